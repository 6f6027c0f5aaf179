"""A known manifold behind real pipelines and schedulers: the whole street must give the closed form back."""

import diffusers
import numpy as np
import pytest
import torch
from tiny import SCALED_LINEAR, ddpm_pipeline, dit_call, dit_pipeline, pixel_call, randn, sd_call, sd_pipeline

from diffusers_geometry import record, with_geometry
from diffusers_geometry.exact import EmpiricalDenoiser, LinearManifoldDenoiser, MixtureDenoiser, SphereDenoiser
from diffusers_geometry.phases import Phases
from diffusers_geometry.selfcheck import exact_network

VARIANCES = torch.tensor([4.0] * 4 + [0.25] * 4)
BASIS = torch.linalg.qr(randn(64, 8, seed=1).double())[0]
MANIFOLD = LinearManifoldDenoiser(BASIS, VARIANCES)
NO_CLIP = {"clip_sample": False}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pixel(name, **config):
    return lambda: (ddpm_pipeline(getattr(diffusers, name)(**config)), pixel_call(num_inference_steps=50))


def latent(name, **config):
    """A Stable Diffusion pipeline whose latents have 4 x 4 x 4 = 64 numbers, guidance on."""
    call = sd_call(height=8, width=8, num_inference_steps=50, output_type="latent")
    return lambda: (sd_pipeline(getattr(diffusers, name)(**config)), call)


RUNS = {
    "DDIM-epsilon": pixel("DDIMScheduler", **NO_CLIP),
    "DDIM-v": pixel("DDIMScheduler", prediction_type="v_prediction", **NO_CLIP),
    "DDIM-v-zero-SNR": pixel(
        "DDIMScheduler", prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", **NO_CLIP
    ),
    "DDIM-sample": pixel("DDIMScheduler", prediction_type="sample", **NO_CLIP),
    "DDPM-epsilon": pixel("DDPMScheduler", **NO_CLIP),
    "DDPM-v": pixel("DDPMScheduler", prediction_type="v_prediction", **NO_CLIP),
    "Euler-epsilon": latent("EulerDiscreteScheduler", **SCALED_LINEAR),
    "Euler-v": latent("EulerDiscreteScheduler", prediction_type="v_prediction", **SCALED_LINEAR),
    "DPM++-epsilon": pixel("DPMSolverMultistepScheduler"),
    "DPM++-v": pixel("DPMSolverMultistepScheduler", prediction_type="v_prediction"),
    "DPM++-flow": pixel("DPMSolverMultistepScheduler", prediction_type="flow_prediction", use_flow_sigmas=True),
    "FlowMatchEuler-flow": pixel("FlowMatchEulerDiscreteScheduler"),
    "FlowMatchEuler-shifted": pixel("FlowMatchEulerDiscreteScheduler", shift=3.0),
}


def analysed(make, exact, **options):
    pipe, call = make()
    pipe.unet = exact_network(exact, pipe.scheduler, like=pipe.unet)
    return with_geometry(pipe).analyze_geometry(**call, generator=seeded(), progress=False, **options)


def kept(sigma):
    """Eigenvalues of D' in closed form, descending, (64,)."""
    values = VARIANCES / (VARIANCES + sigma**2) if np.isfinite(sigma) else 0 * VARIANCES
    return np.concatenate([values.numpy(), np.zeros(56)])


def check_descriptors(step):
    """psi, its rank and nu are those of the values that float32 can tell from zero, and say how far off they may be."""
    truth = kept(step.sigma)
    rank = step.local_scaling_rank[0]
    assert rank <= 8
    if truth[0] == 0:
        assert (rank, step.local_rank.value[0]) == (0, 0)
        return
    if truth[7] > 1e-3:
        assert rank == 8
    tolerance = {name: 2 * getattr(step, name).bias[0] + 1e-4 for name in ("local_scaling", "local_rank")}
    assert abs(step.local_scaling.value[0] - np.log(truth[:rank]).sum()) < tolerance["local_scaling"]
    shares = truth[truth > 0] / truth.sum()
    if rank == 8:
        assert abs(step.local_rank.value[0] - np.exp(-(shares * np.log(shares)).sum())) < tolerance["local_rank"]
        assert tolerance["local_rank"] < 0.5


