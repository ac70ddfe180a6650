"""Weights in files of any origin: found under any name and wrapper, and told apart from what is no weight."""
import functools
import json
import pathlib
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel

from common.checkpoint_io import is_checkpoint, load_checkpoint
from common.errors import ArgumentError, UserError
from common.state_dicts import check_finite, load_weights, select_weights, unwrap_state_dict
from networks import build_dit
from tiny_models import TINY_MODEL, random_weights


def random_model(seed=3):
    return random_weights(build_dit(**TINY_MODEL), seed)


EMA, RAW = random_model(1), random_model(2)
ONE, TWO = EMA.state_dict(), RAW.state_dict()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def prefixed(state_dict, prefix):
    return {prefix + name: value for name, value in state_dict.items()}


def dotless(state_dict, prefix):
    """As latent diffusion's LitEma names what it averages: trained weights alone, without dots."""
    return {prefix + name.replace(".", ""): value for name, value in state_dict.items() if name != "pos_embed"}


@pytest.mark.parametrize("stored, kind", [
    (dict(state_dict=ONE, epoch=3), "model"),
    (dict(state_dict=prefixed(ONE, "model."), hyper_parameters={}), "model"),
    (dict(state_dict=prefixed(ONE, "net._orig_mod.") | {"loss.weight": torch.ones(2)}), "model"),
    (dict(module=ONE, optimizer={"state": {}}), "model"),
    (dict(generator=ONE, discriminator={"w": torch.ones(3)}), "model"),
    (dict(ema_model=ONE, model=TWO), "ema"),
    (dict(ema=prefixed(ONE, "module."), model=prefixed(TWO, "_orig_mod.")), "ema"),
    (dict(ema={"n_averaged": torch.tensor(4), **prefixed(ONE, "module.")}), "ema"),
    (dict(ema={"initted": torch.tensor(True), "step": torch.tensor(3), **prefixed(ONE, "ema_model."),
               **prefixed(TWO, "online_model.")}), "ema"),
    (dict(state_dict=prefixed(TWO, "model.") | prefixed(ONE, "model_ema.")), "ema"),
    (dict(checkpoint=dict(model=dict(net=ONE))), "model"),
    (prefixed(ONE, "ema.") | prefixed(TWO, "model."), "ema"), (dict(net=TWO, netEMA=ONE), "ema"),
    (ONE | dict(step=7, args=dict(lr=1e-4)), "bare"),
    (AveragedModel(EMA).state_dict(), "bare"),
    (prefixed(ONE, "_fsdp_wrapped_module."), "bare"),
    (dict(model={}, ema=ONE, opt={"exp_avg": {"x_embedder.proj.weight": torch.ones(1)}}), "ema"),
    ({name.replace("blocks.0.", "blocks.0._orig_mod."): value for name, value in ONE.items()}, "bare"),
    ({name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."): value for name, value in ONE.items()}, "bare"),
    (dict(model=TWO, ema=dict(decay=0.999, optimization_step=9, shadow_params=list(ONE.values()))), "ema"),
    (prefixed(TWO, "model.diffusion_model.") | dotless(ONE, "model_ema.diffusion_model"), "ema"),
    (dict(state_dict=prefixed(TWO, "model.") | dotless(ONE, "model_ema.")
          | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}), "ema"),
    (dict(model=TWO, ema=dict(decay=0.999, shadow_params=[value for name, value in ONE.items()
                                                         if name != "pos_embed"])), "ema"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_weights_are_found_under_any_name(stored, kind):
    weights, found = select_weights(stored, "x.pt")
    assert found == kind and equal(weights, ONE)


@pytest.mark.parametrize("weights, expected", [("ema", ONE), ("model", TWO), (None, ONE)])
@pytest.mark.parametrize("stored", [dict(model=TWO, ema=ONE), prefixed(TWO, "model.") | prefixed(ONE, "ema.")])
def test_raw_weights_and_average_can_be_chosen(weights, expected, stored):
    assert equal(select_weights(stored, "x.pt", weights)[0], expected)


@pytest.mark.parametrize("stored, weights", [(dict(model=TWO), "ema"), (dict(ema=ONE), "model"), (ONE, "ema")])
def test_weights_that_are_not_there_are_an_argument_error(stored, weights):
    with pytest.raises(ArgumentError) as caught:
        select_weights(stored, "x.pt", weights)
    assert caught.value.arguments == dict(weights=weights)


def test_an_average_that_cannot_be_read_is_told():
    lines = []
    stored = dict(model=TWO, ema=dict(decay=0.999, shadow_params=list(ONE.values())[1:-1]))
    weights, kind = select_weights(stored, "x.pt", log=lines.append)
    assert kind == "model" and equal(weights, TWO) and "'shadow_params'" in lines[0]


def test_which_of_several_models_is_taken_is_told():
    lines = []
    weights, kind = select_weights(prefixed(ONE, "student.") | prefixed(TWO, "teacher."), "x.pt", log=lines.append)
    assert kind == "model" and equal(weights, ONE)
    assert len(lines) == 1 and "'student'" in lines[0] and "'teacher'" in lines[0]
    select_weights(dict(model=ONE, ema=TWO), "x.pt", log=lines.append)
    assert len(lines) == 1


def test_a_state_dictionary_alone_in_a_list_is_read(tmp_path):
    torch.save([ONE], tmp_path / "x.pt")
    assert equal(select_weights(load_checkpoint(str(tmp_path / "x.pt")), "x.pt")[0], ONE)
    torch.save([ONE, TWO], tmp_path / "two.pt")
    with pytest.raises(UserError):
        select_weights(load_checkpoint(str(tmp_path / "two.pt")), "two.pt")


def test_a_file_without_weights_names_its_keys():
    with pytest.raises(UserError, match=r"x\.pt holds no weights.*'epoch', 'history'"):
        select_weights(dict(epoch=3, history=[1]), "x.pt")


def test_prefixes_are_taken_off_a_training_state_too():
    model = random_model()
    load_weights(model, unwrap_state_dict(prefixed(ONE, "module._orig_mod.")), "x.pt")
    assert equal(model.state_dict(), ONE)


def test_the_table_of_positions_is_filled_in():
    model = random_model()
    positions = model.pos_embed.clone()
    load_weights(model, {name: value for name, value in ONE.items() if name != "pos_embed"}, "x.pt")
    assert torch.equal(model.pos_embed, positions) and torch.equal(model.final_layer.linear.bias,
                                                                   ONE["final_layer.linear.bias"])


@pytest.mark.parametrize("convert", [lambda value: value.to(torch.int8), lambda value: value > 0])
def test_weights_that_are_no_floats_are_refused(convert):
    with pytest.raises(UserError, match="no floating-point numbers"):
        load_weights(random_model(), ONE | {"final_layer.linear.bias": convert(ONE["final_layer.linear.bias"])}, "x.pt")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.0])
def test_non_finite_weights_are_named(dtype, value):
    state = {"a": torch.ones(2, dtype=dtype), "b": torch.tensor([1.0, value]).to(dtype)}
    if value == 1:
        check_finite(state, "x.pt")
        return
    with pytest.raises(UserError, match=r"x\.pt.*\(b\)"):
        check_finite(state, "x.pt")


# ---------------------------------------------------------------- files

@pytest.mark.parametrize("name", ["x.pt", "x.bin", "x.ckpt", "X.PT", "x", "x.SafeTensors", "x.weights"])
def test_a_checkpoint_is_known_by_its_content(tmp_path, name):
    path = tmp_path / name
    old_format = functools.partial(torch.save, _use_new_zipfile_serialization=False)
    for save in (torch.save, save_file, old_format):
        save({"w": torch.ones(2)}, path)
        if name != "x.SafeTensors" or save is save_file:
            assert is_checkpoint(str(path)) and torch.equal(load_checkpoint(str(path))["w"], torch.ones(2))


def test_other_files_are_no_checkpoints(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.ones(2))
    (tmp_path / "x.json").write_text("{}")
    (tmp_path / "folder.d").mkdir()
    assert not any(is_checkpoint(str(path)) for path in [*tmp_path.iterdir(), "digits", "absent"])
    assert is_checkpoint("absent.PTH")  # so that an error can say that it is absent


@pytest.mark.parametrize("content, word", [
    (b"", "empty"), (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    (b"<!DOCTYPE html><html>", "web page"), (b"\n<HTML>", "web page"), (b"\x1f\x8b\x08", "compressed"),
    (b'{"a": 1}', "JSON"), (bytes(range(256)) * 9, "not a checkpoint")])
def test_a_file_that_is_none_is_told_apart(tmp_path, content, word):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UserError, match=rf"x\.pt .*{word}"):
        load_checkpoint(str(tmp_path / "x.pt"))


def test_an_npz_and_an_archive_are_told_apart(tmp_path):
    with open(tmp_path / "x.pt", "wb") as file:
        np.savez(file, a=np.ones(2))
    with pytest.raises(UserError, match="npz"):
        load_checkpoint(str(tmp_path / "x.pt"))
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("model.pt", b"0")
    with pytest.raises(UserError, match="archive"):
        load_checkpoint(str(tmp_path / "x.pt"))


@pytest.mark.parametrize("value, name", [
    (pathlib.PurePosixPath("a"), "pathlib"), (np.float64(0.1), "numpy"), (np.ones(2), "numpy"),
    (zipfile.ZipInfo("a"), "zipfile.ZipInfo")])
@pytest.mark.parametrize("zipped", [True, False])
def test_the_type_that_is_refused_is_named(tmp_path, value, name, zipped):
    torch.save(dict(model=ONE, args=dict(a=value)), tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=rf"refused: it holds .*{name}"):
        load_checkpoint(str(tmp_path / "x.pt"))


@pytest.fixture
def shards(tmp_path):
    """Two files that hold a model together, and their index."""
    names = list(ONE)
    files = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, own in files.items():
        save_file({name: ONE[name].contiguous() for name in own}, tmp_path / file)
    index = dict(metadata={}, weight_map={name: file for file, own in files.items() for name in own})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
                                  "model.safetensors.index.json"])
