"""train.py: the published recipe, the same on any number of processes, and resumed as if never stopped."""
import re

import pytest
import torch

from helpers import DIGITS, TINY, differences, largest_difference, losses, run_process, stored, trained


def test_one_and_two_processes_compute_the_same(tmp_path):
    """The same samples, noise, timesteps and label drops, whoever computes them; only sums are rounded otherwise."""
    flags = [*DIGITS, "--max-steps", 6, "--log-every", 1, "--class-dropout-prob", 0.5]
    run_process("train.py", *flags, "--results-dir", tmp_path / "one")
    done = run_process("train.py", *flags, "--results-dir", tmp_path / "two", processes=2)
    assert (done.stdout + done.stderr).count("step=0000006) Train Loss") == 1  # one process speaks
    one, two = trained(tmp_path / "one", 6), trained(tmp_path / "two", 6)
    assert len(losses(tmp_path / "one")) == 6
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1.1e-4)  # four digits are logged
    # Adam divides a gradient by its own size: one that is all rounding error may move a weight by lr (1e-3) a step
    # either way, so the bulk is compared, not the last outlier.
    difference = torch.cat([(one["model"][name] - two["model"][name]).abs().flatten() for name in one["model"]])
    assert difference.quantile(0.99) < 1e-5
    assert largest_difference(one, two, "ema") < 1e-4


def test_other_seed_gives_another_run(command, tmp_path):
    """The control to the tests of equality."""
    for seed in (0, 1):
        command("train", *DIGITS, "--max-steps", 2, "--global-seed", seed, "--results-dir", tmp_path / str(seed))
    assert largest_difference(trained(tmp_path / "0", 2), trained(tmp_path / "1", 2)) > 1e-3


def test_accumulated_gradients_are_those_of_the_whole_batch(command, tmp_path):
    flags = [*DIGITS, "--max-steps", 3, "--log-every", 1, "--class-dropout-prob", 0.5]
    command("train", *flags, "--results-dir", tmp_path / "whole")
    command("train", *flags, "--grad-accum-steps", 4, "--results-dir", tmp_path / "parts")
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "parts"), abs=1.1e-4)
    assert largest_difference(trained(tmp_path / "whole", 3), trained(tmp_path / "parts", 3), "ema") < 1e-5


@pytest.mark.parametrize("extra", [
    ["--max-grad-norm", "0.5"],
    ["--schedule-sampler", "loss-second-moment", "--grad-accum-steps", "2"],
])
def test_resumed_run_is_the_undisturbed_run(command, tmp_path, extra):
    """Weights, EMA, optimiser: bit for bit, over the end of an epoch (179 steps) and in the middle of one."""
    flags = [*DIGITS, *extra, "--ckpt-every", 5, "--log-every", 1]
    command("train", *flags, "--max-steps", 185, "--results-dir", tmp_path / "straight")
    command("train", *flags, "--max-steps", 175, "--results-dir", tmp_path / "cut")
    status, out, _ = command("train", *flags, "--max-steps", 185, "--results-dir", tmp_path / "cut", "--resume", "auto")
    assert status == 0 and "at step 175" in out
    straight, cut = trained(tmp_path / "straight", 185), trained(tmp_path / "cut", 185)
    assert losses(tmp_path / "straight") == losses(tmp_path / "cut")
    assert largest_difference(straight, cut) == largest_difference(straight, cut, "ema") == 0
    for i, state in straight["opt"]["state"].items():
        assert all(torch.equal(state[name], cut["opt"]["state"][i][name]) for name in state)
    history = straight["schedule_sampler"]
    assert all(torch.equal(history[name], cut["schedule_sampler"][name]) for name in history)


def test_checkpoint_holds_what_the_contract_says(command, tmp_path):
    """`model`, `ema`, `opt`, `args` as published, and enough to build the model again."""
    from networks import build_dit
    status, *_ = command("train", *DIGITS, "--max-steps", 4, "--ckpt-every", 2, "--sample-every", 4,
                         "--ema-decay", 0, "--results-dir", tmp_path)
    assert status == 0
    folder = tmp_path / "000-DiT-S-2"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "log.txt", "samples", "tensorboard"]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["0000002.pt", "0000004.pt"]
    stored = trained(tmp_path, 4)
    assert {"model", "ema", "opt", "args", "step"} <= stored.keys()
    assert type(stored["args"]) is dict and stored["args"]["model"] == "DiT-S/2" and stored["step"] == 4
    model = build_dit(**stored["config"]["model"])
    model.load_state_dict(stored["ema"], strict=True)
    torch.optim.AdamW(model.parameters()).load_state_dict(stored["opt"])
    assert largest_difference(stored, {"model": stored["ema"]}) == 0  # decay 0: the EMA is the model
    group = stored["opt"]["param_groups"][0]
    assert group["betas"] == (0.9, 0.999) and group["weight_decay"] == 0
    command("train", *DIGITS, "--max-steps", 1, "--results-dir", tmp_path)
    assert (tmp_path / "001-DiT-S-2").is_dir()  # the next experiment has the next number


