"""Downloads from a local server that fails in the ways real servers fail."""

import contextlib
import hashlib
import http.server
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests

from xtransfer.data.corpora import downloads
from xtransfer.data.corpora.corpus import Download
from xtransfer.errors import UserError

DATA = bytes(range(256)) * 5000
SHA = hashlib.sha256(DATA).hexdigest()


class Server:
    """A server that gives each of `answers` once and then repeats the last one.

    An answer is (status, body, Content-Length), and a negative length sends no header.
    """

    def __init__(self) -> None:
        self.answers: list[tuple[int, bytes, int]] = [(200, DATA, len(DATA))]
        self.requests: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests.append(self.path)
                status, body, length = outer.answers[0]
                if len(outer.answers) > 1:
                    outer.answers.pop(0)
                self.send_response(status)
                if length >= 0:
                    self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/data/x.zip"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(downloads, "_WAITS", (0.0, 0.0))
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()
    server.thread.join()


@pytest.fixture
def error_message(tmp_path: Path) -> Callable[[Download], str]:
    """Return a function that expects a download to fail and returns the error."""

    def fetch(download: Download) -> str:
        with pytest.raises(UserError) as caught:
            downloads.fetch(download, tmp_path)
        message = str(caught.value)
        assert "\n" not in message and download.url in message
        assert "keep it as x.zip in a folder, and set task.data_dir to that folder" in message
        assert list(tmp_path.iterdir()) == [], "files are left behind"
        return message

    return fetch


def test_a_file_is_downloaded_once(server: Server, tmp_path: Path):
    download = Download(server.url, "sub/x.zip", SHA, len(DATA))
    for _ in range(2):
        path = downloads.fetch(download, tmp_path)
        assert path == tmp_path / "sub/x.zip" and path.read_bytes() == DATA
    assert server.requests == ["/data/x.zip"]
    assert [file.name for file in (tmp_path / "sub").iterdir()] == ["x.zip"]


def test_nothing_is_downloaded_where_downloads_are_refused(server: Server, tmp_path: Path):
    download = Download(server.url, "x.zip", SHA, len(DATA))
    with downloads.refused(), pytest.raises(UserError, match="no such file, and nothing is downloaded here"):
        downloads.fetch(download, tmp_path)
    assert list(tmp_path.iterdir()) == []
    path = downloads.fetch(download, tmp_path)
    with downloads.refused():
        assert downloads.fetch(download, tmp_path) == path


def test_a_file_with_the_wrong_checksum_is_refused_and_deleted(server: Server, error_message):
    server.answers = [(200, DATA[:-1] + b"\0", len(DATA))]
    message = error_message(Download(server.url, "x.zip", SHA, len(DATA)))
    assert f"expected {SHA}: refused" in message
    assert len(server.requests) == 1, "a wrong checksum is not retried"


def test_an_unknown_checksum_is_recorded_and_checked_later(server: Server, tmp_path: Path, caplog):
    download = Download(server.url, "x.zip")
    with caplog.at_level(logging.WARNING):
        path = downloads.fetch(download, tmp_path)
    assert SHA in caplog.text
    assert (tmp_path / "x.zip.sha256").read_text() == f"{SHA}\n"
    assert downloads.fetch(download, tmp_path) == path and len(server.requests) == 1
    path.write_bytes(DATA + b"x")
    with pytest.raises(UserError, match=f"{path}: its sha256 is .*, expected {SHA}: delete it to download it again"):
        downloads.fetch(download, tmp_path)
    path.unlink()
    server.answers = [(200, b"other", 5)]
    with pytest.raises(UserError, match=f"{server.url}: its sha256 is .*, expected {SHA}: refused"):
        downloads.fetch(download, tmp_path)
    assert not path.exists()


def test_an_altered_file_on_disk_is_refused(server: Server, tmp_path: Path):
    download = Download(server.url, "x.zip", SHA)
    path = downloads.fetch(download, tmp_path)
    path.write_bytes(DATA[::-1])
    with pytest.raises(UserError, match="x.zip: its sha256 is .*: delete it to download it again"):
        downloads.fetch(download, tmp_path)


