"""The settings of an objective: what it inherits, what it refuses, and objectives that a config defines."""

import dataclasses

import pytest

from xtransfer import config
from xtransfer.config import ExperimentConfig
from xtransfer.distillation.objectives import (
    OBJECTIVES,
    check_classes,
    configured_objective,
    configured_objectives,
    definitions,
    effective_settings,
    teacher_objective,
)
from xtransfer.errors import ConfigError

MIX = {"base": "monox_kd", "hard_weight": 0.5, "soft_weight": 0.5, "temperature": 2.0}


def parsed(objective=None, objectives=tuple(OBJECTIVES), **transfer) -> ExperimentConfig:
    return config.parse({"objective": objective or {}, "objectives": objectives, "transfer": transfer})


def test_without_settings_the_objectives_are_those_of_the_table():
    assert definitions(ExperimentConfig()) == OBJECTIVES
    assert teacher_objective(ExperimentConfig()) == dataclasses.replace(OBJECTIVES["vanilla"], name="teacher")


def test_an_objective_takes_its_own_setting_or_else_the_common_one():
    both = parsed(
        {"monox_kd": {"temperature": 2.0}, "monox_pl": {"focal_gamma": 1.0}}, temperature=0.5, focal_gamma=3.0
    )
    defined = definitions(both)
    assert defined["monox_kd"] == dataclasses.replace(OBJECTIVES["monox_kd"], temperature=2.0)
    assert defined["self_training"] == dataclasses.replace(OBJECTIVES["self_training"], temperature=0.5)
    # A loss without a soft term has no temperature, and one without a hard term no focal loss.
    assert defined["vanilla"] == dataclasses.replace(OBJECTIVES["vanilla"], focal_gamma=3.0)
    assert defined["monox_pl"] == dataclasses.replace(OBJECTIVES["monox_pl"], focal_gamma=1.0)


def test_a_common_setting_can_be_turned_off():
    off = {"class_weights": (), "confidence_weighted": False, "label_smoothing": 0.0}
    common = {"class_weights": ("balanced",), "confidence_weighted": True, "label_smoothing": 0.1}
    defined = definitions(parsed({"monox_pl": off}, **common))
    assert defined["monox_pl"] == OBJECTIVES["monox_pl"]
    expected = dataclasses.replace(OBJECTIVES["vanilla"], class_weights=("balanced",), label_smoothing=0.1)
    assert defined["vanilla"] == expected


def test_the_teacher_takes_no_common_setting():
    common = {"label_smoothing": 0.1, "class_weights": ("balanced",)}
    assert teacher_objective(parsed(**common)) == teacher_objective(ExperimentConfig())
    assert teacher_objective(parsed({"teacher": {"label_smoothing": 0.2}}, **common)).label_smoothing == 0.2


