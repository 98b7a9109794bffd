"""Measure training, labelling, prediction, and tokenising on this machine, also against transformers.

    python -m xtransfer.benchmark [--checkpoint DIR] [--text FILE…] [--against transformers] [--config.key=value …]

    python -m xtransfer.benchmark --growth N [--directory DIR] [--json FILE]

Each side runs in bursts of the same work, and with `--against` the two sides take turns, so that a change in the
machine's speed meets both. A second process then shows how long a start takes that finds its programs compiled. The
settings are those of an experiment's student. Nothing is kept but the JSON.

`--growth` instead runs the stages of an experiment on N unlabelled synthetic texts, each stage in a process of its own,
and reports its time and its peak memory. The host's work shows, because the encoders are random and have one layer.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import shlex
import tempfile
from pathlib import Path
from typing import Any

from xtransfer import config, storage
from xtransfer.benchmark import growth, peer, report
from xtransfer.benchmark.measurement import OURS, PARTS, PEER, Measurement, Plan, measure
from xtransfer.config import BenchmarkConfig
from xtransfer.data.corpora.minireviews import generator
from xtransfer.errors import ConfigError, MachineError, nearest
from xtransfer.report import table as table_writer
from xtransfer.runtime import processes, terminal
from xtransfer.trim import text as text_files

_FORMAT = 1
_MOST_TEXTS = 10_000  # the first of the files; bursts of more examples repeat them
_SHORT_FLAGS = ("checkpoint", "batch_size", "max_length")  # keys of the student that have a flag of their own
_MOST_SECONDS = 3600


def main(argv: list[str]) -> None:
    """Parse the flags, measure, and report."""
    args, overrides = _parser().parse_known_args(argv)
    if args.growth is not None:
        _measure_growth(args, argv)
        return
    if args.directory is not None:
        raise ConfigError("--directory is for --growth: leave it out")
    settings: BenchmarkConfig = config.override_defaults(_with_short_flags(args, overrides), BenchmarkConfig)
    plan = Plan(_parts(args.parts), args.pairs, args.seconds)
    if args.against and not peer.available():
        raise MachineError(
            "--against transformers needs PyTorch, which is not installed: install the extra torch, with "
            "XTRANSFER_EXTRAS=torch launch/test.sh --version"
        )
    if args.json is not None and args.json.exists():
        raise ConfigError(f"{args.json} already exists; choose another file for --json")
    texts = _texts(args)
    record = _conditions(args, argv, settings)
    with contextlib.ExitStack() as stack:
        # Opened first, so that an unwritable path fails now and not after the measurement.
        output = None if args.json is None else stack.enter_context(storage.AtomicFile(args.json, exclusive=True))
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="xtransfer-benchmark-"))
        file = Path(scratch) / "texts.json"
        file.write_text(json.dumps(texts), encoding="utf-8")
        measurement = measure(
            plan,
            record["config"],
            file,
            processes.cores(),
            against=args.against is not None,
            on_part=lambda part: _log_progress(part, plan),
            on_second_start=lambda: terminal.log("second start: a new process with the programs of the first …"),
        )
        record |= _results(args, texts, measurement)
        record["machine"] |= report.devices(measurement)
        show(record, measurement)
        if output is not None:
            output.write((json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())
            output.commit()


def _measure_growth(args: argparse.Namespace, argv: list[str]) -> None:
    """Measure the stages on a number of texts, print a table, and write the JSON."""
    flags = [text for text in argv if text.startswith("--")]
    known = ("--growth", "--directory", "--json")
    other = next((flag for flag in flags if flag.partition("=")[0] not in known), None)
    if other is not None:
        raise ConfigError(f"{other}: with --growth, the only other flags are --directory and --json: leave it out")
    if args.json is not None and args.json.exists():
        raise ConfigError(f"{args.json} already exists; choose another file for --json")
    with contextlib.ExitStack() as stack:
        output = None if args.json is None else stack.enter_context(storage.AtomicFile(args.json, exclusive=True))
        directory = args.directory or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="xtransfer-growth-")))
        costs = growth.measure(args.growth, directory)
        table = growth.table(costs, args.growth)
        print("\n".join([table.title, "", *table_writer.markdown(table)]))
        if output is not None:
            record = {
                "format": _FORMAT,
                "command": shlex.join(["python", "-m", "xtransfer.benchmark", *argv]),
                "texts": args.growth,
                "machine": report.machine(),
                "versions": report.versions(),
                "stages": [dataclasses.asdict(cost) for cost in costs],
            }
            output.write((json.dumps(record, indent=2) + "\n").encode())
            output.commit()


def _conditions(args: argparse.Namespace, argv: list[str], settings: BenchmarkConfig) -> dict[str, Any]:
    """Return the part of the JSON that is known before anything runs."""
    return {
        "format": _FORMAT,
        "command": shlex.join(["python", "-m", "xtransfer.benchmark", *argv]),
        "against": args.against,
        "pairs": args.pairs,
        "seconds": args.seconds,
        "machine": report.machine(),
        "versions": report.versions(),
        "config": dataclasses.asdict(settings),
    }


def _results(args: argparse.Namespace, texts: list[str], measurement: Measurement) -> dict[str, Any]:
    """Return the rest of the JSON."""
    facts = measurement.sides[OURS].facts
    return {
        "texts": {
            "files": None if args.text is None else [str(path) for path in args.text],
            "number": len(texts),
            "tokens": facts["tokens"],
            "truncated": facts["truncated"],
        },
        "sides": report.sides_as_json(measurement),
        "parts": report.parts_as_json(measurement),
    }


def _log_progress(part: str, plan: Plan) -> None:
    number = plan.parts.index(part) + 1
    terminal.log(f"{number} of {len(plan.parts)}: {part}, {plan.pairs} bursts of about {plan.seconds:g} s …")


def _parser() -> argparse.ArgumentParser:
    parser = terminal.parser(
        "benchmark",
        __doc__,
        "The settings of a student, evaluation_batch_size, mesh, and platform are flags too: "
        "--config.student.compute_dtype=bfloat16",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="an encoder or a classifier: an embedded checkpoint, a directory, or a hub id "
        f"(default: {BenchmarkConfig().student.checkpoint})",
    )
    parser.add_argument(
        "--text",
        nargs="+",
        type=terminal.path_argument,
        metavar="FILE",
        help="the texts: .txt with one per line, .tsv, .csv, .jsonl, or .parquet (default: the synthetic reviews)",
    )
    parser.add_argument(
        "--text-column", default="text", metavar="NAME", help="the column with the texts (default: %(default)s)"
    )
    parser.add_argument(
        "--parts", default=",".join(PARTS), metavar="A,B", help="what to measure (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=_positive, metavar="N", help="texts per batch: short for --config.student.batch_size"
    )
    parser.add_argument(
        "--max-length", type=_positive, metavar="N", help="tokens per text: short for --config.student.max_length"
    )
    parser.add_argument(
        "--pairs",
        type=_positive,
        default=5,
        metavar="N",
        help="the number of bursts of each side (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds", type=_seconds, default=5.0, metavar="S", help="the length of our bursts (default: %(default)g)"
    )
    parser.add_argument(
        "--against",
        choices=(PEER,),
        help="take turns with the same work in PyTorch and transformers, on the same cores",
    )
    parser.add_argument(
        "--growth", type=_positive, metavar="N", help="measure the stages of an experiment on N synthetic texts instead"
    )
    parser.add_argument(
        "--directory",
        type=terminal.path_argument,
        metavar="DIR",
        help="where --growth keeps its texts, cache, and workdir (default: a temporary directory, which is removed)",
    )
    parser.add_argument(
        "--json", type=terminal.path_argument, metavar="FILE", help="also write everything, with every burst, as JSON"
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of at most nine digits")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= _MOST_SECONDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0 and up to {_MOST_SECONDS}")
    return seconds


def _with_short_flags(args: argparse.Namespace, overrides: list[str]) -> list[str]:
    """Return the overrides with one for each short flag; refuse a setting that is given in both ways."""
    short = []
    for key in _SHORT_FLAGS:
        value, long_flag = getattr(args, key), f"--config.student.{key}"
        if value is None:
            continue
        if any(override.startswith(f"{long_flag}=") for override in overrides):
            raise ConfigError(f"--{key.replace('_', '-')} and {long_flag} are the same setting: give one of them")
        short.append(f"{long_flag}={value}")
    return [*short, *overrides]


def _parts(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in PARTS:
            raise ConfigError(f"--parts {name}: no such part{nearest(name, PARTS)}; choose from {', '.join(PARTS)}")
    if len(set(names)) < len(names):
        raise ConfigError(f"--parts {text}: name each part once")
    return names


def _texts(args: argparse.Namespace) -> list[str]:
    if args.text is None:
        return [review.text for review in generator.reviews("en", "test")]
    return [line.text for line in itertools.islice(text_files.read(args.text, args.text_column), _MOST_TEXTS)]


def show(record: dict[str, Any], measurement: Measurement) -> None:
    """Print the measurement: tables on a terminal, or Markdown elsewhere."""
    machine, texts, student = record["machine"], record["texts"], record["config"]["student"]
    mean = texts["tokens"] / texts["number"]
    title = (
        f"{student['checkpoint']} ({measurement.sides[OURS].facts['parameters'] / 1e6:,.1f} M parameters), "
        f"{texts['number']:,} texts of {mean:.1f} tokens, batches of {student['batch_size']}, "
        f"{student['compute_dtype']}"
    )
    terminal.log(title)
    terminal.log(f"{machine['cpu']}, {machine['cores']} cores; JAX on {machine['devices']} × {machine['device_kind']}")
    terminal.log("")
    for table in report.tables(measurement):
        if terminal.console.is_terminal:
            table_writer.show(table, terminal.console)
        else:
            print("\n".join([*table_writer.markdown(table), ""]))
    for note in report.notes(record, measurement):
        terminal.log(note)


if __name__ == "__main__":
    terminal.run(main, interrupted="nothing was written; run the command again")
