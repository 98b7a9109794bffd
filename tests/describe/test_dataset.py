"""The description of a tiny task: its counts, and batches and tokens that are the same as in the training run."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sized
from pathlib import Path

import pytest

from tests.helpers import tiny
from xtransfer import config as settings
from xtransfer.config import ExperimentConfig
from xtransfer.data.batches.batches import TrainBatches
from xtransfer.data.registry import load_task
from xtransfer.data.tokens import cache as token_cache
from xtransfer.data.tokens import tokenizer
from xtransfer.describe import dataset
from xtransfer.describe.dataset import Description, SetSize
from xtransfer.distillation import transfer_set
from xtransfer.distillation.objectives import OBJECTIVES
from xtransfer.errors import UserError
from xtransfer.experiment import Stages
from xtransfer.runs.workdir import Workdir
from xtransfer.train import loop
from xtransfer.train.finetuning import Finetuner, Models

DEVICES = 8  # set in tests/conftest.py


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a config of a task with 24 train, 8 dev, and 9 test texts in each of en, de, and fr, half of them good.

    French has no train split. The German dev split is malformed. The checkpoints have no weights.
    """
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
        (directory / "model.safetensors").rename(directory / "hidden")
    return tiny.config_file(root / "tiny.py", data, teacher, student, max_length=6, row_length=24)


@pytest.fixture(scope="module")
def describe_with(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Description]:
    """Return a function that describes the task under additional flags."""
    cache = tmp_path_factory.mktemp("cache")

    def describe_flags(*flags: str, batches: int = 5) -> Description:
        common = [f"--config.task.cache_dir={cache}", "--config.task.labelled=10"]
        return dataset.describe(settings.load(str(config_file), [*common, *flags]), batches)

    return describe_flags


@pytest.fixture(scope="module")
def description(describe_with: Callable[..., Description]) -> Description:
    return describe_with()


def test_task_and_models(description: Description) -> None:
    assert (description.task, description.synthetic, description.labels) == ("files", False, ("bad", "good"))
    assert (description.source_language, description.target_languages) == ("en", ("de", "fr"))
    assert (description.devices, description.unlabelled_from, description.evaluation_splits) == (
        DEVICES,
        "train_rest",
        ("test",),
    )
    assert description.models["student"].endswith("/student, up to 6 tokens")
    assert description.models["teacher"].endswith("/teacher, up to 12 tokens")


@pytest.mark.parametrize(
    ("mesh", "shards"), [((0, 1, 1), 8), ((0, 2, 2), 4), ((2, 3, 1), 6), ((0, 16, 1), 16), ((32, 1, 4), 32)]
)
def test_rows_suit_the_requested_mesh_on_any_machine(
    describe_with: Callable[..., Description], mesh: tuple[int, int, int], shards: int
) -> None:
    sizes = zip(("data", "fsdp", "tensor"), mesh, strict=True)
    description = describe_with(
        *(f"--config.mesh.{axis}={size}" for axis, size in sizes), "--config.student.accumulation=2", batches=1
    )
    assert description.devices == shards
    for packing in description.packing:
        microbatches = 2 if packing.role == "student" else 1
        assert all(rows % (shards * microbatches) == 0 for rows, _ in packing.filling.rows)


def test_the_objectives_have_their_effective_settings(describe_with: Callable[..., Description]) -> None:
    own = (
        "--config.objective.mix.base=monox_kd",
        "--config.objective.mix.hard_weight=2",
        "--config.objectives=('mix',)",
    )
    assert describe_with(*own, batches=1).objectives == {
        "teacher": "CE(labels) on labelled text",
        "mix": "2 · CE(labels) + KL(the teacher's logits; T = 1) on labelled and unlabelled text",
    }
    with pytest.raises(UserError, match="no objective 'mx'; choose from .*; did you mean 'mix'"):
        describe_with(*own[:2], "--config.objectives=('mx',)", batches=1)
    with pytest.raises(UserError, match=r"'vanilla': class_weights names the class 'x'; the task has bad, good"):
        describe_with("--config.objectives=('vanilla',)", "--config.transfer.class_weights=('x=2',)", batches=1)


