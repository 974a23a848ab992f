"""Which layers see a window: attention_window and global_every of ours against config.json."""

from collections.abc import Sequence

from llm_jax.core.config import ConfigError
from llm_jax.models.hf_config import Group, value_of

_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
_FIELDS = ("attention_window", "global_every")


def in_layer_types(every: int) -> Group:
    """Layer by layer, or by a period (Gemma); every: global_every where config.json does not tell.

    The period is written too: it tells what cannot be seen from fewer layers than one.
    """

    def read(content, values):
        found = value_of(content, "_sliding_window_pattern", every)
        found = value_of(content, "sliding_window_pattern", found)
        types = content.get("layer_types")
        if types is not None:
            found = _global_every(types, values["num_layers"], found)
        return {
            "attention_window": value_of(content, "sliding_window", 4096),
            "global_every": found,
        }

    def write(values):
        return {
            "sliding_window": values["attention_window"],
            "layer_types": layer_types(values["num_layers"], values["global_every"]),
            "sliding_window_pattern": values["global_every"],
        }

    keys = ("sliding_window", "layer_types", "sliding_window_pattern", "_sliding_window_pattern")
    return Group(keys, _FIELDS, read, write)


def in_upper_layers() -> Group:
    """From layer max_window_layers on, or layer by layer (Qwen2, Qwen3)."""

    def read(content, values):
        window = value_of(content, "sliding_window", 4096)
        window = window if value_of(content, "use_sliding_window", False) else None
        length = values["num_layers"]
        types = content.get("layer_types")
        if types is None:
            first = (
                length if window is None else value_of(content, "max_window_layers", 28, least=0)
            )
            types = [_GLOBAL if layer < first else _LOCAL for layer in range(length)]
        every = _global_every(types, length)
        if every == 1:
            return {"attention_window": None, "global_every": None}
        if window is None:
            raise ConfigError(
                f"config.json contradicts itself: layer_types has {_LOCAL}, and there is no window"
            )
        return {"attention_window": window, "global_every": every}

    def write(values):
        window, length = values["attention_window"], values["num_layers"]
        return {
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "max_window_layers": length if window is None else 0,
            "layer_types": layer_types(length, 1 if window is None else values["global_every"]),
        }

    keys = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
    return Group(keys, _FIELDS, read, write)


def everywhere() -> Group:
    """In every layer or in none (Qwen3-MoE)."""

    def read(content, values):
        use = value_of(content, "use_sliding_window", False)
        return {"attention_window": value_of(content, "sliding_window", 4096) if use else None}

    def write(values):
        window = values["attention_window"]
        return {"use_sliding_window": window is not None, "sliding_window": window}

    return Group(("use_sliding_window", "sliding_window"), ("attention_window",), read, write)


def layer_types(num_layers: int, global_every: int | None) -> list[str]:
    """What transformers calls each layer; every one is global for 1, none for None."""
    whole = lambda layer: global_every is not None and layer % global_every == 0  # noqa: E731
    return [_GLOBAL if whole(layer) else _LOCAL for layer in range(1, num_layers + 1)]


def _global_every(types: Sequence[str], num_layers: int, guess: int | None = None) -> int | None:
    """The period that makes these layers: the guess, or no period at all, or the smallest.

    Raises:
      ConfigError: none does, or the number of layers is another.
    """
    if len(types) != num_layers:
        raise ConfigError(
            f"config.json: layer_types has {len(types)} layers, and the model {num_layers}"
        )
    for every in (guess, None, *range(1, num_layers + 1)):
        if layer_types(num_layers, every) == list(types):
            return every
    raise ConfigError(
        f"config.json: layer_types = {list(types)!r} cannot be computed, only {_GLOBAL}, {_LOCAL}, "
        f"and every n-th layer {_GLOBAL} with {_LOCAL} between"
    )
