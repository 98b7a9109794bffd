"""Names that users write: which of them look alike, and which may become part of a path.

Two names are alike if they are equal without blanks at their ends, in Unicode's composed form (NFC), and without regard
to case. A reader takes them for one name, so they are never two classes, languages, or columns in silence.
"""

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping

from xtransfer.data import blank
from xtransfer.errors import DataError, nearest

MAX_BYTES = 200  # of a name in a path: file systems allow 255, and files add a split and an ending

_SHOWN = 40  # the most code points to show of one name


def normal(name: str) -> str:
    """Return the form in which names that look alike are equal."""
    composed = blank.strip(unicodedata.normalize("NFC", name))
    return unicodedata.normalize("NFC", composed.casefold())


def with_code_points(name: str) -> str:
    """Return a name with its code points, for an error about names that look alike."""
    points = [f"U+{ord(character):04X}" for character in name]
    return f"{name!r} ({' '.join(points[:_SHOWN])}{' …' if len(points) > _SHOWN else ''})"


def similar(name: str, names: Iterable[str]) -> str:
    """Return `errors.nearest`, or a hint that shows the code points of a name that looks alike."""
    names = list(names)
    alike = [other for other in names if other != name and normal(other) == normal(name)]
    if not alike:
        return nearest(name, names)
    return f"; did you mean {with_code_points(alike[0])}? It looks like {with_code_points(name)}"


def look_alikes(names: Iterable[str]) -> tuple[str, str] | None:
    """Return the first two different names that look alike, in the given order, or None."""
    spellings: dict[str, str] = {}
    for name in names:
        other = spellings.setdefault(normal(name), name)
        if other != name:
            return other, name
    return None


def check_distinct(names: Iterable[str], where: str, remedy: str) -> None:
    """Refuse two different names that look alike; the UserError shows both with their code points.

    Args:
      names: the names, each any number of times.
      where: the start of the message.
      remedy: the end of the message.
    """
    pair = look_alikes(names)
    if pair is not None:
        first, second = map(with_code_points, pair)
        raise DataError(f"{where}: {first} and {second} look alike: {remedy}")


def check_columns(columns: Iterable[str], requested: Iterable[str], where: str) -> None:
    """Refuse a table with another column that looks like a requested one."""
    columns = list(columns)
    for name in requested:
        if name in columns:
            alike = [other for other in columns if normal(other) == normal(name)]
            check_distinct([name, *alike], f"{where}: columns", "rename one of them")


def unify(counts: Mapping[str, int], preferred: Iterable[str] = ()) -> dict[str, str]:
    """Return one spelling for each name, the same for all names that look alike.

    Args:
      counts: how often each name occurs. The most frequent spelling is taken, and among equals the first in order; in
        the composed form, and without blanks at its ends.
      preferred: spellings that come before all others.
    """
    by_frequency = sorted(counts, key=lambda name: (-counts[name], name))
    spellings = {normal(name): name for name in preferred}
    for name in by_frequency:
        spellings.setdefault(normal(name), blank.strip(unicodedata.normalize("NFC", name)))
    return {name: spellings[normal(name)] for name in counts}


def within_limit(name: str) -> str:
    """Return a name of at most `MAX_BYTES` bytes. A longer one is cut, and ends with a digest of the whole."""
    content = name.encode()
    if len(content) <= MAX_BYTES:
        return name
    digest = hashlib.sha256(content).hexdigest()[:8]
    return f"{content[: MAX_BYTES - len(digest) - 1].decode(errors='ignore')}-{digest}"


def check_path_part(name: str, where: str) -> None:
    """Refuse a name that cannot be the name of a file or folder; the UserError starts with `where`."""
    if not name:
        problem = "is empty"
    elif not name.isprintable():  # control characters, and half surrogates, which stand for bytes that are not UTF-8
        problem = "has a character that cannot be printed"
    elif "/" in name or "\\" in name:
        problem = "has a slash, so it would lead to another folder"
    elif name.startswith("."):
        problem = "starts with a dot, so it would be a hidden file or another folder"
    elif len(name.encode()) > MAX_BYTES:
        problem = f"is longer than {MAX_BYTES} bytes"
    else:
        return
    raise DataError(f"{where}: {name[:_SHOWN]!r}{'…' if len(name) > _SHOWN else ''} {problem}: rename it")
