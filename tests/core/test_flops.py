"""Model FLOPs against PaLM's closed form and against what XLA counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llm_jax.core.flops import transformer_flops
from llm_jax.models import bert, encoder_decoder, gpt
from llm_jax.nn.precision import Precision

SHAPE = {
    "num_layers": 3,
    "embed_dim": 64,
    "num_heads": 8,
    "num_kv_heads": 2,
    "head_dim": 16,
    "mlp_dim": 96,
    "gated": True,
    "vocab_size": 160,
    "sequence_length": 32,
    "causal_half": False,
}


def test_palm_closed_form():
    shape = SHAPE | {"num_kv_heads": 8, "gated": False}
    layers, embed, heads, head_dim = 3, 64, 8, 16
    weights = layers * (4 * embed * heads * head_dim + 2 * embed * 96) + embed * 160
    palm = 6 * weights + 12 * layers * heads * head_dim * 32
    assert transformer_flops(**shape) == palm


@pytest.mark.parametrize("gated", [True, False])
def test_xla_counts_the_same(gated):
    """A plain forward and backward of the matrix multiplications, compiled."""
    layers, embed, heads, kv_heads, head_dim, mlp, vocab, length = 3, 64, 8, 2, 16, 96, 160, 32

    def spec(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    layer = {
        "query": spec(embed, kv_heads, heads // kv_heads, head_dim),
        "key_value": spec(2, embed, kv_heads, head_dim),
        "out": spec(kv_heads, heads // kv_heads, head_dim, embed),
        "up": spec(2 if gated else 1, embed, mlp),
        "down": spec(mlp, embed),
    }
    weights = {"layers": [layer] * layers, "head": spec(embed, vocab)}

    def total(weights, x):
        for w in weights["layers"]:
            q = jnp.einsum("td,dkgh->tkgh", x, w["query"])
            k, v = (jnp.einsum("sd,dkh->skh", x, w["key_value"][i]) for i in range(2))
            scores = jnp.einsum("tkgh,skh->kgts", q, k)
            x = jnp.einsum("tkgh,kghd->td", jnp.einsum("kgts,skh->tkgh", scores, v), w["out"])
            up = [jnp.einsum("td,df->tf", x, part) for part in w["up"]]
            x = (up[0] * up[1] if gated else up[0] * up[0]) @ w["down"]
        return jnp.square(x @ weights["head"]).sum()

    compiled = (
        jax.jit(jax.grad(total, argnums=(0, 1))).lower(weights, spec(length, embed)).compile()
    )
    counted = compiled.cost_analysis()["flops"] / length
    assert transformer_flops(**SHAPE | {"gated": gated}) == pytest.approx(counted, rel=0.02)


def test_causal_half_halves_attention_only():
    full, half = (transformer_flops(**SHAPE | {"causal_half": c}) for c in (False, True))
    assert full - half == 3 * 3 * 4 * 8 * 16 * 32 / 2
    double = SHAPE | {"sequence_length": 64, "causal_half": True}
    assert transformer_flops(**double) == full


@pytest.mark.parametrize("window", [1, 2, 7, 31])
def test_a_window_counts_the_keys_that_queries_see(window):
    places = np.arange(32)
    distance = places[:, None] - places
    visible = (distance >= 0) & (distance < window)
    whole, half = (
        transformer_flops(**SHAPE | {"causal_half": c}, attention_window=window)
        for c in (False, True)
    )
    per_key = 3 * 3 * 4 * 8 * 16
    assert transformer_flops(**SHAPE) - whole == per_key * (32 - window)
    assert whole - half == pytest.approx(per_key * (window - visible.sum(1).mean()))


@pytest.mark.parametrize("causal_half", [False, True])
def test_a_window_that_hides_nothing_counts_as_none(causal_half):
    shape = SHAPE | {"causal_half": causal_half}
    for window in (32, 1000):
        assert transformer_flops(**shape, attention_window=window) == transformer_flops(**shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_window": 0}, "attention_window = 0: must be at least 1"),
        ({"num_layers": 0}, "num_layers = 0: must be at least 1"),
        ({"num_kv_heads": 3}, "num_kv_heads = 3: must divide num_heads = 8"),
    ],
)
def test_bad_shapes(change, message):
    with pytest.raises(ValueError, match=message):
        transformer_flops(**SHAPE | change)


MODELS = {
    "gpt": (
        gpt.Config(vocab_size=96, embed_dim=64, num_layers=3, num_heads=4),
        {"tokens": (2, 32)},
    ),
    "bert": (
        bert.Config(
            96,
            embed_dim=128,
            num_layers=3,
            num_heads=4,
            mlp_dim=512,
            num_positions=32,
            activation="relu",
        ),
        {"tokens": (2, 32), "predict_positions": (2, 8)},
    ),
    "encoder_decoder": (
        encoder_decoder.Config(vocab_size=96, embed_dim=64, num_layers=3, num_heads=4),
        {"encoder_tokens": (2, 32), "tokens": (2, 16)},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_count_what_xla_counts(name):
    """Unrolled, since XLA counts a loop's body once; it also counts what is no product."""
    config, shapes = MODELS[name]
    config = dataclasses.replace(config, scan_unroll=3)
    module = {"gpt": gpt, "bert": bert, "encoder_decoder": encoder_decoder}[name]
    make = lambda: module.make(config, precision=Precision(), rngs=nnx.Rngs(0))  # noqa: E731
    graphdef, state = nnx.split(nnx.eval_shape(make))

    def total(state, batch):
        out = nnx.merge(graphdef, state)(batch)
        class_logits = 0.0 if out.class_logits is None else out.class_logits.sum()
        return jnp.square(out.logits).sum() + class_logits

    batch = {key: jax.ShapeDtypeStruct(shape, jnp.int32) for key, shape in shapes.items()}
    compiled = jax.jit(jax.grad(total)).lower(state, batch).compile()
    counted = compiled.cost_analysis()["flops"]
    assert config.batch_flops(shapes, causal_half=False) == pytest.approx(counted, rel=0.1)


def test_an_encoder_of_no_length_costs_nothing():
    with pytest.raises(ValueError, match="memory_length = 0"):
        transformer_flops(**SHAPE, memory_length=0)
