"""What the predictions are like: calibration, confusions, and scores by class."""

import numpy as np

from xtransfer.evaluation.calibration import BINS
from xtransfer.report.page import charts
from xtransfer.report.page.markup import Child, Html, join, name_of, note, table, tag, text_in
from xtransfer.report.page.sources import Source, Tally
from xtransfer.runs.workdir import TEACHER

_LANGUAGES = 6  # shown with small multiples
_FEW_CLASSES = 4  # of a confusion matrix that fits into a small panel
_MOST_CLASSES = 12  # of a confusion matrix; more are listed
_CONFUSIONS = 10  # listed pairs of classes


def build_calibration(source: Source) -> Html:
    """Return reliability diagrams of every objective in a few languages, and the calibration error in all of them."""
    tallies = source.tallies
    shown = source.shown_languages(_LANGUAGES)
    pieces: list[Html] = []
    for language in shown:
        figures = []
        for objective, kind in _aligned(source).items():
            if (objective, language) in tallies:
                tally = tallies[objective, language]
                figures.append(
                    charts.panel(
                        join([charts.named(kind, objective), tag("small", f"ECE {tally.error * 100:.1f}")]),
                        charts.reliability(tally.bins, kind, f"calibration of {objective} in {language}"),
                    )
                )
        pieces += [tag("h4", text_in(language, language)), charts.panels(*figures, small=True)]
    pieces.append(
        note(
            f"Accuracy (%) against confidence in {BINS} bins of equal width, all runs together. The area of a point "
            f"grows with its share of the predictions. Below the diagonal, the classifier is overconfident. "
            f"{'Each class of an example is a prediction. ' if source.task.multi_label else ''}{_few(source)}"
        )
    )
    header: list[Child] = ["calibration error", *(charts.named(kind, name) for name, kind in source.kinds.items())]
    rows: list[list[Child]] = [
        [name_of(language), *(_errors(source, objective, language) for objective in source.kinds)]
        for language in source.languages
    ]
    texts = [f"Expected calibration error (ECE) in points, over {BINS} bins: mean over runs."]
    if any(source.mean("ece_calibrated", *key) is not None for key in tallies):
        texts.append("Small: with the logits divided by the temperature fitted on the source language's dev split.")
    return join([*pieces, table(header, rows), note(" ".join(texts))])


def build_confusions(source: Source) -> Html:
    """Return confusion matrices in a few languages, or the most frequent confusions if there are many classes.

    A multi-label task has no confusions of one class with another, but counts of each class against the rest.
    """
    if source.task.multi_label:
        return _build_against_rest(source)
    labels = source.task.labels
    pieces: list[Html] = []
    for language in source.shown_languages(_LANGUAGES):
        figures = []
        for objective, kind in _aligned(source).items():
            if (objective, language) in source.tallies:
                tally = source.tallies[objective, language]
                content = _matrix(tally, labels) if len(labels) <= _MOST_CLASSES else _frequent(tally, labels)
                figures.append(charts.panel(charts.named(kind, objective), content))
        pieces += [tag("h4", text_in(language, language)), charts.panels(*figures, small=len(labels) <= _FEW_CLASSES)]
    meaning = (
        "Rows are labels and columns are predictions; each number is its share of the row in %, all runs together."
        if len(labels) <= _MOST_CLASSES
        else f"The {_CONFUSIONS} most frequent confusions: label → prediction, and its share of the label in %."
    )
    pieces.append(note(f"{meaning} {_few(source)}"))
    return join(pieces)


def _build_against_rest(source: Source) -> Html:
    labels = source.task.labels
    pieces: list[Html] = []
    for language in source.shown_languages(_LANGUAGES):
        figures = []
        for objective, kind in _aligned(source).items():
            if (objective, language) in source.tallies:
                content = _against_rest(source.tallies[objective, language], labels)
                figures.append(charts.panel(charts.named(kind, objective), content))
        pieces += [tag("h4", text_in(language, language)), charts.panels(*figures)]
    most = f" The {_MOST_CLASSES} classes with the most errors are shown." if len(labels) > _MOST_CLASSES else ""
    pieces.append(
        note(
            "Each class against the rest: how often it was predicted rightly, predicted wrongly, and missed, all runs "
            f"together. A text may have several labels, so no class is confused with another one.{most} {_few(source)}"
        )
    )
    return join(pieces)


def _against_rest(tally: Tally, labels: tuple[str, ...]) -> Html:
    errors = tally.confusion[:, 0, 1] + tally.confusion[:, 1, 0]
    shown = sorted(np.argsort(-errors, kind="stable")[:_MOST_CLASSES].tolist())
    rows: list[list[Child]] = [
        [name_of(labels[k]), *(f"{tally.confusion[k][cell]:,}" for cell in ((1, 1), (0, 1), (1, 0)))] for k in shown
    ]
    return table(["class", "right", "wrong", "missed"], rows)


