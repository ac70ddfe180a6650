"""What users type: the published command lines are frozen, and a mistake gets a sentence and exit status 2."""
import importlib
import re

import pytest
import torch

from common.download import download
from common.errors import MINIMUM_VERSIONS, UserError, check_versions
from helpers import DIGITS, ROOT, TINY, run_process

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
PAPER_DEFAULTS = dict(lr=1e-4, ema_decay=0.9999, class_dropout_prob=0.1, grad_accum_steps=1, max_grad_norm=None,
                      schedule_sampler="uniform", max_steps=None, sample_every=None, resume=None, features_path=None,
                      features_in_memory=False,
                      fast=False, precision="tf32", compile=False, cuda_graphs=False,
                      attention="auto", fused_adamw=False, grad_checkpointing=0.0,
                      max_bad_images=0, conditioning="adaln-zero", fsdp=None)


@pytest.mark.parametrize("name", PUBLISHED_FLAGS)
def test_published_flags_keep_their_defaults(name):
    parser = importlib.import_module(name).build_parser()
    assert {flag: parser.get_default(flag) for flag in PUBLISHED_FLAGS[name]} == PUBLISHED_FLAGS[name]


def test_no_flags_are_the_paper():
    """Whatever train.py can do beside the published flags is off, or the paper's value."""
    parser = importlib.import_module("train").build_parser()
    assert {flag: parser.get_default(flag) for flag in PAPER_DEFAULTS} == PAPER_DEFAULTS


def test_plan_means_what_train_means():
    """Flags of one name have one default, and plan.py's own are the paper's."""
    plan, train = importlib.import_module("tools.plan").build_parser(), importlib.import_module("train").build_parser()
    own = {"help", "flip"}  # flips are those of the cache
    shared = ({action.dest for action in plan._actions} & {action.dest for action in train._actions}) - own
    assert shared >= {"model", "image_size", "num_classes", "vae", "global_batch_size", "grad_accum_steps", "precision",
                      "grad_checkpointing", "fused_adamw", "depth", "hidden_size", "num_heads", "patch_size"}
    assert {flag: plan.get_default(flag) or None for flag in shared} == {
        flag: train.get_default(flag) or None for flag in shared}
    assert {flag: plan.get_default(flag) for flag in ("images", "steps", "gpu", "gpus", "mfu", "memory_share")} == dict(
        images=1_281_167, steps=[400_000, 7_000_000], gpu="h100", gpus=1, mfu=0.45, memory_share=0.9)


@pytest.mark.parametrize("name", ["train", "sample", "sample_ddp", "extract_features", "download", "tools.score_digits",
                                  "tools.plan", "tools.train_classifier"])
def test_help_is_complete(command, name):
    status, out, _ = command(name, "--help")
    assert status == 0
    parser = importlib.import_module(name).build_parser()
    assert [action.dest for action in parser._actions if not action.help] == []
    assert ("(default: 256)" in out) == (name not in ("download", "tools.score_digits"))


