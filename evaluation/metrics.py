"""Distances and scores as ADM's evaluation suite defines them; torch-fidelity does the arithmetic."""
import numpy as np
import torch

from common.errors import UserError

INCEPTION_SCORE_SPLIT = 5000  # images in each part
NUM_NEIGHBORS = 3  # k of precision and recall


def float64_device(device):
    """Return `device`, or the CPU instead of Apple's GPU, which has no float64."""
    return torch.device("cpu") if torch.device(device).type == "mps" else torch.device(device)


def frechet_distance(gaussian_1, gaussian_2):
    """Compute |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) (Heusel et al., 2017, arXiv 1706.08500, eq. 6).

    A Gaussian is a mean (D,) and a covariance (D, D). The result, computed in float64 by eigenvalues, is not finite if
    the covariances overflow. It is 0 if rounding, which singular covariances amplify, makes it less.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
    first, second = (dict(mu=mean.astype("float64"), sigma=covariance.astype("float64"))
                     for mean, covariance in (gaussian_1, gaussian_2))
    with np.errstate(over="ignore", invalid="ignore"):  # the caller checks that the result is finite
        distance = fid_statistics_to_metric(first, second, verbose=False)[KEY_METRIC_FID]
    return 0.0 if distance <= 0 else float(distance)


def inception_score(logits, split=INCEPTION_SCORE_SPLIT):
    """Compute exp of the mean KL(p(y|x) || p(y)) over parts of `split` images in their order (Salimans et al., 2016).

    Returns the mean and standard deviation over the parts of class logits, shape (N, num_classes).
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
    parts = [isc_features_to_metric(part, splits=1, shuffle=False) for part in logits.split(split)]
    scores = torch.tensor([part[KEY_METRIC_ISC_MEAN] for part in parts], dtype=torch.float64)
    return scores.mean().item(), scores.std(correction=0).item()


def precision_recall(samples, reference, block=1000, device="cpu"):
    """Compute improved precision and recall with k = 3 (Kynkaanniemi et al., 2019, arXiv 1904.06991).

    Precision is the fraction of samples within the k-nearest-neighbor ball of a reference image; recall swaps the sets.
    Features have the shapes (N, D) and (M, D). Distances are computed in float64 on `device`, `block` rows at once.

    Raises:
        UserError: If a set has no more than k images.
    """
    from torch_fidelity.metric_prc import calculate_precision_recall_part
    for name, features in (("samples", samples), ("reference images", reference)):
        if len(features) <= NUM_NEIGHBORS:
            raise UserError(f"precision and recall need more than {NUM_NEIGHBORS} {name}, not {len(features)}")
    device = float64_device(device)
    return calculate_precision_recall_part(samples.to(device).double(), reference.to(device).double(), NUM_NEIGHBORS,
                                           block)
