"""The metrics of a front door whose engine is in its own process."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from isotherm.cluster.messages.figures import Metric, Tally
from isotherm.cluster.messages.meters import ShardMeter
from isotherm.cluster.observe.alone import Alone

NOTHING = np.zeros((0, 0), dtype=np.int64)
STEPS = Metric("isotherm_some_total", "some")
METER = ShardMeter(3, 1, 128, 0.25, 0, 0, None, 0.0, {}, NOTHING, NOTHING)


def test_the_engine_is_one_shard_whose_rates_are_those_between_scrapes():
    meter, now = METER, 0.0
    alone = Alone(lambda: meter, lambda: True, lambda: now)

    def scrape() -> dict:
        text = asyncio.run(alone.metrics("local", Tally([STEPS]).read()))
        return {s.name: (s.labels, s.value) for f in text_string_to_metric_families(text) for s in f.samples}

    scrape()
    meter, now = replace(METER, tokens=200), 2.0
    found = scrape()
    assert found["isotherm_shard_tokens_per_second"] == ({"shard": "local"}, 100.0)
    assert found["isotherm_shard_requests_running"] == ({"shard": "local"}, 3)
    assert found["isotherm_some_total"] == ({"ingress": "local"}, 0)
    assert found["isotherm_ready"] == ({}, 1) and asyncio.run(alone.requests()) == {}
