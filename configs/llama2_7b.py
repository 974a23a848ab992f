r"""Llama 2 7B, to the letter: full multi-head attention, vocabulary of 32,000.

Purpose:  pretraining at 7 B (Touvron et al. 2023b, section 2.2); exports to LlamaForCausalLM.
Hardware: 32 or more chips or GPUs of 80 GB: parameters, AdamW and gradients take 108 GB over all of them.
Expect:   500,000 steps of 4 M tokens for 2 T tokens; shorten train.num_steps to your budget.
Command:  python -m llm_jax.train --config configs/llama2_7b.py --workdir /mnt/runs/llama2_7b \
              --data '/mnt/texts/*.parquet' --config.data.tokenizer.path=tokenizer.json
          Going on from the published weights: --config.init_from=hf:/mnt/models/Llama-2-7b-hf
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
                "mlp_dim": 11_008,
                "max_length": 4096,
                "remat": "full",
            },
            "data": {
                "sequence_length": 4096,
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
            "train": {"num_steps": 500_000, "batch_size": 1024, "accumulate_steps": 4},
            "checkpoint": {"save_every": 1000, "keep_every": 50_000},
            "eval": {"every": 1000},
        }
    )  # fmt: skip
