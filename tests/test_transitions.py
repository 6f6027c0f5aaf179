"""Measured transitions: exact distributions behind real pipelines must agree, part and return as the closed forms say."""

import json
import math

import numpy as np
import pytest
import torch
from behind import NO_CLIP, behind, latent, pixel, seeded
from scipy.special import ndtr, ndtri
from tiny import randn

from diffusers_geometry import TransitionReport, measure_transitions, with_geometry
from diffusers_geometry.exact import EmpiricalDenoiser, GaussianDenoiser, MixtureDenoiser
from diffusers_geometry.speciation import crossing
from diffusers_geometry.theory import clone_agreement, collapse_time_gaussian, sigma_of_time
from diffusers_geometry.theory.transitions import clone_snr

MEAN_SQUARED, WITHIN = 16.0, 1.0


def two_classes(dim):
    means = torch.zeros(2, dim, dtype=torch.double)
    means[:, 0] = torch.tensor([1.0, -1.0]) * math.sqrt(MEAN_SQUARED)
    return MixtureDenoiser(means, WITHIN * torch.eye(dim, dtype=torch.double).expand(2, dim, dim))


def first_pixel(images):
    return (images.reshape(len(images), -1)[:, 0] > 0.5).astype(int)


def exact_agreement(sigma, stochastic):
    snr = MEAN_SQUARED / (WITHIN + sigma**2)
    return float(clone_agreement(snr)) if stochastic else float(ndtr(math.sqrt(snr)))


# -- Agreement and speciation -----------------------------------------------------------------------

