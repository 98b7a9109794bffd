"""Members of archives as bounded streams. Nothing is ever unpacked to disk."""

import contextlib
import gzip
import io
import lzma
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from xtransfer.errors import DataError, MachineError, UserError, one_line

_MEMBERS = 100_000  # of an archive or folder, more than any corpus has
_HEADERS = 64 << 20  # bytes of a tar that belong to no member: headers and padding
_BLOCK = 1 << 16
_DEEPEST = 1 << 10  # folders
_ZIP, _GZIP = (b"PK\x03\x04", b"PK\x05\x06"), b"\x1f\x8b"
_TAR_MAGIC = slice(257, 262)
_ARCHIVE_ENDING = re.compile(r"\.(zip|tar|tgz|tar\.gz)$")
# ValueError: for names and headers that the libraries use without checking them.
_BROKEN = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    NotImplementedError,
    RuntimeError,
    ValueError,
)


class DamagedError(DataError):
    """An archive that is truncated or corrupt."""


def open_members(
    source: Path, is_selected: Callable[[str], bool], *, member_limit: int, total_limit: int
) -> Iterator[tuple[str, BinaryIO]]:
    """Open the selected members of a zip, tar, or tar.gz archive, or selected files of a folder, one after the other.

    Args:
      source: the archive, whatever its ending, or the folder with its contents.
      is_selected: decides by name, a relative posix path such as "XNLI-1.0/xnli.dev.tsv".
      member_limit: the most bytes of a selected member, unpacked.
      total_limit: the most bytes of all members of the archive, or of the folder's selected files, unpacked.

    Yields:
      (name, stream), in the archive's order or, for a folder, sorted. A stream ends when the next one is requested.

    Raises:
      UserError: the source is missing, not an archive, truncated or corrupt (`DamagedError`), or beyond a limit (as it
        says or as it turns out); or it has a member that is a link or a device, or that leads out of the archive. A
        link in a folder may only lead to a place within it.
    """
    limits = _Limits(source, member_limit, total_limit)
    with _naming_the_archive(source):
        if source.is_dir():
            members = _folder(source, is_selected, limits)
        else:
            with source.open("rb") as file:
                head = file.read(512)
            if head.startswith(_ZIP):
                members = _zip(source, is_selected, limits)
            elif head.startswith(_GZIP) or head[_TAR_MAGIC] == b"ustar":
                members = _tar(source, is_selected, limits, compressed=head.startswith(_GZIP))
            else:
                hint = "; it looks like a web page" if is_web_page(source) else ""
                raise DataError(f"{source}: neither a zip, tar, or tar.gz archive nor a folder{hint}")
    for name, stream in members:
        with io.BufferedReader(_Member(stream, name, limits), _BLOCK) as reader:
            yield name, reader


@contextmanager
def open_member(
    source: Path, ending: str, *, member_limit: int, total_limit: int, below: int = _DEEPEST
) -> Iterator[tuple[str, BinaryIO]]:
    """Open the one member that is `ending`, or that ends with "/" + `ending` below a limited number of folders.

    The archive is read to its end, where its checksums are. If it is damaged, that error replaces a UserError of the
    reader, because it is the cause.

    Raises:
      UserError: see `open_members`; or there is no such member, or more than one.
    """

    def is_selected(name: str) -> bool:
        return f"/{name}".endswith(f"/{ending}") and name.count("/") - ending.count("/") <= below

    members = open_members(source, is_selected, member_limit=member_limit, total_limit=total_limit)
    with contextlib.closing(members):  # type: ignore[type-var]
        member = next(members, None)
        if member is None:
            raise DataError(f"{source}: it has no {ending}; use the complete archive, or choose other languages")
        try:
            yield member
        except UserError:
            with _damage_only():
                _drain(member[1])
                for _ in members:
                    pass
            raise
        _drain(member[1])
        second = next(members, None)
        if second is not None:
            raise DataError(f"{source}: {member[0]} or {second[0]}? Leave only one {ending} in it")


def unpacked_name(filename: str) -> str:
    """Return the name without the ending of an archive, or the name itself."""
    return _ARCHIVE_ENDING.sub("", filename)


def is_web_page(path: Path) -> bool:
    """Return whether a file starts like an HTML page."""
    with _naming_the_archive(path), path.open("rb") as file:
        return file.read(512).lstrip()[:1] == b"<"


def files_below(folder: Path, *, but: Path | None = None) -> list[str]:
    """Return the relative posix paths of all files below a folder, sorted, without linked folders and `but`.

    Raises:
      UserError: there are too many, or a folder cannot be read.
    """
    names: list[str] = []
    skipped = None if but is None else but.resolve()
    for directory, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if Path(directory, name).resolve() != skipped]
        names += (Path(directory, file).relative_to(folder).as_posix() for file in files)
        if len(names) > _MEMBERS:
            raise DataError(f"{folder}: over {_MEMBERS:,} files: name the folder that holds the data and nothing else")
    return sorted(names)


@dataclass
class _Limits:
    """The limits on a source, and how much of them its members have used."""

    source: Path
    member: int
    total: int
    declared: int = 0
    members: int = 0

    def declare(self, name: str, size: int, *, selected: bool) -> None:
        """Count a member by the size that its archive declares."""
        self.declared += size
        self.members += 1
        if selected:
            self.check_member(name, size)
        if self.declared > self.total:
            raise DataError(f"{self.source}: {name}: over {self.total:,} bytes in total so far: refused")
        if self.members > _MEMBERS:
            raise DataError(f"{self.source}: {name}: over {_MEMBERS:,} members so far: refused")

    def check_member(self, name: str, size: int) -> None:
        """Refuse a member of more bytes than allowed."""
        if size > self.member:
            raise DataError(f"{self.source}: {name}: over {self.member:,} bytes: refused")


