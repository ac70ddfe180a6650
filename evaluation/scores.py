"""Scores of a set of samples against a reference, and how they are named and printed."""
import math

from common.errors import ArgumentError, UserError
from common.resources import check_memory
from evaluation.feature_statistics import FeatureStatistics
from evaluation.image_sources import GeneratedImages
from evaluation.metrics import INCEPTION_SCORE_SPLIT, NUM_NEIGHBORS, frechet_distance, inception_score, precision_recall


def compute_scores(samples, reference, features, labels=None):
    """Compute all scores that a feature space and two `FeatureStatistics` in it allow. Call it on rank 0.

    `labels` are the classes that the samples are meant to show, shape (N,), or None.

    Returns:
        dict[str, float]: In the standard Inception space fid, sfid, inception_score, inception_score_std, precision,
        recall; in others frechet_distance, precision, recall, and with a classifier class_agreement, the fraction of
        samples that are classified as their label.

    Raises:
        UserError: If a score is not finite, or the features have different sizes.
    """
    check_same_dimensions(samples, reference)
    names = ("fid", "sfid") if features.is_standard else ("frechet_distance", "spatial_frechet_distance")
    scores = {names[0]: frechet_distance(samples.pool, reference.pool)}
    if samples.spatial is not None and reference.spatial is not None:
        scores[names[1]] = frechet_distance(samples.spatial, reference.spatial)
    if features.class_logits:
        mean, deviation = inception_score(features.class_logits(samples.features))
        scores |= dict(inception_score=mean, inception_score_std=deviation)
    if reference.features is not None:
        precision, recall = precision_recall(samples.features, reference.features, device=features.device)
        scores |= dict(precision=precision, recall=recall)
    if labels is not None and features.predict_class:
        scores["class_agreement"] = float((features.predict_class(samples.features).numpy() == labels).mean())
    for name, value in scores.items():
        if not math.isfinite(value):
            raise UserError(f"{name} is {value}: features or statistics are too large")
    return scores


def left_out_scores(samples, reference, features, labels, labels_problem):
    """Return {score: reason} of the scores that the feature space allows, but the samples or the reference do not."""
    reasons = {}
    if samples.spatial is not None and reference.spatial is None:
        reasons["sfid"] = "the reference has no mu_s and sigma_s"
    if reference.features is None:
        reasons["precision, recall"] = "the reference has neither features nor images (arr_0)"
    if features.predict_class and labels is None:
        reasons["class_agreement"] = labels_problem
    return reasons


def check_same_dimensions(samples, reference):
    """Raise a `UserError` if the features of two `FeatureStatistics` have different sizes."""
    for name in ("pool", "spatial"):
        one, other = getattr(samples, name), getattr(reference, name)
        if one is not None and other is not None and one[0].shape != other[0].shape:
            raise UserError(f"the reference has {len(other[0])} numbers an image, the samples have {len(one[0])}: "
                            "images of another size, or another feature space?")


def check_comparable(images, reference, features):
    """Check that an `ImageSource` can be compared with a reference, before its images are generated or measured.

    Raises:
        ArgumentError: If too few images are to be generated, or too many for the memory.
        UserError: If there are too few images, unknown labels, or features of another size.
    """
    if reference.features is not None and len(reference.features) <= NUM_NEIGHBORS:
        raise UserError(f"precision and recall need more than {NUM_NEIGHBORS} reference images, not "
                        f"{len(reference.features)}")
    if reference.features is not None and len(images) <= NUM_NEIGHBORS:
        problem = f"precision and recall need more than {NUM_NEIGHBORS} samples"
        if isinstance(images, GeneratedImages):
            raise ArgumentError(problem, num_fid_samples=len(images))
        raise UserError(f"{problem}, not {len(images)}")
    labels = images.class_labels() if features.predict_class else None
    if labels is not None and not 0 <= labels.min() <= labels.max() < features.num_classes:
        raise UserError(f"the samples have the labels {labels.min()} .. {labels.max()}, but "
                        f"{features.metadata()['space']} has the classes 0 .. {features.num_classes - 1}")
    examples = features(images.example_batch())
    if isinstance(images, GeneratedImages):  # rank 0 keeps their features, and an index of each
        check_memory(len(images) * (examples.pool[0].nbytes + 40), num_fid_samples=len(images))
    rows = {name: (values[0], None) for name, values in examples._asdict().items() if values is not None}
    check_same_dimensions(FeatureStatistics(len(images), **rows), reference)


def primary_score(features):
    """Return the name of the distance that sets are ranked by: the lower, the better."""
    return "fid" if features.is_standard else "frechet_distance"


def rounding_note(scores):
    """Return what the record says of a distance that is 0; None if there is none."""
    zeros = [name for name in ("fid", "frechet_distance", "sfid", "spatial_frechet_distance") if scores.get(name) == 0]
    return f"{' and '.join(zeros)}: 0, or computed as less by rounding and set to 0" if zeros else None


def distance_name(features, count):
    """Return what the distance of `count` samples may be called, such as "FID-50K"."""
    if features.is_standard:
        return f"FID-{f'{count // 1000}K' if count % 1000 == 0 else count}"
    return f"Frechet distance ({features.metadata()['space']}, {count} images)"


def format_scores(scores, features, samples, reference):
    """Yield the scores as lines to print, followed by warnings; arguments as of `compute_scores`."""
    yield f"{distance_name(features, samples.count)}: {scores[primary_score(features)]:.4f}"
    for name, title in (("sfid", "sFID"), ("spatial_frechet_distance", "of the spatial features")):
        if name in scores:
            yield f"{title}: {scores[name]:.4f}"
    if "inception_score" in scores:
        yield (f"Inception Score: {scores['inception_score']:.3f} +- {scores['inception_score_std']:.3f} "
               f"(parts of {min(INCEPTION_SCORE_SPLIT, samples.count)})")
    if "precision" in scores:
        yield (f"precision: {scores['precision']:.4f}, recall: {scores['recall']:.4f} (k = {NUM_NEIGHBORS}, "
               f"{len(reference.features)} reference images)")
    if "class_agreement" in scores:
        yield (f"class agreement: {scores['class_agreement']:.1%} (of real images not trained on: "
               f"{features.metadata()['accuracy']:.1%})")
    yield from score_warnings(samples.count, samples.size, reference)


def score_warnings(count, size, reference):
    """Yield reasons why the distance of `count` samples of (height, width) `size` to a reference may mislead."""
    dimensions = len(reference.pool[0])
    for number, name in ((count, "samples"), (reference.count, "reference images")):
        if number and number <= dimensions:
            yield (f"WARNING: {number} {name} in {dimensions} dimensions: the covariance is singular and the distance "
                   "much too large. Compare it with distances of equally many images only")
    if size and reference.size and tuple(size) != tuple(reference.size):
        yield (f"WARNING: the samples have {size[1]} x {size[0]} pixels, the reference has "
               f"{reference.size[1]} x {reference.size[0]}: this adds to the distance")
