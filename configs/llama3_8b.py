r"""Llama 3 8B, to the letter: grouped queries, vocabulary of 128,256, theta 500,000.

Purpose:  pretraining at 8 B (Grattafiori et al. 2024, table 3); exports to LlamaForCausalLM.
Hardware: 64 or more chips or GPUs of 80 GB: on 64 TPU v5p, four rows of 8192 tokens at a time take 18.8 GB
          of each chip's 95 (compiled); on fewer or smaller ones raise train.accumulate_steps.
Expect:   1,000,000 steps of 8 M tokens for 8 T tokens; shorten train.num_steps to your budget.
Command:  python -m llm_jax.train --config configs/llama3_8b.py --workdir /mnt/runs/llama3 \
              --data '/mnt/texts/*.parquet' --config.data.tokenizer.path=tokenizer.json
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "model": {
                "name": "gpt",
                "vocab_size": 128_256,
                "embed_dim": 4096,
                "num_layers": 32,
                "num_heads": 32,
                "num_kv_heads": 8,
                "mlp_dim": 14_336,
                "max_length": 8192,
                "rope_theta": 500_000.0,
                "remat": "full",
            },
            "data": {
                "sequence_length": 8192,
                "tokenizer": {
                    "name": "huggingface",
                    "path": "tokenizer.json",
                    "bos_token": "<|begin_of_text|>",
                    "eos_token": "<|end_of_text|>",
                },
                "held_out_fraction": 0.0001,
            },
            "optimizer": {"name": "adamw", "beta2": 0.95, "weight_decay": 0.1},
            "schedule": {"name": "cosine", "learning_rate": 3e-4, "warmup_steps": 8000,
                         "final_fraction": 0.01},
            "mesh": {"data": 1, "fsdp": -1},
            "train": {"num_steps": 1_000_000, "batch_size": 1024, "accumulate_steps": 4},
            "checkpoint": {"save_every": 1000, "keep_every": 50_000},
            "eval": {"every": 1000},
        }
    )  # fmt: skip
