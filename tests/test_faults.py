"""The table of faults: every promise has its row, and every test that it names exists."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROW = re.compile(r"^\| (\d+) \| (.+?) \| (.+?) \| (.+) \|$", re.MULTILINE)
TEST = re.compile(r"`([\w/]+\.py)::(\w+)`")
# The rows that still say what they lack. Take a number out together with its note.
NOT_YET: set[int] = set()


def rows() -> dict[int, str]:
    """Return the column of tests by the number of the promise."""
    return {int(number): tests for number, _, _, tests in ROW.findall((TESTS / "FAULTS.md").read_text("utf-8"))}


def test_every_promise_has_one_row() -> None:
    numbers = [int(match[0]) for match in ROW.findall((TESTS / "FAULTS.md").read_text("utf-8"))]
    assert numbers == list(range(1, 68))


@pytest.mark.parametrize("number", range(1, 68))
def test_a_row_names_tests_that_exist(number: int) -> None:
    tests, _, missing = rows()[number].partition("not yet: ")
    assert bool(missing) == (number in NOT_YET)
    assert TEST.search(tests) or missing, "a row names a test, or says what is missing"
    assert re.sub(r"[\s;]", "", TEST.sub("", tests)) == "", "only tests, in backticks, and a note"
    for file, name in TEST.findall(tests):
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        assert name in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)], f"{file}::{name}"
