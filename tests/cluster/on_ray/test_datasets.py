"""What becomes of a table's rows, and of a table that cannot be read. Ray Data itself: tests/e2e/test_batch_job.py."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy
import pytest
import ray
import ray.data

from isotherm.cluster.on_ray import datasets
from isotherm.cluster.on_ray.datasets import DatasetError, fetch_tables

ROWS = {
    "s3://a/x.parquet": [
        {"custom_id": None, "messages": numpy.array([{"role": "user", "content": "é", "name": None}], dtype=object)},
        {"custom_id": "b", "prompt": "p", "n": numpy.int64(2)},
    ],
    "s3://b/x.parquet": [{"prompt": "q"}],
}


@pytest.fixture
def attached(monkeypatch):
    """The addresses that were joined; None for each time that it was left."""
    said = []
    monkeypatch.setattr(datasets, "attach", said.append)
    monkeypatch.setattr(ray, "shutdown", lambda: said.append(None))

    def read(uri, ray_remote_args):
        assert ray_remote_args == {"num_cpus": 0}
        if uri not in ROWS:
            raise FileNotFoundError(uri)
        return SimpleNamespace(iter_rows=lambda: iter(ROWS[uri]))

    monkeypatch.setattr(ray.data, "read_parquet", read)
    return said


def test_each_table_is_a_file_of_its_own_name(tmp_path, attached):
    files = fetch_tables("10.0.0.1:6379", list(ROWS), tmp_path)
    assert [file.name for file in files] == ["s3:__a_x.parquet", "s3:__b_x.parquet"]
    assert [json.loads(line) for line in files[0].read_text().splitlines()] == [
        {"messages": [{"role": "user", "content": "é"}]},
        {"custom_id": "b", "prompt": "p", "n": 2},
    ]
    assert attached == ["10.0.0.1:6379", None]


def test_a_table_that_is_not_there_is_named(tmp_path, attached):
    with pytest.raises(DatasetError, match="s3://none: cannot be read as Parquet: s3://none"):
        fetch_tables("a", ["s3://none"], tmp_path)
    assert attached == ["a", None]
