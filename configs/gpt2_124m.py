"""GPT-2 small: 124 M parameters, the model most results are compared with.

Purpose:  a known reference (Radford et al. 2019) on your own text; exports to GPT2LMHeadModel.
Hardware: one GPU with 24 GB or one TPU chip; set train.accumulate_steps higher for less memory.
Expect:   10 B tokens in 20,000 steps of 512 rows; held-out loss about 3.1 nats on web text.
Command:  python -m llm_jax.train --config configs/gpt2_124m.py --workdir runs/gpt2 --data 'texts/*.jsonl.gz'
Variants: gpt2_124m.py               GPT-2's own BPE (extra `tiktoken`, its ranks file on disk)
          gpt2_124m.py:sentencepiece a SentencePiece tokenizer of the same size, trained on the data
"""

import ml_collections


def get_config(tokenizer: str = "tiktoken") -> ml_collections.ConfigDict:
    tokenizers = {
        "tiktoken": {"name": "tiktoken", "encoding": "gpt2"},
        "sentencepiece": {"name": "sentencepiece", "vocab_size": 50257},
    }
    if tokenizer not in tokenizers:
        raise ValueError(f"gpt2_124m.py:{tokenizer}: choices: {', '.join(tokenizers)}")
    return ml_collections.ConfigDict(
        {
            "model": {
                "name": "gpt",
                "vocab_size": 50304,  # 50257 and padding, so that it divides over a mesh
                "embed_dim": 768,
                "num_layers": 12,
                "num_heads": 12,
                "max_length": 1024,
                "norm": "layernorm",
                "norm_bias": True,
                "position": "learned",
                "activation": "gelu_tanh",
                "gated": False,
                "attention_bias": True,
                "attention_out_bias": True,
                "mlp_bias": True,
                "tie_embeddings": True,
            },
            "data": {"sequence_length": 1024, "tokenizer": tokenizers[tokenizer]},
            "optimizer": {"name": "adamw", "beta2": 0.95, "weight_decay": 0.1},
            "schedule": {"name": "cosine", "learning_rate": 6e-4, "warmup_steps": 700},
            "train": {"num_steps": 20_000, "batch_size": 512, "accumulate_steps": 16},
            "checkpoint": {"save_every": 1000, "keep_every": 5000},
            "eval": {"every": 500},
        }
    )
