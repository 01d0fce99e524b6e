"""What networks and servers do to a transfer, on a real S3 server behind a proxy that does it.

Whatever can be helped by trying again ends well; the rest ends in one clear error. Neither leaves a half artifact.
Parts and chunks are a 64th of what they are otherwise, so that a small file has several of them.
"""

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from servers import ceph as ceph_server
from servers.proxy import Fault, Proxy
from servers.s3 import Bucket
from store.folders import SMALL, contents, make_folder
from tiers import tiered

from finetune_assets.store import hashing_reader, objects
from finetune_assets.store.artifacts import ArtifactRef, ArtifactStore, open_store
from finetune_assets.store.errors import ArtifactMissing, CorruptArtifact, StoreError
from finetune_assets.store.manifest import ManifestError

MANIFEST, BODY = r"^GET .*manifest\.json", r"^GET .*big\.bin"
PUT_SMALL, PUT_MANIFEST = r"^PUT .*small\.txt", r"^PUT .*manifest\.json"
BEGIN, PUT_PART, END = r"^POST .*uploads", r"^PUT .*partNumber", r"^POST .*uploadId"
READING, WRITING = (
    {"manifest": MANIFEST, "body": BODY},
    {"small": PUT_SMALL, "begin": BEGIN, "part": PUT_PART, "end": END},
)
WRITING["manifest"] = PUT_MANIFEST
PART = objects.PART
PART_SIZE, CHUNK_SIZE = PART // 64, objects.CHUNK // 64
LEAST_PART = 5 << 20
"""S3 takes no smaller one but the last."""


def test_parts_are_as_large_as_s3_wants_them() -> None:
    assert PART >= LEAST_PART
    assert SMALL > 2 * PART_SIZE, "of which a test's file has several"


