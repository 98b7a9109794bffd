"""What there is to see before a run: counted on tiny files, and the same as what the run then does."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import tiny
from xtransfer import config as settings
from xtransfer.config import ExperimentConfig
from xtransfer.data.batches.batches import TrainBatches
from xtransfer.data.registry import load_task
from xtransfer.data.tokens import cache as token_cache
from xtransfer.data.tokens import tokenizer as text
from xtransfer.describe import dataset
from xtransfer.describe.dataset import Description, SetSize
from xtransfer.distillation import transfer_set
from xtransfer.distillation.objectives import OBJECTIVES
from xtransfer.errors import UserError
from xtransfer.experiment import Stages
from xtransfer.runs.workdir import Workdir
from xtransfer.train import loop
from xtransfer.train.finetuning import Finetuner, Models

DEVICES = 8  # of tests/conftest.py


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 train, 8 dev and 9 test texts of en, de and fr, half of them good; the checkpoints have no weights."""
    root = tmp_path_factory.mktemp("tiny")
    data = tiny.write_task(root / "data", train=24, other=8, languages=("en", "de", "fr"))
    (data / "fr" / "train.tsv").unlink()
    (data / "de" / "dev.tsv").write_text("text\tlabel\nder Film\tugly\n")  # malformed, but never requested
    train = (data / "en" / "train.tsv").read_text().splitlines()
    test = (data / "en" / "test.tsv").read_text().splitlines()
    (data / "en" / "train.tsv").write_text("\n".join([*train[:-2], "the odd film\tbad", "the odd film\tgood", ""]))
    (data / "en" / "test.tsv").write_text("\n".join([*test[:-1], "the odd film\tbad", ""]))
    teacher, student = tiny.checkpoint(root / "teacher"), tiny.checkpoint(root / "student", seed=1)
    for directory in (teacher, student):
        (directory / "model.safetensors").rename(directory / "weights")
    return tiny.config_file(root / "tiny.py", data, teacher, student, max_length=6, row_length=24)


@pytest.fixture(scope="module")
def look(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Description]:
    cache = tmp_path_factory.mktemp("cache")

    def describe(*flags: str, batches: int = 5) -> Description:
        common = [f"--config.task.cache_dir={cache}", "--config.task.labelled=10"]
        return dataset.describe(settings.load(str(config_file), [*common, *flags]), batches)

    return describe


@pytest.fixture(scope="module")
def found(look: Callable[..., Description]) -> Description:
    return look()


def test_what_the_task_is(found: Description) -> None:
    assert (found.task, found.synthetic, found.labels) == ("files", False, ("bad", "good"))
    assert (found.source_language, found.target_languages) == ("en", ("de", "fr"))
    assert (found.devices, found.unlabelled_from, found.evaluation_splits) == (DEVICES, "train_rest", ("test",))
    assert found.models["student"].endswith("/student, up to 6 tokens")
    assert found.models["teacher"].endswith("/teacher, up to 12 tokens")


@pytest.mark.parametrize(
    ("mesh", "shards"), [((0, 1, 1), 8), ((0, 2, 2), 4), ((2, 3, 1), 6), ((0, 16, 1), 16), ((32, 1, 4), 32)]
)
def test_rows_are_of_the_mesh_that_is_asked_for_wherever_they_are_looked_at(
    look: Callable[..., Description], mesh: tuple[int, int, int], shards: int
) -> None:
    sizes = zip(("data", "fsdp", "tensor"), mesh, strict=True)
    found = look(
        *(f"--config.mesh.{axis}={size}" for axis, size in sizes), "--config.student.accumulation=2", batches=1
    )
    assert found.devices == shards
    for packing in found.packing:
        parts = shards * (2 if packing.role == "student" else 1)
        assert all(rows % parts == 0 for rows, _ in packing.filling.rows)


def test_counts(found: Description) -> None:
    assert found.counts == (
        SetSize("en", "L", 10, (5, 5), 0),
        SetSize("en", "U", 14, (0, 0), 14),
        SetSize("en", "train", 24, (12, 12), 0),
        SetSize("en", "dev", 8, (4, 4), 0),
        SetSize("en", "test", 9, (5, 4), 0),
        SetSize("de", "train", 24, (12, 12), 0),
        SetSize("de", "test", 9, (4, 5), 0),
        SetSize("fr", "dev", 8, (4, 4), 0),
        SetSize("fr", "test", 9, (4, 5), 0),
    )
    assert found.count("test").labels == (5, 4) and found.count("test", "de").labels == (4, 5)


def test_why_splits_are_not_there(found: Description) -> None:
    """One line for each reason, which names the first file."""
    lines = found.missing
    assert len(lines) == 3
    assert lines[0].startswith("unlabelled of any language: ") and "en/unlabelled.tsv: no such file" in lines[0]
    assert lines[1].startswith("dev of de: ") and "dev.tsv:2: label 'ugly' is not one of bad, good" in lines[1]
    assert lines[2].startswith("train of fr: ") and "fr/train.tsv: no such file" in lines[2]


