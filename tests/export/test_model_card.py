"""The model card: its text, and front matter that the hub's own parser accepts."""

import dataclasses
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from xtransfer.config import ExperimentConfig, ModelConfig, ObjectiveConfig, TaskConfig, TeacherConfig, TransferConfig
from xtransfer.distillation.objectives import OBJECTIVES
from xtransfer.evaluation.results import ROW
from xtransfer.export.model_card import model_card, scores_of
from xtransfer.runs.find import SelectedRun
from xtransfer.runs.workdir import TaskRecord, Workdir

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
    teacher=TeacherConfig(checkpoint="org/english@v1", steps=30, max_length=99),
    student=ModelConfig(checkpoint="org/multilingual", steps=60, batch_size=8, learning_rate=3e-5, max_length=77),
    transfer=TransferConfig(temperature=2.0),
)


def selected_run(objective="monox_kd", seed=3, step=40, selection="source_dev", config=CONFIG, task=TASK):
    root = Workdir(Path("/secret/run"))
    directory = root.teacher if objective == "teacher" else root.student(objective, seed)
    return SelectedRun(root, config, task, objective, seed, directory, selection, step)


def rows(values, count=400, **changes):
    """Return result rows for `values`: language -> (accuracy, macro-F1, share of the majority class)."""
    base = {
        "task": "topics",
        "objective": "monox_kd",
        "draw": "default",
        "seed": 3,
        "step": 40,
        "selection": "source_dev",
    }
    names = ("accuracy", "macro_f1", "majority_share")
    result_rows = [
        base | {"split": "test", "language": language, "metric": name, "value": value, "count": count} | changes
        for language, numbers in values.items()
        for name, value in zip(names, numbers, strict=True)
    ]
    assert all(row.keys() == ROW.keys() for row in result_rows)
    return result_rows


ROWS = rows({"nob_Latn": (0.61, 0.5, 0.4), "eng_Latn": (0.905, 0.9, 0.4), "deu_Latn": (0.72, 0.7, 0.4)})


def read(text):
    """Parse the card as the hub's client does."""
    card = ModelCard(text)
    assert card.text.lstrip().startswith("# ")
    return card


def test_a_metric_beyond_1_is_in_the_front_matter_and_not_in_the_table_in_percent():
    more = [ROWS[0] | {"metric": name, "value": value} for name, value in (("log_loss", 1.25), ("class_f1/a", 0.5))]
    text = model_card(selected_run(), [*ROWS, *more])
    assert read(text).data.metrics == ["accuracy", "f1", "log_loss"]
    assert [r.metric_value for r in read(text).data.eval_results if r.metric_type == "log_loss"] == [1.25]
    assert "125" not in text and "| language | split | accuracy | macro f1 | majority class | examples |" in text


def test_another_way_to_select_and_to_stop_is_named():
    config = dataclasses.replace(
        CONFIG, selection_metric="log_loss", student=dataclasses.replace(CONFIG.student, patience=3)
    )
    text = model_card(selected_run(config=config), ROWS)
    assert "split (`source_dev`, by `log_loss`)." in text
    assert "; stops early after 3 evaluations without a better score." in text
    usual = model_card(selected_run(), ROWS)
    assert "by `" not in usual and "stops early" not in usual


def test_the_front_matter_has_the_hubs_fields():
    data = read(model_card(selected_run(), ROWS)).data
    assert data.language == ["eng", "deu", "nob"]
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-classification")
    assert (data.base_model, data.license, data.metrics) == ("org/multilingual", None, ["accuracy", "f1"])
    assert {"xtransfer", "cross-lingual", "task:topics", "objective:monox_kd"} <= set(data.tags)
    assert "synthetic-data" not in data.tags
    assert data.model_name == "topics-monox_kd-seed-3"
    results = [
        (r.dataset_type, r.dataset_config, r.dataset_split, r.metric_type, r.metric_value) for r in data.eval_results
    ]
    assert results == [
        ("topics", language, "test", metric, value)
        for language, values in (("eng_Latn", (0.905, 0.9)), ("deu_Latn", (0.72, 0.7)), ("nob_Latn", (0.61, 0.5)))
        for metric, value in zip(("accuracy", "f1"), values, strict=True)
    ]


def test_norwegian_is_not_a_boolean():
    """A bare `no` is false in YAML."""
    task = replace(TASK, source_language="no", target_languages=("zh-CN", "zh-TW", "Deutsch", "on"))
    assert read(model_card(selected_run(task=task), [])).data.language == ["no", "zh", "on"]


