"""Two models' answers to the same probes, compared: all of them while both are there, and a digest for later.

The digest holds, for each position, the logits of the target and of the trained model's most probable tokens,
and the logarithm of the sum over all. From it perplexities and equal tokens come out as they were, and a
divergence that the whole one cannot be below (coarsening two distributions brings them nearer).
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from llm_jax.export.probes import NOTHING, Outputs

_KEPT = 8  # most probable tokens
_AT_ONCE = 16  # positions in float64


@dataclasses.dataclass(frozen=True)
class Figures:
    """How one output of an export differs from the trained model's, over all probes.

    positions: how many were compared, those where the trained model is not finite left out; largest_value:
    of the trained model, in magnitude. The rest is of distributions: mean and largest KL(trained ||
    exported), in nats; share of positions with the same most probable token; of texts the mean nats of a
    target, and exp of them, the perplexity. None where there is none.
    """

    positions: int
    largest_value: float
    largest_difference: float
    kl_divergence: float | None = None
    largest_kl_divergence: float | None = None
    equal_tokens: float | None = None
    predicted: int | None = None
    trained_nats: float | None = None
    exported_nats: float | None = None
    trained_perplexity: float | None = None
    exported_perplexity: float | None = None


@dataclasses.dataclass(frozen=True)
class Digest:
    """n positions of one output. ids: [n, K] int32, the target first (0 where there is none).

    targets: [n] int32; finite: [n] bool, of the trained model. For either model values [n, K] float32 at
    the ids, log_sum [n] float64 of exp of all, top [n] int32. Hidden states are no distributions: their ids
    are coordinates.
    """

    is_distribution: bool
    targets: np.ndarray
    finite: np.ndarray
    ids: np.ndarray
    trained_values: np.ndarray
    trained_log_sum: np.ndarray
    trained_top: np.ndarray
    exported_values: np.ndarray
    exported_log_sum: np.ndarray
    exported_top: np.ndarray

    def figures(self) -> Figures:
        """By what the digest knows: differences and divergences are at most those of all values."""
        there = self.finite
        a, b = (x[there].astype(np.float64) for x in (self.trained_values, self.exported_values))
        plain = Figures(len(a), _largest(a), _largest(a - b))
        if not self.is_distribution or not len(a):
            return plain
        log_p = a - self.trained_log_sum[there, None]
        log_q = b - self.exported_log_sum[there, None]
        told = self.targets[there] != NOTHING
        # Without the target, which may be among the most probable ones and would count twice.
        divergence = _coarse_divergence(log_p[:, 1:], log_q[:, 1:])
        return dataclasses.replace(
            plain,
            kl_divergence=float(np.mean(divergence)),
            largest_kl_divergence=float(np.max(divergence)),
            equal_tokens=float(np.mean(self.trained_top[there] == self.exported_top[there])),
            **(_of_texts(-log_p[told, 0], -log_q[told, 0]) if told.any() else {}),
        )


def compared(
    name: str, pairs: Sequence[tuple[Outputs, Outputs]], targets: np.ndarray
) -> tuple[Figures, Digest]:
    """One output of the trained and of the exported model, for each row of probes.

    Args:
      name: "logits", "class_logits" or "hidden".
      targets: [R, T] int32, of logits.
    """
    parts = []
    for row, (trained, exported) in enumerate(pairs):
        a, b = (x[name].reshape(-1, x[name].shape[-1]) for x in (trained, exported))
        told = targets[row] if name == "logits" else np.full(len(a), NOTHING, np.int32)
        for start in range(0, len(a), _AT_ONCE):
            chunk = slice(start, start + _AT_ONCE)
            parts.append(_Part.of(a[chunk], b[chunk], told[chunk], name != "hidden"))
    digest = _joined([part.digest for part in parts])
    figures = dataclasses.replace(
        digest.figures(),
        largest_value=_largest(np.array([part.largest_value for part in parts])),
        largest_difference=_largest(np.array([part.largest_difference for part in parts])),
    )
    if figures.kl_divergence is not None:
        divergence = np.concatenate([part.divergence for part in parts])
        figures = dataclasses.replace(
            figures,
            kl_divergence=float(np.mean(divergence)),
            largest_kl_divergence=float(np.max(divergence)),
        )
    return figures, digest


@dataclasses.dataclass(frozen=True)
class _Part:
    """Of a few positions; divergence: [n] nats, of those where the trained model is finite."""

    digest: Digest
    largest_value: float
    largest_difference: float
    divergence: np.ndarray

    @classmethod
    def of(
        cls, trained: np.ndarray, exported: np.ndarray, targets: np.ndarray, is_distribution: bool
    ) -> "_Part":
        """trained, exported: [n, V]; targets: [n]."""
        a, b = trained.astype(np.float64), exported.astype(np.float64)
        log_sums = [_log_sum(x) if is_distribution else np.zeros(len(x)) for x in (a, b)]
        kept = min(_KEPT, a.shape[1])
        if is_distribution:
            kept = _most_probable(a, kept)
        else:
            kept = np.tile(np.linspace(0, a.shape[1] - 1, kept).astype(int), (len(a), 1))
        ids = np.concatenate([np.maximum(targets, 0)[:, None], kept], axis=1).astype(np.int32)
        finite = np.isfinite(a).all(1)
        of_models = [
            part
            for x, log_sum in zip((trained, exported), log_sums, strict=True)
            for part in (
                np.take_along_axis(x, ids, axis=1),
                log_sum,
                np.argmax(x, axis=1).astype(np.int32),
            )
        ]
        digest = Digest(is_distribution, targets, finite, ids, *of_models)
        a, b = a[finite], b[finite]
        divergence = np.zeros(len(a))
        if is_distribution:
            log_p, log_q = (x - s[finite, None] for x, s in zip((a, b), log_sums, strict=True))
            divergence = np.sum(np.exp(log_p) * (log_p - log_q), axis=1)
        return cls(digest, _largest(a), _largest(a - b), divergence)


def _of_texts(trained_nats: np.ndarray, exported_nats: np.ndarray) -> dict[str, float]:
    a, b = float(np.mean(trained_nats)), float(np.mean(exported_nats))
    return {
        "predicted": len(trained_nats),
        "trained_nats": a,
        "exported_nats": b,
        "trained_perplexity": math.exp(min(a, 700.0)),
        "exported_perplexity": math.exp(min(b, 700.0)),
    }


def _largest(x: np.ndarray) -> float:
    """Magnitude; 0 of nothing."""
    return float(np.max(np.abs(x), initial=0.0))


def _most_probable(x: np.ndarray, count: int) -> np.ndarray:
    """[n, count] ids of the largest of [n, V], in their order; a NaN counts as smallest."""
    x = np.where(np.isnan(x), -np.inf, x)
    ids = np.sort(np.argpartition(-x, count - 1, axis=1)[:, :count], axis=1)
    order = np.argsort(-np.take_along_axis(x, ids, axis=1), axis=1, kind="stable")
    return np.take_along_axis(ids, order, axis=1)


def _log_sum(x: np.ndarray) -> np.ndarray:
    """[n] of [n, V]: logarithm of the sum of exp."""
    top = np.max(x, axis=1, keepdims=True)
    return top[:, 0] + np.log(np.sum(np.exp(x - top), axis=1))


def _coarse_divergence(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """[n] KL between the distributions over some tokens and all others as one; log_p, log_q: [n, K]."""
    p, q = np.exp(log_p), np.exp(log_q)
    rest_p, rest_q = (np.clip(1 - x.sum(1), 1e-12, 1.0) for x in (p, q))
    return np.sum(p * (log_p - log_q), axis=1) + rest_p * np.log(rest_p / rest_q)


def _joined(digests: Sequence[Digest]) -> Digest:
    arrays = {
        field.name: np.concatenate([getattr(digest, field.name) for digest in digests])
        for field in dataclasses.fields(Digest)
        if field.name != "is_distribution"
    }
    return Digest(digests[0].is_distribution, **arrays)
