# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Where a checkpoint shall be written: what it may replace, and a folder whose files go into place together."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .collection import INDEX_FILE
from .config import MODULAR_KIND, MODULE_KIND, checkpoint_kind
from .errors import NemoValueError


NAMES = {MODULAR_KIND: "modular model", MODULE_KIND: "module", None: "plain model"}


def check_folder(folder: str | os.PathLike, kind: str | None = MODULE_KIND) -> None:
    """
    Refuse to write a checkpoint over one of another kind, or over a collection.

    Args:
        folder (`str` or `os.PathLike`): where it shall be written.
        kind (`str`, *optional*, defaults to `"module"`): of the new checkpoint, as in `config.nemo["kind"]`; `None`
            for a plain model.

    Raises:
        [`~nemo_hf.errors.NemoValueError`]: if something else is there.
    """

    def read(name: str) -> bytes | None:
        path = Path(folder, name)
        return path.read_bytes() if path.is_file() else None

    check_replaceable(str(folder), read, "Choose another folder.", kind)


def check_replaceable(
    where: str, read: Callable[[str], bytes | None], remedy: str, kind: str | None = MODULE_KIND
) -> None:
    """
    The same for any place: `read` gives the content of a file there, or `None`; `where` and `remedy` are shown.
    """
    found = "a collection of modules" if read(INDEX_FILE) is not None else None
    config = _table(read("config.json"))
    if found is None and config is not None and checkpoint_kind(SimpleNamespace(**config)) != kind:
        classes = config.get("architectures")
        shown = f" ({classes[0]})" if isinstance(classes, list) and classes else ""
        found = f"a {NAMES.get(checkpoint_kind(SimpleNamespace(**config)), 'model of another kind')}{shown}"
    if found is not None:
        raise NemoValueError(f"{where} holds {found}, which the {NAMES[kind]} would replace. {remedy}")


def _table(content: bytes | None) -> dict[str, Any] | None:
    """A file of JSON, or `None` for what is left of a write that failed."""
    try:
        found = json.loads(content or b"")
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """
    Yield an empty folder, whose files replace those of `target` once the block has ended without an error. Whatever
    ends it otherwise leaves `target` as it was. The folder is inside `target`, so on its file system even where that
    is a mount point, or its parent cannot be written.
    """
    is_new = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".nemo_hf.", dir=target) as temporary:
            yield Path(temporary)
            for file in Path(temporary).iterdir():
                if file.is_dir() and (target / file.name).is_dir():
                    shutil.rmtree(target / file.name)
                os.replace(file, target / file.name)
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):  # another process has written there
                target.rmdir()
        raise
