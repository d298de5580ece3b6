"""The manifest: what is accepted, and that an error names the field, the value and what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from deepseek_checkpoints import make_config
from pydantic import BaseModel

from isotherm.cluster.engine.places import Room
from isotherm.cluster.manifest import Manifest, ManifestError, kv_bytes_per_token, load_manifest, parse_manifest
from isotherm.cluster.manifest_values import parse_bytes
from isotherm.cluster.model.registry import parse
from isotherm.kernels.select import ISAS, NAMES

DEFAULT = Path(__file__).parents[2] / "manifests" / "default.yaml"
MODEL = parse(make_config())  # 3 layers × (32 + 8) elements per token, 4096 positions
TOKEN = 3 * 40 * 2  # bytes of bfloat16


def nested(field: str, value: Any) -> dict[str, Any]:
    for name in reversed(field.split(".")):
        value = {name: value}
    return value


def refusal(data: Any) -> str:
    with pytest.raises(ManifestError) as caught:
        parse_manifest(data, "here.yaml")
    return str(caught.value)


# --- the default ----------------------------------------------------------------------------------


def test_the_written_default_is_the_default():
    assert load_manifest(DEFAULT) == Manifest()


def test_the_written_default_names_every_field():
    def fields(model: type[BaseModel]) -> dict[str, Any]:
        sections = {name: field.annotation for name, field in model.model_fields.items()}
        return {
            name: fields(t) if isinstance(t, type) and issubclass(t, BaseModel) else None
            for name, t in sections.items()
        }

    def names(data: Any, known: dict[str, Any]) -> dict[str, Any]:
        return {name: names(value, known[name]) if known[name] else None for name, value in data.items()}

    known = fields(Manifest)
    assert names(yaml.safe_load(DEFAULT.read_text()), known) == known


def test_every_field_of_the_written_default_has_a_comment():
    lines = [
        line for line in DEFAULT.read_text().splitlines() if line.startswith("  ") and not line.lstrip().startswith("#")
    ]
    bare = [line.split(":")[0].strip() for line in lines if "#" not in line]
    assert set(bare) <= {"gpus", "memory", "labels"}, "the experts' reservations are as the attention's"


@pytest.mark.parametrize("empty", [None, {}])
def test_an_empty_manifest_is_the_default(empty: Any):
    assert parse_manifest(empty) == Manifest()
    assert parse_manifest(empty).http.drain_seconds == 600, "an answer may take minutes"


def test_a_manifest_survives_being_written_and_read():
    manifest = parse_manifest(
        {"model": "m", "attention": {"shards": 2, "labels": {"role": "attention"}}, "engine": {"kv_memory": "1.5GiB"}}
    )
    assert parse_manifest(yaml.safe_load(yaml.safe_dump(manifest.model_dump()))) == manifest


# --- bad values -----------------------------------------------------------------------------------

BAD: list[tuple[str, Any, str]] = [
    ("model", "", "at least 1 character"),
    ("model", 3, "string"),
    ("device", "tpu", "'cpu' or 'cuda'"),
    ("dtype", "fp8", "'bfloat16' or 'float32'"),
    ("kernels", "cuda", "'auto', 'native', 'reference' or 'triton'"),
    ("attention", None, "mapping"),
    ("attention", [1], "mapping"),
    ("attention.shards", 0, "greater than or equal to 1"),
    ("attention.shards", 1025, "less than or equal to 1024"),
    ("attention.shards", True, "integer"),
    ("attention.shards", "2", "integer"),
    ("attention.shards", 1.5, "integer"),
    ("attention.shards", None, "integer"),
    ("attention.cpus", -1, "greater than or equal to 0"),
    ("attention.cpus", float("nan"), "finite"),
    ("attention.cpus", float("inf"), "finite"),
    ("attention.cpus", "half", "number"),
    ("attention.gpus", -0.5, "greater than or equal to 0"),
    ("attention.memory", -1, "greater than or equal to 0"),
    ("attention.threads", 0, "greater than or equal to 1"),
    ("attention.labels", {"role": "a b"}, "label value, !value, in(a,b) or !in(a,b)"),
    ("attention.labels", {"role": "in()"}, "label value, !value, in(a,b) or !in(a,b)"),
    ("attention.labels", {"ro le": "a"}, "label name such as role"),
    ("attention.labels.role", 3, "string"),
    ("experts.groups", 0, "greater than or equal to 1"),
    ("experts.groups", 4097, "less than or equal to 4096"),
    ("experts.spare_slots", -1, "greater than or equal to 0"),
    ("experts.spare_slots", "some", "integer"),
    ("engine.block_size", 0, "greater than or equal to 1"),
    ("engine.block_size", 2048, "less than or equal to 1024"),
    ("engine.kv_memory", "lots", "512MiB or 4GB"),
    ("engine.kv_memory", "5iB", "512MiB or 4GB"),
    ("engine.kv_memory", "-1GiB", "512MiB or 4GB"),
    ("engine.kv_memory", "1e9", "512MiB or 4GB"),
    ("engine.kv_memory", 1.5, "integer"),
    ("engine.kv_memory", True, "integer"),
    ("engine.kv_memory", "9" * 400 + "GB", "less than or equal to"),
    ("engine.max_batch_tokens", 0, "greater than or equal to 1"),
    ("engine.max_sequences", 0, "greater than or equal to 1"),
    ("engine.max_model_len", 1, "greater than or equal to 2"),
    ("engine.prefix_cache", "yes", "boolean"),
    ("engine.prefix_cache", 1, "boolean"),
    ("links.kind", "carrier-pigeon", "'auto'"),
    ("links.timeout", 0, "greater than 0"),
    ("links.timeout", float("inf"), "finite"),
    ("liveness.timeout", -1, "greater than or equal to 0"),
    ("autoscaling.mode", "auto", "'off', 'advise' or 'on'"),
    ("autoscaling.mode", 1, "'off', 'advise' or 'on'"),
    ("autoscaling.interval", 0, "greater than or equal to 0.1"),
    ("autoscaling.half_life", 0, "greater than 0"),
    ("autoscaling.copies.above", 0.9, "greater than or equal to 1"),
    ("autoscaling.copies.max_loads", 0, "greater than 0"),
    ("autoscaling.expert_groups.min", 0, "greater than or equal to 1"),
    ("autoscaling.expert_groups.busy_above", 1.5, "less than or equal to 1"),
    ("autoscaling.attention_shards.max", 1025, "less than or equal to 1024"),
    ("autoscaling.expert_groups", {"max": 2, "min": 3}, "min at most max"),
    ("autoscaling.expert_groups", {"busy_below": 0.9}, "busy_below below busy_above"),
    ("autoscaling.attention_shards", {"kv_above": 0.4}, "kv_below below kv_above"),
    ("http.host", "", "must be an IP address or a host's name"),
    ("http.host", "http://127.0.0.1", "must be an IP address or a host's name"),
    ("http.host", "127.0.0.1:8000", "without a scheme and a port"),
    ("http.host", "127.0.0.1 ", "must be an IP address or a host's name"),
    ("tracing.endpoint", "collector:4318", "must be a URL such as http://localhost:4318/v1/traces"),
    ("tracing.endpoint", "https://us:secret@collector/v1/traces", "must not have a name and a password in it"),
    ("tracing.endpoint", "http://", "must be a URL such as"),
    ("served_name", "", "must have at least 1 character"),
    ("attention.labels", None, "must be a mapping"),
    ("speculation", False, "must be a mapping of kind, tokens"),  # as YAML reads `speculation: off`
    ("http.tls", 5, "must be a mapping of certificate, key"),
    ("http.port", 0, "greater than or equal to 1"),
    ("http.port", 65536, "less than or equal to 65535"),
    ("http.port", "8000", "integer"),
    ("http.replicas", 0, "greater than or equal to 1"),
    ("http.max_ongoing_requests", 0, "greater than or equal to 1"),
    ("http.batches.keep_seconds", 5, "must be greater than or equal to 3600"),
]


@pytest.mark.parametrize(("field", "value", "allowed"), BAD, ids=lambda v: str(v)[:20])
def test_a_bad_value_is_named_with_its_field_and_what_is_allowed(field: str, value: Any, allowed: str):
    message = refusal(nested(field, value))
    assert message.startswith(f"here.yaml: {field} is ")
    assert (
        (repr(value) in message or len(repr(value)) > 20)
        and allowed in message
        and len(message) < 300
        and "pydantic" not in message
    )


@pytest.mark.parametrize(
    "origin", ["example.org", "https://example.org/", "https://example.org/app", "null", "https://a@b", "HTTPS://A"]
)
def test_origins_are_as_browsers_write_them(origin: str):
    message = refusal({"http": {"cors": ["http://localhost:3000", "*", "app://x", origin]}})
    assert message.startswith(f"here.yaml: http.cors.3 is '{origin}': ") and "must be an origin such as" in message


def test_an_unknown_field_of_a_section_that_need_not_be_there():
    message = refusal({"http": {"tls": {"certificate": "/c", "key": "/k", "password": "x"}}})
    assert "http.tls.password" in message and "known here: certificate, key" in message


def test_a_field_that_must_be_there_is_said_to_be_missing():
    assert refusal({"http": {"tls": {"certificate": "/c"}}}) == "here.yaml: http.tls.key is missing: it must be given"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "::1", "fe80::1%eth0", "localhost", "node-1.example.org", "my_host"])
def test_hosts_to_bind(host: str):
    assert parse_manifest({"http": {"host": host}}).http.host == host


def test_paths_are_absolute():
    tls = {"certificate": "c", "key": "/k"}
    message = refusal({"http": {"batches": {"folder": "here"}, "keys": "k.json", "tls": tls}})
    for field, path in (("batches.folder", "here"), ("keys", "k.json"), ("tls.certificate", "c")):
        assert f"http.{field} is '{path}': must be an absolute path" in message


def test_every_bad_field_is_named_at_once():
    lines = refusal({"attention": {"shards": 0}, "http": {"port": 0}, "modle": "x"}).splitlines()
    assert [line.split(" is ")[0] for line in lines] == [
        "here.yaml: attention.shards",
        "here.yaml: http.port",
        "here.yaml: modle",
    ]


@pytest.mark.parametrize(
    ("data", "field", "known"),
    [
        (
            {"modle": "tiny"},
            "modle",
            "model, served_name, device, dtype, weights, kernels, isa, mixed, generation_config, logprobs, tool_format",
        ),
        ({"attention": {"shard": 1}}, "attention.shard", "shards, cpus, gpus, memory, threads, labels"),
        ({"http": {"prot": 1}}, "http.prot", "host, port, replicas, max_ongoing_requests"),
    ],
)
def test_an_unknown_field_lists_the_known_ones(data: dict[str, Any], field: str, known: str):
    message = refusal(data)
    assert field in message and "unknown field" in message and known in message


@pytest.mark.parametrize("data", [[], "tiny", 3, [{"model": "tiny"}]])
def test_a_manifest_is_a_mapping(data: Any):
    assert refusal(data) == f"here.yaml: must be a mapping, found {type(data).__name__}"


def test_field_names_are_strings():
    assert refusal({True: 2}) == "here.yaml: 1 is a name that YAML reads as True: names of fields must be strings"


# --- sizes and labels -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0), ("17", 17), ("17B", 17), ("1KiB", 1024), ("1 KB", 1000), ("512MiB", 512 << 20), ("1.5GiB", 3 << 29),
        ("4GB", 4 * 10**9), (" 2TiB ", 2 << 40), ("1TB", 10**12), ("0.1GB", 10**8), (12, 12),
    ],
)  # fmt: skip
def test_sizes(text: Any, count: int):
    assert parse_bytes(text) == count
    assert parse_manifest({"engine": {"kv_memory": text}}).engine.kv_memory == count


@pytest.mark.parametrize("selector", ["attention", "!expert", "in(a,b)", "!in(a, b)"])
def test_label_selectors(selector: str):
    assert parse_manifest({"experts": {"labels": {"example.com/role": selector}}}).experts.labels == {
        "example.com/role": selector
    }


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({}, "tiny"), ({"model": "/models/DeepSeek-V3/"}, "DeepSeek-V3"),
        ({"model": "deepseek-ai/DeepSeek-V3"}, "DeepSeek-V3"), ({"model": "/models/x", "served_name": "mine"}, "mine"),
    ],
)  # fmt: skip
def test_the_model_id_is_the_last_part_of_its_name(data: dict[str, Any], name: str):
    assert parse_manifest(data).model_id == name


def test_yaml_means_on_and_off_when_it_says_true_and_false():
    for text, mode in (("on", "on"), ("off", "off"), ("advise", "advise"), ("'off'", "off")):
        assert parse_manifest(yaml.safe_load(f"autoscaling: {{mode: {text}}}")).autoscaling.mode == mode


def test_an_eighth_of_the_share_is_spare_where_nothing_is_said():
    assert [Manifest().group_slots(2 * share - 1, 2) - share for share in (1, 8, 9, 928)] == [1, 1, 2, 116]
    assert parse_manifest({"experts": {"spare_slots": 0}}).group_slots(100, 1) == 100


# --- the scheduler's limits -----------------------------------------------------------------------


def engine(**fields: Any) -> Manifest:
    return parse_manifest({"engine": fields})


def test_kv_memory_divides_into_blocks():
    sizes = [kv_bytes_per_token(MODEL, dtype, "auto") for dtype in ("bfloat16", "float32")]
    assert sizes == [TOKEN, 2 * TOKEN]
    config = engine(
        kv_memory=10 * 16 * TOKEN + 1, max_batch_tokens=7, max_sequences=3, prefix_cache=False
    ).scheduler_config(MODEL)
    assert (config.block_size, config.blocks, config.max_batch_tokens, config.max_sequences, config.prefix_cache) == (
        16,
        10,
        7,
        3,
        False,
    )
    assert config.max_model_len == 160  # what the cache holds
    coded = engine(kv_memory=10 * 16 * TOKEN, kv_cache_dtype="fp8").scheduler_config(MODEL)
    assert coded.blocks == 10 * TOKEN // (3 * (32 + 2 * (8 + 1)))


def test_as_many_tokens_may_wait_as_the_cache_holds_unless_it_is_said():
    limits = {"kv_memory": 160 * TOKEN, "max_sequences": 3, "max_waiting": 2}
    assert engine(**limits).scheduler_config(MODEL).room == Room(5, 320)
    assert engine(**limits, max_waiting_tokens=10).scheduler_config(MODEL).room == Room(5, 170)


def test_the_context_is_at_most_the_models():
    assert Manifest().scheduler_config(MODEL).max_model_len == 4096
    assert engine(max_model_len=100).scheduler_config(MODEL).max_model_len == 100


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kv_memory": 16 * TOKEN - 1}, ["engine.kv_memory", str(16 * TOKEN - 1), str(16 * TOKEN)]),
        ({"kv_memory": 0}, ["engine.kv_memory is 0"]),
        ({"max_model_len": 4097}, ["engine.max_model_len is 4097", "the model allows 4096"]),
        (
            {"max_model_len": 161, "kv_memory": 160 * TOKEN},
            ["engine.max_model_len is 161", "engine.kv_memory 160 tokens"],
        ),
    ],
)
def test_a_cache_or_context_that_does_not_fit_is_refused(fields: dict[str, Any], words: list[str]):
    with pytest.raises(ManifestError) as caught:
        engine(**fields).scheduler_config(MODEL)
    assert all(word in str(caught.value) for word in words)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"a: [1",
        b"a: b: c",
        b"\xff\xfe\x00",
        b"!!python/object/apply:os.getcwd []",
        b"a: 2001-99-99",
        b"[" * 5000,
        b"a: *nowhere",
        b"a: \x07",
    ],
    ids=[
        "open list",
        "two colons",
        "not UTF-8",
        "python object",
        "no date",
        "too deep",
        "no anchor",
        "control character",
    ],
)
def test_what_is_not_yaml_is_named_with_its_file(tmp_path: Path, content: bytes):
    file = tmp_path / "broken.yaml"
    file.write_bytes(content)
    with pytest.raises(ManifestError, match="not valid YAML") as caught:
        load_manifest(file)
    assert str(caught.value).startswith(f"{file}: ")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    for file in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ManifestError, match="cannot be read") as caught:
            load_manifest(file)
        assert str(caught.value).startswith(f"{file}: ")


def test_a_path_has_no_null_character():
    with pytest.raises(ManifestError, match="must be an absolute path"):
        parse_manifest({"http": {"batches": {"folder": "/a\0b"}}})


def test_a_tilde_in_a_files_path_is_a_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m.yaml").write_text("served_name: mine")
    assert load_manifest(Path("~/m.yaml")).served_name == "mine"
    with pytest.raises(ManifestError, match=r"^~nobody-of-that-name/m\.yaml: cannot be read \(.*home"):
        load_manifest(Path("~nobody-of-that-name/m.yaml"))


def test_an_error_inside_a_file_names_the_file(tmp_path: Path):
    file = tmp_path / "m.yaml"
    file.write_text("http: {port: 0}")
    with pytest.raises(ManifestError, match="http.port is 0") as caught:
        load_manifest(file)
    assert str(caught.value).startswith(f"{file}: ")


@pytest.mark.parametrize(("links", "liveness", "expected"), [(30.0, 15.0, 15.0), (2.0, 15.0, 2.0), (30.0, 0, 30.0)])
def test_a_silent_group_is_found_no_later_than_a_worker_that_hangs(links, liveness, expected):
    manifest = parse_manifest({"links": {"timeout": links}, "liveness": {"timeout": float(liveness)}})
    assert manifest.link_timeout == expected


def test_kernels_have_the_names_that_workers_know():
    fields = Manifest.model_fields
    assert get_args(fields["kernels"].annotation) == NAMES and get_args(fields["isa"].annotation) == tuple(ISAS)
