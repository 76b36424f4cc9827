# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""
The convolutional networks of the papers on modular training, for images of 32x32 pixels: VGG16, ResNet18, MobileNet,
SimCNN and ResCNN.

Importing this file registers them with transformers and with nemo_hf; `docs/add_an_architecture.md` explains how. They
are our own implementations: VGG16, ResNet18 and MobileNet of the usual forms for CIFAR-10, SimCNN and ResCNN of what
Modularizing-while-Training (MwT, arXiv 2306.09376) and the work before it say about them. The gates of every
convolution but the first multiply the output of its batch norm, before the activation.
"""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import can_return_tuple

from nemo_hf import Architecture, Chain, Convolution, Stream, register_architecture


# ---- What the five share ----


class CNNConfig(PreTrainedConfig):
    """
    The options that all have.

    Args:
        num_channels (`int`, *optional*, defaults to 3): channels of an image.
        image_size (`int`, *optional*, defaults to 32): its height and width in pixels.
        width_multiplier (`float`, *optional*, defaults to 1.0): multiplies the width of every layer but the
            classifier; no layer gets narrower than 4.
    """

    num_channels: int = 3
    image_size: int = 32
    width_multiplier: float = 1.0

    def width(self, channels: int) -> int:
        """The width of a layer that has `channels` in the published network."""
        return max(4, round(channels * self.width_multiplier))


class ConvLayer(nn.Module):
    """
    A convolution that keeps the size of the image (with stride 2: halves it), batch norm, ReLU.

    Args:
        in_channels, out_channels, kernel_size, stride, groups, bias: of the convolution.
        relu (`bool`, *optional*, defaults to `True`): whether the ReLU is there.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        relu: bool = True,
    ):
        super().__init__()
        self.convolution = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=bias
        )
        self.norm = nn.BatchNorm2d(out_channels)
        self.activation = nn.ReLU() if relu else nn.Identity()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.activation(self.norm(self.convolution(images)))


class HiddenLayer(nn.Module):
    """A fully connected layer before the classifier, with ReLU and dropout."""

    def __init__(self, in_features: int, out_features: int, dropout: float):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)
        self.activation = nn.ReLU()
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.activation(self.linear(features)))


