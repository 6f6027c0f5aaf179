"""``hf-geometry train-reward`` and ``hf-geometry generate``: label, train, steer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_options import Call, ClassLabel, Device, Dtype, Model, Seed, Steps
from .loading import UsageError, call_arguments, check_writable, load_pipeline, one_line, step_choice

DESCRIPTORS = ("psi", "nu", "delta")
_STEPS_REFUSED = "is not a choice of steps. Expected a number, or positions 20,30,40"


def register(app: typer.Typer) -> None:
    """Adds the two commands."""
    app.command("train-reward")(train_reward)
    app.command("generate")(generate)


def train_reward(
    model: Model = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file with one prompt a line, for pipelines that take one.")] = None,
    class_label: ClassLabel = None,
    output: Annotated[Path, typer.Option(help="Folder for the reward, its card and its labels.")] = Path("reward"),
    seeds: Annotated[int, typer.Option(help="Generations per prompt or label, seeds 0, 1, ...")] = 512,
    steps: Steps = 50,
    record_steps: Annotated[str, typer.Option(help="How many loop positions to label, or positions such as 20,30,40.")] = "8",
    descriptor: Annotated[str, typer.Option(help="What to predict: psi, nu or delta.")] = "psi",
    psi_rank: Annotated[int, typer.Option(help="Singular values that psi sums.")] = 16,
    spectrum: Annotated[str, typer.Option(help="auto, dense, golub_kahan or randomized.")] = "auto",
    delta: Annotated[bool, typer.Option(help="Label delta too, by 32 evaluations of the network a label.")] = True,
    batch_size: Annotated[int, typer.Option(help="Generations at once.")] = 16,
    head: Annotated[str, typer.Option(help="bins (per noise level) or value.")] = "bins",
    trunk: Annotated[
        str, typer.Option(help="network (a copy of the model's encoder), small, or auto: network if it can.")
    ] = "auto",
    train_steps: Annotated[int, typer.Option(help="Optimiser steps, at most.")] = 4000,
    plan_only: Annotated[bool, typer.Option("--plan", help="Only say what the labels would cost.")] = False,
    max_seconds: Annotated[float | None, typer.Option(help="Refuse labels that would take longer.")] = None,
    call: Call = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
) -> None:
    """Label what a model generates with psi, nu and delta, and train a reward on one; run again to continue after a stop."""
    from .dataset import DatasetRequest, generate_dataset, plan_dataset

    if trunk not in ("auto", "network", "small"):
        raise UsageError(f"--trunk {trunk!r} is not known. Expected auto, network or small.")
    if descriptor not in DESCRIPTORS or (descriptor == "delta" and not delta):
        raise UsageError(f"--descriptor {descriptor!r}{'' if delta else ' --no-delta'}. Expected one of {DESCRIPTORS}, labelled.")
    check_writable(output)
    pipe, arguments = _loaded(model, class_label, steps, 0, call, dtype, device, prompts)
    pipe.set_progress_bar_config(disable=True)
    kept = {k: v for k, v in arguments.items() if k not in ("generator", "prompt", "class_labels")}
    request = DatasetRequest(
        prompts=_lines(prompts), class_labels=tuple(class_label) if class_label else None, seeds=range(seeds), spectrum=spectrum,
        record_steps=step_choice("--record-steps", record_steps, _STEPS_REFUSED, all_allowed=False), psi_rank=psi_rank,
        batch_size=batch_size, call=kept, **({} if delta else {"delta_radius": None}),
    )  # fmt: skip
    print(plan_dataset(pipe, request).table())
    if plan_only:
        return
    generate_dataset(pipe, output / "labels", request, max_seconds=max_seconds)
    _train(pipe, model, output, trunk, {"descriptor": descriptor, "head": head}, train_steps)


def _train(pipe: Any, model: str | None, output: Path, trunk: str, config: dict[str, str], train_steps: int) -> None:
    from accelerate import PartialState

    from .dataset import GeometryDataset
    from .reward_card import save_reward
    from .reward_networks import copied_network
    from .reward_training import TrainingOptions
    from .reward_training import train_reward as train

    parts, options = (
        [GeometryDataset(output / "labels", split) for split in ("train", "held_out")],
        TrainingOptions(steps=train_steps),
    )
    copied = trunk == "network" or (trunk == "auto" and copied_network(pipe) is not None)
    start_from = pipe if copied else None
    reward, metrics = train(*parts, options=options, start_from=start_from, checkpoint=output / "checkpoint", **config)
    if PartialState().is_main_process:
        made_of = {"model": model or "the bundled digits", "scheduler": parts[0].manifest["model"]["scheduler"]["class"]}
        made_of |= {"trunk": "a copy of the model's encoder" if copied else "small, its own"}
        if reward.config.descriptor == "delta":
            asked = parts[0].request
            made_of["delta"] = (
                f"knots within {asked.delta_radius:g} of the noise per coordinate, {asked.delta_directions} directions, "
                f"mean of {asked.delta_draws} draws"
            )
        save_reward(reward, metrics, output, made_of=made_of)
        shutil.rmtree(output / "checkpoint", ignore_errors=True)
        print(
            f"Spearman {metrics.spearman:.3f}, R² {metrics.r_squared:.3f} within noise levels; {metrics.test_samples} test labels"
        )
        print(f"Reward and card in {output}/")


def generate(
    model: Model = None,
    reward: Annotated[Path | None, typer.Option(help="Folder of a reward; without one nothing is steered.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Text prompt, for pipelines that take one.")] = None,
    class_label: ClassLabel = None,
    scale: Annotated[float, typer.Option(help="Positive raises what the reward predicts, negative lowers it.")] = 1.0,
    start: Annotated[float, typer.Option(help="First share of the run that is guided.")] = 0.2,
    stop: Annotated[float, typer.Option(help="Last share.")] = 0.8,
    target: Annotated[float | None, typer.Option(help="Value to come to.")] = None,
    target_bin: Annotated[int | None, typer.Option(help="Bin to come to.")] = None,
    trust_radius: Annotated[float, typer.Option(help="Largest change of x_0, in units of the model's own.")] = 1.0,
    steps: Steps = 50,
    seed: Seed = 0,
    output: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("generated"),
    call: Call = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: every guided step.")] = False,
) -> None:
    """Generate, steered by a reward, and say what guidance did at every step."""
    from .guidance import GeometryGuidance, guided
    from .reward import GeometryReward

    if reward is None and (target is not None or target_bin is not None):
        raise UsageError("--target and --target-bin need a reward. Expected --reward FOLDER.")
    check_writable(output)
    pipe, arguments = _loaded(model, class_label, steps, seed, call, dtype, device, prompt)
    if reward is None:
        written = _write(pipe(**arguments), output)
        print(json.dumps({"files": written, "steps": []}) if as_json else f"{len(written)} files in {output}/, not guided")
        return
    try:
        loaded = GeometryReward.from_pretrained(reward).to(device)
    except OSError as error:
        raise UsageError(f"no reward in {reward}: {one_line(error)}. Expected a folder that train-reward wrote.") from error
    guidance = GeometryGuidance(loaded, scale, start, stop, target, target_bin, trust_radius=trust_radius)
    with guided(pipe, guidance) as run:
        written = _write(pipe(**arguments), output)
    rows = [
        {"position": s.position, "sigma": s.sigma, "scale": s.scale, "predicted": s.value.tolist(),
         "share_of_estimate": (s.shift / s.denoised).tolist()} for s in run.log
    ]  # fmt: skip
    if as_json:
        print(json.dumps({"files": written, "steps": rows}, indent=1))
        return
    for row in rows:
        numbers = "  ".join(f"{v:8.3f} ({share:.1%})" for v, share in zip(row["predicted"], row["share_of_estimate"], strict=True))
        print(
            f"step {row['position']:>4}  sigma {row['sigma']:8.4g}  predicted {loaded.config.descriptor} (change of x_0): {numbers}"
        )
    print(f"{len(written)} files in {output}/")


def _loaded(
    model: str | None, labels: list[int] | None, steps: int, seed: int, call: list[str] | None, dtype: str, device: str, prompt: Any
) -> tuple[Any, dict[str, Any]]:
    """The pipeline and its call's arguments; a file of prompts is shown to the checks by its first line."""
    pipe = load_pipeline(model, dtype, device)
    prompt = _lines(prompt)[0] if isinstance(prompt, Path) else prompt
    return pipe, call_arguments(pipe, prompt, labels, steps, seed, call or [])


def _lines(path: Path | None) -> tuple[str, ...] | None:
    if path is None:
        return None
    try:
        lines = tuple(dict.fromkeys(line.strip() for line in path.read_text().splitlines() if line.strip()))
    except OSError as error:
        raise UsageError(f"cannot read --prompts {path}: {one_line(error)}. Expected a text file, one prompt a line.") from error
    if not lines:
        raise UsageError(f"--prompts {path} holds no prompt. Expected one a line.")
    return lines


def _write(made: Any, folder: Path) -> list[str]:
    """Images as PNG, anything else as one NumPy file."""
    import numpy as np

    from .analyze import made_by

    folder.mkdir(parents=True, exist_ok=True)
    images = made_by(made)
    if isinstance(images, list) and all(hasattr(image, "save") for image in images):
        for i, image in enumerate(images):
            image.save(folder / f"image-{i:03d}.png")
        return [f"image-{i:03d}.png" for i in range(len(images))]
    array = images.float().cpu().numpy() if hasattr(images, "cpu") else np.asarray(images)
    np.save(folder / "samples.npy", array, allow_pickle=False)
    return ["samples.npy"]
