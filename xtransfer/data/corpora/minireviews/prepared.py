"""The prepared data of `minireviews`: `prepare` writes a config once with TFDS, and `read` returns its rows.

TFDS is only imported when it is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtransfer.data.corpora.minireviews import generator
from xtransfer.data.corpora.tfds_prepare import find_or_write, quiet, write
from xtransfer.errors import DataError

if TYPE_CHECKING:
    from xtransfer.data.corpora.minireviews.builder import MiniReviews


def _builder(config_name: str, data_dir: Path) -> MiniReviews:
    from xtransfer.data.corpora.minireviews.builder import MiniReviews, config_names

    if config_name not in config_names():
        raise DataError(f"minireviews has no config {config_name!r}; it has {', '.join(config_names())}")
    return MiniReviews(config=config_name, data_dir=str(_root(data_dir)), file_format="array_record")


def _root(data_dir: Path) -> Path:
    # The fingerprint in the path keeps what another version of the texts wrote from being read as this one.
    return Path(data_dir) / f"minireviews-{generator.FINGERPRINT[:12]}"


def _data(config_name: str, data_dir: Path) -> Path:
    """Return the directory in which TFDS keeps a config."""
    return _root(data_dir) / "minireviews" / config_name / generator.VERSION


def prepare(config_name: str, data_dir: Path) -> MiniReviews:
    """Write one config under `data_dir` unless it exists, and return its TFDS builder.

    This is safe beside other processes (a file lock) and after a killed one (TFDS renames a finished folder into
    place). Damaged data are written again. Existing data may be read-only.

    Raises:
      UserError: an unknown config, or a directory that cannot be written.
    """

    def find() -> MiniReviews | None:
        with quiet():
            builder = _builder(config_name, data_dir)
            return builder if builder.is_prepared() else None

    def make() -> MiniReviews:
        return write(lambda log_line: _builder(config_name, data_dir), _root(data_dir), data)

    data = _data(config_name, data_dir)
    return find_or_write(_root(data_dir), config_name, data, find, make)


def read(config_name: str, split: str, data_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of one prepared split in order, with text as str and label as int.

    Raises:
      UserError: an unknown config or split, or a config that `prepare` has not written here.
    """
    builder = _builder(config_name, data_dir)
    with quiet():
        is_prepared = builder.is_prepared()
    if not is_prepared:
        raise DataError(f"minireviews/{config_name} is not prepared in {data_dir}: call prepare() first")
    if split not in builder.info.splits:
        raise DataError(f"minireviews/{config_name} has no split {split!r}; it has {', '.join(builder.info.splits)}")
    source = builder.as_data_source(split=split)
    rows = source.__getitems__(range(len(source)))  # all at once: one by one takes ten times as long
    return [{key: _plain(value) for key, value in row.items()} for row in rows]


def _plain(value: Any) -> str | int:
    return value.decode() if isinstance(value, bytes) else int(value)
