"""How good is the bundled model? Writes its model card from measurements on digits that neither it nor the classifier saw.

python examples/evaluate_digits.py                  # about two minutes on two cores
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMPipeline
from sklearn.neural_network import MLPClassifier
from train_digits import digits_split


def frechet(first: np.ndarray, second: np.ndarray) -> float:
    """Squared Fréchet distance between Gaussians fitted to two feature sets (Heusel et al., 2017, arXiv:1706.08500)."""
    a, b = np.cov(first.T), np.cov(second.T)
    overlap = np.sqrt(np.linalg.eigvals(a @ b).real.clip(min=0)).sum()
    return float(np.sum((first.mean(0) - second.mean(0)) ** 2) + np.trace(a + b) - 2 * overlap)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("diffusers_geometry/bundled/digits"))
    parser.add_argument("--output", type=Path, help="folder of the card, the model's own by default")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--steps", type=int, default=1000, help="denoising steps of the sampler")
    args = parser.parse_args()
    train, labels, held_out, held_out_labels = (t.flatten(1).numpy() if t.ndim > 1 else t.numpy() for t in digits_split())
    classifier = MLPClassifier((64,), alpha=1e-2, max_iter=1000, random_state=0).fit(train, labels)
    pipe = DDPMPipeline.from_pretrained(args.model, use_safetensors=True)
    images = pipe(args.samples, torch.Generator().manual_seed(0), num_inference_steps=args.steps, output_type="np").images
    generated = images.reshape(args.samples, -1) * 2 - 1
    confidence = classifier.predict_proba(generated)
    real, made = (np.maximum(x @ classifier.coefs_[0] + classifier.intercepts_[0], 0) for x in (held_out, generated))
    half = min(len(real), len(made)) // 2
    nearest, nearest_held_out = (np.median(np.linalg.norm(x[:, None] - train, axis=2).min(1)) for x in (generated, held_out))
    figures = {
        "parameters": sum(p.numel() for p in pipe.unet.parameters()),
        "samples": args.samples,
        "sampler_steps": args.steps,
        "classifier_accuracy": float(classifier.score(held_out, held_out_labels)),
        "confident_share": float((confidence.max(1) >= 0.9).mean()),
        "smallest_class_share": float(np.bincount(confidence.argmax(1), minlength=10).min() / len(generated)),
        "half": half,
        "frechet_generated_to_held_out": frechet(made[:half], real[:half]),
        "frechet_between_real_halves": frechet(real[:half], real[half : 2 * half]),
        "nearest_training_image_of_generated": float(nearest),
        "nearest_training_image_of_held_out": float(nearest_held_out),
    }
    (args.output or args.model).mkdir(parents=True, exist_ok=True)
    (args.output or args.model).joinpath("quality.json").write_text(json.dumps(figures, indent=2) + "\n")
    card = Path(__file__).with_name("digits_card.md").read_text()
    (args.output or args.model).joinpath("README.md").write_text(card.format(**figures))


if __name__ == "__main__":
    main()