@pytest.fixture(autouse=True)
def _small_and_impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small parts and chunks, and the same retries, sooner."""
    monkeypatch.setattr(objects, "PART", PART_SIZE)
    monkeypatch.setattr(objects, "CHUNK", CHUNK_SIZE)
    monkeypatch.setattr(hashing_reader, "CHUNK", CHUNK_SIZE)
    monkeypatch.setattr(objects, "RETRIES", {**objects.RETRIES, "max_retries": 2})
    monkeypatch.setattr(objects, "TIMEOUTS", {**objects.TIMEOUTS, "read_timeout": "1s"})
    monkeypatch.setattr(objects, "PAUSE_SECONDS", 0.05)
    objects._s3_store.cache_clear()


@pytest.fixture
def store(proxied: Proxy, ceph: Bucket, tmp_path: Path) -> ArtifactStore:
    return open_store(ceph.url, "me", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "made")


@pytest.fixture
def ref(store: ArtifactStore, folder: Path) -> ArtifactRef:
    return store.publish(folder, "raw", "f1", "f1", {})


def passing(match: str) -> dict[str, Fault]:
    """Faults that trying again helps against."""
    return {
        "500 twice": Fault(match, "status", 2),
        "503 twice": Fault(match, "status", 2, status=503, code="SlowDown"),
        "429 twice": Fault(match, "status", 2, status=429, code="SlowDown"),
        "500 five times": Fault(match, "status", 5),
        "refused": Fault(match, "refuse", 2),
        "stalled": Fault(match, "delay", 1, seconds=2.5),
    }


WHILE_READING = {
    "cut": Fault(BODY, "cut", 2, after=SMALL // 4),
    "cut in the head": Fault(BODY, "cut", 1, after=0),
    "flipped": Fault(BODY, "flip", 1, after=SMALL // 3),
    "longer than it says": Fault(BODY, "wrong_length", 1),
    "slow": Fault(BODY, "throttle", 1, rate=2 * SMALL),
    "manifest cut": Fault(MANIFEST, "cut", 2, after=20),
    "manifest longer than it says": Fault(MANIFEST, "wrong_length", 1),
    **{f"{part}: {name}": fault for part, match in READING.items() for name, fault in passing(match).items()},
}
WHILE_WRITING = {
    "part cut": Fault(PUT_PART, "cut_request", 2, after=PART_SIZE // 8),
    "part flipped": Fault(PUT_PART, "flip_request", 1, after=PART_SIZE // 8),
    "small file flipped": Fault(PUT_SMALL, "flip_request", 1, after=2),
    "manifest flipped": Fault(PUT_MANIFEST, "flip_request", 1, after=30),
    "answer to a part lost": Fault(PUT_PART, "drop_answer", 1),
    "answer to the end lost": Fault(END, "cut", 1, after=0),
    "answer to the manifest lost": Fault(PUT_MANIFEST, "drop_answer", 1),
    **{f"{part}: {name}": fault for part, match in WRITING.items() for name, fault in passing(match).items()},
}

ONE_OF_EACH_KIND = {
    "cut",
    "flipped",
    "longer than it says",
    "slow",
    "manifest: 500 twice",
    "body: refused",
    "body: stalled",
    "part cut",
    "part flipped",
    "small file flipped",
    "answer to a part lost",
    "answer to the end lost",
    "answer to the manifest lost",
    "begin: 503 twice",
    "end: refused",
    "part: stalled",
}


def swept(faults: dict[str, Fault]) -> list[Any]:
    """Parameters of a test: one fault of each kind, and the rest in the sweeps."""
    like_others = {name for name in faults if name.endswith(("503 twice", "429 twice"))}  # tried again as 500 is
    return tiered(faults, ONE_OF_EACH_KIND, faults.keys() - like_others)


def test_one_of_each_kind_is_among_them() -> None:
    assert ONE_OF_EACH_KIND <= {*WHILE_READING, *WHILE_WRITING}
    kinds = {fault.what for fault in (*WHILE_READING.values(), *WHILE_WRITING.values())}
    assert {(WHILE_READING | WHILE_WRITING)[name].what for name in ONE_OF_EACH_KIND} == kinds


@pytest.mark.parametrize("name", swept(WHILE_READING))
def test_reading_goes_on(store: ArtifactStore, ref: ArtifactRef, folder: Path, proxied: Proxy, name: str) -> None:
    fault = WHILE_READING[name]
    proxied.faults.append(Fault(**vars(fault)))
    assert contents(store.fetch(ref)) == contents(folder)
    assert proxied.faults[0].times == 0, "the fault has happened"


@pytest.mark.parametrize("name", swept(WHILE_WRITING))
def test_writing_goes_on(
    store: ArtifactStore, folder: Path, proxied: Proxy, ceph: Bucket, name: str, tmp_path: Path
) -> None:
    fault = WHILE_WRITING[name]
    proxied.faults.append(Fault(**vars(fault)))
    ref = store.publish(folder, "raw", "f1", "f1", {})
    assert proxied.faults[0].times == 0, "the fault has happened"
    assert contents(open_store(ceph.url, "me", tmp_path / "other").fetch(ref)) == contents(folder)
    assert len(ceph.listed()) == 4
    left = [one["UploadId"] for one in ceph.client.list_multipart_uploads(Bucket=ceph.name).get("Uploads", ())]
    # Of one whose beginning was answered too late nobody knows the name; garbage collection ends it
    assert not [upload for upload in left if any(upload in unquote(request) for request in proxied.requests)]


LASTING = {
    "500": (500, "InternalError", ""),
    "503": (503, "SlowDown", ""),
    "expired": (400, "ExpiredToken", ""),
    "expired, by another name": (403, "RequestExpired", ""),
    "wrong key": (403, "InvalidAccessKeyId", "AWS_ACCESS_KEY_ID"),
    "wrong secret": (403, "SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"),
    "forbidden": (403, "AccessDenied", "s3:ListBucket"),
    "no bucket": (404, "NoSuchBucket", "FINETUNE_STORE"),
    "region": (301, "PermanentRedirect", "AWS_DEFAULT_REGION"),
    "clock": (403, "RequestTimeTooSkewed", ""),
    "quota": (403, "QuotaExceeded", ""),
}
"""Status, S3's code, and what the person has to look at."""
REQUESTS = {
    **{f"read {name}": match for name, match in READING.items()},
    **{f"write {n}": m for n, m in WRITING.items()},
}
"""For every change, each answer is given to one request and each request has one; the sweep has all pairs."""
PAIRS = [
    pytest.param(what, answer, marks=[] if (i - j) % len(REQUESTS) == 0 else pytest.mark.system)
    for i, answer in enumerate(LASTING)
    for j, what in enumerate(REQUESTS)
]


@pytest.mark.parametrize(("what", "answer"), PAIRS)
def test_what_cannot_be_helped_is_one_clear_error(
    store: ArtifactStore, folder: Path, proxied: Proxy, ceph: Bucket, what: str, answer: str
) -> None:
    status, code, name = LASTING[answer]
    kept = store.publish(folder, "raw", "f1", "f1", {}) if what.startswith("read") else None
    proxied.faults.append(Fault(REQUESTS[what], "status", None, status=status, code=code))
    with pytest.raises(StoreError) as error:
        store.fetch(kept) if kept else store.publish(folder, "raw", "f1", "f1", {})
    message = str(error.value)
    assert message.count("\n") == 0
    assert message.startswith(ceph.url)
    assert (name or code) in message or (not name and str(status) in message)
    proxied.faults.clear()
    if kept:
        assert contents(store.fetch(kept)) == contents(folder), "nothing was lost"
    else:
        assert store.find("raw", "f1") is None, "nothing half is visible"
        assert contents(store.fetch(store.publish(folder, "raw", "f1", "f1", {}))) == contents(folder)


