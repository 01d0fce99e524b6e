"""Adapters that were trained, evaluated and promoted on the packaged model, and servers of vLLM's protocol."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from projects import TestProject
from raw import ingest
from servers.vllm import Models, Vllm, running
from training.conftest import ALONE, BASE, base_model, configured, dataset
from trainings import Train, trained

from finetune_assets.artifacts.champions import PROMOTED, Champions, Record
from finetune_assets.artifacts.kinds import ADAPTERS, EVALUATIONS, RAW, TOKENIZED
from finetune_assets.artifacts.layout import EVALUATION, ROWS
from finetune_assets.data.prepare import prepare_dataset
from finetune_assets.data.tokenization import load_tokenizer
from finetune_assets.evaluation.compare import Comparison
from finetune_assets.evaluation.contenders import Contender
from finetune_assets.resources.project import Project
from finetune_assets.serving.rollout import Rollout, Serving
from finetune_assets.serving.servers import servers_of
from finetune_assets.sources.local import SAMPLE
from finetune_assets.store.artifacts import ArtifactRef

__all__ = ["base_model", "dataset", "trained"]
WRONG = "{{ bos_token }}### Question: {{ messages[-1].content }}\n### Response:"
"""A chat template of other prompts."""
ADAPTER_OF = {"a": "training.seed=1", "b": "training.seed=2", "c": "training.seed=3"}
STRONG = ("training.max_steps=8", "training.macro_batch_size=2", "training.micro_batch_size=2")


@cache
def models() -> Models:
    return Models()


@pytest.fixture
def vllm() -> Iterator[Vllm]:
    with running(models()) as server:
        yield server


@dataclass
class World:
    """A project whose adapters can be promoted and served.

    Attributes:
        project: The project.
        publish: Publishes the adapter of a letter, with its evaluation against the adapter of another letter.
    """

    project: TestProject
    publish: Callable[[str, str | None], tuple[ArtifactRef, str]]

    def promote(self, letter: str, against: str | None = None, experiment: str = "demo") -> Record:
        """Make an adapter the champion, as its evaluation had decided."""
        adapter, evaluation = self.publish(letter, against)
        champions = Champions(self.project.store, experiment)
        current = champions.current()
        record = Record(experiment, adapter.fingerprint, PROMOTED, evaluation=evaluation, by="tests")
        return champions.promote(record, current.number if current else 0)

    def configure(self, *servers: str, experiment: str = "demo", **serving: Any) -> None:
        """Write the group `serving` into an experiment's file, a copy of the demo's."""
        path = self.project.configs / "experiments" / "demo.yaml"
        settings = yaml.safe_load(path.read_text())
        settings["serving"] = {"servers": [*servers], "verify_rows": 12, **serving}
        (path.parent / f"{experiment}.yaml").write_text(yaml.safe_dump(settings))

    def serve(self, experiment: str = "demo") -> Rollout:
        """Serve the champion without a graph."""
        lineage = Project().lineage(experiment)
        servers, champion = servers_of(lineage.experiment.config, self.project.root), lineage.champions.current()
        assert servers
        assert champion
        return Serving(lineage, servers, print, "tests").serve(champion)


@pytest.fixture(scope="session")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenized dataset with more gate rows than that of the trainings, which are split in the same way."""
    folder, data = tmp_path_factory.mktemp("gate"), configured("data.num_samples=400").data
    rows = ingest(tmp_path_factory.mktemp("rows"), SAMPLE)
    prepare_dataset(rows, load_tokenizer(str(BASE)), data, "salt", folder)
    return folder


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    """Folders of evaluations, each made once."""
    return {}


@pytest.fixture
def world(
    project: TestProject,
    trained: Train,
    gate: Path,
    evaluated: dict[Any, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> World:
    """A project with the raw data and the dataset of the adapters in its store."""
    store, raw = project.store, project.root / "raw"
    ingest(raw, SAMPLE)
    store.publish(raw, RAW.folder, "1" * 64, "1" * 64, {"source": "sample"})
    rows = gate
    store.publish(rows, TOKENIZED.folder, "2" * 64, "2" * 64, {"dolly_raw": "1" * 64})

    def adapter_of(letter: str) -> Path:
        names = {"experiment": "demo", "fingerprint": letter.encode().hex().ljust(64, "0")}
        return trained(*STRONG, ADAPTER_OF[letter], **names).job.output

    def evaluate(letter: str, against: str | None) -> Path:
        if (letter, against) not in evaluated:
            folder = tmp_path_factory.mktemp("evaluation")
            config = configured("evaluation.generated_rows=0", "evaluation.general_tokens=0")
            comparison = Comparison(config, rows, "gate", [], [], print)
            contenders = [Contender("base", BASE, config), Contender("challenger", BASE, config, adapter_of(letter))]
            if against:
                contenders.append(Contender("champion", BASE, config, adapter_of(against)))
            comparison.run(contenders, ALONE.device)
            pq.write_table(pa.table(comparison.table()), folder / ROWS)
            (folder / EVALUATION).write_text(json.dumps(comparison.result()))
            evaluated[letter, against] = folder
        return evaluated[letter, against]

    def publish(letter: str, against: str | None) -> tuple[ArtifactRef, str]:
        fingerprint = letter.encode().hex().ljust(64, "0")
        folder = project.root / f"adapter-{letter}"
        if not folder.exists():
            shutil.copytree(adapter_of(letter), folder)
        made_from = {"experiment": "demo", "tokenized_dataset": "2" * 64, "fingerprint": fingerprint}
        adapter = store.find(ADAPTERS.folder, fingerprint) or store.publish(
            folder, ADAPTERS.folder, fingerprint, fingerprint, made_from
        )
        name = f"{letter}{against or ''}".encode().hex().ljust(64, "e")
        if not store.find(EVALUATIONS.folder, name):
            champion = against.encode().hex().ljust(64, "0") if against else None
            made_from = {"lora_adapter": fingerprint, "split": "gate", "experiment": "demo", "champion": champion}
            store.publish(evaluate(letter, against), EVALUATIONS.folder, name, name, made_from)
        return adapter, name

    return World(project, publish)
