"""The layout of a workdir, and the records that an experiment keeps in it."""

import dataclasses
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from xtransfer import storage
from xtransfer.config import ExperimentConfig, PretrainConfig, differences, mappings, parse
from xtransfer.distillation.objectives import TEACHER as TEACHER
from xtransfer.errors import CheckpointError, ConfigError
from xtransfer.runtime import processes

DEFAULT_DRAW = "default"
"""The name of the draw whose runs are at the top of the workdir (see `runs.draws`)."""


class RunId(NamedTuple):
    """The draw and the seed of a run, which distinguish it from the other runs of its objective."""

    draw: str
    seed: int

    def __str__(self) -> str:
        """Return the run as people call it."""
        return f"seed {self.seed}" if self.draw == DEFAULT_DRAW else f"{self.draw} seed {self.seed}"


@dataclass(frozen=True)
class Workdir:
    """The paths of one experiment's files, all below `root`, with the teacher and the students of one draw."""

    root: Path
    draw: str = DEFAULT_DRAW

    def at(self, draw: str) -> "Workdir":
        """Return the paths with the runs of another draw."""
        return replace(self, draw=draw)

    @property
    def draws(self) -> Path:
        """The runs of all draws but the default one."""
        return self.root / "draws"

    @property
    def runs(self) -> Path:
        """The directory of this draw's teacher and students."""
        return self.root if self.draw == DEFAULT_DRAW else self.draws / self.draw

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.root / "config.json"

    @property
    def task(self) -> Path:
        """The task's name and labels, and the fingerprints of data and checkpoints."""
        return self.root / "task.json"

    @property
    def teacher(self) -> Path:
        """The run of the monolingual teacher."""
        return self.runs / "teacher"

    def member(self, member: str) -> Path:
        """Return the run of one of several teachers, by its config key: "teacher" or "teachers.NAME"."""
        return self.runs / Path(*member.split("."))

    def encoder(self, role: str) -> Path:
        """Return the config and tokenizer of the base checkpoint of a role (see `runs.encoders`)."""
        return self.root / "encoders" / role

    @property
    def logits(self) -> Path:
        """All logits stores."""
        return self.root / "logits"

    @property
    def results(self) -> Path:
        """The result rows: one per checkpoint × language × split × metric."""
        return self.root / "results.jsonl"

    @property
    def costs(self) -> Path:
        """The time and memory of each stage (see `runs.costs`)."""
        return self.root / "costs.jsonl"

    @property
    def starts(self) -> Path:
        """The commands that ran the experiment, with versions and machines (see `runs.starts`)."""
        return self.root / "starts.jsonl"

    @property
    def tokens(self) -> Path:
        """The tokens of each evaluated language (see `evaluation.token_counts`)."""
        return self.root / "tokens.jsonl"

    @property
    def by_step(self) -> Path:
        """The result rows of checkpoints that were scored as they landed, selected by nothing but their step."""
        return self.root / "watch.jsonl"

    @property
    def finished(self) -> Path:
        """The end marker: it exists from the end of the main command until its next start."""
        return self.root / "finished.json"

    @property
    def snapshots(self) -> Path:
        """Private copies of checkpoints while somebody reads them (see `train.snapshots`)."""
        return self.root / ".snapshots"

    def student(self, objective: str, seed: int) -> Path:
        """Return the run of one student."""
        return self.runs / "students" / objective / f"seed-{seed}"

    def predictions(self, run: Path, weights: str | int, split: str, language: str) -> Path:
        """Return the predictions on one split of one language by the weights of a run, named by `weights_name`."""
        return self.root / "predictions" / run.relative_to(self.root) / str(weights) / f"{split}-{language}.jsonl"

    def calibration(self, run: Path) -> Path:
        """Return the temperatures and thresholds of a run's weights (see `evaluation.recalibration`)."""
        return run / "calibration.json"


@dataclass(frozen=True)
class TaskRecord:
    """The record of an experiment's task and of the fingerprints of its base checkpoints (`Workdir.task`).

    `other_sources` are the source languages after the main one. `has_train` and `has_dev` are false if the source
    languages have no such split. Without dev, no checkpoint was selected. `teacher_logits` is the fingerprint of the
    file that stands in for the teacher, or empty. `teachers` has the fingerprints of further teachers' base checkpoints
    by config key, and `students` of further students'.
    """

    name: str
    labels: tuple[str, ...]
    synthetic: bool
    source_language: str
    target_languages: tuple[str, ...]
    teacher_checkpoint: str
    student_checkpoint: str
    multi_label: bool = False
    has_train: bool = True
    has_dev: bool = True
    teacher_logits: str = ""
    teachers: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)
    students: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)
    other_sources: tuple[str, ...] = ()

    @property
    def source_languages(self) -> tuple[str, ...]:
        """The source languages, the main one first."""
        return (self.source_language, *self.other_sources)

    @property
    def languages(self) -> tuple[str, ...]:
        """The source languages, then the target languages."""
        return (*self.source_languages, *self.target_languages)


def read_config(workdir: Workdir) -> ExperimentConfig:
    """Return the config of the experiment in a workdir."""
    if not workdir.config.is_file():
        if (workdir.root / "sweep.json").is_file():
            raise ConfigError(f"{workdir.root} holds a sweep: name one of the workdirs in {workdir.root / 'points'}")
        raise CheckpointError(f"{workdir.root}: no config.json, so no experiment has been started in this workdir")
    return parse(_read(workdir.config))


