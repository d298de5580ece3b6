"""Writes the Grafana dashboards beside it: what their panels ask Prometheus, in one table for each.

python manifests/observability/dashboards.py
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
_ACROSS, _HEIGHT = 24, 8  # of Grafana's grid, and of a panel


@dataclass(frozen=True)
class Panel:
    """`queries`: PromQL and legend of each line."""

    title: str
    unit: str
    queries: Sequence[tuple[str, str]]
    words: str = ""
    width: int = 8


def rate(metric: str, by: str = "", where: str = "") -> str:
    """Of a counter, per second; its sum over everything but `by`."""
    return f"sum{f' by ({by}) ' if by else ''}(rate({metric}{where}[$__rate_interval]))"


def quantiles(histogram: str, where: str = "") -> list[tuple[str, str]]:
    found = rate(f"{histogram}_bucket", "le", where)
    return [(f"histogram_quantile({q}, {found})", f"p{100 * q:g}") for q in (0.5, 0.95, 0.99)]


def mean(histogram: str, by: str = "") -> str:
    return f"{rate(f'{histogram}_sum', by)} / {rate(f'{histogram}_count', by)}"


FIRST, PER_TOKEN = "gen_ai_server_time_to_first_token_seconds", "gen_ai_server_time_per_output_token_seconds"
REQUESTS = [
    Panel("Requests", "reqps", [(rate("isotherm_requests_total", "route"), "{{route}}")]),
    Panel("Errors", "reqps", [(rate("isotherm_request_errors_total", "error_type"), "{{error_type}}")],
          "By the code that clients are told"),
    Panel("Open requests", "short", [("sum by (ingress) (isotherm_requests_open)", "{{ingress}}")]),
    Panel("Time to first token", "s", quantiles(FIRST)),
    Panel("Time per output token", "s", quantiles(PER_TOKEN)),
    Panel("Whole request", "s", quantiles("gen_ai_server_request_duration_seconds")),
    Panel("Where the time goes, mean of a request", "s",
          [(mean(f"isotherm_request_{phase}_seconds"), phase) for phase in ("queue", "prefill", "decode")]),
    Panel("Tokens", "short", [(rate("isotherm_tokens_total", "type"), "{{type}} per second")]),
    Panel("Prompt tokens from the prefix cache", "percentunit",
          [(f"{rate('isotherm_prefix_cache_hit_tokens_total')} / {rate('isotherm_prefix_cache_lookup_tokens_total')}",
            "of those looked up")]),
    Panel("Prompt length", "short", quantiles("gen_ai_client_token_usage", '{gen_ai_token_type="input"}')),
    Panel("Output length", "short", quantiles("gen_ai_client_token_usage", '{gen_ai_token_type="output"}')),
    Panel("Finish reasons", "reqps", [(rate("isotherm_choices_finished_total", "finish_reason"), "{{finish_reason}}")]),
    Panel("Requests by key", "reqps", [(rate("isotherm_requests_total", "key"), "{{key}}")]),
    Panel("Tokens by key", "short", [(rate("isotherm_tokens_total", "key"), "{{key}} per second")]),
    Panel("Queue by key, mean of a request", "s",
          [(rate("isotherm_request_phase_seconds_total", "key", '{phase="queue"}') + " / "
            + rate("isotherm_requests_total", "key"), "{{key}}")]),
]  # fmt: skip
CLUSTER = [
    Panel("Serving", "bool", [("isotherm_ready", "ready"), ("isotherm_controller_reachable", "controller")]),
    Panel("Workers", "short", [("isotherm_workers_alive", "{{role}}"), ("isotherm_workers_wanted", "{{role}} wanted")]),
    Panel("Lost workers, failed links", "short",
          [("isotherm_workers_lost_total", "lost {{role}}"), ("isotherm_link_repairs_total", "links {{result}}"),
           ("isotherm_links_failed", "links of no use now")]),
    Panel("Running", "short", [("isotherm_shard_requests_running", "{{shard}}")]),
    Panel("Waiting", "short", [("isotherm_shard_requests_waiting", "{{shard}}")]),
    Panel("KV blocks in use", "percentunit", [("isotherm_shard_kv_used_ratio", "{{shard}}")]),
    Panel("Tokens generated", "short", [("isotherm_shard_tokens_per_second", "{{shard}} per second")]),
    Panel("Step", "s", quantiles("isotherm_step_seconds")),
    Panel("Of a step's time, waiting for groups", "percentunit",
          [(f"{rate('isotherm_step_exchange_wait_seconds_sum', 'shard')} / "
            f"{rate('isotherm_step_seconds_sum', 'shard')}", "{{shard}}")]),
    Panel("Batch, mean of a step", "short",
          [(mean("isotherm_step_requests", "shard"), "{{shard}} requests"),
           (mean("isotherm_step_tokens", "shard"), "{{shard}} tokens")]),
    Panel("Preemptions", "reqps", [(rate("isotherm_preemptions_total", "shard"), "{{shard}}")]),
    Panel("Guessed tokens", "short",
          [(rate("isotherm_drafts_total", "shard"), "{{shard}} guessed per second"),
           (rate("isotherm_drafts_accepted_total", "shard"), "{{shard}} right per second")]),
    Panel("Gain of guessing", "short", [("isotherm_speculation_gain", "{{shard}}")],
          "Speed that is expected / the one without guesses; 1 where none are made"),
    Panel("Streams that went on elsewhere", "reqps",
          [(rate("isotherm_streams_moved_total"), "moved"), (rate("isotherm_streams_resumed_total"), "resumed")]),
    Panel("Groups, busy", "percentunit", [("isotherm_group_busy_ratio", "{{group}}")]),
    Panel("Groups, heat", "short", [("isotherm_group_heat_ratio", "{{group}}")],
          "Rows routed to the group / the mean group's"),
    Panel("Groups, waited for by shards", "percentunit", [("isotherm_group_waited_ratio", "{{group}}")]),
    Panel("Groups, rows", "short", [("isotherm_group_rows_per_second", "{{group}} per second")]),
    Panel("Groups, rows of a computation", "short", [("isotherm_group_batch_rows", "{{group}}")]),
    Panel("Groups, weights", "bytes", [("isotherm_group_weight_bytes", "{{group}}")]),
    Panel("The hottest experts", "short",
          [("isotherm_hot_expert_rows_per_second", "layer {{layer}} expert {{expert}}")], "Rows per second", 16),
    Panel("Operations and the autoscaler", "short",
          [("isotherm_operations_total", "{{origin}} {{phase}}"), ("isotherm_operations_open", "open"),
           ("isotherm_placement_version", "placement version"),
           ("isotherm_autoscaler_decisions_total", "autoscaler {{kind}} {{result}}")]),
]  # fmt: skip
DASHBOARDS = {"requests": ("Isotherm: requests", REQUESTS), "cluster": ("Isotherm: cluster", CLUSTER)}


def dashboard(name: str) -> dict[str, Any]:
    """As Grafana imports it; it asks which Prometheus is meant."""
    title, panels = DASHBOARDS[name]
    source = {"type": "prometheus", "uid": "${source}"}
    made, x, y = [], 0, 0
    for i, panel in enumerate(panels, 1):
        if x + panel.width > _ACROSS:
            x, y = 0, y + _HEIGHT
        targets = [
            {"refId": chr(ord("A") + n), "expr": expr, "legendFormat": legend, "datasource": source}
            for n, (expr, legend) in enumerate(panel.queries)
        ]
        made.append(
            {
                "id": i,
                "title": panel.title,
                "description": panel.words,
                "type": "timeseries",
                "datasource": source,
                "gridPos": {"x": x, "y": y, "w": panel.width, "h": _HEIGHT},
                "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
                "options": {"legend": {"displayMode": "list"}, "tooltip": {"mode": "multi", "sort": "desc"}},
                "targets": targets,
            }
        )
        x += panel.width
    source_choice = {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    return {
        "uid": f"isotherm-{name}",
        "title": title,
        "tags": ["isotherm"],
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [source_choice]},
        "panels": made,
    }


def written(name: str) -> str:
    return json.dumps(dashboard(name), indent=1) + "\n"


if __name__ == "__main__":
    for each in DASHBOARDS:
        (FOLDER / f"{each}.json").write_text(written(each))
