"""The origin of a checkpoint for a model card: its name, its place on the hub, and its licence, without local paths."""

import re
from dataclasses import dataclass
from pathlib import Path

from xtransfer.config import user_path
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.models.hf import hub
from xtransfer.models.hf.config import CONFIG

_FRONT_MATTER = re.compile(r"---\n(.*?)^---$", re.DOTALL | re.MULTILINE)
_LICENCE = re.compile(r"^license:\s*[\"']?([\w.-]+)[\"']?\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Origin:
    """A checkpoint's origin, as a model card states it.

    Attributes:
      name: a short name, as plain text.
      text: the name and where it comes from, as Markdown.
      hub_id: the name of its repository; None if it has none.
      licence: the licence that its own card declares; None if the card is not at hand.
    """

    name: str
    text: str
    hub_id: str | None = None
    licence: str | None = None


def origin(checkpoint: str) -> Origin:
    """Return the origin of a config's `checkpoint`, in the order of `hf.checkpoint.resolve`; nothing is fetched."""
    embedded = hf_checkpoint.EMBEDDED / Path(checkpoint).name
    if embedded.name == checkpoint and (embedded / CONFIG).is_file():
        return Origin(checkpoint, f"`{checkpoint}` (part of xtransfer)", licence=declared_licence(embedded))
    path = user_path(checkpoint).resolve()
    repo, _, revision = checkpoint.partition("@")
    if path.is_dir() or not hub.is_id(repo):
        return Origin(path.name, f"{as_code(path.name)} (a local directory)", licence=declared_licence(path))
    suffix = f" at `{revision}`" if revision else ""
    return Origin(repo, f"[{repo}](https://huggingface.co/{repo}){suffix}", hub_id=repo)


def declared_licence(directory: Path) -> str | None:
    """Return the licence in the front matter of a checkpoint's own card, if it has one."""
    card = directory / "README.md"
    front = _FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
    licence = _LICENCE.search(front[1]) if front else None
    return licence[1] if licence else None


def as_line(text: str) -> str:
    """Return a user's name as Markdown on one line, which is safe in a table too."""
    return re.sub(r"([|`*<>\[\]\\])", r"\\\1", " ".join(text.split()))


def as_code(text: str) -> str:
    """Return a user's name as code on one line, which is safe in a table too."""
    return "`" + " ".join(text.split()).replace("`", "'").replace("|", "\\|") + "`"
