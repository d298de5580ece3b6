"""What the system allows: shared memory, open files, room for Ray's session."""

from __future__ import annotations

import resource
import shutil
import tempfile
from dataclasses import dataclass

from isotherm.cluster.doctor.finding import Finding, fail, ok, warn
from isotherm.cluster.manifest import human_bytes

LEAST_SHM, GOOD_SHM = 256 << 20, 1 << 30  # bytes: Ray's object store takes 200 MiB, and links have rings there
LEAST_FILES, GOOD_FILES = 1024, 8192  # each connection and each of Ray's workers has some
FULL, NEARLY_FULL = 0.95, 0.90  # of the disk with the session: Ray refuses to write beyond the first


@dataclass(frozen=True)
class LimitFacts:
    """`session`: the folder that Ray's session goes to; `disk_used`: fraction of its disk."""

    shm: int
    shm_free: int
    files: int
    files_hard: int
    session: str
    disk_used: float
    disk_free: int


def look_at_limits() -> LimitFacts:
    session = tempfile.gettempdir()
    shm, disk = shutil.disk_usage("/dev/shm"), shutil.disk_usage(session)
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return LimitFacts(shm.total, shm.free, files, hard, session, 1 - disk.free / disk.total, disk.free)


def judge_limits(facts: LimitFacts) -> list[Finding]:
    return [_shm(facts), _files(facts), _disk(facts)]


def _shm(facts: LimitFacts) -> Finding:
    words = f"{human_bytes(facts.shm_free)} free of {human_bytes(facts.shm)} in /dev/shm"
    advice = "give more: docker run --shm-size=2g, in Kubernetes an emptyDir of medium Memory, else mount -o remount"
    if facts.shm_free < LEAST_SHM:
        return fail("shared memory", words, f"Ray's object store and links take 256 MiB and more; {advice}")
    if facts.shm_free < GOOD_SHM:
        return warn("shared memory", words, f"links of large batches may not fit; {advice}")
    return ok("shared memory", words)


def _files(facts: LimitFacts) -> Finding:
    if facts.files < 0 or facts.files >= GOOD_FILES:  # -1: any number
        return ok("open files", "any number" if facts.files < 0 else f"{facts.files} for a process")
    words = f"{facts.files} for a process"
    raised = min(facts.files_hard, 65536) if facts.files_hard > 0 else 65536
    advice = f"ulimit -n {raised}, or LimitNOFILE=65536 under systemd"
    if facts.files < LEAST_FILES:
        return fail("open files", words, f"Ray needs more than {LEAST_FILES}: {advice}")
    return warn("open files", words, f"enough for some hundred clients: {advice}")


def _disk(facts: LimitFacts) -> Finding:
    words = f"{facts.session} is on a disk that is {facts.disk_used:.0%} full, {human_bytes(facts.disk_free)} free"
    if facts.disk_used >= FULL:
        return fail("disk", words, f"Ray takes nothing on a disk that is {FULL:.0%} full: free some, or set TMPDIR")
    if facts.disk_used >= NEARLY_FULL:
        return warn("disk", words, f"at {FULL:.0%} Ray takes nothing any more")
    return ok("disk", words)


def judge_session(trouble: str) -> list[Finding]:
    """`trouble`: why `isotherm serve` could not put Ray's session where temporary files go, if it could not."""
    return [fail("session", trouble, "`isotherm serve` ends with these words")] if trouble else []
