"""A GPT of 5 M parameters on the source of the Python standard library, in minutes on a laptop.

Purpose:  see the whole way work, from raw text to a trained, evaluated and exported model.
Hardware: 2 CPU cores, 4 GB of memory.
Expect:   under 5 minutes in all; held-out bits per byte below those of gzip -9.
Command:  make train
          python -m llm_jax.train --config configs/gpt_tiny.py --workdir runs/gpt_tiny
          python -m llm_jax.train --config configs/gpt_tiny.py --workdir runs/mine --data my_texts/
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    vocab_size = 4096
    return ml_collections.ConfigDict(
        {
            "model": {
                "name": "gpt",
                "vocab_size": vocab_size,
                "embed_dim": 256,
                "num_layers": 4,
                "num_heads": 4,
                "num_kv_heads": 4,
                "mlp_dim": 704,
                "max_length": 512,
                "qk_norm": True,
                "scan_unroll": 4,
            },
            "data": {
                "sources": [{"name": "text", "path": "python:stdlib"}],
                "tokenizer": {"name": "sentencepiece", "vocab_size": vocab_size},
                "sequence_length": 256,
                "held_out_fraction": 0.03,
            },
            "optimizer": {"name": "muon", "weight_decay": 0.01},
            "schedule": {
                "name": "linear",
                "learning_rate": 4e-3,
                "warmup_steps": 20,
                "final_fraction": 0.02,
            },
            "train": {"num_steps": 700, "batch_size": 8, "compute_dtype": "bfloat16"},
            "checkpoint": {"save_every": 250},
            "eval": {"every": 100, "sample_prompts": ["def main("]},
        }
    )
