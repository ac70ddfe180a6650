"""Checkpoints that others wrote: sampled if they are a DiT's, refused by name if not, and never by a traceback."""
import argparse
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from common.errors import ArgumentError, UserError
from helpers import DIGITS
from networks import build_dit, model_config
from run_files import pixels, stored
from sampling.load_model import load_model
from tiny_models import random_weights

FEW = ["--num-sampling-steps", "ddim2", "--cfg-scale", 1.5]


def foreign_model(seed=0, **config):
    """A model of the width of DiT-S/8 with a single block, on images of 16 pixels with three classes."""
    model = build_dit("DiT-S/8", depth=1, input_size=16, in_channels=3, num_classes=3, **config)
    return random_weights(model, seed, scale=0.05)


WEIGHTS = foreign_model().state_dict()
ARGS = dict(image_size=16, num_classes=3, vae="ema")


def load(path, *typed, log=lambda line: None, weights=None, **flags):
    """Load a checkpoint with flags of sample.py, the names of which are typed."""
    flags = dict(model="DiT-XL/2", image_size=256, num_classes=1000, vae="none") | flags
    return load_model(str(path), *flags.values(), {*typed}, "cpu", weights=weights, log=log)


@pytest.fixture
def save(tmp_path):
    def save(content, name="x.pt"):
        torch.save(content, tmp_path / name)
        return tmp_path / name
    return save


# ---------------------------------------------------------------- sizes

def test_bare_weights_need_no_flag(save):
    loaded = load(save(WEIGHTS))
    assert (loaded.name, loaded.image_size, loaded.num_classes) == ("DiT (depth 1, width 384, patch size 8)", 16, 3)
    assert model_config(loaded.model) == model_config(foreign_model())


@pytest.mark.parametrize("wrong", [dict(num_classes=1000), dict(num_classes=-3), dict(num_classes=10**11),
                                   dict(image_size=256), dict(image_size="16 x 16"), dict(model="DiT-B/8"),
                                   dict(num_classes=torch.tensor(3)), dict(image_size=16.0), dict(num_classes="3")])
@pytest.mark.parametrize("namespace", [argparse.Namespace, dict])
def test_sizes_come_from_the_weights(save, wrong, namespace):
    """With true values typed and without; each stored value that is wrong is told once."""
    path, lines = save(dict(model=WEIGHTS, ema=WEIGHTS, opt={}, args=namespace(**ARGS | wrong))), []
    for typed in ((), ("image_size", "num_classes")):
        lines.clear()
        loaded = load(path, *typed, log=lines.append, **dict(image_size=16, num_classes=3) if typed else {})
        assert (loaded.image_size, loaded.num_classes, loaded.weights) == (16, 3, "ema")
    (value,) = wrong.values()
    is_true = value in (3, 16, "3") if not isinstance(value, str) else value == "3"
    said = [line for line in lines if next(iter(wrong)) in line]
    assert len(said) == (0 if is_true or ("image_size" in wrong and typed and value == 256) else 1)


@pytest.mark.parametrize("name, value", [("num_classes", 5), ("image_size", 32), ("model", "DiT-B/8")])
def test_a_typed_flag_that_contradicts_the_weights_is_named(save, name, value):
    for content in (WEIGHTS, dict(ema=WEIGHTS, args=argparse.Namespace(**ARGS))):
        with pytest.raises(ArgumentError) as caught:
            load(save(content), name, **{name: value})
        assert caught.value.arguments == {name: value}


@pytest.mark.parametrize("rows, typed, null", [(3, 3, False), (4, 3, True), (4, 4, False)])
def test_the_class_table_tells_whether_there_is_a_null_class(save, rows, typed, null):
    config = dict(class_dropout_prob=0.0) if rows == 3 else {}
    loaded = load(save(foreign_model(**config).state_dict()), "num_classes", num_classes=typed)
    assert loaded.num_classes == typed and loaded.model.has_null_condition == null


def test_stored_configuration_that_contradicts_the_weights_is_corrected(save):
    config = model_config(foreign_model()) | dict(depth=7, num_classes=10)
    lines = []
    loaded = load(save(dict(ema=WEIGHTS, config=dict(model=config), args=ARGS)), log=lines.append)
    assert model_config(loaded.model) == model_config(foreign_model()) and "depth is 1, not 7" in lines[0]


def test_unknown_heads_are_an_error_and_stored_ones_are_taken(save):
    weights = random_weights(build_dit(input_size=8, hidden_size=16, depth=1, num_heads=2, in_channels=3)).state_dict()
    with pytest.raises(UserError, match="heads"):
        load(save(weights))
    assert load(save(dict(model=weights, args=dict(num_heads=2)))).model.num_heads == 2
    with pytest.raises(UserError, match="heads is 3"):
        load(save(dict(model=weights, args=dict(num_heads=3))))


