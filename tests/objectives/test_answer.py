import functools

import jax
import numpy as np
import pytest
from record_cases import (
    FakeEncoder,
    assert_is_of_spec,
    batch_of,
    bytes_tokenizer,
    log_softmax,
    pieces_tokenizer,
    tiny_bert,
    word_piece_tokenizer,
)

from llm_jax.core.config import ConfigError, parse
from llm_jax.objectives import answer

TOKENIZER = bytes_tokenizer()
CLS, SEP, PAD = TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.pad_id
CONTEXT = "the café in Paris (1889) is"


def record(text, context=CONTEXT, question="q?"):
    return {
        "question": question,
        "context": context,
        "answers": {"text": [text], "answer_start": [context.rindex(text)]},
    }


NO_ANSWER = {"question": "q?", "context": CONTEXT, "answers": {"text": [], "answer_start": []}}


def objective(**config):
    return answer.make(parse(answer.Config, config))


def test_the_answer_is_a_span_of_tokens():
    made_by = objective()
    batch = batch_of(made_by, [record("Paris"), NO_ANSWER, record("é"), {}], TOKENIZER, 40)
    assert_is_of_spec(batch, made_by, 4, 40)
    context = CONTEXT.encode()
    assert batch["tokens"][0].tolist() == [
        CLS, *b"q?", SEP, *context, SEP, *[PAD] * (40 - len(context) - 5)
    ]  # fmt: skip
    assert batch["answer_start"].tolist() == [4 + context.index(b"Paris"), 0, 11, 0]
    assert batch["answer_end"].tolist() == [4 + context.index(b"Paris") + 4, 0, 12, 0]
    assert batch["label_weights"].tolist() == [1, 1, 1, 0]
    places = [1, 0, 0, 0, *[1] * len(context), 0]
    assert batch["answer_places"][0].tolist() == places + [0] * (40 - len(places))
    assert batch["token_types"][0].tolist() == [0] * 4 + [1] * (len(context) + 1) + [0] * (
        40 - len(places)
    )
    assert not batch["answer_places"][3].any()


@pytest.mark.parametrize("style", ["bert", "roberta"])
@pytest.mark.parametrize(
    "tokenizer",
    [TOKENIZER, pieces_tokenizer(), word_piece_tokenizer()],
    ids=["bytes", "sentencepiece", "wordpiece"],
)
def test_the_span_spells_the_answer(tokenizer, style):
    texts = ["the", "café", "Paris", "(1889)", "1889", "is", "in Paris (1889"]
    batch = batch_of(objective(pair_style=style), [record(t) for t in texts], tokenizer, 48)
    for row, text in enumerate(texts):
        span = batch["tokens"][row][batch["answer_start"][row] : batch["answer_end"][row] + 1]
        spelled = tokenizer.decode(span)
        if tokenizer is word_piece_tokenizer():
            text = text.lower().replace("é", "e").replace(" ", "")
            spelled = spelled.replace(" ", "")
        assert spelled.strip() == text


def test_of_a_long_context_a_window_with_the_answer_is_shown():
    words = [f"w{i:02}" for i in range(40)]
    context = " ".join(words)
    records = [record(words[i % 40], context) for i in range(80)]
    batch = batch_of(objective(), records, TOKENIZER, 32)
    assert (batch["segment_ids"] > 0).all()  # full rows
    starts = set()
    for row, item in enumerate(records):
        first, last = batch["answer_start"][row], batch["answer_end"][row]
        span = bytes(batch["tokens"][row][first : last + 1].tolist())
        assert span.decode() == item["answers"]["text"][0]
        assert batch["answer_places"][row][[first, last]].all()
        window = bytes(batch["tokens"][row][4:31].tolist()).decode()
        assert window in context
        starts.add(int(first))
    assert len(starts) > 15  # anywhere in the window


def test_windows_follow_from_the_row_number_alone():
    records = [record("w20", " ".join(f"w{i:02}" for i in range(40)))] * 16
    whole = batch_of(objective(), records, TOKENIZER, 32, first_id=100)
    part = batch_of(objective(), records[:4], TOKENIZER, 32, first_id=108)
    for name, value in part.items():
        np.testing.assert_array_equal(value, whole[name][8:12])
    later = batch_of(objective(), records, TOKENIZER, 32, first_id=200)
    other = batch_of(objective(seed=1), records, TOKENIZER, 32, first_id=100)
    for changed in (later, other):
        assert (changed["answer_start"] != whole["answer_start"]).any()


def test_a_list_of_answers_serves_too():
    item = record("Paris")
    start = CONTEXT.index("Paris")
    listed = item | {"answers": [{"text": "Paris", "answer_start": start}]}
    first, second = batch_of(objective(), [item, listed], TOKENIZER, 40)["answer_start"]
    assert first == second


def test_loss_is_the_mean_of_start_and_end_over_the_context():
    batch = batch_of(objective(), [record("Paris"), NO_ANSWER, {}], TOKENIZER, 40)
    network = FakeEncoder(2)
    logits = np.where(batch["answer_places"][..., None] > 0, network(batch).logits, -np.inf)
    log_p = log_softmax(logits[:2], axis=1)
    rows, starts, ends = np.arange(2), batch["answer_start"][:2], batch["answer_end"][:2]
    expected = -(log_p[rows, starts, 0] + log_p[rows, ends, 1]).mean() / 2
    output = objective().loss(network, batch, key=None, train=False)
    assert float(output.loss.mean) == pytest.approx(expected, rel=1e-5)
    assert float(output.loss.weight) == 2
    # The same model on the spans that it finds itself.
    best = logits[:2].argmax(1)
    batch["answer_start"][:2], batch["answer_end"][:2] = best.T
    batch["answer_end"][1] = (best[1, 1] + 1) % 40
    metrics = objective().loss(network, batch, key=None, train=False).metrics
    found = {name: float(metrics[name].sum) for name in metrics}
    assert found == {"exact_span": 1, "start_accuracy": 2, "end_accuracy": 1}


def test_bert_has_the_head_for_it():
    spec = objective().batch_spec(4, 12)
    network = tiny_bert("question_answering")
    loss = functools.partial(objective().loss, network, key=None, train=True)
    assert jax.eval_shape(loss, spec).loss.sum.shape == ()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        (
            {"answers": {"text": ["Paris"], "answer_start": [3]}},
            "answer 'Paris' is not at character 3",
        ),
        ({"answers": {"text": [" "], "answer_start": [3]}}, "answer ' ' is not at character 3"),
        ({"answers": "Paris"}, "'answers': expected lists 'text' and 'answer_start'"),
        ({"answers": {"text": ["Paris"]}}, "'answers': expected lists 'text' and 'answer_start'"),
        (
            {"answers": {"text": ["Paris"], "answer_start": ["12"]}},
            "expected texts and their first",
        ),
        ({"question": "q" * 36}, "a question of 36 tokens and an answer of 5 leave no room"),
    ],
)
def test_wrong_records(changes, error):
    with pytest.raises(ConfigError, match=error) as caught:
        batch_of(objective(), [record("Paris") | changes], TOKENIZER, 40, names=["squad:7"])
    assert str(caught.value).startswith("squad:7: ")
    assert "\n" not in str(caught.value)


def test_a_model_without_the_head():
    batch = batch_of(objective(), [record("Paris")], TOKENIZER, 40)
    with pytest.raises(ValueError, match=r"set model\.head = 'question_answering'"):
        objective().loss(FakeEncoder(3), batch, key=None, train=False)
