"""`isotherm keys`: makes, lists and revokes the API keys of a file."""

from __future__ import annotations

import json
import sys
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from isotherm.cluster.api.access.caller import ROLES
from isotherm.cluster.api.access.hashing import hashed, new_key, new_key_id
from isotherm.cluster.api.access.keys_file import KeyEntry, KeysFileError, changing, find, read_keys, write_keys

app = typer.Typer(no_args_is_help=True, help="Make, list and revoke API keys.")
Roles = Enum("Roles", {role: role for role in ROLES})  # type: ignore[misc]  # typer's form of choices

FileOption = Annotated[Path, typer.Option("--file", metavar="FILE", help="file of keys; the server's --keys")]
_COLUMNS = ("requests_per_minute", "tokens_per_minute", "streams", "n", "max_tokens", "models", "priority", "weight")


def _at_most(what: str) -> Any:
    return typer.Option(min=1, help=f"{what}, at most; default: no limit")


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="whom it is for; files, batches and responses belong to the name")],
    file: FileOption = Path("keys.json"),
    role: Annotated[
        Optional[list[Roles]],  # noqa: UP045
        typer.Option(help="what it may do; may be given several times. admin may also observe; default: use"),
    ] = None,
    requests_per_minute: Annotated[Optional[int], _at_most("requests a minute")] = None,  # noqa: UP045
    tokens_per_minute: Annotated[
        Optional[int],  # noqa: UP045
        _at_most("tokens of prompts and outputs a minute"),
    ] = None,
    streams: Annotated[Optional[int], _at_most("choices generated at once")] = None,  # noqa: UP045
    n: Annotated[Optional[int], _at_most("choices of one request")] = None,  # noqa: UP045
    max_tokens: Annotated[Optional[int], _at_most("tokens of one choice")] = None,  # noqa: UP045
    model: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="a model, or an alias, that it may ask for; may be given several times; default: all"),
    ] = None,
    priority: Annotated[
        int, typer.Option(help="of its requests that name none, and the lowest they may name; lower ones come first")
    ] = 0,
    weight: Annotated[float, typer.Option(help="its share beside other keys, when all cannot be served")] = 1.0,
    tenant: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="keys of one tenant share a prefix cache; default: the key's name"),
    ] = None,
) -> None:
    """Make a key and print it, this once. A server that has the file takes it within a second or two."""
    key = new_key(key_id := new_key_id())
    try:
        entry = KeyEntry(
            id=key_id,
            name=name,
            hash=hashed(key),
            created=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            roles=[one.value for one in role or ()] or ["use"],
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            streams=streams,
            n=n,
            max_tokens=max_tokens,
            models=model,
            priority=priority,
            weight=weight,
            tenant=tenant,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise KeysFileError(f"{first['loc'][0]}: {first['msg'].removeprefix('Value error, ')}") from None
    with changing(file):
        entries = read_keys(file) if file.exists() else ()
        if find(entries, name) is not None:
            raise KeysFileError(f"{file}: there is a key {name!r} already; revoke it first, or choose another name")
        write_keys(file, [*entries, entry])
    print(f"{name}'s key, which is not shown again; {file} has its hash alone:", file=sys.stderr)
    print(key)


@app.command("list")
def list_keys(
    file: FileOption = Path("keys.json"),
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Show the keys of a file, without anything that they could be made from."""
    entries = read_keys(file)
    if as_json:
        print(json.dumps([entry.model_dump(exclude={"hash"}) for entry in entries]))
        return
    table = Table("name", "id", "roles", "created", "limits")
    for entry in entries:
        given = entry.model_dump(include=set(_COLUMNS), exclude_defaults=True)
        limits = ", ".join(f"{column} {given[column]}" for column in _COLUMNS if column in given)
        table.add_row(entry.name, entry.id, " ".join(entry.roles), entry.created, limits)
    Console(emoji=False).print(table)


@app.command()
def revoke(
    key: Annotated[str, typer.Argument(metavar="NAME|ID", help="as `isotherm keys list` shows it; never the key")],
    file: FileOption = Path("keys.json"),
) -> None:
    """Take a key out of a file. A server that has the file refuses it within a second or two."""
    with changing(file):
        entries = read_keys(file)
        if (found := find(entries, key)) is None:
            raise KeysFileError(f"{file}: there is no key {key[:64]!r}; `isotherm keys list --file {file}` shows them")
        write_keys(file, [entry for entry in entries if entry is not found])
    print(f"{found.name} ({found.id}) is revoked")
