# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Save modules with everything that a user of the checkpoint needs."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import PreTrainedModel

from .config import MODULE_KIND
from .errors import NemoValueError
from .model_card import module_card


def save_module(
    module: PreTrainedModel,
    save_directory: str | os.PathLike,
    processing_class: Any = None,
    metrics: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> None:
    """
    Save a module with its processor and card, ready for `pipeline(task, model=save_directory)`.

    Everything is written to a temporary folder first, then moved into place file by file: a failure while writing
    leaves what was there before.

    Args:
        module (`PreTrainedModel`): made by [`~nemo_hf.extract_module`].
        save_directory (`str` or `os.PathLike`): the folder; made if it is missing.
        processing_class (*optional*): tokenizer or image processor of the parent.
        metrics (`Mapping`, *optional*): measured results for the card, name → value.
        kwargs: passed to `module.save_pretrained`.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: if the model is not a module.

    Example:

    ```python
    >>> save_module(module, "cat-dog", processing_class=image_processor)
    ```
    """
    nemo = getattr(module.config, "nemo", None)
    if not isinstance(nemo, dict) or nemo.get("kind") != MODULE_KIND:
        raise NemoValueError(f"{type(module).__name__} is not a module; make one with `extract_module`.")
    target = Path(save_directory)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        module.save_pretrained(temporary, **kwargs)
        if processing_class is not None:
            processing_class.save_pretrained(temporary)
        if _may_write_card(target / "README.md"):
            module_card(module, metrics).save(Path(temporary) / "README.md")
        written = {file.name for file in Path(temporary).iterdir()}
        for file in Path(temporary).iterdir():
            if file.is_dir() and (target / file.name).is_dir():
                shutil.rmtree(target / file.name)
            os.replace(file, target / file.name)
        for old in target.glob("model*.safetensors*"):  # shards and a single file must not stand side by side
            if old.name not in written:
                old.unlink()


def _may_write_card(path: Path) -> bool:
    """A card that nemo_hf wrote is renewed; one that a person wrote stays."""
    return not path.exists() or "nemo_hf" in (ModelCard.load(path).data.tags or [])
