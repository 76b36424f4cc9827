# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Push and pull where something is wrong: tokens, connections, what lies in the repository, what is pushed."""

import errno
import json

import pytest
from models import VIT, module_masks

from nemo_hf import (
    CheckpointError,
    ModuleMasks,
    NemoValueError,
    NeuronStatistics,
    extract_module,
    files,
    list_modules,
    push_modules,
)
from nemo_hf.files import find_file


@pytest.fixture(autouse=True)
def quiet(hub):
    hub.log.clear()
    hub.cuts.clear()


@pytest.fixture(scope="module")
def vit_module():
    parent = VIT.masked()
    return extract_module(parent, module_masks(parent), ["cat"]), parent


def test_wrong_token_and_foreign_repository(hub, client):
    for code in (
        'push_modules("ann/none", {"cat": cat}, token="hf_wrong")',
        'push_modules("bob/none", {"cat": cat})',
    ):
        answer = client(code)
        assert "OSError" in answer.kinds
        assert "Invalid credentials" in answer.error or "don't have the rights" in answer.error
    assert not {"ann/none", "bob/none"} & set(hub.repositories)


BROKEN = {
    "README.md": (b"---\ntags: [a\n---\nmine", "The metadata of README.md of ann/broken cannot be read"),
    "cat/README.md": (b"---\n- a\n---\nmine", "The metadata of cat/README.md of ann/broken cannot be read"),
    "nemo_modules.json": (b"{", "nemo_modules.json of ann/broken is damaged: it is not JSON"),
}


@pytest.mark.parametrize("path", BROKEN)
def test_what_is_broken_in_the_repository_is_named_and_kept(hub, client, path):
    content, text = BROKEN[path]
    client.run('HfApi().create_repo("ann/broken", exist_ok=True)')
    repository = hub.repositories["ann/broken"]
    repository.commit(f"Break {path}", {path: (content, False)})
    commits = len(repository.commits)
    answer = client('push_modules("ann/broken", {"cat": cat})')
    assert answer.error.startswith(f"CheckpointError: {text}")
    assert len(repository.commits) == commits
    assert not any(line.startswith("PUT") for line in hub.log)


@pytest.mark.parametrize(
    "start", ["PUT /lfs/", "POST /api/models/ann/cut/commit/", "POST /api/models/ann/cut/preupload/"]
)
def test_an_interrupted_push_leaves_the_repository_as_it_was(hub, client, start):
    if "ann/cut" not in hub.repositories:
        client.run('push_modules("ann/cut", {"cat": cat})')
    repository = hub.repositories["ann/cut"]
    before, commits = repository.content(), len(repository.commits)
    number = len(hub.log)
    hub.cut(start, 100)
    answer = client(f'dog.classifier.bias.data += {number}; push_modules("ann/cut", {{"cat": dog, "dog": dog}})')
    assert answer.error.startswith("CheckpointError: The connection to ann/cut failed")
    assert "Push again." in answer.error
    assert repository.content() == before
    assert len(repository.commits) == commits
    hub.cuts.clear()
    client.run('push_modules("ann/cut", {"cat": dog})')
    assert client.run('result = same(Auto.from_pretrained("ann/cut", subfolder="cat"), dog)')


def test_somebody_else_pushes_at_the_same_time(hub, client):
    client.run('push_modules("ann/race", {"cat": cat})')
    repository = hub.repositories["ann/race"]
    code = """
    from nemo_hf import hub
    save = hub._save
    def slow(*args, **options):
        hub._save = save
        push_modules("ann/race", {"first": dog})
        save(*args, **options)
    hub._save = slow
    push_modules("ann/race", {"second": dog})
    """
    answer = client(code)
    assert answer.error.startswith("CheckpointError: ann/race was changed by someone else during the push")
    assert list(json.loads(repository.content()["nemo_modules.json"])["modules"]) == ["cat", "first"]


