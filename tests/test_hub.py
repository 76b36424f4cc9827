# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Push and pull against a real HTTP server on loopback that speaks the Hub's API."""

import json
from pathlib import Path

import pytest
from hub_server import Repository
from huggingface_hub import ModelCard

from nemo_hf.collection import choose_folders


@pytest.fixture(autouse=True)
def quiet(hub):
    hub.log.clear()
    hub.cuts.clear()


@pytest.fixture(scope="module")
def animals(hub, client):
    """A repository with two modules."""
    code = """
    modules = {"cat": cat, "cat or dog": both}
    metrics = {"cat": {"accuracy": 0.75, "flops": 10, "parent_flops": 40}}
    info = push_modules("ann/animals", modules, processing_class=processor, metrics=metrics, dataset="ann/pictures")
    result = info.oid
    """
    sha = client.run(code)
    repository = hub.repositories["ann/animals"]
    assert repository.branches["main"] == sha
    return repository


def test_one_commit_with_everything_a_module_needs(animals):
    assert animals.messages() == ["initial commit", "Upload 2 modules with nemo_hf"]
    files = animals.files()
    folders = {path.partition("/")[0] for path in files if "/" in path}
    assert len(folders) == 2
    assert "cat" in folders
    for folder in folders:
        own = {path.partition("/")[2] for path in files if path.startswith(f"{folder}/")}
        assert {"config.json", "model.safetensors", "README.md"} < own
        assert any(name.startswith(("preprocessor", "processor")) for name in own)
        assert files[f"{folder}/model.safetensors"][1]  # stored as LFS
        assert not files[f"{folder}/config.json"][1]
    root = {path for path in files if "/" not in path}
    assert root - {"slim.py"} == {".gitattributes", "README.md", "nemo_modules.json"}
    assert ("slim.py" in root) == ("cat/slim.py" in files)  # `trust_remote_code` looks in the root


def test_from_pretrained_downloads_one_module_alone(hub, client, animals):
    folder = json.loads(animals.content()["nemo_modules.json"])["modules"]["cat or dog"]["folder"]
    code = f"""
    loaded = Auto.from_pretrained("ann/animals", subfolder={folder!r})
    result = [same(loaded, both), loaded.config.nemo["labels"]]
    """
    assert client.run(code) == [True, ["cat", "dog"]]
    assert hub.downloads("ann/animals") == {f"{folder}/config.json", f"{folder}/model.safetensors"}


def test_the_index_lists_the_modules(hub, client, animals):
    code = """
    entries = list_modules("ann/animals")
    result = {name: vars(entry) for name, entry in entries.items()}
    """
    entries = client.run(code)
    assert list(entries) == ["cat", "cat or dog"]
    assert entries["cat"]["accuracy"] == 0.75
    assert entries["cat or dog"]["accuracy"] is None
    assert entries["cat or dog"]["labels"] == ["cat", "dog"]
    for entry in entries.values():
        assert entry["bytes"] == len(animals.content()[f"{entry['folder']}/model.safetensors"])
        assert 4 * entry["parameters"] <= entry["bytes"]
        assert 0 < entry["neuron_retention"] < 1
        assert 0 < entry["parameter_retention"] < 1
    assert hub.downloads("ann/animals") == {"nemo_modules.json"}


def run_snippets(client, content):
    """Run the Python of all cards, each as printed."""
    cards = [text.decode() for path, text in content.items() if path.endswith("README.md")]
    blocks = [block.partition("```")[0] for card in cards for block in card.split("```python\n")[1:]]
    for block in blocks:
        client.run(block)
    return blocks


def test_the_snippets_of_the_cards_run_as_printed(hub, client, animals):
    assert len(run_snippets(client, animals.content())) == 4
    code = """
    from models import BERT
    from processors import tokenizer
    text_parent = BERT.masked()
    words = extract_module(text_parent, module_masks(text_parent), ["elk", "ant"])
    push_modules("ann/words", [words], processing_class=tokenizer())
    push_modules("ann/word", words, processing_class=tokenizer())
    save_module(words, "saved-words", processing_class=tokenizer())
    result = open("saved-words/README.md").read()
    """
    saved = client.run(code)
    for content in (hub.repositories["ann/words"].content(), hub.repositories["ann/word"].content()):
        run_snippets(client, content)
        assert {row["label"] for row in client.run('result = classify("w1 w2", top_k=None)')} == {"elk", "ant"}
    run_snippets(client, {"README.md": saved.encode()})  # in the folder from which it was saved
    assert client.run("result = type(model).__name__") == "SlimBertForSequenceClassification"


