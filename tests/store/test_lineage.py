"""What an adapter has not seen, by what it was made from."""

from pathlib import Path

import pytest
from projects import TestProject

from finetune_assets.contents import HELD_BACK
from finetune_assets.data.rows import HeldBack
from finetune_assets.resources.project import Project
from finetune_assets.store.artifacts import ADAPTERS, STACKS, ArtifactRef


@pytest.fixture
def adapter(project: TestProject, tmp_path: Path):  # type: ignore[no-untyped-def]
    def publish(kind: str, held_back: HeldBack | None) -> ArtifactRef:
        (tmp_path / "adapter").mkdir(exist_ok=True)
        (tmp_path / "adapter" / "adapter_model.safetensors").touch()
        name = f"{len(project.published(kind)):064}"
        made_from = {HELD_BACK: vars(held_back)} if held_back else {}
        return project.store.publish(tmp_path / "adapter", kind, name, name, made_from)

    return publish


def test_an_adapter_has_seen_what_those_before_it_have(project: TestProject, adapter) -> None:  # type: ignore[no-untyped-def]
    lineage = Project().lineage("demo")
    own = lineage.held_back()
    assert own == HeldBack("finetune-assets", 0.05, 0.1)
    with_more = adapter(ADAPTERS, HeldBack(own.salt, 0.5, 0.5))
    with_less = adapter(STACKS, HeldBack(own.salt, 0.02, 0.2))
    assert lineage.held_back(with_more) == own
    assert lineage.held_back(with_more, with_less) == HeldBack(own.salt, 0.02, 0.1)
    assert lineage.held_back(adapter(ADAPTERS, HeldBack("another", 0.05, 0.1))) == HeldBack(own.salt, 0.0, 0.0)
    assert lineage.held_back(adapter(ADAPTERS, None)) == own, "from elsewhere"


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
        begun = lineage.warm_start()
        assert begun
        assert lineage.held_back(begun).gate == wanted
