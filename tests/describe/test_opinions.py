"""What `describe` says about a teacher before any student is trained, from a file and from a workdir's store."""

import json
import math

import numpy as np
import pytest

from tests.helpers import tiny
from xtransfer import main
from xtransfer.config import load
from xtransfer.describe import __main__ as command
from xtransfer.describe.dataset import describe, transfer_rows
from xtransfer.errors import UserError
from xtransfer.runs.workdir import Workdir

FLAGS = ["--config.objectives=('vanilla','monox_kd','self_training')", "--config.task.labelled=24"]
FAST = ["--config.teacher.steps=4", "--config.student.steps=2", "--config.student.evaluations=1"]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    """Write a config file whose teacher and student have the same tokenizer and length."""
    root = tmp_path_factory.mktemp("config_file")
    data = tiny.write_task(root / "data")
    teacher, student = tiny.checkpoint(root / "teacher", seed=1), tiny.checkpoint(root / "student", seed=2, hidden=8)
    return tiny.config_file(root / "tiny.py", data, teacher, student)


def test_the_entropy_and_the_classes_of_a_file_by_hand(config_file, tmp_path, capsys):
    path = tmp_path / "soft.jsonl"
    flags = [*FLAGS, f"--config.teacher.logits_file={path}"]
    rows = list(transfer_rows(load(str(config_file), flags)))
    assert len(rows) == 64 and rows[0]["id"].startswith("files/train/en/")
    describe(load(str(config_file), flags), 2)  # the file may be missing, because its ids come from here
    answers = [{"id": row["id"], "probabilities": {"bad": 0.25, "good": 0.75}} for row in rows]
    answers[30]["probabilities"] = {"bad": 1.0}
    path.write_text("".join(json.dumps(row) + "\n" for row in answers))
    labelled, unlabelled = describe(load(str(config_file), flags), 2).opinions
    one = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert (labelled.name, labelled.examples, labelled.classes) == ("L", 24, (0, 24))
    assert labelled.entropy == pytest.approx(one) and labelled.agreement == 0.5  # 12 of 24 are good
    assert (unlabelled.name, unlabelled.examples, unlabelled.classes) == ("U", 40, (1, 39))
    assert unlabelled.entropy == pytest.approx(one * 39 / 40, abs=1e-6) and unlabelled.agreement is None
    command.main(["--config", str(config_file), *flags])
    page = capsys.readouterr().out
    assert "| labels | en | L | 24 | 12 (50.0%) | 12 (50.0%) | – | – | – |" in page
    assert "| teacher | en | U | 40 | 1 (2.5%) | 39 (97.5%) | 0.548 | – | – |" in page


def test_the_stored_logits_of_the_teacher_are_described_and_not_those_of_the_vanilla_student(config_file, tmp_path):
    main.main(["--config", str(config_file), "--workdir", str(tmp_path / "run"), *FLAGS, *FAST])
    opinions = describe(load(str(config_file), [*FLAGS, *FAST]), 2, Workdir(tmp_path / "run")).opinions
    assert [(opinion.teacher, opinion.name, opinion.examples) for opinion in opinions] == [
        ("teacher", "L", 24),
        ("teacher", "U", 40),
    ]
    stores = sorted((tmp_path / "run" / "logits").iterdir())
    assert len(stores) == 2
    entropies = []
    for store in stores:
        z = np.load(store / "shard-00000.npy").astype(np.float64)
        q = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        entropies.append(-(q * np.log(q)).sum(1).mean())
    measured = (24 * opinions[0].entropy + 40 * opinions[1].entropy) / 64
    costs = [json.loads(line) for line in (tmp_path / "run" / "costs.jsonl").read_text().splitlines()]
    assert {cost["run"] for cost in costs if cost["stage"] == "labelling"} == {"teacher", "students/vanilla/seed-0"}
    by_age = sorted(stores, key=lambda store: (store / "manifest.json").stat().st_mtime_ns)  # the teacher's comes first
    assert measured == pytest.approx(entropies[stores.index(by_age[0])], abs=1e-9)
    assert abs(entropies[0] - entropies[1]) > 1e-6


def test_a_workdir_without_logits_is_refused(config_file, tmp_path):
    with pytest.raises(UserError, match="no logits are stored there"):
        command.main(["--config", str(config_file), "--workdir", str(tmp_path)])
