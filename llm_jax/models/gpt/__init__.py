"""GPT: the decoder-only family."""

from llm_jax.models.gpt.config import Config
from llm_jax.models.gpt.model import GPT, make

__all__ = ["GPT", "Config", "make"]
