r"""A mixture of experts of 6.9 B parameters, 1.3 B of them at work for each token; the sizes of OLMoE.

Purpose:  more quality per FLOP than a dense model (Muennighoff et al. 2024); 64 experts, 8 per token.
          Query and key are normed head by head, as in Qwen3; OLMoE norms all heads together.
Hardware: 64 or more TPU chips, or GPUs with 80 GB; compiled for 64 chips of v5p it takes 14 GB of each one's
          95, of which 1.3 are parameters and optimizer state (83 GB over all).
Expect:   25,000 steps of 2^22 tokens, 8.2e20 FLOPs: 80 tokens for each active parameter; OLMoE's own 5 T
          tokens are 1,200,000 steps.
Command:  python -m llm_jax.train --config configs/moe_7b.py --workdir /mnt/runs/moe_7b \
              --data '/mnt/texts/*.jsonl.zst' --config.mesh.expert=8
          Keep the expert axis within the fast links: a slice, or the 8 GPUs of a host.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    vocab_size = 50_304
    return ml_collections.ConfigDict(
        {
            "model": {
                "name": "gpt",
                "vocab_size": vocab_size,
                "embed_dim": 2048,
                "num_layers": 16,
                "num_heads": 16,
                "experts": {
                    "num_experts": 64,
                    "mlp_dim": 1024,
                    "experts_per_token": 8,
                    "normalize_weights": False,
                },
                "max_length": 4096,
                "qk_norm": True,
                "remat": "full",
            },
            "data": {
                "sequence_length": 4096,
                "tokenizer": {"name": "sentencepiece", "vocab_size": vocab_size},
                "held_out_fraction": 0.0005,
            },
            "optimizer": {"name": "adamw", "beta2": 0.95, "weight_decay": 0.1},
            "schedule": {"name": "cosine", "learning_rate": 4e-4, "warmup_steps": 2500,
                         "final_fraction": 0.1},
            "mesh": {"data": 1, "fsdp": -1},
            "train": {"num_steps": 25_000, "batch_size": 1024, "accumulate_steps": 4},
            "objective": {"name": "causal_lm", "z_loss": 1e-5},
            "checkpoint": {"save_every": 500, "keep_every": 5000},
            "eval": {"every": 500},
        }
    )  # fmt: skip
