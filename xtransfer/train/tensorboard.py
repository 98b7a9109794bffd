"""TensorBoard's event files, written without TensorFlow in `<run>/tensorboard/`. Only this module imports tensorboard.

Each start of a run adds a file. It begins with the step that the run resumes after, and TensorBoard drops what earlier
files have of that step and later ones, so no step is shown twice. Every record is passed to the system at once, so a
killed process leaves a file that ends with a whole record.
"""

import importlib.util
import socket
import time
from collections.abc import Mapping
from typing import Any

from xtransfer.errors import ConfigError
from xtransfer.train.tracking import Run

FOLDER = "tensorboard"
_VERSION = "brain.Event:2"  # the first version in which the start of a session drops later steps


def check_installed() -> None:
    """Refuse to start without the package."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "--tensorboard needs a package that is not installed: pip install tensorboard, or set "
            "XTRANSFER_EXTRAS=tensorboard for the launch scripts"
        )


class TensorBoard:
    """A `tracking.Logger` that writes event files. Its methods raise an OSError if the disk refuses."""

    def start(self, run: Run, settings: Mapping[str, Any]) -> None:
        """Open a new event file. The settings are in `config.json`, and are not repeated here."""
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = run.directory / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names. The last number orders two starts in one second.
        number = len(list(folder.iterdir()))
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{number:06d}"
        self._writer = RecordWriter((folder / name).open("xb"))
        self._write(file_version=_VERSION)
        self._write(step=run.resumed_from + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write one event with all values, as float32."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        pairs = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step=step, summary=Summary(value=pairs))

    def finish(self, status: str) -> None:
        """Close the file."""
        self._writer.close()

    def _write(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.write(Event(wall_time=time.time(), **fields).SerializeToString())
        self._writer.flush()
