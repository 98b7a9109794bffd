"""Archives and folders give back their members, and unsafe, oversized, or damaged ones are refused by name."""

import contextlib
import gzip
import random
import stat
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import archive_writers
from xtransfer.data.corpora import archives
from xtransfer.errors import UserError

BIG = {"member_limit": 1 << 20, "total_limit": 1 << 22}
CONTENTS = {"top/a.tsv": "one\ntwo\n", "top/b/c.tsv": "\u3042" * 1000, "top/empty": "", "top/z.bin": bytes(range(256))}
LINK, DEVICE = (tarfile.SYMTYPE, tarfile.LNKTYPE), (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)


def read(source: Path, select=lambda name: True, **limits) -> dict[str, bytes]:
    return {name: stream.read() for name, stream in archives.open_members(source, select, **(BIG | limits))}


def error_message(source: Path, **limits) -> str:
    """Return the error of reading all members, and check that it is one line and names the archive."""
    with pytest.raises(UserError) as caught:
        read(source, **limits)
    message = str(caught.value)
    assert str(source) in message and "\n" not in message
    return message


@pytest.mark.parametrize("kind", archive_writers.WRITERS)
def test_members_are_read_back(tmp_path: Path, kind: str):
    source = archive_writers.WRITERS[kind](tmp_path / "x", CONTENTS)
    assert read(source) == {name: archive_writers.encoded(content) for name, content in CONTENTS.items()}
    assert read(source, lambda name: name.endswith(".tsv")).keys() == {"top/a.tsv", "top/b/c.tsv"}


@pytest.mark.parametrize("kind", archive_writers.WRITERS)
def test_a_partly_read_member_does_not_affect_the_next_ones(tmp_path: Path, kind: str):
    source = archive_writers.WRITERS[kind](tmp_path / "x", CONTENTS)
    beginnings = []
    streams = []
    for name, stream in archives.open_members(source, lambda name: True, **BIG):
        beginnings.append((name, stream.read(3)))
        streams.append(stream)
    assert beginnings == [(name, archive_writers.encoded(content)[:3]) for name, content in CONTENTS.items()]
    assert all(stream.closed for stream in streams)


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_members_keep_the_order_of_the_archive(tmp_path: Path, kind: str):
    source = archive_writers.WRITERS[kind](tmp_path / "x", {"z": "1", "a": "2", "./m//n": "3"})
    assert list(read(source)) == ["z", "a", "m/n"]


@pytest.mark.parametrize("kind", archive_writers.WRITERS)
def test_a_large_member_is_streamed(tmp_path: Path, kind: str):
    """Read the first line without the rest."""
    source = archive_writers.WRITERS[kind](tmp_path / "x", {"big": b"line\n" * 200_000})
    with archives.open_member(source, "big", member_limit=1 << 20, total_limit=1 << 21) as (_, stream):
        assert stream.readline() == b"line\n"


@pytest.mark.parametrize("kind", archive_writers.WRITERS)
def test_open_member_finds_the_only_member_with_the_path(tmp_path: Path, kind: str):
    source = archive_writers.WRITERS[kind](
        tmp_path / "x", {"t/en/a.tsv": "1", "t/den/a.tsv": "2", "m/._a.tsv": "3", "t/en/xa.tsv": "4"}
    )
    with archives.open_member(source, "en/a.tsv", **BIG) as (name, stream):
        assert (name, stream.read()) == ("t/en/a.tsv", b"1")
    with (
        pytest.raises(UserError, match=f"{source}: it has no fr/a.tsv"),
        archives.open_member(source, "fr/a.tsv", **BIG),
    ):
        pass
    with (
        pytest.raises(UserError, match=r"a\.tsv or t/\w+/a\.tsv\? Leave only one a\.tsv in it"),
        archives.open_member(source, "a.tsv", **BIG),
    ):
        pass


def test_an_error_in_the_reader_is_not_changed(tmp_path: Path):
    source = archive_writers.write_zip(tmp_path / "x", {"a": "1", "b/a": "2"})
    with pytest.raises(KeyError), archives.open_member(source, "a", **BIG):
        raise KeyError("error of the reader")


@pytest.mark.parametrize("name", ["../a.tsv", "top/../../a.tsv", "/etc/a.tsv", "C:\\a.tsv", "..\\a.tsv", "c:a.tsv"])
@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_a_name_that_leaves_the_archive_is_refused(tmp_path: Path, kind: str, name: str):
    source = archive_writers.WRITERS[kind](tmp_path / "x", {name: "x"})
    message = error_message(source)
    assert "leads out of the archive" in message and repr(name) in message
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("kind", [*LINK, *DEVICE])
@pytest.mark.parametrize("compressed", [False, True])
def test_links_and_devices_in_a_tar_are_refused(tmp_path: Path, kind: bytes, compressed: bool):
    extra = (archive_writers.special("top/a.tsv", kind, "/etc/passwd"),)
    source = archive_writers.write_tar(tmp_path / "x.tar", {"top/b.tsv": "x"}, compressed=compressed, extra=extra)
    assert "top/a.tsv is a link, device, or sparse file: refused" in error_message(source)


