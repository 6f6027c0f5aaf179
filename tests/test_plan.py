"""Plans: the method follows from dimensions, products and limits; what cannot be met says what can; and plans are kept."""

import diffusers
import numpy as np
import pytest
import torch
from tiny import ddpm_pipeline, pixel_call, sd_call, sd_pipeline

from diffusers_geometry import Denoiser, Jacobian, record, with_geometry
from diffusers_geometry.budget import plan_probe
from diffusers_geometry.bundled import DIGITS
from diffusers_geometry.costs import ProductCosts, measure_costs
from diffusers_geometry.difference import evaluate
from diffusers_geometry.mixin import GeometryDDPMPipeline
from diffusers_geometry.plan import fit_to_limits
from diffusers_geometry.quadrature import lanczos_quadrature
from diffusers_geometry.spectrum import dense_spectrum


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("size", "request_", "method"),
    [
        (64, {}, "dense"),
        (2048, {}, "dense"),
        (2049, {}, "golub_kahan"),
        (512, {"num_singular_values": 16}, "dense"),
        (513, {"num_singular_values": 16}, "golub_kahan"),
        (16384, {"num_singular_values": 64}, "golub_kahan"),
        (1024, {"max_products": 1023}, "golub_kahan"),
        (1024, {"max_products": 1024}, "dense"),
        (1024, {"max_products": 1083, "flipd": True}, "golub_kahan"),
        (1024, {"max_products": 1084, "flipd": True}, "dense"),
        (262144, {}, "golub_kahan"),
        (1024, {"derivative": "difference"}, "dense"),
        (4096, {"derivative": "difference", "symmetric": True}, "golub_kahan"),
    ],
)
def test_auto_decides_by_dimensions_and_counts(size, request_, method):
    plan = plan_probe(size, **request_)
    assert plan.method == method
    budget = request_.get("max_products")
    assert budget is None or plan.products - plan.step_products <= budget


def test_what_does_not_fit_this_machine_is_refused():
    with pytest.raises(ValueError, match=r"golub_kahan needs .* GiB for its matrices and bases; .* are free"):
        plan_probe(2**31, method="golub_kahan")


def test_small_samples_have_plans():
    """A point in the plane has two numbers; nobody asked for 16 singular values."""
    for method in ("auto", "dense", "golub_kahan", "perturbation", "central_difference"):
        assert plan_probe(2, method=method).products > 0
    with pytest.raises(ValueError, match="num_singular_values=3. Expected at most 2"):
        plan_probe(2, num_singular_values=3)


def test_the_bases_of_the_quadrature_count():
    without, with_ = plan_probe(10**5), plan_probe(10**5, log_volume_epsilon=0.1)
    assert with_.memory - without.memory >= 8 * 2 * 16 * 30 * 10**5
    with pytest.raises(ValueError, match="log_volume_epsilon by quadrature needs reverse products"):
        plan_probe(4096, method="perturbation", log_volume_epsilon=0.1, derivative="difference")
    assert plan_probe(2048, method="dense", log_volume_epsilon=0.1, derivative="difference").log_volume_products == 0


def test_memory_chooses_and_refuses():
    assert plan_probe(2048, max_memory=20 * 2**20).method == "golub_kahan"
    assert plan_probe(2048, max_memory=2**30).method == "dense"
    with pytest.raises(
        ValueError, match=r"max_probe_memory=1000 cannot be met .*dense needs 2048 products and 144 MiB; golub_kahan"
    ):
        plan_probe(2048, max_memory=1000)
    with pytest.raises(ValueError, match="golub_kahan needs .* GiB. Expected a larger limit"):
        plan_probe(2**24, method="golub_kahan", max_memory=2**30)


