"""The exceptions that a user is meant to read, and the statuses with which every command exits.

    Exception
    └── UserError                  something the user can fix, in one line; always one of these:
        ├── ConfigError        2   a flag, a setting, or a config file
        ├── DataError          3   a task's data, text to label, or results
        │   ├── MissingSplitError  a task has no such split in a language
        │   └── DamagedError       an archive is truncated or corrupt (`data.corpora.archives`)
        ├── CheckpointError    4   a checkpoint, a tokenizer, or a file of a working directory
        ├── MachineError       5   disk, memory, permissions, devices, network, or standard output
        ├── BusyError          6   another process holds a directory, a file, or a port
        ├── DivergedError      7   a loss, a parameter, or a logit is not finite
        ├── StalledError     124   nothing new came in time from the run that a command follows
        └── LostError        134   the run that a command follows has died

Anything else that is raised is a defect of the program, and shows its stack trace.
"""

import difflib
import enum
import errno
import os
import re
from collections.abc import Iterable
from typing import ClassVar, Self


class Exit(enum.IntEnum):
    """The exit statuses of every command. The README shows this table, and the launch scripts act on it.

    Attributes:
      meaning: the reason for the status, for people.
    """

    meaning: str

    def __new__(cls, status: int, meaning: str) -> Self:
        """Create a member that is the integer `status`."""
        member = int.__new__(cls, status)
        member._value_ = status
        member.meaning = meaning
        return member

    DONE = 0, "done"
    DEFECT = 1, "a defect of xtransfer, to report with the lines above the message; or `parity` finds a difference"
    CONFIG = 2, "a flag, a setting, or a config file is wrong"
    DATA = 3, "a task's data, text to label, or results cannot be used"
    CHECKPOINT = 4, "a checkpoint, a tokenizer, or a file of a working directory cannot be used"
    MACHINE = 5, "the machine refuses: disk, memory, permissions, devices, network, or standard output"
    BUSY = 6, "another process holds the directory, the file, or the port: wait for it"
    DIVERGED = 7, "training diverged: a loss, a parameter, or a logit is not finite"
    STALLED = 124, "no progress for `--stall-timeout` seconds: the message has the stacks; or `--watch` saw nothing new"
    INTERRUPTED = 130, "Ctrl-C: run the same command again to resume"
    LOST = 134, "another process of the same run died, or the run that `--watch` follows: see its log"
    PREEMPTED = 143, "SIGTERM or SIGHUP: the work is saved; run the same command again to resume"


class UserError(Exception):
    """Something the user can fix: one line that names the thing and says what to do.

    Raise one of its subclasses. The commands print it without a stack trace and exit with its status (see
    `runtime.terminal`).

    Attributes:
      exit_status: the status with which a command exits.
    """

    exit_status: ClassVar[Exit] = Exit.DEFECT


class ConfigError(UserError):
    """A flag, a setting, or a config file is wrong."""

    exit_status = Exit.CONFIG


class DataError(UserError):
    """A task's data, text to label, or results cannot be used."""

    exit_status = Exit.DATA


class CheckpointError(UserError):
    """A checkpoint, a tokenizer, or a file of a working directory cannot be used."""

    exit_status = Exit.CHECKPOINT


class MachineError(UserError):
    """The machine refuses: disk, memory, permissions, devices, network, or standard output."""

    exit_status = Exit.MACHINE


class BusyError(UserError):
    """Another process holds a directory, a file, or a port."""

    exit_status = Exit.BUSY


class DivergedError(UserError):
    """Training diverged: a loss, a parameter, or a logit is not finite."""

    exit_status = Exit.DIVERGED


class StalledError(UserError):
    """Nothing new came in time from the run that a command follows."""

    exit_status = Exit.STALLED


class LostError(UserError):
    """The run that a command follows has died."""

    exit_status = Exit.LOST


KINDS = (
    ConfigError,
    DataError,
    CheckpointError,
    MachineError,
    BusyError,
    DivergedError,
    StalledError,
    LostError,
)


def user_error(status: int, message: str) -> UserError:
    """Return the kind of error that exits with `status`, with a message.

    This passes an error to another process, and gives it a longer message: `user_error(error.exit_status, …)`.
    """
    return next((kind for kind in KINDS if kind.exit_status == status), UserError)(message)


class MissingSplitError(DataError):
    """A task has no such split in a language.

    Attributes:
      split: the split's name.
      language: the language, as the task names it.
    """

    def __init__(self, split: str, language: str, message: str):
        super().__init__(message)
        self.split, self.language = split, language


def nearest(name: str, names: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` with the nearest of `names`, or "" if none is near."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def is_disk_full(error: BaseException) -> bool:
    """Return whether a disk, a quota, or a limit on files left no space, by the error's number or its text."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError) and error.errno in numbers:
        return True
    # C++ libraries raise classes of their own, with the system's text in their message.
    texts = (os.strerror(number) for number in numbers)
    return any(text in str(error) for text in (*texts, *(errno.errorcode[number] for number in numbers)))


def refuse_url(text: str) -> None:
    """Refuse the address of object storage in place of a path; the caller adds the flag or key.

    Raises:
      UserError: the text starts with a scheme, as in gs://bucket/folder.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise ConfigError(f"{text!r} is an address and not a path: give a directory of a local or mounted disk")


def one_line(error: BaseException | str, limit: int = 200) -> str:
    """Return an error, or its text, on one line of at most `limit` characters; return its class if it has no text."""
    return " ".join(str(error).split())[:limit] or type(error).__name__
