"""Error messages, the kinds of errors, and the table of exit statuses."""

import ast
import re
from pathlib import Path

import pytest

from xtransfer.errors import KINDS, DataError, Exit, MissingSplitError, UserError, nearest, one_line, user_error

ROOT = Path(__file__).parents[1]


def test_one_line_joins_and_truncates():
    assert one_line(ValueError("a\n  b\tc")) == "a b c"
    assert one_line(ValueError("x" * 300)) == "x" * 200 and one_line(ValueError("abc"), 2) == "ab"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_a_missing_split_error_names_split_and_language():
    with pytest.raises(UserError, match="^no test in de$") as caught:
        raise MissingSplitError("test", "de", "no test in de")
    assert isinstance(caught.value, MissingSplitError)
    assert (caught.value.split, caught.value.language) == ("test", "de")


@pytest.mark.parametrize(("name", "hint"), [("vanila", "; did you mean 'vanilla'?"), ("qqq", "")])
def test_nearest_suggests_a_similar_name(name, hint):
    assert nearest(name, ["vanilla", "monox_kd"]) == hint


def test_the_readme_has_the_table_of_exit_statuses():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    table = re.search(r"<!-- exit statuses -->\n(.*?)<!-- /exit statuses -->", page, re.DOTALL)
    assert table is not None
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", table[1], re.MULTILINE)
    assert rows == [(str(int(status)), status.meaning) for status in Exit]


def test_exit_statuses_follow_the_shell():
    """timeout exits with 124, and a signal counts from 128: SIGINT is 2, SIGABRT is 6, and SIGTERM is 15."""
    assert (Exit.STALLED, Exit.INTERRUPTED, Exit.LOST, Exit.PREEMPTED) == (124, 130, 134, 143)
    assert [kind.exit_status for kind in KINDS] == [2, 3, 4, 5, 6, 7, 124, 134]


def test_an_error_keeps_its_status_with_another_message():
    error = user_error(MissingSplitError("test", "de", "").exit_status, "en: no test")
    assert type(error) is DataError and str(error) == "en: no test"


def test_the_docstring_draws_every_kind_with_its_status():
    import xtransfer.errors as module

    drawing = re.findall(r"── (\w+Error) +(\d+) ", module.__doc__ or "")
    assert drawing == [(kind.__name__, str(int(kind.exit_status))) for kind in KINDS]


def calls_of(tree: ast.AST, name: str) -> list[int]:
    """Return the lines that call `name`, also as an attribute of a module."""
    called = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [node.lineno for node in called if getattr(node.func, "id", getattr(node.func, "attr", "")) == name]


def test_every_error_has_a_kind():
    """`UserError` itself has no exit status of its own, so only `user_error` may create one."""
    assert calls_of(ast.parse("raise UserError('x')\nerrors.UserError('y')"), "UserError") == [1, 2]
    found = {}
    for folder in ("xtransfer", "configs"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            lines = calls_of(ast.parse(path.read_text(encoding="utf-8")), "UserError")
            if lines:
                found[str(path.relative_to(ROOT))] = lines
    assert found == {}


def test_exit_statuses_are_written_by_name():
    """A number in an exit call would bypass the table."""
    for path in sorted((ROOT / "xtransfer").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        exits = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("sys.exit", "os._exit", "SystemExit", "exit")
            and any(isinstance(child, ast.Constant) and type(child.value) is int for child in ast.walk(node))
        ]
        assert [f"{path.name}:{node.lineno}" for node in exits] == []
