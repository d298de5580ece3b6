"""`--speculation` of the commands that compute in their own process."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from isotherm.actors.local import local_engine
from isotherm.cluster.cli import bench_engine, bench_kernels
from isotherm.cluster.cli import main as cli

pytestmark = pytest.mark.slow


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


def generated(*arguments: str) -> dict[str, Any]:
    """What the answer says stands in the prompt already, so that there is something to guess from whatever guesses."""
    asked = "Repeat after me: the fox and the owl walked to the old bridge near the river and saw a letter"
    result = invoke(
        "generate", "tiny", "--chat", asked, "--ignore-eos", "--max-tokens", "150", "--json", *arguments
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


@pytest.mark.parametrize("kind", ["auto", "mtp", "ngram"])
def test_generate_guesses_tokens_and_gives_the_same(kind: str):
    plain, guessed = generated(), generated("--speculation", kind)
    assert plain.pop("drafts") == {"accepted": 0, "rejected": 0}
    assert sum(guessed.pop("drafts").values()) > 0
    assert guessed == plain and len(plain["token_ids"]) == 150


def test_bench_decode_guesses_tokens(monkeypatch: pytest.MonkeyPatch):
    engines = []

    def made(*given: Any, **options: Any) -> Any:
        engines.append(local_engine(*given, **options))
        return engines[-1]

    monkeypatch.setattr(bench_engine, "local_engine", made)
    monkeypatch.setattr(bench_kernels, "stream_bandwidth", lambda: 1.0)
    monkeypatch.setattr(bench_kernels, "matmul_peak", lambda: 1.0)
    result = invoke("bench", "decode", "tiny", "--batch", "2", "--runs", "1", "--speculation", "mtp", "--json")
    assert result.exit_code == 0, result.output
    (engine,) = engines
    assert engine.speculation is not None and engine.speculation.meter().drafted > 0
    assert "decode" in result.stdout


@pytest.mark.parametrize(("command", "status"), [(("generate", "tiny", "--prompt", "x"), 1), (("bench", "decode"), 2)])
def test_a_kind_that_is_none_is_refused(command: tuple[str, ...], status: int):
    result = invoke(*command, "--speculation", "oracle")
    assert result.exit_code == status and '--speculation is "oracle"' in result.output
    assert "Traceback" not in result.output
