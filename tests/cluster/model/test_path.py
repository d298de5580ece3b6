"""MODEL: what it may be, what is fetched, and what a user is told where it cannot be had. No network: the hub's
function is replaced."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from published import DEEPSEEK_V3

from isotherm.cluster.model.config import ModelConfigError
from isotherm.cluster.model.path import ModelNotFoundError, bundled_model, resolve_model
from isotherm.cluster.proxies import ProxyError
from isotherm.cluster.text.tokenizer_files import TokenizerError


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Records downloads; each gives tmp_path, with a config.json and a tokenizer.json that can be served."""
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V3))
    (tmp_path / "tokenizer.json").write_text("{}")
    calls: list[tuple[str, dict[str, Any]]] = []

    def snapshot_download(repo: str, **options: Any) -> str:
        calls.append((repo, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def snapshot_download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://hub.invalid/x"))


def test_tiny_is_the_bundled_model_wherever_one_is(hub: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("tiny") == bundled_model()
    assert (bundled_model() / "config.json").is_file()
    assert resolve_model("./tiny") == tmp_path / "tiny"
    assert hub == []


def test_a_directory_becomes_absolute(hub: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("org/model", "~/org/model", str(tmp_path / "org" / "model"), "org/model/", "org/../org/model"):
        assert resolve_model(name) == tmp_path / "org" / "model"
    assert resolve_model(".") == tmp_path
    assert hub == []


def test_a_hub_id_is_fetched_without_pickles_or_code(hub: list, tmp_path: Path):
    assert resolve_model("deepseek-ai/DeepSeek-V3") == tmp_path
    assert [repo for repo, _ in hub] == ["deepseek-ai/DeepSeek-V3"] * 2

    def fetched(name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for _, options in hub for pattern in options["allow_patterns"])

    wanted = ["config.json", "generation_config.json", "model.safetensors.index.json",
              "model-00001-of-000163.safetensors", "tokenizer.json", "tokenizer_config.json",
              "chat_template.jinja"]  # fmt: skip
    refused = ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.pth", "model.ckpt",
               "weights.pkl", "modeling_deepseek.py", "configuration_deepseek.py", "model.gguf", "tf_model.h5",
               "evil.so", "x.pickle", "inference/convert.py"]  # fmt: skip
    assert [n for n in wanted if not fetched(n)] == [] and [n for n in refused if fetched(n)] == []


def test_a_description_is_fetched_without_weights(hub: list, tmp_path: Path):
    assert resolve_model("deepseek-ai/DeepSeek-V3", weights=False) == tmp_path
    ((_, options),) = hub
    assert not any(fnmatch.fnmatch("model.safetensors", pattern) for pattern in options["allow_patterns"])


@pytest.mark.parametrize(
    ("config", "tokenizer", "error", "words"),
    [({"model_type": "kimi_linear"}, True, ModelConfigError, "Kimi Linear has layers of linear attention"),
     ({}, False, TokenizerError, "tiktoken.model: how text is cut"),
     ({"scoring_func": "softmax"}, True, ModelConfigError, "scoring_func")],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_before_its_weights_are_fetched(
    hub: list, tmp_path: Path, config: dict[str, Any], tokenizer: bool, error: type[Exception], words: str
):
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V3 | config))
    if not tokenizer:
        (tmp_path / "tokenizer.json").unlink()
        (tmp_path / "tiktoken.model").write_text("")
    with pytest.raises(error) as caught:
        resolve_model("org/model")
    assert words in str(caught.value)
    ((_, options),) = hub
    assert not any(
        fnmatch.fnmatch("model-00001-of-00002.safetensors", pattern) for pattern in options["allow_patterns"]
    )


@pytest.mark.parametrize(
    "error",
    [LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder\nmore"),
     OSError(101, "Network is unreachable"), HfHubHTTPError("503 from the hub", response=response(503)),
     LocalEntryNotFoundError("")],
)  # fmt: skip
def test_without_a_network_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, error: Exception):
    failing(monkeypatch, error)
    with pytest.raises(ModelNotFoundError) as caught:
        resolve_model("deepseek-ai/DeepSeek-V3")
    message = str(caught.value)
    assert "\n" not in message and "hf download deepseek-ai/DeepSeek-V3" in message and "isotherm serve tiny" in message
    assert "the hub cannot be reached (" in message and "()" not in message


@pytest.mark.parametrize(
    "error", [httpx.ConnectError("no route"), httpx.ConnectTimeout("too slow"), httpx.ReadTimeout("")]
)
def test_a_connection_that_fails_is_told_too(monkeypatch: pytest.MonkeyPatch, error: Exception):
    failing(monkeypatch, error)
    with pytest.raises(ModelNotFoundError, match="the hub cannot be reached"):
        resolve_model("deepseek-ai/DeepSeek-V3")


@pytest.mark.parametrize(("proxy", "error"), [("socks5://h:1", ImportError("socksio")), ("foo://h:1", ValueError("?"))])
def test_a_proxy_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch, proxy: str, error: Exception):
    failing(monkeypatch, error)
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    monkeypatch.delenv("https_proxy", raising=False)
    monkeypatch.setattr("isotherm.cluster.proxies.find_spec", lambda name: None)
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(ProxyError, match=f"ALL_PROXY is '{proxy}'"):
        resolve_model("org/model")
    monkeypatch.delenv("ALL_PROXY")
    with pytest.raises(type(error)):
        resolve_model("org/model")


def test_a_repository_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch):
    failing(monkeypatch, RepositoryNotFoundError("401", response=response(401)))
    with pytest.raises(
        ModelNotFoundError, match='no model "org/private" that you may read; log in with `hf auth login`'
    ):
        resolve_model("org/private")


@pytest.mark.parametrize(
    "name",
    ["", " ", "nothing", "a/b/c", "../x/y", "/no/such/folder", "org/", "/model", "org/mo del",
     "https://hub.invalid/a/b", "org/model;rm", "org/x\n", "-org/model", "org/..", "../model", "org--x/model",
     "a" * 200 + "/b", "a" * 5000, "~nobody-of-that-name"],
)  # fmt: skip
def test_other_names_are_refused_and_never_asked_for(hub: list, name: str):
    with pytest.raises(ModelNotFoundError) as caught:
        resolve_model(name)
    assert "a directory" in str(caught.value) and "hub id" in str(caught.value)
    assert hub == []


def test_a_file_is_no_model(hub: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "model").write_text("")
    with pytest.raises(ModelNotFoundError, match="must be a directory"):
        resolve_model("org/model")
    assert hub == []


def test_a_null_character_is_refused(hub: list):
    with pytest.raises(ModelNotFoundError):
        resolve_model("a\0b")
