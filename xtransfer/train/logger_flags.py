"""The flags that choose loggers: `--tensorboard`, and `--logger FILE` for a user's own."""

import argparse
import runpy
from pathlib import Path

from xtransfer.errors import ConfigError, one_line
from xtransfer.runtime import processes, terminal
from xtransfer.train import tensorboard
from xtransfer.train.tracking import LoggerSource


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a command that trains; `parse_flags` reads them."""
    parser.add_argument(
        "--tensorboard",
        action="store_true",
        help="write TensorBoard's event files to the folder tensorboard/ of each run",
    )
    parser.add_argument(
        "--logger",
        action="append",
        default=[],
        type=terminal.path_argument,
        metavar="FILE",
        help="a Python file whose get_logger() returns a logger, see CONTRIBUTING.md; may be given more than once",
    )


def parse_flags(args: argparse.Namespace) -> tuple[LoggerSource, ...]:
    """Return the loggers that the flags ask for, in process 0; none in the others.

    Raises:
      ConfigError: a package is missing, or a file cannot be used; in all processes.
    """
    sources: list[LoggerSource] = []

    def load() -> None:
        if args.tensorboard:
            tensorboard.check_installed()
            sources.append(LoggerSource("--tensorboard", tensorboard.TensorBoard))
        sources.extend(_user_logger(path) for path in args.logger)

    processes.on_first(load)
    return tuple(sources)


def _user_logger(path: Path) -> LoggerSource:
    if not path.is_file():
        raise ConfigError(f"--logger {path}: {'a directory, and not a file' if path.is_dir() else 'no such file'}")
    try:
        get_logger = runpy.run_path(str(path)).get("get_logger")
    except (Exception, SystemExit) as error:  # the file is the user's program, so any exception is about the file
        raise ConfigError(f"--logger {path}: {type(error).__name__}: {one_line(error)}") from error
    if not callable(get_logger):
        raise ConfigError(f"--logger {path} has no function get_logger; see 'A logger' in CONTRIBUTING.md")
    return LoggerSource(f"--logger {path}", get_logger)
