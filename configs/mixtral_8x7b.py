r"""Mixtral 8x7B, to the letter: 46.7 B parameters, 12.9 B of them at work for each token.

Purpose:  pretraining of a mixture of 8 experts, 2 per token (Jiang et al. 2024, table 1); exports to
          MixtralForCausalLM. Its training recipe is not published: learning rate and batch are Llama 2's.
Hardware: 128 or more chips or GPUs of 80 GB: parameters, AdamW and gradients take 747 GB over all of them.
Expect:   500,000 steps of 4 M tokens for 2 T tokens; shorten train.num_steps to your budget.
Command:  python -m llm_jax.train --config configs/mixtral_8x7b.py --workdir /mnt/runs/mixtral_8x7b \
              --data '/mnt/texts/*.parquet' --config.data.tokenizer.path=tokenizer.json --config.mesh.expert=8
          Keep the expert axis within the fast links: a slice, or the 8 GPUs of a host.
          Going on from the published weights: --config.init_from=hf:/mnt/models/Mixtral-8x7B-v0.1
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
                "experts": {
                    "num_experts": 8,
                    "mlp_dim": 14_336,
                    "experts_per_token": 2,
                    "load_balance": 0.02,
                },
                "max_length": 32_768,
                "rope_theta": 1_000_000.0,
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
