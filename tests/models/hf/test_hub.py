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
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, unquote

import huggingface_hub
import jax
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file

from tests.helpers import pytorch_files, tiny
from xtransfer.errors import UserError
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.models.hf import hub
from xtransfer.models.hf.weights import INDEX

REPO = "someone/some-bert"
MAIN, TAGGED, CONVERTED = "a" * 40, "b" * 40, "c" * 40
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
Files = dict[str, bytes]


@dataclass(frozen=True)
class Discussion:
    """A discussion or a pull request; its commits are listed as the hub does, the last one first."""

    number: int
    commits: tuple[str, ...]
    author: str = "SFconvertbot"
    title: str = "Adding `safetensors` variant of this model"
    status: str = "open"
    is_pull_request: bool = True


@dataclass
class Hub:
    """The repository of the server, its faults, and a log of its requests.

    Like a server that knows no filters, it lists all discussions, one to a page. `failing` maps (method, file) to the
    number of requests that are still answered with `status`.
    """

    files: dict[str, Files]  # by commit
    revisions: dict[str, str]
    gated: bool = False
    failing: Counter[tuple[str, str]] = field(default_factory=Counter)
    status: int = 503
    discussions: list[Discussion] = field(default_factory=list)
    discussions_status: int = 200
    cut: str = ""  # downloads of this file stop half-way
    requests: list[tuple[str, str]] = field(default_factory=list)

    def downloads(self) -> list[str]:
        """Return the files that were requested with GET, in order."""
        return [path for method, path in self.requests if method == "GET" and not path.startswith("api/")]

    def add(self, discussion: Discussion, files: Files | None = None) -> None:
        """Add a discussion, and the files of its last commit."""
        self.discussions.append(discussion)
        self.revisions[f"refs/pr/{discussion.number}"] = discussion.commits[0]
        if files is not None:
            self.files[discussion.commits[0]] = files

    def community(self, kind: str, rest: str, page: int) -> tuple[int, dict[str, str], bytes]:
        """Return the answer to a request for discussions, or for the commits of a pull request."""
        body: Any
        if kind == "discussions":
            rows = [
                {
                    "num": discussion.number,
                    "author": {"name": discussion.author},
                    "title": discussion.title,
                    "status": discussion.status,
                    "isPullRequest": discussion.is_pull_request,
                    "createdAt": "2024-01-01T00:00:00.000Z",
                    "repo": {"name": REPO, "type": "model"},
                }
                for discussion in self.discussions
            ]
            body = {"discussions": rows[page : page + 1], "start": page, "count": len(rows)}
        else:
            commits = next(
                discussion.commits for discussion in self.discussions if rest == f"refs/pr/{discussion.number}"
            )
            facts = {"title": "", "message": "", "date": "2024-01-01T00:00:00.000Z", "authors": [{"user": "someone"}]}
            body = [{"id": commit, **facts} for commit in commits]
        return self.discussions_status, {"Content-Type": "application/json"}, json.dumps(body).encode()

    def answer(self, method: str, path: str, page: int = 0) -> tuple[int, dict[str, str], bytes]:
        """Return (status, headers, body) for a path below the root."""
        if path.startswith("api/"):
            _, _, owner, repo_name, kind, *rest = path.split("/")
            repo, revision = f"{owner}/{repo_name}", unquote("/".join(rest))
        else:
            repo, _, resolved = path.partition("/resolve/")
            revision, _, name = resolved.partition("/")
            revision = unquote(revision)
        if repo != REPO:
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        if path.startswith("api/") and kind in ("discussions", "commits"):
            return self.community(kind, revision, page)
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
        path, _, query = self.path.strip("/").partition("?")
        name = path if path.startswith("api/") else path.split("/resolve/")[-1].partition("/")[2]
        served.requests.append((self.command, name))
        status, headers, body = served.answer(self.command, path, int(parse_qs(query).get("p", ["0"])[0]))
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
    files[INDEX] = json.dumps({"metadata": {}, "weight_map": table}).encode()
    return {*shards, INDEX}


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


