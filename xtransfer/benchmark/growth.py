"""Memory and time of each stage as the text grows: read, tokenise, label, and train on N unlabelled synthetic texts.

The texts have the lengths of XNLI's premises, 20 words on average, and a random encoder of one layer labels them, so
that the host's work shows and not the model's. Every stage is a process of its own, and the system reports its peak
memory. Everything is in `DIR/N/`, where a second run starts again from the same texts.
"""

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xtransfer import storage
from xtransfer.benchmark.growth_stage import STAGES
from xtransfer.data.corpora.minireviews import generator
from xtransfer.errors import MachineError
from xtransfer.models.encoder import EncoderConfig
from xtransfer.report.table import Table
from xtransfer.runs.costs import read_costs
from xtransfer.runs.workdir import Workdir
from xtransfer.runtime import terminal

LABELS = ("contradiction", "entailment", "neutral")
_MEAN_LOG, _SPREAD = 2.88, 0.5  # of the logarithm of the number of words: 20 words on average, 95 % below 41
_MOST_WORDS = 100
_ZIPF = 1.2  # how fast the frequencies of words fall
_CHUNK = 10_000  # texts that are generated at once
_SMALL = {("en", "train"): 600, ("en", "dev"): 300, ("en", "test"): 1000, ("de", "test"): 1000}

_CONFIG = '''"""The experiment of `python -m xtransfer.benchmark --growth`."""

from xtransfer import config as settings


def get_config(arg=""):
    config = settings.default()
    config.task.name = "files"
    config.task.data_dir = {data!r}
    config.task.cache_dir = {cache!r}
    config.task.path = "{{language}}/{{split}}.jsonl"
    config.task.source_language = "en"
    config.task.unlabelled_from = "split"
    config.objectives = ("vanilla", "monox_kd")
    config.seeds = (0,)
    for role, model in (("teacher", config.teacher), ("student", config.student)):
        model.checkpoint = {checkpoints!r} + "/" + role
        model.max_length = 64
        model.steps = 200
        model.evaluations = 2
    return config
'''


# On Linux, a process inherits the peak memory of its parent. So a small process launches each stage.
_LAUNCHER = """
import json, os, subprocess, sys
try:
    process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
except KeyboardInterrupt:
    sys.exit(130)
print(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss]))
"""


@dataclass(frozen=True)
class StageCost:
    """What one stage took.

    Attributes:
      name: the stage.
      seconds: the time on the clock.
      cpu_seconds: the processor time of all its threads, which other programs disturb less; 0 for a part of `main`.
      texts: the number of texts that it processed.
      peak_bytes: the most resident memory of its process, with the pages of mapped files.
    """

    name: str
    seconds: float
    cpu_seconds: float
    texts: int
    peak_bytes: int


def measure(texts: int, directory: Path) -> list[StageCost]:
    """Run every stage on a number of texts in a directory, and return their costs in order.

    Raises:
      UserError: a stage failed; its own message comes before.
    """
    directory = directory / str(texts)
    shutil.rmtree(directory / "cache", ignore_errors=True)
    shutil.rmtree(directory / "workdir", ignore_errors=True)
    if not (directory / "config.py").exists():
        terminal.log(f"writing {texts:,} texts to {directory}")
        prepare(directory, texts)
    config, workdir = directory / "config.py", directory / "workdir"
    costs = [_run(name, texts, ["xtransfer.benchmark.growth_stage", name, str(config)]) for name in STAGES]
    whole = _run("main", texts, ["xtransfer.main", "--config", str(config), "--workdir", str(workdir)])
    for row in read_costs(Workdir(workdir)):
        costs.append(StageCost(f"{row.stage} {row.run}", row.seconds, 0.0, row.examples, row.peak_bytes))
    costs.append(dataclasses.replace(whole, name="main, all stages"))
    costs.append(_run("describe", texts, ["xtransfer.describe", "--config", str(config), "--workdir", str(workdir)]))
    shutil.rmtree(workdir / "predictions")
    costs.append(_run("evaluate", 2000, ["xtransfer.evaluate", "--workdir", str(workdir)]))
    return costs