def test_ema_follows_its_formula(command, tmp_path):
    """One step at decay 0.75: a quarter of the way from the initial weights to the new ones."""
    initial = {}
    for step in (1, 2):
        command("train", *DIGITS, "--max-steps", step, "--ema-decay", 0.75, "--results-dir", tmp_path / str(step))
        initial[step] = trained(tmp_path / str(step), step)
    name = "blocks.0.attn.qkv.weight"
    want = 0.75 * initial[1]["ema"][name] + 0.25 * initial[2]["model"][name]
    assert torch.allclose(initial[2]["ema"][name], want, atol=1e-7)


def test_images_through_a_vae_on_two_processes(image_folder, vae_folder, tmp_path):
    """The ImageNet path in small: an image folder, crop and flip in worker processes, a VAE, DDP."""
    flags = ["--data-path", image_folder, "--image-size", 32, "--num-classes", 3, "--vae", vae_folder, *TINY,
             "--global-batch-size", 8, "--max-steps", 4, "--log-every", 1]
    run_process("train.py", *flags, "--num-workers", 1, "--results-dir", tmp_path / "two", processes=2)
    run_process("train.py", *flags, "--num-workers", 0, "--results-dir", tmp_path / "one")
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1.1e-4)
    stored = trained(tmp_path / "two", 4)
    assert stored["config"]["model"]["in_channels"] == 4 and stored["config"]["model"]["input_size"] == 8
    assert stored["config"]["class_names"] == ["ant", "bee", "cat"]
    assert re.search(r"\(step=0000001\) Train Loss: \d\.\d{4}, Train Steps/Sec: ", next(
        (tmp_path / "two").glob("*/log.txt")).read_text())


