"""Checkpoints from the Hugging Face hub: only the files that are needed, through huggingface_hub's cache."""

import contextlib
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xtransfer.errors import UserError, one_line
from xtransfer.models.hf.config import CONFIG, read_config
from xtransfer.models.hf.weights import INDEX, NO_WEIGHTS, WEIGHTS, read_index

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

log = logging.getLogger(__name__)


def is_id(repo: str) -> bool:
    """Return whether this may be the name of a repository, with or without its owner's name."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", repo) is not None


def fetch(repo: str, revision: str | None = None) -> Path:
    """Return the directory in the hub's cache with a repository's config, tokenizer, and safetensors.

    Cached files are not fetched again, and they are used as they are if the hub cannot be reached. The architecture is
    checked before the weights are fetched.

    Args:
      repo: the repository's name.
      revision: a branch, tag, or commit; None is the main branch.

    Raises:
      UserError: no such repository or revision, no access, no connection and nothing cached, no safetensors, or an
        unsupported model.
    """
    from huggingface_hub import snapshot_download

    name = f"{repo}@{revision}" if revision else repo
    try:
        directory = _file(repo, CONFIG, revision).parent
        commit = directory.name  # every file comes from this commit, even if the branch moves meanwhile
        log.info("%s: commit %s", name, commit)
        read_config(directory)
        patterns: dict[str, Any] = {"allow_patterns": list(TOKENIZER_FILES), "ignore_patterns": "*/*"}
        _retry(lambda: snapshot_download(repo, revision=commit, **patterns))
        if not _fetch_weights(repo, commit, directory):
            raise UserError(f"{name}: {NO_WEIGHTS}")
    except UserError:
        raise
    except Exception as error:  # the hub client raises from several libraries
        raise UserError(f"{name}: no such directory, and not available from the hub: {_reason(error, repo)}") from error
    return directory


def fetch_config(repo: str, revision: str | None = None) -> Path:
    """Return the directory in the hub's cache with a repository's config.json; nothing else is fetched.

    Raises:
      UserError: it can neither be fetched nor found in the cache.
    """
    try:
        return _file(repo, CONFIG, revision).parent
    except Exception as error:  # as in `fetch`
        name = f"{repo}@{revision}" if revision else repo
        raise UserError(f"{name}: no such directory, and not available from the hub: {_reason(error, repo)}") from error


def _fetch_weights(repo: str, commit: str, directory: Path) -> bool:
    """Fetch model.safetensors or else the index and its shards; return False if the repository has neither."""
    from huggingface_hub.errors import RemoteEntryNotFoundError

    if (directory / WEIGHTS).is_file() or not (directory / INDEX).is_file():
        with contextlib.suppress(RemoteEntryNotFoundError):
            _file(repo, WEIGHTS, commit)
            return True
    try:
        index = _file(repo, INDEX, commit)
    except RemoteEntryNotFoundError:
        return False
    for shard in sorted(set(read_index(index).values())):
        _file(repo, shard, commit)
    return True


def _file(repo: str, file: str, revision: str | None) -> Path:
    """Return a file of a repository, in the cache."""
    from huggingface_hub import hf_hub_download

    return Path(_retry(lambda: hf_hub_download(repo, file, revision=revision)))


def _retry(download: Callable[[], str]) -> str:
    """Download again while the hub answers 5xx, which the client itself does not retry."""
    from huggingface_hub.errors import HfHubHTTPError

    for wait in _WAITS:
        try:
            return download()
        except HfHubHTTPError as error:
            if error.response.status_code < 500:
                raise
            log.warning("the hub answers %d; trying again in %d s", error.response.status_code, wait)
            time.sleep(wait)
    return download()


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
