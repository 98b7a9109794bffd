"""The task `files`: the user's own files, one per split with a language column, or one per language and split.

Also the user's file of unlabelled text, for any task.
"""

import dataclasses
import functools
import glob
import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from xtransfer import storage
from xtransfer.config import TaskConfig, cache_dir, user_path
from xtransfer.data import names, sampling, text_cache
from xtransfer.data.examples import classes_of
from xtransfer.data.formats import tables
from xtransfer.data.formats.lines import DELIMITERS, Delimiter
from xtransfer.data.formats.tables import LabelSets, Record
from xtransfer.data.repeats import Repeats, Suspects
from xtransfer.data.task import (
    SPLITS,
    UNLABELLED,
    Example,
    Task,
    TextSource,
    check_request,
    example_id,
    is_on_pairs,
    label_index,
    target_languages,
)
from xtransfer.errors import ConfigError, DataError, MissingSplitError

RowCounts = Mapping[str, Mapping[str, int]]  # split -> language -> number of rows, or 0 if they are not counted
Read = Callable[[str, str], "Records"]  # (split, language) -> rows

_RARE = 100  # a class this many times smaller than the largest one may be a misspelling
_MERGE = "correct one of them, or set task.merge_names to True if they are one"
_KEPT_FILES = 2  # files with all languages to keep in memory, so that they are not read again for each language

_SEPARATORS = {**DELIMITERS, "space": " ", "": ""}  # the characters of task.label_separator

_INTEGER = re.compile(r"-?[0-9]{1,18}")

_log = logging.getLogger(__name__)


def task(config: TaskConfig) -> Task:
    """Return the task of the files that a config names.

    A language with train but without dev gets a dev split that is held out of train. If `config.labels` names the
    classes, the source language's train may be missing, because not every teacher needs it.

    Raises:
      UserError: a necessary file is missing, or a setting does not fit. On loading: a missing or malformed file, an
        unknown label, or a class without an example in the source language's train.
    """
    config = _of_own_files(config)
    _check_pattern(config)
    source = config.source_language
    row_counts = _unified(config, {split: _languages(config, split) for split in SPLITS})
    targets = _targets(config, row_counts)
    for language in (source, *targets):
        _existing_file(config, "test", language)
    read = _reader(config)
    labels = config.labels or _labels_in_train(config, read)
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise ConfigError(f"task.labels {', '.join(map(repr, labels))}: expected two or more different names")
    names.check_distinct(labels, "task.labels", "name each class once")
    held_out = {language for language in row_counts["train"] if language not in row_counts["dev"]}
    if source in held_out:
        _log.warning("no dev file for %s: holding out %s of train for it", source, config.held_out_dev or "a tenth")

    def examples(split: str, language: str) -> Sequence[Example]:
        return _examples(config, read(split, language), _file(config, split, language), labels, split, language)

    def load(split: str, language: str) -> Sequence[Example]:
        check_request(split, language, config, targets)
        if split == "dev" and language in held_out:
            return sampling.train_and_dev(examples("train", language), config)[1]
        loaded = examples(split, language)
        if split == "train" and language == source:
            _check_classes(loaded, labels, _file(config, split, language))
        return sampling.train_and_dev(loaded, config)[0] if split == "train" and language in held_out else loaded

    text = _text_source(config, read)
    return Task(
        name=config.name,
        labels=labels,
        source_language=source,
        target_languages=targets,
        load=load,
        fingerprint=lambda: _hash_files(config, labels, (source, *targets), held_out),
        synthetic=False,
        pretraining=text.pretraining,
        parallel=text.parallel,
        multi_label=config.multi_label,
    )


def text_source(config: TaskConfig) -> TextSource:
    """Return the text of the unlabelled split, without any other file. There are no translations.

    Raises:
      UserError: a setting does not fit. On reading: the file is missing or malformed.
    """
    config = _of_own_files(config)
    _check_pattern(config)
    return _text_source(config, _reader(config))


