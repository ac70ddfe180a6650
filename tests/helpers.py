"""Running commands, planting faults in them, and comparing what they write."""
import contextlib
import importlib
import itertools
import math
import multiprocessing
import os
import pkgutil
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from common.checkpoint_io import list_checkpoints, load_checkpoint
from common.errors import ArgumentError
from diffusion import GaussianDiffusion
from networks import build_dit

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--model", "DiT-S/2", "--depth", "1", "--hidden-size", "16", "--num-heads", "2"]
DIGITS = ["--data-path", "digits", *TINY, "--global-batch-size", "8"]
DROP = ["--class-dropout-prob", 0.5]
ENDLESS = ["--max-steps", 10**6]
PIXELS = ["--features", "pixels"]
FEW_SAMPLES = ["--num-fid-samples", 16, "--per-proc-batch-size", 4, "--num-sampling-steps", "ddim3", "--cfg-scale", 2]


def call(name, *flags):
    """Run a command's main function in this process; its errors are raised."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        importlib.import_module(name).main()


def run_process(script, *flags, processes=None, check=True, **kwargs):
    """Run a command as a user does: `python SCRIPT`, or `torchrun` on several gloo processes."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master-addr=127.0.0.1",
                     f"--master-port={free_port()}"]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run([*launcher, str(ROOT / script), *map(str, flags)], env=environment, capture_output=True,
                          text=True, stdin=subprocess.DEVNULL, timeout=600, **kwargs)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


# ---------------------------------------------------------------- commands in child processes

class Children:
    """Run commands in processes that a server forks, which has imported everything; their output goes to a folder."""

    def __init__(self, folder):
        self.folder, self.started = folder, []
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["train", "sample_ddp", "extract_features", "evaluate",
                                             "torch.utils.tensorboard",
                                             "diffusers.models.autoencoders.autoencoder_kl"])

    def start(self, name, *flags, processes=1, prepare=None):
        """Start a command on several gloo processes and return them; each has the path of its output in `log`.

        `prepare` is called with the rank before the command begins, to plant a fault; it must be picklable.
        """
        port, group = str(free_port()), []
        for rank in range(processes):
            environment = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_PORT=port,
                               MASTER_ADDR="127.0.0.1") if processes > 1 else {}
            log = self.folder / f"{len(self.started)}.log"
            child = self.context.Process(target=run_child, args=(name, [str(flag) for flag in flags], environment,
                                                                 str(log), prepare, rank))
            log.touch()
            child.start()
            child.log = log
            group.append(child)
            self.started.append(child)
        return group

    def run(self, name, *flags, processes=1, prepare=None, status=0):
        """Run a command to its end and return the output of all processes; each must exit with `status`."""
        return self.join(self.start(name, *flags, processes=processes, prepare=prepare), status)

    def join(self, group, status=0):
        """Wait for a group of processes and return their output; each must exit with `status`."""
        for child in group:
            child.join(300)
        text = "".join(child.log.read_text() for child in group)
        assert [child.exitcode for child in group] == [status] * len(group), text
        return text

    def close(self):
        """Kill what still runs."""
        for child in self.started:
            if child.is_alive():
                child.kill()


def run_child(name, flags, environment, log, prepare, rank):
    """Run a command in this child process."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # the default on Linux, which its data workers use
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = [f"{name}.py", *flags]
    if prepare is not None:
        prepare(rank)
    from common.errors import run_command
    run_command(importlib.import_module(name).main)


def wait_for(condition, seconds=120):
    """Wait until `condition()` is true, and return its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not true after {seconds} seconds"
        time.sleep(0.01)
    return value


_PORTS = itertools.count(20_000 + os.getpid() * 37 % 10_000)


def free_port():
    """Return an unused port below the range from which systems choose ports, where it may be taken meanwhile."""
    for port in _PORTS:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


# ---------------------------------------------------------------- faults, planted in a child process

class AtCall:
    """Call `action`, which must be picklable, at the n-th call of a function (None: each), on one rank or on all.

    `function` is its full name, such as "os.fsync"; with `after`, the action follows the call.
    """

    def __init__(self, function, count, action, rank=None, after=False):
        self.function, self.count, self.action, self.rank, self.after = function, count, action, rank, after

    def __call__(self, rank):
        if self.rank not in (None, rank):
            return
        owner, _, name = self.function.rpartition(".")
        owner = pkgutil.resolve_name(owner)
        function, calls = getattr(owner, name), itertools.count(1)

        def with_action(*args, **kwargs):
            is_due = next(calls) == self.count or self.count is None
            if is_due and not self.after:
                self.action()
            result = function(*args, **kwargs)
            if is_due and self.after:
                self.action()
            return result

        setattr(owner, name, with_action)


