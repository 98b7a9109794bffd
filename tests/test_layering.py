"""The house rules: which modules may import which, which packages are banned, and what belongs at the top level.

Add a new engine package to LAYERS and a new command to COMMANDS. Nothing else here has to change.
"""

import ast
import graphlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "xtransfer"

# Lowest first. A module imports from the layers below its own, and from its own package.
LAYERS = (
    ("startup",),
    ("errors",),
    ("config", "storage"),
    ("runtime",),
    ("models",),
    ("data",),
    ("distillation",),
    ("train",),
    ("runs",),
    ("evaluation",),
    ("experiment",),
    ("report",),  # also a command: the other commands print with its table writer
    ("pretrain",),  # also a command: a study pretrains encoders
)
COMMANDS = ("main", "evaluate", "predict", "export", "trim", "describe", "precompile", "parity", "study")
ABOVE_COMMANDS = ("benchmark",)  # a command that runs the code of the others, to measure it
TOP_LEVEL = {
    ".ci",
    ".gitignore",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "README.md",
    "configs",
    "launch",
    "pyproject.toml",
    "setup.cfg",
    "tests",
    "xtransfer",
}
# The package itself is between startup, the lowest layer, and the errors. Its list of commands is a command.
PACKAGE_RANK = 0.5
RANK = {name: rank for rank, layer in enumerate((*LAYERS, (*COMMANDS, "__main__"), ABOVE_COMMANDS)) for name in layer}
UNLAYERED = ("__init__",)

# Weights are read and the models are written here, so nothing may unpickle or import another framework.
BANNED = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "tensorflow", "keras"}
ONLY_IN = {
    "orbax": {"xtransfer.train.checkpoints"},
    "torch": {"xtransfer.parity.reference", "xtransfer.benchmark.peer"},
    "matplotlib": {"xtransfer.report.plot", "xtransfer.report.sweep_plot"},
    "rich": {"xtransfer.runtime.terminal", "xtransfer.report.table"},
    "tensorboard": {"xtransfer.train.tensorboard"},
}
# Imported inside functions: torch and tensorboard are optional, and matplotlib is slow to import.
LAZY = {"torch", "matplotlib", "tensorboard"}
MAY_USE_TRANSFORMERS_MODELS = {"xtransfer.parity.reference", "xtransfer.benchmark.peer"}
MUST_BE_FALSE = {"allow_pickle", "trust_remote_code"}
TRANSFORMERS_NAMES = re.compile(r"(?i).*tokeniz.*|SLOW_TO_FAST_CONVERTERS|BatchEncoding|logging|utils|__version__")

FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    """Return xtransfer.data.task for xtransfer/data/task.py, and xtransfer.data.__init__ for its __init__.py."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def imports(tree: ast.Module, module: str) -> Iterator[tuple[str, int]]:
    """Yield every dotted name that the module imports, with its line. `from a import b` gives a.b."""
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


def top_name(name: str) -> str:
    """Return the module or package directly under xtransfer that a dotted name belongs to; "" for xtransfer itself."""
    second = [*name.split("."), ""][1]
    return "" if second in (*UNLAYERED, "__version__") else second


def layer_faults(tree: ast.Module, module: str) -> Iterator[str]:
    """Yield imports that point upward or sideways, and modules without a layer."""
    package = top_name(module)
    if package and package not in RANK:
        yield f"{module}: not listed; add it to LAYERS or COMMANDS in tests/test_layering.py"
        return
    rank = RANK.get(package, PACKAGE_RANK)
    for name, line in imports(tree, module):
        imported = top_name(name)
        if name.split(".")[0] != "xtransfer" or not imported or imported == package:
            continue
        if imported not in RANK:
            yield f"{module}:{line}: imports {name}, which is in no layer"
        elif RANK[imported] >= rank:
            yield f"{module}:{line}: {package or 'xtransfer'} imports {imported}, which is not below it"


def package_faults(tree: ast.Module, module: str) -> Iterator[str]:
    """Yield imports of banned or misplaced packages, and uses of transformers beyond its tokenizers."""
    nodes, may_use_models = list(ast.walk(tree)), module in MAY_USE_TRANSFORMERS_MODELS
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside_functions = {line for node in functions for line in range(node.lineno + 1, (node.end_lineno or 0) + 1)}
    for name, line in imports(tree, module):
        top, *rest = name.split(".")
        if top in BANNED:
            yield f"{module}:{line}: imports {top}"
        if module not in ONLY_IN.get(top, {module}):
            yield f"{module}:{line}: imports {top}, which only {', '.join(sorted(ONLY_IN[top]))} may"
        elif top in LAZY and line not in inside_functions:
            yield f"{module}:{line}: imports {top} outside a function"
        if top == "transformers" and rest and not TRANSFORMERS_NAMES.fullmatch(rest[-1]) and not may_use_models:
            yield f"{module}:{line}: imports {name}: only the tokenizers of transformers are used"
    aliases = [alias for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    transformers_names = {alias.asname or alias.name for alias in aliases if alias.name == "transformers"}
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in transformers_names:
            if not TRANSFORMERS_NAMES.fullmatch(node.attr) and not may_use_models:
                yield f"{module}:{node.lineno}: uses transformers.{node.attr}: only its tokenizers are used"
        elif isinstance(node, ast.keyword) and node.arg in MUST_BE_FALSE and ast.unparse(node.value) != "False":
            yield f"{module}:{node.lineno}: {node.arg} may only be False"


def faults(source: str, module: str) -> list[str]:
    """Return every breach of the house rules in one file."""
    tree = ast.parse(source)
    return [*layer_faults(tree, module), *package_faults(tree, module)]


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Return, for each module, the modules of the package that it imports."""

    def resolve(name: str) -> str:
        while name and name not in sources:
            name = name.rpartition(".")[0]
        return name

    graph = {}
    for module, source in sources.items():
        imported = {resolve(name) for name, _ in imports(ast.parse(source), module)}
        graph[module] = imported - {module, ""}
    return graph