@pytest.mark.parametrize("flags, sentence", [
    ([*DIGITS, "--ema-decay", "1"], r"decay 1 never leaves the initial weights"),
    (["--data-path", "nowhere"], r"--data-path nowhere: there is no such folder"),
    ([*DIGITS, "--image-size", "256"], r"--image-size 256: the digits are 8 pixels wide"),
    ([*DIGITS, "--num-classes", "9"], r"--num-classes 9: digits has 10 classes"),
    ([*DIGITS, "--global-batch-size", "2000"], r"--global-batch-size 2000: digits has 1438 images"),
    ([*DIGITS, "--grad-accum-steps", "3"], r"--global-batch-size 8 .* multiple of 3"),
    ([*DIGITS, "--patch-size", "3"], r"--model DiT-S/2 at --image-size 8: .*\(8, 8\) .* patch_size 3"),
    ([*DIGITS, "--num-heads", "5"], r"hidden_size 16 is not a multiple of num_heads 5"),
    ([*DIGITS, "--hidden-size", "18"], r"multiple of 4, not 18"),
    ([*DIGITS, "--resume", "gone.pt"], r"--resume gone.pt: there is no such checkpoint"),
    ([*DIGITS, "--lr", "-1"], r"argument --lr: -1 is not a positive number"),
    ([*DIGITS, "--epochs", "0"], r"argument --epochs: 0 is not a positive whole number"),
    ([*DIGITS, "--epochs", "x"], r"argument --epochs: invalid number value: 'x'"),
    ([*DIGITS, "--ema-decay", "1.5"], r"argument --ema-decay: 1.5 does not lie in 0 .. 1"),
    ([*DIGITS, "--model", "DiT-M/2"], r"argument --model: invalid choice: 'DiT-M/2'"),
    ([], r"one of the arguments --data-path --features-path is required"),
    ([*DIGITS, "--features-path", "x"], r"--features-path: not allowed with argument --data-path"),
    ([*DIGITS, "--keep-every", "5"], r"--keep-every 5 needs --keep-checkpoints"),
    ([*DIGITS, "--keep-checkpoints", "0"], r"argument --keep-checkpoints: 0 is not a positive whole number"),
    ([*DIGITS, "--max-loss-spike", "-1"], r"argument --max-loss-spike: -1 is not a positive number"),
    ([*DIGITS, "--timeout", "1e15"], r"argument --timeout: 1e15 minutes are more than a year"),
    ([*DIGITS, "--max-bad-steps", "x"], r"argument --max-bad-steps: invalid number value: 'x'"),
    ([*DIGITS, "--features-in-memory"], r"--features-in-memory needs --features-path"),
])
def test_train_mistakes(command, tmp_path, flags, sentence):
    """Nothing is left behind by a run that could not start."""
    status, _, err = command("train", *flags, "--results-dir", tmp_path / "results")
    assert status == 2 and re.search(sentence, err), err
    assert "Traceback" not in err and not (tmp_path / "results").exists()


def test_image_folder_mistakes(command, image_folder, vae_folder, tmp_path):
    """An empty class, a broken image, a size that the VAE cannot take, a VAE that is not there."""
    flags = ["--image-size", 32, "--num-classes", 3, "--vae", "none", *TINY, "--global-batch-size", 2,
             "--num-workers", 0, "--results-dir", tmp_path / "results"]
    (tmp_path / "data" / "empty").mkdir(parents=True)
    status, _, err = command("train", "--data-path", tmp_path / "data", *flags)
    assert status == 2 and "empty" in err and "one folder per class" in err
    (tmp_path / "data" / "empty" / "broken.png").write_bytes(b"no picture")
    (tmp_path / "data" / "empty" / "broken2.png").write_bytes(b"")
    status, _, err = command("train", "--data-path", tmp_path / "data", *flags)
    assert status == 2 and re.search(r"cannot read the image \S+broken2?\.png", err)
    status, _, err = command("train", "--data-path", image_folder, *flags, "--vae", vae_folder, "--image-size", 30)
    assert status == 2 and "--image-size 30: not a multiple of 4" in err
    status, _, err = command("train", "--data-path", image_folder, *flags, "--vae", tmp_path)
    assert status == 2 and "--vae" in err and "config.json" in err


def test_a_flag_of_too_many_classes_is_told(command, tmp_path):
    """The published default of 1000 stands also for smaller data, but not in silence."""
    status, out, _ = command("train", *DIGITS, "--num-classes", 12, "--max-steps", 1, "--results-dir", tmp_path)
    assert status == 0 and "WARNING: --num-classes is 12: the classes 10 .. 11 have no image" in out


@pytest.fixture(scope="module")
def plain_checkpoint(tmp_path_factory):
    """A model without a null class."""
    results = tmp_path_factory.mktemp("plain")
    run_process("train.py", *DIGITS, "--max-steps", 1, "--class-dropout-prob", 0, "--results-dir", results)
    return results / "000-DiT-S-2" / "checkpoints" / "0000001.pt"


