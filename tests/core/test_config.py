import dataclasses
from typing import Literal

import pytest

from llm_jax.core.config import ConfigError, component, load, parse, set_override, to_dict


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 1.0
    kind: Literal["a", "b"] = "a"


@dataclasses.dataclass(frozen=True)
class Outer:
    size: int
    inner: Inner | None = None
    names: tuple[str, ...] = ()
    flag: bool = False

    def __post_init__(self):
        if self.size < 0:
            raise ValueError(f"size {self.size} must not be negative")


@dataclasses.dataclass(frozen=True)
class Kept:
    remat: Literal["none", "full"] = "full"
    perhaps: Literal["none", "full"] | None = "full"
    other: Literal["a", "b"] = "a"


def test_parse_and_back():
    section = {"size": 3, "inner": {"rate": 2, "kind": "b"}, "names": ["x", "y"]}
    parsed = parse(Outer, section)
    assert parsed == Outer(3, Inner(2.0, "b"), ("x", "y"))
    assert isinstance(parsed.inner.rate, float)
    assert parse(Outer, to_dict(parsed)) == parsed


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "config.size is missing"),
        ({"siz": 1}, "config.siz: unknown key; did you mean 'size'"),
        ({"size": "x"}, "config.size = 'x': expected int"),
        ({"size": True}, "config.size = True: expected int"),
        ({"size": 1.5}, "config.size = 1.5: expected int"),
        ({"size": -1}, "config: size -1 must not be negative"),
        ({"size": 1, "inner": {"kind": "c"}}, "config.inner.kind = 'c'.*choices: a, b"),
        ({"size": 1, "inner": 3}, "config.inner = 3: expected a section"),
        ({"size": 1, "names": "abc"}, "config.names = 'abc': expected a tuple"),
        ({"size": 1, "flag": 1}, "config.flag = 1: expected bool"),
    ],
)
def test_errors_name_key_value_and_choices(section, message):
    with pytest.raises(ConfigError, match=message) as error:
        parse(Outer, section)
    assert "\n" not in str(error.value)


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "c.py"
    path.write_text(
        "import ml_collections\n"
        "def get_config(argument='plain'):\n"
        "    return ml_collections.ConfigDict({'a': {'x': 1}, 'kind': argument, 's': [{'p': 1}]})\n"
    )
    return path


def test_overrides(config_file):
    config = load(
        f"{config_file}:fancy",
        ["a.x=2e9", "a.new=none", "b.c=text", "b.t=(1, 2)", "s.0.p=5", "a.flag=true"],
    )
    assert config.kind == "fancy"
    assert config.a.to_dict() == {"x": 2e9, "new": None, "flag": True}
    assert config.b.to_dict() == {"c": "text", "t": (1, 2)}
    assert config.s[0]["p"] == 5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("a.x.y=1", "a.x is a value, not a section"),
        ("a.x", "expected section.key=value"),
        ("s.7.p=1", "'7' is not an index below 1"),
    ],
)
def test_bad_overrides(config_file, override, message):
    with pytest.raises(ConfigError, match=message):
        load(str(config_file), [override])


def test_missing_files_and_arguments(config_file, tmp_path):
    with pytest.raises(ConfigError, match=r"no config file at .*cc.py; did you mean .*c.py"):
        load(str(tmp_path / "cc.py"))
    config_file.write_text("def get_config():\n    return {}\n")
    with pytest.raises(ConfigError, match="takes no argument"):
        load(f"{config_file}:x")


def test_components_are_found_by_name():
    assert component("models", "gpt").make
    with pytest.raises(ConfigError, match=r"objectives has no 'causal'.*choices: .*causal_lm"):
        component("objectives", "causal")


def test_a_choice_called_none():
    config = {}
    set_override(config, "remat=none")
    assert config == {"remat": None}
    assert parse(Kept, config).remat == "none"
    assert parse(Kept, {"remat": "none"}).remat == "none"
    assert parse(Kept, {"perhaps": None}).perhaps is None
    with pytest.raises(ConfigError, match=r"config.other = None; choices: a, b"):
        parse(Kept, {"other": None})