SAMPLERS = {
    "DDPM": (pixel("DDPMScheduler", **NO_CLIP), "clones"),
    "DDPM by U-turns": (pixel("DDPMScheduler", **NO_CLIP), "u_turn"),
    "Euler ancestral": (latent("EulerAncestralDiscreteScheduler"), "clones"),
    "DDIM": (pixel("DDIMScheduler", **NO_CLIP), "u_turn"),
    "DPM++": (pixel("DPMSolverMultistepScheduler"), "u_turn"),
    "Euler": (latent("EulerDiscreteScheduler"), "u_turn"),
    "flow": (pixel("FlowMatchEulerDiscreteScheduler"), "u_turn"),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_agreement_of_two_classes_is_the_closed_form(name):
    make, gesture = SAMPLERS[name]
    stochastic = name in ("DDPM", "DDPM by U-turns", "Euler ancestral")
    is_pixel = make not in (SAMPLERS["Euler"][0], SAMPLERS["Euler ancestral"][0])
    options = {"output_type": "np"} if is_pixel else {"output_type": "latent"}
    pipe, call = behind(make, two_classes(16 if is_pixel else 64), batch_size=400, num_inference_steps=100, **options)
    report = measure_transitions(
        pipe, **call, classify=first_pixel if is_pixel else None, num_parents=800, num_clones=2, progress=False,
        gesture="u_turn" if "U-turns" in name else "auto",
    )  # fmt: skip
    assert (report.gesture, report.stochastic) == (gesture, stochastic)
    z = [
        (e.value - exact_agreement(s, stochastic)) / e.sem
        for s, e in zip(report.sigmas, report.agreement, strict=True)
        if math.isfinite(s)
    ]
    assert len(z) >= 7
    assert max(map(abs, z)) < 3, z
    expected = [exact_agreement(sigma, stochastic) for sigma in report.sigmas]
    np.testing.assert_allclose(report.predicted_agreement, expected, atol=0.015)  # the two forms are up to 0.09 apart
    snr = clone_snr(0.8) if stochastic else ndtri(0.8) ** 2
    exact = math.sqrt(MEAN_SQUARED / snr - WITHIN)
    assert report.speciation.sem < 0.1 * exact
    assert report.speciation.converged
    assert abs(report.speciation.value - exact) < 3 * report.speciation.sem
    (pair,) = report.pairs
    assert abs(pair.sigma.value - exact) < 3 * pair.sigma.sem
    top = math.sqrt(MEAN_SQUARED + WITHIN)
    assert abs(report.top_eigenvalue_sigma.value - top) < 3 * report.top_eigenvalue_sigma.sem + 0.02 * top


# -- Recall and collapse ----------------------------------------------------------------------------


def test_u_turns_return_with_the_weight_of_the_parent():
    """The exact score of 60 points behind DDPM: the share of returns is the softmax weight, at every depth."""
    data = randn(60, 1, 4, 4)
    pipe, call = behind(pixel("DDPMScheduler", **NO_CLIP), EmpiricalDenoiser(data), batch_size=60, num_inference_steps=250)
    positions = [150, 175, 190, 205, 225]
    options = {"data": data, "branch_positions": positions, "num_parents": 60, "num_clones": 20, "progress": False}
    report = measure_transitions(pipe, **call, **options)
    shares = [e.value for e in report.recall]
    assert shares == sorted(shares)
    assert shares[0] < 0.3
    assert shares[-1] > 0.95
    for found, exact in zip(report.recall, report.exact_recall, strict=True):
        assert abs(found.value - exact.value) < 3 * math.hypot(found.sem, exact.sem)
    by_model = crossing(report.sigmas, np.array(shares), 0.5)
    assert by_model == pytest.approx(report.collapse["weight"].value, rel=0.1)


def test_collapse_by_errors_on_unseen_data():
    """A Gaussian's exact denoiser errs by the posterior variance: its information is log n where theory says."""
    variances = torch.tensor([4.0] * 4 + [0.25] * 12).double()
    pipe, call = behind(
        pixel("DDPMScheduler", **NO_CLIP), GaussianDenoiser(torch.diag(variances)), batch_size=50, num_inference_steps=250
    )
    data, unseen = (randn(n, 1, 4, 4, seed=n) * variances.sqrt().reshape(1, 1, 4, 4).float() for n in (500, 400))
    report = measure_transitions(
        pipe, **call, data=data, held_out=unseen, branch_positions=[200, 240], num_parents=50, num_clones=2, progress=False
    )
    found = report.collapse["held_out"]
    exact = float(sigma_of_time(collapse_time_gaussian(variances, math.log(500))))
    assert found.sem < 0.05 * exact
    assert abs(found.value - exact) < 3 * found.sem
    assert exact < report.collapse["weight"].value < report.collapse["log_odds"].value < 1.5 * exact


# -- The pipeline is left as it was -----------------------------------------------------------------


def state(pipe):
    networks = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
    hooks = [len(p._forward_hooks) + len(p._forward_pre_hooks) for m in networks for p in m.modules()]
    return type(pipe), dict(pipe.__dict__), set(pipe.scheduler.__dict__), type(pipe).__dict__.get("__call__"), hooks


def refuse(images):
    raise KeyError("the classifier failed")


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_the_pipeline_is_changed(fails):
    pipe, call = pixel("DPMSolverMultistepScheduler")(batch_size=4, num_inference_steps=6)
    weights = [p.clone() for p in pipe.unet.parameters()]
    expected = pipe(**call).images
    after_plain, rng = call["generator"].get_state(), torch.get_rng_state()
    before, settings = state(pipe), json.dumps(dict(pipe.scheduler.config), default=str)
    call["generator"] = seeded()
    options = {"classify": refuse if fails else first_pixel, "num_parents": 4, "num_clones": 2, "branch_positions": 2}
    if fails:
        with pytest.raises(KeyError, match="the classifier failed"):
            measure_transitions(pipe, **call, **options, progress=False)
    else:
        measure_transitions(pipe, **call, **options, progress=False)
    assert state(pipe) == before
    assert "step" not in pipe.scheduler.__dict__
    assert json.dumps(dict(pipe.scheduler.config), default=str) == settings
    assert torch.equal(call["generator"].get_state(), after_plain)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(p, w) for p, w in zip(pipe.unet.parameters(), weights, strict=True))
    np.testing.assert_array_equal(pipe(**call | {"generator": seeded()}).images, expected)


def test_seeds_reproduce():
    def measured(clone_seed, noise=0):
        pipe, call = behind(pixel("DDPMScheduler", **NO_CLIP), two_classes(16), batch_size=40, num_inference_steps=20)
        call["generator"] = seeded(noise)
        options = {"branch_positions": 3, "num_parents": 60, "num_clones": 2, "progress": False, "clone_seed": clone_seed}
        return measure_transitions(pipe, **call, **options, classify=first_pixel)

    first = measured(0)
    assert first.to_dict() == measured(0).to_dict()
    assert not np.array_equal(first.agreements, measured(1).agreements)
    assert not np.array_equal(first.agreements, measured(0, noise=1).agreements)
    assert first.agreements.shape == (60, 3)


