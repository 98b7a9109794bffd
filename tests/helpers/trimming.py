"""Run the trim command in this process."""

import json
from pathlib import Path
from typing import Any

from xtransfer.trim import __main__ as trim


def run(model: Path, texts: list[str], output: Path, *flags: str) -> dict[str, Any]:
    """Run the command on texts, and return its report."""
    output.parent.mkdir(parents=True, exist_ok=True)
    source, report = output.parent / f"{output.name}.jsonl", output.parent / f"{output.name}.json"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    command = ["--model", str(model), "--text", str(source), "--output", str(output), "--json", str(report)]
    trim.main([*command, *flags])
    return json.loads(report.read_text())