def read_task(workdir: Workdir) -> TaskRecord:
    """Read the task as the experiment recorded it; a UserError says if the record is missing or broken."""
    path, remedy = workdir.task, _TASK_REMEDY
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file: start the experiment again with python -m xtransfer.main")
    facts = storage.read_object(path, remedy)
    sources = facts.get("source_languages", [facts.get("source_language")])
    for key, names in (
        ("labels", facts.get("labels")),
        ("target_languages", facts.get("target_languages")),
        *([("source_languages", sources)] if "source_languages" in facts else []),
    ):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CheckpointError(f"{path}: {key} = {names!r}, expected a list of names: {remedy}")
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise CheckpointError(f"{path}: {key} has {twice!r} twice: {remedy}")
    if sources[:1] != [facts.get("source_language")]:
        raise CheckpointError(f"{path}: source_languages = {sources!r}, expected the source_language first: {remedy}")
    for key in ("name", "source_language", "teacher_checkpoint", "student_checkpoint"):
        if not isinstance(facts.get(key), str):
            raise CheckpointError(f"{path}: {key} = {facts.get(key)!r}, expected text: {remedy}")
    if len(facts["labels"]) < 2 or not isinstance(facts.get("synthetic"), bool):
        raise CheckpointError(f"{path}: expected two or more labels, and synthetic as true or false: {remedy}")
    if not isinstance(facts.get("multi_label", False), bool):
        raise CheckpointError(f"{path}: multi_label = {facts['multi_label']!r}, expected true or false: {remedy}")
    further: dict[str, dict[str, str]] = {}
    for key in ("teachers", "students"):
        named = facts.get(key, {})
        if not isinstance(named, dict):
            raise CheckpointError(f"{path}: {key} = {named!r}, expected an object by name: {remedy}")
        further[key] = {str(name): str(value) for name, value in named.items()}
    return TaskRecord(
        name=facts["name"],
        labels=tuple(facts["labels"]),
        synthetic=facts["synthetic"],
        source_language=facts["source_language"],
        target_languages=tuple(facts["target_languages"]),
        teacher_checkpoint=facts["teacher_checkpoint"],
        student_checkpoint=facts["student_checkpoint"],
        multi_label=facts.get("multi_label", False),
        has_train=facts.get("train") is not False,
        has_dev=facts.get("dev") is not False,
        teacher_logits=str(facts.get("teacher_logits", "")),
        teachers=further["teachers"],
        students=further["students"],
        other_sources=tuple(sources[1:]),
    )


def as_record(config: Any) -> dict[str, Any]:
    """Return a config as the JSON object that is recorded and compared."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def check_unchanged(path: Path, facts: Mapping[str, Any], ignore: Collection[str] = ()) -> None:
    """Refuse to continue if the facts differ from those recorded at `path`; the error names the differences.

    Recorded facts in `ignore` may be missing.
    """
    if path.exists():
        recorded = {key: value for key, value in _read(path).items() if key in facts or key not in ignore}
        _refuse_differences(path, recorded, facts)


def _refuse_differences(path: Path, recorded: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    changed = differences(recorded, facts)
    if changed:
        raise ConfigError(
            f"{path.parent} was made with other settings or data ({'; '.join(changed)}): choose another directory, "
            "or go back to the recorded settings and data"
        )


def check_config_unchanged(workdir: Workdir, config: ExperimentConfig) -> None:
    """Refuse to continue with other settings than the experiment's; see `check_settings_unchanged`."""
    check_settings_unchanged(workdir.config, config)


def check_settings_unchanged(path: Path, config: ExperimentConfig | PretrainConfig) -> None:
    """Refuse to continue with other settings than those recorded at `path`; the error names the differences.

    A setting that did not exist when the record was written counts as its default.
    """
    if path.exists():
        recorded = _filled_in(as_record(type(config)()), _read(path))
        for key, schema in mappings(type(config)).items():
            entries = recorded[key]
            if not isinstance(entries, dict) or not all(isinstance(values, dict) for values in entries.values()):
                raise CheckpointError(f"{path}: {key} = {entries!r}, expected an object by name: {_CONFIG_REMEDY}")
            recorded[key] = {name: _filled_in(as_record(schema()), values) for name, values in recorded[key].items()}
        _refuse_differences(path, recorded, as_record(config))


def _filled_in(defaults: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested values, with defaults for those that are missing."""
    nested = {key for key in values if isinstance(values[key], Mapping) and isinstance(defaults.get(key), Mapping)}
    return {**defaults, **values, **{key: _filled_in(defaults[key], values[key]) for key in nested}}


def record(path: Path, facts: Mapping[str, Any]) -> None:
    """Record facts, unless they are recorded already.

    With several processes, process 0 writes, and the others check that they have the same facts.
    """
    processes.on_first(lambda: _record(path, facts))
    if not processes.is_first():
        check_unchanged(path, facts)


def mark_finished(workdir: Workdir, runs: Iterable[Path]) -> None:
    """Write the end marker, with the directories of the experiment's runs. The caller holds the workdir."""
    names = [run.relative_to(workdir.root).as_posix() for run in runs]
    storage.write_atomically(workdir.finished, json.dumps({"runs": names}, indent=2) + "\n")


def _record(path: Path, facts: Mapping[str, Any]) -> None:
    text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        storage.write_atomically(path, text)


def _read(path: Path) -> dict[str, Any]:
    return storage.read_object(path, _TASK_REMEDY if path.name == "task.json" else _CONFIG_REMEDY)


_TASK_REMEDY = "remove this file and run python -m xtransfer.main again, which writes it anew"
_CONFIG_REMEDY = (
    "restore it from a backup, or remove it and run the command that wrote it again, with the same settings: finished "
    "work stays"
)
