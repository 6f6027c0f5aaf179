"""Audits: a unit's numbers are those of the analysis, what fails is said and the rest goes on, the summary is of the units."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from audit_tiny import (
    STEPS,
    TEXT_CALL,
    TEXT_OPTIONS,
    TEXT_PROBES,
    TEXT_SCORES,
    assert_same,
    audit_vectors,
    contents,
    spectra,
    text_pipeline,
    vector_pipeline,
)
from PIL import Image
from tiny import ddpm_pipeline, dit_call, dit_pipeline

import diffusers_geometry
from diffusers_geometry import Audit, audit_model, record
from diffusers_geometry.analyze import analyze_geometry
from diffusers_geometry.audit_folder import AuditFolder
from diffusers_geometry.audit_health import health
from diffusers_geometry.audit_plan import plan_audit
from diffusers_geometry.audit_reference import out_of_distribution, reference_document
from diffusers_geometry.audit_request import AuditRequest
from diffusers_geometry.audit_summary import summarise
from diffusers_geometry.audit_unit import picture
from diffusers_geometry.memorization import DEFAULT_SCORES, RunPoint, cross_seed_agreement, rank_prompts, score_run
from diffusers_geometry.precision import to_float32
from diffusers_geometry.probe import probe_generator

WORDS = ["a", "b c", "d", "c"]  # d is NaN


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Four prompts with two seeds; one prompt is poisoned."""
    folder = tmp_path_factory.mktemp("text")
    pipe = text_pipeline(folder / "words")
    labels = [False, None, None, True]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    state = torch.get_rng_state()
    seen = []
    hook = pipe.unet.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    audit = audit_model(pipe, WORDS, seeds=(3, 8), output_dir=folder / "audit", labels=labels, **TEXT_OPTIONS)
    hook.remove()
    assert set(seen) == {1}
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_num_threads(before)
    return pipe, audit


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    return audit_vectors(tmp_path_factory.mktemp("vectors") / "audit", 40, neighborhood_radius=0.1, flipd=True)


def test_a_unit_is_an_analysis_and_its_scores(text):
    """Unit 3 (second prompt, second seed) beside a run by hand: same spectrum, psi, scores and image."""
    pipe, audit = text
    torch.set_num_threads(1)
    request = AuditRequest.from_dict(AuditFolder(audit.folder).read_plan()["request"])
    assert request.place(3) == (1, 8)
    unit, _, arrays = AuditFolder(audit.folder).read_unit(3, "singular_values", "final_sample", "image")
    call = TEXT_CALL | {"prompt": "b c"}
    options = TEXT_PROBES | {"psi_rank": 3}
    seed = request.random_seed(3, "geometry")
    trace = analyze_geometry(pipe, generator=torch.Generator().manual_seed(8), probe_seed=seed, **call, **options)
    assert np.array_equal(np.concatenate([s.singular_values for s in trace.steps]), arrays["singular_values"])
    for step, row in zip(trace.steps, unit["steps"], strict=True):
        assert row["psi"] == step.local_scaling.value[0]
        assert row["psi_sem"] == step.local_scaling.sem[0]
        assert row["effective_dimension_sem"] == step.effective_dimension.sem[0] > 0
        assert row["spectral_norm"] == step.singular_values[0, 0]
    assert np.array_equal(np.asarray(trace.images[0]), arrays["image"])
    with record(pipe, 2) as recording:
        pipe(generator=torch.Generator().manual_seed(8), **call)
    assert np.array_equal(recording.final_sample[0].numpy(), arrays["final_sample"])
    points = [
        RunPoint(
            step.sigma, to_float32(step.sample[0]), step.denoiser.select(0), step.branch("conditional").select(0),
            step.branch("unconditional").select(0), values[0],
        ) for step, values in zip(recording, [s.singular_values for s in trace.steps], strict=True)
    ]  # fmt: skip
    generator = probe_generator(request.random_seed(3, "memorisation"))
    scored = score_run(points, recording.final_sample[0], TEXT_SCORES, generator=generator)
    assert set(unit["scores"]) == set(TEXT_SCORES)
    assert {name: score["value"] for name, score in unit["scores"].items()} == {n: e.value for n, e in scored.scores.items()}
    assert unit["forwards"] == 6 * 2 + scored.forwards
    assert unit["products"] == sum(step.products for step in trace.steps) > 0


