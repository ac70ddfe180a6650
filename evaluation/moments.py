"""Mean and covariance of features, summed up while they stream by."""
import torch


class Moments:
    """Mean and covariance of rows (n, D), in float64, added in any batches by any number of processes.

    Sums are kept about the running mean (Chan et al., 1979), so that features with a large mean lose no digits.
    """

    def __init__(self, dimensions, device="cpu"):
        device = "cpu" if torch.device(device).type == "mps" else device  # which has no float64
        self.count = 0
        self.mean = torch.zeros(dimensions, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dimensions, dimensions, dtype=torch.float64, device=device)

    def add(self, rows):
        """Add features (n, D)."""
        rows = rows.to(self.mean.device).double()
        mean = rows.mean(dim=0)
        centred = rows - mean
        self._merge(len(rows), mean, centred.T @ centred)

    def _merge(self, count, mean, scatter):
        total, shift = self.count + count, mean - self.mean
        self.scatter += scatter + torch.outer(shift, shift) * (self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total

    def reduce(self, accelerator):
        """Become those of all processes' rows, on every process; returns self."""
        if accelerator.num_processes == 1:
            return self
        device = accelerator.device  # where the processes can talk to each other
        sums = torch.cat([self.mean * self.count, self.mean.new_tensor([self.count])]).to(device)
        sums = accelerator.reduce(sums, reduction="sum").to(self.mean.device)
        count = int(sums[-1])
        mean = sums[:-1] / max(1, count)
        shift = self.mean - mean
        scatter = self.scatter + torch.outer(shift, shift) * self.count
        self.scatter = accelerator.reduce(scatter.to(device), reduction="sum").to(self.mean.device)
        self.mean, self.count = mean, count
        return self

    def statistics(self):
        """(mean (D,), covariance (D, D)) as arrays; the covariance as `np.cov` gives it, with N - 1."""
        return self.mean.cpu().numpy(), (self.scatter / max(1, self.count - 1)).cpu().numpy()
