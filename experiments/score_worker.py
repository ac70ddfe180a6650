"""Score samples of trained networks, one setting after the other: `python -m experiments.score_worker REQUEST.json`.

On SIGTERM it stops at the next sampling step; finished batches of samples are kept, and the next start continues.
"""
import os
import shutil
import sys
import time
from dataclasses import replace

import numpy as np
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
from evaluation.records import read_record, try_read, write_record
from evaluation.reference import open_reference
from evaluation.scores import compute_scores
from sampling.load_model import load_model
from sampling.pipeline import build_pipeline
from sampling.sample_set import SampleSet


def main():
    """Compute the scores of the request that are not done yet."""
    if len(sys.argv) != 2:
        raise UserError("the studies start this worker, with the path of a request. Start a study instead")
    request = read_record(sys.argv[1])
    distributed.init()
    space = load_feature_space(request["features"], distributed.device())
    reference, _ = open_reference(request["reference"], space, request["batch"])
    digits = DigitsClassifier() if request["images"] == "digits" else None
    with StopSignals() as signals:
        for score in request["scores"]:
            if try_read(score["path"] + ".json").get("asked") == score["asked"]:
                continue
            start, made = time.monotonic(), collect_environment(distributed.device())
            if score["checkpoint"]:
                # The checkpoint holds the configuration.
                loaded = load_model(score["checkpoint"], "DiT-S/2", None, None, "none", set(), distributed.device(),
                                    ema_decay=score["asked"].get("decay"))
                made |= loaded.metadata()
                samples = generate_samples(loaded, score, request, signals)
            else:
                samples = choose_real_images(score, request)
            labels = samples.class_labels()
            scores = compute_scores(compute_statistics(samples, space, request["batch"]), reference, space, labels)
            scores["agreement"] = digits.agreement(samples.images, labels) if digits else scores.pop("class_agreement")
            write_record(score["path"] + ".json", dict(
                asked=score["asked"], scores=scores, images=len(samples), held_out=reference.count, made=made,
                seconds=round(time.monotonic() - start, 1)))
            shutil.rmtree(score["path"], ignore_errors=True)


def generate_samples(loaded, score, request, signals):
    """Return a set of samples, which is kept batch by batch. Raises `Stopped` on a signal."""
    asked = score["asked"]
    compute = replace(fastest_config(loaded.model.device), compile=False) if request["fast"] else DEFAULT_COMPUTE
    fix_variance(loaded.model, asked.get("variance", "learned"))
    pipeline = build_pipeline(loaded.model, loaded.autoencoder, asked["steps"], asked.get("cfg_scale", 1.0),
                              asked.get("cfg_channels"), asked.get("cfg_interval"), compute=compute,
                              timestep_spacing=asked.get("timestep_spacing"))
    images = GeneratedImages(pipeline, loaded.num_classes, asked["samples"], asked["seed"], "balanced")
    images.stopped = lambda: signals.received
    labels, samples = images.class_labels(), SampleSet(os.path.join(score["path"], "set"))
    samples.open()
    try:
        for start, end in samples.missing(len(images), request["batch"]):
            samples.add(start, images.batch(start, end).cpu().numpy(), labels[start:end])
    except GenerationInterrupted:
        raise Stopped from None
    samples.assemble(len(images))
    return NpzImages(samples.npz)


# Improved DDPM, eq. 15: the network's v = (output + 1) / 2 interpolates between log btilde_t and log beta_t.
FIXED_OUTPUTS = {"fixed_small": -1.0, "fixed_large": 1.0}


@torch.no_grad()
def fix_variance(model, variance):
    """Make a network's variance "fixed_small" (btilde_t) or "fixed_large" (beta_t); "learned" changes nothing."""
    if variance in FIXED_OUTPUTS:
        linear, channels = model.final_layer.linear, model.in_channels
        # Rows of the layer: for each pixel of a patch the channels of the noise, then those of the variance.
        linear.weight.unflatten(0, (-1, 2 * channels))[:, channels:] = 0
        linear.bias.unflatten(0, (-1, 2 * channels))[:, channels:] = FIXED_OUTPUTS[variance]


def choose_real_images(score, request):
    """Return evenly spaced images of the training set, as many as the request asks for, or all."""
    source = open_image_source(request["images"])
    indices = evenly_spaced_indices(len(source), min(score["asked"]["real_images"], len(source)))
    os.makedirs(score["path"], exist_ok=True)
    path = os.path.join(score["path"], "real.npz")
    images = np.concatenate([source.batch(i, i + 1) for i in indices])
    np.savez(path, arr_0=images, arr_1=source.class_labels()[indices])
    return NpzImages(path)


if __name__ == "__main__":
    run_command(main)
