"""The exceptions that a user is meant to read.

    Exception
    └── UserError              something the user can fix, in one line
        ├── MissingSplitError  a task has no such split in a language
        └── DamagedError       an archive is truncated or corrupt (`data.corpora.archives`)

Anything else that is raised is a defect of the program, and keeps its stack trace.
"""

import difflib
import errno
import os
import re
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can fix: one line that names the thing and says what to do.

    The commands print it without a stack trace and exit with status 1 (see `runtime.terminal`).
    """


class MissingSplitError(UserError):
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
        raise UserError(f"{text!r} is an address and not a path: give a directory of a local or mounted disk")


def one_line(error: BaseException | str, limit: int = 200) -> str:
    """Return an error, or its text, on one line of at most `limit` characters; return its class if it has no text."""
    return " ".join(str(error).split())[:limit] or type(error).__name__
