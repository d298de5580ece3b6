"""The folder in which files and batches are kept, as the manifest names it. Imports no Ray: it is looked at before
Ray's environment is set."""

from __future__ import annotations

from pathlib import Path

from isotherm.cluster.api.batches.store import Store
from isotherm.cluster.manifest import BatchesSection, HttpSection, ManifestError


def check_batches_folder(http: HttpSection) -> None:
    """Whether this machine can keep files and batches where the manifest wants them. Raises ManifestError."""
    if http.batches.folder is not None:
        batch_store(http.batches, Path(http.batches.folder))


def batch_store(section: BatchesSection, folder: Path) -> Store:
    """What lies in the folder, which is made where it is not there. Raises ManifestError where nothing can be kept in
    it."""
    try:
        return Store(folder, section.max_bytes, section.keep_seconds)
    except OSError as error:
        named = "" if section.folder is not None else ", which is not set, so that it"
        raise ManifestError(
            f'http.batches.folder{named} is "{folder}": files and batches cannot be kept there ({error.strerror}); '
            "name a folder that the user who serves can write"
        ) from None
