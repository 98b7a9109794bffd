"""The task of a corpus: find or fetch its files, write each language once with TFDS, and read it by random access."""

import contextlib
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, TypeVar

from xtransfer.config import TaskConfig, cache_dir, user_path
from xtransfer.data import sampling, text_cache
from xtransfer.data.corpora import archives, downloads
from xtransfer.data.corpora.corpus import Corpus, Download, Sources
from xtransfer.data.corpora.tfds_prepare import find_or_write, quiet, write
from xtransfer.data.task import UNLABELLED, Example, Task, check_request, example_id, target_languages
from xtransfer.errors import ConfigError, DataError, MissingSplitError, UserError, one_line, user_error
from xtransfer.runtime import terminal

_Result = TypeVar("_Result")

_SHOWN = 20  # the most languages in an error

_log = logging.getLogger(__name__)


def task(corpus: Corpus, config: TaskConfig) -> Task:
    """Return the task of a corpus. Each language is written once below the cache directory, and read from there.

    Raises:
      UserError: there is no such language or split. On loading: data are missing or malformed.
    """
    for language in (*config.sources, *config.target_languages):
        release = dict(corpus.elsewhere).get(language)
        if release is not None:
            raise ConfigError(
                f"{corpus.name} has no {language!r}, which only {release} has: read that as your own files"
            )
    _check_source(corpus, config)
    targets = target_languages(config, corpus.languages)
    languages = PreparedLanguages(corpus, config)

    def load(split: str, language: str) -> Sequence[Example]:
        check_request(split, language, config, targets)
        splits = corpus.splits(language)
        holds_out = "train" in splits and "dev" not in splits
        if split in ("train", "dev") and holds_out:
            train, dev = sampling.train_and_dev(languages.read(language, "train"), config)
            return train if split == "train" else dev
        if split not in splits:
            instead = "; set task.unlabelled_from to 'train_rest', 'file' or 'none'" if split == UNLABELLED else ""
            message = f"{corpus.name} has no {split} split in {language}, only {', '.join(splits)}{instead}"
            raise MissingSplitError(split, language, message)
        return languages.read(language, split)

    def fingerprint() -> str:
        facts: list[Any] = [corpus.name, corpus.labels]
        for language in (config.source_language, *targets):
            facts.append([language, languages.digests(language)])
        if "dev" not in corpus.splits(config.source_language):
            facts.append([config.held_out_dev, config.held_out_seed])
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def pretraining(language: str) -> dict[str, list[str]]:
        splits = corpus.splits(language)
        split = UNLABELLED if UNLABELLED in splits else "train"
        examples = load(split, language) if split in splits else []
        return {language: [text for example in examples for text in (example.text, example.text_pair) if text]}

    return Task(
        name=config.name,
        labels=corpus.labels,
        source_language=config.source_language,
        target_languages=targets,
        load=load,
        fingerprint=fingerprint,
        synthetic=False,
        pretraining=pretraining,
        parallel=lambda first, second: [],
    )


def _check_source(corpus: Corpus, config: TaskConfig) -> None:
    """Refuse a source language without labelled text; the corpus's own is suggested first."""
    key = "source_languages" if config.source_languages else "source_language"
    for language in config.sources:
        if language not in corpus.languages or "train" not in corpus.splits(language):
            raise _no_train(corpus, key, language)


def _no_train(corpus: Corpus, key: str, requested: str) -> ConfigError:
    with_train = (language for language in corpus.languages if "train" in corpus.splits(language))
    usable = list(dict.fromkeys([corpus.source_language, *with_train]))
    suggested = next((language for language in usable if language.startswith(requested)), corpus.source_language)
    shown = ", ".join(usable[:_SHOWN]) + (f" and {len(usable) - _SHOWN} more" if len(usable) > _SHOWN else "")
    return ConfigError(f"task.{key} {requested!r}: set it to {suggested!r}; {corpus.name} has train in {shown}")


