"""Many processes as one program: what the first decides all know, and where one ends all end.

Each process runs the same code on its own devices. Only the first prints and writes files; what it decides reaches the
others by `first`, which all call in the same order, from their main threads. Messages go through the store of JAX's
coordination service, in process 0, and not through the devices: whoever waits for one may wait for hours.

A thread in each process looks for signs of the others: of their end, and of what else they agree on (`preemption`). It
gives up where nothing moves. A process that dies without a sign is missed by JAX after `HEARTBEAT_SECONDS`.
"""

import contextlib
import faulthandler
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from xtransfer.errors import UserError, one_line
from xtransfer.runtime import cluster
from xtransfer.runtime.cluster import Flags

HEARTBEAT_SECONDS = 20
STALL_SECONDS = 1800.0
EXIT_STALLED = 124
SIGNS = "sign/"  # where messages begin that all look for

_LOOK_SECONDS = 0.25
_FINISH_SECONDS = 600
_GRACE_SECONDS = 3.0  # for all to see a sign, before the first, in whom the store is, ends
# After all have said that they are gone: one that is kept from its last instruction would see the store go, and JAX
# would abort it, so that its exit status would be another.
_LINGER_SECONDS = 1.0
_ROOM = "xtransfer/"
_ENDED, _GONE = f"{_ROOM}{SIGNS}ended", f"{_ROOM}gone/"

T = TypeVar("T")


@dataclass
class _Group:
    """This process among the others; `client` reaches the store, and is None for one that works alone."""

    index: int = 0
    count: int = 1
    client: Any = None
    look: Callable[[set[str]], None] = lambda signs: None
    moved: float = field(default_factory=time.monotonic)  # when something was last finished here
    calls: Any = field(default_factory=lambda: itertools.count())
    leaving: Any = field(default_factory=threading.Event)
    done: Any = field(default_factory=threading.Event)
    watcher: threading.Thread | None = None


_here = _Group()


def index() -> int:
    """Which process this is; 0 is the first."""
    return _here.index


def count() -> int:
    """How many processes there are."""
    return _here.count


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return _here.index == 0


def joined() -> bool:
    """Whether this process belongs to a group, be it of one."""
    return _here.client is not None


def start(flags: Flags, look: Callable[[set[str]], None]) -> None:
    """Joins the other processes, where there are any; before anything else is asked of JAX.

    From then on `look(signs)` is called again and again, in a thread of its own, with the names under `SIGNS` of which
    any process has told something.

    Raises:
      UserError: the coordinator's port is taken, or nobody answers there; processes that differ in their number, or in
        the number of their devices.
    """
    timeout, _here.look = flags.stall_timeout, look
    if flags.coordinator or cluster.in_cluster():
        _join(flags)
        timeout = STALL_SECONDS if timeout is None else timeout
    if _here.client is not None or timeout:
        _here.watcher = threading.Thread(target=_watch, args=(timeout or 0.0,), name="watcher", daemon=True)
        note_progress()
        _here.watcher.start()
    if _here.client is None:
        return
    if (wanted := on_first(count)) != count():
        raise UserError(f"--processes is {count()}, but process 0 was started with {wanted}: give all the same")
    _compare_devices()


