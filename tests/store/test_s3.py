"""The same store on S3: what is published is what is fetched, and what is wrong is told. On moto."""

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from servers.s3 import Bucket
from store.folders import SEVERAL_PARTS, contents, make_folder

from finetune_assets.store import objects
from finetune_assets.store.artifacts import ArtifactStore, open_store
from finetune_assets.store.errors import CorruptArtifact, StoreError


@pytest.fixture
def store(moto: Bucket, tmp_path: Path) -> ArtifactStore:
    return open_store(moto.url, "me", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "made")


def test_what_is_fetched_is_what_was_published(store: ArtifactStore, tmp_path: Path, moto: Bucket) -> None:
    folder = make_folder(tmp_path / "large", SEVERAL_PARTS)
    assert store.find("raw", "f1") is None
    ref = store.publish(folder, "raw", "f1", "f1", {"source": "x"})
    assert store.find("raw", "f1") == ref
    assert contents(store.fetch(ref)) == contents(folder)
    key = ref.uri.removeprefix(f"s3://{moto.name}/")
    assert moto.get(f"{key}/big.bin") == (folder / "big.bin").read_bytes()
    assert {k.removeprefix("some/prefix/me/raw/f1/").removeprefix(f"{ref.attempt}/") for k in moto.listed()} == {
        "manifest.json",
        "big.bin",
        "sub/small.txt",
        "empty",
    }


def test_store_at_the_top_of_a_bucket(moto: Bucket, folder: Path, tmp_path: Path) -> None:
    store = open_store(f"s3://{moto.name}", "me", tmp_path / "cache")
    ref = store.publish(folder, "raw", "f1", "f1", {})
    assert contents(store.fetch(ref)) == contents(folder)
    assert "me/raw/f1/manifest.json" in moto.listed()


def test_second_writer_gets_the_firsts_artifact(store: ArtifactStore, folder: Path, moto: Bucket) -> None:
    first = store.publish(folder, "raw", "f1", "f1", {})
    (folder / "sub" / "small.txt").write_text("other")
    assert store.publish(folder, "raw", "f1", "f1", {}) == first
    assert len(moto.listed()) == 4


def test_writer_that_loses_the_race_uses_the_winners_and_removes_its_own(
    store: ArtifactStore, folder: Path, moto: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    winner = store.publish(folder, "raw", "f1", "f1", {})
    (folder / "sub" / "small.txt").write_text("other")
    found, asked = store.find, []

    def nothing_yet(kind: str, name: str, expected: Mapping[str, str] | None = None) -> object:
        asked.append(name)
        return None if len(asked) == 1 else found(kind, name, expected)

    monkeypatch.setattr(store, "find", nothing_yet)
    assert store.publish(folder, "raw", "f1", "f1", {}) == winner
    assert len(moto.listed()) == 4
    assert (store.fetch(winner) / "sub" / "small.txt").read_text() == "small"


def test_replacing_is_seen_at_once_and_whole(store: ArtifactStore, folder: Path) -> None:
    first = store.publish(folder, "raw", "f1", "f1", {})
    (folder / "sub" / "small.txt").write_text("other")
    second = store.publish(folder, "raw", "f1", "f1", {}, replace=True)
    assert store.find("raw", "f1") == second != first
    assert (store.fetch(first) / "sub" / "small.txt").read_text() == "other", "the first is not named any more"


def test_damage_at_rest_is_refused(store: ArtifactStore, folder: Path, moto: Bucket, tmp_path: Path) -> None:
    ref = store.publish(folder, "raw", "f1", "f1", {})
    (key,) = (key for key in moto.listed() if key.endswith("big.bin"))
    body = bytearray(moto.get(key))
    body[12345] ^= 1
    moto.put(key, bytes(body))
    with pytest.raises(CorruptArtifact, match=r"big\.bin"):
        store.fetch(ref)
    assert store.verify("raw", "f1") == ["big.bin"]
    moto.client.delete_object(Bucket=moto.name, Key=key)
    with pytest.raises(CorruptArtifact, match=r"big\.bin"):
        store.fetch(ref)
    assert not list((tmp_path / "cache").rglob("big.bin"))


@pytest.mark.parametrize(
    "url", ["s3://", "s3:/bucket/prefix", "s3://bucket/prefix?versionId=1", "http://bucket/prefix"]
)
def test_url_that_is_none_is_refused(tmp_path: Path, url: str) -> None:
    shown = url.partition("?")[0]  # a query may be a signature
    with pytest.raises(StoreError, match=rf"FINETUNE_STORE.*{re.escape(shown)}'"):
        open_store(url, "me", tmp_path)


def test_credentials_in_a_url_are_refused_and_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="FINETUNE_STORE") as refusal:
        open_store("s3://AKIAKEY:verysecret@bucket/prefix", "me", tmp_path)
    assert "verysecret" not in str(refusal.value)
    assert "AKIAKEY" not in str(refusal.value)


def test_missing_bucket_is_not_taken_for_an_empty_store(moto: Bucket, tmp_path: Path) -> None:
    store = open_store("s3://there-is-no-such-bucket", "me", tmp_path)
    with pytest.raises(StoreError, match=r"there-is-no-such-bucket.*FINETUNE_STORE"):
        store.find("raw", "f1")


def test_no_credentials_says_how_to_give_some(moto: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(StoreError, match=r"AWS_ACCESS_KEY_ID.*AWS_PROFILE"):
        open_store(moto.url, "me", tmp_path).find("raw", "f1")


def test_credentials_of_a_profile_are_used(
    moto: Bucket, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    (tmp_path / "credentials").write_text("[mine]\naws_access_key_id = AK\naws_secret_access_key = SK\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    store = open_store(moto.url, "me", tmp_path / "cache")
    assert contents(store.fetch(store.publish(folder, "raw", "f1", "f1", {}))) == contents(folder)


def test_server_that_is_not_there_is_tried_again_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moto: Bucket, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setattr(objects, "RETRIES", {**objects.RETRIES, "max_retries": 1})
    monkeypatch.setattr(objects, "PAUSE_SECONDS", 0.01)
    with pytest.raises(StoreError, match="AWS_ENDPOINT_URL_S3"):
        open_store(moto.url, "me", tmp_path).find("raw", "f1")
    assert len([record for record in caplog.records if record.name == objects.logger.name]) == objects.TRIES - 1
