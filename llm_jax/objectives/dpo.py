"""Direct preference optimization: of two answers, the chosen one becomes more likely than the rejected one.

Rafailov et al. 2023, equation 7: -log sigmoid(beta * (log-ratio of chosen - log-ratio of rejected)), where a
log-ratio is an answer's log probability under the model minus that under the model before training. The
latter is taken from the model itself: see core/reference.py. With label_smoothing it is the conservative DPO
of Mitchell 2023, for pairs of which that share is swapped.

Both answers go through a model in one call, rows interleaved, so that a device's pairs stay on it. Logits of
a whole batch never exist: the loss is linear in the answers' nats once its slopes are known, so the first pass
over the head gives the nats, the second their weighted sum, with the gradient.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.config import ConfigError
from llm_jax.core.reference import frozen_reference
from llm_jax.core.types import Batch, LossOutput, Model, ModelOutput, Tokenizer, Weighted
from llm_jax.nn.losses import output_loss, output_nats
from llm_jax.objectives.chat import (
    ASSISTANT,
    Part,
    Template,
    TemplateName,
    Tokens,
    chat_template,
    check_messages,
    tokens_of,
)
from llm_jax.objectives.records import Records, batch_transform, check_rates
from llm_jax.objectives.sft import next_token_rows

_KEYS = ("tokens", "targets", "loss_weights", "segment_ids", "positions")
_REJECTED = "rejected_"


@dataclasses.dataclass(frozen=True)
class Config:
    """prompt, messages, chosen, rejected: fields of a record.

    A record has a `prompt`, which the answers continue as plain text; or `messages`, a chat that they end. An
    answer is a text, or a list of messages that come after `messages`, if there are any.

    beta: how dearly the model pays for leaving the reference; small is cheap.
    label_smoothing: share of pairs that are taken to be swapped, in training only.
    chat_template: as in sft, for chats. truncate: cut what is too long at its end, instead of an error.
    """

    name: str = "dpo"
    prompt: str = "prompt"
    messages: str = "messages"
    chosen: str = "chosen"
    rejected: str = "rejected"
    beta: float = 0.1
    label_smoothing: float = 0.0
    chat_template: TemplateName = "built_in"
    truncate: bool = False

    def __post_init__(self):
        check_rates(self)
        if self.beta <= 0:
            raise ValueError(f"objective.beta {self.beta} must be positive")
        if self.label_smoothing >= 0.5:
            raise ValueError(f"objective.label_smoothing {self.label_smoothing} must be below 0.5")


class Dpo:
    """model_passes: of a step's work over a batch of one answer: two answers, each also by the reference,
    which only goes forward, a third of a pass.
    """

    examples = True
    examples_per_row = 1
    evaluators = ("held_out",)
    model_passes = 2 * (1 + 1 / 3)

    def __init__(self, config: Config):
        self.config = config

    def transforms(self, tokenizer: Tokenizer, sequence_length: int) -> list:
        return [batch_transform(_Maker(self.config, tokenizer, sequence_length))]

    def batch_spec(self, batch_size: int, sequence_length: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The keys of next-token prediction, of the chosen answers; and `rejected_...` of the others.

        label_weights: [B] float32.
        """
        shape = (batch_size, sequence_length)
        spec = {
            prefix + name: jax.ShapeDtypeStruct(
                shape, jnp.float32 if name == "loss_weights" else jnp.int32
            )
            for prefix in ("", _REJECTED)
            for name in _KEYS
        }
        return spec | {"label_weights": jax.ShapeDtypeStruct((batch_size,), jnp.float32)}

    def loss(self, model: Model, batch: Batch, *, key: jax.Array | None, train: bool) -> LossOutput:
        """The mean over pairs, in nats.

        reward_margin: beta times the difference of the two log-ratios; accuracy: how often it is positive;
        chosen_reward, rejected_reward: beta times a log-ratio.

        Raises:
          ValueError: the model does not know what it was before training.
        """
        config, weights = self.config, batch["label_weights"]
        smoothing = config.label_smoothing if train else 0.0
        pairs = interleaved(batch)
        reference = frozen_reference(model)(pairs)
        output = model(pairs, train=train, key=key)
        with jax.named_scope("loss"):
            log_ratios = answer_nats(reference, model, pairs) - answer_nats(output, model, pairs)
            rewards = config.beta * log_ratios.reshape(-1, 2)
            margin = rewards[:, 0] - rewards[:, 1]

            def total(margin: jax.Array) -> jax.Array:
                right, swapped = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
                return -jnp.sum(((1 - smoothing) * right + smoothing * swapped) * weights)

            loss, slopes = jax.value_and_grad(total)(margin)
            if train:
                # A chosen answer's nats lower the margin, a rejected one's raise it.
                by_nats = config.beta * jnp.stack([-slopes, slopes], axis=1).reshape(-1)
                loss = _with_gradient_of(loss, weighted_nats(output, model, pairs, by_nats))
        weight = jnp.sum(weights)
        metrics = {
            "reward_margin": Weighted(jnp.sum(margin * weights), weight),
            "accuracy": Weighted(jnp.sum((margin > 0) * weights), weight),
            "chosen_reward": Weighted(jnp.sum(rewards[:, 0] * weights), weight),
            "rejected_reward": Weighted(jnp.sum(rewards[:, 1] * weights), weight),
        }
        return LossOutput.of(output, loss, weight, metrics, train=train)


