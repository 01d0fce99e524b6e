"""What a branch was found to mean: recorded once the store has it, and used while the Hub is down."""

from pathlib import Path

import pytest
from servers.hub import Hub

from finetune_assets.sources.base_models import BaseModelError
from finetune_assets.sources.hub import explained
from finetune_assets.sources.pins import Pins
from finetune_assets.store.artifacts import ArtifactStore, open_store
from finetune_assets.store.errors import ArtifactMissing


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return open_store(f"file://{tmp_path}/store", "me", tmp_path / "cache")


def asked(store: ArtifactStore, record: bool = True, revision: str = "main") -> str:
    pins = Pins(store, "dataset", made_by="dolly_raw", asks_hub=True)
    commit = pins.commit_of("owner/rows", revision)
    if record:
        pins.record()
    return commit


def test_last_answer_is_used_while_the_hub_is_down(
    hub: Hub, store: ArtifactStore, caplog: pytest.LogCaptureFixture
) -> None:
    commit = hub.add("datasets/owner/rows", {"a.jsonl": b"{}"})
    assert asked(store) == commit
    for status in (500, 503, 429):
        hub.failing = status
        assert asked(store) == commit
    assert commit in caplog.text
    hub.failing = None
    moved = hub.add("datasets/owner/rows", {"a.jsonl": b"{} "})
    assert asked(store) == moved != commit
    assert Pins(store, "dataset", "dolly_raw").commit_of("owner/rows", "main") == moved


def test_answer_counts_only_once_the_store_has_what_it_stands_for(hub: Hub, store: ArtifactStore) -> None:
    commit = hub.add("datasets/owner/rows", {"a.jsonl": b"{}"})
    asked(store)
    hub.add("datasets/owner/rows", {"a.jsonl": b"{} "})
    asked(store, record=False)  # and the download fails
    hub.failing = 500
    assert asked(store) == commit


@pytest.mark.parametrize("status", [401, 403])
def test_refusal_is_not_taken_for_a_hub_that_is_down(hub: Hub, store: ArtifactStore, status: int) -> None:
    hub.add("datasets/owner/rows", {"a.jsonl": b"{}"})
    asked(store)
    hub.failing = status
    with pytest.raises(BaseModelError), explained(BaseModelError, "it", "owner/rows", ""):
        asked(store)


def test_without_an_answer_the_hub_must_be_up(hub: Hub, store: ArtifactStore) -> None:
    hub.failing = 500
    with pytest.raises(BaseModelError, match="500"), explained(BaseModelError, "it", "owner/rows", ""):
        asked(store)
    with pytest.raises(ArtifactMissing, match="dolly_raw"):
        Pins(store, "dataset", "dolly_raw").commit_of("owner/rows", "main")


def test_branches_with_a_slash_and_namespaces_are_kept_apart(hub: Hub, store: ArtifactStore, tmp_path: Path) -> None:
    commit = hub.add("datasets/owner/rows", {"a.jsonl": b"{}"}, branch="v1")
    store.objects.put("me/pins/datasets/owner/rows/refs%2Fpr%2F1.json", b"not a record")
    with pytest.raises(ArtifactMissing):
        Pins(store, "dataset", "dolly_raw").commit_of("owner/rows", "refs/pr/1")
    assert asked(store, revision="v1") == commit
    yours = open_store(store.url, "you", tmp_path / "cache")
    with pytest.raises(ArtifactMissing):
        Pins(yours, "dataset", "dolly_raw").commit_of("owner/rows", "v1")