class PreparedLanguages:
    """The languages of a corpus below the cache directory, each written on its first use."""

    def __init__(self, corpus: Corpus, config: TaskConfig) -> None:
        """Read nothing yet."""
        self._corpus, self._config = corpus, config
        self._builders: dict[str, Any] = {}

    def read(self, language: str, split: str) -> Sequence[Example]:
        """Return the examples of a split in the order of the corpus's files, on disk if they are large."""
        from xtransfer.data.corpora import tfds_builder  # importing TFDS takes a second

        prefix = example_id(self._config.name, split, language, "")

        def stream(builder: Any) -> Iterator[Example]:
            for number, text, pair, label in tfds_builder.read(builder, split):
                yield Example(
                    id=f"{prefix}{number}",
                    text=text,
                    text_pair=pair if self._corpus.has_pairs else None,
                    label=label,
                    language=language,
                )

        def examples(builder: Any) -> Sequence[Example]:
            if builder.info.splits[split].num_bytes < text_cache.LARGE:
                return list(stream(builder))
            key = [builder.info.metadata[split]["digest"], self._corpus.labels, self._corpus.has_pairs]
            directory = cache_dir(self._config) / "texts"
            return text_cache.stored(
                directory, key, prefix, language, functools.partial(stream, builder), has_numbers=False
            )

        return self._use(language, examples)

    def digests(self, language: str) -> dict[str, str]:
        """Return the sha256 over the rows of each split."""
        splits = self._corpus.splits(language)
        return self._use(language, lambda builder: {name: builder.info.metadata[name]["digest"] for name in splits})

    def _use(self, language: str, work: Callable[[Any], _Result]) -> _Result:
        """Return what `work` makes of a language's builder; if its data were removed meanwhile, write them again."""
        builder = self._builder(language)
        try:
            return work(builder)
        except UserError:
            raise
        except Exception:  # TFDS and array_record raise many kinds for a file that is not as they wrote it
            del self._builders[language]
            builder = self._builder(language)
            with self._undamaged(language):
                return work(builder)

    def _data(self, language: str) -> Path:
        """Return the directory in which TFDS keeps a language."""
        from xtransfer.data.corpora.tfds_builder import XtransferCorpus

        return self._root / XtransferCorpus.name / language / str(XtransferCorpus.VERSION)

    def _builder(self, language: str) -> Any:
        """Return the TFDS builder of a language with its data written; safe beside other processes and after a kill."""
        if language not in self._builders:
            find, write_ = functools.partial(self._find, language), functools.partial(self._write, language)
            self._builders[language] = find_or_write(self._root, language, self._data(language), find, write_)
        return self._builders[language]

    def _find(self, language: str) -> Any:
        from xtransfer.data.corpora.tfds_builder import XtransferCorpus

        with quiet():
            builder = XtransferCorpus(self._corpus, language, self._root)
            return builder if builder.is_prepared() else None

    def _write(self, language: str) -> Any:
        from xtransfer.data.corpora.tfds_builder import XtransferCorpus

        corpus, config, root = self._corpus, self._config, self._root
        sources = find_sources(corpus, config, language)
        terminal.log(f"{corpus.name}/{language}: preparing once, in {root}")

        def new(log_line: Callable[[str], None]) -> XtransferCorpus:
            return XtransferCorpus(
                corpus, language, root, sources=sources, empty_text=config.empty_text, log_line=log_line
            )

        write(new, root, self._data(language))
        with self._undamaged(language):
            builder = self._find(language)  # so that the first use reads what all later ones read
            self._report(language, builder.info)
        return builder

    def _report(self, language: str, info: Any) -> None:
        """Log the number of examples, and the rows that were left out."""
        name, splits = self._corpus.name, self._corpus.splits(language)
        for split in splits:
            for reason, count, where in info.metadata[split]["skipped"]:
                _log.warning(
                    "%s/%s: %d rows of %s left out (%s), the first at %s", name, language, count, split, reason, where
                )
        counts = ", ".join(f"{split} {info.splits[split].num_examples:,}" for split in splits)
        terminal.log(f"{name}/{language}: {counts} examples")

    @contextlib.contextmanager
    def _undamaged(self, language: str) -> Iterator[None]:
        try:
            yield
        except (UserError, OSError):
            raise
        except Exception as error:  # TFDS and array_record raise many kinds for a file that is not as they wrote it
            raise DataError(
                f"{self._data(language)}: the prepared data are damaged ({one_line(error)}): delete that folder and "
                "run again"
            ) from error

    @functools.cached_property
    def _root(self) -> Path:
        # A hash in the path, so that data prepared by another version or from other files are never read.
        corpus, config = self._corpus, self._config
        if config.data_dir:
            paths = _user_paths(user_path(config.data_dir), _all_downloads(corpus))
            origin: Any = [stamp for path in dict.fromkeys(paths.values()) for stamp in _stamps(corpus, config, path)]
        else:
            origin = [astuple(download) for download in _all_downloads(corpus)]
        facts = [corpus.name, corpus.version, corpus.labels, config.empty_text, origin]
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        return cache_dir(config) / f"{corpus.name.replace('/', '-')}-{key[:12]}"


