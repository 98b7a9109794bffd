"""The output of a command that is killed at random is complete or does not exist, and a second run makes it.

One round kills each command once; `chance` says how to ask for more.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers import contents, forked, tiny_run
from tests.helpers.contents import Contents
from tests.helpers.interruption import Interruption
from tests.kill.chance import ROUNDS, Kills
from xtransfer import storage
from xtransfer.errors import Exit

IGNORED = {"mini.work/.run.lock": "names the last process to hold it, and is emptied at the end"}
RUN = "students/vanilla/seed-0"


@dataclass(frozen=True)
class Command:
    """A command that is killed.

    Attributes:
      module: its module.
      arguments: its arguments, with {root}, {workdir}, and {out}, the directory that it writes to.
      output: what appears complete or not at all, in {out}; a directory ends with a slash.
      is_refused: whether the command refuses an output that exists.
    """

    module: str
    arguments: str
    output: str
    is_refused: bool = True


COMMANDS = {
    "export": Command(
        "export", "--workdir {workdir} --objective vanilla --seed 0 --output {out}/classifier", "classifier/"
    ),
    "trim": Command("trim", "--model {workdir}/" + RUN + " --text {root}/texts.tsv --output {out}/small", "small/"),
    "predict": Command(
        "predict", "--model {workdir}/" + RUN + " --input {root}/texts.tsv --output {out}/labels.jsonl", "labels.jsonl"
    ),
    "report": Command("report", "--workdir {workdir} --output {out}", "report.html", is_refused=False),
    "pretrain": Command("pretrain", "--config {root}/recipe.py --output {out}/mini", "mini/"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Make a workdir, texts, and a recipe that continues the pretraining of a tiny encoder."""
    root = tmp_path_factory.mktemp("commands")
    workdir = tiny_run.workdir(tiny_run.setting(root), root / "run", "--config.objectives=('vanilla',)")
    rows = [
        *tiny_run.rows(workdir, "vanilla", 0, {"en": 0.9, "de": 0.8}),
        *tiny_run.rows(workdir, "teacher", 0, {"en": 0.9}),
    ]
    storage.write_jsonl(workdir.results, rows)
    shutil.copy(root / "data" / "de" / "train.tsv", root / "texts.tsv")
    for language in ("en", "de"):
        shutil.copy(root / "data" / language / "train.tsv", root / "data" / language / "unlabelled.tsv")
    recipe = {"task.name": "files", "task.data_dir": str(root / "data"), "task.source_language": "en"}
    recipe |= {"languages": ("en", "de"), "start_from": str(root / "teacher")}
    recipe |= {"row_length": 16, "rows": 8, "masks": 3, "steps": 1000}
    lines = ["from xtransfer import config as settings", "def get_config(arg=''):"]
    lines += ["    config = settings.default(settings.PretrainConfig)"]
    lines += [f"    config.{key} = {value!r}" for key, value in recipe.items()]
    (root / "recipe.py").write_text("\n".join([*lines, "    return config", ""]))
    forked.home(root)
    return root


@pytest.mark.parametrize("name", COMMANDS)
def test_the_output_of_a_killed_command_is_complete_or_does_not_exist(root, tmp_path, name):
    command, out, home = COMMANDS[name], tmp_path / "out", root / "home"
    arguments = command.arguments.format(root=root, workdir=root / "run", out=out).split()
    stages = {"output": [out, root / "run" / "report"]}

    def run(kill: Interruption | None = None) -> tuple[int, dict[str, int]]:
        return forked.run(f"xtransfer.{command.module}.__main__", arguments, stages, home, kill)

    def clear() -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()

    def found(below: str = "") -> Contents:
        """Return what is in `out`, or the output alone."""
        return {path: content for path, content in contents.of(out, IGNORED).items() if path.startswith(below)}

    def check(actual: Contents, expected: Contents) -> None:
        lines = contents.differences(actual, expected)
        assert not lines, "\n".join([kills.story, *lines, forked.log(home)])

    clear()
    status, operations = run()
    assert status == 0, forked.log(home)
    everything, output = found(), found(command.output)
    for number in range(ROUNDS):
        clear()
        kills = Kills(f"{name} {number}", lambda kill: run(kill)[0], clear)
        kills.kill("output", operations["output"])
        is_complete = (out / command.output).exists()
        if is_complete:
            check(found(command.output), output)
        status = run()[0]
        expected_status = Exit.CONFIG if is_complete and command.is_refused else Exit.DONE
        assert status == expected_status, f"{kills.story}\n{forked.log(home)}"
        check(found(), everything)
