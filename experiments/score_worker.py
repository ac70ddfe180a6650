"""Score samples of trained networks, one setting after the other: `python -m experiments.score_worker REQUEST.json`.

On SIGTERM it stops at the next sampling step; finished batches of samples are kept, and the next start continues.
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
from common.provenance import collect_environment
from common.signals import StopSignals
from data.dataset import evenly_spaced_indices
from evaluation.digits_classifier import DigitsClassifier
from evaluation.feature_statistics import compute_statistics
from evaluation.features import load_feature_space
from evaluation.image_sources import GeneratedImages, GenerationInterrupted, NpzImages, open_image_source
from evaluation.records import read_record, write_record
from evaluation.reference import open_reference
from evaluation.scores import compute_scores, primary_score
from experiments.presets import STUDY_DATA
from sampling.load_model import load_model
from sampling.pipeline import build_pipeline
from sampling.sample_set import SampleSet


def main():
    """Compute the scores of the request."""
    if len(sys.argv) != 2:
        raise UserError("the studies start this worker, with the path of a request. Start a study instead")
    request = read_record(sys.argv[1])
    data, batch_size = STUDY_DATA[request["images"]], request["batch"]
    distributed.init()
    space = load_feature_space(request["features"], distributed.device())
    reference, _ = open_reference(request["reference"], space, batch_size)
    digits = DigitsClassifier() if data.name == "digits" else None
    with StopSignals() as signals:
        for score in request["scores"]:
            if "real_images" in score["asked"]:
                values = score_real_images(data.name, score["asked"]["real_images"], space, reference, batch_size)
            else:
                loaded = load_model(score["checkpoint"], "DiT-S/2", data.image_size, data.num_classes, "none", set(),
                                    distributed.device(), ema_decay=score["asked"].get("decay"))
                values = score_samples(loaded, score, request, signals, space, reference, digits)
            write_record(score["path"] + ".json", dict(asked=score["asked"]) | values)
            shutil.rmtree(score["path"], ignore_errors=True)


def score_samples(loaded, score, request, signals, space, reference, digits):
    """Sample a network and return the scores of the samples. Raises `Stopped` on a signal."""
    start = time.monotonic()
    samples = generate_samples(loaded, score, request, signals)
    labels = samples.class_labels()
    scores = compute_scores(compute_statistics(samples, space, request["batch"]), reference, space, labels)
    scores["agreement"] = digits.agreement(samples.images, labels) if digits else scores.pop("class_agreement")
    made = loaded.metadata() | collect_environment(distributed.device())
    return dict(scores=scores, seconds=round(time.monotonic() - start, 1), made=made)


def generate_samples(loaded, score, request, signals):
    """Return a set of samples, which is kept batch by batch. Raises `Stopped` on a signal."""
    asked = score["asked"]
    compute = replace(fastest_config(loaded.model.device), compile=False) if request["fast"] else DEFAULT_COMPUTE
    samples = SampleSet(os.path.join(score["path"], "set"))
    samples.open()
    with fixed_variance(loaded.model, asked.get("variance")):  # before the pipeline, which in bf16 copies the model
        pipeline = build_pipeline(loaded.model, loaded.autoencoder, asked["steps"], asked.get("cfg_scale", 1.0),
                                  asked.get("cfg_channels"), asked.get("cfg_interval"), compute=compute)
        images = GeneratedImages(pipeline, loaded.num_classes, asked["samples"], asked["seed"], "balanced")
        images.stopped = lambda: signals.received
        labels = images.class_labels()
        try:
            for start, end in samples.missing(len(images), request["batch"]):
                samples.add(start, images.batch(start, end).cpu().numpy(), labels[start:end])
        except GenerationInterrupted:
            raise Stopped from None
    samples.assemble(len(images))
    return NpzImages(samples.npz)


# Improved DDPM, eq. 15: the network's v = (output + 1) / 2 interpolates between log btilde_t and log beta_t.
FIXED_OUTPUTS = {"fixed_small": -1.0, "fixed_large": 1.0}


@contextlib.contextmanager
def fixed_variance(model, variance=None):
    """Replace a network's learned variance in the block by "fixed_small" (btilde_t) or "fixed_large" (beta_t).

    None and "learned" change nothing; the mean never changes.
    """
    if variance in (None, "learned"):
        yield
        return
    def replace_variance(module, inputs, output):
        eps = output[:, : module.in_channels]
        return torch.cat([eps, torch.full_like(eps, FIXED_OUTPUTS[variance])], dim=1)

    hook = model.register_forward_hook(replace_variance)
    try:
        yield
    finally:
        hook.remove()


class _Subset:
    """Some images of a source, by their indices."""

    hashes = False

    def __init__(self, source, indices):
        self.source, self.indices = source, indices

    def __len__(self):
        return len(self.indices)

    def batch(self, start, end):
        return torch.cat([self.source.batch(i, i + 1) for i in self.indices[start:end]])


def score_real_images(name, count, space, reference, batch_size):
    """Return the distance of `count` real training images, or of all."""
    source = open_image_source(name)
    subset = _Subset(source, evenly_spaced_indices(len(source), min(count, len(source))))
    scores = compute_scores(compute_statistics(subset, space, batch_size), reference, space)
    return dict(real=dict(images=len(subset), distance=scores[primary_score(space)]), held_out=reference.count,
                made=collect_environment(distributed.device()))


if __name__ == "__main__":
    run_command(main)
