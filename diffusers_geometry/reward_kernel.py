"""The readout "kernel" of :class:`~.reward.GeometryReward`: the mean of a Gaussian process over the features of a frozen trunk.

With features f of n training samples, their standardised labels z and k(f, f') = exp(-|f - f'|² / (2 size)),

    mean(f) = Σ_i k(f, f_i) c_i,      c = (K + ridge I)⁻¹ z            (Rasmussen and Williams, 2006, eq. 2.23 and 2.25)

in closed form, so that nothing can be trained too long; the ridge is chosen on the validation seeds, and the squared error there
is the variance. For a few thousand labels at most: the samples' features are kept, and K is solved for.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

RIDGES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
MOST_ANCHORS = 4096


class KernelReadout(nn.Module):
    """(B, size) -> mean and log variance of the standardised label, (B, 2).

    Args:
        size: Of the features.
        num_anchors: n.
    """

    def __init__(self, size: int, num_anchors: int) -> None:
        super().__init__()
        self.register_buffer("anchors", torch.zeros(num_anchors, size))
        self.register_buffer("coefficients", torch.zeros(num_anchors))
        self.register_buffer("log_variance", torch.zeros(()))

    def forward(self, features: Tensor) -> Tensor:
        """As the head "value"."""
        mean = self._kernel(features, self.anchors) @ self.coefficients
        return torch.stack([mean, self.log_variance.expand(len(mean))], dim=1)

    @torch.no_grad()
    def fit(self, features: Tensor, labels: Tensor, others: Tensor, other_labels: Tensor) -> tuple[int, float]:
        """Takes the training samples (n, size), (n,) as anchors, and the ridge of least loss on others.

        Returns:
            Which ridge, and the mean negative log likelihood of the others.
        """
        self.anchors.copy_(features)
        kernel, identity = self._kernel(features, features).double(), torch.eye(len(features), dtype=torch.float64)
        across, found = self._kernel(others, features).double(), []
        for ridge in RIDGES:
            coefficients = torch.linalg.solve(kernel + ridge * identity.to(kernel.device), labels.double())
            found.append((float((across @ coefficients - other_labels).square().mean()), coefficients))
        best = min(range(len(RIDGES)), key=lambda i: found[i][0])
        variance, coefficients = found[best]
        self.coefficients.copy_(coefficients)
        self.log_variance.fill_(variance).log_()
        means = torch.as_tensor((across @ coefficients), dtype=torch.float64)
        return best, float(functional.gaussian_nll_loss(means, other_labels.double(), torch.full_like(means, variance)))

    @staticmethod
    def _kernel(first: Tensor, second: Tensor) -> Tensor:
        squares = first.square().sum(dim=1, keepdim=True) + second.square().sum(dim=1) - 2 * first @ second.T
        return (squares.clamp_min(0) / (-2 * first.shape[1])).exp()
