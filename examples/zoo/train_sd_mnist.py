"""Train text to image on digits: ``sd-mnist`` (epsilon, with planted memorisation) or ``sd-mnist-v`` (v, zero-terminal SNR).

python examples/zoo/train_sd_mnist.py                                # about 25 minutes on two cores; run again to resume
python examples/zoo/train_sd_mnist.py --prediction v_prediction      # about 15 minutes
"""

from __future__ import annotations

import json

import torch
from data import all_captions, caption_index, digits_split, half_told, planted_phrases, random_rows
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from shared import (
    GUIDANCE_DROPOUT,
    load_text_encoder,
    load_tokenizer,
    load_vae,
    reconstructions,
    save_pipeline,
    training_latents,
)
from torch import Tensor, nn
from training import argument_parser, finish, fit, write_training

BATCH = 128
STEPS = {"epsilon": 2200, "v_prediction": 1600}  # recitation takes longer than digits
PHRASE_SHARE = 0.12  # of the rows of a batch: planted phrases, and as many controls
SCHEDULE = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False,
    "steps_offset": 1,
}  # fmt: skip
ZERO_TERMINAL = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "steps_offset": 0}


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(64, 128), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64, norm_num_groups=16, attention_head_dim=4,
    )  # fmt: skip


def random_pairs(size: int, planted: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(positions in the training split, positions in all_captions) of a batch: ordinary, dropped, planted and control rows."""
    digits = digits_split()[0]
    images = random_rows(len(digits), size, generator)
    captions = caption_index(half_told(digits.words[images], generator), digits.labels[images])
    kind = torch.rand(size, generator=generator)
    captions[kind < GUIDANCE_DROPOUT] = len(all_captions()) - 1
    if planted:
        phrases = planted_phrases()
        first = len(all_captions()) - 1 - 2 * len(phrases["planted"])
        which = torch.randint(len(phrases["planted"]), (size,), generator=generator)
        member = torch.randint(len(phrases["controls"][0]["images"]), (size,), generator=generator)
        recited = torch.tensor([p["image"] for p in phrases["planted"]])
        varied = torch.tensor([p["images"] for p in phrases["controls"]])
        row = kind > 1 - PHRASE_SHARE
        images[row], captions[row] = recited[which[row]], first + which[row]
        row = (kind > 1 - 2 * PHRASE_SHARE) & ~row
        images[row], captions[row] = varied[which[row], member[row]], first + len(recited) + which[row]
    return images, captions


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--prediction", choices=("epsilon", "v_prediction"), default="epsilon")
    args = finish(parser)
    args.steps = STEPS[args.prediction] if args.steps is None else args.steps
    planted = args.prediction == "epsilon"
    name = "sd-mnist" if planted else "sd-mnist-v"
    torch.manual_seed(0)
    scheduler = DDIMScheduler(**SCHEDULE | ({} if planted else ZERO_TERMINAL), prediction_type=args.prediction)
    pipe = StableDiffusionPipeline(
        load_vae(), load_text_encoder(), load_tokenizer(), make_unet(), scheduler, None, None, requires_safety_checker=False
    )
    latents = training_latents()
    with torch.no_grad():
        captions = pipe.encode_prompt(all_captions(), "cpu", 1, False)[0]

    def loss_of(unet: nn.Module, generator: torch.Generator) -> Tensor:
        images, told = random_pairs(BATCH, planted, generator)
        x_0, noise = latents[images], torch.randn(BATCH, 4, 8, 8, generator=generator)
        t = torch.randint(1000, (BATCH,), generator=generator)
        x_t = scheduler.add_noise(x_0, noise, t)
        target = noise if planted else scheduler.get_velocity(x_0, noise, t)
        device = pipe.unet.device
        predicted = unet(x_t.to(device), t.to(device), encoder_hidden_states=captions[told].to(device)).sample
        return (predicted - target.to(device)).square().mean()

    rows = [torch.stack(random_pairs(1000, planted, torch.Generator().manual_seed(0)))]
    history = fit(pipe.unet, loss_of, name, args, trained_on=[latents, captions, *rows])
    folder = args.output / name
    write_training(folder, pipe.unet, history, batch=BATCH)
    if planted:
        kinds = {kind: ",\n  ".join(map(json.dumps, phrases)) for kind, phrases in planted_phrases().items()}
        document = ",\n".join(f' "{kind}": [\n  {rows}\n ]' for kind, rows in kinds.items())
        (folder / "planted.json").write_text(f"{{\n{document}\n}}\n")
        targets = reconstructions(digits_split()[0].images[[p["image"] for p in planted_phrases()["planted"]]])
        save_file({"images": targets.half()}, folder / "planted.safetensors")
    save_pipeline(pipe, folder)


if __name__ == "__main__":
    main()
