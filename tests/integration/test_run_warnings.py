"""What a run is worth: averages that are young or spoilt, other hyperparameters, labels that are all dropped."""
import argparse

import pytest
import torch

from helpers import DIGITS
from run_files import differences, folder_of, stored
from training.ema import EMA

FLAGS = [*DIGITS, "--num-workers", 0, "--log-every", 1]


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    """The training state after two steps."""
    from helpers import call
    folder = tmp_path_factory.mktemp("state")
    call("train", *FLAGS, "--lr", 0.01, "--max-steps", 2, "--results-dir", folder)
    return stored(folder, 2)


def resume(command, tmp_path, state, *flags):
    torch.save(state, tmp_path / "0000002.pt")
    return command("train", *FLAGS, "--lr", 0.01, "--max-steps", 3, "--resume", tmp_path / "0000002.pt",
                   "--results-dir", tmp_path / "runs", *flags)


def spoiled(state, key, value=float("nan")):
    """Return a copy of a state with a non-finite number in the weights of `key`."""
    weights = {name: tensor.clone() for name, tensor in state[key].items()}
    weights["final_layer.linear.bias"][0] = value
    return state | {key: weights}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_spoilt_average_is_refused_and_can_start_from_the_weights(command, tmp_path, state, value):
    status, _, err = resume(command, tmp_path, spoiled(state, "ema", value))
    assert status == 2 and "--resume" in err and "not finite" in err
    status, out, err = resume(command, tmp_path, spoiled(state, "ema", value), "--allow-config-change")
    assert status == 0 and "WARNING" in out, err
    assert all(tensor.isfinite().all() for tensor in stored(tmp_path / "runs", 3)["ema"].values())


@pytest.mark.parametrize("part", ["model", "opt"])
def test_spoilt_weights_and_moments_are_refused(command, tmp_path, state, part):
    if part == "model":
        wrong = spoiled(state, "model")
    else:
        moments = {key: dict(value, exp_avg=value["exp_avg"] * float("nan"))
                   for key, value in state["opt"]["state"].items()}
        wrong = state | dict(opt=state["opt"] | dict(state=moments))
    status, _, err = resume(command, tmp_path, wrong, "--allow-config-change")
    assert status == 2 and f"its {part}" in err and "earlier checkpoint" in err
    assert list((tmp_path / "runs").iterdir()) == []  # no folder of a run that did not start


@pytest.mark.parametrize("name, value", [("lr", 3e-4), ("lr", torch.tensor(3e-4)), ("betas", (0.9, 0.95)),
                                         ("weight_decay", 0.03)])
def test_hyperparameters_of_other_peoples_optimizers_are_compared(command, tmp_path, state, name, value):
    flags = argparse.Namespace(model="DiT-S/2", image_size=8, num_classes=10, global_batch_size=8, global_seed=0)
    groups = [group | {name: value} for group in state["opt"]["param_groups"]]
    theirs = dict(model=state["model"], ema=state["ema"], args=flags,
                  opt=state["opt"] | dict(param_groups=groups))
    status, _, err = resume(command, tmp_path, theirs)
    assert status == 2 and name in err and "--allow-config-change" in err
    status, out, err = resume(command, tmp_path, theirs, "--allow-config-change")
    assert status == 0 and "WARNING" in out, err
    assert stored(tmp_path / "runs", 3)["opt"]["param_groups"][0]["lr"] == 0.01


def test_control_the_same_learning_rate_of_a_published_file_is_no_change(command, tmp_path, state):
    theirs = {name: state[name] for name in ("model", "ema", "opt")} | dict(args=argparse.Namespace(model="DiT-S/2"))
    status, _, err = resume(command, tmp_path, theirs)
    assert status == 0, err


def test_young_average_is_named_while_training_and_at_the_end(command, tmp_path):
    status, out, _ = command("train", *FLAGS, "--max-steps", 3, "--sample-every", 1, "--results-dir", tmp_path / "a")
    assert status == 0 and out.count("WARNING: the EMA still holds 100% of its start") == 2
    for number, extra in enumerate((["--ema-warmup"], ["--ema-decay", 0.3])):
        status, out, _ = command("train", *FLAGS, "--max-steps", 3, *extra, "--results-dir", tmp_path / str(number))
        assert status == 0 and "WARNING" not in out


def test_warmup_follows_its_formula():
    net = torch.nn.Linear(3, 2)
    ema = EMA(net, 0.5, warmup=True)
    expected = net.weight.double().detach().clone()
    for step in range(20):
        with torch.no_grad():
            net.weight.add_(torch.randn(2, 3))
        ema.update(net, step=step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * net.weight.double().detach()
    torch.testing.assert_close(ema.model.weight.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("extra", [[], ["--fused-adamw"]])
def test_warmup_is_resumed_exactly_and_its_change_needs_confirmation(command, tmp_path, extra):
    flags = [*FLAGS, "--lr", 0.01, "--ema-warmup", *extra]
    command("train", *flags, "--max-steps", 4, "--results-dir", tmp_path / "straight")
    command("train", *flags, "--max-steps", 2, "--results-dir", tmp_path / "cut")
    command("train", *flags, "--max-steps", 4, "--resume", "auto", "--results-dir", tmp_path / "cut")
    assert differences(stored(tmp_path / "straight", 4), stored(tmp_path / "cut", 4)) == []
    status, _, err = command("train", *[flag for flag in flags if flag != "--ema-warmup"], "--max-steps", 5,
                             "--resume", folder_of(tmp_path / "cut"), "--results-dir", tmp_path / "cut")
    assert status == 2 and "--ema-warmup" in err


def test_dropping_every_label_is_named(command, tmp_path):
    status, out, _ = command("train", *FLAGS, "--max-steps", 1, "--class-dropout-prob", 1, "--results-dir", tmp_path)
    assert status == 0 and "WARNING: --class-dropout-prob 1" in out


def test_warnings_come_before_the_plan(command, tmp_path, state):
    status, out, err = resume(command, tmp_path, spoiled(state, "ema"), "--allow-config-change")
    assert status == 0, err
    assert out.index("WARNING") < out.index("Training for")
