"""sample.py and sample_ddp.py: published pictures of published seeds, and sets that any ranks make alike."""
import argparse
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import save_image

import models
from diffusion import create_diffusion
from helpers import TINY, call, raises_argument, run_process
from networks import build_dit
from run_files import pixels
from sampling.load_model import load_model
from sampling.sample_set import SampleSet
from tiny_models import random_weights

FEW = ["--num-sampling-steps", 4]


@pytest.fixture(scope="module")
def digits_checkpoint(tmp_path_factory):
    """A checkpoint of train.py, with EMA weights that do not predict zero."""
    results = tmp_path_factory.mktemp("digits")
    call("train", "--data-path", "digits", *TINY, "--max-steps", 1, "--results-dir", results)
    return replace_ema(results)


@pytest.fixture(scope="module")
def latent_checkpoint(image_folder, vae_folder, tmp_path_factory):
    results = tmp_path_factory.mktemp("latents")
    call("train", "--data-path", image_folder, "--image-size", 32, "--num-classes", 3, "--vae", vae_folder, *TINY,
         "--global-batch-size", 4, "--max-steps", 1, "--num-workers", 0, "--results-dir", results)
    return replace_ema(results)


def replace_ema(results):
    """Replace the EMA of a run's checkpoint by random weights; return its path."""
    (path,) = results.glob("*/checkpoints/0000001.pt")
    stored = torch.load(path, weights_only=True)
    stored["ema"] = random_weights(build_dit(**stored["config"]["model"])).state_dict()
    torch.save(stored, path)
    return path


def ema_model(path):
    stored = torch.load(path, weights_only=True)
    model = build_dit(**stored["config"]["model"])
    model.load_state_dict(stored["ema"])
    return model.eval()


def published_latents(model, labels, cfg_scale, steps, seed):
    """Sample as the published code does: everything doubled, one generator, noise drawn for the doubled batch."""
    torch.manual_seed(seed)
    null = model.y_embedder.num_classes
    z = torch.randn(len(labels), model.in_channels, *model.x_embedder.input_size)
    y = torch.tensor([*labels, *[null] * len(labels)])
    samples = create_diffusion(str(steps)).p_sample_loop(
        model.forward_with_cfg, (2 * len(labels), *z.shape[1:]), torch.cat([z, z]), clip_denoised=False,
        model_kwargs=dict(y=y, cfg_scale=cfg_scale))
    return samples[: len(labels)]


@pytest.mark.parametrize("cfg_scale", [4.0, 1.0])
def test_a_seed_gives_the_published_picture(run_ok, latent_checkpoint, vae_folder, tmp_path, cfg_scale):
    """Also at guidance 1, where the null half of the batch is not computed but its noise is drawn."""
    from diffusers import AutoencoderKL
    out = run_ok("sample", "--ckpt", latent_checkpoint, "--class-labels", 2, 0, 1, "--seed", 3, *FEW,
                 "--cfg-scale", cfg_scale, "--columns", 3, "--output", tmp_path / "ours.png")
    assert "ema weights" in out
    model, vae = ema_model(latent_checkpoint), AutoencoderKL.from_pretrained(vae_folder)
    with torch.no_grad():
        images = vae.decode(published_latents(model, [2, 0, 1], cfg_scale, 4, 3) / 0.5).sample
    images = images.repeat_interleave(2, 2).repeat_interleave(2, 3)  # 32-pixel tiles are enlarged to 64
    save_image(images, tmp_path / "want.png", nrow=3, normalize=True, value_range=(-1, 1))
    ours, want = pixels(tmp_path / "ours.png"), pixels(tmp_path / "want.png")
    assert ours.shape == want.shape and np.abs(ours - want).max() <= 1
    assert want.std() > 10  # not a uniform picture


def test_a_checkpoint_needs_no_other_flag(digits_checkpoint, tmp_path):
    run_process("sample.py", "--ckpt", digits_checkpoint, *FEW, cwd=tmp_path)
    assert pixels(tmp_path / "sample.png").shape == (3 * 66 + 2, 4 * 66 + 2, 3)  # ten classes, four a row


def test_labels_are_rows_and_the_trajectory_is_an_animation(run_ok, digits_checkpoint, tmp_path):
    run_ok("sample", "--ckpt", digits_checkpoint, "--class-labels", "7", "1", *FEW, "--samples-per-label", 3,
           "--trajectory", "--output", tmp_path / "grid.png")
    grid = pixels(tmp_path / "grid.png")
    assert grid.shape == (2 * 66 + 2, 3 * 66 + 2, 3)
    with Image.open(tmp_path / "grid.gif") as animation:
        assert 2 <= animation.n_frames <= 5  # x_T and four steps; Pillow merges frames that look the same
        animation.seek(animation.n_frames - 1)
        assert np.abs(np.asarray(animation.convert("RGB")).astype(int) - grid).mean() < 3


