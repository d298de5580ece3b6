from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from api_keys import make_key
from certificates import make_certificate

from isotherm.cluster.api.access.hashing import matches
from isotherm.cluster.api.access.key_store import KeySource
from isotherm.cluster.api.access.keys_file import KeysFileError, write_keys
from isotherm.cluster.deploy.front_door_keys import check_bound, check_tls, key_source
from isotherm.cluster.manifest import HttpSection, ManifestError, parse_manifest

KEY = "made-up-by-somebody-123"


def http(**fields: Any) -> HttpSection:
    return parse_manifest({"http": fields}).http


def test_the_file_goes_before_the_environment(tmp_path: Path):
    path = tmp_path / "k.json"
    write_keys(path, [make_key("a")[1]])
    assert key_source(http(keys=str(path)), {"ISOTHERM_API_KEY": KEY}) == KeySource(path)
    (given,) = getattr(key_source(http(), {"ISOTHERM_API_KEY": KEY}), "given")  # noqa: B009
    assert matches(KEY, given.hash) and KEY not in repr(given)
    assert key_source(http(), {}) is None and key_source(http(), {"ISOTHERM_API_KEY": ""}) is None


def test_keys_that_cannot_be_used_are_told_at_once(tmp_path: Path):
    with pytest.raises(KeysFileError, match="cannot be read"):
        key_source(http(keys=str(tmp_path / "none.json")), {})
    with pytest.raises(KeysFileError, match="has 5"):
        key_source(http(), {"ISOTHERM_API_KEY": "short"})
    write_keys(tmp_path / "k.json", [])
    with pytest.raises(KeysFileError, match="there are no keys in it"):
        check_bound("127.0.0.1", KeySource(tmp_path / "k.json"))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.9.9.9"])
def test_this_machine_alone_needs_no_keys(host: str):
    check_bound(host, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "a-name", "127.0.0.1.example.org"])
def test_elsewhere_keys_are_required(host: str, tmp_path: Path):
    with pytest.raises(ManifestError, match=r"there are no API keys; make keys with `isotherm keys create NAME"):
        check_bound(host, None)
    write_keys(tmp_path / "k.json", [make_key("a")[1]])
    check_bound(host, KeySource(tmp_path / "k.json"))


def test_certificates(tmp_path: Path):
    certificate, key = make_certificate(tmp_path, "127.0.0.1")
    files = {"certificate": str(certificate), "key": str(key)}
    check_tls(http())
    check_tls(http(tls=files))
    with pytest.raises(ManifestError, match=r"http.tls.key is /none.pem: it cannot be read"):
        check_tls(http(tls=files | {"key": "/none.pem"}))
    with pytest.raises(ManifestError, match="must be a certificate and its key"):
        check_tls(http(tls=files | {"key": str(certificate)}))
    (tmp_path / "locked").mkdir()
    certificate, key = make_certificate(tmp_path / "locked", "127.0.0.1", password=b"secret")
    with pytest.raises(ManifestError, match="without a password"):
        check_tls(http(tls={"certificate": str(certificate), "key": str(key)}))
