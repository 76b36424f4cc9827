# Copyright 2026 The nemo_hf authors. Licensed under the Apache License, Version 2.0.
"""
Writes `families.md`: what is masked and cut in every family of the architecture table, found out by cutting tiny
random models. Run as `python docs/make_families.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import GROUPS, Tiny
from transformers import CONFIG_MAPPING, PreTrainedModel

from nemo_hf import ModuleMasks, extract_module
from nemo_hf.architectures import ARCHITECTURES, ATTENTION_ROLES, UNSUPPORTED, Attention, Chain, FeedForward
from nemo_hf.maskable import maskable_layers
from nemo_hf.resolution import resolve_parts
from nemo_hf.slim import layer_sizes


PAGE = Path(__file__).with_name("families.md")
SHORT = dict(zip(ATTENTION_ROLES, ("q", "k", "v", "o"), strict=True))
COLUMNS = ("family", "classes", "masked", "cut", "never masked", "stock layout", "tested with")
AUTO_CLASSES = {
    "Image transformers": "AutoModelForImageClassification",
    "Convolutional networks": "AutoModelForImageClassification",
    "Text encoders": "AutoModelForSequenceClassification",
    "Text decoders": "AutoModelForSequenceClassification",
    "Audio": "AutoModelForAudioClassification",
}
# Layers of blocks that an entry leaves out for a reason of their own: model type → layers, reason.
LEFT_OUT = {
    "convnext": ("`dwconv`", "the norm behind it mixes the channels"),
    "pvt_v2": ("`mlp.dwconv`", "it works channel by channel behind a masked layer, and is cut with it"),
}

# ---- What a model shows ----


@dataclass
class Row:
    """What the page says about one model."""

    masked: str
    cut: str
    stock: str
    tested: str
    never: dict[str, str] = field(default_factory=dict)  # reason → layers


def describe(model: PreTrainedModel) -> Row:
    """Look at a model, and cut it, to see what the table means for it."""
    parts = [part for _, part in resolve_parts(model)]
    blocks = len({layer.block for layer in maskable_layers(model)})
    masked = {layer.name for layer in maskable_layers(model) if layer.reason is None}
    cut = list(_cut(model, parts, masked))
    stock = _stock(model, masked, cut)
    row = Row(", ".join(_masked(parts, masked)), ", ".join(cut), ", ".join(stock), _sizes(model, parts, blocks))
    found: dict[str, list[str]] = {}
    for layer in maskable_layers(model):
        if layer.reason is not None:
            reason = re.sub(r"\S+, which follows it", "the depthwise convolution, which follows it", layer.reason)
            name = _short_name(layer.name, parts)
            found.setdefault(reason, []).extend([] if name in found.get(reason, ()) else [name])
    if model.config.model_type in LEFT_OUT:
        layers, reason = LEFT_OUT[model.config.model_type]
        found[reason] = [layers]
    row.never = {reason: ", ".join(names) for reason, names in found.items()}
    return row


def _of_kind(parts: Sequence[Any], kind: type) -> list[Any]:
    return [part for part in parts if isinstance(part, kind)]


def _short_name(name: str, parts: Sequence[Any]) -> str:
    for part in _of_kind(parts, Attention):
        for role in ATTENTION_ROLES:
            if getattr(part, role) == name:
                return SHORT[role]
    return f"`{'.'.join(name.split('.')[-2:])}`"


def _masked(parts: Sequence[Any], masked: set[str]) -> Iterator[str]:
    for part in _of_kind(parts, Attention)[:1]:
        yield from (SHORT[role] for role in ATTENTION_ROLES if getattr(part, role) in masked)
    for part in _of_kind(parts, FeedForward)[:1]:
        roles = [role for role in ("gate", "up", "down") if getattr(part, role) in masked]
        yield f"FFN ({', '.join(roles)})"
    if _of_kind(parts, Chain):
        yield "convolutions"


def _cut(model: PreTrainedModel, parts: Sequence[Any], masked: set[str]) -> Iterator[str]:
    """Close some neurons, cut, and see which layers got smaller."""
    for part in _of_kind(parts, Attention)[-1:]:
        size = getattr(model.get_submodule(part.layer), part.head_size[0])
        width = layer_sizes(model.get_submodule(part.output))[0]
        projections = {part.query, part.key, part.value} & masked
        # In every head the first quarter of each half: where positions rotate, units i and i + size / 2 are a pair.
        units = {name: torch.arange(_neurons(model, name)) % (size // 2) < size // 4 for name in projections}
        # Of v only the first head; in a fused projection v comes last.
        before = 2 * width if part.query == part.value else 0
        head = {part.value: torch.arange(_neurons(model, part.value)) < before + size}
        smaller = _smaller(model, units)
        if part.value in masked and part.output in _smaller(model, head):
            yield "heads"
        if part.query in smaller:
            yield "pairs of attention units" if part.rotary else "attention units"
        elif part.value in smaller:
            yield "units of v"
    for part in _of_kind(parts, FeedForward)[:1]:
        half = {n: _first_half(model, n) for n in {part.gate or part.up, part.up} & masked}
        if part.down in _smaller(model, half):
            yield "FFN units"
    steps = [step.layer for part in _of_kind(parts, Chain) for step in part.steps if step.layer in masked]
    if steps and set(steps) <= _smaller(model, {name: _first_half(model, name) for name in steps}):
        yield "channels"


def _neurons(model: PreTrainedModel, name: str) -> int:
    return layer_sizes(model.get_submodule(name))[1]


def _first_half(model: PreTrainedModel, name: str) -> torch.Tensor:
    neurons = _neurons(model, name)
    return torch.arange(neurons) < neurons // 2


def _smaller(model: PreTrainedModel, masks: dict[str, torch.Tensor]) -> set[str]:
    """The layers that are smaller in a module with these masks."""
    if not masks:
        return set()
    shapes = extract_module(model, ModuleMasks({0: masks}), labels=[0]).config.nemo["shapes"]
    return set(shapes.get("layers", ()))


def _stock(model: PreTrainedModel, masked: set[str], cut: Sequence[str]) -> list[str]:
    """What of the cut is left where the plain class shall load the module."""
    stock = ARCHITECTURES[model.config.model_type].stock
    if stock is None:
        return ["–"]
    masks = ModuleMasks({0: {name: _first_half(model, name) for name in masked}})
    if type(extract_module(model, masks, labels=[0], layout="stock")) is not type(model):
        raise SystemExit(f"A module of {type(model).__name__} in the stock layout has another class.")
    said = {"heads": stock.num_heads, "attention units": stock.cuts_units, "FFN units": stock.intermediate_size}
    return [word for word in cut if said.get(word)]


def _sizes(model: PreTrainedModel, parts: Sequence[Any], blocks: int) -> str:
    attentions, feed_forwards, chains = (_of_kind(parts, kind) for kind in (Attention, FeedForward, Chain))
    if chains:
        channels = [_neurons(model, step.layer) for chain in chains for step in chain.steps]
        return f"{len(channels)} convolutions of {min(channels)} to {max(channels)} channels"
    words = [f"width {_several(_neurons(model, part.down) for part in feed_forwards)}", f"{blocks} blocks"]
    if attentions:
        heads = []
        for part in attentions:
            size = getattr(model.get_submodule(part.layer), part.head_size[0])
            query = layer_sizes(model.get_submodule(part.output))[0] // size
            key = query if part.query == part.key else _neurons(model, part.key) // size
            heads.append((query, key))
        shared = {key for query, key in heads if key != query}
        words.append(
            f"{_several(query for query, _ in heads)} heads"
            + (f" ({_several(shared)} of keys and values)" if shared else "")
        )
    words.append(f"FFN {_several(layer_sizes(model.get_submodule(part.down))[0] for part in feed_forwards)}")
    return ", ".join(words)


def _several(numbers: Iterator[int] | set[int]) -> str:
    return " and ".join(map(str, sorted(set(numbers))))


# ---- The page ----


def page() -> str:
    """The text of `families.md`; a family of the table that is not on it is an error."""
    shown = {getattr(transformers, tiny.name).config_class.model_type for tinies in GROUPS.values() for tiny in tinies}
    ours = {name for name in ARCHITECTURES if CONFIG_MAPPING[name].__module__.startswith("transformers.")}
    if shown != ours:
        raise SystemExit(f"GROUPS must have the families of the table; they differ in {sorted(shown ^ ours)}.")
    notes: dict[str, int] = {}
    sections = []
    for group, models in GROUPS.items():
        lines = [
            f"## {group}",
            "",
            f"Load with `{AUTO_CLASSES[group]}`.",
            "",
            _line(COLUMNS),
            "|---" * len(COLUMNS) + "|",
        ]
        by_type: dict[str, list[Tiny]] = {}
        for tiny in models:
            by_type.setdefault(getattr(transformers, tiny.name).config_class.model_type, []).append(tiny)
        lines.extend(_family(model_type, tinies, notes) for model_type, tinies in by_type.items())
        sections.append("\n".join(lines))
    return TEXT.format(
        tables="\n\n".join(sections),
        reasons="\n".join(f"{number}. {reason[0].upper()}{reason[1:]}." for reason, number in notes.items()),
        unsupported="\n".join(f"- `{model_type}`: {reason}." for model_type, reason in UNSUPPORTED.items()),
    )


def _family(model_type: str, tinies: list[Tiny], notes: dict[str, int]) -> str:
    rows = {tiny.variant: describe(tiny.model()) for tiny in tinies}
    never = {variant: _never(row, notes) for variant, row in rows.items()}
    cells = [
        {variant: getattr(row, name) for variant, row in rows.items()} for name in ("masked", "cut", "stock", "tested")
    ]
    masked, cut, stock, tested = map(_merged, cells)
    classes = ", ".join(f"`{name}`" for name in ARCHITECTURES[model_type].heads)
    return _line((f"`{model_type}`", classes, masked, cut, _merged(never), stock, tested))


def _never(row: Row, notes: dict[str, int]) -> str:
    return ", ".join(f"{layers} ({notes.setdefault(why, len(notes) + 1)})" for why, layers in row.never.items())


def _merged(cells: dict[str, str]) -> str:
    """One cell for all variants of a family if they agree."""
    if len(set(cells.values())) == 1:
        return next(iter(cells.values()))
    return "; ".join(f"{variant}: {cell or 'no more'}" for variant, cell in cells.items())


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


TEXT = """\
<!-- Written by docs/make_families.py: change that file, not this one. -->

