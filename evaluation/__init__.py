"""Evaluation of image sets: feature spaces, distances and scores, bits per dimension, and the records of results."""
