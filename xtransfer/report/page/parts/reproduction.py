"""What it takes to reproduce the experiment: commands, versions, fingerprints, objectives, and settings."""

import json

from xtransfer import storage
from xtransfer.distillation.objectives import effective_settings
from xtransfer.report.page.markup import Child, Html, join, note, table, tag
from xtransfer.report.page.sources import Source
from xtransfer.runs.starts import read_starts
from xtransfer.runs.workdir import as_record


def build(source: Source) -> Html:
    """Return the commands and versions of every start, the fingerprints, the objectives, and the settings."""
    starts = read_starts(source.workdir)
    pieces: list[Html] = []
    for start in starts:
        machine = f"{start.system}, {start.devices}" + (f", {start.processes} processes" if start.processes > 1 else "")
        packages = {"xtransfer": start.xtransfer, "Python": start.python, **start.packages}
        versions = ", ".join(f"{name} {version}" for name, version in packages.items())
        pieces += [tag("pre", start.command), note(f"{machine}. {versions}.")]
    if not starts:
        pieces.append(note("The workdir has no starts.jsonl, so its command and its versions are not known."))
    facts = storage.read_object(source.workdir.task, "start the experiment again")
    fingerprints: list[list[Child]] = [
        [name, tag("code", str(facts[key]))]
        for key, name in (
            ("data", "data"),
            ("teacher_checkpoint", f"teacher {source.config.teacher.checkpoint}"),
            ("teacher_logits", f"logits {source.config.teacher.logits_file}"),
            ("student_checkpoint", f"student {source.config.student.checkpoint}"),
        )
        if key in facts and facts[key]
    ]
    fingerprints += [
        [f"{role} {source.config.encoders[role].checkpoint}", tag("code", digest)]
        for role, digest in source.task.students.items()
        if role in source.config.encoders
    ]
    objectives: list[list[Child]] = [[name, text] for name, text in effective_settings(source.config).items()]
    settings = json.dumps(as_record(source.config), indent=2, ensure_ascii=False)
    pieces += [
        table(["fingerprint", "sha256"], fingerprints, text_columns=2, class_="prints"),
        table(["objective", "effective settings"], objectives, text_columns=2),
        tag("details", tag("summary", "All settings (config.json)"), tag("pre", settings)),
    ]
    return join(pieces)
