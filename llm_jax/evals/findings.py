"""What an evaluator finds: figures, and what each item had a share in, so that two models can be compared."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Items:
    """A figure that is sum(sums) / sum(weights), item by item: a right answer of 1, bits of so many bytes.

    names: [N], the same for the same item whatever the model; sums, weights: [N].
    """

    names: tuple[str, ...]
    sums: tuple[float, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, records: Sequence[Any], values: Sequence[float]) -> "Items":
        """Of a mean over records."""
        return cls(names_of(records), tuple(map(float, values)), (1.0,) * len(values))

    @classmethod
    def loaded(cls, plain: Mapping[str, Any]) -> "Items":
        """From what dataclasses.asdict and JSON made of one."""
        return cls(**{field: tuple(values) for field, values in plain.items()})

    @property
    def mean(self) -> float:
        return float(np.sum(self.sums) / max(np.sum(self.weights), 1e-9))


@dataclasses.dataclass(frozen=True)
class Findings:
    """summary: figures by name. items: of those that come from items, by the same names."""

    summary: dict[str, float]
    items: dict[str, Items] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_items(cls, items: Mapping[str, Items], **others: float) -> "Findings":
        return cls({name: of.mean for name, of in items.items()} | others, dict(items))


def names_of(records: Sequence[Any]) -> tuple[str, ...]:
    """A digest of each record, a dataclass or a text; equal ones are numbered."""
    names, seen = [], {}
    for record in records:
        plain = record if isinstance(record, str) else dataclasses.asdict(record)
        text = json.dumps(plain, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        number = seen[name] = seen.get(name, 0) + 1
        names.append(name if number == 1 else f"{name}#{number}")
    return tuple(names)
