"""`isotherm bench`: how fast this machine runs the engine, its kernels and its links, and what load a running endpoint
takes."""

from __future__ import annotations

import asyncio
import json
import math
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer
from rich.console import Console
from rich.table import Table

from isotherm.cluster.cli.key_file import KeyFileOption
from isotherm.cluster.cli.served_url import URL_HELP, served_url
from isotherm.cluster.cli.weight_options import DenseOption, ExpertsOption, HeadOption, KvCacheOption
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.model.kv_cache import KvCacheDtype

app = typer.Typer(no_args_is_help=True, help="Measure this machine. Figures are medians over the runs.")
console = Console(emoji=False)

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help='a directory, a hub id or "tiny"')]
JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON object")]
RunsOption = Annotated[int, typer.Option(min=1, help="counted runs, after one that is not")]
ThreadsOption = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=1, help="threads that compute; default: all cores, or what a limit of CPU time leaves of them"),
]
DtypeOption = Annotated[str, typer.Option(help="of activations: float32 or bfloat16")]
KernelsOption = Annotated[str, typer.Option(help="auto, native, reference or triton")]
HiddenOption = Annotated[int, typer.Option(min=1, help="width of a row")]
ExpertCountOption = Annotated[int, typer.Option("--experts", min=1, help="experts of a layer")]
TopKOption = Annotated[int, typer.Option(min=1, help="experts of each row")]
IsaOption = Annotated[str, typer.Option(help="of native kernels: auto, amx, avx512, avx2 or generic")]
DeviceOption = Annotated[Literal["cpu", "cuda"], typer.Option(help="where it computes: cpu, or cuda for a GPU")]
PlotOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="write a PNG (needs matplotlib: the `bench` extra)"),
]


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise typer.BadParameter(f'"{text}" is not a list of positive numbers such as 1,8,32')
    return sizes


def _show(rows: Sequence[JSON], columns: Sequence[str], as_json: bool, facts: JSON) -> None:
    if as_json:
        print(json.dumps({"figures": list(rows), **facts}))
        return
    table = Table(*columns)
    for row in rows:
        table.add_row(*(f"{row[c]:.1f}" if isinstance(row[c], float) else str(row[c]) for c in columns))
    console.print(table)
    for name, value in facts.items():
        console.print(
            f"{name.replace('_', ' ')}: {value:.1f}"
            if isinstance(value, float)
            else f"{name.replace('_', ' ')}: {value}",
            highlight=False,
        )


def _plot(path: Path | None, title: str, rows: Sequence[JSON], value: str, label: str) -> None:
    if path is None:
        return
    from isotherm.cluster.cli.bench_plot import plot_bars

    plot_bars(
        path,
        title,
        [f"{row['name']} {row.get('size', row.get('rows'))}" for row in rows],
        [row[value] for row in rows],
        label,
    )


def _engine(
    model: str,
    *,
    batches: list[int],
    prompts: list[int],
    runs: int,
    dtype: str,
    choice: tuple[str | None, str | None, str | None],
    kernels: str,
    isa: str,
    threads: int | None,
    as_json: bool,
    plot: Path | None,
    kv_cache_dtype: KvCacheDtype | None,
    device: str,
    speculation: str = "off",
) -> None:
    from isotherm.cluster.cli.bench_engine import EngineBench
    from isotherm.cluster.cli.bench_kernels import matmul_peak, stream_bandwidth
    from isotherm.cluster.model.path import resolve_model
    from isotherm.cluster.model.weight_choice import WeightChoice

    if speculation not in ("auto", "mtp", "ngram", "off"):
        raise typer.BadParameter(f'--speculation is "{speculation}"; it must be "auto", "mtp", "ngram" or "off"')
    bench = EngineBench(
        resolve_model(model),
        dtype=dtype,
        kernels=kernels,
        isa=isa,
        device=device,
        threads=threads,
        most_streams=max(batches, default=1),
        most_prompt=max(prompts, default=1),
        choice=WeightChoice().with_changes(*choice),
        speculation=speculation,
        kv_cache_dtype=kv_cache_dtype or "auto",
    )
    rows = [figure.as_dict() for figure in bench.measure(batches, prompts, runs)]
    facts: JSON = {"kernels": f"{bench.kernels.name} {bench.kernels.instructions}"}
    if device == "cpu":
        facts |= {"stream_gb_per_s": stream_bandwidth(), "matmul_gflop_per_s": matmul_peak()}
    _show(rows, ("name", "size", "median"), as_json, facts)
    _plot(plot, model, rows, "median", "tokens/s")