def test_a_missing_table_of_positions_is_computed(save):
    lines = []
    loaded = load(save({name: value for name, value in WEIGHTS.items() if name != "pos_embed"}), "image_size",
                  image_size=16, log=lines.append)
    assert torch.equal(loaded.model.pos_embed, build_dit(**model_config(loaded.model)).pos_embed)
    assert any("pos_embed" in line for line in lines)


def test_a_vae_of_other_channels_is_refused_before_it_is_fetched(save):
    with pytest.raises(ArgumentError) as caught:
        load(save(WEIGHTS), vae="mse")
    assert caught.value.arguments == dict(vae="mse")


# ---------------------------------------------------------------- values

ODD = [dict(config="configs/a.yaml"), dict(config=["a"]), dict(config=None), dict(args=["a"]), dict(args=None),
       dict(step="0080000"), dict(step=[1]), dict(step=torch.tensor(5)), dict(step=-1), dict(step=float("nan")),
       dict(step=5.0), dict(step=10**400), dict(step=True), dict(step=torch.ones(3)), dict(global_step=7),
       dict(config=dict(class_names=5)), dict(config=dict(class_names=[1, 2, 3])), dict(config=dict(class_names=[])),
       dict(config=dict(class_names=["a"] * 9)), dict(config=dict(class_names=["a", None, "c"])),
       dict(config=dict(image_channels="x")), dict(args=dict(vae=None)), dict(args=dict(vae=["ema"])),
       dict(args=dict(ema_decay=torch.tensor(0.999))), dict(args=dict(ema_decay="0.999")),
       dict(args=dict(ema_decay=[])), dict(args=dict(ema_decay=1.0)),
       dict(args=dict(ema_decay=[0.9, None])), dict(args=dict(model=3)),
       dict(extra_emas=[1]), dict(extra_emas={1: 2}), dict(opt=3), dict(config=dict(model=dict(num_heads="6"))),
       dict(config=dict(model=dict(num_heads=6, input_size=[16, "a"]))),
       dict(config=dict(model=dict(num_heads=6, class_dropout_prob="much", num_classes=[3]))),
       dict(config=dict(model=["adaln-zero"])), {"config": {3: 4}, 5: 6}]


@pytest.mark.parametrize("entries", ODD, ids=lambda entries: str(entries)[:60])
def test_odd_values_are_converted_or_ignored(save, entries):
    """The record of a picture is JSON; what cannot be used is named."""
    lines = []
    loaded = load(save(dict(model=WEIGHTS, ema=WEIGHTS) | entries), log=lines.append)
    assert json.loads(json.dumps(loaded.metadata())) and loaded.num_classes == 3
    assert loaded.step in (None, 5, 7, 80000) and loaded.ema_decay in (None, pytest.approx(0.999))
    assert loaded.class_names in (None, ["1", "2", "3"])
    with pytest.raises(ArgumentError):
        load_model(loaded.path, "DiT-XL/2", 256, 1000, "none", set(), "cpu", ema_decay=0.5)


def test_numbers_in_other_forms_reach_the_record(save):
    loaded = load(save(dict(ema=WEIGHTS, step="0080000", args=ARGS | dict(ema_decay=torch.tensor([0.5])))))
    assert loaded.metadata()["step"] == 80000 and loaded.metadata()["ema_decay"] == 0.5


# ---------------------------------------------------------------- other models

def refused(path, **flags):
    """Return the error about a checkpoint, met before its VAE is looked at."""
    with pytest.raises(UserError) as caught:
        load(path, vae="no/such/vae", **flags)
    assert not isinstance(caught.value, ArgumentError)
    return str(caught.value)


@pytest.mark.parametrize("name", ["SiT-XL-2-256x256.pt", "sit_xl.pt", "lightningdit-xl-imagenet256-800ep.pt",
                                  "REPA.pt", "repa-e.ckpt", "flow-matching.pt", "ＳｉＴ-XL-2.pt", "U-ViT-H.pth",
                                  "pixart_alpha.pt"])
def test_other_models_are_known_by_the_name_of_the_file(save, name):
    assert "rename" in refused(save(WEIGHTS, name))


@pytest.mark.parametrize("name", ["DiT-XL-2.pt", "transit.pt", "visit-3.pt", "reparametrized.pt", "site.pt",
                                  "flowers.pt"])
def test_names_that_only_contain_such_a_word_are_no_sign(save, name):
    assert load(save(WEIGHTS, name)).num_classes == 3


