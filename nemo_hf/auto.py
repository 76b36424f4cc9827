# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""[`AutoModularModel`]: load a modular checkpoint with its mask generators; and what lies beside any checkpoint."""

from __future__ import annotations

import os
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from . import slim
from .config import MODULE_KIND, ModularConfig, checkpoint_kind
from .errors import CheckpointError, NemoError
from .files import find_file
from .masking import apply_masks, is_modular_checkpoint
from .model_card import PROCESSORS, pipeline_task


HUB_NAMES = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download", "proxies")
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "vocab.txt", "vocab.json")  # the last three: old ones
OTHER_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


class AutoModularModel:
    """
    Loads modular models (parents). The stock Auto classes load the same checkpoints as plain models, without their
    generators; a module loads with the stock Auto classes.
    """

    def __init__(self) -> None:
        raise OSError("AutoModularModel is made with `AutoModularModel.from_pretrained(name_or_path)`.")

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> PreTrainedModel:
        """
        Load a modular checkpoint, generators included.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): a folder or a repository on the Hub.
            kwargs: as of the Auto classes: values of the configuration (`hidden_dropout_prob=0.3`); the others go to
                `from_pretrained` of the model's own class: `dtype`, `device_map`, `revision`, `subfolder`, `token`,
                `cache_dir`, `local_files_only`, `attn_implementation`, …

        Returns:
            `PreTrainedModel`: of the class that was trained, with masks.

        Raises:
            [`~nemo_hf.errors.CheckpointError`]: if the checkpoint is not a modular one, is damaged, or lacks
                generators.

        Example:

        ```python
        >>> from nemo_hf import AutoModularModel
        >>> model = AutoModularModel.from_pretrained("my-modular-vit")
        ```
        """
        source = str(pretrained_model_name_or_path)
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs.pop("trust_remote_code", None)  # there is no code to trust
        config = kwargs.pop("config", None)
        if config is None:
            hub = {name: kwargs.pop(name) for name in HUB_NAMES if name in kwargs}
            dtype = {"dtype": kwargs.pop("dtype")} if "dtype" in kwargs else {}
            config, kwargs = load_config(source, return_unused_kwargs=True, **hub, **kwargs)
            kwargs = {**kwargs, **hub, **dtype}
        if not is_modular_checkpoint(config):
            hint = (
                " It is a module: load it with the Auto class of its task."
                if checkpoint_kind(config) == MODULE_KIND
                else ""
            )
            raise CheckpointError(
                f"{source} is not a modular checkpoint: its config has no `nemo` entry of a parent.{hint}"
            )
        base = model_class(config, source)
        with slim.clear_loading_errors(source):
            model, info = _masked_class(base).from_pretrained(
                source, config=config, output_loading_info=True, **kwargs
            )
        missing = sorted(name for name in info["missing_keys"] if ".mask_generator." in name)
        if missing:
            raise CheckpointError(
                f"{source} is damaged: the mask generators {', '.join(missing[:3])}, … are missing from its weights."
            )
        model.__class__ = base  # the subclass below only added masks before the weights were loaded
        return (model, info) if wants_info else model


def load_parent(source: str | os.PathLike, **hub_kwargs: Any) -> PreTrainedModel:
    """
    What modules can be cut out of: a modular model with its masks, or a plain classifier.

    Raises:
        [`~nemo_hf.errors.CheckpointError`]: if the checkpoint is neither, missing or damaged.
    """
    config = load_config(source, **hub_kwargs)
    if checkpoint_kind(config) is not None:
        return AutoModularModel.from_pretrained(source, **hub_kwargs)
    with slim.clear_loading_errors(source), slim.limited_size():
        return model_class(config, str(source)).from_pretrained(source, **hub_kwargs)


def saved_processor(source: str | os.PathLike, model: PreTrainedModel, **hub_kwargs: Any) -> Any:
    """
    The tokenizer, image processor or feature extractor beside a model, by the task of the model.

    Args:
        source (`str` or `os.PathLike`): a folder, or a repository on the Hub.
        model (`PreTrainedModel`): the model in it, or one that takes the same inputs.
        hub_kwargs: `revision`, `token`, … as everywhere in transformers.

    Returns:
        The processor; `None` if there is none.
    """
    name = PROCESSORS[pipeline_task(model)][0]
    files = TOKENIZER_FILES if name == "AutoTokenizer" else OTHER_PROCESSOR_FILES
    if not any(find_file(source, file, optional=True, **hub_kwargs) for file in files):
        return None
    return getattr(transformers, name).from_pretrained(source, **hub_kwargs)


def load_config(source: str | os.PathLike, **kwargs: Any) -> Any:
    """
    The configuration of a checkpoint, as `AutoConfig` gives it. Code that it names is neither run nor asked about.

    Raises:
        [`~nemo_hf.errors.CheckpointError`]: if it is missing or damaged.
    """
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False, **kwargs)
    except Exception as error:  # what transformers raises for a value of the wrong kind depends on who meets it first
        raise CheckpointError(f"The config of {source} cannot be read: {error}") from error


def model_class(config: PreTrainedConfig, source: str) -> type[PreTrainedModel]:
    """The class that `config.architectures` names, of transformers or registered with the Auto classes."""
    names = config.architectures
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    for auto_class in slim.AUTO_CLASSES:
        if type(config) in auto_class._model_mapping:
            found = auto_class._model_mapping[type(config)]
            for candidate in found if isinstance(found, tuple) else (found,):
                if candidate.__name__ == name:
                    return candidate
    candidate = getattr(transformers, name, None)
    if not (isinstance(candidate, type) and issubclass(candidate, PreTrainedModel)):
        raise CheckpointError(
            f"{source} names no known model class in `architectures` of its config: {config.architectures!r}."
        )
    return candidate


def _masked_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """
    `base` with masks from the start, so that `from_pretrained` places, casts and fills generators like every other
    parameter. It keeps the name and the home of `base`: transformers looks up by them how checkpoint keys are renamed.
    """

    def __init__(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        with slim.limited_size():
            base.__init__(self, config, *args, **kwargs)
        try:
            modular_config = ModularConfig.from_dict(config.nemo)
            self.config.nemo = None  # until the masks are on
            apply_masks(self, modular_config)
        except NemoError as error:
            raise CheckpointError(
                f"The `nemo` entry of this checkpoint's config does not fit its model: {error}"
            ) from error

    namespace = {"__init__": __init__, "__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (base,), namespace)