def build_classes(source: Source) -> Html:
    """Return precision, recall, and F1 of each class, in the source languages and on average over the targets."""
    pieces: list[Html] = []
    sources = source.results.source_languages
    for title, languages in (
        *((f"{language}, {'the' if len(sources) == 1 else 'a'} source language", (language,)) for language in sources),
        ("Average of the target languages", source.languages[len(sources) :]),
    ):
        if not languages:
            continue
        objectives = [name for name in source.kinds if all((name, one) in source.tallies for one in languages)]
        header: list[Child] = ["class", "examples"]
        header += [
            join([charts.named(source.kinds[name], name), tag("small", "precision · recall · F1")])
            for name in objectives
        ]
        scores = {
            name: np.mean([class_scores(source.tallies[name, language].confusion) for language in languages], axis=0)
            for name in objectives
        }
        support = np.sum([_support(source.tallies[objectives[-1], language]) for language in languages], axis=0)
        rows: list[list[Child]] = [
            [
                name_of(label),
                f"{int(support[index]):,}",
                *(" · ".join(f"{value * 100:.1f}" for value in scores[name][:, index]) for name in objectives),
            ]
            for index, label in enumerate(source.task.labels)
        ]
        pieces += [tag("h3", title), table(header, rows)]
    pieces.append(note("In %, all runs together. A class that is never predicted has precision 0."))
    return join(pieces)


def class_scores(confusion: np.ndarray) -> np.ndarray:
    """Return precision, recall, and F1 of each class [3, K] from a confusion matrix; 0 in place of 0 / 0.

    Args:
      confusion: [K, K], or [K, 2, 2] for each class against the rest.
    """
    if confusion.ndim == 3:
        right, predicted = confusion[:, 1, 1].astype(float), confusion[:, :, 1].sum(axis=1)
        gold = confusion[:, 1].sum(axis=1)
    else:
        right = np.diag(confusion).astype(float)
        predicted, gold = confusion.sum(axis=0), confusion.sum(axis=1)
    return np.stack(
        [right / np.maximum(predicted, 1), right / np.maximum(gold, 1), 2 * right / np.maximum(predicted + gold, 1)]
    )


def _aligned(source: Source) -> dict[str, charts.Kind]:
    """Return the objectives with those of some languages, and the teacher, last, so that columns line up."""
    return {**source.student_kinds, **{name: kind for name, kind in source.kinds.items() if name != TEACHER}} | {
        name: kind for name, kind in source.kinds.items() if name == TEACHER
    }


def _support(tally: Tally) -> np.ndarray:
    """Return the number of examples of each class [K], each counted once."""
    gold = tally.confusion[:, 1] if tally.confusion.ndim == 3 else tally.confusion
    return gold.sum(axis=1) // tally.runs


def _errors(source: Source, objective: str, language: str) -> Child:
    """Return the calibration error in points, and under it the error after calibration, if it is recorded."""
    if (objective, language) not in source.tallies:
        return "–"
    calibrated = source.mean("ece_calibrated", objective, language)
    before = f"{source.tallies[objective, language].error * 100:.1f}"
    return before if calibrated is None else join([before, tag("small", f"{calibrated * 100:.1f}")])


def _few(source: Source) -> str:
    """Say which languages are shown, if not all."""
    shown = len(source.shown_languages(_LANGUAGES)) - 1
    total = len(source.languages) - 1
    return f"{shown} of {total} target languages are shown, from the hardest to the easiest." if shown < total else ""


def _matrix(tally: Tally, labels: tuple[str, ...]) -> Html:
    shares = tally.confusion / np.maximum(tally.confusion.sum(axis=1, keepdims=True), 1)
    head = tag("tr", tag("td"), *(tag("th", name_of(label, "bdi"), scope="col", title=label) for label in labels))
    rows = []
    for index, label in enumerate(labels):
        cells = [
            tag(
                "td",
                f"{share * 100:.0f}",
                style=f"--share:{share:.2f}",
                class_="strong" if share > 0.55 else None,
                title=f"{tally.confusion[index, column]:,} predictions",
            )
            for column, share in enumerate(shares[index])
        ]
        rows.append(tag("tr", tag("th", name_of(label, "bdi"), scope="row", title=label), *cells))
    # With few classes, there is space for their names above the columns; with more, they stand upright.
    upright = " upright" if len(labels) > _FEW_CLASSES else ""
    return tag("table", head, *rows, class_=f"confusion{upright}")


def _frequent(tally: Tally, labels: tuple[str, ...]) -> Html:
    shares = tally.confusion / np.maximum(tally.confusion.sum(axis=1, keepdims=True), 1)
    wrong = tally.confusion * (1 - np.eye(len(labels), dtype=np.int64))
    order = np.argsort(-wrong, axis=None, kind="stable")[:_CONFUSIONS]
    pairs = [divmod(int(position), len(labels)) for position in order]
    items = [
        tag("li", name_of(labels[gold]), " → ", name_of(labels[guess]), f" {shares[gold, guess] * 100:.0f}")
        for gold, guess in pairs
        if wrong[gold, guess]
    ]
    return tag("ol", *items, class_="confusions") if items else tag("p", "none")
