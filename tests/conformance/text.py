"""Tiny text encoders and tokenizers, made in code, for the classes that cannot be called with ready embeddings."""

import functools

import transformers
from case import random_weights
from tokenizers import Tokenizer, models, pre_tokenizers

LENGTH = 77


@functools.cache
def vocabulary():
    """CLIP's byte alphabet and its two special tokens: every word falls apart into letters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]


def clip_tokenizer(length=LENGTH):
    vocab = {token: i for i, token in enumerate(vocabulary())}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=length)


def clip_text_encoder(width=8, projected=False, length=LENGTH):
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary()), hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=length, projection_dim=width, pad_token_id=len(vocabulary()) - 1,
        bos_token_id=len(vocabulary()) - 2, eos_token_id=len(vocabulary()) - 1,
    )  # fmt: skip
    return random_weights((transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config))


def word_tokenizer(length=LENGTH):
    """A fast tokenizer over letters with pad, end and unknown tokens, which stands in for T5's, Gemma's and Llama's."""
    vocab = {"<pad>": 0, "</s>": 1, "<unk>": 2, "<s>": 3} | {token: i + 4 for i, token in enumerate(vocabulary())}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="<s>", model_max_length=length
    )


def t5_encoder(width=8):
    config = transformers.T5Config(
        vocab_size=len(vocabulary()) + 4, d_model=width, d_ff=16, d_kv=4, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return random_weights(transformers.T5EncoderModel(config))


def clip_vision_encoder(width=8, size=8, projection=8, patch=4):
    config = transformers.CLIPVisionConfig(
        hidden_size=width, projection_dim=projection, num_hidden_layers=1, num_attention_heads=2, image_size=size,
        intermediate_size=16, patch_size=patch,
    )  # fmt: skip
    return random_weights(transformers.CLIPVisionModelWithProjection(config))
