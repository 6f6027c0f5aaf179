"""What users switch on in a pipeline: probes are of the same network, images the same, and everything stays switched on."""

import importlib
import pkgutil

import diffusers
import numpy as np
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from catalogue import CASES
from diffusers.models.attention_processor import AttnProcessor
from flow import flux, flux_call
from tiny import ddpm_pipeline, dit_call, dit_pipeline, quiet, randn, sd_call, sd_pipeline

from diffusers_geometry import record, with_geometry
from diffusers_geometry.precision import _CACHES

CPU = torch.device("cpu")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def jacobian_of(pipe, call, position=1, of="denoised", **options):
    """The dense Jacobian at one step of a seeded run, the step, and the images."""
    with record(pipe, [position], **options) as recording:
        output = pipe(**call, generator=seeded())
    step = recording[0]
    return step.denoiser.select(0).jacobian(step.sample[0].float(), of).dense(), step, np.asarray(output[0])


def sequential_offload(pipe):
    """As ``enable_sequential_cpu_offload`` does, which asks for an accelerator."""
    for module in (pipe.vae, pipe.unet):
        cpu_offload(module, execution_device=CPU)


def model_offload(pipe):
    for module in (pipe.vae, pipe.unet):
        cpu_offload_with_hook(module, execution_device=CPU)


def group_offload(pipe):
    pipe.unet.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


def block_offload(pipe):
    pipe.unet.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="block_level", num_blocks_per_group=1)


def checkpointing(pipe):
    pipe.unet.enable_gradient_checkpointing()


def compiled_in_place(pipe):
    pipe.unet.compile(backend="eager")


def compiled_module(pipe):
    pipe.unet = torch.compile(pipe.unet, backend="eager")


def processors(pipe):
    pipe.unet.set_attn_processor(AttnProcessor())


def vae_options(pipe):
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()


def channels_last(pipe):
    pipe.unet.to(memory_format=torch.channels_last)


CHANGES = [sequential_offload, model_offload, group_offload, block_offload, checkpointing, compiled_in_place, compiled_module,
           processors, vae_options, channels_last]  # fmt: skip


def hooked(module):
    return [sorted(part._diffusers_hook.hooks) for part in module.modules() if hasattr(part, "_diffusers_hook")]


@pytest.fixture(scope="module")
def plain():
    return {of: jacobian_of(sd_pipeline(), sd_call(height=8, width=8), of=of)[0] for of in ("denoised", "decoded")}


