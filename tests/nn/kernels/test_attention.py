"""Every attention kernel against the whole square in plain jnp, and what each may and may not do."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from llm_jax.nn.kernels import blockwise, cudnn, reference, splash
from llm_jax.nn.kernels.attention import AttentionSpec, attention, choose, layout
from llm_jax.nn.kernels.visible import Visible
from llm_jax.nn.mask import Places, attention_mask
from llm_jax.nn.precision import Precision
from llm_jax.nn.remat import remat
from llm_jax.sharding.mesh import MeshConfig, make_mesh, make_rules
from llm_jax.sharding.rules import use_rules

F32 = Precision("float32")
SPECS = {
    "causal": AttentionSpec(),
    "window and cap": AttentionSpec(window=50, soft_cap=2.0),
    "both sides": AttentionSpec(causal=False),
    "window on both sides": AttentionSpec(causal=False, window=50),
}
KERNELS = {  # all take [B, N, T, H]
    "splash": functools.partial(splash.attention, interpret=True),
    "blockwise": functools.partial(blockwise.attention, F32, block=64),
}
specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
kernels = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
swap = functools.partial(jnp.swapaxes, axis1=1, axis2=2)


def rows_of(*documents: list[int]) -> Places:
    """One packed row for each list of document lengths."""
    segments = [np.repeat(np.arange(1, len(row) + 1), row) for row in documents]
    positions = [np.concatenate([np.arange(n) for n in row]) for row in documents]
    return Places(jnp.array(np.stack(segments)), jnp.array(np.stack(positions)))


def arrays(batch, length, heads, kv_heads, head_dim=16, dtype="float32"):
    """query, key, value and the gradient of the output, [B, T, N or K, H]."""
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = (heads, kv_heads, kv_heads, heads)
    return [
        jax.random.normal(key, (batch, length, n, head_dim), dtype)
        for key, n in zip(keys, sizes, strict=True)
    ]


def outputs_and_gradients(run, query, key, value, upstream):
    def both(*inputs):
        out, back = jax.vjp(run, *inputs)
        return out, *back(upstream)

    return jax.jit(both)(query, key, value)


def by_reference(places, spec, *inputs):
    mask = attention_mask(places, places, causal=spec.causal, window=spec.window)
    run = lambda q, k, v: reference.dot_product_attention(F32, q, k, v, mask, spec.soft_cap)  # noqa: E731
    return outputs_and_gradients(run, *inputs)


def by_kernel(kernel, places, spec, *inputs):
    run = lambda q, k, v: swap(kernel(swap(q), swap(k), swap(v), places, places, spec))  # noqa: E731
    return outputs_and_gradients(run, *inputs)


def assert_same(ours, expected, atol=1e-5):
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


@specs
@kernels
def test_kernels_agree_with_the_whole_square(kernel, spec):
    places = rows_of([100, 56, 100], [256])
    inputs = arrays(2, 256, heads=2, kv_heads=1)
    assert_same(by_kernel(kernel, places, spec, *inputs), by_reference(places, spec, *inputs))


def test_fused_backward_sums_over_blocks_of_keys(monkeypatch):
    sides = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv")
    blocks = splash.kernels.BlockSizes(**dict.fromkeys(sides, 128), use_fused_bwd_kernel=True)
    monkeypatch.setattr(splash, "block_sizes", lambda *_, **__: blocks)
    places, spec = rows_of([150, 106]), AttentionSpec(soft_cap=3.0)
    inputs = arrays(1, 256, heads=2, kv_heads=1)
    splash._kernel.cache_clear()
    ours = by_kernel(KERNELS["splash"], places, spec, *inputs)
    splash._kernel.cache_clear()
    assert_same(ours, by_reference(places, spec, *inputs))


def test_blocks_need_not_divide_the_length():
    places, spec = rows_of([70, 31]), SPECS["window and cap"]
    inputs = arrays(1, 101, heads=4, kv_heads=2)
    assert_same(
        by_kernel(KERNELS["blockwise"], places, spec, *inputs),
        by_reference(places, spec, *inputs),
    )


@pytest.mark.parametrize("kernel", ["blockwise", "reference"])
def test_bfloat16_stays_near_float32(kernel):
    precision, spec = Precision("bfloat16"), AttentionSpec(soft_cap=5.0)
    places = rows_of([40, 60])
    inputs = arrays(1, 100, heads=4, kv_heads=2, dtype="bfloat16")
    turn = swap if layout(kernel) == "bnth" else lambda x: x

    def run(*inputs):
        inputs = (turn(x) for x in inputs)
        return turn(attention(kernel, precision, *inputs, places, places, spec))

    ours = outputs_and_gradients(run, *inputs)
    assert all(x.dtype == jnp.bfloat16 for x in ours)
    full = by_reference(places, spec, *(x.astype(jnp.float32) for x in inputs))
    assert_same([x.astype(jnp.float32) for x in ours], full, atol=0.06)


@kernels
def test_shares_of_batch_heads_and_sequence_change_nothing(kernel):
    config = MeshConfig(data=2, context=2, tensor=2)
    rules = make_rules(config, make_mesh(config))
    order = rules.length_order(512)
    assert not np.array_equal(order, np.arange(512))
    natural = rows_of([200, 312], [512])
    places = jax.tree.map(lambda x: x[:, order], natural)
    spec, inputs = AttentionSpec(window=200), arrays(2, 512, heads=4, kv_heads=2)
    with use_rules(rules):
        ours = by_kernel(kernel, places, spec, *(x[:, order] for x in inputs))
    expected = by_reference(natural, spec, *inputs)
    assert_same(ours, [x[:, order] for x in expected])


@kernels
def test_stages_of_a_pipeline_run_side_by_side(kernel):
    config = MeshConfig(pipeline=2, data=2, tensor=2)
    rules = make_rules(config, make_mesh(config)).within_pipeline()
    places, inputs = rows_of([128], [60, 68]), arrays(4, 128, heads=2, kv_heads=2)
    query, key, value, upstream = (swap(x).reshape(2, 2, 2, 128, 16) for x in inputs)

    def run(query, key, value):
        one = lambda q, k, v: kernel(q, k, v, places, places, AttentionSpec())  # noqa: E731
        return jax.vmap(one, spmd_axis_name="pipeline")(query, key, value)

    sharding = NamedSharding(rules.mesh, rules.spec("stage", "batch", "heads", None, None))
    staged = [jax.device_put(x, sharding) for x in (query, key, value, upstream)]
    with use_rules(rules):
        ours = outputs_and_gradients(run, *staged)
    assert ours[0].sharding.is_equivalent_to(sharding, 5)
    both = jax.tree.map(lambda x: jnp.concatenate([x, x]), places)
    expected = by_reference(both, AttentionSpec(), *inputs)
    assert_same([swap(x.reshape(4, 2, 128, 16)) for x in ours], expected)


def test_heads_that_do_not_divide_are_named():
    config = MeshConfig(data=2, tensor=4)
    rules = make_rules(config, make_mesh(config))
    query, key, value, _ = (swap(x) for x in arrays(2, 128, heads=4, kv_heads=2))
    places = rows_of([128], [128])
    with use_rules(rules), pytest.raises(ValueError, match="attention key: axis 'kv_heads'"):
        splash.attention(query, key, value, places, places, AttentionSpec(), interpret=True)


def test_padding_is_finite_and_unseen():
    query, key, value, upstream = arrays(1, 96, heads=2, kv_heads=1)
    places = rows_of([70, 26])
    padded = Places(jnp.where(places.segment_ids == 2, 0, 1), places.positions)
    ours = by_kernel(KERNELS["blockwise"], padded, AttentionSpec(), query, key, value, upstream)
    assert all(np.isfinite(x).all() for x in ours)
    other = value.at[:, 70:].set(7.0)
    again = by_kernel(KERNELS["blockwise"], padded, AttentionSpec(), query, key, other, upstream)
    np.testing.assert_array_equal(ours[0][:, :70], again[0][:, :70])


def sizes_in(jaxpr) -> set[int]:
    """Elements of every array of a jaxpr and of those within it."""
    found = {variable.aval.size for equation in jaxpr.eqns for variable in equation.outvars}
    for equation in jaxpr.eqns:
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            found |= sizes_in(inner) if hasattr(inner, "eqns") else set()
    return found


def test_blockwise_holds_nothing_that_grows_with_the_square():
    length, head_dim = 2048, 8
    x = jnp.zeros((1, 1, length, head_dim))
    places = rows_of([length])

    def loss(x):
        out = blockwise.attention(F32, x, x, x, places, places, AttentionSpec(), block=64)
        return out.sum()

    sizes = sizes_in(jax.make_jaxpr(jax.grad(loss))(x).jaxpr)
    assert 64 * 64 in sizes  # the walk reaches the blocks of scores
    assert max(sizes) == length * head_dim


def test_pairs_of_blocks_are_those_with_something_to_see():
    count = lambda spec: len(blockwise._pairs(Visible.of(spec), 1024, 64, None)[0])  # noqa: E731
    assert count(AttentionSpec(causal=False)) == 16 * 16
    assert count(AttentionSpec()) == 16 * 17 // 2
    assert count(AttentionSpec(window=64)) == 16 + 15
    assert count(AttentionSpec(window=1)) == 16
    assert count(AttentionSpec(causal=False, window=64)) == 16 + 2 * 15


def test_shares_of_a_causal_sequence_have_the_same_work():
    config = MeshConfig(data=2, context=4)
    rules = make_rules(config, make_mesh(config))
    pairs = blockwise._pairs(Visible(True, None), 1024, 64, rules)
    assert pairs.shape == (4, 16 * 17 // 2 // 4, 3)
    assert pairs[..., 2].all()
    windowed = blockwise._pairs(Visible(True, 64), 1024, 64, rules)
    assert windowed[..., 2].sum() == 16 + 15  # the other entries only wait


@pytest.mark.parametrize("visible", [Visible(True, None), Visible(True, 9), Visible(False, 9)])
def test_static_mask_of_blocks_is_that_of_single_tokens(visible):
    rng = np.random.default_rng(0)
    order = np.concatenate([np.arange(48, 64), np.arange(16), np.arange(16, 48)]).astype(np.int32)
    mask = splash._StaticMask(order, visible)
    single = visible(order[:, None], np.arange(64)[None])
    extents = set()
    for _ in range(200):
        first, left = rng.integers(0, 60, 2)
        rows, columns = (slice(start, start + rng.integers(1, 20)) for start in (first, left))
        np.testing.assert_array_equal(mask[rows, columns], single[rows, columns])
        part = single[rows, columns]
        extents.add((bool(part.all()), bool(part.any())))
    assert extents == {(True, True), (False, True), (False, False)}


@pytest.mark.parametrize("generation", ["TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"])
@pytest.mark.parametrize("window", [None, 4096, 100])
def test_splash_blocks_divide_every_length_that_choose_admits(generation, window):
    for length, shares in ((128, 1), (640, 1), (4096, 4), (3 * 128 * 4, 4), (131072, 16)):
        sizes = splash.block_sizes(length, 128, window=window, shares=shares, generation=generation)
        local = length // shares
        assert local % sizes.block_q == local % sizes.block_q_dkv == 0
        assert length % sizes.block_kv == length % sizes.block_kv_dkv == 0
        assert sizes.block_kv % sizes.block_kv_compute == 0
        assert sizes.has_backward_blocks


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_soft_cap_gradient_is_the_derivative(dtype):
    places, cap = rows_of([9, 4]), 1.5
    query, key, value, upstream = arrays(1, 13, heads=4, kv_heads=2)
    mask = attention_mask(places, places, causal=True)

    def plain(query, key, value):
        key, value = (jnp.repeat(x, 2, axis=2) for x in (key, value))
        scores = jnp.einsum("btnh,bsnh->bnts", query, key) * 16**-0.5
        scores = jnp.where(mask[:, None], cap * jnp.tanh(scores / cap), -jnp.inf)
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), value)

    precision = Precision(dtype)
    run = lambda q, k, v: reference.dot_product_attention(precision, q, k, v, mask, cap)  # noqa: E731
    ours = outputs_and_gradients(run, query, key, value, upstream.astype(dtype))
    expected = outputs_and_gradients(plain, query, key, value, upstream)
    assert_same(ours, expected, atol=1e-5 if dtype == "float32" else 0.06)


def test_window_of_the_mask_is_counted_in_positions():
    places = Places(jnp.array([[1, 1, 1, 1, 2, 2]]), jnp.array([[0, 1, 2, 3, 0, 1]]))
    ones_by_row = lambda **how: np.asarray(attention_mask(places, places, **how))[0].sum(1)  # noqa: E731
    np.testing.assert_array_equal(ones_by_row(causal=True, window=2), [1, 2, 2, 2, 1, 2])
    np.testing.assert_array_equal(ones_by_row(causal=False, window=2), [2, 3, 3, 2, 2, 2])
    np.testing.assert_array_equal(ones_by_row(causal=True, window=9), [1, 2, 3, 4, 1, 2])


def test_saved_attention_is_not_run_again():
    x, places = jnp.ones((1, 1, 256, 8)), rows_of([256])

    def loops(policy):
        def layer(x, scale):
            x = jnp.sin(x) * scale
            return blockwise.attention(F32, x, x, x, places, places, AttentionSpec()), None

        loss = lambda x: jax.lax.scan(remat(layer, policy), x, jnp.ones(3))[0].sum()  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(x).as_text().count("stablehlo.while")

    assert loops("attention") == loops("none")
    assert loops("full") == loops("none") + 1


@pytest.mark.parametrize("shared", [False, True])
def test_cudnn_lowers_to_its_custom_calls(monkeypatch, shared):
    found = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"
    monkeypatch.setattr(found, lambda: 91000)  # this machine has none to ask
    config = MeshConfig(data=2, fsdp=2, tensor=2) if shared else MeshConfig(data=1)
    rules = make_rules(config, make_mesh(config, jax.devices()[: 8 if shared else 1]))
    query, key, value, _ = arrays(4, 64, heads=4, kv_heads=2, head_dim=64, dtype="bfloat16")
    places, spec = rows_of(*[[64]] * 4), AttentionSpec(window=16)
    loss = lambda *inputs: cudnn.attention(*inputs, places, places, spec).astype("float32").sum()  # noqa: E731
    with use_rules(rules):
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(query, key, value)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "@__cudnn$fmhaScaleBiasSoftmax(" in text
    assert "@__cudnn$fmhaScaleBiasSoftmaxBackward(" in text
    assert re.search(r"sliding_window_length\\22: 16\b", text)
    assert re.search(r"mask_type\\22: \\22CAUSAL", text)


def pick(kernel="auto", platform="tpu", spec=AttentionSpec(), **changes):  # noqa: B008
    shape = {
        "length": 4096, "head_dim": 128, "num_heads": 8, "num_kv_heads": 2,
        "compute_dtype": "bfloat16", "context_shares": 1,
    }  # fmt: skip
    return choose(kernel, platform, spec, **shape | changes)


def test_auto_takes_the_platforms_kernel_where_it_can():
    assert pick() == "splash"
    assert pick(context_shares=8) == "splash"
    assert pick(length=4000) == "blockwise"
    assert pick(length=32) == "reference"
    assert pick(compute_dtype="float32") == "blockwise"
    assert pick(platform="gpu") == "cudnn"
    assert pick(platform="gpu", spec=AttentionSpec(window=64)) == "cudnn"
    assert pick(platform="gpu", spec=AttentionSpec(soft_cap=50.0)) == "blockwise"
    assert pick(platform="gpu", context_shares=2) == "blockwise"
    assert pick(platform="gpu", head_dim=100) == "blockwise"
    assert pick(platform="cpu") == "blockwise"
    assert pick(platform="cpu", length=32) == "reference"
    assert pick("reference", platform="tpu") == "reference"
    assert pick("blockwise", platform="cpu", length=31) == "blockwise"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"kernel": "splash", "platform": "cpu"},
            "needs a TPU.*choices here: blockwise, reference",
        ),
        ({"kernel": "splash", "length": 1000}, "multiple of 128.*896 or 1024"),
        ({"kernel": "splash", "length": 100}, "multiple of 128.*it is 100: 128 would do"),
        ({"kernel": "splash", "length": 4096 + 128, "context_shares": 4}, "512.*4096 or 4608"),
        ({"kernel": "splash", "compute_dtype": "float32"}, "multiplies in bfloat16"),
        ({"kernel": "cudnn"}, "needs a GPU, and this is 'tpu'.*of which 'splash' is the fastest"),
        (
            {"kernel": "cudnn", "platform": "gpu", "spec": AttentionSpec(soft_cap=30.0)},
            "no soft cap, and soft_cap is 30.0; .*'blockwise' is the fastest",
        ),
        (
            {"kernel": "cudnn", "platform": "gpu", "spec": AttentionSpec(False, 8)},
            "no window without a causal mask",
        ),
        ({"kernel": "cudnn", "platform": "gpu", "context_shares": 2}, "whole sequences"),
        ({"kernel": "flash"}, "'flash'; did you mean 'splash'.*choices: auto"),
        ({"num_kv_heads": 3}, "multiple of num_kv_heads 3"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(asked, message):
    with pytest.raises(ValueError, match=message) as error:
        pick(**asked)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", [{"window": 0}, {"soft_cap": 0.0}, {"soft_cap": -1.0}])
def test_spec_refuses_what_has_no_meaning(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} .*expected"):
        AttentionSpec(**wrong)
