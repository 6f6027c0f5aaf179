"""A page to watch the geometry of a diffusion model's score while it generates; runs here and as a Space of the Hub.

python examples/space/app.py                       # then open http://127.0.0.1:7860
"""

from __future__ import annotations

import argparse
import functools
import inspect
import queue
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from diffusers_geometry import GeometryTrace
from diffusers_geometry.bundled import DIGITS
from diffusers_geometry.hub import snapshot
from diffusers_geometry.loading import UsageError, call_arguments, load_pipeline, one_line

HERE = Path(__file__).resolve().parent
ZOO = next((folder for folder in (HERE / "zoo", HERE.parent / "zoo") if folder.is_dir()), HERE / "zoo")
MODELS = {"digits": DIGITS} | {path.parent.name: path.parent for path in sorted(ZOO.glob("*/model_index.json"))}
EXAMPLES = [
    ["digits", "", "", 50],
    ["sd-mnist", "a thick slanted seven", "", 30],
    ["sd-mnist", "the amber forest", "", 30],
    ["dit-mnist", "", "4", 30],
    ["linear-manifold", "", "", 50],
]  # model, prompt, class, steps; the second caption of sd-mnist is one that it recites
MAX_STEPS, MAX_RECORDED, MAX_BYTES = 200, 24, 8 * 2**30
COLUMNS = {
    "step": "step", "sigma": "noise σ", "phase": "phase", "psi": "ψ (nats)", "psi_rank": "of", "nu": "ν",
    "effective_dimension": "tr D'", "gap_dim": "largest gap at", "asymmetry": "asymmetry", "products": "products",
}  # fmt: skip
ABOUT = f"""# The geometry of a score, while it generates
D' is the derivative of the denoised sample by the noisy one; its large singular values are the directions that the model keeps. At
high noise there are none (trivial), then they come up (coverage), and at last those along the data stay while all others vanish
(consolidation). Pick a model, press **Generate** and watch: the spectrum, the phase, the volume ψ, the directions in use ν, and the
effective dimension tr D'. Models here: {", ".join(f"`{name}`" for name in MODELS)}; any other by its Hub id, such as `org/name`."""


class Stopped(Exception):
    """Ends a run whose reader has gone."""


@functools.lru_cache(maxsize=2)
def loaded(model: str) -> Any:
    """The pipeline of a name of this page, a folder or a Hub id."""
    if not model.strip():
        raise UsageError("no model. Expected one of the list, or a Hub id such as org/name.")
    path = MODELS.get(model) or snapshot(model.strip(), max_bytes=MAX_BYTES).path
    pipe = load_pipeline(str(path))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_of(pipe: Any, prompt: str, label: str, steps: float | None, seed: float | None) -> dict[str, Any]:
    """Arguments of the pipeline's call from the fields of the page; UsageError says which field is wrong."""
    for name, value, least, most in (("Steps", steps, 2, MAX_STEPS), ("Seed", seed, 0, 2**32 - 1)):
        if value is None or value != int(value) or not least <= value <= most:
            raise UsageError(f"{name} is {value}. Expected a whole number from {least} to {most}.")
    if label.strip() and not label.strip().isdecimal():
        raise UsageError(f"Class is {label!r}. Expected a whole number, or nothing.")
    takes = inspect.signature(type(pipe).__call__).parameters
    for name, value, argument in (("Prompt", prompt, "prompt"), ("Class", label, "class_labels")):
        if value.strip() and argument not in takes:
            raise UsageError(f"{name} is {value.strip()!r}, but this model ({type(pipe).__name__}) takes none. Expected it empty.")
        needed = argument in takes and (argument == "prompt" or takes[argument].default is inspect.Parameter.empty)
        if needed and not value.strip():
            raise UsageError(f"{name} is empty. Expected one for this model ({type(pipe).__name__}).")
    labels, known = [int(label)] if label.strip() else None, getattr(pipe, "labels", None)
    if labels and known and labels[0] not in known.values():
        said = ", ".join(f"{i} ({name})" for i, name in sorted((i, name) for name, i in known.items()))
        raise UsageError(f"Class is {labels[0]}. Expected one of {said}.")
    return call_arguments(pipe, prompt.strip() or None, labels, int(steps), int(seed), [])


def watch(pipe: Any, **arguments: Any) -> Iterator[GeometryTrace]:
    """The trace so far after every recorded step, while the pipeline waits there; at last the whole one with its images."""
    made, left = queue.SimpleQueue(), threading.Event()

    def seen(trace: GeometryTrace) -> None:
        if left.is_set():
            raise Stopped
        made.put(trace)

    def run() -> None:
        try:
            made.put(pipe.analyze_geometry(**arguments, watch=seen, progress=False))
        except BaseException as error:  # handed over to the reader, who raises it
            made.put(error)

    thread = threading.Thread(target=run, name="geometry", daemon=True)
    thread.start()
    try:
        while True:
            item = made.get()
            if isinstance(item, BaseException):
                raise item
            yield item
            if item.images is not None:
                return
    finally:
        left.set()
        thread.join()


def figure_of(trace: GeometryTrace, recorded: int) -> Any:
    """The trace's figure on an axis that has room for all the steps to come."""
    figure = trace.plot()
    figure.axes[0].set_xlim(-0.5, recorded - 0.5)  # shared by the three panels
    return figure