@pytest.mark.parametrize("psi_rank", [3, 8])
def test_a_fixed_rank_survives_pure_noise(psi_rank):
    """At alpha_t = 0 D' = 0: no direction can be counted, and the run goes on."""
    trace = analysed(RUNS["FlowMatchEuler-flow"], MANIFOLD, record_steps=[0, 49], psi_rank=psi_rank)
    assert trace.steps[0].local_scaling.value[0] == -np.inf
    assert trace.steps[1].local_scaling_rank[0] == psi_rank
    expected = np.log(kept(trace.steps[1].sigma)[:psi_rank]).sum()
    assert trace.steps[1].local_scaling.value[0] == pytest.approx(expected, abs=1e-4)
    assert trace.rows()[0]["psi"] is None


def test_a_nearly_flat_network_is_not_taken_for_one_without_gradient():
    """x_0 = 4 x: the predicted noise hardly moves with x, and its difference is rounding."""
    wide = LinearManifoldDenoiser(torch.eye(64), torch.full((64,), 4.0))
    trace = analysed(RUNS["DDIM-epsilon"], wide, record_steps=[-1])
    assert trace.steps[0].singular_values[0] == pytest.approx(np.full(64, 4 / (4 + trace.steps[0].sigma ** 2)), abs=1e-4)


def test_what_only_directions_know_is_not_read_as_a_phase():
    """Values of D' along random directions are cosines: no phases and no dimension follow, except from all directions."""
    found = analysed(RUNS["DDIM-epsilon"], MANIFOLD, record_steps=[20, 49], spectrum="central_difference", max_products=24)
    assert found.manifold_dim is None
    assert {str(p) for step in found.steps for p in step.phase} == {"unresolved"}
    assert (found.phases_by_gap.labels == "unresolved").all()
    full = analysed(RUNS["DDIM-epsilon"], MANIFOLD, record_steps=[20, 49], spectrum="central_difference")
    assert full.manifold_dim == 8


@pytest.mark.parametrize("dim", [8, 16, 32])
def test_algorithm_1_sees_the_phase_through_its_sampling_spread(dim):
    """Marchenko-Pastur spreads the kept values by sqrt(m / N) below 1 - Delta; the rule knows."""
    basis = torch.linalg.qr(randn(64, dim, seed=2).double())[0]
    exact = LinearManifoldDenoiser(basis, torch.full((dim,), 4.0))
    for probe_seed in range(3):
        options = {"record_steps": [0, 49], "spectrum": "perturbation", "probe_seed": probe_seed}
        trace = analysed(RUNS["DDIM-epsilon"], exact, **options)
        assert trace.manifold_dim == dim
        assert trace.steps[-1].phase[0] == "consolidation"
    uncentred = analysed(RUNS["DDIM-epsilon"], exact, centred=False, **options)
    assert uncentred.manifold_dim == dim


@pytest.mark.parametrize("run", RUNS)
def test_linear_manifold_through_real_schedulers(run):
    trace = analysed(RUNS[run], MANIFOLD, record_steps=25)
    assert len(trace.steps) == 25
    for step in trace.steps:
        assert np.abs(step.eigenvalues[0] - kept(step.sigma)).max() < 1e-4
        assert np.abs(step.singular_values[0] - kept(step.sigma)).max() < 1e-4
        assert step.effective_dimension.value[0] == pytest.approx(kept(step.sigma).sum(), abs=1e-3)
        assert step.asymmetry[0] < 1e-4
        check_descriptors(step)
    assert trace.manifold_dim == 8
    above, below = trace.phases.trivial_boundary[0]
    assert below**2 <= 4.0 * 0.9 / 0.1 <= above**2
    above, below = trace.phases.consolidation_boundary[0]
    assert below**2 <= 0.25 * 0.1 / 0.9 <= above**2
    assert isinstance(trace.phases, Phases)
    assert trace.steps[0].phase[0] == "trivial"
    assert trace.steps[-1].phase[0] == "consolidation"


