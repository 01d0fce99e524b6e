"""A champion is loaded under a name of its own, verified, named by the alias, and rolled back without moving bytes."""

import json
import shutil
import threading
import time
from pathlib import Path

import pytest
import yaml
from commands import run
from integration.graph import Graph
from servers.vllm import Vllm, running
from serving.conftest import World, models

from finetune_assets.artifacts.champions import Champions
from finetune_assets.errors import UserError
from finetune_assets.serving import rollout as rollouts
from finetune_assets.serving.state import ROLLED_BACK, SERVES, ServedRecords
from finetune_assets.serving.vllm import VllmServer

LOADS = "POST /v1/load_lora_adapter"


def loads(vllm: Vllm) -> int:
    return sum(request.startswith(LOADS) for request in vllm.requests)


def alias(folder: Path) -> str:
    return str(json.loads((folder / "demo.json").read_text())["serves"])


def test_a_champion_is_served_verified_and_rolled_back(
    world: World, vllm: Vllm, capsys: pytest.CaptureFixture[str]
) -> None:
    """The asset in a graph, then the command line: the one path of `make test`."""
    world.configure(vllm.url, "folder:./adapters")
    folder, graph = world.project.root / "adapters", Graph()
    world.promote("a")
    first = graph.run("served_adapter")
    assert first.success, first.log
    name = str(first.metadata("served_adapter")["serves"])
    assert (name.rpartition("-")[0], alias(folder)) == ("demo-1", name)
    (check,) = first.result.get_asset_check_evaluations()
    numbers = {key: entry.value for key, entry in check.metadata.items()}
    assert numbers["distance_to_challenger"] < 1e-4
    assert numbers["distance_to_base"] > 1
    assert (numbers["precision"], numbers["rows"], numbers["chat_rows"]) == ("float32", 12, 12)

    world.promote("b", against="a")
    vllm.answers_as = ""
    failed = graph.run("served_adapter")
    assert not failed.success
    assert "base" in failed.failures["served_adapter"]
    assert [*vllm.adapters] == [name]
    assert alias(folder) == name
    vllm.well()
    second = graph.run("served_adapter")
    assert second.success, second.log
    assert second.metadata("served_adapter")["previous"] == name
    newer = alias(folder)
    assert {*vllm.adapters} == {name, newer}
    assert graph.run("served_adapter").metadata("served_adapter")["cache_hit"], "nothing is moved again"

    before, times = loads(vllm), {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    began = time.monotonic()
    code, _, _ = run(capsys, "adapter", "rollback", "demo", "--reason", "a test")
    assert code == 0
    assert time.monotonic() - began < 2
    assert alias(folder) == name
    assert loads(vllm) == before
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == times
    actions = [record.action for record in ServedRecords(world.project.store, "demo").history()]
    assert actions == [SERVES, SERVES, ROLLED_BACK]


@pytest.mark.system
def test_the_adapter_before_stays_loaded_and_the_one_before_it_is_unloaded(world: World, vllm: Vllm) -> None:
    world.configure(vllm.url, "folder:./adapters")
    names = []
    for letter, against in (("a", None), ("b", "a"), ("c", "b")):
        world.promote(letter, against)
        names.append(world.serve().name)
    assert {*vllm.adapters} == {*names[1:]}
    folder = world.project.root / "adapters"
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {*names[1:]}
    for file, weights in (("demo.gateway.yaml", {names[2]: 100}), ("demo.canary.yaml", {names[1]: 90, names[2]: 10})):
        manifest = yaml.safe_load((folder / file).read_text())
        assert manifest["kind"] == "InferenceModelRewrite"
        (rule,) = manifest["spec"]["rules"]
        assert rule["matches"] == [{"model": {"type": "Exact", "value": "demo"}}]
        assert {target["modelRewrite"]: target["weight"] for target in rule["targets"]} == weights


@pytest.mark.system
def test_an_adapter_is_not_unloaded_while_its_requests_run(
    world: World, vllm: Vllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollouts, "DRAIN_SECONDS", 0.3)
    monkeypatch.setattr(rollouts, "POLL_SECONDS", 0.05)
    world.configure(vllm.url)
    for letter, against in (("a", None), ("b", "a")):
        world.promote(letter, against)
        world.serve()
    (oldest, _) = vllm.adapters
    vllm.running = [oldest]
    world.promote("c", "b")
    kept = world.serve()
    assert kept.moved
    assert oldest in vllm.adapters
    assert any(oldest in note for note in kept.notes)
    timer = threading.Timer(0.1, vllm.running.clear)
    timer.start()
    assert world.serve().notes == []
    timer.join()
    assert oldest not in vllm.adapters


@pytest.mark.system
def test_one_bad_replica_keeps_the_adapter_before_on_all(world: World, vllm: Vllm) -> None:
    with running(models()) as second:
        world.configure(vllm.url, second.url)
        world.promote("a")
        first = world.serve()
        assert len(first.verdicts) == 2
        second.answers_as = first.name
        world.promote("b", against="a")
        failed = world.serve()
        assert [verdict.diagnosis for verdict in failed.verdicts.values()] == ["", "previous adapter"]
        assert [*vllm.adapters] == [*second.adapters] == [first.name]
        second.well()
        assert world.serve().moved
        assert len(vllm.adapters) == len(second.adapters) == 2


@pytest.mark.system
def test_sixteen_bits_are_measured_and_tolerated(world: World, vllm: Vllm) -> None:
    """Noise as that of bfloat16, on base and adapter alike."""
    vllm.noise = 0.01
    world.configure(vllm.url)
    world.promote("a")
    served = world.serve()
    (verdict,) = served.verdicts.values()
    assert verdict.passed, verdict
    assert verdict.numbers["precision"] == "16 bits"
    assert verdict.numbers["tolerance"] == 0.05
    vllm.noise = 0.5
    world.promote("b", against="a")
    (verdict,) = world.serve().verdicts.values()
    assert verdict.diagnosis == "another base"


@pytest.mark.soak
@pytest.mark.system
def test_a_server_that_confuses_the_base_alone_serves_the_adapter(world: World, vllm: Vllm) -> None:
    """As vLLM 0.32 does on a CPU while requests of an adapter run."""
    world.configure(vllm.url)
    world.promote("a")
    vllm.base_as = world.serve().name
    world.promote("b", against="a")
    (verdict,) = world.serve().verdicts.values()
    assert verdict.passed, verdict
    assert verdict.numbers["base_noise"] > 1
    vllm.scale = 0.9
    world.promote("c", against="b")
    (verdict,) = world.serve().verdicts.values()
    assert verdict.diagnosis == "another base"


@pytest.mark.system
def test_verify_rows_is_the_number_of_rows(world: World, vllm: Vllm) -> None:
    world.configure(vllm.url, verify_rows=3)
    world.promote("a")
    (verdict,) = world.serve().verdicts.values()
    assert verdict.passed
    assert verdict.numbers["rows"] == 3


@pytest.mark.soak
@pytest.mark.system
def test_another_base_name_is_another_copy(world: World, vllm: Vllm) -> None:
    vllm.base_name = "company/base"
    world.configure(vllm.url, base_name="company/base")
    world.promote("a")
    first = world.serve()
    assert first.passed, first
    config = json.loads((vllm.adapters[first.name] / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "company/base"
    world.configure(vllm.url, base_name="company/base", max_rank=128)
    assert not world.serve().moved, "its rank is that of the adapter"
    vllm.base_name = "company/other"
    world.configure(vllm.url, base_name="company/other")
    second = world.serve()
    assert second.moved
    assert second.name != first.name


@pytest.mark.system
def test_a_promotion_by_hand_is_verified_with_the_newest_evaluation(world: World, vllm: Vllm) -> None:
    world.configure(vllm.url)
    adapter, _ = world.publish("a", None)
    Champions(world.project.store, "demo").promote_by_hand(adapter, "a test", "tests")
    assert world.serve().passed


@pytest.mark.system
def test_a_champion_without_evaluation_is_not_served(world: World, vllm: Vllm) -> None:
    world.configure(vllm.url)
    adapter, _ = world.publish("a", None)
    Champions(world.project.store, "demo").promote_by_hand(adapter, "a test", "tests")
    shutil.rmtree(world.project.store_root / "tests" / "evaluations")
    with pytest.raises(UserError, match=adapter.fingerprint[:12]) as error:
        world.serve()
    assert "adapter_evaluation" in str(error.value)
    assert ServedRecords(world.project.store, "demo").current() is None


@pytest.mark.system
def test_the_token_is_sent_and_never_shown(
    world: World, vllm: Vllm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FINETUNE_SERVING_TOKEN", "planted-serving-token")
    vllm.token = "planted-serving-token"
    world.configure(vllm.url)
    world.promote("a")
    graph = Graph()
    served = graph.run("served_adapter")
    assert served.success, served.log
    vllm.token = "another"
    world.promote("b", against="a")
    failed = graph.run("served_adapter")
    assert "FINETUNE_SERVING_TOKEN" in failed.failures["served_adapter"]
    shown = served.log + failed.log + str(failed.failures) + "".join(capsys.readouterr())
    assert "planted-serving-token" not in shown
    assert "planted-serving-token" not in repr(VllmServer(vllm.url, "planted-serving-token"))
    stored = [path for path in world.project.root.rglob("*") if path.is_file()]
    assert not [path for path in stored if b"planted-serving-token" in path.read_bytes()]


@pytest.mark.system
def test_an_experiment_without_servers_or_champion_is_skipped(world: World, vllm: Vllm) -> None:
    world.promote("a")
    graph = Graph()
    skipped = graph.run("served_adapter")
    assert skipped.success, skipped.log
    assert skipped.materialized == set()
    assert vllm.requests == []
