"""The scores of a set of samples, by their names."""

import math

from common.errors import UserError
from evaluation.feature_statistics import FeatureStatistics
from evaluation.metrics import NEIGHBOURS, SPLIT, frechet_distance, inception_score, precision_recall


def compute_scores(samples, reference, features, labels=None):
    """All scores that a feature space has, of one `FeatureStatistics` set against another; for the main process.

    labels  (N,) the classes that the samples are to show, or None
    return  dictionary: fid, sfid, inception_score, inception_score_std, precision, recall in the standard Inception
            space; else frechet_distance, precision, recall, and class_agreement (the share of samples that are taken
            for what they are to show) in that of a classifier. What the reference does not allow is left out.
    """
    check_same_dimensions(samples, reference)
    names = ("fid", "sfid") if features.is_standard else ("frechet_distance", "spatial_frechet_distance")
    found = {names[0]: frechet_distance(samples.pool, reference.pool)}
    if samples.spatial is not None and reference.spatial is not None:
        found[names[1]] = frechet_distance(samples.spatial, reference.spatial)
    if features.class_logits:
        mean, deviation = inception_score(features.class_logits(samples.features))
        found |= dict(inception_score=mean, inception_score_std=deviation)
    if reference.features is not None:
        precision, recall = precision_recall(samples.features, reference.features, device=features.device)
        found |= dict(precision=precision, recall=recall)
    if labels is not None and features.predicted:
        found["class_agreement"] = float((features.predicted(samples.features).numpy() == labels).mean())
    for name, value in found.items():
        if not math.isfinite(value):
            raise UserError(f"the {name} comes out as {value}: features or statistics are too large")
    return found


def check_same_dimensions(samples, reference):
    """A `UserError` where the features of two `FeatureStatistics` sets have not the same size."""
    for name in ("pool", "spatial"):
        one, other = getattr(samples, name), getattr(reference, name)
        if one is not None and other is not None and one[0].shape != other[0].shape:
            raise UserError(f"the reference has {len(other[0])} numbers an image, the samples have {len(one[0])}: "
                            "images of another size, or another feature space?")


def check_comparable(images, reference, features):
    """Before the work, not after it: a `UserError` where these images cannot be compared with a `FeatureStatistics` reference.
    """
    if reference.features is not None and len(images) <= NEIGHBOURS:
        raise UserError(f"{len(images)} samples are too few: precision and recall need more than {NEIGHBOURS}")
    labels = images.class_labels() if features.predicted else None
    if labels is not None and not 0 <= labels.min() <= labels.max() < features.num_classes:
        raise UserError(f"the samples have the labels {labels.min()} .. {labels.max()}, "
                        f"{features.metadata()['space']} knows the classes 0 .. {features.num_classes - 1}")
    # To the features noise is as good as samples that are still to be made.
    few = images.noise_like(2) if hasattr(images, "noise_like") else images.batch(0, min(2, len(images)))
    rows = {name: found for name, found in features(few)._asdict().items() if found is not None}
    check_same_dimensions(FeatureStatistics(len(few), **{name: (found[0], None) for name, found in rows.items()}), reference)


def primary_score(features):
    """The name of the distance that sets are ranked by: the lower, the better."""
    return "fid" if features.is_standard else "frechet_distance"


def distance_name(features, count):
    """What the distance of `count` samples may be called: FID-50K, or what it is."""
    if features.is_standard:
        return f"FID-{f'{count // 1000}K' if count % 1000 == 0 else count}"
    return f"Frechet distance ({features.metadata()['space']}, {count} images)"


def format_scores(scores, features, samples, reference):
    """The scores as lines for people, with warnings where they mean little."""
    yield f"{distance_name(features, samples.count)}: {scores[primary_score(features)]:.4f}"
    for name, title in (("sfid", "sFID"), ("spatial_frechet_distance", "of the spatial features")):
        if name in scores:
            yield f"{title}: {scores[name]:.4f}"
    if "inception_score" in scores:
        yield (f"Inception Score: {scores['inception_score']:.3f} +- {scores['inception_score_std']:.3f} "
               f"(parts of {min(SPLIT, samples.count)})")
    if "precision" in scores:
        yield (f"precision: {scores['precision']:.4f}, recall: {scores['recall']:.4f} (k = {NEIGHBOURS}, "
               f"{len(reference.features)} images of the reference)")
    if "class_agreement" in scores:
        yield (f"class agreement: {scores['class_agreement']:.1%} (of real images not trained on: "
               f"{features.metadata()['accuracy']:.1%})")
    yield from score_warnings(samples.count, samples.size, reference)


def score_warnings(count, size, reference):
    """Sentences on why a distance of so many samples of this size to a `FeatureStatistics` reference may mislead."""
    dimensions = len(reference.pool[0])
    for number, what in ((count, "samples"), (reference.count, "images of the reference")):
        if number and number <= dimensions:
            yield (f"WARNING: {number} {what} in {dimensions} dimensions: the covariance is singular and the distance "
                   "much too large; compare it with that of equally many only")
    if size and reference.size and tuple(size) != tuple(reference.size):
        yield (f"WARNING: the samples have {size[1]} x {size[0]} pixels, the reference has "
               f"{reference.size[1]} x {reference.size[0]}: the distance is of that, too")
