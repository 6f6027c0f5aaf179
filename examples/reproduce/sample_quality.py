"""Price of steering: how good and how diverse samples are beside real images, in the features of a classifier.

Precision is the share of samples inside the manifold of the real images, recall the share of real images inside that of the
samples, a manifold being the union of balls that reach to the third neighbour (Kynkäänniemi et al., 2019, arXiv:1904.06991). The
Vendi score is the effective number of different samples, exp of the entropy of the eigenvalues of their similarities (Friedman and
Dieng, 2023, arXiv:2210.02410).
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
from sklearn.neural_network import MLPClassifier
from threadpoolctl import threadpool_limits
from torch import Tensor

sys.path.append(str(Path(__file__).parent.parent))

from evaluate_digits import frechet
from train_digits import digits_split

NEIGHBOUR, CONFIDENT = 3, 0.9
MEASURES = ("confident", "same digit", "Fréchet", "precision", "recall", "Vendi")


class Judge:
    """A multilayer perceptron trained on the digits that the model was trained on; measures beside digits that neither saw."""

    def __init__(self) -> None:
        train, labels, unseen, unseen_labels = (t.flatten(1).numpy() if t.ndim > 1 else t.numpy() for t in digits_split())
        with threadpool_limits(1):  # more threads only wait for one another at this size
            self.network = MLPClassifier((64,), alpha=1e-2, max_iter=1000, random_state=0).fit(train, labels)
        self.accuracy = float(self.network.score(unseen, unseen_labels))
        self.real = self.features(unseen)

    def features(self, images: np.ndarray) -> np.ndarray:
        """The hidden layer, (n, 64)."""
        return np.maximum(images @ self.network.coefs_[0] + self.network.intercepts_[0], 0)

    def __call__(self, samples: Tensor, unguided: Tensor, blocks: int) -> dict[str, tuple[float, float]]:
        """Every measure as (mean, standard error) over blocks of samples of equal size; ``unguided`` are those of equal seeds."""
        made, plain = (list(np.array_split(x.flatten(1).numpy(), blocks)) for x in (samples, unguided))
        columns = {name: [] for name in MEASURES}
        for images, before in zip(made, plain, strict=True):
            for name, value in zip(MEASURES, self._block(images, before), strict=True):
                columns[name].append(value)
        return {name: (float(np.mean(v)), float(np.std(v, ddof=1) / math.sqrt(blocks))) for name, v in columns.items()}

    def _block(self, images: np.ndarray, before: np.ndarray) -> tuple[float, ...]:
        sure, found = self.network.predict_proba(images), self.features(images)
        same = (sure.argmax(1) == self.network.predict_proba(before).argmax(1)).mean()
        precision, recall = covered(found, self.real), covered(self.real, found)
        return float((sure.max(1) >= CONFIDENT).mean()), float(same), frechet(found, self.real), precision, recall, vendi(found)


def distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Euclidean, (n, d) and (m, d) -> (n, m)."""
    squares = (first**2).sum(1)[:, None] + (second**2).sum(1) - 2 * first @ second.T
    return np.sqrt(squares.clip(min=0))


def covered(points: np.ndarray, manifold: np.ndarray) -> float:
    """Share of points within the balls of a manifold's samples, each as wide as the way to its third neighbour."""
    radii = np.sort(distances(manifold, manifold), axis=1)[:, NEIGHBOUR]  # the first is the sample itself
    return float((distances(points, manifold) <= radii).any(1).mean())


def vendi(features: np.ndarray) -> float:
    """exp of the entropy of the eigenvalues of the cosine similarities over n."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True).clip(min=1e-12)
    shares = np.linalg.eigvalsh(unit.T @ unit / len(unit)).clip(min=0)  # those of the n x n similarities, zeros aside
    shares = shares[shares > 1e-12]
    return float(np.exp(-(shares * np.log(shares)).sum()))