@pytest.mark.parametrize("of", ["denoised", "score", "epsilon"])
@pytest.mark.parametrize("method", ["dense", "perturbation", "central_difference"])
def test_every_method_of_every_map(of, method):
    """The values of the map itself, and D' for phases and dimension whatever the map."""
    trace = analysed(RUNS["DDIM-epsilon"], MANIFOLD, record_steps=[10, 30, 45, 49], of=of, spectrum=method, relative_threshold=1e-2)
    for step in trace.steps:
        denoised = kept(step.sigma)
        expected = {"denoised": denoised, "score": (1 - denoised) / step.sigma**2, "epsilon": (1 - denoised) / step.sigma}[of]
        expected = np.sort(expected)[::-1]
        # Algorithm 1 with N = 4 d samples spreads a k-fold value by up to (1 + sqrt(k / N))^±1, see theory.md A3.
        spread = {"dense": 1e-4, "central_difference": 2e-3, "perturbation": 0.6}[method]
        assert np.abs(step.singular_values[0] - expected).max() < spread * expected[0]
        assert step.method == method
        # Choosing the difference step takes products too, and they are counted.
        assert step.products == (256 if method == "perturbation" else 64) + step.details.get("step_products", 0)
        assert ("step_products" in step.details) == (method == "central_difference")
        if method != "perturbation":
            assert np.abs(step.denoised_singular_values[0] - denoised).max() < (1e-4 if method == "dense" else 2e-3)
        error = abs(step.effective_dimension.value[0] - denoised.sum())
        assert error < (5 * step.effective_dimension.sem[0] if method == "perturbation" else 2e-3) + 1e-6
        assert (step.singular_value_sems > 0).any() == (method == "perturbation")
    assert trace.steps[-1].gap_dim.value[0] == 8


def test_perturbation_starts_from_the_final_sample():
    """A sphere bends the map: the mean of tr J over noised copies of the run's own result is known, and is not that at x_t."""
    exact = SphereDenoiser(64, radius=4.0)
    step = analysed(RUNS["DDIM-epsilon"], exact, record_steps=[45], spectrum="perturbation", max_products=4000).steps[0]
    pipe, call = RUNS["DDIM-epsilon"]()
    pipe.unet = exact_network(exact, pipe.scheduler, like=pipe.unet)
    with record(pipe, [45]) as recording:
        pipe(**call, generator=seeded())
    clean = recording.final_sample[0].flatten().double()
    assert clean.norm() == pytest.approx(4.0, rel=1e-2)
    noisy = clean + step.sigma * randn(100, 64, seed=3).double()
    traces = [exact.at(1.0, step.sigma).jacobian(y).dense().trace().item() for y in noisy]
    error = np.hypot(np.std(traces) / 10, step.effective_dimension.sem[0])
    assert abs(step.effective_dimension.value[0] - np.mean(traces)) < 4 * error
    assert error < 1.0


def test_sphere_through_a_pipeline():
    """Tangential R A / r, d - 1 times; the dimension is d - 1 = 63 once the curvature is resolved."""
    trace = analysed(RUNS["DDIM-epsilon"], SphereDenoiser(64, radius=4.0), record_steps=[40, 49])
    assert trace.steps[-1].gap_dim.value[0] == 63
    assert trace.manifold_dim == 63
    step = trace.steps[0]
    values = step.eigenvalues[0]
    assert np.ptp(values[:-1]) < 1e-4


def test_a_saddle_between_modes_is_not_clipped():
    """Eigenvalues above one are right between modes (theory.md 0)."""
    mean = torch.zeros(2, 64)
    mean[0, 0], mean[1, 0] = 2.0, -2.0
    exact = MixtureDenoiser(mean, 0.25 * torch.eye(64).expand(2, 64, 64))
    denoiser = exact.at(1.0, 0.5)
    found = denoiser.jacobian(torch.zeros(64)).dense()
    assert torch.linalg.eigvalsh(found)[-1].item() == pytest.approx(4.5, abs=1e-5)
    pipe, call = RUNS["DDIM-epsilon"]()
    pipe.unet = exact_network(exact, pipe.scheduler, like=pipe.unet)
    with record(pipe, [40]) as recording:
        pipe(**call, generator=seeded())
    denoiser = recording[0].denoiser
    total = 0.25 + denoiser.sigma**2
    along = 0.25 / total + 4.0 * denoiser.sigma**2 / total**2
    found = torch.linalg.eigvalsh(denoiser.jacobian(torch.zeros(1, 8, 8)).dense())[-1].item()
    assert found == pytest.approx(along, rel=1e-4)
    assert found > 1


