"""Two audits side by side: a difference that is there is found, one that is not is not, and a repetition is the same."""

import json

import numpy as np
import pytest
import torch
from audit_tiny import STEPS, assert_same, audit_vectors, vector_pipeline
from scipy import stats

from diffusers_geometry import audit_model
from diffusers_geometry.audit import repeat_audit
from diffusers_geometry.audit_compare import ALPHA, Difference, _holm, compare_audits, mean_difference
from diffusers_geometry.audit_repeat import compare_repetition


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return audit_vectors(tmp_path_factory.mktemp("base") / "audit", 12)


@pytest.fixture(scope="module")
def stronger(tmp_path_factory):
    """The same network with a last layer that is 20 % larger."""
    pipe = vector_pipeline()
    with torch.no_grad():
        pipe.network.last.weight *= 1.2
    return audit_vectors(tmp_path_factory.mktemp("stronger") / "audit", 12, pipe=pipe)


@pytest.mark.parametrize(
    ("prompt_effect", "seed_effect"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)], ids=["none", "prompts", "seeds", "both"]
)
def test_false_alarms_of_crossed_units(prompt_effect, seed_effect):
    """12 prompts with 6 seeds and no true difference: p < 0.05 in at most about 5 % of 2,000 draws, whatever units share."""
    generator = np.random.default_rng(1)
    prompts, seeds = np.repeat(range(12), 6), np.tile(range(6), 12)
    alarms = 0
    for _ in range(2000):
        shared = prompt_effect * generator.standard_normal(12)[prompts] + seed_effect * generator.standard_normal(6)[seeds]
        alarms += mean_difference(shared + generator.standard_normal(72), prompts, seeds)[2] < 0.05
    assert alarms / 2000 < 0.05 + 4 * np.sqrt(0.05 * 0.95 / 2000)
    assert alarms > 0
    if not prompt_effect and not seed_effect:
        assert alarms / 2000 > 0.01
    else:  # what a test of 72 independent units would do
        naive = sum(
            stats.ttest_1samp(
                prompt_effect * generator.standard_normal(12)[prompts] + seed_effect * generator.standard_normal(6)[seeds]
                + generator.standard_normal(72), 0
            ).pvalue < 0.05 for _ in range(500)
        )  # fmt: skip
        assert naive / 500 > 0.2


def test_one_prompt_is_a_t_test():
    values = np.random.default_rng(0).normal(0.3, 1.0, 9)
    mean, sem, p_value = mean_difference(values, ["a"] * 9, range(9))
    expected = stats.ttest_1samp(values, 0)
    assert (mean, sem) == pytest.approx((values.mean(), values.std(ddof=1) / 3))
    assert p_value == pytest.approx(expected.pvalue)
    assert mean_difference(np.array([0.5]), ["a"], [0]) == (0.5, None, None)
    assert mean_difference(np.zeros(5), ["a"] * 5, range(5)) == (0.0, 0.0, 1.0)
    assert mean_difference(np.ones(5), ["a"] * 5, range(5)) == (1.0, 0.0, 2.0**-4)  # no scale to judge by but five equal signs


def test_holm_by_hand():
    differences = [Difference("q", None, 0, 0, 0, 0, 2, p) for p in (0.01, 0.04, 0.03, 0.005)]
    found = _holm([*differences, Difference("r", None, 0, 0, 0, None, 1, None)])
    assert [d.p_holm for d in found] == pytest.approx([0.03, 0.06, 0.06, 0.02, None])
    assert [d.is_significant for d in found] == [True, False, False, True, False]


def test_a_known_difference_is_found(base, stronger):
    found = compare_audits(base.document, stronger.document)
    assert found.pairs == 12
    psi = {d.position: d for d in found.differences if d.quantity == "psi"}
    first = [unit["steps"][0]["psi"] for unit in base.document["units"]]
    second = [unit["steps"][0]["psi"] for unit in stronger.document["units"]]
    assert psi[0].difference == pytest.approx(np.mean(second) - np.mean(first))
    assert psi[0].p_value == pytest.approx(stats.ttest_rel(second, first).pvalue)
    assert psi[0].is_significant
    assert psi[0].p_holm >= psi[0].p_value
    assert any(d.quantity == "score nuclear_norm" and d.is_significant for d in found.differences)
    assert " *" in found.table()
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["correction"] == "Holm"


