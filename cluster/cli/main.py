"""The `isotherm` command. Each command parses and prints; the work is elsewhere, imported only when it is needed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console

from isotherm.cluster.cli.batch_command import batch
from isotherm.cluster.cli.bench import app as bench_app
from isotherm.cluster.cli.compute_options import DeviceOption, DtypeOption, IsaOption, KernelsOption
from isotherm.cluster.cli.convert import convert_command
from isotherm.cluster.cli.deadline_option import deadline_option
from isotherm.cluster.cli.key_file import KeyFileOption
from isotherm.cluster.cli.keys import app as keys_app
from isotherm.cluster.cli.printable import printable
from isotherm.cluster.cli.roll import roll
from isotherm.cluster.cli.served_url import URL_HELP, running_url, served_url
from isotherm.cluster.cli.user_errors import user_errors
from isotherm.cluster.cli.weight_options import DenseOption, ExpertsOption, HeadOption, KvCacheOption
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.on_ray.environment import prepare_attach, prepare_local_ray

if TYPE_CHECKING:
    from isotherm.cluster.manifest import Manifest

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Serve DeepSeek-V3-family models on Ray.",
)
app.add_typer(bench_app, name="bench")
app.add_typer(keys_app, name="keys")
console = Console(emoji=False)

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL|MANIFEST", help='a directory, a hub id, "tiny", or a manifest (*.yaml)')
]
AddressOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Ray address; default: RAY_ADDRESS or this machine's cluster"),
]
TOP_INTERVAL_HELP = "seconds between two looks, where the event stream cannot be read"
COPIES_HELP = "copies that an expert is to have; auto: as many as the autoscaler decides"


app.command()(user_errors(batch))
app.command()(user_errors(roll))
for _command in (*bench_app.registered_commands, *keys_app.registered_commands):
    _command.callback = user_errors(_command.callback)  # type: ignore[arg-type]  # each has one


def _manifest(model: str, weights: bool = True, **overrides: Any) -> tuple[Manifest, Path]:
    """The manifest that MODEL|MANIFEST means, and the model's directory."""
    from isotherm.cluster.served_model import served_model

    return served_model(model, weights, **overrides)


def _cuda_unavailable() -> str | None:
    from isotherm.kernels.select import cuda_unavailable_reason

    return cuda_unavailable_reason()