class ResidualBlock(nn.Module):
    """
    Two convolutions whose result is added to the input, then ReLU. Where the number of channels or the size of the
    image changes, the input goes through a 1x1 convolution with batch norm.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        self.first = ConvLayer(in_channels, out_channels, stride=stride)
        self.second = ConvLayer(out_channels, out_channels, relu=False)
        if stride != 1 or in_channels != out_channels:
            self.shortcut = ConvLayer(in_channels, out_channels, kernel_size=1, stride=stride, relu=False)
        else:
            self.shortcut = nn.Identity()
        self.activation = nn.ReLU()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.activation(self.second(self.first(images)) + self.shortcut(images))


class CNNForImageClassification(PreTrainedModel):
    """What a network adds is its layers, `self.classifier` and `features`."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d | nn.Linear):
            # No norm stands behind the linear layers: without the gain of ReLU the first logits are moderate.
            init.kaiming_normal_(module.weight, nonlinearity="relu" if isinstance(module, nn.Conv2d) else "linear")

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """What the classifier reads, of shape `(batch_size, features)`."""
        raise NotImplementedError

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, image_size, image_size)`): the images.
            labels (`torch.Tensor` of shape `(batch_size,)`, *optional*): ids of their labels, for the loss.
        """
        logits = self.classifier(self.features(pixel_values))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(loss=loss, logits=logits)


_LAYERS = Convolution("layers.*.convolution", norm="layers.*.norm", activation="layers.*.activation")
# The first layer of a residual network has a chain of its own: it writes to the residual stream.
_STEM = Chain((Convolution("convolution", norm="norm"),), path="stem")


def _register(
    config: type[CNNConfig], model: type[CNNForImageClassification], *chains: Chain, stream: Stream | None = None
) -> None:
    """Tell transformers which class belongs to the model type, and nemo_hf how its layers are tied."""
    AutoConfig.register(config.model_type, config)
    AutoModelForImageClassification.register(config, model)
    heads: dict[str, tuple[str, ...]] = {model.__name__: ("classifier",)}
    register_architecture(Architecture(config.model_type, heads, chains=tuple(chains), stream=stream))


# ---- Plain stacks: VGG16 and SimCNN ----


class CifarVGGConfig(CNNConfig):
    """
    The configuration of [`CifarVGGForImageClassification`].

    Args:
        depths (`tuple[int, ...]`, *optional*, defaults to `(2, 2, 3, 3, 3)`): convolutions of the five stages.
        num_pools (`int`, *optional*, defaults to 5): how many stages, from the first, end in max-pooling.
        num_hidden_layers (`int`, *optional*, defaults to 2): fully connected layers before the classifier.
        dropout (`float`, *optional*, defaults to 0.5): of these layers.
    """

    model_type = "cifar_vgg"

    depths: list[int] | tuple[int, ...] = (2, 2, 3, 3, 3)
    num_pools: int = 5
    num_hidden_layers: int = 2
    dropout: float = 0.5


class CifarVGGForImageClassification(CNNForImageClassification):
    """
    VGG16 with batch norm: 13 convolutions, max-pooling after each of five stages, which leaves one position of an
    image of 32x32, and three fully connected layers. 15.25 million parameters with ten labels.
    """

    config_class = CifarVGGConfig

    def __init__(self, config: CifarVGGConfig):
        super().__init__(config)
        layers: list[nn.Module] = []
        channels = config.num_channels
        for stage, (width, depth) in enumerate(zip((64, 128, 256, 512, 512), config.depths, strict=True)):
            for _ in range(depth):
                layers.append(ConvLayer(channels, config.width(width), bias=True))
                channels = config.width(width)
            if stage < config.num_pools:
                layers.append(nn.MaxPool2d(2))
        self.layers = nn.Sequential(*layers)
        sizes = [channels * (config.image_size // 2**config.num_pools) ** 2]
        sizes += config.num_hidden_layers * [config.width(512)]
        self.hidden = nn.Sequential(
            *(HiddenLayer(*pair, config.dropout) for pair in zip(sizes, sizes[1:], strict=False))
        )
        self.classifier = nn.Linear(sizes[-1], config.num_labels)
        self.post_init()

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.hidden(self.layers(pixel_values).flatten(1))


class SimCNNConfig(CifarVGGConfig):
    """The configuration of [`SimCNNForImageClassification`]; see [`CifarVGGConfig`]."""

    model_type = "simcnn"

    num_pools: int = 4


class SimCNNForImageClassification(CifarVGGForImageClassification):
    """
    SimCNN: a plain stack of 13 convolutions and 3 fully connected layers (arXiv 2306.09376).

    The description leaves the rest open. Here the widths are those of VGG16, with batch norm; the last stage does not
    pool, so that the first fully connected layer reads four positions of an image of 32x32. 16.04 million parameters
    with ten labels.
    """

    config_class = SimCNNConfig


_HIDDEN = Convolution("hidden.*.linear", activation="hidden.*.activation", optional=True)
_STACK = Chain((_LAYERS, _HIDDEN), reader="classifier")
_register(CifarVGGConfig, CifarVGGForImageClassification, _STACK)
_register(SimCNNConfig, SimCNNForImageClassification, _STACK)


# ---- Residual networks: ResNet18 and ResCNN ----


class CifarResNetConfig(CNNConfig):
    """
    The configuration of [`CifarResNetForImageClassification`].

    Args:
        depths (`tuple[int, ...]`, *optional*, defaults to `(2, 2, 2, 2)`): blocks of the four stages.
    """

    model_type = "cifar_resnet"

    depths: list[int] | tuple[int, ...] = (2, 2, 2, 2)


class CifarResNetForImageClassification(CNNForImageClassification):
    """
    ResNet18 for small images: a 3x3 convolution without pooling, eight blocks of two convolutions, the mean over all
    positions. 11.17 million parameters with ten labels.
    """

    config_class = CifarResNetConfig

    def __init__(self, config: CifarResNetConfig):
        super().__init__(config)
        channels = config.width(64)
        self.stem = ConvLayer(config.num_channels, channels)
        blocks = []
        for stage, (width, depth) in enumerate(zip((64, 128, 256, 512), config.depths, strict=True)):
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(ResidualBlock(channels, config.width(width), stride))
                channels = config.width(width)
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(channels, config.num_labels)
        self.post_init()

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.stem(pixel_values)).mean((2, 3))


class ResCNNConfig(CNNConfig):
    """The configuration of [`ResCNNForImageClassification`]; see [`CNNConfig`]."""

    model_type = "rescnn"


class ResCNNStage(nn.Module):
    """Convolutions one behind the other, max-pooling, a residual block."""

    def __init__(self, *widths: int):
        super().__init__()
        self.layers = nn.Sequential(*(ConvLayer(*pair) for pair in zip(widths, widths[1:], strict=False)))
        self.pool = nn.MaxPool2d(2)
        self.block = ResidualBlock(widths[-1], widths[-1])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.block(self.pool(self.layers(images)))


class ResCNNForImageClassification(CNNForImageClassification):
    """
    ResCNN: 12 convolutions, residual connections and one fully connected layer (arXiv 2306.09376).

    The description leaves the rest open. Here three residual connections lead around two convolutions each; 64 to 512
    channels, 4,288 over all convolutions, with batch norm; the mean over all positions at the end. 16.01 million
    parameters with ten labels.
    """

    config_class = ResCNNConfig

    def __init__(self, config: ResCNNConfig):
        super().__init__(config)
        narrow, low, middle, wide = (config.width(channels) for channels in (64, 128, 256, 512))
        self.stem = ConvLayer(config.num_channels, narrow)
        self.stages = nn.Sequential(
            ResCNNStage(narrow, low), ResCNNStage(low, middle, wide), ResCNNStage(wide, wide, wide)
        )
        self.classifier = nn.Linear(wide, config.num_labels)
        self.post_init()

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.stages(self.stem(pixel_values)).mean((2, 3))


def _residual_block(path: str, block: str = "") -> tuple[Chain, Chain]:
    """Both ways through a [`ResidualBlock`] write to the residual stream, so neither chain has a reader."""
    steps = (
        Convolution(f"{block}first.convolution", norm=f"{block}first.norm", activation=f"{block}first.activation"),
        Convolution(f"{block}second.convolution", norm=f"{block}second.norm"),
    )
    shortcut = Convolution(f"{block}shortcut.convolution", norm=f"{block}shortcut.norm", optional=True)
    return Chain(steps, path=path), Chain((shortcut,), path=path, shortcut=True)


_register(
    CifarResNetConfig,
    CifarResNetForImageClassification,
    _STEM,
    *_residual_block("blocks.*"),
    stream=Stream(reader="classifier", activation="activation"),
)
# All chains of a stage have the same path, so that the stages are the blocks, in forward order.
_STAGE = (Chain((_LAYERS,), path="stages.*"), *_residual_block("stages.*", "block."))
_register(
    ResCNNConfig,
    ResCNNForImageClassification,
    _STEM,
    *_STAGE,
    stream=Stream(reader="classifier", activation="block.activation"),
)


# ---- Depthwise separable convolutions: MobileNet ----


class CifarMobileNetConfig(CNNConfig):
    """The configuration of [`CifarMobileNetForImageClassification`]; see [`CNNConfig`]."""

    model_type = "cifar_mobilenet"


class CifarMobileNetForImageClassification(CNNForImageClassification):
    """
    MobileNet (version 1) for small images: a 3x3 convolution without stride, then 13 pairs of a depthwise and a
    pointwise convolution, the mean over all positions. 3.22 million parameters with ten labels.
    """

    config_class = CifarMobileNetConfig

    def __init__(self, config: CifarMobileNetConfig):
        super().__init__(config)
        channels = config.width(32)
        layers = [ConvLayer(config.num_channels, channels)]
        # (64, 1): the pointwise convolution has 64 channels, the depthwise one before it stride 1.
        wide = [(512, 2)] + 5 * [(512, 1)] + [(1024, 2), (1024, 1)]
        for width, stride in [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), *wide]:
            layers.append(ConvLayer(channels, channels, stride=stride, groups=channels))
            layers.append(ConvLayer(channels, config.width(width), kernel_size=1))
            channels = config.width(width)
        self.layers = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, config.num_labels)
        self.post_init()

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.layers(pixel_values).mean((2, 3))


_register(CifarMobileNetConfig, CifarMobileNetForImageClassification, Chain((_LAYERS,), reader="classifier"))
