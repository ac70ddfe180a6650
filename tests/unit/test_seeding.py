"""Random numbers as a function of their use."""
import itertools
from types import SimpleNamespace

import pytest
import torch

from common import seeding
from common.seeding import FLIP, LABEL_DROP, NOISE, POSTERIOR, BatchRNG, derive_seed, seeded_generator
from diffusion.timestep_sampler import LossSecondMomentResampler, UniformSampler

ALL_ROWS = slice(0, 6)


def importance():
    sampler = LossSecondMomentResampler(SimpleNamespace(num_timesteps=4), history_per_term=1)
    sampler.update_with_local_losses(torch.arange(4), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    return sampler


DRAWS = {
    "normal": lambda random, step: random.normal(NOISE, step, (2, 3)),
    "uniform": lambda random, step: random.uniform(LABEL_DROP, step),
    "timesteps": lambda random, step: random.timesteps(step, UniformSampler(SimpleNamespace(num_timesteps=1000)))[0],
    "importance": lambda random, step: torch.stack(random.timesteps(step, importance())),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_draws_do_not_depend_on_the_number_of_ranks(draw):
    expected = draw(BatchRNG(3, 6, ALL_ROWS, "cpu"), 10)
    for cuts in ((0, 3, 6), (0, 2, 4, 6)):
        shares = []
        for start, stop in itertools.pairwise(cuts):
            random = BatchRNG(3, 6, slice(start, stop), "cpu")
            draw(random, 9)
            shares.append(draw(random, 10))
        assert torch.equal(torch.cat(shares, dim=-1 if expected.ndim == 2 else 0), expected)


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_steps_and_seeds_differ(draw):
    reference = draw(BatchRNG(0, 64, slice(0, 64), "cpu"), 1)
    for seed, step in ((0, 2), (1, 1), (1, 0)):
        assert not torch.equal(reference, draw(BatchRNG(seed, 64, slice(0, 64), "cpu"), step))


def test_streams_differ():
    random = BatchRNG(0, 6, ALL_ROWS, "cpu")
    draws = [random.normal(stream, 1, (2,)) for stream in (NOISE, POSTERIOR, LABEL_DROP)]
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(draws, 2))
    timesteps = random.timesteps(1, UniformSampler(SimpleNamespace(num_timesteps=1000)))[0]
    for stream in (NOISE, LABEL_DROP, FLIP):
        other = torch.randint(1000, (6,), generator=seeded_generator(0, stream, 1))
        assert not torch.equal(timesteps, other)


def test_draws_have_their_shape_and_distribution():
    random = BatchRNG(0, 4000, slice(0, 4000), "cpu")
    normal, uniform = random.normal(NOISE, 0, (3, 2)), random.uniform(LABEL_DROP, 0)
    assert normal.shape == (4000, 3, 2) and uniform.shape == (4000,)
    assert abs(normal.mean()) < 5 / 24000**0.5 and abs(normal.std() - 1) < 5 / 48000**0.5
    assert 0 <= uniform.min() < 0.01 and 0.99 < uniform.max() < 1


def test_neighboring_keys_give_distinct_seeds():
    keys = list(itertools.product(range(12), range(9), range(40)))
    seeds = {derive_seed(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert 0.45 < sum(seed & 1 for seed in seeds) / len(seeds) < 0.55


def test_seeds_of_samples_are_distinct_in_32_bits():
    """torch's generator on the CPU uses 32 bits: with random seeds, two of 50,000 samples would share their noise."""
    assert torch.equal(*(torch.randn(4, generator=torch.Generator().manual_seed(seed)) for seed in (7, 7 + 2**32)))
    assert len({derive_seed(0, 8, i) % 2**32 for i in range(200_000)}) == 200_000


def test_streams_and_seeds_are_frozen():
    """A change here changes every training run and sample set."""
    streams = ["WEIGHTS", "DATA_ORDER", "FLIP", "TIMESTEP", "NOISE", "LABEL_DROP", "POSTERIOR",
               "SAMPLE_LABEL", "SAMPLE_NOISE", "LIKELIHOOD"]
    assert [getattr(seeding, stream) for stream in streams] == list(range(10))
    assert derive_seed(1, 3, 5) == 2878406626260388669
    assert derive_seed(0, 8, 49999) == 2459982477438780256
    assert derive_seed(123456789, 2, 2**33) == 6676117541431902272
    assert seeded_generator(1, 3, 5).initial_seed() == derive_seed(1, 3, 5)
