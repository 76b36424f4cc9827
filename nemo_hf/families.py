# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""The architecture table: one entry per model family of transformers. The words are in `architectures.py`."""

from __future__ import annotations

import dataclasses

from .architectures import (
    Architecture,
    Attention,
    Chain,
    Convolution,
    FeedForward,
    StockLayout,
    Stream,
    register_architecture,
)


# ---- Attention and feed-forward layers that several families share ----

_VIT_ATTENTION = Attention(
    layer="attention",
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    output="attention.o_proj",
    num_heads=("num_attention_heads",),
    head_size=("head_dim",),
)
_VIT_FEED_FORWARD = FeedForward(up="mlp.fc1", activation="mlp.activation_fn", down="mlp.fc2")
_BERT_ATTENTION = Attention(
    layer="attention.self",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    num_heads=("num_attention_heads",),
    head_size=("attention_head_size",),
    all_head_size=("all_head_size",),
)
_BERT_FEED_FORWARD = FeedForward(
    up="intermediate.dense", activation="intermediate.intermediate_act_fn", down="output.dense"
)
_CLIP_ATTENTION = Attention(
    layer="self_attn",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.out_proj",
    num_heads=("num_heads",),
    head_size=("head_dim",),
)
_LLAMA_ATTENTION = Attention(
    layer="self_attn",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.o_proj",
    head_size=("head_dim",),
    rotary=True,
)
_LLAMA_FEED_FORWARD = FeedForward(
    up="mlp.up_proj", gate="mlp.gate_proj", activation="mlp.act_fn", down="mlp.down_proj"
)


_VIT_STOCK = StockLayout("intermediate_size", "num_attention_heads", head_size="head_dim", cuts_units=True)
_FFN_STOCK = StockLayout("intermediate_size")
_LLAMA_STOCK = StockLayout("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", divides=True)


def _conv_layer(path: str, squeeze_excite: tuple[str, str] | None = None, optional: bool = False) -> Convolution:
    """The conv layer of ResNet, RegNet and MobileNet in transformers: convolution, normalization, activation."""
    return Convolution(
        f"{path}.convolution", f"{path}.normalization", f"{path}.activation", squeeze_excite, optional=optional
    )


_SHORTCUT = Convolution("shortcut.convolution", "shortcut.normalization", optional=True)

# ---- Images ----

