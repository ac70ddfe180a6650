"""Work on numbered items that is done in batches, by several processes, and goes on after a kill."""
import itertools

import numpy as np


def missing_ranges(done, batch_size):
    """What is left to do: ranges (first, end), each within a batch of the grid 0, batch_size, 2 batch_size, ...

    done  (N,) truth values. The grid depends on nothing but the batch size, so that neither a kill nor the number of
          processes changes which items are computed together.
    """
    ranges = []
    for start in range(0, len(done), batch_size):
        todo = [start + int(i) for i in np.flatnonzero(~done[start:start + batch_size])]
        cuts = [0, *(k for k in range(1, len(todo)) if todo[k] != todo[k - 1] + 1), len(todo)]
        ranges += [(todo[a], todo[b - 1] + 1) for a, b in itertools.pairwise(cuts) if b > a]
    return ranges