def test_cards_are_valid_for_the_hub(animals):
    root = ModelCard(animals.content()["README.md"].decode())
    assert root.data.library_name == "transformers"
    assert root.data.pipeline_tag == "image-classification"
    assert {"nemo_hf", "module", "module-collection"} <= set(root.data.tags)
    assert root.data.datasets == ["ann/pictures"]
    (result,) = root.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("accuracy", 0.75, "ann/pictures")
    module = ModelCard(animals.content()["cat/README.md"].decode())
    assert [(result.metric_type, result.metric_value) for result in module.data.eval_results] == [("accuracy", 0.75)]
    assert "| flops | 10 (parent: 40) |" in module.text
    assert 'from_pretrained("ann/animals", subfolder="cat")' in module.text


def test_pushing_again_adds_replaces_and_keeps(hub, client):
    setup = """
    metrics = {"a": {"accuracy": 0.5}, "b": {"accuracy": 0.25}}
    push_modules("ann/again", {"a": cat, "b": dog}, metrics=metrics)
    cat.save_pretrained("shards", max_shard_size="20KB")
    """
    client.run(setup)
    repository = hub.repositories["ann/again"]
    shards = ("model-00001-of-00002.safetensors", "model.safetensors.index.json")
    repository.files().update({f"b/{name}": (b"old", name.endswith("s")) for name in shards})
    repository.files()["b/notes.txt"] = (b"mine", False)
    before = repository.content()
    client.run('push_modules("ann/again", {"b": both, "c/d": dog}, commit_message="Second")')
    after = repository.content()
    assert repository.messages()[-1] == "Second"
    index = json.loads(after["nemo_modules.json"])["modules"]
    assert list(index) == ["a", "b", "c/d"]
    assert index["a"] == json.loads(before["nemo_modules.json"])["modules"]["a"]
    assert index["b"]["labels"] == ["cat", "dog"]
    assert index["b"]["folder"] == "b"
    assert "accuracy" not in index["b"]  # it was that of the module before
    assert [result.metric_value for result in ModelCard(after["README.md"].decode()).data.eval_results] == [0.5]
    assert ModelCard(after["b/README.md"].decode()).data.eval_results is None
    assert {path for path in before if path.startswith("a/") and before[path] != after[path]} == set()
    assert not any(f"b/{name}" in after for name in shards)
    assert after["b/notes.txt"] == b"mine"
    assert client.run('result = same(Auto.from_pretrained("ann/again", subfolder="b"), both)')


LABELS = [
    "cat",
    "Cat",
    "CAT",
    "a/b",
    "a.b",
    "a b",
    "a-b",
    "../../etc",
    "..",
    ".",
    "",
    "con",
    "猫",
    "犬",
    "кошка",
    "🐈",
    "Müller",
    "x" * 200,
    "x" * 199 + "y",
    "golden retriever",
    "a\nb",
    "-rf",
    "C:\\x",
]


def test_folder_names_are_safe_unique_and_stable():
    folders = choose_folders(LABELS, {})
    assert list(folders.values()) != LABELS
    assert len({folder.casefold() for folder in folders.values()}) == len(LABELS)
    for folder in folders.values():
        assert folder.isascii()
        assert folder.replace("-", "").replace("_", "").isalnum()
        assert not folder.startswith("-")
        assert 0 < len(folder) <= 80
    assert (folders["cat"], folders["a-b"]) == ("cat", "a-b")
    assert choose_folders(LABELS[::-1], {}) == folders
    assert choose_folders(["cat", "Cat"], {"Cat": "Cat"})["Cat"] == "Cat"
    assert choose_folders(["cat"], {"Cat": "Cat"})["cat"].startswith("cat-")
    assert choose_folders(["new"], {"old": "new"})["new"].startswith("new-")
    assert choose_folders(["golden retriever"], {})["golden retriever"] == folders["golden retriever"]


