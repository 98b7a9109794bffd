"""The model card says what a reader has to know, in front matter that the hub's own reader takes."""

import dataclasses
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from xtransfer.config import ExperimentConfig, ModelConfig, TaskConfig, TransferConfig
from xtransfer.distillation.objectives import OBJECTIVES
from xtransfer.evaluation.results import ROW
from xtransfer.export.model_card import model_card, scores_of
from xtransfer.runs.find import SelectedRun, TaskRecord
from xtransfer.runs.workdir import Workdir

TASK = TaskRecord(
    name="topics",
    labels=("sport", "art|music", "other"),
    synthetic=False,
    source_language="eng_Latn",
    target_languages=("deu_Latn", "nob_Latn"),
    teacher_checkpoint="a" * 64,
    student_checkpoint="b" * 64,
)
CONFIG = ExperimentConfig(
    task=TaskConfig(name="files", data_dir="/secret/data", labelled=200, unlabelled_from="train_rest"),
    teacher=ModelConfig(checkpoint="org/english@v1", steps=30, max_length=99),
    student=ModelConfig(checkpoint="org/multilingual", steps=60, batch_size=8, learning_rate=3e-5, max_length=77),
    transfer=TransferConfig(temperature=2.0),
)


def chosen(objective="monox_kd", seed=3, step=40, selection="source_dev", config=CONFIG, task=TASK):
    root = Workdir(Path("/secret/run"))
    directory = root.teacher if objective == "teacher" else root.student(objective, seed)
    return SelectedRun(root, config, task, objective, seed, directory, selection, step)


def rows(values, count=400, **changes):
    """language -> (accuracy, macro-F1, most frequent class's share)."""
    base = {"task": "topics", "objective": "monox_kd", "seed": 3, "step": 40, "selection": "source_dev"}
    names = ("accuracy", "macro_f1", "majority_share")
    made = [
        base | {"split": "test", "language": language, "metric": name, "value": value, "count": count} | changes
        for language, numbers in values.items()
        for name, value in zip(names, numbers, strict=True)
    ]
    assert all(row.keys() == ROW.keys() for row in made)
    return made


ROWS = rows({"nob_Latn": (0.61, 0.5, 0.4), "eng_Latn": (0.905, 0.9, 0.4), "deu_Latn": (0.72, 0.7, 0.4)})


def read(text):
    """The card as the hub's client reads it."""
    card = ModelCard(text)
    assert card.text.lstrip().startswith("# ")
    return card


def test_the_front_matter_is_what_the_hub_wants():
    data = read(model_card(chosen(), ROWS)).data
    assert data.language == ["eng", "deu", "nob"]
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-classification")
    assert (data.base_model, data.license, data.metrics) == ("org/multilingual", None, ["accuracy", "f1"])
    assert {"xtransfer", "cross-lingual", "task:topics", "objective:monox_kd"} <= set(data.tags)
    assert "synthetic-data" not in data.tags
    assert data.model_name == "topics-monox_kd-seed-3"
    found = [
        (r.dataset_type, r.dataset_config, r.dataset_split, r.metric_type, r.metric_value) for r in data.eval_results
    ]
    assert found == [
        ("topics", language, "test", metric, value)
        for language, values in (("eng_Latn", (0.905, 0.9)), ("deu_Latn", (0.72, 0.7)), ("nob_Latn", (0.61, 0.5)))
        for metric, value in zip(("accuracy", "f1"), values, strict=True)
    ]


def test_norwegian_is_no_boolean():
    """A bare `no` is false in YAML."""
    task = replace(TASK, source_language="no", target_languages=("zh-CN", "zh-TW", "Deutsch", "on"))
    assert read(model_card(chosen(task=task), [])).data.language == ["no", "zh", "on"]


