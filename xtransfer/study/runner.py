"""Run the repetitions of a study, and write their comparison."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from xtransfer import config, experiment, storage
from xtransfer.config import ExperimentConfig, PretrainConfig
from xtransfer.distillation.objectives import definitions
from xtransfer.errors import ConfigError, UserError, user_error
from xtransfer.evaluation.evaluator import rows_of
from xtransfer.evaluation.evaluator import runs as runs_of
from xtransfer.evaluation.results import ResultsTable, aggregate, read_rows
from xtransfer.pretrain.pretraining import pretrain
from xtransfer.report import table as table_writer
from xtransfer.report.workdir_report import default_split
from xtransfer.runs.workdir import Workdir, check_settings_unchanged, read_task
from xtransfer.runtime import locks, terminal
from xtransfer.study import comparison
from xtransfer.study.design import Study, encoders_of, with_directories


def run(
    study: Study, names: Sequence[str], root: Path, *, from_earlier_step: bool = False
) -> list[comparison.Comparison]:
    """Run the missing repetitions of some variants, and print and write the comparison of all finished variants.

    All configs are checked before anything is computed. A repetition that fails is named, and the others go on.

    Raises:
      UserError: a config is wrong, an encoder was pretrained with another recipe, repetitions failed, or another
        process runs a study in this directory.
    """
    with locks.directory_lock(root):
        return _run(study, names, root, from_earlier_step=from_earlier_step)


def _run(study: Study, names: Sequence[str], root: Path, *, from_earlier_step: bool) -> list[comparison.Comparison]:
    directories = {name: root / "pretrained" / name for name in study.pretrained}
    recipes = {
        name: config.load(source, with_directories(flags, directories), PretrainConfig)
        for name, (source, flags) in study.pretrained.items()
    }
    experiments = {
        name: [config.load(study.base, with_directories(flags, directories)) for flags in repetitions]
        for name, repetitions in study.variants.items()
    }
    for name, repetitions in experiments.items():
        if any(settings.teacher.is_file for settings in repetitions):
            raise ConfigError(f"variant {name}: a study compares the teacher's score too, and a logits_file has none")
    for name in encoders_of(study, names):
        if directories[name].exists():
            work = directories[name].with_name(f"{name}.work")
            check_settings_unchanged(work / "config.json", recipes[name])
        else:
            terminal.log(f"pretraining {name}")
            pretrain(recipes[name], directories[name], from_earlier_step=from_earlier_step)
            jax.clear_caches()
    failures: list[UserError] = []
    comparisons: list[comparison.Comparison] = []
    for name in names:
        for number, settings in enumerate(experiments[name]):
            terminal.log(f"{name}: repetition {number + 1} of {len(experiments[name])}")
            try:
                experiment.run(settings, root / name / str(number), from_earlier_step=from_earlier_step)
            except UserError as error:
                failures.append(user_error(error.exit_status, f"{name} {number}: {error}"))
                terminal.log(f"error: {failures[-1]}")
            jax.clear_caches()  # the next experiment compiles functions of its own
        comparisons = _finished(experiments, root)
        _write(root, comparisons)
    if comparisons:
        table = comparison.table(comparisons)
        table_writer.show(table, terminal.console, wrap=False)
        for note in table.notes:
            terminal.log(note)
    if failures:
        raise user_error(failures[0].exit_status, f"{len(failures)} repetitions failed; the first is {failures[0]}")
    return comparisons


def _finished(experiments: Mapping[str, Sequence[ExperimentConfig]], root: Path) -> list[comparison.Comparison]:
    """Return the comparisons of the variants whose repetitions all have results."""
    comparisons = []
    for name, repetitions in experiments.items():
        workdirs = [Workdir(root / name / str(number)) for number in range(len(repetitions))]
        if all(workdir.results.exists() for workdir in workdirs):
            tables = [_results(*pair) for pair in zip(repetitions, workdirs, strict=True)]
            comparisons.append(comparison.compare(name, tables))
    return comparisons


def _results(settings: ExperimentConfig, workdir: Workdir) -> ResultsTable:
    """Return the results of an experiment's own runs, without earlier draws, seeds, and objectives."""
    return aggregate(
        rows_of(runs_of(workdir, settings), read_rows(workdir.results)),
        source_languages=settings.task.sources,
        target_languages=read_task(workdir).target_languages,
        metric=settings.headline_metric,
        split=default_split(settings.evaluation_splits),
        objectives=definitions(settings),
    )


def _write(root: Path, comparisons: Sequence[comparison.Comparison]) -> None:
    """Write the comparison as Markdown for people and as JSON lines for programs."""
    if not comparisons:
        return
    table = comparison.table(comparisons)
    storage.write_atomically(root / "study.md", "\n".join(table_writer.section(table, "#")))
    storage.write_jsonl(root / "study.jsonl", comparison.rows(comparisons))
