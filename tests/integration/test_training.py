"""train.py: the published recipe, the same on any number of processes, and resumed exactly."""
import re

import pytest
import torch

from common.cli import parse_args
from helpers import DIGITS, TINY
from networks import build_dit
from run_files import differences, folder_of, largest_difference, losses, steps_of, stored
from training.cli import build_parser, choose_defaults
from training.train_state import match_averages


def test_one_and_two_processes_compute_the_same(children, tmp_path):
    """Samples, noise, timesteps and label drops are the same; only sums are rounded differently."""
    flags = [*DIGITS, "--max-steps", 6, "--log-every", 1, "--class-dropout-prob", 0.5]
    children.run("train", *flags, "--results-dir", tmp_path / "one")
    out = children.run("train", *flags, "--results-dir", tmp_path / "two", processes=2)
    assert out.count("step=0000006) Train Loss") == 1  # rank 0 alone logs
    one, two = stored(tmp_path / "one", 6), stored(tmp_path / "two", 6)
    assert len(losses(tmp_path / "one")) == 6
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1.1e-4)  # four digits are logged
    # Adam divides a gradient by its size: one that is all rounding error may move a weight by lr a step either way,
    # so that the bulk is compared, not the last outlier.
    difference = torch.cat([(one["model"][name] - two["model"][name]).abs().flatten() for name in one["model"]])
    assert difference.quantile(0.99) < 1e-5
    assert largest_difference(one, two, "ema") < 1e-4


def test_control_another_seed_gives_another_run(run_ok, tmp_path):
    for seed in (0, 1):
        run_ok("train", *DIGITS, "--max-steps", 2, "--global-seed", seed, "--results-dir", tmp_path / str(seed))
    assert largest_difference(stored(tmp_path / "0", 2), stored(tmp_path / "1", 2)) > 1e-3


def test_accumulated_gradients_are_those_of_the_full_batch(run_ok, tmp_path):
    flags = [*DIGITS, "--max-steps", 3, "--log-every", 1, "--class-dropout-prob", 0.5]
    run_ok("train", *flags, "--results-dir", tmp_path / "full")
    run_ok("train", *flags, "--grad-accum-steps", 4, "--results-dir", tmp_path / "accumulated")
    assert losses(tmp_path / "full") == pytest.approx(losses(tmp_path / "accumulated"), abs=1.1e-4)
    assert largest_difference(stored(tmp_path / "full", 3), stored(tmp_path / "accumulated", 3), "ema") < 1e-5


def test_checkpoint_has_the_published_keys(run_ok, tmp_path):
    run_ok("train", *DIGITS, "--max-steps", 4, "--ckpt-every", 2, "--sample-every", 4, "--ema-decay", 0,
           "--results-dir", tmp_path)
    folder = tmp_path / "000-DiT-S-2"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "log.txt", "samples", "tensorboard"]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["0000002.pt", "0000004.pt"]
    checkpoint = stored(tmp_path, 4)
    assert {"model", "ema", "opt", "args", "step"} <= checkpoint.keys()
    assert type(checkpoint["args"]) is dict and checkpoint["args"]["model"] == "DiT-S/2" and checkpoint["step"] == 4
    model = build_dit(**checkpoint["config"]["model"])
    model.load_state_dict(checkpoint["ema"], strict=True)
    torch.optim.AdamW(model.parameters()).load_state_dict(checkpoint["opt"])
    assert differences(checkpoint["model"], checkpoint["ema"]) == []  # decay 0
    group = checkpoint["opt"]["param_groups"][0]
    assert group["betas"] == (0.9, 0.999) and group["weight_decay"] == 0
    run_ok("train", *DIGITS, "--max-steps", 1, "--results-dir", tmp_path)
    assert (tmp_path / "001-DiT-S-2").is_dir()  # the next run has the next number


