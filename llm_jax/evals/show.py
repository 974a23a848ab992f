"""Evaluations as tables on a terminal."""

from rich.console import Console
from rich.table import Table

from llm_jax.evals.evaluation import Evaluation

_OF_TEXTS = ("loss", "perplexity", "bits_per_byte", "tokens", "bytes")  # in the table of files


def show(evaluation: Evaluation, console: Console, most_files: int = 12) -> None:
    """What the evaluators found, as tables."""
    for problem in evaluation.problems:
        console.print(problem, markup=False)
    if not evaluation.summary:
        return
    others = evaluation.summary
    if evaluation.files:
        _show_files(evaluation, console, most_files)
        others = {name: value for name, value in others.items() if name not in _OF_TEXTS}
    if others:
        table = Table(title="held out", title_justify="left")
        table.add_column("score")
        table.add_column("value", justify="right")
        for name, value in others.items():
            table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:.4f}")
        console.print(table)
    for source, text, target in evaluation.examples[:3]:
        console.print(f"{source!r} -> {text!r}, wanted {target!r}", markup=False, highlight=False)


def _show_files(evaluation: Evaluation, console: Console, most_files: int) -> None:
    """The comparison with compressors, the files that the model does worst on first."""
    table = Table(title="held-out bits per byte", title_justify="left")
    for name in ("file", "bytes", "model", "gzip -9", "xz -9"):
        table.add_column(name, justify="left" if name == "file" else "right", overflow="fold")
    for f in evaluation.files[:most_files]:
        table.add_row(f.name, f"{f.bytes:,}", *(f"{x:.3f}" for x in (f.model, f.gzip, f.xz)))
    others = len(evaluation.files) - most_files
    if others > 0:
        table.add_row(f"... {others} more, where it does better", "", "", "", "")
    total = evaluation.compressors()
    bits = evaluation.summary["bits_per_byte"]
    table.add_section()
    table.add_row(
        f"all {len(evaluation.files)}",
        f"{evaluation.summary['bytes']:,}",
        *(f"[bold]{x:.3f}[/]" for x in (bits, total["gzip"], total["xz"])),
    )
    console.print(table)
    better = {
        name: sum(f.model < getattr(f, name) for f in evaluation.files) for name in ("gzip", "xz")
    }
    console.print(
        f"perplexity {evaluation.summary['perplexity']:.2f} per token; beats gzip -9 on "
        f"{better['gzip']} and xz -9 on {better['xz']} of {len(evaluation.files)} files"
    )
