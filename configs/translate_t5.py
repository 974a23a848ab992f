r"""A small T5 translates number words: English to Chinese, French or German.

Purpose:  as translate_transformer.py, with T5's choices (1.1): relative positions, pre-norm, gated GELU.
Hardware: 2 CPU cores, 2 GB of memory; extra `results`.
Expect:   under 10 minutes; more than 95 % of unseen numbers right, see docs/results.md.
Command:  make results NAME=translate_t5
          python -m llm_jax.train --config configs/translate_t5.py --workdir runs/en_de \
              --config.data.sources.0.path=en-de
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    vocab_size = 640
    return ml_collections.ConfigDict(
        {
            "model": {
                "name": "encoder_decoder",
                "vocab_size": vocab_size,
                "embed_dim": 128,
                "num_layers": 3,
                "num_heads": 4,
                "mlp_dim": 344,
                "max_length": 128,
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
                "scan_unroll": 3,
                "init_stddev": 0.06,
            },
            "data": {
                "sources": [{"name": "number_words", "path": "en-zh", "max_number": 999_999_999}],
                "tokenizer": {
                    "name": "sentencepiece",
                    "vocab_size": vocab_size,
                    "split_words": True,
                    "scan_bytes": 4_000_000,
                },
                "sequence_length": 48,
                "held_out_fraction": 0.001,
            },
            "objective": {"name": "seq2seq", "target_length": 48},
            "optimizer": {"name": "adamw", "beta2": 0.98, "weight_decay": 0.0},
            "schedule": {"name": "linear", "learning_rate": 2e-3, "warmup_steps": 200,
                         "final_fraction": 0.02},
            "train": {"num_steps": 900, "batch_size": 64, "compute_dtype": "float32"},
            "checkpoint": {"save_every": 900},
            "eval": {"every": 300, "max_batches": 8, "num_beams": 4},
        }
    )  # fmt: skip
