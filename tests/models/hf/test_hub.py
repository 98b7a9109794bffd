"""The hub: the real client against a small local server that answers like the hub."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file

from tests.helpers import tiny
from xtransfer.errors import UserError
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.models.hf import hub

REPO = "someone/some-bert"
MAIN, TAGGED = "a" * 40, "b" * 40
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
Files = dict[str, bytes]


@dataclass
class Hub:
    """The repository of the server, its faults, and a log of its requests.

    `failing` maps (method, file) to the number of requests that are still answered with `status`.
    """

    files: dict[str, Files]  # by commit
    revisions: dict[str, str]
    gated: bool = False
    failing: Counter[tuple[str, str]] = field(default_factory=Counter)
    status: int = 503
    cut: str = ""  # downloads of this file stop half-way
    requests: list[tuple[str, str]] = field(default_factory=list)

    def downloads(self) -> list[str]:
        """Return the files that were requested with GET, in order."""
        return [path for method, path in self.requests if method == "GET" and not path.startswith("api/")]

    def answer(self, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        """Return (status, headers, body) for a path below the root."""
        if path.startswith("api/"):
            _, _, *repo, kind, revision = path.split("/")
        else:
            repo_path, _, rest = path.partition("/resolve/")
            repo, (revision, _, name) = repo_path.split("/"), rest.partition("/")
        if "/".join(repo) != REPO:
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        commit = self.revisions.get(revision, revision)
        if commit not in self.files:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if path.startswith("api/"):
            assert kind == "tree"
            rows = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.files[commit].items()
            ]
            return 200, {"Content-Type": "application/json"}, json.dumps(rows).encode()
        if self.failing[method, name] > 0:
            self.failing[method, name] -= 1
            return self.status, {}, b""
        if name not in self.files[commit]:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        content = self.files[commit][name]
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}, content


class Handler(BaseHTTPRequestHandler):
    """A request handler that serves its server's `hub`."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        served: Hub = self.server.hub
        path = self.path.partition("?")[0].strip("/")
        name = path if path.startswith("api/") else path.split("/resolve/")[-1].partition("/")[2]
        served.requests.append((self.command, name))
        status, headers, body = served.answer(self.command, path)
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if name == served.cut else body)
            self.close_connection = name == served.cut

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("hub") / "checkpoint")


@pytest.fixture
def files(checkpoint: Path) -> Files:
    """Return the files of a typical repository: the needed ones, and many others."""
    unneeded = (
        "model.fp16.safetensors",
        "pytorch_model.bin",
        "tf_model.h5",
        "onnx/model.onnx",
        "onnx/config.json",
        "modeling_own.py",
        "README.md",
        "training_args.bin",
        "onnx/tokenizer.json",
        "1_Pooling/config.json",
    )
    return dict.fromkeys(unneeded, b"x") | {path.name: path.read_bytes() for path in checkpoint.iterdir()}


@pytest.fixture
def server(files: Files) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = Hub({MAIN: files, TAGGED: dict(files)}, {"main": MAIN, "v1": TAGGED})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace every sleep, and return the list of seconds that the client would have waited."""
    seconds: list[float] = []
    clock = SimpleNamespace(sleep=seconds.append)
    for module in ("huggingface_hub.utils._http", "huggingface_hub.file_download", "xtransfer.models.hf.hub"):
        monkeypatch.setattr(f"{module}.time", clock)
    return seconds


@pytest.fixture
def online(server: Any, waits: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Connect the client in this process to the server, with an empty cache."""
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    yield server.hub
    huggingface_hub.close_session()


