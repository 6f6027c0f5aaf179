"""Memorisation scores against closed forms: pairs of exact distributions as the conditional and the unconditional branch."""

import math

import diffusers
import numpy as np
import pytest
import tiny
import torch
from branches import two_branch_call, two_branches
from load import load_zoo

from diffusers_geometry import Denoiser, record
from diffusers_geometry.exact import EmpiricalDenoiser, GaussianDenoiser, MixtureDenoiser
from diffusers_geometry.memorization import DEFAULT_SCORES, cross_seed_agreement, rank_prompts, score_batch, score_run
from diffusers_geometry.memorization_scores import SCORES, TRACE_PROBES, RunPoint

LEVELS = [(0.3, math.sqrt(1 - 0.09)), (0.8, 0.6), (0.96, 0.28)]  # (alpha_t, sigma_t), variance-preserving
GUIDANCE = [name for name, score in SCORES.items() if score.needs_guidance]


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(dim, seed, rank=None):
    factor = randn(dim, rank or dim, seed=seed) / math.sqrt(dim)
    return factor @ factor.T, randn(dim, seed=seed + 1)


def pair(dim=6):
    """(conditional: rank 2, unconditional: full rank), each as (covariance, mean)."""
    return gaussian(dim, 10, rank=2), gaussian(dim, 20)


def points(conditional, unconditional, x, levels=LEVELS, scale=1.0):
    """Run points at x (the variance-preserving sample), or at the same points behind a scheduler that scales samples."""
    made = []
    for alpha_t, sigma_t in levels:
        c, u = (e.at(scale * alpha_t, scale * sigma_t) for e in (conditional, unconditional))
        made.append(RunPoint(sigma_t / alpha_t, scale * x, c, c, u))
    return made


def shrink(covariance, alpha, sigma):
    """(precision of x_t, D') of a Gaussian."""
    total = alpha**2 * covariance + sigma**2 * torch.eye(len(covariance), dtype=torch.float64)
    return torch.linalg.inv(total), alpha**2 * covariance @ torch.linalg.inv(total)


def closed_forms(x, final, alpha, sigma):
    """Every score of the Gaussian pair by linear algebra alone."""
    (c_cov, c_mean), (u_cov, u_mean) = pair(len(x))
    (c_precision, c_kept), (u_precision, u_kept) = (shrink(cov, alpha, sigma) for cov in (c_cov, u_cov))
    c_score, u_score = -c_precision @ (x - alpha * c_mean), -u_precision @ (x - alpha * u_mean)
    guidance = c_score - u_score
    c_moved, u_moved = ((torch.eye(len(x)) - kept) @ (mean - final) for kept, mean in ((c_kept, c_mean), (u_kept, u_mean)))
    c_flipd, u_flipd = (k.trace() + (m @ m) * (alpha / sigma) ** 2 for k, m in ((c_kept, c_moved), (u_kept, u_moved)))
    clean = (x + sigma**2 * c_score) / alpha
    return {
        "guidance_norm": sigma * guidance.norm(),
        "guidance_shift": sigma**2 * guidance.norm(),  # sigma_t is sigma / sqrt(1 + sigma²) here
        "sharpness": ((c_precision - u_precision) @ guidance).norm(),
        "sharpness_reverse": ((c_precision - u_precision) @ guidance).norm(),
        "anisotropy": u_score @ guidance / (u_score.norm() * guidance.norm()),
        "commitment": (clean - final).norm() / math.sqrt(len(x)),
        "flipd": c_flipd,
        "flipd_gap": c_flipd - u_flipd,
        "effective_dimension": c_kept.trace(),
        "contraction": u_kept.trace() - c_kept.trace(),
    }


@pytest.mark.parametrize("scale", [1.0, 1 / 0.8, 7.0])
def test_scores_of_two_gaussians_are_linear_algebra(scale):
    x, final = randn(6, seed=1), randn(6, seed=2)
    (c, u) = (GaussianDenoiser(*p) for p in pair())
    found = score_run(points(c, u, x, scale=scale), final, list(SCORES))
    for step, (alpha, sigma) in zip(found.steps, LEVELS, strict=True):
        expected = closed_forms(x, final, alpha, sigma)
        assert set(step) == set(expected)
        for name, value in expected.items():
            assert step[name].value == pytest.approx(float(value), rel=1e-9), name
            assert step[name].sem == 0, name


def test_a_run_has_the_mean_of_its_steps():
    x, final = randn(6, seed=1), randn(6, seed=2)
    (c, u) = (GaussianDenoiser(*p) for p in pair())
    found = score_run(points(c, u, x), final, list(SCORES))
    for name in found.scores:
        assert SCORES[name].over_steps == "mean"
        assert found.scores[name].value == pytest.approx(np.mean([s[name].value for s in found.steps]))


