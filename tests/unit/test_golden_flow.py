"""The golden vectors of flow matching: 101 recorded results of the published method are reproduced."""
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torchdiffeq")

import transport

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def vectors():
    """The tool that recorded them; it imports a neighbour, vectors.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(GOLDEN))
        spec = importlib.util.spec_from_file_location("flow_vectors", GOLDEN / "flow_vectors.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
        sys.modules.pop("vectors")


@pytest.fixture(scope="module")
def want():
    with np.load(GOLDEN / "flow.npz") as golden:
        return type("Recorded", (dict,), dict(files=property(list)))(golden)


@pytest.fixture(scope="module")
def got(vectors):
    return vectors.run(21, transport.create_transport, transport.Sampler)


def test_all_flow_vectors_are_reproduced(vectors, got, want):
    assert len(want.files) == 101 and set(got) >= set(want.files)
    worst, broken = vectors.compare(got, want)
    assert not broken
    assert len(worst) == 33 and {group: diff for group, diff in worst.items() if not diff <= TOLERANCE} == {}


@pytest.mark.parametrize("key", ["flow-loss/VP-score/likelihood/loss", "flow-ode/VP-velocity/reverse",
                                 "flow-sde/GVP-velocity/linear"])
def test_control_a_changed_entry_is_reported(vectors, got, want, key):
    worst, _ = vectors.compare(dict(got, **{key: got[key] * 1.001}), want)
    assert [group for group, diff in worst.items() if diff > TOLERANCE] == ["/".join(key.split("/")[:2])]
