"""The cluster manifest: one YAML file says what runs where. Loaded and checked once, then handed down."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from isotherm.cluster.control import link_choice
from isotherm.cluster.engine.config import SchedulerConfig
from isotherm.cluster.engine.speculation import MOST
from isotherm.cluster.errors import IsothermError
from isotherm.cluster.logs import LogFormat, LogLevel
from isotherm.cluster.manifest_text import decode, problem
from isotherm.cluster.manifest_values import AbsolutePath, Address, Bytes, Endpoint, Labels, Origin, one_of
from isotherm.cluster.messages.copies import CopyFrom
from isotherm.cluster.messages.operations import AutoscalerMode
from isotherm.cluster.model.config import ModelConfig
from isotherm.cluster.model.kv_cache import KvCacheDtype
from isotherm.cluster.model.weight_choice import FORMS, WeightChoice
from isotherm.cluster.text.tool_formats.registry import CHOICES


class ManifestError(IsothermError, ValueError):
    """The manifest cannot be used; the message names the field, the value and what is allowed."""


LinkChoice = Annotated[str, one_of(link_choice.choices)]
ToolFormatChoice = Annotated[str, one_of(lambda: CHOICES)]


class _Section(BaseModel):
    # Strict: `shards: true` and `port: "8000"` are mistakes, not 1 and 8000.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class WeightsSection(_Section):
    """In how many bits weights are kept; what is not stored so is quantised while it is read."""

    experts: Annotated[str, one_of(lambda: FORMS["experts"])] = Field("stored", description="the routed experts")
    dense: Annotated[str, one_of(lambda: FORMS["dense"])] = Field("stored", description="what all tokens share")
    head: Annotated[str, one_of(lambda: FORMS["head"])] = Field("stored", description="the output head")

    @property
    def choice(self) -> WeightChoice:
        return WeightChoice(**self.model_dump())


class AttentionSection(_Section):
    shards: int = Field(1, ge=1, le=1024)
    cpus: float = Field(0.5, ge=0, description="Ray CPUs that each shard's placement group reserves")
    gpus: float = Field(0, ge=0)
    memory: Bytes = Field(0, description="Ray memory that each shard reserves; 0: none")
    threads: int | None = Field(None, ge=1, description="per shard; default: its node's cores, or limit of CPU time")
    labels: Labels = Field({}, description="Ray labels of the nodes that shards may run on")


class ExpertSection(_Section):
    groups: int = Field(2, ge=1, le=4096)
    cpus: float = Field(0.25, ge=0)
    gpus: float = Field(0, ge=0)
    memory: Bytes = Field(0)
    threads: int | None = Field(
        None, ge=1, description="of a group; default: its node's cores, or its limit of CPU time, shared out evenly"
    )
    spare_slots: int | None = Field(
        None, ge=0, description="experts beyond its share that each group has room for; default: an eighth of the share"
    )
    copy_from: CopyFrom = Field(
        "auto", description="whence a group has experts that another holds: a peer's memory, or files; auto: the faster"
    )
    labels: Labels = Field({}, description="Ray labels of the nodes that groups may run on")


class EngineSection(_Section):
    block_size: int = Field(16, ge=1, le=1024, description="tokens per KV block")
    kv_memory: Bytes = Field(256 << 20, description="KV cache per shard")
    kv_cache_dtype: KvCacheDtype = Field("auto", description="auto: that of activations; fp8: latents in 8 bits")
    max_batch_tokens: int = Field(512, ge=1)
    max_sequences: int = Field(128, ge=1)
    max_waiting: int = Field(128, ge=0, description="requests per shard beyond max_sequences; more are refused")
    max_waiting_tokens: int | None = Field(
        None, ge=0, description="the same in tokens, beyond what the KV cache holds; default: as many again"
    )
    max_model_len: int | None = Field(None, ge=2, description="prompt and output; default: what model and cache allow")
    prefix_cache: bool = True
    shared_prefix_cache: bool = Field(False, description="one for all API keys; else each has its own")


def _off(value: Any) -> Any:
    """YAML reads `off` as false."""
    return "off" if value is False else value


class SpeculationSection(_Section):
    kind: Annotated[Literal["auto", "mtp", "ngram", "off"], BeforeValidator(_off)] = Field(
        "off",
        description="what guesses tokens: the model's multi-token-prediction layer, or what stood before; "
        "auto: the layer where the checkpoint has one",
    )
    tokens: int = Field(4, ge=1, le=MOST, description="guesses of a stream in one step, at most")


class LinkSection(_Section):
    kind: LinkChoice = Field("auto", description="auto: shared memory within a host, without GPUs")
    timeout: float = Field(30.0, gt=0, description="seconds after which a silent group counts as lost")
    gather_window: float = Field(
        1.0,
        ge=0,
        le=100,
        description="how long a group holds a message for other busy shards, in layer times; 0: never",
    )


class CopiesSection(_Section):
    enabled: bool = True
    above: float = Field(
        1.1,
        ge=1,
        description="hottest group / mean group in a layer, mean over layers, above which experts are moved and copied",
    )
    after: float = Field(2.0, ge=0, description="seconds that it must have been above")
    cooldown: float = Field(6.0, ge=0, description="seconds from one change of copies to the next")
    gain: float = Field(0.04, ge=0, description="how much of the imbalance a change must be expected to take off")
    max_loads: float = Field(0.25, gt=0, le=1, description="copies loaded in one change, as a fraction of all copies")
    read_cost: float = Field(8.0, ge=0, le=10000, description="of reading an expert's weights once, in rows computed")


class GroupScalingSection(_Section):
    min: int | None = Field(None, ge=1, le=4096)
    max: int | None = Field(None, ge=1, le=4096)
    busy_above: float = Field(0.8, gt=0, le=1, description="mean fraction of the time that groups compute")
    busy_below: float = Field(0.4, ge=0, le=1, description="the same, as it would be with one group fewer")
    memory_above: float = Field(0.9, gt=0, le=1, description="weights / experts.memory, where that is given")

    @model_validator(mode="after")
    def _apart(self) -> GroupScalingSection:
        _ordered(self.min, self.max)
        _below("busy_below", self.busy_below, "busy_above", self.busy_above)
        return self


class ShardScalingSection(_Section):
    min: int | None = Field(None, ge=1, le=1024)
    max: int | None = Field(None, ge=1, le=1024)
    waiting_above: float = Field(4.0, gt=0, description="requests per shard that wait to be admitted")
    kv_above: float = Field(0.85, gt=0, le=1, description="fraction of the KV blocks in use, mean of the shards")
    kv_below: float = Field(0.5, ge=0, le=1, description="the same, as it would be with one shard fewer")
    first_token_above: float = Field(5.0, gt=0, description="seconds to a request's first token, at the shard")

    @model_validator(mode="after")
    def _apart(self) -> ShardScalingSection:
        _ordered(self.min, self.max)
        _below("kv_below", self.kv_below, "kv_above", self.kv_above)
        return self


def _ordered(low: int | None, high: int | None) -> None:
    if low is not None and high is not None and low > high:
        raise ValueError(f"must have min at most max, not {low} and {high}")


def _below(low: str, value: float, high: str, limit: float) -> None:
    if value >= limit:
        raise ValueError(f"must have {low} below {high}, or workers would come and go: {value} and {limit}")


def _mode(value: Any) -> Any:
    """YAML reads `on` and `off` as true and false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class AutoscalingSection(_Section):
    mode: Annotated[AutoscalerMode, BeforeValidator(_mode)] = Field(
        "on", description="advise: only write what would be done"
    )
    interval: float = Field(2.0, ge=0.1, le=3600, description="seconds between two looks at the load")
    half_life: float = Field(10.0, gt=0, le=86400, description="seconds after which past load counts half")
    up_after: float = Field(15.0, ge=0, description="seconds that a reason for more workers must have held")
    down_after: float = Field(300.0, ge=0, description="seconds that a reason for fewer workers must have held")
    cooldown: float = Field(
        60.0, ge=0, description="seconds from one change of the number of workers to the next of the same kind"
    )
    patience: float = Field(900.0, gt=0, description="seconds that a new worker may wait for a node")
    copies: CopiesSection = CopiesSection()
    expert_groups: GroupScalingSection = GroupScalingSection()
    attention_shards: ShardScalingSection = ShardScalingSection()


