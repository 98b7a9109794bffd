"""Our side: a worker that trains, labels, predicts, and tokenizes with the code of `main` and `predict`.

Training runs the compiled step on packed batches, which a thread prepares and places on the devices. Labelling runs
`Finetuner.predict`, and prediction `predict.predictor.predict`; both start from text. Only compiled programs are kept,
beside the texts.
"""

import dataclasses
import itertools
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from xtransfer import config
from xtransfer.benchmark import products, worker
from xtransfer.benchmark.numbers import Burst
from xtransfer.config import BenchmarkConfig
from xtransfer.data.batches.batches import TrainBatches, eval_batches
from xtransfer.data.batches.prefetch import prefetch
from xtransfer.data.formats import tables
from xtransfer.data.task import Example, example_id
from xtransfer.data.tokens.tokenizer import tokenize
from xtransfer.distillation.objectives import OBJECTIVES
from xtransfer.errors import ConfigError, MachineError
from xtransfer.models import inference
from xtransfer.models.hf import config as hf_config
from xtransfer.models.hf.weights import WeightSource
from xtransfer.predict import predictor
from xtransfer.runs.classifier import TrainedClassifier
from xtransfer.runs.costs import peak_memory
from xtransfer.runtime import compilation_cache, terminal
from xtransfer.runtime.sharding import check_platform, make_mesh, path_name, place_batch, process_slice
from xtransfer.train.finetuning import Finetuner
from xtransfer.train.inputs import checkpoint_of
from xtransfer.train.work import Work

_IMPORTED = time.monotonic()
_CLASSES = ("LABEL_0", "LABEL_1")  # of the new head of a checkpoint without one
_TOKENIZED = 1000  # the smallest number of texts to tokenize
_BATCHES = 4  # the smallest number of batches of inference, of which the last one is not full
_PROGRAM_FOUND = "/jax/compilation_cache/cache_hits"  # JAX's event
_ROUNDS = 3  # in which a step and its bare products alternate


class Part(Protocol):
    """One kind of work on a model.

    Attributes:
      unit: the smallest number of examples; amounts are multiples of it.
    """

    unit: int

    def run(self, amount: int) -> Burst:
        """Process the first `amount` examples, which are the same in each call."""

    def step(self, seconds: float) -> dict[str, Any] | None:
        """Measure the compiled step for about `seconds`; None if there is none."""


