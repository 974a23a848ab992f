r"""A small BERT on the source of the Python standard library: masked tokens, and pairs of texts.

Purpose:  see masked-LM pretraining work in minutes, beside what always guessing the commonest token gives.
Hardware: 2 CPU cores, 4 GB of memory.
Expect:   7 minutes for each kind of pair; figures in docs/results.md.
Command:  make results NAME=bert_nsp      (next sentence)
          make results NAME=bert_sop      (and from there sentence order, which by itself is not learned)
          python -m llm_jax.train --config configs/bert_tiny.py --workdir runs/nsp
          python -m llm_jax.train --config configs/bert_tiny.py --workdir runs/sop \
              --config.objective.pairs=sentence_order --config.init_from=runs/nsp
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    vocab_size = 4096
    return ml_collections.ConfigDict(
        {
            "model": {
                "name": "bert",
                "vocab_size": vocab_size,
                "embed_dim": 128,
                "num_layers": 3,
                "num_heads": 4,
                "mlp_dim": 512,
                "num_positions": 64,
                "scan_unroll": 3,
            },
            "data": {
                "sources": [{"name": "text", "path": "python:stdlib"}],
                "tokenizer": {
                    "name": "sentencepiece",
                    "vocab_size": vocab_size,
                    "extra_tokens": ("[MASK]",),
                },
                "sequence_length": 64,
                "held_out_fraction": 0.03,
            },
            "objective": {"name": "masked_lm", "pairs": "next_sentence"},
            "optimizer": {"name": "muon", "weight_decay": 0.01},
            "schedule": {"name": "linear", "learning_rate": 3e-3, "warmup_steps": 100,
                         "final_fraction": 0.02},
            "train": {"num_steps": 3000, "batch_size": 64, "compute_dtype": "bfloat16"},
            "checkpoint": {"save_every": 1000},
            "eval": {"every": 500},
        }
    )  # fmt: skip
