r"""The Transformer of 2017, small, translates number words: English to Chinese, French or German.

Purpose:  an encoder-decoder from scratch whose result can be checked to the letter: exact pairs without end,
          made by the grammars of num2words and cn2an, and numbers held out that training never sees.
Hardware: 2 CPU cores, 2 GB of memory; extra `results`.
Expect:   under 10 minutes; more than 95 % of unseen numbers right, see docs/results.md.
Command:  make results NAME=translate_transformer
          python -m llm_jax.train --config configs/translate_transformer.py --workdir runs/en_fr \
              --config.data.sources.0.path=en-fr
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    vocab_size = 640
    return ml_collections.ConfigDict(
        {
            "model": {
                "name": "encoder_decoder",
                "vocab_size": vocab_size,
                "embed_dim": 128,
                "num_layers": 3,
                "num_heads": 4,
                "mlp_dim": 512,
                "max_length": 128,
                "scan_unroll": 3,
                "init_stddev": 0.06,
            },
            "data": {
                "sources": [{"name": "number_words", "path": "en-zh", "max_number": 999_999_999}],
                "tokenizer": {
                    "name": "sentencepiece",
                    "vocab_size": vocab_size,
                    "split_words": True,
                    "scan_bytes": 4_000_000,
                },
                "sequence_length": 48,
                "held_out_fraction": 0.001,
            },
            "objective": {"name": "seq2seq", "target_length": 48, "label_smoothing": 0.1},
            "optimizer": {"name": "adamw", "beta2": 0.98, "weight_decay": 0.0},
            "schedule": {"name": "inverse_sqrt", "learning_rate": 1.5e-3, "warmup_steps": 300},
            "train": {"num_steps": 1200, "batch_size": 64, "compute_dtype": "float32"},
            "checkpoint": {"save_every": 1000},
            "eval": {"every": 300, "max_batches": 8, "num_beams": 4},
        }
    )
