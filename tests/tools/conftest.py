"""An adapter that serves, in a project of its own."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from projects import TestProject
from training.conftest import dataset, finetune

from finetune_assets.store.artifacts import ADAPTERS, ArtifactRef
from finetune_assets.store.champions import Champions
from finetune_assets.training.recipe import LoraFinetune

__all__ = ["dataset", "finetune"]


@pytest.fixture
def publish(project: TestProject, finetune: Callable[..., LoraFinetune]) -> Callable[..., ArtifactRef]:
    """Trains an adapter and publishes it."""

    def make(name: str, *overrides: str, experiment: str = "demo") -> ArtifactRef:
        run = finetune(*overrides, name=name)
        fingerprint = name.encode().hex().ljust(64, "0")
        own = {"fingerprint": fingerprint, "experiment": experiment, "base_model": "owner/base", "revision": "c" * 40}
        run.job = replace(run.job, made_from={**run.job.made_from, **own})
        run.run()
        return project.store.publish(run.job.output, ADAPTERS, fingerprint, fingerprint, dict(run.job.made_from))

    return make


@pytest.fixture
def champion(project: TestProject, publish: Callable[..., ArtifactRef]) -> ArtifactRef:
    adapter = publish("a")
    Champions(project.store, "demo").promote_by_hand(adapter, "the first", "tests")
    return adapter
