"""Run an experiment from the teacher to the report, or resume it.

python -m xtransfer.main --config configs/quickstart.py --workdir runs/quickstart [--config.key=value …]
"""

import shlex

from xtransfer import config, experiment
from xtransfer.report.workdir_report import report
from xtransfer.runs.workdir import Workdir
from xtransfer.runtime import cluster, processes, terminal
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
    parser.add_argument(FALL_BACK_FLAG, action="store_true", help=FALL_BACK_HELP)
    cluster.add_flags(parser)
    args, overrides = parser.parse_known_args(argv)
    terminal.start(cluster.parse_flags(args))
    settings = config.load(args.config, overrides)
    experiment.run(settings, args.workdir, from_earlier_step=args.from_earlier_step)
    processes.on_first(lambda: _finish(Workdir(args.workdir), settings))


def _finish(workdir: Workdir, settings: config.ExperimentConfig) -> None:
    """Report the results, and say what to do with the models."""
    report(workdir)
    objective = "monox_kd" if "monox_kd" in settings.objectives else settings.objectives[-1]
    run = workdir.student(objective, settings.seeds[0])
    model = shlex.quote(str(run))
    terminal.log(f"classify text: python -m xtransfer.predict --model {model} --input FILE --output FILE")
    if settings.task.name == "minireviews":
        terminal.log("your own text and encoders: see README.md, 'Your own data' and 'Your own checkpoints'")


if __name__ == "__main__":
    terminal.run(main)
