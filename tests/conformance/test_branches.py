"""Classifier-free guidance as the sum of its branches: D'_w = D'_u + w (D'_c - D'_u), w being what the user asked for."""

import pytest
import torch
from catalogue import CASES

from diffusers_geometry import record

SCALES = {  # how the class states w
    "StableDiffusionPipeline": "guidance_scale", "StableDiffusionXLPipeline": "guidance_scale", "DiTPipeline": "guidance_scale",
    "PixArtAlphaPipeline": "guidance_scale", "StableDiffusion3Pipeline": "guidance_scale", "AuraFlowPipeline": "guidance_scale",
    "FluxPipeline true CFG": "true_cfg_scale", "WanPipeline": "guidance_scale", "LTXPipeline": "guidance_scale",
    "CogVideoXPipeline": "guidance_scale", "AudioLDM2Pipeline": "guidance_scale", "HunyuanVideoPipeline true CFG": "true_cfg_scale",
}  # fmt: skip


@pytest.mark.parametrize("name", SCALES)
def test_branches_combine_with_the_users_scale(name):
    case = next(c for c in CASES if c.name == name)
    pipe = case.build()
    arguments = case.arguments(pipe) | {SCALES[name]: 3.5}
    with record(pipe, [1]) as recording:
        pipe(**arguments, generator=torch.Generator().manual_seed(0))
    step = recording[0]
    assert step.engine == "replay"
    x_t = step.sample[0]
    u = torch.randn(4, *x_t.shape, generator=torch.Generator().manual_seed(1))
    guided, conditional, unconditional = (
        step.branch(branch).select(0).jacobian(x_t).vjp(u) for branch in ("guided", "conditional", "unconditional")
    )
    difference = conditional - unconditional
    assert difference.norm() > 1e-4 * guided.norm()
    scale = float(((guided - unconditional) * difference).sum() / difference.square().sum())
    assert scale == pytest.approx(3.5, rel=1e-3)
    torch.testing.assert_close(guided, unconditional + 3.5 * difference, rtol=1e-3, atol=1e-4 * float(guided.abs().max()))
    denoised = {b: step.branch(b).denoised(step.sample) for b in ("guided", "conditional", "unconditional")}
    combined = denoised["unconditional"] + 3.5 * (denoised["conditional"] - denoised["unconditional"])
    torch.testing.assert_close(denoised["guided"], combined, rtol=1e-4, atol=1e-4)


def test_the_conditional_branch_is_the_one_the_prompt_moves():
    """Changing the prompt changes one branch and leaves the other, whichever order a class stacks them in."""
    for name in ("StableDiffusionPipeline", "StableDiffusion3Pipeline", "DiTPipeline"):
        case, found = next(c for c in CASES if c.name == name), []
        for changed in (False, True):
            pipe = case.build()
            arguments = case.arguments(pipe)
            if changed:
                key = "class_labels" if name == "DiTPipeline" else "prompt_embeds"
                arguments[key] = [1] if name == "DiTPipeline" else arguments[key].flip(-1)
            with record(pipe, [0]) as recording:
                pipe(**arguments, generator=torch.Generator().manual_seed(0))
            step = recording[0]
            found.append({b: step.branch(b).denoised(step.sample) for b in ("conditional", "unconditional")})
        assert (found[0]["conditional"] - found[1]["conditional"]).abs().max() > 1e-4
        torch.testing.assert_close(found[0]["unconditional"], found[1]["unconditional"], rtol=1e-5, atol=1e-6)
