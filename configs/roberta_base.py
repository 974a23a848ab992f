r"""RoBERTa base, to the letter: BERT without pairs, byte-level BPE of 50,265, batches of 8192.

Purpose:  pretraining at 125 M (Liu et al. 2019, sections 4 and 5, table 9); exports to RobertaForMaskedLM.
Hardware: 32 or more chips or GPUs of 24 GB: parameters, AdamW and gradients take 2 GB on each under DDP; on
          fewer raise train.accumulate_steps.
Expect:   500,000 steps of 4 M tokens, 160 GB of text; shorten train.num_steps to your budget.
Command:  python -m llm_jax.train --config configs/roberta_base.py --workdir /mnt/runs/roberta_base \
              --data '/mnt/texts/*.parquet' --config.data.tokenizer.path=tokenizer.json
          Going on from the published weights: --config.init_from=hf:/mnt/models/roberta-base
          On a mesh with tensor > 1, a vocabulary that divides: --config.model.vocab_size=50304
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "model": {
                "name": "bert",
                "vocab_size": 50_265,
                "embed_dim": 768,
                "num_layers": 12,
                "num_heads": 12,
                "mlp_dim": 3072,
                "num_positions": 514,
                "position_offset": 2,  # behind the id of padding, 1
                "num_token_types": 1,
                "norm_epsilon": 1e-5,
                "head": "masked_lm",
                "dropout": 0.1,
            },
            "data": {
                "sequence_length": 512,
                "tokenizer": {
                    "name": "huggingface",
                    "path": "tokenizer.json",
                    "bos_token": "<s>",
                    "eos_token": "</s>",
                    "pad_token": "<pad>",
                },
                "held_out_fraction": 0.001,
            },
            "objective": {"name": "masked_lm", "mask_token": "<mask>"},
            "optimizer": {"name": "adamw", "beta2": 0.98, "epsilon": 1e-6, "weight_decay": 0.01,
                          "clip_norm": None},
            "schedule": {"name": "linear", "learning_rate": 6e-4, "warmup_steps": 24_000,
                         "final_fraction": 0.0},
            "train": {"num_steps": 500_000, "batch_size": 8192, "accumulate_steps": 8},
            "checkpoint": {"save_every": 1000, "keep_every": 50_000},
            "eval": {"every": 1000},
        }
    )  # fmt: skip