def test_samplers_and_guidance_change_the_picture(run_ok, digits_checkpoint, tmp_path):
    variants = {"ddpm": [], "ddim": ["--sampler", "ddim"], "eta": ["--sampler", "ddim", "--eta", 1],
                "ddim4": ["--num-sampling-steps", "ddim4"], "unguided": ["--cfg-scale", 1], "seed": ["--seed", 1]}
    pictures = {}
    for name, flags in variants.items():
        run_ok("sample", "--ckpt", digits_checkpoint, *FEW, *flags, "--output", tmp_path / "x.png")
        pictures[name] = pixels(tmp_path / "x.png").tobytes()
    assert len(set(pictures.values())) == len(variants)


def test_three_of_four_latent_channels_are_guided_by_default(run_ok, latent_checkpoint, tmp_path):
    pictures = []
    for flags in ([], ["--cfg-channels", 3], ["--cfg-channels", "all"]):
        run_ok("sample", "--ckpt", latent_checkpoint, *FEW, *flags, "--output", tmp_path / "x.png")
        pictures.append(pixels(tmp_path / "x.png"))
    assert np.array_equal(pictures[0], pictures[1]) and not np.array_equal(pictures[0], pictures[2])


def test_bare_weights_and_published_namespaces_are_loaded(run_ok, tmp_path):
    model = random_weights(models.DiT_models["DiT-S/8"](input_size=16, in_channels=3), scale=0.05)
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    args = argparse.Namespace(model="DiT-S/8", image_size=16, num_classes=1000)
    torch.save(dict(ema=model.state_dict(), model={}, opt={}, args=args), tmp_path / "published.pt")
    say = ["--vae", "none", "--num-sampling-steps", 2, "--class-labels", "golden retriever", 88]
    out = run_ok("sample", "--ckpt", tmp_path / "bare.pt", "--model", "DiT-S/8", "--image-size", 16, *say,
                 "--output", tmp_path / "bare.png")
    assert "bare weights" in out
    out = run_ok("sample", "--ckpt", tmp_path / "published.pt", *say, "--output", tmp_path / "published.png")
    assert "ema weights" in out
    assert np.array_equal(pixels(tmp_path / "bare.png"), pixels(tmp_path / "published.png"))


def sample_set(folder):
    (path,) = folder.glob("*.npz")
    with np.load(path) as file:
        return path.name, file["arr_0"], file["arr_1"]


def test_a_set_does_not_depend_on_processes_or_batch_size(children, digits_checkpoint, tmp_path):
    flags = ["--ckpt", digits_checkpoint, "--num-fid-samples", 20, *FEW]
    children.run("sample_ddp", *flags, "--per-proc-batch-size", 3, "--sample-dir", tmp_path / "one")
    children.run("sample_ddp", *flags, "--per-proc-batch-size", 3, "--sample-dir", tmp_path / "two", processes=2)
    children.run("sample_ddp", *flags, "--per-proc-batch-size", 8, "--sample-dir", tmp_path / "eight")
    name, images, labels = sample_set(tmp_path / "one")
    assert images.shape == (20, 8, 8, 3) and images.dtype == np.uint8 and labels.shape == (20,)
    assert len(np.unique(labels)) > 3 and images.std() > 10
    for other in ("two", "eight"):
        other_name, other_images, other_labels = sample_set(tmp_path / other)
        assert other_name == name and (other_labels == labels).all()
        # the same batches: bit for bit; other batches: matrix products may round otherwise, by one level here and there
        difference = np.abs(other_images.astype(int) - images)
        assert difference.max() <= (0 if other == "two" else 1) and (difference > 0).mean() < 0.01


def test_a_larger_set_begins_with_the_smaller_one(run_ok, digits_checkpoint, tmp_path):
    flags = ["--ckpt", digits_checkpoint, "--per-proc-batch-size", 5, "--sample-dir", tmp_path, *FEW]
    run_ok("sample_ddp", *flags, "--num-fid-samples", 5)
    _, first, _ = sample_set(tmp_path)
    assert "5 of 10 samples are there" in run_ok("sample_ddp", *flags, "--num-fid-samples", 10, "--png")
    _, images, labels = sample_set(tmp_path)
    assert len(labels) == 10 and (images[:5] == first).all()
    pngs = sorted(tmp_path.glob("*/*.png"))
    assert [path.name for path in pngs] == [f"{i:06d}.png" for i in range(10)]
    assert all((pixels(path) == image).all() for path, image in zip(pngs, images))
    out = run_ok("sample_ddp", *flags, "--num-fid-samples", 7)
    assert "holds 10 images" in out and "first 7" in out