def interleaved(batch: Batch) -> dict[str, jax.Array]:
    """[2 B, T] of each key: the chosen and the rejected answer of each row in turn."""
    join = lambda a, b: jnp.stack([a, b], axis=1).reshape(-1, a.shape[1])  # noqa: E731
    return {name: join(batch[name], batch[_REJECTED + name]) for name in _KEYS}


def answer_nats(output: ModelOutput, model: Model, batch: Batch) -> jax.Array:
    """Minus the log probability of each row's answer: [2 B] float32, without a gradient."""
    targets, weights = batch["targets"], batch["loss_weights"]
    nats = output_nats(model, output, targets)
    return jax.lax.stop_gradient(jnp.sum(nats * weights, axis=1))


def weighted_nats(
    output: ModelOutput, model: Model, batch: Batch, row_weights: jax.Array
) -> jax.Array:
    """The sum of the answers' nats times [2 B] row weights, with a gradient by the model alone."""
    targets = batch["targets"]
    weights = batch["loss_weights"] * jax.lax.stop_gradient(row_weights)[:, None]
    return output_loss(model, output, targets, weights).loss_sum


def _with_gradient_of(value: jax.Array, source: jax.Array) -> jax.Array:
    return value + source - jax.lax.stop_gradient(source)


class _Maker:
    """The batch of B records.

    Raises:
      ConfigError: a missing field, a message of another form, or too long an answer; names the record.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, length: int):
        self._config, self._tokenizer, self._length = config, tokenizer, length

    @functools.cached_property
    def _template(self) -> Template:
        """Plain prompts need none."""
        return chat_template(self._config.chat_template, self._tokenizer)

    def __call__(self, records: Records) -> dict[str, np.ndarray]:
        config, length, real = self._config, self._length, records.real
        parts = [
            self._parts(records, i, field) if r else []
            for field in (config.chosen, config.rejected)
            for i, r in enumerate(real)
        ]
        both = tokens_of(parts, self._tokenizer)
        if config.truncate:
            both = [Tokens(x.ids[: length + 1], x.mask[: length + 1]) for x in both]
        sides = both[: len(real)], both[len(real) :]
        chosen, rejected = (
            next_token_rows(records, side, length, self._tokenizer.pad_id) for side in sides
        )
        rejected = {_REJECTED + name: array for name, array in rejected.items()}
        return chosen | rejected | {"label_weights": np.array(real, np.float32)}

    def _parts(self, records: Records, number: int, field: str) -> list[Part]:
        """Prompt and answer of one side of a pair."""
        config, example = self._config, records.examples[number]
        answer = records.value(number, field)
        if config.messages not in example and isinstance(answer, str):
            prompt = records.text(number, config.prompt)
            return [
                Part(self._tokenizer.bos_id, False),
                Part(prompt, False),
                Part(answer, True),
                Part(self._tokenizer.eos_id, True),
            ]
        answer = [{"role": ASSISTANT, "content": answer}] if isinstance(answer, str) else answer
        try:
            check_messages(answer)
            if answer[-1]["role"] != ASSISTANT:
                raise ValueError(f"{field!r} must end with a message of role 'assistant'")
            chat = [*(example.get(config.messages) or []), *answer]
            check_messages(chat)
            return self._template.parts(chat)
        except ConfigError:
            raise
        except ValueError as error:
            raise records.error(number, str(error)) from None


def make(config: Config) -> Dpo:
    return Dpo(config)