# Supported families

The architecture table has an entry for each of these model types of transformers. Models of any size work if they
have one of the classes shown. Another family is one more entry: [add an architecture](add_an_architecture.md).

**How to read the tables.** q, k and v are the projections of the attention, o is the layer that writes its heads
back to the residual stream, FFN is the feed-forward part of a block. Masked layers get gates. "Cut" is what makes a
module smaller. Besides, layers that write to the residual stream lose the rows of their closed neurons. The stream
keeps its width in transformers; in convolutional networks it loses the channels to which nothing writes. [What
happens when a neuron is removed](removing_neurons.md) has the rules. Heads stay where one position bias serves all
blocks. "Tested with" are the sizes of the random models with which the tests compare modules with their parents and
reload them; where there are two numbers, each belongs to a stage.

**Layouts.** The layout `"ragged"` of `extract_module` works for all families: every layer of a module has its own
sizes, and it loads after `import nemo_hf`. The layout `"stock"` gives all blocks one size, so that the plain class
loads the module. It needs masks in every block (`skip_first_blocks=0`). The column says what of the cut it keeps; – is
for families whose configuration cannot say the sizes.

**Never masked anywhere:** embeddings of words and patches, norms, patch merging, poolers, hidden layers of the head,
the classifier (it keeps the rows of the chosen labels), squeeze-excite layers, the spatial reduction of PVT v2, and
the feature extractor and positional convolution of speech models. The numbers in the tables point to [the
reasons](#reasons). For your own model ask:

```python
from nemo_hf import ModularConfig, list_maskable_layers
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

config = DebertaV2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
model = DebertaV2ForSequenceClassification(config)
for name, reason in list_maskable_layers(model, ModularConfig(skip_first_blocks=0), reasons=True).items():
    print(name, "|", reason or "masked")
```

{tables}

## Reasons

{reasons}

The activation of the configuration counts too. Where it does not map zero to zero (sigmoid, softplus), a convolution
in front of another one is not masked, nor is the first layer of an FFN without gate whose second layer has no bias.

## Not supported

{unsupported}

Families without an entry are refused with the nearest names.
"""


def main() -> None:
    """Write the page beside this script."""
    transformers.logging.set_verbosity_error()  # token ids beyond a tiny vocabulary
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