def _text_source(config: TaskConfig, read: Read) -> TextSource:
    def pretraining(language: str) -> dict[str, list[str]]:
        names.check_path_part(language, "config key languages")
        records = read(UNLABELLED, language)
        examples = _examples(config, records, _file(config, UNLABELLED, language), (), UNLABELLED, language)
        return {language: [text for example in examples for text in (example.text, example.text_pair) if text]}

    return TextSource(pretraining, lambda first, second: [])


def with_unlabelled_file(task: Task, config: TaskConfig) -> Task:
    """Return the task with the rows of `config.unlabelled_file` as its source language's unlabelled split.

    If the file has a column `config.language_column`, only the source language's rows count.

    Raises:
      UserError: the file is missing. On loading: it is malformed, or it has single texts for a task with pairs, or
        pairs for a task with single texts.
    """
    return _with_text_file(task, config, "unlabelled_file", (task.source_language,))


def check_language_column(config: TaskConfig) -> None:
    """Refuse an unlabelled file for several source languages whose rows do not say theirs.

    Raises:
      UserError: the file is missing, or has no column `config.language_column`.
    """
    path = text_file(config, "unlabelled_file")
    if config.language_column not in tables.column_names(path, Delimiter(config.delimiter)):
        raise _no_language_column(path, config)


def with_target_text_file(task: Task, config: TaskConfig) -> Task:
    """Return the task with the rows of `config.target_text_file` as the unlabelled splits of its target languages.

    Raises:
      UserError: as `with_unlabelled_file`; or there are several target languages, and no column says whose a row is.
    """
    if len(task.target_languages) > 1 and not config.language_column:
        raise ConfigError(
            f"task.target_text_file: there are {len(task.target_languages)} target languages, so name the file's "
            "column of the language in task.language_column"
        )
    return _with_text_file(task, config, "target_text_file", task.target_languages)


def _with_text_file(task: Task, config: TaskConfig, key: str, languages: Sequence[str]) -> Task:
    """Return the task with the rows of the file that a key names as the unlabelled split of some languages."""
    path = text_file(config, key)
    columns = _columns(config, labelled=False)

    def load(split: str, language: str) -> Sequence[Example]:
        if split != UNLABELLED or language not in languages:
            return task.load(split, language)
        has_pairs = is_on_pairs(task, language)
        if has_pairs != bool(config.pair_column):
            remedy = "name the column of the second texts" if has_pairs else "the task has single texts: leave it empty"
            raise ConfigError(f"task.pair_column {config.pair_column!r}, with which {path} is read: {remedy}")
        has_languages = bool(config.language_column) and config.language_column in tables.column_names(
            path, Delimiter(config.delimiter)
        )
        if len(languages) > 1 and not has_languages:
            raise _no_language_column(path, config)
        file_columns = dataclasses.replace(columns, language=config.language_column if has_languages else "")
        records = _records(config, path, file_columns, language=language if has_languages else "")
        return _examples(config, records, path, (), split, language)

    def fingerprint() -> str:
        facts = json.dumps([task.fingerprint(), storage.sha256(path), dataclasses.astuple(columns), config.empty_text])
        return hashlib.sha256(facts.encode()).hexdigest()

    return dataclasses.replace(task, load=load, fingerprint=fingerprint)


def text_file(config: TaskConfig, key: str) -> Path:
    """Return the path of the file that a key names; a UserError says if it is missing."""
    path = user_path(getattr(config, key))
    if not path.is_file():
        raise ConfigError(f"task.{key} {path}: no such file")
    return path


def _no_language_column(path: Path, config: TaskConfig) -> DataError:
    return DataError(
        f"{path}: no column {config.language_column!r} (task.language_column), which says the language of a row"
    )


def _reader(config: TaskConfig) -> Read:
    """Return a function that reads a split and language; a file with all languages is read only once."""

    @functools.lru_cache(_KEPT_FILES)
    def read_split(split: str) -> list[Record]:
        path = _existing_file(config, split, "")
        return _all_records(config, path, _columns(config, labelled=split != UNLABELLED), _label_sets(config))

    def read(split: str, language: str) -> Records:
        path = _existing_file(config, split, language)
        if config.language_column and not is_large(path):
            return _select_language(config, read_split(split), language, path)
        columns, within = _columns(config, labelled=split != UNLABELLED), language if config.language_column else ""
        return _records(config, path, columns, _label_sets(config), language=within)

    return read


