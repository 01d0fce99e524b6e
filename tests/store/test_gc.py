"""What the store keeps, what may go, and the command line that tells of it."""

import json
import os
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from commands import run
from store.folders import contents, make_folder

from finetune_assets.artifacts.kinds import RETENTION
from finetune_assets.config.errors import ConfigError
from finetune_assets.config.loading import load_store_config
from finetune_assets.config.schema import StoreConfig
from finetune_assets.store.artifacts import ArtifactRef, ArtifactStore, open_store
from finetune_assets.store.gc import Removal, inventory, plan, remove

FIRST = datetime(2026, 1, 1, tzinfo=UTC)
LATER = datetime.now(UTC) + timedelta(days=30)
"""When all that a test has made is old."""


def fp(digit: str) -> str:
    return digit * 64


class Maker:
    """Publishes small artifacts, each a second younger than the one before."""

    def __init__(self, store: ArtifactStore, folder: Path) -> None:
        self.store, self.folder, self.made = store, folder, 0
        folder.mkdir()

    def __call__(self, kind: str, name: str, **made_from: Any) -> ArtifactRef:
        self.made += 1
        (self.folder / "file.txt").write_text(f"{kind}/{name} {self.made}")
        fingerprint = fp(name[-1]) if kind == "base-models" else name
        self.store.publish(self.folder, kind, name, fingerprint, made_from)
        manifest = self.store.manifest(kind, name)
        assert manifest
        aged = replace(manifest, created=(FIRST + timedelta(seconds=self.made)).isoformat())
        self.store.objects.put(f"{self.store.prefix(kind, name)}/manifest.json", aged.to_json())
        return self.store.resolve(kind, name, "it")


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return open_store(f"file://{tmp_path}/store", "me", tmp_path / "cache")


@pytest.fixture
def make(store: ArtifactStore, tmp_path: Path) -> Maker:
    return Maker(store, tmp_path / "folder")


def going(store: ArtifactStore, now: datetime = LATER, **config: Any) -> set[str]:
    """Prefixes of the artifacts that would go."""
    removals = plan(inventory(store.objects), store.namespace, StoreConfig(**config), RETENTION, now)
    return {removal.prefix.removeprefix("me/") for removal in removals if removal.whole}


def a_chain(make: Maker, digit: str, experiment: str = "demo") -> dict[str, ArtifactRef]:
    """Raw data to evaluation, each from the one before; names are letters that no other chain has."""
    letters = dict(zip(("raw", "tokenized", "adapters", "evaluations"), digit, strict=True))
    raw = make("raw", fp(letters["raw"]), source="x")
    data = make("tokenized", fp(letters["tokenized"]), dolly_raw=raw.fingerprint)
    adapter = make("adapters", fp(letters["adapters"]), tokenized_dataset=data.fingerprint, experiment=experiment)
    evaluation = make("evaluations", fp(letters["evaluations"]), lora_adapter=adapter.fingerprint)
    return {"raw": raw, "tokenized": data, "adapters": adapter, "evaluations": evaluation}


def test_nothing_goes_while_it_is_young(store: ArtifactStore, make: Maker) -> None:
    a_chain(make, "1234")
    assert going(store, FIRST + timedelta(days=4), keep_raw=1, keep_adapters=1) == set()


def test_older_adapters_go_with_what_only_they_needed(store: ArtifactStore, make: Maker) -> None:
    a_chain(make, "1234")
    a_chain(make, "5678")
    a_chain(make, "9abc", experiment="another")
    rest = {f"tokenized/{fp('2')}", f"adapters/{fp('3')}", f"evaluations/{fp('4')}"}
    assert going(store, keep_adapters=1, keep_raw=1) == {f"raw/{fp('1')}", *rest}
    assert going(store, keep_adapters=1, keep_raw=3) == rest
    assert going(store, keep_adapters=2, keep_raw=1) == set()


def test_a_few_pages_about_all_experiments_stay(store: ArtifactStore, make: Maker) -> None:
    for digit in "1234":
        make("reports", fp(digit), experiments=2)
    assert going(store, keep_reports=3) == {f"reports/{fp('1')}"}
    assert going(store, FIRST + timedelta(days=4), keep_reports=1) == set(), "all are young"


def test_what_an_adapter_that_stays_began_from_stays(store: ArtifactStore, make: Maker) -> None:
    first = a_chain(make, "1234")
    make("adapters", fp("d"), warm_start=first["adapters"].fingerprint, experiment="demo")
    assert going(store, keep_adapters=1, keep_raw=1) == set()


def test_champion_stays_whatever_its_age(store: ArtifactStore, make: Maker) -> None:
    first = a_chain(make, "1234")
    a_chain(make, "5678")
    store.objects.put("me/champions/demo/1.json", json.dumps({"adapter": first["adapters"].fingerprint}).encode())
    assert going(store, keep_adapters=1, keep_raw=1) == set()


