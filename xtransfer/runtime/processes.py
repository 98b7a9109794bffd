"""Several processes as one program: they share process 0's decisions, and they end together.

Each process runs the same code on its own devices. Only process 0 prints and writes files. Its decisions reach the
others through `on_first`, which all processes call in the same order from their main threads. Messages go through the
store of JAX's coordination service, which is in process 0, and not through the devices, because a process may wait for
hours.

In each process a watcher thread looks for signs of the others: that one has ended, or that they want to agree on
something (`preemption`). It ends the process if nothing makes progress. JAX notices a process that dies without a sign
after `HEARTBEAT_SECONDS`.
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

from xtransfer.errors import ConfigError, Exit, MachineError, UserError, one_line, user_error
from xtransfer.runtime import cluster
from xtransfer.runtime.cluster import Flags

HEARTBEAT_SECONDS = 20
STALL_SECONDS = 1800.0
SIGNS = "sign/"  # prefix of the messages that every watcher looks for

_LOOK_SECONDS = 0.25
_STOPPED_SECONDS = 2.0  # if the watcher sleeps for longer, the whole process was stopped
_FINISH_SECONDS = 600
_GRACE_SECONDS = 3.0  # time for the others to see a sign before process 0, which holds the store, ends
# Process 0 stays for this long after all have said goodbye. If one is kept from its last instruction until the store is
# gone, JAX aborts it, and its exit status is wrong.
_LINGER_SECONDS = 1.0
_PREFIX = "xtransfer/"
_ENDED, _GONE = f"{_PREFIX}{SIGNS}ended", f"{_PREFIX}gone/"

T = TypeVar("T")


@dataclass
class _Group:
    """This process's place in the group.

    Attributes:
      index: this process's index, from 0.
      count: the number of processes.
      client: the client of the store, or None for a process that works alone.
      on_signs: called by the watcher with the names of all signs.
      last_progress: when something was last finished here, by the monotonic clock.
      calls: the counter that numbers the calls of `on_first`.
      leaving: set when this process is about to exit.
      done: set when the work is finished.
      watcher: the watcher thread.
    """

    index: int = 0
    count: int = 1
    client: Any = None
    on_signs: Callable[[set[str]], None] = lambda signs: None
    last_progress: float = field(default_factory=time.monotonic)
    calls: Any = field(default_factory=lambda: itertools.count())
    leaving: Any = field(default_factory=threading.Event)
    done: Any = field(default_factory=threading.Event)
    watcher: threading.Thread | None = None


_group = _Group()


def index() -> int:
    """Return this process's index, from 0."""
    return _group.index


def count() -> int:
    """Return the number of processes."""
    return _group.count


def is_first() -> bool:
    """Return whether this is process 0, which prints and writes."""
    return _group.index == 0


def joined() -> bool:
    """Return whether this process belongs to a group, even a group of one."""
    return _group.client is not None


def start(flags: Flags, on_signs: Callable[[set[str]], None]) -> None:
    """Join the other processes, if there are any. Call this before anything else that uses JAX.

    Args:
      flags: the flags of the command line.
      on_signs: called again and again by the watcher thread, with the names of all messages under `SIGNS`.

    Raises:
      UserError: the coordinator's port is taken, nobody answers there, or the processes differ in their number or in
        their number of devices.
    """
    timeout, _group.on_signs = flags.stall_timeout, on_signs
    if flags.coordinator or cluster.in_cluster():
        _join(flags)
        timeout = STALL_SECONDS if timeout is None else timeout
    if _group.client is not None or timeout:
        _group.watcher = threading.Thread(target=_watch, args=(timeout or 0.0,), name="watcher", daemon=True)
        note_progress()
        _group.watcher.start()
    if _group.client is None:
        return
    expected = on_first(count)
    if expected != count():
        raise ConfigError(f"--processes is {count()}, but process 0 was started with {expected}: use the same for all")
    _compare_devices()