class LivenessSection(_Section):
    timeout: float = Field(
        15.0, ge=0, le=3600, description="seconds without an answer after which a worker counts as hung; 0: never"
    )
    spare_processes: bool = Field(
        False, description="a process stands ready on each node for a worker that takes another's place, in some 250 MB"
    )


class BatchesSection(_Section):
    """/v1/files and /v1/batches."""

    folder: AbsolutePath | None = Field(
        None, description="where they are kept; default: a folder of the Ray session, for one replica"
    )
    max_bytes: Bytes = Field(
        1 << 30, description="all files and outputs together; one API key may have a quarter, and half of what is free"
    )
    max_file_bytes: Bytes = Field(200 << 20, description="one uploaded file")
    keep_seconds: int = Field(30 * 86400, ge=3600, description="from a file's creation to its end")
    concurrency: int = Field(32, ge=1, le=1024, description="rows that one replica asks at once")


class TlsSection(_Section):
    """PEM files, on every machine that has an ingress."""

    certificate: AbsolutePath = Field(description="with the chain that leads to it")
    key: AbsolutePath


class HttpSection(_Section):
    host: Address = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    replicas: int = Field(1, ge=1, description="ingress replicas")
    max_ongoing_requests: int = Field(1024, ge=1, description="per replica")
    max_queued_requests: int = Field(256, ge=1, description="beyond those, per proxy; more are refused")
    tls: TlsSection | None = None
    keys: AbsolutePath | None = Field(None, description="file of API keys, as `isotherm keys` writes it")
    admin: Literal["loopback", "open"] = Field("loopback", description="who may use /admin/* and /status without keys")
    metrics: Literal["loopback", "open"] = Field("loopback", description="who may read /metrics without keys")
    cors: list[Origin] = Field([], description='origins whose pages may read answers in a browser; "*": all')
    batches: BatchesSection = BatchesSection()
    request_timeout: float | None = Field(
        None, gt=0, le=86400, description="seconds from a request's arrival to its end; clients may ask for fewer"
    )
    drain_seconds: float = Field(
        600.0, ge=0, le=86400, description="for open requests to finish when the ingress is updated or the service ends"
    )
    aliases: list[Annotated[str, Field(min_length=1)]] = Field([], description="further names of the model")
    kept_responses: Bytes = Field(64 << 20, description="of responses that later ones may go on from")


