# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""Mutated files: JSON, bytes, safetensors headers; and a watch over what happens while one is read."""

import contextlib
import copy
import json
import resource
import signal
import struct
import sys


VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    7,
    2**31,
    2**63,
    10**12,
    10**40,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "all",
    "module",
    "modular",
    "../../etc/passwd",
    "a\0b",
    "日本🐱",
    "\ud800",
    "9" * 5000,
    "__class__",
    "PreTrainedModel",
    "BertForSequenceClassification",
    [],
    {},
    [[]],
    [None],
    [10**12],
    [10**12, 10**12],
    [-1, 5],
    ["x", "x"],
    {"a": 1},
    {"": {}},
    {"vit": {"training": 10**12}},
]
MEGABYTE = 2**20


class Hang(BaseException):
    """A file took too long."""


class Watch:
    """
    Code from a checkpoint or another program that runs, files that are written, questions to the user, seconds and
    memory that run out: all of these are failures of a loader, whatever it raises.
    """

    FORBIDDEN = ("os.system", "os.exec", "os.fork", "os.posix", "subprocess", "pickle", "socket.", "builtins.input")

    def __init__(self):
        self.folder = self.found = None
        sys.addaudithook(self._hook)  # hooks cannot be removed: this one sleeps outside `loading`

    def _hook(self, event, args):
        if self.folder is None:
            return
        inside = self.folder in str(args[0]) if args and event in ("open", "import", "compile") else False
        is_code = event == "exec" and self.folder in getattr(args[0], "co_filename", "")
        is_write = event == "open" and inside and isinstance(args[1], str) and any(c in args[1] for c in "wax+")
        is_remote_code = event == "import" and "transformers_modules" in str(args[0])
        if event.startswith(self.FORBIDDEN) or is_code or is_write or is_remote_code:
            self.found = f"{event} {args!r:.200}"

    @contextlib.contextmanager
    def loading(self, folder, seconds=20, megabytes=1024):
        """Around the loader: `Hang`, or `MemoryError`, instead of a machine that stands still."""

        def hang(*_):
            raise Hang

        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        limits = resource.getrlimit(resource.RLIMIT_AS)
        handler = signal.signal(signal.SIGPROF, hang)
        self.folder, self.found = str(folder), None
        resource.setrlimit(resource.RLIMIT_AS, (now + megabytes * MEGABYTE, limits[1]))
        signal.setitimer(signal.ITIMER_PROF, seconds)  # of this process: the machine may be busy
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            resource.setrlimit(resource.RLIMIT_AS, limits)
            signal.signal(signal.SIGPROF, handler)
            self.folder = None
        assert self.found is None, self.found


def paths(tree, prefix=()):
    """Where the values of nested dictionaries and lists are."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in entries:
        yield (*prefix, key)
        yield from paths(value, (*prefix, key))


def mutated_tree(tree, generator, under=()):
    """A copy with one to three changes to what lies `under` a path."""
    tree = copy.deepcopy(tree)
    for _ in range(generator.choice((1, 1, 2, 3))):
        known = [path for path in paths(tree) if path[: len(under)] == under]
        if not known:
            break
        *way, last = generator.choice(known)
        parent = tree
        for key in way:
            parent = parent[key]
        change = generator.randrange(6)
        if change == 0:
            parent.pop(last)
        elif change == 1 and isinstance(parent, dict):
            parent[generator.choice(("x", "", "nemo", f"{last}.0"))] = parent.pop(last)
        elif change == 2:
            parent[last] = [parent[last]]
        elif change == 3:  # what stands elsewhere
            other = tree
            for key in generator.choice(known):
                other = other[key]
            parent[last] = copy.deepcopy(other)
        else:
            parent[last] = copy.deepcopy(generator.choice(VALUES))
    return tree


def mutated_json(content, generator, under=()):
    """Bytes of JSON with changed values, or changed bytes, or far too deep."""
    kind = generator.randrange(10)
    if kind == 0:
        return mutated_bytes(content, generator)
    if kind == 1:
        opening = generator.choice((b"[", b'{"nemo":', b'{"a":'))
        return opening * 100_000
    return json.dumps(mutated_tree(json.loads(content), generator, under)).encode()


def mutated_bytes(content, generator):
    """Bytes that were flipped, cut off, put in, doubled or zeroed."""
    data = bytearray(content)
    for _ in range(generator.choice((1, 1, 3, 10))):
        start = generator.randrange(len(data) or 1)
        length = generator.choice((1, 8, 64))
        kind = generator.randrange(5)
        if kind == 0:
            data[start : start + 1] = bytes([generator.randrange(256)])
        elif kind == 1:
            del data[start:]
        elif kind == 2:
            data[start:start] = generator.randbytes(length)
        elif kind == 3:
            data[start:start] = data[start : start + length]
        else:
            data[start : start + length] = bytes(len(data[start : start + length]))
    return bytes(data)


def mutated_safetensors(content, generator):
    """A file whose header, whose description by nemo_hf, whose length of the header, or whose bytes are changed."""
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    kind = generator.randrange(8)
    if kind == 0:
        return mutated_bytes(content, generator)
    if kind == 1:
        return struct.pack("<Q", generator.choice((0, 1, length - 1, length + 1, 2**32, 2**63))) + content[8:]
    described = "nemo" in header.get("__metadata__", {})
    if kind < 6 and described:
        text = mutated_json(header["__metadata__"]["nemo"].encode(), generator)
        header["__metadata__"]["nemo"] = text.decode("utf-8", "replace")
    elif kind == 6:
        entry = header[generator.choice([name for name in header if name != "__metadata__"])]
        change = generator.randrange(3)
        if change == 0:
            entry["dtype"] = generator.choice(("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3"))
        elif change == 1:  # as many bytes in another shape
            entry["shape"] = generator.choice(([1, *entry["shape"]], entry["shape"][::-1], [*entry["shape"], 1]))
        else:
            entry["shape"] = [generator.choice((0, 1, 10**12, 2**62)) for _ in entry["shape"]]
    else:
        header = mutated_tree(header, generator)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data