def test_base_model_stays_while_anybody_refers_to_it(store: ArtifactStore, make: Maker, tmp_path: Path) -> None:
    for commit in ("e" * 40, "f" * 40, "d" * 40):
        make("base-models", f"owner/model/{commit}", repo="owner/model")
    yours = open_store(store.url, "you", tmp_path / "cache")
    yours.publish(make.folder, "adapters", fp("1"), fp("1"), {"cached_base_model": fp("e")})
    store.objects.put("you/pins/models/owner/model/main.json", json.dumps({"commit": "f" * 40}).encode())
    assert going(store) == {f"base-models/owner/model/{'d' * 40}"}


def test_others_artifacts_and_unknown_kinds_stay(store: ArtifactStore, make: Maker, tmp_path: Path) -> None:
    make("stacked", fp("1"))
    yours = open_store(store.url, "you", tmp_path / "cache")
    for digit in "23456":
        yours.publish(make.folder, "raw", fp(digit), fp(digit), {})
    assert going(store, keep_raw=1) == set()


def removals(store: ArtifactStore, now: datetime = LATER, **config: Any) -> list[Removal]:
    return plan(inventory(store.objects), store.namespace, StoreConfig(**config), RETENTION, now)


def test_files_that_no_manifest_names_go(store: ArtifactStore, make: Maker) -> None:
    old = make("raw", fp("1"))
    make.folder.joinpath("file.txt").write_text("other")
    new = store.publish(make.folder, "raw", fp("1"), fp("1"), {}, replace=True)
    store.objects.put("me/raw/dead/20260101T000000Z-00000000/half.bin", b"x" * 100)
    store.objects.put("me/some/file/of/somebody.txt", b"not ours to know")
    found = removals(store)
    assert {(r.prefix, r.attempt, r.whole) for r in found} == {
        (f"me/raw/{fp('1')}", old.attempt, False),
        ("me/raw/dead", "20260101T000000Z-00000000", False),
    }
    assert removals(store, datetime.now(UTC)) == [], "they are young"
    assert all(remove(store, removal) for removal in found)
    assert (store.fetch(new) / "file.txt").read_text() == "other"
    left = {stored.key for stored in store.objects.listing()}
    kept = f"me/raw/{fp('1')}"
    assert left == {f"{kept}/manifest.json", f"{kept}/{new.attempt}/file.txt", "me/some/file/of/somebody.txt"}


def test_what_a_job_of_a_cluster_has_left_goes(store: ArtifactStore) -> None:
    """Of runs that were killed: what was asked of the machines, their answers, and messages that nobody read."""
    keys = ["me/jobs/f1-abc/job.json", "me/jobs/f1-abc/answer-0.json", "me/jobs/messages-1/1.json"]
    for key in [*keys, "other/jobs/f1-abc/job.json"]:
        store.objects.put(key, b"{}")
    assert removals(store, datetime.now(UTC)) == [], "they are young"
    found = removals(store)
    assert {key for removal in found for key in removal.keys} == set(keys)
    assert all(remove(store, removal) for removal in found)
    assert [stored.key for stored in store.objects.listing()] == ["other/jobs/f1-abc/job.json"]


def test_what_changed_since_it_was_planned_stays(store: ArtifactStore, make: Maker) -> None:
    a_chain(make, "1234")
    a_chain(make, "5678")
    planned = {removal.prefix: removal for removal in removals(store, keep_adapters=1, keep_raw=1)}
    store.publish(make.folder, "adapters", fp("3"), fp("3"), {}, replace=True)
    assert not remove(store, planned[f"me/adapters/{fp('3')}"])
    assert store.verify("adapters", fp("3")) == []
    assert remove(store, planned[f"me/evaluations/{fp('4')}"])
    assert store.find("evaluations", fp("4")) is None


def test_unreadable_manifest_protects_its_files(store: ArtifactStore, make: Maker) -> None:
    make("raw", fp("1"))
    store.objects.put(f"me/raw/{fp('1')}/manifest.json", b"{")
    assert removals(store) == []


