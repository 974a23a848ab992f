r"""Mistral 7B (v0.1), to the letter: grouped queries, each layer sees 4096 positions.

Purpose:  pretraining at 7 B with a sliding window (Jiang et al. 2023, table 1); exports to MistralForCausalLM.
          Its training recipe is not published: learning rate and batch are those of Llama 2 7B.
Hardware: 32 or more chips or GPUs of 80 GB: parameters, AdamW and gradients take 116 GB over all of them.
Expect:   500,000 steps of 4 M tokens for 2 T tokens; shorten train.num_steps to your budget.
Command:  python -m llm_jax.train --config configs/mistral_7b.py --workdir /mnt/runs/mistral_7b \
              --data '/mnt/texts/*.parquet' --config.data.tokenizer.path=tokenizer.json
          Going on from the published weights: --config.init_from=hf:/mnt/models/Mistral-7B-v0.1
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "model": {
                "name": "gpt",
                "vocab_size": 32_000,
                "embed_dim": 4096,
                "num_layers": 32,
                "num_heads": 32,
                "num_kv_heads": 8,
                "mlp_dim": 14_336,
                "max_length": 32_768,
                "attention_window": 4096,
                "remat": "full",
            },
            "data": {
                "sequence_length": 8192,
                "tokenizer": {
                    "name": "huggingface",
                    "path": "tokenizer.json",
                    "bos_token": "<s>",
                    "eos_token": "</s>",
                },
                "held_out_fraction": 0.0001,
            },
            "optimizer": {"name": "adamw", "beta2": 0.95, "weight_decay": 0.1},
            "schedule": {"name": "cosine", "learning_rate": 3e-4, "warmup_steps": 2000,
                         "final_fraction": 0.1},
            "mesh": {"data": 1, "fsdp": -1},
            "train": {"num_steps": 500_000, "batch_size": 512, "accumulate_steps": 4},
            "checkpoint": {"save_every": 1000, "keep_every": 50_000},
            "eval": {"every": 1000},
        }
    )  # fmt: skip
