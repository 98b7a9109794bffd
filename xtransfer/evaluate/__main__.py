"""Score the checkpoints of an experiment, at any time or as they land, or any classifier on any task.

    python -m xtransfer.evaluate --workdir DIR

scores the best and the last checkpoint of every finished run in every language, and adds the missing results to
DIR/results.jsonl. Runs that are still in training have their checkpoints scored by step, in DIR/watch.jsonl. --split
and --languages score another split, or other languages of the task's data.

    python -m xtransfer.evaluate --workdir DIR --watch

follows a training run in another process, and scores each checkpoint as it lands, until the run ends. It fails if the
training run dies and none comes back.

    python -m xtransfer.evaluate --model DIR --config FILE[:ARG] [--config.key=value …] [--output DIR]

scores a run or a Hugging Face classifier on the task of a config, in the languages and on the split of your choice. The
model may be a finished run of a workdir, DIR/students/OBJECTIVE/seed-N.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import Any

from xtransfer.data.task import SPLITS, UNLABELLED
from xtransfer.errors import ConfigError
from xtransfer.evaluate import step_table
from xtransfer.evaluate.model import Request, evaluate_model
from xtransfer.evaluate.opening import Experiment, Scope, open_experiment
from xtransfer.evaluate.watch import Patience, score_once, watch
from xtransfer.evaluation import evaluator
from xtransfer.evaluation.evaluator import Run
from xtransfer.report.workdir_report import report
from xtransfer.runs.find import SELECTIONS
from xtransfer.runs.workdir import TEACHER, Workdir
from xtransfer.runtime import cluster, locks, processes, terminal

_MODEL_FLAGS = ("selection", "output", "export_xtreme")
_SHOWN = 3  # the most unfinished runs that a line names
_WATCH_FLAGS = ("interval", "timeout", "grace")


def main(argv: list[str]) -> None:
    """Parse the flags, and score."""
    parser = _parser()
    args, overrides = parser.parse_known_args(argv)
    _check_flags(args, overrides)
    terminal.start(cluster.parse_flags(args))
    names = _names(args.metrics, "--metrics")
    if args.model is not None:
        evaluate_model(
            Request(
                model=args.model,
                config=args.config or "",
                overrides=overrides,
                languages=_names(args.languages, "--languages"),
                split=args.split or "test",
                selection=args.selection or "source_dev",
                metrics=names,
                output=args.output,
                xtreme=args.export_xtreme,
            )
        )
    elif args.watch:
        seconds = {name: getattr(args, name) for name in _WATCH_FLAGS if getattr(args, name) is not None}
        watch(Workdir(args.workdir), Patience(**seconds), _scope(args, names))
    else:
        _evaluate_workdir(Workdir(args.workdir), _scope(args, names))


def _scope(args: argparse.Namespace, names: tuple[str, ...]) -> Scope:
    return Scope(names, args.split or "", _names(args.languages, "--languages"))


def _evaluate_workdir(workdir: Workdir, scope: Scope) -> None:
    """Score the selected checkpoints of finished runs, and report them; score those of the other runs by step."""
    experiment = open_experiment(workdir, scope)
    config, languages = experiment.config, experiment.languages
    with locks.group_lock(workdir.root, "evaluation"):
        rows = evaluator.evaluate(workdir, config, experiment.task, experiment.models, languages)
    processes.on_first(lambda: _report(experiment, scope, rows))
    unfinished = evaluator.unfinished(workdir, config)
    if unfinished and processes.count() > 1:
        terminal.log(f"{_not_finished(unfinished)}, and not scored: only a single process scores checkpoints by step")
    elif unfinished:
        terminal.log(f"{_not_finished(unfinished)}: checkpoints are scored by step")
        score_once(experiment, unfinished)


def _report(experiment: Experiment, scope: Scope, rows: Sequence[Mapping[str, Any]]) -> None:
    """Report the finished students; in some languages alone, print a table of their selected checkpoints."""
    workdir = experiment.workdir
    if all(row["objective"] == TEACHER for row in rows):
        terminal.log(f"{workdir.root}: no student is finished yet, so there is no report")
    elif scope.languages:
        chosen = [
            dict(row)
            for row in rows
            if row["selection"] == "source_dev"
            and row["split"] in experiment.config.evaluation_splits
            and row["language"] in scope.languages
        ]
        step_table.show(chosen, experiment.task, experiment.config.metrics, experiment.objectives)
        terminal.log(f"written: {workdir.results}")
    else:
        report(workdir, split=scope.split or None)


def _not_finished(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return f"{runs[0].name} is not finished"
    more = f" and {len(runs) - _SHOWN} more" if len(runs) > _SHOWN else ""
    return f"{len(runs)} runs are not finished ({', '.join(run.name for run in runs[:_SHOWN])}{more})"


def _parser() -> argparse.ArgumentParser:
    parser = terminal.parser(
        "evaluate", __doc__, epilog="With --config, every setting of the task is a flag: --config.task.data_dir=DIR"
    )
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--workdir", type=terminal.path_argument, metavar="DIR", help="the workdir of xtransfer.main")
    subject.add_argument(
        "--model",
        type=terminal.path_argument,
        metavar="DIR",
        help="a finished run, a Hugging Face classifier, or its hub id with an optional @revision",
    )
    parser.add_argument(
        "--metrics", metavar="NAME,…", help="the metrics, see evaluation/metrics.py (default: the config's)"
    )
    parser.add_argument("--languages", metavar="NAME,…", help="the languages (default: all of the config's task)")
    parser.add_argument(
        "--split",
        choices=[name for name in SPLITS if name != UNLABELLED],
        help="the split (default: test; with --workdir, the config's)",
    )
    watching = parser.add_argument_group("with --workdir")
    watching.add_argument("--watch", action="store_true", help="score each checkpoint as it lands, until training ends")
    default = Patience()
    watching.add_argument(
        "--interval", type=_seconds, metavar="SECONDS", help=f"time between two looks (default: {default.interval:g})"
    )
    watching.add_argument(
        "--timeout",
        type=_seconds,
        metavar="SECONDS",
        help=f"fail after this time without a new checkpoint; 0 is never (default: {default.timeout:g})",
    )
    watching.add_argument(
        "--grace",
        type=_seconds,
        metavar="SECONDS",
        help=f"fail if no training run starts, or comes back, within this time (default: {default.grace:g})",
    )
    scoring = parser.add_argument_group("with --model")
    scoring.add_argument(
        "--config", metavar="FILE[:ARG]", help="a config with the task, see configs/ (default: the run's own)"
    )
    scoring.add_argument(
        "--selection", choices=SELECTIONS, help="the protocol that selects a run's checkpoint (default: source_dev)"
    )
    scoring.add_argument(
        "--output", type=terminal.path_argument, metavar="DIR", help="write results.jsonl and predictions/ to it"
    )
    scoring.add_argument(
        "--export-xtreme",
        type=terminal.path_argument,
        metavar="DIR",
        help="write the predictions on xnli or paws_x for the XTREME benchmark",
    )
    cluster.add_flags(parser)
    return parser


def _check_flags(args: argparse.Namespace, overrides: list[str]) -> None:
    """Refuse flags that do not belong to the requested mode."""
    if args.workdir is not None:
        if overrides:
            raise ConfigError(f"unknown flag {overrides[0]}: with --workdir, the settings are those of the experiment")
        if args.config is not None:
            raise ConfigError(
                "--config needs --model: to score a finished run on another task, give its directory: "
                f"--model {args.workdir / 'students' / 'OBJECTIVE' / 'seed-N'}"
            )
        _refuse(args, _MODEL_FLAGS, "--model")
    if args.model is not None:
        _refuse(args, ("watch",), "--workdir")
    if not args.watch:
        _refuse(args, _WATCH_FLAGS, "--watch")


def _refuse(args: argparse.Namespace, names: tuple[str, ...], needed: str) -> None:
    for name in names:
        if getattr(args, name) not in (None, False):
            raise ConfigError(f"--{name.replace('_', '-')} needs {needed}")


def _names(text: str | None, flag: str) -> tuple[str, ...]:
    """Return comma-separated names, each once; () for none given."""
    if text is None:
        return ()
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise ConfigError(f"{flag} {text}: expected names with commas between them, each only once")
    return names


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, 0 or more")
    return seconds


if __name__ == "__main__":
    terminal.run(main)
