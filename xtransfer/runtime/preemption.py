"""The agreement of several processes to stop at the same step, with all work saved, when one is preempted.

One signal is enough. The watcher thread (see `processes`) notices it, publishes the progress of the work here, and
agrees with the others on the first poll of `stop_requested` that none of them has made yet. If no process has anything
to save, all end at once. If no further poll comes, they end after the section in which they save.
"""

import json
import sys
import threading
from dataclasses import dataclass, field
from typing import Any

from xtransfer.errors import Exit
from xtransfer.runtime import processes

SAVING = "stopping as soon as the work is saved; run the same command again to resume"

_STOP, _OUT = f"{processes.SIGNS}stop/", "out/"


@dataclass
class _Work:
    """The progress of this process's work; guarded by the lock.

    Attributes:
      polls: the number of times it polled whether to stop.
      saving_sections: the number of sections it is in that must save.
      borders: the number of times it entered or left such a section.
      stop_at: the number of the poll at which it must stop.
      out_at: the number of the border at which it must stop if no poll comes.
      preempted: set if this process is to be preempted.
    """

    lock: Any = field(default_factory=threading.RLock)
    polls: int = 0
    saving_sections: int = 0
    borders: int = 0
    stop_at: int | None = None
    out_at: int = 0
    preempted: threading.Event = field(default_factory=threading.Event)


_work = _Work()


def request_stop() -> None:
    """Announce that this process is to be preempted; all agree on where to stop, see `stop_requested`."""
    _work.preempted.set()


def note_saving_section(entered: bool) -> None:
    """Note that the work enters or leaves a section that must save before it stops."""
    with _work.lock:
        _work.saving_sections += 1 if entered else -1
        _work.borders += 1


def leave_if_stopped() -> None:
    """End this process after its saving section if all were to stop but none polled again; wait for the others."""
    with _work.lock:
        if _work.stop_at is None or _work.saving_sections or _work.borders < _work.out_at:
            return
        processes.publish(_OUT, "")
        if processes.read_all(_OUT) is not None:
            processes.leave(Exit.PREEMPTED)


def stop_requested() -> bool:
    """Return whether to save and stop now. All processes must call this equally often, and get the same answers."""
    with _work.lock:
        _work.polls += 1
        return _work.stop_at is not None and _work.polls >= _work.stop_at


def on_signs(signs: set[str]) -> None:
    """Agree with the others on where to stop if one is to be preempted; the watcher calls this with all signs."""
    if _work.stop_at is None and (_work.preempted.is_set() or any(sign.startswith(_STOP) for sign in signs)):
        _agree()


def _agree() -> None:
    """Find where to stop: at a poll that no process has made yet, or after the section that the foremost is in."""
    with _work.lock:
        processes.publish(_STOP, json.dumps([_work.polls, _work.borders, _work.saving_sections]))
        messages = processes.read_all(_STOP)
        if messages is None:
            return
        polls, borders, saving_counts = zip(*map(json.loads, messages), strict=True)
        _work.stop_at, _work.out_at = max(polls) + 1, max(borders)
        if not any(saving_counts):  # nothing to save: stop at once
            processes.leave(Exit.PREEMPTED)
        if processes.is_first():
            print(SAVING, file=sys.stderr, flush=True)
        leave_if_stopped()  # the lock keeps the work here out of other sections while others save
