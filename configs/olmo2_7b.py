r"""OLMo 2 7B, to the letter: norms behind attention and MLP, queries and keys normed over all heads.

Purpose:  pretraining at 7 B with an open recipe (OLMo Team 2024, section 2); exports to Olmo2ForCausalLM.
Hardware: 32 or more chips or GPUs of 80 GB: parameters, AdamW and gradients take 117 GB over all of them.
Expect:   928,646 steps of 4 M tokens for 3.9 T tokens, as published; shorten train.num_steps to your budget.
Command:  python -m llm_jax.train --config configs/olmo2_7b.py --workdir /mnt/runs/olmo2_7b \
              --data '/mnt/texts/*.parquet' --config.data.tokenizer.path=tokenizer.json
          Going on from the published weights: --config.init_from=hf:/mnt/models/OLMo-2-1124-7B
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "model": {
                "name": "gpt",
                "vocab_size": 100_352,
                "embed_dim": 4096,
                "num_layers": 32,
                "num_heads": 32,
                "mlp_dim": 11_008,
                "max_length": 4096,
                "norm_epsilon": 1e-6,
                "norm_placement": "output",
                "qk_norm": True,
                "qk_norm_over": "all_heads",
                "rope_theta": 500_000.0,
                "remat": "full",
            },
            "data": {
                "sequence_length": 4096,
                "tokenizer": {
                    "name": "huggingface",
                    "path": "tokenizer.json",
                    "bos_token": "<|endoftext|>",
                    "eos_token": "<|endoftext|>",
                    "pad_token": "<|pad|>",
                },
                "held_out_fraction": 0.0001,
            },
            "optimizer": {"name": "adamw", "beta2": 0.95, "weight_decay": 0.1},
            "schedule": {"name": "cosine", "learning_rate": 3e-4, "warmup_steps": 2000,
                         "final_fraction": 0.1},
            "mesh": {"data": 1, "fsdp": -1},
            "train": {"num_steps": 928_646, "batch_size": 1024, "accumulate_steps": 4},
            "objective": {"name": "causal_lm", "z_loss": 1e-5},
            "checkpoint": {"save_every": 1000, "keep_every": 50_000},
            "eval": {"every": 1000},
        }
    )  # fmt: skip
