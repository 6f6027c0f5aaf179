"""Audio pipelines: spectrograms (AudioLDM 1 and 2) and waveforms (Stable Audio)."""

import diffusers
import transformers
from case import Case, autoencoder, pipeline, random_weights, schedulers
from pixel import LINEAR, conditional_unet
from stable_diffusion import embeddings
from text import t5_encoder
from tiny import randn
from transformers_2d import VP

SOUND = {"num_inference_steps": 4, "output_type": "latent", "guidance_scale": 3.5}
SECONDS = 0.004


def vocoder():
    """Eight mel bins and a factor of four in time."""
    config = transformers.SpeechT5HifiGanConfig(
        model_in_dim=8, sampling_rate=4000, upsample_initial_channel=8, upsample_rates=[2, 2], upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 3]], normalize_before=False,
    )  # fmt: skip
    return random_weights(transformers.SpeechT5HifiGan(config))


def mel_autoencoder():
    return autoencoder(in_channels=1, out_channels=1)


def language_model():
    """Only asked for its dtype where the generated embeddings are given."""
    config = transformers.GPT2Config(n_embd=8, n_head=1, n_layer=1, n_positions=16, vocab_size=8)
    return random_weights(transformers.GPT2LMHeadModel(config))


def audio_ldm_2():
    unet = diffusers.AudioLDM2UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, sample_size=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=(8, 8), attention_head_dim=4,
    )  # fmt: skip
    return pipeline(
        "AudioLDM2Pipeline", vae=mel_autoencoder(), text_encoder=None, text_encoder_2=t5_encoder(), projection_model=None,
        language_model=language_model(), tokenizer=None, tokenizer_2=None, feature_extractor=None, unet=random_weights(unet),
        scheduler=diffusers.DDIMScheduler(**LINEAR), vocoder=vocoder(),
    )  # fmt: skip


def audio_ldm_2_call(pipe):
    generated = {"generated_prompt_embeds": randn(1, 4, 8, seed=5), "negative_generated_prompt_embeds": randn(1, 4, 8, seed=6)}
    ones = {name: randn(1, 5).mul(0).add(1).long() for name in ("attention_mask", "negative_attention_mask")}
    return embeddings(audio_length_in_s=4 * SECONDS, **generated, **ones) | SOUND


def spectrogram_unet():
    return conditional_unet(
        cross_attention_dim=(8, 16), class_embed_type="simple_projection", projection_class_embeddings_input_dim=8,
        class_embeddings_concat=True,
    )  # fmt: skip


def clap_text_encoder():
    """Only asked for its dtype where the embeddings are given."""
    config = transformers.ClapTextConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, projection_dim=8
    )
    return random_weights(transformers.ClapTextModelWithProjection(config))


def audio_ldm():
    return pipeline(
        "AudioLDMPipeline", vae=mel_autoencoder(), text_encoder=clap_text_encoder(), tokenizer=None, unet=spectrogram_unet(),
        vocoder=vocoder(), scheduler=diffusers.DDIMScheduler(**LINEAR),
    )  # fmt: skip


def audio_ldm_call(pipe):
    embeds = {"prompt_embeds": randn(1, 8, seed=3), "negative_prompt_embeds": randn(1, 8, seed=4)}
    return embeds | SOUND | {"audio_length_in_s": 4 * SECONDS}


def stable_audio():
    transformer = diffusers.StableAudioDiTModel(
        sample_size=8, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2, num_key_value_attention_heads=1,
        out_channels=4, cross_attention_dim=16, time_proj_dim=8, global_states_input_dim=32, cross_attention_input_dim=16,
    )  # fmt: skip
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=4, downsampling_ratios=[1, 2], decoder_channels=4, decoder_input_channels=4, audio_channels=2,
        channel_multiples=[2, 4], sampling_rate=4,
    )  # fmt: skip
    projection = diffusers.pipelines.stable_audio.StableAudioProjectionModel(
        text_encoder_dim=8, conditioning_dim=16, min_value=0, max_value=32
    )
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(
        prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential", sigma_min=0.3, sigma_max=500
    )
    return pipeline(
        "StableAudioPipeline", vae=random_weights(vae, gain=0.3), text_encoder=t5_encoder(), tokenizer=None,
        projection_model=random_weights(projection), transformer=random_weights(transformer), scheduler=scheduler,
    )  # fmt: skip


def stable_audio_call(pipe):
    ones = {name: randn(1, 5).mul(0).add(1).long() for name in ("attention_mask", "negative_attention_mask")}
    return embeddings(audio_end_in_s=3.0, **ones)


CASES = (
    Case("AudioLDM2Pipeline", audio_ldm_2, audio_ldm_2_call, VP[1:], "audio", "spectrogram latents, two text streams"),
    Case("AudioLDMPipeline", audio_ldm, audio_ldm_call, VP[1:], "audio", "spectrogram latents, the text as a class"),
    Case("StableAudioPipeline", stable_audio, stable_audio_call, schedulers("EDMEulerScheduler"), "audio", "waveform latents"),
)  # fmt: skip
