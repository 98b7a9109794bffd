"""Binary: what an experiment learns from and is evaluated on, to be looked at before it is run.

    python -m xtransfer.describe --config FILE[:ARG] [--config.key=value …] [--batches N] [--json FILE]

Splits, labels, lengths in tokens, tokens per word, packing, and a few examples as the models read them. Nothing is
trained and no weights are read. Tables on a terminal, Markdown elsewhere.
"""

import argparse
import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from xtransfer import config, storage
from xtransfer.data.batches.measures import PERCENTILES
from xtransfer.data.task import SPLITS
from xtransfer.describe.dataset import Description, Shown, describe
from xtransfer.errors import UserError
from xtransfer.report import table as table_writer
from xtransfer.report.table import Table
from xtransfer.runtime import terminal

_EXAMPLES = "Examples as the models read them"
_MUCH = 0.1  # share of unknown tokens that is worth a line


def main(argv: list[str]) -> None:
    """Parses the flags, looks at everything, prints it."""
    parser = argparse.ArgumentParser(prog="xtransfer.describe", description=__doc__.partition("\n")[0])
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help="of the experiment")
    parser.add_argument("--batches", type=int, default=100, metavar="N", help="training batches to make: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes what is shown for programs")
    args, overrides = parser.parse_known_args(argv)
    if args.batches < 1:
        raise UserError(f"--batches is {args.batches}: give 1 or more")
    logging.getLogger("xtransfer.data.tokens.tokenizer").setLevel(logging.ERROR)  # what it warns of is a column here
    found = describe(config.load(args.config, overrides), args.batches)
    if args.json is not None:
        storage.write_atomically(args.json, json.dumps(dataclasses.asdict(found), indent=2, ensure_ascii=False) + "\n")
    if terminal.console.is_terminal:
        show(found)
    else:
        print(markdown(found))


def show(found: Description) -> None:
    """Prints everything on a terminal."""
    _say(_title(found), "bold")
    for line in introduction(found):
        _say(line)
    for table in tables(found):
        _say(f"\n{table.title}", "bold")
        table_writer.show(dataclasses.replace(table, title=""), terminal.console)
        for note in table.notes:
            _say(note)
    _say(f"\n{_EXAMPLES}", "bold")
    for example in found.examples:
        _say("")
        table_writer.show_fields(fields(example), terminal.console)


def _say(text: str, style: str | None = None) -> None:
    """Prints lines that break between words."""
    terminal.console.print(text, style=style, markup=False, soft_wrap=False)


def markdown(found: Description) -> str:
    """The same as a Markdown page."""
    lines = [f"# {_title(found)}", "", *(f"- {line}" for line in introduction(found)), ""]
    for table in tables(found):
        lines += [f"## {table.title}", "", *table_writer.markdown(table), ""]
        lines += [*(f"- {note}" for note in table.notes), ""] if table.notes else []
    lines += [f"## {_EXAMPLES}", ""]
    for example in found.examples:
        lines += [f"    {name:<9} {text}" for name, text in fields(example)] + [""]
    return "\n".join(lines)


def fields(example: Shown) -> list[tuple[str, str]]:
    """(what, how) of an example."""
    pair = [("second", example.text_pair)] if example.text_pair else []
    return [("id", example.id), ("label", example.label), ("text", example.text), *pair, *example.tokens.items()]


def _title(found: Description) -> str:
    return f"{found.task}{' (synthetic)' * found.synthetic}: {found.source_language} → {_targets(found)}"


def _targets(found: Description) -> str:
    targets = found.target_languages
    return f"{len(targets)} languages" if len(targets) > 5 else ", ".join(targets) or "no other language"


