"""Kernels beside their plain jnp references: one per file, and a chooser per operation."""
