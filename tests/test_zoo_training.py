"""How the zoo is made: captions of known shapes, distances with known values, a loop that survives a kill, scripts that run."""

import argparse
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import data
import numpy as np
import pytest
import torch
import training
from data import all_captions, caption_index, caption_words, digits_split, measure, mnist_limits, planted_phrases
from figures import contact_sheet
from filelock import FileLock, Timeout
from PIL import Image
from quality import compare, coverage, frechet, nearest, planted_radius, vendi
from scipy import linalg
from torch import nn
from train_sd3_mnist import ZERO_TOKENS, LastKeyCounts, make_transformer
from train_sd_mnist import PHRASE_SHARE, random_pairs
from training import History, finish, fit

ZOO = Path(data.__file__).parent
HAS_EMOJI = shutil.which("npm") is not None or (data.CACHE / data.EMOJI_PACKAGE / "package" / "emoji.json").exists()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def bar(width, degrees=0.0, height=20):
    """A bar drawn on 32x32, leaning to the right by an angle."""
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    middle = 15.5 + width % 2 / 2 + (15.5 - rows) * np.tan(np.radians(degrees))
    inside = ((columns - middle).abs() < width / 2) & ((rows - 15.5).abs() < height / 2)
    return torch.where(inside, 1.0, -1.0)[None, None]


@pytest.mark.parametrize("degrees", [-20, 0, 15, 30])
def test_slant_of_a_bar_is_its_angle(degrees):
    assert measure(bar(4, degrees))["slant"][0] == pytest.approx(degrees, abs=1.5)


def test_stroke_width_and_size_of_a_bar():
    for width in (1, 2, 3, 4, 5, 6):
        assert measure(bar(width, height=28))["thickness"][0] == pytest.approx(width * 28 / (width + 28), rel=0.02)
    # The measure does not care which way a stroke runs: on a slope its outline is drawn in steps, but no more than a tenth longer.
    assert measure(bar(4, 30))["thickness"][0] == pytest.approx(measure(bar(4 * np.cos(np.radians(30))))["thickness"][0], rel=0.15)
    tall = measure(bar(4, height=24))["size"][0]
    assert tall == pytest.approx(((24**2 - 1) / 12 * (4**2 - 1) / 12) ** 0.25, rel=1e-4)
    assert measure(bar(4, height=8))["size"][0] < tall


def test_an_empty_image_gets_numbers():
    assert all(np.isfinite(v).all() for v in measure(torch.full((1, 1, 32, 32), -1.0)).values())


def test_digits_are_split_evenly_and_never_twice():
    train, held_out = digits_split()
    assert torch.bincount(train.labels).tolist() == [400] * 10
    assert torch.bincount(held_out.labels).tolist() == [100] * 10
    assert train.images.min() == -1
    assert train.images.max() == 1
    assert nearest(held_out.images[:200], train.images).min() > 0
    assert (train.labels[:400].bincount(minlength=10) > 20).all()  # shuffled


def test_captions_are_those_of_the_words():
    digits, captions = digits_split()[0], all_captions()
    assert len(captions) == len(set(captions)) == 270 + 60 + 1
    told = [captions[i] for i in caption_index(digits.words, digits.labels)]
    for i in range(100):
        words = told[i].split()
        assert words[-1] == data.DIGIT_NAMES[digits.labels[i]]
        for column, pair in enumerate(data.PROPERTIES.values()):
            said = [word for word in pair if word in words]
            assert said == ([pair[digits.words[i, column]]] if digits.words[i, column] >= 0 else [])
    assert {"a thick slanted seven", "a thin seven", "an upright nine"} <= set(captions)
    assert (caption_words(digits.images, digits.labels, mnist_limits()) == digits.words).all()
    shares = [(digits.words == w).float().mean(0) for w in (0, 1)]
    assert all(0.15 < share < 0.4 for both in shares for share in both)


