"""What one ingress replica counts of its requests as they end.

Names and buckets are those of OpenTelemetry's conventions for generative AI, where these have one
(https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-metrics/)."""

from __future__ import annotations

from isotherm.cluster.api.request_book import RequestRecord
from isotherm.cluster.messages.figures import BoundedLabels, Family, Metric, Tally

KEYS = 50  # names of keys that have series of their own; those that come later share one
_OPERATION, _MODEL = "gen_ai_operation_name", "gen_ai_request_model"
_DURATIONS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_TOKENS = tuple(float(4**i) for i in range(14))

DURATION = Metric(
    "gen_ai_server_request_duration_seconds",
    "From a request's arrival to its end",
    "histogram",
    (_OPERATION, _MODEL, "error_type"),
    _DURATIONS,
)
FIRST_TOKEN = Metric(
    "gen_ai_server_time_to_first_token_seconds",
    "From a request's arrival to its first token, of those that went well",
    "histogram",
    (_OPERATION, _MODEL),
    _FIRST,
)
PER_TOKEN = Metric(
    "gen_ai_server_time_per_output_token_seconds",
    "Decode time / tokens after the first, of requests that went well",
    "histogram",
    (_OPERATION, _MODEL),
    _PER_TOKEN,
)
TOKEN_USAGE = Metric(
    "gen_ai_client_token_usage",
    "Tokens of a request: of its prompt (input), of all its choices (output)",
    "histogram",
    (_OPERATION, _MODEL, "gen_ai_token_type"),
    _TOKENS,
)
QUEUE, PREFILL, DECODE = (
    Metric(f"isotherm_request_{phase}_seconds", words, "histogram", bounds=(*_FIRST, 20.0, 40.0, 80.0))
    for phase, words in (
        ("queue", "From a request's submission to its first turn at a shard"),
        ("prefill", "From a request's first turn to its first token"),
        ("decode", "From a request's first token to its end"),
    )
)
REQUESTS = Metric("isotherm_requests_total", "Requests that have ended, refused ones included", labels=("key", "route"))
ERRORS = Metric(
    "isotherm_request_errors_total", "Requests that ended with an error, by its kind", labels=("key", "error_type")
)
FINISHED = Metric("isotherm_choices_finished_total", "Choices that have finished", labels=("finish_reason",))
TOKENS = Metric(
    "isotherm_tokens_total",
    "Tokens of prompts (input), those of them from the prefix cache (cached), and of outputs",
    labels=("key", "type"),
)
SECONDS = Metric(
    "isotherm_request_phase_seconds_total", "Seconds that requests spent in each phase", labels=("key", "phase")
)
MOVED = Metric("isotherm_streams_moved_total", "Times that a shard gave a stream to another")
RESUMED = Metric("isotherm_streams_resumed_total", "Times that a stream went on elsewhere after its shard was lost")
METRICS = (
    DURATION, FIRST_TOKEN, PER_TOKEN, TOKEN_USAGE, QUEUE, PREFILL, DECODE,
    REQUESTS, ERRORS, FINISHED, TOKENS, SECONDS, MOVED, RESUMED,
)  # fmt: skip


class RequestFigures:
    """A sink of the request book."""

    def __init__(self) -> None:
        self._tally = Tally(METRICS)
        self._keys = BoundedLabels(KEYS)

    def take(self, record: RequestRecord) -> None:
        tally, key = self._tally, self._keys.of(record.key)
        of_model = "text_completion" if record.route == "/v1/completions" else "chat", record.model
        tally.observe(DURATION, record.seconds, (*of_model, record.error))
        tally.add(REQUESTS, (key, record.route))
        if record.error:
            tally.add(ERRORS, (key, record.error))
        for reason in record.finish_reasons:
            tally.add(FINISHED, (reason,))
        self._count_tokens(record, key, of_model)
        if record.first_token is None:
            return
        tally.observe(QUEUE, record.queue)
        tally.observe(PREFILL, record.prefill)
        tally.observe(DECODE, record.decode)
        for phase in ("queue", "prefill", "decode"):
            tally.add(SECONDS, (key, phase), getattr(record, phase))
        if not record.error:
            tally.observe(FIRST_TOKEN, record.first_token, of_model)
            after_first = record.output_tokens / max(1, record.choices) - 1
            if after_first > 0:
                tally.observe(PER_TOKEN, record.decode / after_first, of_model)

    def _count_tokens(self, record: RequestRecord, key: str, of_model: tuple[str, str]) -> None:
        tally = self._tally
        if record.prompt_tokens:
            tally.observe(TOKEN_USAGE, record.prompt_tokens, (*of_model, "input"))
            tally.observe(TOKEN_USAGE, record.output_tokens, (*of_model, "output"))
            tally.add(TOKENS, (key, "input"), record.prompt_tokens)
            tally.add(TOKENS, (key, "cached"), record.cached_tokens)
            tally.add(TOKENS, (key, "output"), record.output_tokens)
        tally.add(MOVED, amount=record.moved)
        tally.add(RESUMED, amount=record.resumed)

    def read(self) -> list[Family]:
        return self._tally.read()
