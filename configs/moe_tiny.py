r"""gpt_tiny.py with a mixture of experts: 2 of 8 for each token, together as wide as its MLP.

Purpose:  what experts give at the same active FLOPs, on a laptop.
Hardware: 2 CPU cores, 4 GB of memory.
Expect:   9 minutes, over half of them for Muon on all experts (AdamW: 4); figures in docs/results.md.
Command:  make results NAME=moe_tiny
          python -m llm_jax.train --config configs/moe_tiny.py --workdir runs/moe_tiny
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    vocab_size = 4096
    return ml_collections.ConfigDict(
        {
            "model": {
                "name": "gpt",
                "vocab_size": vocab_size,
                "embed_dim": 256,
                "num_layers": 4,
                "num_heads": 4,
                "experts": {"num_experts": 8, "mlp_dim": 352, "experts_per_token": 2},
                "max_length": 512,
                "qk_norm": True,
                "scan_unroll": 4,
            },
            "data": {
                "sources": [{"name": "text", "path": "python:stdlib"}],
                "tokenizer": {"name": "sentencepiece", "vocab_size": vocab_size},
                "sequence_length": 256,
                "held_out_fraction": 0.03,
            },
            "optimizer": {"name": "muon", "weight_decay": 0.01},
            "schedule": {
                "name": "linear",
                "learning_rate": 4e-3,
                "warmup_steps": 20,
                "final_fraction": 0.02,
            },
            "train": {"num_steps": 500, "batch_size": 8, "compute_dtype": "bfloat16"},
            "checkpoint": {"save_every": 250},
            "eval": {"every": 100, "sample_prompts": ["def main("]},
        }
    )
