"""How long an asynchronous save holds up training, beside one copy of the state.

python -m bench.checkpoint [--layers 24 --embed 768] [--json FILE]
"""

import argparse
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from bench import measure
from bench.train_step import Sizes, our_run
from llm_jax.checkpoint.manager import Checkpointer, RunFiles
from llm_jax.sharding.mesh import MeshConfig, make_mesh
from llm_jax.training.config import CheckpointConfig
from llm_jax.training.program import build_program

ROUNDS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    measure.json_flag(parser)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--embed", type=int, default=384)
    arguments = parser.parse_args()
    sizes = Sizes(layers=arguments.layers, embed=arguments.embed)
    program = build_program(our_run(sizes, "float32"), make_mesh(MeshConfig()))
    state = program.init(jax.random.key(0))
    arrays = [np.asarray(x) for x in jax.tree.leaves((state.params, state.opt_state))]
    size = sum(a.nbytes for a in arrays)
    seconds: dict[str, list[float]] = {"copy": [], "save returns": [], "save is on disk": []}
    with tempfile.TemporaryDirectory() as folder:
        checkpointer = Checkpointer(Path(folder) / "c", CheckpointConfig(keep_last=1))
        for step in range(ROUNDS + 1):
            start = time.perf_counter()
            copies = [a.copy() for a in arrays]
            copied = time.perf_counter()
            checkpointer.save(step, state, RunFiles({}, {}, {}))
            saved = time.perf_counter()
            checkpointer.wait()
            done = time.perf_counter()
            del copies
            if step:  # the first one sets things up
                for name, value in zip(
                    seconds, (copied - start, saved - copied, done - copied), strict=True
                ):
                    seconds[name].append(value)
        checkpointer.close()
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    rows = [(name, 1e3 * s, s / medians["copy"]) for name, s in medians.items()]
    about = {**measure.machine(), "state_MB": size / 1e6}
    measure.show("asynchronous save", ("", "ms", "x one copy"), rows, about)
    measure.write_json(arguments.json, {"machine": about, "seconds": medians})


if __name__ == "__main__":
    main()