@pytest.mark.parametrize(
    "vocabulary",
    [
        {"spm.model"},
        {"sentencepiece.bpe.model"},
        {"spiece.model"},
        {"tokenizer.model"},
        {"vocab.txt"},
        {"vocab.json", "merges.txt"},
        {"vocab.txt", "added_tokens.json", "special_tokens_map.json"},
    ],
)
def test_every_form_of_vocabulary_is_downloaded(vocabulary: set[str], online: Hub) -> None:
    del online.files[MAIN]["tokenizer.json"]
    online.files[MAIN].update({name: name.encode() for name in vocabulary})
    hf_checkpoint.resolve(REPO)
    expected = {"config.json", "model.safetensors", "tokenizer_config.json", *vocabulary}
    assert sorted(online.downloads()) == sorted(expected)


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
    online.files[MAIN][INDEX] = json.dumps({"weight_map": {"x": "../../escape.safetensors"}}).encode()
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
        (
            lambda files: [files.pop("model.safetensors"), files.pop("pytorch_model.bin")],
            r"no model\.safetensors and no pytorch_model\.bin, in one file or with an index: choose a revision",
        ),
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
        (
            {"model_type": "own", "auto_map": {"AutoModel": "modeling_own.Own"}},
            "model_type 'own' is not supported: one of bert",
        ),
    ],
)
def test_unusable_model_is_refused_before_its_weights_are_downloaded(
    change: dict[str, Any], message: str, online: Hub
) -> None:
    online.files[MAIN]["config.json"] = json.dumps(json.loads(online.files[MAIN]["config.json"]) | change).encode()
    with pytest.raises(UserError, match=message):
        hf_checkpoint.resolve(REPO)
    assert online.downloads() == ["config.json"]


