"""Timestep samplers: what they draw, and that their weights leave the expected loss unchanged."""
import math
import sys
import types

import numpy as np
import pytest
import torch

from common import distributed
from diffusion import create_diffusion
from diffusion.timestep_sampler import LossSecondMomentResampler, UniformSampler, create_named_schedule_sampler


def steps(number):
    """Return a stand-in for a diffusion process of that many steps."""
    return types.SimpleNamespace(num_timesteps=number)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def learned(losses, **arguments):
    """Return a resampler whose history of timestep i is `losses[i]`."""
    losses = torch.tensor(losses, dtype=torch.float32)
    sampler = LossSecondMomentResampler(steps(len(losses)), losses.shape[1], **arguments)
    for column in losses.T:
        sampler.update_with_local_losses(torch.arange(len(losses)), column)
    return sampler


def probabilities(sampler):
    return sampler.weights() / sampler.weights().sum()


def test_named_samplers_have_a_weight_for_every_timestep():
    diffusion = create_diffusion("7")
    for name, sampler_class in (("uniform", UniformSampler), ("loss-second-moment", LossSecondMomentResampler)):
        sampler = create_named_schedule_sampler(name, diffusion)
        assert isinstance(sampler, sampler_class)
        assert sampler.weights().shape == (7,)
    with pytest.raises(ValueError, match="second-moment"):
        create_named_schedule_sampler("importance", diffusion)


@pytest.mark.parametrize("sampler", [UniformSampler(steps(10)), LossSecondMomentResampler(steps(10))])
def test_draws_are_uniform_before_any_loss(sampler):
    t, weights = sampler.sample(20_000, "cpu", seeded())
    assert t.dtype == torch.int64 and weights.dtype == torch.float32
    assert torch.equal(weights, torch.ones(20_000))
    counts = t.bincount(minlength=10)
    assert len(counts) == 10
    assert (counts - 2000).abs().max() < 5 * math.sqrt(20_000 * 0.1 * 0.9)


@pytest.mark.parametrize("sampler", [UniformSampler(steps(1000)), LossSecondMomentResampler(steps(1000))])
def test_draws_are_a_function_of_the_generator(sampler):
    draw = [sampler.sample(50, "cpu", seeded(seed))[0] for seed in (1, 1, 2)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])


def test_uniform_until_every_timestep_has_its_history():
    sampler = LossSecondMomentResampler(steps(3), history_per_term=2)
    sampler.update_with_local_losses(torch.tensor([0, 0, 0, 1, 1, 2]), torch.arange(1.0, 7.0))
    assert probabilities(sampler) == pytest.approx([1 / 3] * 3)
    sampler.update_with_local_losses(torch.tensor([2]), torch.tensor([7.0]))
    assert probabilities(sampler)[2] > 1.2 * probabilities(sampler)[1] > 1.2 * probabilities(sampler)[0]


def test_probabilities_follow_the_second_moment_of_the_losses():
    """sqrt(E[L^2]) (Improved DDPM, section 3.3), not the mean of |L|, mixed with a uniform share."""
    sampler = learned([[0.0, 0], [3, 4], [-1, 7]], uniform_prob=0.1)
    moments = np.sqrt([0, 12.5, 25])
    assert probabilities(sampler) == pytest.approx(0.9 * moments / moments.sum() + 0.1 / 3)


def test_losses_of_zero_leave_the_draw_uniform():
    assert probabilities(learned([[0.0], [0.0]])) == pytest.approx([0.5, 0.5])


def test_the_oldest_loss_is_forgotten():
    sampler = LossSecondMomentResampler(steps(2), history_per_term=3, uniform_prob=0)
    sampler.update_with_local_losses(torch.tensor([1, 1, 1]), torch.tensor([1.0, 1, 1]))
    sampler.update_with_local_losses(torch.tensor([0] * 5), torch.tensor([9.0, 8, 3, 4, 5]))
    rms = math.sqrt((9 + 16 + 25) / 3)
    assert probabilities(sampler) == pytest.approx([rms / (rms + 1), 1 / (rms + 1)])


