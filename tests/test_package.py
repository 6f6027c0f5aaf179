"""The package as a whole: imports that only go down the street, and an import that costs nothing."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

import diffusers_geometry

PACKAGE = Path(diffusers_geometry.__file__).parent
NUMERICAL = [
    "difference",
    "forward_mode",
    "jacobian",
    "continuation",
    "denoiser",
    "exact",
    "estimate",
    "spectrum",
    "golub_kahan",
    "function_values",
    "stochastic",
    "quadrature",
    "descriptors",
    "activations",
    "vertices",
    "complexity",
    "batch_complexity",
    "variation",
    "generators",
    "dimension",
    "probe",
    "costs",
    "budget",
    "phases",
    "theory",
    "storage",
    "disclosure",
    "step_geometry",
    "trajectory",
    "speciation",
    "transition_report",
    "viz",
    "comparison",
    "training_trace",
    "report",
    "memorization_metrics",
    "memorization_scores",
    "memorization_bulk",
    "memorization_detector",
    "memorization",
]
HOST = [
    "bundled",
    "schedule",
    "precision",
    "pipeline_call",
    "drive",
    "ending",
    "replay",
    "recorded_step",
    "capture",
    "plan",
    "settings",
    "analyze",
    "restart",
    "clones",
    "collapse",
    "transitions",
    "labels",
    "dataset",
    "reward_trunks",
    "reward_networks",
    "reward_kernel",
    "reward",
    "reward_metrics",
    "reward_training",
    "reward_card",
    "objectives",
    "mitigation",
    "guidance",
    "best_of",
    "preference",
    "training_callback",
    "mixin",
    "vector",
    "exact_network",
    "checks",
    "selfcheck",
    "hub_errors",
    "pipeline_files",
    "hub",
    "hub_card",
    "hub_folder",
    "hub_changes",
    "hub_publish",
    "loading",
    "claims",
    "audit_folder",
    "audit_request",
    "audit_unit",
    "audit_plan",
    "audit_source",
    "audit_health",
    "audit_reference",
    "audit_ranking",
    "audit_summary",
    "audit_compare",
    "audit_repeat",
    "audit_run",
    "audit",
    "cli_options",
    "cli_transitions",
    "cli_reward",
    "cli_audit",
    "cli",
]
STREET = NUMERICAL + HOST
# Drawn when it is asked for: a trace knows how to plot itself without loading matplotlib.
CALLED_LATER = {("trajectory", "viz"), ("trajectory", "comparison"), ("transition_report", "viz")}
TYPES_ONLY = {
    *(("viz", name) for name in ("trajectory", "comparison", "transition_report")),
    ("comparison", "trajectory"), ("trajectory", "comparison"),
}  # fmt: skip


def imports(path):
    """(module, whether it is at the top of the file) of every import."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            inside = [*path.relative_to(PACKAGE).parts[:-1]]
            package = ".".join(["diffusers_geometry", *inside[: len(inside) + 1 - node.level], ""]) if node.level else ""
            base = package + (node.module or "")
            for alias in node.names:
                yield (f"{base}{alias.name}" if base.endswith(".") else base), id(node) in top
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top


def test_every_module_is_on_the_street():
    found = {p.stem if p.is_file() else p.name for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert found - {"__init__", "__main__"} == set(STREET)


@pytest.mark.parametrize("module", STREET)
def test_imports_only_go_down_the_street(module):
    files = [PACKAGE / f"{module}.py"] if (PACKAGE / f"{module}.py").exists() else sorted((PACKAGE / module).glob("*.py"))
    for name, _ in (found for path in files for found in imports(path)):
        if name.startswith("diffusers_geometry.") and name != "diffusers_geometry.__version__":
            other = name.split(".")[1]
            if other != module and (module, other) not in CALLED_LATER | TYPES_ONLY:
                assert STREET.index(other) < STREET.index(module), f"{module} imports {other}, which comes later"
        if module in NUMERICAL:
            assert name.split(".")[0] not in ("diffusers", "transformers", "accelerate", "huggingface_hub"), f"{module}: {name}"


def test_heavy_libraries_load_when_used():
    for path in PACKAGE.glob("*.py"):
        for name, at_top in imports(path):
            if at_top:
                assert name.split(".")[0] not in ("matplotlib", "pandas", "PIL", "rich"), f"{path.name} imports {name} at its top"


def test_modules_stay_readable():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 330, f"{path.name} is long: is it one noun?"


def test_names_resolve_and_are_listed():
    assert set(diffusers_geometry.__all__) <= set(dir(diffusers_geometry))
    for name in diffusers_geometry.__all__:
        assert getattr(diffusers_geometry, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'. Expected one of"):
        diffusers_geometry.nothing  # noqa: B018


def test_editors_see_the_names_that_resolve():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING")
    typed = {alias.asname: node.module for node in block.body for alias in node.names}
    assert typed == diffusers_geometry._HOME


def test_import_costs_at_most_a_third_of_a_second_beyond_torch():
    code = "import torch, time, sys; t = time.perf_counter(); import diffusers_geometry; print(time.perf_counter() - t)\n"
    code += "assert 'diffusers' not in sys.modules and 'matplotlib' not in sys.modules"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.3
    assert time.perf_counter() - start > float(done.stdout)