def test_revision_may_be_a_pull_request(online: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    online.add(Discussion(7, (CONVERTED, MAIN)), online.files[MAIN] | {"tokenizer.json": b"{}"})
    directory = hf_checkpoint.resolve(f"{REPO}@refs/pr/7")
    assert directory.name == CONVERTED and (directory / "tokenizer.json").read_bytes() == b"{}"
    assert hf_checkpoint.resolve(REPO, "refs/pr/7") == directory
    assert hf_checkpoint.resolve(f"{REPO}@refs/pr/7", only_config=True) == directory
    assert_refused("the repository has no such revision", f"{REPO}@refs/pr/8")
    go_offline(online, monkeypatch)
    assert hf_checkpoint.resolve(f"{REPO}@refs/pr/7") == directory and not online.requests


@pytest.fixture
def unconverted(online: Hub, checkpoint: Path, tmp_path: Path) -> Hub:
    """Return the hub with a repository that has only a PyTorch file, whose numbers differ from the safetensors."""
    tensors = {name: value + 1 for name, value in load_file(checkpoint / "model.safetensors").items()}
    pytorch = pytorch_files.write_tensors(tmp_path / "pytorch_model.bin", tensors).read_bytes()
    for files in online.files.values():
        del files["model.safetensors"]
        files["pytorch_model.bin"] = pytorch
    return online


def convert(unconverted: Hub, checkpoint: Path, discussion: Discussion) -> None:
    """Add a pull request with the safetensors."""
    weights = (checkpoint / "model.safetensors").read_bytes()
    unconverted.add(discussion, unconverted.files[MAIN] | {"model.safetensors": weights})


def test_safetensors_of_the_converters_pull_request_are_used(
    unconverted: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for number, status in ((3, "closed"), (4, "merged")):
        unconverted.add(Discussion(number, ("d" * 40, MAIN), status=status))
    convert(unconverted, checkpoint, Discussion(7, (CONVERTED, MAIN, TAGGED)))
    hub._warn.cache_clear()
    directory = hf_checkpoint.resolve(REPO)  # without a level: users see warnings only
    assert directory.name == CONVERTED
    assert caplog.messages == [
        f"{REPO}: no safetensors; using pull request 7 of SFconvertbot, which converts this commit: commit {CONVERTED}"
    ]
    assert hf_checkpoint.fingerprint_files(directory) == hf_checkpoint.fingerprint_files(checkpoint)
    assert "pytorch_model.bin" not in unconverted.downloads()
    cached = huggingface_hub.scan_cache_dir(constants.HF_HUB_CACHE)
    assert not cached.warnings

    # The pull request may disappear, and later starts ask for nothing but the branch.
    unconverted.discussions.clear()
    unconverted.requests.clear()
    assert hf_checkpoint.resolve(REPO) == directory
    assert unconverted.requests == [("HEAD", "config.json")]
    go_offline(unconverted, monkeypatch)
    for name in (REPO, f"{REPO}@{MAIN}"):
        assert hf_checkpoint.resolve(name) == directory and not unconverted.requests
    assert caplog.messages[1:] == [
        f"{name}: no safetensors; using its conversion, commit {CONVERTED}" for name in (REPO, f"{REPO}@{MAIN}")
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"author": "someone"},
        {"status": "closed"},
        {"status": "merged"},
        {"is_pull_request": False},
        {"title": "Update README.md"},
        {"commits": (CONVERTED, TAGGED, MAIN)},
        {"commits": (CONVERTED, "e" * 40, MAIN)},
        {"commits": (CONVERTED,)},
    ],
)
def test_other_pull_requests_are_not_used(
    change: dict[str, Any], unconverted: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(unconverted, checkpoint, replace(Discussion(7, (CONVERTED, MAIN)), **change))
    assert_pytorch_file_is_used(unconverted, checkpoint, monkeypatch)


@pytest.mark.parametrize("status", [200, 403, 404])
def test_pytorch_file_is_used_without_a_pull_request(
    status: int, unconverted: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unconverted.discussions_status = status
    assert_pytorch_file_is_used(unconverted, checkpoint, monkeypatch)


def test_pull_request_without_safetensors_is_not_used(
    unconverted: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unconverted.add(Discussion(7, (CONVERTED, MAIN)), dict(unconverted.files[MAIN]))
    assert_pytorch_file_is_used(unconverted, checkpoint, monkeypatch)


def assert_pytorch_file_is_used(unconverted: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the parameters, one download, and the use of the cache, even after a pull request appears."""
    directory = hf_checkpoint.resolve(REPO)
    assert directory.name == MAIN and "model.safetensors" not in unconverted.downloads()
    assert unconverted.downloads().count("pytorch_model.bin") == 1
    params, original = (hf_checkpoint.load_classifier(path, 2, seed=0)[1] for path in (directory, checkpoint))
    encoders = (jax.tree.leaves(state["encoder"]) for state in (params, original))
    for ours, converted in zip(*encoders, strict=True):
        np.testing.assert_array_equal(ours, converted + np.float32(1))
    unconverted.discussions_status = 200
    convert(unconverted, checkpoint, Discussion(9, (CONVERTED, MAIN)))
    unconverted.requests.clear()
    assert hf_checkpoint.resolve(REPO) == directory
    assert unconverted.requests == [("HEAD", "config.json")]
    go_offline(unconverted, monkeypatch)
    assert hf_checkpoint.resolve(REPO) == directory and not unconverted.requests


def test_sharded_pytorch_files_are_downloaded(unconverted: Hub, tmp_path: Path) -> None:
    files = unconverted.files[MAIN]
    whole = files.pop("pytorch_model.bin")
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    files |= {name: whole + name.encode() for name in names}
    files["pytorch_model.bin.index.json"] = json.dumps({"weight_map": {"x": names[0], "y": names[1]}}).encode()
    directory = hf_checkpoint.resolve(REPO)
    weights = {*names, "pytorch_model.bin.index.json"}
    assert sorted(unconverted.downloads()) == sorted({"config.json", *weights, *TOKENIZER})
    assert {path.name for path in directory.iterdir()} == {"config.json", *weights, *TOKENIZER}


def test_busy_hub_does_not_decide_between_the_formats(unconverted: Hub, waits: list[float]) -> None:
    """A hub that answers 503 may have a conversion, and another format is another fingerprint."""
    unconverted.discussions_status = 503
    assert_refused("the hub answers 503: try again later")
    assert "pytorch_model.bin" not in unconverted.downloads() and 0 < sum(waits) < 120


def test_pull_requests_are_not_asked_for_if_there_are_safetensors(online: Hub, checkpoint: Path) -> None:
    convert(online, checkpoint, Discussion(7, (CONVERTED, MAIN)))
    assert hf_checkpoint.resolve(REPO).name == MAIN
    assert not any("discussions" in path or "commits" in path for _, path in online.requests)


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