def test_a_poisoned_prompt_fails_and_the_rest_goes_on(text):
    _, audit = text
    document = audit.document
    assert [unit["status"] for unit in document["units"]] == ["done"] * 4 + ["failed"] * 2 + ["done"] * 2
    error = document["units"][4]["error"]
    assert error["type"] == "FloatingPointError"
    assert "the network's output at step 0" in error["message"]
    assert re.fullmatch(r"difference.py:\d+ in require_finite", error["where"])
    check = {check["name"]: check for check in document["health"]["checks"]}["failed_units"]
    assert (check["value"], check["ok"], check["units"]) == (2, False, [4, 5])
    assert not document["health"]["ok"]
    poisoned = document["prompts"][2]
    assert (poisoned["rank"], poisoned["combined"], poisoned["psi"], poisoned["scores"]) == (None, None, None, {})
    assert np.isnan(spectra(audit.folder)["singular_values"][4:6]).all()
    assert np.isfinite(spectra(audit.folder)["singular_values"][[0, 1, 2, 3, 6, 7]]).all()
    assert "6 of 8 units done, 4 prompts" in audit.table()
    assert "failed_units 2, limit 0, NOT OK" in audit.table()


def test_the_summary_is_of_the_units(text):
    """Means, errors, ranks and agreement, computed again from the units' own numbers."""
    _, audit = text
    document, folder = audit.document, AuditFolder(audit.folder)
    done = [unit for unit in document["units"] if unit["status"] == "done"]
    for k, step in enumerate(document["geometry"]):
        values = np.array([unit["steps"][k]["nu"] for unit in done])
        assert step["nu"]["value"] == pytest.approx(values.mean(), rel=1e-12)
        assert step["nu"]["sem"] == pytest.approx(values.std(ddof=1) / np.sqrt(6), rel=1e-12)
        assert step["nu"]["n"] == 6
        assert sum(step["phases"].values()) == pytest.approx(1)
        assert step["flipd"] is None
    finals = torch.from_numpy(np.stack([folder.read_unit(i, "final_sample")[2]["final_sample"] for i in (2, 3)]))
    agreement = document["prompts"][1]["agreement"]
    assert agreement["value"] == cross_seed_agreement(finals).value
    assert agreement["n"] == 2
    scores = {
        name: np.array([u["scores"].get(name, {"value": np.nan})["value"] for u in document["units"]]).reshape(4, 2)
        for name in TEXT_SCORES
    }
    scores["agreement"] = np.array([np.nan if p["agreement"] is None else p["agreement"]["value"] for p in document["prompts"]])
    ranking = rank_prompts(scores, [False, None, None, True])
    for prompt, place in zip(document["prompts"], ranking.prompts, strict=True):
        assert prompt["rank"] == (place and place.rank)
        assert prompt["combined"] == (place and {"value": place.combined.value, "sem": place.combined.sem, "n": 2})
    assert document["memorization"]["combined"]["certainty"] == ranking.certainty
    assert [p["label"] for p in document["prompts"]] == [False, None, None, True]
    named = {score["name"]: score for score in document["memorization"]["scores"]}
    assert set(named) == {*TEXT_SCORES, "agreement"}
    assert named["guidance_norm"]["url"] == "https://arxiv.org/abs/2407.21720"
    again = summarise(folder)
    assert json.dumps(again, sort_keys=True) == json.dumps(document, sort_keys=True)
    assert document == Audit.from_folder(audit.folder).document