def is_large(path: Path) -> bool:
    """Return whether the examples of a file are kept on disk, and not in memory."""
    return tables.size(path) >= text_cache.LARGE


@dataclass(frozen=True)
class _Stream:
    """The rows of a large file, which are read again each time they are iterated over.

    Attributes:
      config: the task's settings.
      path: the file.
      columns: the columns to read.
      label_sets: see `tables.read_records`.
      language: yield this language's rows alone; "" yields all.
    """

    config: TaskConfig
    path: Path
    columns: tables.Columns
    label_sets: LabelSets | None
    language: str = ""

    def __iter__(self) -> Iterator[Record]:
        """Yield the rows with text.

        Raises:
          UserError: as `_all_records` and `_select_language`. That an id occurs twice is known after the last row.
        """
        repeats, counts, skipped = Repeats(), Counter[str](), 0
        for record in self._rows():
            counts[record.language] += 1
            if self._is_mine(record):
                if self.columns.id:  # row numbers differ
                    repeats.add(record.id)
                if tables.is_to_skip(self.path, self.columns, record, self.config.empty_text):
                    skipped += 1
                else:
                    yield record
        if self.language and not self.config.merge_names:
            names.check_distinct([self.language, *counts], f"{self.path}: column {self.columns.language!r}", _MERGE)
        self._refuse_repeated(repeats.suspects())
        if skipped:
            _log.warning("%s: %d rows without text were skipped", self.path, skipped)
        mine = sum(count for name, count in counts.items() if self._is_name_mine(name))
        if mine == skipped:
            raise _no_rows(self.path, self.columns.language, self.language, counts)

    def _rows(self) -> Iterator[Record]:
        delimiter = Delimiter(self.config.delimiter)
        return tables.stream_records(self.path, self.columns, delimiter=delimiter, label_sets=self.label_sets)

    def _is_mine(self, record: Record) -> bool:
        return not self.language or self._is_name_mine(record.language)

    def _is_name_mine(self, name: str) -> bool:
        if not self.language or name == self.language:
            return True
        return self.config.merge_names and names.normal(name) == names.normal(self.language)

    def _refuse_repeated(self, suspects: Suspects) -> None:
        lines_by_id: dict[str, int] = {}
        for record in self._rows() if suspects else ():
            if self._is_mine(record) and record.id in suspects:
                if record.id in lines_by_id:
                    raise tables.repeated_id(self.path, self.columns, record, lines_by_id[record.id])
                lines_by_id[record.id] = record.line


Records = list[Record] | _Stream


def _records(
    config: TaskConfig,
    path: Path,
    columns: tables.Columns,
    label_sets: LabelSets | None = None,
    *,
    language: str = "",
) -> Records:
    """Return the rows of a file, or of a language in it; those of a large file as a stream."""
    if is_large(path):
        return _Stream(config, path, columns, label_sets, language)
    records = _all_records(config, path, columns, label_sets)
    return _select_language(config, records, language, path) if language else records


def _all_records(
    config: TaskConfig, path: Path, columns: tables.Columns, label_sets: LabelSets | None = None
) -> list[Record]:
    delimiter = Delimiter(config.delimiter)
    records, skipped = tables.read_records(
        path, columns, empty_text=config.empty_text, delimiter=delimiter, label_sets=label_sets
    )
    if skipped:
        _log.warning("%s: %d rows without text were skipped", path, skipped)
    return records


def _label_sets(config: TaskConfig) -> LabelSets | None:
    """Return the form of the label column in a multi-label task, or None."""
    return LabelSets(_SEPARATORS[config.label_separator]) if config.multi_label else None


