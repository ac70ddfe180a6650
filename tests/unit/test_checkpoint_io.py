"""Checkpoint files: complete or absent, and read without executing code in them."""
import argparse
import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from common.checkpoint_io import latest_checkpoint, load_checkpoint, save_checkpoint
from common.errors import UserError
from common.state_dicts import load_weights, select_weights
from run_files import Payload


def fails_half_way(error):
    def save(state, file):
        file.write(b"half")
        raise error
    return save


@pytest.mark.parametrize("error", [RuntimeError("disk full"), OSError(28, "No space left on device")])
def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch, error):
    path = tmp_path / "0000001.pt"
    save_checkpoint(str(path), dict(step=1))
    before = path.read_bytes()
    monkeypatch.setattr(torch, "save", fails_half_way(error))
    with pytest.raises(UserError, match=r"0000001\.pt"):
        save_checkpoint(str(path), dict(step=2))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["0000001.pt"]


def test_an_interrupted_save_cannot_be_taken_for_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", fails_half_way(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(str(tmp_path / "checkpoints" / "0000001.pt"), dict(step=1))
    assert latest_checkpoint(str(tmp_path)) is None


def test_a_save_makes_the_folder_and_replaces_the_file(tmp_path):
    path = str(tmp_path / "results" / "checkpoints" / "0000001.pt")
    for step in (1, 2):
        save_checkpoint(path, dict(step=step))
        assert load_checkpoint(path) == dict(step=step)
    assert os.listdir(os.path.dirname(path)) == ["0000001.pt"]


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        save_checkpoint(str(tmp_path / "file" / "0000001.pt"), {})


def test_tensors_and_plain_values_are_loaded(tmp_path):
    path = str(tmp_path / "x.pt")
    state = dict(model={"w": torch.arange(3.0)}, step=7, args=dict(lr=1e-4, names=["a", None], on=True))
    torch.save(state, path)
    loaded = load_checkpoint(path)
    assert torch.equal(loaded["model"].pop("w"), state["model"].pop("w"))
    assert loaded == state


def test_the_namespace_of_published_checkpoints_is_loaded(tmp_path):
    path = str(tmp_path / "x.pt")
    torch.save(dict(args=argparse.Namespace(model="DiT-XL/2", image_size=256)), path)
    assert vars(load_checkpoint(path)["args"]) == dict(model="DiT-XL/2", image_size=256)


def test_safetensors_are_loaded(tmp_path):
    path = str(tmp_path / "x.safetensors")
    save_file({"w": torch.arange(3.0)}, path)
    assert torch.equal(load_checkpoint(path)["w"], torch.arange(3.0))


@pytest.mark.parametrize("wrap", [lambda payload: payload, lambda payload: dict(model={}, args=payload),
                                  lambda payload: dict(args=argparse.Namespace(model=payload))])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_not_executed(tmp_path, wrap, zipped):
    path, touched = str(tmp_path / "evil.pt"), tmp_path / "touched"
    torch.save(wrap(Payload(touched)), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"evil\.pt was refused"):
        load_checkpoint(path)
    assert not touched.exists()


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
@pytest.mark.parametrize("damage", [
    lambda raw: raw[: len(raw) // 2], lambda raw: raw[:-9], lambda raw: b"", lambda raw: b"no checkpoint",
], ids=["half", "end", "empty", "garbage"])
def test_a_damaged_file_is_an_error_of_one_line(tmp_path, name, damage):
    path = tmp_path / name
    state = {"w": torch.arange(100.0)}
    save_file(state, path) if name == "x.safetensors" else torch.save(state, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError) as caught:
        load_checkpoint(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_errors(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(UserError, match=str(path)):
            load_checkpoint(str(path))


ONE, TWO = {"w": torch.ones(1)}, {"w": torch.zeros(1)}


@pytest.mark.parametrize("stored, expected", [(dict(model=TWO, ema=ONE, step=3), "ema"), (dict(ema=ONE), "ema"),
                                           (dict(model=ONE, opt={}), "model"), (ONE, "bare")])
def test_ema_comes_before_model_before_bare_weights(stored, expected):
    weights, kind = select_weights(stored, "x.pt")
    assert kind == expected
    assert weights.keys() == {"w"} and weights["w"] == 1


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: dict(model=state), lambda state: dict(ema=state)])
def test_prefixes_of_wrappers_are_taken_off(prefix, wrap):
    state = {f"{prefix}blocks.0.module.w": torch.ones(1), f"{prefix}b": torch.ones(1)}
    assert select_weights(wrap(state), "x.pt")[0].keys() == {"blocks.0.module.w", "b"}


@pytest.mark.parametrize("stored", [{}, dict(step=3), dict(model=None), [torch.ones(1)], torch.ones(1),
                                    dict(w=torch.ones(1), step=3)])
def test_a_checkpoint_without_weights_is_an_error(stored):
    with pytest.raises(UserError, match=r"x\.pt holds no weights"):
        select_weights(stored, "x.pt")


def test_weights_that_fit_are_loaded():
    model = nn.Linear(2, 3)
    state = {name: torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}
    load_weights(model, state, "x.pt")
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("change, sentence", [
    (lambda state: state.pop("bias"), "missing: bias"),
    (lambda state: state.update(bias=3), "bias None instead of"),
    (lambda state: state.update(gate=torch.ones(1)), "unknown: gate"),
    (lambda state: state.update(weight=torch.ones(3, 4)), r"weight \(3, 4\) instead of \(3, 2\)"),
])
def test_weights_that_do_not_fit_are_named_and_not_loaded(change, sentence):
    model = nn.Linear(2, 3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {name: torch.randn(tensor.shape) for name, tensor in before.items()}
    change(state)
    with pytest.raises(UserError, match=rf"(?s)x\.pt.*{sentence}"):
        load_weights(model, state, "x.pt")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_latest_checkpoint_has_the_highest_step(tmp_path):
    assert latest_checkpoint(str(tmp_path)) is None
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    assert latest_checkpoint(str(tmp_path)) is None
    for name in ("12000000.pt", "0000200.pt", "9000000.pt", "13000000.pt.77.tmp", "13000000.pt.bak",
                 "best14000000.pt", "99000000.safetensors", "last.pt"):
        (folder / name).touch()
    assert latest_checkpoint(str(tmp_path)) == str(folder / "12000000.pt")