def said_of(trace: GeometryTrace, recorded: int, done: bool) -> str:
    """One line about the newest step, or about the whole run."""
    row = trace.rows()[-1]
    numbers = [
        f"{name} {row[key]:.4g}"
        for key, name in (("psi", "ψ"), ("nu", "ν"), ("effective_dimension", "tr D'"))
        if row[key] is not None
    ]
    sigma = "∞" if row["sigma"] is None else f"{row['sigma']:.3g}"
    if not done:
        return f"Recorded step {len(trace.steps)} of {recorded}: σ {sigma}, {row['phase']}, {', '.join(numbers)}"
    dim, size = trace.manifold_dims[0], trace.settings["plan"]["size"]
    read = f"manifold dimension {dim} of {size}" if dim is not None else "no consolidation phase, so no manifold dimension"
    return f"Done: {read}; {sum(step.products for step in trace.steps)} Jacobian products ({trace.settings['plan']['method']})."


def table_of(trace: GeometryTrace) -> list[list[Any]]:
    """The rows of the table, numbers as text."""
    rows = [[row[key] for key in COLUMNS] for row in trace.rows()]
    return [["–" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in row] for row in rows]


def image_of(trace: GeometryTrace) -> Any:
    """The generated image, enlarged without smoothing; None where the pipeline makes no image."""
    from PIL import Image

    image = trace.images[0] if isinstance(trace.images, list) else None
    scale = 1 if image is None else max(1, 256 // max(image.size))
    return image and image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def pack(trace: GeometryTrace, folder: Path) -> str:
    """The trace's files and figure as one archive."""
    trace.save_pretrained(folder / "geometry", figure="geometry.png")
    with zipfile.ZipFile(folder / "geometry.zip", "w") as archive:
        for path in sorted((folder / "geometry").iterdir()):
            archive.write(path, f"geometry/{path.name}")
    return str(folder / "geometry.zip")


def generate(model: str, prompt: str, label: str, seed: float, steps: float, recorded: float, values: float) -> Iterator[tuple]:
    """What the page shows, step by step: line, figure, table, image, archive."""
    yield f"Loading {model} ...", None, [], None, gr.DownloadButton(value=None, interactive=False)
    try:
        pipe = loaded(model)
        call = call_of(pipe, prompt, label, steps, seed)
        recorded = min(int(recorded), int(steps))
        size = None if not values else int(values)
        for trace in watch(pipe, **call, record_steps=recorded, num_singular_values=size):
            total = max(recorded, len(trace.steps))
            done = trace.images is not None
            shown = said_of(trace, total, done), figure_of(trace, total), table_of(trace)
            if not done:
                yield *shown, None, gr.skip()
                continue
            with tempfile.TemporaryDirectory() as folder:  # gradio copies what it serves
                yield *shown, image_of(trace), gr.DownloadButton(value=pack(trace, Path(folder)), interactive=True)
    except (UsageError, ValueError, TypeError, RuntimeError, FloatingPointError, OSError) as error:
        yield f"Cannot run: {one_line(error)}", None, [], None, gr.skip()


def page() -> gr.Blocks:
    """The page; no fonts or scripts from elsewhere."""
    with gr.Blocks(title="Geometry of a diffusion model", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.Markdown(ABOUT)
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                model = gr.Dropdown(
                    list(MODELS),
                    value="digits",
                    label="Model",
                    info="listed, or a Hub id",
                    allow_custom_value=True,
                    elem_id="model",
                )
                prompt = gr.Textbox(label="Prompt", info="for models of text", elem_id="prompt")
                label = gr.Textbox(label="Class", info="for models of classes, a number", elem_id="class")
                seed = gr.Number(0, label="Seed", elem_id="seed")
                steps = gr.Number(50, label="Steps", info=f"2 to {MAX_STEPS}", elem_id="steps")
                recorded = gr.Slider(
                    2, MAX_RECORDED, value=12, step=1, label="Recorded steps", info="each takes a Jacobian", elem_id="recorded"
                )
                values = gr.Slider(
                    0,
                    256,
                    value=0,
                    step=8,
                    label="Largest singular values",
                    info="0: all of a small model, 16 of a large one",
                    elem_id="values",
                )
                with gr.Row():
                    start, stop = gr.Button("Generate", variant="primary"), gr.Button("Stop")
                gr.Examples(EXAMPLES, [model, prompt, label, steps])
            with gr.Column(scale=2, min_width=420):
                line = gr.Textbox(label="Now", interactive=False, elem_id="now")
                figure = gr.Plot(show_label=False, elem_id="figure")
            with gr.Column(scale=1, min_width=280):
                image = gr.Image(label="Generated", interactive=False, height=300, elem_id="image")
                archive = gr.DownloadButton("Download the trace", interactive=False, elem_id="archive")
        table = gr.Dataframe(headers=list(COLUMNS.values()), label="Recorded steps", interactive=False, elem_id="table")
        run = start.click(generate, [model, prompt, label, seed, steps, recorded, values], [line, figure, table, image, archive])
        stop.click(lambda: "Stopped.", None, line, cancels=[run])
    return blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, help="Free port from 7860 on if not given.")
    parser.add_argument("--host", help="Address to listen on; a Space sets its own.")
    args = parser.parse_args()
    page().queue(default_concurrency_limit=1).launch(server_port=args.port, server_name=args.host, show_error=True)


if __name__ == "__main__":
    main()
