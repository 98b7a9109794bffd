"""Describe a task and its tokens before training.

    python -m xtransfer.describe --config FILE[:ARG] [--config.key=value …] [--batches N] [--json FILE]

Print the splits, labels, lengths in tokens, tokens per word, packing, and a few examples as the models read them. This
trains nothing and reads no weights. The output is tables on a terminal and Markdown elsewhere.
"""

import dataclasses
import json

from xtransfer import config, storage
from xtransfer.describe.dataset import Description, describe, transfer_rows
from xtransfer.describe.tables import fields, introduction, tables, title
from xtransfer.errors import ConfigError
from xtransfer.report import table as table_writer
from xtransfer.runs.workdir import Workdir
from xtransfer.runtime import terminal

_EXAMPLES = "Examples as the models read them"


def main(argv: list[str]) -> None:
    """Parse the flags, describe the task, and print the description."""
    parser = terminal.parser("describe", __doc__)
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help="the experiment's config; see configs/")
    parser.add_argument(
        "--batches", type=int, default=100, metavar="N", help="training batches to pack (default: %(default)s)"
    )
    parser.add_argument(
        "--json", type=terminal.path_argument, metavar="FILE", help="also write the description as JSON"
    )
    parser.add_argument(
        "--workdir",
        type=terminal.path_argument,
        metavar="DIR",
        help="the experiment's workdir, if it has started: also describe the teachers' logits that are stored there",
    )
    parser.add_argument(
        "--transfer-set",
        type=terminal.path_argument,
        metavar="FILE",
        help="also write the text to learn from with its ids, as JSON lines, to label it for teacher.logits_file",
    )
    args, overrides = parser.parse_known_args(argv)
    if args.batches < 1:
        raise ConfigError(f"--batches is {args.batches}; expected 1 or more")
    if args.json is not None:
        storage.check_creatable(args.json)
    if args.transfer_set is not None:
        storage.check_creatable(args.transfer_set)
    experiment = config.load(args.config, overrides)
    if args.workdir is not None and not Workdir(args.workdir).logits.is_dir():
        raise ConfigError(f"--workdir {args.workdir}: no logits are stored there")
    description = describe(experiment, args.batches, None if args.workdir is None else Workdir(args.workdir))
    if args.transfer_set is not None:
        storage.write_jsonl(args.transfer_set, transfer_rows(experiment))
    if args.json is not None:
        content = dataclasses.asdict(description)
        for key in ("label_sets", "other_sources", "proportions"):  # of some tasks only
            if not content[key]:
                del content[key]
        storage.write_atomically(args.json, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    if terminal.console.is_terminal:
        show(description)
    else:
        print(markdown(description))


def show(description: Description) -> None:
    """Print a description on a terminal."""
    _print_wrapped(title(description), "bold")
    for line in introduction(description):
        _print_wrapped(line)
    for table in tables(description):
        _print_wrapped(f"\n{table.title}", "bold")
        table_writer.show(dataclasses.replace(table, title=""), terminal.console)
        for note in table.notes:
            _print_wrapped(note)
    _print_wrapped(f"\n{_EXAMPLES}", "bold")
    for example in description.examples:
        _print_wrapped("")
        table_writer.show_fields(fields(example), terminal.console)


def _print_wrapped(text: str, style: str | None = None) -> None:
    """Print text that wraps between words."""
    terminal.console.print(text, style=style, markup=False, soft_wrap=False)


def markdown(description: Description) -> str:
    """Return a description as a Markdown page."""
    lines = [f"# {title(description)}", "", *(f"- {line}" for line in introduction(description)), ""]
    for table in tables(description):
        lines += table_writer.section(table, "##")
    lines += [f"## {_EXAMPLES}", ""]
    for example in description.examples:
        lines += [*(f"    {name:<9} {text}" for name, text in fields(example)), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    terminal.run(main)