@pytest.mark.parametrize("of", ["denoised", "score"])
@pytest.mark.parametrize("extra", [{}, {"flipd": True}, {"log_volume_epsilon": 0.1, "log_volume_probes": 4, "log_volume_steps": 8}])
@pytest.mark.parametrize("method", ["dense", "golub_kahan", "randomized", "perturbation", "central_difference"])
def test_a_run_keeps_to_its_plan(method, of, extra):
    """Products spent never exceed the plan's, for every method, map and extra."""
    pipe = with_geometry(ddpm_pipeline())
    options = {"spectrum": method, "of": of, "num_singular_values": 4, "record_steps": [4], "progress": False, **extra}
    trace = pipe.analyze_geometry(**pixel_call(generator=seeded()), **options)
    planned = trace.settings["plan"]
    for step in trace.steps:
        assert 0 < step.products <= planned["products"]
        assert step.method == method
        assert (step.flipd is not None) == ("flipd" in extra)
        assert (step.log_volume is not None) == ("log_volume_epsilon" in extra)
    if method == "dense":
        assert step.products == planned["products"]


def test_all_methods_agree_on_the_largest_values():
    pipe = with_geometry(ddpm_pipeline())
    options = {"record_steps": [4], "progress": False, "num_singular_values": 5}
    runs = {
        method: pipe.analyze_geometry(**pixel_call(generator=seeded()), spectrum=method, **options).steps[0]
        for method in ("dense", "golub_kahan", "randomized", "central_difference")
    }
    truth = runs["dense"].singular_values[0]
    assert runs["golub_kahan"].singular_values[0] == pytest.approx(truth, rel=1e-3)
    assert (np.abs(runs["golub_kahan"].singular_values[0] - truth) <= runs["golub_kahan"].singular_value_bounds[0]).all()
    assert (np.abs(runs["randomized"].singular_values[0] - truth) <= runs["randomized"].singular_value_bounds[0]).all()
    assert runs["central_difference"].singular_values[0] == pytest.approx(truth, rel=2e-3)
    effective = runs["golub_kahan"].effective_dimension
    error = abs(effective.value[0] - runs["dense"].effective_dimension.value[0])
    assert error <= 4 * effective.sem[0] + 1e-6
    assert effective.products[0] == 60


def test_plan_geometry_states_what_analyze_spends():
    pipe = with_geometry(sd_pipeline())
    call = sd_call(2)
    options = {"record_steps": 3, "spectrum": "golub_kahan", "num_singular_values": 4, "max_products": 200, "flipd": True}
    generator = seeded()
    state = generator.get_state()
    plan = pipe.plan_geometry(**call, generator=seeded(), **options)
    assert (plan.steps, plan.samples, plan.probe.size, plan.engine) == (3, 2, 256, "replay")
    assert plan.products == 3 * 2 * plan.probe.products
    assert plan.probe.products <= 200
    assert plan.probe.flipd_products == plan.probe.trace_products == 60
    assert plan.seconds > 0
    assert plan.memory > plan.probe.memory > 0
    assert "golub_kahan" in plan.table()
    assert torch.equal(generator.get_state(), state)
    assert "step" not in pipe.scheduler.__dict__


def test_planning_leaves_the_pipeline_as_it_was():
    pipe = with_geometry(ddpm_pipeline())
    before = pipe(**pixel_call(generator=seeded())).images
    pipe.plan_geometry(**pixel_call(generator=seeded()))
    assert np.array_equal(pipe(**pixel_call(generator=seeded())).images, before)
    with pytest.raises(TypeError, match="no_such_argument"):
        pipe.plan_geometry(no_such_argument=1)
    with pytest.raises(ValueError, match="spectrum='magic'"):
        pipe.plan_geometry(spectrum="magic")


def test_a_dense_plan_counts_the_decomposition():
    """Singular values of a large matrix cost more than the products of a small network: of 1,024 about as much as 64 times 256."""
    dense = plan_probe(1024)
    costs = [ProductCosts(reverse=0.01, forward=0.02, evaluation=0.01, memory=None, decomposition=s) for s in (0.0, 3.0)]
    assert costs[1].seconds(dense) - costs[0].seconds(dense) == pytest.approx(3.0)
    few = plan_probe(4096, num_singular_values=8)
    assert costs[1].seconds(few) == costs[0].seconds(few)
    denoiser = Denoiser.from_function(lambda x: x / 2, alpha_t=0.6, sigma_t=0.8, prediction_type="epsilon")
    small, large = (measure_costs(plan_probe(n), denoiser, torch.ones(n)).decomposition for n in (16, 1024))
    assert 0 < small < large / 10
    assert measure_costs(few, denoiser, torch.ones(4096)).decomposition == 0


