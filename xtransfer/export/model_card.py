"""The model card of an exported classifier: front matter for the hub, and the facts to know before using it.

The form follows https://huggingface.co/docs/hub/model-cards. The results are in the front matter too, where programs
read them.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from xtransfer import __version__
from xtransfer.config import ModelConfig
from xtransfer.distillation.objectives import (
    Objective,
    definitions,
    describe,
    kinds_of_target_text,
    teacher_objective,
    uses_target_text,
)
from xtransfer.evaluation.metrics import CHANCE, EFFECTS, METRICS, at_chance
from xtransfer.evaluation.recalibration import UNCHANGED, Recalibration
from xtransfer.evaluation.results import TARGET_TEXT_MARK, Row
from xtransfer.export.provenance import as_code, as_line, origin
from xtransfer.models.hf.config import transformers_pools
from xtransfer.report import table as table_writer
from xtransfer.report.table import Table
from xtransfer.runs.find import SelectedRun
from xtransfer.runs.selection import PROTOCOLS
from xtransfer.runs.workdir import TEACHER, RunId
from xtransfer.train.checkpoints import AVERAGE
from xtransfer.train.metrics_log import PLANNED_STEPS, read_metrics

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_OF_PROBABILITIES = ("log_loss", "brier_score", "ece", "adaptive_ece")  # a temperature changes them
# Neither temperature nor threshold changes these.
_OF_RANKS = ("auroc", "recall_at_fpr_0.01", "recall_at_fpr_0.05", "macro_auroc", "macro_average_precision")
_HUB_METRICS = {"macro_f1": "f1", "auroc": "roc_auc"}  # the hub's names of our metrics, if they differ

# The column with `CHANCE`, and what it means, without and with several labels per text.
_CHANCES = (
    ("majority class", '"Majority class" is the accuracy of always predicting that class.'),
    ("most frequent set", '"Most frequent set" is the subset accuracy of always predicting the most frequent labels.'),
)

_SEVERAL = (
    "This gives a probability for each class, which need not add up to 1. A text has the classes whose probability is "
    "above 0.5, and perhaps none.\n\n"
)

_NO_OTHER_TEXT = "Fine-tuning used no text in another language."

_TARGET_TEXT = {"split": "the unlabelled split", "train": "the training split", "file": "another file"}
_UNLABELLED = {
    "split": "the unlabelled split",
    "train_rest": "the rest of the training split",
    "file": "another file",
}


@dataclass(frozen=True)
class Scores:
    """One checkpoint's scores on one split of one language: value by metric, and the number of examples."""

    split: str
    language: str
    values: Mapping[str, float]
    count: int


def model_card(
    run: SelectedRun, rows: Sequence[Row], *, family: str = "bert", applied: Recalibration = UNCHANGED
) -> str:
    """Return README.md of an exported checkpoint: YAML front matter, then Markdown. It names no local directory.

    Args:
      run: the checkpoint.
      rows: all result rows of the experiment; the card uses the rows of this checkpoint and protocol.
      family: the checkpoint's family, which decides how `transformers` can pool.
      applied: what is folded into the classification head; the card has the scores after it.
    """
    scores = [recalibrated(entry, applied) for entry in scores_of(run, rows)]
    by_transformers = transformers_pools(family, run.settings.pooling)
    sections = (
        f"# {_title(run)}",
        *_notices(run, scores, by_transformers),
        _what_it_does(run),
        _how_to_use(run, by_transformers),
        _how_it_was_made(run, applied),
        _results(run, scores),
        _limits(run),
        _licence(run),
    )
    return f"---\n{_front_matter(run, scores, by_transformers)}\n---\n\n" + "\n\n".join(sections) + "\n"


