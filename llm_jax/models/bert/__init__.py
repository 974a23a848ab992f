"""Bidirectional encoders: BERT and RoBERTa."""

from llm_jax.models.bert.config import Config
from llm_jax.models.bert.model import Bert, make

__all__ = ["Bert", "Config", "make"]
