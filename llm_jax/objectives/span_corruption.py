"""Spans of text replaced by sentinels, to be written out by a decoder: T5, and the mixture of UL2.

Raffel et al. 2019, section 3.1.4, and `random_spans_noise_mask` of the T5 code: the numbers of noise
tokens and of spans follow from the length; their lengths are a random composition. Rows are as long as
makes the encoder's input full. The encoder reads `text <extra_id_0> text <extra_id_1> [eos]`, the
decoder writes `<extra_id_0> span <extra_id_1> span [eos]` and starts from pad. Documents in a row are
one text, as in T5.

UL2 (Tay et al. 2022, section 3.1 and table 1) draws one of several denoisers for each row and names it
by a token in front: `UL2` is that mixture. Its S denoiser, a prefix to be continued, is one span.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.config import ConfigError
from llm_jax.core.randomness import RowRandom
from llm_jax.core.types import Tokenizer
from llm_jax.objectives.causal_lm import CausalLm


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """noise_density: share of tokens in spans.

    mean_span_length: tokens; None is a single span, which then is the end of the row.
    weight: how often it is drawn, against the others.
    prefix: a special token that stands before the encoder's input, or None.
    """

    noise_density: float = 0.15
    mean_span_length: float | None = 3.0
    weight: float = 1.0
    prefix: str | None = None

    def __post_init__(self):
        if not 0 < self.noise_density < 1:
            raise ValueError(f"noise_density {self.noise_density} must be in 0..1")
        if self.mean_span_length is not None and not self.mean_span_length >= 1:
            raise ValueError(
                f"mean_span_length {self.mean_span_length} must be at least 1, or None"
            )
        if not 0 < self.weight < math.inf:
            raise ValueError(f"a denoiser's weight {self.weight} must be above 0")


# R, S and X denoisers; the prefixes are those of the released model.
UL2 = (
    Denoiser(0.15, 3.0, prefix="[NLU]"),
    Denoiser(0.15, 8.0, prefix="[NLU]"),
    Denoiser(0.25, None, prefix="[S2S]"),
    Denoiser(0.5, 3.0, prefix="[NLG]"),
    Denoiser(0.5, 8.0, prefix="[NLG]"),
    Denoiser(0.15, 64.0, prefix="[NLG]"),
    Denoiser(0.5, 64.0, prefix="[NLG]"),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """noise_density, mean_span_length: of the one denoiser, where `denoisers` is empty.

    sentinel: how the tokenizer writes sentinel number {}.
    z_loss: weight of log(Z)^2, in training only; T5 1.1 has 1e-4.
    """

    name: str = "span_corruption"
    noise_density: float = 0.15
    mean_span_length: float = 3.0
    denoisers: tuple[Denoiser, ...] = ()
    sentinel: str = "<extra_id_{}>"
    z_loss: float = 0.0
    seed: int = 0

    def __post_init__(self):
        if self.z_loss < 0:
            raise ValueError(f"objective.z_loss {self.z_loss} must not be negative")
        if self.sentinel.count("{}") != 1:
            raise ValueError(f"objective.sentinel {self.sentinel!r} must have one {{}}")
        self.mixture()

    def mixture(self) -> tuple[Denoiser, ...]:
        return self.denoisers or (Denoiser(self.noise_density, self.mean_span_length),)


class SpanCorruption(CausalLm):
    """The loss is that of any decoder: cross entropy of `targets`."""

    config: Config
    evaluators = ("held_out",)

    def row_length(self, sequence_length: int) -> int:
        """As many tokens as fill an encoder of `sequence_length`, for the densest of the noises."""
        return Lengths.of(self.config.mixture(), sequence_length).row

    def transforms(self, tokenizer: Tokenizer) -> list:
        """Raises ConfigError where the tokenizer lacks sentinels or prefixes."""
        return [_transform(self.config, tokenizer)]

    def batch_spec(self, batch_size: int, sequence_length: int) -> dict[str, jax.ShapeDtypeStruct]:
        decoder = Lengths.of(self.config.mixture(), sequence_length).decoder
        spec = super().batch_spec(batch_size, decoder)
        encoder = jax.ShapeDtypeStruct((batch_size, sequence_length), jnp.int32)
        names = ("encoder_tokens", "encoder_segment_ids", "encoder_positions")
        return spec | dict.fromkeys(names, encoder)


@dataclasses.dataclass(frozen=True)
class Lengths:
    """What a mixture makes of an encoder length; maxima are over its denoisers.

    tokens: of text, for each denoiser. row: the most of these. decoder: the most targets, [eos]
    included. noise, clean, spans: the most of each.
    """

    encoder: int
    tokens: tuple[int, ...]
    decoder: int
    noise: int
    clean: int
    spans: int

    @property
    def row(self) -> int:
        return max(self.tokens)

    @staticmethod
    @functools.cache
    def of(mixture: tuple[Denoiser, ...], encoder: int) -> "Lengths":
        """Raises ConfigError for an encoder that is too short for two tokens."""
        tokens = tuple(_tokens_that_fill(encoder, denoiser) for denoiser in mixture)
        density, mean_span, _ = _columns(mixture)
        noise, spans = noise_counts(np.array(tokens), density, mean_span)
        return Lengths(
            encoder,
            tokens,
            decoder=int((noise + spans).max()) + 1,
            noise=int(noise.max()),
            clean=int((np.array(tokens) - noise).max()),
            spans=int(spans.max()),
        )

    @staticmethod
    @functools.cache
    def of_row(mixture: tuple[Denoiser, ...], row: int) -> "Lengths":
        """The inverse of `of(mixture, encoder).row`: a longer row fills a longer encoder."""
        encoder = min(_encoder_length(row, denoiser) for denoiser in mixture)
        return Lengths.of(mixture, encoder)


def noise_counts(
    lengths: np.ndarray, density: np.ndarray, mean_span: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(noise tokens, spans) of texts of `lengths` tokens, all [B]; 0 for a text of less than two."""
    noise = np.clip(np.rint(lengths * density), 1, np.maximum(lengths - 1, 1))
    spans = np.clip(np.rint(noise / mean_span), 1, np.minimum(noise, lengths - noise).clip(1))
    enough = lengths >= 2
    return (noise * enough).astype(np.int64), (spans * enough).astype(np.int64)