@app.command()
def decode(
    model: ModelArgument = "tiny",
    batch: Annotated[str, typer.Option(help="streams at once")] = "1,8,32",
    runs: RunsOption = 5,
    dtype: DtypeOption = "bfloat16",
    experts: ExpertsOption = None,
    dense: DenseOption = None,
    head: HeadOption = None,
    kernels: KernelsOption = "auto",
    isa: IsaOption = "auto",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    kv_cache_dtype: KvCacheOption = None,
    speculation: Annotated[str, typer.Option(help="auto, mtp, ngram or off: what guesses tokens")] = "off",
    as_json: JsonOption = False,
    plot: PlotOption = None,
) -> None:
    """Tokens per second of the offline engine while it generates."""
    _engine(
        model, batches=_sizes(batch), prompts=[], runs=runs, dtype=dtype, choice=(experts, dense, head),
        kernels=kernels, isa=isa, threads=threads, as_json=as_json, plot=plot, kv_cache_dtype=kv_cache_dtype,
        device=device, speculation=speculation,
    )  # fmt: skip


@app.command()
def prefill(
    model: ModelArgument = "tiny",
    tokens: Annotated[str, typer.Option(help="prompt lengths")] = "128,512",
    runs: RunsOption = 5,
    dtype: DtypeOption = "bfloat16",
    experts: ExpertsOption = None,
    dense: DenseOption = None,
    head: HeadOption = None,
    kernels: KernelsOption = "auto",
    isa: IsaOption = "auto",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    kv_cache_dtype: KvCacheOption = None,
    as_json: JsonOption = False,
    plot: PlotOption = None,
) -> None:
    """Prompt tokens per second of the offline engine."""
    _engine(
        model, batches=[], prompts=_sizes(tokens), runs=runs, dtype=dtype, choice=(experts, dense, head),
        kernels=kernels, isa=isa, threads=threads, as_json=as_json, plot=plot, kv_cache_dtype=kv_cache_dtype,
        device=device,
    )  # fmt: skip


@app.command("kernels")
def bench_kernels(
    hidden: HiddenOption = 1024,
    inner: Annotated[int, typer.Option(min=1, help="width of one expert")] = 512,
    experts: ExpertCountOption = 64,
    top_k: TopKOption = 6,
    rows: Annotated[str, typer.Option(help="rows of one product")] = "1,8,32,128",
    runs: RunsOption = 15,
    kernels: KernelsOption = "auto",
    isa: IsaOption = "auto",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    plot: PlotOption = None,
) -> None:
    """Matrix kernels beside this machine's measured stream bandwidth and matrix-product peak."""
    import torch

    from isotherm.cluster.cli.bench_kernels import FORMS, bench_experts, bench_linear, matmul_peak, stream_bandwidth
    from isotherm.kernels.select import select_kernels

    chosen, counts = select_kernels(kernels, torch.bfloat16, threads, isa=isa).kernels, _sizes(rows)
    stream, peak = stream_bandwidth(), matmul_peak()
    figures = [f for form in FORMS for f in bench_linear(chosen, 3 * hidden, hidden, form, counts, runs)]
    figures += [f for form in FORMS for f in bench_experts(chosen, hidden, inner, experts, top_k, form, counts, runs)]
    table = [f.as_dict() for f in figures]
    # Before and after: what a shared machine gives may change meanwhile.
    facts = {
        "kernels": f"{chosen.name} {chosen.instructions}",
        "stream_gb_per_s": max(stream, stream_bandwidth()),
        "matmul_gflop_per_s": max(peak, matmul_peak()),
    }
    _show(table, ("name", "weights", "rows", "microseconds", "gb_per_s", "gflop_per_s"), as_json, facts)
    _plot(plot, f"kernels, hidden {hidden}", table, "gflop_per_s", "GFLOP/s")


@app.command("links")
def bench_links(
    hidden: HiddenOption = 1024,
    experts: ExpertCountOption = 64,
    top_k: TopKOption = 6,
    rows: Annotated[str, typer.Option(help="rows of a message")] = "1,8,32,128",
    trips: Annotated[int, typer.Option(min=1, help="counted round trips of each message")] = 300,
    as_json: JsonOption = False,
    plot: PlotOption = None,
) -> None:
    """Round trips of dispatch messages between two processes, over each kind of link."""
    from isotherm.cluster.cli import bench_links as bench

    if top_k > experts:
        raise typer.BadParameter(f"--top-k is {top_k}; there are {experts} experts")
    figures, without = bench.bench_links(bench.LinkShape(hidden, experts, top_k), _sizes(rows), trips)
    table = [f.as_dict() for f in figures]
    _show(table, ("name", "rows", "pairs", "microseconds", "p99_microseconds", "mb_per_s"), as_json,
          {} if without is None else {"no_shared_memory": without})  # fmt: skip
    _plot(plot, f"round trips, hidden {hidden}, top {top_k}", table, "microseconds", "µs")


