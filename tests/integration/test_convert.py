"""convert.py: this code's checkpoints, diffusers' folders and .safetensors, with the real library."""
import json

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline

from common.errors import UserError
from networks import build_dit, model_config
from sampling.diffusers_format import from_diffusers, to_diffusers, transformer_config
from sampling.load_model import load_model, read_checkpoint
from sampling.noise import PerSampleRNG
from sampling.pipeline import build_pipeline
from tiny_models import random_weights

CONFIG = dict(input_size=4, patch_size=2, in_channels=4, hidden_size=32, depth=2, num_heads=2, num_classes=3)
NAMES = ["ant", "bee", "cat"]


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
                  block_out_channels=[8, 8], layers_per_block=1, latent_channels=4, norm_num_groups=4,
                  scaling_factor=0.5, shift_factor=0.1).save_pretrained(folder)
    return folder


def model(**changes):
    return random_weights(build_dit(**CONFIG | changes), 1)


@pytest.fixture
def checkpoint(tmp_path, vae_folder):
    network, path = model(), tmp_path / "0000007.pt"
    torch.save(dict(model=model().state_dict(), ema=network.state_dict(), step=7,
                    args=dict(model="DiT-S/2", image_size=8, vae=str(vae_folder), num_classes=3),
                    config=dict(model=model_config(network), class_names=NAMES, image_channels=3)), path)
    return path


def load(path, vae="none", log=print):
    return load_model(str(path), "DiT-XL/2", 256, 1000, vae, set(), "cpu", log=log)


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_round_trips_are_exact(run_ok, checkpoint, tmp_path):
    original = torch.load(checkpoint, weights_only=True)
    run_ok("convert", checkpoint, "--to", "diffusers", "--output", tmp_path / "folder")
    for source, name in ((tmp_path / "folder", "a.pt"), (tmp_path / "a.pt", "b.safetensors"),
                         (tmp_path / "b.safetensors", "c.pt"), (tmp_path / "folder" / "transformer", "d.pt")):
        run_ok("convert", source, "--to", "dit", "--output", tmp_path / name)
        stored = read_checkpoint(str(tmp_path / name))
        assert equal(stored["model"], original["ema"])
        assert stored["config"]["model"] == original["config"]["model"] and stored["config"]["class_names"] == NAMES
    loaded = load(tmp_path / "c.pt")
    assert loaded.class_names == NAMES and loaded.image_size == 8 and loaded.model.num_heads == 2


