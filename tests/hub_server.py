# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""A small server on loopback that speaks the part of the Hub's API that huggingface_hub uses for models."""

import base64
import contextlib
import hashlib
import json
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


USER, TOKEN = "ann", "hf_right"


@dataclass
class Repository:
    """Branches name commits, commits hold all files: path → (content, whether it is stored as LFS)."""

    private: bool = False
    commits: list = field(default_factory=list)  # (message, files)
    branches: dict = field(default_factory=dict)  # name → sha
    pulls: list = field(default_factory=list)  # shas

    def commit(self, message, files, branch="main"):
        sha = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits.append((sha, message, files))
        if branch is not None:
            self.branches[branch] = sha
        return sha

    def sha_of(self, revision):
        pulls = {f"refs/pr/{i + 1}": sha for i, sha in enumerate(self.pulls)}
        known = {**{sha: sha for sha, _, _ in self.commits}, **self.branches, **pulls}
        return known.get(revision)

    def files(self, revision="main"):
        return next(files for sha, _, files in self.commits if sha == self.sha_of(revision))

    def content(self, revision="main"):
        return {path: content for path, (content, _) in self.files(revision).items()}

    def messages(self):
        return [message for _, message, _ in self.commits]


class HubServer(ThreadingHTTPServer):
    """`repositories` is the state, `log` all requests as `"METHOD /path"`; `cuts` breaks connections."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.files_endpoint = f"http://localhost:{self.server_port}"  # another host, as on the Hub
        self.repositories, self.objects, self.log, self.cuts = {}, {}, [], {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def cut(self, start, times):
        """Break the connection in the middle of the next requests that start so: `times` of them."""
        self.cuts[start] = times

    def downloads(self, repo_id):
        """The files of a repository that were really sent since `log` was emptied."""
        start = f"GET /{repo_id}/resolve/"
        small = {line.removeprefix(start).partition("/")[2] for line in self.log if line.startswith(start)}
        files = self.repositories[repo_id].content()
        oids = {hashlib.sha256(content).hexdigest(): path for path, content in files.items()}
        return small | {oids[line.removeprefix("GET /cdn/")] for line in self.log if line.startswith("GET /cdn/")}

    def handle_error(self, request, client_address):
        pass  # connections that a test cuts


class Answer(Exception):
    """Ends a request."""

    def __init__(self, status, body=None, code=None, **headers):
        super().__init__(status)
        self.status = status
        self.body = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
        self.headers = {name.replace("_", "-"): str(value) for name, value in headers.items()}
        if code is not None:
            self.headers |= {"X-Error-Code": code, "X-Error-Message": str((body or {}).get("error", code))}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args):
        pass

    def respond(self):
        url = urlsplit(self.path)
        self.route, self.query = [unquote(part) for part in url.path.strip("/").split("/")], parse_qs(url.query)
        self.server.log.append(line := f"{self.command} {unquote(url.path)}")
        self.is_cut = False
        for start, times in self.server.cuts.items():
            if line.startswith(start) and times > 0:
                self.server.cuts[start] -= 1
                self.is_cut = True
        length = int(self.headers.get("Content-Length", 0))
        if self.is_cut and length > 1:
            self.rfile.read(length // 2)
            return self.hang_up()
        self.body = (
            self.read_chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        )
        try:
            self.dispatch()
            raise Answer(404, {"error": f"nothing at {line}"})
        except Answer as answer:
            self.send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = respond

    def read_chunks(self):
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def send(self, answer):
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(answer.body[: len(answer.body) // 2] if self.is_cut else answer.body)
        if self.is_cut:
            self.hang_up()

    def hang_up(self):
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    def json(self):
        return json.loads(self.body or b"{}")

    def user(self, must=False):
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and given != TOKEN or must and not given:
            raise Answer(401, {"error": "Invalid credentials in Authorization header"})
        return USER if given else None

    def repository(self, owner, name, write=False):
        user = self.user(must=write)
        found = self.server.repositories.get(f"{owner}/{name}")
        if found is None or (found.private and user != owner):
            raise Answer(404 if user else 401, {"error": "Repository not found"}, code="RepoNotFound")
        if write and user != owner and "create_pr" not in self.query:
            raise Answer(403, {"error": "You are not allowed to write to this repository"})
        return found

    def sha(self, repository, revision):
        sha = repository.sha_of(revision)
        if sha is None:
            raise Answer(404, {"error": f"Invalid rev id: {revision}"}, code="RevisionNotFound")
        return sha

    def dispatch(self):
        match (self.command, *self.route):
            case ("GET", "api", "whoami-v2"):
                raise Answer(200, {"name": self.user(must=True), "type": "user", "orgs": []})
            case ("POST", "api", "repos", "create"):
                self.create()
            case ("POST", "api", "validate-yaml"):
                self.validate()
            case ("GET", "api", "models", owner, name, *rest):
                self.describe(self.repository(owner, name), f"{owner}/{name}", rest)
            case ("POST", "api", "models", owner, name, "paths-info", revision):
                self.describe_paths(self.repository(owner, name), revision)
            case ("POST", "api", "models", owner, name, "branch", branch):
                self.branch(self.repository(owner, name, write=True), branch)
            case ("POST", "api", "models", owner, name, "preupload", revision):
                self.preupload(self.repository(owner, name, write=True), revision)
            case ("POST", "api", "models", owner, name, "commit", revision):
                self.commit(self.repository(owner, name, write=True), f"{owner}/{name}", revision)
            case ("POST", owner, name, "info", "lfs", "objects", "batch"):
                self.user(must=True)
                self.repository(owner, name.removesuffix(".git"))
                self.batch()
            case ("PUT", "lfs", oid):
                if hashlib.sha256(self.body).hexdigest() != oid:
                    raise Answer(400, {"error": "The content is not what its hash says"})
                self.server.objects[oid] = self.body
                raise Answer(200)
            case ("GET" | "HEAD", "cdn", oid):
                self.content(self.server.objects[oid])
            case ("GET" | "HEAD", owner, name, "resolve", revision, *path):
                self.resolve(self.repository(owner, name), revision, "/".join(path))

    def create(self):
        user, wanted = self.user(must=True), self.json()
        repo_id = f"{wanted.get('organization') or user}/{wanted['name']}"
        url = {"url": f"{self.server.endpoint}/{repo_id}"}
        if repo_id in self.server.repositories:
            raise Answer(409, {**url, "error": "You already created this model repo"})
        if not repo_id.startswith(f"{user}/"):
            raise Answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        private = wanted.get("private") or wanted.get("visibility") == "private"
        created = self.server.repositories[repo_id] = Repository(private=bool(private))
        created.commit("initial commit", {".gitattributes": (b"*.safetensors filter=lfs\n", False)})
        raise Answer(200, url)

    def validate(self):
        content = self.json()["content"]
        block = content.split("---")[1] if content.startswith("---") else ""
        try:
            yaml.safe_load(block)
        except yaml.YAMLError as error:
            raise Answer(400, {"errors": [{"message": str(error)}], "warnings": []}) from error
        raise Answer(200, {"errors": [], "warnings": []})

    def describe(self, repository, repo_id, rest):
        kind, revision, *path = rest or ["revision", "main"]
        sha = self.sha(repository, revision)
        files = repository.files(revision)
        if kind == "revision":
            siblings = [{"rfilename": path} for path in files]
            info = {"_id": "0", "id": repo_id, "modelId": repo_id, "sha": sha, "private": repository.private}
            raise Answer(200, {**info, "tags": [], "siblings": siblings})
        if kind == "tree":
            start = "".join(f"{part}/" for part in path)
            found = {name: value for name, value in files.items() if name.startswith(start)}
            if path and not found:
                raise Answer(404, {"error": "Entry not found"}, code="EntryNotFound")
            recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
            rows = [self.row(name, *found[name]) for name in found if recursive or "/" not in name[len(start) :]]
            raise Answer(200, rows)

    def describe_paths(self, repository, revision):
        self.sha(repository, revision)
        # huggingface_hub sends a form, as JSON or URL-encoded
        wanted = self.json()["paths"] if self.body[:1] == b"{" else parse_qs(self.body.decode())["paths"]
        files = repository.files(revision)
        raise Answer(200, [self.row(path, *files[path]) for path in wanted if path in files])

    @staticmethod
    def row(path, content, is_lfs):
        row = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return {**row, "lfs": lfs} if is_lfs else row

    def branch(self, repository, branch):
        if branch in repository.branches:
            raise Answer(409, {"error": "Reference already exists"})
        repository.branches[branch] = repository.branches["main"]
        raise Answer(200)

    def preupload(self, repository, revision):
        self.sha(repository, revision)
        modes = {True: "lfs", False: "regular"}
        files = [
            {"path": file["path"], "uploadMode": modes[file["path"].endswith(".safetensors")], "shouldIgnore": False}
            for file in self.json()["files"]
        ]
        raise Answer(200, {"files": files})

    def batch(self):
        objects = []
        for wanted in self.json()["objects"]:
            actions = {"upload": {"href": f"{self.server.endpoint}/lfs/{wanted['oid']}"}}
            objects.append(wanted if wanted["oid"] in self.server.objects else {**wanted, "actions": actions})
        raise Answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, repository, repo_id, revision):
        head = self.sha(repository, revision)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        wants_pull = "create_pr" in self.query
        if header.get("parentCommit") not in (None, head) and not wants_pull:
            raise Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        files = dict(repository.files(revision))
        for line in lines[1:]:
            path = line["value"]["path"]
            if line["key"] == "file":
                files[path] = (base64.b64decode(line["value"]["content"]), False)
            elif line["key"] == "lfsFile":
                files[path] = (self.server.objects[line["value"]["oid"]], True)
            elif files.pop(path, None) is None:
                raise Answer(404, {"error": "A file with this name doesn't exist"}, code="EntryNotFound")
        sha = repository.commit(header["summary"], files, None if wants_pull else revision)
        answer = {"commitUrl": f"{self.server.endpoint}/{repo_id}/commit/{sha}", "commitOid": sha}
        if wants_pull:
            repository.pulls.append(sha)
            answer["pullRequestUrl"] = f"{self.server.endpoint}/{repo_id}/discussions/{len(repository.pulls)}"
        raise Answer(200, answer)

    def resolve(self, repository, revision, path):
        head = {"X_Repo_Commit": self.sha(repository, revision)}
        if path not in repository.files(revision):
            raise Answer(404, {"error": "Entry not found"}, code="EntryNotFound", **head)
        content, is_lfs = repository.files(revision)[path]
        if not is_lfs:
            self.content(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', **head)
        oid = hashlib.sha256(content).hexdigest()
        head |= {"X_Linked_Etag": f'"{oid}"', "X_Linked_Size": len(content)}
        raise Answer(302, Location=f"{self.server.files_endpoint}/cdn/{oid}", **head)

    def content(self, content, **headers):
        wanted = self.headers.get("Range")
        if not wanted:
            raise Answer(200, content, Accept_Ranges="bytes", **headers)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        first, last = int(first), min(int(last or len(content)), len(content) - 1)
        headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
        raise Answer(206, content[first : last + 1], **headers)
