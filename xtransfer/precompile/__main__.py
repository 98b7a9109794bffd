"""Compile an experiment's steps for a TPU topology, without a TPU.

    python -m xtransfer.precompile --config FILE[:arg] --topology v5e:2x4 [--json F] [--config.key=value …]

These are the same steps that `xtransfer.main` runs. For each step it reports a chip's memory, the estimated cycles and
what they are spent on, and collectives. It needs the package `libtpu` and reads no weights.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from xtransfer import config as settings
from xtransfer import storage
from xtransfer.errors import UserError, nearest
from xtransfer.precompile.measure import measure
from xtransfer.precompile.steps import STEPS, Override, steps
from xtransfer.precompile.topology import EXAMPLES, Chip, chip_of, devices_of
from xtransfer.runtime import terminal
from xtransfer.runtime.sharding import make_mesh

_MOST = 2**20  # rows per chip, or tokens per row


def lines(row: Mapping[str, Any], chip: Chip) -> Iterator[str]:
    """Yield what the terminal shows about a step."""
    sizes = "/".join(map(str, row["row_sizes"]))
    shapes = "1 shape" if row["batch_shapes"] == 1 else f"{row['batch_shapes']} shapes, of which this is the largest"
    per_chip = f"{row['rows_per_chip']} rows of {row['row_length']} tokens per chip"
    per_chip += f" in {row['parts']} microbatches" if row["parts"] > 1 else ""
    yield f"{row['step']}: {per_chip} (batches of {sizes} rows: {shapes})"
    needed = "more" if row["hbm_gib"] is None else f"{row['hbm_gib']:.2f} GiB"
    if "arguments_gib" not in row:
        yield f"  memory      does not fit: {needed} of {chip.memory:g} GiB; {row['compiler']}"
        return
    parts = ", ".join(f"{key} {row[f'{key}_gib']:.2f}" for key in ("arguments", "temporaries", "outputs", "code"))
    yield f"  memory      {needed} of {chip.memory:g} GiB: {'fits' if row['fits'] else 'does not fit'} ({parts})"
    total, limit = row["estimated_mcycles"], row["matmul_limit_mcycles"]
    if total is None:
        yield f"  warning: no cycles and collectives: {row['compiler']}"
        return
    yield (
        f"  cycles      {total:,.1f} M estimated, {row['estimated_milliseconds']:.1f} ms at {chip.clock:g} GHz; "
        f"matmul limit {limit:,.1f} M ({total / limit:.2f} ×)"
    )
    for name, count in row["groups"].items():
        yield f"  {count:>10,.2f}  {count / total:4.0%}  {name}"
    without = ", ".join(f"{count} {kind}" for kind, count in row["without_estimate"].items())
    if without:
        yield f"  not counted {row['ops_without_estimate']} ops without an estimate: {without}"
    if row["loops_of_unknown_length"]:
        yield f"  warning: {row['loops_of_unknown_length']} loops of unknown length count as if they ran once"
    moved = ", ".join(f"{kind} {amount / 2**20:,.2f} MiB" for kind, amount in row["collective_bytes"].items())
    yield f"  collectives {moved or 'none'}"


def main(argv: list[str]) -> None:
    """Parse the flags, compile the steps, and report what they need."""
    args, overrides = _parser().parse_known_args(argv)
    names = [name.strip() for name in args.steps.split(",")]
    for name in names:
        if name not in STEPS:
            raise UserError(f"--steps {name}: no such step{nearest(name, STEPS)}; choose from {', '.join(STEPS)}")
    chip, config = chip_of(args.topology), settings.load(args.config, overrides)
    mesh = make_mesh(dataclasses.astuple(config.mesh), devices_of(args.topology))
    sizes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    terminal.log(f"{args.topology}: {mesh.devices.size} chips of {chip.memory:g} GiB · mesh {sizes}")
    rows: list[dict[str, Any]] = []
    _write(args.json, args.topology, mesh, rows)  # a path that cannot be written fails before anything is compiled
    for step in steps(config, mesh, Override(args.rows_per_chip, args.row_length, args.unpacked), names):
        terminal.log(f"{step.name}: compiling, which takes a minute or two for a base encoder …")
        started = time.monotonic()
        rows.append(measure(step, chip, mesh) | {"compile_seconds": round(time.monotonic() - started, 1)})
        for line in lines(rows[-1], chip):
            terminal.log(line)
        _write(args.json, args.topology, mesh, rows)  # after each step, so that an interruption costs only one
    large = [row["step"] for row in rows if not row["fits"]]
    if large:
        raise UserError(
            f"{', '.join(large)}: more than the {chip.memory:g} GiB of a chip: lower batch_size or "
            "evaluation_batch_size, or set mesh.fsdp, accumulation, or remat"
        )


def _write(path: Path | None, topology: str, mesh: jax.sharding.Mesh, rows: Sequence[Mapping[str, Any]]) -> None:
    if path is not None:
        report = {"topology": topology, "chips": mesh.devices.size, "steps": rows}
        storage.write_atomically(path, json.dumps(report, indent=2, allow_nan=False) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m xtransfer.precompile",
        description=__doc__.partition("\n")[0],
        epilog="Every setting of the config is a flag: --config.mesh.fsdp=8. The exit status is 0 if every step fits "
        "into a chip, and 1 if one does not (the JSON is written anyway) or if the input is wrong.",
    )
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help="the experiment, see configs/")
    parser.add_argument("--topology", required=True, metavar="NAME", help=f"the chips, like {EXAMPLES}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one object per step for programs")
    parser.add_argument(
        "--steps", default=",".join(STEPS), metavar="A,B", help="the steps to compile (default: %(default)s)"
    )
    parser.add_argument("--rows-per-chip", type=_count, metavar="N", help="rows of a batch per shard of data × fsdp")
    parser.add_argument("--row-length", type=_count, metavar="S", help="tokens per row")
    parser.add_argument("--unpacked", action="store_true", help="one text per row")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {_MOST:,}")
    return int(text)


if __name__ == "__main__":
    terminal.run(main)
