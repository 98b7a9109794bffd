"""The two sides take turns with the same work, in processes of their own."""

import json
from pathlib import Path

import pytest

from tests.helpers import tiny
from tests.helpers.benchmarking import TINY, run
from xtransfer.benchmark import peer
from xtransfer.benchmark.measurement import OURS, PEER
from xtransfer.errors import ConfigError


@pytest.mark.skipif(not peer.available(), reason="PyTorch is not installed")
def test_the_peer_does_the_same_work_in_turns(tmp_path: Path) -> None:
    model, file, texts = tiny.checkpoint(tmp_path / "model"), tmp_path / "report.json", tmp_path / "texts.txt"
    texts.write_text("the film is very good\nder Film ist schlecht\nle film\n")
    frozen = "--config.student.frozen=('^encoder[.]embeddings[.]',)"
    result = run(
        *("--checkpoint", str(model), "--text", str(texts), "--against", "transformers", "--json", str(file)),
        *("--batch-size", "4", "--parts", "training,labelling,tokenising", frozen, *TINY),
    )
    assert result.returncode == 0, result.stderr
    assert "× transformers" in result.stdout
    record = json.loads(file.read_text())
    for part in record["parts"]:
        assert [pair["order"] for pair in part["pairs"]] == [[OURS, PEER], [PEER, OURS]]
        for pair, ratio in zip(part["pairs"], part["ratios"], strict=True):
            mine, theirs = pair[OURS], pair[PEER]
            assert (mine["examples"], mine["tokens"]) == (theirs["examples"], theirs["tokens"])
            assert ratio == pytest.approx(theirs["seconds"] / mine["seconds"])
        assert part["ratio"]["count"] == 2
    # Texts of 7, 6, and 4 tokens in batches of 4 examples: every batch has one of 7, which the others are padded to.
    training = record["parts"][0]["pairs"][0]
    assert training[PEER]["slots"] == 7 * training[PEER]["examples"]
    assert training[OURS]["slots"] == 16 * training[OURS]["examples"], "unpacked rows have max_length tokens"
    assert set(record["sides"]) == {OURS, PEER} and len(record["sides"][OURS]["frozen"]) == 5


@pytest.mark.skipif(not peer.available(), reason="PyTorch is not installed")
def test_exactly_the_frozen_tensors_keep_their_values() -> None:
    """A bare encoder's names have no prefix in the file. A name that fits no tensor, or two, cannot be frozen."""
    import torch

    def side(*frozen: str) -> peer.Peer:
        handler = peer.Peer()
        handler._request = {"frozen": frozen}
        return handler

    layers = {name: torch.nn.Linear(2, 2) for name in ("embeddings", "other_embeddings", "first", "second")}
    model = torch.nn.ModuleDict({"bert": torch.nn.ModuleDict(layers)})
    side("embeddings.weight", "bert.first.bias").freeze(model)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
        "bert.embeddings.weight",
        "bert.first.bias",
    }
    for name in ("third.weight", "weight"):
        with pytest.raises(ConfigError, match=f"has no single tensor {name}, which student.frozen selects"):
            side(name).freeze(model)
