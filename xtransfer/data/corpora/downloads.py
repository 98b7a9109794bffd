"""Files from their publishers, checked against their sha256, and in place only when complete."""

import contextvars
import hashlib
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests

from xtransfer import storage
from xtransfer.data.corpora.archives import is_web_page, unpacked_name
from xtransfer.data.corpora.corpus import Download
from xtransfer.errors import DataError, MachineError, one_line
from xtransfer.runtime import terminal

_CHUNK = _MIB = 1 << 20
_TIMEOUT = 60.0  # seconds without a byte
_WAITS = (1.0, 4.0, 16.0)  # seconds before each further attempt
_BUSY = (429, 500, 502, 503, 504)
_TRANSIENT = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
_UNKNOWN_SIZE = 4 << 30  # the most bytes of a file of unknown size

_log = logging.getLogger(__name__)
_are_refused = contextvars.ContextVar("downloads are refused", default=False)


@contextmanager
def refused() -> Iterator[None]:
    """Refuse downloads inside the block: a UserError names the file that would have to be fetched."""
    token = _are_refused.set(True)
    try:
        yield
    finally:
        _are_refused.reset(token)


class _TryAgain(Exception):
    """A failure that may not recur at the next attempt."""


def fetch(download: Download, directory: Path) -> Path:
    """Return the file of a download below `directory`, fetching it if necessary.

    It gets its name only when it is complete and its sha256 is right. If the sha256 is unknown, the one of the first
    download is kept beside the file, and later ones are compared with it. TFDS's download manager is not used: it has
    no limit on size, does not retry, and leaves refused files on the disk.

    Args:
      download: what to fetch; its file name may have folders.
      directory: where to keep it.

    Raises:
      UserError: the file is not available, is not the expected one, or cannot be written. It says how to get it by
        hand.
    """
    path = directory / download.filename
    record = path.with_name(f"{path.name}.sha256")
    with _writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        expected = download.sha256 or (record.read_text(encoding="utf-8").strip() if record.is_file() else "")
        if path.is_file():
            actual = storage.sha256(path)
            if expected and actual != expected:
                raise DataError(f"{path}: its sha256 is {actual}, expected {expected}: delete it to download it again")
        elif _are_refused.get():
            raise DataError(f"{path}: no such file, and nothing is downloaded here")
        else:
            with storage.AtomicFile(path, unique=True) as file:
                actual = _fetch(download, file)
                if not expected and unpacked_name(path.name) != path.name and is_web_page(file.temporary):
                    raise DataError(f"{download.url}: a web page and not an archive: refused; {_by_hand(download)}")
                if expected and actual != expected:
                    raise DataError(
                        f"{download.url}: its sha256 is {actual}, expected {expected}: refused; {_by_hand(download)}"
                    )
                file.commit()
        if not expected:
            first = next(directory.rglob("*.sha256"), None) is None  # a corpus may have hundreds of such files
            _log.log(
                logging.WARNING if first else logging.INFO,
                "%s: its sha256 is unknown; from now on it must be %s (as for all files with a *.sha256 beside them)",
                path,
                actual,
            )
            storage.write_atomically(record, f"{actual}\n")
    return path


def _fetch(download: Download, file: storage.AtomicFile) -> str:
    """Write the file, retrying after transient failures, and return its sha256."""
    for wait in (*_WAITS, None):
        try:
            return _attempt(download, file)
        except (_TryAgain, *_TRANSIENT) as error:
            reason = _reason(error)
        except requests.RequestException as error:
            raise MachineError(f"{download.url}: {_reason(error)}; {_by_hand(download)}") from None
        if wait is None:
            break
        _log.warning("%s: %s; trying again in %.0f s", download.url, reason, wait)
        time.sleep(wait)
    raise MachineError(f"{download.url}: {reason} (attempt {len(_WAITS) + 1}); {_by_hand(download)}")


def _attempt(download: Download, file: storage.AtomicFile) -> str:
    digest, size = hashlib.sha256(), 0
    file.restart()
    with requests.get(download.url, stream=True, timeout=_TIMEOUT) as response:
        if response.status_code in _BUSY:
            raise _TryAgain(f"HTTP {response.status_code} {response.reason}")
        if response.status_code != 200:
            raise MachineError(f"{download.url}: HTTP {response.status_code} {response.reason}; {_by_hand(download)}")
        announced = _announced(response)
        limit = download.size or _UNKNOWN_SIZE
        total = math.ceil((download.size or announced or limit) / _MIB)
        with terminal.progress_bar(f"fetching {Path(download.filename).name}", total, unit="MiB") as progress:
            for chunk in response.iter_content(_CHUNK):
                size += len(chunk)
                if size > limit:
                    raise DataError(f"{download.url}: over {limit:,} bytes: refused; {_by_hand(download)}")
                digest.update(chunk)
                file.write(chunk)
                progress.advance(len(chunk) / _MIB)
    if announced and size != announced:  # older versions of urllib3 do not notice
        raise _TryAgain(f"received {size:,} of {announced:,} bytes")
    return digest.hexdigest()


def _announced(response: requests.Response) -> int:
    """Return the number of bytes that the server announces, or 0 if it does not announce the decoded bytes."""
    length = response.headers.get("Content-Length", "")
    encoded = response.headers.get("Content-Encoding", "identity") != "identity"
    return int(length) if length.isdecimal() and not encoded else 0


def _by_hand(download: Download) -> str:
    name = download.filename
    return f"try again later, or get it by hand, keep it as {name} in a folder, and set task.data_dir to that folder"


def _reason(error: Exception) -> str:
    if isinstance(error, requests.Timeout):
        return f"nothing received for {_TIMEOUT:.0f} s"
    if isinstance(error, _TRANSIENT):
        return "the connection failed"
    return one_line(error)


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        yield
    except requests.RequestException:
        raise
    except OSError as error:
        raise MachineError(f"{path} cannot be written: {error.strerror or error}") from error