def test_byte_that_flips_each_time_is_never_read(
    store: ArtifactStore, ref: ArtifactRef, folder: Path, proxied: Proxy, tmp_path: Path
) -> None:
    proxied.faults.append(Fault(BODY, "flip", None, after=SMALL // 2))
    with pytest.raises(CorruptArtifact, match=r"big\.bin"):
        store.fetch(ref)
    assert not list((tmp_path / "cache").rglob("big.bin"))
    proxied.faults.clear()
    assert contents(store.fetch(ref)) == contents(folder)


def test_manifest_with_a_flipped_byte_is_refused(store: ArtifactStore, ref: ArtifactRef, proxied: Proxy) -> None:
    proxied.faults.append(Fault(MANIFEST, "flip", None, after=100))
    with pytest.raises(ManifestError, match=r"manifest\.json"):
        store.fetch(ref)
    proxied.faults[:] = [Fault(MANIFEST, "flip", 1, after=100)]
    store.fetch(ref)


def test_truncated_object_of_right_length_header_is_refused(
    store: ArtifactStore, ref: ArtifactRef, ceph: Bucket
) -> None:
    (key,) = (key for key in ceph.listed() if key.endswith("small.txt"))
    ceph.put(key, b"smal")
    with pytest.raises(CorruptArtifact, match=r"small\.txt"):
        store.fetch(ref)


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_real_refusal_of_credentials(
    ceph: Bucket, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, ceph_server.SECRET_KEY[::-1])
    store = open_store(ceph.url, "me", tmp_path / "cache")
    for act in (lambda: store.find("raw", "f1"), lambda: store.publish(folder, "raw", "f1", "f1", {})):
        with pytest.raises(StoreError, match=name) as error:
            act()
        assert ceph_server.SECRET_KEY[::-1] not in str(error.value) or name == "AWS_ACCESS_KEY_ID"


def test_real_missing_bucket(ceph: Bucket, tmp_path: Path, folder: Path) -> None:
    store = open_store("s3://nobody-made-this-one/prefix", "me", tmp_path / "cache")
    acts: list[Callable[[], object]] = [
        lambda: store.find("raw", "f1"),
        lambda: store.publish(folder, "raw", "f1", "f1", {}),
        lambda: store.objects.upload("x", SMALL, lambda: iter([b"x" * SMALL])),
        lambda: list(store.objects.listing()),
        lambda: store.objects.delete(["x"]),
    ]
    for act in acts:
        with pytest.raises(StoreError, match=r"nobody-made-this-one.*FINETUNE_STORE"):
            act()


def test_artifact_that_was_removed_meanwhile_is_told(store: ArtifactStore, ref: ArtifactRef, ceph: Bucket) -> None:
    for key in ceph.listed():
        ceph.client.delete_object(Bucket=ceph.name, Key=key)
    with pytest.raises(ArtifactMissing, match=re.escape(ref.uri)):
        store.fetch(ref)


def test_file_that_changes_while_it_is_published_is_refused(
    store: ArtifactStore, folder: Path, ceph: Bucket, proxied: Proxy
) -> None:
    with pytest.raises(StoreError, match=r"small\.txt"):
        store.publish(folder, "raw", "f1", "f1", {}, expected={"sub/small.txt": "0" * 64})
    assert ceph.listed() == [], "what was stored already is removed"


def test_upload_that_died_is_found_and_ended(store: ArtifactStore, ceph: Bucket) -> None:
    ceph.client.create_multipart_upload(Bucket=ceph.name, Key="some/prefix/me/raw/f9/x/big.bin")
    ceph.client.create_multipart_upload(Bucket=ceph.name, Key="some/prefix/you/raw/f9/x/big.bin")
    soon, before = datetime.now(UTC) + timedelta(minutes=1), datetime.now(UTC) - timedelta(minutes=1)
    assert store.objects.abort_uploads("me/", before, dry_run=False) == []
    assert store.objects.abort_uploads("me/", soon, dry_run=True) == ["me/raw/f9/x/big.bin"]
    assert store.objects.abort_uploads("me/", soon, dry_run=False) == ["me/raw/f9/x/big.bin"]
    (left,) = ceph.client.list_multipart_uploads(Bucket=ceph.name)["Uploads"]
    assert left["Key"] == "some/prefix/you/raw/f9/x/big.bin"