@pytest.fixture
def command(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Runs `finetune store` in this process; its exit code, and what it printed."""
    monkeypatch.setenv("FINETUNE_STORE", store.url)
    monkeypatch.setenv("FINETUNE_NAMESPACE", "me")
    monkeypatch.setenv("FINETUNE_CACHE", str(store.cache.root))
    monkeypatch.setenv("FINETUNE_CONFIGS", str(tmp_path))

    def store_command(*arguments: str) -> tuple[int, str]:
        code, printed, err = run(capsys, "store", *arguments)
        return code, printed + err

    return store_command


def test_list_and_show(command: Any, make: Maker, store: ArtifactStore) -> None:
    chain = a_chain(make, "1234")
    code, told = command("list")
    assert code == 0
    assert [line.split()[0] for line in told.splitlines()[1:5]] == ["evaluations", "adapters", "tokenized", "raw"]
    code, told = command("list", "adapters", "--json")
    assert json.loads(told)["made_from"]["experiment"] == "demo"
    code, told = command("show", "333")
    assert chain["adapters"].uri in told
    assert fp("2") in told
    tree = told.partition("file.txt")[2]
    assert tree.index(f"tokenized/{'2' * 12}") < tree.index(f"raw/{'1' * 12}") < tree.index(f"evaluations/{'4' * 12}")
    for name in ("nothing", "333"):
        if name == "333":
            make("raw", fp("3"))
        code, told = command("show", name)
        assert code != 0
        assert f"'{name}'" in told
    assert command("show", "adapters/333")[0] == 0


def test_verify_finds_damage_in_store_and_cache(command: Any, make: Maker, store: ArtifactStore) -> None:
    chain = a_chain(make, "1234")
    assert command("verify")[0] == 0
    (Path(chain["raw"].uri.removeprefix("file://")) / "file.txt").write_text("changed")
    code, told = command("verify")
    assert code == 1
    (line,) = [line for line in told.splitlines() if "file.txt" in line]
    assert f"raw/{'1' * 12}" in line
    assert command("verify", "tokenized/2")[0] == 0

    cached = store.fetch(chain["adapters"]) / "file.txt"
    assert command("verify", "--cache")[0] == 0
    when = cached.stat().st_mtime_ns
    cached.chmod(0o644)
    body = cached.read_bytes()
    cached.write_bytes(bytes([body[0] ^ 1]) + body[1:])
    os.utime(cached, ns=(when, when))
    code, told = command("verify", "--cache")
    assert code == 1
    assert "file.txt" in told
    assert cached.exists(), "this process uses it"


def test_fetch_copies_into_a_new_folder(command: Any, store: ArtifactStore, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "made", 1000)
    store.publish(folder, "adapters", fp("1"), fp("1"), {})
    code, told = command("fetch", "adapters/1", str(tmp_path / "out"))
    assert code == 0, told
    assert contents(tmp_path / "out") == contents(folder)
    (tmp_path / "out" / "empty").write_text("mine to change")
    code, told = command("fetch", "adapters/1", str(tmp_path / "out"))
    assert code != 0
    assert str(tmp_path / "out") in told
    assert (tmp_path / "out" / "empty").read_text() == "mine to change"


def gone_of(told: str) -> set[str]:
    """Artifacts that a line of gc's table names."""
    return set(re.findall(r"me/(\w+/\w{8})", told))


def test_gc_removes_only_when_told_to(command: Any, make: Maker, store: ArtifactStore, tmp_path: Path) -> None:
    chain = {f"{ref.kind}/{ref.name[:8]}" for ref in a_chain(make, "1234").values()}
    a_chain(make, "5678")
    (tmp_path / "store.yaml").write_text("keep_raw: 1\nkeep_adapters: 1\nkeep_days: 0\n")
    (store.cache.scratch(fp("9")) / "step-1").mkdir(parents=True)
    before = {stored.key for stored in store.objects.listing()}
    code, told = command("gc")
    assert code == 0
    assert gone_of(told) == chain
    assert "--delete" in told
    assert {stored.key for stored in store.objects.listing()} == before
    assert store.cache.scratch(fp("9")).exists()
    assert gone_of(command("gc", "--older-than", "10000")[1]) == set()
    code, told = command("gc", "--delete")
    assert code == 0
    assert gone_of(told) == chain
    assert not store.cache.scratch(fp("9")).exists()
    left = inventory(store.objects)
    assert {artifact.manifest.fingerprint[0] for artifact in left.artifacts} == set("5678")
    assert all(store.verify(artifact.kind, artifact.name) == [] for artifact in left.artifacts)
    assert len(left.attempts) == 4, "no file of what went is left"


def test_cache_is_shown(command: Any, make: Maker, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.fetch(make("raw", fp("1")))
    monkeypatch.setenv("FINETUNE_CACHE_LIMIT", "5GB")
    code, told = command("cache")
    assert code == 0
    assert f"me--raw--{fp('1')}" in told
    assert "5.0 GB" in told
    monkeypatch.setenv("FINETUNE_CACHE_LIMIT", "much")
    code, told = command("cache")
    assert code != 0
    assert "FINETUNE_CACHE_LIMIT: 'much'" in told


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("keep_raw: 0", r"store\.yaml.*keep_raw: 0"),
        ("keep_days: -1", r"store\.yaml.*keep_days: -1"),
        ("keep_adaptors: 3", r"store\.yaml.*keep_adaptors.*keep_adapters"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, text: str, facts: str) -> None:
    (tmp_path / "store.yaml").write_text(text)
    with pytest.raises(ConfigError, match=facts):
        load_store_config(tmp_path)


def test_without_a_file_the_defaults_hold(tmp_path: Path) -> None:
    assert load_store_config(tmp_path) == StoreConfig()