def test_the_documents_are_those_of_the_documentation(text, vectors):
    """Every key that docs/audit.md names is there, and no other at the top."""
    lines = (Path(diffusers_geometry.__file__).parents[1] / "docs" / "audit.md").read_text().splitlines()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", "\n".join(lines), re.MULTILINE))
    for audit in (text[1], vectors):
        assert set(audit.document) == set(rows)
        assert set(re.findall(r"`(\w+)`", rows["plan"])) <= set(audit.document["plan"])
        unit = next(unit for unit in audit.document["units"] if unit["status"] == "done")
        said = rows["units"].split("`steps` (per recorded step: ")
        step_keys, rest = said[1].split("), ", 1)
        assert set(re.findall(r"`(\w+)`", step_keys)) <= set(unit["steps"][0])
        assert set(re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", said[0] + rest))) <= set(unit)
        step_keys = set(re.findall(r"`(\w+)`", rows["steps"]))
        assert all(set(step) == step_keys for step in audit.document["steps"])
        assert set(re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", rows["run"]))) <= set(audit.document["run"])
        json.dumps(audit.document, allow_nan=False)


def test_images_and_what_is_none(text, vectors, tmp_path):
    _, audit = text
    image = np.asarray(Image.open(audit.folder / audit.document["units"][3]["image"]))
    assert np.array_equal(image, AuditFolder(audit.folder).read_unit(3, "image")[2]["image"])
    assert image.shape == (16, 16, 3)
    assert image.std() > 0
    assert vectors.document["units"][0]["image"] is None
    assert not (vectors.folder / "images").exists()
    video = np.zeros((1, 5, 4, 6, 3))
    video[0, 0] = 0.5
    assert picture(video).tolist() == np.full((4, 6, 3), 128).tolist()
    assert picture([[Image.new("RGB", (6, 4), (1, 2, 3))] * 2])[0, 0].tolist() == [1, 2, 3]
    assert picture(torch.ones(2, 1, 4, 6)).shape == (4, 6)
    assert picture(torch.ones(1, 4, 8, 8)) is None  # a latent
    assert picture(np.ones((1, 8))) is None  # a vector
    assert picture(Image.new("L", (2, 2))) is None
    assert picture([np.ones((4, 6, 3), np.float32)]).max() == 255


def test_delta_and_flipd_on_request(vectors):
    steps = vectors.document["units"][7]["steps"]
    assert all(step["delta"] >= 0 and step["flipd"] is not None for step in steps)
    assert vectors.document["geometry"][0]["delta"]["n"] == 40
    assert vectors.document["geometry"][0]["flipd"]["n"] == 40


def test_a_unit_does_not_depend_on_the_others(vectors, tmp_path):
    """One seed alone, and in another order: the same numbers."""
    pipe = vector_pipeline()
    audit = audit_model(
        pipe, seeds=(39, 7), output_dir=tmp_path, call=STEPS, record_steps=3, progress=False, neighborhood_radius=0.1, flipd=True
    )
    for mine, theirs in ((0, 39), (1, 7)):
        ours, others = (dict(a.document["units"][i]) for a, i in ((audit, mine), (vectors, theirs)))
        assert ours.pop("index") != others.pop("index")
        assert ours == others


def test_probes_belong_to_prompt_and_seed():
    """The same in every audit that has both, another for every unit, purpose and probe seed."""
    many = AuditRequest.make(["a", "b"], None, (1, 2), {}, {}, ())
    one = AuditRequest.make(["b"], None, (2,), {}, {}, ())
    assert many.place(3) == (1, 2)
    assert many.random_seed(3, "geometry") == one.random_seed(0, "geometry") == many.settings(3)["probe_seed"]
    other = AuditRequest.make(["b"], None, (2,), {}, {"probe_seed": 1}, ())
    seeds = [many.random_seed(i, purpose) for i in range(4) for purpose in ("geometry", "delta")] + [other.random_seed(0, "delta")]
    assert len(set(seeds)) == 9
    assert one.arguments(0)["generator"].initial_seed() == 2


def test_the_plan_is_what_is_spent(vectors):
    plan, units = vectors.document["plan"], vectors.document["units"]
    assert plan["units"] == 40
    assert plan["dimension"] == 8
    assert plan["method"] == "dense"
    assert plan["products"] == sum(unit["products"] for unit in units)
    assert abs(plan["forwards"] - sum(unit["forwards"] for unit in units)) <= 40 * 3 * 17  # delta is in the plan alone
    request = AuditRequest.make(None, None, range(3), STEPS, {"record_steps": 3}, DEFAULT_SCORES)
    planned, filled = plan_audit(vector_pipeline(), request)
    assert filled.options["psi_rank"] == 8
    assert planned.seconds > 0
    assert "3 units of 3 recorded steps, 8 dimensions, by dense: 72 products" in planned.table()


def test_limits_are_kept_before_anything_is_spent(tmp_path):
    with pytest.raises(ValueError, match=r"max_products=100 is less than the audit needs, 288: 12 units of 3 recorded steps"):
        audit_vectors(tmp_path / "no", max_products=100)
    with pytest.raises(ValueError, match="max_seconds=1e-09 is less than the audit needs"):
        audit_vectors(tmp_path / "no", max_seconds=1e-9)
    assert not (tmp_path / "no").exists()
    audit_vectors(tmp_path / "begun", 2)
    with pytest.raises(ValueError, match="max_products=47 is less than the audit needs, 48"):
        audit_vectors(tmp_path / "begun", 2, max_products=47)
    assert audit_vectors(tmp_path / "yes", 2, max_products=288, probe_products=8).document["plan"]["products"] == 48
    with pytest.raises(ValueError, match="max_products=7 cannot be met"):
        audit_vectors(tmp_path / "no", 2, probe_products=7)


def test_a_model_of_nan_is_audited_to_the_end(tmp_path):
    """Every unit fails, with the reason, and the audit says so."""
    pipe = vector_pipeline()
    with torch.no_grad():
        pipe.network.last.weight[:] = torch.nan
    audit = audit_vectors(tmp_path, 3, pipe=pipe)
    assert {unit["error"]["type"] for unit in audit.document["units"]} == {"FloatingPointError"}
    assert audit.document["plan"]["seconds"] is None
    assert audit.document["plan"]["products"] == 72
    assert "FloatingPointError" in audit.document["plan"]["note"]
    assert audit.document["steps"] == audit.document["geometry"] == []
    assert audit.document["manifold_dim"] is None
    assert spectra(tmp_path)["singular_values"].shape == (3, 0, 0)
    checks = {check["name"]: check for check in audit.document["health"]["checks"]}
    assert checks["failed_units"]["ok"] is False
    assert checks["asymmetry"]["ok"] is None
    assert "0 of 3 units done" in audit.table()
    assert "No unit has scores, so prompts are not compared." in audit.table()


def test_a_sample_that_ends_at_nan_is_told_and_agrees_with_none(tmp_path):
    """Finite networks, of which the scheduler's last step makes NaN: the units are done, the model is not healthy."""
    pipe = vector_pipeline()
    step = pipe.scheduler.step

    def spoilt(*args, **options):
        found = step(*args, **options)
        if pipe.scheduler.step_index == len(pipe.scheduler.timesteps):
            found.prev_sample = found.prev_sample * torch.nan
        return found

    pipe.scheduler.step = spoilt
    document = audit_vectors(tmp_path, 2, pipe=pipe, scores=["effective_dimension"]).document
    assert [unit["status"] for unit in document["units"]] == ["done", "done"]
    assert [unit["non_finite"] for unit in document["units"]] == [8, 8]
    assert document["prompts"][0]["agreement"] is None
    assert document["health"]["ok"] is False


def test_failed_units_are_tried_again_on_request(tmp_path):
    pipe = vector_pipeline()
    kept = pipe.network.last.weight.detach().clone()
    audit_vectors(tmp_path / "whole", 3)
    audit_vectors(tmp_path / "mended", 3)
    for i in (0, 2):  # as a crash of another kind would leave them
        folder = AuditFolder(tmp_path / "mended")
        folder.unit_path(i).unlink()
        folder.write_failure(i, {"type": "RuntimeError", "message": "no", "where": None}, folder.read_unit(1)[1])
    failed = audit_vectors(tmp_path / "mended", 3)
    assert [unit["status"] for unit in failed.document["units"]] == ["failed", "done", "failed"]
    audit_vectors(tmp_path / "mended", 3, retry_failed=True)
    one, other = contents(tmp_path / "whole"), contents(tmp_path / "mended")
    for found in (one, other):
        found["audit.json"]["plan"].pop("seconds")
        found["audit.json"]["plan"].pop("memory_bytes")
    assert one == other
    assert torch.equal(pipe.network.last.weight, kept)


def test_class_labels_and_no_guidance(tmp_path):
    """Class-conditional with guidance; and an unconditional model has no guidance scores."""
    call = dit_call()
    del call["class_labels"], call["output_type"]
    options = {"call": call, "record_steps": 1, "spectrum": "golub_kahan", "num_singular_values": 2, "progress": False}
    audit = audit_model(dit_pipeline(), class_labels=[3, 5, 7], seeds=[1], output_dir=tmp_path / "dit", **options)
    assert audit.document["request"]["kind"] == "class_labels"
    assert [p["prompt"] for p in audit.document["prompts"]] == [3, 5, 7]
    assert sorted(p["rank"] for p in audit.document["prompts"]) == [1, 2, 3]
    assert "guidance_norm" in audit.document["units"][0]["scores"]
    plain = audit_model(ddpm_pipeline(), seeds=[1], output_dir=tmp_path / "ddpm", call=STEPS, record_steps=1, progress=False)
    assert "guidance_norm" not in plain.document["units"][0]["scores"]
    assert "commitment" in plain.document["units"][0]["scores"]
    assert plain.document["prompts"][0]["prompt"] is None
    assert "1 prompt has scores; at least 3 are needed" in plain.document["memorization"]["combined"]["certainty"]


def test_another_model_or_request_is_refused(tmp_path):
    audit_vectors(tmp_path, 2)
    other = vector_pipeline()
    with torch.no_grad():
        other.network.last.bias[0] += 1e-3
    with pytest.raises(
        ValueError, match=r"holds another audit: model weights_sha256 was .* Expected the same again to continue it"
    ):
        audit_vectors(tmp_path, 2, pipe=other)
    with pytest.raises(ValueError, match=r"holds another audit: seeds was \[0, 1\] and is now \[0, 1, 2\]"):
        audit_vectors(tmp_path, 3)
    with pytest.raises(ValueError, match="holds another audit: options psi_rank was 8 and is now 5"):
        audit_vectors(tmp_path, 2, psi_rank=5)
    plan = json.loads((tmp_path / "plan.json").read_text())
    plan["provenance"]["versions"]["torch"] = "1.0"
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ValueError, match="holds another audit: version of torch was '1.0' and is now"):
        audit_vectors(tmp_path, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": ["a", "a"]}, "prompt holds 'a' twice"),
        ({"prompts": []}, r"prompt=\(\). Expected a non-empty sequence of str"),
        ({"class_labels": [True]}, "class_labels=.*Expected a non-empty sequence of int"),
        ({"prompts": ["a"], "class_labels": [1]}, "prompts and class_labels are both given"),
        ({"prompts": ["a"], "labels": [1]}, r"labels=\[1\]. Expected True, False or None for each of 1 prompts"),
        ({"seeds": [1, 1]}, "seeds holds 1 twice"),
        ({"seeds": [-1]}, "seeds=.*Expected integers from 0"),
        ({"call": {"generator": None}}, r"call has \['generator'\]. Expected prompts="),
        ({"call": {"batch_size": 2}}, r"call has \['batch_size'\]"),
        ({"call": {"latents": torch.ones(1)}}, "cannot be stored"),
        ({"options": {"max_probe_seconds": 3.0}}, "max_probe_seconds makes budgets depend on timings"),
        ({"options": {"record_steps": 0}}, "Expected a positive number of steps"),
    ],
)
def test_senseless_requests_are_refused(options, message):
    given = {"prompts": None, "class_labels": None, "seeds": [0], "call": {}, "options": {}, "scores": ()} | options
    with pytest.raises(ValueError, match=message):
        AuditRequest.make(**given)


