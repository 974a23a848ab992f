"""Config files to frozen dataclasses.

A config file is Python with `get_config(argument=None) -> ml_collections.ConfigDict`. It holds only
what differs from the defaults, which live in the dataclass of each section, beside the code that
reads them. `load` reads a file and applies `--config.section.key=value` overrides, `parse` turns one
section into its dataclass. Past that border there is no ConfigDict. Unknown keys and values of the
wrong type raise a ValueError that names the key, the value and the choices.

Nothing is registered: `component("models", "gpt")` imports `llm_jax.models.gpt`. Only reading files
needs ml_collections: a training step is built from plain dicts where it is not installed.
"""

import ast
import collections.abc
import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ml_collections


class ConfigError(ValueError):
    """What a user wrote in a config cannot be used; the message is one line."""


def load(path: str, overrides: Sequence[str] = ()) -> "ml_collections.ConfigDict":
    """Reads `FILE.py` or `FILE.py:argument` and applies overrides like `train.num_steps=100`."""
    import ml_collections

    file, _, argument = path.partition(":")
    file = Path(file)
    if not file.is_file():
        near = difflib.get_close_matches(file.name, [p.name for p in file.parent.glob("*.py")], 1)
        raise ConfigError(
            f"no config file at {file}"
            + (f"; did you mean {file.parent / near[0]}?" if near else "")
        )
    spec = importlib.util.spec_from_file_location(f"llm_jax_config_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses defined in a config look themselves up there
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{file} has no get_config()")
    takes_argument = bool(inspect.signature(module.get_config).parameters)
    if argument and not takes_argument:
        raise ConfigError(f"{path}: get_config() of {file.name} takes no argument")
    try:
        config = module.get_config(argument) if argument else module.get_config()
    except ValueError as error:
        raise ConfigError(str(error)) from None
    sections = plain(config)
    for override in overrides:
        set_override(sections, override)
    return ml_collections.ConfigDict(sections, type_safe=False)


def plain(value: Any) -> Any:
    """Dicts and lists all the way down: ConfigDicts refuse to change a value's type."""
    if _is_section(value):
        return {key: plain(value[key]) for key in value}
    return type(value)(map(plain, value)) if isinstance(value, list | tuple) else value


def _is_section(value: Any) -> bool:
    """A mapping, or a ConfigDict, which is none; whoever holds one has imported its package."""
    package = sys.modules.get("ml_collections")
    return isinstance(value, Mapping) or (
        package is not None and isinstance(value, package.ConfigDict)
    )


def set_override(config: dict[str, Any], override: str) -> None:
    """Applies one `a.b.c=value`; sections that the file left out are made."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"override {override!r}: expected section.key=value")
    *parents, leaf = dotted.split(".")
    node: Any = config
    for depth, parent in enumerate(parents):
        if isinstance(node, list | tuple):
            node = node[_index(parent, node, dotted)]
            continue
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if isinstance(node, tuple):
            raise ConfigError(
                f"config.{'.'.join(parents[: depth + 1])}: set the whole tuple at once"
            )
        if not isinstance(node, dict | list):
            raise ConfigError(
                f"config.{dotted}: {'.'.join(parents[: depth + 1])} is a value, not a section"
            )
    key = _index(leaf, node, dotted) if isinstance(node, list) else leaf
    node[key] = _literal(text)


def _index(text: str, node: Sequence, dotted: str) -> int:
    if not text.isdigit() or int(text) >= len(node):
        raise ConfigError(f"config.{dotted}: {text!r} is not an index below {len(node)}")
    return int(text)


def _literal(text: str) -> Any:
    lowered = {"true": True, "false": False, "none": None}
    if text.lower() in lowered:
        return lowered[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def component(kind: str, name: str) -> types.ModuleType:
    """The module `llm_jax.<kind>.<name>`, which holds a `Config` and a `make`.

    Raises:
      ConfigError: no such module; lists what the folder holds and suggests the nearest.
    """
    package = importlib.import_module(f"llm_jax.{kind}")
    found = {m.name for m in pkgutil.iter_modules(package.__path__) if m.name != "__main__"}
    if name in found:
        module = importlib.import_module(f"llm_jax.{kind}.{name}")
        if hasattr(module, "make"):
            return module
    choices = sorted(n for n in found if _offers_make(f"llm_jax.{kind}.{n}"))
    raise ConfigError(
        f"{kind} has no {name!r}{nearest(name, choices)}; choices: {', '.join(choices)}"
    )


def _offers_make(name: str) -> bool:
    try:
        return hasattr(importlib.import_module(name), "make")
    except ImportError:  # of an extra that is not installed; what is chosen by name does without
        return False


def parse(cls: type, section: Mapping | None, where: str = "config") -> Any:
    """Builds the dataclass `cls` from a mapping, checking every key and every type.

    Args:
      where: the dotted name of the section, for messages.
    """
    section = {} if section is None else section
    if dataclasses.is_dataclass(section) and isinstance(section, cls):
        return section
    if not _is_section(section):
        raise ConfigError(f"{where} = {section!r}: expected a section with keys of {cls.__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints = typing.get_type_hints(cls)
    for key in section:
        if key not in fields:
            raise ConfigError(
                f"{where}.{key}: unknown key{nearest(key, fields)}; keys: {', '.join(fields)}"
            )
    for name, field in fields.items():
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and name not in section:
            raise ConfigError(f"{where}.{name} is missing: {cls.__name__} needs it")
    values = {key: _convert(hints[key], section[key], f"{where}.{key}") for key in section}
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def parse_component(kind: str, section: Mapping, where: str) -> Any:
    """Parses a section whose `name` picks the component; its `Config` carries the name."""
    if not _is_section(section):
        raise ConfigError(f"{where} = {section!r}: expected a section with a name")
    if "name" not in section:
        raise ConfigError(f"{where}.name is missing: it picks the {kind} module")
    return parse(component(kind, section["name"]).Config, section, where)


def nearest(name: str, choices) -> str:
    """'; did you mean X?' or nothing."""
    near = difflib.get_close_matches(str(name), list(choices), 1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def to_dict(value: Any) -> Any:
    """A parsed config as plain dicts, lists and scalars, which `parse` reads back."""
    if dataclasses.is_dataclass(value):
        return {
            f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init
        }
    if isinstance(value, Mapping):
        return {k: to_dict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_dict(v) for v in value]
    return value


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is typing.Literal:
        if value is None and "none" in arguments:
            return "none"  # on the command line none is None, and some choices are called so
        if value not in arguments:
            choices = ", ".join(map(str, arguments))
            raise ConfigError(f"{where} = {value!r}{nearest(value, arguments)}; choices: {choices}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} = {value!r}: expected a tuple")
        kinds = (
            [arguments[0]] * len(value)
            if len(arguments) == 2 and arguments[1] is ...
            else arguments
        )
        if len(kinds) != len(value):
            raise ConfigError(f"{where} = {value!r}: expected {len(kinds)} values")
        return tuple(
            _convert(k, v, f"{where}.{i}")
            for i, (k, v) in enumerate(zip(kinds, value, strict=True))
        )
    if origin in (dict, collections.abc.Mapping):
        return {k: _convert(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return parse(hint, value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 1e9 is how people write a billion
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where} = {value!r}: expected {hint.__name__}, got {type(value).__name__}")


def _convert_union(arguments: tuple, value: Any, where: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    errors = []
    for hint in arguments:
        if hint is type(None):
            continue
        try:
            return _convert(hint, value, where)
        except ConfigError as error:
            errors.append(error)
    raise errors[0]