def _select_language(config: TaskConfig, records: Sequence[Record], language: str, path: Path) -> list[Record]:
    """Return the rows of a language. Ids were unique for each spelling of its name, and must be for all of them."""
    column = config.language_column
    spellings = dict.fromkeys(record.language for record in records)
    if config.merge_names:
        spellings = {name: None for name in spellings if names.normal(name) == names.normal(language)}
    else:
        names.check_distinct([language, *spellings], f"{path}: column {column!r}", _MERGE)
        spellings = {language: None}
    rows = [record for record in records if record.language in spellings]
    if not rows:
        raise _no_rows(path, column, language, {record.language for record in records})
    if len(spellings) > 1:
        lines_by_id: dict[str, int] = {}
        for record in rows:
            first = lines_by_id.setdefault(record.id, record.line)
            if first != record.line:
                raise DataError(f"{path}:{record.line}: id {record.id!r} of {language!r} already occurs in {first}")
    return rows


def _no_rows(path: Path, column: str, language: str, known: Iterable[str]) -> DataError:
    """Return the error about a file, or a language in it, without text."""
    if not language:
        return DataError(f"{path}: no rows with text")
    known = sorted(known)
    near = names.similar(language, known)
    return DataError(
        f"{path}: no row with text whose column {column!r} is {language!r}; there are {', '.join(known)}{near}"
    )


def _examples(
    config: TaskConfig, records: Records, path: Path, labels: Sequence[str], split: str, language: str
) -> Sequence[Example]:
    """Return the examples of some rows, in memory or, for a stream, on disk."""
    if isinstance(records, list):
        return list(_each_example(config, records, path, labels, split, language))
    sets = None if records.label_sets is None else records.label_sets.separator
    digest = storage.sha256(path)
    source = [digest, path.suffix.lower(), dataclasses.astuple(records.columns), sets, records.language, list(labels)]

    def read() -> Iterator[Example]:
        yield from _each_example(config, records, path, labels, split, language)
        if storage.sha256(path) != digest:  # or other text would be kept under the digest of the old one
            raise DataError(f"{path}: changed while it was read; run the same command again when it is complete")

    return text_cache.stored(
        cache_dir(config) / "texts",
        [*source, config.delimiter, config.empty_text, config.merge_names],
        example_id(config.name, split, language, ""),
        language,
        read,
        has_numbers=not records.columns.id,
    )


def _each_example(
    config: TaskConfig, records: Iterable[Record], path: Path, labels: Sequence[str], split: str, language: str
) -> Iterator[Example]:
    spellings = {names.normal(label): label for label in labels} if config.merge_names else {}

    def index(label: str, where: str) -> int:
        return label_index(spellings.get(names.normal(label), label), labels, where)

    def label_set(record: Record) -> tuple[int, ...] | None:
        if record.label_set is None:
            return None
        return tuple(sorted({index(label, f"{path}:{record.line}") for label in record.label_set}))

    for record in records:
        yield Example(
            id=example_id(config.name, split, language, record.id),
            text=record.text,
            text_pair=record.text_pair,
            label=-1 if record.label is None else index(record.label, f"{path}:{record.line}"),
            language=language,
            label_set=label_set(record),
        )


def _check_classes(train: Sequence[Example], labels: Sequence[str], path: Path) -> None:
    """Refuse a class without examples."""
    used = classes_of(train)
    missing = [repr(name) for i, name in enumerate(labels) if i not in used]
    if missing:
        raise DataError(f"{path}: no example of {', '.join(missing)} in task.labels; add some, or change task.labels")


def _of_own_files(config: TaskConfig) -> TaskConfig:
    """Return the settings with which to read the files at `task.path`.

    If that path has the language, `task.language_column` is a column of the text files alone.
    """
    has_text_file = bool(config.unlabelled_file or config.target_text_file)
    return dataclasses.replace(config, language_column="") if has_text_file and "{language}" in config.path else config


