# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""A module replaces a module, nothing else; and the files of a checkpoint go into place together or not at all."""

import errno
import json
import os
from pathlib import Path

import pytest
from models import VIT, modular_parent, module_masks, plain_parent
from test_full_disk import content

from nemo_hf import NemoValueError, cli, extract_module, save_module
from nemo_hf.collection import INDEX_FILE, write_index
from nemo_hf.replacing import check_folder


@pytest.fixture(scope="module")
def module():
    parent = modular_parent(VIT)
    return extract_module(parent, module_masks(parent), ["cat"])


def write_plain(folder):
    plain_parent(VIT).save_pretrained(folder)


def write_modular(folder):
    modular_parent(VIT).save_pretrained(folder)


def write_collection(folder):
    folder.mkdir()
    write_index(folder / INDEX_FILE, {})


OTHERS = {
    r"a plain model \(ViTForImageClassification\)": write_plain,
    r"a modular model \(ViTForImageClassification\)": write_modular,
    "a collection of modules": write_collection,
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_module_replaces_no_other_checkpoint(module, name, tmp_path):
    OTHERS[name](tmp_path / "there")
    before = content(tmp_path)
    with pytest.raises(NemoValueError, match=f"there holds {name}, which the module would replace. Choose another"):
        save_module(module, tmp_path / "there")
    assert content(tmp_path) == before


def test_a_module_replaces_a_module_and_what_a_failed_write_left(module, tmp_path):
    for left in ("", "{", "[]", "[" * 100_000):
        (tmp_path / "config.json").write_text(left)
        save_module(module, tmp_path)
        save_module(module, tmp_path)
        (tmp_path / "model.safetensors").unlink()


def test_extract_and_learn_masks_ask_before_they_work(tmp_path, monkeypatch, capsys):
    write_plain(tmp_path / "plain")
    module_masks(plain_parent(VIT)).save_pretrained(tmp_path / "plain")
    write_modular(tmp_path / "modular")
    (tmp_path / "modular" / "neuron_statistics.safetensors").write_bytes(b"counts")
    before = content(tmp_path)
    monkeypatch.setattr("nemo_hf.auto.load_parent", None)
    monkeypatch.setattr("nemo_hf.task_data.load_train_split", None)
    plain, modular = (str(tmp_path / name) for name in ("plain", "modular"))
    for command, text in (
        (["extract", plain, "--labels", "ant", "--output", plain], "holds a plain model"),
        (["extract", modular, "--labels", "ant", "--output", modular], "holds a modular model"),
        (["learn-masks", plain, "--dataset_name", "none", "--output", modular], "which the plain model would replace"),
    ):
        assert cli.main(command) == 1
        assert text in capsys.readouterr().err
    assert content(tmp_path) == before
    check_folder(plain, kind=None)  # learning again is fine


def test_the_staging_folder_is_on_the_file_system_of_the_target(module, tmp_path, monkeypatch):
    """As if the target were a mount point: nothing can be renamed into it from outside."""
    replace = os.replace

    def within(source, target):
        if Path(target).parent not in Path(source).parents:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(source, target)

    monkeypatch.setattr("os.replace", within)
    for _ in range(2):
        save_module(module, tmp_path / "module")
    names = {path.name for path in (tmp_path / "module").iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors", "slim.py"}
    assert [path.name for path in tmp_path.iterdir()] == ["module"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_folder_that_can_be_written_in_one_that_cannot(module, tmp_path):
    target = tmp_path / "module"
    target.mkdir()
    os.chmod(tmp_path, 0o555)
    try:
        save_module(module, target)
    finally:
        os.chmod(tmp_path, 0o755)
    assert (target / "model.safetensors").exists()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, OSError])
def test_an_interrupted_save_leaves_nothing(module, tmp_path, monkeypatch, stop):
    def interrupt(*_):
        raise stop

    save_module(module, tmp_path / "old", metrics={"accuracy": 0.5})
    before = content(tmp_path)
    monkeypatch.setattr("nemo_hf.hub._write_card", interrupt)
    for name in ("old", "new"):
        with pytest.raises(stop):
            save_module(module, tmp_path / name)
    assert content(tmp_path) == before
    assert [path.name for path in tmp_path.rglob("*") if path.is_dir()] == ["old"]


PUSHES = {
    "a modular model (ViTForImageClassification)": "parent.push_to_hub({!r})",
    "a plain model (ViTForImageClassification)": "VIT.model().push_to_hub({!r})",
    "a collection of modules": "push_modules({!r}, dict(cat=cat))",
}


@pytest.mark.parametrize("name", PUSHES)
def test_a_pushed_module_replaces_no_other_checkpoint(hub, client, name):
    repo_id = f"ann/{name.replace(' ', '-').partition('-(')[0]}"
    client.run(PUSHES[name].format(repo_id))
    repository = hub.repositories[repo_id]
    before, commits = repository.content(), len(repository.commits)
    answer = client(f"push_modules({repo_id!r}, both)")
    assert answer.error == (
        f"NemoValueError: {repo_id} holds {name}, which the module would replace. Choose another repository, or a "
        "folder in it: push_modules(repo_id, {name: module})."
    )
    assert (repository.content(), len(repository.commits)) == (before, commits)
    client.run(f"push_modules({repo_id!r}, dict(both=both))")  # what the error proposes
    changed = {path for path in before if repository.content()[path] != before[path]}
    assert changed <= {"README.md", INDEX_FILE}


def test_a_module_of_a_collection_replaces_no_other_checkpoint(hub, client):
    client.run('HfApi().create_repo("ann/folders")')
    repository = hub.repositories["ann/folders"]
    repository.commit("A parent", {"cat/config.json": (b'{"architectures": ["ViTModel"]}', False)})
    answer = client('push_modules("ann/folders", {"dog": dog, "cat": cat})')
    assert answer.error.startswith("NemoValueError: ann/folders/cat holds a plain model (ViTModel), which the module")
    assert answer.error.endswith("Give the module another name.")
    client.run('push_modules("ann/folders", {"dog": dog, "kitten": cat})')
    assert json.loads(repository.content()["cat/config.json"]) == {"architectures": ["ViTModel"]}
    client.run('push_modules("ann/folders", {"dog": both})')
    client.run('push_modules("ann/one", cat)')
    client.run('push_modules("ann/one", both)')
