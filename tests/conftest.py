"""Small real things to run the commands on, and ways to run them."""
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--model", "DiT-S/2", "--depth", "1", "--hidden-size", "16", "--num-heads", "2"]
DIGITS = ["--data-path", "digits", *TINY, "--global-batch-size", "8"]


@pytest.fixture
def command(monkeypatch, capfd):
    """Run a command's main in this process: command("train", "--flag", ...) -> (exit status, output, errors)."""
    def run(name, *flags):
        from runtime.errors import run_command
        module = __import__(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        capfd.readouterr()
        status = 0
        try:
            run_command(module.main)
        except SystemExit as stop:
            status = stop.code
        out, err = capfd.readouterr()
        return status, out, err
    return run


def call(name, *flags):
    """Run a command's main in this process; errors come as they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        __import__(name).main()


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
    from runtime.errors import run_command
    run_command(__import__(name).main)


@pytest.fixture
def children(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # for the server, which does not know pytest's path
        patch.setenv("OMP_NUM_THREADS", "1")
        started = Children(tmp_path_factory.mktemp("logs"))
        yield started
        started.close()


def wait_for(condition, seconds=60):
    """Wait until condition() is true; returns what it gave."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "nothing came of it"
        time.sleep(0.005)
    return found


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Three classes of eight small colour images each, of several sizes."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for label, name in enumerate(["ant", "bee", "cat"]):
        (root / name).mkdir()
        for i in range(8):
            noise = random.integers(0, 256, (5, 7, 3), dtype=np.uint8)
            noise[..., label] = 200
            Image.fromarray(noise).resize((40 + i, 36), Image.Resampling.BICUBIC).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory):
    """A small AutoencoderKL with random weights, as diffusers saves one: 4 channels, 4 pixels a latent."""
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 8, 16), down_block_types=("DownEncoderBlock2D",) * 3,
                        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, norm_num_groups=4,
                        latent_channels=4, scaling_factor=0.5)
    folder = tmp_path_factory.mktemp("vae") / "small-vae"
    vae.save_pretrained(folder)
    return folder