def _join(flags: Flags) -> None:
    import jax

    # JAX's own service takes SIGTERM away from us, and cannot tell when there is nothing to save; see `preemption`.
    jax.config.update("jax_enable_preemption_service", False)
    waiting = threading.Timer(flags.start_timeout, _abort_start, args=(flags,))
    waiting.daemon = True
    if flags.coordinator:
        _group.index, _group.count = flags.process, flags.processes
        if flags.process == 0:
            cluster.check_port(flags)
        else:
            cluster.await_coordinator(flags)
        arguments: dict[str, Any] = {
            "coordinator_address": flags.coordinator,
            "num_processes": flags.processes,
            "process_id": flags.process,
            "cluster_detection_method": "deactivate",
        }
    else:
        arguments = {"local_device_ids": cluster.local_devices(), "num_processes": cluster.slurm_tasks()}
    waiting.start()
    try:
        with cluster.exit_on_signals():
            jax.distributed.initialize(
                **arguments,
                initialization_timeout=int(flags.start_timeout) + 60,  # our own message comes first
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
    except (RuntimeError, ValueError, OSError) as error:
        reason = one_line(error)
        raise MachineError(
            f"cannot join the processes of this cluster ({reason}): describe them with --coordinator, --processes, and "
            "--process"
        ) from error
    finally:
        waiting.cancel()
    from jax._src.distributed import global_state  # JAX exposes its store nowhere else

    _group.index, _group.count = global_state.process_id, global_state.num_processes
    _group.client = global_state.client


def _abort_start(flags: Flags) -> None:
    """Say why JAX is about to abort. It waits in C++, where nothing can be raised."""
    where, remedy = "", "start all of them"
    if flags.coordinator:
        where, remedy = f" at {flags.coordinator}", "start all of them, each with its own --process"
    print(
        f"{prefix()}error: not all processes met{where} within {flags.start_timeout:g} s: see their logs, and {remedy}",
        file=sys.stderr,
        flush=True,
    )
    os._exit(Exit.MACHINE)


def _compare_devices() -> None:
    """Raise a UserError in all processes if one has more devices than another, since no mesh fits that."""
    import jax

    from xtransfer.runtime.sharding import check_platform

    def compare() -> None:
        counts = read_all("devices/") or []
        processes_by_count = {n: [str(i) for i, other in enumerate(counts) if other == n] for n in counts}
        if len(processes_by_count) > 1:
            listed = []
            for n, processes in processes_by_count.items():
                more = ", …" if len(processes) > 4 else ""
                listed.append(f"{n} in process {', '.join(processes[:4])}{more}")
            raise MachineError(
                f"the processes have different numbers of devices ({'; '.join(listed)}): give each the same number, by "
                "its devices, CUDA_VISIBLE_DEVICES, or XLA_FLAGS"
            )

    check_platform("")  # raises if JAX finds no device at all
    publish("devices/", str(jax.local_device_count()))
    on_first(compare)


def prefix() -> str:
    """Return the prefix of the lines that this process prints; "" in process 0."""
    return "" if _group.index == 0 else f"process {_group.index}: "


def on_first(work: Callable[[], T]) -> T:
    """Run `work` in process 0 alone, and return its result in all processes, which wait for it.

    All processes must call this in the same order, from their main threads. With several processes the result passes
    through JSON, so tuples become lists.

    Raises:
      UserError: raised by `work` in process 0, and then in all processes, with the same exit status.
    """
    if _group.client is None:
        return work()
    key = f"{_PREFIX}first/{next(_group.calls)}"
    if _group.index == 0:
        try:
            answer = json.dumps({"value": work()})
        except UserError as error:
            _group.client.key_value_set(key, json.dumps({"error": str(error), "status": error.exit_status}))
            raise
        _group.client.key_value_set(key, answer)
    else:
        answer = _wait_for(key)
    note_progress()
    decoded = json.loads(answer)
    if "error" in decoded:
        raise user_error(decoded["status"], decoded["error"])
    return decoded["value"]


def _wait_for(key: str) -> str:
    """Wait for a message, however long it takes. If its sender stalls or dies, the watcher or JAX ends this process."""
    while True:
        message = _read(key, 5.0)
        if message is not None:
            return message
        note_progress()


def _read(key: str, seconds: float) -> str | None:
    """Return a message, or None if it does not come in time."""
    try:
        return _group.client.blocking_key_value_get(key, int(1000 * seconds))
    except RuntimeError as error:  # the base class of JaxRuntimeError
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        return None


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def note_progress() -> None:
    """Note that something was finished here, so that this process does not count as stalled."""
    _group.last_progress = time.monotonic()


def publish(key: str, value: str) -> None:
    """Put a message of this process into the store, replacing an earlier one."""
    _group.client.key_value_set(f"{_PREFIX}{key}{_group.index}", value, allow_overwrite=True)


def read_all(key: str) -> list[str] | None:
    """Wait for the message of every process, and return them in order; None if a process ends or the work is done."""
    messages = []
    for number in range(_group.count):
        message = _read(f"{_PREFIX}{key}{number}", 1.0)
        while message is None:
            if _group.done.is_set() or _read(_ENDED, 0.01) is not None:
                return None
            note_progress()
            message = _read(f"{_PREFIX}{key}{number}", 1.0)
        messages.append(message)
    return messages


def _watch(stall_timeout: float) -> None:
    before = time.monotonic()
    while not _group.done.wait(_LOOK_SECONDS):
        waited = time.monotonic() - before
        if waited > _STOPPED_SECONDS:  # a stopped process (Ctrl-Z) is not a stalled one: leave that time out
            _group.last_progress += waited
        if _group.client is not None:
            with contextlib.suppress(RuntimeError):  # process 0 is gone, and JAX ends this process
                _look_for_signs()
        if stall_timeout and time.monotonic() - _group.last_progress > stall_timeout:
            _stalled(stall_timeout)
        before = time.monotonic()


def _look_for_signs() -> None:
    signs = dict(_group.client.key_value_dir_get(f"{_PREFIX}{SIGNS}"))
    if _ENDED in signs:
        _follow(**json.loads(signs[_ENDED]))
    else:
        _group.on_signs({key.removeprefix(_PREFIX) for key in signs})


def _stalled(seconds: float) -> None:
    _group.leaving.set()  # so that no other thread reports the connections that break from here on
    print(f"{prefix()}error: no progress for {seconds:g} s; the stacks of its threads:", file=sys.stderr)
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    _announce("", Exit.STALLED)
    if _group.client is not None:
        # The others print where they hang. Once this process is gone, a broken connection would take them elsewhere.
        time.sleep(4 * _LOOK_SECONDS)
    leave(Exit.STALLED)


def _follow(by: int, message: str, status: int) -> None:
    """End this process because another one did."""
    if by == _group.index:
        return
    if status == Exit.STALLED:
        _group.leaving.set()
        print(f"{prefix()}process {by} sees no progress; the stacks of the threads here:", file=sys.stderr)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    elif _group.index == 0 and message:
        print(f"error: process {by} has ended: {message}", file=sys.stderr, flush=True)
    leave(status)


def wait_for_ending() -> None:
    """Wait a moment before printing an error, in which the watcher may end this process silently.

    All processes find an error in the settings at the same time, and process 0 prints it. A broken connection mostly
    means that another process has ended.
    """
    time.sleep(_GRACE_SECONDS / 2 if _group.index else 3 * _LOOK_SECONDS)
    if _group.leaving.is_set():
        time.sleep(2 * _GRACE_SECONDS)


def end(message: str, status: int) -> None:
    """End this process and tell the others, which end with the same status."""
    _announce(message, status)
    leave(status)


def _announce(message: str, status: int) -> None:
    """Tell the others that this process ends."""
    if _group.client is not None:
        sign = json.dumps({"by": _group.index, "message": message, "status": status})
        with contextlib.suppress(RuntimeError):  # another process was faster, or the store is gone
            _group.client.key_value_set(_ENDED, sign)


def leave(status: int) -> None:
    """End this process at once; process 0 ends shortly after the others are gone."""
    _group.leaving.set()
    sys.stdout.flush()
    sys.stderr.flush()
    if _group.client is not None:
        try:
            if _group.index:
                _group.client.key_value_set(f"{_GONE}{_group.index}", "")
            elif _group.count > 1:
                until = time.monotonic() + _GRACE_SECONDS
                while time.monotonic() < until and len(_group.client.key_value_dir_get(_GONE)) < _group.count - 1:
                    time.sleep(_LOOK_SECONDS / 5)
                time.sleep(_LINGER_SECONDS)
        except RuntimeError:
            pass
    os._exit(status)


def finish() -> None:
    """End all processes in order: wait for the others, then leave the group."""
    if _group.client is not None:
        _group.client.wait_at_barrier(f"{_PREFIX}finish", 1000 * _FINISH_SECONDS)  # while the watcher still watches
    _group.done.set()
    if _group.watcher is not None:
        _group.watcher.join()
    if _group.client is not None:
        import jax

        _group.client = None
        jax.distributed.shutdown()
