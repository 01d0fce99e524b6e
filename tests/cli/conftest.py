"""An adapter that serves, in a project of its own."""

from collections.abc import Callable

import pytest
from projects import TestProject
from training.conftest import dataset, finetune
from trainings import Train, trained

from finetune_assets.artifacts.champions import Champions
from finetune_assets.artifacts.kinds import ADAPTERS
from finetune_assets.store.artifacts import ArtifactRef

__all__ = ["dataset", "finetune", "trained"]


@pytest.fixture
def publish(project: TestProject, trained: Train) -> Callable[..., ArtifactRef]:
    """Publishes an adapter, which is trained once for all tests that want it with the same settings."""

    def make(name: str, *overrides: str, experiment: str = "demo") -> ArtifactRef:
        fingerprint = name.encode().hex().ljust(64, "0")
        own = {"fingerprint": fingerprint, "experiment": experiment, "base_model": "owner/base", "revision": "c" * 40}
        run = trained(*overrides, **own)
        return project.store.publish(run.job.output, ADAPTERS.folder, fingerprint, fingerprint, dict(run.job.made_from))

    return make


@pytest.fixture
def champion(project: TestProject, publish: Callable[..., ArtifactRef]) -> ArtifactRef:
    adapter = publish("a")
    Champions(project.store, "demo").promote_by_hand(adapter, "the first", "tests")
    return adapter
