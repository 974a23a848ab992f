r"""Qwen3 8B, to the letter: grouped queries, queries and keys normed head by head.

Purpose:  pretraining at 8 B (Yang et al. 2025, table 1); exports to Qwen3ForCausalLM. Its learning rate is not
          published.
Hardware: 64 or more chips or GPUs of 80 GB: parameters, AdamW and gradients take 131 GB over all of them.
Expect:   2,000,000 steps of 4 M tokens for 8 T of its 36 T tokens; rows of 4096 tokens, as in its first stage.
Command:  python -m llm_jax.train --config configs/qwen3_8b.py --workdir /mnt/runs/qwen3_8b \
              --data '/mnt/texts/*.parquet' --config.data.tokenizer.path=tokenizer.json
          Going on from the published weights: --config.init_from=hf:/mnt/models/Qwen3-8B-Base
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "model": {
                "name": "gpt",
                "vocab_size": 151_936,
                "embed_dim": 4096,
                "num_layers": 36,
                "num_heads": 32,
                "num_kv_heads": 8,
                "head_dim": 128,
                "mlp_dim": 12_288,
                "max_length": 32_768,
                "norm_epsilon": 1e-6,
                "qk_norm": True,
                "rope_theta": 1_000_000.0,
                "remat": "full",
            },
            "data": {
                "sequence_length": 4096,
                "tokenizer": {
                    "name": "huggingface",
                    "path": "tokenizer.json",
                    "bos_token": "<|endoftext|>",
                    "eos_token": "<|endoftext|>",
                },
                "held_out_fraction": 0.0001,
            },
            "optimizer": {"name": "adamw", "beta2": 0.95, "weight_decay": 0.1},
            "schedule": {"name": "cosine", "learning_rate": 3e-4, "warmup_steps": 2000,
                         "final_fraction": 0.1},
            "mesh": {"data": 1, "fsdp": -1},
            "train": {"num_steps": 2_000_000, "batch_size": 1024, "accumulate_steps": 4},
            "checkpoint": {"save_every": 1000, "keep_every": 50_000},
            "eval": {"every": 1000},
        }
    )  # fmt: skip