def test_weighting_leaves_the_expected_loss_alone():
    """The weighted mean over draws is that over timesteps, within 5 standard errors; a plain one is not."""
    losses = np.array([0.1, 0.5, 1.0, 4.0])
    sampler, draws = learned(losses[:, None]), 100_000
    p = probabilities(sampler)
    t, weights = sampler.sample(draws, "cpu", seeded())
    assert t.bincount(minlength=4) / draws == pytest.approx(p, abs=5 * math.sqrt(0.25 / draws))
    np.testing.assert_allclose(weights, 1 / (4 * p[t]), rtol=1e-5)
    drawn = losses[t]
    error = math.sqrt((losses**2 / (16 * p)).sum() - losses.mean() ** 2) / math.sqrt(draws)
    assert (weights.numpy() * drawn).mean() == pytest.approx(losses.mean(), abs=5 * error)
    assert abs(drawn.mean() - losses.mean()) > 100 * error


def test_losses_that_require_gradients_are_accepted():
    sampler = LossSecondMomentResampler(steps(2), history_per_term=1)
    sampler.update_with_local_losses(torch.tensor([0, 1]), torch.tensor([1.0, 3.0], requires_grad=True) * 1)
    assert probabilities(sampler) == pytest.approx([0.25, 0.75], abs=1e-3)


def test_a_restored_sampler_continues_like_the_saved_one():
    original = LossSecondMomentResampler(steps(2), history_per_term=2)
    original.update_with_local_losses(torch.tensor([0, 0, 1]), torch.tensor([1.0, 2.0, 3.0]))
    state = original.state_dict()
    assert all(torch.is_tensor(value) for value in state.values())
    saved = {name: value.clone() for name, value in state.items()}
    restored = LossSecondMomentResampler(steps(2), history_per_term=2)
    restored.load_state_dict(state)
    for sampler in (original, restored):
        sampler.update_with_local_losses(torch.tensor([1, 0]), torch.tensor([4.0, 5.0]))
        assert probabilities(sampler) == pytest.approx(probabilities(learned([[2.0, 5], [3, 4]])))
    assert all(torch.equal(value, saved[name]) for name, value in state.items())


def test_a_state_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(3, 2\).*\(3, 4\)"):
        LossSecondMomentResampler(steps(3), history_per_term=4).load_state_dict(
            LossSecondMomentResampler(steps(3), history_per_term=2).state_dict())


def test_the_uniform_sampler_has_no_state():
    sampler = UniformSampler(steps(3))
    assert sampler.state_dict() == {}
    sampler.load_state_dict({})


def main():
    """Learn from the batches of this rank; `children` runs this."""
    distributed.init()
    folder, rank = sys.argv[1], distributed.rank()
    sampler = LossSecondMomentResampler(steps(4), history_per_term=3)
    for t, losses in torch.load(f"{folder}/batches.pt")[rank]:
        sampler.update_with_local_losses(t, losses)
    torch.save(sampler.state_dict(), f"{folder}/state{rank}.pt")


def test_two_ranks_learn_as_one(children, tmp_path):
    """With batches of unequal sizes; the histories overflow, so that the order of the ranks matters."""
    generator = seeded()
    sizes = [[3, 2, 9], [1, 5, 8]]
    batches = [[(torch.randint(4, (n,), generator=generator), torch.rand(n, generator=generator))
                for n in rank] for rank in sizes]
    torch.save(batches, tmp_path / "batches.pt")
    children.run("test_timestep_sampler", tmp_path, processes=2)
    alone = LossSecondMomentResampler(steps(4), history_per_term=3)
    for round_of_0, round_of_1 in zip(*batches):
        for t, losses in (round_of_0, round_of_1):
            alone.update_with_local_losses(t, losses)
    expected = alone.state_dict()
    assert (expected["counts"] == 3).all()
    for rank in (0, 1):
        state = torch.load(tmp_path / f"state{rank}.pt")
        assert all(torch.equal(state[name], expected[name]) for name in expected), rank