@pytest.mark.parametrize("flags, named", [
    (dict(path_type="Linear", prediction="velocity"), "flow matching"), (dict(prediction="v"), "flow matching"),
    (dict(zero_terminal_snr=True), "noise schedule"), (dict(loss="l2_v"), "predicts it"),
    (dict(prediction_type="v_prediction"), "flow matching"), (dict(objective="pred_v"), "flow matching"),
    (dict(model="SiT-XL/2", resolution=256), "another model"), (dict(transport=dict(path_type="Linear")), "flow"),
    (dict(parameterization="x0"), "clean"), (dict(predict_xstart=True), "clean"), (dict(prediction="score"), "score"),
    (dict(noise_schedule="squaredcos_cap_v2"), "not linear"), (dict(diffusion_steps=4000), "4000"),
    (dict(train=dict(flow_matching=True)), "flow matching"), ({"path-type": "GVP"}, "flow matching")])
@pytest.mark.parametrize("wrap", [lambda flags: dict(args=argparse.Namespace(**ARGS | flags)),
                                  lambda flags: dict(args=ARGS | flags), lambda flags: dict(hyper_parameters=flags),
                                  lambda flags: dict(config=flags)])
def test_other_processes_are_known_by_the_stored_flags(save, flags, named, wrap):
    assert named in refused(save(dict(model=WEIGHTS) | wrap(flags)))


def test_a_configuration_that_is_text_is_read(save):
    text = "model:\n  model_type: LightningDiT-XL/1\ntransport:\n  path_type: Linear\n"
    assert "LightningDiT" in refused(save(dict(ema=WEIGHTS, config=text)))


@pytest.mark.parametrize("flags", [dict(prediction="noise"), dict(prediction_type="epsilon"), dict(objective="mse"),
                                   dict(noise_schedule="linear"), dict(diffusion_steps="1000"),
                                   dict(predict_xstart=False),
                                   dict(flow_matching=False), dict(path_type=None), dict(loss_type="l2")])
def test_flags_of_this_process_are_no_sign(save, flags):
    assert load(save(dict(model=WEIGHTS, args=ARGS | flags))).num_classes == 3


@pytest.mark.parametrize("names, model", [
    (["projectors.0.0.weight"], "REPA"), (["blocks.0.mlp.w12.weight"], "LightningDiT"),
    (["blocks.0.attn.q_norm.weight"], "LightningDiT"), (["mask_token"], "MDT"),
    (["blocks.0.attn.qkv.lora_A.weight"], "LoRA"), (["t_block.1.weight"], "PixArt")])
def test_other_models_are_known_by_the_names_of_more_weights(save, names, model):
    assert model in refused(save(dict(ema=WEIGHTS | dict.fromkeys(names, torch.ones(2)))))


@pytest.mark.parametrize("names, model", [
    (["transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.weight"], "diffusers"),
    (["input_blocks.0.0.weight"], "U-Net"), (["encoder.conv_in.weight", "decoder.conv_in.weight"], "--vae"),
    (["in_blocks.0.norm1.weight"], "U-ViT"), (["joint_blocks.0.x"], "text-to-image")])
@pytest.mark.parametrize("wrap", [lambda weights: weights, lambda weights: dict(ema=weights),
                                  lambda weights: dict(state_dict=dict(model=weights))])
def test_other_models_are_known_by_the_names_of_their_weights(save, names, model, wrap):
    assert model in refused(save(wrap(dict.fromkeys(names, torch.ones(2)))))


def test_a_model_with_a_vae_beside_it_is_sampled(save):
    """Lightning saves all modules of a training."""
    weights = {f"model.{name}": value for name, value in WEIGHTS.items()}
    weights["vae.encoder.conv_in.weight"] = torch.ones(2)
    assert load(save(dict(state_dict=weights))).weights == "model"


def test_a_variance_that_was_never_trained_gives_a_warning(save):
    """SiT has DiT's shapes and discards the second half of the outputs."""
    weights, lines = {name: value.clone() for name, value in WEIGHTS.items()}, []
    weights["final_layer.linear.weight"].view(64, 2, 3, 384)[:, 1] = 0
    load(save(weights), log=lines.append)
    assert "WARNING" in lines[0] and "SiT" in lines[0]
    lines.clear()
    load(save(WEIGHTS), log=lines.append)
    assert lines == []


def test_a_text_conditional_dit_is_an_error(save):
    for name in ("y_embedder.embedding_table.weight", "x_embedder.proj.weight", "blocks"):
        weights = {key: value for key, value in WEIGHTS.items() if not key.startswith(name)}
        assert "x.pt" in refused(save(weights))
    assert "shape" in refused(save(WEIGHTS | {"x_embedder.proj.weight": torch.ones(384, 192)}))