class Training:
    """Training steps with hard labels."""

    def __init__(self, model: Finetuner, texts: Sequence[Example]):
        self._dataset = model.dataset(texts)
        plan = model.training_plan(len(texts))
        self._batches, self._mesh = TrainBatches(self._dataset, plan, seed=0), model.mesh
        self._step = model.compiled_steps.train_step(OBJECTIVES["vanilla"])
        self._rate = np.float32(model.settings.learning_rate)
        self._state = model.compiled_steps.initial_state(model.fresh_params(seed=0), 0)
        self._key, self.unit = jax.random.key(0), plan.batch_size

    def run(self, amount: int) -> Burst:
        """Take one step for each batch."""
        steps, slots = amount // self.unit, 0
        _, num_slices = process_slice(self._mesh)
        start = time.perf_counter()
        host_batches = map(self._batches, range(steps))
        with closing(prefetch(place_batch(self._mesh, batch, num_slices) for batch in host_batches)) as batches:
            for batch in batches:
                slots += batch["input_ids"].size
                self._state, terms = self._step(self._state, batch, self._key, self._rate)
            jax.block_until_ready((self._state, terms))
        seconds = time.perf_counter() - start
        return Burst(seconds, amount, int(self._dataset.tokens.lengths[self.indices(amount)].sum()), slots)

    def indices(self, amount: int) -> np.ndarray:
        """Return the positions of the first `amount` examples in the texts, in the order of training."""
        return np.concatenate([self._batches.indices(i) for i in range(amount // self.unit)])

    def step(self, seconds: float) -> dict[str, Any]:
        """Measure the training step on the first batch."""
        batch = place_batch(self._mesh, self._batches(0), process_slice(self._mesh)[1])

        def run() -> Any:
            self._state, _ = self._step(self._state, batch, self._key, self._rate)
            return self._state

        return _measured_step(run, self._step, (self._state, batch, self._key, self._rate), seconds)


class Labelling:
    """The logits of the examples, from text, as a teacher computes them."""

    def __init__(self, model: Finetuner, texts: Sequence[Example]):
        self._model, self._texts, self._params = model, texts, model.fresh_params(seed=0)
        row_length = model.settings.row_length or model.settings.max_length
        per_row = row_length / model.dataset(texts).tokens.lengths.mean() if model.settings.packed else 1.0
        self.unit = _BATCHES * math.ceil(model.eval_batch_size * per_row)

    def run(self, amount: int) -> Burst:
        """Tokenize the texts and compute their logits."""
        before, texts = dataclasses.replace(self._model.predicted), list(_cycled(self._texts, amount))
        start = time.perf_counter()
        self._model.predict(self._params, self._model.dataset(texts))
        return _burst(time.perf_counter() - start, self._model.predicted.since(before))

    def step(self, seconds: float) -> dict[str, Any]:
        """Measure the forward pass on the first batch."""
        model = self._model
        _, batch = next(eval_batches(model.dataset(self._texts), model.inputs.evaluation_plan(model.eval_batch_size)))
        return _forward_step(model.compiled_steps.eval_step, self._params, _placed(model.mesh, batch), seconds)


class Prediction:
    """The command `predict`, from a file to the logits of its rows, without the output."""

    def __init__(self, model: Finetuner, texts: Sequence[Example], batch_size: int | None, scratch: Path):
        self._model, self._texts, self._batch_size, self._scratch = model, texts, batch_size, scratch
        self._lengths = model.dataset(texts).tokens.lengths
        self._step, self._slots = model.compiled_steps.eval_step, 0
        self._largest: dict[str, jax.Array] = {}
        inputs, rows = model.inputs, batch_size or inference.default_rows(model.mesh, predictor.BATCH_TEXT)
        self.unit = _BATCHES * math.ceil(rows * predictor.BATCH_TEXT / self._lengths.mean())
        self._classifier = TrainedClassifier(
            source=inputs.directory,
            directory=inputs.directory,
            architecture=inputs.architecture,
            tokenizer=inputs.tokenizer,
            graphdef=model.compiled_steps.graphdef,
            params=model.fresh_params(seed=0),
            labels=model.labels,
            pooling=model.settings.pooling,
            max_length=model.settings.max_length,
            dtype=model.settings.compute_dtype,
        )

    def run(self, amount: int) -> Burst:
        """Read, tokenize, and classify a file."""
        rows = ({"text": example.text} for example in _cycled(self._texts, amount))
        self._scratch.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        self._slots = 0
        start = time.perf_counter()
        source = tables.inspect(self._scratch, "text", "", "", skip_empty=False)
        max_length = self._model.settings.max_length
        for _ in predictor.predict(
            self._classifier, self._model.mesh, source, max_length, self._batch_size, step=self._counted_step
        ):
            pass
        seconds = time.perf_counter() - start
        return Burst(seconds, amount, int(sum(_cycled(self._lengths.tolist(), amount))), self._slots)

    def _counted_step(self, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        self._slots += batch["input_ids"].size
        if not self._largest or batch["input_ids"].size > self._largest["input_ids"].size:
            self._largest = dict(batch)
        return self._step(params, batch)

    def step(self, seconds: float) -> dict[str, Any]:
        """Measure the forward pass on the largest batch so far."""
        return _forward_step(self._step, self._classifier.params, self._largest, seconds)


class Tokenising:
    """Texts to token ids."""

    unit = _TOKENIZED

    def __init__(self, model: Finetuner, texts: Sequence[Example]):
        self._inputs, self._texts = model.inputs, texts

    def run(self, amount: int) -> Burst:
        """Tokenize the texts."""
        texts = [example.text for example in _cycled(self._texts, amount)]
        start = time.perf_counter()
        tokens = tokenize(self._inputs.tokenizer, texts, None, self._inputs.settings.max_length)
        count = len(tokens.input_ids)
        return Burst(time.perf_counter() - start, amount, count, count)

    def step(self, seconds: float) -> None:
        """Return nothing, because nothing is compiled."""


def _cycled(items: Sequence[Any], amount: int) -> Any:
    return itertools.islice(itertools.cycle(items), amount)


def _burst(seconds: float, work: Work) -> Burst:
    return Burst(seconds, work.examples, int(work.real), work.slots)


def _placed(mesh: jax.sharding.Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    return place_batch(mesh, {key: batch[key] for key in inference.INPUTS})


def _forward_step(step: inference.EvalStep, params: Any, batch: Any, seconds: float) -> dict[str, Any]:
    return _measured_step(lambda: step(params, batch), step, (params, batch), seconds)


def _measured_step(
    run: Callable[[], Any], step: Callable[..., Any], arguments: tuple[Any, ...], seconds: float
) -> dict[str, Any]:
    """Return the times of a step and of its products alone, divided over the devices. The two alternate.

    Args:
      run: takes one step.
      step: the compiled function behind it.
      arguments: its arguments, of which the second is the batch.
      seconds: the time to measure for.
    """
    counts = products.products_of(step, *arguments)
    shape = arguments[1]["input_ids"].shape
    bare = products.BareProducts(counts)
    bare.seconds(0.0)  # compiles
    jax.block_until_ready(run())
    budget = seconds / (2 * _ROUNDS)
    # The products run on one device, and all devices share the step. The virtual devices of a CPU share its cores.
    devices = 1 if jax.default_backend() == "cpu" else jax.device_count()
    rounds = []
    for _ in range(_ROUNDS):
        times: list[float] = []
        while not times or sum(times) < budget:
            start = time.perf_counter()
            jax.block_until_ready(run())
            times.append(time.perf_counter() - start)
        rounds.append({"step_seconds": statistics.median(times), "products_seconds": bare.seconds(budget) / devices})
    return {
        "rows": shape[0],
        "row_length": shape[1],
        "products": sum(counts.values()),
        "flops": products.total_flops(counts),
        "rounds": rounds,
    }


class Ours:
    """The handler of the worker's requests: open, prepare, run, indices, step, and close, in this order."""

    def __init__(self) -> None:
        self._part: Any = None
        self._programs_found = 0

    def __call__(self, request: Mapping[str, Any]) -> worker.Answer:
        """Answer one request."""
        match request["do"]:
            case "open":
                return self._open(request)
            case "prepare":
                self._part = None  # frees its memory first
                self._part = self._new_part(request["part"])
                return {"unit": self._part.unit}
            case "run":
                return dataclasses.asdict(self._part.run(request["amount"]))
            case "indices":
                return {"indices": self._part.indices(request["amount"]).tolist()}
            case "step":
                return {"step": self._part.step(request["seconds"])}
            case "close":
                peak, kind = peak_memory()
                return {"peak_bytes": peak, "memory": kind, "programs_found": self._programs_found}
        raise ValueError(f"no such request: {request['do']}")

    def _open(self, request: Mapping[str, Any]) -> worker.Answer:
        """Load the texts, the tokenizer, and the checkpoint."""
        started = time.monotonic()
        terminal.console.quiet = True  # the parent reports truncated texts
        settings: BenchmarkConfig = config.parse(request["settings"], BenchmarkConfig)
        path = Path(request["texts"])
        # As `main` and `predict` do, but not in the user's cache, so that the next measurement compiles too.
        compilation_cache.enable(path.parent)
        jax.monitoring.register_event_listener(self._count_programs)
        check_platform(settings.platform)
        if request["against"]:
            _check_devices()
        student, self._batch_size = settings.student, settings.evaluation_batch_size
        directory = checkpoint_of("student", student)
        source = WeightSource.open(directory, hf_config.read_family(directory))
        labels: tuple[str, ...] = _CLASSES
        if "head.kernel" in source.targets:
            labels = hf_config.class_names(directory, source.targets["head.kernel"].shape[0])
        mesh = make_mesh(dataclasses.astuple(settings.mesh))
        rows = self._batch_size or inference.default_rows(mesh, student.row_length or student.max_length)
        self._model = Finetuner("student", student, labels, mesh, eval_batch_size=rows)
        self._texts = _examples(json.loads(path.read_text(encoding="utf-8")), len(labels))
        self._scratch = path.with_name("prediction.jsonl")
        tokens = self._model.dataset(self._texts).tokens
        answer = {
            "imports_seconds": _IMPORTED - request["spawned"],
            "loading_seconds": time.monotonic() - started,
            "directory": str(directory),
            "classes": len(labels),
            "tokens": int(tokens.lengths.sum()),
            "truncated": int(np.count_nonzero(tokens.truncated)),
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(self._model.compiled_steps.shapes)),
            "platform": jax.default_backend(),
            "device_kind": jax.devices()[0].device_kind,
            "devices": jax.device_count(),
        }
        return answer | (_for_the_peer(self._model, source) if request["against"] else {})

    def _count_programs(self, event: str, **_: Any) -> None:
        self._programs_found += event == _PROGRAM_FOUND

    def _new_part(self, name: str) -> Part:
        match name:
            case "training":
                return Training(self._model, self._texts)
            case "labelling":
                return Labelling(self._model, self._texts)
            case "prediction":
                return Prediction(self._model, self._texts, self._batch_size or None, self._scratch)
            case "tokenising":
                return Tokenising(self._model, self._texts)
        raise ValueError(f"no such part: {name}")


def _examples(texts: Sequence[str], classes: int) -> list[Example]:
    return [
        Example(example_id("benchmark", "given", "text", str(i)), text, None, i % classes, "text")
        for i, text in enumerate(texts)
    ]


def _check_devices() -> None:
    """Refuse devices on which the peer does not run."""
    platform = jax.default_backend()
    if platform not in ("cpu", "gpu"):
        raise MachineError(
            f"--against transformers runs on a CPU or a GPU, and JAX on {platform}: set JAX_PLATFORMS=cpu"
        )
    if platform == "gpu" and jax.device_count() > 1:
        raise MachineError(
            f"--against transformers uses one GPU, and JAX {jax.device_count()}: set CUDA_VISIBLE_DEVICES=0"
        )


def _for_the_peer(model: Finetuner, source: WeightSource) -> dict[str, Any]:
    """Return the names of the frozen tensors; refuse what `transformers` cannot do.

    Raises:
      UserError: `transformers` has no such classifier, or a frozen parameter is no tensor of its own there.
    """
    settings, family = model.settings, model.inputs.architecture.family
    if source.family.saved_as not in (None, source.family.name):
        raise ConfigError(f"--against transformers: it does not load a checkpoint of type {family}; leave the flag out")
    if not hf_config.transformers_pools(family, settings.pooling):
        raise ConfigError(
            f"--against transformers: it has no {family} classifier that pools by {settings.pooling}; choose another "
            "student.pooling, or leave the flag out"
        )
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(model.compiled_steps.shapes)]
    frozen = {path for path in paths if any(re.search(pattern, path) for pattern in settings.frozen)}
    trained_tensors = {source.targets[path].name for path in paths if path in source.targets and path not in frozen}
    for path in sorted(frozen):
        if path not in source.targets or source.targets[path].name in trained_tensors:
            raise ConfigError(
                f"--against transformers: {path}, which student.frozen selects, is no tensor of its own in the "
                "checkpoint, so it cannot be frozen there; leave the flag out"
            )
    return {"frozen": sorted({source.targets[path].name for path in frozen})}


if __name__ == "__main__":
    worker.serve(Ours())
