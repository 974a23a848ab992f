r"""Gemma 2 9B, to the letter: windows of 4096 in every other layer, soft caps, norms before and after.

Purpose:  pretraining at 9 B (Gemma Team 2024, table 1); exports to Gemma2ForCausalLM. Its learning rate
          is not published.
Hardware: 64 or more chips or GPUs of 80 GB: parameters, AdamW and gradients take 148 GB over all of them.
Expect:   2,000,000 steps of 4 M tokens for 8 T tokens, as published; shorten train.num_steps to your budget.
Command:  python -m llm_jax.train --config configs/gemma2_9b.py --workdir /mnt/runs/gemma2_9b \
              --data '/mnt/texts/*.parquet' --config.data.tokenizer.path=tokenizer.json
          Going on from the published weights: --config.init_from=hf:/mnt/models/gemma-2-9b
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "model": {
                "name": "gpt",
                "vocab_size": 256_000,
                "embed_dim": 3584,
                "num_layers": 42,
                "num_heads": 16,
                "num_kv_heads": 8,
                "head_dim": 256,
                "mlp_dim": 14_336,
                "max_length": 8192,
                "activation": "gelu_tanh",
                "norm_epsilon": 1e-6,
                "norm_placement": "both",
                "norm_unit_offset": True,
                "scale_embeddings": True,
                "tie_embeddings": True,
                "attention_window": 4096,
                "global_every": 2,
                "attention_soft_cap": 50.0,
                "final_soft_cap": 30.0,
                "remat": "full",
            },
            "data": {
                "sequence_length": 8192,
                "tokenizer": {
                    "name": "huggingface",
                    "path": "tokenizer.json",
                    "bos_token": "<bos>",
                    "eos_token": "<eos>",
                    "pad_token": "<pad>",
                },
                "held_out_fraction": 0.0001,
            },
            "optimizer": {"name": "adamw", "beta2": 0.95, "weight_decay": 0.1},
            "schedule": {"name": "cosine", "learning_rate": 3e-4, "warmup_steps": 2000,
                         "final_fraction": 0.1},
            "mesh": {"data": 1, "fsdp": -1},
            "train": {"num_steps": 2_000_000, "batch_size": 512, "accumulate_steps": 4},
            "checkpoint": {"save_every": 1000, "keep_every": 50_000},
            "eval": {"every": 1000},
        }
    )  # fmt: skip
