"""Tables between a model family and Hugging Face: tensors and config.json, for both directions.

models/<family>/hf.py holds one `FAMILY`, a few Architectures. A row of their `tensors` reads

    our path | its dimensions | Hugging Face's name | its dimensions

in letters: D embed, N query heads, K kv heads, H head dim, F mlp, V vocab, E experts and what else the
family's `sizes` names. `(N H)` is one dimension made of two. The first `{}` of a name is the layer, the
second the expert. Our blocks are stacked along a first axis that the rows leave out, and experts along
the next one, E; how many there are is seen from our parameters, so two stacks may differ in depth. A
row counts where our model has its paths: biases and heads come and go with the config. config.json is
read strictly: see models/hf_config.py.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from llm_jax.core.config import ConfigError, parse
from llm_jax.models.hf_config import Field, Group, check_keys

Sizes = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Row:
    """paths, dims: ours; several paths, with one space between, lie along the first of the dims."""

    paths: str
    dims: str
    name: str
    hf_dims: str

    @property
    def depth(self) -> int:
        """Leading axes of our parameters that the name counts: 0, 1 (layer) or 2 (layer, expert)."""
        return self.name.count("{}")

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Of the Hugging Face tensor."""
        return _shape(self._theirs, sizes)

    def to_hf(self, parts: Sequence[np.ndarray], sizes: Sizes) -> np.ndarray:
        """One layer's (and expert's) arrays of `paths` as the Hugging Face tensor; a view, where it can be."""
        x = np.stack(parts) if len(parts) > 1 else parts[0]
        ours, theirs = _letters(self._ours), _letters(self._theirs)
        x = x.reshape([sizes[letter] for letter in ours])
        x = x.transpose([ours.index(letter) for letter in theirs])
        return x.reshape(self.shape(sizes))

    def from_hf(self, tensor: np.ndarray, sizes: Sizes) -> list[np.ndarray]:
        """The inverse of `to_hf`; views of `tensor`, where it can be."""
        ours, theirs = _letters(self._ours), _letters(self._theirs)
        x = tensor.reshape([sizes[letter] for letter in theirs])
        x = x.transpose([theirs.index(letter) for letter in ours])
        x = x.reshape(_shape(self._ours, sizes))
        return list(x) if len(self.paths.split()) > 1 else [x]

    @functools.cached_property
    def _ours(self) -> list[list[str]]:
        return _groups(self.dims)[max(0, self.depth - 1) :]

    @functools.cached_property
    def _theirs(self) -> list[list[str]]:
        return _groups(self.hf_dims)