def test_a_file_placed_by_hand_is_used(server: Server, tmp_path: Path):
    (tmp_path / "x.zip").write_bytes(DATA)
    for download in (Download(server.url, "x.zip", SHA), Download(server.url, "x.zip")):
        assert downloads.fetch(download, tmp_path).read_bytes() == DATA
    assert server.requests == []


@pytest.mark.parametrize("status", [403, 404])
def test_a_refusal_by_the_server_is_not_retried(server: Server, error_message, status: int):
    server.answers = [(status, b"<html>", 6)]
    assert f"HTTP {status} " in error_message(Download(server.url, "x.zip"))
    assert len(server.requests) == 1


def test_a_web_page_instead_of_an_archive_is_refused(server: Server, error_message, tmp_path: Path):
    server.answers = [(200, b"<!DOCTYPE html>", 15)]
    assert "a web page and not an archive: refused" in error_message(Download(server.url, "x.zip"))
    assert downloads.fetch(Download(server.url, "x.tsv"), tmp_path).read_bytes() == b"<!DOCTYPE html>"


def test_many_files_without_a_checksum_give_one_warning(server: Server, tmp_path: Path, caplog):
    with caplog.at_level(logging.WARNING):
        for name in ("en/train.tsv", "en/test.tsv", "de/train.tsv"):
            downloads.fetch(Download(server.url, name), tmp_path)
            assert (tmp_path / f"{name}.sha256").read_text() == f"{SHA}\n"
    assert len(caplog.records) == 1 and "en/train.tsv: its sha256 is unknown" in caplog.text


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_retried(server: Server, tmp_path: Path, status: int):
    server.answers = [(status, b"", 0), (status, b"", 0), (200, DATA, len(DATA))]
    assert downloads.fetch(Download(server.url, "x.zip", SHA), tmp_path).read_bytes() == DATA
    assert len(server.requests) == 3


def test_a_server_that_stays_busy_is_an_error_after_three_attempts(server: Server, error_message):
    server.answers = [(503, b"", 0)]
    assert "HTTP 503 Service Unavailable (attempt 3)" in error_message(Download(server.url, "x.zip", SHA))
    assert len(server.requests) == 3


def test_a_truncated_transfer_is_retried_and_leaves_no_file(server: Server, error_message, tmp_path: Path):
    server.answers = [(200, DATA[:1000], len(DATA))]
    error_message(Download(server.url, "x.zip"))
    assert len(server.requests) == 3
    server.answers = [(200, DATA[:1000], len(DATA)), (200, DATA, len(DATA))]
    assert downloads.fetch(Download(server.url, "x.zip"), tmp_path).read_bytes() == DATA


def test_a_truncated_transfer_is_detected_even_if_the_client_does_not_raise(
    error_message, monkeypatch: pytest.MonkeyPatch
):
    class Response(contextlib.nullcontext):
        status_code, reason, headers = 200, "OK", {"Content-Length": "10"}

        def __enter__(self) -> "Response":
            return self

        def iter_content(self, size: int) -> list[bytes]:
            return [b"12345", b"6789"]

    monkeypatch.setattr(downloads, "_WAITS", ())
    monkeypatch.setattr(requests, "get", lambda *args, **kwargs: Response())
    assert "received 9 of 10 bytes (attempt 1)" in error_message(Download("http://example.org/x.zip", "x.zip"))


@pytest.mark.parametrize("promised", [len(DATA), -1])
def test_a_file_larger_than_declared_is_refused(server: Server, error_message, promised: int):
    server.answers = [(200, DATA, promised)]
    size = len(DATA) - 1
    assert f"over {size:,} bytes: refused" in error_message(Download(server.url, "x.zip", SHA, size))
    assert len(server.requests) == 1


def test_a_failed_connection_is_an_error(error_message, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(downloads, "_WAITS", (0.0,))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    assert "the connection failed (attempt 2)" in error_message(Download(f"http://127.0.0.1:{port}/x", "x.zip"))
    assert "requests" not in error_message(Download("http://x y/", "x.zip"))


def test_an_unwritable_folder_is_an_error(server: Server, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"{tmp_path}/file/x.zip cannot be written"):
        downloads.fetch(Download(server.url, "x.zip", SHA), tmp_path / "file")
    assert server.requests == []