def scores_of(run: SelectedRun, rows: Sequence[Row]) -> list[Scores]:
    """Return the scores of this checkpoint under this protocol, split by split, the source language first."""
    checkpoint = (run.task.name, run.objective, run.workdir.draw, run.seed, run.step, run.selection)
    keys = ("task", "objective", "draw", "seed", "step", "selection")
    run_rows = [row for row in rows if tuple(row[key] for key in keys) == checkpoint]
    scores = []
    for split in dict.fromkeys(row["split"] for row in run_rows):
        for language in run.languages:
            matching = [row for row in run_rows if (row["split"], row["language"]) == (split, language)]
            if matching:
                values = {row["metric"]: row["value"] for row in matching}
                scores.append(Scores(split, language, values, matching[0]["count"]))
    return scores


def recalibrated(scores: Scores, applied: Recalibration) -> Scores:
    """Return the scores of a recalibrated classifier. A metric that was not scored after it, and changes, is left out.

    A temperature changes what depends on probabilities. A threshold changes predictions, and shifts probabilities.
    """
    if applied == UNCHANGED:
        return scores
    if not applied.has_threshold:
        suffix, kept = "_calibrated", scores.values.keys() - set(_OF_PROBABILITIES)
    else:
        suffix, kept = "_thresholded", scores.values.keys() & {*_OF_RANKS, CHANCE}
    values = {name: value for name, value in scores.values.items() if name in kept}
    after = {EFFECTS[name]: scores.values[name] for name in EFFECTS if name in scores.values and name.endswith(suffix)}
    return dataclasses.replace(scores, values={**values, **after})


def _title(run: SelectedRun) -> str:
    role = "monolingual teacher" if run.is_teacher else f"{as_line(run.objective)} student"
    synthetic = " (synthetic)" if run.task.synthetic else ""
    return f"{as_line(run.task.name)}{synthetic}: {role} from {origin(run.settings.checkpoint).name}"


def _notices(run: SelectedRun, scores: Sequence[Scores], by_transformers: bool) -> list[str]:
    """Return the notices to read first, as one block quote, or nothing."""
    notices = []
    if _uses_target_text(run):
        kinds = " and ".join(kinds_of_target_text(definitions(run.config), run.objective))
        notices.append(
            f"**{TARGET_TEXT_MARK.capitalize()}.** This student has learned from {kinds} in target languages, itself "
            "or through its teacher, so its numbers are not zero-shot without target text."
        )
    if run.task.synthetic:
        notices.append(
            "**Synthetic data.** A generator wrote the text of this task. The model shows that the method runs. It is "
            "useless on real text, and its numbers say nothing about real languages."
        )
    if not by_transformers:
        notices.append(
            f"**Not for `transformers`.** This classifier pools by `{run.settings.pooling}`, for which `transformers` "
            "has no class. It would load the files without an error and compute other, wrong logits. Use "
            "`python -m xtransfer.predict`."
        )
    if no_better := [f"{entry.language} ({entry.split})" for entry in scores if _is_at_chance(entry)]:
        notices.append(
            f"**At chance** in {', '.join(no_better)}: the accuracy there is no better than always predicting the "
            "majority class."
        )
    return ["\n>\n".join(f"> {text}" for text in notices)] if notices else []


def _is_at_chance(scores: Scores) -> bool:
    values = scores.values
    scored = "accuracy" in values and CHANCE in values
    return scored and at_chance(values["accuracy"], scores.count, values[CHANCE])


def _what_it_does(run: SelectedRun) -> str:
    task = run.task
    rows = tuple((str(index), as_code(label)) for index, label in enumerate(task.labels))
    classes = "\n".join(table_writer.markdown(Table(("index", "class"), rows, text_columns=2)))
    others = ", ".join(as_line(language) for language in _targets(run))
    source = _source(run)
    languages = f"It was trained on {source} alone and is meant for {others} as well."
    if _objective(run).reads_target_text:
        read, known = (", ".join(map(as_line, names)) for names in (_sources(run), run.languages))
        kind = "unlabelled text in" if _objective(run).data == "target" else f"translations from {source} into"
        languages = f"It was trained on {kind} {read} and is meant for {known}."
    elif _uses_target_text(run):
        languages = f"It was trained on {source}, by a teacher that has learned from text in target languages."
    if run.is_teacher:
        languages = f"It is for {' and '.join(map(as_line, run.languages))} only."
    into = "gives" if task.multi_label else "puts"
    several = "any number of the" if task.multi_label else "into one of the"
    return (
        f"## What it does\n\nIt {into} a text, or a pair of texts if the task has pairs, {several} "
        f"{len(task.labels)} classes of the task {as_code(task.name)}. {languages}\n\n{classes}"
    )