# -- The report -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report():
    data = randn(80, 1, 4, 4) + 3 * torch.sign(randn(80, 1, 1, 1, seed=5))
    pipe, call = behind(pixel("FlowMatchEulerDiscreteScheduler"), EmpiricalDenoiser(data), batch_size=40, num_inference_steps=20)
    options = {"data": data, "branch_positions": 6, "num_parents": 40, "num_clones": 2, "progress": False, "agreement_level": 0.9}
    return with_geometry(pipe).measure_transitions(**call, **options)


def test_reports_come_back_from_files(report, tmp_path):
    report.save(tmp_path / "report.json")
    loaded = TransitionReport.load(tmp_path / "report.json")
    assert loaded.to_dict() == report.to_dict()
    assert loaded.table() == report.table()
    loaded.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 20_000


def test_tables_say_all_of_it(report):
    table = report.table()
    assert [line.split()[0] for line in table.splitlines()[1:7]] == [str(p) for p in report.positions]
    assert f"measured agreement = 0.9  sigma = {report.speciation}" in " ".join(table.split()).replace(" sigma =", "  sigma =")
    for words in ("recall", "exact recall", "closed form", "top covariance eigenvalue", "only pair of classes (0, 1)", "E w = 1/2"):
        assert words in table
    row = report.rows()[0]
    assert row["recall"] == report.recall[0].value
    assert row["recall_sem"] > 0
    assert report.settings["pipeline"] == "DDPMPipeline"
    assert report.settings["classes"] == "2 clusters"


def test_what_does_not_cross_is_said():
    pipe, call = behind(pixel("DDIMScheduler", **NO_CLIP), two_classes(16), batch_size=20, num_inference_steps=20)
    options = {"branch_positions": [18, 19], "num_parents": 20, "num_clones": 2, "progress": False, "classify": first_pixel}
    report = measure_transitions(pipe, **call, **options)
    assert report.speciation is None
    assert "not found: agreement is within 1.000 and 1.000" in report.table()


# -- Bad input --------------------------------------------------------------------------------------


def no_output(pipe):
    class Silent(type(pipe)):
        def __call__(self, *args, **kwargs):
            super().__call__(*args, **kwargs)
            return ("a", "b", "c", "d")

    pipe.__class__ = Silent
    return pipe


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_clones": 1}, r"num_clones=1. Expected an integer >= 2"),
        ({"num_parents": 1}, r"num_parents=1. Expected an integer >= 2"),
        ({"num_clusters": 1.5}, r"num_clusters=1.5. Expected an integer >= 2"),
        ({"agreement_level": 0.5}, r"agreement_level=0.5. Expected 0.5 < agreement_level < 1"),
        ({"agreement_level": 1.0}, r"agreement_level=1.0. Expected 0.5 < agreement_level < 1"),
        ({"gesture": "jump"}, r"gesture='jump'. Expected 'auto', 'clones' or 'u_turn'"),
        ({"gesture": "clones"}, r"gesture='clones' with DDIMScheduler, which draws no noise here"),
        ({"branch_positions": [0, 2]}, r"branch_positions=\[0, 2\] has \[0\]. Expected from 1 to 5"),
        ({"branch_positions": [6]}, r"branch_positions=\[6\] has \[6\]. Expected from 1 to 5"),
        ({"branch_positions": []}, r"branch_positions is empty. Expected at least one"),
        ({"branch_positions": 2.5}, r"branch_positions=2.5. Expected a number, loop positions, or 'all'"),
        ({"branch_positions": None}, r"branch_positions=None. Expected a number, loop positions, or 'all'"),
        ({"branch_positions": [1.5]}, r"branch_positions=\[1.5\]. Expected a number, loop positions, or 'all'"),
        ({"agreement_level": "a"}, r"agreement_level='a'. Expected 0.5 < agreement_level < 1"),
        ({"classify": 3}, r"classify=3. Expected None or a function"),
        (
            {"data": torch.zeros(5, 1, 4, 4), "held_out": torch.zeros(1, 1, 4, 4)},
            r"held_out has 1 examples. Expected at least 2",
        ),
        ({"branch_positions": 0}, r"branch_positions=0. Expected an integer >= 2"),
        ({"branch_positions": "some"}, r"branch_positions='some'. Expected a number, loop positions, or 'all'"),
        ({"data": torch.zeros(0, 1, 4, 4)}, r"data has shape \(0, 1, 4, 4\). Expected \(n, 1, 4, 4\), n >= 1"),
        ({"data": torch.zeros(5, 4, 4)}, r"data has shape \(5, 4, 4\). Expected samples \(n, 1, 4, 4\)"),
        ({"data": torch.full((5, 1, 4, 4), math.nan)}, r"data has shape .* all finite"),
        ({"data": torch.zeros(5, 1, 4, 4)}, r"data has copies of points"),
        ({"held_out": torch.zeros(5, 1, 4, 4)}, r"held_out without data"),
        ({"classify": lambda images: [0]}, r"classify returned shape \(1,\) of int64 for 4 images. Expected \(4,\)"),
        ({"classify": lambda images: np.zeros(4)}, r"of float64 for 4 images. Expected \(4,\), integers or strings"),
        ({"num_clusters": 9}, r"num_clusters=9 of 4 samples. Expected at most as many"),
        ({"num_inference_steps": 1}, r"the run has 1 steps. Expected at least 2, to branch after the first"),
    ],
)
def test_bad_input_is_refused(options, message):
    pipe, call = pixel("DDIMScheduler", **NO_CLIP)(batch_size=4, num_inference_steps=6)
    settings = {"num_parents": 4, "num_clones": 2, "branch_positions": 2, "progress": False} | options
    with pytest.raises(ValueError, match=message):
        measure_transitions(pipe, **call | settings)
    assert "step" not in pipe.scheduler.__dict__


