"""One small randomly initialised model of each of many families of Hugging Face transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

BATCH, LENGTH, SIDE, WORDS = 2, 8, 32, 101

# The names that most configurations share; a configuration ignores those that it doesn't know.
TEXT = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 64}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 2,
}
IMAGE = {
    "image_size": SIDE,
    "patch_size": 8,
    "num_channels": 3,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "albert": {**TEXT, "embedding_size": 16, "num_hidden_groups": 1},
    "bart": {**TEXT, **SEQ2SEQ},
    "bert": TEXT,
    "bloom": {**TEXT, "n_layer": 2, "n_head": 4},
    "codegen": {**TEXT, **GPT, "rotary_dim": 4},
    "convnext": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "deberta-v2": {
        **TEXT,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
    },
    "deit": IMAGE,
    "dinov2": IMAGE,
    "distilbert": {**TEXT, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    "electra": {**TEXT, "embedding_size": 32},
    "falcon": {**TEXT, "num_kv_heads": 4},
    "gemma": {**TEXT, "head_dim": 8},
    "gpt2": {**TEXT, **GPT},
    "gpt_neo": {**TEXT, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]},
    "gpt_neox": TEXT,
    "gptj": {**TEXT, **GPT, "rotary_dim": 4},
    "llama": TEXT,
    "mamba": {**TEXT, "state_size": 4},
    "mistral": TEXT,
    "mixtral": {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mobilebert": {
        **TEXT,
        "embedding_size": 32,
        "intra_bottleneck_size": 32,
        "true_hidden_size": 32,
    },
    "opt": {**TEXT, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "pegasus": {**TEXT, **SEQ2SEQ},
    "phi": TEXT,
    "qwen2": TEXT,
    "qwen3": {**TEXT, "head_dim": 8},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "roberta": {**TEXT, "pad_token_id": 1},
    "segformer": {
        "hidden_sizes": [8, 16, 24, 32],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 2, 4],
        "decoder_hidden_size": 32,
    },
    "swin": {
        "image_size": SIDE,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": [1, 2],
        "num_heads": [2, 4],
        "window_size": 4,
    },
    "t5": {**TEXT, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4},
    "vit": IMAGE,
    "wav2vec2": {
        **TEXT,
        "conv_dim": [16, 16],
        "conv_kernel": [8, 4],
        "conv_stride": [4, 4],
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "mask_time_prob": 0.0,
    },
    "whisper": {
        **TEXT,
        **SEQ2SEQ,
        "num_mel_bins": 16,
        "max_source_positions": 16,
        "max_target_positions": 32,
    },
    "xlm-roberta": {**TEXT, "pad_token_id": 1},
    "xlnet": {"vocab_size": WORDS, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
}


def make(family: str) -> nn.Module:
    """The base model of a family, with a small configuration."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(family, **FAMILIES[family])
    return AutoModel.from_config(config)


def arguments(family: str) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """What the model of that family is called with."""
    from transformers import AutoConfig

    words = torch.randint(3, WORDS, (BATCH, LENGTH))
    if family == "wav2vec2":
        return (), {"input_values": torch.randn(BATCH, 400)}
    if family == "whisper":
        return (), {"input_features": torch.randn(BATCH, 16, 32), "decoder_input_ids": words}
    config = AutoConfig.for_model(family, **FAMILIES[family])
    if "vocab_size" not in FAMILIES[family]:
        return (), {"pixel_values": torch.randn(BATCH, 3, SIDE, SIDE)}
    found = {"input_ids": words}
    if config.is_encoder_decoder:
        found["decoder_input_ids"] = words.flip(1)
    return (), found