def test_the_results_table():
    text = model_card(selected_run(), ROWS)
    table = [line for line in text.splitlines() if line.count("|") == 7]
    assert table == [
        "| language | split | accuracy | macro f1 | majority class | examples |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        r"| eng_Latn (source) | test | 90.5 | 90.0 | 40.0 | 400 |",
        r"| deu_Latn | test | 72.0 | 70.0 | 40.0 | 400 |",
        r"| nob_Latn | test | 61.0 | 50.0 | 40.0 | 400 |",
        "| mean of targets | test | 66.5 | 60.0 |  |  |",
    ]
    assert "the best on the source language's dev split (`source_dev`); labels in the other languages" in text


def test_only_rows_of_this_checkpoint_count():
    others = {
        "task": "x",
        "objective": "vanilla",
        "draw": "sample-1-teacher-0",
        "seed": 4,
        "step": 60,
        "selection": "last",
    }
    wrong = [row for key, value in others.items() for row in rows({"eng_Latn": (0.1, 0.1, 0.1)}, **{key: value})]
    assert scores_of(selected_run(), wrong) == []
    assert model_card(selected_run(), wrong + ROWS) == model_card(selected_run(), ROWS)


def test_the_mean_is_omitted_if_a_language_is_missing():
    text = model_card(selected_run(), [row for row in ROWS if row["language"] != "nob_Latn"])
    assert "mean of targets" not in text
    assert "Not evaluated in nob_Latn." in text


def test_two_splits_are_two_groups():
    text = model_card(selected_run(), ROWS + rows({"eng_Latn": (0.5, 0.25, 0.4)}, split="dev"))
    assert text.index("| nob_Latn | test") < text.index("| eng_Latn (source) | dev | 50.0 | 25.0 | 40.0 | 400 |")
    assert text.count("mean of targets") == 1


def test_a_card_without_results_says_so():
    card = read(model_card(selected_run(), []))
    assert "None: this checkpoint had not been evaluated when it was exported." in card.text
    assert card.data.eval_results is None and card.data.metrics is None


def test_synthetic_data_is_mentioned_first():
    card = read(model_card(selected_run(task=replace(TASK, synthetic=True)), ROWS))
    assert "synthetic-data" in card.data.tags
    assert card.text.index("(synthetic)") < card.text.index("> **Synthetic data.**") < card.text.index("## ")
    assert "ynthetic" not in model_card(selected_run(), ROWS)


def test_results_at_chance_are_mentioned_first():
    """With a majority share of one half, 220 right answers of 400 have p = 0.026, and 210 have p = 0.17."""
    values = {"eng_Latn": (0.55, 0.5, 0.5), "deu_Latn": (0.525, 0.5, 0.5), "nob_Latn": (0.5, 0.4, 0.5)}
    text = model_card(selected_run(), rows(values))
    assert "> **At chance** in deu_Latn (test), nob_Latn (test): " in text
    assert text.index("At chance") < text.index("## ")
    assert "At chance" not in model_card(selected_run(), ROWS)


def test_a_mean_pooled_model_is_not_for_transformers():
    config = replace(CONFIG, student=replace(CONFIG.student, pooling="mean"))
    card = read(model_card(selected_run(config=config), ROWS))
    assert "> **Not for `transformers`.**" in card.text and "pipeline(" not in card.text
    assert "python -m xtransfer.predict" in card.text
    assert (card.data.library_name, card.data.pipeline_tag) == ("xtransfer", None)
    usual = model_card(selected_run(), ROWS)
    assert "Not for" not in usual and 'pipeline("text-classification", model="DIRECTORY", truncation=True)' in usual


@pytest.mark.parametrize(
    ("kind", "phrase"),
    [
        ("split", "all unlabelled texts from the unlabelled split."),
        ("train_rest", "all unlabelled texts from the rest of the training split."),
        ("file", "all unlabelled texts from another file."),
        ("none", "from the eng_Latn training split."),
    ],
)
def test_the_source_of_the_unlabelled_text_is_described(kind, phrase):
    config = replace(CONFIG, task=replace(CONFIG.task, unlabelled_from=kind, unlabelled_file="/secret/file"))
    assert f"{phrase} Fine-tuning used no text in another language." in model_card(selected_run(config=config), [])