def _how_to_use(run: SelectedRun, by_transformers: bool) -> str:
    ours = (
        "With `xtransfer`, for a file with the column `text`, and `text_pair` for pairs:\n\n```sh\n"
        "python -m xtransfer.predict --model DIRECTORY --input texts.jsonl --output classes.jsonl\n```"
    )
    if not by_transformers:
        return f"## How to use it\n\n{ours}"
    every = ", top_k=None" if run.task.multi_label else ""
    code = (
        "from transformers import pipeline\n\n"
        f'classify = pipeline("text-classification", model="DIRECTORY"{every}, truncation=True)\n'
        'classify("…")  # for pairs: classify({"text": "…", "text_pair": "…"})'
    )
    return (
        "## How to use it\n\nDIRECTORY is the directory of this card, or its name on the hub. With `transformers`:\n\n"
        f"```python\n{code}\n```\n\n{_SEVERAL if run.task.multi_label else ''}{ours}"
    )


def _how_it_was_made(run: SelectedRun, applied: Recalibration) -> str:
    settings, task = run.settings, run.task
    base = origin(settings.checkpoint)
    facts = [
        f"**Method**: {_method(run)}",
        f"**Base checkpoint**: {base.text}, sha256 of its files `{run.fingerprint}`.",
        *_teacher(run),
        f"**Data**: the task {as_code(task.name)}{', synthetic' if task.synthetic else ''}; {_data(run)}",
        *_training(run),
        f"**Checkpoint**: step {run.step:,}, the {_protocol(run)} (`{run.selection}`"
        f"{_selected_by(run)}{_averaged(run)}).",
        *_recalibration(applied, task.labels),
        f"**Software**: xtransfer {__version__}.",
    ]
    return "## How it was trained\n\n" + "\n".join(f"- {fact}" for fact in facts)


def _training(run: SelectedRun) -> list[str]:
    """Return the length and the settings of training; nothing for a teacher that was not trained here."""
    settings = run.settings
    if not settings.learns:
        return []
    return [
        f"**Training**: {_length(run)} of {settings.batch_size} examples of at most {settings.max_length} "
        f"tokens; AdamW with a peak learning rate of {settings.learning_rate:g}{_options(settings)}; "
        f"compute in {settings.compute_dtype}; pooling: {settings.pooling}{_frozen(run)}; "
        f"seed {run.seed}{_patience(run)}.",
    ]


def _recalibration(applied: Recalibration, labels: Sequence[str]) -> list[str]:
    facts = []
    if applied.temperature is not None:
        facts.append(
            f"**Temperature**: {applied.temperature:.4g}, which has the lowest log loss on the source language's dev "
            "split. The head's weights and bias are divided by it."
        )
    if applied.threshold is not None:
        facts.append(
            f"**Threshold**: {as_code(labels[1])} is predicted if its probability before any recalibration is above "
            f"{applied.threshold:.4g}, which has the highest macro-F1 on the source language's dev split. The head's "
            "bias is shifted so that this point has the probability 0.5. The probabilities serve this decision, and "
            "are not calibrated."
        )
    if applied.class_thresholds is not None:
        pairs = zip(labels, applied.class_thresholds, strict=True)
        shown = ", ".join(f"{as_code(label)} {threshold:.4g}" for label, threshold in pairs)
        facts.append(
            "**Thresholds**: a class is predicted if its probability before any recalibration is above its own "
            f"threshold, which has the highest F1 on the source language's dev split: {shown}. The head's bias is "
            "shifted so that these points have the probability 0.5. The probabilities serve this decision, and are not "
            "calibrated."
        )
    return facts


