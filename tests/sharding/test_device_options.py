"""Compiler options by generation of chip: the user's own win, and the step carries them."""

from llm_jax.sharding import xla_flags


def test_generations_get_more_vmem_and_others_nothing():
    assert xla_flags.device_options("TPU v5", {}) == {"xla_tpu_scoped_vmem_limit_kib": "50000"}
    assert xla_flags.device_options("TPU v6 lite", {}) == {"xla_tpu_scoped_vmem_limit_kib": "65536"}
    for kind in ("TPU7x", "cpu", "NVIDIA H100 80GB HBM3"):
        assert xla_flags.device_options(kind, {}) == {}


def test_what_the_user_set_wins():
    given = {"LIBTPU_INIT_ARGS": "--xla_tpu_scoped_vmem_limit_kib=20000"}
    assert xla_flags.device_options("TPU v5", given) == {}
    assert xla_flags.device_options("TPU v5", {"LLM_JAX_XLA_FLAGS": "off"}) == {}
