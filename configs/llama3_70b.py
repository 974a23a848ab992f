r"""Llama 3 70B, to the letter: 80 layers of width 8192, grouped queries, vocabulary of 128,256.

Purpose:  pretraining at 70 B (Grattafiori et al. 2024, table 3); exports to LlamaForCausalLM.
Hardware: 256 or more TPU chips of any generation since v5e, or 128 or more GPUs of 80 GB: one row of 8192
          tokens at a time on each of 256 chips; raise train.accumulate_steps on fewer. The 16 GB of a v5e
          need, on 256 of them, --config.model.remat=offload --config.mesh.fsdp=128 --config.mesh.tensor=2
          --config.train.accumulate_steps=8.
Expect:   docs/planner.md has memory, step time and price on v5e, v5p, v6e and tpu7x; for your own slice:
          python -m llm_jax.plan --config configs/llama3_70b.py --topology v5p:8x8x8 --tokens 15t
Command:  python -m llm_jax.train --config configs/llama3_70b.py --workdir /mnt/runs/llama3_70b \
              --data '/mnt/texts/*.parquet' --config.data.tokenizer.path=tokenizer.json
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "model": {
                "name": "gpt",
                "vocab_size": 128_256,
                "embed_dim": 8192,
                "num_layers": 80,
                "num_heads": 64,
                "num_kv_heads": 8,
                "mlp_dim": 28_672,
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
            "schedule": {"name": "cosine", "learning_rate": 1.5e-4, "warmup_steps": 8000,
                         "final_fraction": 0.01},
            "mesh": {"data": 1, "fsdp": -1},
            "train": {"num_steps": 1_000_000, "batch_size": 1024, "accumulate_steps": 4},
            "checkpoint": {"save_every": 1000, "keep_every": 50_000},
            "eval": {"every": 1000},
        }
    )  # fmt: skip