def test_the_table_of_results():
    text = model_card(chosen(), ROWS)
    table = [line for line in text.splitlines() if line.count("|") == 7]
    assert table == [
        "| language | split | accuracy | macro f1 | most frequent class | examples |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        r"| eng_Latn (source) | test | 90.5 | 90.0 | 40.0 | 400 |",
        r"| deu_Latn | test | 72.0 | 70.0 | 40.0 | 400 |",
        r"| nob_Latn | test | 61.0 | 50.0 | 40.0 | 400 |",
        "| mean of targets | test | 66.5 | 60.0 |  |  |",
    ]
    assert "the best on the source language's dev split (`source_dev`); labels in the other languages" in text


def test_only_this_checkpoints_rows_count():
    others = {"task": "x", "objective": "vanilla", "seed": 4, "step": 60, "selection": "last"}
    wrong = [row for key, value in others.items() for row in rows({"eng_Latn": (0.1, 0.1, 0.1)}, **{key: value})]
    assert scores_of(chosen(), wrong) == []
    assert model_card(chosen(), wrong + ROWS) == model_card(chosen(), ROWS)


def test_an_average_is_never_taken_over_fewer_languages():
    text = model_card(chosen(), [row for row in ROWS if row["language"] != "nob_Latn"])
    assert "mean of targets" not in text
    assert "Not evaluated in nob_Latn." in text


def test_two_splits_are_two_groups():
    text = model_card(chosen(), ROWS + rows({"eng_Latn": (0.5, 0.25, 0.4)}, split="dev"))
    assert text.index("| nob_Latn | test") < text.index("| eng_Latn (source) | dev | 50.0 | 25.0 | 40.0 | 400 |")
    assert text.count("mean of targets") == 1


def test_without_results_it_says_so():
    card = read(model_card(chosen(), []))
    assert "None: this checkpoint had not been evaluated when it was exported." in card.text
    assert card.data.eval_results is None and card.data.metrics is None


def test_synthetic_data_is_said_first():
    card = read(model_card(chosen(task=replace(TASK, synthetic=True)), ROWS))
    assert "synthetic-data" in card.data.tags
    assert card.text.index("(synthetic)") < card.text.index("> **Synthetic data.**") < card.text.index("## ")
    assert "ynthetic" not in model_card(chosen(), ROWS)


def test_results_at_chance_are_said_first():
    """220 right of 400 where the most frequent class has a half: p = 0.026. 210: p = 0.17."""
    values = {"eng_Latn": (0.55, 0.5, 0.5), "deu_Latn": (0.525, 0.5, 0.5), "nob_Latn": (0.5, 0.4, 0.5)}
    text = model_card(chosen(), rows(values))
    assert "> **At chance** in deu_Latn (test), nob_Latn (test): " in text
    assert text.index("At chance") < text.index("## ")
    assert "At chance" not in model_card(chosen(), ROWS)


def test_mean_pooling_is_not_for_transformers():
    config = replace(CONFIG, student=replace(CONFIG.student, pooling="mean"))
    card = read(model_card(chosen(config=config), ROWS))
    assert "> **Not for `transformers`.**" in card.text and "pipeline(" not in card.text
    assert "python -m xtransfer.predict" in card.text
    assert (card.data.library_name, card.data.pipeline_tag) == ("xtransfer", None)
    usual = model_card(chosen(), ROWS)
    assert "Not for" not in usual and 'pipeline("text-classification", model="DIRECTORY", truncation=True)' in usual


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("split", "all unlabelled texts from the unlabelled split."),
        ("train_rest", "all unlabelled texts from the rest of the training split."),
        ("file", "all unlabelled texts from another file."),
        ("none", "from the eng_Latn training split."),
    ],
)
def test_where_the_unlabelled_text_is_from(kind, said):
    config = replace(CONFIG, task=replace(CONFIG.task, unlabelled_from=kind, unlabelled_file="/secret/file"))
    assert f"{said} Fine-tuning used no text in another language." in model_card(chosen(config=config), [])


def test_every_source_of_unlabelled_text_has_its_words():
    fields = {field.name: field for field in dataclasses.fields(TaskConfig)}
    assert set(fields["unlabelled_from"].metadata["choices"]) == {"split", "train_rest", "file", "none"}