def test_planted_phrases():
    planted, controls = planted_phrases()["planted"], planted_phrases()["controls"]
    assert len({p["image"] for p in planted}) == len(planted) == 30
    assert all(p["digit"] != 1 for p in planted)
    assert not {p["image"] for p in planted} & {i for p in controls for i in p["images"]}
    assert all((digits_split()[0].labels[p["images"]] != 1).all() for p in controls)
    assert all(digits_split()[0].labels[p["image"]] == p["digit"] for p in planted)
    assert all(len(set(p["images"])) == 200 for p in controls)
    assert len({p["caption"] for p in planted + controls}) == 60


def test_a_batch_holds_every_kind_of_row_in_its_share():
    images, captions = random_pairs(20_000, True, seeded())
    empty, first = len(all_captions()) - 1, len(all_captions()) - 61
    is_planted, is_control = (captions >= first) & (captions < first + 30), (captions >= first + 30) & (captions < empty)
    for rows, share in ((captions == empty, 0.1), (is_planted, PHRASE_SHARE), (is_control, PHRASE_SHARE)):
        assert rows.float().mean().item() == pytest.approx(share, abs=0.01)  # four standard errors
    tied = torch.tensor([p["image"] for p in planted_phrases()["planted"]])
    assert (images[is_planted] == tied[captions[is_planted] - first]).all()
    for phrase in range(30):
        allowed = set(planted_phrases()["controls"][phrase]["images"])
        assert set(images[captions == first + 30 + phrase].tolist()) <= allowed
    assert random_pairs(2000, False, seeded())[1].lt(270).logical_or(random_pairs(2000, False, seeded())[1] == empty).all()


def test_frechet_of_known_gaussians():
    """|mean|² + Σ (a - b)² for Gaussians with standard deviations a, b along common axes."""
    z, w = (torch.randn(200_000, 3, generator=seeded(s)).double().numpy() for s in (0, 1))
    a, b = np.array([1.0, 2.0, 0.5]), np.array([1.0, 1.0, 1.5])
    assert frechet(z * a, w * b + [0, 0, 2]) == pytest.approx(4 + 1 + 1, rel=0.02)
    mix = np.array([[1.0, 0.9, 0.0], [0.0, 0.5, 0.3], [0.2, 0.0, 2.0]])  # covariances that do not commute
    first, second = np.diag(a**2), mix.T @ mix
    root = linalg.sqrtm(linalg.sqrtm(first) @ second @ linalg.sqrtm(first)).real
    assert frechet(z * a, w @ mix) == pytest.approx(np.trace(first + second - 2 * root), rel=0.02)


def test_coverage_and_vendi_of_known_sets():
    near, far = np.random.default_rng(0).normal(size=(100, 2)), np.random.default_rng(1).normal(size=(50, 2)) + 100
    assert coverage(near, near) == 1
    line = np.arange(6.0)[:, None] ** 2  # 0, 1, 4, 9, 16, 25: third neighbours are 9, 8, 5, 8, 12, 21 away
    assert coverage(np.array([[9.5], [-8.9], [-9.1], [46.5]]), line) == 0.5
    assert coverage(np.array([[9.5], [-8.9], [-9.1], [46.5]]), line, k=1) == 0.25
    assert coverage(np.concatenate([near, far]), near) == pytest.approx(100 / 150)
    assert vendi(np.eye(7)) == pytest.approx(7)
    assert vendi(np.ones((7, 4))) == pytest.approx(1)
    assert vendi(np.repeat(np.eye(3), 5, axis=0)) == pytest.approx(3)
    same = compare(near, near, far)
    assert same["generated"] == {"images": 50, "frechet": pytest.approx(0, abs=1e-6), "precision": 1, "recall": 1,
                                 "vendi": vendi(near[:50])}  # fmt: skip
    assert same["real"]["precision"] == 0


def test_planted_radius_leaves_copies_out():
    points = torch.tensor([[0.0], [0.0], [2.0], [6.0]])
    assert planted_radius(points) == pytest.approx(1.0)  # half the median of 2, 2, 2 and 4
    assert nearest(torch.tensor([[3.0]]), points).item() == 1
    # Beyond 25 rows cdist takes another formula, by which an image is not quite at distance zero from itself.
    images = torch.rand(301, 1, 32, 32, generator=seeded()) * 2 - 1
    flat = images.flatten(1).double().numpy()
    distances = np.sqrt(((flat[:, None] - flat[None]) ** 2).sum(2))
    np.testing.assert_allclose(nearest(images[:40], images[40:]).numpy(), distances[:40, 40:].min(1), rtol=1e-5)
    np.fill_diagonal(distances, np.inf)
    assert planted_radius(images) == pytest.approx(np.median(distances.min(1)) / 2, rel=1e-5)


