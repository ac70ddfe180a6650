"""Distances and scores, against closed forms, textbook formulas and brute force in float64."""
import sys

import numpy as np
import pytest
import scipy.linalg
import torch

from common import distributed
from common.errors import UserError
from evaluation.feature_statistics import RunningMoments
from evaluation.metrics import frechet_distance, inception_score, precision_recall


def random_rows(count, dimensions, seed, spread=1.0, mean=0.0):
    random = np.random.default_rng(seed)
    return mean + spread * random.standard_normal((count, dimensions)) @ random.standard_normal(
        (dimensions, dimensions)) / dimensions**0.5


def statistics_of(rows):
    return rows.mean(axis=0), np.cov(rows, rowvar=False)


def test_frechet_distance_agrees_with_the_closed_form():
    """Covariances that commute: |m1 - m2|^2 + sum (sqrt(l1) - sqrt(l2))^2, D = 64."""
    random = np.random.default_rng(0)
    rotation = np.linalg.qr(random.standard_normal((64, 64)))[0]
    one, two = random.uniform(0.1, 3, (2, 64))
    mean_one, mean_two = random.standard_normal((2, 64))
    found = frechet_distance((mean_one, rotation * one @ rotation.T), (mean_two, rotation * two @ rotation.T))
    assert abs(found - ((mean_one - mean_two) ** 2).sum() - ((one**0.5 - two**0.5) ** 2).sum()) < 1e-9


@pytest.mark.parametrize("count", [200, 2000])
def test_frechet_distance_agrees_with_scipy(count):
    one, two = statistics_of(random_rows(count, 512, 1)), statistics_of(random_rows(count, 512, 2, 1.5, 0.1))
    root = scipy.linalg.sqrtm(one[1] @ two[1]).real
    want = ((one[0] - two[0]) ** 2).sum() + np.trace(one[1] + two[1] - 2 * root)
    assert abs(frechet_distance(one, two) - want) < 1e-6


def test_frechet_distance_of_identical_sets_is_zero():
    one = statistics_of(random_rows(500, 32, 1))
    assert abs(frechet_distance(one, one)) < 1e-9


def test_frechet_distance_of_shifted_sets_is_the_squared_shift():
    one = statistics_of(random_rows(500, 32, 1))
    shifted = one[0] + 2, one[1]
    assert abs(frechet_distance(one, shifted) - 32 * 4) < 1e-9


@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("batch", [1, 64, 1001])
def test_running_moments_do_not_depend_on_the_batches(batch, mean):
    rows = random_rows(1001, 17, 3, mean=mean)
    moments = RunningMoments(17)
    for part in torch.from_numpy(rows).split(batch):
        moments.add(part)
    found = moments.statistics()
    assert moments.count == 1001
    for one, want in zip(found, statistics_of(rows)):
        np.testing.assert_allclose(one, want, rtol=1e-9, atol=1e-9 * max(1, abs(mean)) ** 0.5)


def main():
    """Reduce moments as one of two ranks with uneven parts of the rows; once, one of them has none."""
    distributed.init()
    rows, rank = torch.from_numpy(random_rows(1001, 17, 3)), distributed.rank()
    first, second = RunningMoments(17), RunningMoments(17)
    first.add(rows[:700] if rank == 0 else rows[700:])
    if rank == 1:
        second.add(rows)
    for number, moments in enumerate((first, second)):
        mean, covariance = moments.reduce().statistics()
        np.savez(f"{sys.argv[1]}/{rank}-{number}.npz", mean=mean, covariance=covariance)


def test_moments_of_two_ranks_are_those_of_all_rows(children, tmp_path):
    children.run("test_metrics", tmp_path, processes=2)
    want = statistics_of(random_rows(1001, 17, 3))
    for path in sorted(tmp_path.glob("*.npz")):
        with np.load(path) as found:
            np.testing.assert_allclose(found["mean"], want[0], rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(found["covariance"], want[1], rtol=1e-9, atol=1e-9)
    assert len(list(tmp_path.glob("*.npz"))) == 4


def brute_inception_score(logits, split):
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    parts = [p[i:i + split] for i in range(0, len(p), split)]
    scores = [np.exp((part * (np.log(part) - np.log(part.mean(axis=0)))).sum(axis=1).mean()) for part in parts]
    return np.mean(scores), np.std(scores)


@pytest.mark.parametrize("count", [40, 47])
def test_inception_score_agrees_with_its_formula(count):
    logits = 3 * np.random.default_rng(0).standard_normal((count, 9))
    found = inception_score(torch.from_numpy(logits), split=10)
    np.testing.assert_allclose(found, brute_inception_score(logits, 10), rtol=1e-12)
    if count == 40:
        assert abs(inception_score(torch.from_numpy(np.sort(logits, axis=0)), split=10)[0] - found[0]) > 1e-3


def test_inception_score_is_between_one_and_the_number_of_classes():
    certain = torch.eye(10).repeat(5, 1) * 1000
    assert abs(inception_score(certain)[0] - 10) < 1e-9
    assert abs(inception_score(torch.zeros(50, 10))[0] - 1) < 1e-12


def brute_precision_recall(samples, reference, k=3):
    def distances(one, other):
        return np.sqrt(((one[:, None] - other[None]) ** 2).sum(axis=2))

    def fraction_within(points, centers):
        radii = np.sort(distances(centers, centers), axis=1)[:, k]
        return (distances(points, centers) <= radii).any(axis=1).mean()

    return fraction_within(samples, reference), fraction_within(reference, samples)


@pytest.mark.parametrize("block", [7, 64, 1000])
def test_precision_and_recall_agree_with_brute_force(block):
    samples, reference = random_rows(83, 6, 1, 0.8), random_rows(101, 6, 2, mean=0.3)
    found = precision_recall(torch.from_numpy(samples), torch.from_numpy(reference), block)
    want = brute_precision_recall(samples, reference)
    np.testing.assert_allclose(found, want, atol=1e-6)
    assert min(want) > 0.1 and max(want) < 0.99


def test_precision_is_of_samples_and_recall_of_the_reference():
    reference = torch.from_numpy(random_rows(200, 6, 1))
    collapsed = reference[:1] + 1e-3 * torch.from_numpy(random_rows(100, 6, 2))
    precision, recall = precision_recall(collapsed, reference)
    assert precision == 1.0 and recall < 0.05
    assert precision_recall(reference, reference) == (1.0, 1.0)
    assert precision_recall(reference + 100, reference) == (0.0, 0.0)
    wide = torch.cat([reference, reference + 100])
    assert precision_recall(wide, reference) == (0.5, 1.0)


def test_precision_and_recall_need_more_images_than_neighbors():
    with pytest.raises(UserError, match="reference"):
        precision_recall(torch.zeros(9, 2), torch.zeros(3, 2))
