# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""A repository on the Hub that is read, then changed by exactly one commit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # of httpx, or of whatever huggingface_hub speaks HTTP with
)

from .errors import CheckpointError


@dataclass(frozen=True)
class Remote:
    """
    A model repository at one revision.

    Args:
        api (`HfApi`): with the user's token.
        repo_id (`str`): with its namespace.
        revision (`str`, *optional*): the branch; the default is the main one.
        commit (`str`): what the branch pointed to when it was opened.
        files (`frozenset[str]`): the paths in that commit.
    """

    api: HfApi
    repo_id: str
    revision: str | None
    commit: str
    files: frozenset[str]

    @classmethod
    def open(
        cls, repo_id: str, private: bool | None, token: str | bool | None, revision: str | None, create_pr: bool
    ) -> Remote:
        """Find the repository, or create it (and the branch, unless a pull request is wanted)."""
        api = HfApi(token=token)
        with clear_errors(repo_id):
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not create_pr and not revision.startswith("refs/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            info = api.repo_info(repo_id, revision=revision)
        files = frozenset(file.rfilename for file in info.siblings or ())
        return cls(api, repo_id, revision, info.sha, files)

    def read(self, name: str, folder: str = "") -> bytes | None:
        """The content of a file in a folder, or `None` if the repository has no such file."""
        path = f"{folder}/{name}" if folder else name
        if path not in self.files:
            return None
        with clear_errors(self.repo_id):
            return Path(self.api.hf_hub_download(self.repo_id, path, revision=self.commit)).read_bytes()

    def push(self, folder: Path, delete: Iterable[str], message: str, create_pr: bool) -> CommitInfo:
        """
        Commit all files of a folder, all or none. The commit is refused if someone else has committed since the
        repository was opened.
        """
        operations = [
            CommitOperationAdd(path_in_repo=file.relative_to(folder).as_posix(), path_or_fileobj=str(file))
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        ]
        with clear_errors(self.repo_id):
            return self.api.create_commit(
                self.repo_id,
                [*operations, *(CommitOperationDelete(path) for path in sorted(delete))],
                commit_message=message,
                revision=self.revision,
                create_pr=create_pr,
                parent_commit=self.commit,
            )


@contextlib.contextmanager
def clear_errors(repo_id: str) -> Iterator[None]:
    """Say what a broken connection means; answers of the Hub (no access, no such revision, …) speak for themselves."""
    try:
        yield
    except HfHubHTTPError as error:
        if error.response.status_code == 412:
            raise CheckpointError(
                f"{repo_id} was changed by someone else during the push. Nothing was committed; push again."
            ) from error
        raise
    except (HTTPError, RuntimeError) as error:  # huggingface_hub raises RuntimeError for an upload that failed
        raise CheckpointError(
            f"The connection to {repo_id} failed ({error.__cause__ or error}). A push is one commit, so the "
            "repository is as it was, unless only the answer was lost. Push again."
        ) from error
