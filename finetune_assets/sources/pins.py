"""What a branch or tag of the Hub was found to mean when it was asked last.

Only the asset that brings something from the Hub asks it. All others go by this record, so that the steps of a run
agree while a branch moves, and what the store has stays usable while the Hub is down.
"""

import json
import logging
from datetime import UTC, datetime
from urllib.parse import quote

from finetune_assets.sources import hub
from finetune_assets.store.artifacts import ArtifactStore
from finetune_assets.store.errors import ArtifactMissing

logger = logging.getLogger(__name__)


class Pins:
    """One namespace's records, in the store.

    Args:
        store: The store.
        repo_type: What the repositories are.
        made_by: The asset that asks the Hub.
        asks_hub: Be that asset; otherwise go by the record.
    """

    def __init__(self, store: ArtifactStore, repo_type: hub.RepoType, made_by: str, asks_hub: bool = False) -> None:
        self.store, self.repo_type, self.made_by, self.asks_hub = store, repo_type, made_by, asks_hub
        self._answer: tuple[str, str, str] | None = None

    def commit_of(self, repo: str, revision: str) -> str:
        """The commit that a revision means; a whole commit means itself.

        Raises:
            ArtifactMissing: if the record has none, and it is not this one's to ask.
        """
        if hub.is_commit(revision):
            return revision
        return self._asked(repo, revision) if self.asks_hub else self._recorded(repo, revision)

    def _recorded(self, repo: str, revision: str) -> str:
        if commit := self._read(repo, revision):
            return commit
        raise ArtifactMissing(f"materialize {self.made_by} first: it asks the Hub which commit {repo}@{revision} is")

    def _asked(self, repo: str, revision: str) -> str:
        """What the Hub says; if it is down, the commit on record."""
        try:
            commit = hub.commit_of(repo, revision, self.repo_type)
        except Exception as e:
            recorded = self._read(repo, revision) if hub.is_down(e) else None
            if recorded is None:
                raise
            logger.warning("Hub unreachable (%s); using %s@%s from the last request", e, repo, recorded)
            return recorded
        self._answer = repo, revision, commit
        return commit

    def record(self) -> None:
        """Record what the Hub has said, if it was asked: now that the store has what that stands for."""
        if self._answer is None:
            return
        repo, revision, commit = self._answer
        if commit != self._read(repo, revision):
            record = {"commit": commit, "asked": datetime.now(UTC).isoformat(timespec="seconds")}
            self.store.objects.put(self._key(repo, revision), json.dumps(record).encode())

    def _read(self, repo: str, revision: str) -> str | None:
        try:
            commit = json.loads(self.store.objects.get(self._key(repo, revision)))["commit"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return commit if hub.is_commit(str(commit)) else None

    def _key(self, repo: str, revision: str) -> str:
        return f"{self.store.namespace}/pins/{self.repo_type}s/{repo}/{quote(revision, safe='')}.json"
