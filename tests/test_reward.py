"""The reward: a known relation is learnt, a stopped training continues to the same bits, and a wrong folder is refused."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from exact_loop import FIXED, loop
from safetensors.torch import load_file
from sklearn.kernel_ridge import KernelRidge
from tiny import ddpm_pipeline, dit_pipeline, randn, sd_pipeline, unet2d
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers_geometry.exact import GaussianDenoiser
from diffusers_geometry.guidance import GeometryGuidance, guided
from diffusers_geometry.objectives import GuidedStep, RewardObjective
from diffusers_geometry.reward import GeometryReward
from diffusers_geometry.reward_card import save_reward
from diffusers_geometry.reward_kernel import RIDGES, KernelReadout
from diffusers_geometry.reward_networks import copied_network, network_config, network_trunk
from diffusers_geometry.reward_training import TrainingOptions, train_reward
from diffusers_geometry.schedule import NoiseLevel

ZOO = Path(__file__).parent.parent / "examples" / "zoo"
SMALL = {"width": 16, "num_blocks": 1, "num_bins": 8}
SHAPES = {"image": (2, 8, 8), "video": (2, 3, 8, 8), "packed": (6, 4), "vector": (10,)}


def labelled(count, seed, shape=(1, 8, 8), first_seed=0, runs_share=4):
    """Samples whose label is known: the mean square of the clean signal's upper half, read through little noise."""
    clean = randn(count, *shape, seed=seed) * (0.4 + randn(count, *[1] * len(shape), seed=seed + 1).abs())
    sigma = torch.tensor([0.1, 0.3])[torch.arange(count) % 2].double()
    alpha_t = 1 / (1 + sigma**2).sqrt()
    noise = randn(count, *shape, seed=seed + 2)
    spread = [-1, *[1] * (len(shape))]
    x_t = alpha_t.reshape(spread).float() * (clean + sigma.reshape(spread).float() * noise)
    half = clean.flatten(1)[:, : clean[0].numel() // 2]
    psi = half.square().mean(dim=1).log().double() + 5 * sigma
    return {"x_t": x_t, "alpha_t": alpha_t, "sigma_t": sigma * alpha_t, "psi": psi,
            "seed": first_seed + torch.arange(count) // runs_share}  # fmt: skip


def fresh(shape=(1, 8, 8), **config):
    torch.manual_seed(0)
    reward = GeometryReward(shape, num_levels=2, **{**SMALL, **config})
    reward.set_levels(torch.tensor([0.1, 0.3]).repeat(200), randn(400, seed=3).exp())
    return reward.eval()


@pytest.fixture(scope="module")
def trained():
    options = TrainingOptions(steps=300, batch_size=64, evaluate_every=100, learning_rate=2e-3)
    return train_reward(labelled(6000, 1), labelled(800, 50, first_seed=10_000), options=options, progress=False, **SMALL)


def test_a_known_relation_is_learnt(trained):
    reward, metrics = trained
    assert [round(level.sigma, 6) for level in metrics.levels] == [0.1, 0.3]
    assert metrics.spearman >= 0.9
    assert metrics.r_squared >= 0.8
    assert all(0 < level.spearman_sem < 0.05 for level in metrics.levels)
    assert metrics.validation_samples + metrics.test_samples == 800
    off = [abs(predicted - true) / sem for predicted, true, sem in metrics.calibration]
    assert np.median(off) < 4
    data = labelled(400, 90)
    sigma = data["sigma_t"] / data["alpha_t"]
    predicted = reward.predict(data["x_t"], sigma, data["alpha_t"])
    assert abs((predicted - data["psi"]).mean()) < 0.1  # the level's mean, 5 sigma apart, is in it


def test_the_value_head_learns_too_and_shuffled_labels_do_not():
    options = TrainingOptions(steps=200, batch_size=64, evaluate_every=100, learning_rate=2e-3)
    _, metrics = train_reward(labelled(6000, 1), labelled(800, 50, first_seed=10_000), options=options, progress=False,
                              head="value", **SMALL)  # fmt: skip
    assert metrics.spearman >= 0.9
    shuffled = labelled(2000, 1)
    shuffled["psi"] = shuffled["psi"][torch.randperm(2000, generator=torch.Generator().manual_seed(0))]
    options = TrainingOptions(steps=100, batch_size=64, evaluate_every=50)
    _, metrics = train_reward(shuffled, labelled(800, 50, first_seed=10_000), options=options, progress=False, **SMALL)
    assert abs(metrics.spearman) < 0.25


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("head", ["bins", "value"])
def test_shapes_gradients_and_independence(kind, head):
    reward, x = fresh(SHAPES[kind], head=head), randn(3, *SHAPES[kind], seed=1)
    sigma = torch.tensor([0.1, 0.2, 0.3])
    leaf = x.clone().requires_grad_(True)
    value = reward.predict(leaf, sigma)
    assert value.shape == (3,)
    gradient = torch.autograd.grad(value[1], leaf)[0]
    assert gradient[1].abs().sum() > 0
    assert gradient[[0, 2]].abs().max() == 0
    torch.testing.assert_close(reward.predict(x[1:2], 0.2), value[1:2].detach(), atol=1e-5, rtol=1e-5)
    scaled = reward.predict(0.7 * x, sigma, 0.7)
    torch.testing.assert_close(scaled, value.detach(), atol=1e-5, rtol=1e-5)
    v, h = randn(*SHAPES[kind], seed=2), 1e-2
    difference = (reward.predict(x[1:2] + h * v, 0.2) - reward.predict(x[1:2] - h * v, 0.2)) / (2 * h)
    assert difference.item() == pytest.approx((gradient[1] * v).sum().item(), abs=2e-3 * float(gradient[1].norm() * v.norm()))


def text_pipeline():
    """Stable Diffusion with a text encoder as small as its UNet, and the zoo's tokenizer."""
    pipe, sizes = sd_pipeline(), {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = CLIPTokenizer.from_pretrained(ZOO / "shared" / "tokenizer")
    config = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=8, max_position_embeddings=tokenizer.model_max_length, **sizes)
    pipe.register_modules(text_encoder=CLIPTextModel(config).eval(), tokenizer=tokenizer)
    return pipe


def network_of(pipe):
    return getattr(pipe, "unet", None) or pipe.transformer


def without_conditioning(pipe, x_t, timestep):
    """The network's own answer as its pipeline asks for it without a prompt or class."""
    network = network_of(pipe)
    if isinstance(network, diffusers.UNet2DConditionModel):
        nothing = pipe.encode_prompt("", "cpu", len(x_t), False)[0]
        return network(x_t, timestep, encoder_hidden_states=nothing)
    if isinstance(network, diffusers.DiTTransformer2DModel):
        nothing = torch.full((len(x_t),), network.config.num_embeds_ada_norm)
        return network(x_t, timestep=torch.full((len(x_t),), timestep), class_labels=nothing)
    return network(x_t, timestep)


COPIED = {  # pipeline and where the copy ends in its network and in the trunk
    "unconditional": (ddpm_pipeline, (1, 8, 8), lambda module: module.mid_block),
    "text": (text_pipeline, (4, 8, 8), lambda module: getattr(module, "attention", None) or module.up_blocks[0].attentions[0]),
    "class": (dit_pipeline, (4, 8, 8), lambda module: module.transformer_blocks[1]),
}


@pytest.mark.parametrize("kind", COPIED)
def test_a_reward_can_start_as_a_copy_of_the_models_network(kind, tmp_path):
    make, shape, last = COPIED[kind]
    pipe = make()
    options = TrainingOptions(steps=1, batch_size=8, evaluate_every=1, learning_rate=1e-12)
    data = labelled(400, 1, shape), labelled(80, 5, shape, first_seed=999)
    reward, _ = train_reward(*data, options=options, progress=False, start_from=pipe, num_bins=4)
    seen, own = [], []
    handle = last(network_of(pipe)).register_forward_hook(lambda module, args, output: seen.append(output))
    alphas, t = pipe.scheduler.alphas_cumprod, 300
    alpha_t, sigma = alphas[t].sqrt(), ((1 - alphas[t]) / alphas[t]).sqrt()
    x_t = randn(2, *shape)
    with torch.no_grad():
        without_conditioning(pipe, x_t, t)
    handle.remove()
    last(reward.trunk).register_forward_hook(lambda module, args, output: own.append(output))
    leaf = x_t.clone().requires_grad_(True)
    gradient = torch.autograd.grad(reward.predict(leaf, sigma, alpha_t)[0], leaf)[0]
    found, expected = (x[0] if isinstance(x, tuple) else getattr(x, "sample", x) for x in (own[0], seen[0]))
    torch.testing.assert_close(found.detach(), expected, atol=1e-4, rtol=1e-4)
    assert gradient[0].abs().sum() > 0
    assert gradient[1].abs().max() == 0
    assert last(reward.trunk) is not last(network_of(pipe))
    reward.save_pretrained(tmp_path)
    assert torch.equal(GeometryReward.from_pretrained(tmp_path).predict(x_t, 0.2), reward.predict(x_t, 0.2))


def test_the_kernel_readout_is_kernel_ridge_regression():
    features, others = randn(60, 5, seed=1), randn(40, 5, seed=2)
    labels, other_labels = (v[:, 0].sin() + v[:, 1] + 0.1 * randn(len(v), seed=3) for v in (features, others))
    readout = KernelReadout(5, 60)
    best, loss = readout.fit(features, labels, others, other_labels)
    errors = {}
    for ridge in RIDGES:
        reference = KernelRidge(alpha=ridge, kernel="rbf", gamma=1 / 10).fit(features.double().numpy(), labels.double().numpy())
        errors[ridge] = float(np.square(reference.predict(others.double().numpy()) - other_labels.numpy()).mean())
    chosen = min(errors, key=errors.get)
    assert RIDGES[best] == chosen
    reference = KernelRidge(alpha=chosen, kernel="rbf", gamma=1 / 10).fit(features.double().numpy(), labels.double().numpy())
    mean, log_variance = readout(randn(7, 5, seed=4)).T
    np.testing.assert_allclose(mean, reference.predict(randn(7, 5, seed=4).double().numpy()), atol=1e-4)
    assert log_variance[0].exp() == pytest.approx(errors[chosen], rel=1e-4)
    assert loss == pytest.approx(0.5 * (math.log(errors[chosen]) + 1), abs=1e-3)


def test_a_reward_of_few_labels_is_fitted_in_closed_form(tmp_path):
    """Its label is read off the very features, so that 160 samples are enough."""
    pipe, shape = dit_pipeline(), (4, 8, 8)
    data = labelled(160, 1, shape), labelled(80, 5, shape, first_seed=999)
    trunk = network_trunk(network_config(pipe), 1000)
    trunk.start_from(pipe)
    for part in data:
        sigma = (part["sigma_t"] / part["alpha_t"]).float()
        unit = part["x_t"] / (part["alpha_t"].float() * (1 + sigma**2).sqrt()).reshape(-1, 1, 1, 1)
        with torch.no_grad():
            part["psi"] = trunk(unit, sigma.log())[:, :4].sum(dim=1).double()
    reward, metrics = train_reward(*data, head="kernel", start_from=pipe, num_bins=4, progress=False)
    assert metrics.spearman > 0.8
    assert metrics.steps == len(RIDGES)
    assert 1 <= metrics.best_step <= len(RIDGES)
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    loaded, x = GeometryReward.from_pretrained((reward.save_pretrained(tmp_path), tmp_path)[1]), data[1]["x_t"][:2]
    assert torch.equal(loaded.predict(x, 0.2), reward.predict(x, 0.2))
    leaf, v, h = x.clone().requires_grad_(True), randn(*x.shape, seed=2), 1e-2
    slope = (torch.autograd.grad(reward.predict(leaf, 0.2)[1], leaf)[0] * v).sum().item()
    difference = float(reward.predict(x + h * v, 0.2)[1] - reward.predict(x - h * v, 0.2)[1]) / (2 * h)
    assert difference == pytest.approx(slope, rel=0.05)


def test_what_has_more_conditioning_is_no_start():
    without_encoder, with_more, with_flow = sd_pipeline(), text_pipeline(), text_pipeline()
    assert copied_network(with_more) is with_more.unet
    with_more.unet.register_to_config(addition_embed_type="text_time")
    with_flow.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    for pipe in (without_encoder, with_more, with_flow):
        assert copied_network(pipe) is None
        with pytest.raises(ValueError, match="start_from=StableDiffusionPipeline. Expected a pipeline of a UNet2DModel"):
            train_reward(labelled(400, 1), labelled(80, 5, first_seed=999), start_from=pipe, progress=False)
    with pytest.raises(ValueError, match="network is a FluxTransformer2DModel. Expected a UNet2DModel"):
        GeometryReward((4, 8, 8), network={"_class_name": "FluxTransformer2DModel"})
    with pytest.raises(ValueError, match="head='kernel', num_anchors=0. Expected 1 to 4096 training samples of a copied network"):
        GeometryReward((4, 8, 8), head="kernel")
    with pytest.raises(ValueError, match="head='bins', num_anchors=5. Expected 1 to 4096"):
        GeometryReward((4, 8, 8), num_anchors=5)


def test_a_reward_with_the_models_encoder_is_saved_whole(tmp_path):
    pipe = ddpm_pipeline()
    options = TrainingOptions(steps=2, batch_size=8, evaluate_every=1)
    data = labelled(400, 1), labelled(80, 5, first_seed=999)
    reward, metrics = train_reward(*data, options=options, progress=False, start_from=pipe, num_bins=4)
    save_reward(reward, metrics, tmp_path, made_of={"model": "tiny"})
    loaded = GeometryReward.from_pretrained(tmp_path)
    x_t = randn(2, 1, 8, 8)
    assert torch.equal(loaded.predict(x_t, 0.2), reward.predict(x_t, 0.2))
    text = (tmp_path / "README.md").read_text()
    assert f"Mean Spearman {metrics.spearman:.3f}" in text
    assert "noise sigma from 0.1 to 0.3" in text
    assert "- model: tiny" in text
    assert text.count("\n| 0.") == 2
    document = json.loads((tmp_path / "metrics.json").read_text())
    assert document["levels"][0]["spearman"] == metrics.levels[0].spearman
    assert (tmp_path / "calibration.png").stat().st_size > 5000


def test_bins_are_quantiles_per_level_and_the_loss_is_theirs():
    reward = GeometryReward((3,), num_levels=2, num_bins=4)
    labels = torch.cat([torch.arange(100.0), 1000 + torch.arange(100.0)])
    reward.set_levels(torch.tensor([0.5] * 100 + [2.0] * 100), labels)
    torch.testing.assert_close(reward.bin_edges[1], 1000 + torch.tensor([24.75, 49.5, 74.25]))
    torch.testing.assert_close(reward.bin_centres[0], torch.tensor([12.0, 37.0, 62.0, 87.0]))
    assert reward.spread(torch.tensor([0.5])).item() == pytest.approx(labels[:100].std().item())
    middle = reward._at(reward.label_mean, torch.tensor([1.0]).log())  # log sigma half way
    assert middle.item() == pytest.approx(549.5)
    output = torch.tensor([[0.0, 9.0, 0.0, 0.0], [0.0, 0.0, 0.0, 9.0]])
    sure = reward.loss_of(output, torch.tensor([0.5, 2.0]), torch.tensor([30.0, 1099.0]))
    assert sure.item() < 1e-3
    wrong = reward.loss_of(output, torch.tensor([0.5, 2.0]), torch.tensor([80.0, 1099.0]))
    assert wrong.item() == pytest.approx(4.5, abs=1e-2)


def test_saving_and_loading(tmp_path, trained):
    reward, _ = trained
    reward.save_pretrained(tmp_path / "reward")
    assert {p.name for p in (tmp_path / "reward").iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    loaded = GeometryReward.from_pretrained(tmp_path / "reward")
    assert not loaded.training
    x = randn(2, 1, 8, 8)
    assert torch.equal(loaded.predict(x, 0.2), reward.predict(x, 0.2))
    with pytest.raises(ValueError, match="safe_serialization=False. Expected True"):
        reward.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    with pytest.raises(ValueError, match="use_safetensors=False. Expected True"):
        GeometryReward.from_pretrained(tmp_path / "reward", use_safetensors=False)
    pipe = ddpm_pipeline()
    pipe.register_modules(reward=reward)
    pipe.save_pretrained(tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["reward"][1] == "GeometryReward"


def test_a_wrong_folder_is_refused(tmp_path, trained):
    unet2d().save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match="holds a UNet2DModel. Expected a GeometryReward"):
        GeometryReward.from_pretrained(tmp_path / "unet")
    trained[0].save_pretrained(tmp_path / "reward")
    config = json.loads((tmp_path / "reward" / "config.json").read_text())
    (tmp_path / "reward" / "config.json").write_text(json.dumps(config | {"num_blocks": 2}))
    with pytest.raises(ValueError, match="missing_keys.*Expected exactly the weights of its config"):
        GeometryReward.from_pretrained(tmp_path / "reward")
    (tmp_path / "reward" / "config.json").write_text(json.dumps(config))
    (tmp_path / "reward" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "reward" / "diffusion_pytorch_model.bin")
    with pytest.raises((OSError, ValueError)):
        GeometryReward.from_pretrained(tmp_path / "reward")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GeometryReward((1, 8, 8), descriptor="chi"), "descriptor='chi', head='bins'. Expected 'psi', 'nu' or 'delta'"),
        (
            lambda: GeometryReward((1, 8, 8), width=12),
            "width=12.*Expected one to four axes, a width that is a positive multiple of 8",
        ),
        (lambda: GeometryReward((1, 8, 8))(randn(2, 2, 8, 8), 1.0), r"x_t has shape \(2, 2, 8, 8\). Expected \(B, 1, 8, 8\)"),
        (lambda: fresh().bin_log_probability(randn(1, 1, 8, 8), 0.2, 8), "bin 8 of a 'bins' head. Expected head='bins' and 0 to 7"),
        (lambda: fresh().set_levels(torch.tensor([0.1, 0.3]).repeat(5), torch.ones(10)), "has 5 labels, 1 of them distinct"),
        (lambda: fresh().set_levels(torch.full((9,), 0.1), randn(9)), "1 noise levels, num_levels=2. Expected at least as many"),
        (lambda: RewardObjective(fresh(), 9), "target_bin=9, head='bins' with 8 bins. Expected head='bins' and 0 to 7"),
        (
            lambda: train_reward(labelled(99, 1), labelled(99, 1)),
            r"seeds \[0, 1, 2, 3, 4\] are in both sets. Expected held-out seeds",
        ),
        (lambda: train_reward(labelled(99, 1), labelled(8, 1, first_seed=999)), "2 held-out seeds. Expected at least 4"),
        (
            lambda: train_reward(labelled(9, 1), labelled(9, 1), descriptor="nu"),
            r"descriptor='nu' is not among the labels.*\['psi'\]",
        ),
        (lambda: TrainingOptions(steps=0), "Expected positive counts"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_untrained_reward_predicts_nothing():
    with pytest.raises(RuntimeError, match="was not trained: it has no label statistics. Expected train_reward"):
        GeometryReward((1, 8, 8)).predict(randn(1, 1, 8, 8), 1.0)


def test_the_objective_of_a_reward(trained):
    reward, _ = trained
    level = NoiseLevel(alpha_t=0.98, sigma_t=0.196, a=1 / 0.98, b=-0.2, c_in=1.0, timestep=1.0)
    x_t = labelled(4, 7)["x_t"]
    found = RewardObjective(reward).evaluate(GuidedStep(x_t, x_t, level))
    torch.testing.assert_close(found.value, reward.predict(x_t, 0.2, 0.98).detach())
    h = 0.02
    unit = found.gradient / found.gradient.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    along = [reward.predict(x_t + sign * h * 0.98 * unit, 0.2, 0.98) for sign in (1, -1)]  # a move of h in y
    torch.testing.assert_close((along[0] - along[1]) / (2 * h), found.gradient.flatten(1).norm(dim=1), rtol=0.05, atol=1e-3)
    assert not RewardObjective(reward).covers(NoiseLevel(0.1, 1.0, 1.0, 1.0, 1.0, 1.0))
    best = RewardObjective(reward, target_bin=7).evaluate(GuidedStep(x_t, x_t, level))
    assert (best.value < 0).all()


def test_guidance_by_a_reward_moves_what_it_predicts(trained):
    """The descriptor itself at the end of a run from an exact Gaussian, not the reward's word of it."""
    reward, _ = trained
    pipe = loop(GaussianDenoiser(torch.eye(64)), diffusers.DDIMScheduler(**FIXED))

    def final(scale):
        with guided(pipe, GeometryGuidance(reward, scale=scale, start=0.5, stop=1.0, trust="noise", trust_radius=0.5)) as run:
            samples = pipe(randn(16, 1, 8, 8, seed=4), 40)
        assert all(reward.covers(step.sigma) for step in run.log)
        assert (len(run.log) > 3) == (scale != 0)
        return samples[:, :, :4].flatten(1).square().mean(dim=1).log()

    up, plain, down = final(2.0), final(0.0), final(-2.0)
    assert (up > plain + 0.1).all()
    assert (down < plain - 0.1).all()
    refused = pytest.raises(ValueError, match="covers no noise between start=0.0 and stop=0.1")
    with refused, guided(pipe, GeometryGuidance(reward, 1.0, 0.0, 0.1)):
        pipe(randn(1, 1, 8, 8), 40)


TRAIN = """
import sys, torch
sys.path[:0] = [{tests!r}]
from test_reward import SMALL, labelled
from diffusers_geometry.reward_card import save_reward
from diffusers_geometry.reward_kernel import RIDGES, KernelReadout
from diffusers_geometry.reward_networks import copied_network, network_config, network_trunk
from diffusers_geometry.reward_training import TrainingOptions, train_reward
torch.set_num_threads(1)
options = TrainingOptions(steps=60, batch_size=32, evaluate_every=10, accumulation={accumulation})
data = labelled(400, 1), labelled(80, 5, first_seed=999)
reward, metrics = train_reward(*data, options=options, checkpoint={folder!r}, progress=False, **SMALL)
reward.save_pretrained({output!r})
"""


def test_a_killed_training_continues_to_the_same_bits(tmp_path):
    def command(name):
        folder, output = str(tmp_path / name), str(tmp_path / f"{name}-reward")
        return [sys.executable, "-c", TRAIN.format(tests=str(Path(__file__).parent), accumulation=2, folder=folder, output=output)]

    torch.set_num_threads(1)
    subprocess.run(command("whole"), check=True, env=os.environ)
    killed = subprocess.Popen(command("killed"), env=os.environ)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "killed").glob("checkpoint-*[1-3]0.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed-reward").exists()
    left = [p.name for p in (tmp_path / "killed").glob("checkpoint-*")]
    assert left
    assert "checkpoint-00000060.safetensors" not in left
    subprocess.run(command("killed"), check=True, env=os.environ)
    whole, resumed = (load_file(tmp_path / f"{n}-reward" / "diffusion_pytorch_model.safetensors") for n in ("whole", "killed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    with pytest.raises(ValueError, match="holds a checkpoint of another training"):
        train_reward(labelled(400, 1), labelled(80, 5, first_seed=999), checkpoint=tmp_path / "whole", progress=False, **SMALL)


def test_accumulated_parts_make_the_same_step():
    data = labelled(256, 1), labelled(80, 5, first_seed=999)
    found = []
    for parts in (1, 4):
        options = TrainingOptions(steps=3, batch_size=64, evaluate_every=3, accumulation=parts)
        found.append(train_reward(*data, options=options, progress=False, **SMALL)[0].state_dict())
    assert all(torch.allclose(found[0][k], found[1][k], atol=1e-5) for k in found[0])
    assert math.isfinite(sum(float(v.double().sum()) for v in found[0].values()))
