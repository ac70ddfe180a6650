"""Fixtures of the tests of faults: undisturbed runs to compare with."""
import shutil

import pytest

from helpers import DIGITS, DROP, TINY, call


@pytest.fixture(scope="session")
def sources(image_folder, vae_folder, tmp_path_factory):
    """Flags of a run from the digits (179 steps an epoch), from images and from a cache (3 steps an epoch)."""
    cache = tmp_path_factory.mktemp("sources") / "cache"
    images = ["--data-path", image_folder, "--image-size", 32, "--vae", vae_folder]
    call("extract_features", *images, "--features-path", cache, "--num-workers", 0)
    small = [*TINY, "--num-classes", 3, "--global-batch-size", 8, *DROP]
    return dict(digits=[*DIGITS, *DROP], images=[*images, *small], cache=["--features-path", cache, *small])


@pytest.fixture(scope="session")
def undisturbed(session_children, sources, tmp_path_factory):
    """undisturbed(source, processes): the folder of an undisturbed run of 32 steps, with all checkpoints."""
    runs = {}

    def find_run(source, processes=1):
        if (source, processes) not in runs:
            results = tmp_path_factory.mktemp(f"{source}-{processes}")
            session_children.run("train", *sources[source], "--max-steps", 32, "--ckpt-every", 1, "--log-every", 1,
                                "--num-workers", 0, "--results-dir", results, processes=processes)
            runs[source, processes] = results
        return runs[source, processes]

    return find_run


@pytest.fixture(scope="session")
def three_checkpoints(tmp_path_factory):
    """A run of six steps on the digits with checkpoints at 2, 4 and 6."""
    results = tmp_path_factory.mktemp("three")
    call("train", *DIGITS, "--max-steps", 6, "--ckpt-every", 2, "--results-dir", results)
    return results


@pytest.fixture
def copied_run(three_checkpoints, tmp_path):
    """A copy of `three_checkpoints` to damage or resume."""
    return shutil.copytree(three_checkpoints, tmp_path / "results")