@pytest.mark.parametrize("of", ["denoised", "decoded"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_jacobian_is_the_same(change, of, plain):
    pipe = sd_pipeline()
    change(pipe)
    network = pipe.unet
    before = {name: (p.dtype, p.device.type) for name, p in network.named_parameters()}, hooked(network)
    expected = np.asarray(pipe(**sd_call(height=8, width=8), generator=seeded())[0])
    found, _, images = jacobian_of(pipe, sd_call(height=8, width=8), of=of)
    torch.testing.assert_close(found, plain[of], rtol=1e-3, atol=1e-4 * float(plain[of].abs().max()))
    assert np.array_equal(images, expected)
    assert ({name: (p.dtype, p.device.type) for name, p in network.named_parameters()}, hooked(network)) == before
    assert pipe.unet is network
    assert np.array_equal(np.asarray(pipe(**sd_call(height=8, width=8), generator=seeded())[0]), expected)


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_layerwise_casting_is_probed_in_the_stored_weights(storage):
    """The same weights rounded once and kept in float32 must give the same Jacobian."""
    pipe, rounded = dit_pipeline(), dit_pipeline()
    pipe.transformer.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    stored = {name: p.dtype for name, p in pipe.transformer.named_parameters()}
    assert storage in stored.values()
    with torch.no_grad():
        for name, parameter in rounded.transformer.named_parameters():
            parameter.copy_(parameter.to(stored[name]).float())
    found, step, images = jacobian_of(pipe, dit_call())
    expected, _, rounded_images = jacobian_of(rounded, dit_call())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    np.testing.assert_allclose(images, rounded_images, atol=1e-5)
    assert step.certificate_error < 2e-5
    assert {name: p.dtype for name, p in pipe.transformer.named_parameters()} == stored
    assert np.array_equal(np.asarray(pipe(**dit_call(), generator=seeded())[0]), images)


CACHES = {
    "FirstBlockCache": lambda pipe: diffusers.FirstBlockCacheConfig(threshold=2.0),
    "TaylorSeer": lambda pipe: diffusers.TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=1, max_order=1),
    "PyramidAttentionBroadcast": lambda pipe: diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=("transformer_blocks",), current_timestep_callback=lambda: pipe._current_timestep,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CACHES)
def test_step_caches_are_passed_by_and_stay_on(name):
    """The trajectory is that of the cached run; the probes there are of the network without its cache."""
    pipe, uncached = (flux(num_layers=2, num_single_layers=2) for _ in range(2))
    call = flux_call(pipe, num_inference_steps=6)
    config = CACHES[name](pipe)
    pipe.transformer.enable_cache(config)
    cached_images = np.asarray(pipe(**call, generator=seeded())[0])
    plain_images = np.asarray(uncached(**call, generator=seeded())[0])
    with record(pipe, [3]) as recording:
        images = np.asarray(pipe(**call, generator=seeded())[0])
    assert np.array_equal(images, cached_images)
    assert not np.array_equal(cached_images, plain_images), "the cache must do something for this test to say anything"
    step = recording[0]
    with record(uncached, [3]) as reference:
        uncached(**call, generator=seeded())
    point = step.sample
    torch.testing.assert_close(step.denoiser.denoised(point), reference[0].denoiser.denoised(point), rtol=1e-4, atol=1e-5)
    dense = step.denoiser.select(0).jacobian(point[0]).dense()
    torch.testing.assert_close(dense, reference[0].denoiser.select(0).jacobian(point[0]).dense(), rtol=1e-3, atol=1e-5)
    assert "a step cache changed the recorded output by" in step.note
    assert pipe.transformer.is_cache_enabled
    assert pipe.transformer._cache_config is config
    assert np.array_equal(np.asarray(pipe(**call, generator=seeded())[0]), cached_images)


def test_every_cache_of_the_installed_diffusers_is_known():
    """A new release's cache hooks must not go unnoticed."""
    names = []
    for info in pkgutil.iter_modules(diffusers.hooks.__path__):
        if "cache" in info.name or "pyramid" in info.name:
            module = importlib.import_module(f"diffusers.hooks.{info.name}")
            names += [value for key, value in vars(module).items() if key.endswith("_HOOK") and isinstance(value, str)]
    assert len(names) > 8
    assert all(name.startswith(_CACHES) for name in names), names


def test_a_poisoned_difference_would_have_been_wrong():
    """Why caches are passed by: with one on, the network's own difference is another number."""
    pipe = flux(num_layers=2, num_single_layers=2)
    call = flux_call(pipe, num_inference_steps=4)
    with record(pipe, [1]) as recording:
        pipe(**call, generator=seeded())
    step = recording[0]
    x_t, h = step.sample, 0.05 * step.sigma_t * randn(*step.sample.shape, seed=4)
    network = step.network_calls[0]
    clean = [network.module(**network.kwargs | {"hidden_states": x_t + sign * h})[0] for sign in (1, -1)]
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=2.0))
    with pipe.transformer.cache_context("cond"):
        cached = [network.module(**network.kwargs | {"hidden_states": x_t + sign * h})[0] for sign in (1, -1)]
    wanted = clean[0] - clean[1]
    assert ((cached[0] - cached[1]) - wanted).norm() > 0.01 * wanted.norm()


def test_lora_adapters_are_part_of_the_network():
    from peft import LoraConfig

    pipe = sd_pipeline()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    pipe.unet.eval()
    merged = sd_pipeline()
    with torch.no_grad():
        for name, module in pipe.unet.named_modules():
            if hasattr(module, "lora_A"):
                delta = module.scaling["default"] * module.lora_B["default"].weight @ module.lora_A["default"].weight
                merged.unet.get_submodule(name).weight += delta
    found, _, _ = jacobian_of(pipe, sd_call(height=8, width=8))
    expected, _, _ = jacobian_of(merged, sd_call(height=8, width=8))
    without, _, _ = jacobian_of(sd_pipeline(), sd_call(height=8, width=8))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert (expected - without).norm() > 10 * (found - expected).norm()


