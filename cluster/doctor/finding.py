"""What a check has found, and what is to be done about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class State(str, Enum):
    OK = "ok"
    WARN = "warn"  # it works, and could be better
    FAIL = "fail"  # it will not work


@dataclass(frozen=True)
class Finding:
    """`subject`: a word or two; `where`: the node, where it is not this machine."""

    subject: str
    state: State
    words: str
    advice: str = ""
    where: str = ""


def ok(subject: str, words: str) -> Finding:
    return Finding(subject, State.OK, words)


def warn(subject: str, words: str, advice: str) -> Finding:
    return Finding(subject, State.WARN, words, advice)


def fail(subject: str, words: str, advice: str) -> Finding:
    return Finding(subject, State.FAIL, words, advice)


def exit_status(findings: Sequence[Finding]) -> int:
    """1 where something will not work."""
    return int(any(finding.state is State.FAIL for finding in findings))
