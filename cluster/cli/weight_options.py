"""The options of commands that say in how many bits weights are kept."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

ExpertsOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="stored or int4: the routed experts; default: as the manifest says"),
]
DenseOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="stored, fp8 or int4: attention, dense MLPs and shared experts"),
]
HeadOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="stored, fp8 or int8: the output head"),
]
