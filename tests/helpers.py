"""Small real things to run the commands on, and ways to run and compare them."""
import contextlib
import importlib
import itertools
import math
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from common.checkpoint_io import list_checkpoints, load_checkpoint
from diffusion import GaussianDiffusion
from networks import build_dit

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--model", "DiT-S/2", "--depth", "1", "--hidden-size", "16", "--num-heads", "2"]
DIGITS = ["--data-path", "digits", *TINY, "--global-batch-size", "8"]


def call(name, *flags):
    """Run a command's main in this process; errors come as they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        importlib.import_module(name).main()



def run_process(script, *flags, processes=None, check=True, **more):
    """Run a command as a user does: `python SCRIPT`, or `torchrun` on several gloo processes."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master-addr=127.0.0.1",
                     f"--master-port={free_port()}"]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run([*launcher, str(ROOT / script), *map(str, flags)], env=environment, capture_output=True,
                          text=True, stdin=subprocess.DEVNULL, timeout=300, **more)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done



class Children:
    """Commands in processes of their own, which start at once: a server that has imported everything forks them."""

    def __init__(self, folder):
        self.folder, self.started = folder, []
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["train", "sample_ddp", "extract_features", "evaluate",
                                             "torch.utils.tensorboard",
                                             "diffusers.models.autoencoders.autoencoder_kl"])

    def start(self, name, *flags, processes=1, prepare=None):
        """Start a command on some gloo processes; returns them. The text of each goes to its `log`.

        prepare  called with the process' number before the command begins, to plant a fault; of a module's top level
        """
        port, group = str(free_port()), []
        for rank in range(processes):
            environment = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_PORT=port,
                               MASTER_ADDR="127.0.0.1") if processes > 1 else {}
            log = self.folder / f"{len(self.started)}.log"
            child = self.context.Process(target=in_child, args=(name, [str(flag) for flag in flags], environment,
                                                                str(log), prepare, rank))
            log.touch()
            child.start()
            child.log = log
            group.append(child)
            self.started.append(child)
        return group

    def run(self, name, *flags, processes=1, prepare=None, status=0):
        """Run a command to its end on some processes; returns what they printed, one after the other."""
        group = self.start(name, *flags, processes=processes, prepare=prepare)
        for child in group:
            child.join(120)
        text = "".join(child.log.read_text() for child in group)
        assert [child.exitcode for child in group] == [status] * processes, text
        return text

    def close(self):
        for child in self.started:
            if child.is_alive():
                child.kill()



def in_child(name, flags, environment, log, prepare, rank):
    """Where a child begins."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for their own workers, as where nobody sets one
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = [f"{name}.py", *flags]
    if prepare is not None:
        prepare(rank)
    from common.errors import run_command
    run_command(importlib.import_module(name).main)



def wait_for(condition, seconds=60):
    """Wait until condition() is true; returns what it gave."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "nothing came of it"
        time.sleep(0.005)
    return found



_PORTS = itertools.count(20_000 + os.getpid() * 37 % 10_000)


def free_port():
    """A port that nothing uses: below the range from which systems choose ports, where an idle one may be taken."""
    for port in _PORTS:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port



def picture(*shape, seed=0):
    """(H, W, ...) uint8 noise."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)



def write_images(root, files):
    """files: {"class/name.png": PIL image or bytes}; returns the folder's name."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content) if isinstance(content, bytes) else content.save(path)
    return str(root)



def largest_difference(a, b, part="model"):
    return max((a[part][name] - b[part][name]).abs().max().item() for name in a[part])



def losses(results):
    """Every loss that log.txt shows."""
    (log,) = results.glob("*/log.txt")
    return [float(loss) for loss in re.findall(r"Train Loss: (\S+),", log.read_text())]



def trained(results, step):
    """The checkpoint of a run's first experiment."""
    return load_checkpoint(str(next(results.glob(f"*/checkpoints/{step:07d}.pt"))))



