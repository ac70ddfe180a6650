"""Command lines: published flags and defaults are frozen; an error names its argument and has exit status 2."""
import argparse
import importlib
import re

import pytest
import torch

from common.cli import ReadOnlyFlags, add_alias, parse_args
from common.errors import MINIMUM_VERSIONS, UserError, check_versions
from helpers import DIGITS, ROOT, TINY, run_process
from networks import build_dit, model_config
from sampling import load_model

PUBLISHED_FLAGS = {
    "train": dict(data_path=None, results_dir="results", model="DiT-XL/2", image_size=256, num_classes=1000,
                  epochs=1400, global_batch_size=256, global_seed=0, vae="ema", num_workers=4, log_every=100,
                  ckpt_every=50000),
    "sample": dict(model="DiT-XL/2", vae="mse", image_size=256, num_classes=1000, cfg_scale=4.0, num_sampling_steps=250,
                   seed=0, ckpt=None),
    "sample_ddp": dict(model="DiT-XL/2", vae="ema", sample_dir="samples", per_proc_batch_size=32,
                       num_fid_samples=50000, image_size=256, num_classes=1000, cfg_scale=1.5, num_sampling_steps=250,
                       global_seed=0, tf32=True, ckpt=None),
}
PAPER_DEFAULTS = dict(lr=1e-4, ema_decay=[0.9999], class_dropout_prob=0.1, grad_accum_steps=1, max_grad_norm=None,
                      schedule_sampler="uniform", max_steps=None, sample_every=None, resume=None, features_path=None,
                      cache_on_device=False, fast=False, precision="tf32", compile=False, cuda_graphs=False,
                      attention="auto", fused_adamw=False, grad_checkpointing=0.0, max_bad_images=0,
                      conditioning="adaln-zero", fsdp=None)


@pytest.mark.parametrize("name", PUBLISHED_FLAGS)
def test_published_flags_keep_their_defaults(name):
    parser = importlib.import_module(name).build_parser()
    assert {flag: parser.get_default(flag) for flag in PUBLISHED_FLAGS[name]} == PUBLISHED_FLAGS[name]


def test_defaults_are_the_papers():
    parser = importlib.import_module("train").build_parser()
    assert {flag: parser.get_default(flag) for flag in PAPER_DEFAULTS} == PAPER_DEFAULTS


def test_plan_and_train_have_the_same_defaults():
    plan, train = importlib.import_module("tools.plan").build_parser(), importlib.import_module("train").build_parser()
    different = {"help", "flip"}  # flips are those of the cache
    shared = ({action.dest for action in plan._actions} & {action.dest for action in train._actions}) - different
    assert shared >= {"model", "image_size", "num_classes", "vae", "global_batch_size", "grad_accum_steps", "precision",
                      "grad_checkpointing", "fused_adamw", "depth", "hidden_size", "num_heads", "patch_size"}
    assert {flag: plan.get_default(flag) or None for flag in shared} == {
        flag: train.get_default(flag) or None for flag in shared}
    assert {flag: plan.get_default(flag) for flag in ("images", "steps", "gpu", "gpus", "mfu", "memory_share")} == dict(
        images=1_281_167, steps=[400_000, 7_000_000], gpu="h100", gpus=1, mfu=0.45, memory_share=0.9)


@pytest.mark.parametrize("name", ["train", "sample", "sample_ddp", "extract_features", "download", "tools.score_digits",
                                  "tools.plan", "tools.train_classifier"])
def test_every_flag_has_a_help_text(run_ok, name):
    out = run_ok(name, "--help")
    parser = importlib.import_module(name).build_parser()
    assert [action.dest for action in parser._actions if not action.help] == []
    assert ("(default: 256)" in out) == (name not in ("download", "tools.score_digits"))