def test_counts(description: Description) -> None:
    assert description.counts == (
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
    assert description.count("test").labels == (5, 4) and description.count("test", "de").labels == (4, 5)


def test_missing_splits_are_explained(description: Description) -> None:
    """There is one line per reason, and it names the first file."""
    lines = description.missing
    assert len(lines) == 3
    assert lines[0].startswith("unlabelled split in any language: ") and "en/unlabelled.tsv: no such file" in lines[0]
    assert lines[1].startswith("dev split in de: ") and "dev.tsv:2: label 'ugly' is not one of bad, good" in lines[1]
    assert lines[2].startswith("train split in fr: ") and "fr/train.tsv: no such file" in lines[2]


def test_repeated_texts_are_counted(description: Description, config_file: Path) -> None:
    """The odd film is twice in train and once in test. The other texts also repeat, by chance."""
    texts = {}
    for split in ("train", "dev", "test"):
        lines = (config_file.parent / "data" / "en" / f"{split}.tsv").read_text().splitlines()[1:]
        texts[split] = [line.split("\t")[0] for line in lines]
    train = set(texts["train"])
    assert description.repeated["L ∪ U"] == 24 - len(train) >= 1
    assert description.repeated["test"] == len([text for text in texts["test"] if text in train]) >= 1
    assert description.repeated["dev"] == len([text for text in texts["dev"] if text in train])


def test_lengths_under_both_tokenizers_in_every_language(description: Description) -> None:
    sets = [(m.role, m.language, m.name, m.lengths.examples) for m in description.measured]
    source = [("en", "L", 10), ("en", "U", 14), ("en", "dev", 8), ("en", "test", 9)]
    assert sets == [
        *(("teacher", *key) for key in source),
        ("teacher", "de", "test", 9),
        ("teacher", "fr", "test", 9),
        *(("student", *key) for key in source),
        ("student", "de", "test", 9),
        ("student", "fr", "test", 9),
    ]
    by_name = {(m.role, m.language, m.name): m.lengths for m in description.measured}
    for (role, language, name), lengths in by_name.items():
        # Every word is one token, and "odd" is the unknown token.
        assert lengths.fertility == 1 and lengths.unit == "word"
        assert lengths.percentiles[-1] <= 8 and (lengths.truncated > 0) == (role == "student"), (language, name)
    assert by_name["teacher", "en", "test"].unknown > 0 == by_name["teacher", "en", "dev"].unknown


def test_packing_of_each_training_set(describe_with: Callable[..., Description], config_file: Path) -> None:
    """The teacher trains on L, and the student on the sets of its objectives."""
    description = describe_with("--config.student.steps=3", "--config.seeds=(4,)", "--config.teacher.packed=False")
    assert [(p.role, p.name, p.examples) for p in description.packing] == [
        ("teacher", "L", 10),
        ("student", "L", 10),
        ("student", "L ∪ U", 24),
    ]
    teacher, student, both = description.packing
    assert (teacher.epochs, teacher.batch_size, teacher.row_length) == (48 * 8 / 10, 8, 12)
    assert teacher.filling.rows == ((8, 5),)
    assert (both.epochs, both.batch_size, both.row_length) == (1.0, 8, 24)
    assert sum(count for _, count in both.filling.rows) == 3  # all the steps of the training
    assert both.filling.unpacked < 0.25 and student.filling.real <= 8 * 6 / (8 * 24)


def entries(cache: Path) -> set[str]:
    """Return the names of the token cache's entries."""
    return {path.name for path in (cache / "tokens").iterdir() if not path.name.startswith(".")}


def record_training(
    experiment: ExperimentConfig, root: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, list[tuple[TrainBatches, int]]]:
    """Run an experiment without its training loop, and return the (batches, steps) given to the loop, by role."""
    runs: dict[str, list[tuple[TrainBatches, int]]] = {"teacher": [], "student": []}

    def fit(
        directory: Path,
        plan: loop.Plan,
        start: object,
        step: object,
        rates: Sized,
        batches: TrainBatches,
        *rest: object,
    ) -> None:
        assert len(rates) == plan.steps
        runs["student" if "students" in directory.parts else "teacher"].append((batches, plan.steps))

    monkeypatch.setattr(loop, "fit", fit)
    monkeypatch.setattr(Finetuner, "_check_params", lambda self: None)  # the checkpoints have no weights
    task = load_task(experiment.task)
    stages = Stages(Workdir(root), experiment, Models(experiment, task), transfer_set.gather(experiment, task))
    stages.train_teachers()
    for name in experiment.objectives:
        # There is no trained teacher to give logits, and they do not change the batches.
        stages.train_student(dataclasses.replace(OBJECTIVES[name], teacher="none"), experiment.seeds[0])
    return runs


@pytest.mark.parametrize("steps", [100, 600])
def test_batches_equal_those_of_the_training_run(
    describe_with: Callable[..., Description], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """A long training is compiled for more batch sizes than a short one."""
    texts = [" ".join(["the", "film"] * (1 + i % 13)) + f"\t{('bad', 'good')[i % 2]}" for i in range(200)]
    data = tiny.write_task(tmp_path / "data", other=8)
    (data / "en" / "train.tsv").write_text("\n".join(["text\tlabel", *texts, ""]))
    model = tiny.checkpoint(tmp_path / "model")
    changes = {"steps": steps, "batch_size": 96, "max_length": 32, "row_length": 32}
    file = tiny.config_file(tmp_path / "tiny.py", data, model, model, **changes)
    flags = ["--config.task.labelled=0", "--config.objectives=('vanilla',)", "--config.teacher.steps=9"]
    experiment = settings.load(str(file), [f"--config.task.cache_dir={tmp_path}", *flags])
    description = dataset.describe(experiment, 40)
    runs = record_training(experiment, tmp_path / "run", monkeypatch)
    assert [packing.role for packing in description.packing] == ["teacher", "student"]
    for packing in description.packing:
        [(batches, steps)] = runs[packing.role]
        segment_ids = [batches(i)["segment_ids"] for i in range(min(40, steps))]
        assert packing.filling.rows == tuple(sorted(Counter(map(len, segment_ids)).items()))
        real = sum(int((segments > 0).sum()) for segments in segment_ids)
        assert packing.filling.real == pytest.approx(real / sum(segments.size for segments in segment_ids))
        assert packing.epochs == steps * packing.batch_size / 200


def test_experiments_reuse_the_cached_tokens_whatever_they_sample(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache has one entry per complete split, so a sweep over label counts and sampling seeds tokenizes nothing."""
    monkeypatch.setattr(token_cache, "_WORTH_KEEPING", 70)  # in characters, so that the examples to show are not cached
    common = [f"--config.task.cache_dir={tmp_path}", "--config.objectives=('vanilla','monox_kd')"]
    dataset.describe(settings.load(str(config_file), [*common, "--config.task.labelled=10"]), 5)
    cached = entries(tmp_path)
    assert len(cached) == 2 * 5  # under both tokenizers: train, dev, and test of en, and test of de and fr
    tokenized: list[object] = []

    def record(*args: object) -> Iterator[object]:
        tokenized.append(args)
        return iter(())

    monkeypatch.setattr(tokenizer, "tokenize_batches", record)
    for flags in (
        ("labelled=10",),
        ("labelled=20",),
        ("labelled=20", "labelled_seed=1"),
        ("labelled=8", "unlabelled=5"),
    ):
        experiment = settings.load(str(config_file), [*common, *(f"--config.task.{flag}" for flag in flags)])
        runs = record_training(experiment, tmp_path / "-".join(flags), monkeypatch)
        assert [len(batches._dataset) for batches, _ in runs["teacher"]] == [experiment.task.labelled]
        assert entries(tmp_path) == cached and not tokenized


def test_objective_without_unlabelled_text(describe_with: Callable[..., Description]) -> None:
    description = describe_with("--config.objectives=('vanilla',)")
    assert [(packing.role, packing.name) for packing in description.packing] == [("teacher", "L"), ("student", "L")]
    assert description.count("U").examples == 0 and "U" not in {measured.name for measured in description.measured}


def test_dev_as_an_evaluation_split(describe_with: Callable[..., Description]) -> None:
    description = describe_with("--config.evaluation_splits=('dev','test')", "--config.task.target_languages=('fr',)")
    names = [(m.language, m.name) for m in description.measured if m.role == "student"]
    assert names == [("en", "L"), ("en", "U"), ("en", "dev"), ("en", "test"), ("fr", "dev"), ("fr", "test")]


def test_examples(description: Description) -> None:
    """Three examples are from L and three in the first target language, with different labels as far as possible."""
    examples = description.examples
    ids = [example.id for example in examples]
    assert (
        len(set(ids)) == 6 and [id_.rsplit("/", 1)[0] for id_ in ids] == ["files/train/en"] * 3 + ["files/test/de"] * 3
    )
    labels = [example.label for example in examples]
    assert set(labels[:2]) == set(labels[3:5]) == {"bad", "good"}
    for example in examples:
        words = example.text.lower().split()
        assert example.tokens["student"] == " ".join(["[CLS]", *words[:4], "[SEP]"])  # up to 6 tokens
        assert ("teacher" in example.tokens) == example.id.startswith("files/train/en")


def test_long_texts_are_shortened_and_control_characters_made_visible() -> None:
    assert dataset._shorten("a\tb\nc\x1b[1m\u2028本") == "a�b⏎c�[1m�本"
    assert dataset._shorten("x" * 400) == "x" * 400
    assert dataset._shorten("x" * 1500) == "x" * 400 + " … and 1,100 more characters"


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
def test_user_errors(describe_with: Callable[..., Description], flag: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        describe_with(flag)
