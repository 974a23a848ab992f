"""Number words in two languages: endless exact translations (extra `results`).

English, French and German come from num2words, Chinese from cn2an, so that the pairs follow real
grammars, with their irregular forms (quatre-vingt-onze, einundzwanzig, 一十 against 十). Each index
is another number, by a seeded permutation.
"""

import collections
import dataclasses
import hashlib
import importlib
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np

from llm_jax.core.config import ConfigError, nearest
from llm_jax.data.fields import Record
from llm_jax.data.shuffle import derive_seed, permute

_PAIRS = ("en-zh", "en-fr", "en-de")
_NUMBER_END = 10**12  # cn2an goes to 10**16; words have up to 150 letters here
_SIZE_MOST = 10**7  # 8 bytes of memory each


@dataclasses.dataclass(frozen=True)
class Config:
    """path: the languages, from English: "en-zh", "en-fr" or "en-de".

    size: how many records there are. max_number: their numbers are drawn from 0..max_number.
    """

    path: str
    name: str = "number_words"
    weight: float = 1.0
    size: int = 1_000_000
    max_number: int = 999_999_999
    seed: int = 0

    def __post_init__(self):
        if self.path not in _PAIRS:
            raise ConfigError(
                f"path = {self.path!r}{nearest(self.path, _PAIRS)}; choices: {', '.join(_PAIRS)}"
            )
        if not 0 < self.max_number < _NUMBER_END:
            raise ConfigError(f"max_number = {self.max_number}: must be in 1..{_NUMBER_END - 1:_}")
        most = min(self.max_number + 1, _SIZE_MOST)
        if not 0 < self.size <= most:
            raise ConfigError(
                f"size = {self.size}: must be in 1..{most}: each record is another number up to "
                f"max_number = {self.max_number}"
            )


class NumberWords:
    """Records {"source": English words, "target": the other language's, "number": int}.

    As a document, the two stand in a line with a tab between them. Numbers, not words, decide what is
    held out, so that all languages hold out the same ones.
    """

    group_starts = None

    def __init__(self, config: Config):
        self._config = config
        target = config.path.partition("-")[2]
        self._source = _speller("en", config.max_number)
        self._target = _speller(target, config.max_number)
        seed = derive_seed(config.seed, "number words")
        self._numbers = permute(np.arange(config.size), config.max_number + 1, seed)
        packages = ("num2words", "cn2an") if target == "zh" else ("num2words",)
        versions = [importlib.metadata.version(name) for name in packages]
        key = f"{config.path} {config.size} {config.max_number} {config.seed} {versions}"
        self.fingerprint = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return self._config.size

    def __getitem__(self, index: int) -> dict:
        record = self.record(index)
        return {"text": "{source}\t{target}\n".format(**record.fields), "name": record.name}

    def record(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(self._numbers[index])
        fields = {"source": self._source(number), "target": self._target(number), "number": number}
        return Record(f"{self._config.path}:{number}", fields)

    def split_ids(self, indices: np.ndarray) -> np.ndarray:
        return self._numbers[indices]

    def check_text(self) -> None: ...


def make(config: Config, cache: Path) -> NumberWords:
    return NumberWords(config)


def _speller(language: str, max_number: int) -> Callable[[int], str]:
    if language == "zh":
        return _package("cn2an").an2cn
    converter = type(_package("num2words").CONVERTER_CLASSES[language])()
    # It looks at all its number words for each part of a number, 130 in English, most of them for
    # numbers over 10**30: without those it is six to twelve times as fast.
    small = ((value, word) for value, word in converter.cards.items() if value <= max_number)
    converter.cards = collections.OrderedDict(small)
    return converter.to_cardinal


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(
            f'a number_words source needs {name}: pip install "llm_jax[results]"'
        ) from None
