"""A Llama-style GPT of 1.4 B parameters, trained for the compute-optimal 26 B tokens.

Purpose:  the first size that is worth a pod; the starting point for runs of your own.
Hardware: 16 to 256 TPU chips, or 8 to 64 GPUs with 80 GB; parameters lie in shares over all (fsdp).
Expect:   25,000 steps of 2^20 tokens, 2.3e20 FLOPs: 16 chips that reach 50% of 459 TFLOP/s take 18 hours.
Command:  python -m llm_jax.train --config configs/gpt_1b.py --workdir /mnt/runs/gpt_1b --data '/mnt/texts/*.jsonl.zst'
          with --config.mesh.tensor=4 for long sequences, --config.train.accumulate_steps=4 for fewer chips
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    vocab_size = 32_768
    return ml_collections.ConfigDict(
        {
            "model": {
                "name": "gpt",
                "vocab_size": vocab_size,
                "embed_dim": 2048,
                "num_layers": 24,
                "num_heads": 16,
                "num_kv_heads": 16,
                "mlp_dim": 5632,
                "max_length": 2048,
                "remat": "attention",
            },
            "data": {
                "sequence_length": 2048,
                "tokenizer": {"name": "sentencepiece", "vocab_size": vocab_size},
                "held_out_fraction": 0.001,
            },
            "optimizer": {"name": "adamw", "beta2": 0.95, "weight_decay": 0.1},
            "schedule": {"name": "cosine", "learning_rate": 3e-4, "warmup_steps": 1000},
            "mesh": {"data": 1, "fsdp": -1},
            "train": {"num_steps": 25_000, "batch_size": 512},
            "objective": {"name": "causal_lm", "z_loss": 1e-4},
            "checkpoint": {"save_every": 500, "keep_every": 5000},
            "eval": {"every": 500},
        }
    )
