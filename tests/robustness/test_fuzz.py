"""Files and flags mutated at random: a sentence and a status, never a traceback of ours, and never another result."""
import contextlib
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from common.checkpoint_io import load_checkpoint, save_checkpoint, select_weights, verify_checkpoint
from common.errors import UserError
from common.files import read_npz_array
from data.latent_cache.manifest import read_manifest, write_manifest
from data.latent_cache.reader import LatentCache, verify
from diffusion import create_diffusion
from diffusion.timestep_sampler import create_named_schedule_sampler
from helpers import DIGITS, TINY, call
from networks import build_dit
from training.ema import EMA
from training.nan_guard import NonFiniteGuard
from training.train_state import TrainState

often = settings(max_examples=600, deadline=2000, database=None, derandomize=True,
                 suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@some.composite
def mutations(draw):
    """A function that spoils bytes: flips, cuts, repeats, overwrites, a few of them in a row."""
    step = some.tuples(some.sampled_from(["flip", "cut", "drop", "repeat", "write"]), some.floats(0, 1),
                       some.floats(0, 1), some.binary(min_size=1, max_size=12))
    steps = draw(some.lists(step, min_size=1, max_size=4))

    def mutate(raw):
        for kind, where, other, text in steps:
            at, end = sorted((int(where * len(raw)), int(other * len(raw))))
            if kind == "flip" and at < len(raw):
                raw = raw[:at] + bytes([raw[at] ^ (text[0] or 1)]) + raw[at + 1:]
            elif kind == "cut":
                raw = raw[:at]
            elif kind == "drop":
                raw = raw[:at] + raw[end:]
            elif kind == "repeat":
                raw = raw[:end] + raw[at:end] + raw[end:]
            else:
                raw = raw[:at] + text + raw[at + len(text):]
        return raw

    return mutate


values = some.recursive(some.none() | some.booleans() | some.integers() | some.floats() | some.text(max_size=8)
                        | some.sampled_from(["../../etc/passwd", "/etc/passwd", 10**15, -1, 0, "fp16", "bf16"]),
                        lambda inner: some.lists(inner, max_size=3)
                        | some.dictionaries(some.text(max_size=5), inner, max_size=3), max_leaves=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


STATE = dict(model={"w": torch.arange(40.0)}, ema={"w": torch.ones(3)}, step=7, args=dict(model="DiT-S/2", lr=0.1))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("zipped", [True, False])
@given(mutate=mutations())
@often
def test_checkpoints(folder, zipped, mutate):
    """What passes the check and loads is what was saved."""
    torch.save(STATE, folder / "whole.pt", _use_new_zipfile_serialization=zipped)
    path = folder / "spoilt.pt"
    path.write_bytes(mutate((folder / "whole.pt").read_bytes()))
    try:
        verify_checkpoint(str(path))
        found = load_checkpoint(str(path))
        select_weights(found, str(path))
    except UserError as error:
        assert str(path) in str(error)
        return
    if zipped:  # the old format has no checksums
        assert torch.equal(found["model"]["w"], STATE["model"]["w"]) and found["step"] == 7


@pytest.fixture(scope="module")
def training_state(folder):
    """A checkpoint after two steps of a real run, and what makes the state of a run that would go on from it."""
    call("train", *DIGITS, "--schedule-sampler", "loss-second-moment", "--max-steps", 2, "--results-dir", folder)
    stored = load_checkpoint(str(next(folder.glob("000-*/checkpoints/0000002.pt"))))

    def make():
        model = build_dit(**stored["config"]["model"])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
        sampler = create_named_schedule_sampler("loss-second-moment", create_diffusion(""))
        return TrainState(model, optimizer, sampler, NonFiniteGuard(None, 10), EMA(model, 0.99), dict(stored["args"]),
                             stored["config"])

    return stored, make


def places(value, path=()):
    """Every place in nested dictionaries and lists, as the keys that lead to it."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield (*path, key)
        yield from places(inner, (*path, key))


def changed(value, path, change):
    """A copy in which `change` was called on the container and the key that a path leads to."""
    key, *rest = path
    copy = value.copy()
    if rest:
        copy[key] = changed(value[key], rest, change)
    else:
        change(copy, key)
    return copy


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # torch's, of lists in the place of names
@given(data=some.data())
@settings(often, max_examples=400)
def test_training_states(folder, training_state, data):
    """Whole files with good checksums, in which something is another thing: refused, or a state that can be trained."""
    stored, make = training_state
    where = data.draw(some.sampled_from(sorted(places(stored), key=str)))
    other = data.draw(values | some.sampled_from([torch.zeros(3), torch.zeros(2, 2, dtype=torch.long), torch.ones(())]))
    change = data.draw(some.sampled_from([lambda box, key: box.pop(key), lambda box, key: box.update({key: other})
                                          if isinstance(box, dict) else box.__setitem__(key, other)]))
    path = str(folder / "changed.pt")
    save_checkpoint(path, changed(stored, where, change))
    state = make()
    try:
        state.restore(path, override=True)
    except UserError as error:
        assert path in str(error)
        return
    for weight in state.model.parameters():
        weight.grad = torch.ones_like(weight)
    state.optimizer.step()
    state.ema.update(state.model)
    state.schedule_sampler.sample(4, torch.device("cpu"))
    assert state.optimizer.param_groups[0]["lr"] == 1e-3 and state.optimizer.param_groups[0]["betas"] == (0.9, 0.999)


@given(mutate=mutations())
@often
def test_sets_of_samples(folder, mutate):
    np.savez(folder / "whole.npz", arr_0=np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3), arr_1=np.zeros(1, np.int64))
    path = folder / "spoilt.npz"
    path.write_bytes(mutate((folder / "whole.npz").read_bytes()))
    for name in ("arr_0", "arr_1"):
        try:
            assert not read_npz_array(str(path), name).dtype.hasobject
        except UserError as error:
            assert "spoilt.npz" in str(error)


@pytest.fixture(scope="module")
def cache(folder, image_folder, vae_folder):
    call("extract_features", "--data-path", image_folder, "--features-path", folder / "cache", "--image-size", 32,
         "--vae", vae_folder, "--num-workers", 0, "--dtype", "fp32")
    return folder / "cache"


def answers(path):
    data = LatentCache(str(path))
    return data.__getitems__([(index, bool(index % 2)) for index in range(len(data))])


@given(mutate=mutations(), name=some.sampled_from(["manifest.json", "labels.npy", "moments-000.npy", "paths.txt"]))
@often
def test_latent_caches(folder, cache, mutate, name):
    """Opening, reading and verifying; whatever is wrong with a file, --verify finds it."""
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(cache, copy)
    raw = (cache / name).read_bytes()
    spoilt = mutate(raw)
    (copy / name).write_bytes(spoilt)
    with contextlib.suppress(UserError):
        answers(copy)
    try:
        found = verify(str(copy)) != []
    except UserError:
        found = True
    assert found or spoilt == raw or json_equal(spoilt, raw)


def json_equal(one, two):
    """White space in the manifest is nobody's loss."""
    try:
        return json.loads(one) == json.loads(two)
    except ValueError:
        return False


@given(data=some.data())
@often
def test_manifests_of_somebody_else(folder, cache, data):
    """With a checksum that fits: any value in any place is refused, or read as what it says; nothing else is opened."""
    copy = folder / "hostile"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(cache, copy)
    manifest = read_manifest(str(copy))
    name = data.draw(some.sampled_from(sorted(manifest)))
    if isinstance(manifest[name], dict) and data.draw(some.booleans()):
        inner = data.draw(some.sampled_from(sorted(manifest[name])))
        manifest[name][inner] = data.draw(values)
    elif data.draw(some.booleans()):
        manifest[name] = data.draw(values)
    else:
        del manifest[name]
    write_manifest(str(copy), manifest)
    for use in (lambda: answers(copy), lambda: verify(str(copy))):
        with contextlib.suppress(UserError):
            use()


@pytest.mark.parametrize("name", ["train", "sample", "sample_ddp", "extract_features", "download"])
@given(data=some.data())
@often
def test_flags(name, data):
    """Any text as any flag's value: argparse's sentence and status 2, or a value."""
    from common.cli import parse_args
    parser = __import__(name).build_parser()
    flags = sorted(option for action in parser._actions for option in action.option_strings if option.startswith("--"))
    text = some.text(max_size=12) | some.sampled_from(["nan", "inf", "-inf", "1e999", "-1", "0", str(2**70), "ddim",
                                                       "ddim0", "\x00", "٣", "--", "-", "=", "auto", "all"])
    line = [part for _ in range(data.draw(some.integers(1, 3))) for part in (
        data.draw(some.sampled_from(flags)), data.draw(text))]
    with open(os.devnull, "w") as nothing, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", nothing)
        patch.setattr(sys, "stdout", nothing)
        try:
            parse_args(parser, line)
        except SystemExit as stop:
            assert stop.code in (0, 2)


SIZES = ["--depth", "--hidden-size", "--num-heads", "--patch-size", "--num-classes", "--model"]  # cost memory: a few


@given(data=some.data())
@settings(often, max_examples=150, deadline=None)
def test_whole_runs(folder, data):
    """train.py from end to end, with up to three flags of any value: it trains a step, or says a sentence."""
    import train
    parser = train.build_parser()
    takes_value = sorted(flag for action in parser._actions for flag in action.option_strings
                         if flag.startswith("--") and action.nargs != 0 and flag not in (
                             "--data-path", "--features-path", "--results-dir", "--num-workers", "--vae", "--resume"))
    lone = ["--flip", "--no-flip", "--features-in-memory", "--async-save", "--override"]
    number = some.integers(-1, 70) | some.sampled_from([0.5, 1e-9, 1e9, 1e30, 0.1])
    line = ["--data-path", "digits", *TINY, "--max-steps", "1", "--global-batch-size", "4", "--log-every", "1",
            "--results-dir", str(folder / "runs")]
    for _ in range(data.draw(some.integers(1, 3))):
        if data.draw(some.integers(0, 4)) == 0:
            line.append(data.draw(some.sampled_from(lone)))
            continue
        flag = data.draw(some.sampled_from(takes_value))
        large = some.sampled_from([2**31, 2**63, 2**70]) if flag not in SIZES else some.nothing()
        value = data.draw(number | large | some.sampled_from(["loss-second-moment", "DiT-S/8", "auto"]))
        if flag == "--max-steps" and (not isinstance(value, int) or value > 9):
            continue  # it would train for so long
        line += [flag, str(value)]
    with open(os.devnull, "w") as nothing, pytest.MonkeyPatch.context() as patch:
        for stream in ("stdout", "stderr"):
            patch.setattr(sys, stream, nothing)
        patch.setattr(sys, "argv", ["train.py", *line])
        with contextlib.suppress(UserError):
            try:
                train.main()
            except SystemExit as stop:
                assert stop.code in (0, 2)
            finally:
                shutil.rmtree(folder / "runs", ignore_errors=True)