class _Member(io.RawIOBase):
    """A member while it is read: counts the bytes that really come out, and names the archive in every error."""

    def __init__(self, stream: Any, name: str, limits: _Limits) -> None:
        self._stream, self._name, self._limits, self._count = stream, name, limits, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _naming_the_archive(self._limits.source, self._name):
            data = self._stream.read(len(buffer))
        self._count += len(data)
        self._limits.check_member(self._name, self._count)
        buffer[: len(data)] = data
        return len(data)


class _Flow:
    """The bytes of a tar while they are unpacked; keeps the last ones, which a truncated tar lacks."""

    def __init__(self, stream: Any, limits: _Limits) -> None:
        self._stream, self._limits, self._count, self.tail = stream, limits, 0, b""

    def read(self, size: int) -> bytes:
        data: bytes = self._stream.read(min(size, _BLOCK))
        self._count += len(data)
        if self._count > self._limits.total + _HEADERS:
            raise DataError(f"{self._limits.source}: over {self._limits.total:,} bytes when unpacked: refused")
        self.tail = (self.tail + data)[-tarfile.BLOCKSIZE :]
        return data


def _folder(source: Path, is_selected: Callable[[str], bool], limits: _Limits) -> Iterator[tuple[str, Any]]:
    root = source.resolve()
    for name in filter(is_selected, files_below(source)):
        with _naming_the_archive(source, name):
            path = (source / name).resolve()
            if not path.is_relative_to(root):
                raise DataError(f"{source}: {name} is a link that leads out of the folder: refused")
            if not path.is_file():
                raise DataError(f"{source}: {name} is not a plain file: refused")
            limits.declare(name, path.stat().st_size, selected=True)
            file = path.open("rb")
        with file:
            yield name, file


def _zip(source: Path, is_selected: Callable[[str], bool], limits: _Limits) -> Iterator[tuple[str, Any]]:
    with _naming_the_archive(source):
        archive = zipfile.ZipFile(source)
    with archive:
        for member in archive.infolist():
            name = _checked_name(source, member.filename)
            kind = stat.S_IFMT(member.external_attr >> 16)  # 0 unless the zip was made on Unix
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise DataError(f"{source}: {name} is a link or device: refused")
            selected = not member.is_dir() and is_selected(name)
            limits.declare(name, member.file_size, selected=selected)
            if selected:
                with _naming_the_archive(source, name):
                    stream = archive.open(member)
                with stream:
                    yield name, stream


def _tar(
    source: Path, is_selected: Callable[[str], bool], limits: _Limits, *, compressed: bool
) -> Iterator[tuple[str, Any]]:
    with contextlib.ExitStack() as stack:
        with _naming_the_archive(source):
            file: Any = stack.enter_context(source.open("rb"))
            flow = _Flow(stack.enter_context(gzip.GzipFile(fileobj=file)) if compressed else file, limits)
            archive = stack.enter_context(tarfile.open(fileobj=flow, mode="r|"))  # type: ignore[call-overload]
        while True:
            with _naming_the_archive(source):
                member = archive.next()
            if member is None:
                break
            archive.members = []  # otherwise tarfile keeps them all
            name = _checked_name(source, member.name)
            if not (member.isdir() or member.isreg()) or member.issparse():
                raise DataError(f"{source}: {name} is a link, device, or sparse file: refused")
            selected = member.isreg() and is_selected(name)
            limits.declare(name, member.size, selected=selected)
            if selected:
                yield name, archive.extractfile(member)
        with _naming_the_archive(source):  # to the end, where gzip's checksum is
            while flow.read(_BLOCK):
                pass
        if flow.tail.strip(b"\0") or len(flow.tail) < tarfile.BLOCKSIZE:
            raise DamagedError(f"{source}: the archive is truncated: download it again")


def _checked_name(source: Path, name: str) -> str:
    """Return the name as a relative posix path; refuse one that leads out of the archive."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", name):
        raise DataError(f"{source}: {name!r} leads out of the archive: refused")
    return path.as_posix()


@contextmanager
def _naming_the_archive(source: Path, name: str = "") -> Iterator[None]:
    """Turn any failure in an archive into one line that names it and the member."""
    where = f"{source}: {name}" if name else str(source)
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise DataError(f"{where}: no such file or folder") from None
    except _BROKEN as error:
        if isinstance(error, OSError) and error.strerror:
            raise MachineError(f"{where}: cannot be read: {error.strerror}") from None
        reason = one_line(error, limit=1000)
        raise DamagedError(f"{where}: the archive is truncated or corrupt ({reason}): download it again") from None


@contextmanager
def _damage_only() -> Iterator[None]:
    """Raise the error of a damaged archive, and suppress every other UserError."""
    try:
        yield
    except DamagedError as error:
        raise error from None  # the content that was read from it does not matter
    except UserError:
        pass


def _drain(stream: BinaryIO) -> None:
    while stream.read(_BLOCK):
        pass


def _raise(error: OSError) -> None:
    raise MachineError(f"{error.filename}: cannot be read: {error.strerror}")