_IMAGE = [
    Architecture(
        model_type="vit",
        heads={"ViTForImageClassification": ("classifier",)},
        blocks="vit.layers.*",
        attention=_VIT_ATTENTION,
        feed_forward=_VIT_FEED_FORWARD,
        stock=_VIT_STOCK,
    ),
    Architecture(
        model_type="vit_msn",
        heads={"ViTMSNForImageClassification": ("classifier",)},
        blocks="vit.layers.*",
        attention=_VIT_ATTENTION,
        feed_forward=_VIT_FEED_FORWARD,
        stock=_VIT_STOCK,
    ),
    Architecture(
        model_type="deit",
        heads={
            "DeiTForImageClassification": ("classifier",),
            "DeiTForImageClassificationWithTeacher": ("cls_classifier", "distillation_classifier"),
        },
        blocks="deit.layers.*",
        attention=_VIT_ATTENTION,
        feed_forward=_VIT_FEED_FORWARD,
        stock=_VIT_STOCK,
    ),
    Architecture(
        model_type="beit",
        heads={"BeitForImageClassification": ("classifier",)},
        blocks="beit.layers.*",
        attention=dataclasses.replace(
            _VIT_ATTENTION,
            head_biases=("relative_position_bias.relative_position_bias_table",),
            shared_head_bias="beit.shared_position_bias",
        ),
        feed_forward=_VIT_FEED_FORWARD,
        stock=_VIT_STOCK,
    ),
    Architecture(
        model_type="dinov2",
        heads={"Dinov2ForImageClassification": ("classifier",)},
        blocks="dinov2.encoder.layer.*",
        attention=_VIT_ATTENTION,
        feed_forward=(_VIT_FEED_FORWARD, _LLAMA_FEED_FORWARD),
        stock=dataclasses.replace(_VIT_STOCK, intermediate_size=None),
    ),
    *(
        Architecture(
            model_type=model_type,
            heads={f"{name}ForImageClassification": ("classifier",)},
            blocks="vision_model.encoder.layers.*",
            attention=_CLIP_ATTENTION,
            feed_forward=_VIT_FEED_FORWARD,
        )
        for model_type, name in (("clip", "CLIP"), ("siglip", "Siglip"))
    ),
    Architecture(
        model_type="swin",
        heads={"SwinForImageClassification": ("classifier",)},
        blocks="swin.encoder.layers.*.blocks.*",
        attention=dataclasses.replace(
            _VIT_ATTENTION,
            head_biases=("attention.relative_position_bias.relative_position_bias_table",),
            windowed=True,
        ),
        feed_forward=_VIT_FEED_FORWARD,
    ),
    Architecture(
        model_type="swinv2",
        heads={"Swinv2ForImageClassification": ("classifier",)},
        blocks="swinv2.encoder.layers.*.blocks.*",
        attention=dataclasses.replace(
            _BERT_ATTENTION,
            head_rows=("attention.self.logit_scale", "attention.self.continuous_position_bias_mlp.2"),
            cosine=True,
            windowed=True,
        ),
        feed_forward=_BERT_FEED_FORWARD,
    ),
    Architecture(
        model_type="pvt_v2",
        heads={"PvtV2ForImageClassification": ("classifier",)},
        blocks="pvt_v2.encoder.layers.*.blocks.*",
        attention=Attention(
            layer="attention",
            query="attention.query",
            key="attention.key",
            value="attention.value",
            output="attention.proj",
            num_heads=("num_attention_heads",),
            head_size=("attention_head_size",),
            all_head_size=("all_head_size",),
            reasons=dict.fromkeys(
                ("query", "key", "value"),
                "its forward pass expects the heads to be as wide together as the residual stream",
            ),
        ),
        feed_forward=FeedForward(
            up="mlp.dense1", depthwise="mlp.dwconv.dwconv", activation="mlp.intermediate_act_fn", down="mlp.dense2"
        ),
    ),
    Architecture(
        model_type="resnet",
        heads={"ResNetForImageClassification": ("classifier.1",)},
        chains=(
            Chain((_conv_layer("embedder"),), path="resnet.embedder"),
            Chain((_conv_layer("layer.*"),), path="resnet.encoder.stages.*.layers.*"),
            Chain((_SHORTCUT,), path="resnet.encoder.stages.*.layers.*", shortcut=True),
        ),
        stream=Stream(reader="classifier.1", activation="activation"),
    ),
    Architecture(
        model_type="regnet",
        heads={"RegNetForImageClassification": ("classifier.1",)},
        chains=(
            Chain((_conv_layer("embedder"),), path="regnet.embedder"),
            Chain(
                (
                    _conv_layer("layer.0"),
                    _conv_layer("layer.1", squeeze_excite=("layer.2.attention.0", "layer.2.attention.2")),
                    _conv_layer("layer.2", optional=True),  # of X layers
                    _conv_layer("layer.3", optional=True),  # of Y layers, whose layer.2 is the squeeze-excite block
                ),
                path="regnet.encoder.stages.*.layers.*",
            ),
            Chain((_SHORTCUT,), path="regnet.encoder.stages.*.layers.*", shortcut=True),
        ),
        stream=Stream(reader="classifier.1", activation="activation"),
    ),
    Architecture(
        model_type="convnext",
        heads={"ConvNextForImageClassification": ("classifier",)},
        blocks="convnext.encoder.stages.*.layers.*",
        # The depthwise convolution goes into a LayerNorm, which mixes its channels: it is not masked.
        feed_forward=FeedForward(up="pwconv1", activation="act", down="pwconv2"),
    ),
    Architecture(
        model_type="mobilenet_v2",
        heads={"MobileNetV2ForImageClassification": ("classifier",)},
        chains=(
            Chain(
                (
                    _conv_layer("first_conv"),
                    _conv_layer("expand_1x1", optional=True),
                    _conv_layer("conv_3x3"),
                    _conv_layer("reduce_1x1"),
                ),
                path="mobilenet_v2.conv_stem",
            ),
            Chain(
                (_conv_layer("expand_1x1"), _conv_layer("conv_3x3"), _conv_layer("reduce_1x1")),
                path="mobilenet_v2.layer.*",
            ),
            Chain((_conv_layer("mobilenet_v2.conv_1x1"),), reader="classifier"),
        ),
        stream=Stream(),
    ),
    Architecture(
        model_type="efficientnet",
        heads={"EfficientNetForImageClassification": ("classifier",)},
        chains=(
            Chain((Convolution("convolution", "batchnorm", "activation"),), path="efficientnet.embeddings"),
            Chain(
                (
                    Convolution("expansion.expand_conv", "expansion.expand_bn", "expansion.expand_act", optional=True),
                    Convolution(
                        "depthwise_conv.depthwise_conv",
                        "depthwise_conv.depthwise_norm",
                        "depthwise_conv.depthwise_act",
                        squeeze_excite=("squeeze_excite.reduce", "squeeze_excite.expand"),
                    ),
                    Convolution("projection.project_conv", "projection.project_bn"),
                ),
                path="efficientnet.encoder.blocks.*",
            ),
            Chain(
                (
                    Convolution(
                        "efficientnet.encoder.top_conv",
                        "efficientnet.encoder.top_bn",
                        "efficientnet.encoder.top_activation",
                    ),
                ),
                reader="classifier",
            ),
        ),
        stream=Stream(),
    ),
]

