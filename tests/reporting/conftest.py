"""Adapters and evaluations of real trainings, published as the graph does."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from cli.conftest import dataset, finetune, publish
from projects import TestProject
from training.conftest import ALONE
from trainings import trained

from finetune_assets.artifacts.kinds import EVALUATIONS
from finetune_assets.config.loading import load_resolved
from finetune_assets.data.texts import PACKAGED as TEXTS
from finetune_assets.data.texts import read_texts
from finetune_assets.evaluation.compare import Comparison
from finetune_assets.evaluation.contenders import BASE, CHALLENGER, CHAMPION, Contender
from finetune_assets.sources.base_models import PACKAGED
from finetune_assets.store.artifacts import ArtifactRef

__all__ = ["dataset", "finetune", "publish", "trained"]
FOLDER = PACKAGED["demo-base"]


@pytest.fixture
def measure(project: TestProject, dataset: Callable[..., Path]) -> Callable[..., ArtifactRef]:
    """Evaluates an adapter, beside a champion if one is given, and publishes what was found."""

    def make(adapter: ArtifactRef, champion: ArtifactRef | None = None) -> ArtifactRef:
        folder = project.store.fetch(adapter)
        config = load_resolved(folder / "config.yaml")
        config.evaluation.generated_rows, config.evaluation.general_tokens = 2, 500
        texts = read_texts(TEXTS["demo-prose"])
        compared = Comparison(config, dataset(config.data.tokenization), "val", texts, [], print)
        contenders = [Contender(BASE, FOLDER, config), Contender(CHALLENGER, FOLDER, config, folder)]
        if champion:
            contenders.append(Contender.of_folder(CHAMPION, FOLDER, project.store.fetch(champion)))
        compared.run(contenders, ALONE.device)
        made = project.root / f"evaluation-{adapter.name[:8]}"
        made.mkdir()
        (made / "evaluation.json").write_text(json.dumps(compared.result()), encoding="utf-8")
        name = adapter.fingerprint[::-1]
        return project.store.publish(made, EVALUATIONS.folder, name, name, {"lora_adapter": adapter.fingerprint})

    return make


def aged(project: TestProject, ref: ArtifactRef, days: float) -> None:
    """Have an artifact be older than it is."""
    manifest = project.store.manifest(ref.kind, ref.name)
    assert manifest
    created = datetime.fromisoformat(manifest.created) - timedelta(days=days)
    key = f"{project.store.prefix(ref.kind, ref.name)}/manifest.json"
    project.store.objects.put(key, replace(manifest, created=created.isoformat()).to_json())
