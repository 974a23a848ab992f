"""Reads the few fields of a SentencePiece `.model` that its Python API does not show.

The wire format is read by hand: the generated `sentencepiece_model_pb2` refuses every protobuf
runtime older than its compiler, which others (TensorFlow) pin. Field numbers: sentencepiece_model.proto.
"""

import dataclasses
import enum
import struct
from collections.abc import Iterator, Sequence

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_SCORE = 2  # in a piece
# A message that comes twice is merged and the last scalar wins, so an override is a suffix:
# normalizer_spec { add_dummy_prefix: false }.
NO_DUMMY_PREFIX = bytes([_NORMALIZER << 3 | 2, 2, 3 << 3, 0])
_TEXT, _TYPE = 1, 3  # in a piece, as is _SCORE


class PieceType(enum.IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclasses.dataclass(frozen=True)
class Piece:
    text: str
    score: float
    type: PieceType


@dataclasses.dataclass(frozen=True)
class Model:
    """model_type: 1 unigram, 2 bpe, 3 word, 4 char."""

    pieces: list[Piece]
    model_type: int
    byte_fallback: bool
    whitespace_as_suffix: bool
    has_charsmap: bool
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool

    @property
    def loss(self) -> str | None:
        """Why some text does not come back from this model, or None."""
        reasons = {
            "it normalises characters": self.has_charsmap,
            "it removes repeated spaces": self.remove_extra_whitespaces,
            "it has no byte fallback": not self.byte_fallback,
            "it does not mark spaces": not self.escape_whitespaces,
            "it adds a space at the end": self.whitespace_as_suffix and self.add_dummy_prefix,
        }
        return next((reason for reason, holds in reasons.items() if holds), None)


def read_model(data: bytes) -> Model:
    """Parses a serialized ModelProto.

    Raises:
      ValueError: not a SentencePiece model.
    """
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    try:
        for number, value, _ in _fields(data):
            if number == _PIECES:
                pieces.append(_piece(_message(value)))
            elif number == _TRAINER:
                trainer.update(_message(value))
            elif number == _NORMALIZER:
                normalizer.update(_message(value))
    except (IndexError, TypeError, ValueError, KeyError, struct.error):
        pieces = []
    if not pieces:
        raise ValueError("not a SentencePiece model")
    return Model(
        pieces=pieces,
        model_type=trainer.get(3, 1),
        byte_fallback=bool(trainer.get(35, 0)),
        whitespace_as_suffix=bool(trainer.get(24, 0)),
        has_charsmap=bool(normalizer.get(2, b"")),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        escape_whitespaces=bool(normalizer.get(5, 1)),
    )


def with_control_pieces(data: bytes, texts: Sequence[str]) -> bytes:
    """The same model with more pieces, after its own ones, that no text is encoded as."""
    pieces = b""
    for text in texts:
        raw = text.encode("utf-8")
        piece = bytes([_TEXT << 3 | 2, *_as_varint(len(raw)), *raw, _TYPE << 3, PieceType.CONTROL])
        pieces += bytes([_PIECES << 3 | 2, *_as_varint(len(piece)), *piece])
    return data + pieces  # a repeated field goes on wherever it comes again


def round_scores(data: bytes, steps: int) -> bytes:
    """The same model with every score a multiple of 1 / steps.

    SentencePiece adds unigram scores in float32, others in float64: unrounded, the sums of two equally
    good segmentations differ in the last bit, and each library picks another one. Multiples of a
    negative power of two add up exactly in both, up to a sum of 2**24 / steps.
    """
    rounded = bytearray(data)
    for number, piece, piece_end in _fields(data):
        if number != _PIECES:
            continue
        for inner, score, end in _fields(piece):
            if inner == _SCORE:
                at = piece_end - len(piece) + end - 4
                value = round(struct.unpack("<f", score)[0] * steps) / steps
                rounded[at : at + 4] = struct.pack("<f", value)
    return bytes(rounded)


def _piece(fields: dict[int, int | bytes]) -> Piece:
    score = struct.unpack("<f", fields[_SCORE])[0] if _SCORE in fields else 0.0
    return Piece(fields[_TEXT].decode("utf-8"), score, PieceType(fields.get(_TYPE, 1)))


def _message(data: bytes) -> dict[int, int | bytes]:
    return {number: value for number, value, _ in _fields(data)}


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes, int]]:
    """(field number, varint or raw bytes, where it ends) of each field of a message."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            value, at = _varint(data, at)
            yield number, value, at
            continue
        if wire_type == 2:
            size, at = _varint(data, at)
        else:
            size = {1: 8, 5: 4}[wire_type]
        if at + size > len(data):
            raise ValueError("truncated")
        yield number, data[at : at + size], at + size
        at += size


def _as_varint(value: int) -> bytes:
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