def test_texts_that_are_there_twice(found: Description, config_file: Path) -> None:
    """ "the odd film" is twice in train, and once in test; the tiny texts repeat by themselves."""
    read = {}
    for split in ("train", "dev", "test"):
        lines = (config_file.parent / "data" / "en" / f"{split}.tsv").read_text().splitlines()[1:]
        read[split] = [line.split("\t")[0] for line in lines]
    train = set(read["train"])
    assert found.repeated["L ∪ U"] == 24 - len(train) >= 1
    assert found.repeated["test"] == len([text for text in read["test"] if text in train]) >= 1
    assert found.repeated["dev"] == len([text for text in read["dev"] if text in train])


def test_lengths_with_both_tokenizers_in_every_language(found: Description) -> None:
    sets = [(each.role, each.language, each.name, each.lengths.examples) for each in found.measured]
    source = [("en", "L", 10), ("en", "U", 14), ("en", "dev", 8), ("en", "test", 9)]
    assert sets == [
        *(("teacher", *each) for each in source),
        ("teacher", "de", "test", 9),
        ("teacher", "fr", "test", 9),
        *(("student", *each) for each in source),
        ("student", "de", "test", 9),
        ("student", "fr", "test", 9),
    ]
    by_name = {(each.role, each.language, each.name): each.lengths for each in found.measured}
    for (role, language, name), lengths in by_name.items():
        assert lengths.fertility == 1 and lengths.unit == "word"  # every word is a token, and odd an unknown one
        assert lengths.percentiles[-1] <= 8 and (lengths.truncated > 0) == (role == "student"), (language, name)
    assert by_name["teacher", "en", "test"].unknown > 0 == by_name["teacher", "en", "dev"].unknown


def test_packing_is_what_the_training_does(look: Callable[..., Description], config_file: Path) -> None:
    """The rows of the batches that `Finetuner.train` makes, of the sets that its objectives learn from."""
    found = look("--config.student.steps=3", "--config.seeds=(4,)", "--config.teacher.packed=False")
    assert [(each.role, each.name, each.examples) for each in found.packing] == [
        ("teacher", "L", 10),
        ("student", "L", 10),
        ("student", "L ∪ U", 24),
    ]
    teacher, student, both = found.packing
    assert (teacher.epochs, teacher.batch_size, teacher.row_length) == (48 * 8 / 10, 8, 12)
    assert teacher.filling.rows == ((8, 5),)
    assert (both.epochs, both.batch_size, both.row_length) == (1.0, 8, 24)
    assert sum(count for _, count in both.filling.rows) == 3  # there are no more steps
    assert both.filling.unpacked < 0.25 and student.filling.real <= 8 * 6 / (8 * 24)


def entries(cache: Path) -> set[str]:
    """The entries of the token cache."""
    return {path.name for path in (cache / "tokens").iterdir() if not path.name.startswith(".")}


def trained(
    experiment: ExperimentConfig, root: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, list[tuple[TrainBatches, int]]]:
    """Role -> (batches, steps) of every training of the experiment's stages: what `Finetuner.train` gives the loop."""
    found: dict[str, list[tuple[TrainBatches, int]]] = {"teacher": [], "student": []}

    def fit(
        directory: Path, plan: loop.Plan, start: object, step: object, batches: TrainBatches, *rest: object
    ) -> None:
        found["student" if "students" in directory.parts else "teacher"].append((batches, plan.steps))

    monkeypatch.setattr(loop, "fit", fit)
    monkeypatch.setattr(Finetuner, "fresh_params", lambda self, seed: None)  # there are no weights, and none are needed
    task = load_task(experiment.task)
    stages = Stages(Workdir(root), experiment, Models(experiment, task), transfer_set.gather(experiment, task))
    stages.train_teacher()
    for name in experiment.objectives:
        # Whose logits are learnt from changes no batch, and there is no trained model to ask for them.
        stages.train_student(dataclasses.replace(OBJECTIVES[name], teacher="none"), experiment.seeds[0])
    return found


