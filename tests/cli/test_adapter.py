"""`finetune adapter` as a person types it."""

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from commands import run
from projects import TestProject
from servers.hub import TOKEN, Hub

from finetune_assets.artifacts.champions import Champions, Record
from finetune_assets.artifacts.kinds import EVALUATIONS
from finetune_assets.store.artifacts import ArtifactRef


def test_history_promote_and_roll_back(
    project: TestProject,
    publish: Callable[..., ArtifactRef],
    champion: ArtifactRef,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    second = publish("b", "training.seed=5")
    code, said, _ = run(capsys, "adapter", "promote", "demo", second.fingerprint[:8], "--reason", "I like it")
    assert code == 0
    assert "adapter_evaluation" in said, "it was not evaluated"
    champions = Champions(project.store, "demo")
    serving = champions.current()
    assert serving
    assert (serving.number, serving.adapter, serving.reason) == (2, second.fingerprint, "I like it")
    run(capsys, "adapter", "promote", "demo", second.fingerprint, "--reason", "again")
    assert champions.current() == serving, "it serves already"
    code, said, _ = run(capsys, "adapter", "rollback", "demo", "--reason", "it stutters")
    assert code == 0
    serving = champions.current()
    assert serving
    assert (serving.number, serving.adapter) == (3, champion.fingerprint)
    assert [*champions.withdrawn()] == [second.fingerprint]
    code, said, _ = run(capsys, "adapter", "history", "demo")
    assert [line.split()[0] for line in said.splitlines()[1:]] == ["1", "2", "3"]
    assert "I like it" in said
    assert "it stutters" in said
    code, said, _ = run(capsys, "adapter", "champions")
    assert champion.fingerprint[:12] in said
    code, said, _ = run(capsys, "adapter", "fetch", "demo", str(tmp_path / "out"))
    assert code == 0
    stored = project.store.fetch(champion)
    for path in stored.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("history", "dmo"), "dmo"),
        (("rollback", "demo", "--reason", "so"), "1"),
        (("rollback", "demo", "--reason", " "), ""),
        (("promote", "demo", "ffff", "--reason", "so"), "'ffff'"),
        (("fetch", "other", "folder"), "other"),
        (("fetch", "demo", "folder", "--with-index"), "data.retrieval"),
        (("verify", "."), "SHA256SUMS"),
        (("verify", "./nowhere"), "nowhere"),
        (("updates", "nothing"), "'nothing'"),
        (("promote", "dmo", "ffff", "--reason", "so"), "'demo'"),
    ],
)
def test_what_cannot_be_is_refused(
    project: TestProject,
    champion: ArtifactRef,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    told: str,
) -> None:
    code, _, err = run(capsys, "adapter", *arguments)
    assert code == 1
    assert told in err, "the name that is wrong, or what is lacking"
    assert [record.number for record in Champions(project.store, "demo").history()] == [1]


def test_an_adapter_that_was_evaluated_is_promoted_without_a_word(
    project: TestProject, publish: Callable[..., ArtifactRef], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    adapter = publish("a")
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "evaluation.json").write_text("{}")
    made_from = {"lora_adapter": adapter.fingerprint}
    project.store.publish(tmp_path / "evaluation", EVALUATIONS.folder, "e" * 64, "e" * 64, made_from)
    _, said, _ = run(capsys, "adapter", "promote", "demo", adapter.fingerprint, "--reason", "I like it")
    assert len(said.splitlines()) == 1


