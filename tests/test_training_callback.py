"""The training callback: a linear network whose D' is known at every step, and that a training does not notice it."""

import inspect
import math

import diffusers
import numpy as np
import pytest
import torch
from tiny import SCALED_LINEAR, ddpm_pipeline, dit, randn, sd_unet, unet2d

from diffusers_geometry import Denoiser, GeometryTrainingCallback, dense_spectrum, record
from diffusers_geometry.descriptors import local_rank, local_scaling
from diffusers_geometry.schedule import KNOWN_SCHEDULERS
from diffusers_geometry.training_callback import nearest_levels
from diffusers_geometry.training_trace import QUANTITIES, TrainingTrace

RANK = 3


class Linear(torch.nn.Module):
    """epsilon = W x for vectors, whatever the timestep, with a dropout that must be off while it is measured."""

    def __init__(self, dim, seed=0):
        super().__init__()
        self.weight = torch.nn.Parameter(0.3 * randn(dim, dim, seed=seed))
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, x, timestep):
        return (self.dropout(x) @ self.weight.T,)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def callback(scheduler=None, samples=None, **options):
    samples = randn(4, 6, seed=2) if samples is None else samples
    options = {"generator": seeded(), "sigmas": (0.3, 1.0), "psi_rank": RANK, **options}
    return GeometryTrainingCallback(scheduler or diffusers.DDPMScheduler(), samples, **options)


def closed_form(weight, level):
    """psi at rank 3, nu, tr D' and asymmetry of D' = alpha (a I + b W)."""
    matrix = level.alpha_t * (level.a * torch.eye(len(weight)).double() + level.b * weight.detach().double())
    values = torch.linalg.svdvals(matrix)
    shares = values / values.sum()
    return {
        "psi": values[:RANK].log().sum(), "nu": (-(shares * shares.log()).sum()).exp(), "effective_dimension": matrix.trace(),
        "asymmetry": (matrix - matrix.T).norm() / (matrix + matrix.T).norm(),
    }  # fmt: skip


def test_a_linear_network_in_training_is_measured_as_its_weights_say():
    """Trained at one noise on Gaussian data, D' goes to C / (C + sigma²): symmetric, with a psi that is known."""
    variance, geometry, network = torch.tensor([2.0, 1.0, 0.5, 0.3, 0.2, 0.1]), callback(sigmas=(1.0,)), Linear(6)
    level = geometry.levels[0]
    optimizer, generator = torch.optim.Adam(network.parameters(), lr=0.02), seeded(3)
    for step in range(401):
        if step % 100 == 0:
            expected, record = closed_form(network.weight, level), geometry(step, network)
            for name in QUANTITIES:
                np.testing.assert_allclose(record.values[name], np.full((1, 4), float(expected[name])), rtol=1e-4, err_msg=name)
                assert (record.sems[name] == 0).all()
            assert record.products == 4 * 6
        x_0, epsilon = randn_of(variance, generator), torch.randn(256, 6, generator=generator)
        network.dropout.eval()
        loss = (network(level.alpha_t * x_0 + level.sigma_t * epsilon, None)[0] - epsilon).square().mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    asymmetry, _ = geometry.trace.means("asymmetry")
    assert asymmetry[-1, 0] < 0.2 * asymmetry[0, 0]
    wanted = (variance / (variance + level.sigma**2)).log().sort(descending=True).values[:RANK].sum().item()
    assert geometry.trace.means("psi")[0][-1, 0] == pytest.approx(wanted, abs=0.15)
    assert abs(geometry.trace.means("psi")[0][0, 0] - wanted) > 0.5
    assert geometry.trace.steps.tolist() == [0, 100, 200, 300, 400]


def randn_of(variance, generator):
    return torch.randn(256, len(variance), generator=generator) * variance.sqrt()


@pytest.mark.parametrize("name", sorted(KNOWN_SCHEDULERS))
def test_levels_are_those_nearest_in_every_scheduler(name):
    cls = getattr(diffusers, name)
    betas = {key: value for key, value in SCALED_LINEAR.items() if key in inspect.signature(cls).parameters}
    scheduler = cls(**betas)
    before = dict(scheduler.__dict__)
    levels = nearest_levels(scheduler, (0.3, 1.0))
    assert [math.log(level.sigma / sigma) for level, sigma in zip(levels, (0.3, 1.0), strict=True)] == pytest.approx(
        [0, 0], abs=0.3
    )
    assert all(scheduler.__dict__[key] is value for key, value in before.items())


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"])
@pytest.mark.parametrize("network", ["unet", "sd", "dit"])
def test_networks_of_diffusers_are_measured_as_denoisers_are(name, network):
    scheduler = getattr(diffusers, name)(**({} if "Flow" in name else SCALED_LINEAR))
    make, shape, rows = {
        "unet": (unet2d, (1, 8, 8), {}), "sd": (sd_unet, (4, 8, 8), {"encoder_hidden_states": randn(2, 5, 8, seed=5)}),
        "dit": (dit, (4, 8, 8), {"class_labels": torch.tensor([3, 7])}),
    }[network]  # fmt: skip
    model, samples = make(), randn(2, *shape, seed=1)
    geometry = callback(scheduler, samples, sigmas=(0.5,), conditioning=rows, spectrum="dense")
    found, level, x_t = geometry(0, model), geometry.levels[0], geometry.points[0][1]
    timestep = torch.tensor([level.timestep])

    def prediction(x):
        kept = {key: value[1:].expand(len(x), *value.shape[1:]) for key, value in rows.items()}
        return model(level.c_in * x, timestep.expand(len(x)), **kept)[0][:, : shape[0]]

    exact = Denoiser(lambda x: level.a * x + level.b * prediction(x), alpha_t=level.alpha_t, sigma_t=level.sigma_t)
    spectrum = dense_spectrum(exact.jacobian(x_t))
    expected = (local_scaling(spectrum, rank=RANK).value, local_rank(spectrum).value, spectrum.trace.value, spectrum.asymmetry)
    for key, value in zip(QUANTITIES, expected, strict=True):
        assert found.values[key][0, 1] == pytest.approx(value, rel=1e-4), key