@pytest.mark.parametrize("steps", [100, 600])
def test_the_batches_are_those_of_the_training(
    look: Callable[..., Description], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Of short and long trainings, which are compiled for fewer and more sizes of batches."""
    texts = [" ".join(["the", "film"] * (1 + i % 13)) + f"\t{('bad', 'good')[i % 2]}" for i in range(200)]
    data = tiny.write_task(tmp_path / "data", other=8)
    (data / "en" / "train.tsv").write_text("\n".join(["text\tlabel", *texts, ""]))
    model = tiny.checkpoint(tmp_path / "model")
    changes = {"steps": steps, "batch_size": 96, "max_length": 32, "row_length": 32}
    file = tiny.config_file(tmp_path / "tiny.py", data, model, model, **changes)
    flags = ["--config.task.labelled=0", "--config.objectives=('vanilla',)", "--config.teacher.steps=9"]
    experiment = settings.load(str(file), [f"--config.task.cache_dir={tmp_path}", *flags])
    found = dataset.describe(experiment, 40)
    runs = trained(experiment, tmp_path / "run", monkeypatch)
    assert [each.role for each in found.packing] == ["teacher", "student"]
    for packing in found.packing:
        [(batches, steps)] = runs[packing.role]
        made = [batches(i)["segment_ids"] for i in range(min(40, steps))]
        assert packing.filling.rows == tuple(sorted(Counter(map(len, made)).items()))
        real = sum(int((segments > 0).sum()) for segments in made)
        assert packing.filling.real == pytest.approx(real / sum(segments.size for segments in made))
        assert packing.epochs == steps * packing.batch_size / 200


def test_the_experiment_finds_all_tokens_whatever_it_draws(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep over label counts and seeds of the draw reads what one look has kept: an entry for each whole split."""
    monkeypatch.setattr(token_cache, "_WORTH_KEEPING", 70)  # characters: not the examples that are shown
    common = [f"--config.task.cache_dir={tmp_path}", "--config.objectives=('vanilla','monox_kd')"]
    dataset.describe(settings.load(str(config_file), [*common, "--config.task.labelled=10"]), 5)
    kept = entries(tmp_path)
    assert len(kept) == 2 * 5  # train, dev and test of en, test of de and fr, of both tokenizers
    tokenised: list[object] = []
    monkeypatch.setattr(text, "tokenize_batches", lambda *args: tokenised.append(args) or iter(()))
    for flags in (
        ("labelled=10",),
        ("labelled=20",),
        ("labelled=20", "labelled_seed=1"),
        ("labelled=8", "unlabelled=5"),
    ):
        experiment = settings.load(str(config_file), [*common, *(f"--config.task.{flag}" for flag in flags)])
        runs = trained(experiment, tmp_path / "-".join(flags), monkeypatch)
        assert [len(batches._dataset) for batches, _ in runs["teacher"]] == [experiment.task.labelled]
        assert entries(tmp_path) == kept and not tokenised


def test_objectives_without_unlabelled_text(look: Callable[..., Description]) -> None:
    found = look("--config.objectives=('vanilla',)")
    assert [(each.role, each.name) for each in found.packing] == [("teacher", "L"), ("student", "L")]
    assert found.count("U").examples == 0 and "U" not in {each.name for each in found.measured}


def test_evaluated_dev_splits(look: Callable[..., Description]) -> None:
    found = look("--config.evaluation_splits=('dev','test')", "--config.task.target_languages=('fr',)")
    names = [(each.language, each.name) for each in found.measured if each.role == "student"]
    assert names == [("en", "L"), ("en", "U"), ("en", "dev"), ("en", "test"), ("fr", "dev"), ("fr", "test")]


def test_examples(found: Description) -> None:
    """Three of L and three of the first target language, of different labels where that can be."""
    ids = [each.id for each in found.examples]
    assert (
        len(set(ids)) == 6 and [id_.rsplit("/", 1)[0] for id_ in ids] == ["files/train/en"] * 3 + ["files/test/de"] * 3
    )
    assert (
        {each.label for each in found.examples[:2]} == {each.label for each in found.examples[3:5]} == {"bad", "good"}
    )
    for each in found.examples:
        words = each.text.lower().split()
        assert each.tokens["student"] == " ".join(["[CLS]", *words[:4], "[SEP]"])  # up to 6 tokens
        assert ("teacher" in each.tokens) == each.id.startswith("files/train/en")


def test_long_texts_are_cut_and_control_characters_shown() -> None:
    assert dataset._cut("a\tb\nc\x1b[1m\u2028本") == "a�b⏎c�[1m�本"
    assert dataset._cut("x" * 400) == "x" * 400
    assert dataset._cut("x" * 1500) == "x" * 400 + " … and 1,100 characters more"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.student.checkpoint=", "config key student.checkpoint is empty"),
        ("--config.teacher.max_length=99", "teacher.max_length is 99, but .* has 32 positions"),
        ("--config.task.labelled=25", "task.labelled 25"),
        ("--config.task.unlabelled_from=split", "en/unlabelled.tsv: no such file"),
        ("--config.evaluation_splits=('dev',)", "de/dev.tsv:2: label 'ugly'"),
        ("--config.task.target_languages=('it',)", "task.target_languages: no data in 'it'"),
    ],
)
def test_faults(look: Callable[..., Description], flag: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        look(flag)