def _method(run: SelectedRun) -> str:
    if run.is_teacher and run.config.teacher.is_ready_made:
        return "the monolingual teacher, a classifier that was trained before this experiment."
    objective = _objective(run)
    if run.is_teacher:
        read = as_line(run.task.source_language) if not run.task.other_sources else _joined(run.languages)
        return f"the monolingual teacher, fine-tuned on {read} labels.{_loss(objective)}"
    is_taught_by_student = objective.student_teacher is not None
    teacher = f"the {as_line(objective.teacher)} student's" if is_taught_by_student else "a monolingual teacher's"
    targets = []
    if objective.soft_weight:
        both = " on both sides" if objective.temperature_on == "both" else ""
        targets.append(
            f"{teacher} class probabilities (knowledge distillation, temperature {objective.temperature:g}{both})"
        )
    if objective.pseudo_labels:
        condition = f" if it is at least {objective.threshold:.0%} sure" if objective.threshold else ""
        gold = "" if objective.reads_target_text else "gold labels, and "
        targets.append(f"{gold}{teacher} prediction{condition} where there is no label")
    elif objective.hard_weight:
        targets.append("gold labels")
    return f"`{run.objective}`, trained on {' and '.join(targets)}.{_loss(objective)}"


def _objective(run: SelectedRun) -> Objective:
    return teacher_objective(run.config) if run.is_teacher else definitions(run.config)[run.objective]


def _loss(objective: Objective) -> str:
    """Return the loss as a sentence if the targets alone do not say what it is."""
    weighs = objective.confidence_weighted or objective.class_weights or objective.focal_gamma
    is_mix = objective.hard_weight and objective.soft_weight
    return f" Loss: {as_line(describe(objective))}." if weighs or objective.label_smoothing or is_mix else ""


def _teacher(run: SelectedRun) -> list[str]:
    if run.is_teacher or _objective(run).teacher == "none":
        return []
    if _objective(run).teacher == "vanilla":
        return [f"**Teacher**: the `vanilla` student of the same experiment, seed {run.seed}; no monolingual model."]
    if name := _objective(run).student_teacher:
        return [f"**Teacher**: the {as_code(name)} student of the same experiment, seed {run.seed}."]
    if run.config.teachers:
        return [f"**Teachers**: the mean of {len(run.config.members)} teachers.", *_members(run)]
    if run.config.teacher.is_file:
        return [
            "**Teacher**: logits, probabilities, or labels from a file, made outside this experiment; its sha256 "
            f"`{run.task.teacher_logits}`."
        ]
    link = origin(run.config.teacher.checkpoint).text
    if run.config.teacher.is_ready_made:
        return [
            f"**Teacher**: {link}, a classifier that was trained before this experiment; sha256 of its files "
            f"`{run.task.teacher_checkpoint}`."
        ]
    return [
        f"**Teacher**: fine-tuned from {link} on the same labels (seed {run.config.teacher_seed}); sha256 of its "
        f"base's files `{run.task.teacher_checkpoint}`."
    ]


def _members(run: SelectedRun) -> list[str]:
    """Return one line on each of several teachers."""
    lines = []
    for member, settings in run.config.members.items():
        name = "a file of logits, probabilities, or labels" if settings.is_file else origin(settings.checkpoint).text
        kind = "fine-tuned from " if settings.learns else ""
        reads = ", ".join(map(as_line, run.config.languages_of(member)))
        lines.append(f"**Teacher {as_code(member)}**: {kind}{name}; reads {reads}; weight {settings.weight:g}.")
    return lines