def test_exported_pipeline_makes_the_same_images(run_ok, checkpoint, tmp_path):
    folder = tmp_path / "folder"
    run_ok("convert", checkpoint, "--to", "diffusers", "--output", folder)
    loaded = load(checkpoint)
    for cfg_scale, channels in ((4.0, 3), (1.0, 3)):
        ours = build_pipeline(loaded.model, loaded.autoencoder, "ddim10", cfg_scale=cfg_scale)
        noise = PerSampleRNG(0, range(3), "cpu")
        expected = ours(dict(y=torch.arange(3)), noise)
        pipeline = DiffusionPipeline.from_pretrained(str(folder), custom_pipeline=str(folder),
                                                     trust_remote_code=True)
        pipeline.set_progress_bar_config(disable=True)
        assert pipeline.config.guided_channels == channels and pipeline.labels == dict(ant=0, bee=1, cat=2)
        latents = PerSampleRNG(0, range(3), "cpu").initial((3, 4, 4, 4))
        images = pipeline([0, 1, 2], guidance_scale=cfg_scale, num_inference_steps=10, output_type="pt",
                          latents=latents).images
        torch.testing.assert_close(images, (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)
        assert images.std() > 0.01
    # The plain pipeline computes something else.
    for block in pipeline.transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 1
    other = pipeline([0, 1, 2], guidance_scale=1.0, num_inference_steps=10, output_type="pt", latents=latents).images
    assert (other - images).abs().max() > 1e-3


def test_a_folder_of_diffusers_is_sampled(run_ok, checkpoint, tmp_path):
    folder = tmp_path / "folder"
    run_ok("convert", checkpoint, "--to", "diffusers", "--output", folder)
    (folder / "dit.json").unlink()  # as others write it
    loaded = load(folder)
    assert loaded.num_classes == 3 and loaded.class_names == NAMES and loaded.image_size == 8
    assert loaded.autoencoder.name == str(folder / "vae") and equal(
        loaded.model.state_dict(), torch.load(checkpoint, weights_only=True)["ema"])
    run_ok("sample", "--ckpt", folder, "--class-labels", "bee", "--num-sampling-steps", "ddim2", "--output",
           tmp_path / "x.png")
    assert (tmp_path / "x.png").exists()


def test_a_model_of_gray_pixels_goes_both_ways(run_ok, tmp_path):
    """Without a VAE; what diffusers has no place for, as the channels of the images, is kept beside."""
    network = model(in_channels=1)
    torch.save(dict(model=network.state_dict(), args=dict(model="DiT-S/2", image_size=4, vae="none", num_classes=3),
                    config=dict(model=model_config(network), class_names=NAMES, image_channels=1)), tmp_path / "x.pt")
    run_ok("convert", tmp_path / "x.pt", "--to", "diffusers", "--output", tmp_path / "folder")
    run_ok("convert", tmp_path / "folder", "--to", "dit", "--output", tmp_path / "y.safetensors")
    for path in (tmp_path / "folder", tmp_path / "y.safetensors"):
        loaded = load(path)
        assert loaded.autoencoder.channels == 1 and equal(loaded.model.state_dict(), network.state_dict())
    pipeline = DiffusionPipeline.from_pretrained(str(tmp_path / "folder"), custom_pipeline=str(tmp_path / "folder"),
                                                 trust_remote_code=True)
    assert pipeline.vae is None and pipeline.config.guided_channels == 1
    assert pipeline([0], num_inference_steps=2, output_type="pt").images.shape == (1, 1, 4, 4)


@pytest.mark.parametrize("changes, problem", [
    (dict(conditioning="adaln"), "adaln blocks"), (dict(input_size=(4, 8)), "rectangular"),
    (dict(mlp_ratio=2.0), "MLP ratio"), (dict(class_dropout_prob=0.0), "null class")])
def test_what_diffusers_lacks_is_refused(changes, problem):
    with pytest.raises(UserError, match=problem):
        transformer_config(model_config(model(**changes)))


def test_embedders_that_differ_between_blocks_are_refused():
    weights = to_diffusers(model().state_dict())
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
    with pytest.raises(UserError, match="block 1"):
        from_diffusers(weights | {name: weights[name] + 0.5}, "x")
    for change in (dict(extra=torch.ones(1)), {"proj_out_2.bias": None}):
        changed = {key: value for key, value in (weights | change).items() if value is not None}
        with pytest.raises(UserError, match=r"proj_out_2\.bias|extra"):
            from_diffusers(changed, "x")


def test_nothing_is_overwritten_unasked(run_ok, run_error, checkpoint, tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    assert "--output" in run_error("convert", checkpoint, "--to", "diffusers", "--output", target)
    assert "--output" in run_error("convert", checkpoint, "--to", "dit", "--output", tmp_path / "x.bin")
    assert "--output" in run_error("convert", checkpoint, "--to", "dit", "--output", checkpoint)
    assert "--output" in run_error("convert", checkpoint, "--to", "diffusers", "--output", target, "--overwrite")
    assert "--output" in run_error("convert", checkpoint, "--to", "diffusers", "--output", tmp_path, "--overwrite")
    assert (target / "mine.txt").read_text() == "mine" and checkpoint.exists()
    (target / "mine.txt").unlink()
    for _ in range(2):
        run_ok("convert", checkpoint, "--to", "diffusers", "--output", target, "--overwrite")
    assert json.loads((target / "model_index.json").read_text())["id2label"] == {"0": "ant", "1": "bee", "2": "cat"}


def test_raw_weights_and_average_can_be_chosen(run_ok, checkpoint, tmp_path):
    stored = torch.load(checkpoint, weights_only=True)
    stored["model"] = {name: value + 1 for name, value in stored["model"].items()}
    torch.save(stored, checkpoint)
    run_ok("convert", checkpoint, "--to", "dit", "--output", tmp_path / "x.pt", "--weights", "model")
    assert equal(read_checkpoint(str(tmp_path / "x.pt"))["model"], stored["model"])


def test_a_damaged_folder_is_a_sentence(tmp_path):
    folder = tmp_path / "transformer"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(_class_name="DiTTransformer2DModel", sample_size=4)))
    with pytest.raises(UserError, match="no weights"):
        read_checkpoint(str(tmp_path))
