"""Tiny archives for tests, written member by member, including malicious ones."""

import io
import os
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

Contents = Mapping[str, str | bytes]


def encoded(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content


def write_zip(path: Path, contents: Contents) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, encoded(content))
    return path


def write_tar(
    path: Path, contents: Contents, *, compressed: bool = False, extra: tuple[tarfile.TarInfo, ...] = ()
) -> Path:
    """Write a tar, or a tar.gz if `compressed`. The `extra` members have no content and come first."""
    with tarfile.open(path, "w:gz" if compressed else "w") as archive:
        for member in extra:
            archive.addfile(member)
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(encoded(content))
            archive.addfile(member, io.BytesIO(encoded(content)))
    return path


def write_tar_gz(path: Path, contents: Contents) -> Path:
    return write_tar(path, contents, compressed=True)


def write_folder(path: Path, contents: Contents) -> Path:
    for name, content in contents.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(content))
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    """Return a tar member that is not a regular file, such as one of the kind tarfile.SYMTYPE."""
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def touch(path: Path) -> None:
    """Move the modification time forward by a second."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))


WRITERS = {"zip": write_zip, "tar": write_tar, "tar.gz": write_tar_gz, "folder": write_folder}