def table(costs: Sequence[StageCost], texts: int) -> Table:
    """Return the costs as a table."""
    rows = tuple(
        (
            cost.name,
            f"{cost.seconds:,.1f}",
            f"{cost.cpu_seconds:,.1f}" if cost.cpu_seconds else "",
            f"{cost.texts / cost.seconds:,.0f}",
            f"{cost.peak_bytes / 2**20:,.0f}",
        )
        for cost in costs
    )
    return Table(("stage", "seconds", "CPU seconds", "texts/s", "peak MiB"), rows, 1, f"{texts:,} unlabelled texts")


def prepare(directory: Path, texts: int) -> None:
    """Write the texts, the checkpoints, and the config of an experiment. The same numbers give the same files."""
    data = directory / "data"
    for number, ((language, split), count) in enumerate({**_SMALL, ("en", "unlabelled"): texts}.items()):
        path = data / language / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for index, text in enumerate(synthetic_texts(language, count, seed=number)):
                label = {} if split == "unlabelled" else {"label": LABELS[index % len(LABELS)]}
                file.write(json.dumps({"text": text, **label}, ensure_ascii=False) + "\n")
    for role, source in (("teacher", "mini-bert-en"), ("student", "mini-bert-multilingual")):
        if not (directory / "checkpoints" / role).exists():
            _write_checkpoint(directory / "checkpoints" / role, source)
    content = _CONFIG.format(data=str(data), cache=str(directory / "cache"), checkpoints=str(directory / "checkpoints"))
    storage.write_atomically(directory / "config.py", content)


def synthetic_texts(language: str, count: int, seed: int) -> Iterator[str]:
    """Yield texts of words from the synthetic reviews, with Zipf's frequencies and log-normal lengths."""
    reviews = generator.reviews(language, "test")
    words = np.array(sorted({word for review in reviews for word in review.text.split()}), object)
    random = np.random.default_rng([seed, count])
    words = words[random.permutation(len(words))]
    shares = np.arange(1, len(words) + 1, dtype=np.float64) ** -_ZIPF
    thresholds = np.cumsum(shares / shares.sum())
    for start in range(0, count, _CHUNK):
        size = min(_CHUNK, count - start)
        lengths = np.clip(np.rint(random.lognormal(_MEAN_LOG, _SPREAD, size)), 1, _MOST_WORDS).astype(np.int64)
        drawn = words[np.minimum(np.searchsorted(thresholds, random.random(lengths.sum())), len(words) - 1)].tolist()
        ends = np.cumsum(lengths).tolist()
        for first, last in zip([0, *ends[:-1]], ends, strict=True):
            yield " ".join(drawn[first:last])


def _write_checkpoint(directory: Path, source: str) -> None:
    """Write a random encoder of one layer with the tokenizer of an embedded one."""
    from flax import nnx

    from xtransfer.data.tokens.tokenizer import load_tokenizer
    from xtransfer.models.heads import MaskedLM
    from xtransfer.models.hf import checkpoint as hf_checkpoint

    tokenizer = load_tokenizer(hf_checkpoint.resolve(source))
    architecture = EncoderConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        intermediate_size=64,
        max_positions=128,
    )
    params = nnx.state(MaskedLM(architecture, rngs=nnx.Rngs(0), with_next_sentence=True), nnx.Param)
    hf_checkpoint.save(directory, architecture, params, tokenizer=tokenizer)


def _run(name: str, texts: int, arguments: Sequence[str]) -> StageCost:
    """Run a module in a process of its own, and return its time and peak memory."""
    start = time.monotonic()
    command = [sys.executable, "-S", "-c", _LAUNCHER, sys.executable, "-m", *arguments]
    launched = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    status, cpu_seconds, peak = json.loads(launched.stdout or "[1, 0, 0]")
    if status:
        raise MachineError(f"stage {name} ended with status {status}: see the lines above")
    unit = 1 if sys.platform == "darwin" else 1024
    cost = StageCost(name, round(time.monotonic() - start, 1), round(cpu_seconds, 1), texts, peak * unit)
    terminal.log(f"{name}: {cost.seconds:,.1f} s, {cost.peak_bytes / 2**20:,.0f} MiB")
    return cost
