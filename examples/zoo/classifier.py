"""The small convolutional network that judges generated digits, and whose features distances between image sets are taken in."""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class DigitClassifier(ModelMixin, ConfigMixin):
    """Logits of ten digits from images (n, 1, 32, 32) in [-1, 1].

    Args:
        channels: Of the two convolutional stages.
        num_features: Size of the layer before the logits.
    """

    @register_to_config
    def __init__(self, channels: tuple[int, int] = (24, 48), num_features: int = 64) -> None:
        super().__init__()
        first, second = channels
        self.trunk = nn.Sequential(
            *self._stage(1, first), *self._stage(first, first), nn.MaxPool2d(2),
            *self._stage(first, second), *self._stage(second, second), nn.MaxPool2d(2),
            *self._stage(second, second), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.25),
            nn.Linear(second * 16, num_features), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(num_features, 10)

    @staticmethod
    def _stage(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
        return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.GroupNorm(6, outputs), nn.ReLU()

    def features(self, images: Tensor) -> Tensor:
        """Activations before the logits, (n, num_features)."""
        return self.trunk(images)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, (n, 10)."""
        return self.head(self.trunk(images))

    @torch.no_grad()
    def probabilities(self, images: Tensor, batch_size: int = 500) -> Tensor:
        """Class probabilities, (n, 10), a batch at a time."""
        return torch.cat([self(chunk).softmax(1) for chunk in images.split(batch_size)])