@pytest.mark.parametrize("flags, sentence", [
    (["--cfg-scale", "0.5"], r"guidance starts at 1, which means none; 0.5"),
    (["--cfg-scale", "2"], r"--cfg-scale 2: this model was trained without label dropout"),
    (["--cfg-channels", "2"], r"--cfg-channels 2: the latents of this model have 1 channels"),
    (["--class-labels", "10"], r"--class-labels 10: this model has the classes 0 .. 9"),
    (["--class-labels", "-1"], r"--class-labels -1: this model has the classes 0 .. 9"),
    (["--class-labels", "ostrich"], r"--class-labels 'ostrich': no class has this name"),
    (["--num-sampling-steps", "2000"], r"--num-sampling-steps 2000: cannot keep 2000 steps"),
    (["--num-sampling-steps", "ddim600"], r"--num-sampling-steps ddim600: .*exactly 600 of 1000"),
    (["--num-sampling-steps", "many"], r"argument --num-sampling-steps: invalid number value: 'many'"),
    (["--eta", "0.5"], r"--eta 0.5 is DDIM's noise: pass --sampler ddim"),
    (["--image-size", "256"], r"--image-size 256: .* was trained with 8; leave the flag out"),
    (["--model", "DiT-B/2"], r"--model DiT-B/2: .* was trained with DiT-S/2"),
    (["--output", "nowhere/x.png"], r"--output nowhere/x.png: there is no folder"),
    (["--output", "x.docx"], r"--output x.docx: .*'.docx'"),
])
def test_sample_mistakes(command, plain_checkpoint, tmp_path, monkeypatch, flags, sentence):
    monkeypatch.chdir(tmp_path)
    unguided = [] if "--cfg-scale" in flags else ["--cfg-scale", 1]
    steps = [] if "--num-sampling-steps" in flags else ["--num-sampling-steps", 2]
    status, _, err = command("sample", "--ckpt", plain_checkpoint, *unguided, *steps, *flags)
    assert status == 2 and re.search(sentence, err), err
    assert "Traceback" not in err and not list(tmp_path.iterdir())


def test_unguided_model_samples_at_scale_1(command, plain_checkpoint, tmp_path):
    status, _, err = command("sample", "--ckpt", plain_checkpoint, "--cfg-scale", 1, "--num-sampling-steps", 2,
                             "--output", tmp_path / "x.png")
    assert status == 0, err


def test_wrong_checkpoints(command, tmp_path):
    """Not there, not a checkpoint, of another model, and published weights that do not exist."""
    import models
    status, _, err = command("sample", "--ckpt", tmp_path / "gone.pt")
    assert status == 2 and "there is no checkpoint file" in err
    status, _, err = command("sample", "--ckpt", tmp_path)
    assert status == 2 and "is a folder: name a file in it" in err
    (tmp_path / "text.pt").write_text("hello")
    status, _, err = command("sample_ddp", "--ckpt", tmp_path / "text.pt")
    assert status == 2 and "text.pt" in err
    model = models.DiT(input_size=8, hidden_size=16, depth=1, num_heads=2, num_classes=10)
    torch.save(model.state_dict(), tmp_path / "small.pt")
    status, _, err = command("sample", "--ckpt", tmp_path / "small.pt", "--model", "DiT-S/8", "--vae", "none",
                             "--image-size", 8)
    assert status == 2 and "do not fit this model" in err and "Do --model" in err
    status, _, err = command("sample", "--model", "DiT-B/4")
    assert status == 2 and "published weights of DiT-XL/2 alone" in err


def test_no_network_is_a_sentence(command, tmp_path, monkeypatch):
    """The published weights, asked for where nothing answers: the address, and where to put the file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(download, "__defaults__", ("pretrained_models", "http://127.0.0.1:9/", None))
    status, _, err = command("sample", "--image-size", 256)
    place = str(tmp_path / "pretrained_models" / "DiT-XL-2-256x256.pt")
    assert status == 2 and "http://127.0.0.1:9/DiT-XL-2-256x256.pt" in err and place in err


def test_one_sentence_from_several_processes(tmp_path):
    """What fails on every process is told once."""
    done = run_process("train.py", *DIGITS, "--global-batch-size", 9, "--results-dir", tmp_path, processes=2,
                       check=False)
    assert done.returncode != 0
    assert done.stderr.count("--global-batch-size 9") == 1
    assert "terminate called" not in done.stderr



def test_oldest_versions_are_those_required(monkeypatch):
    """An older package is refused by name (trap 14)."""
    required = dict(re.findall(r"^([\w-]+)>=([\d.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    assert {package: required[package] for package in MINIMUM_VERSIONS} == MINIMUM_VERSIONS
    monkeypatch.setitem(MINIMUM_VERSIONS, "timm", "99.1")
    with pytest.raises(UserError, match=r"timm \S+ is installed, 99\.1 or later is needed"):
        check_versions()
