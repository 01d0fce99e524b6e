"""One hostile or damaged file of a shared store ends nothing: it is reported by name, and everything else is shown."""

import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from projects import TestProject
from tiers import every_third, tiered

from finetune_assets.artifacts import provenance
from finetune_assets.artifacts.aliases import canonical
from finetune_assets.artifacts.champions import Champions, parse_record
from finetune_assets.artifacts.history import trainer_states
from finetune_assets.artifacts.kinds import RETENTION
from finetune_assets.artifacts.streams import is_good, newest_version, record_good
from finetune_assets.config.schema import StoreConfig
from finetune_assets.reporting.collect import collect
from finetune_assets.store.artifacts import ArtifactRef, ArtifactStore
from finetune_assets.store.errors import StoreError
from finetune_assets.store.gc import inventory, plan
from finetune_assets.store.json_object import MOST_BYTES, InvalidJson, parse_object
from finetune_assets.store.manifest import Manifest, ManifestError, _digest, parse

COUNT, SECONDS, GIB = 200, 30, 1 << 30
LATER = datetime.now(UTC) + timedelta(days=60)
GOOD = {
    "kind": "raw",
    "fingerprint": "1" * 64,
    "folder": "20260101T000000Z-00000000",
    "created": "2026-01-01T00:00:00+00:00",
}
FILE = {"path": "a.txt", "size": 1, "sha256": "0" * 64}


def signed(**changes: Any) -> bytes:
    """A manifest with a right digest, which is no protection."""
    tree = {"format": 2, **GOOD, "files": [FILE], "made_from": {}, **changes}
    tree = {name: value for name, value in tree.items() if value is not ...}
    return json.dumps({**tree, "digest": _digest(tree)}).encode()


def nested(levels: int) -> Any:
    tree: Any = {}
    for _ in range(levels):
        tree = {"a": tree}
    return tree


HOSTILE: dict[str, Callable[[], bytes]] = {
    "deep lists": lambda: b"[" * 100_000,
    "deep objects": lambda: b'{"a":' * 100_000,
    "deep provenance": lambda: signed(made_from=nested(200)),
    "no time zone": lambda: signed(created="2026-01-01T00:00:00"),
    "year 1": lambda: signed(created="0001-01-01T00:00:00+23:59"),
    "year 9999": lambda: signed(created="9999-12-31T23:59:59-23:59"),
    "time is a number": lambda: signed(created=5),
    "fingerprint is an object": lambda: signed(fingerprint={"a": 1}),
    "fingerprint leads outside": lambda: signed(fingerprint="../x"),
    "fingerprint is long": lambda: signed(fingerprint="f" * 100_000),
    "fingerprint clears the screen": lambda: signed(fingerprint="\x1b[2J"),
    "kind is a list": lambda: signed(kind=["raw"]),
    "kind is null": lambda: signed(kind=None),
    "provenance is a list": lambda: signed(made_from=["a"]),
    "provenance is a text": lambda: signed(made_from="a"),
    "files is an object": lambda: signed(files={"a": FILE}),
    "files is null": lambda: signed(files=None),
    "file is a text": lambda: signed(files=["a.txt"]),
    "file has more": lambda: signed(files=[{**FILE, "mode": 7}]),
    "size of 400 digits": lambda: signed(files=[{**FILE, "size": 10**400}]),
    "size of 5,000 digits": lambda: signed().replace(b'"size": 1', b'"size": ' + b"9" * 5000),
    "size is negative": lambda: signed(files=[{**FILE, "size": -1}]),
    "size is true": lambda: signed(files=[{**FILE, "size": True}]),
    "size is a fraction": lambda: signed(files=[{**FILE, "size": 1.5}]),
    "sha256 is a list": lambda: signed(files=[{**FILE, "sha256": ["0"]}]),
    "path is a number": lambda: signed(files=[{**FILE, "path": 1}]),
    "path leads outside": lambda: signed(files=[{**FILE, "path": "../x"}]),
    "lone surrogate": lambda: signed(made_from={"experiment": "\ud800"}),
    "lone surrogate as a key": lambda: signed(made_from={"\ud800": 1}),
    "huge integer": lambda: signed(made_from={"steps": 10**400}),
    "not UTF-8": lambda: b'{"a": "\xff"}',
    "UTF-16": lambda: signed().decode().encode("utf-16"),
    "empty": lambda: b"",
    "zeros": lambda: b"\0" * 1000,
    "number": lambda: b"5",
    "text": lambda: b'"manifest"',
    "other format": lambda: signed(format="2"),
    "no digest": lambda: json.dumps({"format": 2, **GOOD, "files": []}).encode(),
    "digest is a list": lambda: signed().replace(b'"digest": "', b'"digest": ["').replace(b'"}', b'"]}'),
    "unknown field": lambda: signed(more=1),
    "field is missing": lambda: signed(folder=...),
    "too large": lambda: b" " * (MOST_BYTES + 1),
    "many small values": lambda: b'{"a": [' + b"[]," * 300_000 + b"[]]}",
    "another artifact's": lambda: signed(fingerprint="2" * 64),
    "another kind's": lambda: signed(kind="adapters"),
}
MARKUP = {
    "markup": {"experiment": "[/red]", "[/bold]": "[/]"},
    "escapes in provenance": {"experiment": 5, "champions": [1], "sources": {"a": 1}, "held_back": "x"},
    "numbers": {"experiment": None, "dolly_raw": 7, "overrides": {"a": 1}, "same_as": [], "parts": [[]]},
    "not a number": {"experiment": float("nan"), "cached_base_model": float("inf")},
}
"""Provenance of manifests that are valid."""