AtTrainingLoss = partial(AtCall, "diffusion.GaussianDiffusion.training_losses")  # once per microbatch


def send_signal(number=signal.SIGKILL):
    """Send a signal to this process."""
    os.kill(os.getpid(), number)


class SpoilLoss:
    """Multiply the loss of a row of the local batch by a value, in some steps (from 0), on one rank or on all."""

    def __init__(self, steps, value, rank=None, row=1):
        self.steps, self.value, self.rank, self.row = set(steps), value, rank, row

    def __call__(self, rank):
        if self.rank not in (None, rank):
            return
        training_losses, calls = GaussianDiffusion.training_losses, itertools.count()

        def spoiled(*args, **kwargs):
            terms = training_losses(*args, **kwargs)
            if next(calls) in self.steps:
                factor = torch.ones_like(terms["loss"])
                factor[self.row] = self.value
                terms["loss"] = terms["loss"] * factor
            return terms

        GaussianDiffusion.training_losses = spoiled


# ---------------------------------------------------------------- what a run leaves behind

STATE = ("/model", "/ema", "/opt", "/schedule_sampler")  # in `differences` of checkpoints: what a step changes


def folder_of(results, number=0):
    """Return the folder of the run with a number."""
    return next(results.glob(f"{number:03d}-*"))


def checkpoint_path(results, step, number=0):
    return folder_of(results, number) / "checkpoints" / f"{step:07d}.pt"


def stored(results, step, number=0):
    """Load the checkpoint of a run after `step` steps."""
    return load_checkpoint(str(checkpoint_path(results, step, number)))


def steps_of(results, number=0):
    """List the steps of a run's checkpoints, ascending."""
    return sorted(list_checkpoints(str(folder_of(results, number))))


def losses(results):
    """List the losses in log.txt."""
    (log,) = results.glob("*/log.txt")
    return [float(loss) for loss in re.findall(r"Train Loss: (\S+),", log.read_text())]


def scalars(results, name="train/loss"):
    """Return {step: value} of a TensorBoard tag; of a step that was logged twice, the last value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder_of(results) / "tensorboard")).Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def largest_difference(a, b, part="model"):
    """Return the largest absolute difference of weights in two checkpoints."""
    return max((a[part][name] - b[part][name]).abs().max().item() for name in a[part])


def differences(one, two, path=""):
    """List the paths of values that differ between two checkpoints, bit for bit; their flags may differ."""
    if torch.is_tensor(one):
        return [] if torch.is_tensor(two) and torch.equal(one, two) else [path]
    if isinstance(one, dict):
        names = [name for name in one if not (path == "" and name == "args")]
        missing = [f"{path}/{name}" for name in set(one) ^ set(two)]
        return missing + [inner for name in names if name in two
                          for inner in differences(one[name], two[name], f"{path}/{name}")]
    if isinstance(one, (list, tuple)):
        return [path] if len(one) != len(two) else [
            inner for i, pair in enumerate(zip(one, two)) for inner in differences(*pair, f"{path}/{i}")]
    return [] if one == two else [path]


# ---------------------------------------------------------------- errors

@contextlib.contextmanager
def raises_argument(match="", **arguments):
    """Expect an `ArgumentError` about these parameters and values."""
    with pytest.raises(ArgumentError, match=match) as caught:
        yield
    assert caught.value.arguments == arguments


# ---------------------------------------------------------------- images

def picture(*shape, seed=0):
    """Return uint8 noise of shape (H, W, ...)."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def images_of(count, seed):
    """Return noise around a color of the seed, shape (count, 4, 4, 3), uint8."""
    random = np.random.default_rng(seed)
    return np.clip(random.normal(100 + 10 * seed, 30, (count, 4, 4, 3)), 0, 255).astype(np.uint8)


def write_images(root, files):
    """Write {"class/name.png": PIL image or bytes} and return the folder's path as text."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content) if isinstance(content, bytes) else content.save(path)
    return str(root)


def write_noise(root, count, *shape):
    """Write noise as 0.png, 1.png, ...; return the folder's path as text."""
    return write_images(root, {f"{i}.png": Image.fromarray(picture(*shape, seed=i)) for i in range(count)})


