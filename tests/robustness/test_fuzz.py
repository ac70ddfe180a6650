"""Files and flags mutated at random give an error message and a status: never a traceback, never another result."""
import contextlib
import importlib
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import networks
from common.checkpoint_io import load_checkpoint, save_checkpoint, verify_checkpoint
from common.cli import parse_args
from common.errors import UserError
from common.files import read_npz_array
from common.state_dicts import select_weights
from data.latent_cache.manifest import read_manifest, write_manifest
from data.latent_cache.reader import LatentCache, verify
from diffusion import create_diffusion
from diffusion.timestep_sampler import create_named_schedule_sampler
from helpers import DIGITS, TINY, call, raises_argument
from run_files import stored
from training.checkpoint_manager import CheckpointManager
from training.ema import EMA
from training.nan_guard import NonFiniteGuard
from training.train_state import ModelState, OptimizerState, find_config_changes


def examples(count):
    """Run a test on `count` examples, the same at each run, however long they take."""
    return settings(max_examples=count, deadline=None, database=None, derandomize=True,
                    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@st.composite
def mutations(draw):
    """Draw a function that damages bytes by one to four flips, cuts, repetitions or overwrites."""
    step = st.tuples(st.sampled_from(["flip", "cut", "drop", "repeat", "write"]), st.floats(0, 1), st.floats(0, 1),
                     st.binary(min_size=1, max_size=12))
    steps = draw(st.lists(step, min_size=1, max_size=4))

    def mutate(raw):
        for kind, one, other, text in steps:
            start, end = sorted((int(one * len(raw)), int(other * len(raw))))
            if kind == "flip" and start < len(raw):
                raw = raw[:start] + bytes([raw[start] ^ (text[0] or 1)]) + raw[start + 1:]
            elif kind == "cut":
                raw = raw[:start]
            elif kind == "drop":
                raw = raw[:start] + raw[end:]
            elif kind == "repeat":
                raw = raw[:end] + raw[start:end] + raw[end:]
            else:
                raw = raw[:start] + text + raw[start + len(text):]
        return raw

    return mutate


values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
                      | st.sampled_from(["../../etc/passwd", "/etc/passwd", 10**15, -1, 0, "fp16", "bf16"]),
                      lambda inner: st.lists(inner, max_size=3)
                      | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


WEIGHTS = dict(model={"w": torch.arange(40.0)}, ema={"w": torch.ones(3)}, step=7, args=dict(model="DiT-S/2", lr=0.1))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("is_zip", [True, False])
@given(mutate=mutations())
@examples(200)
def test_damaged_checkpoints_are_refused_or_intact(folder, is_zip, mutate):
    torch.save(WEIGHTS, folder / "intact.pt", _use_new_zipfile_serialization=is_zip)
    path = folder / "damaged.pt"
    path.write_bytes(mutate((folder / "intact.pt").read_bytes()))
    try:
        verify_checkpoint(str(path))
        checkpoint = load_checkpoint(str(path))
        select_weights(checkpoint, str(path))
    except UserError as error:
        assert str(path) in str(error)
        return
    if is_zip:  # the old format has no checksums
        assert torch.equal(checkpoint["model"]["w"], WEIGHTS["model"]["w"]) and checkpoint["step"] == 7


@pytest.fixture(scope="module")
def checkpoint(folder):
    call("train", *DIGITS, "--schedule-sampler", "loss-second-moment", "--max-steps", 2, "--results-dir", folder)
    return stored(folder, 2)


class Run:
    """What a run that resumes `checkpoint` consists of, with another learning rate."""

    def __init__(self, checkpoint):
        self.model = networks.build_dit(**checkpoint["config"]["model"])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=0)
        self.sampler = create_named_schedule_sampler("loss-second-moment", create_diffusion(""))
        self.ema, self.guard = EMA(self.model, 0.99), NonFiniteGuard(10, max_loss_spike=5)
        self.args, self.config = dict(checkpoint["args"]), checkpoint["config"]

    def restore(self, path):
        manager = CheckpointManager(os.path.dirname(path), {}, model=ModelState(self.model),
                                    ema=ModelState(self.ema.model), opt=OptimizerState(self.optimizer, self.model),
                                    schedule_sampler=self.sampler, guard=self.guard)
        return manager.restore(path, lambda stored: find_config_changes(stored, self.args, self.config))

    def step(self):
        for weight in self.model.parameters():
            weight.grad = torch.ones_like(weight)
        self.guard.check(0, torch.tensor(1.0), torch.tensor(1.0), torch.ones(4))
        self.optimizer.step()
        self.ema.update(self.model)
        t, weights = self.sampler.sample(4, torch.device("cpu"))
        self.sampler.update_with_local_losses(t, weights)


