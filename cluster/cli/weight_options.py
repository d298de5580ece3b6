"""The options of commands that say in how many bits weights and the KV cache are kept."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from isotherm.cluster.model.kv_cache import KvCacheDtype

ExpertsOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="stored or int4: the routed experts. Default: the manifest's; stored where there is none"),
]
DenseOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="stored, fp8 or int4: attention, dense MLPs and shared experts. Default: as with --experts"),
]
HeadOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="stored, fp8, int8, int6 or int4: the output head. Default: as with --experts"),
]
KvCacheOption = Annotated[
    Optional[KvCacheDtype],  # noqa: UP045
    typer.Option(
        "--kv-cache-dtype",
        help="of the KV cache; fp8: latents in 8 bits. Default: the manifest's; auto where there is none",
    ),
]
