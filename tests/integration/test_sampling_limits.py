"""What sampling refuses: steps that are not possible, images that are not finite, two commands that make one set."""
import pytest
import torch

from autoencoder.vae import IdentityAutoencoder
from common.errors import ArgumentError, UserError
from networks import build_dit, model_config
from run_files import pixels
from sampling.noise import PerSampleRNG
from sampling.pipeline import build_pipeline
from sampling.sample_set import SampleSet
from sampling.trajectory import TrajectoryRecorder
from tiny_models import TINY_MODEL, random_weights


def tiny_model():
    return random_weights(build_dit(**TINY_MODEL))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint as train.py writes it, of images of 4 pixels."""
    model = random_weights(build_dit(**TINY_MODEL | dict(in_channels=1)))
    path = tmp_path_factory.mktemp("run") / "0000009.pt"
    torch.save(dict(ema=model.state_dict(), config=dict(model=model_config(model), image_channels=1), step=9,
                    args=dict(model="DiT-S/2", image_size=4, num_classes=7, vae="none", ema_decay=0.5)), path)
    return path


# ---------------------------------------------------------------- steps

def error_of(command, checkpoint, tmp_path, *flags):
    """Return the error of sample.py, the same as that of sample_ddp.py."""
    errors = []
    for name, more in (("sample", ["--output", tmp_path / "x.png"]), ("sample_ddp", ["--sample-dir", tmp_path])):
        status, _, err = command(name, "--ckpt", checkpoint, *flags, *more)
        assert status == 2 and "Traceback" not in err and not list(tmp_path.iterdir()), err
        errors.append(err.split("error: ", 1)[1])
    assert errors[0] == errors[1]
    return errors[0]


@pytest.mark.parametrize("steps, advice", [
    ("ddim150", "--num-sampling-steps 150 --sampler ddim"), ("ddim300", "'ddim250' and 'ddim334'"), ("1", "2 or more"),
    ("ddim1", "2 or more"), ("1001", ""), ("ddim1001", ""), ("ddim999999999999999999999", "")])
def test_steps_that_are_not_possible_are_refused_with_advice_that_works(command, checkpoint, tmp_path, steps, advice):
    """Before the checkpoint is read: it need not exist."""
    error = error_of(command, "absent.pt", tmp_path, "--num-sampling-steps", steps)
    named = (f"--num-sampling-steps {steps}:", "argument --num-sampling-steps:")  # the second by argparse
    assert error.startswith(named) and advice in error
    if "--sampler" in advice:
        status, out, err = command("sample", "--ckpt", checkpoint, *advice.split(), "--output", tmp_path / "x.png")
        assert status == 0 and '"sampler": "ddim", "steps": 150' in out, err


@pytest.mark.parametrize("steps", ["ddim0", "ddim", "ddim-5", "ddim5.5", "0", "-3", "10,15,20", "", " "])
def test_text_that_is_no_number_of_steps_is_refused(command, tmp_path, steps):
    error = error_of(command, "absent.pt", tmp_path, f"--num-sampling-steps={steps}")
    assert "--num-sampling-steps" in error and "10,15,20'," not in error and f"'{steps}' without" not in error


def test_an_interval_without_a_sampled_timestep_is_refused(command, checkpoint, tmp_path):
    few = ["--num-sampling-steps", 4, "--cfg-interval"]
    assert error_of(command, checkpoint, tmp_path, *few, 5, 300).startswith("--cfg-interval 5 300:")
    flags = [*few, 5, 333, "--output", tmp_path / "x.png"]
    assert command("sample", "--ckpt", checkpoint, *flags)[0] == 0


# ---------------------------------------------------------------- finite images

def test_guidance_that_overflows_writes_no_picture(command, checkpoint, tmp_path):
    for scale in ("1e30", "1e38"):
        status, _, err = command("sample", "--ckpt", checkpoint, "--num-sampling-steps", "ddim5", "--cfg-scale", scale,
                                 "--output", tmp_path / "x.png")
        assert status == 2 and "--cfg-scale" in err and not list(tmp_path.glob("*.png"))
        status, _, err = command("sample_ddp", "--ckpt", checkpoint, "--num-sampling-steps", "ddim5", "--cfg-scale",
                                 scale, "--num-fid-samples", 2, "--sample-dir", tmp_path / "sets")
        assert status == 2 and "--cfg-scale" in err and not list(tmp_path.glob("sets/*.npz"))
    status, _, err = command("sample", "--ckpt", checkpoint, "--num-sampling-steps", "ddim5", "--output",
                             tmp_path / "x.png")
    assert status == 0 and pixels(tmp_path / "x.png").std() > 1, err


class SpoiltAutoencoder(IdentityAutoencoder):
    name = "half"

    def decode(self, latents):
        return torch.where(torch.arange(len(latents))[:, None, None, None] == 1, float("nan"), latents)


def sample(model, autoencoder, **flags):
    pipeline = build_pipeline(model, autoencoder, 2, **dict(cfg_scale=1.0) | flags)
    return pipeline(dict(y=torch.tensor([1, 2, 3])), PerSampleRNG(0, range(3), "cpu"))


def test_the_cause_of_values_that_are_not_finite_is_named():
    with pytest.raises(ArgumentError, match="1 of 3 images") as caught:
        sample(tiny_model(), SpoiltAutoencoder(4))
    assert caught.value.arguments == dict(vae="half")
    spoilt = tiny_model()
    torch.nn.init.constant_(spoilt.final_layer.linear.bias, float("nan"))
    with pytest.raises(UserError, match="3 of 3 images") as caught:
        sample(spoilt, IdentityAutoencoder(4), cfg_scale=1.5)
    assert not isinstance(caught.value, ArgumentError)
    assert sample(tiny_model(), IdentityAutoencoder(4)).isfinite().all()


def test_an_animation_of_values_that_are_not_finite_is_not_written(tmp_path):
    recorder = TrajectoryRecorder(2)
    for step in (-1, 0, 1):
        recorder(step, torch.full((2, 3, 8, 8), float("inf") if step == 0 else 0.0))
    with pytest.raises(UserError, match=r"x\.gif"):
        recorder.save(IdentityAutoencoder(3), 2, str(tmp_path / "x.gif"))
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- two at once

def test_a_second_command_for_the_same_set_is_refused(command, checkpoint, tmp_path):
    flags = ["--ckpt", checkpoint, "--num-sampling-steps", 2, "--num-fid-samples", 3, "--sample-dir", tmp_path]
    assert command("sample_ddp", *flags)[0] == 0
    (npz,) = tmp_path.glob("*.npz")
    other = SampleSet(str(npz.with_suffix("")))
    before = npz.read_bytes()
    with other.locked():
        status, _, err = command("sample_ddp", *flags)
        assert status == 2 and "another command" in err and npz.name in err
        with pytest.raises(UserError, match="another command"), other.locked():
            pass
        assert command("sample_ddp", *flags, "--global-seed", 1)[0] == 0  # another set
    assert command("sample_ddp", *flags)[0] == 0 and npz.read_bytes() == before
    assert not list(tmp_path.glob("*.lock"))