@pytest.mark.parametrize("name", tiered(HOSTILE, every_third(name for name in HOSTILE if name != "many small values")))
def test_a_hostile_manifest_is_one_clear_error(name: str, project: TestProject) -> None:
    raw = HOSTILE[name]()
    if not name.startswith("another"):
        with pytest.raises(ManifestError, match=r"^where: ") as error:
            parse(raw, "where")
        assert str(error.value).count("\n") == 0
        assert len(str(error.value)) < 400
    store = project.store
    store.objects.put(f"you/raw/{'1' * 64}/manifest.json", raw)
    listed = inventory(store.objects)
    assert listed.artifacts == []
    (problem,) = listed.problems
    assert f"you/raw/{'1' * 64}/manifest.json" in problem


def test_an_honest_manifest_is_read(project: TestProject) -> None:
    manifest = parse(signed(), "where")
    assert manifest == parse(manifest.to_json(), "where")
    assert parse(signed(made_from=...), "where").made_from == {}, "of an earlier version"


def seeded(store: ArtifactStore, folder: Path, count: int = COUNT) -> set[str]:
    """Plant hostile files all over a store; returns the keys of what is not readable."""
    chosen, planted = random.Random(5), set()
    for number in range(count):
        name = chosen.choice([*HOSTILE, *MARKUP])
        place = chosen.choice(["mallory", store.namespace, "base-models"])
        kind = "" if place == "base-models" else chosen.choice(["raw", "adapters", "evaluations", "plans", "x"])
        fingerprint = f"{number:064x}"
        prefix = "/".join(part for part in (place, kind, fingerprint) if part)
        if name in MARKUP:
            parents = [f"{(number + step) % count:064x}" for step in range(-3, 4)]  # circles, and many ways through
            made_from = {**MARKUP[name], "parents": parents}
            content = signed(kind=kind or "base-models", fingerprint=fingerprint, made_from=made_from)
        else:
            content = HOSTILE[name]().replace(b"1" * 64, fingerprint.encode())
            planted.add(f"{prefix}/manifest.json")
        store.objects.put(f"{prefix}/manifest.json", content)
    folder.mkdir(exist_ok=True)
    return planted


COMMANDS = {
    "list": ("store", "list", "--all-namespaces"),
    "list as JSON": ("store", "list", "--all-namespaces", "--json"),
    "gc": ("store", "gc", "--older-than", "0"),
    "gc --delete": ("store", "gc", "--delete", "--older-than", "0"),
    "verify": ("store", "verify", "raw/" + "e" * 64),
    "show": ("store", "show", "raw/" + "e" * 64),
    "report": ("report", "page.html"),
    "champions": ("adapter", "champions"),
}
FOR_EVERY_CHANGE = ("gc --delete",)
"""Commands of `make test`; the others are in `make test-system`."""


