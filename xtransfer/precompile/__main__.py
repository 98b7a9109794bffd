"""Compile an experiment's steps for a TPU topology, without a TPU.

    python -m xtransfer.precompile --config FILE[:arg] --topology v5e:2x4 [--json F] [--config.key=value …]

Compile the same steps that `xtransfer.main` runs. For each step, report a chip's memory, the estimated cycles by
purpose, and the bytes of its collectives. This needs the package `libtpu`, and reads no weights.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from xtransfer import storage
from xtransfer.config import load
from xtransfer.errors import ConfigError, nearest
from xtransfer.precompile.compilation import compile_and_measure
from xtransfer.precompile.steps import STEPS, Override, steps
from xtransfer.precompile.topology import EXAMPLES, Chip, chip_of, devices_of
from xtransfer.runtime import terminal
from xtransfer.runtime.sharding import make_mesh

_MAX_COUNT = 2**20  # for rows per chip and for tokens per row


def lines(report: Mapping[str, Any], chip: Chip) -> Iterator[str]:
    """Yield the lines that the terminal shows about a step, from its entry in the JSON report."""
    rows = f"{report['rows_per_chip']} rows of {report['row_length']} tokens per chip"
    if report["parts"] > 1:
        rows += f" in {report['parts']} microbatches"
    sizes = "/".join(map(str, report["row_sizes"]))
    shapes = "1 shape"
    if report["batch_shapes"] > 1:
        shapes = f"{report['batch_shapes']} shapes, of which this is the largest"
    yield f"{report['step']}: {rows} (batches of {sizes} rows: {shapes})"
    needed = "more" if report["hbm_gib"] is None else f"{report['hbm_gib']:.2f} GiB"
    if "arguments_gib" not in report:
        yield f"  memory      does not fit: {needed} of {chip.memory:g} GiB; {report['compiler']}"
        return
    sizes = ", ".join(f"{key} {report[f'{key}_gib']:.2f}" for key in ("arguments", "temporaries", "outputs", "code"))
    yield f"  memory      {needed} of {chip.memory:g} GiB: {'fits' if report['fits'] else 'does not fit'} ({sizes})"
    total, limit = report["estimated_mcycles"], report["matmul_limit_mcycles"]
    if total is None:
        yield f"  warning: no cycles and no collectives: {report['compiler']}"
        return
    yield (
        f"  cycles      {total:,.1f} M estimated, {report['estimated_milliseconds']:.1f} ms at {chip.clock:g} GHz; "
        f"matmul limit {limit:,.1f} M ({total / limit:.2f} ×)"
    )
    for name, count in report["groups"].items():
        yield f"  {count:>10,.2f}  {count / total:4.0%}  {name}"
    uncounted = ", ".join(f"{count} {kind}" for kind, count in report["without_estimate"].items())
    if uncounted:
        yield f"  not counted {report['ops_without_estimate']} ops without an estimate: {uncounted}"
    if report["loops_of_unknown_length"]:
        yield f"  warning: {report['loops_of_unknown_length']} loops of unknown length count as if they ran once"
    received = ", ".join(f"{kind} {amount / 2**20:,.2f} MiB" for kind, amount in report["collective_bytes"].items())
    yield f"  collectives {received or 'none'}"


def main(argv: list[str]) -> None:
    """Parse the flags, compile the steps, and report their memory and cycles."""
    args, overrides = _parser().parse_known_args(argv)
    jax.config.update("jax_enable_compilation_cache", False)  # JAX cannot load a program for a device that is not here
    names = [name.strip() for name in args.steps.split(",")]
    for name in names:
        if name not in STEPS:
            raise ConfigError(f"--steps {name}: no such step{nearest(name, STEPS)}; choose from {', '.join(STEPS)}")
    chip, config = chip_of(args.topology), load(args.config, overrides)
    mesh = make_mesh(dataclasses.astuple(config.mesh), devices_of(args.topology))
    sizes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    terminal.log(f"{args.topology}: {mesh.devices.size} chips of {chip.memory:g} GiB · mesh {sizes}")
    reports: list[dict[str, Any]] = []
    _write(args.json, args.topology, mesh, reports)  # so that an unwritable path fails before anything is compiled
    for step in steps(config, mesh, Override(args.rows_per_chip, args.row_length, args.unpacked), names):
        terminal.log(f"{step.name}: compiling, which takes a minute or two for a base encoder …")
        started = time.monotonic()
        report = compile_and_measure(step, chip, mesh) | {"compile_seconds": round(time.monotonic() - started, 1)}
        for line in lines(report, chip):
            terminal.log(line)
        reports.append(report)
        _write(args.json, args.topology, mesh, reports)  # after each step, so that an interruption loses only one
    too_large = [report["step"] for report in reports if not report["fits"]]
    if too_large:
        raise ConfigError(
            f"{', '.join(too_large)}: more than the {chip.memory:g} GiB of a chip; lower batch_size or "
            "evaluation_batch_size, or set mesh.fsdp, accumulation, or remat"
        )


def _write(path: Path | None, topology: str, mesh: jax.sharding.Mesh, reports: Sequence[Mapping[str, Any]]) -> None:
    """Write the reports of all steps so far as JSON, if there is a path."""
    if path is not None:
        record = {"topology": topology, "chips": mesh.devices.size, "steps": reports}
        storage.write_atomically(path, json.dumps(record, indent=2, allow_nan=False) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = terminal.parser(
        "precompile",
        __doc__,
        "Every setting of the config is a flag: --config.mesh.fsdp=8. The exit status is 0 if every step fits "
        "into a chip, and 2 if one does not fit (the JSON is written anyway).",
    )
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help="the experiment's config; see configs/")
    parser.add_argument("--topology", required=True, metavar="NAME", help=f"the TPU topology, such as {EXAMPLES}")
    parser.add_argument(
        "--json", type=terminal.path_argument, metavar="FILE", help="also write the reports of all steps as JSON"
    )
    parser.add_argument(
        "--steps", default=",".join(STEPS), metavar="A,B", help="the steps to compile (default: %(default)s)"
    )
    parser.add_argument(
        "--rows-per-chip", type=_count, metavar="N", help="rows per shard of data × fsdp (default: the experiment's)"
    )
    parser.add_argument("--row-length", type=_count, metavar="S", help="tokens per row (default: the experiment's)")
    parser.add_argument("--unpacked", action="store_true", help="put one text in each row")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _MAX_COUNT:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {_MAX_COUNT:,}")
    return int(text)


if __name__ == "__main__":
    terminal.run(main)