def go_offline(online: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    online.requests.clear()


def shard(files: Files, tmp_path: Path) -> set[str]:
    """Split the weights of a repository into two files with an index, and return the names of all three."""
    (tmp_path / "whole").write_bytes(files.pop("model.safetensors"))
    tensors = load_file(tmp_path / "whole")
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    table = {name: shards[i % 2] for i, name in enumerate(tensors)}
    for file in shards:
        save_file({name: value for name, value in tensors.items() if table[name] == file}, tmp_path / file)
        files[file] = (tmp_path / file).read_bytes()
    files[hub.INDEX] = json.dumps({"metadata": {}, "weight_map": table}).encode()
    return {*shards, hub.INDEX}


def assert_refused(message: str, name: str = REPO) -> str:
    with pytest.raises(UserError, match=message) as caught:
        hf_checkpoint.resolve(name)
    assert str(caught.value).startswith(f"{name}: ") and "\n" not in str(caught.value)
    return str(caught.value)


def test_only_needed_files_are_downloaded_and_only_once(
    online: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = hf_checkpoint.resolve(REPO)
    assert directory.name == MAIN
    assert sorted(online.downloads()) == sorted({"config.json", "model.safetensors", *TOKENIZER})
    assert {path.name for path in directory.iterdir()} == {"config.json", "model.safetensors", *TOKENIZER}
    params, expected = (hf_checkpoint.load_classifier(path, 2, seed=0)[1] for path in (directory, checkpoint))
    assert hf_checkpoint.fingerprint_params(params) == hf_checkpoint.fingerprint_params(expected)
    assert hf_checkpoint.fingerprint_files(directory) == hf_checkpoint.fingerprint_files(checkpoint)
    online.requests.clear()
    assert hf_checkpoint.resolve(REPO) == directory
    assert online.requests == [("HEAD", "config.json")]  # checks whether the branch has moved
    go_offline(online, monkeypatch)
    assert hf_checkpoint.resolve(REPO) == directory and hf_checkpoint.resolve(f"{REPO}@{MAIN}") == directory
    assert not online.requests


def test_revision_is_a_tag_or_a_commit(online: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    online.files[TAGGED]["config.json"] = online.files[MAIN]["config.json"].replace(b"{", b"{ ", 1)
    tagged = hf_checkpoint.resolve(f"{REPO}@v1")
    assert tagged.name == TAGGED
    assert hf_checkpoint.resolve(REPO, "v1") == tagged
    assert hf_checkpoint.resolve(f"{REPO}@{TAGGED}") == tagged
    assert (tagged / "config.json").read_bytes() == online.files[TAGGED]["config.json"]
    go_offline(online, monkeypatch)
    assert hf_checkpoint.resolve(f"{REPO}@v1") == tagged
    assert_refused("HF_HUB_OFFLINE is set, and the cache .* lacks it: fetch it once without it, or name a directory$")


def test_files_of_a_moving_branch_are_not_mixed(online: Hub) -> None:
    before = hf_checkpoint.resolve(REPO)
    online.revisions["main"] = TAGGED
    online.files[TAGGED]["tokenizer.json"] += b" "
    after = hf_checkpoint.resolve(REPO)
    assert (before.name, after.name) == (MAIN, TAGGED)
    assert (after / "tokenizer.json").read_bytes() == (before / "tokenizer.json").read_bytes() + b" "


def test_shards_of_an_index_are_downloaded(
    online: Hub, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = shard(online.files[MAIN], tmp_path)
    directory = hf_checkpoint.resolve(REPO)
    assert sorted(online.downloads()) == sorted({"config.json", *weights, *TOKENIZER})
    params, expected = (hf_checkpoint.load_classifier(path, 2, seed=0)[1] for path in (directory, checkpoint))
    assert hf_checkpoint.fingerprint_params(params) == hf_checkpoint.fingerprint_params(expected)
    go_offline(online, monkeypatch)
    assert hf_checkpoint.resolve(REPO) == directory and not online.requests
    (directory / "model-00002-of-00002.safetensors").unlink()
    assert_refused("HF_HUB_OFFLINE is set, and the cache .* lacks it")


def test_missing_shard_is_named(online: Hub, tmp_path: Path) -> None:
    shard(online.files[MAIN], tmp_path)
    del online.files[MAIN]["model-00002-of-00002.safetensors"]
    assert_refused("the repository has no model-00002-of-00002.safetensors: not a complete transformers model")


def test_index_cannot_point_outside_the_repository(online: Hub, tmp_path: Path) -> None:
    shard(online.files[MAIN], tmp_path)
    online.files[MAIN][hub.INDEX] = json.dumps({"weight_map": {"x": "../../escape.safetensors"}}).encode()
    with pytest.raises(UserError, match=r"must map tensors to \.safetensors files of this directory"):
        hf_checkpoint.resolve(REPO)
    assert not any("escape" in path for _, path in online.requests)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("someone/no-such-bert", "no such repository, or a private one: check the name, or log in"),
        ("no-such-bert", "no such directory, and not available from the hub: no such repository"),
        (f"{REPO}@v9", "no such revision: choose a branch, a tag, or a whole commit hash"),
        (f"{REPO}@{'c' * 40}", "no such revision"),
        ("some--one/bert", "Cannot have -- or .. in repo_id"),
    ],
)
def test_unavailable_names_are_explained(name: str, message: str, online: Hub) -> None:
    assert_refused(message, name)


def test_gated_repository_says_where_to_request_access(online: Hub, tmp_path: Path) -> None:
    online.gated = True
    message = assert_refused(
        "it is gated: ask for access at http://.*/someone/some-bert, then log in with `hf auth login`$"
    )
    assert "401" not in message and not online.downloads()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: files.pop("model.safetensors"), r"no model\.safetensors \(pickled weights .* never read: conv"),
        (
            lambda files: files.pop("config.json"),
            r"the repository has no config\.json: not a complete transformers",
        ),
    ],
)
def test_incomplete_repository_is_refused(change: Any, message: str, online: Hub) -> None:
    change(online.files[MAIN])
    assert_refused(message)
    assert not any(path.endswith((".bin", ".h5", ".safetensors")) for path in online.downloads())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"auto_map": {"AutoModel": "modeling_own.Own"}}, "auto_map asks for remote code, which is never run"),
    ],
)
def test_unusable_model_is_refused_before_its_weights_are_downloaded(
    change: dict[str, Any], message: str, online: Hub
) -> None:
    online.files[MAIN]["config.json"] = json.dumps(json.loads(online.files[MAIN]["config.json"]) | change).encode()
    with pytest.raises(UserError, match=message):
        hf_checkpoint.resolve(REPO)
    assert online.downloads() == ["config.json"]


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_temporarily_busy_hub_is_retried(file: str, method: str, status: int, online: Hub, waits: list[float]) -> None:
    online.failing[method, file], online.status = 3, status
    assert hf_checkpoint.resolve(REPO).name == MAIN
    assert waits and sum(waits) < 60


