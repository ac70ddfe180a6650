"""training/ema.py: the moving average of the weights."""
import pytest
import torch
from torch import nn

from training.ema import EMA


def model():
    """Return a network with two trained parameters, a fixed one and a buffer."""
    net = nn.Linear(3, 2)
    net.fixed = nn.Parameter(torch.randn(4), requires_grad=False)
    net.register_buffer("table", torch.randn(5))
    return net


def change(net):
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.add_(torch.randn(tensor.shape))


def copy_of(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def test_average_starts_as_an_independent_copy():
    net = model().train()
    ema = EMA(net, 0.9)
    before = copy_of(net)
    assert not ema.model.training and net.training
    assert not any(weight.requires_grad for weight in ema.model.parameters())
    change(net)
    for name, tensor in ema.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_average_follows_its_formula():
    net = model()
    ema = EMA(net, 0.9)
    expected = {name: tensor.double() for name, tensor in copy_of(net).items()}
    for _ in range(20):
        change(net)
        ema.update(net)
        new = net.state_dict()
        expected = {name: 0.9 * old + (1 - 0.9) * new[name].double() for name, old in expected.items()}
    averages = ema.model.state_dict()
    for name in ("weight", "bias"):
        torch.testing.assert_close(averages[name].double(), expected[name], rtol=1e-5, atol=1e-6)
    for name in ("fixed", "table"):
        assert torch.equal(averages[name], net.state_dict()[name]), name
        assert not torch.allclose(averages[name].double(), expected[name]), name


@pytest.mark.parametrize("decay", [0, 1])
def test_decay_0_keeps_the_weights_and_1_the_initial_ones(decay):
    net = model()
    ema = EMA(net, decay)
    start = copy_of(net)
    change(net)
    ema.update(net)
    expected = start if decay else net.state_dict()
    for name in ("weight", "bias"):
        assert torch.equal(ema.model.state_dict()[name], expected[name])


def test_update_does_not_change_the_model():
    net = model()
    ema = EMA(net, 0.5)
    change(net)
    before, trained = copy_of(net), [weight.requires_grad for weight in net.parameters()]
    ema.update(net)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert [weight.requires_grad for weight in net.parameters()] == trained
    assert all(weight.grad is None for weight in net.parameters())
