r"""T5 base, to the letter: 12 and 12 layers of 768, relative biases, ReLU, the embedding as head.

Purpose:  pretraining at 220 M by span corruption (Raffel et al. 2019, section 3.1); exports to
          T5ForConditionalGeneration.
Hardware: 8 or more chips or GPUs of 24 GB: parameters, Adafactor and gradients take 1.8 GB on each under DDP.
Expect:   524,288 steps of 65,536 tokens for 34 B tokens, the paper's baseline.
Command:  python -m llm_jax.train --config configs/t5_base.py --workdir /mnt/runs/t5_base --data '/mnt/texts/*.parquet'
          Going on from the published weights, with their tokenizer: --config.init_from=hf:/mnt/models/t5-base
              --config.data.tokenizer.path=/mnt/models/t5-base/spiece.model --config.data.tokenizer.lossless=false
The paper's learning rates are relative to a parameter's size, ours are not; the paper also holds the rate for the
first 10,000 steps, which here rises.
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
                "mlp_dim": 3072,
                "max_length": 512,
                "position": "relative",
                "norm": "rmsnorm",
                "norm_epsilon": 1e-6,
                "norm_bias": False,
                "norm_placement": "pre",
                "activation": "relu",
                "attention_bias": False,
                "mlp_bias": False,
                "attention_scale": 1.0,
                "scale_embeddings": False,
                "scale_outputs": True,
                "dropout": 0.1,
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
            "train": {"num_steps": 524_288, "batch_size": 128},
            "checkpoint": {"save_every": 1000, "keep_every": 50_000},
            "eval": {"every": 1000},
        }
    )