def _source(run: SelectedRun) -> str:
    """Return the task's source languages as text."""
    return _joined(run.task.source_languages)


def _joined(languages: Sequence[str]) -> str:
    return " and ".join(map(as_line, languages))


def _sources(run: SelectedRun) -> tuple[str, ...]:
    """Return the languages of the text that a run learned from, of translations without their originals."""
    if run.is_teacher:
        return run.config.languages_of(TEACHER)
    if _objective(run).reads_target_text:
        return _objective(run).languages or run.task.target_languages
    return (run.task.source_language, *run.config.further_sources)


def _targets(run: SelectedRun) -> tuple[str, ...]:
    """Return the languages of a run without the source languages."""
    return tuple(language for language in run.languages if language not in run.task.source_languages)


def _uses_target_text(run: SelectedRun) -> bool:
    return not run.is_teacher and uses_target_text(definitions(run.config), run.objective)


def _data(run: SelectedRun) -> str:
    if _objective(run).data == "target":
        each = " of each language" if len(_sources(run)) > 1 else ""
        amount = f"{run.config.task.target_text:,}{each}" if run.config.task.target_text else "all"
        names = " and ".join(map(as_line, _sources(run)))
        return (
            f"{amount} unlabelled texts in {names} from {_TARGET_TEXT[run.config.task.target_text_from]}, without "
            "labels. What it knows of the labels comes from its teacher."
        )
    if _objective(run).data == "parallel":
        return _translations(run)
    config, source = run.config.task, _joined(_sources(run))
    each = " of each language" if len(_sources(run)) > 1 else ""
    if run.task.other_sources:
        return _data_of_several(run)
    amounts = f"{config.labelled:,} labelled texts{each}, balanced over classes,"
    count = amounts if config.labelled else "all labelled texts"
    if run.is_teacher and run.config.teacher.is_ready_made:
        return "unknown here; see the card of the classifier."
    text = f"{count} from the {source} training split" if run.task.has_train else f"no labelled {source} texts"
    if _objective(run).data == "all" and config.unlabelled_from in _UNLABELLED:
        amount = f"{config.unlabelled:,}{each}" if config.unlabelled else "all"
        text += f", and {amount} unlabelled texts from {_UNLABELLED[config.unlabelled_from]}"
    if run.is_teacher or _uses_target_text(run):
        return text + "."
    return f"{text}. {_NO_OTHER_TEXT}"


def _translations(run: SelectedRun) -> str:
    """Describe the translations that a run learned from."""
    each = " into each of" if len(_sources(run)) > 1 else " into"
    amount = f"{run.config.task.parallel:,}" if run.config.task.parallel else "all"
    place = "a file" if run.config.task.parallel_file else "the task"
    originals = "" if _objective(run).languages else " and their originals"
    return (
        f"{amount} translations from {_source(run)}{each} {_joined(_sources(run))} from {place}{originals}, without "
        "labels. What it knows of the labels comes from its teacher, which read the originals."
    )


def _data_of_several(run: SelectedRun) -> str:
    """Describe the training text of a run on several source languages, of which a teacher may read only some."""
    if run.is_teacher and run.config.teacher.is_ready_made:
        return "unknown here; see the card of the classifier."
    config, sources = run.config.task, _source(run)

    def amount(total: int, kind: str) -> str:
        if not total and config.keeps_proportions:
            return f"all {kind} texts"
        return f"{f'{total:,}' if total else 'the largest sample of'} {kind} texts {config.proportions}"

    text = f"no labelled {sources} texts"
    if run.task.has_train:
        balanced = ", balanced over classes in each language" if config.labelled else ""
        text = f"{amount(config.labelled, 'labelled')}{balanced}, from the {sources} training splits"
    if _objective(run).data == "all" and config.unlabelled_from in _UNLABELLED:
        text += f", and {amount(config.unlabelled, 'unlabelled')} from {_UNLABELLED[config.unlabelled_from]}"
    if run.is_teacher and set(_sources(run)) < set(run.task.source_languages):
        text += f", of which it read {_joined(_sources(run))}"
    return f"{text}." if run.is_teacher or _uses_target_text(run) else f"{text}. {_NO_OTHER_TEXT}"