def _groups(dims: str) -> list[list[str]]:
    """The letters of each dimension."""
    return [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\S+", dims)]


def _letters(groups: list[list[str]]) -> list[str]:
    return [letter for group in groups for letter in group]


def _shape(groups: list[list[str]], sizes: Sizes) -> tuple[int, ...]:
    return tuple(math.prod(sizes[letter] for letter in group) for group in groups)


def in_blocks(path: str, name: str, rows: Sequence[Row]) -> tuple[Row, ...]:
    """Rows of one block with the paths and names they have in the whole model.

    Args:
      path: of the stack's layers, such as "stack.layers.".
      name: Hugging Face's, such as "model.layers.{}.".
    """
    return tuple(
        dataclasses.replace(
            row, paths=" ".join(path + part for part in row.paths.split()), name=name + row.name
        )
        for row in rows
    )


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What one class of transformers computes, in terms of our Config.

    fields, groups: what config.json and our Config both have; `ours` may be dotted.
    fixed: values of our other fields, or functions of the values of all by dotted path.
    limits: the same for fields that config.json has and that transformers does not take as they come.
    only: keys that we can serve with this value alone, which is also transformers' default.
    written: keys that change nothing we compute, and what is written there.
    ignored: such keys that are not written.
    prefix: what checkpoints of the headless class leave out of the names.
    renames: (pattern, replacement) for names of older checkpoints.
    skipped: names in checkpoints that are no parameters, without the prefix.
    copies: names of tensors that may lie beside the one they are tied to, and that one's name. They
      must be equal; one that is a parameter of its own, since the config does not tie it, is none.
    applies: to which contents of config.json, among architectures of one class.
    inputs_first: pattern of the names of matrices that are stored [in, out]; the others are [out, in].
    heads: names, with the prefix, of what other classes of the same model_type have on top: passed
      over where our model lacks it, and left to be initialized where the checkpoint lacks it.
    """

    model_type: str
    class_name: str
    fields: tuple[Field, ...]
    tensors: tuple[Row, ...]
    fixed: Mapping[str, Any]
    limits: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    groups: tuple[Group, ...] = ()
    only: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    written: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    prefix: str = ""
    renames: tuple[tuple[str, str], ...] = ()
    skipped: str | None = None
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    inputs_first: str | None = None
    heads: str | None = None
    applies: Callable[[Mapping[str, Any]], bool] = lambda content: True

    @property
    def told(self) -> set[str]:
        """Our fields that config.json has."""
        return {field.ours for field in self.fields} | {f for g in self.groups for f in g.fields}

    def fixed_values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        fixed = {k: v for k, v in self.fixed.items() if k not in self.told}
        constants = {k: v for k, v in fixed.items() if not callable(v)}
        return _evaluated(fixed, {**constants, **values})

    def obstacles(self, config: Any) -> dict[str, Any]:
        """Our fields that it has no place for, with the value it would take."""
        values = flat(config)
        wanted = self.fixed_values(values) | _evaluated(self.limits, values)
        return {k: v for k, v in wanted.items() if values.get(k) != v}


def _evaluated(table: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v(values) if callable(v) else v for k, v in table.items()}


@dataclasses.dataclass(frozen=True)
class Family:
    """One folder of models/.

    name, config: of the component.
    architectures: the first of a model_type is taken where config.json names no class, or another.
    sizes: what the letters of the rows stand for.
    free: fields that change nothing that a forward pass without dropout computes.
    """

    name: str
    config: type
    architectures: tuple[Architecture, ...]
    sizes: Callable[[Any], Sizes]
    free: frozenset[str] = frozenset()

    @property
    def model_types(self) -> list[str]:
        return list(dict.fromkeys(a.model_type for a in self.architectures))

    def architecture_for(self, config: Any) -> Architecture:
        """The architecture that computes what this config does.

        Raises:
          ConfigError: there is none; names what stands between the config and the nearest.
        """
        found = [(a, a.obstacles(config)) for a in self.architectures]
        values = flat(config)
        is_section = lambda field: dataclasses.is_dataclass(values.get(field))  # noqa: E731
        # One without a whole section of ours is farther away than any with some other values.
        distance = lambda fields: (sum(map(is_section, fields)), len(fields))  # noqa: E731
        nearest, obstacles = min(found, key=lambda pair: distance(pair[1]))
        if not obstacles:
            return nearest
        wrong = " and ".join(
            f"model.{field}"
            + ("" if is_section(field) else f" = {values.get(field)!r}")
            + f" (it takes {value!r})"
            for field, value in obstacles.items()
        )
        raise ConfigError(
            f"no Hugging Face architecture computes this model; the nearest, {nearest.class_name}, "
            f"has no place for {wrong}"
        )

    def architecture_of(self, content: Mapping[str, Any]) -> Architecture:
        """The architecture that a config.json names.

        Raises:
          ConfigError: none of this family.
        """
        found = [a for a in self.architectures if a.model_type == content.get("model_type")]
        if not found:
            raise ConfigError(
                f"model_type = {content.get('model_type')!r} cannot be read; "
                f"choices: {', '.join(self.model_types)}"
            )
        found = [a for a in found if a.applies(content)]
        names = content.get("architectures") or ()
        return next((a for a in found if a.class_name in names), found[0])

    def hf_config(
        self,
        config: Any,
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        pad_id: int | None = None,
    ) -> dict[str, Any]:
        """The content of config.json.

        Raises:
          ConfigError: no architecture of Hugging Face computes this model, or its positions depend on
            another `pad_id`.
        """
        architecture, values = self.architecture_for(config), flat(config)
        out: dict[str, Any] = {
            "architectures": [architecture.class_name],
            "model_type": architecture.model_type,
        }
        for field in architecture.fields:
            out[field.key] = field.write(values[field.ours])
        out |= {**architecture.only, **architecture.written}
        # The embedding's row of pad_token_id gets no gradient in transformers: never a token in use.
        if architecture.only.get("is_encoder_decoder"):
            out["decoder_start_token_id"] = pad_id  # as objectives/seq2seq.py has it
        told_pad_id = None if pad_id in (bos_id, eos_id) else pad_id
        out |= {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": told_pad_id}
        out |= {"dtype": "float32", "torch_dtype": "float32"}  # the key of 5.x, of 4.x
        for group in architecture.groups:  # last: RoBERTa's positions depend on its pad_token_id
            out |= group.write(values)
        if pad_id is not None and out["pad_token_id"] not in (told_pad_id, pad_id):
            raise ConfigError(
                f"this model's positions start behind a padding id of {out['pad_token_id']}, but the "
                f"tokenizer's is {pad_id}: transformers would give other positions"
            )
        return out

    def config_from_hf(self, content: Mapping[str, Any]) -> Any:
        """The Config of a config.json.

        Raises:
          ConfigError: another architecture, a key that is not understood, or an option that our
            model cannot compute.
        """
        architecture = self.architecture_of(content)
        check_keys(
            content,
            architecture.class_name,
            understood={key for part in (*architecture.fields, *architecture.groups) for key in part.keys}
            | architecture.written.keys()
            | architecture.ignored,
            only=architecture.only,
        )  # fmt: skip
        values = {field.ours: field.read(content) for field in architecture.fields}
        for group in architecture.groups:
            values |= group.read(content, values)
        values = {**architecture.fixed_values(values), **values}
        return parse(self.config, nested(values), "config.json")

    def differences(self, architecture: Architecture, wanted: Any, found: Any) -> dict[str, tuple]:
        """Fields by which two configs compute different things, with both values."""
        mine, theirs = flat(wanted), flat(found)
        names = (architecture.told | architecture.fixed.keys()) - self.free
        return {
            name: (mine.get(name), theirs.get(name))
            for name in mine | theirs
            if name in names and mine.get(name) != theirs.get(name)
        }


def flat(section: Any, prefix: str = "") -> dict[str, Any]:
    """Every field of a config by its dotted path; a section also stands there as a whole."""
    found = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        found[prefix + field.name] = value
        if dataclasses.is_dataclass(value):
            found |= flat(value, f"{prefix}{field.name}.")
    return found


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for path, value in values.items():
        *sections, name = path.split(".")
        node = out
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return out


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of Hugging Face: a row of the table at one layer, or one expert of a layer.

    index: where it lies in our parameters: (), (layer,) or (layer, expert).
    """

    row: Row
    index: tuple[int, ...]
    name: str
    shape: tuple[int, ...]

    @property
    def paths(self) -> list[str]:
        return self.row.paths.split()


@dataclasses.dataclass(frozen=True)
class Plan:
    """What goes where. shapes: of our parameters, by dotted path."""

    architecture: Architecture
    sizes: Sizes
    shapes: Mapping[str, tuple[int, ...]]
    entries: tuple[Entry, ...]

    @classmethod
    def of(
        cls, architecture: Architecture, sizes: Sizes, shapes: Mapping[str, tuple[int, ...]]
    ) -> "Plan":
        """Raises ValueError where a parameter has no row in the architecture's table."""
        rows = [r for r in architecture.tensors if shapes.keys() >= set(r.paths.split())]
        left = shapes.keys() - {path for row in rows for path in row.paths.split()}
        if left:
            raise ValueError(f"no {architecture.class_name} name for {', '.join(sorted(left))}")
        return cls(architecture, sizes, shapes, tuple(_entries(rows, sizes, shapes)))

    def to_hf(self, entry: Entry, params: Mapping[str, np.ndarray]) -> np.ndarray:
        return entry.row.to_hf([params[path][entry.index] for path in entry.paths], self.sizes)

    def from_hf(self, entry: Entry, tensor: np.ndarray) -> dict[str, np.ndarray]:
        parts = entry.row.from_hf(tensor, self.sizes)
        return dict(zip(entry.paths, parts, strict=True))


def _entries(
    rows: Sequence[Row], sizes: Sizes, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[Entry]:
    block = lambda row: row.depth and row.name.partition("{}")[0]  # noqa: E731
    for _, group in itertools.groupby(rows, key=block):
        entries = [
            Entry(row, index, row.name.format(*index), row.shape(sizes))
            for row in group
            for index in np.ndindex(*shapes[row.paths.split()[0]][: row.depth])
        ]
        yield from sorted(entries, key=lambda entry: entry.index[:1])  # layer by layer
