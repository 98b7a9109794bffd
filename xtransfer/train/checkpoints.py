"""Orbax checkpoints of a training run in `<directory>/<step>/`. Only this module imports Orbax.

A checkpoint holds two items: `params`, which evaluation and export read, and `resume`, the optimizer state and whatever
else training needs to continue (see `train.saving`). If the run averages its last checkpoints, it also holds `average`,
their mean so far. Two checkpoints are kept: the newest, to resume from, and the best on the source language's dev
split, to use. If the newest is the best, the one before it is the second, to fall back to. A run with an oracle also
keeps the best on the dev split of each target language.

A checkpoint takes its name when it is complete and its checksums are written, and it loses its name before any of its
files is removed. So a step exists completely or not at all, whenever a process is killed, and a file of a named step
that differs from its checksum is damaged. Checksums are computed in the thread that saves, while training continues,
and compared before each restore. A step without them was saved by an older version. It is used, with a warning.
"""

import asyncio
import functools
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from xtransfer import storage
from xtransfer.config import refuse_pattern
from xtransfer.errors import CheckpointError, MachineError, UserError, is_disk_full, one_line
from xtransfer.runtime import checksums, processes, terminal
from xtransfer.runtime.sharding import path_name
from xtransfer.train.state import TrainState

CHECKPOINTS = "checkpoints"  # the folder of a run that holds them
FALL_BACK_FLAG = "--from-earlier-step"
FALL_BACK_HELP = "remove a run's newest checkpoint if it is damaged, and resume from the one before it"

PARAMS, RESUME, AVERAGE = "params", "resume", "average"
"""The items of a checkpoint."""

_policies = ocp.checkpoint_managers
_METRICS = "metrics"
_REMOVED = ".removed"  # steps that have lost their names, and are about to be deleted
# Orbax writes its commit time and its mark after the checksums. Neither decides what is restored.
_WRITTEN_LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")


@functools.cache
def _write_small_arrays_whole() -> None:
    """Divide an array among at most eight of the devices that hold copies of it, in parts of at least 1 MiB.

    Orbax divides even a bias among all of them, which took a third of a small run's time. Its folder `array_metadatas`,
    which no restore of ours reads, is not written.
    """
    handler = ocp.type_handlers.ArrayHandler(
        min_slice_bytes_for_replica_parallel=1 << 20, max_replicas_for_replica_parallel=8
    )
    ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)


class _ListedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """The hidden directory of a checkpoint, which gets its checksums before it gets its name."""

    async def finalize(self) -> None:
        """List the files, then rename the directory. Orbax calls this in process 0, in the thread that saves."""
        await asyncio.to_thread(checksums.write_all, Path(self.get()), skip=_WRITTEN_LATER)
        await super().finalize()


