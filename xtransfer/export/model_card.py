"""The model card of an exported classifier: front matter for the hub, and what a reader has to know before using it.

The form is that of https://huggingface.co/docs/hub/model-cards; the results stand in the front matter as well, where
programs read them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from xtransfer import __version__
from xtransfer.distillation.objectives import OBJECTIVES
from xtransfer.evaluation.metrics import CHANCE, METRICS, at_chance
from xtransfer.evaluation.results import Row
from xtransfer.export.provenance import as_code, as_line, origin
from xtransfer.report import table as tables
from xtransfer.report.table import Table
from xtransfer.runs.find import SelectedRun
from xtransfer.runs.selection import PROTOCOLS

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_HUB_METRICS = {"macro_f1": "f1"}  # ours under the hub's names, where they differ

_UNLABELLED = {
    "split": "the unlabelled split",
    "train_rest": "the rest of the training split",
    "file": "another file",
}


@dataclass(frozen=True)
class Scores:
    """What one checkpoint reached on one split of one language: metric -> value, and over how many examples."""

    split: str
    language: str
    values: Mapping[str, float]
    count: int


def model_card(chosen: SelectedRun, rows: Sequence[Row]) -> str:
    """README.md of an exported checkpoint: YAML front matter, then Markdown.

    `rows` are all there are of the experiment's results; those of this checkpoint and protocol are used. Nothing in it
    names a directory of this machine.
    """
    scores = scores_of(chosen, rows)
    sections = (
        f"# {_title(chosen)}",
        *_notices(chosen, scores),
        _what_it_does(chosen),
        _how_to_use(chosen),
        _how_it_was_made(chosen),
        _results(chosen, scores),
        _limits(chosen),
        _licence(chosen),
    )
    return f"---\n{_front_matter(chosen, scores)}\n---\n\n" + "\n\n".join(sections) + "\n"


def scores_of(chosen: SelectedRun, rows: Sequence[Row]) -> list[Scores]:
    """The scores of this checkpoint, chosen by this protocol: split by split, the source language first."""
    wanted = (chosen.task.name, chosen.objective, chosen.seed, chosen.step, chosen.selection)
    keys = ("task", "objective", "seed", "step", "selection")
    mine = [row for row in rows if tuple(row[key] for key in keys) == wanted]
    found = []
    for split in dict.fromkeys(row["split"] for row in mine):
        for language in chosen.languages:
            here = [row for row in mine if (row["split"], row["language"]) == (split, language)]
            if here:
                found.append(Scores(split, language, {row["metric"]: row["value"] for row in here}, here[0]["count"]))
    return found


def _title(chosen: SelectedRun) -> str:
    what = "monolingual teacher" if chosen.is_teacher else f"{as_line(chosen.objective)} student"
    synthetic = " (synthetic)" if chosen.task.synthetic else ""
    return f"{as_line(chosen.task.name)}{synthetic}: {what} from {origin(chosen.settings.checkpoint).name}"


def _notices(chosen: SelectedRun, scores: Sequence[Scores]) -> list[str]:
    """What must be read first."""
    found = []
    if chosen.task.synthetic:
        found.append(
            "**Synthetic data.** A generator wrote the text of this task. The model shows that the method runs; it is "
            "of no use on real text, and its numbers say nothing about real languages."
        )
    if chosen.settings.pooling == "mean":
        found.append(
            "**Not for `transformers`.** This classifier reads the mean of all tokens, which `transformers` has no "
            "class for: it would load the files without an error and compute other, wrong logits. Use "
            "`python -m xtransfer.predict`."
        )
    if no_better := [f"{one.language} ({one.split})" for one in scores if _is_at_chance(one)]:
        found.append(
            f"**At chance** in {', '.join(no_better)}: the accuracy there cannot be told from always answering the "
            "most frequent class."
        )
    return ["\n>\n".join(f"> {text}" for text in found)] if found else []


def _is_at_chance(scores: Scores) -> bool:
    values = scores.values
    known = "accuracy" in values and CHANCE in values
    return known and at_chance(values["accuracy"], scores.count, values[CHANCE])


def _what_it_does(chosen: SelectedRun) -> str:
    task = chosen.task
    rows = tuple((str(index), as_code(label)) for index, label in enumerate(task.labels))
    classes = "\n".join(tables.markdown(Table(("index", "class"), rows, text_columns=2)))
    others = ", ".join(as_line(language) for language in chosen.languages[1:])
    source = as_line(task.source_language)
    where = f"It was trained on {source} alone and is meant for {others} as well."
    if chosen.is_teacher:
        where = f"It is for {source} only."
    return (
        f"## What it does\n\nIt puts a text, or a pair of texts where the task has pairs, into one of the "
        f"{len(task.labels)} classes of the task {as_code(task.name)}. {where}\n\n{classes}"
    )


def _how_to_use(chosen: SelectedRun) -> str:
    ours = (
        "With `xtransfer`, for a file with the column `text`, of pairs also `text_pair`:\n\n```sh\n"
        "python -m xtransfer.predict --model DIRECTORY --input texts.jsonl --output classes.jsonl\n```"
    )
    if chosen.settings.pooling == "mean":
        return f"## How to use it\n\n{ours}"
    code = (
        "from transformers import pipeline\n\n"
        'classify = pipeline("text-classification", model="DIRECTORY", truncation=True)\n'
        'classify("…")  # of pairs: classify({"text": "…", "text_pair": "…"})'
    )
    return (
        "## How to use it\n\nDIRECTORY is that of this card, or its name on the hub. With `transformers`:\n\n"
        f"```python\n{code}\n```\n\n{ours}"
    )


def _how_it_was_made(chosen: SelectedRun) -> str:
    settings, task = chosen.settings, chosen.task
    base = origin(settings.checkpoint)
    facts = [
        f"**Method**: {_method(chosen)}",
        f"**Base checkpoint**: {base.text}, sha256 of its files `{chosen.fingerprint}`.",
        *_teacher(chosen),
        f"**Data**: the task {as_code(task.name)}{', synthetic' if task.synthetic else ''}; {_material(chosen)}",
        f"**Training**: {settings.steps:,} steps of {settings.batch_size} examples of at most {settings.max_length} "
        f"tokens; AdamW with a peak learning rate of {settings.learning_rate:g}; compute in {settings.compute_dtype}; "
        f"pooling: {settings.pooling}{_frozen(chosen)}; seed {chosen.seed}.",
        f"**Checkpoint**: step {chosen.step:,}, the {PROTOCOLS[chosen.selection].describe} (`{chosen.selection}`).",
        f"**Software**: xtransfer {__version__}.",
    ]
    return "## How it was made\n\n" + "\n".join(f"- {fact}" for fact in facts)


def _method(chosen: SelectedRun) -> str:
    if chosen.is_teacher:
        return f"the monolingual teacher, fine-tuned on {as_line(chosen.task.source_language)} labels."
    objective, transfer = OBJECTIVES[chosen.objective], chosen.config.transfer
    whose = {"none": "", "monolingual": "a monolingual teacher's", "vanilla": "the vanilla student's"}[
        objective.teacher
    ]
    learnt = []
    if objective.soft_weight:
        both = " on both sides" if transfer.temperature_on == "both" else ""
        learnt.append(
            f"{whose} class probabilities (knowledge distillation, temperature {transfer.temperature:g}{both})"
        )
    if objective.pseudo_labels:
        least = f" where it is at least {transfer.threshold:.0%} sure" if transfer.threshold else ""
        learnt.append(f"gold labels, and {whose} choice{least} where there is none")
    elif objective.hard_weight:
        learnt.append("gold labels")
    return f"`{chosen.objective}`, trained on {' and '.join(learnt)}."


def _teacher(chosen: SelectedRun) -> list[str]:
    if chosen.is_teacher or OBJECTIVES[chosen.objective].teacher == "none":
        return []
    if OBJECTIVES[chosen.objective].teacher == "vanilla":
        return [f"**Teacher**: the student `vanilla` of the same experiment, seed {chosen.seed}; no monolingual model."]
    link = origin(chosen.config.teacher.checkpoint).text
    return [
        f"**Teacher**: fine-tuned from {link} on the same labels (seed {chosen.config.teacher_seed}), sha256 of the "
        f"base's files `{chosen.task.teacher_checkpoint}`."
    ]


def _material(chosen: SelectedRun) -> str:
    config, source = chosen.config.task, as_line(chosen.task.source_language)
    count = f"{config.labelled:,} labelled texts, equally of each class" if config.labelled else "all labelled texts"
    text = f"{count}, of the {source} training split"
    if not chosen.is_teacher and OBJECTIVES[chosen.objective].data == "all" and config.unlabelled_from in _UNLABELLED:
        many = f"{config.unlabelled:,}" if config.unlabelled else "all"
        text += f", and {many} texts of {_UNLABELLED[config.unlabelled_from]} without labels"
    return text + "." if chosen.is_teacher else f"{text}. No text of another language was used in fine-tuning."


def _frozen(chosen: SelectedRun) -> str:
    patterns = chosen.settings.frozen
    return f"; frozen: {', '.join(map(as_code, patterns))}" if patterns else ""


def _results(chosen: SelectedRun, scores: Sequence[Scores]) -> str:
    head = "## Results\n\n"
    if not scores:
        return (
            f"{head}None: this checkpoint had not been evaluated when it was exported. `python -m xtransfer.evaluate` "
            "does that; export it again afterwards."
        )
    names = [name for name in METRICS if any(name in one.values for one in scores)]
    lines: list[tuple[str, ...]] = []
    for split in dict.fromkeys(one.split for one in scores):
        here = {one.language: one for one in scores if one.split == split}
        for language, one in here.items():
            source = " (source)" if language == chosen.task.source_language else ""
            cells = [_percent(one.values.get(name)) for name in (*names, CHANCE)]
            lines.append((f"{as_line(language)}{source}", split, *cells, f"{one.count:,}"))
        targets = chosen.languages[1:]
        if len(targets) > 1 and all(language in here for language in targets):  # an average is never over fewer
            means = [fmean(here[language].values[name] for language in targets) for name in names]
            lines.append(("mean of targets", split, *map(_percent, means), "", ""))
    header = ("language", "split", *map(_title_of, names), "most frequent class", "examples")
    table = "\n".join(tables.markdown(Table(header, tuple(lines), text_columns=2)))
    missing = [language for language in chosen.languages if language not in {one.language for one in scores}]
    absent = f" Not evaluated in {', '.join(missing)}." if missing else ""
    return (
        f"{head}In %, of this one run (seed {chosen.seed}). Its checkpoint is the "
        f"{PROTOCOLS[chosen.selection].describe} (`{chosen.selection}`){_zero_shot(chosen)}.{absent}\n\n{table}\n\n"
        '"Most frequent class" is the accuracy of always answering that one.'
    )


def _zero_shot(chosen: SelectedRun) -> str:
    if chosen.is_teacher:
        return ""
    return "; labels of the other languages were used for nothing but these scores"


def _limits(chosen: SelectedRun) -> str:
    tested = f"Languages other than {', '.join(map(as_line, chosen.languages))} are untested."
    return (
        f"## Limits\n\n- {tested}\n"
        f"- Texts are cut at {chosen.settings.max_length} tokens: longer ones were not seen in training.\n"
        "- It is one run; another seed gives other numbers.\n"
        "- It has the biases of its base checkpoint and of its data."
    )


def _licence(chosen: SelectedRun) -> str:
    base = origin(chosen.settings.checkpoint)
    known = f" (`{base.licence}`, by its own card)" if base.licence else ""
    taught = not chosen.is_teacher and OBJECTIVES[chosen.objective].teacher == "monolingual"
    others = "of the teacher's checkpoint and of the data" if taught else "of the data"
    return (
        f"## Licence\n\nThe weights derive from {base.text}, so its licence applies to them{known}. The terms {others} "
        "may add to it."
    )


def _front_matter(chosen: SelectedRun, scores: Sequence[Scores]) -> str:
    from huggingface_hub import ModelCardData

    base, task, by_transformers = origin(chosen.settings.checkpoint), chosen.task, chosen.settings.pooling == "cls"
    tags = ["text-classification", "xtransfer", f"task:{task.name}"]
    if not chosen.is_teacher:
        tags += ["cross-lingual", "zero-shot-transfer", f"objective:{chosen.objective}"]
    tags += ["synthetic-data"] if task.synthetic else []
    data = ModelCardData(
        language=_language_codes(chosen.languages) or None,
        license=base.licence,
        library_name="transformers" if by_transformers else "xtransfer",
        pipeline_tag="text-classification" if by_transformers else None,
        tags=tags,
        base_model=base.hub_id,
        metrics=[_HUB_METRICS.get(name, name) for name in METRICS] if scores else None,
        model_name=f"{task.name}-{chosen.objective}-seed-{chosen.seed}" if scores else None,
        eval_results=[result for one in scores for result in _eval_results(chosen, one)] or None,
    )
    return data.to_yaml()


def _eval_results(chosen: SelectedRun, scores: Scores) -> "list[EvalResult]":
    from huggingface_hub import EvalResult

    synthetic = ", synthetic" if chosen.task.synthetic else ""
    return [
        EvalResult(
            task_type="text-classification",
            dataset_type=chosen.task.name,
            dataset_name=f"{chosen.task.name} ({scores.language}{synthetic})",
            dataset_config=scores.language,
            dataset_split=scores.split,
            metric_type=_HUB_METRICS.get(name, name),
            metric_name=_title_of(name),
            metric_value=round(scores.values[name], 6),
        )
        for name in METRICS
        if name in scores.values
    ]


def _language_codes(languages: Sequence[str]) -> list[str]:
    """The ISO 639 codes that the hub takes, of tags such as de, deu_Latn, pt-BR; other names have none."""
    codes = (re.split(r"[-_]", language)[0].lower() for language in languages)
    return list(dict.fromkeys(code for code in codes if re.fullmatch(r"[a-z]{2,3}", code)))


def _title_of(metric: str) -> str:
    return metric.replace("_", " ")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}".removesuffix("%")
