# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""The errors of nemo_hf: each derives from [`NemoError`] and from the built-in kind it refines."""


class NemoError(Exception):
    """Base of every error that nemo_hf raises on purpose."""


class NemoValueError(NemoError, ValueError):
    """A value, a name or a combination of arguments that cannot work."""


class NemoRuntimeError(NemoError, RuntimeError):
    """Something that only showed while the model ran: a masked layer that is never called, gates without gradient."""


class UnsupportedModelError(NemoError, TypeError):
    """A model, or a layer of it, that cannot carry masks or cannot be cut."""


class CheckpointError(NemoError, OSError):
    """A file or folder that is missing, damaged, or not what was asked for."""