@app.command("served")
def bench_served(
    model: ModelArgument = "tiny",
    streams: Annotated[int, typer.Option(min=1, help="requests at once")] = 16,
    output_tokens: Annotated[int, typer.Option(min=16, help="tokens of each output")] = 256,
    rounds: Annotated[int, typer.Option(min=1, help="counted rounds, after one that is not")] = 5,
    links: Annotated[
        str, typer.Option(help="kinds of links.kind in the manifest, each with a cluster of its own")
    ] = "auto,process-group",
    as_json: JsonOption = False,
    plot: PlotOption = None,
) -> None:
    """Tokens per second through HTTP (the default manifest, Ray, separate processes) beside the engine in one process,
    in turn."""
    from isotherm.cluster.cli.bench_engine import PROMPT, EngineBench
    from isotherm.cluster.cli.bench_load import LoadShape
    from isotherm.cluster.cli.bench_served import bench_served
    from isotherm.cluster.model.path import resolve_model

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the cluster is ended on the way out
    path = resolve_model(model)
    engine = EngineBench(
        path,
        dtype="bfloat16",
        kernels="auto",
        threads=None,
        most_streams=streams,
        most_prompt=1,
        most_output=output_tokens,
    )
    shape = LoadShape(streams, math.inf, PROMPT, output_tokens)
    figures = bench_served(
        {"model": str(path)}, links.split(","), shape, lambda: engine.decode(streams, output_tokens - 1), rounds
    )
    rows = [figure.as_dict() for figure in figures]
    columns = {
        "links": "links",
        "offline_median": "offline",
        "streamed_median": "streamed",
        "streamed_ratio": "",
        "whole_median": "whole",
        "whole_ratio": "",
        "first_token_ms": "alone: first token, ms",
        "token_ms": "ms/token",
    }
    if as_json:
        print(json.dumps({"figures": rows, "kernels": engine.kernels.name}))
    else:
        table = Table(*columns.values(), title=f"{streams} streams, tokens/s (and of offline)")
        for row in rows:
            table.add_row(
                row["links"], *(f"{row[c]:.0%}" if c.endswith("_ratio") else f"{row[c]:.1f}" for c in list(columns)[1:])
            )
        console.print(table)
    names = ("offline", "streamed", "whole")
    bars = [
        {"name": f"{row['links']} {name}", "size": streams, "value": row[f"{name}_median"]}
        for row in rows
        for name in names
    ]
    _plot(plot, f"{model}, served", bars, "value", "tokens/s")


@app.command("serve")
def bench_serve(
    url: Annotated[Optional[str], typer.Option(help=URL_HELP)] = None,  # noqa: UP045
    requests: Annotated[int, typer.Option(min=1, help="requests in all")] = 64,
    rate: Annotated[float, typer.Option(min=0, help="arrivals per second; 0: all at once")] = 0.0,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="tokens of each prompt")] = 32,
    output_tokens: Annotated[int, typer.Option(min=1, help="tokens of each output")] = 64,
    seed: Annotated[int, typer.Option(help="of the prompts and of the times of arrival")] = 0,
    stream: Annotated[bool, typer.Option(help="replies as events, or whole")] = True,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Open-loop load on an endpoint: throughput, time to first token, time between tokens."""
    from isotherm.cluster.cli.bench_load import LoadShape, run_load
    from isotherm.cluster.client import Client
    from isotherm.cluster.client.answers import checked
    from isotherm.cluster.client.calls import bearer

    with Client(served_url(url)) as client:
        url = client.base_url
        model = checked(client.request("GET", "/v1/models"))["data"][0]
    shape = LoadShape(requests, rate or math.inf, prompt_tokens, output_tokens, seed, stream)
    report = asyncio.run(run_load(url, model["id"], model["vocab_size"], shape, bearer()))
    if as_json:
        print(json.dumps(report.as_dict()))
        return
    console.print(f"{report.requests} requests, {report.failed} failed {report.first_error}", highlight=False)
    decoding = f", {report.decode_tokens_per_s:.1f} while decoding" if stream else ""
    console.print(
        f"{report.output_tokens_per_s:.1f} output tokens/s over {report.seconds:.1f} s{decoding}", highlight=False
    )
    table = Table("", "p50 ms", "p90 ms", "p99 ms")
    for name in ("time_to_first_token_ms", "time_between_tokens_ms"):
        table.add_row(name[:-3].replace("_", " "), *(f"{v:.1f}" for v in getattr(report, name).values()))
    console.print(table)
