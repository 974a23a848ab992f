"""Checkpoints: one Orbax step directory holds all a run needs to go on, or to be used elsewhere.

    <directory>/<step>/model       params and extra      (all that evaluation and export read)
    <directory>/<step>/optimizer   step, key, opt_state
    <directory>/<step>/run         config.json, loader.json, stopping.json, tokenizer files

Orbax writes under a temporary name and renames, so a step directory is whole or absent; `restore`
says so when it finds what a killed run left. Arrays are restored onto whatever mesh is asked for.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from llm_jax.checkpoint.claims import Claims
from llm_jax.core.config import ConfigError
from llm_jax.core.flags import RunError
from llm_jax.metrics.scores import read_scores
from llm_jax.sharding.rules import path_name
from llm_jax.training.config import CheckpointConfig
from llm_jax.training.state import TrainState
from llm_jax.training.stopping import is_larger_better

LOADER, CONFIG, TOKENIZER = "loader.json", "config.json", "tokenizer/"
STOPPING = "stopping.json"


class CheckpointMismatch(ConfigError):
    """The checkpoint's arrays are not the model's; the message lists the differences."""


class CheckpointDamaged(ConfigError):
    """A step directory that cannot be read."""


class FolderItem:
    """A few small files as one part of a checkpoint: Orbax's StatefulCheckpointable."""

    def __init__(self, files: Mapping[str, bytes] | None = None):
        self.files = dict(files or {})

    async def save(self, directory):
        async def write():
            target = await directory.await_creation()
            if jax.process_index() == 0:
                for name, content in self.files.items():
                    (target / name).parent.mkdir(parents=True, exist_ok=True)
                    (target / name).write_bytes(content)

        return write()

    async def load(self, directory):
        async def read():
            self.files = read_folder(Path(directory))

        return read()


