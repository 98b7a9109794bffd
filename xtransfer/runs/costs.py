"""What each stage of an experiment cost: time, examples, tokens, devices, and memory, in `costs.jsonl`.

A stage adds a row when it ends, whether it is finished or was stopped, so the rows of a resumed stage add up. A process
that is killed without warning adds none.
"""

import dataclasses
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from xtransfer import storage
from xtransfer.errors import UserError
from xtransfer.runs.workdir import Workdir
from xtransfer.runtime import processes, terminal
from xtransfer.train.work import Work

STAGES = ("teacher", "labelling", "students", "evaluation")
"""The stages in their order."""

_KINDS = {"stage": str, "run": str, "seconds": float, "examples": int, "real_tokens": float, "tokens": int}
_KINDS |= {"devices": str, "peak_bytes": int, "memory": str}


@dataclass(frozen=True)
class Cost:
    """The cost of one stage of one run, from a start to a stop; a row of `costs.jsonl`.

    Attributes:
      stage: a name from `STAGES`.
      run: the run's directory below the workdir.
      seconds: the time on the clock, with compiling and saving.
      examples: the number of examples that were processed. One that is read twice counts twice.
      real_tokens: the number of their tokens; for training, an estimate from the first batches.
      tokens: the number of token positions, with padding.
      devices: the number and kind of the devices.
      peak_bytes: the most memory in use at once, since the process started.
      memory: "device" for the memory of one accelerator, or "process" for the memory of process 0.
    """

    stage: str
    run: str
    seconds: float
    examples: int
    real_tokens: float
    tokens: int
    devices: str
    peak_bytes: int
    memory: str


@contextmanager
def recorded(workdir: Workdir, stage: str, run: Path, work: Work) -> Iterator[None]:
    """Add a row to `costs.jsonl` when the block ends, unless it processed nothing.

    A row that cannot be written costs a warning, because no result depends on it.

    Args:
      workdir: the experiment.
      stage: a name from `STAGES`.
      run: the run's directory.
      work: the counter to which the block adds.
    """
    before, start = dataclasses.replace(work), time.monotonic()
    try:
        yield
    finally:
        added = work.since(before)
        if added.examples and processes.is_first():
            peak, memory = peak_memory()
            cost = Cost(
                stage=stage,
                run=run.relative_to(workdir.root).as_posix(),
                seconds=round(time.monotonic() - start, 3),
                examples=added.examples,
                real_tokens=round(added.real, 1),
                tokens=added.slots,
                devices=f"{jax.device_count()} × {jax.devices()[0].device_kind}",
                peak_bytes=peak,
                memory=memory,
            )
            try:
                storage.append_jsonl(workdir.costs, dataclasses.asdict(cost))
            except UserError as error:
                terminal.log(f"warning: the cost of {stage} is not recorded ({error})")


def read_costs(workdir: Workdir) -> list[Cost]:
    """Return the recorded costs, oldest first; lines that a killed process left incomplete are skipped."""
    if not workdir.costs.is_file():
        return []
    return [cost for line in workdir.costs.read_bytes().split(b"\n") if (cost := _parsed(line)) is not None]


def _parsed(line: bytes) -> Cost | None:
    try:
        row: Any = storage.read_json(line.decode("utf-8"))
    except ValueError:
        return None
    if not isinstance(row, dict) or row.keys() != _KINDS.keys():
        return None
    for key, kind in _KINDS.items():
        accepted = (int, float) if kind is float else kind
        if not isinstance(row[key], accepted) or isinstance(row[key], bool):
            return None
    return Cost(**row)


def peak_memory() -> tuple[int, str]:
    """Return the peak memory in bytes, and whose it is; see `Cost`."""
    statistics = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [int(values["peak_bytes_in_use"]) for values in statistics if "peak_bytes_in_use" in values]
    if peaks:
        return max(peaks), "device"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "process"