def test_a_download_that_is_cut_goes_on_or_fails_cleanly(hub, client):
    client.run('push_modules("ann/pull", {"cat": cat})')
    hub.cut("GET /cdn/", 1)
    assert client.run('result = same(Auto.from_pretrained("ann/pull", subfolder="cat"), cat)')
    client.run('push_modules("ann/pull", {"cat": both})')
    hub.cut("GET /ann/pull/resolve/", 100)
    hub.cut("GET /cdn/", 100)
    code = 'Auto.from_pretrained("ann/pull", subfolder="cat", cache_dir="cut")'
    assert client(code).error is not None
    hub.cuts.clear()
    code = 'result = same(Auto.from_pretrained("ann/pull", subfolder="cat", cache_dir="cut"), both)'
    assert client.run(code)


@pytest.mark.parametrize(
    "loader",
    ["list_modules", "describe_checkpoint", "AutoModularModel.from_pretrained"],
)
def test_without_a_connection_nothing_is_said_to_be_missing(hub, client, loader):
    repository = f"ann/{loader.partition('.')[0].replace('_', '-')}"  # of its own, so that nothing is cached
    client.run(f'push_modules("{repository}", {{"cat": cat}})')
    for start in ("GET", "HEAD"):
        hub.cut(f"{start} /{repository}/", 100)
    code = f"""
    from nemo_hf import AutoModularModel, list_modules
    from nemo_hf.inspection import describe_checkpoint

    {loader}("{repository}")
    """
    answer = client(code)
    assert answer.error.startswith("CheckpointError: ")
    assert "There is no" not in answer.error


@pytest.mark.parametrize("loader", [list_modules, NeuronStatistics.from_pretrained, ModuleMasks.from_pretrained])
def test_what_is_not_cached_is_not_said_to_be_missing(loader):
    with pytest.raises(CheckpointError, match="of ann/far-away cannot be read: "):
        loader("ann/far-away", local_files_only=True)


def test_what_is_known_to_be_missing_is_missing_offline_too(tmp_path):
    commit = "0" * 40
    repository = tmp_path / "models--ann--vit"
    for path, text in (
        ("refs/main", commit),
        (f"snapshots/{commit}/config.json", "{}"),
        (f".no_exist/{commit}/a", ""),
    ):
        (repository / path).parent.mkdir(parents=True)
        (repository / path).write_text(text)
    offline = {"cache_dir": tmp_path, "local_files_only": True}
    assert find_file("ann/vit", "config.json", **offline) == str(repository / "snapshots" / commit / "config.json")
    assert find_file("ann/vit", "a", **offline) is None
    assert find_file("ann/vit", "b", optional=True, **offline) is None
    with pytest.raises(CheckpointError, match="b of ann/vit cannot be read: it is not in the cache"):
        find_file("ann/vit", "b", **offline)


def test_a_full_disk_is_no_missing_file(monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "cached_file", full)
    with pytest.raises(CheckpointError, match="a of ann/vit cannot be read: .*No space left"):
        find_file("ann/vit", "a", optional=True)


def test_what_is_no_module_is_refused_before_anything_is_sent(vit_module):
    module, parent = vit_module
    for modules, text in (
        ({"cat": module, "dog": parent}, r"ViTForImageClassification \('dog'\) is not a module; make one with"),
        ({}, "non-empty mapping from names to modules"),
        ([module, module], "got 2 module.s. with the names 'cat'"),
        ({"cat": 3}, r"int \('cat'\) is not a module"),
    ):
        with pytest.raises(NemoValueError, match=text):
            push_modules("ann/none", modules)
    with pytest.raises(NemoValueError, match="accuracy of a module must be a share from 0 to 1, got 97"):
        push_modules("ann/none", {"cat": module}, metrics={"cat": {"accuracy": 97}})
    with pytest.raises(NemoValueError, match="metrics has 'cow', but the modules are 'cat'"):
        push_modules("ann/none", {"cat": module}, metrics={"cow": {"accuracy": 1.0}})
