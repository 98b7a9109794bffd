"""Live tracking: what a training run sends to loggers such as TensorBoard, besides `metrics.jsonl`.

Process 0 alone logs. A logger that raises costs one line of warning, and is not called again in that run. The loop
passes on what it reads anyway, once per window of steps, so logging adds no wait for the devices.
"""

import functools
import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from xtransfer import storage
from xtransfer.errors import one_line
from xtransfer.runtime import terminal
from xtransfer.train.work import Work

IDENTITY_FILE = "tracking.json"
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"
"""The ways in which a run ends: by itself, by a signal that a later start resumes from, or with an error."""


@dataclass(frozen=True)
class Run:
    """A training run, as a logger sees it.

    Attributes:
      name: the run's name, for people, such as "teacher" or "monox_kd seed-0".
      id: 32 hexadecimal digits. They are the same each time the run is resumed, and different for every other run.
      directory: the run's directory.
      resumed_from: the step of the checkpoint that the run resumes from; 0 for a run from the start. A killed process
        may have logged later steps. They are logged again, so a logger replaces or skips them.
    """

    name: str
    id: str
    directory: Path
    resumed_from: int


class Logger(Protocol):
    """Receives the numbers of one training run."""

    def start(self, run: Run, settings: Mapping[str, Any]) -> None:
        """Begin, or continue after an interruption.

        Args:
          run: the run.
          settings: the config, nested, as in `config.json`.
        """

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log values by name, such as "train/loss" or "dev/accuracy".

        Args:
          step: the number of finished steps. It never decreases within a start. Training values and scores of the same
            step come in two calls.
          values: the numbers.
        """

    def finish(self, status: str) -> None:
        """End with the status "finished", "stopped", or "failed". A process that is killed makes no such call."""


@dataclass(frozen=True)
class LoggerSource:
    """A kind of logger that the user asked for.

    Attributes:
      flag: the flag that asked for it, for warnings.
      create: returns a new logger. It is called once for each run.
    """

    flag: str
    create: Callable[[], Logger]


@dataclass(frozen=True)
class Tracking:
    """The loggers of a command, and the settings that they log.

    Attributes:
      sources: the kinds of loggers; none in all processes but the first.
      settings: the config, nested, as in `config.json`.
    """

    sources: tuple[LoggerSource, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


NOTHING = Tracking()

ORACLE = "oracle_not_zero_shot"
"""The first part of the names of values that come from labels in the target languages."""


@contextmanager
def tracked(tracking: Tracking, name: str, directory: Path) -> Iterator["Tracker"]:
    """Yield the tracker of a run. When the block ends, its loggers get the status."""
    tracker, status = Tracker(tracking, name, directory), FAILED
    try:
        yield tracker
        status = FINISHED
    except (KeyboardInterrupt, SystemExit):
        status = STOPPED
        raise
    finally:
        tracker.finish(status)


class Tracker:
    """The loggers of one run. Before `start`, and without loggers, it does nothing."""

    def __init__(self, tracking: Tracking, name: str, directory: Path):
        self._tracking, self._name, self._directory = tracking, name, directory
        self._loggers: list[tuple[str, Logger]] = []
        self._work: dict[int, Work] = {}  # by step; filled by the thread that prefetches
        self._step, self._num_slices, self._since = 0, 1, 0.0

    def start(self, step: int, num_slices: int) -> None:
        """Create and start the loggers.

        Args:
          step: the number of steps that are done already.
          num_slices: the number of equal slices of a batch, of which this process counts one.
        """
        self._step, self._num_slices, self._since = step, num_slices, time.monotonic()
        for source in self._tracking.sources:
            self._succeeds(source.flag, "start", functools.partial(self._add, source))

    def counted(self, step: int, batch: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Count a host's batch for the rates, and return it."""
        if self._loggers:
            segments = batch["segment_ids"]  # [R, S]; numbers the examples of a row from 1
            examples, real = int(segments.max(axis=-1).sum()), int(np.count_nonzero(segments))
            self._work[step] = Work(examples, real, segments.size)
        return batch

    def window(self, step: int, values: Mapping[str, float]) -> None:
        """Log values by name for the steps since the last window, and their throughput.

        Args:
          step: the last step of the window.
          values: the means of the terms, read from the device, and the learning rate of the last step.
        """
        if not self._loggers:
            return
        total = Work()
        for earlier in range(self._step + 1, step + 1):
            work = self._work.pop(earlier)
            total.add(work.examples, work.real, work.slots)
        now = time.monotonic()
        throughput = {
            "examples_per_second": total.examples * self._num_slices / max(now - self._since, 1e-9),
            "real_token_share": total.real / max(total.slots, 1),
        }
        self._log(step, {f"train/{name}": value for name, value in {**values, **throughput}.items()})
        self._step, self._since = step, now

    def scores(
        self,
        step: int,
        metrics: Mapping[str, float],
        target_metrics: Mapping[str, Mapping[str, float]],
        source_metrics: Mapping[str, Mapping[str, float]] = MappingProxyType({}),
    ) -> None:
        """Log the scores after a step, if there are any. Scoring does not count as time of training.

        Args:
          step: the number of finished steps.
          metrics: metrics on source dev by name, such as "dev_accuracy".
          target_metrics: for an oracle, the metrics on target dev by language.
          source_metrics: of several source languages, the metrics on dev by language, whose means `metrics` holds.
        """
        values = {f"dev/{name.removeprefix('dev_')}": value for name, value in metrics.items()}
        for language, in_source in source_metrics.items():
            values |= {f"dev/{name.removeprefix('dev_')}/{language}": value for name, value in in_source.items()}
        for language, in_target in target_metrics.items():
            values |= {f"{ORACLE}/{name.removeprefix('dev_')}/{language}": value for name, value in in_target.items()}
        if values:
            self._log(step, values)
        self._since = time.monotonic()

    def finish(self, status: str) -> None:
        """Tell the loggers how the run ended."""
        for flag, logger in self._loggers:
            self._succeeds(flag, "finish", functools.partial(logger.finish, status))
        self._loggers = []

    def _add(self, source: LoggerSource) -> None:
        logger = source.create()
        logger.start(Run(self._name, _identity(self._directory), self._directory, self._step), self._tracking.settings)
        self._loggers.append((source.flag, logger))

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        self._loggers = [
            (flag, logger)
            for flag, logger in self._loggers
            if self._succeeds(flag, f"scalars at step {step:,}", functools.partial(logger.scalars, step, dict(values)))
        ]

    def _succeeds(self, flag: str, name: str, call: Callable[[], None]) -> bool:
        """Call a logger, and return whether it succeeded; otherwise warn."""
        try:
            call()
        except (Exception, SystemExit) as error:  # a logger is the user's program, or writes to the user's disk
            reason = f"{type(error).__name__}: {one_line(error)}"
            terminal.log(f"warning: {flag}: {name} failed ({reason}); {self._name} is no longer logged with it")
            return False
        return True


def _identity(directory: Path) -> str:
    """Return the id of a run, which is drawn when it is first needed."""
    path = directory / IDENTITY_FILE
    if not path.exists():
        storage.write_atomically(path, json.dumps({"id": uuid.uuid4().hex}) + "\n")
    return str(storage.read_object(path, "remove it to log under a new id")["id"])