@pytest.mark.parametrize(
    ("objective", "method", "teacher", "data"),
    [
        ("vanilla", "trained on gold labels.", None, "split. Fine-tuning used no text"),
        (
            "monox_kd",
            "trained on a monolingual teacher's class probabilities",
            "org/english",
            "and all unlabelled texts from the rest",
        ),
        (
            "monox_pl",
            "trained on gold labels, and a monolingual teacher's prediction",
            "org/english",
            "and all unlabelled texts from the rest of the",
        ),
        (
            "self_training",
            "trained on the vanilla student's class probabilities",
            "`vanilla`",
            "and all unlabelled texts from the rest",
        ),
    ],
)
def test_the_method_in_words(objective, method, teacher, data):
    text = model_card(chosen(objective), [])
    line = next(line for line in text.splitlines() if line.startswith("- **Method**"))
    assert f"`{objective}`, {method}" in line
    assert ("temperature 2" in line) == (OBJECTIVES[objective].soft_weight > 0)
    teachers = [line for line in text.splitlines() if line.startswith("- **Teacher**")]
    assert len(teachers) == (teacher is not None) and all(teacher in line for line in teachers)
    assert "200 labelled texts, balanced over classes, from the eng_Latn training split" in text and data in text


def test_every_objective_has_a_card():
    for objective in OBJECTIVES:
        assert f"# topics: {objective} student from org/multilingual" in model_card(chosen(objective), [])


def test_the_threshold_of_pseudo_labels():
    config = replace(CONFIG, transfer=replace(CONFIG.transfer, threshold=0.9))
    assert "prediction if it is at least 90% sure where there is no label" in model_card(
        chosen("monox_pl", config=config), []
    )


def test_the_teacher():
    mine = rows({"eng_Latn": (0.9, 0.9, 0.4)}, objective="teacher", seed=0)
    card = read(model_card(chosen("teacher", seed=0), mine))
    assert card.text.lstrip().startswith("# topics: monolingual teacher from org/english\n")
    assert "It is for eng_Latn only." in card.text and "cross-lingual" not in card.data.tags
    assert card.data.language == ["eng"] and card.data.base_model == "org/english"
    assert "[org/english](https://huggingface.co/org/english) at `v1`, sha256 of its files `" + "a" * 64 in card.text
    assert "mean of targets" not in card.text and "- **Teacher**" not in card.text


def test_how_it_was_trained():
    text = model_card(chosen(), [])
    assert "60 steps of 8 examples of at most 77 tokens" in text and "learning rate of 3e-05" in text
    assert "step 40, the best on the source language's dev split (`source_dev`)" in text
    assert "seed 3." in text and "sha256 of its files `" + "b" * 64 in text
    assert "step 60, the last checkpoint (`last`)" in model_card(chosen(step=60, selection="last"), [])


def test_the_licence_is_the_base_checkpoints():
    text = model_card(chosen(), [])
    assert "The weights derive from [org/multilingual](https://huggingface.co/org/multilingual), so its licence" in text
    assert "The terms of the teacher's checkpoint and of the data may apply as well." in text
    for objective in ("vanilla", "self_training", "teacher"):  # no other checkpoint taught these
        without = model_card(chosen(objective), [])
        assert "The terms of the data may apply as well." in without and "teacher's checkpoint" not in without
    embedded = replace(CONFIG, student=replace(CONFIG.student, checkpoint="mini-bert-multilingual"))
    card = read(model_card(chosen("vanilla", config=embedded), []))
    assert card.data.license == "apache-2.0" and card.data.base_model is None
    assert "applies to them (`apache-2.0`, according to its card). The terms of the data" in card.text


def test_class_names_are_in_a_table_that_they_cannot_break():
    text = model_card(chosen(), [])
    assert "into one of the 3 classes" in text and r"| 1 | `art\|music` |" in text


def test_no_directory_is_told():
    config = replace(CONFIG, student=replace(CONFIG.student, checkpoint="/secret/models/mine"))
    text = model_card(chosen(config=config), ROWS)
    assert "secret" not in text and "`mine` (a local directory)" in text
    assert read(text).data.base_model is None
