"""Checkpoints from the Hugging Face hub: only the files that are needed, through huggingface_hub's cache."""

import contextlib
import functools
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from xtransfer import storage
from xtransfer.errors import CheckpointError, UserError, one_line
from xtransfer.models.hf.config import CONFIG, read_config
from xtransfer.models.hf.weights import NO_WEIGHTS, PYTORCH, SAFETENSORS, read_index

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "*.model",
)

_WAITS = (1, 2, 4, 8)  # seconds before each further attempt
_CONVERTER = "SFconvertbot"  # the hub's account that opens pull requests with a repository's weights as safetensors
_CONVERSIONS = "safetensors-of"  # the folder among the cache's refs that names a commit's conversion

_T = TypeVar("_T")

log = logging.getLogger(__name__)


def is_id(repo: str) -> bool:
    """Return whether this may be the name of a repository, with or without its owner's name."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", repo) is not None


def fetch(repo: str, revision: str | None = None) -> Path:
    """Return the directory in the hub's cache with a repository's config, tokenizer, and weights.

    Cached files are not fetched again, and they are used as they are if the hub cannot be reached. The architecture is
    checked before the weights are fetched. If the revision has no safetensors, a pull request of the hub's converter
    that adds them to this very revision takes its place. Without one, PyTorch files are fetched.

    Args:
      repo: the repository's name.
      revision: a branch, tag, commit, or pull request (`refs/pr/N`); None is the main branch.

    Raises:
      UserError: no such repository or revision, no access, no connection and nothing cached, no weights, or an
        unsupported model.
    """
    name = f"{repo}@{revision}" if revision else repo
    try:
        directory = _file(repo, CONFIG, revision).parent
        # Every file comes from this commit, even if the branch moves meanwhile.
        log.info("%s: commit %s", name, directory.name)
        read_config(directory)
        _fetch_tokenizer(repo, directory.name)
        return _fetch_weights(repo, name, directory)
    except UserError:
        raise
    except Exception as error:  # the hub client raises from several libraries
        raise CheckpointError(
            f"{name}: no such directory, and not available from the hub: {_reason(error, repo)}"
        ) from error


def fetch_config(repo: str, revision: str | None = None) -> Path:
    """Return the directory in the hub's cache with a repository's config.json; nothing else is fetched.

    Raises:
      UserError: it can neither be fetched nor found in the cache.
    """
    try:
        return _file(repo, CONFIG, revision).parent
    except Exception as error:  # as in `fetch`
        name = f"{repo}@{revision}" if revision else repo
        raise CheckpointError(
            f"{name}: no such directory, and not available from the hub: {_reason(error, repo)}"
        ) from error


def _fetch_tokenizer(repo: str, commit: str) -> None:
    from huggingface_hub import snapshot_download

    patterns: dict[str, Any] = {"allow_patterns": list(TOKENIZER_FILES), "ignore_patterns": "*/*"}
    _retry(lambda: snapshot_download(repo, revision=commit, **patterns))


def _fetch_weights(repo: str, name: str, directory: Path) -> Path:
    """Fetch the weights of a commit, and return its directory, or the directory of the commit that converts them."""
    pinned = directory.parents[1] / "refs" / _CONVERSIONS / directory.name
    if not _has_any(directory, SAFETENSORS):
        if pinned.is_file() and (converted := _fetch_converted(repo, pinned.read_text())):
            _warn(f"{name}: no safetensors; using its conversion, commit {converted.name}")
            return converted
        if _has_any(directory, PYTORCH) and _fetch_files(repo, directory, PYTORCH):
            return directory
    if _fetch_files(repo, directory, SAFETENSORS):
        return directory
    conversion = _find_conversion(repo, directory.name)
    if conversion and (converted := _fetch_converted(repo, conversion.commit)):
        origin = f"pull request {conversion.number} of {_CONVERTER}, which converts this commit"
        _warn(f"{name}: no safetensors; using {origin}: commit {conversion.commit}")
        with contextlib.suppress(UserError):  # in a cache that is read-only, the hub is asked again
            storage.write_atomically(pinned, conversion.commit)
        return converted
    if _fetch_files(repo, directory, PYTORCH):
        return directory
    raise CheckpointError(f"{name}: {NO_WEIGHTS}")


@functools.cache
def _warn(message: str) -> None:
    """Warn once per process, because a command resolves a checkpoint several times."""
    log.warning(message)


def _fetch_converted(repo: str, commit: str) -> Path | None:
    """Fetch everything from a commit of the converter; return its directory, or None if it has no safetensors."""
    directory = _file(repo, CONFIG, commit).parent
    read_config(directory)
    if not _fetch_files(repo, directory, SAFETENSORS):
        return None
    _fetch_tokenizer(repo, commit)
    return directory


class _Conversion(NamedTuple):
    """A pull request, and its last commit."""

    number: int
    commit: str


def _find_conversion(repo: str, commit: str) -> _Conversion | None:
    """Return the converter's open pull request whose only commit continues this one, or None."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()

    def requests() -> list[Any]:
        filters: dict[str, Any] = {"discussion_type": "pull_request", "discussion_status": "open"}
        return list(api.get_repo_discussions(repo, author=_CONVERTER, **filters))

    def commits(reference: str) -> list[str]:
        """Return the commits of a pull request, the last one first."""
        return [info.commit_id for info in _retry(lambda: api.list_repo_commits(repo, revision=reference))]

    try:
        for request in _retry(requests):
            is_open = request.is_pull_request and request.status == "open"
            # Anybody may open a pull request with this title, and its weights may be anything.
            if is_open and request.author == _CONVERTER and "safetensors" in request.title:
                head, *earlier = commits(f"refs/pr/{request.num}")
                if earlier[:1] == [commit]:
                    return _Conversion(request.num, head)
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403, 404):  # the owner may turn pull requests off
            raise
    return None


