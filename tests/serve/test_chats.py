"""Which layout a chat gets, and where an answer ends."""

import pytest
from servers import MARKS

from llm_jax.core.config import ConfigError
from llm_jax.data.tokenizers.raw_bytes import RawBytesTokenizer
from llm_jax.objectives import causal_lm, dpo, sft
from llm_jax.serve.chats import make_chats

MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
CHATTY, SIMPLE = RawBytesTokenizer(MARKS), RawBytesTokenizer()


@pytest.mark.parametrize("objective", [sft.Config(), dpo.Config()])
def test_a_model_trained_on_chats(objective):
    chats = make_chats("auto", CHATTY, objective)
    assert chats.prompt(MESSAGES) == [256, 259, ord("s"), 262, 260, ord("u"), 262, 261]
    assert chats.stop_tokens == {262, 257}
    assert chats.stops == ()


@pytest.mark.parametrize("objective", [None, causal_lm.Config()])
def test_a_model_that_never_saw_one(objective):
    assert make_chats("auto", CHATTY, objective) is None
    assert make_chats("auto", SIMPLE, dpo.Config()) is None  # pairs of plain texts
    assert make_chats("none", CHATTY, sft.Config()) is None


def test_the_tokenizers_own_template():
    class Tokenizer(RawBytesTokenizer):
        chat_template = (
            "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}"
        )

    chats = make_chats("auto", Tokenizer(MARKS), None)
    assert chats.prompt(MESSAGES) == [259, ord("s"), 262, 260, ord("u"), 262, 261]
    assert chats.stop_tokens == {262}
    Tokenizer.chat_template = "{{ raise_exception('only users') }}"
    with pytest.raises(ValueError, match="template"):
        make_chats("tokenizer", Tokenizer(MARKS), None)


def test_the_plain_layout():
    chats = make_chats("plain", SIMPLE, None)
    ids = chats.prompt(MESSAGES)
    assert ids[0] == 256
    assert bytes(ids[1:]) == b"System: s\n\nUser: u\n\nAssistant:"
    assert chats.stops == ("\n\nUser:",)
    with pytest.raises(ValueError, match="role 'tool': choices: system, user, assistant"):
        chats.prompt([{"role": "tool", "content": "x"}])


def test_a_layout_that_the_tokenizer_cannot_write():
    with pytest.raises(ConfigError, match="special token"):
        make_chats("built_in", SIMPLE, None)
    with pytest.raises(ConfigError, match="brings none"):
        make_chats("tokenizer", CHATTY, None)
