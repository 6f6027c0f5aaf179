"""Every pipeline of the catalogue, with its schedulers: recording, both engines, products, maps and a trace; then the page of it.

The truth for an evaluated point is :func:`oracle.own_loop_output`, the pipeline's own untouched loop.
"""

import functools
import itertools
import os
import re
import time
from types import SimpleNamespace

import compatibility
import numpy as np
import pytest
import torch
from catalogue import CASES
from oracle import own_loop_output

from diffusers_geometry import record, with_geometry

PAIRS = [(case, make) for case in CASES for make in (None, *case.schedulers)]
REFUSED = {  # by the first words of the case's name: why
    "ConsistencyModelPipeline": "is not a scheduler whose noise levels are known",
    "KarrasVePipeline": "is not a scheduler whose noise levels are known",
    "SanaSprintPipeline": "is not a scheduler whose noise levels are known",
    "StableDiffusionInpaintPipeline four channels": "changes the sample between two scheduler steps",
    "TextToVideoSDPipeline": "rows of the scheduler's sample at step . influence one another",
    "HiDreamImagePipeline": "the derivative of the model output .* differs",
}
BY_COUNT = (
    "StableDiffusionControlNetPipeline first half",
    "StableDiffusion3Pipeline layers skipped at first",
    "StableDiffusionLatentUpscalePipeline",
)  # loops that act by their count; all but their first step is answered
POSITIONS = {"HiDreamImagePipeline": (0, 2, -1)}  # its experts, under no_grad, matter in the middle of the run
NOT_DECODED = {"LDMSuperResolutionPipeline": "the derivative of of='decoded' differs"}  # a codebook: steps, no slope
NOT_SAMPLED = "draws noise|ends .* away from|did not take the loop"
ROWS = {}


def label(pair):
    case, make = pair
    return case.name if make is None else f"{case.name} {case.schedulers.index(make) + 1}"


def built(pair):
    case, make = pair
    pipe = case.build()
    if make is not None:
        pipe.scheduler = make(pipe)
    return pipe


def called(pipe, case, **options):
    return pipe(**case.arguments(pipe), generator=torch.Generator().manual_seed(0), **options)


def arrays(output):
    first = output[0]
    return [np.asarray(item) for item in first] if isinstance(first, (list, tuple)) else [np.asarray(first)]


def patched(pipe):
    """What a recording could leave behind."""
    networks = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for m in networks for part in m.modules()]
    own = [sorted({"forward", "to", "decode"} & set(m.__dict__)) for m in networks]
    return type(pipe), sorted(pipe.__dict__), sorted({"step", "set_timesteps"} & set(pipe.scheduler.__dict__)), hooks, own


@functools.lru_cache(maxsize=1)
def recorded_run(pair):
    """The recorded run of a pair, or the words with which it is refused."""
    pipe = built(pair)
    run = SimpleNamespace(pipe=pipe, case=pair[0], before=None, words=None, recording=None, output=None)
    run.plain = called(pipe, pair[0])
    run.before, run.first_step = patched(pipe), None
    for first in (0, 1):
        run.words = None
        try:
            with record(pipe, POSITIONS.get(pair[0].name, (first, -1))) as recording:
                run.output = called(pipe, pair[0])
            run.recording = recording
            run.engines = [step.engine for step in recording]
        except (RuntimeError, ValueError) as refused:
            run.words = str(refused)
        if run.words is None or "step 0 (" not in run.words or "cannot be evaluated again" not in run.words:
            break
        run.first_step = run.words  # a loop that acts by its count has a first step that only its own sample reaches
    run.after = patched(pipe)
    return run


@pytest.fixture(scope="module", params=PAIRS, ids=label)
def pair(request):
    return request.param


@pytest.fixture
def run(pair):
    run = recorded_run(pair)
    expected = [why for name, why in REFUSED.items() if pair[0].name.startswith(name)]
    if run.words is not None:
        assert expected, run.words
        assert re.search(expected[0], run.words)
        add_row(run, engine="refused", why=run.words)
        pytest.skip(f"refused, as it should be: {run.words}")
    assert not expected, f"{pair[0].name} is not refused any more"
    return run