def test_an_adapter_of_another_experiment_is_promoted_with_a_word(
    project: TestProject, champion: ArtifactRef, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said, _ = run(
        capsys, "adapter", "promote", "smollm2-135m-dolly", champion.fingerprint, "--reason", "it was a try"
    )
    assert code == 0
    assert "demo" in said, "whose settings it was made with"
    assert Champions(project.store, "smollm2-135m-dolly").champion() == champion


def test_a_picture_has_a_kind_that_can_be_drawn(champion: ArtifactRef, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "adapter", "updates", "demo", "--plot", "x.xyz")
    assert code == 2
    assert all(part in err for part in ("x.xyz", ".png", ".svg", ".pdf"))


def test_a_copied_adapter_is_verified_and_says_where_it_is_from(
    project: TestProject, champion: ArtifactRef, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(project.store.fetch(champion), tmp_path / "copy"))
    code, said, _ = run(capsys, "adapter", "verify", str(copy))
    assert code == 0, said
    assert "Champion 1 of demo" in said

    weights = copy / "adapter_model.safetensors"
    weights.chmod(0o644)
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    (copy / "config.yaml").unlink()
    (copy / "extra.py").touch()
    code, said, _ = run(capsys, "adapter", "verify", str(copy))
    assert code == 1
    for told in (
        "adapter_model.safetensors",
        "config.yaml",
        "extra.py",
    ):
        assert any(line.startswith(f"{told}:") for line in said.splitlines())

    weights.write_bytes(bytes(damaged))
    (copy / "extra.py").unlink()
    (copy / "config.yaml").write_bytes((project.store.fetch(champion) / "config.yaml").read_bytes())
    sums = subprocess.run("sha256sum $(ls | grep -v SHA256SUMS)", shell=True, cwd=copy, capture_output=True, text=True)
    (copy / "SHA256SUMS").write_text(sums.stdout)
    code, said, _ = run(capsys, "adapter", "verify", str(copy))
    assert code == 1, "sums that were made to fit do not fit the store"
    assert said.count("adapter_model.safetensors:") == 1, "by the store's manifest alone"


def test_an_adapter_that_the_store_has_not_is_not_verified(
    project: TestProject, champion: ArtifactRef, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(project.store.fetch(champion), tmp_path / "copy"))
    shutil.rmtree(project.store_root)
    code, said, _ = run(capsys, "adapter", "verify", str(copy))
    assert code == 1
    assert project.store.url in said


def test_a_tampered_adapter_is_not_verified_by_what_another_namespace_published(
    project: TestProject,
    champion: ArtifactRef,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Mallory publishes the tampered files under the same fingerprint, in a namespace of his own."""
    copy = Path(shutil.copytree(project.store.fetch(champion), tmp_path / "copy"))
    weights = copy / "adapter_model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    sums = subprocess.run("sha256sum $(ls | grep -v SHA256SUMS)", shell=True, cwd=copy, capture_output=True, text=True)
    (copy / "SHA256SUMS").chmod(0o644)
    (copy / "SHA256SUMS").write_text(sums.stdout)
    fingerprint = champion.fingerprint
    theirs = replace(project, namespace="mallory").store
    theirs.publish(copy, "adapters", fingerprint, fingerprint, {"experiment": "demo"})
    code, said, _ = run(capsys, "adapter", "verify", str(copy))
    assert code == 1
    assert said.count("adapter_model.safetensors:") == 1
    assert "namespace tests" in said
    code, said, _ = run(capsys, "adapter", "verify", str(copy), "--namespace", "mallory")
    assert code == 0, "asked for, it says whose adapter it is"
    assert said.count("namespace mallory") == 2
    assert "Champion 1 of demo" not in said
    code, said, _ = run(capsys, "adapter", "verify", str(copy), "--namespace", "nobody")
    assert code == 1
    assert "nobody" in said


def test_no_date_chooses_among_several_adapters_of_one_fingerprint(
    project: TestProject, champion: ArtifactRef, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(project.store.fetch(champion), tmp_path / "copy"))
    fingerprint = champion.fingerprint
    project.store.publish(copy, "stacks", fingerprint, fingerprint, {"experiment": "demo"})
    code, _, err = run(capsys, "adapter", "verify", str(copy))
    assert code == 1
    assert f"tests/adapters/{fingerprint}" in err
    assert f"tests/stacks/{fingerprint}" in err
    manifest = project.store.manifest("adapters", fingerprint)
    assert manifest
    project.store.objects.delete([f"tests/stacks/{fingerprint}/manifest.json"])
    newer = replace(manifest, created="2999-01-01T00:00:00+00:00", files=())
    project.store.objects.put(f"tests/adapters/{'d' * 64}/manifest.json", newer.to_json())
    code, _, _ = run(capsys, "adapter", "verify", str(copy))
    assert code == 0, "a manifest in another artifact's place is unreadable"


def test_updates_are_shown_and_drawn(champion: ArtifactRef, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, said, _ = run(capsys, "adapter", "updates", "demo", "--plot", str(tmp_path / "updates.svg"))
    assert code == 0
    assert "model.layers.3.mlp.up_proj" in said
    settings = yaml.safe_load(said.partition("as settings of an experiment:\n\n")[2].partition("\n\nPlot")[0])
    assert settings["lora"]["rank"] >= 1
    assert "<svg" in (tmp_path / "updates.svg").read_text()


def test_the_champion_is_published_to_the_hub(
    project: TestProject,
    publish: Callable[..., ArtifactRef],
    hub: Hub,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    adapter = publish("a")
    measured = {"loss": 0.5, "perplexity": 1.6487, "exact_match": 0.75, "rouge_l": 0.8, "general_loss": 2.0}
    evaluation = tmp_path / "evaluation"
    evaluation.mkdir()
    (evaluation / "evaluation.json").write_text(
        f'{{"rows": 51, "contenders": {{"base": {str(measured).replace(chr(39), chr(34))}, '
        f'"challenger": {str(measured).replace(chr(39), chr(34))}}}}}'
    )
    project.store.publish(evaluation, EVALUATIONS.folder, "e" * 64, "e" * 64, {})
    record = Record("demo", adapter.fingerprint, "promoted", evaluation="e" * 64)
    Champions(project.store, "demo").promote(record, after=0)

    code, said, _ = run(capsys, "adapter", "publish", "demo", "me/towns")
    assert code == 0, code
    repo = hub.repos["me/towns"]
    files = repo.commits[repo.branches["main"]]
    assert f"{hub.url}/me/towns/commit/" in said
    stored = project.store.fetch(adapter)
    for path in stored.iterdir():
        if path.name not in ("README.md", "SHA256SUMS"):
            assert files[path.name] == path.read_bytes()
    header, _, text = files["README.md"].decode().removeprefix("---\n").partition("\n---\n")
    card = yaml.safe_load(header)
    assert card["base_model"] == "owner/base"
    assert card["library_name"] == "peft"
    metrics = {metric["type"]: metric["value"] for metric in card["model-index"][0]["results"][0]["metrics"]}
    assert metrics == {"loss": 0.5, "perplexity": 1.6487, "exact_match": 0.75, "rouge_l": 0.8}
    assert "| exact match | 75.0% | 75.0% |" in text

    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in files.items():
        (copy / name).write_bytes(content)
    code, said, _ = run(capsys, "adapter", "verify", str(copy))
    assert code == 0, said

    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    code, _, err = run(capsys, "adapter", "publish", "demo", "me/other")
    assert "me/other" in err
    assert "HF_TOKEN" in err
    assert "me/other" not in hub.repos
    assert "hf_wrong" not in err
