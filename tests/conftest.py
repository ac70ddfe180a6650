"""Small real things to run the commands on, and ways to run them."""
import os
import socket
import subprocess
import sys
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