def test_a_link_in_a_zip_is_refused(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        member = zipfile.ZipInfo("top/a.tsv")
        member.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(member, "/etc/passwd")
    assert "top/a.tsv is a link or device: refused" in error_message(tmp_path / "x.zip")


def test_links_in_a_folder_must_stay_inside_it(tmp_path: Path):
    folder = archive_writers.write_folder(tmp_path / "data", {"real.tsv": "x"})
    (folder / "inner.tsv").symlink_to("real.tsv")
    assert read(folder) == {"inner.tsv": b"x", "real.tsv": b"x"}
    (tmp_path / "secret").write_text("s")
    (folder / "outer.tsv").symlink_to(tmp_path / "secret")
    assert "outer.tsv is a link that leads out of the folder" in error_message(folder)
    assert read(folder, lambda name: name != "outer.tsv").keys() == {"inner.tsv", "real.tsv"}
    (folder / "outer.tsv").unlink()
    (folder / "dangling.tsv").symlink_to("nothing")
    assert "dangling.tsv is not a plain file" in error_message(folder)


@pytest.mark.parametrize("kind", archive_writers.WRITERS)
def test_members_over_a_size_limit_are_refused(tmp_path: Path, kind: str):
    source = archive_writers.WRITERS[kind](tmp_path / "x", {"a": b"\0" * 1000, "b": b"\0" * 1001})
    assert len(read(source, member_limit=1001, total_limit=2001)) == 2
    assert "b: over 1,000 bytes" in error_message(source, member_limit=1000)
    assert "b: over 2,000 bytes in total so far: refused" in error_message(source, total_limit=2000)


def test_a_file_that_grows_over_its_limit_while_being_read_is_refused(tmp_path: Path):
    folder = archive_writers.write_folder(tmp_path / "data", {"a": b"x" * 1000})
    members = archives.open_members(folder, lambda name: True, member_limit=1000, total_limit=1000)
    _, stream = next(members)
    with (folder / "a").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="a: over 1,000 bytes: refused"):
        stream.read()


def test_the_limits_include_members_that_are_not_selected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for kind in ("zip", "tar.gz"):
        source = archive_writers.WRITERS[kind](tmp_path / kind, {"bomb": b"\0" * (1 << 21), "a": "x"})
        with pytest.raises(UserError, match="bomb: over 1,048,576 bytes in total so far: refused"):
            read(source, lambda name: name == "a", total_limit=1 << 20)
    monkeypatch.setattr(archives, "_MEMBERS", 3)
    for kind in archive_writers.WRITERS:
        assert len(read(archive_writers.WRITERS[kind](tmp_path / f"3{kind}", dict.fromkeys("abc", "")))) == 3
        assert "over 3 " in error_message(
            archive_writers.WRITERS[kind](tmp_path / f"4{kind}", dict.fromkeys("abcd", ""))
        )


def test_a_zip_with_a_wrong_size_is_refused(tmp_path: Path):
    """Declare 10 bytes for a member of a million."""
    path = archive_writers.write_zip(tmp_path / "x.zip", {"a": b"\0" * 1_000_000})
    data = path.read_bytes()
    assert data.count(struct.pack("<I", 1_000_000)) == 2, "the size is in the local and in the central header"
    path.write_bytes(data.replace(struct.pack("<I", 1_000_000), struct.pack("<I", 10)))
    assert "x.zip: a: the archive is truncated or corrupt" in error_message(path, member_limit=100)