@pytest.mark.parametrize("flags, named", [
    (["--data-path", "nowhere"], "--data-path nowhere:"),
    ([*DIGITS, "--image-size", "256"], "--image-size 256:"),
    ([*DIGITS, "--num-classes", "9"], "--num-classes 9:"),
    ([*DIGITS, "--global-batch-size", "2000"], "--global-batch-size 2000:"),
    ([*DIGITS, "--grad-accum-steps", "3"], "--global-batch-size 8"),
    ([*DIGITS, "--patch-size", "3"], "--model DiT-S/2"),
    ([*DIGITS, "--num-heads", "5"], "num_heads"),
    ([*DIGITS, "--hidden-size", "18"], "multiple of 4"),
    ([*DIGITS, "--resume", "gone.pt"], "--resume gone.pt:"),
    ([*DIGITS, "--keep-every", "5"], "--keep-every 5:"),
    ([*DIGITS, "--features-in-memory"], "--cache-on-device:"),
    ([*DIGITS, "--ema-decay", "1"], "--ema-decay: "),
    ([*DIGITS, "--ema-decay", "1.5"], "--ema-decay: 1.5 "),
    ([*DIGITS, "--lr", "-1"], "--lr: -1 "),
    ([*DIGITS, "--epochs", "0"], "--epochs: 0 "),
    ([*DIGITS, "--epochs", "x"], "--epochs: invalid number value: 'x'"),
    ([*DIGITS, "--model", "DiT-M/2"], "--model: invalid choice: 'DiT-M/2'"),
    ([*DIGITS, "--features-path", "x"], "--features-path: not allowed with argument --data-path"),
    ([*DIGITS, "--keep-checkpoints", "0"], "--keep-checkpoints: 0 "),
    ([*DIGITS, "--max-loss-spike", "-1"], "--max-loss-spike: -1 "),
    ([*DIGITS, "--timeout", "1e15"], "--dist-timeout: 1e15 minutes"),
    ([*DIGITS, "--max-bad-steps", "x"], "--max-bad-steps: invalid number value: 'x'"),
    ([*DIGITS, "--eval-cfg-scale", "0.5"], "--eval-cfg-scale: "),
    ([*DIGITS, "--ema-decay", "0.9", "0.5", "0.5"], "--ema-decay 0.9 0.5 0.5"),
    ([*DIGITS, "--fsdp"], "--fsdp all: a single process"),
    ([*DIGITS, "--fsdp", "zero"], "--fsdp: invalid choice: 'zero'"),
    ([], "--data-path --features-path"),
])
def test_train_names_the_argument_that_does_not_fit(run_error, tmp_path, flags, named):
    assert named in run_error("train", *flags, "--results-dir", tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_errors_of_image_folders_name_file_or_argument(run_error, image_folder, vae_folder, tmp_path):
    flags = ["--image-size", 32, "--num-classes", 3, "--vae", "none", *TINY, "--global-batch-size", 2,
             "--num-workers", 0, "--results-dir", tmp_path / "results"]
    (tmp_path / "data" / "empty").mkdir(parents=True)
    err = run_error("train", "--data-path", tmp_path / "data", *flags)
    assert "--data-path" in err and "empty" in err
    (tmp_path / "data" / "empty" / "broken.png").write_bytes(b"no picture")
    (tmp_path / "data" / "empty" / "broken2.png").write_bytes(b"")
    assert re.search(r"broken2?\.png", run_error("train", "--data-path", tmp_path / "data", *flags))
    err = run_error("train", "--data-path", image_folder, *flags, "--vae", vae_folder, "--image-size", 30)
    assert "--image-size 30:" in err
    err = run_error("train", "--data-path", image_folder, *flags, "--vae", tmp_path)
    assert "--vae" in err and "config.json" in err


def test_classes_without_images_give_a_warning(run_ok, tmp_path):
    """The published default of 1000 classes is accepted for smaller data."""
    out = run_ok("train", *DIGITS, "--num-classes", 12, "--max-steps", 1, "--results-dir", tmp_path)
    assert "WARNING" in out and "10 .. 11" in out


@pytest.fixture(scope="module")
def plain_checkpoint(tmp_path_factory):
    """A checkpoint as train.py writes it, of a model without a null class."""
    model = build_dit(input_size=8, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=10,
                      class_dropout_prob=0)
    path = tmp_path_factory.mktemp("plain") / "0000001.pt"
    torch.save(dict(ema=model.state_dict(), config=dict(model=model_config(model), image_channels=1), step=1,
                    args=dict(model="DiT-S/2", image_size=8, num_classes=10, vae="none")), path)
    return path


@pytest.mark.parametrize("flags, named", [
    (["--cfg-scale", "0.5"], "argument --cfg-scale: "),
    (["--num-sampling-steps", "many"], "argument --num-sampling-steps: invalid number value: 'many'"),
    (["--cfg-interval", "3", "1000"], "argument --cfg-interval: timesteps are 0 .. 999, not 1000"),
    (["--cfg-scale", "2"], "--cfg-scale 2:"),
    (["--cfg-channels", "2"], "--cfg-channels 2:"),
    (["--cfg-interval", "300", "200"], "--cfg-interval 300 200:"),
    (["--class-labels", "10"], "--class-labels 10:"),
    (["--class-labels", "-1"], "--class-labels -1:"),
    (["--class-labels", "ostrich"], "--class-labels ostrich:"),
    (["--num-sampling-steps", "2000"], "--num-sampling-steps 2000:"),
    (["--num-sampling-steps", "ddim600"], "--num-sampling-steps ddim600:"),
    (["--eta", "0.5"], "--eta 0.5:"),
    (["--image-size", "256"], "--image-size 256:"),
    (["--model", "DiT-B/2"], "--model DiT-B/2:"),
    (["--ema-decay", "0.5"], "--ema-decay 0.5:"),
    (["--output", "nowhere/x.png"], "--output nowhere/x.png:"),
    (["--output", "x.docx"], "--output x.docx:"),
    (["--output", "x.gif", "--trajectory"], "--output x.gif, --trajectory:"),
])
def test_sample_names_the_argument_that_does_not_fit(run_error, plain_checkpoint, tmp_path, monkeypatch, flags, named):
    monkeypatch.chdir(tmp_path)
    unguided = [] if "--cfg-scale" in flags else ["--cfg-scale", 1]
    steps = [] if "--num-sampling-steps" in flags else ["--num-sampling-steps", 2]
    assert named in run_error("sample", "--ckpt", plain_checkpoint, *unguided, *steps, *flags)
    assert not list(tmp_path.iterdir())


def test_unguided_model_samples_at_scale_1(run_ok, plain_checkpoint, tmp_path):
    run_ok("sample", "--ckpt", plain_checkpoint, "--cfg-scale", 1, "--num-sampling-steps", 2, "--output",
           tmp_path / "x.png")


def test_wrong_checkpoints_are_errors(run_error, tmp_path):
    assert "there is no checkpoint file" in run_error("sample", "--ckpt", tmp_path / "gone.pt")
    assert f"{tmp_path} is a folder" in run_error("sample", "--ckpt", tmp_path)
    (tmp_path / "text.pt").write_text("hello")
    assert "text.pt" in run_error("sample_ddp", "--ckpt", tmp_path / "text.pt")
    model = build_dit(input_size=8, hidden_size=16, depth=1, num_heads=2, num_classes=10)
    torch.save(model.state_dict(), tmp_path / "small.pt")
    err = run_error("sample", "--ckpt", tmp_path / "small.pt", "--model", "DiT-S/8", "--vae", "none", "--image-size", 8)
    assert "small.pt do not fit this model" in err
    assert "--model DiT-B/4, --image-size 256, --num-classes 1000:" in run_error("sample", "--model", "DiT-B/4")


def test_without_a_network_the_error_names_address_and_place(run_error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load_model, "PUBLISHED_URL", "http://127.0.0.1:9/")
    err = run_error("sample", "--image-size", 256)
    assert "http://127.0.0.1:9/DiT-XL-2-256x256.pt" in err
    assert str(tmp_path / "pretrained_models" / "DiT-XL-2-256x256.pt") in err


def test_an_error_of_all_ranks_is_printed_once(tmp_path):
    done = run_process("train.py", *DIGITS, "--global-batch-size", 9, "--results-dir", tmp_path, processes=2,
                       check=False)
    assert done.returncode != 0
    assert done.stderr.count("--global-batch-size 9") == 1 and "terminate called" not in done.stderr


def test_minimum_versions_are_those_of_requirements_txt(monkeypatch):
    required = dict(re.findall(r"^([\w-]+)>=([\d.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    assert {package: required[package] for package in MINIMUM_VERSIONS} == MINIMUM_VERSIONS
    monkeypatch.setitem(MINIMUM_VERSIONS, "timm", "99.1")
    with pytest.raises(UserError, match=r"timm \S+ is installed, 99\.1 or later is needed"):
        check_versions()


def toy_parser():
    parser = argparse.ArgumentParser()
    parser.add_argument("--label-distribution", choices=["uniform", "balanced"], default="uniform")
    parser.add_argument("--steps", type=int, default=1)
    add_alias(parser, "--labels", "--label-distribution")
    return parser


def test_a_former_name_of_a_flag_works_and_is_not_shown():
    flags, explicit_args = parse_args(toy_parser(), argv=["--labels", "balanced"])
    assert flags.label_distribution == "balanced" and explicit_args == {"label_distribution"}
    assert "--labels" not in toy_parser().format_help()


def test_presets_replace_defaults_and_not_explicit_arguments():
    presets = dict(steps=5, label_distribution="balanced")
    flags, explicit_args = parse_args(toy_parser(), lambda flags, explicit_args: presets, ["--steps", "1"])
    assert (flags.steps, flags.label_distribution, explicit_args) == (1, "balanced", {"steps"})


def test_locked_flags_cannot_be_changed():
    flags = ReadOnlyFlags(steps=1)
    flags.is_locked = True
    with pytest.raises(AttributeError, match="steps"):
        flags.steps = 2
    assert vars(flags) == dict(steps=1)
