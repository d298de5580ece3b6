"""Tables that lie elsewhere (s3://, gs://, hdfs://, …), read by Ray Data on a running cluster."""

from __future__ import annotations

import json
from pathlib import Path

import ray
from ray.exceptions import RayError

from isotherm.cluster.errors import IsothermError, one_line
from isotherm.cluster.on_ray.session import attach


class DatasetError(IsothermError, RuntimeError):
    """The table cannot be read; names it, and what to do."""


def fetch_tables(address: str | None, uris: list[str], folder: Path) -> list[Path]:
    """Each table's rows as a file of JSON Lines in `folder`, in their order; cells without a value are left out. A
    table is a Parquet file or a folder of them. `address` as `prepare_attach` gave it. Raises DatasetError,
    NoClusterError, OSError."""
    try:
        from ray import data
    except ImportError as error:
        raise DatasetError(
            f"{uris[0]}: Ray Data cannot be loaded ({error}); install it with: pip install 'isotherm[batch]'"
        ) from None
    attach(address)
    try:
        context = data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        files = []
        for uri in uris:
            files.append(file := folder / uri.replace("/", "_"))  # by which rows without a name are named
            # Reading takes no CPU of those that the workers have reserved.
            try:
                with open(file, "w", encoding="utf-8") as lines:
                    for row in data.read_parquet(uri, ray_remote_args={"num_cpus": 0}).iter_rows():
                        lines.write(json.dumps(_told(row), ensure_ascii=False, default=str) + "\n")
            except (OSError, ValueError, RayError) as error:
                raise DatasetError(f"{uri}: cannot be read as Parquet: {one_line(error)}") from None
        return files
    finally:
        ray.shutdown()


def _told(value: object) -> object:
    if isinstance(value, dict):
        return {key: _told(one) for key, one in value.items() if one is not None}
    if hasattr(value, "tolist"):  # numpy's
        value = value.tolist()
    return [_told(one) for one in value] if isinstance(value, list) else value
