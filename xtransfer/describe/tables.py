"""A description as text: its title, its introduction, its tables, and the fields of its examples."""

from collections.abc import Sequence

from xtransfer.data.batches.measures import PERCENTILES
from xtransfer.data.task import SPLITS
from xtransfer.describe.dataset import Description, ShownExample
from xtransfer.report.table import Table

_MANY_UNKNOWN = 0.1  # share of unknown tokens that deserves a note


def fields(example: ShownExample) -> list[tuple[str, str]]:
    """Return the names and values of an example's fields."""
    pair = [("second", example.text_pair)] if example.text_pair else []
    return [("id", example.id), ("label", example.label), ("text", example.text), *pair, *example.tokens.items()]


def title(description: Description) -> str:
    """Return the heading: the task and its languages."""
    synthetic = " (synthetic)" if description.synthetic else ""
    return f"{description.task}{synthetic}: {description.source_language} → {_targets(description)}"


def _targets(description: Description) -> str:
    targets = description.target_languages
    return f"{len(targets)} languages" if len(targets) > 5 else ", ".join(targets) or "no other language"


def introduction(description: Description) -> list[str]:
    """Return lines on the text that the models learn from, and on the models."""
    labelled, unlabelled, dev = (description.count(name) for name in ("L", "U", "dev"))
    source, whole = description.source_language, labelled.examples + unlabelled.examples
    drawn = f" and {unlabelled.examples:,} unlabelled (U: {description.unlabelled_from})" if unlabelled.examples else ""
    others = ", ".join(
        f"{count:,} of {description.count(name).examples:,} in {name}"
        for name, count in description.repeated.items()
        if name != "L ∪ U"
    )
    return [
        *(f"{role}: {what}" for role, what in description.models.items()),
        f"training text: {labelled.examples:,} labelled{drawn} examples of {source}; {dev.examples:,} dev examples "
        "select the checkpoint",
        f"repeated texts: {description.repeated['L ∪ U']:,} of {whole:,} in L ∪ U; also in L ∪ U: {others}",
    ]


def tables(description: Description) -> list[Table]:
    """Return everything but the examples, as tables."""
    return [_splits(description), _labels(description), _lengths(description), _packing(description)]


def _splits(description: Description) -> Table:
    languages = (description.source_language, *description.target_languages)
    splits = [split for split in SPLITS if any(count.name == split for count in description.counts)]
    counts = {(count.language, count.name): f"{count.examples:,}" for count in description.counts}
    lines = tuple((language, *(counts.get((language, split), "–") for split in splits)) for language in languages)
    notes = tuple(f"no {line}" for line in description.missing)
    return Table(("language", *splits), lines, title="Splits", notes=notes)


def _labels(description: Description) -> Table:
    names = dict.fromkeys(("train", "L", "dev", *description.evaluation_splits))
    columns = [(name, [description.count(name)]) for name in names]
    targets = _targets(description)
    for split in description.evaluation_splits:
        columns.append(
            (f"{split} of {targets}", [description.count(split, name) for name in description.target_languages])
        )
    lines = [
        (label, *(_range([(count.labels[i], count.examples) for count in counts]) for _, counts in columns))
        for i, label in enumerate(description.labels)
    ]
    if any(count.without_label for _, counts in columns for count in counts):
        lines.append(("none", *(_range([(c.without_label, c.examples) for c in counts]) for _, counts in columns)))
    note = f"train, L, dev, {', '.join(description.evaluation_splits)}: {description.source_language}"
    header = ("label", *(name for name, _ in columns))
    return Table(header, tuple(lines), title="Labels", notes=(note,))


def _range(parts: Sequence[tuple[int, int]]) -> str:
    """Return a count and its share, or the range of several."""
    if not parts:
        return "–"
    counts, shares = (
        [n for n, _ in parts],
        [f"{n / max(1, whole):.1%}" for n, whole in sorted(parts, key=lambda x: x[0] / max(1, x[1]))],
    )
    few, many = min(counts), max(counts)
    if few == many and shares[0] == shares[-1]:
        return f"{few:,} ({shares[0]})"
    return f"{few:,}–{many:,} ({shares[0]}–{shares[-1]})"


def _lengths(description: Description) -> Table:
    lines = tuple(
        (
            each.role,
            each.language,
            each.name,
            f"{each.lengths.examples:,}",
            *(f"{tokens:,}" for tokens in each.lengths.percentiles),
            f"{each.lengths.truncated / each.lengths.examples:.1%}",
            f"{each.lengths.fertility:.2f}{' *' * (each.lengths.unit == 'character')}",
            f"{each.lengths.unknown:.1%}",
        )
        for each in description.measured
    )
    percentiles = (f"{p} %" if p < 100 else "longest" for p in PERCENTILES)
    header = ("model", "language", "texts", "examples", *percentiles, "truncated", "tokens/word", "unknown")
    notes = ["tokens per example before truncation, with special tokens; tokens/word and unknown leave those out"]
    if any(each.role == "teacher" and each.language != description.source_language for each in description.measured):
        notes.append(f"the teacher reads {description.source_language} only; its other rows compare the tokenizers")
    if any(each.lengths.unknown > _MANY_UNKNOWN for each in description.measured):
        notes.append("few tokens per word with many unknown ones mean that whole words are unknown")
    if any(each.lengths.unit == "character" for each in description.measured):
        notes.append("* tokens per character, because the script has no spaces between words")
    return Table(header, lines, text_columns=3, title="Lengths", notes=tuple(notes))


def _packing(description: Description) -> Table:
    lines = tuple(
        (
            each.role,
            each.name,
            ", ".join(f"{size} ({count})" for size, count in each.filling.rows),
            f"{each.examples:,}",
            f"{each.epochs:.1f}",
            f"{each.batch_size:,}",
            f"{each.row_length:,}",
            f"{each.filling.real:.1%}",
            f"{each.filling.unpacked:.1%}",
        )
        for each in description.packing
    )
    header = ("model", "on", "rows (batches)", "examples", "epochs", "batch", "row length", "real tokens", "unpacked")
    devices = "1 device" if description.devices == 1 else f"{description.devices} devices"
    note = (
        f"rows (batches): the numbers of rows among the first batches, and how many batches have each, on {devices}; "
        "unpacked: the share of real tokens with one example per row"
    )
    return Table(header, lines, text_columns=3, title="Training batches", notes=(note,))
