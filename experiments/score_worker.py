"""How good a trained network's samples are, sampled in one way after the other. The studies start it as

    python -m experiments.scoring REQUEST.json

Told to stop, it ends at the next sampling step; what was made of a set of samples is kept, and a later start goes on.
"""

import contextlib
import os
import shutil
import sys
import time
from dataclasses import replace

import torch

from common import distributed
from common.compute import DEFAULT_COMPUTE, fastest_config
from common.errors import Stopped, UserError, run_command
from common.files import read_npz_array
from common.provenance import collect_environment
from common.signals import StopSignals
from data.dataset import evenly_spaced_indices
from data.image_io import to_uint8
from evaluation.digits_classifier import DigitsClassifier
from evaluation.feature_statistics import compute_statistics
from evaluation.features import load_feature_space
from evaluation.image_sources import NpzImages, open_image_source
from evaluation.records import read_record, write_record
from evaluation.reference import open_reference
from evaluation.scores import compute_scores, primary_score
from experiments.presets import STUDY_DATA
from sampling.load_model import load_model
from sampling.noise import PerSampleRNG
from sampling.pipeline import build_pipeline
from sampling.sample_set import SampleSet, sample_labels


def main():
    request = read_record(sys.argv[1])
    images = STUDY_DATA[request["images"]]
    distributed.init()
    space = load_feature_space(request["features"], distributed.device())
    reference, _ = open_reference(request["reference"], space, request["batch"])
    with StopSignals() as signals:
        if "scores" not in request:
            return measure_baseline(request, images, space, reference)
        digits, trained = DigitsClassifier() if images.name == "digits" else None, None
        for score in request["scores"]:
            start = time.monotonic()
            if trained is None or trained.path != score["checkpoint"]:
                trained = load_model(score["checkpoint"], "DiT-S/2", images.image_size, images.num_classes, "none",
                                       set(), distributed.device())
            samples = make_samples(trained, score, request, signals)
            measured = compute_statistics(samples, space, request["batch"])
            labels = read_npz_array(samples.path, "arr_1")
            found = compute_scores(measured, reference, space, labels)
            found["agreement"] = digits.agreement(samples.images, labels) if digits else found.pop("class_agreement")
            write_record(score["path"] + ".json", dict(
                asked=score["asked"], scores=found, seconds=round(time.monotonic() - start, 1), made=trained.metadata()
                | collect_environment(distributed.device())))
            shutil.rmtree(score["path"], ignore_errors=True)


def make_samples(trained, score, request, signals):
    """The set of samples that is asked for, which grows in parts; raises `Stopped` on a signal."""
    asked, device = score["asked"], trained.model.pos_embed.device
    compute = replace(fastest_config(device), compile=False) if request["fast"] else DEFAULT_COMPUTE

    def check(step, x):
        if signals.received:
            raise Stopped

    samples = SampleSet(os.path.join(score["path"], "set"))
    samples.open()
    with with_variance(trained.model, asked.get("variance")):  # before the maker: in bf16 it samples a copy
        make = build_pipeline(trained.model, trained.autoencoder, asked["steps"], asked.get("cfg_scale", 1.0),
                           asked.get("cfg_channels"), asked.get("cfg_interval"), compute=compute)
        for first, end in samples.missing(asked["samples"], request["batch"]):
            labels = sample_labels("balanced", asked["seed"], range(first, end), trained.num_classes)
            noise = PerSampleRNG(asked["seed"], range(first, end), device)
            samples.add(first, to_uint8(make(torch.from_numpy(labels).to(device), noise, check)).cpu().numpy(), labels)
    samples.assemble(asked["samples"])
    return NpzImages(samples.npz)


# Improved DDPM, eq. 15: the network's values v = (output + 1) / 2 choose between log btilde_t and log beta_t.
FIXED = {"fixed_small": -1.0, "fixed_large": 1.0}


@contextlib.contextmanager
def with_variance(model, variance=None):
    """A block in which a network that has learned its variance answers with a fixed one; its mean stays.

    variance  "fixed_small" (btilde_t), "fixed_large" (beta_t); None or "learned": its own
    """
    if variance in (None, "learned"):
        yield
        return
    if not model.learn_sigma:
        raise UserError(f"variance {variance}: this network has learned none that could be replaced")

    def fix(module, inputs, output):
        eps = output[:, : module.in_channels]
        return torch.cat([eps, torch.full_like(eps, FIXED[variance])], dim=1)

    hook = model.register_forward_hook(fix)
    try:
        yield
    finally:
        hook.remove()


class Subset:
    """Some images of a source, chosen by their numbers."""

    hashes = False

    def __init__(self, source, numbers):
        self.source, self.numbers = source, numbers

    def __len__(self):
        return len(self.numbers)

    def batch(self, first, end):
        return torch.cat([self.source.batch(i, i + 1) for i in self.numbers[first:end]])


def measure_baseline(request, images, space, reference):
    """What the best samples could reach: distances of real images, as many as there are samples."""
    train = open_image_source(images.name)
    rows = evenly_spaced_indices(len(train), min(request["asked"]["count"], len(train)))
    found = compute_scores(compute_statistics(Subset(train, rows), space, request["batch"]), reference, space)
    write_record(request["path"] + ".json", dict(
        asked=request["asked"], real=dict(images=len(rows), distance=found[primary_score(space)]),
        held_out=reference.count, made=collect_environment(distributed.device())))


if __name__ == "__main__":
    run_command(main)
