"""How good a set of images is: feature spaces, distances between sets, and the records that say what was measured."""