def test_odd_labels_keep_their_names(hub, client):
    labels = ["a/b", "../../etc", "猫 🐈", "x" * 200, "Cat"]
    code = f"""
    names = {labels!r}
    model = VIT.model()
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {{name: i for i, name in enumerate(names)}}
    by_id = nemo_hf.ModuleMasks({{name: masks[label] for name, label in zip(names, masks.labels)}})
    push_modules("ann/odd", [extract_module(model, by_id, [name]) for name in names])
    found = list_modules("ann/odd")
    loaded = [Auto.from_pretrained("ann/odd", subfolder=entry.folder) for entry in found.values()]
    result = [list(found), [model.config.id2label[0] for model in loaded]]
    """
    assert client.run(code) == [labels, labels]
    assert not any(".." in path for path in hub.repositories["ann/odd"].files())


def test_a_single_module_goes_to_the_root(hub, client):
    code = """
    push_modules("one", both, processing_class=processor, metrics={"accuracy": 0.5})
    classify = transformers.pipeline("image-classification", "ann/one")
    result = [same(Auto.from_pretrained("ann/one"), both), classify.task]
    """
    assert client.run(code) == [True, "image-classification"]
    content = hub.repositories["ann/one"].content()
    assert "nemo_modules.json" not in content
    assert json.loads(content["config.json"])["nemo"]["metrics"] == {"accuracy": 0.5}
    assert 'model="ann/one"' in content["README.md"].decode()


def test_push_to_hub_of_transformers(hub, client):
    code = """
    both.push_to_hub("ann/stock-push", private=True)
    processor.push_to_hub("ann/stock-push")
    result = same(Auto.from_pretrained("ann/stock-push"), both)
    """
    assert client.run(code)
    assert hub.repositories["ann/stock-push"].private


def test_private_revision_and_pull_request(hub, client):
    client.run('push_modules("ann/secret", {"cat": cat}, private=True)')
    repository = hub.repositories["ann/secret"]
    assert repository.private
    answer = client('list_modules("ann/secret", token=False, force_download=True)')
    assert "OSError" in answer.kinds
    client.run('push_modules("ann/secret", {"dog": dog}, revision="next")')
    assert list(repository.branches) == ["main", "next"]
    assert "dog/config.json" not in repository.files()
    assert {"dog/config.json", "cat/config.json"} < set(repository.files("next"))
    assert client.run('result = list(list_modules("ann/secret", revision="next"))') == ["cat", "dog"]
    code = 'result = push_modules("ann/secret", {"both": both}, create_pr=True).pr_url'
    assert client.run(code).endswith("/ann/secret/discussions/1")
    assert "both/config.json" not in repository.files()
    assert client.run('result = list(list_modules("ann/secret", revision="refs/pr/1"))') == ["cat", "both"]


def test_a_pull_request_to_the_repository_of_someone_else(hub, client):
    repository = hub.repositories["bob/zoo"] = Repository()
    repository.commit("initial commit", {"config.json": (b"{}", False)})
    answer = client('push_modules("bob/zoo", {"cat": cat})')
    assert "OSError" in answer.kinds
    assert "403" in answer.error
    code = 'result = push_modules("bob/zoo", {"cat": cat}, create_pr=True).pr_url'
    assert client.run(code).endswith("/bob/zoo/discussions/1")
    assert list(repository.content()) == ["config.json"]


def test_an_existing_readme_is_updated(hub, client):
    client.run('HfApi().create_repo("ann/readme")')
    repository = hub.repositories["ann/readme"]
    mine = (
        "---\nlicense: mit  # as the data\ntags:\n- birds\npipeline_tag: zero-shot-image-classification\n---\n# Zoo\n"
    )
    repository.commit("Write", {**repository.files(), "README.md": (mine.encode(), False)})
    client.run('push_modules("ann/readme", {"cat": cat}, metrics={"cat": {"accuracy": 0.5}})')
    first = repository.content()["README.md"].decode()
    card = ModelCard(first)
    assert card.data.license == "mit"
    assert card.data.tags[0] == "birds"
    assert "nemo_hf" in card.data.tags
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    assert card.text.startswith("# Zoo\n")
    edited = first + "\nA last word.\n"
    repository.commit("Edit", {**repository.files(), "README.md": (edited.encode(), False)})
    client.run('push_modules("ann/readme", {"cat": cat, "dog": dog}, metrics={"cat": {"accuracy": 0.6}})')
    text = repository.content()["README.md"].decode()
    assert text.endswith("\nA last word.\n")
    assert text.count("<!-- nemo_hf: begin") == text.count("# Zoo") == 1
    assert "`dog`" in text
    assert [result.metric_value for result in ModelCard(text).data.eval_results] == [0.6]


