"""A classifier of handwritten digits that judges samples of them."""
import numpy as np
from sklearn.svm import SVC

from data.digits import DigitsDataset


class DigitsClassifier:
    """A support vector machine on the training digits' pixels. Its accuracy on the held-out ones is `accuracy`."""

    def __init__(self):
        train, held_out = DigitsDataset("train"), DigitsDataset("held-out")
        self.machine = SVC(gamma=0.02, C=10).fit(train.images.flatten(1).numpy(), train.labels)
        self.accuracy = self.machine.score(held_out.images.flatten(1).numpy(), held_out.labels)

    def agreement(self, images, labels):
        """The share of images (N, 8, 8, 3) uint8 that are taken for the digits `labels` (N,)."""
        pixels = np.asarray(images)[..., 0].reshape(len(images), -1) / 127.5 - 1.0
        return float((self.machine.predict(pixels) == np.asarray(labels)).mean())