class LoggingSection(_Section):
    format: LogFormat = "text"
    level: LogLevel = "info"


class TracingSection(_Section):
    endpoint: Endpoint | None = Field(None, description="OTLP over HTTP; default: no traces")
    sample: float = Field(1.0, ge=0, le=1, description="share of the requests, of those that bring no traceparent")


class Manifest(_Section):
    model: str = Field("tiny", min_length=1)
    served_name: str | None = Field(
        None, min_length=1, description="model id that the API shows; default: the name of the model's directory"
    )
    device: Literal["cpu", "cuda"] = Field(
        "cpu", description="where workers that reserve GPUs compute; the others use the CPU"
    )
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    weights: WeightsSection = WeightsSection()
    kernels: Literal["auto", "native", "reference", "triton"] = "auto"
    isa: Literal["auto", "amx", "avx512", "avx2", "generic"] = Field(
        "auto", description="instruction set of the native kernels; auto: the best of each machine"
    )
    mixed: Literal["refuse", "allow"] = Field(
        "refuse", description="what becomes of workers that would compute other bits"
    )
    generation_config: Literal["auto", "none"] = Field(
        "auto", description="whether sampling has the checkpoint's own defaults"
    )
    logprobs: Literal["model", "processed"] = Field(
        "model", description="of the model's own distribution, or of the one that tokens are drawn from"
    )
    tool_format: ToolFormatChoice = Field("auto", description="how the model calls tools; auto: as its template shows")
    control_tokens: Literal["from_template", "anywhere"] = Field(
        "from_template",
        description="where the text of a control token is one: not in what chats' messages say, or there too",
    )
    attention: AttentionSection = AttentionSection()
    experts: ExpertSection = ExpertSection()
    engine: EngineSection = EngineSection()
    speculation: SpeculationSection = SpeculationSection()
    links: LinkSection = LinkSection()
    liveness: LivenessSection = LivenessSection()
    autoscaling: AutoscalingSection = AutoscalingSection()
    http: HttpSection = HttpSection()
    logging: LoggingSection = LoggingSection()
    tracing: TracingSection = TracingSection()

    @property
    def model_id(self) -> str:
        return self.served_name or Path(self.model.rstrip("/")).name

    @property
    def url(self) -> str:
        """Where the front door listens, as seen from its own machine."""
        scheme, host = "https" if self.http.tls is not None else "http", self.http.host
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.http.port}"

    @property
    def link_timeout(self) -> float:
        """Seconds after which a group that does not answer a shard counts as lost. Not more than after which a worker
        hangs: till then a shard that waits for an answer could not be told from one that does."""
        return min(self.links.timeout, self.liveness.timeout or self.links.timeout)

    def worker_device(self, gpus: float) -> Literal["cpu", "cuda"]:
        """Where a worker that reserves so many GPUs computes."""
        return self.device if gpus else "cpu"

    def group_slots(self, experts: int, groups: int) -> int:
        """Of so many experts over all layers, how many each of so many groups may hold: its share and the spare ones.
        By default those are an eighth: what DeepSeek's own deployment of V3 keeps (32 redundant experts for 256 per
        layer)."""
        share = -(-experts // groups)
        return share + (-(-share // 8) if self.experts.spare_slots is None else self.experts.spare_slots)

    def scheduler_config(self, model: ModelConfig) -> SchedulerConfig:
        """How the KV memory divides into blocks. Raises ManifestError where the wished context does not fit."""
        engine = self.engine
        block_bytes = engine.block_size * kv_bytes_per_token(model, self.dtype, engine.kv_cache_dtype)
        blocks = engine.kv_memory // block_bytes
        if blocks < 1:
            raise ManifestError(
                f"engine.kv_memory is {engine.kv_memory} bytes; "
                f"one block of {engine.block_size} tokens takes {block_bytes}"
            )
        room = min(model.max_position_embeddings, blocks * engine.block_size)
        wished = engine.max_model_len or room
        if wished > room:
            raise ManifestError(
                f"engine.max_model_len is {wished}; the model allows {model.max_position_embeddings} and "
                f"engine.kv_memory {blocks * engine.block_size} tokens"
            )
        return SchedulerConfig(
            engine.block_size,
            blocks,
            engine.max_batch_tokens,
            engine.max_sequences,
            wished,
            engine.prefix_cache,
            engine.max_waiting,
            blocks * engine.block_size if engine.max_waiting_tokens is None else engine.max_waiting_tokens,
        )


def kv_bytes_per_token(model: ModelConfig, dtype: str, kept: KvCacheDtype) -> int:
    """Latent and rotary key of every layer."""
    return model.cache_layers * model.cache_bytes({"bfloat16": 2, "float32": 4}[dtype], kept)


def parse_manifest(data: Any, where: str = "manifest") -> Manifest:
    """Check decoded YAML. Raises ManifestError naming every bad field."""
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ManifestError(f"{where}: must be a mapping, found {type(data).__name__}")
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        problems = [problem(e, _fields_at) for e in error.errors()]
        raise ManifestError("\n".join(f"{where}: {words}" for words in problems)) from None


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    section: Any = Manifest
    for part in location:
        section = section.model_fields[str(part)].annotation
        section = next((one for one in get_args(section) if one is not type(None)), section)
    return list(section.model_fields)


def load_manifest(path: Path) -> Manifest:
    """Read a YAML file. Raises ManifestError."""
    return parse_manifest(read_manifest(path), str(path))


def read_manifest(path: Path) -> Any:
    """What a YAML file says, to be checked by `parse_manifest`; ~ is a home directory. Raises ManifestError."""
    try:
        return decode(path.expanduser().read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or a date such as 2001-99-99
        raise ManifestError(f"{path}: not valid YAML ({error})") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: ~ of nobody
        raise ManifestError(f"{path}: cannot be read ({getattr(error, 'strerror', error)})") from None


def human_bytes(count: int) -> str:
    """1536 → 1.5 KiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
