"""What a server lost is loaded again; what it should not have, or does not answer, is an alert."""

import json

import dagster as dg
import pytest
from integration.graph import Graph, definitions
from projects import TestProject
from servers.vllm import Vllm
from serving.conftest import World

from finetune_assets.artifacts.champions import Champions
from finetune_assets.automation import serving
from finetune_assets.automation.alerts import AlertError
from finetune_assets.automation.serving import serving_sensor

pytestmark = pytest.mark.system


class Watch:
    """The sensor at successive ticks, and the runs that it asks for."""

    def __init__(self, project: TestProject, monkeypatch: pytest.MonkeyPatch) -> None:
        self.graph, self.cursor, self.alerts = Graph(), "{}", list[str]()
        self.now, self.fails = 1_800_000_000.0, False
        self.loaded: dg.Definitions | None = None
        monkeypatch.setattr(serving, "send_alert", self.alert)
        monkeypatch.setattr(serving.time, "time", lambda: self.now)

    def alert(self, title: str, text: str) -> None:
        if self.fails:
            raise AlertError("planted")
        self.alerts.append(f"{title}: {text}")

    def tick(self, seconds: float = 30) -> list[dg.RunRequest]:
        self.now += seconds
        loaded = self.loaded or definitions()
        result = serving_sensor(dg.build_sensor_context(self.graph.instance, self.cursor, definitions=loaded))
        assert isinstance(result, dg.SensorResult)
        self.cursor = result.cursor or ""
        self.message = result.skip_reason.skip_message if result.skip_reason else ""
        return [*(result.run_requests or [])]


@pytest.fixture
def watch(project: TestProject, monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(project, monkeypatch)


@pytest.fixture
def served(world: World, vllm: Vllm) -> str:
    """An adapter that serves, and one before it; the name of the former."""
    world.configure(vllm.url, "folder:./adapters")
    world.promote("a")
    world.serve()
    world.promote("b", against="a")
    return world.serve().name


def test_a_restarted_server_gets_its_adapters_back(world: World, vllm: Vllm, served: str, watch: Watch) -> None:
    assert watch.tick() == []
    both = {*vllm.adapters}
    vllm.restart()
    (request,) = watch.tick()
    assert request.partition_key == "demo"
    assert request.asset_selection == [dg.AssetKey("served_adapter")]
    assert watch.graph.run("served_adapter").success
    assert {*vllm.adapters} == both, "also the one before, for a rollback"
    assert watch.tick() == []
    assert watch.alerts == []
    assert json.loads(watch.cursor)["attempts"] == {}


def test_three_runs_are_tried_and_one_alert_is_sent(vllm: Vllm, served: str, watch: Watch) -> None:
    vllm.restart()
    requests = [request for _ in range(40) for request in watch.tick(300)]
    assert len(requests) == 3
    assert len({request.run_key for request in requests}) == 3
    assert sorted(text.partition(" demo:")[0] for text in watch.alerts) == ["serving: lost:"] * 2
    assert any(served in text for text in watch.alerts)


def test_a_champion_that_is_not_served(world: World, vllm: Vllm, served: str, watch: Watch) -> None:
    Champions(world.project.store, "demo").roll_back("a test", "tests")
    (request,) = watch.tick()
    assert request.partition_key == "demo"
    assert watch.tick() == [], "a pause before the next"
    (alert,) = watch.alerts
    assert alert.startswith("serving: not served: demo: champion 3")
    assert watch.graph.run("served_adapter").success
    assert watch.tick(600) == []


def test_wrong_answers_of_a_server_that_lists_the_adapter(vllm: Vllm, served: str, watch: Watch) -> None:
    vllm.answers_as = ""
    assert len(watch.tick()) == 1
    watch.tick()
    (alert,) = watch.alerts
    assert served in alert
    assert alert.startswith("serving: wrong answers")


def test_an_adapter_that_is_no_champion(vllm: Vllm, served: str, watch: Watch) -> None:
    vllm.adapters["mallory"] = vllm.adapters[served]
    assert watch.tick() == []
    assert watch.alerts == [], "a rollout may be going on"
    watch.fails = True
    watch.tick()
    watch.fails = False
    assert watch.alerts == []
    for _ in range(5):
        watch.tick()
    (alert,) = watch.alerts
    assert "mallory" in alert
    assert vllm.url in alert
    del vllm.adapters["mallory"]
    watch.tick()
    vllm.adapters["mallory"] = vllm.adapters[served]
    for _ in range(2):
        watch.tick()
    assert len(watch.alerts) == 2, "it is another one"


@pytest.mark.soak
def test_another_experiments_adapters_are_no_strangers(world: World, vllm: Vllm, served: str, watch: Watch) -> None:
    world.configure(vllm.url, experiment="other")
    world.promote("c", experiment="other")
    assert world.serve("other").moved
    watch.tick()
    watch.tick()
    assert watch.alerts == []
    assert len(vllm.adapters) == 3


def test_a_server_that_is_away(vllm: Vllm, served: str, watch: Watch) -> None:
    vllm.failing = {"/v1/models": 503}
    assert watch.tick() == []
    assert watch.tick() == []
    (alert,) = watch.alerts
    assert alert.startswith("serving: unreachable")
    vllm.well()
    assert watch.tick() == []


def test_nothing_is_started_while_a_run_serves(vllm: Vllm, served: str, watch: Watch) -> None:
    vllm.restart()

    @dg.op
    def work() -> None: ...

    @dg.job
    def job() -> None:
        work()

    tags = {"dagster/partition": "demo"}
    run = watch.graph.instance.create_run_for_job(job, tags=tags, status=dg.DagsterRunStatus.STARTED)
    assert watch.tick() == []
    watch.graph.instance.report_run_canceled(run)
    assert len(watch.tick()) == 1


def test_an_experiment_without_servers_is_not_watched(project: TestProject, watch: Watch) -> None:
    assert watch.tick() == []
    assert watch.message.startswith("0 experiments")


@pytest.mark.parametrize("subscribed", [True, False])
def test_what_never_served_is_served_where_it_is_subscribed(
    world: World, vllm: Vllm, watch: Watch, subscribed: bool
) -> None:
    path = world.project.configs / "experiments" / "demo.yaml"
    world.configure(vllm.url)
    path.write_text(path.read_text().replace("subscribed: true", f"subscribed: {str(subscribed).lower()}"))
    world.promote("a")
    assert len(watch.tick()) == subscribed


def test_an_experiment_that_dagster_has_not_loaded_yet(world: World, vllm: Vllm, watch: Watch) -> None:
    """A request for a partition that the definitions do not have would fail the tick, and with it all experiments."""
    watch.loaded = definitions()
    world.configure(vllm.url, experiment="other")
    world.promote("c", experiment="other")
    assert watch.tick() == []
    watch.loaded = None
    assert [request.partition_key for request in watch.tick()] == ["other"]
