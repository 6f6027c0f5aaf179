"""GeometryReward: a small network that reads psi (or nu, or delta) off a noisy sample, so that generation can be steered by it.

The exact psi at x_t costs a spectrum, and its gradient another; a network trained on labels costs one small pass
(arXiv:2408.08307, section 5). It sees what every noise-aware network sees, the sample scaled to unit variance and the noise:

    u = x_t / sqrt(alpha_t² data_std² + sigma_t²) = y / sqrt(data_std² + sigma²),      c_noise = log(sigma) / 4

Labels differ more between noise levels than within one, so they are compared within a level. Per level (a loop position of the
labelled runs) the head "bins" predicts in which of K quantile bins of the level's labels the sample is, the paper's discretisation;
the expected label is Σ p_k centre_k(sigma), centres being the mean label of a bin, interpolated in log sigma between levels. The
head "value" predicts mean and log variance of the label standardised by the level's mean and standard deviation; so does the head
"kernel", in closed form from the features of a frozen trunk, for few labels (:mod:`.reward_kernel`).

Samples of shape (C, H, W) pass a convolutional trunk, (C, F, H, W) frame by frame and averaged, packed latents (L, C) and vectors
(d,) a token trunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from .reward_kernel import MOST_ANCHORS, KernelReadout
from .reward_networks import network_trunk
from .reward_trunks import GROUPS, ConvolutionalTrunk, TokenTrunk

Descriptor = Literal["psi", "nu", "delta"]
Head = Literal["bins", "value", "kernel"]
FREQUENCIES, HEAD_WIDTH = 8, 128
_HUB_OPTIONS = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download", "proxies")


class GeometryReward(ModelMixin, ConfigMixin):
    """Predicts a descriptor of the Jacobian at x_t from x_t alone, differentiably.

    Args:
        sample_shape: Of one sample without its batch axis: (C, H, W), (C, F, H, W), (L, C) or (d,).
        descriptor: What the labels are.
        head: "bins", "value" or "kernel".
        num_levels: Noise levels with label statistics of their own.
        num_bins: K, of the head "bins".
        width: Channels of the first stage, a multiple of 8.
        num_stages: Stages of the convolutional trunk, each at half the resolution and up to twice the channels.
        num_blocks: Residual blocks a stage, or transformer layers.
        data_std: Root mean square of a coordinate of x_0.
        psi_rank: Singular values that the labels sum; None where it does not apply.
        network: Config of a network whose first half is the trunk, instead of width, stages and blocks; see
            :mod:`.reward_networks`.
        num_timesteps: Of that network's schedule.
        num_anchors: Training samples that the head "kernel" keeps.

    Raises:
        ValueError: a shape, width, head or descriptor that is not one of these.
    """

    @register_to_config
    def __init__(
        self,
        sample_shape: Sequence[int],
        descriptor: Descriptor = "psi",
        head: Head = "bins",
        num_levels: int = 8,
        num_bins: int = 16,
        width: int = 32,
        num_stages: int = 2,
        num_blocks: int = 2,
        data_std: float = 1.0,
        psi_rank: int | None = None,
        network: dict[str, Any] | None = None,
        num_timesteps: int = 1000,
        num_anchors: int = 0,
    ) -> None:
        super().__init__()
        if descriptor not in ("psi", "nu", "delta") or head not in get_args(Head):
            raise ValueError(
                f"descriptor={descriptor!r}, head={head!r}. Expected 'psi', 'nu' or 'delta', and one of {get_args(Head)}."
            )
        if (head == "kernel") != (0 < num_anchors <= MOST_ANCHORS) or (head == "kernel" and network is None):
            raise ValueError(
                f"head={head!r}, num_anchors={num_anchors}. Expected 1 to {MOST_ANCHORS} training samples of a copied network for "
                "'kernel', and none for the other heads."
            )
        if not 1 <= len(sample_shape) <= 4 or width % GROUPS or min(width, num_levels, num_stages, num_blocks, num_bins - 1) < 1:
            raise ValueError(
                f"sample_shape={tuple(sample_shape)}, width={width}, num_levels={num_levels}, num_bins={num_bins}. Expected one to "
                f"four axes, a width that is a positive multiple of {GROUPS}, at least one level and two bins."
            )
        self.sample_shape = tuple(int(n) for n in sample_shape)
        embedding = 4 * width
        self.register_buffer("frequencies", torch.logspace(0, math.log10(64), FREQUENCIES), persistent=False)
        if network is not None:
            self.trunk: nn.Module = network_trunk(network, num_timesteps)
        elif len(self.sample_shape) >= 3:
            self.trunk = ConvolutionalTrunk(self.sample_shape[0], width, num_stages, num_blocks, embedding)
        else:
            self.trunk = TokenTrunk(self.sample_shape[-1], embedding, num_blocks)
        if network is None:
            into = nn.Linear(2 * FREQUENCIES + 1, embedding)
            self.noise_embedding = nn.Sequential(into, nn.SiLU(), nn.Linear(embedding, embedding))
        outputs, size = num_bins if head == "bins" else 2, self.trunk.size
        if head == "kernel":
            self.readout: nn.Module = KernelReadout(size, num_anchors)
        else:
            self.readout = nn.Sequential(nn.Linear(size, HEAD_WIDTH), nn.SiLU(), nn.Linear(HEAD_WIDTH, outputs))
        for name, shape in {"log_sigmas": (), "bin_edges": (num_bins - 1,), "bin_centres": (num_bins,),
                            "label_mean": (), "label_std": ()}.items():  # fmt: skip
            self.register_buffer(name, torch.zeros(num_levels, *shape))

    @torch.no_grad()
    def set_levels(self, sigma: Tensor, labels: Tensor) -> None:
        """Takes the label statistics of every noise level from training labels.

        Args:
            sigma: VE noise of each label, shape (N,); its distinct values are grouped into ``num_levels`` by rank.
            labels: The labels, shape (N,).

        Raises:
            ValueError: fewer distinct noises than levels, labels that do not vary, or too few of a level for its bins.
        """
        log_sigma, labels, config = sigma.double().log(), labels.double(), self.config
        distinct = log_sigma.unique()
        if len(distinct) < config.num_levels or not torch.isfinite(log_sigma).all():
            raise ValueError(
                f"{len(distinct)} noise levels, num_levels={config.num_levels}. Expected at least as many, all finite."
            )
        for level, group in enumerate(distinct.tensor_split(config.num_levels)):
            own = labels[(log_sigma >= group[0]) & (log_sigma <= group[-1])]
            edges = torch.quantile(own, torch.linspace(0, 1, config.num_bins + 1, dtype=own.dtype)[1:-1])
            index = torch.bucketize(own, edges)
            counts = torch.bincount(index, minlength=config.num_bins)
            if len(own) < 2 or counts.min() == 0 or not own.std() > 0:
                raise ValueError(
                    f"noise level sigma={group.mean().exp():.4g} has {len(own)} labels, {len(own.unique())} of them distinct. "
                    f"Expected enough for {config.num_bins} bins: label more seeds, or take fewer bins."
                )
            self.log_sigmas[level], self.label_mean[level], self.label_std[level] = group.mean(), own.mean(), own.std()
            self.bin_edges[level] = edges
            self.bin_centres[level] = torch.bincount(index, own, minlength=config.num_bins) / counts

    def forward(self, x_t: Tensor, sigma: Tensor | float, alpha_t: Tensor | float = 1.0) -> Tensor:
        """The head's output: logits of the bins (B, K), or mean and log variance of the standardised label (B, 2).

        Args:
            x_t: The scheduler's sample, (B, *sample_shape).
            sigma: VE noise sigma_t / alpha_t, a number or (B,).
            alpha_t: Signal scale of ``x_t``, a number or (B,); 1 for a VE sample.
        """
        return self.readout(self.features(x_t, sigma, alpha_t)).float()

    def features(self, x_t: Tensor, sigma: Tensor | float, alpha_t: Tensor | float = 1.0) -> Tensor:
        """What the head reads, (B, size); arguments as for :meth:`forward`."""
        if x_t.shape[1:] != self.sample_shape and not self._other_size(x_t):
            raise ValueError(f"x_t has shape {tuple(x_t.shape)}. Expected (B, {', '.join(map(str, self.sample_shape))}).")
        sigma, alpha_t = (self._per_sample(value, x_t) for value in (sigma, alpha_t))
        variance = self.config.data_std**2 if self.config.network is None else 1.0  # what the network itself was given
        scale = 1 / (alpha_t * (variance + sigma**2).sqrt())
        unit = x_t.to(self.dtype) * scale.reshape(-1, *[1] * (x_t.ndim - 1)).to(self.dtype)
        if self.config.network is not None:
            return self.trunk(unit, sigma.log())
        noise = (sigma.log() / 4).to(self.dtype)[:, None]
        angles = noise * self.frequencies.to(noise)
        embedding = self.noise_embedding(torch.cat([noise, angles.sin(), angles.cos()], dim=1))
        return self._pooled(unit, embedding)

    def predict(self, x_t: Tensor, sigma: Tensor | float, alpha_t: Tensor | float = 1.0) -> Tensor:
        """Expected label (B,), differentiable in ``x_t``; psi in nats.

        Raises:
            RuntimeError: the reward was not trained.
        """
        output, log_sigma = self.forward(x_t, sigma, alpha_t), self._log_sigma(sigma, x_t)
        if self.config.head == "bins":
            return (output.softmax(dim=1) * self._at(self.bin_centres, log_sigma)).sum(dim=1)
        return self._at(self.label_mean, log_sigma) + self._at(self.label_std, log_sigma) * output[:, 0]

    def bin_log_probability(self, x_t: Tensor, sigma: Tensor | float, index: int, alpha_t: Tensor | float = 1.0) -> Tensor:
        """log p(bin ``index`` of the labels at this noise | x_t), shape (B,).

        Raises:
            ValueError: a head without bins, or no such bin.
        """
        if self.config.head != "bins" or not 0 <= index < self.config.num_bins:
            raise ValueError(
                f"bin {index} of a {self.config.head!r} head. Expected head='bins' and 0 to {self.config.num_bins - 1}."
            )
        return self.forward(x_t, sigma, alpha_t).log_softmax(dim=1)[:, index]

    def spread(self, sigma: Tensor | float) -> Tensor:
        """Standard deviation of the training labels at this noise, the shape of ``sigma``."""
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=self.device)
        return self._at(self.label_std, sigma.reshape(-1).log()).reshape(sigma.shape)

    def covers(self, sigma: float, margin: float = 1.25) -> bool:
        """Whether a noise lies in the trained range, widened by a factor at both ends."""
        return bool(self.log_sigmas.min() - math.log(margin) <= math.log(sigma) <= self.log_sigmas.max() + math.log(margin))

    def loss(self, x_t: Tensor, sigma: Tensor, labels: Tensor, alpha_t: Tensor | float = 1.0) -> Tensor:
        """Mean negative log likelihood of the labels (B,): cross-entropy of their bins, or of the Gaussian."""
        return self.loss_of(self.forward(x_t, sigma, alpha_t), sigma, labels)

    def loss_of(self, output: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """:meth:`loss` of a head's output."""
        log_sigma = sigma.to(self.log_sigmas).log()
        if self.config.head == "bins":
            level = (log_sigma[:, None] - self.log_sigmas).abs().argmin(dim=1)
            index = (labels.to(self.bin_edges)[:, None] > self.bin_edges[level]).sum(dim=1)
            return functional.cross_entropy(output, index)
        return functional.gaussian_nll_loss(output[:, 0], self.standardised(labels.to(output), sigma), output[:, 1].exp())

    def standardised(self, labels: Tensor, sigma: Tensor) -> Tensor:
        """Labels (B,) in standard deviations of their noise level."""
        log_sigma = sigma.to(self.log_sigmas).log()
        return (labels - self._at(self.label_mean, log_sigma)) / self._at(self.label_std, log_sigma)

    def _pooled(self, unit: Tensor, embedding: Tensor) -> Tensor:
        if len(self.sample_shape) == 4:
            frames = unit.shape[2]
            folded = unit.transpose(1, 2).flatten(0, 1)
            return self.trunk(folded, embedding.repeat_interleave(frames, dim=0)).unflatten(0, (-1, frames)).mean(dim=1)
        return self.trunk(unit[:, None] if unit.ndim == 2 else unit, embedding)

    def _other_size(self, x_t: Tensor) -> bool:
        """Whether the sample only has another resolution, or another number of frames or tokens."""
        if x_t.ndim != len(self.sample_shape) + 1 or len(self.sample_shape) == 1:
            return False
        return x_t.shape[-1] == self.sample_shape[-1] if len(self.sample_shape) == 2 else x_t.shape[1] == self.sample_shape[0]

    def _per_sample(self, value: Tensor | float, x_t: Tensor) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float32, device=x_t.device).expand(len(x_t))

    def _log_sigma(self, sigma: Tensor | float, x_t: Tensor) -> Tensor:
        if not self.label_std.all():
            raise RuntimeError(
                "this reward was not trained: it has no label statistics. Expected train_reward(...) before predict."
            )
        return self._per_sample(sigma, x_t).log()

    def _at(self, table: Tensor, log_sigma: Tensor) -> Tensor:
        """A per-level table at these noises, linear in log sigma and constant beyond the ends; (B, ...)."""
        if len(self.log_sigmas) == 1:
            return table.expand(len(log_sigma), *table.shape[1:])
        high = torch.searchsorted(self.log_sigmas, log_sigma.to(self.log_sigmas).contiguous()).clamp(1, len(self.log_sigmas) - 1)
        low_sigma, high_sigma = self.log_sigmas[high - 1], self.log_sigmas[high]
        share = ((log_sigma - low_sigma) / (high_sigma - low_sigma)).clamp(0, 1).reshape(-1, *[1] * (table.ndim - 1))
        return torch.lerp(table[high - 1], table[high], share)

    def save_pretrained(self, save_directory: Any, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Writes ``config.json`` and safetensors, as :meth:`diffusers.ModelMixin.save_pretrained`; nothing else is offered."""
        if not safe_serialization:
            raise ValueError("safe_serialization=False. Expected True: a reward is saved as safetensors only.")
        super().save_pretrained(save_directory, *args, safe_serialization=True, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> GeometryReward:
        """Loads a reward from a folder or Hub id, in eval mode; safetensors only.

        Raises:
            ValueError: the config is of another class, or weights are missing or left over.
        """
        if kwargs.pop("use_safetensors", True) is not True:
            raise ValueError("use_safetensors=False. Expected True: a reward is loaded from safetensors only.")
        wants_info = kwargs.pop("output_loading_info", False)
        options = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
        found = cls.load_config(pretrained_model_name_or_path, **options).get("_class_name")
        if found != cls.__name__:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a {found}. Expected a {cls.__name__}, as save_pretrained writes it."
            )
        options = {"use_safetensors": True, "output_loading_info": True, **kwargs}
        reward, info = super().from_pretrained(pretrained_model_name_or_path, **options)
        wrong = {name: keys for name, keys in info.items() if keys}
        if wrong:
            raise ValueError(f"{pretrained_model_name_or_path} has {wrong}. Expected exactly the weights of its config.")
        return (reward, info) if wants_info else reward
