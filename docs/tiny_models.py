# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Tiny models of all families, for the pages that scripts write and for the tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Tiny:
    """A class of transformers with a tiny configuration; `variant` says what is special about it."""

    name: str
    options: dict[str, Any]
    variant: str = ""

    def model(self) -> PreTrainedModel:
        model_class = getattr(transformers, self.name)
        return model_class(model_class.config_class(**self.options)).eval()


def _tiny(task: str, names: Sequence[str], options: dict[str, Any], **variants: dict[str, Any]) -> list[Tiny]:
    return [
        Tiny(f"{name}For{task}Classification", {**options, **more}, variant.replace("_", " "))
        for name in names
        for variant, more in (variants or {"": {}}).items()
    ]


_COMMON = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
_IMAGE = {**_COMMON, "image_size": 16, "patch_size": 8}
# Grids of 8 and 4 tokens: their windows are padded, every second block shifts them.
_WINDOWS = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 3, "image_size": 32}
_PYRAMID = {
    "image_size": 32,
    "num_encoder_blocks": 2,
    "hidden_sizes": [16, 32],
    "depths": [1, 2],
    "num_attention_heads": [2, 4],
    "sr_ratios": [2, 1],
    "mlp_ratios": [2, 2],
    "patch_sizes": [3, 3],
    "strides": [4, 2],
}
_STAGES = {"hidden_sizes": [16, 32], "depths": [1, 2]}
_CNN = {"embedding_size": 8, **_STAGES}
_EFFICIENT = {
    "image_size": 32,
    "width_coefficient": 0.025,
    "depth_coefficient": 1.0,
    "hidden_dim": 32,
    "in_channels": [32, 320, 640],
    "out_channels": [320, 640, 640],
    "kernel_sizes": [3, 3, 5],
    "strides": [1, 2, 1],
    "num_block_repeats": [1, 2, 1],
    "expand_ratios": [1, 4, 4],
}
_TEXT = {**_COMMON, "vocab_size": 50, "max_position_embeddings": 40}
_DEBERTA = {
    **_TEXT,
    "pad_token_id": 0,
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "position_buckets": 4,
    "max_relative_positions": 20,
}
_DECODER = {**_TEXT, "num_key_value_heads": 2, "pad_token_id": 0, "head_dim": 8}
_SPECTROGRAM = {"patch_size": 4, "num_mel_bins": 8, "max_length": 12, "frequency_stride": 4, "time_stride": 4}
_SPEECH = {
    **_COMMON,
    "conv_dim": [16, 16],
    "conv_kernel": [8, 4],
    "conv_stride": [4, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "feat_extract_norm": "layer",  # with a norm over time, padding changes the features themselves
    "classifier_proj_size": 24,
    "vocab_size": 20,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
}

GROUPS: dict[str, list[Tiny]] = {
    "Image transformers": [
        *_tiny("Image", ["ViT"], _IMAGE),
        *_tiny("Image", ["ViTMSN"], _IMAGE),
        *_tiny("Image", ["DeiT"], _IMAGE),
        Tiny("DeiTForImageClassificationWithTeacher", _IMAGE),
        *_tiny(
            "Image",
            ["Beit"],
            _IMAGE,
            own_position_bias={"use_relative_position_bias": True},
            shared_position_bias={"use_shared_relative_position_bias": True},
        ),
        *_tiny("Image", ["Dinov2"], {**_IMAGE, "mlp_ratio": 2}, MLP={}, SwiGLU={"use_swiglu_ffn": True}),
        *_tiny("Image", ["CLIP", "Siglip"], {"vision_config": _IMAGE}),
        *_tiny("Image", ["Swin", "Swinv2"], _WINDOWS),
        *_tiny("Image", ["PvtV2"], _PYRAMID, spatial_reduction={}, linear_attention={"linear_attention": True}),
    ],
    "Convolutional networks": [
        *_tiny("Image", ["ResNet"], _CNN, basic={"layer_type": "basic"}, bottleneck={"layer_type": "bottleneck"}),
        *_tiny("Image", ["RegNet"], {**_CNN, "groups_width": 4}, X={"layer_type": "x"}, Y={"layer_type": "y"}),
        *_tiny("Image", ["ConvNext"], {**_STAGES, "num_stages": 2, "patch_size": 2, "image_size": 16}),
        *_tiny(
            "Image",
            ["MobileNetV2"],
            {"depth_multiplier": 0.25, "depth_divisible_by": 2, "min_depth": 4, "image_size": 16},
        ),
        *_tiny("Image", ["EfficientNet"], _EFFICIENT),
    ],
    "Text encoders": [
        *_tiny("Sequence", ["Bert", "Roberta", "XLMRoberta", "Camembert", "Electra", "MPNet"], _TEXT),
        *_tiny(
            "Sequence", ["DistilBert"], {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64, "vocab_size": 50}
        ),
        *_tiny(
            "Sequence",
            ["ModernBert"],
            {**_TEXT, "pad_token_id": 0, "local_attention": 4, "global_attn_every_n_layers": 2},
        ),
        *_tiny(
            "Sequence",
            ["DebertaV2"],
            _DEBERTA,
            shared_position_projections={"share_att_key": True, "norm_rel_ebd": "layer_norm"},
            own_position_projections={"share_att_key": False, "conv_kernel_size": 3},
        ),
        *_tiny("Sequence", ["EuroBert"], _DECODER),
        *_tiny("Sequence", ["NomicBert"], {**_TEXT, "head_dim": 8, "pad_token_id": 0}),
    ],
    "Text decoders": [
        *_tiny("Sequence", ["Llama", "Qwen2", "Qwen3", "Gemma"], _DECODER),
        *_tiny(
            "Sequence",
            ["GPT2"],
            {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 50, "n_positions": 40, "pad_token_id": 0},
        ),
    ],
    "Audio": [
        *_tiny("Audio", ["AST"], {**_COMMON, **_SPECTROGRAM}),
        *_tiny("Sequence", ["Wav2Vec2"], _SPEECH),
        *_tiny("Sequence", ["Hubert"], {**_SPEECH, "do_stable_layer_norm": True}),
        *_tiny("Sequence", ["WavLM"], _SPEECH),
    ],
}
