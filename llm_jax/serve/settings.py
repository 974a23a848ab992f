"""What a server allows, and where it listens."""

import dataclasses
import math
import os
from pathlib import Path

from llm_jax.core.config import ConfigError

KEY_VARIABLE = "LLM_JAX_API_KEY"


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """host, port: where it listens; port 0 is any free one.

    api_key: what requests must bring as "Authorization: Bearer KEY"; None: nothing.
    allowed_hosts: names under which the server may be addressed, beside those of this machine itself.
    num_slots: completions that run together; max_queue: more of them that may wait.
    max_length: most tokens of prompt and completion together; None: the model's.
    max_tokens: most new tokens of a completion; None: all that fit.
    max_body: bytes of a request. timeout: seconds of a request, its waiting included.
    drain: seconds that running requests have when the server is told to stop.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = dataclasses.field(default=None, repr=False)
    allowed_hosts: tuple[str, ...] = ()
    num_slots: int = 16
    max_queue: int = 64
    max_length: int | None = None
    max_tokens: int | None = None
    max_body: int = 1 << 20
    timeout: float = 600.0
    drain: float = 30.0

    def __post_init__(self):
        if not 0 <= self.port < 65536:
            raise ConfigError(f"--port {self.port} must lie in 0..65535")
        for field in ("num_slots", "max_tokens", "max_body"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ConfigError(f"--{field} {value} must be at least 1")
        if self.max_queue < 0:
            raise ConfigError(f"--max_queue {self.max_queue} must be at least 0")
        if not self.timeout > 0:
            raise ConfigError(f"--timeout {self.timeout} must be above 0")
        if not 0 <= self.drain < math.inf:
            raise ConfigError(f"--drain {self.drain} must be at least 0, and finite")


def read_api_key(file: Path | None) -> str | None:
    """The key of a file, else that of the environment variable LLM_JAX_API_KEY, else None.

    Raises:
      ConfigError: an empty key, or one that no header can carry.
    """
    if file is not None:
        source, key = f"--api_key_file {file}", file.read_text(encoding="utf-8").strip()
    else:
        source, key = KEY_VARIABLE, os.environ.get(KEY_VARIABLE)
    if key is None:
        return None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"{source}: expected a key of printable ASCII characters without spaces")
    return key
