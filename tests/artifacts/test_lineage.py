"""What an adapter has not seen, by what it was made from."""

import shutil
from pathlib import Path

import pytest
import yaml
from paths import ROOT
from projects import TestProject

from finetune_assets.artifacts.kinds import ADAPTERS, EVALUATIONS, STACKS
from finetune_assets.artifacts.layout import CHAMPION_AT_START, HELD_BACK
from finetune_assets.data.rows import HoldoutRows
from finetune_assets.errors import UserError
from finetune_assets.resources.project import Project
from finetune_assets.store.artifacts import ArtifactRef
from finetune_assets.store.errors import ArtifactMissing


@pytest.fixture
def adapter(project: TestProject, tmp_path: Path):  # type: ignore[no-untyped-def]
    def publish(kind: str, held_back: HoldoutRows | None) -> ArtifactRef:
        (tmp_path / "adapter").mkdir(exist_ok=True)
        (tmp_path / "adapter" / "adapter_model.safetensors").touch()
        name = f"{len(project.published(kind)):064}"
        made_from = {HELD_BACK: vars(held_back)} if held_back else {}
        return project.store.publish(tmp_path / "adapter", kind, name, name, made_from)

    return publish


def test_the_shipped_demo_is_trained_on_the_packaged_rows_alone(
    project: TestProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(ROOT / "configs" / "experiments" / "demo.yaml", project.configs / "experiments")
    mine = project.root / "mine.jsonl"
    mine.write_text('{"instruction": "Mine?", "response": "Mine."}\n')
    (project.configs / "raw_data.yaml").write_text(f"source: {mine}\n")
    with pytest.raises(ArtifactMissing, match="FINETUNE_RAW_DATA=sample"):
        Project().lineage("demo").selected_sources()
    monkeypatch.setenv("FINETUNE_RAW_DATA", "sample")
    with pytest.raises(ArtifactMissing, match="dolly_raw"):
        Project().lineage("demo").selected_sources()
    assert Project().lineage("demo").source_names() == ["sample"]


def test_an_adapter_has_seen_what_those_before_it_have(project: TestProject, adapter) -> None:  # type: ignore[no-untyped-def]
    lineage = Project().lineage("demo")
    own = lineage.held_back()
    assert own == HoldoutRows("finetune-assets", 0.05, 0.1)
    with_more = adapter(ADAPTERS.folder, HoldoutRows(own.salt, 0.5, 0.5))
    with_less = adapter(STACKS.folder, HoldoutRows(own.salt, 0.02, 0.2))
    assert lineage.held_back(with_more) == own
    assert lineage.held_back(with_more, with_less) == HoldoutRows(own.salt, 0.02, 0.1)
    assert lineage.held_back(adapter(ADAPTERS.folder, HoldoutRows("another", 0.05, 0.1))) == HoldoutRows(
        own.salt, 0.0, 0.0
    )
    assert lineage.held_back(adapter(ADAPTERS.folder, None)) == own, "from elsewhere"


def test_a_folder_that_was_copied_out_still_says_it(project: TestProject, tmp_path: Path) -> None:
    folder = tmp_path / "copied"
    folder.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / name).write_text("{}")
    for text, wanted in (
        ('{"held_back": {"salt": "finetune-assets", "gate": 0.01, "val": 0.01}}', 0.01),
        ('{"held_back": 1}', 0.05),
        ("[]", 0.05),
        ("{", 0.05),
    ):
        (folder / "provenance.json").write_text(text)
        lineage = Project(overrides=[f"training.warm_start={folder}"]).lineage("demo")
        begun = lineage.import_external_inputs()["warm_start"]
        assert lineage.held_back(begun).gate == wanted


