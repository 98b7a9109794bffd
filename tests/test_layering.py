"""Holds the house rules that a reviewer should not have to: who imports whom, what is never imported, how long is long.

A new module or binary gets its floor in FLOORS; nothing else here has to change for it.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "xtransfer"

# A room (module or folder directly under xtransfer/) imports from lower floors, and from its own room. The rooms of
# floor 0 and the binaries are each one room; data/ and models/ share a floor, but not a room.
FLOORS = {
    **dict.fromkeys(("errors", "storage", "cli", "cluster", "config", "distributed", "sharding", "workdir"), 0),
    **dict.fromkeys(("compiled", "hlo", "preemption", "topology"), 0),
    **dict.fromkeys(("data", "models"), 1),
    "transfer": 2,
    "train": 3,
    "evaluation": 4,
    **dict.fromkeys(("experiment", "trained"), 5),
    **dict.fromkeys(
        ("main", "evaluate", "report", "pretrain", "parity", "export", "predict", "describe", "description"), 6
    ),
    "precompile": 6,
}
ONE_ROOM = (0, 6)

# Weights come as safetensors and models are our own, so nothing here unpickles or borrows a framework.
FORBIDDEN = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "tensorflow", "keras"}
ONLY_IN = {"orbax": {"xtransfer.train.checkpoints"}, "torch": {"xtransfer.models.reference"}}
# What others compute is compared with in one place, and it is no dependency: imported when it is asked for, not before.
MODELS_OF_TRANSFORMERS_IN = {"xtransfer.models.reference"}
LAZY = {"torch"}
MUST_BE_FALSE = {"allow_pickle", "trust_remote_code"}
TRANSFORMERS_NAMES = re.compile(r"(?i).*tokeniz.*|BatchEncoding|logging|utils|__version__")

FILE_LINES = 350
FUNCTION_LINES = 50
FILE_LINES_OF = {"xtransfer.main": 100}


def module_name(path: Path) -> str:
    """xtransfer/data/text.py -> xtransfer.data.text; a package's __init__.py keeps that last part."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def imports(tree: ast.Module, module: str) -> Iterator[tuple[str, int]]:
    """Every dotted name that the module imports, wherever in it, with its line; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *filter(None, [base])])
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value, node.lineno


def room_of(name: str) -> str:
    """The room of a dotted name under xtransfer; "" for the package itself."""
    second = [*name.split("."), ""][1]
    return "" if second in ("__init__", "__version__") else second


def floor_faults(tree: ast.Module, module: str) -> Iterator[str]:
    """Imports from a higher floor or from another room of the same one; rooms without a floor."""
    room = room_of(module)
    if room and room not in FLOORS:
        yield f"{module}: no floor is known for it: give it one in tests/test_floors.py"
        return
    floor = FLOORS.get(room, -1)  # xtransfer/__init__.py stands below them all
    for name, line in imports(tree, module):
        other = room_of(name)
        if name.split(".")[0] != "xtransfer" or not other or other == room:
            continue
        if other not in FLOORS:
            yield f"{module}:{line}: imports {name}, which has no floor"
        elif FLOORS[other] > floor or (FLOORS[other] == floor and floor not in ONE_ROOM):
            yield f"{module}:{line}: floor {floor} ({room or 'xtransfer'}) imports floor {FLOORS[other]} ({other})"


def package_faults(tree: ast.Module, module: str) -> Iterator[str]:
    """Packages that are never imported, or only in one place; transformers for more than its tokenizers."""
    nodes, may_use_models = list(ast.walk(tree)), module in MODELS_OF_TRANSFORMERS_IN
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside_functions = {line for node in functions for line in range(node.lineno + 1, (node.end_lineno or 0) + 1)}
    for name, line in imports(tree, module):
        top, *rest = name.split(".")
        if top in FORBIDDEN:
            yield f"{module}:{line}: imports {top}"
        if module not in ONLY_IN.get(top, {module}):
            yield f"{module}:{line}: imports {top}, which only {', '.join(sorted(ONLY_IN[top]))} may"
        elif top in LAZY and line not in inside_functions:
            yield f"{module}:{line}: imports {top} outside a function, so that nothing works without it"
        if top == "transformers" and rest and not TRANSFORMERS_NAMES.fullmatch(rest[-1]) and not may_use_models:
            yield f"{module}:{line}: imports {name}: only the tokenizers of transformers are used"
    aliases = [alias for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    called = {alias.asname or alias.name for alias in aliases if alias.name == "transformers"}
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in called:
            if not TRANSFORMERS_NAMES.fullmatch(node.attr) and not may_use_models:
                yield f"{module}:{node.lineno}: uses transformers.{node.attr}: only its tokenizers are used"
        elif isinstance(node, ast.keyword) and node.arg in MUST_BE_FALSE and ast.unparse(node.value) != "False":
            yield f"{module}:{node.lineno}: {node.arg} may only be False"


def length_faults(tree: ast.Module, module: str, lines: int) -> Iterator[str]:
    """Files and functions that are too long."""
    allowed = FILE_LINES_OF.get(module, FILE_LINES)
    if lines > allowed:
        yield f"{module}: {lines} lines, {allowed} are allowed"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            length = node.end_lineno - node.lineno + 1
            if length > FUNCTION_LINES:
                yield f"{module}:{node.lineno}: {node.name} has {length} lines, {FUNCTION_LINES} are allowed"


def faults(source: str, module: str) -> list[str]:
    """Everything that is against the house rules in one file."""
    tree = ast.parse(source)
    return [
        *floor_faults(tree, module),
        *package_faults(tree, module),
        *length_faults(tree, module, len(source.splitlines())),
    ]


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[module_name(path) for path in FILES])
def test_house_rules(path: Path) -> None:
    assert faults(path.read_text(encoding="utf-8"), module_name(path)) == []


def test_every_folder_with_modules_is_a_package() -> None:
    """Without an __init__.py, a wheel would leave the folder out."""
    assert [str(folder) for folder in {path.parent for path in FILES} if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("xtransfer.data.text", "from xtransfer.models import hf"),
        ("xtransfer.models.hf", "from ..data.text import tokenize"),
        ("xtransfer.models.__init__", "from ..data import text"),
        ("xtransfer.config", "from xtransfer.data.tasks import TASKS"),
        ("xtransfer.train.loop", "import xtransfer.evaluation.evaluator"),
        ("xtransfer.train.loop", "def late():\n    from xtransfer import experiment"),
        ("xtransfer.train.loop", "import importlib\nimportlib.import_module('xtransfer.evaluation')"),
        ("xtransfer.experiment", "from xtransfer.main import main"),
        ("xtransfer.__init__", "from xtransfer.errors import UserError"),
        ("xtransfer.data.text", "from xtransfer.helpers import anything"),
        ("xtransfer.helpers", "x = 1"),
        ("xtransfer.evaluation.evaluator", "import orbax.checkpoint as ocp"),
        ("xtransfer.train.loop", "from orbax import checkpoint"),
        ("xtransfer.models.hf", "import pickle"),
        ("xtransfer.models.hf", "def f():\n    import torch.nn"),
        ("xtransfer.models.parity", "def f():\n    from torch import nn"),
        ("xtransfer.parity", "def f():\n    import importlib\n    importlib.import_module('torch')"),
        ("xtransfer.models.reference", "import torch"),
        ("xtransfer.models.reference", "if True:\n    from torch import nn\ndef f():\n    return nn"),
        ("xtransfer.models.reference", "def f():\n    import tensorflow"),
        ("xtransfer.models.reference", "def f():\n    from xtransfer.data import text"),
        ("xtransfer.models.reference", "load('x', trust_remote_code=True)"),
        ("xtransfer.export", "def f():\n    from transformers import AutoModelForSequenceClassification"),
        ("xtransfer.parity", "def f():\n    import transformers\n    transformers.AutoModel.from_pretrained('x')"),
        ("xtransfer.trained", "from xtransfer.export import export"),
        ("xtransfer.evaluation.model_card", "from xtransfer.trained import Trained"),
        ("xtransfer.experiment", "from xtransfer.trained import open_run"),
        ("xtransfer.models.hf", "from tensorflow import keras"),
        ("xtransfer.models.hf", "from transformers import AutoModel"),
        ("xtransfer.models.hf", "from transformers import AutoTokenizer, BertForSequenceClassification"),
        ("xtransfer.models.hf", "from transformers.models.bert.modeling_bert import BertModel"),
        ("xtransfer.models.hf", "import transformers\ntransformers.AutoModel.from_pretrained('x')"),
        ("xtransfer.models.hf", "def f():\n    import transformers as tf\n    tf.BertModel"),
        ("xtransfer.transfer.logits_store", "import numpy as np\nnp.load('x', allow_pickle=True)"),
        ("xtransfer.data.text", "load('x', trust_remote_code=flag)"),
        ("xtransfer.data.text", "def f():\n" + "    x = 1\n" * FUNCTION_LINES),
        ("xtransfer.data.text", "class A:\n  async def f(self):\n" + "    x = 1\n" * FUNCTION_LINES),
        ("xtransfer.data.text", "x = 1\n" * (FILE_LINES + 1)),
        ("xtransfer.main", "x = 1\n" * 101),
    ],
)
def test_a_fault_is_found_once(module: str, source: str) -> None:
    assert len(faults(source, module)) == 1, faults(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("xtransfer.data.text", "from xtransfer.errors import UserError\nfrom . import packing\nimport numpy"),
        ("xtransfer.data.builders.minireviews.generator", "from ... import tasks\nfrom ....errors import UserError"),
        ("xtransfer.models.hf", "from xtransfer import __version__, sharding"),
        ("xtransfer.cli", "from xtransfer.errors import UserError"),
        ("xtransfer.evaluate", "from xtransfer.report import table\nfrom xtransfer.experiment import run"),
        ("xtransfer.export", "from xtransfer.trained import load_run"),
        ("xtransfer.train.checkpoints", "import orbax.checkpoint as ocp"),
        ("xtransfer.models.reference", "def f():\n    import torch\n    from transformers import AutoModel"),
        ("xtransfer.models.reference", "def f():\n    import transformers\n    transformers.BertModel"),
        ("xtransfer.data.text", "from transformers import AutoTokenizer, PreTrainedTokenizerFast"),
        ("xtransfer.data.text", "import transformers\ntransformers.utils.logging.set_verbosity_error()"),
        ("xtransfer.data.text", "load('x', allow_pickle=False, trust_remote_code=False)"),
        ("xtransfer.data.text", "def f():\n" + "    x = 1\n" * (FUNCTION_LINES - 1)),
        ("xtransfer.data.text", "x = 1\n" * FILE_LINES),
    ],
)
def test_what_is_allowed_is_not_a_fault(module: str, source: str) -> None:
    assert faults(source, module) == []
