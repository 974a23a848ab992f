"""What an export and the trained model are asked, to see whether they compute the same.

A fixed set of rows: texts, and ids drawn at random, which reach pieces that no text has. Rows are whole, so
that every format can be asked, those too that know neither padding nor packing. A decoder sees the rows, an
encoder with some of their tokens masked, a decoder with an encoder sees the half of each and predicts the
other.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llm_jax.core.config import component
from llm_jax.core.types import Batch, Model, Tokenizer
from llm_jax.data.fields import texts_of
from llm_jax.data.held_out import held_out_documents, held_out_records
from llm_jax.training.config import RunConfig

# Of a row, without a row axis more: see `Probes.batches`. "logits" [B, T, V], "class_logits" [B, C], or
# "hidden" [B, T, D] of a model that has neither; all float32.
Outputs = Mapping[str, np.ndarray]
Forward = Callable[[Batch], Outputs]

NOTHING = -1  # in targets: nothing is predicted there

TEXT_ROWS, _RANDOM_ROWS = 4, 2
# Nothing is seen of a longer window, nor of positions behind: docs/export.md says so.
_LENGTH = 128
_HELD_OUT_BYTES = 16_384
_MASKED_EVERY = 7  # about the 15 % of BERT
_MASKS = ("[MASK]", "<mask>")
_BUILT_IN = (
    "The committee read the report twice, found nothing to add, and went home before the rain "
    "began; only the gardener stayed, counting tulips: 12, 13, 14.\n",
    "def largest(values):\n    best = None\n    for value in values:\n        if best is None or "
    "value > best:\n            best = value\n    return best  # None of nothing\n",
    "Der Fluß trat über die Ufer. Ночью выпал первый снег, и город затих. Η θάλασσα ήταν ήρεμη.\n",
    "天気がいいので散歩に行きました。今天的会议推迟到下午三点。 오늘은 날씨가 맑고 바람이 분다.\n",
    "كان البحر هادئا في الصباح. बच्चे बगीचे में खेल रहे हैं। ฝนตกตลอดทั้งคืน 🙂 π ≈ 3.14159\n",
    '{"name": "probe", "values": [1, 2.5, null], "path": "C:\\\\temp"}\t<b>x &lt; y</b>  \r\n',
)


@dataclasses.dataclass(frozen=True)
class Probes:
    """source: where the texts are from; inputs: the model's by their reserved keys, each [R, T] int32.

    targets: [R, T] int32, NOTHING where nothing is to be predicted, as in all rows of random ids.
    """

    source: str
    inputs: Mapping[str, np.ndarray]
    targets: np.ndarray

    def batches(self) -> Iterator[Batch]:
        """One row at a time, [1, T]: the logits of more would need more memory than a small model."""
        for row in range(len(self.targets)):
            yield {name: array[row : row + 1] for name, array in self.inputs.items()}


def probes_for(model: Model, run: RunConfig, tokenizer: Tokenizer, workdir: Path | None) -> Probes:
    """The same ones for the same run.

    Args:
      workdir: of the run, whose held-out documents are the texts; where there are none, and for None,
        the texts are those of this file.
    """
    texts = _held_out(run, workdir) if workdir is not None else []
    source, texts = ("held out", texts) if texts else ("built in", list(_BUILT_IN))
    length = min(_LENGTH, run.model.max_length)
    if hasattr(model, "encode"):
        return _of_encoder_decoder(source, run, tokenizer, texts, length)
    rows = _rows(texts, tokenizer, run.model.vocab_size, length)
    if hasattr(model, "init_cache"):
        targets = _shifted(rows, first=NOTHING)
        return Probes(source, {"tokens": rows}, _text_rows_only(targets))
    return _of_encoder(source, run, tokenizer, rows)


def _held_out(run: RunConfig, workdir: Path) -> list[str]:
    """The first held-out texts; none where nothing is held out or the sources are gone."""
    objective = component("objectives", run.objective.name).make(run.objective)
    try:
        if not objective.examples:
            found = held_out_documents(run.data, workdir, _HELD_OUT_BYTES)
            return [document.text for _, document in found if document.text]
        texts: list[str] = []
        for record in held_out_records(run.data, workdir):
            texts.append("\n".join(texts_of(record)))
            if sum(map(len, texts)) > _HELD_OUT_BYTES:
                break
        return texts
    except (ValueError, OSError):  # ConfigErrors, and what packages of sources raise offline
        return []


def _rows(texts: Sequence[str], tokenizer: Tokenizer, vocab_size: int, length: int) -> np.ndarray:
    """[R, length] int32: documents as training packs them, each row from another text on; random ids."""
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    documents = [[bos, *ids, eos] for ids in tokenizer.encode_batch(texts)]
    rows = np.zeros((TEXT_ROWS + _RANDOM_ROWS, length), np.int32)
    for row in range(TEXT_ROWS):
        ids: list[int] = []
        number = row * max(1, len(documents) // TEXT_ROWS)
        while len(ids) < length:
            ids += documents[number % len(documents)]
            number += 1
        rows[row] = ids[:length]
    random = np.random.default_rng(0)
    rows[TEXT_ROWS:] = random.integers(0, vocab_size, (_RANDOM_ROWS, length))
    return rows


def _shifted(rows: np.ndarray, first: int) -> np.ndarray:
    """What follows each token; nothing after the last."""
    return np.concatenate([rows[:, 1:], np.full((len(rows), 1), first, np.int32)], axis=1)


def _text_rows_only(targets: np.ndarray) -> np.ndarray:
    targets[TEXT_ROWS:] = NOTHING
    return targets


def _of_encoder_decoder(source, run, tokenizer, texts, length) -> Probes:
    rows = _rows(texts, tokenizer, run.model.vocab_size, 2 * length)
    targets = rows[:, length:].copy()
    start = np.full((len(rows), 1), tokenizer.pad_id, np.int32)  # as objectives/seq2seq.py has it
    inputs = {
        "tokens": np.concatenate([start, targets[:, :-1]], axis=1),
        "encoder_tokens": rows[:, :length],
    }
    return Probes(source, inputs, _text_rows_only(targets))


def _of_encoder(source, run, tokenizer, rows) -> Probes:
    mask_token = getattr(run.objective, "mask_token", None)
    names = (mask_token, *_MASKS) if mask_token else _MASKS
    found = (i for i in map(tokenizer.token_id, names) if i is not None)
    mask = next(found, tokenizer.pad_id)
    tokens, targets = rows.copy(), np.full_like(rows, NOTHING)
    targets[:, 3::_MASKED_EVERY] = rows[:, 3::_MASKED_EVERY]
    tokens[:, 3::_MASKED_EVERY] = mask
    return Probes(source, {"tokens": tokens}, _text_rows_only(targets))


def forward_of(model: Model) -> Forward:
    """What a model of ours computes, on its own devices."""
    graphdef, state = nnx.split(model)
    # Said alike, though it changes no place: a model and what is loaded back share one compilation.
    state = jax.tree.map(
        lambda x: jax.device_put(x, *x.devices()) if len(x.devices()) == 1 else x, state
    )
    return lambda batch: jax.device_get(_outputs(graphdef, state, dict(batch)))


@functools.partial(jax.jit, static_argnames="graphdef")
def _outputs(graphdef: nnx.GraphDef, state: nnx.State, batch: Batch) -> dict[str, jax.Array]:
    output = nnx.merge(graphdef, state)(batch)
    found = {"logits": output.logits, "class_logits": output.class_logits}
    found = {name: x for name, x in found.items() if x is not None} or {"hidden": output.hidden}
    return {name: x.astype(jnp.float32) for name, x in found.items()}


def host() -> jax.Device | None:
    """The host's memory, which holds models that one accelerator does not.

    None where JAX_PLATFORMS leaves the CPU out.
    """
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
