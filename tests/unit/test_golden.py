"""The golden vectors: 1,125 recorded results of the published method are reproduced."""
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

import models
from diffusion import create_diffusion

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 2e-5


class Recorded(dict):
    """A copy of the recorded results that a control can change; `files` as in the archive of np.load."""

    @property
    def files(self):
        return list(self)


@pytest.fixture(scope="module")
def vectors():
    spec = importlib.util.spec_from_file_location("golden_vectors", GOLDEN / "vectors.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def want():
    with np.load(GOLDEN / "golden.npz") as golden:
        return Recorded(golden)


@pytest.fixture(scope="module")
def got(vectors):
    return vectors.run(json.loads((GOLDEN / "cases.json").read_text()), models, create_diffusion)


def test_all_golden_vectors_are_reproduced(vectors, got, want):
    assert len(want.files) == 1125 and set(got) == set(want.files)
    worst, broken = vectors.compare(got, want)
    assert not broken
    assert len(worst) == 36 and {group: diff for group, diff in worst.items() if not diff <= TOLERANCE} == {}


@pytest.mark.parametrize("key, group", [
    ("model/base/forward", "model/base"),
    ("sample/eps_range/ddpm", "sample/eps_range"),
    ("diffusion/kl/0/loss_loss", "diffusion/kl"),
])
def test_control_a_changed_entry_is_reported(vectors, got, want, key, group):
    """One entry that is off by a thousandth is reported in its group, and only there."""
    worst, broken = vectors.compare(got, Recorded(want, **{key: want[key] * 1.001}))
    assert not broken
    assert [name for name, diff in worst.items() if diff > TOLERANCE] == [group]


def test_control_a_missing_entry_is_reported(vectors, got, want):
    key = "respace/linear/250/betas"
    _, broken = vectors.compare({name: value for name, value in got.items() if name != key}, want)
    assert broken == [f"missing {key}"]


def test_control_a_renamed_weight_is_reported(vectors, got, want):
    key = "model/base/keys"
    renamed = [name.replace("pos_embed", "position") for name in got[key]]
    _, broken = vectors.compare(dict(got, **{key: np.asarray(renamed)}), want)
    assert len(broken) == 1 and "position" in broken[0]
