"""Where a checkpoint came from, in words for others: its name, its place on the hub, its licence; no local path."""

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
    """A checkpoint as others may know it.

    Attributes:
      name: short, as plain text.
      text: the name with where it is from, as Markdown.
      hub_id: of its repository, None where it has none.
      licence: as its own card declares it, None where that is not at hand.
    """

    name: str
    text: str
    hub_id: str | None = None
    licence: str | None = None


def origin(checkpoint: str) -> Origin:
    """What a config's `checkpoint` is, in the order in which `hf.resolve` looks for it; nothing is fetched."""
    embedded = hf_checkpoint.EMBEDDED / Path(checkpoint).name
    if embedded.name == checkpoint and (embedded / CONFIG).is_file():
        return Origin(checkpoint, f"`{checkpoint}` (comes with xtransfer)", licence=declared_licence(embedded))
    path = user_path(checkpoint).resolve()
    repo, _, revision = checkpoint.partition("@")
    if path.is_dir() or not hub.is_id(repo):
        return Origin(path.name, f"{as_code(path.name)} (a local directory)", licence=declared_licence(path))
    at = f" at `{revision}`" if revision else ""
    return Origin(repo, f"[{repo}](https://huggingface.co/{repo}){at}", hub_id=repo)


def declared_licence(directory: Path) -> str | None:
    """The licence in the front matter of a checkpoint's own card, where it has one."""
    card = directory / "README.md"
    front = _FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
    found = _LICENCE.search(front[1]) if front else None
    return found[1] if found else None


def as_line(text: str) -> str:
    """A user's name as Markdown in one line, also in a table."""
    return re.sub(r"([|`*<>\[\]\\])", r"\\\1", " ".join(text.split()))


def as_code(text: str) -> str:
    """The same set as code."""
    return "`" + " ".join(text.split()).replace("`", "'").replace("|", "\\|") + "`"
