"""Sampling: pipelines from noise to images, loading trained models, sets of samples."""
