"""Measure the parts one after the other, both sides in turns, in their worker processes, and then a second start.

Our side keeps its compiled programs beside the texts. The second start is a new process that finds them there, as a
restart of `main` finds them in the user's cache. The workers have ended by then: they would hold memory, or a TPU.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtransfer.benchmark.numbers import Burst, amount_for
from xtransfer.benchmark.worker import Answer, Worker

PARTS = ("training", "labelling", "prediction", "tokenising")
OURS, PEER = "xtransfer", "transformers"
SECOND_START = f"{OURS}, second start"
_OURS_MODULE, _PEER_MODULE = "xtransfer.benchmark.ours", "xtransfer.benchmark.peer"
_OWN_CACHE = {"JAX_COMPILATION_CACHE_DIR": ""}  # the user's folder would have programs before the first start
_MOST_EXAMPLES = 1 << 20  # in a burst
_RESIZES = 4
_NEAR = 1.5  # a burst that is this many times too short or too long is good enough
_REST_SECONDS = 0.2  # for the threads of one side to fall asleep before the other side runs


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
      parts: names from `PARTS`, in the order to measure them.
      pairs: the number of bursts of each side.
      seconds: about how long our bursts take. The other side does the same work.
    """

    parts: tuple[str, ...]
    pairs: int
    seconds: float


@dataclass(frozen=True)
class PartResult:
    """The measurement of one part.

    Attributes:
      part: a name from `PARTS`.
      amount: the number of examples in each burst.
      bursts: the bursts of each side, by its name. Pair i is the i-th burst of both.
      step: our compiled step, see `ours.Part.step`, or None.
    """

    part: str
    amount: int
    bursts: Mapping[str, tuple[Burst, ...]]
    step: Mapping[str, Any] | None


@dataclass(frozen=True)
class FirstBatch:
    """The times of a part up to its first batch, in one process.

    Attributes:
      preparing_seconds: the time to prepare the part, which also loads.
      first_seconds: the time of the first batch, with compiling.
      again_seconds: the time of the same batch once more.
    """

    preparing_seconds: float
    first_seconds: float
    again_seconds: float


@dataclass(frozen=True)
class Start:
    """The start of a process of one side, up to its first batch of the first part.

    Attributes:
      facts: its answer to the request to open: the seconds of imports and loading, and what it found.
      first_batch: the times of the first part.
      closing_facts: its answer to the request to close: its peak memory (see `costs.peak_memory`) and, on our side, the
        number of programs that it found in the cache.
    """

    facts: Mapping[str, Any]
    first_batch: FirstBatch
    closing_facts: Mapping[str, Any]

    @property
    def loading_seconds(self) -> float:
        """The seconds between the imports and the first batch."""
        return self.facts["loading_seconds"] + self.first_batch.preparing_seconds

    @property
    def compiling_seconds(self) -> float:
        """The part of the first batch's time that is not the step itself."""
        return max(0.0, self.first_batch.first_seconds - self.first_batch.again_seconds)

    @property
    def until_first_step(self) -> float:
        """The seconds from the start of the process to the end of its first step."""
        return self.facts["imports_seconds"] + self.loading_seconds + self.first_batch.first_seconds


@dataclass(frozen=True)
class Side(Start):
    """Everything about one side but its bursts.

    Attributes:
      idle_seconds: how long it waited for the other side.
      idle_cpu_seconds: the processor time that it took meanwhile.
    """

    idle_seconds: float
    idle_cpu_seconds: float


@dataclass(frozen=True)
class Measurement:
    """All results.

    Attributes:
      sides: the sides by name, `OURS` first.
      parts: the parts in their order.
      second_start: the start of our side that finds the programs of the first; None if the first part compiles nothing.
    """

    sides: Mapping[str, Side]
    parts: tuple[PartResult, ...]
    second_start: Start | None = None