def _check_pattern(config: TaskConfig) -> None:
    if not config.data_dir:
        raise ConfigError("task.data_dir is empty: name the directory that task.path starts from")
    if not user_path(config.data_dir).is_dir():
        raise ConfigError(f"task.data_dir {config.data_dir}: no such directory")
    if not config.label_column:
        raise ConfigError("task.label_column is empty: name the column of the labels")
    is_table = Path(config.path).suffix.lower() in (".tsv", ".csv")
    if config.delimiter and not is_table:
        raise ConfigError(
            f"task.delimiter is {config.delimiter!r}, but task.path {config.path!r} is neither .tsv nor .csv"
        )
    if config.multi_label and is_table and not config.label_separator:
        raise ConfigError(
            f"task.label_separator is empty: name what separates the labels of a text in task.path {config.path!r}"
        )
    fields = sorted(set(re.findall(r"{(.*?)}", config.path)))
    if config.language_column and fields != ["split"]:
        raise ConfigError(
            f"task.path {config.path!r}: expected {{split}} in it and no other {{}}, because the languages are in "
            f"task.language_column {config.language_column!r}"
        )
    if not config.language_column and fields != ["language", "split"]:
        raise ConfigError(
            f"task.path {config.path!r}: expected {{language}} and {{split}} in it, and no other {{}}; if one file has "
            "all languages, name the column in task.language_column"
        )
    if Path(config.path).is_absolute() or ".." in Path(config.path).parts:
        raise ConfigError(f"task.path {config.path!r}: expected a path below task.data_dir, without '..'")


def _file(config: TaskConfig, split: str, language: str) -> Path:
    path = re.sub(r"\{(language|split)\}", lambda match: {"language": language, "split": split}[match[1]], config.path)
    return user_path(config.data_dir) / path


def _existing_file(config: TaskConfig, split: str, language: str) -> Path:
    path = _file(config, split, language)
    if path.is_file():
        return path
    remedy = f"task.path expects split {split!r} of {language!r} there"
    if split == UNLABELLED:
        remedy = "without one, set task.unlabelled_from to 'train_rest' or 'none'"
    raise MissingSplitError(split, language, f"{path}: no such file; {remedy}")


def _languages(config: TaskConfig, split: str) -> dict[str, int]:
    """Return the languages that have the split, sorted, with their numbers of rows, or 0 for one file each."""
    if config.language_column:
        return _languages_in_column(config, _file(config, split, ""))
    root = user_path(config.data_dir)
    parts = PurePosixPath(config.path).as_posix().replace("{split}", split).split("{language}")
    before, *others = map(re.escape, parts)
    pattern = re.compile(f"{before}(?P<language>[^/]+){'(?P=language)'.join(others)}")
    paths = root.glob("*".join(map(glob.escape, parts)))
    matches = [pattern.fullmatch(path.relative_to(root).as_posix()) for path in paths]
    # Hidden files and folders, such as .ipynb_checkpoints, belong to other programs.
    languages = {match["language"] for match in matches if match and not match["language"].startswith(".")}
    for language in languages:
        names.check_path_part(language, f"{root}: the name of a language")
    return dict.fromkeys(sorted(languages), 0)


def _languages_in_column(config: TaskConfig, path: Path) -> dict[str, int]:
    if not path.is_file():
        return {}
    rows: Counter[str] = Counter()
    for line, language in tables.column_values(path, config.language_column, Delimiter(config.delimiter)):
        if language not in rows:
            names.check_path_part(language, f"{path}:{line}: column {config.language_column!r}")
        rows[language] += 1
    return dict(sorted(rows.items()))


def _unified(config: TaskConfig, row_counts: RowCounts) -> RowCounts:
    """Refuse languages whose names look alike, or unite their rows under one name if they are to be merged."""
    totals: Counter[str] = Counter()
    for counts in row_counts.values():
        totals.update(counts)
    if not (config.merge_names and config.language_column):
        where = f"column {config.language_column!r}" if config.language_column else f"{config.data_dir}: the languages"
        remedy = _MERGE if config.language_column else "rename one of them"
        names.check_distinct(totals, where, remedy)
        return row_counts
    spelling = names.unify(totals, (*config.sources, *config.target_languages))
    united: dict[str, dict[str, int]] = {split: {} for split in row_counts}
    for split, counts in row_counts.items():
        for language, count in counts.items():
            united[split][spelling[language]] = united[split].get(spelling[language], 0) + count
    return {split: dict(sorted(counts.items())) for split, counts in united.items()}


