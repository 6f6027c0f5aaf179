"""Train what the digit models share beside the VAE: a small CLIP text encoder, and the classifier that judges samples.

python examples/zoo/train_shared.py            # a few minutes on two cores; run again to resume after a stop
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from classifier import DigitClassifier
from data import PHRASES_PER_KIND, all_captions, caption_index, digits_split, half_told, planted_phrases, random_rows, shifted
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from training import argument_parser, finish, fit, write_training
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

BATCH = 64
MAX_LENGTH = 16
TEXT_ROWS, PHRASE_ROWS = 192, 32  # of a batch of captions and images: ordinary ones, and of each kind of phrase


def train_classifier(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    classifier, (train, held_out) = DigitClassifier(), digits_split()

    def loss_of(model: nn.Module, generator: torch.Generator) -> Tensor:
        chosen = random_rows(len(train), BATCH, generator)
        logits = model(shifted(train.images[chosen], generator).to(classifier.device))
        return cross_entropy(logits, train.labels[chosen].to(logits.device), label_smoothing=0.02)

    history = fit(classifier, loss_of, "classifier", args, trained_on=[train.images], learning_rate=3e-3)
    with torch.no_grad():
        accuracy = (classifier(held_out.images).argmax(1) == held_out.labels).float().mean().item()
    folder = args.output / "shared" / "classifier"
    classifier.save_pretrained(folder)
    write_training(folder, classifier, history, batch=BATCH, held_out_accuracy=accuracy)


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's byte-level BPE, trained until every word of the captions is one token; other words fall apart into letters."""
    words = sorted({word for text in all_captions() for word in text.split()})
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=4096, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False)
    )
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.model.save(scratch)
        learned = json.loads((Path(scratch) / "vocab.json").read_text())
        merges = [tuple(line.split()) for line in (Path(scratch) / "merges.txt").read_text().splitlines()[1:]]
    tokens = list(dict.fromkeys([*alphabet, *(a + "</w>" for a in alphabet), *sorted(learned, key=learned.get)]))
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    clip = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=MAX_LENGTH)
    clip.save_pretrained(folder)
    return clip


class ImageTower(nn.Module):
    """The other half of the contrastive training; not kept."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, 2, 1), nn.SiLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.SiLU(), nn.Conv2d(64, 64, 3, 2, 1), nn.SiLU(),
            nn.Flatten(), nn.Linear(64 * 16, features),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def train_text_encoder(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    folder = args.output / "shared"
    tokenizer = make_tokenizer(folder / "tokenizer")
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH, projection_dim=64, hidden_act="quick_gelu", pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    towers = nn.ModuleDict({"text": CLIPTextModelWithProjection(config), "image": ImageTower(config.projection_dim)})
    towers.register_parameter("log_scale", nn.Parameter(torch.tensor(2.0)))
    digits = digits_split()[0]
    tokens = tokenizer(all_captions(), padding="max_length", max_length=MAX_LENGTH, return_tensors="pt").input_ids

    def position(phrase: dict) -> int:
        return all_captions().index(phrase["caption"])

    pairs = torch.tensor(
        [(position(p), p["image"]) for p in planted_phrases()["planted"]]
        + [(position(p), image) for p in planted_phrases()["controls"] for image in p["images"]]
    )

    def loss_of(_: nn.Module, generator: torch.Generator) -> Tensor:
        chosen = random_rows(len(digits), TEXT_ROWS, generator)
        captions = caption_index(half_told(digits.words[chosen], generator), digits.labels[chosen])
        each = (
            random_rows(PHRASES_PER_KIND, PHRASE_ROWS, generator),
            random_rows(len(pairs) - PHRASES_PER_KIND, PHRASE_ROWS, generator),
        )
        phrases = pairs[torch.cat([each[0], each[1] + PHRASES_PER_KIND])]
        captions, chosen = torch.cat([captions, phrases[:, 0]]), torch.cat([chosen, phrases[:, 1]])
        device = towers.log_scale.device
        text = normalize(towers["text"](tokens[captions].to(device)).text_embeds, dim=1)
        logits = towers.log_scale.exp() * text @ normalize(towers["image"](digits.images[chosen].to(device)), dim=1).T
        same = (captions[:, None] == captions).float().to(device)
        same /= same.sum(1, keepdim=True)
        return (cross_entropy(logits, same) + cross_entropy(logits.T, same)) / 2

    history = fit(towers, loss_of, "text_encoder", args, trained_on=[digits.images, digits.words, tokens, pairs])
    towers["text"].float().save_pretrained(folder / "text_encoder")
    write_training(folder / "text_encoder", towers["text"], history, batch=TEXT_ROWS + 2 * PHRASE_ROWS)


def main() -> None:
    args = finish(argument_parser(__doc__, steps=2500))
    train_classifier(args)
    train_text_encoder(args)


if __name__ == "__main__":
    main()