def test_traces_of_many_dimensions_have_their_error():
    dim = 60
    final, x = randn(dim, seed=2), randn(dim, seed=1)
    (c, u) = (GaussianDenoiser(*p) for p in pair(dim))
    names, errors = ["flipd", "flipd_gap", "contraction"], []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        found = score_run(points(c, u, x), final, names, generator=generator)
        for step, level in zip(found.steps, LEVELS, strict=True):
            expected = closed_forms(x, final, *level)
            errors.append([(step[n].value - float(expected[n])) / step[n].sem for n in names])
    spread = np.sqrt(np.mean(np.square(errors), axis=0))  # Student's t with 7 degrees of freedom: 1.18
    assert (spread > 0.8).all()
    assert (spread < 1.7).all()
    assert dim > TRACE_PROBES


def test_equal_branches_have_no_gap_whatever_the_probes():
    exact = GaussianDenoiser(*pair(60)[1])
    found = score_run(points(exact, exact, randn(60, seed=1)), randn(60, seed=2), ["flipd", "flipd_gap", "contraction"]).scores
    assert (found["contraction"].value, found["contraction"].sem) == (0, 0)
    assert (found["flipd_gap"].value, found["flipd_gap"].sem) == (0, 0)
    assert found["flipd"].sem > 0


def test_sharpness_of_a_mixture_is_that_of_its_log_density():
    dim, alpha, sigma = 5, 0.8, 0.6
    means, covariances = randn(3, dim, seed=5), torch.stack([gaussian(dim, s)[0] for s in (30, 40, 50)])
    c_cov, c_mean = gaussian(dim, 60, rank=2)

    def log_density(x, means, covariances):
        total = alpha**2 * covariances + sigma**2 * torch.eye(dim, dtype=torch.float64)
        centred = x - alpha * means
        squares = (centred[:, None] @ torch.linalg.inv(total) @ centred[:, :, None])[:, 0, 0]
        return torch.logsumexp(-0.5 * squares - 0.5 * torch.logdet(total), dim=0)

    x = randn(dim, seed=6)
    parts = [(c_mean[None], c_cov[None]), (means, covariances)]
    scores = [torch.func.grad(lambda p, part=part: log_density(p, *part))(x) for part in parts]
    hessians = [torch.func.hessian(lambda p, part=part: log_density(p, *part))(x) for part in parts]
    expected = (hessians[0] - hessians[1]) @ (scores[0] - scores[1])
    exact = GaussianDenoiser(c_cov, c_mean), MixtureDenoiser(means, covariances)
    found = score_run(points(*exact, x, levels=[(alpha, sigma)]), x, ["sharpness", "guidance_norm"]).scores
    assert found["sharpness"].value == pytest.approx(expected.norm().item(), rel=1e-8)
    assert found["guidance_norm"].value == pytest.approx(sigma * (scores[0] - scores[1]).norm().item(), rel=1e-8)


def predicting(exact, prediction, alpha, sigma):
    """The exact denoiser behind a network that predicts something else."""

    def network(x_t):
        x_0 = exact.denoised(x_t, alpha, sigma)
        epsilon = (x_t - alpha * x_0) / sigma
        return {
            "epsilon": epsilon, "sample": x_0, "flow_prediction": epsilon - x_0,
            "v_prediction": (alpha * epsilon - sigma * x_0) / math.hypot(alpha, sigma),
        }[prediction]  # fmt: skip

    return Denoiser.from_function(network, alpha_t=alpha, sigma_t=sigma, prediction_type=prediction)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "flow_prediction"])
def test_what_a_network_predicts_does_not_matter(prediction):
    x, final = randn(6, seed=1), randn(6, seed=2)
    exact = [GaussianDenoiser(*p) for p in pair()]
    made = []
    for alpha, sigma in LEVELS:
        c, u = (predicting(e, prediction, alpha, sigma) for e in exact)
        made.append(RunPoint(sigma / alpha, x, c, c, u))
    found = score_run(made, final, list(SCORES))
    for step, level in zip(found.steps, LEVELS, strict=True):
        for name, value in closed_forms(x, final, *level).items():
            assert step[name].value == pytest.approx(float(value), rel=1e-7), name