@pytest.mark.parametrize("name", tiered(COMMANDS, FOR_EVERY_CHANGE, ("report", "list", "verify", "show", "champions")))
def test_commands_name_what_is_hostile_and_show_the_rest(
    name: str, project: TestProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = project.store
    planted = seeded(store, tmp_path / "made")
    (tmp_path / "made" / "rows.txt").write_text("mine")
    store.publish(tmp_path / "made", "raw", "e" * 64, "e" * 64, {"parents": [f"{i:064x}" for i in range(COUNT)]})
    store.objects.put("tests/champions/mine/00000001.json", b"[" * 100_000)
    before = {stored.key for stored in store.objects.listing()}
    ended, seconds = limited(*COMMANDS[name], cwd=tmp_path)
    said = ended.stdout + ended.stderr
    assert "Traceback" not in said, said[-3000:]
    assert ended.returncode == (1 if name in ("verify", "champions") else 0), said[-3000:]
    assert seconds < SECONDS
    if name in ("list", "list as JSON", "gc", "gc --delete", "verify", "report"):
        missing = {key for key in planted if key not in said}
        assert not missing
        assert all(said.count(f"{key}:") <= 1 for key in planted)
    if name == "champions":
        assert "champions/mine/00000001.json" in said
    assert f"{'e' * 12}" in said or name in ("gc", "gc --delete", "champions", "report")
    assert {stored.key for stored in store.objects.listing()} == before, "nothing that they may refer to was removed"


def limited(*arguments: str, cwd: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run a command with at most 1 GiB of data; its end, and the CPU seconds that it took."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (GIB, GIB))

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "finetune_assets.cli", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=cwd, preexec_fn=limit, timeout=600)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_gc_removes_nothing_that_an_unreadable_manifest_may_refer_to(project: TestProject, tmp_path: Path) -> None:
    store = project.store
    made = tmp_path / "made"
    made.mkdir()
    (made / "rows.txt").write_text("mine")
    for kind, name in (("raw", "a" * 64), ("tokenized", "b" * 64), ("base-models", "owner/model/" + "c" * 40)):
        store.publish(made, kind, name, name if len(name) == 64 else "d" * 64, {})
    config = StoreConfig(keep_raw=0, keep_adapters=0)

    def removed() -> set[str]:
        removals = plan(inventory(store.objects), "tests", config, RETENTION, LATER)
        return {removal.prefix.split("/")[-2] for removal in removals if removal.whole}

    assert removed() == {"raw", "tokenized", "model"}
    store.objects.put(f"base-models/x/{'1' * 40}/manifest.json", b"[" * 100_000)
    assert removed() == {"raw", "tokenized", "model"}, "base models refer to nothing"
    store.objects.put("mallory/adapters/x/manifest.json", signed(made_from=["c" * 64]))
    assert removed() == {"raw", "tokenized"}, "mallory's adapter may be of any base model"
    store.objects.put("tests/adapters/x/manifest.json", b"{")
    assert removed() == set()


RECORD = {
    "experiment": "demo", "adapter": "a" * 64, "action": "promoted", "kind": "adapters", "against": None,
    "evaluation": None, "numbers": {}, "reason": "", "by": "", "at": "2026-01-01T00:00:00+00:00", "number": 1,
    "before": None,
}  # fmt: skip
RECORDS: dict[str, bytes] = {
    "deep": b"[" * 100_000,
    "list": b"[]",
    "adapter": json.dumps({**RECORD, "adapter": ["a"]}).encode(),
    "adapter leads outside": json.dumps({**RECORD, "adapter": "../x"}).encode(),
    "kind": json.dumps({**RECORD, "kind": "../../other/adapters"}).encode(),
    "kind is a list": json.dumps({**RECORD, "kind": []}).encode(),
    "time": json.dumps({**RECORD, "at": "2026-01-01T00:00:00"}).encode(),
    "no time": json.dumps({**RECORD, "at": ""}).encode(),
    "number": json.dumps({**RECORD, "number": "1"}).encode(),
    "number is true": json.dumps({**RECORD, "number": True}).encode(),
    "other number": json.dumps({**RECORD, "number": 2}).encode(),
    "numbers": json.dumps({**RECORD, "numbers": []}).encode(),
    "deep numbers": json.dumps({**RECORD, "numbers": nested(100)}).encode(),
    "before": json.dumps({**RECORD, "before": {"a": 1}}).encode(),
    "reason": json.dumps({**RECORD, "reason": 5}).encode(),
    "unknown": json.dumps({**RECORD, "more": 5}).encode(),
    "missing": json.dumps({name: value for name, value in RECORD.items() if name != "adapter"}).encode(),
    "huge": json.dumps({**RECORD, "numbers": {"mean": 10**400}}).encode(),
}


@pytest.mark.parametrize("name", tiered(RECORDS, every_third(RECORDS)))
def test_a_hostile_champion_record_is_one_clear_error(name: str, project: TestProject) -> None:
    assert parse_record(json.dumps(RECORD).encode(), "demo/00000001.json").adapter == "a" * 64
    project.store.objects.put("tests/champions/demo/00000001.json", RECORDS[name])
    with pytest.raises(StoreError, match=r"tests/champions/demo/00000001\.json.*delete it") as error:
        Champions(project.store, "demo").current()
    assert str(error.value).count("\n") == 0


def test_an_earlier_record_without_newer_fields_is_read() -> None:
    old = {name: RECORD[name] for name in ("experiment", "adapter", "action", "number", "at")}
    assert parse_record(json.dumps(old).encode(), "demo/00000001.json").kind == "adapters"


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"{}", b'{"version": 5}', b'{"version": "../x"}', b"x" * (5 << 20)]
)
def test_a_hostile_record_of_a_source_is_passed_over(
    project: TestProject, content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = project.store
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "rows.parquet").write_text("rows")
    ref = store.publish(tmp_path / "made", "raw", "a" * 64, "a" * 64, {})
    record_good(store, "inbox", ref.fingerprint)
    (key,) = [stored.key for stored in store.objects.listing("tests/streams")]
    hostile = f"{key.rpartition('/')[0]}/9999.json"
    store.objects.put(hostile, content)
    assert newest_version(store, "inbox") == ref
    assert is_good(store, "inbox", ref.fingerprint)
    assert hostile in caplog.text


