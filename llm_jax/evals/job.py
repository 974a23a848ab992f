"""One evaluation job: which run, what is asked, on which devices; the work behind `llm_jax.evaluate`."""

import dataclasses
import re
from pathlib import Path

from llm_jax.checkpoint.load import LoadedModel, choose_checkpoint, load_model
from llm_jax.checkpoint.manager import read_run_files
from llm_jax.core.config import ConfigError, load, plain, set_override, to_dict
from llm_jax.core.flags import RunError
from llm_jax.evals.evaluation import Evaluation, evaluate, make_tasks
from llm_jax.evals.harness import Harness
from llm_jax.evals.subject import Subject
from llm_jax.sharding.mesh import MeshConfig, make_mesh, make_rules
from llm_jax.sharding.rules import AxisRules
from llm_jax.training.config import RunConfig, resolve


@dataclasses.dataclass(frozen=True)
class Job:
    """harness: what lm-evaluation-harness asks, if anything.

    rows: windows at a time; None: as in training. config: a file whose section `eval` takes the place of the
    run's; overrides: of that section, as "eval.key=value".
    """

    workdir: Path
    harness: Harness | None = None
    rows: int | None = None
    config: str | None = None
    overrides: tuple[str, ...] = ()

    def __post_init__(self):
        for override in self.overrides:
            if not override.startswith("eval."):
                raise ConfigError(
                    f"--config.{override}: of a trained run only config.eval can change"
                )

    def score(self, step: int) -> Evaluation | None:
        """What the objective's evaluators, `eval.tasks` and the harness find of a checkpoint.

        Raises:
          ConfigError: there is no such checkpoint, or it cannot be read.
          RunError: what is asked cannot be asked of any.
        """
        saved = self._saved(step)
        try:
            run = self._run(saved)
            tasks = make_tasks(run.eval.tasks)
        except ConfigError as error:
            raise RunError(str(error)) from None
        if self.harness is not None:
            tasks["harness"] = self.harness
        loaded, rules = self._load(step, scored=bool(tasks))
        shares = rules.shares("batch")
        rows = self.rows or -(-run.train.microbatch_size // shares) * shares
        return evaluate(
            loaded.trained, loaded.tokenizer, run, rules, self.workdir, step, rows, tasks
        )

    def ask_harness(self, step: int | None) -> tuple[dict, int, Path]:
        """The harness's results, how many requests were cut, and the file for them."""
        step = choose_checkpoint(self.workdir, step)[1]
        loaded, rules = self._load(step, scored=True)
        length = loaded.run.data.sequence_length
        subject = Subject(loaded.model, loaded.tokenizer, rules, length, self.rows)
        results, cut = self.harness.results(subject)
        return results, cut, self.workdir / "evals" / f"{self._name(step)}.json"

    def _name(self, step: int) -> str:
        """tasks_<step>_<tasks>[_<k>shot][_limit<n>]: another question, another file."""
        config = self.harness.config
        tasks = "-".join(re.sub(r"\W+", "_", Path(name).stem) for name in config.tasks)
        name = f"tasks_{step}_{tasks[:100]}"
        if config.num_fewshot is not None:
            name += f"_{config.num_fewshot}shot"
        return name if config.limit is None else f"{name}_limit{config.limit}"

    def _saved(self, step: int) -> dict:
        """The config of a checkpoint."""
        folder, step = choose_checkpoint(self.workdir, step)
        return read_run_files(folder, step).config

    def _run(self, sections: dict) -> RunConfig:
        if self.config is not None or self.overrides:
            sections = to_dict(resolve(sections))
            if self.config is not None:
                sections["eval"] = plain(load(self.config).get("eval") or {})
            for override in self.overrides:
                set_override(sections, override)
        return resolve(sections)

    def _load(self, step: int, *, scored: bool) -> tuple[LoadedModel, AxisRules]:
        choose = scoring_rules_for if scored else rules_for
        # The harness's figures are compared with those of others, who load the export: in float32.
        dtype = "float32" if self.harness is not None else None
        loaded = load_model(self.workdir, step, rules=choose, compute_dtype=dtype)
        return loaded, choose(loaded.run)


def rules_for(run: RunConfig) -> AxisRules:
    """The mesh of training where the devices that are here make one, else all of them as "fsdp"."""
    try:
        rules = make_rules(run.mesh, make_mesh(run.mesh))
        rules.length_order(run.data.sequence_length)
        return rules
    except ValueError:
        return _in_shares()


def scoring_rules_for(run: RunConfig) -> AxisRules:
    """The same, but no activation is cut along a sequence: a Scorer's are of many lengths."""
    rules = rules_for(run)
    cut = rules.shares("length") > 1 or run.mesh.rules == "sequence"
    return _in_shares() if cut else rules


def _in_shares() -> AxisRules:
    mesh = MeshConfig(data=1, fsdp=-1)
    return make_rules(mesh, make_mesh(mesh))
