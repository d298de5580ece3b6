"""The options of commands that say with what it is computed, where a manifest may say it too."""

from __future__ import annotations

from typing import Annotated, Literal, Optional

import typer

DtypeOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="float32 or bfloat16. Default: the manifest's"),
]
KernelsOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="auto, native, reference or triton. Default: the manifest's"),
]
IsaOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="of native kernels: auto, amx, avx512, avx2 or generic. Default: the manifest's"),
]
DeviceOption = Annotated[
    Optional[Literal["cpu", "cuda"]],  # noqa: UP045
    typer.Option(help="where it computes: cpu, or cuda for a GPU. Default: the manifest's"),
]