@pytest.mark.parametrize("status", [429, 503])
def test_permanently_busy_hub_is_a_one_line_error(status: int, online: Hub, waits: list[float]) -> None:
    online.failing["HEAD", "config.json"], online.status = 10**9, status
    assert_refused(f"the hub answers {status}, and the cache .* lacks it: try again later")
    assert 0 < sum(waits) < 120
    online.failing = Counter({("GET", "model.safetensors"): 10**9})
    assert_refused(f"the hub answers {status}: try again later")
    assert 0 < sum(waits) < 240


def test_interrupted_download_leaves_no_weights(online: Hub, waits: list[float], tmp_path: Path) -> None:
    online.cut = "model.safetensors"
    assert_refused("not available from the hub: ")
    assert not list(tmp_path.rglob("snapshots/*/model.safetensors"))
    online.cut = ""
    assert (hf_checkpoint.resolve(REPO) / "model.safetensors").read_bytes() == online.files[MAIN]["model.safetensors"]


def test_cache_is_used_without_a_connection(
    online: Hub, server: ThreadingHTTPServer, waits: list[float], tmp_path: Path
) -> None:
    directory = hf_checkpoint.resolve(REPO)
    server.shutdown()
    server.server_close()
    huggingface_hub.close_session()  # the server would still answer on open connections
    assert hf_checkpoint.resolve(REPO) == directory
    shutil.rmtree(tmp_path / "cache")
    assert_refused(
        r"no connection to http://127\.0\.0\.1:\d+ \(ConnectError: .*\), and the cache .* lacks it: connect, or na"
    )
    assert 0 < sum(waits) < 120


def test_unwritable_cache_is_named(online: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    assert_refused(f"not available from the hub: .*Not a directory: .*{tmp_path / 'file'}")


def test_environment_variables_select_the_hub(server: Any, tmp_path: Path) -> None:
    code = f"from xtransfer.models.hf import checkpoint; print(checkpoint.resolve('{REPO}@v1'))"
    environment = {
        key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    }
    hub_variables = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path),
        "NO_PROXY": "127.0.0.1",
    }
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment | hub_variables, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == str(tmp_path / "hub" / "models--someone--some-bert" / "snapshots" / TAGGED)