def test_images_train_through_a_vae_on_two_processes(children, image_folder, vae_folder, tmp_path):
    flags = ["--data-path", image_folder, "--image-size", 32, "--num-classes", 3, "--vae", vae_folder, *TINY,
             "--global-batch-size", 8, "--max-steps", 4, "--log-every", 1]
    children.run("train", *flags, "--num-workers", 1, "--results-dir", tmp_path / "two", processes=2)
    children.run("train", *flags, "--num-workers", 0, "--results-dir", tmp_path / "one")
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1.1e-4)
    config = stored(tmp_path / "two", 4)["config"]
    assert config["model"]["in_channels"] == 4 and config["model"]["input_size"] == 8
    assert config["class_names"] == ["ant", "bee", "cat"]
    log = (folder_of(tmp_path / "two") / "log.txt").read_text()
    assert re.search(r"\(step=0000001\) Train Loss: \d\.\d{4}, Train Steps/Sec: ", log)


def test_tensorboard_has_losses_speed_and_samples(run_ok, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run_ok("train", *DIGITS, "--max-steps", 4, "--log-every", 2, "--sample-every", 4, "--results-dir", tmp_path)
    events = EventAccumulator(str(tmp_path / "000-DiT-S-2" / "tensorboard")).Reload()
    assert {"train/loss", "train/mse", "train/vb", "train/grad_norm", "train/learning_rate", "speed/images_per_second",
            "speed/memory_gb"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["samples"]
    loss, mse, vb = ([event.value for event in events.Scalars(f"train/{name}")] for name in ("loss", "mse", "vb"))
    assert len(loss) == 2 and loss == pytest.approx([a + b for a, b in zip(mse, vb)], rel=1e-5)


def test_resume_auto_takes_the_latest_checkpoint_or_starts_a_run(run_ok, tmp_path):
    flags = [*DIGITS, "--max-steps", 2, "--results-dir", tmp_path]
    assert "WARNING: --resume auto: no checkpoint" in run_ok("train", *flags, "--resume", "auto")
    assert "Nothing to do" in run_ok("train", *flags, "--resume", "auto")


def test_resuming_an_earlier_checkpoint_makes_another_run(command, run_ok, tmp_path):
    """A folder must not hold a later checkpoint from which its run does not descend."""
    flags = [*DIGITS, "--ckpt-every", 1, "--results-dir", tmp_path]
    run_ok("train", *flags, "--max-steps", 3)
    folder = tmp_path / "000-DiT-S-2" / "checkpoints"
    run_ok("train", *flags, "--max-steps", 2, "--resume", folder / "0000001.pt")
    assert sorted(path.name for path in folder.iterdir()) == ["0000001.pt", "0000002.pt", "0000003.pt"]
    assert (tmp_path / "001-DiT-S-2" / "checkpoints" / "0000002.pt").exists()
    _, out, _ = command("train", *flags, "--max-steps", 3, "--resume", "auto")
    assert "001-DiT-S-2/checkpoints/0000002.pt at step 2" in out


def test_accelerate_config_does_not_change_the_run(run_ok, tmp_path, monkeypatch):
    """`accelerate launch` passes its saved settings on in the environment."""
    flags = [*DIGITS, "--max-steps", 2, "--log-every", 1]
    run_ok("train", *flags, "--results-dir", tmp_path / "plain")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    from accelerate.state import AcceleratorState
    AcceleratorState._reset_state(reset_partial_state=True)
    run_ok("train", *flags, "--results-dir", tmp_path / "configured")
    assert differences(stored(tmp_path / "plain", 2), stored(tmp_path / "configured", 2)) == []


def test_explicit_steps_and_models_override_the_preset_of_the_digits():
    def parse(*argv):
        return parse_args(build_parser(), choose_defaults, ["--data-path", "digits", *argv])[0]

    assert parse().epochs == 136 and parse("--max-steps", "140").epochs == 1400
    assert parse().hidden_size == 96 and parse("--model", "DiT-S/8").hidden_size is None


def test_several_decays_save_the_average_of_each(run_ok, tmp_path):
    flags = [*DIGITS, "--max-steps", 3, "--num-workers", 0]
    for name, decays in (("several", [0.5, 0, 0.9]), ("0.5", [0.5]), ("0.9", [0.9])):
        run_ok("train", *flags, "--ema-decay", *decays, "--results-dir", tmp_path / name)
    several, first, last = (stored(tmp_path / name, 3) for name in ("several", "0.5", "0.9"))
    assert several["args"]["ema_decay"] == [0.5, 0, 0.9] and first["args"]["ema_decay"] == 0.5
    assert differences(several["ema"], first["ema"]) == [] and "extra_emas" not in first
    assert differences(several["extra_emas"], {"0": several["model"], "0.9": last["ema"]}) == []


@pytest.mark.parametrize("before", [[0.5], [0.5, 0.7]], ids=["one average", "another average"])
def test_average_that_a_checkpoint_lacks_starts_from_the_weights(run_ok, run_error, tmp_path, before):
    flags = [*DIGITS, "--num-workers", 0, "--results-dir", tmp_path]
    run_ok("train", *flags, "--max-steps", 2, "--ema-decay", *before)
    resume = [*flags, "--max-steps", 3, "--ema-decay", 0.5, 0.9, "--resume", "auto"]
    assert "--ema-decay" in run_error("train", *resume)
    run_ok("train", *resume, "--allow-config-change")
    old, new, averages = stored(tmp_path, 2)["model"], stored(tmp_path, 3)["model"], stored(tmp_path, 3)["extra_emas"]
    assert averages.keys() == {"0.9"}
    for name, weight in averages["0.9"].items():
        torch.testing.assert_close(weight, old[name].lerp(new[name], 0.1), rtol=0, atol=1e-7)


def test_averages_keep_their_decay_when_the_order_changes(run_ok, tmp_path):
    flags = [*DIGITS, "--num-workers", 0]
    run_ok("train", *flags, "--ema-decay", 0.5, 0.9, "--max-steps", 3, "--results-dir", tmp_path / "straight")
    run_ok("train", *flags, "--ema-decay", 0.5, 0.9, "--max-steps", 2, "--results-dir", tmp_path / "cut")
    run_ok("train", *flags, "--ema-decay", 0.9, 0.5, "--max-steps", 3, "--results-dir", tmp_path / "cut",
           "--resume", "auto", "--allow-config-change")
    straight, cut = stored(tmp_path / "straight", 3), stored(tmp_path / "cut", 3)
    assert cut["args"]["ema_decay"] == [0.9, 0.5]
    assert differences(cut["ema"], straight["extra_emas"]["0.9"]) == []
    assert differences(cut["extra_emas"], {"0.5": straight["ema"]}) == []


def test_new_and_dropped_averages_are_named():
    """A new one starts from the weights; a single average that continues with another decay stays as it is."""
    checkpoint = dict(args=dict(ema_decay=[0.5, 0.9]), model="weights", ema="half", extra_emas={"0.9": "more"})
    assert match_averages(checkpoint, [0.9, 0.7]) == ["the average of decay 0.7 starts from the weights",
                                                      "the average of decay 0.5 is dropped"]
    assert checkpoint["ema"] == "more" and checkpoint["extra_emas"] == {"0.7": "weights"}
    single = dict(args=dict(ema_decay=0.9), model="weights", ema="average")
    assert match_averages(single, [0.99]) == [] and single["ema"] == "average"


def test_zero_steps_mean_off(run_ok, tmp_path):
    every = ["--log-every", 0, "--ckpt-every", 0, "--sample-every", 0, "--eval-every", 0]
    assert run_ok("train", *DIGITS, *every, "--max-steps", 3, "--results-dir", tmp_path).count("Train Loss") == 1
    assert steps_of(tmp_path) == [3]
