"""A fixed classifier of handwritten digits that judges samples of them."""
import numpy as np
from sklearn.svm import SVC

from data.digits import DigitsDataset


class DigitsClassifier:
    """A support vector machine on the pixels of the training digits.

    Attributes:
        accuracy (float): Fraction of the held-out digits that it classifies correctly.
    """

    def __init__(self):
        train, held_out = DigitsDataset("train"), DigitsDataset("held-out")
        self.machine = SVC(gamma=0.02, C=10).fit(train.images.flatten(1).numpy(), train.labels)
        self.accuracy = self.machine.score(held_out.images.flatten(1).numpy(), held_out.labels)

    def agreement(self, images, labels):
        """Compute the fraction of images, shape (N, 8, 8, 3), uint8, classified as their labels, shape (N,)."""
        pixels = np.asarray(images)[..., 0].reshape(len(images), -1) / 127.5 - 1.0
        return float((self.machine.predict(pixels) == np.asarray(labels)).mean())