def test_pipelines_that_cannot_be_measured_are_refused():
    options = {"num_parents": 4, "num_clones": 2, "branch_positions": 2, "progress": False}
    pipe, call = pixel("DDIMScheduler", **NO_CLIP)(batch_size=4, num_inference_steps=6)
    with pytest.raises(ValueError, match="Silent returned tuple for 4 samples|Silent returned str for 4 samples"):
        measure_transitions(no_output(pipe), **call, classify=first_pixel, **options)
    with pytest.raises(ValueError, match="UNet2DModel has no scheduler. Expected a diffusers pipeline"):
        measure_transitions(pipe.unet)
    pipe, call = latent("PNDMScheduler")(4, num_inference_steps=20)
    with pytest.raises(ValueError, match="PNDMScheduler has skip_prk_steps=False. Expected True"):
        measure_transitions(pipe, **call, **options)
    pipe, call = latent("DDIMScheduler", **NO_CLIP)(2, num_inference_steps=4, latents=randn(2, 4, 4, 4))
    with pytest.raises(ValueError, match="gave the same runs: num_parents=4 cannot be had. Expected at most 2"):
        measure_transitions(pipe, **call, **options)
    with pytest.raises(ValueError, match=r"or images \(n, 3, H, W\) in \[-1, 1\] for the vae"):
        measure_transitions(pipe, **call, **options, data=torch.zeros(4, 1, 8, 8))
    with pytest.raises(ValueError, match=r"becomes latents of shape \(4, 4, 8, 8\). Expected \(n, 4, 4, 4\)"):
        measure_transitions(pipe, **call, **options, data=randn(4, 3, 16, 16).clamp(-1, 1))
    pipe, call = latent("HeunDiscreteScheduler")(2, num_inference_steps=4)
    with pytest.raises(ValueError, match=r"has \[3\]. Expected from 2 to 6 in steps of 2"):
        measure_transitions(pipe, **call, **options | {"branch_positions": [2, 3]})


def test_images_are_encoded_for_latent_models():
    pipe, call = latent("DDIMScheduler", **NO_CLIP)(4, num_inference_steps=4)
    images = randn(5, 3, 8, 8).clamp(-1, 1)
    options = {"num_parents": 4, "num_clones": 2, "branch_positions": [2], "progress": False}
    report = measure_transitions(pipe, **call, **options, data=images)
    with torch.no_grad():
        latents = pipe.vae.encode(images).latent_dist.mode() * pipe.vae.config.scaling_factor
    expected = measure_transitions(pipe, **call | {"generator": seeded()}, **options, data=latents)
    assert report.collapse == expected.collapse
    assert report.settings["num_examples"] == 5