def test_what_an_evaluation_needs_from_outside_is_named_where_it_is_missing(project: TestProject) -> None:
    def lineage(override: str):  # type: ignore[no-untyped-def]
        return Project(overrides=[override]).lineage("demo")

    assert lineage("evaluation.general_tokens=0").general_text() is None
    with pytest.raises(UserError, match=r"evaluation\.general_text: './gone\.txt'"):
        lineage("evaluation.general_text=./gone.txt").general_text()
    settings = yaml.safe_load((project.configs / "experiments" / "demo.yaml").read_text())

    def with_tasks(folder: str):  # type: ignore[no-untyped-def]
        evaluation = settings["evaluation"] | {"lm_eval": {"tasks": ["mine"], "folder": folder}}
        project.write_experiment("demo", yaml.safe_dump(settings | {"evaluation": evaluation}))
        return Project().lineage("demo")

    with pytest.raises(UserError, match=r"evaluation\.lm_eval\.folder: .*gone"):
        with_tasks("./gone").lm_eval_tasks()
    (project.root / "tasks").mkdir()
    (project.root / "tasks" / "mine.yaml").write_text("task: mine")
    once, twice = (with_tasks("./tasks") for _ in range(2))
    once.fingerprint(EVALUATIONS, lora_adapter=ArtifactRef(ADAPTERS.folder, "a", "f" * 64, "", 0, 0))
    assert project.published("imports") == [], "computing an identity publishes nothing"
    assert once.import_external_inputs() == twice.import_external_inputs()
    assert len(project.published("imports")) == 2, "the tasks, and the demo's general text"
    with pytest.raises(UserError, match=r"training\.warm_start: 'ab12'"):
        lineage("training.warm_start=ab12").warm_start()


def test_a_training_that_begins_with_the_champion_is_not_repeated_from_itself(
    project: TestProject, tmp_path: Path
) -> None:
    """Promoting its adapter changes the champion, but not the adapter that its inputs lead to; new rows do."""
    settings = "training.objective=dpo", "training.preference.reference=champion", "training.warm_start=champion"
    lineage = Project(overrides=[*settings]).lineage("demo")
    upstream = {
        asset: ArtifactRef(kind, asset, digit * 64, "", 0, 0)
        for asset, kind, digit in (("tokenized_dataset", "tokenized", "1"), ("cached_base_model", "base-models", "2"))
    }
    later = {**upstream, "tokenized_dataset": ArtifactRef("tokenized", "later", "3" * 64, "", 0, 0)}
    (tmp_path / "adapter_model.safetensors").touch()

    def train(known: dict[str, ArtifactRef]) -> ArtifactRef:
        begun, name = lineage.champion_at_start(**known), lineage.fingerprint(ADAPTERS, **known)
        assert begun == lineage.warm_start(**known) == lineage.reference(**known)
        made_from = {CHAMPION_AT_START: begun.fingerprint} if begun else {}
        return project.store.publish(tmp_path, ADAPTERS.folder, name, name, made_from)

    first = train(upstream)
    assert lineage.champion_at_start(**upstream) is None
    lineage.champions.promote_by_hand(first, "a test", "tests")
    assert train(upstream) == first
    second = train(later)
    assert lineage.champion_at_start(**later) == first
    lineage.champions.promote_by_hand(second, "a test", "tests")
    assert train(later) == second
    assert lineage.champion_at_start(**later) == first
    assert lineage.champion_at_start(**upstream) == second
    assert train(upstream) not in (first, second)


def test_a_stack_needs_champions_of_one_base_model(project: TestProject, adapter) -> None:  # type: ignore[no-untyped-def]
    lineage = Project(overrides=["stack={adapters: {demo: 0.5, llama-7b-int8: 0.5}}"]).lineage("demo")
    base = ArtifactRef("base-models", "a/b", "f" * 64, "", 0, 0)
    with pytest.raises(UserError, match="demo has no champion"):
        lineage.stacked_from(base)
    ref = adapter(ADAPTERS.folder, None)
    lineage.champions.promote_by_hand(ref, "a test", "tests")
    with pytest.raises(UserError, match="another base model"):
        lineage.stacked_from(base)
