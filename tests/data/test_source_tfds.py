import importlib
import sys
import textwrap

import pytest

from llm_jax.core.config import ConfigError, parse_component
from llm_jax.data.sources import open_source, source_for

BUILDER = '''
    import numpy as np
    import tensorflow_datasets as tfds

    class TinyCorpus(tfds.core.GeneratorBasedBuilder):
        """Seven sentences."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "number": np.int64})
            return self.dataset_info_from_configs(features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number in range(7):
                yield number, {"text": f"sentence {number} é", "number": number}
'''


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    pytest.importorskip("tensorflow_datasets")
    folder = tmp_path_factory.mktemp("tfds")
    package = folder / "tiny_corpus_builders"
    package.mkdir()
    (package / "tiny_corpus.py").write_text(textwrap.dedent(BUILDER))
    (package / "__init__.py").touch()
    (package / "CITATIONS.bib").touch()
    (package / "README.md").write_text("Seven sentences.")
    (package / "TAGS.txt").touch()
    sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module("tiny_corpus_builders.tiny_corpus")
        module.TinyCorpus(
            data_dir=folder / "data", file_format="array_record"
        ).download_and_prepare()
        yield str(folder / "data")
    finally:
        sys.path.remove(str(folder))


def open_tfds(tmp_path, prepared_in, as_records=False, **section):
    section = source_for("tfds:tiny_corpus:1.0.0") | {"data_dir": prepared_in} | section
    config = parse_component("data.sources", section, "source")
    return open_source(config, tmp_path, as_records=as_records)


def test_documents_are_read_by_index_without_tensorflow(tmp_path, data_dir):
    source = open_tfds(tmp_path, data_dir)
    assert sorted(source[i]["text"] for i in range(7)) == [f"sentence {i} é" for i in range(7)]
    assert source[3] == source[3]
    assert len(open_tfds(tmp_path, data_dir, split="train[:3]")) == 3
    records = [open_tfds(tmp_path, data_dir, text_key="absent", as_records=True).record(i)
               for i in range(7)]  # fmt: skip
    assert sorted(r.fields["number"] for r in records) == list(range(7))
    assert all(r.fields["text"] == f"sentence {r.fields['number']} é" for r in records)
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"text_key": "body"}, r"no feature 'body'.*features: .*text"),
        ({"split": "validation"}, "split 'validation'"),
        ({"data_dir": "/nowhere"}, "tfds build tiny_corpus:1.0.0"),
        ({"path": "not_a_dataset"}, "tfds:not_a_dataset cannot be opened"),
    ],
)
def test_what_cannot_be_opened_is_one_line(tmp_path, data_dir, section, message):
    with pytest.raises(ConfigError, match=message) as caught:
        open_tfds(tmp_path, data_dir, **section)
    assert "\n" not in str(caught.value)
