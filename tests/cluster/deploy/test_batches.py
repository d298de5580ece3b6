"""Where replicas keep files and batches, and when they take none."""

from __future__ import annotations

import pytest

from isotherm.cluster.deploy.batch_store import check_batches_folder
from isotherm.cluster.deploy.batches import batch_service, batches_refused
from isotherm.cluster.deploy.ingress_start import said_by_replica
from isotherm.cluster.manifest import HttpSection, ManifestError, parse_manifest


def http(**fields) -> HttpSection:
    return parse_manifest({"http": fields}).http


def test_several_replicas_need_a_folder_that_all_of_them_see(tmp_path):
    assert batches_refused(http()) == ""
    assert "http.batches.folder" in batches_refused(http(replicas=2))
    assert batches_refused(http(replicas=2, batches={"folder": str(tmp_path)})) == ""


def test_two_replicas_with_one_folder_see_the_same(tmp_path):
    section = http(replicas=2, batches={"folder": str(tmp_path / "new"), "max_bytes": "1KB", "concurrency": 3})
    first, second = batch_service(section, 1000), batch_service(section, 1000)
    assert first.limits.concurrency == 3
    path = first.store.new_upload()
    path.write_bytes(b"x" * 600)
    file = first.store.add_file(path, "a", "batch")
    assert second.store.files() == [file] and second.store.space.left("") < 400


def test_a_folder_that_cannot_be_written_is_named_at_the_start(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    section = http(batches={"folder": str(tmp_path / "file")})
    for look in (lambda: batch_service(section, 1000), lambda: check_batches_folder(section)):
        with pytest.raises(ManifestError, match=rf'http\.batches\.folder is "{tmp_path}/file": .*\(Not a directory\)'):
            look()
    section = http(batches={"folder": str(tmp_path / "new")})
    check_batches_folder(section)
    check_batches_folder(http())
    monkeypatch.setattr("os.access", lambda *_: False)  # whoever runs the tests as root may write anywhere
    with pytest.raises(ManifestError, match=r"may not write there"):
        check_batches_folder(section)


SAID = """The deployment failed to start 3 times in a row. See controller logs for details. Error:
ray::ServeReplica:isotherm:ingress.initialize_and_get_metadata() (pid=1, ip=127.0.0.1)
  File "replica.py", line 1, in initialize
    raise RuntimeError(traceback.format_exc()) from None
RuntimeError: Traceback (most recent call last):
  File "batches.py", line 1, in batch_service
    raise ManifestError(
           ^^^^^^^^^^^
isotherm.cluster.manifest.ManifestError: http.batches.folder is "/x": no
"""


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (SAID, 'http.batches.folder is "/x": no'),
        ("It failed. Error:\nThe actor died.\n", "The actor died."),
        ("RuntimeError: no", "RuntimeError: no"),
    ],
)
def test_why_replicas_do_not_start_is_one_line_of_theirs(message, words):
    assert said_by_replica(message) == words