def find_sources(corpus: Corpus, config: TaskConfig, language: str) -> Sources:
    """Return the files of a language: the user's if `task.data_dir` is set, or else the publisher's.

    Raises:
      UserError: there is no such file or folder, or a download fails.
    """
    needed = corpus.downloads(language)
    if config.data_dir:
        return Sources(_user_paths(user_path(config.data_dir), needed))
    folder = cache_dir(config) / "downloads" / corpus.name.partition("/")[0]
    paths = {}
    for download in needed:
        try:
            fetched = downloads.fetch(download, folder)
        except UserError as error:
            raise user_error(error.exit_status, f"{error}. {corpus.notes}" if corpus.notes else str(error)) from error
        paths[download.filename] = fetched if _is_archive(download.filename) else folder
    return Sources(paths)


def _user_paths(data_dir: Path, needed: Sequence[Download]) -> dict[str, Path]:
    """Return the path of each download's contents in the user's data."""
    if data_dir.is_dir():
        return {download.filename: _user_path(data_dir, download.filename) for download in needed}
    if not data_dir.is_file():
        raise ConfigError(f"task.data_dir {data_dir}: no such file or folder")
    names = [download.filename for download in needed]
    if data_dir.name in names:
        return {data_dir.name: data_dir}
    if len(names) > 1 and any(map(_is_archive, names)):  # this one archive may hold all files that are not archives
        raise ConfigError(f"task.data_dir {data_dir}: expected a folder with {', '.join(names)} or their contents")
    return dict.fromkeys(names, data_dir)


def _user_path(folder: Path, filename: str) -> Path:
    """Return the archive of that name in the folder, a folder with its contents, or the folder itself."""
    file, unpacked = folder / filename, folder / archives.unpacked_name(filename)
    if file.is_file():
        return file if _is_archive(filename) else folder
    return unpacked if unpacked.is_dir() else folder


def _is_archive(filename: str) -> bool:
    """Return whether a download is an archive; any other file is read as a member of its folder."""
    return archives.unpacked_name(filename) != filename


def _all_downloads(corpus: Corpus) -> list[Download]:
    return list(dict.fromkeys(download for language in corpus.languages for download in corpus.downloads(language)))


def _stamps(corpus: Corpus, config: TaskConfig, path: Path) -> list[list[Any]]:
    """Return name, size, and modification time of the files that a corpus may read, which show if they changed."""
    members = {member for language in corpus.languages for member in corpus.members(language)}

    def is_read(name: str) -> bool:
        parts = name.split("/")
        return any("/".join(parts[start:]) in members for start in range(len(parts)))

    names = list(filter(is_read, archives.files_below(path, but=cache_dir(config)))) if path.is_dir() else [""]
    stamps: list[list[Any]] = []
    for name in names:
        file = path / name
        with contextlib.suppress(FileNotFoundError):  # a broken link
            facts = file.stat()
            stamps.append([str(file.resolve()), facts.st_size, facts.st_mtime_ns])
    return stamps
