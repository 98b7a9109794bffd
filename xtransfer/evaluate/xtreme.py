"""Predictions in the layout that the XTREME benchmark scores: DIR/<task>/test-<language>.tsv, a label on each line.

Hu, Ruder, Siddhant, Neubig, Firat, and Johnson, "XTREME: A Massively Multilingual Multi-task Benchmark for Evaluating
Cross-lingual Generalization", ICML 2020. The layout follows the published description of its submissions and the reader
of its scoring program: file and folder names, languages, one label per line in the order of the test file, and labels
as the corpora write them. Nothing was submitted, and the hidden label files were not available, so two things are not
verified: that they have as many lines as the published test sets (5,010 and 2,000), and that the ids in PAWS-X's test
files count its rows from 1.

PAWS-X has pairs that were not translated. They are no examples here, but they have a line in the benchmark, so their
lines get the label 0. Their number is logged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from xtransfer import storage
from xtransfer.data.corpora import paws_x, xnli
from xtransfer.data.task import Task
from xtransfer.errors import ConfigError, DataError, MachineError
from xtransfer.evaluation.classifiers import LanguageResult
from xtransfer.runtime import terminal

SPLIT = "test"


@dataclass(frozen=True)
class Layout:
    """A task of the benchmark.

    Attributes:
      folder: the benchmark's name of the task.
      languages: the languages that it scores.
      labels: the label in the file by the task's class.
      lines: the lines of each file.
      missing: the label of a row that is no example, whose place follows from the ids of the others, which count rows
        from 1; None if every row is an example.
    """

    folder: str
    languages: tuple[str, ...]
    labels: Mapping[str, str]
    lines: int
    missing: str | None = None


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "xnli": Layout("xnli", xnli.LANGUAGES, {name: name for name in xnli.LABELS}, 5010),
        "paws_x": Layout(
            "pawsx",
            paws_x.LANGUAGES,
            {name: str(index) for index, name in enumerate(paws_x.LABELS)},
            2000,
            missing="0",
        ),
    }
)
"""The layouts by the name of the task here."""


def check(task: str, split: str, directory: Path) -> Layout:
    """Return a task's layout, before anything is computed.

    Raises:
      UserError: the benchmark has no such task, the split is not test, or the folder exists.
    """
    if task not in LAYOUTS:
        raise ConfigError(f"--export-xtreme: task {task!r} is not one of {', '.join(LAYOUTS)}")
    if split != SPLIT:
        raise ConfigError(f"--export-xtreme: the benchmark scores {SPLIT}, not {split}: leave out --split")
    layout = LAYOUTS[task]
    folder = directory / layout.folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} already exists; choose another --export-xtreme")
    storage.check_creatable(folder)
    return layout


def export(directory: Path, layout: Layout, task: Task, results: Sequence[LanguageResult]) -> None:
    """Write the predictions of a task; its folder appears complete or not at all.

    Args:
      directory: the directory of the submission, which may have folders of other tasks.
      layout: the task's layout.
      task: the task.
      results: the results in each language on test.

    Raises:
      UserError: an id does not count rows, or the disk is full.
    """
    folder = directory / layout.folder
    # The languages have the same pairs, so a row that one of them has exists in all.
    rows = max(map(_last_row, results)) if layout.missing is not None else 0
    try:
        with storage.atomic_directory(folder) as partial:
            for result in results:
                lines = file_lines(layout, task, result, rows)
                (partial / f"{SPLIT}-{result.language}.tsv").write_text("".join(f"{line}\n" for line in lines))
                if len(lines) != layout.lines:
                    terminal.log(
                        f"warning: {folder}: {result.language} has {len(lines):,} lines, the benchmark {layout.lines:,}"
                    )
    except OSError as error:
        raise MachineError(f"{folder} cannot be written: {error.strerror or error}") from error
    missing = [name for name in layout.languages if name not in {result.language for result in results}]
    if missing:
        terminal.log(f"warning: {folder}: the benchmark also scores {', '.join(missing)}")
    terminal.log(f"written: {folder}")


def file_lines(layout: Layout, task: Task, result: LanguageResult, rows: int = 0) -> list[str]:
    """Return the lines of one language's file.

    Args:
      layout: the task's layout.
      task: the task.
      result: the language's results.
      rows: the number of rows, if some of them are no examples.
    """
    labels = [layout.labels[task.labels[index]] for index in result.logits.argmax(axis=1)]
    if layout.missing is None:
        return labels
    lines = [layout.missing] * rows
    for example, label in zip(result.examples, labels, strict=True):
        lines[_row(example.id) - 1] = label
    if rows > len(labels):
        terminal.log(
            f"{layout.folder}: {rows - len(labels):,} rows in {result.language} are not translated and get the label "
            f"{layout.missing}"
        )
    return lines


def _last_row(result: LanguageResult) -> int:
    return max(_row(example.id) for example in result.examples)


def _row(example_id: str) -> int:
    """Return the row that an example's id counts, from 1."""
    number = example_id.rpartition("/")[2]
    if not number.isdecimal() or int(number) < 1:
        raise DataError(f"{example_id}: the id does not count rows from 1, so the predictions have no place")
    return int(number)