def test_tensorboard_has_what_people_look_at(command, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    command("train", *DIGITS, "--max-steps", 4, "--log-every", 2, "--sample-every", 4, "--results-dir", tmp_path)
    events = EventAccumulator(str(tmp_path / "000-DiT-S-2" / "tensorboard")).Reload()
    assert {"train/loss", "train/mse", "train/vb", "train/grad_norm", "train/learning_rate", "speed/images_per_second",
            "speed/memory_gb"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["samples"]
    loss, mse, vb = ([event.value for event in events.Scalars(f"train/{name}")] for name in ("loss", "mse", "vb"))
    assert len(loss) == 2 and loss == pytest.approx([a + b for a, b in zip(mse, vb)], rel=1e-5)


def test_resuming_another_model_is_refused(command, tmp_path):
    command("train", *DIGITS, "--max-steps", 1, "--results-dir", tmp_path)
    again = ["--max-steps", 2, "--results-dir", tmp_path, "--resume", "auto"]
    status, _, err = command("train", *DIGITS, "--depth", 2, *again)
    assert status == 2 and "depth=1" in err and "depth=2" in err
    status, _, err = command("train", *DIGITS, "--lr", 0.5, *again)
    assert status == 2 and "--lr is 0.5, it was 0.0001" in err and "--allow-config-change" in err
    status, out, _ = command("train", *DIGITS, "--lr", 0.5, *again, "--allow-config-change")
    assert status == 0 and "WARNING: --lr is 0.5, it was 0.0001 (--allow-config-change)" in out
    assert trained(tmp_path, 2)["opt"]["param_groups"][0]["lr"] == 0.5


def test_resume_auto_takes_the_newest_and_starts_without_one(command, tmp_path):
    status, out, _ = command("train", *DIGITS, "--max-steps", 2, "--results-dir", tmp_path, "--resume", "auto")
    assert status == 0 and "starting from the beginning" in out
    status, out, _ = command("train", *DIGITS, "--max-steps", 2, "--results-dir", tmp_path, "--resume", "auto")
    assert status == 0 and "Nothing to do: 2 steps are done" in out
    status, _, err = command("train", *DIGITS, "--results-dir", tmp_path, "--resume", tmp_path / "none.pt")
    assert status == 2 and "none.pt" in err


def test_going_back_is_another_experiment(command, tmp_path):
    """Resumed below the newest checkpoint, a run must not leave one in its folder that it does not descend from."""
    flags = [*DIGITS, "--ckpt-every", 1, "--results-dir", tmp_path]
    command("train", *flags, "--max-steps", 3)
    folder = tmp_path / "000-DiT-S-2" / "checkpoints"
    command("train", *flags, "--max-steps", 2, "--resume", folder / "0000001.pt")
    assert sorted(path.name for path in folder.iterdir()) == ["0000001.pt", "0000002.pt", "0000003.pt"]
    assert (tmp_path / "001-DiT-S-2" / "checkpoints" / "0000002.pt").exists()
    _, out, _ = command("train", *flags, "--max-steps", 3, "--resume", "auto")
    assert "001-DiT-S-2/checkpoints/0000002.pt at step 2" in out


def test_an_accelerate_config_does_not_change_the_run(command, tmp_path, monkeypatch):
    """`accelerate launch` hands its saved settings over in the environment: no flag, no effect on the numbers."""
    flags = [*DIGITS, "--max-steps", 2, "--log-every", 1]
    command("train", *flags, "--results-dir", tmp_path / "plain")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    from accelerate.state import AcceleratorState
    AcceleratorState._reset_state(reset_partial_state=True)
    command("train", *flags, "--results-dir", tmp_path / "configured")
    assert largest_difference(trained(tmp_path / "plain", 2), trained(tmp_path / "configured", 2)) == 0


def test_typed_steps_are_kept_for_the_digits(command, tmp_path):
    """The preset's epochs must not end a run before the steps that were asked for."""
    _, out, _ = command("train", "--data-path", "digits", "--depth", 1, "--hidden-size", 16, "--num-heads", 2,
                        "--global-batch-size", 1438, "--max-steps", 140, "--results-dir", tmp_path)
    assert "Training for 140 steps, to step 140 (--max-steps)" in out


def test_typed_sizes_are_kept_for_the_digits(command, tmp_path):
    """What suits the embedded data by default does not reach into a model that was asked for."""
    command("train", "--data-path", "digits", "--model", "DiT-S/8", "--depth", 1, "--global-batch-size", 8,
            "--max-steps", 1, "--results-dir", tmp_path)
    config = trained(tmp_path, 1)["config"]["model"]
    assert (config["hidden_size"], config["num_heads"], config["patch_size"]) == (384, 6, 8)


def test_several_decays_save_the_average_of_each(command, tmp_path):
    """Each is the average of a run with that decay alone; the first is `ema`, and 0 is the weights themselves."""
    flags = [*DIGITS, "--max-steps", 3, "--num-workers", 0]
    for name, decays in (("several", [0.5, 0, 0.9]), ("half", [0.5]), ("more", [0.9])):
        status, _, err = command("train", *flags, "--ema-decay", *decays, "--results-dir", tmp_path / name)
        assert status == 0, err
    several, half, more = (stored(tmp_path / name, 3) for name in ("several", "half", "more"))
    assert several["args"]["ema_decay"] == [0.5, 0, 0.9] and half["args"]["ema_decay"] == 0.5
    assert differences(several["ema"], half["ema"]) == [] and "extra_emas" not in half
    assert differences(several["extra_emas"], {"0": several["model"], "0.9": more["ema"]}) == []


def test_several_averages_resume(command, tmp_path):
    """Bit for bit; an average that the checkpoint lacks starts from the weights, if the change is allowed."""
    flags = [*DIGITS, "--num-workers", 0, "--ema-decay", 0.5, 0.9]
    command("train", *flags, "--max-steps", 4, "--results-dir", tmp_path / "straight")
    command("train", *flags, "--max-steps", 2, "--results-dir", tmp_path / "cut")
    status, _, err = command("train", *flags, "--max-steps", 4, "--results-dir", tmp_path / "cut", "--resume", "auto")
    assert status == 0, err
    assert differences(stored(tmp_path / "straight", 4), stored(tmp_path / "cut", 4)) == []
    other = [*flags[:-1], 0.7, "--results-dir", tmp_path / "cut", "--resume", "auto", "--max-steps", 5]
    status, _, err = command("train", *other)
    assert status == 2 and "--ema-decay" in err
    status, _, err = command("train", *other, "--allow-config-change")
    assert status == 0, err
    assert stored(tmp_path / "cut", 5)["extra_emas"].keys() == {"0.7"}
