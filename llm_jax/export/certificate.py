"""The certificate of an export: it computes what the trained model does, within tolerances that it names.

Every format has the same. What lies in the folder is loaded back by the format's own means and asked the same
probes as the trained model (export/probes.py): largest difference of logits, KL divergence, next tokens,
perplexity (export/outputs.py), beside the SHA-256 of every file but the card. `certificate.json` is written where all of
it holds, and only there. It also keeps a digest of both models' answers, by which `verify` checks a folder
years later, without the run.
"""

import base64
import binascii
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llm_jax.core.config import component, parse, to_dict
from llm_jax.core.flags import RunError
from llm_jax.core.types import Model, Tokenizer
from llm_jax.export.card import NAME as CARD
from llm_jax.export.outputs import Digest, Figures, compared
from llm_jax.export.probes import NOTHING, TEXT_ROWS, Forward, Outputs, Probes, forward_of
from llm_jax.training.config import RunConfig

NAME = "certificate.json"
_VERSION = 1
_PACKAGES = ("llm_jax", "jax", "jaxlib", "flax", "numpy", "safetensors", "gguf")
# At which share of positions another machine may be farther from the recorded answers than `elsewhere`
# allows, since a router may choose another expert there.
_OFF = 0.005
_ENOUGH = 100  # positions: a share of fewer says little, such as of the classes of six rows


@dataclasses.dataclass(frozen=True)
class Tolerances:
    """What an export may differ by. None: by anything.

    difference: of an output, as a share of its largest value; kl_divergence: nats, the mean over positions;
    equal_tokens: the least share of positions with the same most probable token; nats: of the mean loss
    on texts, so the perplexity may change by a factor of exp of it.
    elsewhere: how far the same files may be from the recorded answers on another machine, which adds in
    another order; as a share of the largest.
    """

    difference: float | None
    kl_divergence: float
    equal_tokens: float
    nats: float
    elsewhere: float = 1e-3


# The same numbers, added in another order at most.
EXACT = Tolerances(difference=1e-4, kl_divergence=1e-6, equal_tokens=0.99, nats=1e-4)


class Exporter(Protocol):
    """A format: `make(config)` of its module.

    config: its Config, a frozen dataclass with a `name` and the format's options.
    tolerances: what its certificate holds it to.
    claims: what else `export` has made sure of before it returns, a sentence each.
    library: what loads it, as the Hugging Face hub calls it ("transformers"), or None; for the model card.
    """

    config: Any
    tolerances: Tolerances
    claims: Sequence[str]
    library: str | None

    def export(
        self, model: Model, tokenizer: Tokenizer, config: RunConfig, directory: Path
    ) -> Path:
        """Writes a folder, which is absent or empty, whole or not at all."""

    def load_back(self, directory: Path) -> Forward:
        """What lies in a folder that `export` wrote, computing.

        Raises:
          ConfigError: it cannot be loaded.
        """

    def usage(self, directory: Path, name: str) -> str:
        """How to load what `export` wrote to `directory`, under its last name: Markdown, for the card."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """The trained model's answers, which outlive it: loading back needs its memory."""

    probes: Probes
    outputs: list[Outputs]

    @classmethod
    def of(cls, model: Model, probes: Probes) -> "Reference":
        """Raises RunError where the model's answers to texts are no numbers; random ids may have none."""
        forward = forward_of(model)
        outputs = [forward(batch) for batch in probes.batches()]
        for name in outputs[0]:
            if not all(np.isfinite(row[name]).all() for row in outputs[:TEXT_ROWS]):
                raise _nothing_to_compare(name, "on every text")
        # Of a head over few classes the targets, which are tokens, are none.
        if outputs[0].get("logits", np.zeros(0)).shape[-1] != model.config.vocab_size:
            nothing = np.full_like(probes.targets, NOTHING)
            probes = dataclasses.replace(probes, targets=nothing)
        return cls(probes, outputs)


