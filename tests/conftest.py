"""Fixtures: running commands, small data sets and a small VAE. A test has the marker of its folder."""
import importlib
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import ROOT, Children
from tiny_models import random_inception


@pytest.fixture(autouse=True)
def _seed():
    """Give each test the same random numbers, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def command(monkeypatch, capfd):
    """Run a command in this process: command("train", "--flag", ...) -> (exit status, stdout, stderr)."""
    def run(name, *flags):
        from common.errors import run_command
        module = importlib.import_module(name)
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


@pytest.fixture
def run_ok(command):
    """Run a command in this process that succeeds, and return its output: run_ok("train", "--flag", ...)."""
    def run(name, *flags):
        status, out, err = command(name, *flags)
        assert status == 0, out + err
        return out
    return run


@pytest.fixture
def run_error(command):
    """Run a command in this process that ends with an error message and status 2, and return the message."""
    def run(name, *flags):
        status, out, err = command(name, *flags)
        assert status == 2 and "Traceback" not in err, out + err
        return err
    return run


@pytest.fixture(scope="session")
def session_children(tmp_path_factory):
    """Run commands in child processes, for fixtures of a session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # for the server, which does not know pytest's path
        patch.setenv("OMP_NUM_THREADS", "1")
        yield Children(tmp_path_factory.mktemp("logs"))


@pytest.fixture
def children(session_children):
    """Run commands in child processes; those that still run at the end of the test are killed."""
    yield session_children
    session_children.close()


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Three classes of eight small color images each, of several sizes."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for label, name in enumerate(["ant", "bee", "cat"]):
        (root / name).mkdir()
        for i in range(8):
            noise = generator.integers(0, 256, (5, 7, 3), dtype=np.uint8)
            noise[..., label] = 200
            Image.fromarray(noise).resize((40 + i, 36), Image.Resampling.BICUBIC).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory):
    """A small AutoencoderKL with random weights, as diffusers saves it: 4 channels, stride 4."""
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 8, 16), down_block_types=("DownEncoderBlock2D",) * 3,
                        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, norm_num_groups=4,
                        latent_channels=4, scaling_factor=0.5)
    folder = tmp_path_factory.mktemp("vae") / "small-vae"
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """A file of random weights for torch-fidelity's Inception."""
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(random_inception().state_dict(), path)
    return str(path)


def pytest_collection_modifyitems(items):
    for item in items:
        folder = item.path.relative_to(ROOT / "tests").parts[0]
        item.add_marker(getattr(pytest.mark, folder))