def test_errors_of_the_model_itself(tmp_path):
    with pytest.raises(TypeError, match="audit_model has no option 'record_step'. Expected one of its own"):
        audit_vectors(tmp_path, record_step=3)
    with pytest.raises(ValueError, match=r"scores has \['fortune'\]. Expected names in"):
        audit_vectors(tmp_path, scores=["fortune"])
    with pytest.raises(Exception, match="takes no argument 'size'. Expected one of"):
        audit_vectors(tmp_path, call={"size": 3})
    pipe = text_pipeline(tmp_path / "words")
    with pytest.raises(ValueError, match=r"nothing can be generated for the prompt 'no prompt'.*prompt"):
        audit_model(pipe, output_dir=tmp_path / "no", **TEXT_OPTIONS)
    options = TEXT_OPTIONS | {"call": TEXT_CALL | {"num_images_per_prompt": 2}}
    with pytest.raises(ValueError, match="makes 2 samples. Expected one a unit"):
        audit_model(pipe, ["a"], output_dir=tmp_path / "no", **options)
    assert not (tmp_path / "no").exists()
    with pytest.raises(FileNotFoundError, match=r"holds no audit.json. Expected a folder of a finished audit"):
        Audit.from_folder(tmp_path)


def test_units_unlike_a_reference(vectors, tmp_path):
    """The same model agrees with itself; one whose weights are larger does not. The numbers follow from the units."""
    options = {"neighborhood_radius": 0.1, "flipd": True, "reference": vectors.folder}
    same = audit_model(vector_pipeline(), seeds=range(100, 112), output_dir=tmp_path / "same", call=STEPS, record_steps=3,
                       progress=False, **options)  # fmt: skip
    found = same.document["out_of_distribution"]
    assert found["false_alarm_rate"] == pytest.approx(1 / 41)
    assert found["expected_false_alarms"] == pytest.approx(12 / 41)
    assert len(found["flagged"]) <= 3
    other = audit_vectors(tmp_path / "other", 12, pipe=vector_pipeline(scale=0.5), **options)
    assert other.document["out_of_distribution"]["flagged"] == list(range(12))
    row = other.document["out_of_distribution"]["units"][3]
    reference = np.array([unit["steps"][1]["psi"] for unit in vectors.document["units"]])
    mine = other.document["units"][3]["steps"][1]["psi"]
    centre = np.median([*reference, mine])
    assert row["steps"][1]["psi"] == (np.abs(reference - centre) >= abs(mine - centre)).mean()
    assert row["p_value"] == pytest.approx(1 / 41)
    assert same.document["request"]["reference"] == found["reference"]["sha256"]
    with pytest.raises(ValueError, match="this audit records the steps .* the reference"):
        audit_vectors(tmp_path / "third", 2, record_steps=2, reference=vectors.folder)