def certify(
    exporter: Exporter, directory: Path, reference: Reference, about: Mapping[str, Any]
) -> dict[str, Any]:
    """Loads a folder back, compares it with the trained model and writes its certificate.

    Args:
      about: of the model and its run, such as its step; JSON.

    Returns:
      The content of certificate.json.

    Raises:
      RunError: the export does not compute what the model does; says which figure is how far off.
    """
    forward = exporter.load_back(directory)
    answers = [forward(batch) for batch in reference.probes.batches()]
    names = list(reference.outputs[0])
    pairs = list(zip(reference.outputs, answers, strict=True))
    for name in names:
        shapes = {(a[name].shape, np.shape(b.get(name))) for a, b in pairs}
        if any(wanted != found for wanted, found in shapes):
            raise RunError(f"the export does not compute {name}, or of another shape: {shapes}")
    found = {name: compared(name, pairs, reference.probes.targets) for name in names}
    for name, (figures, _) in found.items():
        _check(name, figures, exporter.tolerances)
    files = _files(directory)
    content = {
        "certificate": _VERSION,
        "format": to_dict(exporter.config),
        **about,
        "held": list(exporter.claims),
        "tolerances": to_dict(exporter.tolerances),
        "figures": {name: _told(figures) for name, (figures, _) in found.items()},
        "texts": reference.probes.source,
        "length": reference.probes.targets.shape[1],
        "versions": _versions(),
        "bytes": sum(file["bytes"] for file in files.values()),
        "files": files,
        "probes": _packed_all(reference.probes.inputs),
        "digests": {name: _packed_all(vars(digest)) for name, (_, digest) in found.items()},
    }
    content["sha256"] = _sha256_of(content)
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    (directory / NAME).write_text(text, encoding="utf-8")
    return content


def verify(directory: Path) -> dict[str, Any]:
    """Checks a folder against the certificate in it, without the run.

    Returns:
      The content of certificate.json.

    Raises:
      RunError: there is no certificate, or what differs from it.
    """
    path = Path(directory) / NAME
    content = _read(path)
    try:
        files, tolerances = dict(content["files"]), content["tolerances"]
        module = component("export", content["format"]["name"])
        exporter = module.make(parse(module.Config, content["format"], f"{NAME}: format"))
        inputs = _unpacked_all(content["probes"])
        rows = len(next(iter(inputs.values())))
        digests = {name: Digest(**_unpacked_all(x)) for name, x in content["digests"].items()}
        recorded = {name: Figures(**content["figures"][name]) for name in digests}
    except (KeyError, TypeError, AttributeError, StopIteration, binascii.Error):
        raise RunError(f"{path} cannot be read as a certificate") from None
    _check_files(directory, files)
    if tolerances != to_dict(exporter.tolerances):
        raise RunError(f"{directory}: its certificate has other tolerances than the format")
    forward = exporter.load_back(directory)
    answers = [forward({k: x[i : i + 1] for k, x in inputs.items()}) for i in range(rows)]
    for name, digest in digests.items():
        _check_answers(directory, name, digest, answers, exporter.tolerances.elsewhere)
        _check_figures(directory, name, recorded[name], digest.figures())
        _check(name, recorded[name], exporter.tolerances)
    return content


def summary(content: Mapping[str, Any]) -> str:
    """What a certificate says, in a line."""
    found = content["figures"]
    name = "logits" if "logits" in found else next(iter(found))
    figures = found[name]
    parts = [f"{content['bytes']:,} bytes", f"{name} within {figures['largest_difference']:.2g}"]
    if "kl_divergence" in figures:
        parts.append(f"KL divergence {figures['kl_divergence']:.2g} nats")
        parts.append(f"{figures['equal_tokens']:.1%} equal tokens")
    if "trained_perplexity" in figures:
        a, b = figures["trained_perplexity"], figures["exported_perplexity"]
        parts.append(f"perplexity {b:.4g} (trained {a:.4g})")
    return ", ".join(parts)


def _check(name: str, figures: Figures, tolerances: Tolerances) -> None:
    """Raises RunError where a figure is outside; NaN is."""
    if not figures.positions:
        raise _nothing_to_compare(name, "anywhere")
    limits = []
    if tolerances.difference is not None:
        limit = tolerances.difference * max(figures.largest_value, 1.0)
        limits.append(("largest difference", figures.largest_difference, limit))
    if figures.kl_divergence is not None:
        limits.append(("KL divergence", figures.kl_divergence, tolerances.kl_divergence))
    if figures.equal_tokens is not None and figures.positions >= _ENOUGH:
        unequal = 1 - figures.equal_tokens
        limits.append(("share of unequal tokens", unequal, 1 - tolerances.equal_tokens))
    if figures.trained_nats is not None:
        change = abs(figures.exported_nats - figures.trained_nats)
        limits.append(("change of the loss in nats", change, tolerances.nats))
    for figure, value, limit in limits:
        if not value <= limit + 1e-12:
            raise RunError(
                f"the export does not compute what the model does: {name}: {figure} {value:.4g} "
                f"exceeds {limit:.4g}"
            )


def _nothing_to_compare(name: str, where: str) -> RunError:
    return RunError(
        f"the trained model's {name} are not finite {where}: there is nothing to compare"
    )


def _told(figures: Figures) -> dict[str, Any]:
    return {name: value for name, value in vars(figures).items() if value is not None}


