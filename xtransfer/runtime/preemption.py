"""Where many processes stop when one of them is to be preempted: all at the same step, with all that is done saved.

One signal is enough. The thread that watches (`distributed`) sees it, tells the others how far the work here is, and
finds with them the first question whether to stop that none of them has asked yet. Where none has to save all end at
once; where no question comes any more they end behind the section in which they save.
"""

import json
import sys
import threading
from dataclasses import dataclass, field
from typing import Any

from xtransfer.runtime import processes

EXIT_PREEMPTED = 143
SAVING = "stopping when what is done is saved; the same command goes on from there"

_STOP, _OUT = f"{processes.SIGNS}stop/", "out/"


@dataclass
class _Work:
    """How far the work of this process is, under the lock.

    Attributes:
      asked: how often it asked whether to stop.
      saving: how many sections it is in that have to save.
      borders: how often it came into such a section or out of one.
      stop_at: the question at which it is to stop.
      out_at: the border at which it is to stop, where no question comes.
      wanted: this process is to be preempted.
    """

    lock: Any = field(default_factory=threading.RLock)
    asked: int = 0
    saving: int = 0
    borders: int = 0
    stop_at: int | None = None
    out_at: int = 0
    wanted: threading.Event = field(default_factory=threading.Event)


_work = _Work()


def request_stop() -> None:
    """This process is to be preempted: all agree on a place to stop, see `stop_requested`."""
    _work.wanted.set()


def saving(entered: bool) -> None:
    """The work comes into a section that has to save before it stops, or out of it."""
    with _work.lock:
        _work.saving += 1 if entered else -1
        _work.borders += 1


def leave_if_stopped() -> None:
    """Ends this process after a section that all were to stop in and that asked no more; when all are out of it."""
    with _work.lock:
        if _work.stop_at is None or _work.saving or _work.borders < _work.out_at:
            return
        processes.tell(_OUT, "")
        if processes.told_by_all(_OUT) is not None:
            processes.leave(EXIT_PREEMPTED)


def stop_requested() -> bool:
    """Whether to save and stop now. All processes ask equally often, and get the same answers."""
    with _work.lock:
        _work.asked += 1
        return _work.stop_at is not None and _work.asked >= _work.stop_at


def look(signs: set[str]) -> None:
    """Agrees with the others as soon as one is to be preempted; for the thread that watches, with the signs of all."""
    if _work.stop_at is None and (_work.wanted.is_set() or any(sign.startswith(_STOP) for sign in signs)):
        _agree()


def _agree() -> None:
    """Finds where to stop: at a question that none has asked yet, or behind the section that the foremost is in."""
    with _work.lock:
        processes.tell(_STOP, json.dumps([_work.asked, _work.borders, _work.saving]))
        if (found := processes.told_by_all(_STOP)) is None:
            return
        asked, borders, saving = zip(*map(json.loads, found), strict=True)
        _work.stop_at, _work.out_at = max(asked) + 1, max(borders)
        if not any(saving):  # at once
            processes.leave(EXIT_PREEMPTED)
        if processes.is_first():
            print(SAVING, file=sys.stderr, flush=True)
        leave_if_stopped()  # the work here enters no other section while it waits for those who save