def key_paths(value, path=()):
    """Yield every place in nested dictionaries and lists, as the keys that lead to it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from key_paths(inner, (*path, key))


def changed(value, path, change):
    """Return a copy in which `change` was called on the container and the key that a path leads to."""
    key, *rest = path
    copy = value.copy()
    if rest:
        copy[key] = changed(value[key], rest, change)
    else:
        change(copy, key)
    return copy


def remove(container, key):
    container.pop(key)


def replace_by(value):
    return lambda container, key: container.__setitem__(key, value)


tensors = st.sampled_from([torch.zeros(3), torch.zeros(2, 2, dtype=torch.long), torch.ones(()), -torch.ones(()),
                           torch.tensor(float("nan"))])


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # torch's, for lists instead of names
@given(data=st.data())
@examples(150)
def test_odd_training_states_are_refused_or_can_be_trained(folder, checkpoint, data):
    place = data.draw(st.sampled_from(sorted(key_paths(checkpoint), key=str)))
    change = data.draw(st.just(remove) | st.builds(replace_by, values | tensors))
    path = str(folder / "changed.pt")
    save_checkpoint(path, changed(checkpoint, place, change))
    run = Run(checkpoint)
    try:
        run.restore(path)
    except UserError as error:
        assert path in str(error)
        return
    run.step()
    assert run.optimizer.param_groups[0]["lr"] == 1e-3 and run.optimizer.param_groups[0]["betas"] == (0.9, 0.999)


MOMENTS = ("opt", "state", 1)  # of the first weight that is trained
REFUSED = {
    "no weights": (("model",), {}), "weights of another kind": (("model",), 7), "a missing EMA": (("ema",), None),
    "an empty EMA": (("ema",), {}), "no optimizer": (("opt",), {}), "no flags": (("args",), None),
    "flags of another kind": (("args",), 5), "no configuration": (("config",), None),
    "no moments": (("opt", "state"), {}), "moments of one weight missing": (MOMENTS, {}),
    "moments of another shape": ((*MOMENTS, "exp_avg"), torch.zeros(3)),
    "integer moments": ((*MOMENTS, "exp_avg_sq"), 5),
    "a negative count of steps": ((*MOMENTS, "step"), torch.tensor(-1.0)),
    "a count of steps that is NaN": ((*MOMENTS, "step"), torch.tensor(float("nan"))),
    "a step as text": (("step",), "2"), "a negative step": (("step",), -5), "an infinite step": (("step",), 2**70),
    "a guard of another kind": (("guard",), dict(allows=3)), "a guard's negative count": (("guard", "averaged"), -1),
    "a guard's infinite count": (("guard", "total"), float("inf")),
    "a guard's NaN average": (("guard", "average"), float("nan")),
    "a loss history of another shape": (("schedule_sampler", "losses"), torch.zeros(3)),
    "a loss history's count of another kind": (("schedule_sampler", "counts"), torch.zeros(1000)),
}


@pytest.mark.parametrize("place, value", REFUSED.values(), ids=REFUSED)
def test_training_states_that_cannot_be_resumed_are_refused(folder, checkpoint, place, value):
    path = str(folder / "refused.pt")
    save_checkpoint(path, changed(checkpoint, place, replace_by(value)))
    with raises_argument(resume=path):
        Run(checkpoint).restore(path)


def test_control_an_unchanged_training_state_is_restored(folder, checkpoint):
    """The refusals above have a reason; a state before the first applied step needs no moments."""
    path = str(folder / "unchanged.pt")
    save_checkpoint(path, checkpoint)
    assert Run(checkpoint).restore(path) == 2
    fresh = checkpoint | dict(opt=checkpoint["opt"] | dict(state={}), guard=checkpoint["guard"] | dict(total=2))
    save_checkpoint(path, fresh)
    assert Run(checkpoint).restore(path) == 2


@given(mutate=mutations())
@examples(200)
def test_damaged_sample_sets_are_refused_or_hold_numbers(folder, mutate):
    np.savez(folder / "intact.npz", arr_0=np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3),
             arr_1=np.zeros(1, np.int64))
    path = folder / "damaged.npz"
    path.write_bytes(mutate((folder / "intact.npz").read_bytes()))
    for name in ("arr_0", "arr_1"):
        try:
            assert not read_npz_array(str(path), name).dtype.hasobject
        except UserError as error:
            assert "damaged.npz" in str(error)


@pytest.fixture(scope="module")
def cache(folder, image_folder, vae_folder):
    call("extract_features", "--data-path", image_folder, "--features-path", folder / "cache", "--image-size", 32,
         "--vae", vae_folder, "--num-workers", 0, "--dtype", "fp32")
    return folder / "cache"


@pytest.fixture
def cache_copy(folder, cache):
    """A copy to damage; the next example overwrites what it changed."""
    shutil.rmtree(folder / "copy", ignore_errors=True)
    return shutil.copytree(cache, folder / "copy")


def read_all(path):
    dataset = LatentCache(str(path))
    return dataset.__getitems__([(index, bool(index % 2)) for index in range(len(dataset))])


@pytest.mark.parametrize("name", ["manifest.json", "labels.npy", "moments-000.npy", "paths.txt"])
@given(mutate=mutations())
@examples(100)
def test_verification_finds_damage_to_a_latent_cache(cache, cache_copy, name, mutate):
    intact = (cache / name).read_bytes()
    damaged = mutate(intact)
    (cache_copy / name).write_bytes(damaged)
    with contextlib.suppress(UserError):
        read_all(cache_copy)
    try:
        is_found = verify(str(cache_copy)) != []
    except UserError:
        is_found = True
    assert is_found or damaged == intact or is_equal_json(damaged, intact)


def is_equal_json(one, two):
    """Return whether two texts mean the same: white space in the manifest has no meaning."""
    try:
        return json.loads(one) == json.loads(two)
    except ValueError:
        return False


@given(data=st.data())
@examples(150)
def test_hostile_manifests_are_refused_or_read(cache, cache_copy, data):
    manifest = read_manifest(str(cache))
    name = data.draw(st.sampled_from(sorted(manifest)))
    if isinstance(manifest[name], dict) and data.draw(st.booleans()):
        inner = data.draw(st.sampled_from(sorted(manifest[name])))
        manifest[name][inner] = data.draw(values)
    elif data.draw(st.booleans()):
        manifest[name] = data.draw(values)
    else:
        del manifest[name]
    write_manifest(str(cache_copy), manifest)
    for use in (read_all, lambda path: verify(str(path))):
        with contextlib.suppress(UserError):
            use(cache_copy)


@pytest.mark.parametrize("name", ["train", "sample", "sample_ddp", "extract_features", "download"])
@given(data=st.data())
@examples(150)
def test_any_text_as_a_flag_is_parsed_or_refused(name, data):
    parser = importlib.import_module(name).build_parser()
    flags = sorted(option for action in parser._actions for option in action.option_strings if option.startswith("--"))
    text = st.text(max_size=12) | st.sampled_from(["nan", "inf", "-inf", "1e999", "-1", "0", str(2**70), "ddim",
                                                   "ddim0", "\x00", "٣", "--", "-", "=", "auto", "all"])
    pairs = data.draw(st.lists(st.tuples(st.sampled_from(flags), text), min_size=1, max_size=3))
    with silence():
        try:
            parse_args(parser, argv=[part for pair in pairs for part in pair])
        except SystemExit as stop:
            assert stop.code in (0, 2)


@contextlib.contextmanager
def silence():
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        yield


SIZES = ["--depth", "--hidden-size", "--num-heads", "--patch-size", "--num-classes", "--model"]  # large: memory
FIXED = ["--data-path", "--features-path", "--results-dir", "--num-workers", "--vae", "--resume", "--max-steps"]


@given(data=st.data())
@examples(60)
def test_runs_with_any_flags_train_or_are_refused(folder, data):
    import train
    from training.cli import build_parser
    value_flags = sorted(flag for action in build_parser()._actions for flag in action.option_strings
                         if flag.startswith("--") and action.nargs != 0 and flag not in FIXED)
    switches = ["--flip", "--no-flip", "--cache-on-device", "--async-save", "--allow-config-change"]
    number = st.integers(-1, 70) | st.sampled_from([0.5, 1e-9, 1e9, 1e30, 0.1])
    large = st.sampled_from([2**31, 2**63, 2**70])
    line = ["--data-path", "digits", *TINY, "--max-steps", "1", "--global-batch-size", "4", "--log-every", "1",
            "--results-dir", str(folder / "runs")]
    for _ in range(data.draw(st.integers(1, 3))):
        if data.draw(st.integers(0, 4)) == 0:
            line.append(data.draw(st.sampled_from(switches)))
            continue
        flag = data.draw(st.sampled_from(value_flags))
        value = number | st.sampled_from(["loss-second-moment", "DiT-S/8", "auto"])
        line += [flag, str(data.draw(value if flag in SIZES else value | large))]
    with silence(), pytest.MonkeyPatch.context() as patch, contextlib.suppress(UserError):
        patch.setattr(sys, "argv", ["train.py", *line])
        try:
            train.main()
        except SystemExit as stop:
            assert stop.code in (0, 2)
        finally:
            shutil.rmtree(folder / "runs", ignore_errors=True)