class _NewestAndBest:
    """Keep the newest step and the best on source dev; if they are the same, also the step before it.

    The best step on the dev split of each target language is kept too, if steps have scores there.
    """

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Return for each checkpoint, of ascending steps, whether to keep it."""
        *earlier, newest = range(len(checkpoints))
        scored = {i: checkpoints[i].metrics for i in (*earlier, newest) if checkpoints[i].metrics is not None}
        kept = {newest}
        if scored:
            kept.add(max(scored, key=lambda i: _rank(scored[i])))
        for language in {name for metrics in scored.values() for name in metrics.get("targets", {})}:
            kept.add(max(scored, key=functools.partial(_rank_in, language, scored)))
        if kept == {newest} and earlier:
            kept.add(earlier[-1])
        return [i in kept for i in range(len(checkpoints))]


class Checkpoints:
    """The checkpoints of one run. As a context manager it waits on exit until everything saved is on the disk.

    Args:
      directory: the directory of the checkpoints.
      read_only: refuse to save, and delete nothing.
    """

    def __init__(self, directory: Path, *, read_only: bool = False):
        refuse_pattern(directory, "directory")
        self.directory = directory.absolute()  # Orbax fails late, in a thread, on a relative path
        self._read_only = read_only
        options = ocp.CheckpointManagerOptions(
            # Without `best_fn` Orbax keeps scores in memory only, and a resumed run would lose the best checkpoint.
            best_fn=_rank,
            preservation_policy=_NewestAndBest(),
            save_decision_policy=_policies.FixedIntervalPolicy(1),
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
            enable_async_checkpointing=not read_only,
            lightweight_initialize=read_only,  # read no scores, which only decide what is kept
            todelete_subdir=_REMOVED,
            temporary_path_class=_ListedPath,
        )
        if not read_only:
            _write_small_arrays_whole()
            processes.on_first(self._check_scores)
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=(PARAMS, RESUME, AVERAGE))

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._naming_a_full_disk():
            self._manager.close()
        self._delete_removed()

    def steps(self) -> list[int]:
        """Return the steps of all complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        state: TrainState,
        *,
        score: float | None,
        target_scores: Mapping[str, float] | None = None,
        average: Any = None,
        rows: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Save a state under its step, in the background; its scores decide whether it is kept.

        Args:
          state: the state.
          score: its score on source dev; None keeps it only while it is the newest.
          target_scores: its scores on target dev by language, for an oracle; the best in each language is kept.
          average: the mean of the last checkpoints' parameters so far; None if there is none.
          rows: the rows of the run's `metrics.jsonl` up to this step, of which a checkpoint with a score keeps a copy.
        """
        step = int(state.step)
        self.wait()  # raises if the last save failed, such as on a full disk
        metrics = None if score is None else saved_scores(step, score, target_scores, rows)
        saved = {PARAMS: state.params, RESUME: state.opt_state} | ({} if average is None else {AVERAGE: average})
        items = ocp.args.Composite(**{name: ocp.args.StandardSave(tree) for name, tree in saved.items()})
        with self._naming_a_full_disk():
            is_saved = self._manager.save(step, args=items, metrics=metrics)
        if not is_saved:
            newest = self.steps()[-1:]
            raise RuntimeError(f"{self.directory}: checkpoint {step} was not saved (the newest is {newest})")

    def wait(self) -> None:
        """Wait until everything saved is on the disk; raise the error of a failed save.

        Raises:
          UserError: the disk is full.
        """
        with self._naming_a_full_disk():
            self._manager.wait_until_finished()
        self._delete_removed()

    def _delete_removed(self) -> None:
        if not self._read_only and processes.is_first():
            shutil.rmtree(self.directory / _REMOVED, ignore_errors=True)

    def _check_scores(self) -> None:
        """Refuse a step whose score is damaged: the score decides which steps are kept."""
        for step in _named_steps(self.directory):
            fault = checksums.fault_below(self.directory / str(step), only=(_METRICS,))
            if fault is not None:
                raise _damaged(self.directory, step, fault, is_score=True)

    @contextmanager
    def _naming_a_full_disk(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not is_disk_full(error):
                raise
            # The manager lists the failed step too. On the disk a step gets its name when it is complete.
            complete = _named_steps(self.directory)
            intact = f"step {complete[-1]:,} is intact" if complete else "there is no earlier one"
            raise MachineError(
                f"{self.directory}: no space left for a checkpoint; {intact}: free some space and run the same command "
                "again to resume"
            ) from error

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Return the whole state of a step, in the shapes, dtypes, and shardings of `abstract`."""
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params), resume=ocp.args.StandardRestore(abstract.opt_state)
        )
        restored = self._restore(step, items)
        counter = abstract.step
        return TrainState(_scalar(step, counter), restored["params"], restored["resume"])

    def restore_params(self, step: int, abstract_params: Any, item: str = PARAMS) -> Any:
        """Return the parameters of a step, in the shapes, dtypes, and shardings of `abstract_params`.

        Args:
          step: the step.
          abstract_params: what to restore.
          item: `PARAMS`, or `AVERAGE` for the mean that the checkpoint holds.
        """
        return self._restore(step, ocp.args.Composite(**{item: ocp.args.StandardRestore(abstract_params)}))[item]

    def restore_arrays(self, step: int, item: str = PARAMS) -> dict[str, np.ndarray]:
        """Return every parameter of a step by its dotted path, on the host, without knowing the model."""
        tree = self._restore(step, ocp.args.Composite(**{item: ocp.args.StandardRestore()}))[item]
        return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    def _restore(self, step: int, items: Any) -> Any:
        processes.on_first(lambda: self._verify(step, tuple(items.keys())))
        try:
            return self._manager.restore(step, args=items)
        except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file, even bare Exception
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                raise  # the checkpoint may be whole, so nobody should remove it
            path, reason = self.directory / str(step), one_line(error)
            if (path / checksums.CHECKSUMS).exists():
                raise CheckpointError(
                    f"{path}: this checkpoint cannot be read: {reason}; its files are as they were written, so keep "
                    "it, and restore the settings and package versions that it was saved with"
                ) from error
            raise _damaged(self.directory, step, reason) from error

    def _verify(self, step: int, items: Sequence[str]) -> None:
        """Compare the files of some items with their checksums; a UserError names the first that differs."""
        path = self.directory / str(step)
        if not path.is_dir():
            others = ", ".join(map(str, _named_steps(self.directory))) or "none"
            raise CheckpointError(
                f"{path}: no such checkpoint (the steps here: {others}); restore it from a copy, or take the newest "
                f"with --selection last, or remove {self.directory} to train this run again"
            )
        if not (path / checksums.CHECKSUMS).exists():
            terminal.log(f"warning: {path} has no {checksums.CHECKSUMS}, so damage to it may go unnoticed")
        fault = checksums.fault_below(path, only=items)
        if fault is not None:
            raise _damaged(self.directory, step, fault)