def _has_any(directory: Path, names: tuple[str, ...]) -> bool:
    return any((directory / name).is_file() for name in names)


def _fetch_files(repo: str, directory: Path, names: tuple[str, str]) -> bool:
    """Fetch a file of weights, or else the index and its shards; return False if the commit has neither.

    Args:
      repo: the repository's name.
      directory: the commit's directory in the cache.
      names: the names of the single file and of the index.
    """
    from huggingface_hub.errors import RemoteEntryNotFoundError

    single, index = names
    if (directory / single).is_file() or not (directory / index).is_file():
        with contextlib.suppress(RemoteEntryNotFoundError):
            _file(repo, single, directory.name)
            return True
    try:
        table = read_index(_file(repo, index, directory.name))
    except RemoteEntryNotFoundError:
        return False
    for shard in sorted(set(table.values())):
        _file(repo, shard, directory.name)
    return True


def _file(repo: str, file: str, revision: str | None) -> Path:
    """Return a file of a repository, in the cache."""
    from huggingface_hub import hf_hub_download

    return Path(_retry(lambda: hf_hub_download(repo, file, revision=revision)))


def _retry(request: Callable[[], _T]) -> _T:
    """Repeat a request while the hub answers 5xx, which the client itself does not retry."""
    from huggingface_hub.errors import HfHubHTTPError

    for wait in _WAITS:
        try:
            return request()
        except HfHubHTTPError as error:
            if error.response.status_code < 500:
                raise
            log.warning("the hub answers %d; trying again in %d s", error.response.status_code, wait)
            time.sleep(wait)
    return request()


def _reason(error: Exception, repo: str) -> str:
    """Say in one line what went wrong and what to do."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return f"it is gated: ask for access at {constants.ENDPOINT}/{repo}, then log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such repository, or a private one: check the name, or log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision: choose a branch, a tag, or a whole commit hash"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"the repository has no {str(error.response.url).rsplit('/', 1)[-1]}: not a complete transformers model"
    if isinstance(error, errors.LocalEntryNotFoundError):
        lacking = f"the cache {constants.HF_HUB_CACHE} lacks it"
        cause = error.__cause__
        if constants.is_offline_mode():
            return f"HF_HUB_OFFLINE is set, and {lacking}: fetch it once without it, or name a directory"
        if isinstance(cause, errors.HfHubHTTPError):
            return f"the hub answers {cause.response.status_code}, and {lacking}: try again later"
        why = f"{type(cause or error).__name__}: {one_line(cause or error, limit=100)}"
        return f"no connection to {constants.ENDPOINT} ({why}), and {lacking}: connect, or name a directory"
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (429, 500, 502, 503, 504):
        return f"the hub answers {error.response.status_code}: try again later"
    return one_line(error)
