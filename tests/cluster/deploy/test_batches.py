"""Where replicas keep files and batches, and when they take none."""

from __future__ import annotations

import pytest

from isotherm.cluster.deploy.batches import batch_service, batches_refused
from isotherm.cluster.manifest import HttpSection, parse_manifest


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


def test_a_folder_that_cannot_be_written_is_said_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        batch_service(http(batches={"folder": str(tmp_path / "file")}), 1000)
