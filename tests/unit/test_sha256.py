"""SHA-256 of files, weights and values."""
import hashlib

import torch
from torch import nn

from common.files import sha256_file, sha256_json, sha256_weights


def test_hash_of_a_file_is_that_of_its_blocks(tmp_path):
    content = bytes(range(256)) * 10
    (tmp_path / "file").write_bytes(content)
    sizes = []
    assert sha256_file(tmp_path / "file", block=1000, on_block=sizes.append) == hashlib.sha256(content).hexdigest()
    assert sizes == [1000, 1000, 560]


def test_hash_of_weights_depends_on_values_names_and_order():
    torch.manual_seed(0)
    one, two = nn.BatchNorm2d(3), nn.Linear(2, 2)
    first = sha256_weights(one, two)
    assert first == sha256_weights(one, two) and len(first) == 64
    others = [sha256_weights(one), sha256_weights(two)]
    with torch.no_grad():
        two.weight[1, 1] = torch.nextafter(two.weight[1, 1], torch.tensor(9.0))
    others.append(sha256_weights(one, two))
    one.running_mean[0] = 1
    others.append(sha256_weights(one, two))
    assert len({first, *others}) == 5


def test_hash_of_a_value_does_not_depend_on_the_order_of_keys():
    assert sha256_json(dict(a=1, b=[2.5])) == sha256_json(dict(b=[2.5], a=1))
    assert sha256_json(dict(a=1)) != sha256_json(dict(a=2))