# ---- Text: encoders ----


def _bert_like(model_type: str, prefix: str, class_name: str, head: str) -> Architecture:
    return Architecture(
        model_type=model_type,
        heads={f"{class_name}ForSequenceClassification": (head,)},
        blocks=f"{prefix}.encoder.layer.*",
        attention=_BERT_ATTENTION,
        feed_forward=_BERT_FEED_FORWARD,
        stock=_FFN_STOCK,
    )


_TEXT = [
    _bert_like("bert", "bert", "Bert", "classifier"),
    _bert_like("roberta", "roberta", "Roberta", "classifier.out_proj"),
    _bert_like("xlm-roberta", "roberta", "XLMRoberta", "classifier.out_proj"),
    _bert_like("camembert", "roberta", "Camembert", "classifier.out_proj"),
    _bert_like("electra", "electra", "Electra", "classifier.out_proj"),
    Architecture(
        model_type="mpnet",
        heads={"MPNetForSequenceClassification": ("classifier.out_proj",)},
        blocks="mpnet.encoder.layer.*",
        attention=Attention(
            layer="attention.attn",
            query="attention.attn.q",
            key="attention.attn.k",
            value="attention.attn.v",
            output="attention.attn.o",
            num_heads=("num_attention_heads",),
            head_size=("attention_head_size",),
            all_head_size=("all_head_size",),
            shared_head_bias="mpnet.encoder.relative_attention_bias",
            inline_scale=True,
        ),
        feed_forward=_BERT_FEED_FORWARD,
        stock=_FFN_STOCK,
    ),
    Architecture(
        model_type="distilbert",
        heads={"DistilBertForSequenceClassification": ("classifier",)},
        blocks="distilbert.transformer.layer.*",
        attention=Attention(
            layer="attention",
            query="attention.q_lin",
            key="attention.k_lin",
            value="attention.v_lin",
            output="attention.out_lin",
            num_heads=("n_heads",),
            head_size=("attention_head_size",),
        ),
        feed_forward=FeedForward(up="ffn.lin1", activation="ffn.activation", down="ffn.lin2"),
        stock=StockLayout("hidden_dim"),
    ),
    Architecture(
        model_type="modernbert",
        heads={"ModernBertForSequenceClassification": ("classifier",)},
        blocks="model.layers.*",
        attention=Attention(
            layer="attn",
            query="attn.Wqkv",
            key="attn.Wqkv",
            value="attn.Wqkv",
            output="attn.Wo",
            head_size=("head_dim",),
            rotary=True,
            inline_scale=True,
        ),
        feed_forward=FeedForward(up="mlp.Wi", gate="mlp.Wi", activation="mlp.act", down="mlp.Wo"),
        stock=_FFN_STOCK,
    ),
    Architecture(
        model_type="deberta-v2",
        heads={"DebertaV2ForSequenceClassification": ("classifier",)},
        blocks="deberta.encoder.layer.*",
        attention=dataclasses.replace(
            _BERT_ATTENTION,
            query="attention.self.query_proj",
            key="attention.self.key_proj",
            value="attention.self.value_proj",
            head_rows=("attention.self.pos_query_proj", "attention.self.pos_key_proj"),
            own_value_size=True,
            reasons=dict.fromkeys(
                ("query", "key"),
                "relative positions share it or meet its units in the scores, and they have no gates",
            ),
        ),
        feed_forward=_BERT_FEED_FORWARD,
        stock=_FFN_STOCK,
    ),
    Architecture(
        model_type="eurobert",
        heads={"EuroBertForSequenceClassification": ("classifier",)},
        blocks="model.layers.*",
        attention=_LLAMA_ATTENTION,
        feed_forward=_LLAMA_FEED_FORWARD,
        stock=_LLAMA_STOCK,
    ),
    Architecture(
        model_type="nomic_bert",
        heads={"NomicBertForSequenceClassification": ("classifier",)},
        blocks="nomic_bert.layers.*",
        attention=_LLAMA_ATTENTION,
        feed_forward=_LLAMA_FEED_FORWARD,
    ),
]

