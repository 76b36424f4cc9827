# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Which model learns what, and how: the rows of the suites. Data alone, so that importing this file costs nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


DATASETS = {
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "trec": "CogComp/trec",
    "cifar10": "uoft-cs/cifar10",
}
LABEL_COLUMNS = {"CogComp/trec": "coarse_label"}  # where there are several; a copy with one needs no name


@dataclass(frozen=True)
class Row:
    """
    A model, its data and its recipe, the same for every method.

    Args:
        dataset (`str`): a name in [`DATASETS`].
        model_type (`str`): as transformers, or `cnns.py`, registers it.
        config (`Mapping[str, Any]`): values of the model's configuration.
        epochs, batch_size, learning_rate: of the training.
        held_out (`int`): training samples to evaluate on with `--validation`.
        max_train_samples (`int`, *optional*): train on so many, the same for every seed; on all by default.
        max_eval_samples (`int`, *optional*): measure modules on so many; on all by default.
        settings (`Mapping[str, Mapping[str, Any]]`, *optional*): method → settings of its own for this row.
        published_recipe (`bool`, *optional*, defaults to `False`): SGD with Nesterov momentum, cosine schedule, random
            crops and flips, bf16 (NeMo, arXiv 2508.11348). Otherwise AdamW with a linear schedule.
        teacher (`str`, *optional*): the row whose plain model is distilled.
    """

    dataset: str
    model_type: str
    config: Mapping[str, Any]
    epochs: int
    batch_size: int
    learning_rate: float
    held_out: int
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    published_recipe: bool = False
    teacher: str | None = None

    def scaled(self, scale: float, num_train_samples: int = 50_000) -> Row:
        """
        The row with `scale` times the samples, epochs and parameters, to try it.

        Args:
            scale (`float`): in (0, 1].
            num_train_samples (`int`, *optional*, defaults to 50000): what all of the training samples are.
        """
        if scale == 1:
            return self
        config = dict(self.config)
        if "hidden_size" in config:  # parameters go with the square of the width
            heads = config["num_attention_heads"]
            head_size = max(4, round(config["hidden_size"] / heads * math.sqrt(scale)))
            config.update(hidden_size=heads * head_size, num_hidden_layers=max(2, config["num_hidden_layers"] // 4))
            config["intermediate_size"] = 2 * heads * head_size
        else:
            config["width_multiplier"] = config.get("width_multiplier", 1.0) * math.sqrt(scale)
        return replace(
            self,
            config=config,
            epochs=max(1, round(self.epochs * scale)),
            held_out=max(200, round(self.held_out * scale)),
            max_train_samples=max(200, round((self.max_train_samples or num_train_samples) * scale)),
            max_eval_samples=max(200, round((self.max_eval_samples or 10_000) * scale)),
        )


# α of NeMo as published: 0.06 and 0.15 for ViT-S, 0.1 for DeiT-S, 1.0 to 1.8 for convolutional networks, of which 1.0
# gave the most accurate model; 1.1 for ResNet18 and 1.3 for SimCNN. BERT was not published: as ViT.
def _nemo(alpha: float) -> dict[str, dict[str, float]]:
    return {"nemo": {"alpha": alpha}}


_SMALL_IMAGES: dict[str, Any] = {
    "dataset": "fashion_mnist",
    "epochs": 8,
    "batch_size": 128,
    "learning_rate": 1e-3,
    "held_out": 5000,
    "max_train_samples": 10_000,
    "max_eval_samples": 1000,
}
_SMALL_VIT = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 6, "intermediate_size": 384}
_SMALL_VGG = {"width_multiplier": 0.25, "depths": [1, 1, 2, 2, 2], "num_pools": 4, "num_hidden_layers": 1}
_SMALL_BERT = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
_SMALL_RESNET = {"width_multiplier": 0.25, "depths": [1, 1, 1, 1]}
SMALL = {
    "fashion_mnist/vit": Row(
        model_type="vit",
        config={**_SMALL_VIT, "image_size": 28, "patch_size": 7},
        settings=_nemo(0.15),
        **_SMALL_IMAGES,
    ),
    "fashion_mnist/vgg": Row(
        model_type="cifar_vgg", config={**_SMALL_VGG, "image_size": 28}, settings=_nemo(1.0), **_SMALL_IMAGES
    ),
    "fashion_mnist/resnet": Row(
        model_type="cifar_resnet", config={**_SMALL_RESNET, "image_size": 28}, settings=_nemo(1.1), **_SMALL_IMAGES
    ),
    "trec/bert": Row(
        dataset="trec",
        model_type="bert",
        config=_SMALL_BERT,
        epochs=12,
        batch_size=64,
        learning_rate=1e-3,
        held_out=818,
        settings=_nemo(0.15),
    ),
}

_PUBLISHED: dict[str, Any] = {
    "dataset": "cifar10",
    "epochs": 200,
    "batch_size": 128,
    "learning_rate": 0.05,
    "held_out": 5000,
    "published_recipe": True,
}
_VIT_S = {"hidden_size": 384, "num_hidden_layers": 12, "intermediate_size": 1536, "image_size": 32, "patch_size": 4}
_WITH_TEACHER = {"architectures": ["DeiTForImageClassificationWithTeacher"]}
PAPER = {
    "cifar10/vit_s": Row(
        model_type="vit", config={**_VIT_S, "num_attention_heads": 12}, settings=_nemo(0.15), **_PUBLISHED
    ),
    "cifar10/vgg16": Row(model_type="cifar_vgg", config={}, settings=_nemo(1.0), **_PUBLISHED),
    "cifar10/resnet18": Row(model_type="cifar_resnet", config={}, settings=_nemo(1.1), **_PUBLISHED),
    "cifar10/simcnn": Row(model_type="simcnn", config={}, settings=_nemo(1.3), **_PUBLISHED),
    "cifar10/rescnn": Row(model_type="rescnn", config={}, settings=_nemo(1.3), **_PUBLISHED),
    "cifar10/deit_s": Row(
        model_type="deit",
        config={**_VIT_S, **_WITH_TEACHER, "num_attention_heads": 6},
        settings=_nemo(0.1),
        teacher="cifar10/resnet18",
        **_PUBLISHED,
    ),
}

SUITES = {"small": SMALL, "paper": PAPER}
