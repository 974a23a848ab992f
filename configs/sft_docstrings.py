r"""LoRA fine-tuning on chats made of doc strings: a signature asks, the first line of its doc string answers.

Purpose:  supervised fine-tuning that leaves what the base can do as it is.
Hardware: 2 CPU cores, 4 GB of memory.
Expect:   a few minutes after the base, which is gpt_tiny.py with the marks of a chat in its tokenizer.
Command:  make results NAME=sft_docstrings
          By hand: --config.init_from=WORKDIR of the base, --data chats.jsonl of {"messages"}.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    vocab_size = 4096
    return ml_collections.ConfigDict(
        {
            "init_from": None,
            "model": {},
            "transforms": [
                {"name": "lora", "rank": 16, "alpha": 16.0, "targets": ("stack.layers.*",)}
            ],
            "data": {
                "sources": [{"name": "jsonl", "path": None}],
                "tokenizer": {"name": "sentencepiece", "vocab_size": vocab_size, "path": None},
                "sequence_length": 256,
                "held_out_fraction": 0.05,
            },
            "objective": {"name": "sft", "examples_per_row": 1, "truncate": True},
            "optimizer": {"name": "adamw", "beta2": 0.99, "weight_decay": 0.0},
            "schedule": {"name": "linear", "learning_rate": 1e-3, "warmup_steps": 20,
                         "final_fraction": 0.02},
            "train": {"num_steps": 400, "batch_size": 16, "compute_dtype": "bfloat16"},
            "checkpoint": {"save_every": 200},
            "eval": {"every": 100},
        }
    )  # fmt: skip
