"""A worker process for each side, so that the thread pools of JAX and PyTorch never compete for the cores.

A worker lives for the whole measurement. It blocks on a pipe while the other side runs, and reports how much processor
time it took meanwhile, which shows that none of its threads was spinning. Requests and answers are lines of JSON.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from xtransfer import startup
from xtransfer.errors import Exit, MachineError, UserError, one_line, user_error
from xtransfer.runtime import terminal

Answer = dict[str, Any]
Handler = Callable[[Mapping[str, Any]], Answer]

_END_SECONDS = 5.0  # time for a worker to end by itself


class Worker:
    """The parent's end of a worker process.

    Attributes:
      name: the side, for errors.
      idle_seconds: how long the worker has waited for requests so far.
      idle_cpu_seconds: the processor time of all its threads in that time.

    Args:
      name: the side.
      module: the module to run, which calls `serve`.
      environment: variables that differ from this process's.
    """

    def __init__(self, name: str, module: str, environment: Mapping[str, str] = {}):
        self.name, self.idle_seconds, self.idle_cpu_seconds = name, 0.0, 0.0
        self._spawned = time.monotonic()  # one clock for all processes of a machine
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **environment},
        )

    def ask(self, **request: Any) -> Answer:
        """Send a request, and return the answer.

        Raises:
          UserError: the worker raised it, or it was killed.
          RuntimeError: any other exception in the worker, whose traceback it has printed.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the answer is then missing too
            self._process.stdin.write(json.dumps({"spawned": self._spawned, **request}).encode() + b"\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            if status == -signal.SIGKILL:
                raise MachineError(
                    f"the process of {self.name} was killed, as when memory runs out: lower --batch-size"
                )
            raise MachineError(f"the process of {self.name} has ended with status {status}: see the lines above")
        answer = json.loads(line)
        if "error" in answer:
            raise user_error(answer["status"], answer["error"])
        if "defect" in answer:
            raise RuntimeError(answer["defect"])
        self.idle_seconds += answer.pop("idle_seconds")
        self.idle_cpu_seconds += answer.pop("idle_cpu_seconds")
        return answer

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def serve(handler: Handler) -> None:
    """Answer requests from standard input until it ends. What libraries print goes to standard error."""
    startup.imported()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group, and the parent decides
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    # The time before the first request is the start, not a wait for the other side.
    waiting_since: tuple[float, float] | None = None
    for line in sys.stdin:
        idle = (0.0, 0.0)
        if waiting_since is not None:
            idle = time.monotonic() - waiting_since[0], time.process_time() - waiting_since[1]
        with terminal.one_line_warnings():
            answer = _answer(handler, json.loads(line))
        answer |= {"idle_seconds": idle[0], "idle_cpu_seconds": idle[1]}
        waiting_since = time.monotonic(), time.process_time()
        try:
            print(json.dumps(answer, allow_nan=False), file=answers, flush=True)
        except BrokenPipeError:  # the parent is gone
            break
    os._exit(Exit.DONE)  # the libraries' own clean-up takes seconds, and there is nothing to save


def _answer(handler: Handler, request: Mapping[str, Any]) -> Answer:
    try:
        return handler(request)
    except UserError as error:
        return {"error": str(error), "status": int(error.exit_status)}
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and not isinstance(error, MemoryError):
            traceback.print_exc()
        return {"defect": f"{type(error).__name__}: {one_line(error, limit=500)}"}
