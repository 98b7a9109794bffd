"""Run an experiment from the teacher to the report, or resume it.

    python -m xtransfer.main --config configs/quickstart.py --workdir runs/quickstart [--config.key=value …]

runs one experiment.

    python -m xtransfer.main --config FILE[:ARG] --workdir DIR --sweep KEY=VALUE,VALUE,… [--sweep …]

runs one for every combination of values, each in a workdir of its own below DIR/points. They share what does not depend
on the values: a sweep over the temperature trains the teacher and `vanilla` once.
"""

import shlex
from pathlib import Path

from xtransfer import config, experiment
from xtransfer.errors import ConfigError
from xtransfer.report.sweep_report import report_sweep
from xtransfer.report.workdir_report import report
from xtransfer.runs import sweep
from xtransfer.runs.draws import draws_of
from xtransfer.runs.workdir import Workdir
from xtransfer.runtime import cluster, processes, terminal
from xtransfer.train import logger_flags
from xtransfer.train.checkpoints import FALL_BACK_FLAG, FALL_BACK_HELP


def main(argv: list[str]) -> None:
    """Parse the flags, run the stages, and report."""
    parser = terminal.parser(
        "main", __doc__, "Every setting of the config is a flag: --config.student.learning_rate=3e-5"
    )
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help="the experiment, see configs/")
    parser.add_argument(
        "--workdir",
        required=True,
        type=terminal.path_argument,
        metavar="DIR",
        help="the directory that the run writes to",
    )
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=VALUE,…",
        help="run the experiment with each of these values; several flags run every combination",
    )
    parser.add_argument(FALL_BACK_FLAG, action="store_true", help=FALL_BACK_HELP)
    logger_flags.add_flags(parser)
    cluster.add_flags(parser)
    args, overrides = parser.parse_known_args(argv)
    terminal.start(cluster.parse_flags(args))
    loggers = logger_flags.parse_flags(args)
    if args.sweep:
        points = sweep.parse(args.config, overrides, args.sweep)
        failure = experiment.run_sweep(points, args.workdir, from_earlier_step=args.from_earlier_step, loggers=loggers)
        try:
            processes.on_first(lambda: _report_sweep(args.workdir))
        finally:  # the finished points have a table, whatever happened to the others
            if failure is not None:
                raise failure
        return
    if sweep.is_sweep(args.workdir):
        raise ConfigError(f"{args.workdir} holds a sweep: add its --sweep flags, or choose another --workdir")
    settings = config.load(args.config, overrides)
    experiment.run(settings, args.workdir, from_earlier_step=args.from_earlier_step, loggers=loggers)
    processes.on_first(lambda: _finish(Workdir(args.workdir), settings))


def _report_sweep(root: Path) -> None:
    """Report, and return nothing, because a result would have to pass to the other processes as JSON."""
    report_sweep(root)


def _finish(workdir: Workdir, settings: config.ExperimentConfig) -> None:
    """Report the results, and say what to do with the models."""
    report(workdir)
    objective = "monox_kd" if "monox_kd" in settings.objectives else settings.objectives[-1]
    run = workdir.at(draws_of(settings)[0].name).student(objective, settings.seeds[0])
    model = shlex.quote(str(run))
    terminal.log(f"classify text: python -m xtransfer.predict --model {model} --input FILE --output FILE")
    if settings.task.name == "minireviews":
        terminal.log("your own text and encoders: see README.md, 'Your own data' and 'Your own checkpoints'")


if __name__ == "__main__":
    terminal.run(main)