def published(
    project: TestProject, tmp_path: Path, kind: str, files: dict[str, bytes], **made_from: Any
) -> ArtifactRef:
    folder = tmp_path / f"made-{kind}"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return project.store.publish(folder, kind, "a" * 64, "a" * 64, made_from)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[]", b'{"active": 5}', b'{"active": {"hardware": []}}', b"\xff"])
def test_a_hostile_trainer_state_ends_neither_plan_nor_report(
    project: TestProject, tmp_path: Path, content: bytes
) -> None:
    from finetune_assets.preflight.speed import Past

    files = {"trainer_state.json": content, "provenance.json": b"{}"}
    published(project, tmp_path, "adapters", files, experiment="demo")
    assert [Past.of(state) for state in trainer_states(project.store)] in ([], [None])
    report = collect(project.store, project.configs)
    assert not report.trained
    assert report.problems


@pytest.mark.parametrize("value", [5, [], {}, "../x", "f" * 63, "F" * 64, None])
def test_an_alias_that_is_no_fingerprint_is_ignored(project: TestProject, tmp_path: Path, value: Any) -> None:
    ref = published(project, tmp_path, "raw", {"a": b"a"}, same_as=value)
    assert canonical(project.store, ref) == ref


@pytest.mark.parametrize("value", [5, [], {"salt": 1, "gate": 0, "val": 0}, {"salt": "s", "gate": "x", "val": 0}, "x"])
def test_provenance_of_another_type_is_not_taken(value: Any) -> None:
    assert provenance.held_back({"held_back": value}) is None
    assert provenance.texts({"a": value}, "a") == []
    assert {*provenance.texts_by_name({"a": value}, "a")} <= {"salt", "gate"}


def test_limits() -> None:
    assert parse_object(json.dumps(nested(31)).encode())
    for raw in (json.dumps(nested(32)).encode(), json.dumps({"a": 1 << 63}).encode(), b'{"a": "\\ud800"}'):
        with pytest.raises(InvalidJson):
            parse_object(raw)


def test_many_artifacts_are_listed_as_fast_as_before(project: TestProject) -> None:
    """Not a benchmark: 2,000 manifests within seconds of CPU on any machine."""
    store = project.store
    for number in range(2000):
        fingerprint = f"{number:064x}"
        manifest = Manifest("raw", fingerprint, GOOD["folder"], (), GOOD["created"], {})
        path = Path(store.url.removeprefix("file://")) / "tests" / "raw" / fingerprint
        path.mkdir(parents=True)
        (path / "manifest.json").write_bytes(manifest.to_json())
    began = time.process_time()
    assert len(inventory(store.objects).artifacts) == 2000
    assert time.process_time() - began < 10