def test_every_source_of_unlabelled_text_is_covered_above():
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
def test_the_method_is_described(objective, method, teacher, data):
    text = model_card(selected_run(objective), [])
    line = next(line for line in text.splitlines() if line.startswith("- **Method**"))
    assert f"`{objective}`, {method}" in line
    assert ("temperature 2" in line) == (OBJECTIVES[objective].soft_weight > 0)
    teachers = [line for line in text.splitlines() if line.startswith("- **Teacher**")]
    assert len(teachers) == (teacher is not None) and all(teacher in line for line in teachers)
    assert "200 labelled texts, balanced over classes, from the eng_Latn training split" in text and data in text


def test_the_card_has_the_settings_of_its_objective():
    objective = {
        "monox_kd": ObjectiveConfig(temperature=0.5),
        "mix": ObjectiveConfig(base="monox_pl", class_weights=("art|music=2",)),
        "teacher": ObjectiveConfig(focal_gamma=2.0),
    }
    config = replace(CONFIG, objective=objective)
    methods = [model_card(selected_run(name, config=config), []) for name in (*objective, "self_training")]
    assert "(knowledge distillation, temperature 0.5).\n" in methods[0]
    assert (
        "`mix`, trained on gold labels, and a monolingual teacher's prediction where there is no label. Loss: "
        "CE(labels and the teacher's predictions; class weights art\\|music=2) on labelled and unlabelled text.\n"
    ) in methods[1]
    assert "- **Teacher**: fine-tuned from" in methods[1] and "objective:mix" in methods[1]
    assert "fine-tuned on eng_Latn labels. Loss: CE(labels; focal loss with γ = 2) on labelled text.\n" in methods[2]
    assert "temperature 2)." in methods[3]  # the common one


def test_every_objective_has_a_card():
    for objective in OBJECTIVES:
        assert f"# topics: {objective} student from org/multilingual" in model_card(selected_run(objective), [])


def test_the_pseudo_label_threshold_is_described():
    config = replace(CONFIG, transfer=replace(CONFIG.transfer, threshold=0.9))
    assert "prediction if it is at least 90% sure where there is no label" in model_card(
        selected_run("monox_pl", config=config), []
    )


def test_the_card_of_a_teacher():
    teacher_rows = rows({"eng_Latn": (0.9, 0.9, 0.4)}, objective="teacher", seed=0)
    card = read(model_card(selected_run("teacher", seed=0), teacher_rows))
    assert card.text.lstrip().startswith("# topics: monolingual teacher from org/english\n")
    assert "It is for eng_Latn only." in card.text and "cross-lingual" not in card.data.tags
    assert card.data.language == ["eng"] and card.data.base_model == "org/english"
    assert "[org/english](https://huggingface.co/org/english) at `v1`, sha256 of its files `" + "a" * 64 in card.text
    assert "mean of targets" not in card.text and "- **Teacher**" not in card.text


def test_the_training_is_described():
    text = model_card(selected_run(), [])
    assert "60 steps of 8 examples of at most 77 tokens" in text and "learning rate of 3e-05" in text
    assert "step 40, the best on the source language's dev split (`source_dev`)" in text
    assert "seed 3." in text and "sha256 of its files `" + "b" * 64 in text
    assert "step 60, the last checkpoint (`last`)" in model_card(selected_run(step=60, selection="last"), [])


def test_the_licence_is_taken_from_the_base_checkpoint():
    text = model_card(selected_run(), [])
    assert "The weights derive from [org/multilingual](https://huggingface.co/org/multilingual), so its licence" in text
    assert "The terms of the teacher's checkpoint and of the data may apply as well." in text
    for objective in ("vanilla", "self_training", "teacher"):  # trained without another checkpoint
        without = model_card(selected_run(objective), [])
        assert "The terms of the data may apply as well." in without and "teacher's checkpoint" not in without
    embedded = replace(CONFIG, student=replace(CONFIG.student, checkpoint="mini-bert-multilingual"))
    card = read(model_card(selected_run("vanilla", config=embedded), []))
    assert card.data.license == "apache-2.0" and card.data.base_model is None
    assert "applies to them (`apache-2.0`, according to its card). The terms of the data" in card.text


def test_class_names_cannot_break_their_table():
    text = model_card(selected_run(), [])
    assert "into one of the 3 classes" in text and r"| 1 | `art\|music` |" in text


def test_no_local_directory_is_disclosed():
    config = replace(CONFIG, student=replace(CONFIG.student, checkpoint="/secret/models/mine"))
    text = model_card(selected_run(config=config), ROWS)
    assert "secret" not in text and "`mine` (a local directory)" in text
    assert read(text).data.base_model is None
