"""`finetune-adapter` as a person types it."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from projects import TestProject
from servers.hub import TOKEN, Hub

from finetune_assets.store.artifacts import EVALUATIONS, ArtifactRef
from finetune_assets.store.champions import Champions, Record
from finetune_assets.tools import adapter as tool


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int | str | None, str]:
    """The exit code (or what was said instead), and what was printed."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        tool.main(arguments)
    return ended.value.code, capsys.readouterr().out


def test_history_promote_and_roll_back(
    project: TestProject,
    publish: Callable[..., ArtifactRef],
    champion: ArtifactRef,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    second = publish("b", "training.seed=5")
    code, said = run(capsys, "promote", "demo", second.fingerprint[:8], "--reason", "I like it")
    assert code == 0
    assert "is the champion of demo (record 2)" in said
    assert "note: " not in said
    assert "already" in run(capsys, "promote", "demo", second.fingerprint, "--reason", "again")[1]
    code, said = run(capsys, "rollback", "demo", "--reason", "it stutters")
    assert code == 0
    assert "record 3" in said
    assert "is not promoted by itself any more" in said
    code, said = run(capsys, "history", "demo")
    assert [line.split()[0] for line in said.splitlines()[1:]] == ["1", "2", "3"]
    assert "I like it" in said
    assert "to 1: it stutters" in said
    code, said = run(capsys, "champions")
    assert champion.fingerprint[:12] in said
    code, said = run(capsys, "fetch", "demo", str(tmp_path / "out"))
    assert code == 0
    stored = project.store.fetch(champion)
    for path in stored.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("history", "dmo"), "dmo: no adapter was promoted yet"),
        (("rollback", "demo", "--reason", "so"), "champion 1 is the first"),
        (("rollback", "demo", "--reason", " "), "say why"),
        (("promote", "demo", "ffff", "--reason", "so"), "'ffff': no adapter of that name"),
        (("fetch", "other", "folder"), "other has no champion yet"),
        (("verify", "."), "holds no SHA256SUMS"),
        (("verify", "./nowhere"), "nowhere: no such folder"),
        (("updates", "nothing"), "'nothing': no experiment with a champion, no folder of an adapter, and"),
        (("promote", "dmo", "ffff", "--reason", "so"), "no experiment 'dmo'; did you mean 'demo'?"),
    ],
)
def test_what_cannot_be_is_told(
    champion: ArtifactRef, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], told: str
) -> None:
    code, _ = run(capsys, *arguments)
    assert told in str(code)


def test_an_adapter_of_another_experiment_is_promoted_with_a_word(
    champion: ArtifactRef, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = run(capsys, "promote", "smollm2-135m-dolly", champion.fingerprint, "--reason", "it was a try")
    assert code == 0
    assert "was made for experiment demo, with its settings" in said


def test_a_picture_has_a_kind_that_can_be_drawn(champion: ArtifactRef, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tool.main(["updates", "demo", "--plot", "x.xyz"])
    assert "'x.xyz' does not end in .png, .svg or .pdf" in capsys.readouterr().err


def test_a_copied_adapter_is_verified_and_says_where_it_is_from(
    project: TestProject, champion: ArtifactRef, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(project.store.fetch(champion), tmp_path / "copy"))
    code, said = run(capsys, "verify", str(copy))
    assert code == 0, said
    assert "verified" in said
    assert "champion 1 of demo: promoted by hand" in said

    weights = copy / "adapter_model.safetensors"
    weights.chmod(0o644)
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    (copy / "config.yaml").unlink()
    (copy / "extra.py").touch()
    code, said = run(capsys, "verify", str(copy))
    assert code == 1
    for told in (
        "adapter_model.safetensors: differs from SHA256SUMS",
        "adapter_model.safetensors: differs from the store's manifest",
        "config.yaml: missing",
        "extra.py: not in",
        "not verified",
    ):
        assert told in said

    weights.write_bytes(bytes(damaged))
    (copy / "extra.py").unlink()
    (copy / "config.yaml").write_bytes((project.store.fetch(champion) / "config.yaml").read_bytes())
    sums = subprocess.run("sha256sum $(ls | grep -v SHA256SUMS)", shell=True, cwd=copy, capture_output=True, text=True)
    (copy / "SHA256SUMS").write_text(sums.stdout)
    code, said = run(capsys, "verify", str(copy))
    assert code == 1, "sums that were made to fit do not fit the store"
    assert "differs from SHA256SUMS" not in said
    assert "adapter_model.safetensors: differs from the store's manifest" in said


def test_an_adapter_that_the_store_has_not_is_not_verified(
    project: TestProject, champion: ArtifactRef, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(project.store.fetch(champion), tmp_path / "copy"))
    shutil.rmtree(project.store_root)
    code, said = run(capsys, "verify", str(copy))
    assert code == 1
    assert "holds no adapter of its fingerprint" in said


def test_updates_are_shown_and_drawn(champion: ArtifactRef, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, said = run(capsys, "updates", "demo", "--plot", str(tmp_path / "updates.svg"))
    assert code == 0
    assert "model.layers.3.mlp.up_proj" in said
    settings = yaml.safe_load(said.partition("as settings of an experiment:\n\n")[2].partition("\n\ndrawn")[0])
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
    project.store.publish(evaluation, EVALUATIONS, "e" * 64, "e" * 64, {})
    record = Record("demo", adapter.fingerprint, "promoted", evaluation="e" * 64)
    Champions(project.store, "demo").promote(record, after=0)

    code, said = run(capsys, "publish", "demo", "me/towns")
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
    assert "| Exact match | 0.7500 | 0.7500 |" in text

    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in files.items():
        (copy / name).write_bytes(content)
    code, said = run(capsys, "verify", str(copy))
    assert code == 0, said

    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    code, _ = run(capsys, "publish", "demo", "me/other")
    assert "publish to 'me/other': the Hub does not accept HF_TOKEN (401)" in str(code)
    assert "hf_wrong" not in str(code)
