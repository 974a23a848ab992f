r"""LoRA fine-tuning on chats made of doc strings: a signature asks, the first line of its doc string answers.

Purpose:  supervised fine-tuning that leaves what the base can do as it is.
Hardware: 2 CPU cores, 4 GB of memory.
Expect:   a few minutes after the base, which is gpt_tiny.py with the marks of a chat in its tokenizer.
Command:  make results NAME=sft_docstrings
          which trains the base and makes the chats. With your own: --config.init_from=WORKDIR of the base,
          --config.data.tokenizer.path=WORKDIR/data/tokenizer/tokenizer.model, --data chats.jsonl of {"messages"}.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    folder = "runs/results/sft_docstrings"
    return ml_collections.ConfigDict(
        {
            "init_from": f"{folder}/base",
            "model": {
                "name": "gpt",
                "vocab_size": 4096,
                "embed_dim": 256,
                "num_layers": 4,
                "num_heads": 4,
                "num_kv_heads": 4,
                "mlp_dim": 704,
                "max_length": 512,
                "qk_norm": True,
                "scan_unroll": 4,
            },
            "transforms": [
                {"name": "lora", "rank": 16, "alpha": 16.0, "targets": ("stack.layers.*",)}
            ],
            "data": {
                "sources": [{"name": "jsonl", "path": f"{folder}/records/docstrings.jsonl"}],
                "tokenizer": {
                    "name": "sentencepiece",
                    "vocab_size": 4096,
                    "path": f"{folder}/base/data/tokenizer/tokenizer.model",
                },
                "sequence_length": 256,
                "held_out_fraction": 0.05,
            },
            "objective": {"name": "sft", "truncate": True},
            "optimizer": {"name": "adamw", "beta2": 0.99, "weight_decay": 0.0},
            "schedule": {"name": "linear", "learning_rate": 2e-4, "warmup_steps": 20,
                         "final_fraction": 0.02},
            "train": {"num_steps": 200, "batch_size": 16, "compute_dtype": "bfloat16"},
            "checkpoint": {"save_every": 100},
            "eval": {"every": 50},
        }
    )  # fmt: skip
