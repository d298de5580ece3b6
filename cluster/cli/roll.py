"""`isotherm roll` as a command: its options, what it prints, its exit status."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console

from isotherm.cluster.cli.deadline_option import deadline_option
from isotherm.cluster.cli.key_file import KeyFileOption
from isotherm.cluster.cli.served_url import URL_HELP, served_url
from isotherm.cluster.on_ray.environment import prepare_attach

console = Console(emoji=False)
LONGEST_WAIT = 86400.0  # seconds that --wait waits for streams to finish on the weights that they began with
MODEL_HELP = (
    'a directory that the cluster can read, a hub id, or "tiny": the same architecture and tokenizer; '
    "with --ingress a manifest, or nothing"
)
FEWER_HELP = "to begin with, where there is no room for as many beside those that serve; default: as many"
MANIFEST_HELP = (
    "a whole manifest: the new workers get the values that it has for workers, with MODEL or with the same weights"
)
INGRESS_HELP = "replace the ingress replicas instead: by the code that is installed, and a manifest's http values"


def roll(
    model: Annotated[Optional[str], typer.Argument(metavar="MODEL|MANIFEST", help=MODEL_HELP)] = None,  # noqa: UP045
    manifest: Annotated[Optional[Path], typer.Option(metavar="FILE", help=MANIFEST_HELP)] = None,  # noqa: UP045
    ingress: Annotated[bool, typer.Option("--ingress", help=INGRESS_HELP)] = False,
    expert_groups: Annotated[Optional[int], typer.Option(min=1, help=FEWER_HELP)] = None,  # noqa: UP045
    attention_shards: Annotated[Optional[int], typer.Option(min=1, help=FEWER_HELP)] = None,  # noqa: UP045
    url: Annotated[Optional[str], typer.Option(help=URL_HELP)] = None,  # noqa: UP045
    deadline: Annotated[Optional[float], deadline_option("the new workers must have loaded")] = None,  # noqa: UP045
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="only show what would be done, and whether it fits")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="until the old workers are gone, or it is rolled back")] = False,
    key_file: KeyFileOption = None,
    address: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Ray address, for --ingress; default: RAY_ADDRESS or this machine's cluster"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Serve other weights of the same architecture, or with other values of the manifest, under live traffic: streams
    finish on the workers that they began on.

    Exit status: 1 where it was rolled back.
    """
    if ingress:
        if manifest is not None:
            raise typer.BadParameter(
                "--ingress takes its manifest without --manifest; workers are rolled by themselves"
            )
        asked = {
            "--expert-groups": expert_groups, "--attention-shards": attention_shards, "--deadline": deadline,
            "--dry-run": dry_run or None, "--wait": wait or None, "--json": as_json or None,
        }  # fmt: skip
        if given := [option for option, value in asked.items() if value is not None]:
            raise typer.BadParameter(f"--ingress takes no {', '.join(given)}: the replicas are replaced at once")
        _update_ingress(model, address)
        return
    if model is None and manifest is None:
        raise typer.BadParameter("give the MODEL to serve, --manifest, or --ingress")
    from isotherm.cluster.cli.views import end_with, telling_waits
    from isotherm.cluster.client import Client

    path, values = _directory(model), _values(manifest)
    with Client(served_url(url)) as client:
        operation = client.roll(
            path,
            manifest=values,
            expert_groups=expert_groups,
            attention_shards=attention_shards,
            deadline_seconds=deadline,
            dry_run=dry_run,
        )
        if wait:
            operation = client.wait_for_operation(operation["id"], LONGEST_WAIT, telling_waits(operation["id"]))
    end_with(operation, console, as_json)


def _directory(model: str | None) -> str | None:
    """Which the cluster reads, not this process."""
    from isotherm.cluster.model.path import resolve_model

    return model if model is None or model.startswith("/") else str(resolve_model(model))


def _values(path: Path | None) -> Mapping[str, Any] | None:
    """As the file says, which is checked here already: its errors name the file. Raises ManifestError."""
    from isotherm.cluster.manifest import parse_manifest, read_manifest

    if path is None:
        return None
    said = read_manifest(path)
    parse_manifest(said, str(path))
    return said or {}


def _update_ingress(manifest: str | None, address: str | None) -> None:
    from isotherm.cluster.manifest import load_manifest

    wanted = None if manifest is None else load_manifest(Path(manifest))
    address = prepare_attach(address)
    from isotherm.cluster.deploy.ingress_update import update_ingress

    console.print(f"{update_ingress(address, wanted)} ingress replica(s) replaced", highlight=False)
