"""Distances and scores, as ADM's evaluation suite defines them; the arithmetic is torch-fidelity's."""

import numpy as np
import torch

from common.errors import UserError

SPLIT = 5000  # images in each part of the Inception Score
NEIGHBOURS = 3  # k of precision and recall


def frechet_distance(one, other):
    """The Frechet distance of two Gaussians: |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)).

    one, other  (mean (D,), covariance (D, D)) arrays; computed in float64, by eigenvalues (Heusel et al., 2017,
                arXiv 1706.08500, eq. 6)
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
    first, second = (dict(mu=mean.astype("float64"), sigma=covariance.astype("float64"))
                     for mean, covariance in (one, other))
    with np.errstate(over="ignore", invalid="ignore"):  # whoever asks will see that it is not finite
        return fid_statistics_to_metric(first, second, verbose=False)[KEY_METRIC_FID]


def inception_score(logits, split=SPLIT):
    """exp of the mean KL(p(y|x) || p(y)), over parts of `split` images in their order (Salimans et al., 2016).

    logits  (N, classes)
    return  mean and standard deviation over the parts
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
    parts = torch.tensor([isc_features_to_metric(part, splits=1, shuffle=False)[KEY_METRIC_ISC_MEAN]
                          for part in logits.split(split)], dtype=torch.float64)
    return parts.mean().item(), parts.std(correction=0).item()


def precision_recall(samples, reference, block=1000, device="cpu"):
    """Improved precision and recall with k = 3 (Kynkaanniemi et al., 2019, arXiv 1904.06991).

    precision: the share of samples within the k-nearest-neighbour ball of an image of the reference; recall: the other
    way round. samples (N, D), reference (M, D), compared in float64, `block` rows at once, on `device`.
    """
    from torch_fidelity.metric_prc import calculate_precision_recall_part
    for name, features in (("samples", samples), ("images of the reference", reference)):
        if len(features) <= NEIGHBOURS:
            raise UserError(f"precision and recall need more than {NEIGHBOURS} {name}, here are {len(features)}")
    device = "cpu" if torch.device(device).type == "mps" else device  # which has no float64
    return calculate_precision_recall_part(samples.to(device).double(), reference.to(device).double(), NEIGHBOURS,
                                           block)
