# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Offline, one thread, a fixed seed, and deprecations of transformers are failures."""

import gc
import logging
import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis  # noqa: E402 (the environment is read when the libraries are imported)
import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402


# HYPOTHESIS_PROFILE=long pytest tests/test_properties.py
hypothesis.settings.register_profile("quick", deadline=None, max_examples=20, derandomize=True, database=None)
hypothesis.settings.register_profile("long", deadline=None, max_examples=2000, database=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """The models are tiny: more threads only cost time."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def frozen_imports():
    """Every training ends with a garbage collection, which would search all that torch and transformers define."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class _Collector(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.deprecations = []

    def emit(self, record):
        message = record.getMessage()
        if "deprecat" in message.lower():
            self.deprecations.append(message)


@pytest.fixture(autouse=True)
def no_deprecations():
    """What transformers announces to remove must not be used."""
    collector = _Collector()
    logger = logging.getLogger("transformers")
    logger.addHandler(collector)
    yield
    logger.removeHandler(collector)
    assert collector.deprecations == []


@pytest.fixture(scope="session")
def hub():
    """The Hub on loopback."""
    from hub_server import HubServer

    server = HubServer()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def client(hub, tmp_path_factory):
    """Another process that talks to it."""
    from hub_client import HubClient

    process = HubClient(hub.endpoint, tmp_path_factory.mktemp("client"))
    yield process
    process.close()