# ---- Text: decoders as sequence classifiers ----


def _llama_like(model_type: str, class_name: str, **attention: object) -> Architecture:
    return Architecture(
        model_type=model_type,
        heads={f"{class_name}ForSequenceClassification": ("score",)},
        blocks="model.layers.*",
        attention=dataclasses.replace(_LLAMA_ATTENTION, **attention),
        feed_forward=_LLAMA_FEED_FORWARD,
        stock=_LLAMA_STOCK,
    )


_DECODERS = [
    _llama_like("llama", "Llama"),
    _llama_like("qwen2", "Qwen2"),
    _llama_like("qwen3", "Qwen3", unit_norms=("self_attn.q_norm", "self_attn.k_norm")),
    _llama_like("gemma", "Gemma"),
    Architecture(
        model_type="gpt2",
        heads={"GPT2ForSequenceClassification": ("score",)},
        blocks="transformer.h.*",
        attention=Attention(
            layer="attn",
            query="attn.c_attn",
            key="attn.c_attn",
            value="attn.c_attn",
            output="attn.c_proj",
            num_heads=("num_heads",),
            head_size=("head_dim",),
            all_head_size=("split_size",),
        ),
        feed_forward=FeedForward(up="mlp.c_fc", activation="mlp.act", down="mlp.c_proj"),
        stock=StockLayout("n_inner"),
    ),
]

# ---- Audio ----


def _speech(model_type: str, prefix: str, class_name: str, **attention: object) -> Architecture:
    """Wav2Vec2 and its kin. Their attention_mask is over samples of sound; the encoder gets the one over frames."""
    return Architecture(
        model_type=model_type,
        heads={f"{class_name}ForSequenceClassification": ("classifier",)},
        blocks=f"{prefix}.encoder.layers.*",
        attention=Attention(
            layer="attention",
            query="attention.q_proj",
            key="attention.k_proj",
            value="attention.v_proj",
            output="attention.out_proj",
            num_heads=("num_heads",),
            head_size=("head_dim",),
            **attention,
        ),
        feed_forward=FeedForward(
            up="feed_forward.intermediate_dense",
            activation="feed_forward.intermediate_act_fn",
            down="feed_forward.output_dense",
        ),
        encoder=f"{prefix}.encoder",
        stock=_FFN_STOCK,
    )


_AUDIO = [
    Architecture(
        model_type="audio-spectrogram-transformer",
        heads={"ASTForAudioClassification": ("classifier.dense",)},
        blocks="audio_spectrogram_transformer.layers.*",
        attention=_VIT_ATTENTION,
        feed_forward=_VIT_FEED_FORWARD,
        stock=_VIT_STOCK,
    ),
    _speech("wav2vec2", "wav2vec2", "Wav2Vec2"),
    _speech("hubert", "hubert", "Hubert"),
    _speech(
        "wavlm",
        "wavlm",
        "WavLM",
        reasons=dict.fromkeys(
            ("query", "key", "value", "output"), "the forward pass uses its weights without calling it"
        ),
    ),
]

for _entry in _IMAGE + _TEXT + _DECODERS + _AUDIO:
    register_architecture(_entry)