@app.command()
@user_errors
def serve(
    model: ModelArgument = "tiny",
    host: Annotated[Optional[str], typer.Option(help="address to bind; default 127.0.0.1")] = None,  # noqa: UP045
    port: Annotated[Optional[int], typer.Option(help="port to bind; default 8000")] = None,  # noqa: UP045
    address: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="join this Ray cluster; default: start a local one"),
    ] = None,
    keys: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="API keys, as `isotherm keys` writes them; default: http.keys"),
    ] = None,
) -> None:
    """Serve a model over the OpenAI API until Ctrl-C, SIGTERM or `isotherm stop`."""
    # A link stays one: another file is put behind it, as Kubernetes does with a Secret.
    keys_path = None if keys is None else os.path.abspath(keys)
    manifest, path = _manifest(model, host=host, port=port, keys=keys_path)
    from isotherm.cluster.api.access.key_store import ENVIRONMENT, key_source_as_json
    from isotherm.cluster.deploy.batch_store import check_batches_folder
    from isotherm.cluster.deploy.capacity import check_machine
    from isotherm.cluster.deploy.front_door_keys import check_bound, check_tls, key_source
    from isotherm.cluster.deploy.preflight import check_servable, hold_port
    from isotherm.cluster.deploy.session_folder import check_session_folder
    from isotherm.cluster.machine_memory import machine_memory
    from isotherm.cluster.text.tokenizer_files import trouble_with_chats

    source = key_source(manifest.http, os.environ)
    check_bound(manifest.http.host, source)
    check_tls(manifest.http)
    os.environ.pop(ENVIRONMENT, None)  # nothing that is started below this process needs the key itself
    check_servable(manifest, path, _cuda_unavailable if address is None else None)
    for words in trouble_with_chats(path):
        console.print(f"warning: chats: {words}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if address is None:
        check_machine(manifest, path, machine_memory(), os.cpu_count() or 1)
        check_batches_folder(manifest.http)
        check_session_folder()
        held: contextlib.AbstractContextManager[object] = hold_port(manifest.http.host, manifest.http.port)
        prepare_local_ray()
    else:
        held = contextlib.nullcontext()  # Serve may listen on other machines
        address = prepare_attach(address)
    from isotherm.cluster.supervise.supervisor import serve_until_stopped

    with held:
        serve_until_stopped(manifest, path, address, key_source_as_json(source), console)


@app.command()
@user_errors
def generate(
    model: ModelArgument,
    prompt: Annotated[Optional[str], typer.Option(help="text to continue")] = None,  # noqa: UP045
    prompt_ids: Annotated[Optional[str], typer.Option(help="token ids to continue, as 1,2,3")] = None,  # noqa: UP045
    chat_prompt: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--chat", help="a user message, put into the chat template"),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="tokens at most")] = 128,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0: the likeliest token")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="of the likeliest tokens, so much probability")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="of the likeliest tokens, so many; 0: all")] = 0,
    sampling: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="NAME=VALUE", help="any other parameter, as min_p=0.05 or repetition_penalty=1.1"),
    ] = None,
    seed: Annotated[int, typer.Option(min=-(2**63), max=2**63 - 1, help="of what is drawn")] = 0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="go on past the end-of-sequence token")] = False,
    dtype: DtypeOption = None,
    kernels: KernelsOption = None,
    isa: IsaOption = None,
    device: DeviceOption = None,
    experts: ExpertsOption = None,
    dense: DenseOption = None,
    head: HeadOption = None,
    kv_cache_dtype: KvCacheOption = None,
    logprobs: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, help="log-probabilities of each token and of the N most likely ones"),
    ] = None,
    speculation: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="KIND", help="auto, mtp, ngram or off; it changes no token. Default: the manifest's"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Continue one prompt offline: the same engine in this process, without Ray."""
    manifest, path = _manifest(model)
    from isotherm.cluster.cli.offline import OfflineOptions, generate_offline, sampling_asked

    choice = manifest.weights.choice.with_changes(experts, dense, head)
    options = OfflineOptions(
        prompt=prompt, prompt_ids=prompt_ids, chat=chat_prompt, max_tokens=max_tokens, temperature=temperature,
        top_p=top_p, top_k=top_k, seed=seed, ignore_eos=ignore_eos, dtype=dtype, kernels=kernels, logprobs=logprobs,
        weights=choice, sampling=sampling_asked(sampling or ()), isa=isa, speculation=speculation,
        kv_cache_dtype=kv_cache_dtype, device=device,
    )  # fmt: skip
    terminal = sys.stdout is not None and sys.stdout.isatty()
    show = None if as_json else lambda text: print(printable(text, terminal), end="", flush=True)
    result = generate_offline(manifest, path, options, show, lambda line: print(line, file=sys.stderr))
    if as_json:
        print(json.dumps(result))
    else:
        print("" if result["text"] is not None else ",".join(map(str, result["token_ids"])))


app.command("convert")(user_errors(convert_command))


@app.command("inspect")
@user_errors
def inspect_command(
    model: ModelArgument = "tiny",
    quality: Annotated[bool, typer.Option("--quality", help="what --experts … --kv-cache-dtype lose")] = False,
    text: Annotated[Optional[Path], typer.Option(help="whose perplexity --quality measures")] = None,  # noqa: UP045
    experts: ExpertsOption = None,
    dense: DenseOption = None,
    head: HeadOption = None,
    kv_cache_dtype: KvCacheOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Print what a checkpoint is and what a manifest would place where, without reading weights (of a hub id
    they are not fetched, and their bytes are estimated); or, with --quality, what quantising them, or the KV cache,
    loses."""
    manifest, path = _manifest(model, weights=quality)
    choice = manifest.weights.choice.with_changes(experts, dense, head)
    kept = kv_cache_dtype or manifest.engine.kv_cache_dtype
    if quality:
        from isotherm.cluster.cli.quality import measure_quality, show_quality

        found = measure_quality(manifest, path, choice, kept, text, lambda words: print(words, file=sys.stderr))
        print(json.dumps(found)) if as_json else show_quality(found, console)
        return
    from isotherm.cluster.cli.views import show_report
    from isotherm.cluster.deploy.inspect import inspect_model

    engine = manifest.engine.model_copy(update={"kv_cache_dtype": kept})
    report = inspect_model(path, manifest.model_copy(update={"engine": engine}), choice)
    if as_json:
        print(json.dumps(report.as_dict()))
    else:
        show_report(report, console)