def test_no_difference_is_no_finding(base, tmp_path):
    """The same model again: nothing but zeros. And with other seeds, unpaired: nothing significant."""
    same = compare_audits(base.document, audit_vectors(tmp_path / "same", 12).document)
    assert {d.difference for d in same.differences} == {0.0}
    assert {d.p_value for d in same.differences} == {1.0}
    assert f"0 of {len(same.differences)} differ at a family-wise level of {ALPHA}" in same.table()
    options = {"call": STEPS, "record_steps": 3, "progress": False}
    other = audit_model(vector_pipeline(), seeds=range(50, 62), output_dir=tmp_path / "other", **options)
    unpaired = compare_audits(base.document, other.document)
    assert unpaired.pairs == 0
    assert not any(d.is_significant for d in unpaired.differences)
    psi = next(d for d in unpaired.differences if d.quantity == "psi" and d.position == 2)
    values = [[unit["steps"][1]["psi"] for unit in audit.document["units"]] for audit in (base, other)]
    assert psi.p_value == pytest.approx(stats.ttest_ind(*values, equal_var=False).pvalue)
    assert "no common units" in unpaired.table()


def test_what_cannot_be_compared_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match=r"the audits record the steps \[0, 2, 5\] and \[0, 5\]"):
        compare_audits(base.document, audit_vectors(tmp_path / "steps", 2, record_steps=2).document)
    with pytest.raises(ValueError, match="the audits have psi_rank 8 and 4. Expected the same in both"):
        compare_audits(base.document, audit_vectors(tmp_path / "rank", 2, psi_rank=4).document)
    pipe = vector_pipeline()
    with torch.no_grad():
        pipe.network.last.weight[:] = torch.nan
    with pytest.raises(ValueError, match="has no finished unit"):
        compare_audits(base.document, audit_vectors(tmp_path / "nan", 2, pipe=pipe).document)


def test_a_repetition_is_the_same_and_another_model_is_refused(base, tmp_path):
    second, repetition = repeat_audit(base.folder, tmp_path / "again", model=vector_pipeline(), progress=False)
    assert repetition.moved == ()
    assert repetition.identical == repetition.numbers > 12 * 3 * 8
    assert json.loads((tmp_path / "again" / "repetition.json").read_text())["moved"] == []
    first = json.loads((base.folder / "audit.json").read_text())
    assert second.document["units"] == first["units"]
    assert second.document["plan"] == first["plan"]
    with pytest.raises(ValueError, match=r"is not the model of .*: weights_sha256 differs .*Expected the same weights"):
        repeat_audit(base.folder, tmp_path / "no", model=vector_pipeline(scale=0.31), progress=False)
    with pytest.raises(FileNotFoundError, match="holds no audit.json"):
        repeat_audit(tmp_path, tmp_path / "no", progress=False)


def test_numbers_that_moved_are_named(base):
    other = json.loads(json.dumps(base.document))
    other["units"][3]["steps"][1]["psi"] += 0.5
    other["units"][3]["steps"][1]["nu"] *= 1 + 1e-5  # rounding of another machine
    other["units"][4]["steps"][2]["phase"] = "unheard of"
    other["units"][5]["scores"].pop("psi")
    found = compare_repetition(base.document, other)
    assert [(m.unit, m.quantity) for m in found.moved] == [(3, "psi at step 1"), (4, "phase at step 2"), (5, "score psi")]
    assert found.identical == found.numbers - 4
    assert "3 moved beyond their errors" in found.table()
    other["units"][3]["steps"][1]["psi_sem"] = 0.2  # a random number may move by that
    assert len(compare_repetition(base.document, other).moved) == 2


def test_a_repetition_that_was_stopped_goes_on(base, tmp_path):
    folder = tmp_path / "again"
    repeat_audit(base.folder, folder, model=vector_pipeline(), progress=False)
    for name in ("audit.json", "units/00002.safetensors", "units/00007.safetensors"):
        (folder / name).unlink()
    _, repetition = repeat_audit(base.folder, folder, model=vector_pipeline(), progress=False)
    assert repetition.moved == ()
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["provenance"]["command"] == "hf-geometry audit --repeat FOLDER --output OTHER"
    with pytest.raises(AssertionError):
        assert_same(base.folder, folder)  # of the command only