def test_a_run_killed_before_its_npz_only_assembles_it(command, run_ok, digits_checkpoint, tmp_path, monkeypatch):
    flags = ["--ckpt", digits_checkpoint, "--num-fid-samples", 6, "--per-proc-batch-size", 4, *FEW,
             "--sample-dir", tmp_path]
    with monkeypatch.context() as patch:
        patch.setattr(SampleSet, "assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert command("sample_ddp", *flags)[0] == 130
    assert len(list(tmp_path.glob("*/parts/*.npz"))) == 2 and not list(tmp_path.glob("*.npz"))
    assert "6 of 6 samples are there" in run_ok("sample_ddp", *flags)
    assert len(sample_set(tmp_path)[1]) == 6 and not list(tmp_path.glob("*/parts"))


def test_classes_without_images_are_not_sampled(run_ok, run_error, image_folder, tmp_path):
    """The published default of 1000 classes, trained on a folder of three."""
    flags = ["--data-path", image_folder, "--image-size", 8, "--vae", "none", *TINY, "--global-batch-size", 8,
             "--num-workers", 0, "--max-steps", 1, "--results-dir", tmp_path]
    run_ok("train", *flags)
    checkpoint = tmp_path / "000-DiT-S-2" / "checkpoints" / "0000001.pt"
    run_ok("sample_ddp", "--ckpt", checkpoint, "--num-fid-samples", 20, *FEW, "--sample-dir", tmp_path)
    assert set(sample_set(tmp_path)[2]) == {0, 1, 2}
    err = run_error("sample", "--ckpt", checkpoint, *FEW, "--class-labels", 3, "--output", tmp_path / "x.png")
    assert "--class-labels 3" in err and "0 .. 2" in err
    run_ok("sample", "--ckpt", checkpoint, *FEW, "--class-labels", "bee", "--output", tmp_path / "x.png")


def test_a_picture_holds_the_metadata_of_its_sampling(run_ok, digits_checkpoint, tmp_path):
    run_ok("sample", "--ckpt", digits_checkpoint, *FEW, "--seed", 5, "--cfg-scale", 2, "--output", tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        record = json.loads(picture.text["DiT"])
    assert record["seed"] == 5 and record["cfg_scale"] == 2 and record["cfg_channels"] == 1 and record["steps"] == 4


def test_the_name_of_a_set_holds_what_changes_its_images(run_ok, digits_checkpoint, tmp_path):
    base = ["--ckpt", digits_checkpoint, "--num-fid-samples", 1, "--sample-dir", tmp_path, "--num-sampling-steps", 2]
    variants = [[], ["--cfg-scale", 2], ["--global-seed", 1], ["--sampler", "ddim"], ["--num-sampling-steps", 3],
                ["--sampler", "ddim", "--eta", 0.5], ["--no-tf32"]]
    for flags in variants:
        run_ok("sample_ddp", *base, *flags)
    assert len(list(tmp_path.glob("*.npz"))) == len(variants)


@pytest.fixture(scope="module")
def averages_checkpoint(digits_checkpoint, tmp_path_factory):
    """A checkpoint with averages of two decays, the first of which is the EMA of `digits_checkpoint`."""
    stored = torch.load(digits_checkpoint, weights_only=True)
    other = random_weights(build_dit(**stored["config"]["model"]), seed=1).state_dict()
    stored |= dict(extra_emas={"0.999": other}, args=stored["args"] | dict(ema_decay=[0.9999, 0.999]))
    path = tmp_path_factory.mktemp("averages") / "0000001.pt"
    torch.save(stored, path)
    return path


def test_one_of_several_averages_is_chosen_by_its_decay(run_ok, digits_checkpoint, averages_checkpoint, tmp_path):
    few = ["--num-fid-samples", 2, *FEW, "--sample-dir"]
    run_ok("sample_ddp", "--ckpt", digits_checkpoint, *few, tmp_path / "single")
    expected = sample_set(tmp_path / "single")
    names = []
    for folder, flags, decay in (("default", [], 0.9999), ("first", ["--ema-decay", 0.9999], 0.9999),
                                 ("other", ["--ema-decay", 0.999], 0.999)):
        run_ok("sample_ddp", "--ckpt", averages_checkpoint, *flags, *few, tmp_path / folder)
        name, images, _ = sample_set(tmp_path / folder)
        names.append(name)
        assert np.array_equal(images, expected[1]) == (decay == 0.9999)
        made = json.loads((tmp_path / folder / name).with_suffix(".json").read_text())["made"]
        assert made["ema_decay"] == decay and made["weights"] == "ema"
    assert names[0] == names[1] == expected[0] != names[2]


def test_a_decay_without_an_average_is_an_error_that_lists_the_others(digits_checkpoint, averages_checkpoint, tmp_path):
    torch.save(ema_model(digits_checkpoint).state_dict(), tmp_path / "bare.pt")
    for path, averages in ((averages_checkpoint, "0.9999, 0.999"), (digits_checkpoint, "0.9999"),
                           (tmp_path / "bare.pt", "none")):
        with raises_argument(f"it has {averages}", ema_decay=0.5):
            load_model(str(path), "DiT-S/2", 8, 10, "none", set(), "cpu", ema_decay=0.5)