@pytest.mark.parametrize("path", FILES, ids=[module_name(path) for path in FILES])
def test_house_rules(path: Path) -> None:
    assert faults(path.read_text(encoding="utf-8"), module_name(path)) == []


def test_there_is_no_import_cycle() -> None:
    sources = {module_name(path).removesuffix(".__init__"): path.read_text(encoding="utf-8") for path in FILES}
    tuple(graphlib.TopologicalSorter(import_graph(sources)).static_order())  # CycleError names the modules


def test_an_import_cycle_is_detected() -> None:
    sources = {"xtransfer.a": "from xtransfer.b import x", "xtransfer.b": "def f():\n    import xtransfer.a"}
    with pytest.raises(graphlib.CycleError):
        tuple(graphlib.TopologicalSorter(import_graph(sources)).static_order())


def test_every_folder_with_modules_is_a_package() -> None:
    """Without an __init__.py, a wheel would leave the folder out."""
    assert [str(folder) for folder in {path.parent for path in FILES} if not (folder / "__init__.py").exists()] == []


def test_the_package_top_level_holds_only_listed_modules() -> None:
    modules = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert modules == {*RANK, *UNLAYERED}
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders - modules == {"pretrained"}, "the embedded checkpoints are the only folder without modules"


def test_the_repository_top_level_holds_only_known_entries() -> None:
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    entries = {line.split("/")[0] for line in listed.splitlines() if (ROOT / line).exists()}
    assert entries - TOP_LEVEL == set()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("xtransfer.data.task", "from xtransfer.distillation import objectives"),
        ("xtransfer.models.hf.config", "from ...data.tokens import tokenizer"),
        ("xtransfer.models.__init__", "from ..data import task"),
        ("xtransfer.config", "from xtransfer.data.registry import TASKS"),
        ("xtransfer.config", "from xtransfer import storage"),
        ("xtransfer.data.tokens.cache", "from xtransfer.runs import workdir"),
        ("xtransfer.train.loop", "import xtransfer.evaluation.evaluator"),
        ("xtransfer.train.loop", "def late():\n    from xtransfer import experiment"),
        ("xtransfer.train.loop", "import importlib\nimportlib.import_module('xtransfer.evaluation')"),
        ("xtransfer.runs.find", "from xtransfer.evaluation.results import BASELINE"),
        ("xtransfer.experiment", "from xtransfer.main import main"),
        ("xtransfer.describe.dataset", "from xtransfer.precompile import steps"),
        ("xtransfer.describe.dataset", "from xtransfer.benchmark import products"),
        ("xtransfer.report.table", "from xtransfer.describe import dataset"),
        ("xtransfer.__init__", "from xtransfer.errors import UserError"),
        ("xtransfer.data.task", "from xtransfer.helpers import anything"),
        ("xtransfer.helpers", "x = 1"),
        ("xtransfer.evaluation.evaluator", "import orbax.checkpoint as ocp"),
        ("xtransfer.train.loop", "from orbax import checkpoint"),
        ("xtransfer.train.loop", "from rich.table import Table"),
        ("xtransfer.report.summary", "def f():\n    import matplotlib.pyplot"),
        ("xtransfer.report.plot", "from matplotlib.figure import Figure"),
        ("xtransfer.train.loop", "def f():\n    from tensorboard.compat.proto import event_pb2"),
        ("xtransfer.train.tensorboard", "from tensorboard.compat.proto import event_pb2"),
        ("xtransfer.models.hf.weights", "import pickle"),
        ("xtransfer.models.hf.pytorch_file", "from pickle import Unpickler"),
        ("xtransfer.models.hf.weights", "def f():\n    import torch.nn"),
        ("xtransfer.parity.activations", "def f():\n    from torch import nn"),
        ("xtransfer.parity.__main__", "def f():\n    import importlib\n    importlib.import_module('torch')"),
        ("xtransfer.parity.reference", "import torch"),
        ("xtransfer.parity.reference", "if True:\n    from torch import nn\ndef f():\n    return nn"),
        ("xtransfer.parity.reference", "def f():\n    import tensorflow"),
        ("xtransfer.parity.reference", "load('x', trust_remote_code=True)"),
        ("xtransfer.export.__main__", "def f():\n    from transformers import AutoModelForSequenceClassification"),
        (
            "xtransfer.parity.__main__",
            "def f():\n    import transformers\n    transformers.AutoModel.from_pretrained(x)",
        ),
        ("xtransfer.models.hf.hub", "from tensorflow import keras"),
        ("xtransfer.models.hf.hub", "from transformers import AutoModel"),
        ("xtransfer.models.hf.hub", "from transformers import AutoTokenizer, BertForSequenceClassification"),
        ("xtransfer.models.hf.hub", "from transformers.models.bert.modeling_bert import BertModel"),
        ("xtransfer.models.hf.hub", "import transformers\ntransformers.AutoModel.from_pretrained('x')"),
        ("xtransfer.models.hf.hub", "def f():\n    import transformers as tf\n    tf.BertModel"),
        ("xtransfer.distillation.logits_store", "import numpy as np\nnp.load('x', allow_pickle=True)"),
        ("xtransfer.data.tokens.tokenizer", "load('x', trust_remote_code=flag)"),
    ],
)
def test_each_fault_is_reported_once(module: str, source: str) -> None:
    assert len(faults(source, module)) == 1, faults(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("xtransfer.data.task", "from xtransfer.errors import UserError\nfrom . import sampling\nimport numpy"),
        ("xtransfer.data.corpora.minireviews.generator", "from .... import config\nfrom ....errors import UserError"),
        ("xtransfer.models.hf.checkpoint", "from xtransfer import __version__, storage"),
        ("xtransfer.runtime.terminal", "from xtransfer.errors import UserError"),
        ("xtransfer.main", "from xtransfer.report.table import Table\nfrom xtransfer.experiment import run"),
        ("xtransfer.export.__main__", "from xtransfer.runs.classifier import load_run"),
        ("xtransfer.benchmark.ours", "from xtransfer.predict.predictor import predict"),
        ("xtransfer.train.checkpoints", "import orbax.checkpoint as ocp"),
        ("xtransfer.report.plot", "def f():\n    from matplotlib.figure import Figure"),
        ("xtransfer.parity.reference", "def f():\n    import torch\n    from transformers import AutoModel"),
        ("xtransfer.parity.reference", "def f():\n    import transformers\n    transformers.BertModel"),
        ("xtransfer.data.tokens.tokenizer", "from transformers import AutoTokenizer, PreTrainedTokenizerFast"),
        (
            "xtransfer.data.tokens.vocabularies",
            "from transformers.convert_slow_tokenizer import SLOW_TO_FAST_CONVERTERS",
        ),
        ("xtransfer.models.hf.hub", "import transformers\ntransformers.utils.logging.set_verbosity_error()"),
        ("xtransfer.models.hf.hub", "load('x', allow_pickle=False, trust_remote_code=False)"),
    ],
)
def test_allowed_imports_are_not_faults(module: str, source: str) -> None:
    assert faults(source, module) == []