SCHEDULERS = {
    "epsilon": lambda: diffusers.DDIMScheduler(**tiny.SCALED_LINEAR, clip_sample=False),
    "v": lambda: diffusers.DDIMScheduler(**tiny.SCALED_LINEAR, clip_sample=False, prediction_type="v_prediction"),
    "sample": lambda: diffusers.DDIMScheduler(**tiny.SCALED_LINEAR, clip_sample=False, prediction_type="sample"),
    "euler-v": lambda: diffusers.EulerDiscreteScheduler(**tiny.SCALED_LINEAR, prediction_type="v_prediction"),
    "flow": lambda: diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_recorded_runs_of_every_prediction_type_have_the_closed_forms(kind):
    dim, scheduler = 256, SCHEDULERS[kind]()
    exact = [GaussianDenoiser(*p) for p in pair(dim)]
    pipe = two_branches(*exact, scheduler)
    with record(pipe, [1, 3, 5]) as recording:
        pipe(**two_branch_call())
    branches = ("guided", "conditional", "unconditional")
    made = [RunPoint(s.sigma, s.sample[0].float(), *(s.branch(b).select(0) for b in branches)) for s in recording]
    final = recording.final_sample[0].float()
    names = ["guidance_norm", "guidance_shift", "sharpness", "anisotropy", "commitment"]
    found = score_run(made, final, names)
    for step, recorded in zip(found.steps, recording, strict=True):
        norm = math.hypot(recorded.alpha_t, recorded.sigma_t)
        x = recorded.sample[0].double().flatten() / norm
        expected = closed_forms(x, final.double().flatten(), recorded.alpha_t / norm, recorded.sigma_t / norm)
        for name in names:
            assert step[name].value == pytest.approx(float(expected[name]), rel=2e-3), (name, recorded.sigma)


def test_one_point_has_collapsed_and_many_have_not():
    data, dim = randn(50, 24, seed=3), 24
    recited, everything = EmpiricalDenoiser(data[:1]), EmpiricalDenoiser(data)
    x = 0.8 * data[0] + 0.6 * randn(dim, seed=4)
    found = score_run(points(recited, everything, x, levels=[(0.8, 0.6)]), data[0], list(SCORES)).scores
    assert found["commitment"].value == pytest.approx(0, abs=1e-12)
    assert found["flipd"].value == pytest.approx(0, abs=1e-12)
    d_u = everything.denoised(x[None], 0.8, 0.6)[0]
    assert found["guidance_norm"].value == pytest.approx(0.8 / 0.6 * (data[0] - d_u).norm().item())
    weights = everything.weights(x[None], 0.8, 0.6)[0]
    variance = (weights @ data.square().sum(dim=1) - d_u @ d_u).item()
    assert abs(found["contraction"].value - variance / 0.75**2) < 4 * found["contraction"].sem + 1e-12


def test_prompts_that_recite_rank_first():
    """Eight conditions tied to one image, forty tied to ten: by every score with guidance and by all together."""
    data, dim, levels = randn(400, 24, seed=3), 24, [(0.5, math.sqrt(0.75)), (0.8, 0.6)]
    everything, rows = EmpiricalDenoiser(data), []
    for prompt in range(48):
        size = 1 if prompt < 8 else 10
        own = EmpiricalDenoiser(data[10 * prompt % 390 :][:size])
        for seed in range(3):
            target = own.data[seed % size]
            made = [
                RunPoint(
                    s / a, a * target + s * randn(dim, seed=100 * prompt + seed), own.at(a, s), own.at(a, s), everything.at(a, s)
                )
                for a, s in levels
            ]
            rows.append(score_run(made, target, ["flipd", "commitment", "contraction", "guidance_norm"]).scores)
    table = {name: np.array([row[name].value for row in rows]).reshape(48, 3) for name in rows[0]}
    ranking = rank_prompts(table, [p < 8 for p in range(48)])
    assert ranking.quality["commitment"].auroc.value == 1.0
    assert ranking.combined_quality.auroc.value == 1.0
    assert sorted(i for i, p in enumerate(ranking.prompts) if p.rank <= 8) == list(range(8))
    assert all(p.flagged for p in ranking.prompts[:8])


def test_without_guidance_scores_of_guidance_are_left_out():
    x, exact = randn(6, seed=1), GaussianDenoiser(*pair()[0])
    values = np.linspace(1, 0.1, 9)
    made = [RunPoint(0.75, x, exact.at(0.8, 0.6), singular_values=values)]
    found = score_run(made, x, DEFAULT_SCORES)
    assert set(found.scores) == {n for n in DEFAULT_SCORES if n not in GUIDANCE}
    assert found.scores["psi"].value == pytest.approx(np.log(values[:8]).sum())
    assert found.scores["nuclear_norm"].value == pytest.approx(values[:8].sum())
    assert found.scores["spectral_norm"].value == 1
    u = GaussianDenoiser(*pair()[1]).at(0.8, 0.6)
    guided = score_run([RunPoint(0.75, x, u, exact.at(0.8, 0.6), u, values)], x, DEFAULT_SCORES).scores
    assert not {"psi", "nuclear_norm", "spectral_norm"} & set(guided)  # of D'_w, which tells nothing of a collapse
    closed = closed_forms(x, x, 0.8, 0.6)
    assert found.scores["commitment"].value == pytest.approx(float(closed["commitment"]))


def test_pure_noise_says_nothing_of_the_guidance_but_how_far_the_end_is():
    x, final = randn(6, seed=1), randn(6, seed=2)
    (c, u) = (GaussianDenoiser(*p) for p in pair())
    pure = RunPoint(math.inf, x, c.at(0.0, 1.0), c.at(0.0, 1.0), u.at(0.0, 1.0))
    found = score_run([pure, *points(c, u, x, levels=[(0.8, 0.6)])], final, list(SCORES))
    assert set(found.steps[0]) == {"commitment"}
    assert found.steps[0]["commitment"].value == pytest.approx((c.mean - final).norm().item() / math.sqrt(6))
    assert found.scores["guidance_norm"].value == found.steps[1]["guidance_norm"].value


def test_a_batch_has_the_scores_of_its_samples():
    x, final = randn(3, 40, seed=1), randn(3, 40, seed=2)
    (c, u) = (GaussianDenoiser(*p) for p in pair(40))
    together = score_batch(points(c, u, x), final, list(SCORES))
    for i in range(3):
        alone = score_run(points(c, u, x[i]), final[i], list(SCORES))
        for name, value in alone.scores.items():
            assert together[i].scores[name].value == pytest.approx(value.value, rel=1e-9), name
            assert together[i].scores[name].sem == pytest.approx(value.sem, rel=1e-9, abs=1e-12), name
    assert alone.forwards == together[0].forwards


def test_cost_counts_what_is_evaluated():
    calls = {"rows": 0}

    def counted(exact, alpha, sigma):
        def fn(x_t):
            calls["rows"] += len(x_t)
            return exact.denoised(x_t, alpha, sigma)

        return Denoiser(fn, alpha_t=alpha, sigma_t=sigma)

    c, u = (counted(GaussianDenoiser(*p), 0.8, 0.6) for p in pair())
    made = [RunPoint(0.75, randn(6, seed=1), c, c, u)]
    found = score_run(made, randn(6, seed=2), ["guidance_norm", "guidance_shift", "anisotropy", "commitment"])
    assert calls["rows"] == found.forwards == 2  # shared between the four


def test_agreement_of_seeds():
    image = randn(30, seed=1)
    same = cross_seed_agreement(torch.stack([image, 2 * image + 3, image - 1]))
    assert same.value == pytest.approx(1)
    assert same.sem == pytest.approx(0, abs=1e-9)
    samples = randn(4, 3, 10, seed=2)
    expected = np.corrcoef(samples.flatten(1).numpy())
    assert cross_seed_agreement(samples).value == pytest.approx(expected[np.triu_indices(4, 1)].mean())
    assert cross_seed_agreement(samples[:2]).sem is None
    with pytest.raises(ValueError, match="1 samples. Expected those of at least two seeds"):
        cross_seed_agreement(samples[:1])


def test_refusals():
    exact = GaussianDenoiser(*pair()[0])
    made = [RunPoint(0.75, randn(6, seed=1), exact.at(0.8, 0.6))]
    with pytest.raises(ValueError, match="scores=\\['karma'\\]"):
        score_run(made, randn(6, seed=2), ["karma"])
    with pytest.raises(ValueError, match="0 points"):
        score_run([], randn(6, seed=2))
    broken = Denoiser(lambda x: x * math.nan, alpha_t=0.8, sigma_t=0.6)
    with pytest.raises(FloatingPointError, match="conditional noise"):
        score_run([RunPoint(0.75, randn(6, seed=1), broken)], randn(6, seed=2), ["commitment"])


def test_planted_captions_of_the_zoo_stand_out():
    """A real network through its own pipeline: two planted captions, a control and two ordinary ones."""
    pipe = load_zoo("sd-mnist")
    pipe.set_progress_bar_config(disable=True)
    captions = ["the velvet violin", "the amber meadow", "the amber coral", "a thick seven", "a thin slanted two"]
    with record(pipe, [4]) as recording:
        recording.run(1, captions, num_inference_steps=10, guidance_scale=3.0, generator=torch.Generator().manual_seed(0))
    step = recording[0]
    point = RunPoint(step.sigma, step.sample, *(step.branch(b) for b in ("guided", "conditional", "unconditional")))
    with torch.no_grad():
        guess = step.denoiser.denoised(step.sample)
    found = score_batch([point], guess, ["guidance_norm", "contraction"])
    for name, least in (("guidance_norm", 1.5), ("contraction", 5.0)):
        values = [run.scores[name].value for run in found]
        assert min(values[:2]) > least * max(0.1, *values[2:]), name