def test_command_line_pushes_folders_and_describes_what_is_there(hub, client, tmp_path):
    code = f"""
    root = {str(tmp_path)!r} + "/"
    save_module(cat, root + "cat", processing_class=processor, metrics={{"accuracy": 0.5}}, dataset="ann/pictures")
    save_module(both, root + "cat-dog", processing_class=processor)
    with open(root + "cat/README.md", "a") as file:
        file.write("My own words.")
    folders = [root + "cat", root + "cat-dog"]
    result = cli.main(["push", *folders, "--repo_id", "zoo", "--private", "--json", root + "push"])
    """
    assert client.run(code) == 0
    repository = hub.repositories["ann/zoo"]
    assert json.loads((tmp_path / "push").read_text())["commit"] == repository.branches["main"]
    assert repository.private
    content = repository.content()
    assert any(path.startswith("cat-dog/preprocessor") or path.startswith("cat-dog/processor") for path in content)
    card = content["cat/README.md"].decode()
    assert card.endswith("My own words.")
    assert 'from_pretrained("ann/zoo", subfolder="cat")' in card
    (result,) = ModelCard(content["README.md"].decode()).data.eval_results
    assert (result.metric_value, result.dataset_type) == (0.5, "ann/pictures")
    hub.log.clear()
    client.run(f'assert cli.main(["info", "ann/zoo", "--json", {str(tmp_path / "all")!r}]) == 0')
    report = json.loads((tmp_path / "all").read_text())
    assert (report["kind"], report["num_modules"]) == ("collection", 2)
    assert [module["folder"] for module in report["modules"]] == ["cat", "cat-dog"]
    arguments = ["info", "ann/zoo", "--subfolder", "cat-dog", "--revision", "main", "--json", str(tmp_path / "one")]
    client.run(f"assert cli.main({arguments!r}) == 0")
    report = json.loads((tmp_path / "one").read_text())
    assert (report["kind"], report["labels"]) == ("module", ["cat", "dog"])
    assert report["bytes"] == len(content["cat-dog/model.safetensors"])
    assert report["parameters"] == client.run("result = both.num_parameters()")
    sent = [line for line in hub.log if line.startswith("GET /cdn/")]
    assert len(sent) <= 1  # the header of one file


def test_command_line_errors_are_one_line(client, animals):
    for arguments, text in (
        (["push", "nowhere", "--repo_id", "ann/none"], "nowhere holds no module: there is no config.json"),
        (["info", "ann/none"], "ann/none is not a local folder and is not a valid model identifier"),
        (["info", "ann/animals", "--revision", "v9"], "v9 is not a valid git identifier"),
        (["info", "ann/animals", "--subfolder", "cow"], "There is no config.json in ann/animals/cow"),
        (["info", "ann/animals", "--subfolder", "cat", "--token", "hf_wrong"], "401 Unauthorized"),
    ):
        answer = client(f"result = cli.main({arguments!r})")
        assert answer.result == 1
        (line,) = answer.err.strip().splitlines()
        assert line.startswith(f"nemo-hf {arguments[0]}: error: ")
        assert text in line


def test_the_walk_in_the_documentation(hub, client):
    page = (Path(__file__).parents[1] / "docs" / "sharing.md").read_text(encoding="utf-8")
    blocks = [block.partition("```")[0] for block in page.split("```python\n")[1:]]
    assert len(blocks) >= 6
    for block in blocks:
        client.run(block.replace("your-name", "ann"))
    assert hub.repositories["ann/animals-of-the-page"].messages()[1:] == ["Upload 3 modules with nemo_hf"]
    commands = [line for line in page.split("```bash\n")[2].partition("```")[0].splitlines() if line]
    for command in commands:
        arguments = command.replace("your-name", "ann").split()[1:]
        assert client.run(f"result = cli.main({arguments!r})") == 0
