"""The command line: what it prints, and that an error which a user can do something about is one message and exit
status 1, never a traceback."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer
from deepseek_checkpoints import make_checkpoint
from fake_admin import FakeAdmin
from fake_engine import FakeEngine, http_server
from httpx import InvalidURL
from typer.testing import CliRunner, Result

from isotherm.cluster.api.app import build_app
from isotherm.cluster.cli import main as cli
from isotherm.cluster.cli.own_cluster import free_port
from isotherm.cluster.client import BatchError, BatchSummary, ConnectionFailedError
from isotherm.cluster.client.batch import BatchOptions
from isotherm.cluster.errors import IsothermError
from isotherm.cluster.model.fingerprint import NumericsError
from isotherm.cluster.model.path import bundled_model
from isotherm.cluster.on_ray import environment as ray_environment
from isotherm.kernels.errors import KernelsUnavailable
from isotherm.kernels.native.library import NativeKernelsUnavailable

ISOTHERM = str(Path(sys.executable).with_name("isotherm"))


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub, no cluster of this machine, and a current directory with nothing in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(ray_environment, "local_address", lambda *_: None)
    # Consoles that were made at import write to the stream of that time.
    monkeypatch.setattr(cli, "console", _Console())
    monkeypatch.setattr("isotherm.cluster.cli.user_errors.errors", _Console(stderr=True))


class _Console:
    def __init__(self, **options: Any):
        self._options = options

    def print(self, *args: Any, **kwargs: Any) -> None:
        self._made().print(*args, **kwargs)

    @property
    def is_terminal(self) -> bool:
        return self._made().is_terminal

    def _made(self) -> Any:
        from rich.console import Console

        return Console(**self._options, width=200)


def invoke(*arguments: str) -> Result:
    """What a command sets in its process's environment is gone again afterwards."""
    before = dict(os.environ)
    try:
        return CliRunner().invoke(cli.app, list(arguments))
    finally:
        os.environ.clear()
        os.environ.update(before)


