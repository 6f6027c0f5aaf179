"""The preference scorer on a tiny CLIP of random weights, saved to a folder as transformers saves one."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import ddpm_pipeline

from diffusers_geometry import GeometryGuidance, guided
from diffusers_geometry.preference import compare_preference, preference_scorer

WORDS = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "b</w>": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

    path = tmp_path_factory.mktemp("clip")
    (path / "vocab.json").write_text(json.dumps(WORDS))
    (path / "merges.txt").write_text("#version: 0.2\n")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 6}
    text = sizes | {"vocab_size": 4, "max_position_embeddings": 6, "bos_token_id": 0, "eos_token_id": 1}
    config = CLIPConfig(text_config=text, vision_config=sizes | {"image_size": 16, "patch_size": 8}, projection_dim=6)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(config)
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        model.logit_scale.data.fill_(2.0)
    model.save_pretrained(path)
    tokenizer = CLIPTokenizer(str(path / "vocab.json"), str(path / "merges.txt"), model_max_length=6)
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def scorer(folder):
    return preference_scorer(folder)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).random((5, 12, 16, 3))


def test_scores_are_scaled_cosines_of_each_image_with_its_own_prompt(folder, scorer, images):
    from transformers import CLIPModel, CLIPProcessor

    prompts = ["a", "b", "a b", "b b a", "a"]
    found = scorer(images, prompts)
    assert found.shape == (5,)
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    for i, prompt in enumerate(prompts):  # each pair alone, by the model's own logits
        picture = Image.fromarray((255 * images[i]).round().astype(np.uint8))
        with torch.no_grad():
            expected = model(**processor(text=[prompt], images=[picture], return_tensors="pt")).logits_per_image.item()
        assert found[i].item() == pytest.approx(expected, abs=1e-4)
    assert found.abs().max() <= np.exp(2.0) + 1e-4
    assert found.std() > 0.1
    torch.testing.assert_close(scorer(images, prompts, chunk_size=2), found, atol=1e-5, rtol=0)
    assert scorer(images, "a")[0].item() == pytest.approx(found[0].item(), abs=1e-5)
    assert (scorer(images, "b")[0] - found[0]).abs() > 1e-3


def test_every_form_in_which_pipelines_give_images(scorer, images):
    pictures = [Image.fromarray((255 * image).round().astype(np.uint8)) for image in images]
    expected = scorer(pictures, "a")
    assert torch.equal(scorer(images, "a"), expected)
    assert torch.equal(scorer(torch.from_numpy(images).permute(0, 3, 1, 2), "a"), expected)
    grey = scorer(images[..., :1], "a")
    assert torch.equal(grey, scorer(np.repeat(images[..., :1], 3, axis=3), "a"))
    assert not torch.equal(grey, expected)


def test_what_guidance_did_by_a_preference_model(scorer):
    """Colour is pushed towards red and away from it; the scorer tells images of one seed apart, equals are even."""
    pipe = ddpm_pipeline(channels=3)
    red = torch.tensor([1.0, -1, -1]).reshape(1, 3, 1, 1)

    def generate(scale):
        call = {"batch_size": 4, "num_inference_steps": 6, "output_type": "np"}
        call["generator"] = [torch.Generator().manual_seed(i) for i in range(4)]
        with guided(pipe, GeometryGuidance(lambda x_0, x_t, sigma: (x_0 * red).flatten(1).sum(1), scale, 0, 1)):
            return pipe(**call).images

    plain, more, less = generate(0.0), generate(20.0), generate(-20.0)
    up, down = (compare_preference(scorer, made, plain, "a b") for made in (more, less))
    assert up.pairs == 4
    assert up.model == scorer.name
    gap = scorer(more, "a b") - scorer(plain, "a b")
    assert up.difference.value == pytest.approx(gap.mean().item(), abs=1e-5)
    assert up.difference.sem == pytest.approx(gap.std().item() / 2, abs=1e-5)
    assert up.share_preferred.value == (gap > 0).float().mean().item()
    assert up.difference.value * down.difference.value < 0
    even = compare_preference(scorer, plain, plain, "a b")
    assert (even.difference.value, even.share_preferred.value) == (0, 0.5)
    assert 0 < even.share_preferred.sem <= 0.25


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (np.zeros((2, 4, 4, 3)), ["a"], "2 images, 1 prompts. Expected at least one image, and a prompt for each"),
        ([], "a", "0 images, 0 prompts"),
        (np.full((1, 4, 4, 3), -1.0), "a", r"values from -1 to -1. Expected \(B, H, W, C\)"),
        (np.zeros((1, 4, 4, 2)), "a", r"images have shape \(1, 4, 4, 2\)"),
        (torch.full((1, 3, 4, 4), torch.nan), "a", r"values from nan to nan"),
    ],
)
def test_what_is_no_set_of_images_is_refused(scorer, images, prompts, message):
    with pytest.raises(ValueError, match=message):
        scorer(images, prompts)


def test_other_models_and_formats_are_refused(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "siglip"}))
    with pytest.raises(ValueError, match="is a 'siglip' model. Expected 'clip'"):
        preference_scorer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model.safetensors"):
        preference_scorer(tmp_path)
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights.pop("visual_projection.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks \['visual_projection.weight'\]. Expected the weights of a whole CLIPModel"):
        preference_scorer(tmp_path)
