"""Orbax checkpoints of a training run in `<directory>/<step>/`. Only this module imports Orbax.

A checkpoint holds two items: `params`, which evaluation and export read, and `resume`, the optimizer state. Two are
kept: the newest, to resume from, and the best on the source language's dev split, to use.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from xtransfer.config import refuse_pattern
from xtransfer.errors import UserError, is_disk_full, one_line
from xtransfer.runtime.sharding import path_name
from xtransfer.train.state import TrainState

_policies = ocp.checkpoint_managers


class Checkpoints:
    """The checkpoints of one run. As a context manager it waits on exit until everything saved is on the disk."""

    def __init__(self, directory: Path, *, read_only: bool = False):
        refuse_pattern(directory, "directory")
        self.directory = directory.absolute()  # Orbax fails late, in a thread, on a relative path
        keep = [_policies.LatestN(1), _policies.BestN(get_metric_fn=_rank, n=1, keep_checkpoints_without_metrics=False)]
        options = ocp.CheckpointManagerOptions(
            # Without `best_fn` Orbax keeps scores in memory only, and a resumed run would lose the best checkpoint.
            best_fn=_rank,
            preservation_policy=_policies.AnyPreservationPolicy(keep),
            save_decision_policy=_policies.FixedIntervalPolicy(1),
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
            enable_async_checkpointing=not read_only,
        )
        names = ("params", "resume")
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=names)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._naming_a_full_disk():
            self._manager.close()

    def steps(self) -> list[int]:
        """Return the steps of all complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, *, score: float | None) -> None:
        """Save a state under its step, in the background; its score on source dev decides whether it is kept."""
        step = int(state.step)
        self.wait()  # raises if the last save failed, such as on a full disk
        metrics = None if score is None else {"score": score, "step": step}
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params), resume=ocp.args.StandardSave(state.opt_state)
        )
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

    @contextmanager
    def _naming_a_full_disk(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not is_disk_full(error):
                raise
            # The manager lists the failed step too. On the disk a step gets its name when it is complete.
            complete = sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal())
            intact = f"step {complete[-1]:,} is intact" if complete else "there is no earlier one"
            raise UserError(
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

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        """Return the parameters of a step, in the shapes, dtypes, and shardings of `abstract_params`."""
        return self._restore(step, ocp.args.Composite(params=ocp.args.StandardRestore(abstract_params)))["params"]

    def restore_arrays(self, step: int) -> dict[str, np.ndarray]:
        """Return every parameter of a step by its dotted path, on the host, without knowing the model."""
        tree = self._restore(step, ocp.args.Composite(params=ocp.args.StandardRestore()))["params"]
        return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    def _restore(self, step: int, items: Any) -> Any:
        try:
            return self._manager.restore(step, args=items)
        except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file, even bare Exception
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                raise  # the checkpoint may be whole, so nobody should remove it
            reason = one_line(error)
            raise UserError(
                f"{self.directory / str(step)}: this checkpoint cannot be read: {reason}; "
                f"remove {self.directory.parent} to train this run again"
            ) from error


def _rank(metrics: dict[str, Any]) -> Any:
    # Of two equal scores the earlier step is better, as in runs/selection.py.
    return metrics["score"], -metrics["step"]


def _scalar(step: int, like: Any) -> Any:
    return jax.device_put(jnp.asarray(step, jnp.int32), like.sharding)