def add_row(run, **cells):
    key = (run.case.name, type(run.pipe.scheduler).__name__)
    row = ROWS.setdefault(key, dict.fromkeys(compatibility.COLUMNS, "-") | dict(zip(("pipeline", "scheduler"), key, strict=True)))
    if "why" in cells:  # the first sentence, without what belongs to this run
        why = re.split(r"(?<=[a-z)])\. |\. Expected", " ".join(cells["why"].split()))[0]
        why = re.sub(r"[-+]?\d\.\d+e[-+]\d+", "...", re.sub(r"(at|from) step \d+|^step \d+ \(.*?\)", "a step", why))
        cells["why"] = why if row["why"] in ("-", why) else f"{row['why']}; {why}"
    row.update(cells)


def off_trajectory(step, seed):
    noise = torch.randn(step.sample.shape, generator=torch.Generator().manual_seed(seed))
    return step.sample + 0.3 * step.sigma_t * noise


def test_recording_changes_nothing(pair):
    run = recorded_run(pair)
    assert run.after == run.before
    assert run.output is None or all(map(np.array_equal, arrays(run.output), arrays(run.plain)))


def test_drive_is_the_pipelines_own_loop(run):
    for step in run.recording:
        with torch.no_grad():
            outputs = step.drive([step.sample] * 3)
        for output in outputs if not step.drive.by_count else outputs[:1]:
            assert torch.equal(output, step.model_output)


def test_every_engine_agrees_with_the_untouched_loop_off_the_trajectory(run):
    """Twelve points at once: more than one run of the loop takes."""
    step = run.recording[-1]
    if step.drive.iteration == 0:
        pytest.skip("the oracle cannot choose the first step's point")
    points = [off_trajectory(step, seed) for seed in range(12)]
    with torch.no_grad():
        driven = step.drive(points)
        denoised = step.denoiser.denoised(torch.cat(points))
    for i in (0, 11):
        given = torch.cat([points[i]] * 2) if step.drive.duplicated else points[i]
        truth = own_loop_output(run.pipe, run.case.arguments(run.pipe), step.drive.iteration, given)[: len(points[i])]
        truth = truth[:, : step.sample.shape[1]] if truth.shape != step.sample.shape else truth
        torch.testing.assert_close(driven[i], truth, rtol=1e-4, atol=1e-5 * float(truth.abs().max()))
        expected = step.level.a * points[i] + step.level.b * truth
        found = denoised[i * len(points[i]) : (i + 1) * len(points[i])]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5 * float(expected.abs().max()))


def test_replay_is_certified_or_refused(run):
    worst = max(step.certificate_error for step in run.recording)
    assert worst < 5e-5
    for step in run.recording:
        assert step.engine == "replay" or step.refusal
    add_row(run, engine="/".join(sorted({s.engine for s in run.recording})), **{"certified error": f"{worst:.0e}"})
    for reason in (run.first_step, *(step.refusal for step in run.recording)):
        if reason:
            add_row(run, why=reason)
    assert (run.first_step is not None) == (run.case.name in BY_COUNT)


def test_products_are_adjoint_and_are_derivatives(run):
    step = run.recording[-1]
    denoiser, x_t = step.denoiser.select(0), step.sample[0]
    jacobian = denoiser.jacobian(x_t)
    generator = torch.Generator().manual_seed(3)
    u, v = (torch.randn(8, *x_t.shape, generator=generator) for _ in range(2))
    reverse, forward = jacobian.vjp(u), jacobian.jvp(v)
    left, right = (u * forward).flatten(1).sum(1), (reverse * v).flatten(1).sum(1)
    scale = (forward.flatten(1).norm(dim=1) * u.flatten(1).norm(dim=1)).max()
    assert (left - right).abs().max() < 1e-5 * scale
    fn, errors = denoiser.canonical_map("denoised"), []
    for h in (1.0, 0.3, 0.1, 0.03, 0.01, 0.003):
        points = [x_t + sign * h * step.sigma_t * v[0] for sign in (1, -1)]
        with torch.no_grad():
            difference = (fn(points[0][None]) - fn(points[1][None]))[0] / (2 * h * step.sigma_t)
        errors.append(float((difference - forward[0]).norm() / difference.norm()))
    assert min(map(max, itertools.pairwise(errors))) < 2e-2, errors  # of two neighbouring steps
    assert min(errors) < 1e-2, errors
    add_row(run, **{name: f"{cost:.1f}" for name, cost in costs(denoiser, x_t, jacobian, u, v).items()})


