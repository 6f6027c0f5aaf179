"""What the comparison of rewards stands on: true descriptors of many samples at once, measures of images, moved labels."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import randn

from diffusers_geometry import Denoiser, dense_spectrum
from diffusers_geometry.complexity import local_complexity
from diffusers_geometry.descriptors import local_rank, local_scaling

sys.path.append(str(Path(__file__).parent.parent / "examples" / "reproduce"))

from descriptor_bench import DIGITS, REFERENCE_T, Bench, image_change, moved
from descriptor_rows import Reader, over


@pytest.fixture(scope="module")
def bench():
    return Bench(replace(DIGITS, noises=2, rank=5), None)


def test_true_descriptors_of_many_samples_are_those_of_each_alone(bench):
    samples = randn(3, 1, 8, 8, seed=4).clamp(-1, 1)
    found = bench.truth(samples)
    level = bench.pipe.scheduler.alphas_cumprod[REFERENCE_T].double()
    alpha, sigma = float(level.sqrt()), float((1 - level).sqrt())
    denoiser = Denoiser.from_function(lambda x: bench.pipe.unet(x, REFERENCE_T).sample, alpha_t=alpha, sigma_t=sigma)
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(77))
    for i, draw in ((0, 0), (2, 1)):
        point = alpha * samples[i] + sigma * noise[draw]
        spectrum = dense_spectrum(denoiser.jacobian(point))
        assert found["psi"][i, draw].item() == pytest.approx(local_scaling(spectrum, rank=5).value, abs=1e-3)
        assert found["nu"][i, draw].item() == pytest.approx(local_rank(spectrum).value, rel=1e-4)
        options = {"num_directions": 8, "num_draws": 1, "generator": torch.Generator().manual_seed(draw)}
        delta = local_complexity(denoiser.canonical_map("denoised"), point[None], 0.1 * sigma, **options)
        assert found["delta"][i, draw].item() == pytest.approx(delta.value.item(), abs=1.5)  # of 800: a unit on its knot
    assert found["psi"].shape == (3, 2)
    assert found["psi"].std(0).min() > 0.01


def test_measures_of_images_whose_answer_is_known(bench):
    reader = Reader.__new__(Reader)
    reader.bench, reader.judge = bench, object()
    bar = -torch.ones(2, 1, 12, 12)
    bar[0, 0, 1:11, 4:6], bar[1, 0, 1:11, 3:7] = 1, 1
    width = reader.shown(bar)["stroke width"]  # twice the area over the outline, which goes straight across one corner
    assert width.tolist() == pytest.approx([40 / (24 - 2 + 2**0.5), 80 / (28 - 2 + 2**0.5)])
    reader.judge = None
    colours = torch.tensor([[1.0, -1, -1], [1, 1, 1], [0, 0, 0], [1, 0, 0]]).reshape(4, 3, 1, 1).expand(4, 3, 4, 4)
    assert reader.shown(colours)["saturation"].tolist() == pytest.approx([1, 0, 0, 0.5])
    assert reader.shown(colours)["edge density"].tolist() == [0, 0, 0, 0]
    assert image_change(bar, bar).tolist() == [0, 0]
    assert image_change(bar, -bar).tolist() == pytest.approx([2, 2])
    assert over(torch.tensor([1.0, 3.0, 5.0]).numpy()) == pytest.approx((3, 2 / 3**0.5))


def test_moved_labels_keep_what_they_say():
    part = {"x_t": randn(40, 1, 5, 5), "psi": torch.arange(40.0), "seed": torch.arange(40)}
    found = moved(part)
    assert torch.equal(found["psi"], torch.cat([part["psi"], part["psi"]]))
    assert torch.equal(found["x_t"][:40], part["x_t"])
    ways = [(step, axis) for axis in (-1, -2) for step in (-1, 1)]
    used = [
        [i for i, way in enumerate(ways) if torch.equal(copy, x.roll(*way))]
        for copy, x in zip(found["x_t"][40:], part["x_t"], strict=True)
    ]
    assert all(len(way) == 1 for way in used)
    assert {way[0] for way in used} == {0, 1, 2, 3}
