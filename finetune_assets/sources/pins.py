"""Records the commit that a branch or tag on the Hub had at the last request, and the hashes of a commit's files.

Only the asset that imports from the Hub sends requests. All others use this record, so that the steps of a run agree
while a branch moves, and artifacts in the store remain usable while the Hub is down.
"""

import json
import logging
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from finetune_assets.sources import hub
from finetune_assets.store.artifacts import ArtifactStore
from finetune_assets.store.errors import ArtifactMissing, UnreadableObject
from finetune_assets.store.json_object import MOST_BYTES, InvalidJson, parse_object

logger = logging.getLogger(__name__)


class Pins:
    """The commit records of one namespace, in the store.

    Args:
        store: The store.
        repo_type: Type of the repositories.
        made_by: Asset that sends requests to the Hub.
        asks_hub: Send requests to the Hub, as that asset; otherwise use only the records.
    """

    def __init__(self, store: ArtifactStore, repo_type: hub.RepoType, made_by: str, asks_hub: bool = False) -> None:
        self.store, self.repo_type, self.made_by, self.asks_hub = store, repo_type, made_by, asks_hub
        self._answers: dict[tuple[str, str], str] = {}

    def commit_of(self, repo: str, revision: str) -> str:
        """The commit of a revision; a full commit hash is returned unchanged.

        Raises:
            ArtifactMissing: if no commit is recorded and `asks_hub` is false.
        """
        if hub.is_commit(revision):
            return revision
        return self._requested(repo, revision) if self.asks_hub else self._recorded(repo, revision)

    def _recorded(self, repo: str, revision: str) -> str:
        if commit := self._read(repo, revision):
            return commit
        raise ArtifactMissing(
            f"no commit recorded for {repo}@{revision}; materialize {self.made_by} first, which resolves it on the Hub"
        )

    def _requested(self, repo: str, revision: str) -> str:
        """The commit on the Hub; if the Hub is down, the recorded commit."""
        try:
            commit = hub.commit_of(repo, revision, self.repo_type)
        except Exception as e:
            recorded = self._read(repo, revision) if hub.is_down(e) else None
            if recorded is None:
                raise
            logger.warning("Hub unreachable (%s); using %s@%s from the last request", e, repo, recorded)
            return recorded
        self._answers[repo, revision] = commit
        return commit

    def record(self) -> None:
        """Record the commits of all requests. Call this once the store has the artifacts of these commits."""
        for (repo, revision), commit in self._answers.items():
            if commit != self._read(repo, revision):
                record = {"commit": commit, "asked": datetime.now(UTC).isoformat(timespec="seconds")}
                self.store.objects.put(self._key(repo, revision), json.dumps(record).encode())

    def hashes(self, repo: str, commit: str) -> dict[str, str] | None:
        """Recorded sha256 of the files of a commit that are in the store, by path; None if they are not recorded."""
        files = self._content(repo, commit).get("sha256")
        if not isinstance(files, dict) or not all(_is_sha256(digest) for digest in files.values()):
            return None
        return files

    def record_hashes(self, repo: str, commit: str, hashes: Mapping[str, str]) -> None:
        """Record the hashes of a commit's files, which were compared with those on the Hub."""
        # The record does not name the commit: garbage collection keeps base models whose commit a record names
        self.store.objects.put(self._key(repo, commit), json.dumps({"sha256": dict(hashes)}).encode())

    def _read(self, repo: str, revision: str) -> str | None:
        commit = self._content(repo, revision).get("commit")
        return commit if isinstance(commit, str) and hub.is_commit(commit) else None

    def _content(self, repo: str, revision: str) -> dict[str, Any]:
        """Content of a record; empty if it does not exist or is unreadable, so that the Hub is asked."""
        key = self._key(repo, revision)
        try:
            return parse_object(self.store.objects.get(key, MOST_BYTES))
        except FileNotFoundError:
            return {}
        except (InvalidJson, UnreadableObject) as e:
            logger.warning("%s/%s: unreadable record ignored (%s)", self.store.url, key, e)
            return {}

    def _key(self, repo: str, revision: str) -> str:
        return f"{self.store.namespace}/pins/{self.repo_type}s/{repo}/{quote(revision, safe='')}.json"


def _is_sha256(digest: Any) -> bool:
    return isinstance(digest, str) and bool(re.fullmatch("[0-9a-f]{64}", digest))
