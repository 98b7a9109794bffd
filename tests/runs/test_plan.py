"""The plan of an experiment: estimates by hand, and its lines."""

import pytest

from xtransfer.runs import plan
from xtransfer.runs.plan import Machine, Stage, Work

MACHINE = Machine(flops=3e9, step_seconds=0.1, compile_seconds=4.0)


def test_estimates_by_hand():
    work = Work(parameters=1_000_000, tokens=10.0)
    # A step of 33 examples: 6 · 10⁶ · 10 · 33 FLOPs at a third of 3 GFLOP/s (0.99 GFLOP/s) take 2 s, and 0.1 s more.
    assert work.training_seconds(MACHINE, steps=50, batch_size=33) == pytest.approx(50 * 2.1)
    # 330 examples: 2 · 10⁶ · 10 · 330 FLOPs.
    assert work.inference_seconds(MACHINE, examples=330) == pytest.approx(6.6 / 0.99)


def test_the_lines_are_aligned_and_a_finished_stage_costs_nothing():
    stages = [
        Stage("teacher", "100 steps of 32 examples", None),
        Stage("students", "8 × 160 steps", 100.0),
        Stage("evaluation", "16 checkpoints", 7.4),
    ]
    assert list(plan.lines(stages)) == [
        "plan, with rough times:",
        "  teacher     100 steps of 32 examples  finished",
        "  students    8 × 160 steps             about 2 min",
        "  evaluation  16 checkpoints            about 7 s",
        "  total                                 about 2 min",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "about 1 s"), (9.6, "about 10 s"), (44, "about 40 s"), (100, "about 2 min"), (7200, "about 2.0 h")],
)
def test_durations_are_rounded(seconds, text):
    (_, line, _) = plan.lines([Stage("x", "", seconds)])
    assert line.endswith(text)


def test_the_objectives_are_aligned():
    assert list(plan.objective_lines({"teacher": "CE(labels)", "mix": "KL"})) == [
        "objectives, with their effective settings:",
        "  teacher  CE(labels)",
        "  mix      KL",
    ]


def test_the_machine_is_measured():
    machine = plan.measure()
    assert machine.flops > 1e8 and machine.step_seconds > 0 and machine.compile_seconds > 0