def test_an_empirical_denoiser_recites():
    """With isolated data points D' vanishes at small noise: nothing is kept but the point itself, dimension 0."""
    data = randn(20, 64, seed=9)
    trace = analysed(RUNS["DDIM-epsilon"], EmpiricalDenoiser(data), record_steps=[49])
    assert trace.steps[0].singular_values.max() < 1e-5
    assert np.abs(trace.images.reshape(-1) * 2 - 1 - data.clamp(-1, 1).numpy()).max(axis=1).min() < 2e-2


def test_transformer_with_learned_variance_and_duplicated_batch():
    pipe = dit_pipeline()
    exact = LinearManifoldDenoiser(torch.linalg.qr(randn(256, 8, seed=1))[0], VARIANCES)
    pipe.transformer = exact_network(exact, pipe.scheduler, like=pipe.transformer)
    trace = with_geometry(pipe).analyze_geometry(
        **dit_call(num_inference_steps=20), record_steps=4, progress=False, generator=seeded()
    )
    for step in trace.steps:
        assert step.singular_values.shape == (1, 256)
        assert np.abs(step.singular_values[0, :8] - kept(step.sigma)[:8]).max() < 1e-4


@pytest.mark.parametrize("of", ["denoised", "score", "epsilon"])
def test_one_network_behind_two_schedulers_has_one_spectrum(of):
    """DDIM scales its sample, Euler does not; in the canonical convention nothing of that is left."""
    denoisers = []
    for name in ("DDIMScheduler", "EulerDiscreteScheduler"):
        config = {"timestep_spacing": "leading", **SCALED_LINEAR} | ({"clip_sample": False} if name.startswith("DDIM") else {})
        pipe = sd_pipeline(getattr(diffusers, name)(**config))
        with record(pipe, "all") as recording:
            pipe(**sd_call(height=8, width=8), generator=seeded())
        denoisers.append({step.timestep: step.denoiser for step in recording})
    point = randn(4, 4, 4, seed=8)
    for timestep in denoisers[0]:
        ddim, euler = (d[timestep] for d in denoisers)
        assert ddim.sigma == pytest.approx(euler.sigma, rel=1e-5)
        x_t = point * (1 + ddim.sigma**2) ** 0.5
        first = torch.linalg.svdvals(ddim.jacobian(ddim.alpha_t * x_t, of).dense())
        second = torch.linalg.svdvals(euler.jacobian(x_t, of).dense())
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-5 * float(second[0]))


def test_corrupted_noise_levels_do_not_pass(monkeypatch):
    """Break the schedule on purpose: the closed form must then be missed."""
    import diffusers_geometry.capture as capture

    def corrupted(scheduler, i, right=capture.noise_level):
        level = right(scheduler, i)
        return type(level)(level.alpha_t, level.sigma_t * 1.05, level.a, level.b * 1.05, level.c_in, level.timestep)

    monkeypatch.setattr(capture, "noise_level", corrupted)
    trace = analysed(RUNS["DDIM-epsilon"], MANIFOLD, record_steps=[30])
    assert np.abs(trace.steps[0].eigenvalues[0] - kept(trace.steps[0].sigma)).max() > 1e-3


def test_two_noise_levels_under_one_timestep_are_refused():
    pipe = ddpm_pipeline(diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True))
    pipe.unet = exact_network(MANIFOLD, pipe.scheduler, like=pipe.unet)
    with pytest.raises(ValueError, match="the same timestep"):
        pipe(**pixel_call(num_inference_steps=200))
