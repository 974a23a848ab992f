"""`python -m llm_jax.export --workdir DIR --format hf --out OUT`: a trained model for other programs."""

from pathlib import Path

import jax
from jax.sharding import Mesh

from llm_jax.checkpoint.load import load_model
from llm_jax.core.config import component
from llm_jax.core.flags import make_parser, parse, run_entry
from llm_jax.sharding import xla_flags
from llm_jax.sharding.mesh import MeshConfig, make_mesh


def main() -> None:
    parser = make_parser("export", "Writes a trained model for other programs.", config=False)
    parser.add_argument("--format", default="hf", help="hf: a folder for transformers (default)")
    parser.add_argument("--out", required=True, type=Path, help="the folder to write")
    parser.add_argument("--step", type=int, help="of the checkpoint; the newest by default")
    arguments = parse(parser)
    xla_flags.apply()
    exporter = component("export", arguments.format).make()
    loaded = load_model(
        arguments.workdir, arguments.step, mesh=_host_mesh(), compute_dtype="float32"
    )
    path = exporter.export(loaded.model, loaded.tokenizer, loaded.run, arguments.out)
    print(f"step {loaded.step} exported to {path}")


def _host_mesh() -> Mesh | None:
    """The host's memory, which holds models that one accelerator does not."""
    try:
        return make_mesh(MeshConfig(), jax.local_devices(backend="cpu")[:1])
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        return None


if __name__ == "__main__":
    run_entry(main)
