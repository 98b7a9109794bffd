"""Run the repetitions of a study, and write their comparison."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax

from xtransfer import config, experiment, storage
from xtransfer.config import ExperimentConfig, PretrainConfig
from xtransfer.evaluation.results import ResultsTable, aggregate, read_rows
from xtransfer.pretrain.pretraining import pretrain
from xtransfer.report import table as table_writer
from xtransfer.report.workdir_report import default_split
from xtransfer.runs.workdir import Workdir, read_task
from xtransfer.runtime import terminal
from xtransfer.study import comparison
from xtransfer.study.design import Flags, Study


def run(study: Study, names: Sequence[str], root: Path) -> list[comparison.Comparison]:
    """Run the missing repetitions of some variants, and print and write their comparison.

    All configs are checked before anything is computed.

    Raises:
      UserError: a config is wrong, or an experiment fails.
    """
    directories = {name: root / "pretrained" / name for name in study.pretrained}
    recipes = {
        name: config.load(source, _overrides(flags, directories), PretrainConfig)
        for name, (source, flags) in study.pretrained.items()
    }
    experiments = {
        (name, number): config.load(study.base, _overrides(flags, directories))
        for name in names
        for number, flags in enumerate(study.variants[name])
    }
    for name in _used(study, names):
        if not directories[name].exists():
            terminal.log(f"pretraining {name}")
            pretrain(recipes[name], directories[name])
            jax.clear_caches()
    results: dict[str, list[ResultsTable]] = {}
    for done, ((name, number), settings) in enumerate(experiments.items()):
        terminal.log(f"{name} {number}: experiment {done + 1} of {len(experiments)}")
        results.setdefault(name, []).append(_results(settings, root / name / str(number)))
    comparisons = [comparison.compare(name, of_variant) for name, of_variant in results.items()]
    table = comparison.table(comparisons)
    table_writer.show(table, terminal.console, wrap=False)
    lines = [f"# {table.title}", "", *table_writer.markdown(table), "", *(f"- {note}" for note in table.notes), ""]
    storage.write_atomically(root / "study.md", "\n".join(lines))
    storage.write_jsonl(root / "study.jsonl", comparison.rows(comparisons))
    return comparisons


def _overrides(flags: Flags, directories: Mapping[str, Path]) -> list[str]:
    return [f"--config.{flag.format(**directories)}" for flag in flags]


def _used(study: Study, names: Sequence[str]) -> Iterator[str]:
    """Yield the pretrained encoders that some variants use."""
    flags = [flag for name in names for repetition in study.variants[name] for flag in repetition]
    return (name for name in study.pretrained if any(f"{{{name}}}" in flag for flag in flags))


def _results(settings: ExperimentConfig, directory: Path) -> ResultsTable:
    """Run one experiment, or read it if it is finished."""
    experiment.run(settings, directory)
    jax.clear_caches()  # the next experiment compiles functions of its own
    workdir = Workdir(directory)
    return aggregate(
        read_rows(workdir.results),
        source_language=settings.task.source_language,
        target_languages=read_task(workdir).target_languages,
        split=default_split(settings.evaluation_splits),
    )
