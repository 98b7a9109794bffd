"""Rows of a stream, such as a member of an archive, by the readers of the user's own files."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from xtransfer.data import files
from xtransfer.errors import UserError

_BOM = b"\xef\xbb\xbf"
_MAX_LINE = 64 << 20  # bytes


def lines(stream: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
    r"""The lines of a UTF-8 stream with their numbers, from 1; only "\n" ends a line, and stays on it.

    A byte-order mark at the beginning is dropped. One line is held at a time.

    Raises:
      UserError: `name`:line for what is not UTF-8, or has over 64 MiB.
    """
    number = 0
    while data := stream.readline(_MAX_LINE + 1):
        number += 1
        if len(data) > _MAX_LINE:
            raise UserError(f"{name}:{number}: a line of over {_MAX_LINE >> 20} MiB")
        if number == 1:
            data = data.removeprefix(_BOM)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{name}:{number}: byte 0x{data[error.start]:02x} is not UTF-8") from None
        if text:
            yield number, text


def rows(stream: BinaryIO, name: str, ending: str) -> Iterator[files.Row]:
    """The rows of a stream by the reader of an ending (".tsv", ".csv", ".jsonl"), with the line that each starts on.

    Args:
      stream: UTF-8.
      name: of the file or member, for errors.
      ending: tells the format, as in `files.READERS`.

    Raises:
      UserError: `name`:line and what is wrong there.
    """
    yield from files.READERS[ending](lines(stream, name), Path(name))
