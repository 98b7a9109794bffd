"""Format a description as text: title, introduction, tables, and the fields of its examples."""

import math
from collections.abc import Sequence

from xtransfer.data.batches.measures import PERCENTILES
from xtransfer.data.task import SPLITS
from xtransfer.describe.dataset import Description, ShownExample
from xtransfer.report.table import Table

_MANY_UNKNOWN = 0.1  # the share of unknown tokens above which a note explains them


def fields(example: ShownExample) -> list[tuple[str, str]]:
    """Return the names and values of an example's fields."""
    pairs = [("id", example.id), ("label", example.label), ("text", example.text)]
    if example.text_pair:
        pairs.append(("second", example.text_pair))
    return [*pairs, *example.tokens.items()]


def title(description: Description) -> str:
    """Return the heading: the task and its languages."""
    synthetic = " (synthetic)" if description.synthetic else ""
    return f"{description.task}{synthetic}: {', '.join(description.source_languages)} → {_targets(description)}"


def _targets(description: Description) -> str:
    """Return the target languages, or their number if there are many."""
    targets = description.target_languages
    if len(targets) > 5:
        return f"{len(targets)} languages"
    return ", ".join(targets) or "no other language"


def introduction(description: Description) -> list[str]:
    """Return a line on each model, on the training text, on repeated texts, and on each objective."""
    sources = description.source_languages
    labelled, unlabelled, dev = (
        sum(description.count(name, language).examples for language in sources) for name in ("L", "U", "dev")
    )
    sizes = f"{labelled:,} labelled"
    if unlabelled:
        sizes += f" and {unlabelled:,} unlabelled (U: {description.unlabelled_from})"
    in_sources = {name: count for name, count in description.repeated.items() if name != "L ∪ U"}
    overlaps, in_target_text = (
        ", ".join(
            f"{count:,} of {description.count(*name.split(' ', 1)).examples:,} in {name}"
            for name, count in counts.items()
        )
        for counts in (in_sources, description.in_target_text)
    )
    names = {size.name for size in description.counts}
    target_sets = " and ".join(name for name in ("T", "P") if name in names)
    selection = f"{dev:,} dev examples select the checkpoint" if dev else "no dev split: the last step"
    if dev and len(sources) > 1:
        selection += ", by the mean over languages"
    return [
        *(f"{role}: {model}" for role, model in description.models.items()),
        f"training text: {sizes} examples in {' and '.join(sources)}; {selection}",
        f"repeated texts: {description.repeated['L ∪ U']:,} of {labelled + unlabelled:,} within "
        f"L ∪ U; texts that are also in L ∪ U: {overlaps}",
        *([f"texts that are also in target text ({target_sets}): {in_target_text}"] if in_target_text else []),
        *(f"loss of {name}: {settings}" for name, settings in description.objectives.items()),
    ]


def tables(description: Description) -> list[Table]:
    """Return the tables of splits, labels, the transfer set, lengths, and training batches."""
    sets = [_label_sets(description)] if description.label_sets else []
    return [
        _splits(description),
        _labels(description),
        *sets,
        *([_sources(description)] if description.other_sources else []),
        _transfer_set(description),
        _lengths(description),
        _packing(description),
    ]


def _splits(description: Description) -> Table:
    languages = (*description.source_languages, *description.target_languages)
    splits = [split for split in SPLITS if any(count.name == split for count in description.counts)]
    counts = {(count.language, count.name): f"{count.examples:,}" for count in description.counts}
    rows = tuple((language, *(counts.get((language, split), "–") for split in splits)) for language in languages)
    notes = tuple(f"no {line}" for line in description.missing)
    return Table(("language", *splits), rows, title="Splits", notes=notes)


def _labels(description: Description) -> Table:
    names = dict.fromkeys(("train", "L", "dev", *description.evaluation_splits))
    sources = description.source_languages
    columns = [(name, [description.count(name, language) for language in sources]) for name in names]
    targets = _targets(description)
    for split in description.evaluation_splits:
        columns.append(
            (f"{split} ({targets})", [description.count(split, name) for name in description.target_languages])
        )
    rows = [
        (label, *(_range([(size.labels[i], size.examples) for size in sizes]) for _, sizes in columns))
        for i, label in enumerate(description.labels)
    ]
    if any(size.without_label for _, sizes in columns for size in sizes):
        rows.append(
            ("none", *(_range([(size.without_label, size.examples) for size in sizes]) for _, sizes in columns))
        )
    note = f"train, L, dev, {', '.join(description.evaluation_splits)}: examples in {' and '.join(sources)}"
    header = ("label", *(name for name, _ in columns))
    return Table(header, tuple(rows), title="Labels", notes=(note,))


def _label_sets(description: Description) -> Table:
    rows = tuple(
        (
            sets.language,
            sets.name,
            f"{sets.cardinality:.2f}",
            f"{sets.most:,}",
            f"{sets.empty:,}",
            f"{sets.different:,}",
        )
        for sets in description.label_sets
    )
    header = ("language", "texts", "labels per text", "most", "texts without labels", "different sets")
    return Table(header, rows, text_columns=2, title="Label sets")


