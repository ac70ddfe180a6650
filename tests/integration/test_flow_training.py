"""train.py --objective flow: the same loop, random numbers, checkpoints and resuming as for diffusion."""
import pytest
import torch

from autoencoder.vae import IdentityAutoencoder
from common.seeding import NOISE, BatchRNG
from helpers import DIGITS, DROP, TINY
from networks import build_dit
from run_files import STATE, checkpoint_path, differences, largest_difference, losses, stored
from tiny_models import random_model
from training.ema import EMA
from training.nan_guard import NonFiniteGuard
from training.train_step import TrainStep
from transport import Sampler, TimeSampler, create_transport

FLOW = [*DIGITS, "--objective", "flow", "--log-every", 1, *DROP]


def flow_step(model, transport, distribution="uniform", lr=1e-3, fused=True, **options):
    """Return a TrainStep for a transport, of 8 rows."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=fused)
    guard = NonFiniteGuard(10, sample_indices=lambda step: [list(range(8))])
    return TrainStep(model, model, IdentityAutoencoder(4), transport, TimeSampler(transport, distribution), optimizer,
                     [EMA(model, 0.99)], guard, BatchRNG(0, 8, slice(0, 8), torch.device("cpu")), **options)


@pytest.mark.parametrize("path_type, prediction, weight, distribution, shift", [
    ("Linear", "velocity", None, "uniform", 1.0), ("GVP", "noise", "velocity", "logit-normal", 3.0),
    ("VP", "score", "likelihood", "uniform", 0.5)])
@pytest.mark.parametrize("microbatches", [1, 4])
def test_a_step_computes_the_loss_of_the_transport(path_type, prediction, weight, distribution, shift, microbatches):
    """At times and noise that are functions of seed, step and position; on microbatches too."""
    transport = create_transport(path_type, prediction, weight, time_shift=shift)
    model = random_model(class_dropout_prob=0.0).train()
    step = flow_step(model, transport, distribution, num_microbatches=microbatches)
    x, y = torch.randn(8, *model.sample_shape), torch.randint(0, 7, (8,))
    t, _ = step.rng.timesteps(5, step.schedule_sampler)
    noise = step.rng.normal(NOISE, 5, model.sample_shape)
    with torch.no_grad():
        expected = transport.training_losses(model, x, dict(y=y), t=t, noise=noise)["loss"].mean()
    terms, _, is_applied = step(5, x, dict(y=y))
    assert terms.keys() == {"loss"} and is_applied and step.decides_on_device
    torch.testing.assert_close(terms["loss"], expected)


def test_training_reaches_the_data():
    """A model that is trained on two constant images makes them, by ODE and SDE."""
    torch.manual_seed(0)
    transport, model = create_transport(), build_dit(input_size=4, hidden_size=32, depth=2, num_heads=2, num_classes=2)
    step, y = flow_step(model.train(), transport, lr=3e-3), torch.tensor([0, 1] * 4)
    images = torch.tensor([-0.6, 0.8])[y].view(8, 1, 1, 1).expand(8, 4, 4, 4)
    for i in range(300):
        step(i, images, dict(y=y))
    sampler, noise = Sampler(transport), torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    for sample in (sampler.sample_ode(sampling_method="heun", num_steps=13),
                   sampler.sample_sde(diffusion_form="sigma", num_steps=50)):
        with torch.no_grad():
            error = (sample(noise, model.eval(), y=y)[-1] - images).square().mean().sqrt()
        assert error < 0.2


@pytest.mark.parametrize("extra", [[], ["--fused-adamw", "--path-type", "GVP", "--time-sampling", "logit-normal"]])
def test_a_resumed_run_is_the_same(run_ok, tmp_path, extra):
    run_ok("train", *FLOW, *extra, "--max-steps", 4, "--results-dir", tmp_path / "straight")
    run_ok("train", *FLOW, *extra, "--max-steps", 2, "--results-dir", tmp_path / "cut")
    run_ok("train", *FLOW, *extra, "--max-steps", 4, "--resume", "auto", "--results-dir", tmp_path / "cut")
    straight, cut = stored(tmp_path / "straight", 4), stored(tmp_path / "cut", 4)
    assert [name for name in differences(straight, cut) if name.startswith(STATE)] == []
    assert straight["args"]["objective"] == "flow" and straight["args"]["prediction"] == "velocity"


def test_two_processes_with_shards_compute_the_same(children, tmp_path):
    flags = [*FLOW, "--max-steps", 3]
    children.run("train", *flags, "--results-dir", tmp_path / "one")
    children.run("train", *flags, "--fsdp", "--results-dir", tmp_path / "two", processes=2)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1.1e-4)
    assert largest_difference(stored(tmp_path / "one", 3), stored(tmp_path / "two", 3), "ema") < 1e-4


def test_training_from_a_cache_of_latents(run_ok, cache, tmp_path):
    run_ok("train", "--features-path", cache, *TINY, "--global-batch-size", 4, "--num-classes", 3, "--num-workers", 0,
           "--objective", "flow", "--prediction", "noise", "--loss-weight", "velocity", "--time-scale", 1000,
           "--log-every", 1, "--max-steps", 2, "--results-dir", tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 2 and stored(tmp_path / "run", 2)["args"]["time_scale"] == 1000


def test_the_objective_is_not_changed_silently(run_ok, run_error, tmp_path):
    """Also that of a checkpoint from before there was a choice."""
    run_ok("train", *DIGITS, *DROP, "--max-steps", 1, "--results-dir", tmp_path)
    path, checkpoint = tmp_path / "old.pt", stored(tmp_path, 1)
    assert checkpoint["args"]["objective"] == "ddpm" and checkpoint["args"]["path_type"] is None
    checkpoint["args"] = {name: value for name, value in checkpoint["args"].items()
                          if name not in ("objective", "path_type", "prediction")}
    torch.save(checkpoint, path)
    flow = [*FLOW, "--max-steps", 2, "--results-dir", tmp_path / "flow"]
    assert "--objective is flow, it was ddpm" in run_error("train", *flow, "--resume", path)
    run_ok("train", *flow)
    error = run_error("train", *flow, "--max-steps", 3, "--time-shift", 2, "--resume", "auto")
    assert "--time-shift is 2.0, it was 1.0" in error
    # Until the commands sample such models, they refuse them.
    assert "flow" in run_error("sample", "--ckpt", checkpoint_path(tmp_path / "flow", 2))


def test_a_model_without_outputs_for_the_variance(run_ok, tmp_path):
    """Of either objective; one of diffusion samples with the fixed variance."""
    for name, flags in (("flow", FLOW), ("ddpm", DIGITS)):
        run_ok("train", *flags, "--no-learn-sigma", "--max-steps", 2, "--results-dir", tmp_path / name)
        config = stored(tmp_path / name, 2)["config"]["model"]
        assert config["learn_sigma"] is False and build_dit(**config).out_channels == 1
    run_ok("sample", "--ckpt", checkpoint_path(tmp_path / "ddpm", 2), "--num-sampling-steps", 2, "--output",
           tmp_path / "picture.png")


@pytest.mark.parametrize("flags, name", [
    (["--path-type", "GVP"], "--path-type GVP"),
    (["--time-shift", 2], "--time-shift 2"),
    (["--objective", "flow", "--schedule-sampler", "loss-second-moment"], "--schedule-sampler"),
    (["--objective", "flow", "--loss-weight", "velocity"], "--loss-weight velocity"),
    (["--objective", "flow", "--sample-every", 1], "--sample-every 1"),
])
def test_flags_that_do_not_fit_the_objective(run_error, tmp_path, flags, name):
    assert name in run_error("train", *DIGITS, *flags, "--max-steps", 1, "--results-dir", tmp_path)
    assert not list(tmp_path.iterdir())
