"""Encoder-decoders: the Transformer of 2017 and T5."""

from llm_jax.models.encoder_decoder.config import Config
from llm_jax.models.encoder_decoder.model import EncoderDecoder, make

__all__ = ["Config", "EncoderDecoder", "make"]
