"""Which attention kernel runs, and the one call for all of them.

| kernel    | runs on | what is special                                                             |
|-----------|---------|-----------------------------------------------------------------------------|
| splash    | TPU     | bfloat16, T per share of the sequence a multiple of 128                     |
| cudnn     | GPU     | bfloat16, no soft cap, whole sequences, a window only where causal          |
| blockwise | all     | memory grows with T                                                         |
| reference | all     | memory grows with T * S; any mask, any lengths, so caches of generation too |

All see the same keys: those of the query's segment that AttentionSpec leaves. The kernels other than
the reference skip blocks by index in the row, so in them the positions of a segment must follow each
other. What padding (segment 0) gives is finite, and differs between kernels.
"""

from collections.abc import Callable

import jax

from llm_jax.core.config import nearest
from llm_jax.nn.kernels import blockwise, reference
from llm_jax.nn.kernels.spec import AttentionSpec, Kernel, Layout
from llm_jax.nn.mask import Places, attention_mask
from llm_jax.nn.precision import Precision

__all__ = ["AttentionSpec", "Kernel", "Layout", "attention", "choose", "layout"]

# From which length blocks beat the whole square in a training step. On 2 CPU cores (bench.train_step's
# model): float32 1.03 times at 256; bfloat16 0.9 times at 256 and 512, 1.4 to 1.5 times at 1024. On
# accelerators, where it stands in for other kernels only: two of its blocks.
BLOCKWISE_FROM = {("cpu", "float32"): 256}
BLOCKWISE_FROM_ELSEWHERE = 1024
# The fastest first.
_KERNELS = ("splash", "cudnn", "blockwise", "reference")


def choose(
    kernel: Kernel,
    platform: str,
    spec: AttentionSpec,
    *,
    length: int,
    head_dim: int,
    num_heads: int,
    num_kv_heads: int,
    compute_dtype: str,
    context_shares: int,
) -> Kernel:
    """The kernel that runs self-attention of this shape; never "auto".

    "auto" takes the platform's own kernel where it can run, else blockwise for long rows and the
    reference for short ones; see BLOCKWISE_FROM.

    Args:
      platform: "cpu", "gpu" or "tpu".
      length: T of a whole row, in `context_shares` shares; a symbol of jax.export for "reference" only.

    Raises:
      ValueError: a kernel that cannot run here: why, which can, and which of them is the fastest.
    """
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads {num_heads} must be a multiple of num_kv_heads {num_kv_heads}")
    if kernel not in ("auto", *_KERNELS):
        raise ValueError(
            f"attention kernel {kernel!r}{nearest(kernel, _KERNELS)}; "
            f"choices: auto, {', '.join(_KERNELS)}"
        )
    if kernel == "reference":  # runs everywhere; the length may be a symbol then
        return kernel
    obstacles = {
        "splash": _splash_obstacle(platform, length, head_dim, compute_dtype, context_shares),
        "cudnn": _cudnn_obstacle(platform, spec, length, head_dim, compute_dtype, context_shares),
    }
    possible = [name for name in _KERNELS if obstacles.get(name) is None]
    if length < BLOCKWISE_FROM.get((platform, compute_dtype), BLOCKWISE_FROM_ELSEWHERE):
        possible.sort(key=lambda name: name == "blockwise")
    if kernel == "auto":
        return possible[0]
    if kernel not in possible:
        raise ValueError(
            f"attention kernel {kernel!r} {obstacles[kernel]}; choices here: "
            f"{', '.join(possible)}, of which {possible[0]!r} is the fastest"
        )
    return kernel


def _splash_obstacle(platform, length, head_dim, compute_dtype, context_shares) -> str | None:
    if platform != "tpu":
        return f"needs a TPU, and this is {platform!r}"
    if compute_dtype != "bfloat16":
        return f"multiplies in bfloat16, and compute_dtype is {compute_dtype!r}"
    unit = 128 * context_shares
    if length % unit:
        return (
            f"needs a sequence length that is a multiple of {unit} (128 for each of "
            f"{context_shares} shares), and it is {length}: {_multiples(length, unit)} would do"
        )
    if head_dim % 8:
        return f"needs a head_dim that is a multiple of 8, and it is {head_dim}"
    return None


def _cudnn_obstacle(platform, spec, length, head_dim, compute_dtype, context_shares) -> str | None:
    if platform != "gpu":
        return f"needs a GPU, and this is {platform!r}"
    if compute_dtype != "bfloat16":
        return f"needs compute_dtype 'bfloat16', and it is {compute_dtype!r}"
    most = _cudnn_head_dim()
    if head_dim > most or head_dim % 8:
        return f"needs a head_dim that is a multiple of 8 up to {most}, and it is {head_dim}"
    if spec.soft_cap is not None:
        return f"has no soft cap, and soft_cap is {spec.soft_cap}"
    if spec.window is not None and not spec.causal:
        return f"has no window without a causal mask, and the window is {spec.window}"
    if context_shares > 1:
        return f"needs whole sequences, and mesh.context cuts them into {context_shares} shares"
    if length % 2:
        return f"needs an even sequence length, and it is {length}"
    return None


def _cudnn_head_dim() -> int:
    """256 from Hopper on, 128 before it and where no GPU can be asked."""
    capability = getattr(jax.devices()[0], "compute_capability", "0")
    return 256 if float(capability) >= 9 else 128


def _multiples(length: int, unit: int) -> str:
    below = length // unit * unit
    return f"{below} or {below + unit}" if below else f"{unit}"


def layout(kernel: Kernel) -> Layout:
    """The order of the axes of query, key, value and output in `attention`."""
    return "bnth" if kernel in ("splash", "blockwise") else "btnh"


def attention(
    kernel: Kernel,
    precision: Precision,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    queries: Places,
    keys: Places,
    spec: AttentionSpec,
) -> jax.Array:
    """Softmax attention by a kernel that `choose` gave.

    Args:
      query: [B, T, N, H], key and value: [B, S, K, H] for layout "btnh", [B, N, T, H] and
        [B, K, S, H] for "bnth"; N is a multiple of K, and S = T except in the reference.
      queries, keys: of the T and the S tokens.

    Returns:
      The output in the layout of the query and the compute dtype. Its name for rematerialization is
      "attention", which is also that of the softmax statistics of splash and blockwise: where the
      name is kept, their forward pass does not run again.

    Raises:
      ValueError: a size that does not divide over the active mesh.
    """
    if kernel == "reference":
        mask = attention_mask(queries, keys, causal=spec.causal, window=spec.window)
        return reference.dot_product_attention(precision, query, key, value, mask, spec.soft_cap)
    arrays = (precision.cast(x) for x in (query, key, value))
    return _kernel(kernel, precision)(*arrays, queries, keys, spec)


def _kernel(kernel: Kernel, precision: Precision) -> Callable[..., jax.Array]:
    if kernel == "splash":
        from llm_jax.nn.kernels import splash  # loads the compiler of TPU kernels

        return splash.attention
    if kernel == "cudnn":
        from llm_jax.nn.kernels import cudnn

        return cudnn.attention
    return lambda *arguments: blockwise.attention(precision, *arguments)
