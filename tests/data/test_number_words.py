"""Pairs of number words are what the libraries say, one number each, and split by number."""

import sys

import pytest
from corpora import RawRecords

from llm_jax.core.config import ConfigError, parse_component
from llm_jax.data.config import resolve_data
from llm_jax.data.held_out import held_out_records
from llm_jax.data.pipeline import make_loader
from llm_jax.data.prepare import prepare
from llm_jax.data.sources import open_source

cn2an = pytest.importorskip("cn2an")
num2words = pytest.importorskip("num2words").num2words


def open_words(path, **settings):
    section = {"name": "number_words", "path": path, **settings}
    return open_source(parse_component("data.sources", section, "data.sources.0"), None)


def translate(path, number):
    return cn2an.an2cn(number) if path == "en-zh" else num2words(number, lang=path[-2:])


@pytest.mark.parametrize("path", ["en-zh", "en-fr", "en-de"])
@pytest.mark.parametrize("max_number", [9, 999, 999_999, 10**12 - 1])
def test_pairs_are_those_of_the_libraries(path, max_number):
    size = min(100, max_number + 1)
    source = open_words(path, size=size, max_number=max_number)
    found = [source.record(i).fields for i in range(size)]
    for fields in found:
        number = fields["number"]
        assert 0 <= number <= max_number
        assert fields["source"] == num2words(number, lang="en")
        assert fields["target"] == translate(path, number)
        if path == "en-zh":
            assert cn2an.cn2an(fields["target"], "smart") == number
    assert len({fields["number"] for fields in found}) == size
    assert found == [open_words(path, size=size, max_number=max_number).record(i).fields
                     for i in range(size)]  # fmt: skip


def test_irregular_forms():
    words = {
        path: {r.fields["number"]: r.fields["target"] for r in map(source.record, range(1000))}
        for path in ("en-zh", "en-fr", "en-de")
        if (source := open_words(path, size=1000, max_number=999))
    }
    assert [words["en-zh"][n] for n in (0, 10, 12, 101, 110)] == [
        "零", "十", "十二", "一百零一", "一百一十",
    ]  # fmt: skip
    assert [words["en-fr"][n] for n in (21, 71, 80, 91)] == [
        "vingt et un", "soixante et onze", "quatre-vingts", "quatre-vingt-onze",
    ]  # fmt: skip
    assert [words["en-de"][n] for n in (1, 21, 101)] == ["eins", "einundzwanzig", "einhunderteins"]


def test_seeds_are_other_numbers_and_documents_hold_both_languages():
    first, other = (open_words("en-de", size=50, seed=seed) for seed in (0, 1))
    numbers = [[s.record(i).fields["number"] for i in range(50)] for s in (first, other)]
    assert len({*numbers[0], *numbers[1]}) == 100
    assert first.fingerprint != other.fingerprint
    fields = first.record(7).fields
    assert first[7] == {
        "text": f"{fields['source']}\t{fields['target']}\n", "name": f"en-de:{fields['number']}",
    }  # fmt: skip


def test_all_languages_hold_out_the_same_numbers(tmp_path):
    settings = {"name": "number_words", "size": 500, "max_number": 2000}
    data = resolve_data(
        {
            "sources": [{**settings, "path": path} for path in ("en-zh", "en-fr")],
            "tokenizer": {"name": "raw_bytes"},
            "held_out_fraction": 0.1,
        }
    )
    found = prepare(data, tmp_path, examples=True)
    held_out = [(r["name"], r["number"]) for r in held_out_records(data, tmp_path)]
    assert 20 < len(held_out) < 200
    numbers = {name[:5]: set() for name, _ in held_out}
    for name, number in held_out:
        numbers[name[:5]].add(number)
    assert numbers["en-zh"] == numbers["en-fr"]
    loader = make_loader(
        data, workdir=tmp_path, tokenizer=found.tokenizer, objective=RawRecords(), batch_size=1024
    )
    trained = {example["number"] for example in next(loader)["examples"]}
    assert len(trained) > 400
    assert not trained & numbers["en-zh"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "en-es"}, "path = 'en-es'; did you mean .*choices: en-zh, en-fr, en-de"),
        ({"size": 0}, r"size = 0: must be in 1\.\.10000000"),
        ({"size": 11, "max_number": 9}, r"size = 11: must be in 1\.\.10: each record is another"),
        ({"max_number": 10**12}, r"max_number = 1000000000000: must be in 1\.\.999_999_999_999"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        open_words(**{"path": "en-zh"} | settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("package", ["num2words", "cn2an"])
def test_a_missing_package_is_named(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"needs {package}: .*llm_jax\[results\]"):
        open_words("en-zh")