def read_folder(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path inside it."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """What a checkpoint keeps beside the arrays.

    config: the resolved config as plain dicts; loader: the loader's state; tokenizer: its files.
    stopping: the state of early stopping, or None; see training/stopping.py.
    """

    config: dict[str, Any]
    loader: dict[str, Any]
    tokenizer: dict[str, bytes]
    stopping: dict[str, Any] | None = None

    @property
    def best_step(self) -> int | None:
        """The step that did best on held-out data, whose checkpoint is kept."""
        return None if self.stopping is None else self.stopping["step"]

    def to_files(self) -> dict[str, bytes]:
        files = {TOKENIZER + name: content for name, content in self.tokenizer.items()}
        parts = {CONFIG: self.config, LOADER: self.loader, STOPPING: self.stopping}
        for name, value in parts.items():
            if value is not None:
                files[name] = json.dumps(value, indent=1).encode()
        return files

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> "RunFiles":
        tokenizer = {
            name.removeprefix(TOKENIZER): content
            for name, content in files.items()
            if name.startswith(TOKENIZER)
        }
        stopping = json.loads(files[STOPPING]) if STOPPING in files else None
        return cls(json.loads(files[CONFIG]), json.loads(files[LOADER]), tokenizer, stopping)


class _Keep:
    """Orbax's PreservationPolicy: which checkpoints stay when a new one is written.

    best_step: of early stopping.
    """

    def __init__(self, config: CheckpointConfig, workdir: Path, say: Callable[[str], None]):
        self.best_step: int | None = None
        self._config, self._workdir, self._say = config, workdir, say
        self._claims = Claims(workdir, f"training on {socket.gethostname()}, process {os.getpid()}")
        self.going = contextlib.ExitStack()  # claims on what is being removed

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Process 0 decides, since what others read and score changes between two looks."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = np.zeros(len(steps), bool)
        if jax.process_index() == 0:
            wanted = self._wanted(steps)
            # A claim on what goes, so that nobody begins to read it; where there is one, it stays.
            for place, step in enumerate(steps):
                claim = None if step in wanted else self._claims.take(step)
                kept[place] = claim is None
                if claim is not None:
                    self.going.enter_context(claim.held())
            self._claims.forget(steps)
        if jax.process_count() > 1:
            kept = multihost_utils.broadcast_one_to_all(kept)
        return kept.tolist()

    def _wanted(self, steps: list[int]) -> set[int]:
        every, newest = self._config.keep_every, sorted(steps)[-self._config.keep_last :]
        multiples = [step for step in steps if every is not None and step % every == 0]
        best = [self.best_step, self._best_by_score(steps)]
        return {step for step in (*newest, *multiples, *best) if step is not None}

    def _best_by_score(self, steps: Sequence[int]) -> int | None:
        metric = self._config.keep_best
        if metric is None:
            return None
        scores = {step: of for step, of in read_scores(self._workdir).items() if step in steps}
        known = {step: of[metric] for step, of in scores.items() if of.get(metric) is not None}
        if scores and not known:
            names = sorted({name for of in scores.values() for name in of})
            self._say(f"checkpoint.keep_best {metric!r} is no score; there are: {', '.join(names)}")
        sign = 1 if is_larger_better(metric) else -1
        return max(known, key=lambda step: (sign * known[step], step), default=None)


class Checkpointer:
    """Saves in the background and restores strictly."""

    def __init__(
        self,
        directory: Path,
        config: CheckpointConfig | None = None,
        *,
        say: Callable[[str], None] = print,
    ):
        """config None: read only."""
        self.directory, self.config, self._say = Path(directory).absolute(), config, say
        self._saving: int | None = None
        self._keep: _Keep | None = None
        if config is not None:
            self._remove_leftovers()
            self._keep = _Keep(config, self.directory.parent, say)
        else:
            steps_in(self.directory)
        self._orbax = ocp.training.Checkpointer(self.directory, preservation_policy=self._keep)

    def _remove_leftovers(self) -> None:
        for path in sorted(self.directory.glob("*.orbax-checkpoint-tmp*")):
            self._say(
                f"checkpoint of step {path.name.partition('.')[0]} was not finished: "
                "it is removed, and the one before it is used"
            )
            if jax.process_index() == 0:
                shutil.rmtree(path)

    def steps(self) -> list[int]:
        return [c.step for c in self._orbax.checkpoints]

    def save(self, step: int, state: TrainState, run: RunFiles) -> None:
        """Copies the state off the devices and writes it in the background.

        The checkpoint of `run.best_step` is kept, and any that an evaluation job reads. Waits for the save
        before it, and raises what went wrong there.
        """
        self.wait()
        self._keep.best_step = run.best_step
        items = {
            "model": {"params": state.params, "extra": state.extra},
            "optimizer": {
                "step": state.step,
                "key": jax.random.key_data(state.key),
                "opt_state": state.opt_state,
            },
            "run": FolderItem(run.to_files()),
        }
        with self._no_lost_checkpoint(step):
            self._orbax.save_checkpointables_async(step, items, force=True)
        self._saving = step

    def wait(self) -> None:
        """Returns when the last save is on disk; raises RunError when it could not be written."""
        with self._no_lost_checkpoint(self._saving):
            self._orbax.wait()
        if self._keep is not None:  # what had to go is gone
            self._keep.going.close()

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """Leaves only when the last save is on disk, even when leaving by an exception."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(RunError):  # the first error is the one to show
                self.wait()
            raise
        self.wait()

    @contextlib.contextmanager
    def _no_lost_checkpoint(self, step: int | None) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            kept = [s for s in steps_in(self.directory) if s != step]
            last = f"step {kept[-1]} is kept" if kept else "there is no earlier one"
            raise RunError(
                f"the checkpoint of step {step} could not be written ({_reason(error)}): "
                f"training stopped, {last}"
            ) from error

    def close(self) -> None:
        self._orbax.close()

    def restore_latest(
        self, abstract: TrainState, shardings: TrainState
    ) -> tuple[TrainState, RunFiles] | None:
        """The newest readable checkpoint, or None when there is none.

        A damaged one is moved aside to `<step>.damaged` and the one before it is tried.

        Raises:
          CheckpointMismatch: the checkpoint is of another model.
          RunError: there were checkpoints and none can be read: starting anew would lose the run.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self.restore(step, abstract, shardings)
            except CheckpointDamaged as error:
                self._say(f"{error}; the one before it is used")
                self._set_aside(step)
        if steps:
            raise RunError(
                f"none of the checkpoints {steps} in {self.directory} can be read; they are now "
                "called STEP.damaged: repair them, or choose another --workdir to start anew"
            )
        return None

    def _set_aside(self, step: int) -> None:
        folder = self.directory / str(step)
        if jax.process_index() == 0:
            target = folder.with_name(f"{step}.damaged")
            shutil.rmtree(target, ignore_errors=True)
            folder.rename(target)
        multihost_utils.sync_global_devices(f"set aside checkpoint {step}")
        self._orbax.reload()

    def restore(
        self, step: int, abstract: TrainState, shardings: TrainState
    ) -> tuple[TrainState, RunFiles]:
        """State and files of one step, with arrays placed by `shardings`.

        Raises:
          CheckpointMismatch: names what is missing, extra or misshapen.
          CheckpointDamaged: the directory cannot be read.
        """
        placed = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
        )
        key = jax.eval_shape(jax.random.key_data, placed.key)
        wanted = {
            "model": {"params": placed.params, "extra": placed.extra},
            "optimizer": {
                "step": placed.step,
                "key": jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=placed.key.sharding),
                "opt_state": placed.opt_state,
            },
        }
        out = self._load(step, wanted)
        state = TrainState(**out["model"], **out["optimizer"])
        state = dataclasses.replace(state, key=jax.random.wrap_key_data(state.key))
        return state, _parse(self.directory / str(step), out["run"].files)

    def restore_params(self, step: int, abstract: Mapping[str, Any]) -> Mapping[str, Any]:
        """`{"params", "extra"}` of one step; abstract leaves carry the shardings."""
        return self._load(step, {"model": dict(abstract)})["model"]

    def _load(self, step: int, wanted: dict[str, Any]) -> dict[str, Any]:
        folder = self.directory / str(step)
        for part, tree in wanted.items():
            try:
                found = ocp.metadata(folder, part).metadata
            except Exception as error:
                raise CheckpointDamaged(_damaged(folder, error)) from None
            if jax.tree.leaves(tree) and not jax.tree.leaves(found):
                raise CheckpointDamaged(_damaged(folder, f"{part} holds no arrays"))
            differences = tree_differences(tree, found)
            if differences:
                raise CheckpointMismatch(
                    f"checkpoint {folder} does not fit the model: " + "; ".join(differences)
                )
        try:
            with warnings.catch_warnings():
                # Orbax warns that scalars carry no sharding of their own.
                warnings.simplefilter("ignore", UserWarning)
                return self._orbax.load_checkpointables(step, {**wanted, "run": FolderItem()})
        except Exception as error:
            if isinstance(error, MemoryError | PermissionError) or "RESOURCE_EXHAUSTED" in str(
                error
            ):
                raise  # nothing is wrong with the files
            raise CheckpointDamaged(_damaged(folder, error)) from None


def steps_in(directory: Path) -> list[int]:
    """The steps whose checkpoints are in a folder; touches neither Orbax nor devices.

    Raises:
      ConfigError: there is no such folder.
    """
    if not directory.is_dir():
        raise ConfigError(f"no checkpoints at {directory}: train first, or check --workdir")
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())


def read_run_files(directory: Path, step: int) -> RunFiles:
    """Config, loader state and tokenizer, without reading arrays; touches neither Orbax nor devices."""
    folder = directory / str(step)
    return _parse(folder, read_folder(folder / "run"))


def _parse(folder: Path, files: Mapping[str, bytes]) -> RunFiles:
    try:
        return RunFiles.from_files(files)
    except (KeyError, ValueError) as error:
        raise CheckpointDamaged(_damaged(folder, error)) from None


def _damaged(folder: Path, error: Exception | str) -> str:
    return f"checkpoint {folder} cannot be read ({_reason(error)})"


def _reason(error: BaseException | str) -> str:
    """The first line of the error at the bottom of the chain: Orbax wraps what the system said."""
    while getattr(error, "__cause__", None) is not None:
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def tree_differences(wanted: Any, found: Any, limit: int = 8) -> list[str]:
    """`missing`, `extra` and `shape` lines between two trees of arrays, at most `limit` + 1."""
    shapes = [
        {path_name(path): getattr(leaf, "shape", ()) for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (wanted, found))
    ]
    mine, theirs = shapes
    lines = [f"missing {name} {mine[name]}" for name in mine if name not in theirs]
    lines += [f"extra {name} {theirs[name]}" for name in theirs if name not in mine]
    lines += [
        f"shape of {name} is {theirs[name]}, not {mine[name]}"
        for name in mine
        if name in theirs and tuple(mine[name]) != tuple(theirs[name])
    ]
    return lines[:limit] + ([f"and {len(lines) - limit} more"] if len(lines) > limit else [])
