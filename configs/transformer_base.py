r"""The Transformer of 2017, base: 6 and 6 layers of 512, one vocabulary of 37,000 for both languages.

Purpose:  translation from pairs of sentences (Vaswani et al. 2017, sections 5 and 6.1, table 3).
Hardware: 8 GPUs of 16 GB, as published, or one of 80 GB with train.accumulate_steps=4.
Expect:   100,000 steps of about 25,000 tokens on each side; 27.3 BLEU on WMT 2014 English to German, as published.
Command:  python -m llm_jax.train --config configs/transformer_base.py --workdir /mnt/runs/transformer \
              --data '/mnt/pairs/*.jsonl'
          The lines are {"source": ..., "target": ...}; leave out pairs with more than 128 pieces on a side.
          MarianMTModel has a bias on its logits: --config.model.head_bias=true makes an export possible.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    embed_dim = 512
    return ml_collections.ConfigDict(
        {
            "model": {
                "name": "encoder_decoder",
                "vocab_size": 37_000,
                "embed_dim": embed_dim,
                "num_layers": 6,
                "num_heads": 8,
                "mlp_dim": 2048,
                "max_length": 512,
                "dropout": 0.1,
                "init_stddev": embed_dim**-0.5,  # embeddings are then of variance 1
            },
            "data": {
                "sequence_length": 128,
                "tokenizer": {"name": "sentencepiece", "vocab_size": 37_000, "split_words": True},
                "held_out_fraction": 0.001,
            },
            "objective": {"name": "seq2seq", "label_smoothing": 0.1},
            "optimizer": {"name": "adamw", "beta2": 0.98, "epsilon": 1e-9, "weight_decay": 0.0,
                          "clip_norm": None},
            "schedule": {"name": "inverse_sqrt", "learning_rate": (embed_dim * 4000) ** -0.5,
                         "warmup_steps": 4000},
            "train": {"num_steps": 100_000, "batch_size": 832},
            "checkpoint": {"save_every": 1000, "keep_every": 10_000},
            "eval": {"every": 1000, "num_beams": 4},
        }
    )  # fmt: skip
