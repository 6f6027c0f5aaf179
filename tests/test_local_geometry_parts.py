"""Parts of the study of images where the answer is known."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

sys.path.append(str(Path(__file__).parent.parent / "examples" / "reproduce"))

from delta_stability import halves, stability
from image_measures import CORRUPTIONS, corrupted, edge_density, file_size, nearest_distance
from local_probe import Probe, psi_at, reliability
from resampling import auroc, interval, mean_difference, spearman, spread_ratio
from separation import separation


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(seed=0):
    return np.random.default_rng(seed)


def test_rank_statistics_are_those_of_scipy_and_sklearn():
    first, second = seeded().integers(0, 6, (2, 5, 40)).astype(float)  # many ties
    expected = [spearmanr(a, b).statistic for a, b in zip(first, second, strict=True)]
    assert spearman(first, second) == pytest.approx(expected)
    positive = second[:, :25] + 1
    expected = [roc_auc_score([0] * 40 + [1] * 25, np.concatenate(pair)) for pair in zip(first, positive, strict=True)]
    assert auroc(first, positive) == pytest.approx(expected)
    assert auroc(np.arange(5.0), np.arange(5.0, 8.0)) == 1
    assert spearman(np.ones(4), np.arange(4.0)) == 0


def test_intervals_are_as_wide_as_the_statistic_scatters():
    samples = seeded(1).normal(size=(300, 2, 80))
    samples[:, 1] = 0.8 * samples[:, 0] + 0.6 * samples[:, 1]
    truth = 6 / math.pi * math.asin(0.4)  # of normal variables with correlation 0.8
    scatter = np.std([spearman(a, b) for a, b in samples])
    found = [interval(spearman, a, b, resamples=200) for a, b in samples[:60]]
    assert np.mean([own.sem for own in found]) == pytest.approx(scatter, rel=0.15)
    assert 0.85 <= np.mean([own.low <= truth <= own.high for own in found]) <= 1  # of 0.95, 3 standard errors of 60
    apart = interval(auroc, np.arange(20.0), np.arange(20.0, 40.0))
    assert (apart.value, apart.low, apart.high) == (1, 1, 1)


def test_sets_are_compared_in_standard_deviations_of_the_second():
    first, second = np.array([4.0, 6.0, 8.0]), np.array([0.0, 1.0, 2.0])
    assert mean_difference(first, second) == pytest.approx(5)
    assert spread_ratio(first, second) == pytest.approx(2)


def test_edges_of_a_slope_are_its_gradient_whatever_lies_beside_it():
    """A slope from black to white over w pixels, half as steep at both margins, has a mean gradient of 1 / w."""
    slope = torch.linspace(-1, 1, 8).expand(1, 8, 8)
    images = torch.stack([slope, -torch.ones(1, 8, 8), slope.mT, noise(1, 8, 8)])
    assert edge_density(images)[:3] == pytest.approx([1 / 8, 0, 1 / 8])
    assert edge_density(images[:3].expand(-1, 3, -1, -1))[2] == pytest.approx(1 / 8)


def test_files_grow_with_what_is_in_the_image_and_see_only_the_levels():
    images = torch.stack([torch.zeros(3, 16, 16), noise(3, 16, 16).clamp(-1, 1)])
    plain, busy = file_size(images, 256)
    assert busy > plain + 400
    level = torch.randint(17, (1, 1, 8, 8), generator=torch.Generator().manual_seed(0)) / 8 - 1
    assert file_size(level + 0.05 * noise(1, 1, 8, 8).clamp(-1, 1), 17) == file_size(level, 17)


def test_corruptions_do_what_they_say():
    images, draw = 0.01 * noise(200, 1, 8, 8), lambda kind: corrupted(images, kind, torch.Generator().manual_seed(1))
    assert (draw("noise 0.2") - images).std().item() == pytest.approx(0.2, rel=0.03)
    blurred = draw("blur 1.0")
    assert torch.equal(corrupted(torch.ones(2, 1, 8, 8), "blur 1.0", torch.Generator()), torch.ones(2, 1, 8, 8))
    assert torch.equal(blurred[3:4], corrupted(images[3:4], "blur 1.0", torch.Generator()))
    assert blurred.std() < 0.5 * images.std()
    swapped = draw("patch swap")
    for image, original in zip(swapped, images, strict=True):
        changed = (image != original)[0]
        assert changed.sum() == 16
        assert (changed.any(0).sum(), changed.any(1).sum()) == (4, 4)
        donors = (images[:, 0, changed] == image[0, changed]).all(1)
        assert donors.sum() == 1
    with pytest.raises(ValueError, match="patch swap"):
        draw("blurred")
    assert len({draw(kind).sum().item() for kind in CORRUPTIONS}) == len(CORRUPTIONS)


def test_distance_to_the_nearest_is_per_pixel():
    training = torch.zeros(3, 1, 2, 2) + torch.tensor([0.0, 1.0, 4.0]).reshape(3, 1, 1, 1)
    assert nearest_distance(training + 0.3, training) == pytest.approx([0.3] * 3, abs=1e-6)


def test_scores_are_judged_on_images_that_did_not_choose_their_direction():
    generator = seeded(2)
    base, n = generator.normal(size=400), 400
    whole = {"good": base, "lower": base, "idle": generator.normal(size=n), "size": base}
    copies = {"good": base + 9, "lower": base - 1, "idle": generator.normal(size=n), "size": base + 0.5}
    turned = np.where(np.arange(n) % 2, 9.0, -9.0)  # what the first half says is wrong of the second
    found = separation(whole | {"turned": 0 * base}, [copies | {"turned": turned}], ("good", "lower", "idle", "turned"))
    assert found.areas["good"].value == 1
    assert found.areas["lower"].low > 0.65
    assert found.areas["turned"].value == 0
    assert found.seen["turned"] == 1
    assert abs(found.areas["idle"].value - 0.5) < 0.1
    assert found.baseline == "size"
    assert found.gain.value == pytest.approx(found.areas[found.descriptor].value - found.areas["size"].value)
    several = separation(whole, [copies, whole], ("good", "lower", "idle"))
    expected = roc_auc_score(
        [0] * 200 + [1] * 400, np.concatenate([whole["good"][1::2], copies["good"][1::2], whole["good"][1::2]])
    )
    assert several.areas["good"].value == pytest.approx(expected)


def test_a_shuffled_ranking_is_not_stable():
    ranking = seeded(3).normal(size=200)
    settings = [np.repeat((scale * ranking)[:, None], 4, axis=1) for scale in (1.0, 5.0)]
    settings.append(seeded(4).permuted(settings[0], axis=0))
    (same, half), (scaled, _), (shuffled, unlike) = stability(settings, 0)
    assert (same.value, scaled.value, half) == pytest.approx((1, 1, 1))
    assert abs(shuffled.value) < 0.2
    assert abs(unlike) < 0.2
    assert shuffled.low < 0 < shuffled.high
    assert halves(ranking[:, None]) == 1
    noisy = ranking[:, None] + seeded(5).normal(size=(200, 4))
    assert halves(noisy) == pytest.approx(1 / 1.5, abs=0.12)  # of variances 1 and 1/2, and ranks are near to that
    assert reliability(noisy) == pytest.approx(0.5, abs=0.1)


def test_the_probe_measures_the_whole_jacobian_under_common_draws(tmp_path):
    probe, images = Probe("digits", 2, tmp_path), noise(1, 1, 8, 8).clamp(-1, 1).repeat(2, 1, 1, 1)
    found, denoiser = probe.measure(images), probe.denoiser()
    assert np.array_equal(found["delta"][0], found["delta"][1])
    points, values = probe.points(denoiser, images[0]), []
    for x_t in points:
        matrix = torch.autograd.functional.jacobian(lambda x: denoiser.denoised(x[None])[0], x_t).reshape(64, 64)
        values.append(torch.linalg.svdvals(denoiser.alpha_t * matrix.double()))
    logs = torch.stack(values)[:, :16].log().sum(1)
    assert found["psi"][0] == pytest.approx(logs.numpy(), abs=1e-3)
    assert psi_at(found["values"], 16)[0] == pytest.approx(logs.mean().item(), abs=1e-3)
    assert found["nu"][0, 0] == pytest.approx(torch.distributions.Categorical(values[0]).entropy().exp().item(), rel=1e-4)
    with torch.no_grad():
        off = (denoiser.denoised(points) - images[0]).square().mean((1, 2, 3)).sqrt()
    assert found["error"][0] == pytest.approx(off.numpy(), rel=1e-5)
    again = probe.measure(images)
    assert all(np.array_equal(found[name], again[name]) for name in found)  # seconds too: read, not measured
    assert len(list(tmp_path.iterdir())) == 1
    probe.measure(-images[:1])
    assert len(list(tmp_path.iterdir())) == 2
