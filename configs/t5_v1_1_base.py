r"""T5 1.1 base, to the letter: GEGLU, a head of its own, no dropout in pretraining.

Purpose:  pretraining at 250 M by span corruption (Raffel et al. 2019; Shazeer 2020; the release notes of T5 1.1);
          exports to T5ForConditionalGeneration.
Hardware: 32 or more chips or GPUs of 24 GB: parameters, Adafactor and gradients take 2 GB on each under DDP; on
          fewer raise train.accumulate_steps.
Expect:   1,000,000 steps of 1 M tokens for 1 T tokens; shorten train.num_steps to your budget.
Command:  python -m llm_jax.train --config configs/t5_v1_1_base.py --workdir /mnt/runs/t5_v1_1_base \
              --data '/mnt/texts/*.parquet'
          Going on from the published weights, with their tokenizer: --config.init_from=hf:/mnt/models/t5-v1_1-base
              --config.data.tokenizer.path=/mnt/models/t5-v1_1-base/spiece.model
              --config.data.tokenizer.lossless=false
          To fine-tune: --config.model.dropout=0.1
The published learning rates are relative to a parameter's size, ours are not; the rate also was held for the first
10,000 steps, where here it rises.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "model": {
                "name": "encoder_decoder",
                "vocab_size": 32_128,
                "embed_dim": 768,
                "num_layers": 12,
                "num_heads": 12,
                "head_dim": 64,
                "mlp_dim": 2048,
                "max_length": 512,
                "position": "relative",
                "norm": "rmsnorm",
                "norm_epsilon": 1e-6,
                "norm_bias": False,
                "norm_placement": "pre",
                "activation": "gelu_tanh",
                "gated": True,
                "attention_bias": False,
                "mlp_bias": False,
                "attention_scale": 1.0,
                "scale_embeddings": False,
                "tie_embeddings": False,
            },
            "data": {
                "sequence_length": 512,
                "tokenizer": {
                    "name": "sentencepiece",
                    "model_type": "unigram",
                    "vocab_size": 32_100,
                    "extra_tokens": tuple(f"<extra_id_{i}>" for i in range(100)),
                },
                "held_out_fraction": 0.001,
            },
            "objective": {"name": "span_corruption", "z_loss": 1e-4},
            "optimizer": {"name": "adafactor", "weight_decay": 0.0},
            "schedule": {"name": "inverse_sqrt", "learning_rate": 1e-3, "warmup_steps": 10_000},
            "train": {"num_steps": 1_000_000, "batch_size": 2048, "accumulate_steps": 4},
            "checkpoint": {"save_every": 1000, "keep_every": 50_000},
            "eval": {"every": 1000},
        }
    )
