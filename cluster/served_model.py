"""What MODEL|MANIFEST means, wherever it is given: on a command line, or to `Client.local`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from isotherm.cluster.manifest import Manifest, load_manifest, parse_manifest
from isotherm.cluster.model.path import resolve_model


def served_model(model: str, weights: bool = True, **http: Any) -> tuple[Manifest, Path]:
    """The manifest that MODEL|MANIFEST means, and the model's directory; `http` has fields of that section, of which
    those that are None are as the manifest says. Where a hub id is named, its weights are fetched only where they are
    wanted. Raises ManifestError, ModelNotFoundError."""
    is_manifest = model.endswith((".yaml", ".yml"))
    manifest = load_manifest(Path(model)) if is_manifest else parse_manifest({"model": model})
    if given := {name: value for name, value in http.items() if value is not None}:
        manifest = parse_manifest(manifest.model_dump() | {"http": manifest.http.model_dump() | given}, "command line")
    path = resolve_model(manifest.model, weights)
    if manifest.model_id in ("", ".", ".."):
        manifest = parse_manifest(manifest.model_dump() | {"served_name": path.name or "model"}, "command line")
    return manifest, path