def _options(settings: ModelConfig) -> str:
    """Return the settings of training that are not the usual ones."""
    usual, lora = ModelConfig(), settings.lora
    rates = {"b1": settings.adam_b1, "b2": settings.adam_b2, "eps": settings.adam_eps}
    different = rates != {"b1": usual.adam_b1, "b2": usual.adam_b2, "eps": usual.adam_eps}
    facts = [
        settings.schedule != usual.schedule and f"schedule: {settings.schedule}",
        different and ", ".join(f"{name} {value:g}" for name, value in rates.items()),
        settings.layer_decay < 1 and f"multiplied by {settings.layer_decay:g} per layer from the head down",
        settings.reinit_layers and f"the last {settings.reinit_layers} layers started from random numbers",
        settings.ema_decay and f"the weights are a moving average with a decay of {settings.ema_decay:g}",
        lora.rank
        and f"LoRA of rank {lora.rank} and alpha {lora.alpha:g} on {', '.join(map(as_code, lora.targets))}, merged",
    ]
    return "".join(f"; {fact}" for fact in facts if fact)


def _length(run: SelectedRun) -> str:
    if run.settings.known_steps is not None:
        return f"{run.settings.steps:,} steps"
    steps = read_metrics(run.directory)[-1][PLANNED_STEPS]
    return f"{steps:,} steps (epochs: {run.settings.epochs:g})"


def _protocol(run: SelectedRun) -> str:
    return PROTOCOLS[run.selection].text(len(run.task.source_languages))


def _patience(run: SelectedRun) -> str:
    patience = run.settings.patience
    return f"; stops early after {patience} evaluations without a better score" if patience else ""


def _selected_by(run: SelectedRun) -> str:
    metric = run.config.selection_metric
    return "" if metric == "accuracy" else f", by {as_code(metric)}"


def _averaged(run: SelectedRun) -> str:
    return f", at most {run.settings.average_last}" if run.item == AVERAGE else ""


def _frozen(run: SelectedRun) -> str:
    patterns = run.settings.frozen
    return f"; frozen: {', '.join(map(as_code, patterns))}" if patterns else ""


def _results(run: SelectedRun, scores: Sequence[Scores]) -> str:
    head = "## Results\n\n"
    if not scores:
        return (
            f"{head}None: this checkpoint had not been evaluated when it was exported. Run `python -m "
            "xtransfer.evaluate`, and export it again."
        )
    names = [name for name in _scored(scores) if METRICS[name].is_share]  # the table is in percent
    lines: list[tuple[str, ...]] = []
    for split in dict.fromkeys(entry.split for entry in scores):
        by_language = {entry.language: entry for entry in scores if entry.split == split}
        for language, entry in by_language.items():
            source = " (source)" if language in run.task.source_languages else ""
            cells = [_percent(entry.values.get(name)) for name in (*names, CHANCE)]
            lines.append((f"{as_line(language)}{source}", split, *cells, f"{entry.count:,}"))
        targets = _targets(run)
        if len(targets) > 1 and all(language in by_language for language in targets):  # no average is taken over fewer
            means = [fmean(by_language[language].values[name] for language in targets) for name in names]
            lines.append(("mean of targets", split, *map(_percent, means), "", ""))
    column, meaning = _CHANCES[run.task.multi_label]
    header = ("language", "split", *map(_title_of, names), column, "examples")
    table = "\n".join(table_writer.markdown(Table(header, tuple(lines), text_columns=2)))
    missing = [language for language in run.languages if language not in {entry.language for entry in scores}]
    absent = f" Not evaluated in {', '.join(missing)}." if missing else ""
    return (
        f"{head}In %, for this one run ({RunId(run.workdir.draw, run.seed)}). Its checkpoint is the "
        f"{_protocol(run)} (`{run.selection}`){_zero_shot(run)}.{absent}\n\n{table}\n\n"
        f"{meaning}"
    )