def saved_scores(
    step: int, score: float, target_scores: Mapping[str, float] | None, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the scores that are saved with a checkpoint; see `Checkpoints.save` for the arguments."""
    scores = {"score": score, "step": step, "targets": dict(target_scores or {})}
    return scores | ({"rows": [dict(row) for row in rows]} if rows else {})


def read_scores(directory: Path) -> list[dict[str, Any]]:
    """Return the undamaged scores of all checkpoints, as from `saved_scores`, by step.

    Another process may be deleting checkpoints meanwhile.

    Args:
      directory: the run's checkpoints. It need not exist.
    """
    result = []
    for step in _named_steps(directory):
        path = directory / str(step)
        is_listed = (path / checksums.CHECKSUMS).exists()
        if is_listed and checksums.fault_below(path, only=(_METRICS,)) is None:
            with suppress(OSError, UserError):
                scores = _read_score(path)
                result += [] if scores is None else [scores]
    return result


def mend_scores(directory: Path, scores_by_step: Mapping[int, Mapping[str, Any]]) -> None:
    """Write the damaged scores of checkpoints again, if the given ones have the checksum of those that were saved.

    Args:
      directory: the run's checkpoints. It need not exist.
      scores_by_step: the scores, as from `saved_scores`.
    """
    for step in _named_steps(directory):
        path, name = directory / str(step), f"{_METRICS}/{_METRICS}"
        if step not in scores_by_step or checksums.fault_below(path, only=(_METRICS,)) is None:
            continue
        with suppress(ValueError):  # a damaged list
            entry, scores = (checksums.read(path) or {}).get(name), dict(scores_by_step[step])
            older = {key: value for key, value in scores.items() if key != "rows"}
            for content in (json.dumps(scores).encode(), json.dumps(older).encode()):  # as Orbax writes it
                if entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}:
                    storage.write_atomically(path / name, content)
                    terminal.log(f"{path / name}: damaged, so restored from the run's rows")


def fall_back(directory: Path) -> None:
    """Remove the newest checkpoints of a run if they are damaged, so that it resumes from the last whole one.

    An earlier one goes too if its score is damaged, because training cannot do without the score. If anything else of
    it is damaged, it stays, and is named if it is used. Call this in process 0.

    Args:
      directory: the run's checkpoints, which nothing else may have open. It need not exist.

    Raises:
      UserError: no checkpoint is whole. Nothing is removed.
    """
    faults: dict[int, str] = {}
    newest_first = list(reversed(_named_steps(directory)))
    whole: int | None = None
    for step in newest_first:
        only = () if whole is None else (_METRICS,)
        fault = checksums.fault_below(directory / str(step), only=only)
        if fault is not None:
            faults[step] = fault
        elif whole is None:
            whole = step
    if faults and whole is None:
        raise _damaged(directory, *next(iter(faults.items())))
    for step, fault in faults.items():
        _hide(directory, step)
        terminal.log(f"{directory / str(step)}: damaged ({fault}), so removed")
    shutil.rmtree(directory / _REMOVED, ignore_errors=True)


def remove_leftovers(directory: Path) -> None:
    """Delete what a killed process was about to delete, and what it had only half written.

    Training does this as it saves, but a run that was killed just after its last checkpoint never saves again. Call
    this in process 0.

    Args:
      directory: the run's checkpoints, which nobody else may write to. It need not exist.
    """
    if not directory.is_dir():
        return
    for path in directory.glob(f"*{ocp.path.atomicity.TMP_DIR_SUFFIX}*"):
        shutil.rmtree(path, ignore_errors=True)
    steps = _named_steps(directory)
    if steps and all(checksums.fault_below(directory / str(step), only=(_METRICS,)) is None for step in steps):
        saved = [_Saved(_read_score(directory / str(step))) for step in steps]
        for step, is_kept in zip(steps, _NewestAndBest().should_preserve(saved, context=None), strict=True):
            if not is_kept:
                _hide(directory, step)
    shutil.rmtree(directory / _REMOVED, ignore_errors=True)


@dataclass(frozen=True)
class _Saved:
    """A checkpoint on the disk, with the score that it was saved with, if any."""

    metrics: dict[str, Any] | None


def _read_score(path: Path) -> dict[str, Any] | None:
    file = path / _METRICS / _METRICS
    return storage.read_object(file, f"remove {path}") if file.is_file() else None


def _hide(directory: Path, step: int) -> None:
    """Take a checkpoint's name away, in one step, so that a half-deleted one is never offered."""
    hidden = directory / _REMOVED / str(step)
    hidden.parent.mkdir(exist_ok=True)
    shutil.rmtree(hidden, ignore_errors=True)
    (directory / str(step)).replace(hidden)


def _damaged(directory: Path, step: int, fault: str, *, is_score: bool = False) -> UserError:
    """Return the error of a damaged checkpoint. It never advises to remove a whole one that can be used.

    Args:
      directory: the run's checkpoints.
      step: the damaged one.
      fault: what is wrong with it.
      is_score: its score is damaged, which stops training only.
    """
    path = directory / str(step)
    others = (other for other in _named_steps(directory) if other != step)
    whole = [other for other in others if checksums.fault_below(directory / str(other)) is None]
    again = f"remove {directory} to train this run again"
    if not whole:
        remedy = f"there is no other whole step, so {again}"
    elif whole[-1] > step and is_score:
        remedy = f"step {whole[-1]} is whole: train with {FALL_BACK_FLAG} to remove step {step} alone"
    elif whole[-1] > step:
        remedy = (
            f"step {whole[-1]} is whole: predict and export take it with --selection last; restore step {step} from a "
            f"copy, or {again}"
        )
    elif (path / checksums.CHECKSUMS).exists():
        remedy = (
            f"step {whole[-1]} is whole: train with {FALL_BACK_FLAG} to remove step {step} and resume from step "
            f"{whole[-1]}"
        )
    else:
        remedy = f"remove it to resume from step {whole[-1]}"
    return CheckpointError(f"{path}: this checkpoint is damaged: {fault}; {remedy}")


def _named_steps(directory: Path) -> list[int]:
    """Return the steps on the disk, ascending. A step gets its name when it is complete."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def _rank(metrics: dict[str, Any]) -> Any:
    # Of two equal scores the earlier step is better, as in runs/selection.py.
    return metrics["score"], -metrics["step"]


def _rank_in(language: str, scored: Mapping[int, dict[str, Any]], index: int) -> Any:
    return scored[index]["targets"][language], -scored[index]["step"]


def _scalar(step: int, like: Any) -> Any:
    return jax.device_put(jnp.asarray(step, jnp.int32), like.sharding)