def test_a_training_does_not_notice_the_callback():
    """Same weights to the bit, modes and gradients as they were, and the global random state untouched."""

    def trained(geometry):
        torch.manual_seed(0)
        network = torch.nn.ModuleDict({"net": unet2d(), "frozen": torch.nn.BatchNorm2d(1).eval()})
        network["net"].train()
        optimizer = torch.optim.AdamW(network["net"].parameters(), lr=1e-3)
        for step in range(3):
            x = torch.nn.functional.dropout(torch.randn(2, 1, 8, 8), 0.2)
            network["net"](x, 10).sample.square().mean().backward()
            if geometry is not None:
                held = [p.grad.clone() for p in network["net"].parameters()]
                objects = [id(p) for p in network.parameters()]
                with torch.no_grad():
                    geometry(step, network)
                assert network["net"].training
                assert not network["frozen"].training
                assert all(torch.equal(a, p.grad) for a, p in zip(held, network["net"].parameters(), strict=True))
                assert objects == [id(p) for p in network.parameters()]
                assert all(p.requires_grad for p in network["net"].parameters())
            optimizer.step(), optimizer.zero_grad()
        return list(network.parameters())

    def predict(network, x, timestep):
        return network["net"](x, timestep).sample

    geometry = callback(samples=randn(1, 1, 8, 8, seed=4), predict=predict)
    with_it, without = trained(geometry), trained(None)
    assert all(torch.equal(a, b) for a, b in zip(with_it, without, strict=True))
    psi = geometry.trace.values("psi")
    assert psi.shape == (3, 2, 1)
    assert (np.abs(np.diff(psi, axis=0)) > 1e-6).all()


def test_it_agrees_with_a_recorded_pipeline_at_the_same_point():
    pipe = ddpm_pipeline()
    with record(pipe, [4]) as recording:
        pipe(num_inference_steps=6, output_type="np", generator=seeded())
    step = recording[0]
    geometry = callback(pipe.scheduler, randn(1, 1, 8, 8), sigmas=(step.sigma,), num_inference_steps=6)
    assert geometry.levels[0].timestep == step.timestep
    geometry.points[0] = step.sample
    expected = local_scaling(dense_spectrum(step.denoiser.select(0).jacobian(step.sample[0])), rank=RANK)
    assert geometry(0, pipe.unet).values["psi"][0, 0] == pytest.approx(expected.value, rel=1e-5)


def test_largest_values_by_products_where_a_matrix_is_too_large():
    model, options = unet2d(), {"samples": randn(1, 1, 8, 8, seed=1), "sigmas": (0.5,)}
    dense, few = callback(**options)(0, model), callback(spectrum="golub_kahan", **options)
    record = few(0, model)
    assert record.values["psi"][0, 0] == pytest.approx(dense.values["psi"][0, 0], abs=5e-3)
    assert (
        abs(record.values["effective_dimension"] - dense.values["effective_dimension"])
        < 4 * record.sems["effective_dimension"] + 1e-6
    )
    assert record.converged
    assert np.isnan(record.values["asymmetry"]).all()
    assert np.isnan(record.values["nu"]).all()
    assert [axes.get_ylabel() for axes in few.trace.plot().axes] == ["ψ at rank 3 (nats)", "tr D' (directions)"]
    starved = callback(spectrum="golub_kahan", max_products=70, **options)(0, model)
    assert not starved.converged


def test_traces_are_saved_continued_and_drawn(tmp_path):
    geometry, network = callback(), Linear(6)
    for step in (0, 5):
        geometry(step, network)
        with torch.no_grad():
            network.weight.mul_(0.9)
    geometry.trace.save(tmp_path / "training.json")
    loaded = TrainingTrace.load(tmp_path / "training.json")
    assert loaded.to_dict() == geometry.trace.to_dict()
    continued = callback(trace=loaded)
    continued(9, network)
    assert continued.trace.steps.tolist() == [0, 5, 9]
    change, sem = continued.trace.changes("psi")
    values = continued.trace.values("psi")
    np.testing.assert_allclose(change, (values - values[0]).mean(-1))
    np.testing.assert_allclose(sem, (values - values[0]).std(-1, ddof=1) / 2, atol=1e-12)
    continued.trace.plot(tmp_path / "training.png")
    assert (tmp_path / "training.png").stat().st_size > 10_000
    assert len(continued.trace.table().splitlines()) == 1 + 3 * 2
    with pytest.raises(ValueError, match="trace is of other points"):
        callback(generator=seeded(1), trace=loaded)
    with pytest.raises(ValueError, match=r"step=9. Expected more than 9"):
        continued(9, network)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"psi_rank": 7}, "Expected 1 <= psi_rank <= 6"),
        ({"sigmas": (0.3, -1.0)}, "Expected positive, finite noises"),
        ({"sigmas": ()}, "Expected positive, finite noises"),
        ({"sigmas": (0.3, 0.3001)}, "Expected noises that differ there"),
        ({"conditioning": {"class_labels": torch.tensor([1])}}, "a row of conditioning"),
        ({"spectrum": "dense", "max_products": 3}, "max_products=3 cannot be met"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        callback(**options)
