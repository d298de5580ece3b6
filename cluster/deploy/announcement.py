"""What `isotherm serve` says once it serves: where, a request to be copied, with which kernels, and who may ask."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape

from isotherm.cluster.api.access.key_store import ENVIRONMENT
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.manifest import Manifest


def announce(manifest: Manifest, asks_for_keys: bool, workers: Iterable[JSON], console: Console) -> None:
    """Lines that a terminal may not break: they are there to be copied. `workers`: what they say of themselves."""
    url = manifest.url
    key = f""" -H "Authorization: Bearer ${ENVIRONMENT}\"""" if asks_for_keys else ""
    ready = f"[bold green]ready[/]  {escape(manifest.model_id)} at {url}/v1   (Ctrl-C ends it)"
    console.print(ready, highlight=False, soft_wrap=True)
    console.print(
        f"""  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\
       -d '{{"model": "{manifest.model_id}", "messages": [{{"role": "user", "content": "What is 3 + 4?"}}]}}'""",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    for kernels in dict.fromkeys(worker["kernels_reason"] for worker in workers if "kernels_reason" in worker):
        console.print(f"  kernels: {kernels}", highlight=False, markup=False, soft_wrap=True)
    if asks_for_keys:
        source = f"those of {manifest.http.keys}" if manifest.http.keys is not None else f"the one of {ENVIRONMENT}"
        console.print(
            f"  every route but /health, /ready and the page at / asks for a key: {source}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        return
    who = {"loopback": "this machine alone", "open": "whoever reaches the port, for there are no keys"}
    for routes, opened in ("/admin and /status", manifest.http.admin), ("/metrics", manifest.http.metrics):
        console.print(f"  open to {who[opened]}: {routes}", highlight=False, soft_wrap=True)