def introduction(found: Description) -> list[str]:
    """What is learnt from, by which models."""
    labelled, unlabelled, dev = (found.count(name) for name in ("L", "U", "dev"))
    source, whole = found.source_language, labelled.examples + unlabelled.examples
    drawn = f" and {unlabelled.examples:,} unlabelled (U: {found.unlabelled_from})" if unlabelled.examples else ""
    others = ", ".join(
        f"{count:,} of {found.count(name).examples:,} in {name}"
        for name, count in found.repeated.items()
        if name != "L ∪ U"
    )
    return [
        *(f"{role}: {what}" for role, what in found.models.items()),
        f"learnt from: {labelled.examples:,} labelled{drawn} examples of {source}; checkpoints are chosen by its "
        f"{dev.examples:,} of dev",
        f"texts that are there twice: {found.repeated['L ∪ U']:,} of {whole:,} in L ∪ U; also in L ∪ U: {others}",
    ]


def tables(found: Description) -> list[Table]:
    """Everything but the examples."""
    return [_splits(found), _labels(found), _lengths(found), _packing(found)]


def _splits(found: Description) -> Table:
    languages = (found.source_language, *found.target_languages)
    splits = [split for split in SPLITS if any(count.name == split for count in found.counts)]
    counts = {(count.language, count.name): f"{count.examples:,}" for count in found.counts}
    lines = tuple((language, *(counts.get((language, split), "–") for split in splits)) for language in languages)
    notes = tuple(f"no {line}" for line in found.missing)
    return Table(("language", *splits), lines, title="Splits", notes=notes)


def _labels(found: Description) -> Table:
    names = dict.fromkeys(("train", "L", "dev", *found.evaluation_splits))
    columns = [(name, [found.count(name)]) for name in names]
    targets = _targets(found)
    for split in found.evaluation_splits:
        columns.append((f"{split} of {targets}", [found.count(split, name) for name in found.target_languages]))
    lines = [
        (label, *(_range([(count.labels[i], count.examples) for count in counts]) for _, counts in columns))
        for i, label in enumerate(found.labels)
    ]
    if any(count.without_label for _, counts in columns for count in counts):
        lines.append(("none", *(_range([(c.without_label, c.examples) for c in counts]) for _, counts in columns)))
    note = f"train, L, dev, {', '.join(found.evaluation_splits)}: {found.source_language}"
    header = ("label", *(name for name, _ in columns))
    return Table(header, tuple(lines), title="Labels", notes=(note,))


def _range(parts: Sequence[tuple[int, int]]) -> str:
    """A count and its share, or the least and the most of several."""
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


def _lengths(found: Description) -> Table:
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
        for each in found.measured
    )
    percentiles = (f"{p} %" if p < 100 else "longest" for p in PERCENTILES)
    header = ("model", "language", "texts", "examples", *percentiles, "truncated", "tokens/word", "unknown")
    notes = [
        "tokens of an example before truncation, special ones included; they are left out of tokens/word and of the "
        "share of unknown tokens"
    ]
    if any(each.role == "teacher" and each.language != found.source_language for each in found.measured):
        notes.append(f"the teacher reads {found.source_language} only; the rest is there to compare the tokenizers")
    if any(each.lengths.unknown > _MUCH for each in found.measured):
        notes.append("few tokens per word beside many unknown ones mean that whole words are not read")
    if any(each.lengths.unit == "character" for each in found.measured):
        notes.append("* tokens per character, as the script puts no space between words")
    return Table(header, lines, text_columns=3, title="Lengths", notes=tuple(notes))


def _packing(found: Description) -> Table:
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
        for each in found.packing
    )
    header = ("model", "on", "rows (batches)", "examples", "epochs", "batch", "row length", "real tokens", "unpacked")
    note = (
        f"rows (batches): the rows that the first batches have, and how many batches have as many, on {found.devices} "
        f"device{'s' * (found.devices > 1)}; unpacked: the share of real tokens with each example alone in a row"
    )
    return Table(header, lines, text_columns=3, title="Training batches", notes=(note,))


if __name__ == "__main__":
    terminal.run(main)
