"""Transforms of a model, made before its optimizer: Model -> Model. One file each."""

from llm_jax.transforms.weight import Frozen, drawn, merged, transformed

__all__ = ["Frozen", "drawn", "merged", "transformed"]
