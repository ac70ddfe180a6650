"""Noise schedules, and the steps that a respaced process keeps."""
import numpy as np
import pytest

from diffusion import create_diffusion
from diffusion.schedules import named_betas, space_timesteps

BETAS = np.linspace(1e-4, 0.02, 1000)  # DDPM, section 4
ALPHA_BAR = np.cumprod(1.0 - BETAS)


@pytest.mark.parametrize("steps, start, end", [(1000, 1e-4, 0.02), (100, 1e-3, 0.2), (4000, 2.5e-5, 0.005)])
def test_linear_schedule_scales_with_its_length(steps, start, end):
    betas = named_betas("linear", steps)
    assert betas.dtype == np.float64 and len(betas) == steps
    np.testing.assert_allclose(betas[[0, -1]], [start, end], rtol=1e-12)
    np.testing.assert_allclose(np.diff(betas), (end - start) / (steps - 1), rtol=1e-9)


def test_cosine_schedule_is_a_squared_cosine_with_capped_betas():
    """Improved DDPM, eq. 17; only the last beta reaches the cap."""
    betas = named_betas("squaredcos_cap_v2", 500)
    wave = np.cos((np.arange(501) / 500 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(np.cumprod(1 - betas)[:-1], wave[1:-1] / wave[0], rtol=1e-9)
    assert betas[-1] == 0.999 and betas[-2] < 0.999


def test_unknown_schedules_are_refused():
    with pytest.raises(ValueError, match="quadratic"):
        create_diffusion("", noise_schedule="quadratic")
    with pytest.raises(ValueError, match="diffusion_steps=20"):
        create_diffusion("", diffusion_steps=20)
    with pytest.raises(ValueError, match="diffusion_steps=0"):
        create_diffusion("", noise_schedule="squaredcos_cap_v2", diffusion_steps=0)


@pytest.mark.parametrize("respacing", ["", None, "1000", [1000], "ddim1000", "500,500"])
def test_keeping_every_step_changes_nothing(respacing):
    diffusion = create_diffusion(respacing)
    assert list(diffusion.timestep_map) == list(range(1000)) and diffusion.num_timesteps == 1000
    np.testing.assert_allclose(diffusion.betas, BETAS, rtol=1e-10)
    np.testing.assert_allclose(diffusion.alphas_cumprod, ALPHA_BAR, rtol=1e-10)


@pytest.mark.parametrize("steps, counts, kept", [
    (1000, "ddim50", list(range(0, 1000, 20))),
    (1000, "ddim7", list(range(0, 1000, 143))),
    (10, "4", [0, 3, 6, 9]),
    (10, [5], [0, 2, 4, 7, 9]),   # 2.25 apart
    (9, "3,2", [0, 2, 4, 5, 8]),  # sections of 5 and 4
    (11, [1, 2, 1], [0, 4, 7, 8]),
])
def test_sections_keep_evenly_spaced_steps(steps, counts, kept):
    assert space_timesteps(steps, counts) == kept


def test_sections_of_unequal_density_keep_their_ends():
    kept = space_timesteps(1000, "10,15,20")
    for low, high, count in [(0, 333, 10), (334, 666, 15), (667, 999, 20)]:
        section = [step for step in kept if low <= step <= high]
        assert (len(section), section[0], section[-1]) == (count, low, high)


def test_any_number_of_steps_can_be_kept():
    for count in range(2, 1001):
        kept = space_timesteps(1000, str(count))
        assert len(kept) == len(set(kept)) == count and kept == sorted(kept)
        assert (kept[0], kept[-1]) == (0, 999)
    gaps = np.diff(space_timesteps(1000, "250"))
    assert set(gaps) == {4, 5}  # 999 / 249 = 4.01


@pytest.mark.parametrize("respacing", ["0", "1001", "-5", "501,1", "ddim0", "ddim300", "ddim1001", "ddim-1",
                                       "abc", "10,,20", "10,", "2.5", "ddim", "ddimx"])
def test_impossible_respacings_are_refused(respacing):
    """ddim300: no integer stride keeps 300 of 1000 steps, a stride of 3 keeps 334 and one of 4 keeps 250."""
    named = respacing if not respacing[-1].isdigit() or "." in respacing else respacing.split(",")[0]
    with pytest.raises(ValueError, match=named):
        create_diffusion(respacing)


@pytest.mark.parametrize("respacing", ["250", "10,15,20", "ddim50", "1"])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_a_respaced_process_has_the_same_alpha_bar(respacing, schedule):
    full, short = (create_diffusion(r, noise_schedule=schedule) for r in ("", respacing))
    assert short.num_timesteps == len(short.timestep_map) < 1000
    np.testing.assert_allclose(short.alphas_cumprod, full.alphas_cumprod[short.timestep_map], rtol=1e-9)
    np.testing.assert_array_equal(short.alphas_cumprod_prev, np.append(1.0, short.alphas_cumprod[:-1]))
    np.testing.assert_array_equal(short.alphas_cumprod_next, np.append(short.alphas_cumprod[1:], 0.0))


def test_a_process_may_be_trained_with_fewer_steps():
    diffusion = create_diffusion("4", diffusion_steps=100)
    assert (diffusion.num_timesteps, diffusion.original_num_steps) == (4, 100)
    assert list(diffusion.timestep_map) == [0, 33, 66, 99]
    np.testing.assert_allclose(diffusion.alphas_cumprod, np.cumprod(1 - np.linspace(1e-3, 0.2, 100))[::33], rtol=1e-9)