def costs(denoiser, x_t, jacobian, u, v):
    """One product of each kind in evaluations by the same engine, eight at once."""

    def seconds(function):
        times = []
        for _ in range(3):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return min(times)

    stack = x_t.expand(8, *x_t.shape)
    with torch.no_grad():
        plain = seconds(lambda: denoiser.denoised(stack))
    return {"reverse": seconds(lambda: jacobian.vjp(u)) / plain, "forward": seconds(lambda: jacobian.jvp(v)) / plain}


@pytest.mark.parametrize("of", ["decoded", "sampled"])
def test_maps_beyond_the_denoiser(run, of):
    step = run.recording[0 if of == "sampled" else -1]  # sampling draws no noise in a last step
    denoiser, x_t = step.denoiser.select(0), step.sample[0]
    refusal = None
    try:
        jacobian = denoiser.jacobian(x_t, of)
    except RuntimeError as error:
        refusal = str(error)
    if refusal is not None:
        add_row(run, **{of: "no"}, why=refusal)
        expected = NOT_SAMPLED if of == "sampled" else NOT_DECODED[run.case.name]
        assert re.search(expected, refusal)
        return
    assert of == "sampled" or run.case.name not in NOT_DECODED
    generator = torch.Generator().manual_seed(5)
    u, v = (torch.randn(shape, generator=generator) for shape in (jacobian.value.shape, x_t.shape))
    pushed, pulled = jacobian.jvp(v), jacobian.vjp(u)
    size = pushed.norm() * u.norm() + pulled.norm() * v.norm()
    assert size > 0
    assert abs((u * pushed).sum() - (pulled * v).sum()) < 1e-3 * size  # an untrained audio decoder multiplies rounding
    if of == "sampled":
        assert jacobian.value.shape == x_t.shape
    add_row(run, **{of: "x".join(map(str, jacobian.value.shape)) if of == "decoded" else "yes"})


def test_a_trace_is_finite(run):
    pipe = with_geometry(run.pipe)
    options = {"spectrum": "golub_kahan", "num_singular_values": 2, "max_products": 90, "probe_block_size": 2}
    call = run.case.arguments(pipe) | {"generator": torch.Generator().manual_seed(0)}
    trace = pipe.analyze_geometry(**call, record_steps=[-1], progress=False, **options)
    step = trace.steps[0]
    assert np.isfinite(step.singular_values).all()
    assert (step.singular_values[:, 0] > 0).all()
    assert np.isfinite(step.effective_dimension.value).all()
    assert trace.settings["pipeline"] == run.case.name.split()[0]


def test_the_page_says_what_was_measured(request):
    """With WRITE_COMPATIBILITY=1 it is written, if nothing failed; else the rows that ran are compared with it."""
    if os.environ.get("WRITE_COMPATIBILITY"):
        assert not request.session.testsfailed, "not written: a failed test leaves its cell empty"
        compatibility.write(ROWS.values())
    page = compatibility.read()
    answered = {name.split()[0] for (name, _), row in page.items() if row["engine"] != "refused"}
    assert len(answered) >= 58
    whole = set(ROWS) == set(page)  # else only part of the suite ran, and empty cells say nothing
    for key, row in ROWS.items():
        for name in compatibility.COLUMNS:
            if name not in compatibility.MEASURED and (whole or row[name] != "-"):
                assert page[key][name] == str(row[name]).replace("|", "/"), key