def _scored(scores: Sequence[Scores]) -> list[str]:
    """Return the metrics that the scores have, without those of single classes."""
    return [name for name in METRICS if any(name in entry.values for entry in scores)]


def _zero_shot(run: SelectedRun) -> str:
    if run.is_teacher:
        return ""
    if _uses_target_text(run):
        labels = "; labels in target languages were used for these scores only"
        return f"{labels}. The model **{TARGET_TEXT_MARK}**, without labels"
    return "; labels in the other languages were used for these scores only"


def _limits(run: SelectedRun) -> str:
    tested = f"Languages other than {', '.join(map(as_line, run.languages))} are untested."
    return (
        f"## Limits\n\n- {tested}\n"
        f"- Texts are truncated to {run.settings.max_length} tokens; training saw no longer ones.\n"
        "- This is one run. Another sample of labels, another teacher, or another seed gives other numbers.\n"
        "- It has the biases of its base checkpoint and of its data."
    )


def _licence(run: SelectedRun) -> str:
    base = origin(run.settings.checkpoint)
    known = f" (`{base.licence}`, according to its card)" if base.licence else ""
    is_taught = not run.is_teacher and _objective(run).teacher == "monolingual"
    teacher = "model" if run.config.teacher.is_file else "checkpoint"
    others = f"of the teacher's {teacher} and of the data" if is_taught else "of the data"
    return (
        f"## Licence\n\nThe weights derive from {base.text}, so its licence applies to them{known}. The terms {others} "
        "may apply as well."
    )


def _front_matter(run: SelectedRun, scores: Sequence[Scores], by_transformers: bool) -> str:
    from huggingface_hub import ModelCardData

    base, task, run_name = origin(run.settings.checkpoint), run.task, RunId(run.workdir.draw, run.seed)
    tags = ["text-classification", "xtransfer", f"task:{task.name}"]
    if not run.is_teacher:
        kind = "uses-target-text" if _uses_target_text(run) else "zero-shot-transfer"
        tags += ["cross-lingual", kind, f"objective:{run.objective}"]
    tags += ["synthetic-data"] if task.synthetic else []
    data = ModelCardData(
        language=_language_codes(run.languages) or None,
        license=base.licence,
        library_name="transformers" if by_transformers else "xtransfer",
        pipeline_tag="text-classification" if by_transformers else None,
        tags=tags,
        base_model=base.hub_id,
        metrics=[_HUB_METRICS.get(name, name) for name in _scored(scores)] or None,
        model_name=f"{task.name}-{run.objective}-{str(run_name).replace(' ', '-')}" if scores else None,
        eval_results=[result for entry in scores for result in _eval_results(run, entry)] or None,
    )
    return data.to_yaml()


def _eval_results(run: SelectedRun, scores: Scores) -> "list[EvalResult]":
    from huggingface_hub import EvalResult

    synthetic = ", synthetic" if run.task.synthetic else ""
    marked = f", {TARGET_TEXT_MARK}" if _uses_target_text(run) else ""
    return [
        EvalResult(
            task_type="text-classification",
            dataset_type=run.task.name,
            dataset_name=f"{run.task.name} ({scores.language}{synthetic}{marked})",
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
    """Return the ISO 639 codes that the hub accepts, for tags like de, deu_Latn, and pt-BR; other names have none."""
    codes = (re.split(r"[-_]", language)[0].lower() for language in languages)
    return list(dict.fromkeys(code for code in codes if re.fullmatch(r"[a-z]{2,3}", code)))


def _title_of(metric: str) -> str:
    return metric.replace("_", " ")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}".removesuffix("%")