@pytest.mark.parametrize(("prompts", "seeds", "asked"), [(79, 1, "others"), (20, 4, "others"), (20, 4, "the same")])
def test_false_alarms_are_as_rare_as_stated(prompts, seeds, asked):
    """Units drawn like the reference's, from a skew distribution, those of a prompt alike: flagged at most as often as it says."""
    generator = np.random.default_rng(0)
    levels = [{"position": 0}, {"position": 5}]
    flagged, count = 0, 0
    for _ in range(120):
        places = [generator.standard_normal((2, 3)) for _ in range(prompts + 20)]
        units = [_drawn(p, places[p], generator) for p in range(prompts) for _ in range(seeds)]
        names = [{"sha256": f"{p}"} for p in range(prompts + 20)]
        reference = reference_document({"units": units, "model": {"name": "r"}, "steps": levels, "prompts": names}, "00")
        shift = prompts if asked == "others" else 0
        own = [_drawn(i, places[i + shift], generator) for i in range(20)]
        found = out_of_distribution(own, levels, reference, [f"{i + shift}" for i in range(20)])
        flagged, count = flagged + len(found["flagged"]), count + 20
    rate = found["false_alarm_rate"]
    assert rate == pytest.approx(max(0.01, 1 / (prompts * (seeds if asked == "the same" else 1) + 1)))
    error = 4 * np.sqrt(rate / count)
    assert (rate if seeds == 1 or asked == "the same" else rate / seeds) - error < flagged / count < rate + error
    assert ("so prompts count" in found["explanation"]) == (asked == "others")