def test_a_tar_gz_with_much_data_after_its_last_member_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(archives, "_HEADERS", 1 << 14)
    archive_writers.write_tar(tmp_path / "x.tar", {"a": "x"})
    path = tmp_path / "x.tar.gz"
    path.write_bytes(gzip.compress((tmp_path / "x.tar").read_bytes() + b"\0" * (1 << 22)))
    assert "over 1,000 bytes when unpacked" in error_message(path, total_limit=1000)


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_a_truncated_archive_is_always_refused(tmp_path: Path, kind: str):
    contents = {f"{i}.tsv": bytes((i * j) % 251 for j in range(700)) for i in range(1, 5)}
    source = archive_writers.WRITERS[kind](tmp_path / "x", contents)
    data = source.read_bytes()
    content_length = len(data.rstrip(b"\0")) if kind == "tar" else len(data)
    lengths = {*range(1, content_length, max(1, content_length // 60)), content_length - 1}
    if kind == "tar":
        lengths |= set(range(512, content_length, 512))  # the boundaries of its blocks
    for length in lengths:
        source.write_bytes(data[:length])
        error_message(source)


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_a_flipped_bit_never_changes_the_content_of_a_member(tmp_path: Path, kind: str):
    contents = {f"{i}.tsv": bytes((i * j) % 251 for j in range(700)) for i in range(1, 4)}
    source = archive_writers.WRITERS[kind](tmp_path / "x", contents)
    data = source.read_bytes()
    refusals = 0
    for position in range(0, len(data), max(1, len(data) // 80)):
        source.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        try:
            members = read(source)
        except UserError:
            refusals += 1
        else:  # the bit is in a name, a date, or another field without a checksum
            assert set(members.values()) <= set(contents.values())
    assert refusals > 40


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(tmp_path_factory, data: bytes):
    path = tmp_path_factory.getbasetemp() / "any"
    for head in (b"", b"PK\x03\x04", b"\x1f\x8b\x08\x00"):
        path.write_bytes(head + data)
        with contextlib.suppress(UserError):
            read(path)


def test_a_file_that_is_not_an_archive_is_refused(tmp_path: Path):
    path = tmp_path / "x.zip"
    assert f"{path}: no such file or folder" in error_message(path)
    path.write_text("<!DOCTYPE html><title>Sign in</title>")
    assert "neither a zip, tar, or tar.gz archive nor a folder; it looks like a web page" in error_message(path)
    path.write_bytes(b"")
    assert "neither a zip" in error_message(path)
    path.write_bytes(gzip.compress(b"just text, no tar"))
    assert "truncated or corrupt" in error_message(path)


def damage(source: Path, word: bytes) -> None:
    """Replace the last byte of the only occurrence of a word."""
    data = source.read_bytes()
    assert data.count(word) == 1
    source.write_bytes(data.replace(word, word[:-1] + b"X"))


def write_uncompressed(tmp_path: Path, kind: str) -> Path:
    """Write an archive of two members without compression."""
    contents = {"t/a.tsv": "first\nsecond\nthird\n" + "x" * 100_000, "t/b.tsv": "other\n"}
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "x", "w", zipfile.ZIP_STORED) as archive:
            for name, content in contents.items():
                archive.writestr(name, content)
        return tmp_path / "x"
    tar = archive_writers.write_tar(tmp_path / "x.tar", contents)
    (tmp_path / "x").write_bytes(gzip.compress(tar.read_bytes(), compresslevel=0))
    return tmp_path / "x"


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
@pytest.mark.parametrize("reader", ["reads all", "stops early", "raises"])
def test_a_flipped_byte_is_reported_as_damage_of_the_archive(tmp_path: Path, kind: str, reader: str):
    """The checksum follows the data, so a reader meets the wrong byte before the checksum fails."""
    source = write_uncompressed(tmp_path, kind)

    def read_member() -> None:
        with archives.open_member(source, "a.tsv", **BIG) as (_, stream):
            lines = stream.readlines() if reader == "reads all" else [stream.readline(), stream.readline()]
            if reader == "raises":
                raise UserError(f"a.tsv:2: {lines[1]!r} is no label")

    if reader == "raises":
        with pytest.raises(UserError, match=r"a\.tsv:2: b'second\\n' is no label"):
            read_member()
    else:
        read_member()
    damage(source, b"second")
    with pytest.raises(archives.DamagedError, match=f"{source}: .*truncated or corrupt .*: download it again"):
        read_member()


def test_below_limits_the_depth_of_a_member(tmp_path: Path):
    source = archive_writers.write_tar_gz(tmp_path / "x", {"top/en/a": "1", "top/de/trans/en/a": "2"})
    with archives.open_member(source, "en/a", **BIG, below=1) as (name, _):
        assert name == "top/en/a"
    with pytest.raises(UserError, match="it has no en/a;"), archives.open_member(source, "en/a", **BIG, below=0):
        pass


def test_an_encrypted_zip_is_refused(tmp_path: Path):
    path = archive_writers.write_zip(tmp_path / "x.zip", {"a": "x"})
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + offset] |= 1
    path.write_bytes(bytes(data))
    assert "encrypted" in error_message(path)


def test_files_below_lists_files_in_order_and_can_exclude_a_folder(tmp_path: Path):
    archive_writers.write_folder(tmp_path, {"b/c": "", "a": "", "b-": ""})
    assert archives.files_below(tmp_path) == ["a", "b-", "b/c"]
    assert archives.files_below(tmp_path, but=tmp_path / "b") == ["a", "b-"]


def test_unpacked_name_drops_the_ending_of_an_archive():
    names = ("a.zip", "b-1.0.tar.gz", "c.tgz", "d.tar", "e/f.tsv")
    assert list(map(archives.unpacked_name, names)) == ["a", "b-1.0", "c", "d", "e/f.tsv"]


def test_damaged_lzma_data_is_reported_as_damage_of_the_archive(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.txt", random.Random(0).randbytes(5000))
    data = bytearray(path.read_bytes())
    data[1000:1020] = b"\xff" * 20
    path.write_bytes(data)
    with pytest.raises(archives.DamagedError, match="a.zip"):
        for _, stream in archives.open_members(path, lambda name: True, member_limit=1 << 20, total_limit=1 << 20):
            stream.read()
