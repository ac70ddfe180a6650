"""The latents of a data set on disk: moments of the posterior of every image, in a few large files.

A folder holds

    manifest.json    what this is a cache of, and the SHA-256 of every file
    moments-000.npy  (rows_per_file, orientations, 2C, h, w): mean and log_var of each image, then of its mirror image
    moments-001.npy  ... image i is row i % rows_per_file of file i // rows_per_file
    labels.npy       (count,) int64
    paths.txt        a line per image: its path relative to the data set's folder
    progress.npy     (count,) uint8, while the cache is being made: MISSING, ENCODED or CORRUPT
    extraction.lock  while a run is making it

The place of an image follows from its index alone: ranks write without asking each other, a restart finds what is done,
and the bytes depend on neither.
"""
