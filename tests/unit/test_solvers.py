"""Few-step solvers of diffusers on our models: orders of accuracy, ends, guidance, and independence of batches."""
import math

import pytest
import torch

from autoencoder.vae import IdentityAutoencoder
from diffusion import create_diffusion
from helpers import raises_argument
from networks import build_dit
from sampling.noise import PerSampleRNG
from sampling.pipeline import SAMPLERS, build_pipeline
from sampling.solvers import SOLVERS, SPACINGS, SolverProcess, parse_steps
from tiny_models import random_weights

ALPHA_BAR = torch.from_numpy(create_diffusion("").alphas_cumprod)
MEAN, STD = 0.7, 0.5  # of data whose best prediction of the noise is known


def alpha_bar(t):
    """Interpolate log SNR, since Heun's timesteps may be fractional."""
    log_snr, t = torch.log(ALPHA_BAR / (1 - ALPHA_BAR)), torch.as_tensor(t).double()
    low = t.floor().long()
    return torch.sigmoid(torch.lerp(log_snr[low], log_snr[(low + 1).clamp(max=999)], t - low))


class ExactDenoiser:
    """The noise of normal data, with a variance half that must be dropped; notes the timesteps that it is told."""

    def __init__(self):
        self.timestep, self.told = None, []

    def __call__(self, x, t):
        assert self.timestep == t[0]
        self.told.append(self.timestep)
        a = alpha_bar(t).view(-1, 1, 1, 1)
        eps = (1 - a).sqrt() * (x - a.sqrt() * MEAN) / (a * STD**2 + 1 - a)
        return torch.cat([eps, torch.full_like(eps, 1e3)], dim=1)


def solve(process, x):
    """Return the result, and the exact solution of the ODE from the first timestep to 0."""
    a = alpha_bar(process.timestep_map[-1])
    exact = MEAN + STD * (x - a.sqrt() * MEAN) / (a * STD**2 + 1 - a).sqrt()
    *_, last = process.steps(ExactDenoiser(), x)
    return last["sample"], exact


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_solvers_are_of_order_two(solver, spacing):
    x = torch.randn(64, 1, 1, 1, dtype=torch.float64)
    errors = []
    for count in (10, 40):
        result, exact = solve(SolverProcess(solver, count, spacing), x)
        errors.append((result - exact).abs().mean().item())
    assert math.log(errors[0] / errors[1], 4) > 1.6 and errors[1] < 0.01


def test_ddim_of_the_library_is_ours():
    """The noise schedule and the meaning of timesteps are the same."""
    from diffusers import DDIMScheduler
    x, process, scheduler = torch.randn(4, 2, 3, 3).double(), create_diffusion("ddim20"), DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    scheduler.set_timesteps(20)
    theirs = x
    for t in scheduler.timesteps:
        denoise = ExactDenoiser()
        denoise.timestep = t
        theirs = scheduler.step(denoise(theirs, t.expand(4))[:, :2], t, theirs).prev_sample
    ours = process.ddim_sample_loop(lambda x, t: ExactDenoiser.__call__(told(t), x, t), x.shape, x, clip_denoised=False)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def told(t):
    denoise = ExactDenoiser()
    denoise.timestep = t[0]
    return denoise


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("count", [1, 2, 7])
def test_every_step_is_yielded_and_calls_are_counted(solver, count):
    process, denoise = SolverProcess(solver, count), ExactDenoiser()
    outs = list(process.steps(denoise, torch.randn(2, 1, 2, 2).double()))
    assert len(outs) == process.num_timesteps == count
    assert denoise.told == process.timestep_map[::-1] and denoise.told[0] == 999
    assert len(denoise.told) == (2 * count - 1 if solver == "heun" else count)


@pytest.fixture(scope="module")
def model():
    return random_weights(build_dit(input_size=4, hidden_size=32, depth=1, num_heads=2, num_classes=5), 1).eval()


@pytest.mark.parametrize("sampler", sorted(SOLVERS))
def test_samples_do_not_depend_on_their_batch_and_guidance_has_its_interval(model, sampler):
    def sample(rows, **options):
        pipeline = build_pipeline(model, IdentityAutoencoder(4), 4, sampler=sampler, **options)
        return pipeline(dict(y=torch.tensor([row % 5 for row in rows])), PerSampleRNG(0, rows, "cpu")), pipeline

    (together, pipeline), (alone, _) = (sample(rows, cfg_scale=4.0) for rows in (range(4), range(2, 3)))
    torch.testing.assert_close(together[2:3], alone, rtol=1e-4, atol=1e-5)
    calls = len(pipeline.diffusion.timestep_map)
    assert pipeline.metadata()["model_calls"] == 2 * calls and pipeline.metadata()["timestep_spacing"] == SPACINGS[0]
    plain, _ = sample(range(4), cfg_scale=1.0)
    partial, pipeline = sample(range(4), cfg_scale=4.0, cfg_interval=(900, 999))
    assert calls < pipeline.metadata()["model_calls"] < 2 * calls
    assert not torch.allclose(partial, plain) and not torch.allclose(partial, together)


def test_names_of_steps_choose_the_sampler(model):
    names = {"dpm20": "dpm++", "unipc10": "unipc", "heun5": "heun", "ddim50": "ddim", 9: "ddpm"}
    for steps, sampler in names.items():
        pipeline = build_pipeline(model, IdentityAutoencoder(4), steps, cfg_scale=1.0)
        assert pipeline.sampler == sampler in SAMPLERS
        assert pipeline.diffusion.num_timesteps == int(str(steps).strip("abcdefghijklmnopqrstuvwxyz"))
    assert parse_steps("dpm") == (None, "dpm")


@pytest.mark.parametrize("options, arguments", [
    (dict(num_sampling_steps="dpm20", sampler="ddim"), dict(sampler="ddim", num_sampling_steps="dpm20")),
    (dict(num_sampling_steps=2000, sampler="unipc"), dict(num_sampling_steps=2000)),
    (dict(num_sampling_steps=50, timestep_spacing="leading"), dict(timestep_spacing="leading")),
    (dict(num_sampling_steps="dpm1", timestep_spacing="leading"), dict(timestep_spacing="leading")),
    (dict(num_sampling_steps="dpm9", eta=0.5), dict(eta=0.5))])
def test_what_does_not_fit_is_an_error(model, options, arguments):
    with raises_argument(**arguments):
        build_pipeline(model, IdentityAutoencoder(4), cfg_scale=1.0, **options)