def _join(flags: Flags) -> None:
    import jax

    # Its own service takes SIGTERM away from us and knows no section that has nothing to save: see `preemption`.
    jax.config.update("jax_enable_preemption_service", False)
    waiting = threading.Timer(flags.start_timeout, _nobody_came, args=(flags,))
    waiting.daemon = True
    if flags.coordinator:
        _here.index, _here.count = flags.process, flags.processes
        cluster.check_port(flags) if flags.process == 0 else cluster.await_coordinator(flags)
        known: dict[str, Any] = {
            "coordinator_address": flags.coordinator,
            "num_processes": flags.processes,
            "process_id": flags.process,
            "cluster_detection_method": "deactivate",
        }
    else:
        known = {"local_device_ids": cluster.local_devices(), "num_processes": cluster.slurm_tasks()}
    waiting.start()
    try:
        with cluster.ended_by_signals():
            jax.distributed.initialize(
                **known,
                initialization_timeout=int(flags.start_timeout) + 60,  # our own line comes first
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
    except (RuntimeError, ValueError, OSError) as error:
        reason = one_line(error)
        raise UserError(
            f"the processes of this cluster cannot be joined ({reason}): say who takes part with --coordinator, "
            "--processes and --process"
        ) from error
    finally:
        waiting.cancel()
    from jax._src.distributed import global_state  # JAX shows its store nowhere else

    _here.index, _here.count = global_state.process_id, global_state.num_processes
    _here.client = global_state.client


def _nobody_came(flags: Flags) -> None:
    """Says why JAX is about to abort: it waits inside, where nothing can be raised."""
    where, own = (f" at {flags.coordinator}", ", each with a --process of its own") if flags.coordinator else ("", "")
    print(
        f"{prefix()}error: not all of the processes met{where} within {flags.start_timeout:g} s: see their logs, and "
        f"start all of them{own}",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def _compare_devices() -> None:
    """UserError, in all: one has more devices than another, of which no mesh can be made."""
    import jax

    from xtransfer.runtime.sharding import check_platform

    def compare() -> None:
        found = told_by_all("devices/") or []
        has = {n: [str(i) for i, other in enumerate(found) if other == n] for n in found}
        if len(has) > 1:
            said = "; ".join(f"{n} in process {', '.join(who[:4])}{', …' * (len(who) > 4)}" for n, who in has.items())
            raise UserError(
                f"the processes have different numbers of devices ({said}): let each see as many, by the devices given "
                "to it, CUDA_VISIBLE_DEVICES or XLA_FLAGS"
            )

    check_platform("")  # where JAX finds none at all
    tell("devices/", str(jax.local_device_count()))
    on_first(compare)


def prefix() -> str:
    """What stands before a line of a process that is not the first."""
    return "" if _here.index == 0 else f"process {_here.index}: "


def on_first(work: Callable[[], T]) -> T:
    """What `work` returns in process 0, in all processes; there alone it is run, and the others wait.

    All processes call this in the same order, in their main threads. What is returned has come through JSON where there
    are many, so tuples are lists.

    Raises:
      UserError: of process 0, in all.
    """
    if _here.client is None:
        return work()
    key = f"{_ROOM}first/{next(_here.calls)}"
    if _here.index == 0:
        try:
            answer = json.dumps({"value": work()})
        except UserError as error:
            _here.client.key_value_set(key, json.dumps({"error": str(error)}))
            raise
        _here.client.key_value_set(key, answer)
    else:
        answer = _awaited(key)
    note_progress()
    found = json.loads(answer)
    if "error" in found:
        raise UserError(found["error"])
    return found["value"]


def _awaited(key: str) -> str:
    """A message, however long it takes: if its sender stalls or dies, the watcher or JAX ends this process."""
    while (found := _within(key, 5.0)) is None:
        note_progress()
    return found


def _within(key: str, seconds: float) -> str | None:
    try:
        return _here.client.blocking_key_value_get(key, int(1000 * seconds))
    except RuntimeError as error:  # JaxRuntimeError is one
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        return None


def note_progress() -> None:
    """Something was finished here: no stall."""
    _here.moved = time.monotonic()


def tell(key: str, value: str) -> None:
    """Puts a message of this process into the store; what stands there already is replaced."""
    _here.client.key_value_set(f"{_ROOM}{key}{_here.index}", value, allow_overwrite=True)


def told_by_all(key: str) -> list[str] | None:
    """What each process has told, in their order, waiting for it; None where one ends, or it is too late."""
    found = []
    for i in range(_here.count):
        while (said := _within(f"{_ROOM}{key}{i}", 1.0)) is None:
            if _here.done.is_set() or _within(_ENDED, 0.01) is not None:
                return None
            note_progress()
        found.append(said)
    return found


def _watch(stall_timeout: float) -> None:
    while not _here.done.wait(_LOOK_SECONDS):
        if _here.client is not None:
            with contextlib.suppress(RuntimeError):  # the first has gone: JAX ends this process
                _look()
        if stall_timeout and time.monotonic() - _here.moved > stall_timeout:
            _stalled(stall_timeout)


def _look() -> None:
    signs = dict(_here.client.key_value_dir_get(f"{_ROOM}{SIGNS}"))
    if _ENDED in signs:
        _follow(**json.loads(signs[_ENDED]))
    else:
        _here.look({key.removeprefix(_ROOM) for key in signs})


def _stalled(seconds: float) -> None:
    print(f"{prefix()}error: nothing was finished for {seconds:g} s; what its threads do:", file=sys.stderr)
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    end("", EXIT_STALLED)


def _follow(by: int, message: str, status: int) -> None:
    """Ends this process because another did."""
    if by == _here.index:
        return
    if status == EXIT_STALLED:
        _here.leaving.set()
        print(f"{prefix()}process {by} sees no progress; what the threads here do:", file=sys.stderr)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    elif _here.index == 0 and message:
        print(f"error: process {by} has ended: {message}", file=sys.stderr, flush=True)
    leave(status)


def settle() -> None:
    """Waits a moment before an error is said, in which the watcher may end this process without a word.

    An error of the settings is found by all at the same time, and process 0 says it; and a broken connection is mostly
    what the end of another looks like from here.
    """
    time.sleep(_GRACE_SECONDS / 2 if _here.index else 3 * _LOOK_SECONDS)
    if _here.leaving.is_set():
        time.sleep(2 * _GRACE_SECONDS)


def end(message: str, status: int) -> None:
    """Ends this process and tells the others, which end with the same status."""
    if _here.client is not None:
        sign = json.dumps({"by": _here.index, "message": message, "status": status})
        with contextlib.suppress(RuntimeError):  # another was quicker, or the store has gone
            _here.client.key_value_set(_ENDED, sign)
    leave(status)


def leave(status: int) -> None:
    """Ends this process at once; the first soon after the others have gone."""
    _here.leaving.set()
    sys.stdout.flush()
    sys.stderr.flush()
    if _here.client is not None:
        try:
            if _here.index:
                _here.client.key_value_set(f"{_GONE}{_here.index}", "")
            elif _here.count > 1:
                until = time.monotonic() + _GRACE_SECONDS
                while time.monotonic() < until and len(_here.client.key_value_dir_get(_GONE)) < _here.count - 1:
                    time.sleep(_LOOK_SECONDS / 5)
                time.sleep(_LINGER_SECONDS)
        except RuntimeError:
            pass
    os._exit(status)


def finish() -> None:
    """The orderly end of all processes: waits for the others."""
    if _here.client is not None:
        _here.client.wait_at_barrier(f"{_ROOM}finish", 1000 * _FINISH_SECONDS)  # while the watcher still watches
    _here.done.set()
    if _here.watcher is not None:
        _here.watcher.join()
    if _here.client is not None:
        import jax

        _here.client = None
        jax.distributed.shutdown()
