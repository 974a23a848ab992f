r"""Gemma 3 4B's text model, to the letter: five layers with a window of 1024, then one that sees all.

Purpose:  pretraining at 4 B for long contexts (Gemma Team 2025, section 2); exports to Gemma3ForCausalLM, of
          model_type gemma3_text. The released 4B also sees images: that half is not in here. Its learning
          rate is not published.
Hardware: 32 or more chips or GPUs of 80 GB: parameters, AdamW and gradients take 62 GB over all of them.
Expect:   1,000,000 steps of 4 M tokens for 4 T tokens, as published; in rows of 8192 tokens, where the original's
          had 32,768 and in the end 131,072.
Command:  python -m llm_jax.train --config configs/gemma3_4b.py --workdir /mnt/runs/gemma3_4b \
              --data '/mnt/texts/*.parquet' --config.data.tokenizer.path=tokenizer.json
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "model": {
                "name": "gpt",
                "vocab_size": 262_208,
                "embed_dim": 2560,
                "num_layers": 34,
                "num_heads": 8,
                "num_kv_heads": 4,
                "head_dim": 256,
                "mlp_dim": 10_240,
                "max_length": 131_072,
                "activation": "gelu_tanh",
                "norm_epsilon": 1e-6,
                "norm_placement": "both",
                "norm_unit_offset": True,
                "scale_embeddings": True,
                "tie_embeddings": True,
                "qk_norm": True,
                "attention_window": 1024,
                "global_every": 6,
                "rope_theta": 1_000_000.0,
                "rope_scaling": {"kind": "linear", "factor": 8.0},
                "local_rope_theta": 10_000.0,
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
            "train": {"num_steps": 1_000_000, "batch_size": 512, "accumulate_steps": 4},
            "checkpoint": {"save_every": 1000, "keep_every": 50_000},
            "eval": {"every": 1000},
        }
    )  # fmt: skip