# ---------------------------------------------------------------- averages and values that are not finite

def test_a_young_average_is_told(save):
    def lines(step, decay, **more):
        said = []
        load(save(dict(ema=WEIGHTS, step=step, args=ARGS | dict(ema_decay=decay)) | more), log=said.append)
        return said

    assert "95%" in lines(500, 0.9999, model=WEIGHTS)[0] and "--weights model" in lines(500, 0.9999, model=WEIGHTS)[0]
    assert "--weights" not in lines(500, 0.9999)[0]
    assert "100%" in lines(0, [0.9, 0.99])[0]
    assert lines(50_000, 0.9999) == lines(500, 0.9) == lines(None, 0.9999) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(save, value):
    spoilt = WEIGHTS | {"blocks.0.mlp.fc1.weight": WEIGHTS["blocks.0.mlp.fc1.weight"].clone()}
    spoilt["blocks.0.mlp.fc1.weight"][0, 0] = value
    with pytest.raises(UserError, match=r"blocks\.0\.mlp\.fc1\.weight") as caught:
        load(save(dict(model=WEIGHTS, ema=spoilt)))
    assert "--weights model" in str(caught.value)
    assert load(save(dict(model=WEIGHTS, ema=spoilt)), weights="model").weights == "model"
    with pytest.raises(UserError) as caught:
        load(save(dict(model=spoilt, ema=spoilt)))
    assert "--weights model" not in str(caught.value)


# ---------------------------------------------------------------- commands

def test_sampling_and_evaluation_read_the_same_files(command, tmp_path):
    """Whatever the file is called; raw weights and average make other pictures."""
    raw = foreign_model(seed=5).state_dict()
    torch.save(dict(model=raw, ema=WEIGHTS, args=ARGS), tmp_path / "weights")
    save_file({name: value.contiguous() for name, value in raw.items()}, tmp_path / "raw.BIN")
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((4, 16, 16, 3), dtype=np.uint8))
    pictures = {}
    for name, flags in (("weights", []), ("weights", ["--weights", "model"]), ("raw.BIN", [])):
        status, _, err = command("sample", "--ckpt", tmp_path / name, "--vae", "none", *FEW, *flags, "--output",
                                 tmp_path / "x.png")
        assert status == 0, err
        pictures[(name, *flags)] = pixels(tmp_path / "x.png").tobytes()
        status, _, err = command("evaluate", "score", tmp_path / name, "--reference", tmp_path / "images.npz", "--vae",
                                 "none", "--features", "pixels", *FEW, *flags, "--num-fid-samples", 4)
        assert status == 0, err
    assert len(set(pictures.values())) == 2


def test_resuming_takes_prefixes_of_wrappers_off(command, tmp_path):
    assert command("train", *DIGITS, "--max-steps", 1, "--results-dir", tmp_path)[0] == 0
    content = stored(tmp_path, 1)
    for part, prefix in (("model", "_orig_mod."), ("ema", "module.")):
        content[part] = {prefix + name: value for name, value in content[part].items()}
    content["ema"]["n_averaged"] = torch.tensor(3)
    torch.save(content, tmp_path / "x.pt")
    status, _, err = command("train", *DIGITS, "--max-steps", 2, "--resume", tmp_path / "x.pt", "--results-dir",
                             tmp_path / "again")
    assert status == 0, err


# ---------------------------------------------------------------- tensors without usable values

@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_sparse_weights_are_read(save):
    sparse = {name: value.to_sparse() if value.ndim == 2 else value for name, value in WEIGHTS.items()}
    loaded = load(save(sparse))
    assert all(torch.equal(value, WEIGHTS[name]) for name, value in loaded.model.state_dict().items())


def test_weights_without_values_are_refused(save):
    with pytest.raises(UserError, match="no values"):
        load(save({name: value.to("meta") for name, value in WEIGHTS.items()}))


@pytest.mark.parametrize("rows", [0, 1])
def test_model_without_a_class_is_refused(save, rows):
    table = "y_embedder.embedding_table.weight"
    with pytest.raises(UserError, match="without classes"):
        load(save(WEIGHTS | {table: WEIGHTS[table][:rows].clone()}))


def test_values_of_one_entry_that_are_no_tensors_are_a_sentence(save):
    with pytest.raises(UserError):
        load(save(dict(model={"weight": torch.zeros(2), "note": "text"})))


def test_unusable_entry_is_named_before_the_autoencoder_is_chosen(save):
    lines = []
    with pytest.raises(ArgumentError):
        load(save(dict(model=WEIGHTS, args=dict(ARGS, vae=5))), log=lines.append, vae="mse")
    assert any("'vae' (5)" in line for line in lines)