def _sources(description: Description) -> Table:
    """Return the sizes of the labelled and unlabelled text in each source language, before and after sampling."""
    sources = description.source_languages
    totals = {name: sum(description.count(name, one).examples for one in sources) for name in ("L", "U")}

    def drawn(name: str, language: str) -> str:
        size = description.count(name, language).examples
        return f"{size:,} ({size / max(1, totals[name]):.1%})"

    rows = []
    for language in sources:
        train, labelled, split = (description.count(name, language).examples for name in ("train", "L", "unlabelled"))
        pool = {"none": 0, "train_rest": train - labelled}.get(description.unlabelled_from, split)
        rows.append((language, f"{train:,}", drawn("L", language), f"{pool:,}", drawn("U", language)))
    header = ("language", "labelled", "L", "unlabelled", "U")
    note = f"L and U are drawn from the text to their left, {description.proportions}; in parentheses: shares"
    return Table(header, tuple(rows), title="Source languages", notes=(note,))


def _transfer_set(description: Description) -> Table:
    """Return the sizes of L and U, and of each teacher's pseudo-labels."""
    rows = []
    for language in (description.source_language, *description.further_sources):
        for size in (description.count(name, language) for name in ("L", "U")):
            if size.examples:
                labels = [_range([(count, size.examples)]) if size.name == "L" else "–" for count in size.labels]
                source = "labels" if size.name == "L" else "none"
                rows.append((source, language, size.name, f"{size.examples:,}", *labels, "–", "–", "–"))
    for language in description.target_languages:
        for size in (description.count(name, language) for name in ("T", "P")):
            if size.examples:
                unknown = ["–"] * len(description.labels)
                rows.append(("none", language, size.name, f"{size.examples:,}", *unknown, "–", "–", "–"))
    for opinion in description.opinions:
        counts = [_range([(count, opinion.examples)]) for count in opinion.classes]
        agreement = "–" if opinion.agreement is None else f"{opinion.agreement:.1%}"
        disagreement = "–" if opinion.disagreement is None else f"{opinion.disagreement:.3f}"
        sizes = (opinion.language, opinion.name, f"{opinion.examples:,}")
        rows.append((opinion.teacher, *sizes, *counts, f"{opinion.entropy:.3f}", agreement, disagreement))
    header = ("by", "language", "texts", "examples", *description.labels, "entropy", "as labelled", "disagreement")
    if description.opinions:
        is_multi_label, count = bool(description.label_sets), len(description.labels)
        most = f"{count * math.log(2) if is_multi_label else math.log(count):.3f}"
        whose = "all of whose labels and no others" if is_multi_label else "whose label"
        note = (
            f"entropy: the mean entropy of a teacher's probabilities in nats, at most {most}; as labelled: the share "
            f"of labelled texts {whose} the teacher predicts; disagreement: of several teachers, in nats"
        )
    else:
        note = "the teacher's classes and its entropy are shown here with --workdir, once it has labelled this text"
    return Table(header, tuple(rows), text_columns=3, title="Transfer set", notes=(note,))


def _range(fractions: Sequence[tuple[int, int]]) -> str:
    """Return a count and its share, or the ranges of several, from pairs of (count, total)."""
    if not fractions:
        return "–"
    counts = [count for count, _ in fractions]
    shares = [count / max(1, total) for count, total in fractions]
    lowest, highest = f"{min(shares):.1%}", f"{max(shares):.1%}"
    if min(counts) == max(counts) and lowest == highest:
        return f"{min(counts):,} ({lowest})"
    return f"{min(counts):,}–{max(counts):,} ({lowest}–{highest})"


def _lengths(description: Description) -> Table:
    rows = tuple(
        (
            measured.role,
            measured.language,
            measured.name,
            f"{measured.lengths.examples:,}",
            *(f"{tokens:,}" for tokens in measured.lengths.percentiles),
            f"{measured.lengths.truncated / measured.lengths.examples:.1%}",
            f"{measured.lengths.fertility:.2f}" + (" *" if measured.lengths.unit == "character" else ""),
            f"{measured.lengths.unknown:.1%}",
        )
        for measured in description.measured
    )
    percentiles = (f"{p} %" if p < 100 else "longest" for p in PERCENTILES)
    header = ("model", "language", "texts", "examples", *percentiles, "truncated", "tokens/word", "unknown")
    notes = ["lengths are before truncation and include special tokens; tokens/word and unknown exclude them"]
    if description.further_sources:
        notes.append("other rows of a teacher than those of its own languages compare the tokenizers")
    elif any(m.role == "teacher" and m.language != description.source_language for m in description.measured):
        notes.append(f"the teacher reads {description.source_language} only; its other rows compare the tokenizers")
    if any(m.lengths.unknown > _MANY_UNKNOWN for m in description.measured):
        notes.append("few tokens per word and many unknown tokens: whole words are unknown to the tokenizer")
    if any(m.lengths.unit == "character" for m in description.measured):
        notes.append("* tokens per character, because the script has no spaces between words")
    return Table(header, rows, text_columns=3, title="Lengths", notes=tuple(notes))


def _packing(description: Description) -> Table:
    rows = tuple(
        (
            training.role,
            training.name,
            ", ".join(f"{size} ({count})" for size, count in training.filling.rows),
            f"{training.examples:,}",
            f"{training.epochs:.1f}",
            f"{training.batch_size:,}",
            f"{training.row_length:,}",
            f"{training.filling.real:.1%}",
            f"{training.filling.unpacked:.1%}",
        )
        for training in description.packing
    )
    header = (
        "model",
        "trained on",
        "rows (batches)",
        "examples",
        "epochs",
        "batch",
        "row length",
        "real tokens",
        "unpacked",
    )
    devices = "1 device" if description.devices == 1 else f"{description.devices} devices"
    note = (
        f"rows (batches): the rows per batch on {devices}, and the number of batches with that many rows; "
        "unpacked: the real tokens with one example per row"
    )
    return Table(header, rows, text_columns=3, title="Training batches", notes=(note,))