def _drawn(prompt, place, generator):
    """A unit near its prompt's place (steps, quantities)."""
    values = (place + 0.3 * generator.standard_normal((2, 3))) ** 3
    names = ("psi", "nu", "spectral_norm")
    steps = [dict(zip(names, row, strict=True)) | {"effective_dimension": None} for row in values.tolist()]
    return {"index": prompt, "prompt": prompt, "status": "done", "steps": steps}


def test_health_finds_what_is_wrong():
    def unit(index, **change):
        step = {"asymmetry": 0.1, "spectral_norm": 2.0, "certificate_error": 1e-6} | change
        noisy = {"asymmetry": 0.4, "spectral_norm": 1.0, "certificate_error": 1e-7}
        return {"index": index, "status": "done", "non_finite": change.get("non_finite", 0), "steps": [noisy, step]}

    fine = health([unit(0), unit(1)], "float32")
    assert fine["ok"]
    assert {c["name"]: c["value"] for c in fine["checks"]} == {
        "failed_units": 0, "non_finite": 0, "asymmetry": 0.1, "spectral_norm": 2.0, "certificate_error": 1e-6
    }  # fmt: skip
    wrong = {"asymmetry": 0.9, "spectral_norm": 100.1, "certificate_error": 3.1e-5, "non_finite": 1}
    for name, value in wrong.items():
        other = {"asymmetry": {"asymmetry": value}}.get(name, {name: value})
        found = health([unit(0), unit(1, **other)], "float32")
        bad = [check for check in found["checks"] if check["ok"] is False]
        if name == "asymmetry":  # it is judged where it is smallest: the noisy step has 0.4
            assert (bad, found["ok"]) == ([], True)
        else:
            assert [(c["name"], c["value"], c["units"]) for c in bad] == [(name, value, [1])]
            assert not found["ok"]
    assert health([unit(0, certificate_error=1e-3)], "float16")["ok"]
    assert not health([], "float32")["checks"][1]["ok"]


def test_same_request_same_folder(vectors):
    """Asked for again, a finished audit is read, not computed."""
    before = {path: path.stat().st_mtime_ns for path in vectors.folder.rglob("*") if path.is_file()}
    again = audit_vectors(vectors.folder, 40, neighborhood_radius=0.1, flipd=True)
    assert again.document == vectors.document
    assert {path: path.stat().st_mtime_ns for path in vectors.folder.rglob("*") if path.is_file()} == before
    assert_same(vectors.folder, again.folder)