def test_an_objective_of_your_own():
    own = parsed({"mix": MIX | {"data": "labelled"}}, ("vanilla", "mix"), temperature_on="both")
    expected = dataclasses.replace(
        OBJECTIVES["monox_kd"],
        name="mix",
        hard_weight=0.5,
        soft_weight=0.5,
        temperature=2.0,
        temperature_on="both",
        data="labelled",
    )
    assert [objective.name for objective in configured_objectives(own)] == ["vanilla", "mix"]
    assert configured_objective(own, "mix") == expected
    assert list(definitions(own)) == [*OBJECTIVES, "mix"]


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (
            {"monoxkd": {"temperature": 2.0}},
            "config key objective.monoxkd: no objective 'monoxkd'; did you mean 'monox_kd'?",
        ),
        ({"mix": {"base": "monox"}}, "config key objective.mix.base is 'monox': choose one of vanilla, monox_kd"),
        ({"mix": {"hard_weight": 0.5}}, "to define it, set objective.mix.base to one of vanilla, monox_kd"),
        ({"monox_kd": {"teacher": "vanilla"}}, "config key objective.monox_kd.teacher: what monox_kd reads is fixed"),
        ({"vanilla": {"data": "all"}}, "config key objective.vanilla.data: what vanilla reads is fixed"),
        ({"teacher": {"base": "vanilla"}}, "config key objective.teacher.base: what teacher reads is fixed"),
        ({"Vanilla": MIX}, "config key objective.Vanilla: it looks like 'vanilla'; choose another name"),
        (
            {"vanilla": {"temperature": 2.0}},
            "config key objective.vanilla.temperature is 2.0, but vanilla has no soft term",
        ),
        ({"teacher": {"scale_by_t2": False}}, "objective.teacher.scale_by_t2 is False, but teacher has no soft term"),
        ({"monox_kd": {"threshold": 0.5}}, "objective.monox_kd.threshold is 0.5, but monox_kd has no pseudo-labels"),
        ({"vanilla": {"confidence_weighted": True}}, "confidence_weighted is True, but vanilla has no pseudo-labels"),
        ({"monox_kd": {"label_smoothing": 0.1}}, "label_smoothing is 0.1, but monox_kd has no hard term (hard_weight)"),
        ({"self_training": {"focal_gamma": 1.0}}, "focal_gamma is 1.0, but self_training has no hard term"),
        (
            {"monox_kd": {"class_weights": ("balanced",)}},
            "class_weights is ('balanced',), but monox_kd has no hard term",
        ),
        (
            {"vanilla": {"soft_weight": 1.0}},
            "objective 'vanilla': teacher = 'none', expected 'monolingual' or another objective",
        ),
        (
            {"vanilla": {"hard_weight": 0.0}},
            "objective 'vanilla': soft_weight = 0.0, expected above 0 if hard_weight is 0",
        ),
        ({"mix": MIX | {"soft_weight": 0.0, "temperature": None}}, "'mix': teacher = 'monolingual', expected 'none'"),
        (
            {"mix": {"base": "monox_pl", "data": "labelled"}},
            "'mix': pseudo_labels = True, expected false, or data 'all'",
        ),
        (
            {"vanilla": {"label_smoothing": 1.0}},
            "'vanilla': label_smoothing = 1.0, expected a number from 0 to below 1",
        ),
        ({"vanilla": {"class_weights": ("a=0",)}}, "objective 'vanilla': class_weights has 'a=0'"),
    ],
)
def test_settings_that_make_no_sense_are_refused_even_for_objectives_that_are_not_trained(objective, message):
    with pytest.raises(ConfigError) as caught:
        configured_objectives(parsed(objective, ("monox_kd",)))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        (
            ("mixx",),
            "config key objectives: no objective 'mixx'; choose from vanilla, monox_kd, monox_pl, self_training, ",
        ),
        (("mixx",), "self_training, mix; did you mean 'mix'?"),
        (("teacher",), "config key objectives: no objective 'teacher'"),
        (("control", "vanilla"), "control learns from the student of 'vanilla'; list that one before it"),
    ],
)
def test_a_list_of_objectives_that_cannot_be_trained_is_refused(objectives, message):
    own = {"mix": MIX, "control": {"base": "self_training"}}
    with pytest.raises(ConfigError) as caught:
        configured_objectives(parsed(own, objectives))
    assert message.replace("self_training, mix", "self_training, control, mix") in str(caught.value)


def test_the_teacher_is_no_objective_even_with_settings():
    with pytest.raises(ConfigError, match="'teacher' is trained in any case; leave it out"):
        configured_objectives(parsed({"teacher": {"focal_gamma": 1.0}}, ("teacher",)))


def test_effective_settings_are_lines_for_people():
    settings = {
        "mix": MIX | {"scale_by_t2": True, "temperature_on": "both", "class_weights": ("bad=2",)},
        "monox_pl": {"threshold": 0.9, "confidence_weighted": True, "focal_gamma": 2.0, "label_smoothing": 0.0},
        "teacher": {"class_weights": ("balanced",)},
    }
    shown = parsed(settings, ("vanilla", "monox_pl", "self_training", "mix"), label_smoothing=0.1)
    assert effective_settings(shown) == {
        "teacher": "CE(labels; class weights balanced) on labelled text",
        "vanilla": "CE(labels; label smoothing 0.1) on labelled text",
        "monox_pl": "CE(labels and the teacher's predictions; focal loss with γ = 2, predictions from a confidence of "
        "0.9, predictions weighted by confidence) on labelled and unlabelled text",
        "self_training": "KL(the vanilla student's logits; T = 1) on labelled and unlabelled text",
        "mix": "0.5 · CE(labels; class weights bad=2, label smoothing 0.1) + 0.5 · KL(the teacher's logits; T = 2, on "
        "both sides, times T²) on labelled and unlabelled text",
    }


@pytest.mark.parametrize(
    "setting",
    [{"class_weights": ("balanced",)}, {"label_smoothing": 0.1}, {"focal_gamma": 1.0}, {"confidence_weighted": True}],
)
def test_factors_of_one_label_are_refused_in_a_multi_label_task(setting):
    config_of_task = parsed({"monox_pl": setting})
    check_classes(config_of_task, ("a", "b"))
    with pytest.raises(ConfigError, match=rf"^objective 'monox_pl': {next(iter(setting))} = .*this one is multi-label"):
        check_classes(config_of_task, ("a", "b"), multi_label=True)
