"""Loss curves of int8 and float8 matmuls beside bfloat16, on the bytes of the standard library.

    python -m bench.low_precision [--steps 300] [--json FILE] [--chart docs/low_precision.svg]

The model is a small gpt_tiny. All runs see the same batches; all but one start from the same
parameters. The one that does not says how much of a difference is chance.
"""

import argparse
import contextlib
import html
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from bench import measure
from llm_jax.core.config import load
from llm_jax.data.pipeline import make_loader
from llm_jax.data.prepare import prepare
from llm_jax.metrics.chart import Series, bucketize, smoothed, tick_labels, ticks
from llm_jax.sharding.mesh import make_mesh
from llm_jax.sharding.place import to_global_batch
from llm_jax.training.config import RunConfig, resolve
from llm_jax.training.program import build_program

CONFIG = "configs/gpt_tiny.py"
SMALLER = (
    "model.vocab_size=320", "model.embed_dim=128", "model.mlp_dim=352", "model.num_layers=3",
    "model.scan_unroll=3", "data.sequence_length=128", "data.num_threads=0", "train.batch_size=16",
)  # fmt: skip
CONTENDERS = {
    "bfloat16": [],
    "int8": ["train.matmul_dtype=int8"],
    "fp8": ["train.matmul_dtype=fp8"],
    "bfloat16, another start": ["train.seed=1"],
}
COLORS = dict(zip(CONTENDERS, ("#1b1f24", "#0068a8", "#b84a00", "#9aa2ab"), strict=True))
LAST = 50  # steps whose mean loss is the result


class Contender:
    """One run and the losses of its steps so far."""

    def __init__(self, run: RunConfig):
        self.program = build_program(run, make_mesh(run.mesh, jax.devices()[:1]))
        self.state = self.program.init(jax.random.key(run.train.seed))
        self.losses: list[float] = []

    def step(self, batch: Mapping[str, np.ndarray], batch_size: int) -> None:
        placed = to_global_batch(batch, self.program.rules, batch_size)
        self.state, metrics = self.program.step(self.state, placed)
        self.losses.append(float(metrics["loss"]))


def small_run(steps: int, changes: Sequence[str]) -> RunConfig:
    config = load(CONFIG, [f"train.num_steps={steps}", *SMALLER, *changes])
    config.data.tokenizer = {"name": "raw_bytes"}
    return resolve(config)


def train(steps: int) -> dict[str, np.ndarray]:
    """Loss of each step, in nats per byte, by contender."""
    runs = {name: small_run(steps, changes) for name, changes in CONTENDERS.items()}
    contenders = {name: Contender(run) for name, run in runs.items()}
    run = runs["bfloat16"]
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(run.data, Path(folder))
        loader = make_loader(
            run.data,
            workdir=Path(folder),
            tokenizer=prepared.tokenizer,
            objective=contenders["bfloat16"].program.objective,
            batch_size=run.train.batch_size,
        )
        with contextlib.closing(loader):
            for step in range(steps):
                batch = next(loader)
                for contender in contenders.values():
                    contender.step(batch, run.train.batch_size)
                if (step + 1) % 25 == 0:
                    last = (f"{n} {c.losses[-1]:.4f}" for n, c in contenders.items())
                    print(f"step {step + 1}: {', '.join(last)}", flush=True)
    return {name: np.array(c.losses) for name, c in contenders.items()}


def chart(losses: Mapping[str, np.ndarray]) -> str:
    """An SVG: the losses above, their distance from bfloat16 below, both smoothed."""
    base = losses["bfloat16"]
    curves = [_curve(name, values) for name, values in losses.items()]
    percent = [_curve(n, 100 * (v / base - 1)) for n, v in losses.items() if n != "bfloat16"]
    legend, left = [], 64.0
    for name, color in COLORS.items():
        legend.append(f'<path d="M{left} 18h18" stroke="{color}" stroke-width="2"/>')
        legend.append(f'<text x="{left + 24}" y="22">{html.escape(name)}</text>')
        left += 54 + 6.6 * len(name)
    panels = _panel(curves, "loss, nats per byte", top=58, height=220)
    panels += _panel(percent, "distance from bfloat16, %", top=326, height=120)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 770 496" '
        'font-family="system-ui, sans-serif" font-size="12" fill="#59626d">'
        f'<rect width="770" height="496" fill="#fff"/>{"".join(legend)}{panels}'
        '<text x="404" y="486" text-anchor="middle">step</text></svg>\n'
    )


def _curve(name: str, values: np.ndarray) -> Series:
    buckets = bucketize(Series(name, np.arange(1.0, len(values) + 1), values))
    return Series(name, buckets.steps, smoothed(buckets.mean))


def _panel(curves: Sequence[Series], title: str, *, top: float, height: float) -> str:
    """Lines over a grid, `height` units high from `top`; the first curve is drawn last."""
    values = np.concatenate([c.values for c in curves])
    room = 0.06 * (values.max() - values.min())
    low, high = float(values.min() - room), float(values.max() + room)
    first, last = float(curves[0].steps[0]), float(curves[0].steps[-1])
    x_of = lambda x: 64 + 680 * (x - first) / (last - first)  # noqa: E731
    y_of = lambda y: top + height * (high - y) / (high - low)  # noqa: E731
    parts = [f'<text x="64" y="{top - 10}" font-weight="600">{title}</text>']
    places = ticks(low, high, 4)
    for place, label in zip(places, tick_labels(places), strict=True):
        shade = "#8a929c" if place == 0 else "#e3e6ea"
        parts.append(f'<path d="M64 {y_of(place):.1f}h680" stroke="{shade}"/>')
        parts.append(f'<text x="56" y="{y_of(place) + 4:.1f}" text-anchor="end">{label}</text>')
    places = ticks(first, last, 5)
    for place, label in zip(places, tick_labels(places), strict=True):
        x, y = f"{x_of(place):.1f}", top + height + 16
        parts.append(f'<text x="{x}" y="{y}" text-anchor="middle">{label}</text>')
    for curve in reversed(curves):
        points = zip(curve.steps, curve.values, strict=True)
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
        stroke = f'stroke="{COLORS[curve.name]}" stroke-width="1.6"'
        parts.append(f'<polyline points="{path}" fill="none" {stroke}/>')
    return "".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--chart", type=Path, help="also draw the curves here, as SVG")
    measure.json_flag(parser)
    flags = parser.parse_args()
    losses = train(flags.steps)
    final = {name: float(values[-LAST:].mean()) for name, values in losses.items()}
    rows = [(n, f"{v:.4f}", 100 * (v / final["bfloat16"] - 1)) for n, v in final.items()]
    title = f"mean loss of the last {LAST} of {flags.steps} steps"
    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    measure.show(title, ("matmuls", "nats per byte", "% from bfloat16"), rows, about)
    curves = {name: values.round(5).tolist() for name, values in losses.items()}
    measure.write_json(flags.json, {"machine": about, "final": final, "losses": curves})
    if flags.chart:
        flags.chart.write_text(chart(losses))


if __name__ == "__main__":
    main()
