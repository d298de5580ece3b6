"""`isotherm serve` on every interface of a host, over TLS and with keys: what a second host sees of it, and who is let
in."""

from __future__ import annotations

import json
import os
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from certificates import make_certificate
from hosts import Host, Hosts, unavailable_reason
from served import ISOTHERM, Served

from isotherm.cluster.api.access.hashing import hashed, new_key, new_key_id
from isotherm.cluster.api.access.keys_file import KeyEntry, read_keys, write_keys

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(unavailable_reason() is not None, reason=f"no hosts can be made: {unavailable_reason()}"),
]
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "What is 3 + 4?"}], "temperature": 0}


class Front:
    """The cluster, its host, another host, and keys by name."""

    def __init__(self, served: Served, head: Host, other: Host, keys: dict[str, str], file: Path) -> None:
        self.served, self.head, self.other, self.keys, self.file = served, head, other, keys, file

    def ask(self, method: str, path: str, key: str = "", **options: Any) -> httpx.Response:
        """From the other host."""
        headers = {"authorization": f"Bearer {self.keys.get(key, key)}"} if key else {}
        url = f"https://{self.head.address}:{self.served.port}{path}"
        with self.other.entered():
            return httpx.request(
                method, url, verify=self.served.verify, headers=headers, timeout=60, trust_env=False, **options
            )


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    folder = tmp_path_factory.mktemp("access")
    with Hosts(2) as hosts:
        head, other = hosts.hosts
        certificate, key = make_certificate(folder, "127.0.0.1", head.address)
        made = {name: new_key(new_key_id()) for name in ("ann", "bob", "ops")}
        roles: dict[str, Any] = {"ann": ["use"], "bob": ["use"], "ops": ["admin"]}
        entries = [
            KeyEntry(id=text[4:12], name=name, hash=hashed(text), roles=roles[name]) for name, text in made.items()
        ]
        write_keys(folder / "keys.json", entries)
        http = {
            "host": "0.0.0.0",
            "keys": str(folder / "keys.json"),
            "tls": {"certificate": str(certificate), "key": str(key)},
        }
        served = Served({"http": http, "autoscaling": {"mode": "off"}}, folder)
        served.url, served.verify = f"https://127.0.0.1:{served.port}", ssl.create_default_context(cafile=certificate)
        with head.entered(), served:
            served.wait_ready()
            yield Front(served, head, other, made, folder / "keys.json")


def listening(host: Host) -> set[int]:
    """Ports at which anything in the host's network listens, on whatever address."""
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/{host.pid}/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                found.add(int(fields[1].rpartition(":")[2], 16))
    return found


def answers(host: Host, port: int) -> bool:
    with closing(socket.socket()) as connection:
        connection.settimeout(2)
        return connection.connect_ex((host.address, port)) == 0


def test_a_second_host_sees_the_ingress_port_alone(front: Front):
    ports = listening(front.head)
    assert len(ports) > 10, "Ray listens at many"
    with front.other.entered():
        reached = {port for port in ports if answers(front.head, port)}
    assert reached == {front.served.port}


def test_who_is_let_in(front: Front):
    assert front.ask("GET", "/health").json() == {"status": "alive"}
    assert front.ask("GET", "/ready").status_code == 200
    for path in ("/v1/models", "/status", "/metrics", "/docs", "/-/routes", "/nothing"):
        assert front.ask("GET", path).status_code == 401, path
        assert front.ask("GET", path, new_key(new_key_id())).status_code == 401, path
    assert "7" in front.ask("POST", "/v1/chat/completions", "ann", json=CHAT).text
    assert front.ask("POST", "/v1/chat/completions", "ops", json=CHAT).status_code == 403
    assert front.ask("GET", "/status", "ops").json()["url"] == front.served.url
    assert front.ask("GET", "/status", "ann").status_code == 403


def test_nobody_speaks_to_it_without_tls(front: Front):
    with front.other.entered(), pytest.raises(httpx.TransportError):
        httpx.get(f"http://{front.head.address}:{front.served.port}/health", trust_env=False)


def test_a_key_that_is_made_or_revoked_counts_within_seconds(front: Front, tmp_path: Path):
    made = front.served.command("keys", "create", "eve", "--file", str(front.file), "--role", "observe")
    key = made.stdout.strip()
    assert key.startswith("iso-") and made.returncode == 0

    def until(status: int) -> None:
        deadline = time.monotonic() + 10
        while front.ask("GET", "/status", key).status_code != status:
            assert time.monotonic() < deadline
            time.sleep(0.2)

    until(200)
    assert front.served.command("keys", "revoke", "eve", "--file", str(front.file)).returncode == 0
    until(401)
    assert [entry.name for entry in read_keys(front.file)] == ["ann", "bob", "ops"]


def test_commands_take_the_key_from_the_environment_or_a_file(front: Front, tmp_path: Path):
    trust = {"SSL_CERT_FILE": str(front.file.with_name("tls.crt"))}
    scale = ["scale", "--expert-groups", "2", "--dry-run", "--url", front.served.url]
    (tmp_path / "key").write_text(front.keys["ops"] + "\n")
    without = front.served.command(*scale, **trust)
    assert without.returncode == 1 and "API key" in without.stderr
    assert front.served.command(*scale, **trust, ISOTHERM_API_KEY=front.keys["ops"]).returncode == 0
    by_file = front.served.command(*scale, "--key-file", str(tmp_path / "key"), **trust)
    assert by_file.returncode == 0, by_file.stderr


def test_files_and_responses_are_their_keys_own(front: Front):
    row = json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": CHAT}) + "\n"
    form = {"files": {"file": ("rows.jsonl", row.encode())}, "data": {"purpose": "batch"}}
    file = front.ask("POST", "/v1/files", "ann", **form).json()["id"]
    body = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    assert front.ask("POST", "/v1/batches", "bob", json=body).status_code == 404
    batch = front.ask("POST", "/v1/batches", "ann", json=body).json()["id"]
    deadline = time.monotonic() + 60
    while (found := front.ask("GET", f"/v1/batches/{batch}", "ann").json())["status"] != "completed":
        assert time.monotonic() < deadline and found["status"] != "failed", found
        time.sleep(0.3)
    output = found["output_file_id"]
    assert "7" in front.ask("GET", f"/v1/files/{output}/content", "ann").text
    for path in (f"/v1/batches/{batch}", f"/v1/files/{file}", f"/v1/files/{output}", f"/v1/files/{output}/content"):
        assert front.ask("GET", path, "bob").status_code == 404, path
    assert front.ask("GET", "/v1/files", "bob").json()["data"] == []


def test_no_process_and_no_log_has_a_key(front: Front):
    """Neither in arguments nor in an environment, nor in what was written so far."""
    front.served.remember_processes()
    secrets = [key.rpartition("-")[2] for key in front.keys.values()]
    told = front.served.log.read_text() + "\n".join(front.served.logged(0))
    for process in psutil.Process(front.served.process.pid).children(recursive=True):
        told += " ".join(process.cmdline()) + str(process.environ())
    assert [secret for secret in secrets if secret in told] == []


def test_without_keys_it_says_so_and_ends(front: Front, tmp_path: Path):
    environment = {name: value for name, value in os.environ.items() if name != "ISOTHERM_API_KEY"}
    front.served.environment = environment
    refused = front.served.command("serve", "--host", "0.0.0.0", "--port", "1")
    assert refused.returncode == 1 and "there are no API keys" in refused.stderr and ISOTHERM.endswith("isotherm")
    assert "isotherm keys create" in refused.stderr and "ISOTHERM_API_KEY" in refused.stderr
