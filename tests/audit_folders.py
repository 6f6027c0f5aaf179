"""Folders of the shape that docs/audit.md lists, without a model: spectra of a linear manifold, so that every number is known.

Sample i of a prompt has D' = diag(l_j / (l_j + sigma^2)), l_j = its prompt's variances; memorised prompts have smaller ones.
"""

import json
import math

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

SIGMAS = (80.0, 10.0, 3.0, 1.0, 0.3, 0.05)
HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror=alert(1)>' onmouseover='alert(1)",
    "</script><script>alert(1)</script><!-- ]]>",
    "{{ 7 * 7 }} {% raw %} | `code` [link](javascript:alert(1)) @everyone **bold**",
    "شخص يمشي في الشارع ליד הבית",
    "turned \u202earound\u202c, NUL \u0000 and half a pair \ud800",
    "a very long prompt, " * 120,
    "unbroken" * 60,
    "",
)


def estimate(values):
    known = [v for v in values if v is not None]
    if not known:
        return None
    sem = float(np.std(known, ddof=1) / math.sqrt(len(known))) if len(known) > 1 else None
    return {"value": float(np.mean(known)), "sem": sem, "n": len(known)}


def spectrum(sigma, variance, dims, size):
    values = np.where(np.arange(size) < dims, variance, 0.0)
    return values / (values + sigma**2)


def phase(values):
    if (values < 0.1).all():
        return "trivial"
    return "coverage" if ((values >= 0.1) & (values <= 0.9)).any() else "consolidation"


def step_of(sigma, values, scored):
    shares, counted = values[values > 0] / values.sum(), values[values > 1e-3 * values.max()]
    return {
        "sigma": sigma, "phase": phase(values), "psi": float(np.log(counted).sum()), "psi_sem": 0.0, "psi_rank": len(counted),
        "nu": float(np.exp(-(shares * np.log(shares)).sum())), "delta": None, "effective_dimension": float(values.sum()),
        "effective_dimension_sem": 0.02, "gap_dim": int(np.argmax(-np.diff(values))) + 1, "flipd": None,
        "flipd_sem": None, "spectral_norm": float(values.max()), "asymmetry": 0.05 + 0.1 * sigma / (1 + sigma),
        "certificate_error": 1.2e-7, "engine": "replay", "refusal": None, "products": 64,
        "scores": {"guidance_norm": scored} if scored is not None else {},
    }  # fmt: skip