def one_error(result: Result) -> str:
    """The message of a failed command."""
    assert result.exit_code == 1, (result.exit_code, result.output, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("isotherm: ") and "Traceback" not in result.output, result.output
    return lines[0]


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a tokenizer."""
    return make_checkpoint(tmp_path_factory.mktemp("random"))


# --- MODEL ----------------------------------------------------------------------------------------

COMMANDS = (("serve",), ("inspect",), ("generate", "--prompt", "x"))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[0])
@pytest.mark.parametrize(
    "model", ["", " ", "nothing", "a/b/c", "../x", "~nobody-of-that-name/x", "[red]x[/]", "$(id)", "a\nb", "/dev/null"]
)
def test_a_model_that_is_none_is_one_message(command: tuple[str, ...], model: str):
    assert "MODEL" in one_error(invoke(command[0], *command[1:], "--", model)).replace("model is ''", "MODEL")


def test_bench_of_a_model_that_is_none_is_one_message():
    assert "nothing" in one_error(invoke("bench", "decode", "nothing"))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[0])
def test_a_hub_id_without_a_network_says_what_to_do(command: tuple[str, ...]):
    assert "hf download deepseek-ai/DeepSeek-V3" in one_error(
        invoke(command[0], "deepseek-ai/DeepSeek-V3", *command[1:])
    )


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[0])
def test_a_manifest_that_is_none_is_one_message(command: tuple[str, ...], tmp_path: Path):
    assert "cannot be read" in one_error(invoke(command[0], "none.yaml", *command[1:]))
    assert "cannot be read" in one_error(invoke(command[0], "~nobody-of-that-name/m.yaml", *command[1:]))
    (tmp_path / "bad.yaml").write_text("attention: {shards: 0}")
    assert "attention.shards is 0" in one_error(invoke(command[0], "bad.yaml", *command[1:]))
    (tmp_path / "bad.yml").write_text("model: [")
    assert "not valid YAML" in one_error_of_many(invoke(command[0], "bad.yml", *command[1:]))


def one_error_of_many(result: Result) -> str:
    """A YAML error shows the place in several lines."""
    assert result.exit_code == 1 and "Traceback" not in result.output
    return result.stderr


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[0])
def test_a_broken_checkpoint_is_one_message(command: tuple[str, ...], tmp_path: Path):
    make_checkpoint(tmp_path / "m", change=lambda tensors: tensors.pop("model.layers.1.mlp.experts.7.up_proj.weight"))
    message = one_error(invoke(command[0], str(tmp_path / "m"), *command[1:]))
    assert "model.layers.1.mlp.experts.7.up_proj.weight is missing" in message and "[36, 56]" in message


# --- serve ----------------------------------------------------------------------------------------


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """`serve` stops before Ray; what it would have served."""
    calls: list[Any] = []

    def serve(*args: Any) -> None:
        assert "ISOTHERM_API_KEY" not in os.environ  # which what is started from here would have too
        calls.append(args)

    monkeypatch.setattr("isotherm.cluster.on_ray.environment.os.environ", dict(os.environ))
    monkeypatch.setattr("isotherm.cluster.supervise.supervisor.serve_until_stopped", serve)
    return calls


def test_without_keys_serve_stays_on_this_machine(served: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(os.environ, "ISOTHERM_API_KEY", raising=False)
    (tmp_path / "open.yaml").write_text("http: {host: '::', port: 18763}")
    for arguments in (["--host", "0.0.0.0"], ["open.yaml"], ["--host", "10.1.2.3"]):
        refused = invoke("serve", *arguments)
        assert refused.exit_code == 1 and "there are no API keys" in refused.stderr and "keys create" in refused.stderr
    assert not served


def test_serve_hands_on_hashes_and_never_a_key(served: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(os.environ, "ISOTHERM_API_KEY", "made-up-by-somebody-123")
    done = invoke("serve", "--host", "0.0.0.0", "--port", "18762")
    assert done.exit_code == 0, done.stderr
    monkeypatch.delitem(os.environ, "ISOTHERM_API_KEY")
    assert invoke("keys", "create", "ann", "--file", "k.json").exit_code == 0
    done = invoke("serve", "--host", "0.0.0.0", "--port", "18762", "--keys", "k.json")
    assert done.exit_code == 0, done.stderr
    (*_, by_environment, _), (manifest, *_, by_file, _) = served
    assert [entry["name"] for entry in by_environment["given"]] == ["environment"]
    assert "made-up-by-somebody-123" not in json.dumps(by_environment) and by_environment["file"] is None
    assert by_file == {"file": str(tmp_path / "k.json"), "given": []} and manifest.http.keys == by_file["file"]


def test_serve_keeps_a_link_to_its_keys(served: list[Any], tmp_path: Path):
    """As a Secret of Kubernetes is: what was behind it at the start is deleted at the next change."""
    (tmp_path / "..2026").mkdir()
    assert invoke("keys", "create", "ann", "--file", "..2026/k.json").exit_code == 0
    (tmp_path / "k.json").symlink_to("..2026/k.json")
    assert invoke("serve", "--port", "18762", "--keys", "k.json").exit_code == 0
    ((manifest, *_),) = served
    assert manifest.http.keys == str(tmp_path / "k.json")


def test_serve_takes_the_manifest_and_the_options(served: list[Any], tmp_path: Path):
    assert invoke("serve", "--port", "18765").exit_code == 0
    (tmp_path / "m.yaml").write_text("experts: {groups: 3}\nhttp: {port: 18764, replicas: 2}")
    assert invoke("serve", "m.yaml", "--host", "127.0.0.2").exit_code == 0
    (first, path, address, *_), (second, *_) = served
    assert (first.http.port, first.model_id, path, address) == (18765, "tiny", bundled_model(), None)
    assert (second.experts.groups, second.http.port, second.http.replicas, second.http.host) == (
        3,
        18764,
        2,
        "127.0.0.2",
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ("engine: {kv_memory: 900TiB}", "engine.kv_memory is 900.0 TiB"),
        ("attention: {cpus: 4096}", "attention.cpus is 4096"),
    ],
)
def test_serve_refuses_what_no_machine_holds(served: list[Any], tmp_path: Path, fields: str, words: str):
    (tmp_path / "m.yaml").write_text(fields)
    assert words in one_error(invoke("serve", "m.yaml", "--port", "18765"))
    assert invoke("serve", "m.yaml", "--address", "10.0.0.5:6379").exit_code == 0, "a cluster of others may grow"
    assert len(served) == 1


def test_a_model_in_the_current_directory_has_a_name(
    served: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "my-model"
    folder.mkdir()
    for file in bundled_model().iterdir():
        if file.is_file():
            (folder / file.name).symlink_to(file)
    monkeypatch.chdir(folder)
    assert invoke("serve", ".", "--port", "18765").exit_code == 0
    assert served[0][0].model_id == "my-model"


def test_serve_refuses_cuda_without_a_gpu_and_a_bad_port(
    served: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "gpu.yaml").write_text("device: cuda\nattention: {gpus: 1}")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "device is cuda, but torch" in one_error(invoke("serve", "gpu.yaml"))
    assert served == []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert invoke("serve", "gpu.yaml", "--port", "18766").exit_code == 0
    served.clear()
    assert "http.port is 0" in one_error(invoke("serve", "--port", "0"))
    assert "http.port is 99999" in one_error(invoke("serve", "--port", "99999"))
    assert served == []


def test_serve_refuses_a_taken_port(served: list[Any]):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"nothing can listen on 127.0.0.1 port {port}" in one_error(invoke("serve", "--port", str(port)))
    assert served == []


def test_serve_has_its_port_until_it_ends(served: list[Any], monkeypatch: pytest.MonkeyPatch):
    """Not only until Ray starts, whose processes ask the system for any port that is free."""
    port = free_port()

    def serve(*_: Any) -> None:
        with socket.socket() as other, pytest.raises(OSError, match="Address already in use"):
            other.bind(("127.0.0.1", port))
        served.append(port)

    monkeypatch.setattr("isotherm.cluster.supervise.supervisor.serve_until_stopped", serve)
    for _ in range(2):  # and not afterwards
        assert invoke("serve", "--port", str(port)).exit_code == 0
    assert served == [port] * 2


def test_serve_names_a_folder_in_which_no_batch_can_be_kept(served: list[Any], tmp_path: Path):
    (tmp_path / "file").write_text("")
    (tmp_path / "m.yaml").write_text(f"http: {{port: 18766, batches: {{folder: {tmp_path}/file}}}}")
    message = one_error(invoke("serve", "m.yaml"))
    assert f'http.batches.folder is "{tmp_path}/file"' in message and "Not a directory" in message
    assert served == []
    assert invoke("serve", "m.yaml", "--address", "10.0.0.5:6379").exit_code == 0, "other machines may have it"


def test_serve_names_the_folder_in_which_rays_session_cannot_be(
    served: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    assert f"TMPDIR is {tmp_path}/none" in one_error(invoke("serve", "--port", "18766"))
    assert served == []
    assert invoke("serve", "--address", "10.0.0.5:6379").exit_code == 0, "that Ray has a session already"


def test_serve_needs_a_tokenizer(served: list[Any], random_model: Path):
    assert "tokenizer.json: not found" in one_error(invoke("serve", str(random_model)))
    assert served == []


# --- inspect --------------------------------------------------------------------------------------


def test_inspect_prints_json(random_model: Path):
    result = invoke("inspect", str(random_model), "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert {
        "architecture",
        "parameters",
        "parameters_by_part",
        "bytes_by_part",
        "bytes_from",
        "kv_bytes_per_token",
        "placement",
    } <= set(report)
    assert report["kv_bytes_per_token"] == 240 and [row["worker"] for row in report["placement"]] == [
        "attention-0",
        "expert-0",
        "expert-1",
    ]
    coded = json.loads(invoke("inspect", str(random_model), "--json", "--kv-cache-dtype", "fp8").stdout)
    assert coded["kv_bytes_per_token"] == 150  # of 3 layers: 32 codes, 8 rotary values and a scale
    assert coded["placement"][0]["kv_tokens"] == (256 << 20) // (16 * 150) * 16


def test_inspect_prints_tables():
    result = invoke("inspect")
    assert result.exit_code == 0 and "KV cache" in result.stdout and "expert-1" in result.stdout


# --- generate -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give one of --prompt TEXT, --prompt-ids 1,2,3 and --chat TEXT"),
        (["--prompt", "x", "--chat", "y"], "give one of"),
        (["--prompt", "x", "--prompt-ids", "1"], "give one of"),
        (["--prompt-ids", "1,two"], "--prompt-ids is"),
        (["--prompt-ids", ""], "--prompt-ids is"),
        (["--prompt-ids", "1,,2"], "--prompt-ids is"),
        (["--prompt-ids", "1280"], "ids 0 to 1279"),
        (["--prompt-ids", "1,-1"], "--prompt-ids has -1"),
        (["--prompt", "x", "--dtype", "float8"], '--dtype is "float8"'),
        (["--prompt", "x", "--kernels", "gpu"], '--kernels is "gpu"'),
        (["--prompt", "x", "--max-tokens", "5000"], "exceed the model's 4096"),
        (["--prompt", "x", "--logprobs", "1281"], "the vocabulary has 1280"),
    ],
    ids=lambda v: " ".join(v)[:40] if isinstance(v, list) else "",
)
def test_generate_refuses_what_does_not_fit(arguments: list[str], words: str):
    assert words in one_error(invoke("generate", "tiny", *arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--max-tokens", "0"], ["--temperature", "-1"], ["--temperature", "nan"], ["--temperature", "inf"],
        ["--top-p", "2"], ["--top-p", "nan"], ["--top-k", "-1"], ["--top-k", str(1 << 64)], ["--logprobs", "-1"],
        ["--seed", "x"], ["--seed", str(1 << 63)],
    ],
    ids=" ".join,
)  # fmt: skip
def test_generate_names_an_option_out_of_range(arguments: list[str]):
    result = invoke("generate", "tiny", "--prompt", "x", *arguments)
    assert result.exit_code == 2 and arguments[0] in result.stderr and "Traceback" not in result.output


def test_generate_needs_a_tokenizer_for_text_alone(random_model: Path):
    assert "tokenizer.json: not found" in one_error(invoke("generate", str(random_model), "--prompt", "x"))
    result = invoke("generate", str(random_model), "--prompt-ids", "1,2", "--max-tokens", "2", "--kernels", "reference")
    assert result.exit_code == 0 and len(result.stdout.strip().split(",")) == 2, "without text the token ids are shown"


def test_generate_prints_json(random_model: Path):
    arguments = [
        "--prompt-ids",
        "5,250,17",
        "--max-tokens",
        "4",
        "--ignore-eos",
        "--logprobs",
        "2",
        "--dtype",
        "float32",
    ]
    arguments += ["--kernels", "reference", "--json"]
    result = invoke("generate", str(random_model), *arguments)
    assert result.exit_code == 0, result.output
    out = json.loads(result.stdout)
    assert set(out) == {
        "token_ids", "text", "logprobs", "finish_reason", "prompt_tokens", "drafts", "system_fingerprint"
    }  # fmt: skip
    assert len(out["token_ids"]) == 4 and all(0 <= t < 300 for t in out["token_ids"])
    assert (out["text"], out["finish_reason"], out["prompt_tokens"]) == (None, "length", 3)
    assert [entry["token_id"] for entry in out["logprobs"]] == out["token_ids"]
    for entry in out["logprobs"]:
        assert set(entry) == {"token_id", "logprob", "top"} and len(entry["top"]) == 2
        assert entry["top"][0] == [entry["token_id"], entry["logprob"]]  # greedy
    assert json.loads(invoke("generate", str(random_model), *arguments).stdout) == out


def test_generate_streams_text():
    result = invoke("generate", "tiny", "--chat", "What is 3 + 4?")
    assert result.exit_code == 0 and "7" in result.stdout and result.stdout.endswith("\n")


# --- a cluster that is not there ------------------------------------------------------------------


@pytest.mark.parametrize("command", ["status", "stop"])
@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "[::1]:1", "localhost:1"])
def test_without_a_cluster_it_says_what_to_do(command: str, address: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    message = one_error(invoke(command, "--address", address))
    assert f"no Ray cluster at {address}" in message and "isotherm serve" in message


@pytest.mark.parametrize("command", ["status", "stop", "top"])
def test_without_an_address_it_says_what_to_do(command: str, monkeypatch: pytest.MonkeyPatch):
    """Ray is not asked: it would find any cluster of this machine."""

    def init(**_: Any) -> None:
        raise AssertionError("Ray was asked")

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("isotherm.cluster.on_ray.environment.local_address", lambda: None)
    monkeypatch.setattr(
        os, "environ", {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    )
    message = one_error(invoke(command))
    assert "no `isotherm serve` of this user runs on this machine" in message and "--address" in message


@pytest.mark.slow
def test_serve_on_a_cluster_that_is_not_there_says_so():
    """In a process of its own, since it takes over signals."""
    done = subprocess.run([ISOTHERM, "serve", "--address", "127.0.0.1:1"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout == "joining Ray at 127.0.0.1:1\n"
    assert len(done.stderr.splitlines()) == 1 and "no Ray cluster at 127.0.0.1:1" in done.stderr


def test_chat_without_a_server_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    def models(_self: Any) -> list[str]:
        raise ConnectionFailedError("http://127.0.0.1:9: refused")

    monkeypatch.setattr("isotherm.cluster.client.client.Client.models", models)
    message = one_error(invoke("chat", "--url", "http://127.0.0.1:9"))
    assert "no server answers at http://127.0.0.1:9" in message and "isotherm serve" in message


ASKING = (
    ("scale", "--expert-groups", "2"),
    ("roll", "tiny"),
    ("top", "--once"),
    ("chat",),
    ("bench", "serve"),
)


@pytest.mark.parametrize("command", ASKING, ids=lambda command: command[0])
@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "foo://127.0.0.1:9"])
def test_a_proxy_that_cannot_be_used_is_one_message_and_for_other_machines(
    command: tuple[str, ...], proxy: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("isotherm.cluster.proxies.find_spec", lambda name: None)
    monkeypatch.setenv("ALL_PROXY", proxy)
    monkeypatch.setenv("no_proxy", "[::1")
    message = one_error(invoke(*command, "--url", "http://server.example:9"))
    assert f"ALL_PROXY is '{proxy}'" in message and "server.example" in message
    here = invoke(*command, "--url", "http://127.0.0.1:9")
    assert here.exit_code == 1 and "Connection refused" in here.output and "ALL_PROXY" not in here.output


def number_options() -> list[tuple[tuple[str, ...], str]]:
    """(command, option) of each that takes any number."""
    found = []
    for group, commands in (((), cli.app), (("bench",), cli.bench_app), (("keys",), cli.keys_app)):
        for command in commands.registered_commands:
            assert command.callback is not None
            name = command.name or command.callback.__name__.replace("_", "-")
            for option, hint in get_type_hints(command.callback).items():
                if float in (hint, *get_args(hint)):
                    found.append(((*group, name), "--" + option.replace("_", "-")))
    return found


@pytest.mark.parametrize(("command", "option"), number_options(), ids=str)
def test_what_is_no_number_is_refused_where_it_is_given(command: tuple[str, ...], option: str):
    refused = invoke(*command, *(["x"] if command == ("keys", "create") else []), option, "nan")
    assert refused.exit_code in (1, 2) and option.strip("-") in refused.stderr, refused.output
    assert isinstance(refused.exception, SystemExit), "a traceback"


@pytest.mark.parametrize("command", [("scale", "--drain-none"), ("roll", "tiny")], ids=lambda command: command[0])
@pytest.mark.parametrize("deadline", ["inf", "-inf", "-1", "0", "86401", "1e400"])
def test_a_deadline_that_is_none_is_refused_where_it_is_given(command: tuple[str, ...], deadline: str):
    refused = invoke(*command, "--url", "http://127.0.0.1:9", "--deadline", deadline)
    assert refused.exit_code == 2 and "'--deadline'" in refused.stderr and "more than 0" in refused.stderr
    assert "Connection refused" in one_error(invoke(*command, "--url", "http://127.0.0.1:9", "--deadline", "86400"))


def test_batch_names_a_missing_file():
    message = one_error(
        invoke("batch", "--input", "none.jsonl", "--output", "out.jsonl", "--url", "http://127.0.0.1:9")
    )
    assert "none.jsonl" in message


@pytest.mark.parametrize(
    ("summary", "status"),
    [
        (BatchSummary(total=3, completed=3), 0),
        (BatchSummary(total=14, completed=14, failed=13), 3),
        (BatchSummary(total=3, completed=1, failed=1, unfinished=2, reason="refused"), 4),
    ],
)
def test_batch_says_by_its_status_what_became_of_the_rows(monkeypatch, summary, status):
    monkeypatch.setattr("isotherm.cluster.cli.batch.run", lambda *_: summary)
    result = invoke("batch", "--input", "in", "--output", "out", "--url", "http://127.0.0.1:9")
    assert result.exit_code == status and "rows done" in result.output and "isotherm:" not in result.output


def test_batch_takes_several_inputs_and_a_cluster_of_its_own(monkeypatch):
    asked = []

    def run_on_own(*arguments):
        asked.append(arguments)
        return BatchSummary(total=1, completed=1, notes=["1 blank lines"])

    monkeypatch.setattr("isotherm.cluster.cli.batch.run_on_own", run_on_own)
    monkeypatch.setattr(cli, "prepare_attach", lambda _: os.environ["RAY_ADDRESS"])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    words = ("batch", "--input", "a", "--input", "b*.jsonl", "--output", "out", "--own", "tiny", "--priority", "7")
    result = invoke(*words)
    assert result.exit_code == 0 and "1 blank lines" in result.output
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    invoke(*words)
    options = BatchOptions(32, 7)
    assert asked == [("tiny", to, ["a", "b*.jsonl"], Path("out"), options) for to in (None, "10.0.0.1:6379")]
    both = invoke(*words, "--url", "http://127.0.0.1:9")
    assert both.exit_code == 2 and "not both" in both.output


# --- as a process ---------------------------------------------------------------------------------


def test_help_needs_neither_torch_nor_ray():
    code = (
        "import sys; from isotherm.cluster.cli import main as cli; sys.argv = ['isotherm', '--help']\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'ray'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("serve", "generate", "chat", "status", "inspect", "stop", "batch"))


@pytest.mark.parametrize(
    "bug",
    [
        ValueError("a bug"),
        RuntimeError("a bug"),
        UnicodeDecodeError("utf-8", b"x", 0, 1, "a bug"),
        NotImplementedError("a bug"),
        KeyError("a bug"),
    ],
    ids=lambda bug: type(bug).__name__,
)
def test_a_bug_keeps_its_traceback(bug: Exception):
    """Subclasses of ValueError and RuntimeError that are not ours too."""

    def broken() -> None:
        raise bug

    with pytest.raises(type(bug), match="a bug"):
        cli.user_errors(broken)()


@pytest.mark.parametrize(
    "error",
    [
        IsothermError("what is wrong"),
        NumericsError("what is wrong"),
        ConnectionFailedError("what is wrong"),
        BatchError("what is wrong"),
        ConnectionRefusedError("what is wrong"),
        FileNotFoundError("what is wrong"),
        InvalidURL("what is wrong"),
        KernelsUnavailable("what is wrong"),
        NativeKernelsUnavailable("what is wrong"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_for_the_user_is_its_message(error: Exception, capsys: pytest.CaptureFixture[str]):
    def fails() -> None:
        raise error

    with pytest.raises(typer.Exit) as left:
        cli.user_errors(fails)()
    assert left.value.exit_code == 1 and capsys.readouterr().err == "isotherm: what is wrong\n"


@pytest.mark.parametrize("url", ["http://[::1", "nonsense", "ftp://127.0.0.1", ""])
def test_a_url_that_is_none_is_one_message(url: str):
    assert one_error(invoke("chat", "--url", url))


def test_scale_says_which_copies_there_are_to_be():
    app = build_app(FakeEngine(100), None, "m", admin=FakeAdmin())  # type: ignore[arg-type]
    with http_server(app) as url:
        done = invoke("scale", "--url", url, "--copies", "2:5=3", "--copies", "2:6=auto", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["target"]["copies"] == [
        {"layer": 2, "expert": 5, "count": 3},
        {"layer": 2, "expert": 6, "count": None},
    ]


@pytest.mark.parametrize("word", ["2:5", "2:5=", "5=3", "2:5=-1", "2:5=many", "2:5=3,"])
def test_scale_refuses_copies_that_say_nothing(word):
    done = invoke("scale", "--copies", word)
    assert done.exit_code == 2 and "must be LAYER:EXPERT=N" in " ".join(done.stderr.split())


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_some_characters_is_told_the_others(encoding: str):
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([ISOTHERM, "inspect", "tiny"], capture_output=True, env=environment, timeout=60)
    said = done.stdout.decode(encoding)
    assert done.returncode == 0 and not done.stderr and "attention heads" in said and "block" in said