def _columns(mixture: tuple[Denoiser, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(noise density, mean span length, encoder tokens besides text) of each denoiser."""
    density = np.array([d.noise_density for d in mixture])
    mean_span = np.array([d.mean_span_length or math.inf for d in mixture])
    return density, mean_span, np.array([d.prefix is not None for d in mixture], np.int64)


def _encoder_length(tokens: int, denoiser: Denoiser) -> int:
    """Positions that so many tokens take, with sentinels, [eos] and the prefix."""
    density, mean_span, prefix = _columns((denoiser,))
    noise, spans = noise_counts(np.array([tokens]), density, mean_span)
    return int(tokens - noise[0] + spans[0] + 1 + prefix[0])


def _tokens_that_fill(encoder: int, denoiser: Denoiser) -> int:
    """The most tokens that fit an encoder: `compute_input_and_target_lengths` of the T5 code."""
    tokens = 2
    if _encoder_length(tokens, denoiser) > encoder:
        raise ConfigError(
            f"sequence_length {encoder} is too short for spans: expected at least "
            f"{_encoder_length(tokens, denoiser)}"
        )
    step = 1 << 30  # the length grows by 0 or 1 with each token: bisect
    while step:
        if _encoder_length(tokens + step, denoiser) <= encoder:
            tokens += step
        step >>= 1
    return tokens


def _transform(config: Config, tokenizer: Tokenizer):
    """The Grain transformation of {"rows", "row_ids"}."""
    import grain  # not at the top: a training step needs no loader, and runs where Grain is not

    class CorruptSpans(grain.transforms.Map):
        def __init__(self):
            self._corruption = Corruption.of(config, tokenizer)

        def map(self, element: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            random = RowRandom(config.seed, element["row_ids"])
            return self._corruption(element["rows"], random)

    return CorruptSpans()


@dataclasses.dataclass(frozen=True)
class Corruption:
    """sentinels: [<=V] int32, the ids of sentinel 0, 1, ...; prefixes: an id or None per denoiser."""

    mixture: tuple[Denoiser, ...]
    sentinels: np.ndarray
    sentinel: str
    prefixes: tuple[int | None, ...]
    eos_id: int
    pad_id: int

    @classmethod
    def of(cls, config: Config, tokenizer: Tokenizer) -> "Corruption":
        sentinels: list[int] = []
        while (found := tokenizer.token_id(config.sentinel.format(len(sentinels)))) is not None:
            sentinels.append(found)
        names = [d.prefix for d in config.mixture()]
        prefixes = [None if name is None else tokenizer.token_id(name) for name in names]
        for name, prefix in zip(names, prefixes, strict=True):
            if name is not None and prefix is None:
                raise ConfigError(
                    f"objective.denoisers: the prefix {name!r} is no special token of this tokenizer: "
                    "put it into data.tokenizer.extra_tokens"
                )
        ids = tokenizer.eos_id, tokenizer.pad_id
        made = cls(
            config.mixture(), np.array(sentinels, np.int32), config.sentinel, tuple(prefixes), *ids
        )
        made.check_sentinels(1)
        return made

    def check_sentinels(self, needed: int) -> None:
        if needed > len(self.sentinels):
            name = self.sentinel.replace("{}", "{i}")
            raise ConfigError(
                f"the objective needs {needed} sentinels {self.sentinel.format(0)}, ...; this tokenizer "
                f"has {len(self.sentinels)}: set data.tokenizer.extra_tokens = "
                f'tuple(f"{name}" for i in range({needed}))'
            )

    def __call__(self, rows: np.ndarray, random: RowRandom) -> dict[str, np.ndarray]:
        """The batch of rows [B, L] int32, -1 is padding; a row of less than two tokens is all padding.

        Raises:
          ConfigError: fewer sentinels than spans.
        """
        lengths = Lengths.of_row(self.mixture, rows.shape[1])
        self.check_sentinels(lengths.spans)
        which = self._drawn(random)
        valid = (rows >= 0).sum(axis=1)
        sizes = np.minimum(valid, np.array(lengths.tokens)[which])
        sizes[sizes < 2] = 0
        # A denoiser of little noise reads fewer tokens than a row has: any of them, not the first.
        starts = random.below("window", valid - sizes + 1)
        density, mean_span, _ = _columns(self.mixture)
        noise, spans = noise_counts(sizes, density[which], mean_span[which])
        segments = [
            random_segments(random, "clean", sizes - noise, spans, (lengths.clean, lengths.spans)),
            random_segments(random, "noise", noise, spans, (lengths.noise, lengths.spans)),
        ]
        segments = np.stack(segments, axis=2)
        encoder, decoder = self._sides(_Ragged.cut(rows, starts, sizes), segments)
        prefixes = np.array([-1 if p is None else p for p in self.prefixes], np.int32)[which]
        prefixes[sizes == 0] = -1
        encoder_batch = self._padded(encoder, prefixes, lengths.encoder)
        batch = self._padded(decoder, np.full_like(prefixes, -1), lengths.decoder)
        targets, real = batch["tokens"], batch["segment_ids"]
        tokens = np.full_like(targets, self.pad_id)
        np.copyto(tokens[:, 1:], targets[:, :-1], where=real[:, 1:] > 0)
        return {
            **{f"encoder_{name}": array for name, array in encoder_batch.items()},
            **batch,
            "tokens": tokens,
            "targets": targets,
            "loss_weights": real.astype(np.float32),
        }

    def _drawn(self, random: RowRandom) -> np.ndarray:
        """[B] int64: the denoiser of each row."""
        weights = np.cumsum([d.weight for d in self.mixture])
        limits = np.rint(weights / weights[-1] * 2**32)
        return np.searchsorted(limits, random.bits("denoiser", 1)[:, 0], side="right")

    def _sides(self, text: "_Ragged", segments: np.ndarray) -> tuple["_Ragged", "_Ragged"]:
        """What the encoder reads and the decoder writes, without [eos].

        segments: [B, spans, 2] int64, the lengths of clean and noise spans in turn, 0 after the last.
        """
        sizes = segments.ravel()
        starts = np.cumsum(sizes) - sizes
        exists = np.flatnonzero(sizes[::2])  # a clean span and the noise after it
        sentinels = self.sentinels[exists % segments.shape[1]]
        is_noise = np.repeat(np.arange(len(sizes)) % 2 == 1, sizes)
        clean, noise = segments.sum(axis=1).T
        spans = (segments[..., 0] > 0).sum(axis=1)
        # In either text a sentinel takes the place of the first token of a span that is left out.
        encoder = _with_sentinels(text, ~is_noise, starts[1::2][exists], sentinels, clean + spans)
        decoder = _with_sentinels(text, is_noise, starts[::2][exists], sentinels, noise + spans)
        return encoder, decoder

    def _padded(self, text: "_Ragged", prefixes: np.ndarray, width: int) -> dict[str, np.ndarray]:
        """tokens, segment_ids, positions [B, width] int32 of texts with prefix (or -1) and [eos]."""
        columns = np.arange(width, dtype=np.int32)
        has_prefix = prefixes >= 0
        first = has_prefix.astype(np.int32)[:, None]
        end = first + text.counts[:, None].astype(np.int32)
        tokens = np.full((len(prefixes), width), self.pad_id, np.int32)
        tokens[(columns >= first) & (columns < end)] = text.values
        tokens[has_prefix, 0] = prefixes[has_prefix]
        filled = np.flatnonzero(text.counts)
        tokens[filled, end[filled, 0]] = self.eos_id
        segment_ids = ((columns <= end) & (text.counts > 0)[:, None]).astype(np.int32)
        return {
            "tokens": tokens,
            "segment_ids": segment_ids,
            "positions": columns * segment_ids,
        }


def random_segments(
    random: RowRandom, draw: str, items: np.ndarray, segments: np.ndarray, most: tuple[int, int]
) -> np.ndarray:
    """Cuts `items` [B] into `segments` [B] parts of at least one, each way as likely as any other.

    The T5 code shuffles which items are the first of a part; here that subset is drawn.

    Args:
      most: of items and of segments that any row can have, not only those of this batch.

    Returns:
      [B, most segments] int64 that sum to `items`, 0 after the last segment.
    """
    gaps = np.arange(most[0] - 1) < items[:, None] - 1
    cuts = random.subset(draw, gaps, np.maximum(segments - 1, 0), most[1] - 1) + 1
    ends = np.concatenate([np.minimum(cuts, items[:, None]), items[:, None]], axis=1)
    return np.diff(ends, axis=1, prepend=0)


@dataclasses.dataclass(frozen=True)
class _Ragged:
    """Texts of unequal length in one array. values: [sum of counts] int32; counts: [B] int64."""

    values: np.ndarray
    counts: np.ndarray

    @classmethod
    def cut(cls, rows: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> "_Ragged":
        """Columns start .. start + size - 1 of rows [B, L]."""
        columns = np.arange(rows.shape[1])
        inside = (columns >= starts[:, None]) & (columns < (starts + sizes)[:, None])
        return cls(rows[inside], sizes)


def _with_sentinels(
    text: _Ragged, keep: np.ndarray, places: np.ndarray, sentinels: np.ndarray, counts: np.ndarray
) -> _Ragged:
    """The kept tokens of a text, and the sentinels at their places."""
    values = text.values.copy()
    values[places] = sentinels
    keep[places] = True
    return _Ragged(values[keep], counts)


def make(config: Config) -> SpanCorruption:
    return SpanCorruption(config)
