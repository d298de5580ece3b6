"""Which API keys the front door asks for, whether it may be without any, and its certificate. Imports no Ray: it runs
before Ray's environment is set."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from pathlib import Path

from isotherm.cluster.api.access.key_store import ENVIRONMENT, KeySource, environment_entry
from isotherm.cluster.api.access.keys_file import KeysFileError, read_keys
from isotherm.cluster.errors import one_line
from isotherm.cluster.loopback import is_loopback
from isotherm.cluster.manifest import HttpSection, ManifestError

MAKE_KEYS = (
    "make keys with `isotherm keys create NAME --file /absolute/path/keys.json` and name the file with --keys or "
    f"http.keys, or give one key in {ENVIRONMENT}"
)


def key_source(http: HttpSection, environment: Mapping[str, str] = os.environ) -> KeySource | None:
    """The file of the manifest, else the key of the environment, of which only the hash goes on from here; None where
    there is neither. Raises ManifestError, KeysFileError."""
    if http.keys is not None:
        read_keys(Path(http.keys))
        return KeySource(Path(http.keys))
    if key := environment.get(ENVIRONMENT):
        return KeySource(given=(environment_entry(key),))
    return None


def check_bound(host: str, keys: KeySource | None) -> None:
    """Whether the front door may listen there. Raises ManifestError."""
    if keys is None and not is_loopback(host):
        raise ManifestError(
            f'http.host is "{host}", where other machines may ask, and there are no API keys; {MAKE_KEYS}. '
            "On 127.0.0.1 none is needed"
        )
    if keys is not None and keys.file is not None and not read_keys(keys.file):
        raise KeysFileError(f"{keys.file}: there are no keys in it, so nobody could ask; {MAKE_KEYS}")


def check_tls(http: HttpSection) -> None:
    """Whether the certificate and its key can be used. Raises ManifestError."""
    if http.tls is None:
        return
    for field in ("certificate", "key"):
        path = getattr(http.tls, field)
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise ManifestError(f"http.tls.{field} is {path}: it cannot be read ({error.strerror})") from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Without a password, or OpenSSL would ask the terminal for one.
        context.load_cert_chain(http.tls.certificate, http.tls.key, password=lambda: b"")
    except (ssl.SSLError, ValueError) as error:
        raise ManifestError(
            f"http.tls: {http.tls.certificate} and {http.tls.key} must be a certificate and its key, without a "
            f"password, in PEM ({one_line(error)})"
        ) from None
