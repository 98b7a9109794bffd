"""The page: the parts of each workdir in a fixed order, under one style sheet, without scripts or external files."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from xtransfer.errors import UserError, one_line
from xtransfer.report import summary
from xtransfer.report.page import charts
from xtransfer.report.page.markup import Child, Html, join, name_of, note, table, tag
from xtransfer.report.page.parts import costs, curves, examples, predictions, protocols, reproduction, results, transfer
from xtransfer.report.page.sources import MissingSource, Source
from xtransfer.runtime import terminal

# Whatever a name smuggled in, a browser runs nothing and fetches nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Part:
    """One part of the page: its heading, and the function that returns its content or raises MissingSource."""

    title: str
    build: Callable[[Source], Html]


PARTS: Mapping[str, Part] = {
    "results": Part("Results", results.build),
    "protocols": Part("Checkpoint selection", protocols.build),
    "curves": Part("Learning curves", curves.build),
    "transfer": Part("Transfer by language", transfer.build),
    "calibration": Part("Calibration", predictions.build_calibration),
    "confusions": Part("Confusions", predictions.build_confusions),
    "classes": Part("Scores by class", predictions.build_classes),
    "examples": Part("Disagreements", examples.build),
    "costs": Part("Costs", costs.build),
    "reproduction": Part("Reproduction", reproduction.build),
}
"""The parts by their anchor, in the order of the page."""


def page(sources: Sequence[Source]) -> Html:
    """Return the page of one workdir, or of several with an overview.

    A part that cannot be made is one sentence in the page. If it fails for another reason than a missing file, it also
    costs a warning.
    """
    if len(sources) == 1:
        title = summary.title_of(sources[0].results, sources[0].task)
        return _document(title, _workdir(sources[0], ""))
    names = _names(sources)
    sections = [
        _workdir(source, f"run{number}-", name)
        for number, (source, name) in enumerate(zip(sources, names, strict=True))
    ]
    return _document("Results of several experiments", join([_overview(sources, names), *sections]))


def _document(title: str, body: Html) -> Html:
    style = (Path(__file__).with_name("style.css")).read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name_="color-scheme", content="light dark"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", title),
        tag("style", Html(style)),
    )
    return join([Html("<!doctype html>\n"), tag("html", head, tag("body", tag("main", body)), lang="en"), "\n"])


def _workdir(source: Source, prefix: str, name: str = "") -> Html:
    """Return the header and the parts of one workdir; `prefix` keeps its anchors apart."""
    links = [tag("a", part.title, href=f"#{prefix}{anchor}") for anchor, part in PARTS.items()]
    sections = [
        tag("section", tag("h2", part.title), _content(source, part), id=f"{prefix}{anchor}")
        for anchor, part in PARTS.items()
    ]
    return tag("article", _header(source, name), tag("nav", *links), *sections, class_="workdir", id=f"{prefix}top")


def _content(source: Source, part: Part) -> Html:
    try:
        return part.build(source)
    except MissingSource as missing:
        return tag("p", f"Left out: {missing}", class_="missing")
    except UserError as error:
        return tag("p", f"Left out: {error}.", class_="missing")
    except Exception as error:  # a fault in one part is not worth the others, nor the results
        terminal.log(f"warning: {source.workdir.root}: the part {part.title!r} of the page failed ({one_line(error)})")
        return tag("p", f"Left out, because it failed: {one_line(error)}.", class_="missing")


def _header(source: Source, name: str) -> Html:
    task, shown = source.task, source.results
    targets = shown.target_languages
    listed = ", ".join(targets) if len(targets) <= 12 else f"{len(targets)} languages"
    facts = f"{len(task.labels)} classes · {', '.join(shown.source_languages)} → {listed} · {shown.checkpoint}"
    caveats = summary.caveats(shown, task)
    headline = summary.headline(shown, results.paired_gains(source))
    return tag(
        "header",
        tag("p", name_of(name), class_="workdir-name") if name else None,
        tag("h1", summary.title_of(shown, task)),
        tag("p", facts, class_="facts"),
        tag("p", headline, class_="headline") if headline else None,
        tag("p", caveats, class_="caveats") if caveats else None,
    )


def _overview(sources: Sequence[Source], names: Sequence[str]) -> Html:
    """Return a table with one row for each workdir."""
    notes = {name: note for source in sources for name, note in source.notes.items()}
    kinds = charts.kinds(dict.fromkeys(line.objective for source in sources for line in source.results.lines), notes)
    objectives = [name for name in kinds if any(name in source.students for source in sources)]
    header: list[Child] = ["workdir", "task", "source", "targets"]
    header += [charts.named(kinds[objective], objective) for objective in objectives]
    header.append(summary.gain_title(sources[0].results))
    rows: list[list[Child]] = []
    for number, (source, name) in enumerate(zip(sources, names, strict=True)):
        lines = {line.objective: line for line in source.results.lines}
        row: list[Child] = [
            tag("a", name_of(name), href=f"#run{number}-top"),
            name_of(source.task.name),
            name_of(", ".join(source.results.source_languages)),
            f"{len(source.results.target_languages):,}",
        ]
        row += [summary.value_text(lines[name].average if name in lines else None) for name in objectives]
        row.append(_gain(source))
        rows.append(row)
    metric = sources[0].results.metric
    return tag(
        "section",
        tag("h1", "Overview"),
        table(header, rows, text_columns=3, class_="results"),
        note(
            f"Average of the target languages, {metric} in %: mean ± standard deviation over "
            f"{' or '.join(dict.fromkeys(source.results.axis.units for source in sources))}; checkpoint: "
            f"{sources[0].results.checkpoint}."
        ),
        id="overview",
    )


def _gain(source: Source) -> Html:
    """Return the gain of the main objective, and its name."""
    try:
        objective = source.main_objective
    except MissingSource:
        return Html("–")
    line = next(line for line in source.results.lines if line.objective == objective)
    if line.gain is None:
        return Html("–")
    return join([summary.value_text(line.gain, "+.1f"), tag("small", source.results.name_of(objective))])


def _names(sources: Sequence[Source]) -> list[str]:
    """Return the names of the workdirs' directories, or their paths if two have the same name."""
    names = [source.workdir.root.resolve().name for source in sources]
    return names if len(set(names)) == len(names) else [str(source.workdir.root) for source in sources]