def read_files(folder):
    """Return {name: bytes} of the files in a folder."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def pixels(path):
    """Read an image as integers, shape (H, W, ...)."""
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


# ---------------------------------------------------------------- models

MODEL_SIZES = {
    "DiT-XL/2": (28, 1152, 16, 2, 674_834_720, 118.62),
    "DiT-XL/4": (28, 1152, 16, 4, 675_000_704, 29.04),
    "DiT-XL/8": (28, 1152, 16, 8, 675_664_640, 7.39),
    "DiT-L/2": (24, 1024, 16, 2, 457_840_672, 80.70),
    "DiT-L/4": (24, 1024, 16, 4, 457_988_224, 19.70),
    "DiT-L/8": (24, 1024, 16, 8, 458_578_432, 5.01),
    "DiT-B/2": (12, 768, 12, 2, 130_315_808, 23.01),
    "DiT-B/4": (12, 768, 12, 4, 130_426_496, 5.57),
    "DiT-B/8": (12, 768, 12, 8, 130_869_248, 1.42),
    "DiT-S/2": (12, 384, 6, 2, 32_865_056, 6.06),
    "DiT-S/4": (12, 384, 6, 4, 32_920_448, 1.41),
    "DiT-S/8": (12, 384, 6, 8, 33_142_016, 0.36),
}
TINY_MODEL = dict(input_size=4, patch_size=2, hidden_size=16, depth=1, num_heads=2, num_classes=7)


def random_weights(model, seed=0, scale=0.2):
    """Fill a model with random weights, so that its output depends on all of them, and return it."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=scale, generator=generator)
    return model


def random_model(scale=0.3, **config):
    """Return a tiny DiT whose output depends on all weights; with its initial weights it would be zero."""
    return random_weights(build_dit(**TINY_MODEL | config).eval(), scale=scale)


def random_inception():
    """Return torchvision's Inception with random weights that keep activations at a sensible size."""
    from torchvision.models import inception_v3
    torch.manual_seed(0)
    network = inception_v3(weights=None, num_classes=1008, aux_logits=False, transform_input=False, init_weights=False)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.7, 1.3)
    return network.eval()


def inputs(model, n=3):
    """Draw latents, timesteps and labels for a model, n of each; no label is the null class."""
    return (torch.randn(n, *model.sample_shape), torch.randint(1000, (n,)),
            torch.randint(model.config.num_classes, (n,)))


def giga_multiply_adds(model):
    """Count the multiply-adds of a forward pass for one image, on the meta device."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, *model.sample_shape), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    return counter.get_total_flops() / 2 / 1e9


def reference_attention(layer, x, heads):
    """Compute softmax(q k / sqrt(head width)) v; the rows of the qkv weight are q, k, v, each head by head."""
    q, k, v = layer.qkv(x).unflatten(-1, (3, heads, -1)).unbind(2)
    weights = torch.einsum("nqhd,nkhd->nhqk", q, k).div(math.sqrt(q.shape[-1])).softmax(-1)
    return layer.proj(torch.einsum("nhqk,nkhd->nqhd", weights, v).flatten(2))


def reference_mlp(layer, x):
    """Compute an MLP with the tanh approximation of GELU."""
    h = layer.fc1(x)
    return layer.fc2(0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))))


# ---------------------------------------------------------------- diffusion

def constant(*values):
    """Return a network whose output is always these tensors, concatenated over channels."""
    return lambda x, t: torch.cat([value.expand_as(x) for value in values], dim=1)


def column(array):
    """Reshape (T,) to float64 (T, 1, 1, 1), for a batch with one sample for each step."""
    return torch.from_numpy(np.asarray(array, dtype=np.float64)).view(-1, 1, 1, 1)


def every_step(diffusion):
    """Return t = 0 .. T - 1 as one batch, with two random tensors of that batch size."""
    t = torch.arange(diffusion.num_timesteps)
    return t, torch.randn(len(t), 1, 2, 2), torch.randn(len(t), 1, 2, 2)


class Recompilations:
    """Count the graphs that are compiled in this context, and the breaks in them."""

    def __enter__(self):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        return self

    def __exit__(self, *error):
        torch._dynamo.reset()

    @property
    def graphs(self):
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    @property
    def breaks(self):
        return sum(torch._dynamo.utils.counters["graph_break"].values())