def differences(one, two, path=""):
    """Names of what is not the same, bit for bit, in two checkpoints; flags and folders aside."""
    if torch.is_tensor(one):
        return [] if torch.is_tensor(two) and torch.equal(one, two) else [path]
    if isinstance(one, dict):
        names = [name for name in one if not (path == "" and name == "args")]
        missing = [f"{path}/{name}" for name in set(one) ^ set(two)]
        return missing + [found for name in names if name in two
                          for found in differences(one[name], two[name], f"{path}/{name}")]
    if isinstance(one, (list, tuple)):
        return [path] if len(one) != len(two) else [
            found for i, pair in enumerate(zip(one, two)) for found in differences(*pair, f"{path}/{i}")]
    return [] if one == two else [path]



def scalars(results, name="train/loss"):
    """{step: value} of what TensorBoard was told, all digits; where a step was told twice, the last."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder_of(results) / "tensorboard")).Reload()
    return {event.step: event.value for event in events.Scalars(name)}



def stored(results, step, number=0):
    return load_checkpoint(str(folder_of(results, number) / "checkpoints" / f"{step:07d}.pt"))

STATE = ("/model", "/ema", "/opt", "/schedule_sampler")


class Spoils:
    """Makes the loss of one sample of one process something else in some steps (counted from 0)."""

    def __init__(self, steps, value, rank=None, row=1):
        self.steps, self.value, self.rank, self.row = set(steps), value, rank, row

    def __call__(self, rank):
        if self.rank not in (None, rank):
            return
        losses, count = GaussianDiffusion.training_losses, [0]

        def spoilt(diffusion, *args, **more):
            terms = losses(diffusion, *args, **more)
            if count[0] in self.steps:
                factor = torch.ones_like(terms["loss"])
                factor[self.row] = self.value
                terms["loss"] = terms["loss"] * factor
            count[0] += 1
            return terms

        GaussianDiffusion.training_losses = spoilt



def steps_of(results, number=0):
    """Steps of the checkpoints of an experiment, oldest first."""
    return sorted(list_checkpoints(str(folder_of(results, number))))



def folder_of(results, number=0):
    return next(results.glob(f"{number:03d}-*"))

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


def reference_attention(layer, x, heads):
    """softmax(q k / sqrt(width of a head)) v, the rows of the qkv weight being q, k, v, each head by head."""
    q, k, v = layer.qkv(x).unflatten(-1, (3, heads, -1)).unbind(2)
    weights = torch.einsum("nqhd,nkhd->nhqk", q, k).div(math.sqrt(q.shape[-1])).softmax(-1)
    return layer.proj(torch.einsum("nhqk,nkhd->nqhd", weights, v).flatten(2))



def giga_multiply_adds(model):
    """Of one forward pass for one image; nothing is computed, the tensors are on the meta device."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        x = torch.zeros(1, model.in_channels, *model.x_embedder.input_size)
        model.eval()(x, torch.zeros(1), torch.zeros(1, dtype=torch.long))
    return counter.get_total_flops() / 2 / 1e9



def inputs(model, n=3):
    """n latents, timesteps and labels that fit the model; no label is the null class."""
    x = torch.randn(n, model.in_channels, *model.x_embedder.input_size)
    return x, torch.randint(1000, (n,)), torch.randint(model.y_embedder.num_classes, (n,))



def reference_mlp(layer, x):
    h = layer.fc1(x)
    return layer.fc2(0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))))



def random_model(**overrides):
    """A tiny model in which every part has a say: a fresh one predicts zero whatever its input."""
    model = build_dit(**TINY_MODEL | overrides).eval()
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.3)
    return model



def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)



def random_weights(model, seed=0, scale=0.2):
    """Weights that make the output depend on everything (freshly initialised, it is zero)."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=scale, generator=generator)
    return model



class Recompilations:
    """Counts the graphs that were compiled, and breaks in them."""

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

