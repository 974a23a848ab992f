r"""BERT base, to the letter: 12 layers of 768, WordPiece vocabulary of 30,522, masked tokens and next sentences.

Purpose:  pretraining at 110 M (Devlin et al. 2018, sections 3.1 and A.2); exports to BertForPreTraining.
Hardware: 4 or more chips or GPUs of 24 GB: parameters, AdamW and gradients take 1.8 GB on each under DDP.
Expect:   1,000,000 steps of 128,000 tokens, about 40 epochs of 3.3 B words; the paper trains the first 90 % at
          data.sequence_length=128.
Command:  python -m llm_jax.train --config configs/bert_base.py --workdir /mnt/runs/bert_base \
              --data '/mnt/texts/*.parquet' --config.data.tokenizer.path=tokenizer.json
          Going on from the published weights: --config.init_from=hf:/mnt/models/bert-base-uncased
          On a mesh with tensor > 1, a vocabulary that divides: --config.model.vocab_size=30528
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "model": {
                "name": "bert",
                "vocab_size": 30_522,
                "embed_dim": 768,
                "num_layers": 12,
                "num_heads": 12,
                "mlp_dim": 3072,
                "num_positions": 512,
                "num_token_types": 2,
                "head": "pretraining",
                "dropout": 0.1,
            },
            "data": {
                "sequence_length": 512,
                "tokenizer": {
                    "name": "huggingface",
                    "path": "tokenizer.json",
                    "bos_token": "[CLS]",
                    "eos_token": "[SEP]",
                    "pad_token": "[PAD]",
                    "lossless": False,  # lower case
                },
                "held_out_fraction": 0.001,
            },
            "objective": {"name": "masked_lm", "pairs": "next_sentence"},
            "optimizer": {"name": "adamw", "beta2": 0.999, "epsilon": 1e-6, "weight_decay": 0.01},
            "schedule": {"name": "linear", "learning_rate": 1e-4, "warmup_steps": 10_000,
                         "final_fraction": 0.0},
            "train": {"num_steps": 1_000_000, "batch_size": 256},
            "checkpoint": {"save_every": 1000, "keep_every": 50_000},
            "eval": {"every": 1000},
        }
    )  # fmt: skip