@pytest.mark.parametrize("of", ["denoised", "sampled"])
def test_inference_mode_around_everything(of, plain):
    """Tensors made under inference_mode carry no derivatives; the recording keeps copies that do."""
    pipe = with_geometry(sd_pipeline())
    call = sd_call(height=8, width=8)
    with torch.inference_mode():
        trace = pipe.analyze_geometry(**call, generator=seeded(), record_steps=[1], of=of, progress=False)
        planned = pipe.plan_geometry(**call, generator=seeded(), record_steps=[1], of=of)
    outside = pipe.analyze_geometry(**call, generator=seeded(), record_steps=[1], of=of, progress=False)
    np.testing.assert_allclose(trace.steps[0].singular_values, outside.steps[0].singular_values, rtol=1e-4, atol=1e-5)
    assert planned.products == outside.settings["plan"]["products"]
    if of == "denoised":
        np.testing.assert_allclose(trace.steps[0].singular_values[0], torch.linalg.svdvals(plain["denoised"]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("generators", [1, 2])
def test_several_images_and_lists_of_generators(generators):
    """Image i of a call with its own generator is the image of that generator alone, and so is its Jacobian."""
    pipe = sd_pipeline()
    call = sd_call(height=8, width=8, num_images_per_prompt=2)
    given = [seeded(0), seeded(1)] if generators == 2 else seeded(0)
    with record(pipe, [2]) as recording:
        pipe(**call, generator=given)
    step = recording[0]
    assert len(step.sample) == 2
    latents = torch.cat([torch.randn(1, 4, 4, 4, generator=seeded(i)) for i in (0, 1)]) if generators == 2 else None
    with record(pipe, [2]) as alone:
        single = {"latents": latents[1:]} if latents is not None else {"latents": torch.randn(2, 4, 4, 4, generator=seeded(0))[1:]}
        pipe(**call | {"num_images_per_prompt": 1}, **single)
    torch.testing.assert_close(step.sample[1], alone[0].sample[0], rtol=1e-4, atol=1e-5)
    both, one = step.denoiser.select(1).jacobian(step.sample[1]), alone[0].denoiser.select(0).jacobian(step.sample[1])
    torch.testing.assert_close(both.dense(), one.dense(), rtol=1e-3, atol=1e-5)


def test_interrupted_pipelines_say_so():
    pipe = with_geometry(sd_pipeline())

    def interrupt(pipe, i, t, tensors):
        pipe._interrupt = i == 2
        return tensors

    with pytest.raises(RuntimeError, match="the run ended after 3 of 6 steps"):
        pipe.analyze_geometry(**sd_call(), callback_on_step_end=interrupt, record_steps=[1, 5], progress=False)
    trace = pipe.analyze_geometry(**sd_call(), callback_on_step_end=interrupt, record_steps=[1], progress=False)
    assert len(trace.steps) == 1


def test_the_copies_of_half_precision_are_in_the_plan():
    half, single = (with_geometry(sd_pipeline().to(dtype)) for dtype in (torch.bfloat16, torch.float32))
    rows = [p.plan_geometry(**sd_call(output_type="pt"), generator=seeded(), record_steps=[1]).rows() for p in (half, single)]
    copies = sum(4 * p.numel() for m in (half.unet, half.vae) for p in m.parameters())
    assert rows[0]["weights_memory_bytes"] == copies
    assert rows[1]["weights_memory_bytes"] == 0


HALF_CLASSES = ("DDPMPipeline", "StableDiffusionPipeline", "StableDiffusionXLImg2ImgPipeline", "FluxPipeline", "WanPipeline",
                "LTXPipeline", "QwenImagePipeline", "SanaPipeline", "CogVideoXPipeline")  # fmt: skip


def half(value):
    return value.to(torch.bfloat16) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("name", HALF_CLASSES)
def test_half_precision_pipelines_are_probed_whatever_they_round(name):
    """Held against the record in their own precision; the derivative is that of the float32 loop, and nothing is converted."""
    case = next(c for c in CASES if c.name == name)
    pipe = case.build().to(torch.bfloat16)
    call = {k: half(v) if "embed" in k else v for k, v in case.arguments(pipe).items()}
    call |= {"output_type": "pt"} if call.get("output_type") == "np" else {}
    networks = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
    before = [{key: (p.dtype, p.data_ptr()) for key, p in m.named_parameters()} for m in networks]
    with record(pipe, [1]) as recording:
        pipe(**call, generator=seeded())
    step = recording[0]
    jacobian = step.denoiser.select(0).jacobian(step.sample[0].float())
    u, v = (randn(*step.sample.shape[1:], seed=seed) for seed in (1, 2))
    assert float((jacobian.jvp(v) * u).sum()) == pytest.approx(float((jacobian.vjp(u) * v).sum()), rel=1e-3, abs=1e-3)
    assert jacobian.value.dtype == torch.float32
    assert "half precision output" in step.note
    assert [{key: (p.dtype, p.data_ptr()) for key, p in m.named_parameters()} for m in networks] == before


def test_pipelines_that_round_their_sample_say_so():
    class Rounding(diffusers.DDPMPipeline):
        @torch.no_grad()
        def __call__(self, generator=None, num_inference_steps=4):
            image = torch.randn(1, 1, 8, 8, generator=generator)
            self.scheduler.set_timesteps(num_inference_steps)
            for t in self.scheduler.timesteps:
                image = image.to(torch.bfloat16).float()
                image = self.scheduler.step(self.unet(image, t).sample, t, image, generator=generator).prev_sample
            return (image,)

    plain = ddpm_pipeline()
    with record(quiet(Rounding(plain.unet, plain.scheduler)), [1]) as recording:
        recording.pipe(generator=seeded())
    with pytest.raises(RuntimeError, match="rounds its sample to half precision within its loop.*load it with dtype=torch.float32"):
        recording[0].denoiser.denoised(recording[0].sample + 1e-3)


def test_guided_half_precision_has_its_branches():
    pipe = with_geometry(sd_pipeline().to(torch.bfloat16))
    call = sd_call(height=8, width=8, output_type="pt")
    call |= {name: half(value) for name, value in call.items() if "embed" in name}
    trace = pipe.analyze_geometry(**call, generator=seeded(), record_steps=[2], flipd=True, progress=False)
    assert trace.steps[0].engine == "replay"
    assert trace.steps[0].certificate_error < 2e-5
    assert np.isfinite(trace.steps[0].flipd.value).all()
    assert "half precision output" in trace.steps[0].details["note"]