def test_a_model_in_several_files_is_read_from_any_of_them(shards, name):
    assert is_checkpoint(str(shards / name)) and equal(load_checkpoint(str(shards / name)), ONE)
    (shards / "model-00002-of-00002.safetensors").rename(shards / "away")
    if name != "model-00002-of-00002.safetensors":
        with pytest.raises(UserError, match=r"2 files .*model-00002-of-00002\.safetensors is not there"):
            load_checkpoint(str(shards / name))


@pytest.mark.parametrize("text", ["{}", "{", '{"weight_map": 3}', '{"weight_map": {"a": "../x.pt"}}',
                                  '{"weight_map": {"a": 3}}', '{"weight_map": {}}'])
def test_an_index_without_files_is_an_error(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match="weight_map"):
        load_checkpoint(str(tmp_path / "model.safetensors.index.json"))


def test_folders_are_told_apart_and_only_files_that_exist_are_named(tmp_path):
    def error(*names):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        folder.mkdir(exist_ok=True)
        with pytest.raises(UserError) as caught:
            load_checkpoint(str(folder))
        return str(caught.value)

    assert "diffusers" in error("model_index.json", "transformer/config.json")
    assert "diffusers" in error("config.json", "diffusion_pytorch_model.safetensors")
    assert "dcp_to_torch" in error(".metadata", "__0_0.distcp")
    assert "0000200.pt" in error("checkpoints/0000100.pt", "checkpoints/0000200.pt")
    assert "model.safetensors" in error("model.safetensors")
    assert "holds no checkpoint" in error()
