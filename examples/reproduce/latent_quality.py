"""Price of steering a digit model of the zoo: whether the asked digit is shown, how good samples are, and how diverse.

In the features of the zoo's classifier, beside the zoo's held-out digits. Every figure is of all samples at once; its standard
error is a jackknife, which leaves out one group of samples at a time.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parent.parent / "zoo"))

from data import digits_split
from quality import coverage, frechet, vendi
from shared import load_classifier

MEASURES = ("asked digit", "same digit", "Fréchet", "precision", "recall", "Vendi", "Vendi within a digit")


class DigitJudge:
    """Measures beside the zoo's held-out digits."""

    def __init__(self) -> None:
        with torch.no_grad():
            self.real = load_classifier().features(digits_split()[1].images).numpy()

    def __call__(self, images: Tensor, unguided: Tensor, asked: Tensor, groups: int) -> dict[str, tuple[float, float]]:
        """Every measure of images (n, 1, 32, 32) with its standard error; ten samples in a row belong to one of the groups."""
        classifier = load_classifier()
        with torch.no_grad():
            found, seen = classifier.features(images).numpy(), classifier(images).argmax(1)
            before = classifier(unguided).argmax(1)
        right, same, asked = (seen == asked).numpy(), (seen == before).numpy(), asked.numpy()

        def figures(chosen: np.ndarray) -> np.ndarray:
            own = found[chosen]
            inner = np.mean([vendi(own[asked[chosen] == digit]) for digit in np.unique(asked[chosen])])
            values = right[chosen].mean(), same[chosen].mean(), frechet(own, self.real), coverage(own, self.real)
            return np.array([*values, coverage(self.real, own), vendi(own), inner])

        group = np.arange(len(images)) // 10 % groups
        left_out = np.stack([figures(group != g) for g in range(groups)])
        sems = np.sqrt((groups - 1) * left_out.var(axis=0))
        return {name: (float(v), float(e)) for name, v, e in zip(MEASURES, figures(group >= 0), sems, strict=True)}
