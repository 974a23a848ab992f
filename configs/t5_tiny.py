r"""A small T5 on the source of the Python standard library: span corruption.

Purpose:  see an encoder-decoder learn from raw text in minutes.
Hardware: 2 CPU cores, 4 GB of memory.
Expect:   under 10 minutes; figures in docs/results.md.
Command:  make results NAME=t5_span
          python -m llm_jax.train --config configs/t5_tiny.py --workdir runs/t5
          The mixture of UL2 instead: tokenizer.extra_tokens with its prefixes, and
          objective.denoisers = llm_jax.objectives.span_corruption.UL2.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    vocab_size = 4096
    return ml_collections.ConfigDict(
        {
            "model": {
                "name": "encoder_decoder",
                "vocab_size": vocab_size,
                "embed_dim": 256,
                "num_layers": 4,
                "num_heads": 4,
                "mlp_dim": 704,
                "max_length": 256,
                "position": "relative",
                "norm": "rmsnorm",
                "norm_bias": False,
                "norm_placement": "pre",
                "activation": "gelu_tanh",
                "gated": True,
                "attention_bias": False,
                "mlp_bias": False,
                "scale_embeddings": False,
                "tie_embeddings": False,
                "scan_unroll": 4,
            },
            "data": {
                "sources": [{"name": "text", "path": "python:stdlib"}],
                "tokenizer": {
                    "name": "sentencepiece",
                    "vocab_size": vocab_size,
                    "extra_tokens": tuple(f"<extra_id_{i}>" for i in range(32)),
                },
                "sequence_length": 256,
                "held_out_fraction": 0.03,
            },
            "objective": {"name": "span_corruption"},
            "optimizer": {"name": "muon", "weight_decay": 0.01},
            "schedule": {"name": "linear", "learning_rate": 3e-3, "warmup_steps": 50,
                         "final_fraction": 0.02},
            "train": {"num_steps": 750, "batch_size": 8, "compute_dtype": "bfloat16"},
            "checkpoint": {"save_every": 250},
            "eval": {"every": 250},
        }
    )  # fmt: skip
