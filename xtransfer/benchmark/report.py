"""A measurement for people, as tables, and for programs, as JSON."""

import dataclasses
import importlib.metadata
import os
import platform
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import xtransfer
from xtransfer.benchmark.measurement import OURS, PEER, SECOND_START, Measurement, PartResult, Start, order
from xtransfer.benchmark.numbers import Burst, Spread, ratios, spread
from xtransfer.report.table import Table
from xtransfer.runtime import processes

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "transformers", "tokenizers", "numpy", "torch")
_BUSY = 0.5  # other processes that are running, on average, beyond which figures are doubtful
_SPINNING = 0.05  # cores that an idle worker takes, beyond which the other side's figures are doubtful


def machine() -> dict[str, Any]:
    """Return the facts about this machine that need no JAX."""
    return {
        "cpu": _cpu_model(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": processes.cores(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def devices(measurement: Measurement) -> dict[str, Any]:
    """Return the facts about JAX's devices."""
    facts = measurement.sides[OURS].facts
    return {key: facts[key] for key in ("platform", "device_kind", "devices")}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package, and of the packages that decide the figures, if installed."""
    found = {"python": platform.python_version(), "xtransfer": xtransfer.__version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def step_figures(step: Mapping[str, Any]) -> dict[str, Spread]:
    """Return FLOP/s of a step and of its bare products, and the share of the second that the first reaches."""
    flops, rounds = step["flops"], step["rounds"]
    return {
        "step_flops_per_second": spread([flops / times["step_seconds"] for times in rounds]),
        "products_flops_per_second": spread([flops / times["products_seconds"] for times in rounds]),
        "share": spread([times["products_seconds"] / times["step_seconds"] for times in rounds]),
    }


def tables(measurement: Measurement) -> Iterator[Table]:
    """Yield the tables: rates, the compiled steps, and the start."""
    columns: tuple[str, ...] = ("part", "side", "examples/s", "tokens/s", "real tokens", f"× {PEER}")
    columns = columns if PEER in measurement.sides else columns[:-1]
    rows = (row[: len(columns)] for result in measurement.parts for row in _rates(result))
    yield Table(columns, tuple(rows), text_columns=2)
    steps = tuple(_step(result) for result in measurement.parts if result.step is not None)
    if steps:
        yield Table(("step", "batch", "GFLOP", "GFLOP/s", "its products alone, GFLOP/s", "share of that"), steps)
    yield Table(
        ("side", "imports, s", "loading, s", "compiling, s", "first step, s", "total, s", "peak memory, MB"),
        tuple(_start(name, start) for name, start in _starts(measurement)),
    )


def _rates(result: PartResult) -> Iterator[tuple[str, ...]]:
    for name, bursts in result.bursts.items():
        ratio = "–"
        if name == OURS and PEER in result.bursts:
            ratio = _cell(spread(ratios(bursts, result.bursts[PEER])), 2)
        yield (
            result.part if name == OURS else "",
            name,
            _cell(spread([burst.examples_per_second for burst in bursts])),
            f"{statistics.median(burst.tokens_per_second for burst in bursts):,.0f}",
            f"{statistics.median(burst.real_share for burst in bursts):.0%}",
            ratio,
        )


def _cell(values: Spread, decimals: int | None = None) -> str:
    """Return the median, with the range if there is one, in about three digits or with a number of decimals."""

    def number(value: float) -> str:
        digits = (0 if value >= 100 else 1 if value >= 10 else 2) if decimals is None else decimals
        return f"{value:,.{digits}f}"

    median = number(values.median)
    return median if values.count == 1 else f"{median} ({number(values.least)}–{number(values.most)})"


def _step(result: PartResult) -> tuple[str, ...]:
    assert result.step is not None
    figures = step_figures(result.step)
    return (
        result.part,
        f"{result.step['rows']} × {result.step['row_length']}",
        f"{result.step['flops'] / 1e9:,.2f}",
        f"{figures['step_flops_per_second'].median / 1e9:,.0f}",
        f"{figures['products_flops_per_second'].median / 1e9:,.0f}",
        f"{figures['share'].median:.0%}",
    )


def _starts(measurement: Measurement) -> Iterator[tuple[str, Start]]:
    """Yield the starts with their names, our second one after our first."""
    for name, side in measurement.sides.items():
        yield name, side
        if name == OURS and measurement.second_start is not None:
            yield SECOND_START, measurement.second_start


def _start(name: str, start: Start) -> tuple[str, ...]:
    of_device = " of the device" if start.closing_facts["memory"] == "device" else ""
    seconds = (f"{value:.2f}" for value in _seconds(start).values())
    return (name, *seconds, f"{start.closing_facts['peak_bytes'] / 1e6:,.0f}{of_device}")


def _seconds(start: Start) -> dict[str, float]:
    """Return the seconds of a start by their keys in the JSON, in the order of the table, the total last."""
    return {
        "imports_seconds": start.facts["imports_seconds"],
        "loading_seconds": start.loading_seconds,
        "compiling_seconds": start.compiling_seconds,
        "first_step_seconds": start.first_batch.first_seconds - start.compiling_seconds,
        "until_first_step_seconds": start.until_first_step,
    }


def notes(record: Mapping[str, Any], measurement: Measurement) -> Iterator[str]:
    """Yield the sentences below the tables."""
    texts, counts = record["texts"], {result.part: result.amount for result in measurement.parts}
    amounts = ", ".join(f"{part} {count:,}" for part, count in counts.items())
    yield f"examples in each burst: {amounts}; medians of {record['pairs']} bursts, with the range in brackets"
    if texts["truncated"]:
        yield (
            f"{texts['truncated']:,} of {texts['number']:,} texts are longer than "
            f"{record['config']['student']['max_length']} tokens and were truncated"
        )
    second = measurement.second_start
    if second is not None and not second.closing_facts["programs_found"]:
        yield (
            "the second start found no compiled programs: they compile too fast to be kept, could not be written, or "
            "JAX_ENABLE_COMPILATION_CACHE=0 is set"
        )
    if record["machine"]["load_before"] > _BUSY:
        yield (
            f"warning: {record['machine']['load_before']:.1f} other processes were running on "
            f"{record['machine']['cores']} cores; measure again on a quiet machine"
        )
    for name, side in measurement.sides.items():
        if side.idle_cpu_seconds > _SPINNING * max(side.idle_seconds, 1.0):
            yield (
                f"warning: {name} took {side.idle_cpu_seconds:.1f} s of processor time in the "
                f"{side.idle_seconds:.1f} s in which it should have been idle"
            )


def parts_as_json(measurement: Measurement) -> list[dict[str, Any]]:
    """Return every burst and every figure of the parts."""
    return [_part_as_json(result) for result in measurement.parts]


def _part_as_json(result: PartResult) -> dict[str, Any]:
    names = tuple(result.bursts)
    pairs = [
        {"order": list(order(i, names)), **{name: _burst_as_json(result.bursts[name][i]) for name in names}}
        for i in range(len(result.bursts[OURS]))
    ]
    rates = {
        name: dataclasses.asdict(spread([burst.examples_per_second for burst in bursts]))
        for name, bursts in result.bursts.items()
    }
    record: dict[str, Any] = {"part": result.part, "examples": result.amount, "pairs": pairs}
    record |= {"examples_per_second": rates, "ratios": None, "ratio": None, "step": None}
    if PEER in result.bursts:
        each = ratios(result.bursts[OURS], result.bursts[PEER])
        record |= {"ratios": each, "ratio": dataclasses.asdict(spread(each))}
    if result.step is not None:
        figures = {name: dataclasses.asdict(values) for name, values in step_figures(result.step).items()}
        record["step"] = {**result.step, **figures}
    return record


def _burst_as_json(burst: Burst) -> dict[str, Any]:
    return {
        **dataclasses.asdict(burst),
        "examples_per_second": burst.examples_per_second,
        "tokens_per_second": burst.tokens_per_second,
        "real_share": burst.real_share,
    }


def sides_as_json(measurement: Measurement) -> dict[str, dict[str, Any]]:
    """Return the start, the memory, and the idle time of each side, and the second start."""
    return {
        name: {
            **side.facts,
            **_seconds(side),
            **side.closing_facts,
            "idle_seconds": side.idle_seconds,
            "idle_cpu_seconds": side.idle_cpu_seconds,
            "second_start": _second_start(measurement) if name == OURS else None,
        }
        for name, side in measurement.sides.items()
    }


def _second_start(measurement: Measurement) -> dict[str, Any] | None:
    start = measurement.second_start
    return None if start is None else {**_seconds(start), **start.closing_facts}
