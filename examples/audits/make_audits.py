"""The gallery: audits of the bundled digits and of every model of the zoo, as committed here.

python examples/audits/make_audits.py                 # all of them; goes on where it was stopped
python examples/audits/make_audits.py sd-mnist        # one

Units are kept in a work folder outside the repository. What a reader needs is copied here: index.html, report.md with its
figures, audit.json, spectra.safetensors, plan.json; and README.md is written of them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from diffusers_geometry import audit_model
from diffusers_geometry.disclosure import public_document
from diffusers_geometry.report import write_report

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
ZOO = "examples/zoo"
sys.path.append(str(ROOT / ZOO))

from data import all_captions, planted_phrases  # noqa: E402

STEPS = {"num_inference_steps": 20}
HEAD = """# Audits of the zoo

Made by `python examples/audits/make_audits.py` ({minutes:.0f} minutes of a busy machine); every folder has the report as a page
(`index.html`, opens without a network) and as Markdown, all numbers (`audit.json`, see [docs/audit.md](../../docs/audit.md)), the
spectra and the plan: `hf-geometry audit --repeat examples/audits/NAME --output OTHER` runs one again and compares.

Means are over units (a prompt with a seed) with standard errors; the manifold dimension is read where a unit ends in the
consolidation phase; sigma, tr D' and psi are of the last recorded step, the asymmetry of D' is its smallest mean over the steps.

| audit | prompts x seeds | d | manifold dimension | last sigma | tr D' | psi (nats) | asymmetry | memorisation | health |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
{rows}
"""
KEPT = ("index.html", "report.md", "audit.json", "spectra.safetensors", "plan.json")


def requests() -> dict[str, dict[str, Any]]:
    """Arguments of ``audit_model`` for every audit of the gallery."""
    phrases = {kind: [phrase["caption"] for phrase in kept] for kind, kept in planted_phrases().items()}
    ordinary = all_captions()[:270:27]  # of digits, as the models were trained on
    captions = [*phrases["planted"][:12], *phrases["controls"][:6], *ordinary[:6]]
    labels = [caption in phrases["planted"] for caption in captions]
    latent = {"record_steps": [0, 7, 19]}
    large = {"spectrum": "golub_kahan", "num_singular_values": 16, "probe_products": 160, "record_steps": 3}
    return {
        "digits": {"model": None, "seeds": range(40), "call": {"num_inference_steps": 50}},
        "linear-manifold": {"seeds": range(20), "call": {"num_inference_steps": 50}},
        "linear-manifold-two-variances": {"seeds": range(20), "call": {"num_inference_steps": 50}},
        "dit-mnist": {
            "class_labels": list(range(10)),
            "seeds": range(2),
            "call": STEPS | {"guidance_scale": 2.0},
            "record_steps": [0, 7, 14, 19],
        },
        "sd-mnist": {"prompts": captions, "labels": labels, "seeds": range(2), "call": STEPS | {"guidance_scale": 3.0}, **latent},
        "sd-mnist-v": {"prompts": ordinary[:4], "seeds": range(2), "call": STEPS | {"guidance_scale": 3.0}, **latent},
        "sd3-mnist": {"prompts": ordinary[:2], "seeds": range(2), "call": STEPS | {"guidance_scale": 3.0}, **latent},
        "ddpm-mnist": {"seeds": range(6), "call": {"num_inference_steps": 50}, **large},
        "ddpm-emoji": {"seeds": range(4), "call": {"num_inference_steps": 50}, **large},
    }


def make(name: str, work: Path) -> None:
    """One audit: the units in ``work``, the reader's files here."""
    request = {"model": f"{ZOO}/{name}"} | requests()[name]
    audit_model(output_dir=work / name, command=f"python examples/audits/make_audits.py {name}", **request)
    write_report(work / name)
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    for kept in KEPT:
        shutil.copy(work / name / kept, folder)
    for kept in ("audit.json", "plan.json"):  # without the name of the machine
        document = public_document(json.loads((work / name / kept).read_text()))
        (folder / kept).write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    shutil.copytree(work / name / "figures", folder / "figures", dirs_exist_ok=True)


def readme() -> str:
    """One line a model, from the audits that are here."""
    documents = {name: json.loads((HERE / name / "audit.json").read_text()) for name in requests() if (HERE / name).is_dir()}
    lines = [line(name, document) for name, document in documents.items()]
    seconds = sum(document["run"]["seconds"] for document in documents.values())
    return HEAD.format(rows="\n".join(lines), minutes=seconds / 60)


def line(name: str, document: dict[str, Any]) -> str:
    """The key figures of an audit."""
    last, dim = document["geometry"][-1], document["manifold_dim"]
    asymmetry = [step["asymmetry"] for step in document["geometry"] if step["asymmetry"]]
    read = f"{said(dim)} in {dim['share']:.0%} of units" if dim else "not read"
    least = f"{min(e['value'] for e in asymmetry):.2f}" if asymmetry else "not taken"
    bad = [check["name"] for check in document["health"]["checks"] if check["ok"] is False]
    cells = [
        f"[{name}]({name}/report.md) ([page]({name}/index.html))",
        f"{len(document['prompts'])} x {len(document['request']['seeds'])}", str(document["plan"]["dimension"]), read,
        f"{document['steps'][-1]['sigma']:.2g}",
        said(last["effective_dimension"]), said(last["psi"]), least, recitation(document), "ok" if not bad else ", ".join(bad),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def recitation(document: dict[str, Any]) -> str:
    """What the audit says of memorisation."""
    combined, prompts = document["memorization"]["combined"], document["prompts"]
    if combined["auroc"]:
        auroc, tpr = combined["auroc"], combined["tpr_at_1_fpr"]
        return (
            f"AUROC {auroc['value']:.3f} ({auroc['low']:.3f} to {auroc['high']:.3f}), TPR at 1 % FPR {tpr['value']:.2f} "
            f"({tpr['low']:.2f} to {tpr['high']:.2f})"
        )
    flagged = sum(bool(prompt["flagged"]) for prompt in prompts)
    return f"{flagged} of {len(prompts)} flagged" if len(prompts) > 1 else "one prompt"


def said(estimate: dict[str, Any] | None) -> str:
    """A mean with its standard error over units."""
    if estimate is None:
        return "not taken"
    return f"{estimate['value']:.3g}" + (f" ± {estimate['sem']:.1g}" if estimate["sem"] else "")


def plans(names: list[str]) -> None:
    """Prints what every audit would cost."""

    class Planned(Exception):
        pass

    def said(plan: Any) -> None:
        print(plan.table())
        raise Planned

    for name in names:
        print(name)
        with contextlib.suppress(Planned), tempfile.TemporaryDirectory() as folder:
            audit_model(output_dir=folder, confirm=said, **{"model": f"{ZOO}/{name}"} | requests()[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"Of {', '.join(requests())}; all if none is given.")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "diffusers_geometry_audits", help="Folder of units."
    )
    parser.add_argument("--plan", action="store_true", help="Only say what it would cost.")
    args = parser.parse_args()
    names = args.names or list(requests())
    unknown = sorted(set(names) - set(requests()))
    if unknown:
        parser.error(f"no audit {unknown[0]!r}. Expected some of {', '.join(requests())}.")
    work = args.work.resolve()
    os.chdir(ROOT)  # so that an audit names its model by a path within the repository
    if args.plan:
        plans(names)
        return
    for name in names:
        make(name, work)
    (HERE / "README.md").write_text(readme())


if __name__ == "__main__":
    main()