def _targets(config: TaskConfig, row_counts: RowCounts) -> tuple[str, ...]:
    """Return the target languages; a language that is requested or has any file must have test."""
    known = tuple(row_counts["test"])
    if not known:
        raise ConfigError(f"task.path {config.path!r}: there is no such file for split 'test' below {config.data_dir}")
    requested = {*config.sources, *config.target_languages}
    for split in SPLITS:
        for language in row_counts[split]:
            if language not in known and (language in requested or not config.target_languages):
                path, test = (_file(config, name, language) for name in (split, "test"))
                remedy = names.similar(language, known)
                if language not in requested:
                    remedy = f", or list the languages that you mean in task.target_languages{remedy}"
                raise DataError(f"{path}: {language!r} has {split}, but no test: add it to {test}{remedy}")
    targets = target_languages(config, known)
    if not config.language_column:
        return targets
    for split in SPLITS:
        # Requested languages are left out on purpose; only other ones may be misspelt.
        shown = {*requested, *targets} if split == "test" else {*requested, *known}
        others = {language: rows for language, rows in row_counts[split].items() if language not in shown}
        if others:
            path = _file(config, split, "")
            _log.warning("%s: ignored, because task.target_languages does not list them: %s", path, _counts(others))
    return targets


def _columns(config: TaskConfig, *, labelled: bool) -> tables.Columns:
    label = config.label_column if labelled else ""
    return tables.Columns(config.text_column, config.pair_column, label, config.id_column, config.language_column)


def _labels_in_train(config: TaskConfig, read: Read) -> tuple[str, ...]:
    """Return the classes of train in order. If one is rare, log them all, because it may be a misspelling."""
    try:
        records = read("train", config.source_language)
    except MissingSplitError as error:
        remedy = "or name the classes in task.labels, if the teacher is not trained here"
        raise MissingSplitError("train", config.source_language, f"{error}, {remedy}") from None
    path = _file(config, "train", config.source_language)
    counts = Counter(label for record in records for label in record.label_names)
    if config.merge_names:
        spelling = names.unify(counts)
        counts = Counter(spelling[label] for record in records for label in record.label_names)
    pair = names.look_alikes(counts)
    if pair is not None:
        line = next(record.line for record in records if pair[1] in record.label_names)
        names.check_distinct(pair, f"{path}:{line}: labels", _MERGE)
    counts = Counter({name: counts[name] for name in _in_order(counts)})
    most = max(counts.values(), default=0)
    rare = [name for name, count in counts.items() if count == 1 or count * _RARE <= most]
    if rare:
        shown = ", ".join(map(repr, rare))
        _log.warning("%s: is %s misspelt? Without task.labels, the classes are: %s", path, shown, _counts(counts))
    return tuple(counts)


def _in_order(labels: Iterable[str]) -> list[str]:
    """Return labels in the order of their numbers if all of them are integers, or else of their characters."""
    labels = sorted(labels)
    return sorted(labels, key=int) if all(_INTEGER.fullmatch(label) for label in labels) else labels


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _hash_files(config: TaskConfig, labels: Sequence[str], languages: Sequence[str], held_out: set[str]) -> str:
    """Return the sha256 over the bytes of all existing files, and over how they are read."""
    columns = dataclasses.astuple(_columns(config, labelled=True))
    facts: list[Any] = [columns, list(labels), config.empty_text]
    if config.delimiter or config.merge_names:
        facts.append([config.delimiter, config.merge_names])
    if config.multi_label:
        facts.append({"multi_label": True, "label_separator": config.label_separator})
    digest = hashlib.sha256(json.dumps(facts).encode())
    file_digest = functools.cache(storage.sha256)  # one file may have all languages
    for language in languages:
        for split in SPLITS:
            path = _file(config, split, language)
            if path.is_file():
                digest.update(json.dumps([split, language, file_digest(path)]).encode())
        if language in held_out:
            digest.update(json.dumps([language, config.held_out_dev, config.held_out_seed]).encode())
    return digest.hexdigest()