def test_a_time_limit_shrinks_golub_kahan_and_then_refuses():
    costs = ProductCosts(reverse=0.01, forward=0.02, evaluation=0.01, memory=None)
    plan = plan_probe(4096, num_singular_values=8)
    assert costs.seconds(plan) == pytest.approx(256 * 0.015 + 60 * 0.01)
    assert fit_to_limits(plan, costs, 10, max_seconds=60, max_memory=None) is plan
    shrunk = fit_to_limits(plan, costs, 10, max_seconds=20, max_memory=None)
    assert costs.seconds(shrunk) * 10 <= 20
    assert 16 <= shrunk.spectrum_products < 256
    with pytest.raises(ValueError, match=r"max_probe_seconds=1. Expected at least 8.4 for golub_kahan .*record at most 1 of them"):
        fit_to_limits(plan, costs, 10, max_seconds=1, max_memory=None)


def test_memory_in_flight_sets_the_chunk():
    costs = ProductCosts(reverse=0.01, forward=0.02, evaluation=0.01, memory=2**20)
    plan = plan_probe(1024)
    room = plan.memory + 5 * 2**20
    assert fit_to_limits(plan, costs, 1, max_seconds=None, max_memory=room).chunk_size == 5
    with pytest.raises(ValueError, match="for one product in flight"):
        fit_to_limits(plan, costs, 1, max_seconds=None, max_memory=plan.memory)


def test_limits_are_honoured_in_a_run():
    pipe = with_geometry(ddpm_pipeline(size=16))
    call = pixel_call(generator=seeded(), num_inference_steps=4) | {"record_steps": [3], "num_singular_values": 4}
    free = pipe.plan_geometry(**call, spectrum="dense")
    with pytest.raises(ValueError, match="max_probe_memory=.* cannot be met"):
        pipe.plan_geometry(**call, spectrum="dense", max_probe_memory=free.probe.memory - 1)
    room = free.probe.memory + 3 * free.costs.memory
    tight = pipe.analyze_geometry(**call, max_probe_memory=room, max_probe_seconds=600.0, progress=False)
    assert tight.settings["plan"]["method"] == "golub_kahan"
    assert tight.settings["plan"]["chunk_size"] < 32
    assert tight.steps[0].details["chunk_size"] == tight.settings["plan"]["chunk_size"]
    with pytest.raises(ValueError, match="max_probe_seconds=1e-06. Expected at least"):
        pipe.analyze_geometry(**call, max_probe_seconds=1e-6, progress=False)


def test_chunks_shrink_when_memory_runs_out_and_say_so():
    matrix = torch.randn(24, 24, generator=seeded(1))

    def hungry(points):
        if len(points) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return points @ matrix.T

    jacobian = Jacobian(lambda x: hungry(x[None])[0], torch.zeros(24), batched_fn=hungry, derivative="difference")
    with pytest.warns(UserWarning, match="out of memory with chunk_size=24; going on with 12"):
        found = jacobian.dense()
    torch.testing.assert_close(found, matrix, rtol=1e-3, atol=1e-3)
    assert jacobian.chunk_size <= 10
    assert jacobian.chunk_reductions >= 2
    points = torch.randn(40, 24, generator=seeded(2))
    with pytest.warns(UserWarning, match="out of memory with chunk_size=40; going on with 20"):
        torch.testing.assert_close(evaluate(hungry, points, 64), points @ matrix.T)
    always = Jacobian(lambda x: hungry(x.expand(99, 24)), torch.zeros(24), derivative="difference")
    with pytest.warns(UserWarning, match="going on with 1"), pytest.raises(torch.OutOfMemoryError):
        always.jvp(torch.ones(24))


@pytest.fixture(scope="module")
def digits():
    pipe = GeometryDDPMPipeline.from_pretrained(DIGITS)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("method", ["golub_kahan", "randomized"])
def test_pure_noise_by_products(method):
    """Zero-terminal SNR: D' = 0 at the first step, and every number is zero instead of a crash."""
    scheduler = diffusers.DDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False
    )
    pipe = with_geometry(ddpm_pipeline(scheduler))
    options = {"record_steps": [0], "spectrum": method, "num_singular_values": 4, "progress": False, "flipd": True}
    step = pipe.analyze_geometry(**pixel_call(generator=seeded()), **options).steps[0]
    assert step.alpha_t == 0
    assert step.singular_values.tolist() == [[0, 0, 0, 0]]
    assert (step.effective_dimension.value[0], step.local_rank.value[0], step.flipd.value[0]) == (0, 0, 0)
    assert step.phase[0] == "trivial"