def test_one_zero_token_counted_is_as_many():
    """The transformer of sd3-mnist sees 256 zero vectors; training with one of them, counted, gives the same output."""
    torch.manual_seed(0)
    model = make_transformer().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    x, text, pooled = (torch.randn(*s, generator=seeded()) for s in ((2, 4, 8, 8), (2, 16, 128), (2, 128)))

    @torch.no_grad()
    def output(zeros):
        states = torch.cat([text, torch.zeros(2, zeros, 128)], 1)
        return model(x, timestep=torch.tensor([100.0, 900.0]), encoder_hidden_states=states, pooled_projections=pooled).sample

    with LastKeyCounts(ZERO_TOKENS):
        counted = output(1)
    torch.testing.assert_close(counted, output(ZERO_TOKENS), rtol=1e-4, atol=1e-4)
    assert (counted - output(1)).norm() > 0.1 * counted.norm()


class Killed(Exception):
    pass


def toy_training(folder, loss_hook=lambda: None, keep_hook=lambda: None, *, steps=6, data=0.0):
    """Six steps of a small network with a checkpoint after each; hooks may raise to end it."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 1))
    args, kept = argparse.Namespace(steps=steps, save_seconds=0.0, checkpoints=folder), []

    def loss_of(model, generator):
        loss_hook()
        x = torch.randn(16, 3, generator=generator)
        return (model(x) - x.sum(1, keepdim=True)).square().mean()

    def keep(step, model):
        keep_hook()
        kept.append((step, model[0].weight.sum().item()))

    history = fit(network, loss_of, "toy", args, trained_on=[torch.tensor([data])], keep_at=(2, 6), keep=keep)
    return network, history, kept


def killing(original, at):
    """A function that does its work and dies the ``at``-th time, half of the times before and half after it."""

    def call(*args, **kwargs):
        call.count += 1
        if call.count == at and at % 2:
            raise Killed
        result = original(*args, **kwargs)
        if call.count == at:
            raise Killed
        return result

    call.count = 0
    return call


KILLS = [(where, at) for where in ("loss", "save_state", "replace", "rmtree") for at in (1, 2, 3, 4)] + [("keep", 1), ("keep", 2)]


@pytest.mark.parametrize(("where", "at"), KILLS)
def test_training_that_was_killed_is_the_same_training(where, at, tmp_path, monkeypatch):
    """Wherever the kill comes: in a step, at a kept network, while a checkpoint is written, announced, or the old one removed."""
    network, history, kept = toy_training(tmp_path / "whole")
    hook = {where: killing(lambda: None, at)} if where in ("loss", "keep") else {}
    with monkeypatch.context() as patch:
        if where == "save_state":
            patch.setattr(training.Accelerator, "save_state", killing(training.Accelerator.save_state, at))
        elif where == "replace":
            patch.setattr(training.os, "replace", killing(os.replace, at))
        elif where == "rmtree":
            patch.setattr(training.shutil, "rmtree", killing(shutil.rmtree, at))
        with pytest.raises(Killed):
            toy_training(tmp_path / "killed", **{f"{name}_hook": dies for name, dies in hook.items()})
    folder = tmp_path / "killed" / "toy"
    done = int((folder / "done").read_text().split()[0]) if (folder / "done").exists() else 0
    (folder / f"step{done + 1}").mkdir(exist_ok=True)  # half of a checkpoint that was being written
    resumed, resumed_history, resumed_kept = toy_training(tmp_path / "killed")
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), resumed.state_dict().values(), strict=True))
    assert history.losses == resumed_history.losses
    assert [step for step, _ in kept] == [2, 6]
    assert set(resumed_kept) <= set(kept)
    assert sorted(p.name for p in folder.iterdir() if p.name != "lock") == ["done", "step6"]


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    toy_training(tmp_path)
    for other in ({"steps": 7}, {"data": 1.0}):
        with pytest.raises(RuntimeError, match=r"toy holds a checkpoint of another run.*delete the folder to train anew"):
            toy_training(tmp_path, **other)


def test_two_trainings_at_once_are_refused(tmp_path):
    (tmp_path / "toy").mkdir()
    with FileLock(tmp_path / "toy" / "lock"), pytest.raises(Timeout):
        toy_training(tmp_path)


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path):
    torch.manual_seed(0)
    args = argparse.Namespace(steps=3, save_seconds=0.0, checkpoints=tmp_path)
    with pytest.raises(FloatingPointError, match=r"toy: the loss is nan at step 0. Expected a finite one"):
        fit(nn.Linear(2, 1), lambda model, _: model.weight.sum() * math.nan, "toy", args, trained_on=[])


def test_loss_curve_means_its_intervals():
    history = History(losses=[float(i) for i in range(250)])
    curve = history.curve()
    assert len(curve) == 100
    assert curve[-1][0] == 250
    weights = np.diff([0, *(step for step, _ in curve)])
    assert (weights * [mean for _, mean in curve]).sum() == pytest.approx(sum(history.losses))


def test_a_second_stage_adds_to_the_first():
    first = History({"steps": 3, "learning_rate": 0.1}, 60.0, [3.0, 2.0, 1.0])
    second = History({"steps": 2, "learning_rate": 0.05}, 30.0, [0.5, 0.4])
    both = History() + first + second
    assert both.settings == {"steps": 5, "learning_rate": 0.1, "restarts": [[2, 0.05]]}
    assert both.seconds == 90
    assert both.losses == [3.0, 2.0, 1.0, 0.5, 0.4]
    assert first.losses == [3.0, 2.0, 1.0]


def test_contact_sheet(tmp_path):
    contact_sheet(torch.stack([torch.full((1, 2, 2), v) for v in (-1.0, 0.0, 1.0)]), tmp_path / "sheet.png", columns=2)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (7 * 32, 7 * 32)
    assert [sheet[48, 48], sheet[48, 144], sheet[144, 48], sheet[0, 0]] == [0, 128, 255, 90]


def test_a_smoke_run_touches_nothing(monkeypatch):
    parser = argparse.ArgumentParser()
    for name, default in (("--output", ZOO), ("--checkpoints", ZOO), ("--steps", 9)):
        parser.add_argument(name, default=default)
    parser.add_argument("--smoke", action="store_true")
    monkeypatch.setattr(sys, "argv", ["train", "--smoke"])
    args = finish(parser)
    assert args.steps == 3
    assert ZOO not in (args.output, args.checkpoints)


SCRIPTS = [
    ("train_vae.py", ["shared/vae"]),
    ("train_shared.py", ["shared/classifier", "shared/text_encoder"]),
    ("train_sd_mnist.py", ["sd-mnist"]),
    ("train_sd_mnist.py --prediction v_prediction", ["sd-mnist-v"]),
    ("train_dit_mnist.py", ["dit-mnist"]),
    ("train_sd3_mnist.py", ["sd3-mnist"]),
    ("train_ddpm.py --data mnist", ["ddpm-mnist"]),
    ("train_ddpm.py --data emoji", ["ddpm-emoji"]),
    ("train_linear_manifold.py", ["linear-manifold", "linear-manifold-two-variances"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "folders"), SCRIPTS, ids=[command for command, _ in SCRIPTS])
def test_training_scripts_run(command, folders, tmp_path):
    if "emoji" in command and not HAS_EMOJI:
        pytest.skip("no emoji are cached, and npm, which fetches them, is not installed")
    script, *options = command.split()
    run = [sys.executable, "-W", "ignore", str(ZOO / script), *options, "--smoke", "--output", str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, env=os.environ | {"TMPDIR": str(tmp_path)}, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    for folder in folders:
        assert (tmp_path / folder / "training.json").exists()
        assert list((tmp_path / folder).rglob("*.safetensors"))
