"""List the commands: `python -m xtransfer`.

A command is a module `xtransfer/NAME.py` or a folder `xtransfer/NAME/` with a `__main__.py`, and the first line of its
docstring is what is listed. This list needs no entry for a new command; the tests and the README do (see
CONTRIBUTING.md).
"""

import argparse
import ast
from pathlib import Path

from xtransfer.errors import ConfigError, nearest
from xtransfer.runtime import terminal


def commands() -> dict[str, str]:
    """Return the commands by name, each with the first line of its docstring; nothing is imported."""
    package = Path(__file__).parent
    modules = {path.parent.name: path for path in package.glob("*/__main__.py")}
    modules |= {path.stem: path for path in package.glob("*.py") if not path.stem.startswith("__")}
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in sorted(modules.items())}
    return {name: (ast.get_docstring(tree) or "").partition("\n")[0] for name, tree in trees.items() if _runs(tree)}


def _runs(tree: ast.Module) -> bool:
    """Whether a module does something when it is run: it ends in `if __name__ == "__main__":`."""
    last = tree.body[-1]
    return isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'"


def main(argv: list[str]) -> None:
    """Print the commands, a line each."""
    parser = terminal.parser("COMMAND", __doc__)
    parser.add_argument("name", nargs="?", help=argparse.SUPPRESS)
    name, summaries = parser.parse_args(argv).name, commands()
    if name is not None:
        hint = nearest(name, summaries) or "; python -m xtransfer lists the commands"
        raise ConfigError(f"{name!r} is not a command by itself{hint}: commands are python -m xtransfer.COMMAND")
    width = max(map(len, summaries))
    print("usage: python -m xtransfer.COMMAND --help\n")
    for name, summary in summaries.items():
        print(f"  {name:<{width}}  {summary}")


if __name__ == "__main__":
    terminal.run(main)
