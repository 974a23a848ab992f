"""What objectives over records share: reading a record's fields, and errors that name the record.

Such an objective has `examples = True` and gets {"examples": list of records, "row_ids": [N] int64} from
the loader, and perhaps "names" of the records; it returns a whole batch. {} is padding at the end of a
held-out split: it gives a row, or a part of one, of weight 0.
"""

import dataclasses
import functools
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from llm_jax.core.config import ConfigError, nearest
from llm_jax.core.packing import RowLayout, overfull

_SHOWN = 60  # characters of a record in a message


@dataclasses.dataclass(frozen=True)
class Records:
    """examples: N records; names: of each, or () where the source has none; row_ids: [N] int64."""

    examples: Sequence[Mapping[str, Any]]
    row_ids: np.ndarray
    names: Sequence[str] = ()

    @classmethod
    def of(cls, element: Mapping[str, Any]) -> "Records":
        return cls(element["examples"], element["row_ids"], element.get("names", ()))

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def real(self) -> list[bool]:
        """False for padding."""
        return [bool(example) for example in self.examples]

    def error(self, number: int, problem: str) -> ConfigError:
        """One line that names record `number` and says what is wrong with it."""
        name = self.names[number] if self.names else ""
        if not name:
            shown = repr(dict(self.examples[number]))
            name = "record " + (shown if len(shown) <= _SHOWN else shown[: _SHOWN - 3] + "...")
        return ConfigError(f"{name}: {problem}")

    def value(self, number: int, field: str) -> Any:
        """Raises ConfigError where the record has no such field, or nothing in it."""
        example = self.examples[number]
        if field not in example:
            raise self.error(
                number,
                f"no field {field!r}{nearest(field, example)}; its fields: {', '.join(example)}",
            )
        if example[field] is None:
            raise self.error(number, f"field {field!r} is empty")
        return example[field]

    def text(self, number: int, field: str) -> str:
        """A field that is text, or a number written as one."""
        value = self.value(number, field)
        if not isinstance(value, str | int | float):
            raise self.error(
                number, f"field {field!r} is a {type(value).__name__}: expected a text"
            )
        return str(value)

    def texts(self, field: str) -> list[str]:
        """Of all records, "" for padding."""
        return [self.text(i, field) if real else "" for i, real in enumerate(self.real)]

    def items(self, number: int, field: str) -> list:
        value = self.value(number, field)
        if not isinstance(value, list | tuple):
            raise self.error(
                number, f"field {field!r} is a {type(value).__name__}: expected a list"
            )
        return list(value)

    def label(self, number: int, value: Any, labels: Sequence[str]) -> int:
        """The number of a label among the choices.

        An integer is that number already, as in many public sets, unless the labels are numbers themselves.
        """
        text = str(value)
        if text in labels:
            return labels.index(text)
        is_number = isinstance(value, int) and not isinstance(value, bool)
        if is_number and 0 <= value < len(labels) and not any(map(str.isdigit, labels)):
            return value
        raise self.error(
            number,
            f"label {text!r} is outside the set{nearest(text, labels)}; choices: {', '.join(labels)}",
        )

    def layout(self, sizes: Sequence[int], limit: "Limit", per_row: int = 1) -> RowLayout:
        """Raises ConfigError where an example, or the examples of a row, do not fit."""
        for number in np.flatnonzero(np.asarray(sizes) > limit.tokens)[:1]:
            raise self.error(
                number, f"{limit.what} has {sizes[number]} tokens, {limit.text}{limit.advice}"
            )
        for row in overfull(sizes, per_row, limit.tokens)[:1]:
            first = int(row) * per_row
            raise self.error(
                first,
                f"{limit.what}, with those of {per_row - 1} more in its row, has "
                f"{sum(sizes[first : first + per_row])} tokens, {limit.text}; lower "
                f"objective.examples_per_row = {per_row}",
            )
        return RowLayout.of(sizes, per_row, limit.tokens)


@dataclasses.dataclass(frozen=True)
class Limit:
    """The most tokens that there is room for.

    what: of which text. setting: where the number is set. advice: what else can be done.
    """

    what: str
    tokens: int
    setting: str = "data.sequence_length"
    advice: str = "; raise it, or set objective.truncate = True"

    @property
    def text(self) -> str:
        return f"more than {self.setting} = {self.tokens}"


@dataclasses.dataclass(frozen=True)
class FieldTemplate:
    """Text with fields of a record in braces, such as "translate to {language}: "."""

    text: str
    where: str

    def __post_init__(self):
        _ = self.parts

    @functools.cached_property
    def parts(self) -> tuple[tuple[str, str | None], ...]:
        """(literal, field after it or None), ...

        Raises:
          ConfigError: braces that do not match, or hold anything but a field's name.
        """
        try:
            parts = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise ConfigError(f"{self.where} {self.text!r}: {error}") from None
        for _, field, layout, conversion in parts:
            if field is not None and (not field or layout or conversion):
                raise ConfigError(
                    f"{self.where} {self.text!r}: expected names of fields in braces; {{{{ is a brace"
                )
        return tuple((literal, field) for literal, field, _, _ in parts)

    def __call__(self, records: Records, number: int) -> str:
        return "".join(
            literal + (records.text(number, field) if field else "")
            for literal, field in self.parts
        )


def batch_transform(make: Callable[[Records], dict[str, np.ndarray]]):
    """The Grain transformation of {"examples", "row_ids"} to the batch that `make` returns."""
    import grain  # not at the top: a training step needs no loader, and runs where Grain is not

    class MakeBatch(grain.transforms.Map):
        def map(self, element: dict[str, Any]) -> dict[str, np.ndarray]:
            return make(Records.of(element))

    return MakeBatch()


def check_labels(labels: Sequence[str]) -> None:
    """Raises ValueError for a set of fewer than two, or with one twice."""
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise ValueError(
            f"objective.labels {tuple(labels)!r}: expected two or more different names"
        )


def check_rates(config: Any) -> None:
    """Raises ValueError for a z_loss or label_smoothing out of range."""
    rates = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    if rates.get("z_loss", 0.0) < 0:
        raise ValueError(f"objective.z_loss {rates['z_loss']} must not be negative")
    if not 0 <= rates.get("label_smoothing", 0.0) < 1:
        raise ValueError(f"objective.label_smoothing {rates['label_smoothing']} must be in [0, 1)")
    if rates.get("examples_per_row", 1) < 1:
        raise ValueError(
            f"objective.examples_per_row {rates['examples_per_row']} must be at least 1"
        )
