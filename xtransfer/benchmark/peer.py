"""The other side: a worker that does the same work in PyTorch with `transformers`.

- Training is the loop of `Trainer` with its defaults: fused AdamW, clipping, a linear schedule, and batches that are
  padded to their longest text. `Trainer` itself needs another package, and adds logging and checkpoints.
- Labelling and prediction are `pipeline("text-classification")`.
- Tokenising calls the fast tokenizer with 1000 texts at a time.

Only `parity.reference` and this module import PyTorch, inside functions.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xtransfer.benchmark import worker
from xtransfer.benchmark.numbers import Burst
from xtransfer.errors import CheckpointError, ConfigError, MachineError, one_line

_TOKENIZED = 1000  # texts per call of the tokenizer


def available() -> bool:
    """Return whether PyTorch is installed."""
    return importlib.util.find_spec("torch") is not None


class Peer:
    """The handler of the worker's requests: open, prepare, batches, run, and close, in this order."""

    def __init__(self) -> None:
        self._part: Any = None
        self._loaded: Any = None

    def __call__(self, request: Mapping[str, Any]) -> worker.Answer:
        """Answer one request."""
        match request["do"]:
            case "open":
                return self._open(request)
            case "prepare":
                self._part = None  # frees its memory first
                self._part = self._new_part(request["part"])
                return {}
            case "indices":
                self._part.indices = request["indices"]
                return {}
            case "run":
                return dataclasses.asdict(self._part.run(request["amount"]))
            case "close":
                return self._peak_memory()
        raise ValueError(f"no such request: {request['do']}")

    def _open(self, request: Mapping[str, Any]) -> worker.Answer:
        """Import PyTorch, and load the tokenizer and the first part's model."""
        import torch
        import transformers

        imported = time.monotonic()
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(request["threads"])
        if request["platform"] == "gpu" and not torch.cuda.is_available():
            raise MachineError(
                "JAX runs on a GPU, and PyTorch finds none: install its CUDA build, or set JAX_PLATFORMS=cpu"
            )
        self._request = request
        self.device = torch.device("cuda" if request["platform"] == "gpu" else "cpu")
        self.texts: list[str] = json.loads(Path(request["texts"]).read_text(encoding="utf-8"))
        self.tokenizer = self._load(transformers.AutoTokenizer, use_fast=True)
        self._loaded = self.model()
        return {
            "imports_seconds": imported - request["spawned"],
            "loading_seconds": time.monotonic() - imported,
            "threads": torch.get_num_threads(),
        }

    @property
    def settings(self) -> Mapping[str, Any]:
        """The keys of `config.ModelConfig`."""
        return self._request["student"]

    @property
    def classes(self) -> int:
        """The number of classes, K."""
        return self._request["classes"]

    def model(self) -> Any:
        """Return a new classifier from the checkpoint, on its device. Opening has loaded the first one."""
        import torch
        import transformers

        if self._loaded is not None:
            model, self._loaded = self._loaded, None
            return model
        model = self._load(
            transformers.AutoModelForSequenceClassification, num_labels=self.classes, dtype=torch.float32
        )
        return model.to(self.device)

    def _load(self, kind: Any, **options: Any) -> Any:
        directory = self._request["directory"]
        try:
            return kind.from_pretrained(directory, local_files_only=True, trust_remote_code=False, **options)
        except Exception as error:  # several libraries raise their own exceptions for files that they cannot use
            raise CheckpointError(
                f"{directory}: transformers cannot load it: {one_line(error, limit=300)}; leave out --against"
            ) from error

    def freeze(self, model: Any) -> None:
        """Keep the tensors of the checkpoint that `student.frozen` selects.

        Raises:
          UserError: the model has no such tensor.
        """
        for name in self._request["frozen"]:
            # A bare encoder's tensors have no prefix in the file, and one in the classifier.
            matches = [p for key, p in model.named_parameters() if key == name or key.endswith(f".{name}")]
            if len(matches) != 1:
                raise ConfigError(
                    f"--against transformers: its classifier has no single tensor {name}, which student.frozen "
                    "selects; leave the flag out"
                )
            matches[0].requires_grad_(False)

    def precision(self) -> Any:
        """Return the context of a forward pass with the compute dtype of the settings."""
        import torch

        if self.settings["compute_dtype"] == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.settings["compute_dtype"]))

    def wait(self) -> None:
        """Wait for the device."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _new_part(self, name: str) -> Any:
        match name:
            case "training":
                return Training(self)
            case "labelling" | "prediction":
                return Pipeline(self, logits=name == "labelling")
            case "tokenising":
                return Tokenising(self)
        raise ValueError(f"no such part: {name}")

    def _peak_memory(self) -> worker.Answer:
        import resource
        import sys

        import torch

        if self.device.type == "cuda":
            return {"peak_bytes": torch.cuda.max_memory_allocated(), "memory": "device"}
        unit = 1 if sys.platform == "darwin" else 1024
        return {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "memory": "process"}


class Training:
    """Training steps of the loop in `Trainer`. The texts are tokenized before, and each batch is padded in the loop.

    Attributes:
      indices: the examples in the order of training, the same as ours.
    """

    def __init__(self, peer: Peer):
        import torch
        import transformers

        settings = peer.settings
        self._peer, self.indices = peer, list[int]()
        self._features = peer.tokenizer(peer.texts, truncation=True, max_length=settings["max_length"])
        self._model = peer.model().train()
        peer.freeze(self._model)
        trained = [p for p in self._model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings["weight_decay"]},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self._trained = trained
        self._optimizer = torch.optim.AdamW(groups, lr=settings["learning_rate"], fused=True)
        self._schedule = transformers.get_linear_schedule_with_warmup(
            self._optimizer, round(settings["steps"] * settings["warmup_fraction"]), settings["steps"]
        )

    def run(self, amount: int) -> Burst:
        """Take one step for each batch."""
        import torch

        peer, clip_norm = self._peer, self._peer.settings["clip_norm"]
        tokens = slots = 0
        batch_size = peer.settings["batch_size"]
        total = torch.zeros((), device=peer.device)
        start = time.perf_counter()
        for first in range(0, amount, batch_size):
            chosen = self.indices[first : first + batch_size]
            features = [{key: values[i] for key, values in self._features.items()} for i in chosen]
            batch = peer.tokenizer.pad(features, padding="longest", return_tensors="pt").to(peer.device)
            batch["labels"] = torch.tensor([i % peer.classes for i in chosen], device=peer.device)
            with peer.precision():
                loss = self._model(**batch).loss
            loss.backward()
            if clip_norm:
                torch.nn.utils.clip_grad_norm_(self._trained, clip_norm)
            self._optimizer.step()
            self._schedule.step()
            self._model.zero_grad()
            total += loss.detach()
            tokens += sum(len(feature["input_ids"]) for feature in features)
            slots += batch["input_ids"].numel()
        peer.wait()
        return Burst(time.perf_counter() - start, amount, tokens, slots)


class Pipeline:
    """`pipeline("text-classification")`, from texts to logits or probabilities."""

    def __init__(self, peer: Peer, *, logits: bool):
        import transformers

        settings, self._peer, self._slots = peer.settings, peer, 0
        ids = peer.tokenizer(peer.texts, truncation=True, max_length=settings["max_length"])["input_ids"]
        self._lengths = list(map(len, ids))
        model = peer.model().eval()
        model.register_forward_pre_hook(self._count, with_kwargs=True)
        self._run = transformers.pipeline(
            "text-classification",
            model=model,
            tokenizer=peer.tokenizer,
            device=peer.device,
            batch_size=settings["batch_size"],
            truncation=True,
            max_length=settings["max_length"],
            top_k=None,
            function_to_apply="none" if logits else "softmax",
        )

    def _count(self, _: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        self._slots += kwargs["input_ids"].numel()

    def run(self, amount: int) -> Burst:
        """Classify the texts."""
        texts = _cycled(self._peer.texts, amount)
        self._slots = 0
        start = time.perf_counter()
        with self._peer.precision():
            self._run(texts)
        self._peer.wait()
        return Burst(time.perf_counter() - start, amount, sum(_cycled(self._lengths, amount)), self._slots)


class Tokenising:
    """Texts to token ids."""

    def __init__(self, peer: Peer):
        self._peer = peer

    def run(self, amount: int) -> Burst:
        """Tokenize the texts."""
        texts, max_length = _cycled(self._peer.texts, amount), self._peer.settings["max_length"]
        tokens = 0
        start = time.perf_counter()
        for first in range(0, amount, _TOKENIZED):
            chunk = texts[first : first + _TOKENIZED]
            tokens += sum(map(len, self._peer.tokenizer(chunk, truncation=True, max_length=max_length)["input_ids"]))
        return Burst(time.perf_counter() - start, amount, tokens, tokens)


def _cycled(items: Sequence[Any], amount: int) -> list[Any]:
    return list(itertools.islice(itertools.cycle(items), amount))


if __name__ == "__main__":
    worker.serve(Peer())
