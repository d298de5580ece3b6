"""Whether a manifest can be served with its checkpoint: what `isotherm serve` checks first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from isotherm.cluster.deploy.capacity import check_machine
from isotherm.cluster.deploy.preflight import check_servable
from isotherm.cluster.doctor.finding import Finding, fail, ok, warn
from isotherm.cluster.errors import IsothermError, one_line
from isotherm.cluster.manifest import Manifest
from isotherm.cluster.text.tokenizer_files import trouble_with_chats


def check_checkpoint(manifest: Manifest, path: Path, memory: int, cpus: int) -> list[Finding]:
    """`memory` bytes and `cpus` are there for it. Reads headers, no weights."""
    checks: tuple[tuple[str, Callable[[], None]], ...] = (
        ("checkpoint", lambda: check_servable(manifest, path)),
        ("room for it", lambda: check_machine(manifest, path, memory, cpus)),
    )
    found: list[Finding] = []
    for subject, check in checks:
        try:
            check()
        except (IsothermError, OSError) as error:
            return [*found, fail(subject, f"{path} cannot be served", one_line(error))]
        words = {"checkpoint": f"{path} can be served", "room for it": "its workers fit on this machine"}
        found.append(ok(subject, words[subject]))
    advice = "mend the file in the checkpoint; text is completed all the same"
    return found + [warn("chat template", words, advice) for words in trouble_with_chats(path)]