@pytest.mark.slow
def test_the_largest_values_of_the_digits_model_at_every_step(digits):
    """Golub-Kahan against the dense spectrum of the trained model: 16 values within bounds, and the sum that was asked for."""
    options = {"record_steps": 10, "progress": False, "log_volume_epsilon": 0.05}
    call = {"num_inference_steps": 20, "output_type": "np"}
    dense = digits.analyze_geometry(**call, **options, generator=seeded(1), flipd=True)
    sparse = {"spectrum": "golub_kahan", "num_singular_values": 16}
    found = digits.analyze_geometry(**call, **options, **sparse, generator=seeded(1))
    assert len(found.steps) == 10
    for step, truth in zip(found.steps, dense.steps, strict=True):
        values = truth.singular_values[0]
        assert (np.abs(step.singular_values[0] - values[:16]) <= step.singular_value_bounds[0] + 1e-6).all()
        assert step.singular_values[0] == pytest.approx(values[:16], rel=1e-3)
        assert step.singular_values_converged.all()
        expected = (0.5 * np.log(values**2 + 0.05**2)).sum()
        assert truth.log_volume.value[0] == pytest.approx(expected, abs=1e-6)
        # Its 2 x 16 x 30 products exceed d = 64, so the quadrature is a sum over all values.
        assert step.log_volume.value[0] == pytest.approx(expected, abs=1e-3)
        assert step.log_volume.sem[0] == 0
        assert truth.flipd.sem[0] == 0


@pytest.mark.slow
def test_quadrature_of_the_digits_model_at_every_step(digits):
    """The same functionals of the dense spectrum lie within 4 sem + |bias| at 7 probes of 4 steps, in 95 % of 200 runs."""
    with record(digits, 10) as recording:
        digits(num_inference_steps=20, output_type="np", generator=seeded(1))
    covered = {"log_volume": [], "nu": []}
    for step in recording:
        matrix = step.denoiser.jacobian(step.sample[0]).dense().double()
        values = torch.linalg.svdvals(matrix).numpy()
        shares = values / values.sum()
        truths = {"log_volume": (0.5 * np.log(values**2 + 0.05**2)).sum(), "nu": np.exp(-(shares * np.log(shares)).sum())}
        jacobian = Jacobian(lambda x, m=matrix: m @ x, torch.zeros(64).double())
        for seed in range(20):
            quadrature = lanczos_quadrature(jacobian, num_probes=7, num_steps=4, generator=seeded(seed))
            assert not quadrature.exact
            for name, found in (("log_volume", quadrature.log_volume(0.05)), ("nu", quadrature.local_rank())):
                covered[name].append(abs(found.value - truths[name]) <= abs(found.bias) + 4 * found.sem)
    assert np.mean(covered["log_volume"]) >= 0.95
    assert np.mean(covered["nu"]) >= 0.95


def test_flipd_in_a_trace_is_taken_at_the_final_sample_on_the_conditional_branch():
    pipe = with_geometry(sd_pipeline())
    call = sd_call(generator=seeded(), output_type="latent")
    trace = pipe.analyze_geometry(**call, record_steps=[3], flipd=True, progress=False)
    with record(pipe, [3]) as recording:
        final = pipe(**sd_call(generator=seeded(), output_type="latent")).images
    assert torch.equal(final, recording.final_sample)
    denoiser, clean = recording[0].branch("conditional").select(0), final[0]
    jacobian = denoiser.jacobian(denoiser.alpha_t * clean)
    moved = denoiser.denoised(denoiser.alpha_t * clean[None])[0] - clean
    expected = dense_spectrum(jacobian).trace.value + (moved.norm() / denoiser.sigma).item() ** 2
    assert trace.steps[0].flipd.value[0] == pytest.approx(expected, rel=1e-4)
    assert trace.steps[0].flipd.products[0] == 256
    assert pipe.analyze_geometry(**call, record_steps=[3], progress=False).steps[0].flipd is None