@app.command()
@user_errors
def status(
    address: AddressOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Print workers, nodes, placement version and load of the running cluster."""
    address = prepare_attach(address)
    from isotherm.cluster.cli.views import show_status
    from isotherm.cluster.on_ray.session import cluster_status

    found = cluster_status(address)
    if as_json:
        print(json.dumps(found))
    else:
        show_status(found, console)


@app.command()
@user_errors
def doctor(
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(metavar="MODEL|MANIFEST", help="what is to be served here"),
    ] = None,
    address: Annotated[Optional[str], typer.Option(help="of a Ray: look at all its nodes")] = None,  # noqa: UP045
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Check this machine, or a cluster's nodes, and say what to do. Exit status 1 when something will not work."""
    manifest, path = _manifest(model or "tiny")
    there = prepare_attach(address) if address or os.environ.get("RAY_ADDRESS") else None
    from isotherm.cluster.cli.doctor import report

    if report(manifest, path if model else None, there, None if as_json else console):
        raise typer.Exit(1)


@app.command()
@user_errors
def stop(address: AddressOption = None) -> None:
    """End the running cluster, once its open requests have finished: ingress, workers and controller, and the Ray that
    `isotherm serve` started."""
    address = prepare_attach(address)
    from isotherm.cluster.deploy.serve import stop_running

    stop_running(address)
    console.print("stopped")


def _copies(word: str) -> JSON:
    """ "2:5=3" → layer 2, expert 5, 3 copies; "2:5=auto" → as many as the autoscaler decides."""
    found = re.fullmatch(r"(\d{1,9}):(\d{1,9})=(\d{1,9}|auto)", word)
    if found is None:
        raise typer.BadParameter(f"--copies {word}: must be LAYER:EXPERT=N, or LAYER:EXPERT=auto")
    layer, expert, count = found.groups()
    return {"layer": int(layer), "expert": int(expert), "count": None if count == "auto" else int(count)}


@app.command()
@user_errors
def scale(
    expert_groups: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="expert groups that there are to be"),
    ] = None,
    attention_shards: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="attention shards that there are to be"),
    ] = None,
    drain_node: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="ID", help="node that is to have no worker; give all of them"),
    ] = None,
    drain_none: Annotated[bool, typer.Option("--drain-none", help="every node may have workers again")] = False,
    copies: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="LAYER:EXPERT=N|auto", help=COPIES_HELP),
    ] = None,
    url: Annotated[Optional[str], typer.Option(help=URL_HELP)] = None,  # noqa: UP045
    deadline: Annotated[Optional[float], deadline_option("it must be prepared")] = None,  # noqa: UP045
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only show what would be done")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="until it is done or rolled back")] = False,
    key_file: KeyFileOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Change the number of workers, the nodes that they run on, or the copies of experts, under live traffic."""
    from isotherm.cluster.cli.views import end_with, telling_waits
    from isotherm.cluster.client import Client

    if drain_node and drain_none:
        raise typer.BadParameter("give --drain-node or --drain-none, not both")
    target: JSON = {
        "expert_groups": expert_groups,
        "attention_shards": attention_shards,
        "deadline_seconds": deadline,
    }
    target["drain_nodes"] = [] if drain_none else drain_node or None
    target["copies"] = [_copies(word) for word in copies] if copies else None
    with Client(served_url(url)) as client:
        operation = client.scale(**{name: n for name, n in target.items() if n is not None}, dry_run=dry_run)
        if wait:
            told = telling_waits(operation["id"])
            operation = client.wait_for_operation(operation["id"], at_each_look=told)
    end_with(operation, console, as_json)


@app.command()
@user_errors
def top(
    url: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="where `isotherm serve` listens; default: as the running cluster says"),
    ] = None,
    address: AddressOption = None,
    interval: Annotated[float, typer.Option(min=0.1, max=60, help=TOP_INTERVAL_HELP)] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="print one picture and end")] = False,
    key_file: KeyFileOption = None,
) -> None:
    """Show workers, operations and the heat of every expert, live, until Ctrl-C."""
    from isotherm.cluster.cli.top import run_top

    run_top(running_url(address) if url is None else url, interval, once, console)


@app.command()
@user_errors
def chat(
    url: Annotated[Optional[str], typer.Option(help=URL_HELP)] = None,  # noqa: UP045
    system: Annotated[Optional[str], typer.Option(help="system message")] = None,  # noqa: UP045
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0: the likeliest token")] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1, help="tokens at most")] = 512,
    key_file: KeyFileOption = None,
) -> None:
    """Chat with a served model in the terminal."""
    from isotherm.cluster.cli.chat import chat_loop

    chat_loop(served_url(url), system, temperature, max_tokens, console)


def main() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):  # it is None where the shell has closed it
        sys.stdout.reconfigure(errors="replace")  # a terminal without a character for what is told gets a question mark
    sys.exit(app())