def audit_document(
    prompts, seeds=(0, 1), *, kind="prompt", labels=None, failed=(), memorised=(), scores=True, size=64, reference=False
):
    """(audit.json, spectra) of prompts with seeds."""
    generator = np.random.default_rng(0)
    units, spectra = [], np.full((len(prompts) * len(seeds), len(SIGMAS), size), np.nan, np.float32)
    for p in range(len(prompts)):
        for s, seed in enumerate(seeds):
            i = p * len(seeds) + s
            dims = 3 if p in memorised else 8 + p % 3
            variance = float(generator.uniform(0.7, 1.3))
            for k, sigma in enumerate(SIGMAS):
                spectra[i, k] = spectrum(sigma, variance, dims, size)
            score = float(generator.normal(6.0 if p in memorised else 1.0, 0.3)) if scores else None
            steps = [step_of(sigma, spectra[i, k].astype(float), score) for k, sigma in enumerate(SIGMAS)]
            unit = {
                "index": i, "prompt": p, "seed": seed, "status": "done", "error": None, "image": f"images/{i:05d}.png",
                "steps": steps, "scores": {"guidance_norm": {"value": score, "sem": 0.0, "n": 1}} if scores else {},
                "manifold_dim": dims, "phases": {"trivial_boundary": [10.0, 3.0], "consolidation_boundary": [0.3, 0.05]},
                "non_finite": 0, "products": 64 * len(SIGMAS), "forwards": 500,
            }  # fmt: skip
            if i in failed:
                spectra[i] = np.nan
                unit |= {
                    "status": "failed", "image": None, "steps": [], "scores": {}, "manifold_dim": None, "phases": {}, "products": 0,
                    "forwards": 0, "error": {"type": "RuntimeError", "message": "the <b>poisoned</b> prompt raised"},
                }  # fmt: skip
            units.append(unit)
    done = [u for u in units if u["status"] == "done"]
    labels = list(labels) if labels is not None else [None] * len(prompts)
    entries = [_prompt(p, prompt, labels[p], [u for u in units if u["prompt"] == p]) for p, prompt in enumerate(prompts)]
    ranked = sorted((e for e in entries if e["combined"]), key=lambda e: -e["combined"]["value"]) if len(entries) > 2 else []
    for entry in entries:
        entry["combined"] = entry["combined"] if entry in ranked else None
    for rank, entry in enumerate(ranked, start=1):
        between = [max(1, rank - 1), min(len(ranked), rank + 1)] if len(seeds) > 1 else None
        entry |= {"rank": rank, "rank_interval": between, "flagged": entry["combined"]["value"] > 4.0}
    document = {
        "schema": "diffusers_geometry.audit/1",
        "model": {
            "name": "someone/linear-manifold", "revision": "5e1c" * 10, "pipeline": "StableDiffusionPipeline",
            "scheduler": {"class": "DDIMScheduler", "config": {"beta_start": 0.001}}, "dtype": "float32", "device": "cpu",
            "weights": {"unet/diffusion_pytorch_model.safetensors": "ab" * 32}, "weights_sha256": "cd" * 32,
        },
        "request": {
            "kind": kind, "prompts": list(prompts), "prompts_sha256": "ef" * 32, "seeds": list(seeds),
            "call": {"num_inference_steps": 50, "guidance_scale": 4.0}, "options": {"of": "denoised", "record_steps": len(SIGMAS)},
            "scores": ["guidance_norm", "psi"] if scores else [], "labels": labels, "reference": None,
        },
        "plan": {
            "units": len(units), "products": 64 * len(SIGMAS) * len(units), "forwards": 500 * len(units), "seconds": 60.0,
            "memory_bytes": 5 << 20, "method": "dense", "engine": "replay", "dimension": size,
        },
        "steps": [
            {"position": 10 * k, "timestep": 999 - 150 * k, "sigma": s, "alpha_t": 1.0, "sigma_t": s} for k, s in enumerate(SIGMAS)
        ] if done else [],
        "geometry": [_geometry([u["steps"][k] for u in done]) for k in range(len(SIGMAS))] if done else [],
        "manifold_dim": {**estimate([u["manifold_dim"] for u in done]), "share": 1.0} if done else None,
        "prompts": entries,
        "memorization": _memorization(bool(ranked), any(label is not None for label in labels), scores),
        "health": _health(failed),
        "out_of_distribution": _reference(done) if reference else None,
        "units": units,
        "provenance": {
            "versions": {"diffusers_geometry": "0.1.0", "torch": "2.13.0"}, "threads": 1,
            "command": "hf-geometry audit someone/linear-manifold --prompts prompts.txt --seeds 0-1 --output audit",
            "repeat": "hf-geometry audit --repeat audit --output again",
        },
        "run": {
            "started": "2026-11-25T20:00:00+00:00", "finished": "2026-11-25T20:10:00+00:00", "seconds": 300.0,
            "unit_seconds": [2.5] * len(units), "processes": 2, "host": "a-machine",
        },
    }  # fmt: skip
    return document, spectra if done else spectra[:, :0, :0]


def _prompt(index, prompt, label, units):
    done = [u for u in units if u["status"] == "done"]
    scored = [u["scores"]["guidance_norm"]["value"] for u in done if u["scores"]]
    return {
        "index": index, "prompt": prompt, "sha256": "01" * 32, "label": label, "units": [u["index"] for u in units],
        "scores": {"guidance_norm": estimate(scored)} if scored else {}, "combined": estimate(scored), "rank": None,
        "rank_interval": None, "flagged": None, "psi": estimate([u["steps"][-1]["psi"] for u in done]),
        "manifold_dim": estimate([u["manifold_dim"] for u in done]), "agreement": None,
    }  # fmt: skip