def measure(
    plan: Plan,
    settings: Mapping[str, Any],
    texts: Path,
    threads: int,
    *,
    against: bool,
    on_part: Callable[[str], None] = lambda part: None,
    on_second_start: Callable[[], None] = lambda: None,
) -> Measurement:
    """Measure all parts, and a second start.

    Args:
      plan: what to measure.
      settings: a `BenchmarkConfig` as a dictionary.
      texts: a JSON file with a list of texts, in a directory of this measurement, where our side writes.
      threads: the number of threads of the peer; ours takes one for each core that the process may use.
      against: whether to measure the peer too.
      on_part: called with each part before it is measured.
      on_second_start: called before the second start, if there is one.

    Raises:
      UserError: see `Worker.ask`.
    """
    # Both sides need the memory of a GPU, of which JAX would take three quarters at its start.
    environment = _OWN_CACHE | ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if against else {})
    request = {"do": "open", "settings": settings, "texts": str(texts), "against": against}
    with ExitStack() as stack:
        ours = stack.enter_context(closing(Worker(OURS, _OURS_MODULE, environment)))
        facts = {OURS: ours.ask(**request)}
        workers = {OURS: ours}
        if against:
            workers[PEER] = stack.enter_context(closing(Worker(PEER, _PEER_MODULE)))
            shared = {key: facts[OURS][key] for key in ("directory", "classes", "frozen", "platform")}
            facts[PEER] = workers[PEER].ask(
                do="open", student=settings["student"], texts=str(texts), threads=threads, **shared
            )
        results: list[PartResult] = []
        first_batches: dict[str, FirstBatch] = {}
        for part in plan.parts:
            on_part(part)
            result, batches = _measure_part(part, plan, workers)
            results.append(result)
            first_batches = first_batches or batches
        closing_facts = {name: worker.ask(do="close") for name, worker in workers.items()}
        sides = {
            name: Side(
                facts=facts[name],
                first_batch=first_batches[name],
                closing_facts=closing_facts[name],
                idle_seconds=worker.idle_seconds,
                idle_cpu_seconds=worker.idle_cpu_seconds,
            )
            for name, worker in workers.items()
        }
    second_start = None
    if results[0].step is not None:
        on_second_start()
        second_start = _second_start(request, plan.parts[0], environment)
    return Measurement(sides, tuple(results), second_start)


def _second_start(request: Mapping[str, Any], part: str, environment: Mapping[str, str]) -> Start:
    """Start our side again, run the first batch of a part, and end."""
    with closing(Worker(f"{OURS}'s second start", _OURS_MODULE, environment)) as worker:
        facts = worker.ask(**request)
        preparing, answer = _timed(lambda: worker.ask(do="prepare", part=part))
        return Start(facts, _first_batch(worker, preparing, answer["unit"]), worker.ask(do="close"))


def _measure_part(part: str, plan: Plan, workers: Mapping[str, Worker]) -> tuple[PartResult, dict[str, FirstBatch]]:
    """Return the result, and the times of each side's first batch."""
    ours = workers[OURS]
    preparing, answer = _timed(lambda: ours.ask(do="prepare", part=part))
    unit = answer["unit"]
    amount, first, again = _sized(ours, unit, plan.seconds)
    batches = {OURS: FirstBatch(preparing, first.seconds, again.seconds)}
    peer = workers.get(PEER)
    if peer is not None:
        preparing, _ = _timed(lambda: peer.ask(do="prepare", part=part))
        if part == "training":
            peer.ask(do="indices", **ours.ask(do="indices", amount=amount))
        batches[PEER] = _first_batch(peer, preparing, unit)
    bursts: dict[str, list[Burst]] = {name: [] for name in workers}
    for pair in range(plan.pairs):
        for name in order(pair, tuple(workers)):
            if peer is not None:
                time.sleep(_REST_SECONDS)
            bursts[name].append(_run(workers[name], amount))
    step = ours.ask(do="step", seconds=plan.seconds)["step"]
    return PartResult(part, amount, {name: tuple(of_side) for name, of_side in bursts.items()}, step), batches


def order(pair: int, names: Sequence[str]) -> tuple[str, ...]:
    """Return the sides in the order in which a pair runs: A B, then B A, so that a drift favours neither."""
    return tuple(names) if pair % 2 == 0 else tuple(reversed(names))


def _timed(ask: Callable[[], Answer]) -> tuple[float, Answer]:
    """Return the seconds that a request takes, and its answer."""
    start = time.monotonic()
    answer = ask()
    return time.monotonic() - start, answer


def _first_batch(worker: Worker, preparing: float, unit: int) -> FirstBatch:
    """Run the first batch of a prepared part, and the same once more."""
    return FirstBatch(preparing, _run(worker, unit).seconds, _run(worker, unit).seconds)


def _run(worker: Worker, amount: int) -> Burst:
    return Burst(**worker.ask(do="run", amount=amount))


def _sized(worker: Worker, unit: int, seconds: float) -> tuple[int, Burst, Burst]:
    """Return an amount that takes about `seconds`, and the first two bursts of one unit.

    Afterwards everything that this amount needs is compiled.
    """
    amount, first = unit, _run(worker, unit)
    again = burst = _run(worker, unit)
    for _ in range(_RESIZES):
        better = amount_for(burst, seconds, unit, _MOST_EXAMPLES)
        if amount / _NEAR <= better <= amount * _NEAR:
            break
        amount = better
        burst = _run(worker, amount)
    return amount, first, again
