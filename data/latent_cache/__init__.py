"""A data set's latents on disk: the posterior's moments of every image, in a few large files that are memory-mapped.

A folder holds

    manifest.json    what this is a cache of, and the SHA-256 of every file
    moments-000.npy  (rows_per_file, orientations, 2C, h, w): mean and log_var of each image, then of its mirror image
    moments-001.npy  ... image i is row i % rows_per_file of file i // rows_per_file
    labels.npy       (count,) int64
    paths.txt        a line an image: its path below the data set's folder
    progress.npy     (count,) uint8, while the cache is being made: MISSING, ENCODED or BAD
    extraction.lock  while a run is making it

An image's place follows from its index alone, so that processes write without asking each other, a restart finds what
is done, and the bytes do not depend on either.
"""

from data.latent_cache.manifest import DTYPES, cache_bytes, new_manifest, read_manifest
from data.latent_cache.reader import LatentCache, describe_incomplete_cache, verify
from data.latent_cache.writer import LatentCacheWriter

__all__ = ["DTYPES", "LatentCache", "LatentCacheWriter", "cache_bytes", "describe_incomplete_cache", "new_manifest",
           "read_manifest", "verify"]
