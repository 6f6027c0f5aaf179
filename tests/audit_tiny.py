"""Tiny models to audit, and what two audits share bit for bit. Importable without pytest, so that worker processes start fast."""

import json
import multiprocessing
import os
import signal
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import torch
from diffusers import EDMEulerScheduler
from safetensors import safe_open
from tiny import quiet, randomised, sd_pipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers_geometry import GeometryVectorPipeline, VectorNetwork
from diffusers_geometry.audit import audit_model

STEPS = {"num_inference_steps": 6}
TEXT_CALL = {"num_inference_steps": 6, "height": 16, "width": 16, "guidance_scale": 5.0}
TEXT_PROBES = {"record_steps": 2, "spectrum": "golub_kahan", "num_singular_values": 3, "probe_tolerance": 0.1, "progress": False}
TEXT_SCORES = ("guidance_norm", "anisotropy", "commitment", "flipd")
TEXT_OPTIONS = {"call": TEXT_CALL, "scores": TEXT_SCORES, **TEXT_PROBES}


def vector_pipeline(scale=0.3):
    """Eight numbers a sample: a unit takes milliseconds."""
    network = randomised(VectorNetwork(dim=8, width=16, num_blocks=1), scale=scale)
    return quiet(GeometryVectorPipeline(network, EDMEulerScheduler()))


def text_pipeline(folder):
    """Stable Diffusion of random weights that knows the words a, b, c and d; the embedding of d is NaN."""
    folder.mkdir(parents=True, exist_ok=True)
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "b</w>": 3, "c</w>": 4, "d</w>": 5}
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": len(words)}
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=5)
    encoder = randomised(
        CLIPTextModel(CLIPTextConfig(max_position_embeddings=5, bos_token_id=0, eos_token_id=1, **sizes)), scale=1.0
    )
    with torch.no_grad():
        encoder.get_input_embeddings().weight[5] = torch.nan
    pipe = sd_pipeline()
    pipe.register_modules(tokenizer=tokenizer, text_encoder=encoder)
    return quiet(pipe)


def audit_vectors(folder, count=12, **options):
    """An audit of ``count`` seeds."""
    options = {"call": STEPS, "record_steps": 3, "progress": False, **options}
    pipe = options.pop("pipe", None) or vector_pipeline()
    return audit_model(pipe, seeds=range(count), output_dir=folder, **options)


def contents(folder):
    """Everything that two audits of one plan share: units, arrays, documents, spectra, images."""
    folder, found = Path(folder), {}
    for path in sorted(folder.glob("units/*")):
        if path.suffix == ".json":
            found[path.name] = json.loads(path.read_text())["error"]
            continue
        with safe_open(path, "np") as unit:
            found[path.name] = unit.metadata()["unit"]
            found |= {f"{path.name}/{name}": unit.get_tensor(name).tobytes() for name in sorted(unit.keys())}
    document = json.loads((folder / "audit.json").read_text())
    found["audit.json"] = {name: value for name, value in document.items() if name != "run"}
    found |= {path.name: path.read_bytes() for path in [folder / "spectra.safetensors", *sorted(folder.glob("images/*"))]}
    return found


def assert_same(one, other):
    one, other = contents(one), contents(other)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


def spectra(folder):
    with safe_open(Path(folder) / "spectra.safetensors", "np") as file:
        return {name: np.array(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (a file is no dict)


def workers():
    """Processes that start from a server that has imported everything, so that one is there in a moment."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["audit_tiny"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), before]))  # the server has no other path
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    return context


def run_vectors(folder, options):
    """What a worker process does; it can be interrupted even if the tests run as a background job, which cannot."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["OMP_NUM_THREADS"] = "1"
    audit_vectors(folder, **options)