def _files(directory: Path) -> dict[str, dict[str, Any]]:
    """Bytes and SHA-256 of every file but the certificate and the card, by its path inside."""
    return {name: _file(directory / name) for name in _names(directory)}


def _names(directory: Path) -> list[str]:
    """What is hidden, such as .git, is not of the export; the card is, but others add to it."""
    paths = (p.relative_to(directory) for p in Path(directory).rglob("*") if p.is_file())
    visible = (p for p in paths if not any(part.startswith(".") for part in p.parts))
    return sorted(p.as_posix() for p in visible if p.as_posix() not in (NAME, CARD))


def _file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _check_files(directory: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    there = _names(directory)
    for kind, names in (
        ("lacks", [name for name in files if name not in there]),
        ("has beside what was certified", [name for name in there if name not in files]),
    ):
        if names:
            raise RunError(f"{directory} {kind} {', '.join(names)}")
    for name, wanted in files.items():
        size = (Path(directory) / name).stat().st_size
        if size != wanted["bytes"]:
            raise RunError(
                f"{directory}: {name} has {size:,} bytes, and what was certified {wanted['bytes']:,}"
            )
        if _file(Path(directory) / name) != wanted:
            raise RunError(f"{directory}: {name} is not what was certified: another SHA-256")


def _check_answers(
    directory: Path, name: str, digest: Digest, answers: Sequence[Outputs], elsewhere: float
) -> None:
    """Raises RunError unless the model gives the recorded answers, up to another machine's rounding."""
    found = np.concatenate([x[name].reshape(-1, x[name].shape[-1]) for x in answers])
    if len(found) != len(digest.ids) or found.shape[1] <= digest.ids.max(initial=0):
        raise RunError(f"{directory}: {name} is {found.shape}, not what was certified")
    values = np.take_along_axis(found, digest.ids, axis=1).astype(np.float64)[digest.finite]
    wanted = digest.exported_values[digest.finite]
    differences = np.max(np.abs(values - wanted), axis=1)
    near = differences <= elsewhere * np.max(np.abs(wanted), initial=1.0)
    if np.count_nonzero(~near) > _OFF * len(near):
        raise RunError(
            f"{directory}: its {name} are not those that were certified: they differ by up to "
            f"{np.max(differences):.4g} at {np.count_nonzero(~near)} of {len(near)} positions"
        )


def _check_figures(directory: Path, name: str, recorded: Figures, found: Figures) -> None:
    """Raises RunError where the recorded figures are not those of the recorded answers."""
    near = lambda a, b: math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-6)  # noqa: E731
    # The digest sees a part of the logits, whose differences and divergence are no larger.
    at_most = ("largest_value", "largest_difference", "kl_divergence", "largest_kl_divergence")
    for field in dataclasses.fields(Figures):
        told, seen = getattr(recorded, field.name), getattr(found, field.name)
        if (told is None) != (seen is None):
            raise RunError(f"{directory}: its certificate was changed: {name}: {field.name}")
        if told is None or near(told, seen) or (field.name in at_most and seen <= told):
            continue
        raise RunError(
            f"{directory}: its certificate was changed: {name}: {field.name} = {told:.6g}, and the "
            f"recorded answers give {seen:.6g}"
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        recorded = content.pop("sha256")
    except FileNotFoundError:
        raise RunError(f"{path.parent} has no {NAME}: it is no export, or an old one") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RunError(f"{path} cannot be read as a certificate") from None
    if recorded != _sha256_of(content):
        raise RunError(f"{path} was changed: it is not what its own SHA-256 says")
    if content["certificate"] != _VERSION:
        raise RunError(
            f"{path} is of version {content['certificate']}, and this program reads {_VERSION}"
        )
    return content


def _sha256_of(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _packed_all(values: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays as base64 of their little-endian bytes; what is no array as it is."""
    return {
        name: _packed(value) if isinstance(value, np.ndarray) else value
        for name, value in values.items()
    }


def _packed(array: np.ndarray) -> dict[str, Any]:
    array = np.ascontiguousarray(array)
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    data = base64.b64encode(array.tobytes()).decode("ascii")
    return {"dtype": array.dtype.name, "shape": list(array.shape), "base64": data}


def _unpacked_all(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _unpacked(value) if isinstance(value, Mapping) else value
        for name, value in values.items()
    }


def _unpacked(packed: Mapping[str, Any]) -> np.ndarray:
    dtype = np.dtype(packed["dtype"]).newbyteorder("<")
    return np.frombuffer(base64.b64decode(packed["base64"]), dtype).reshape(packed["shape"])


def _versions() -> dict[str, str]:
    """Of what took part in the export."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        if name in sys.modules:
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:  # run from its sources
                continue
    return found
