"""Model FLOPs from shapes alone.

Counted are the matrix multiplications that an architecture needs, not what XLA executes, so
rematerialization, padding and a fused kernel's extra work lower the utilization and never raise it.
Source: PaLM (Chowdhery et al. 2022, arXiv:2204.02311), appendix B; docs/metrics.md has the formula.
"""

from collections.abc import Mapping

Shapes = Mapping[str, tuple[int, ...]]  # of a batch, by its keys


def transformer_flops(
    *,
    num_layers: int,
    embed_dim: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    mlp_dim: int,
    gated: bool,
    vocab_size: int | None,
    sequence_length: int,
    causal_half: bool,
    attention_window: int | None = None,
    global_every: int | None = None,
    memory_length: int | None = None,
) -> float:
    """Forward and backward FLOPs for one token of a decoder or encoder stack.

    With D embed, N query heads, K kv heads, H head dim, F mlp, V vocab, L layers, T length:

        3 * (L * (2*D*H*(N + 2*K)              query, key and value projections
                  + 2*N*H*S + 2*N*H*S          scores, values
                  + 2*N*H*D                    output projection
                  + 2*D*F*(3 if gated else 2)) MLP
             + 2*D*V)                          head

    A multiply-add is 2 FLOPs, the backward pass costs twice the forward. S = T, as in PaLM, or
    S = T/2 with `causal_half`, which counts only the scores that a causal mask keeps. Where a query
    sees the last `attention_window` = W < T positions, S = W, or the mean over the queries,
    W - W*(W - 1)/(2*T), with `causal_half`; with `global_every` = n that holds but for every n-th
    layer, which sees all. The embedding lookup, norms, softmax and activations
    are free, and so is a head where vocab_size is None. With `memory_length` = M a layer also attends to M
    tokens of an encoder: 4*D*H*N + 4*N*H*M, and its share, M/T, of their keys and values. For a mixture of experts, `mlp_dim` is the width one token uses: experts per token
    times the width of an expert.

    Returns:
      FLOPs per token.

    Raises:
      ValueError: a size is below 1, or the kv heads do not divide the heads.
    """
    sizes = {
        "num_layers": num_layers,
        "embed_dim": embed_dim,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "mlp_dim": mlp_dim,
        "sequence_length": sequence_length,
    }
    optional = {
        "vocab_size": vocab_size,
        "attention_window": attention_window,
        "global_every": global_every,
        "memory_length": memory_length,
    }
    sizes |= {name: size for name, size in optional.items() if size is not None}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} = {size}: must be at least 1")
    if num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads = {num_kv_heads}: must divide num_heads = {num_heads}")
    whole_layers = num_layers // global_every if global_every else 0
    windowed = keys_seen(sequence_length, attention_window, causal_half)
    whole = keys_seen(sequence_length, None, causal_half)
    seen = windowed + (whole - windowed) * whole_layers / num_layers
    projections = 2 * embed_dim * head_dim * (2 * num_heads + 2 * num_kv_heads)
    attention = 4 * num_heads * head_dim * seen
    mlp = 2 * embed_dim * mlp_dim * (3 if gated else 2)
    across = 0.0
    if memory_length is not None:
        across = 4 * num_heads * head_dim * (embed_dim + memory_length)
        across += 4 * embed_dim * head_dim * num_kv_heads * memory_length / sequence_length
    head = 2 * embed_dim * (vocab_size or 0)
    return float(3 * (num_layers * (projections + attention + across + mlp) + head))


def keys_seen(length: int, window: int | None, causal_half: bool) -> float:
    """Keys that a query of a sequence attends to, on average; with causal_half not those after it."""
    if window is None or window >= length:
        return length / 2 if causal_half else length
    return window - window * (window - 1) / (2 * length) if causal_half else window


def dense_flops(tokens: int, weights: int) -> float:
    """Forward and backward FLOPs of so many tokens through a matrix of so many weights."""
    return 6.0 * tokens * weights