def _geometry(steps):
    names = ("psi", "nu", "delta", "effective_dimension", "gap_dim", "flipd", "spectral_norm", "asymmetry")
    phases = [s["phase"] for s in steps]
    return {n: estimate([s[n] for s in steps]) for n in names} | {
        "phases": {p: phases.count(p) / len(phases) for p in sorted(set(phases))}
    }


def _memorization(ranked, labelled, scores):
    quality = {"auroc": None, "tpr_at_1_fpr": None, "roc": None}
    if labelled and ranked:
        quality = {
            "auroc": {"value": 0.97, "low": 0.93, "high": 1.0}, "tpr_at_1_fpr": {"value": 0.8, "low": 0.6, "high": 1.0},
            "roc": {"fpr": [0.0, 0.0, 0.25, 1.0], "tpr": [0.0, 0.8, 1.0, 1.0]},
        }  # fmt: skip
    known = {
        "source": "Wen et al., 2024",
        "url": "https://arxiv.org/abs/2407.21720",
        "correlation_with_combined": 0.9 if ranked else None,
    }
    listed = [
        {"name": "guidance_norm", "formula": "|e_c - e_u|", "higher_is_memorised": True, "forwards": 12, **known, **quality},
        {"name": "psi", "formula": "sum of log s_i", "higher_is_memorised": False, "forwards": 0, **known,
         "url": "javascript:alert(1)", **quality,
         **({"auroc": {"value": 0.88, "low": 0.8, "high": 0.95}} if quality["auroc"] else {})},
    ]  # fmt: skip
    combined = {
        "weights": {"guidance_norm": 0.7, "psi": 0.3} if ranked else {}, "threshold": 4.0 if ranked else None, **quality,
        "fitted_on": ("labels" if labelled else "robust z") if ranked else None,
        "certainty": "Prompts unlike the bulk are flagged; of a normal bulk, 1 in 30,000." if ranked else "No score was taken.",
    }  # fmt: skip
    return {"scores": listed if scores else [], "combined": combined}


def _health(failed):
    checks = [
        {
            "name": "failed_units",
            "value": len(failed),
            "limit": 0,
            "ok": not failed,
            "meaning": "units that raised",
            "units": list(failed),
        },
        {"name": "asymmetry", "value": 0.05, "limit": 0.5, "ok": True, "meaning": "|D' - D'^T| / |D' + D'^T|", "units": []},
        {"name": "certificate_error", "value": None, "limit": 3e-5, "ok": None, "meaning": "of the probed denoiser", "units": []},
    ]
    return {"ok": not failed, "checks": checks}


def _reference(done):
    rows = [
        {"index": u["index"], "p_value": 0.004 if n == 0 else 0.5, "score": 9.0 if n == 0 else 1.0,
         "steps": [{"psi": 0.002 if n == 0 and k == 2 else 0.4, "nu": 0.5} for k in range(len(SIGMAS))]}
        for n, u in enumerate(done)
    ]  # fmt: skip
    return {
        "reference": {"name": "someone/base", "sha256": "23" * 32, "units": 99}, "quantities": ["psi", "nu"],
        "false_alarm_rate": 0.01,
        "expected_false_alarms": 0.01 * len(done), "explanation": "At most 1 % of units like the reference's would be flagged.",
        "units": rows, "flagged": [done[0]["index"]],
    }  # fmt: skip


def write_audit(folder, document, spectra, side=28):
    """Writes the documents, and an image for every unit that has one."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "audit.json").write_text(json.dumps(document))
    sigma = np.full(spectra.shape[:2], np.nan)
    save_file({"singular_values": np.ascontiguousarray(spectra), "sigma": sigma}, str(folder / "spectra.safetensors"))
    for unit in document["units"]:
        if unit["image"]:
            rows, columns = np.mgrid[:side, :side] / side
            waves = np.sin(6 * rows * (1 + unit["index"] % 4) + 5 * columns * (1 + unit["index"] % 3) + unit["index"])
            image = (127 + 127 * np.stack([waves, waves * columns, waves * rows], axis=-1)).astype(np.uint8)
            Image.fromarray(image).save(folder / unit["image"])
    return folder
