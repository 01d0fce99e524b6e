"""A real vLLM server and a real daemon: new data, a worse challenger, a rollback and a killed server, under traffic."""

import json
import shutil
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from integration.daemon import Daemon
from integration.daemon import running as daemon_running
from integration.graph import UP_TO_CHAMPION, Graph
from projects import TestProject
from servers import real_vllm
from servers.real_vllm import Client
from transformers import AutoModelForCausalLM

from benchmarks.vllm_server import VllmProcess
from finetune_assets.artifacts.champions import Champions
from finetune_assets.artifacts.kinds import ADAPTERS, MERGED
from finetune_assets.config.loading import load_experiment
from finetune_assets.data.serving_template import serving_template
from finetune_assets.data.tokenization import load_tokenizer
from finetune_assets.evaluation.files import read_evaluation
from finetune_assets.evaluation.generation import answers, readable
from finetune_assets.evaluation.metrics.exact_match import exact_match
from finetune_assets.resources.project import Project
from finetune_assets.serving.gate_rows import GateRows, evaluation_of, gate_rows
from finetune_assets.serving.rollback import move_back
from finetune_assets.serving.servers import servers_of
from finetune_assets.serving.state import Served, ServedRecords
from finetune_assets.serving.vllm import VllmServer
from finetune_assets.sources.base_models import PACKAGED
from finetune_assets.sources.local import SAMPLE

pytestmark = [pytest.mark.system, pytest.mark.timeout(3000)]
BASE = "demo-base"
FOLDER = "adapters"
SAME, APART = 1e-3, 0.05
"""Differences of log-probabilities between answers of one adapter, and between adapters."""
SECONDS = 1200
EPOCHS = 6
"""Of the demo, instead of 15."""
ANSWER_TOKENS = 8
"""`evaluation.max_new_tokens` of the demo."""


@pytest.fixture
def inbox(project: TestProject, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = project.root / "inbox"
    folder.mkdir()
    monkeypatch.setenv("FINETUNE_RAW_DATA", str(folder))
    for path in (project.configs / "experiments").glob("*.yaml"):
        if path.stem != "demo":
            path.unlink()
    return folder


@pytest.fixture
def server(project: TestProject) -> Iterator[VllmProcess]:
    """A server with the packaged base model and the chat template of the demo."""
    config = load_experiment(project.configs, "demo").config
    template = project.root / "chat_template.jinja"
    template.write_text(str(serving_template(load_tokenizer(str(PACKAGED[BASE])), config.data)))
    with real_vllm.running(PACKAGED[BASE], BASE, project.root, template) as running:
        yield running


def configure(project: TestProject, url: str, experiment: str, **groups: dict[str, object]) -> None:
    """Write an experiment: the demo with other settings, served."""
    settings = yaml.safe_load((project.configs / "experiments" / "demo.yaml").read_text())
    for name, values in groups.items():
        settings[name] = {**settings.get(name, {}), **values}
    settings["serving"] = {"servers": [f"folder:./{FOLDER}", url]}
    project.write_experiment(experiment, yaml.safe_dump(settings))


def drop(folder: Path, name: str, lines: list[str]) -> None:
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def served(project: TestProject, experiment: str) -> Served | None:
    return ServedRecords(project.store, experiment).current()


def wait_for_record(daemon: Daemon, experiment: str, number: int) -> Served:
    """Wait until record `number` names what serves."""

    def record() -> Served | None:
        current = served(daemon.project, experiment)
        return current if current and current.number >= number else None

    return daemon.wait_for(f"record {number} of {experiment}", record, SECONDS)


def parts(daemon: Daemon, dropped: float, experiment: str, record: Served) -> dict[str, float]:
    """Seconds from a data drop to the moved alias, by part."""
    assets = ["dolly_raw", "tokenized_dataset", "lora_adapter", "adapter_evaluation", "champion_adapter"]
    ends = {}
    for asset in assets:
        made = [one for one in daemon.made(asset) if one.partition_key in (None, experiment)]
        ends[asset] = made[-1].timestamp
    runs = [one for one in daemon.runs() if one.dagster_run.run_id == daemon.made("dolly_raw")[-1].run_id]
    times = {"detected": runs[0].create_timestamp.timestamp(), "run started": runs[0].start_time, **ends}
    seconds = {name: after - before for (_, before), (name, after) in pairwise([("dropped", dropped), *times.items()])}
    return {**seconds, "in all": time.time() - dropped}


def file_times(folder: Path) -> dict[str, int]:
    """When each file of the adapters was written."""
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.glob("*/*"))}


def evaluated(project: TestProject) -> tuple[GateRows, float]:
    """All gate rows of the demo's champion, and the share of exact matches in its evaluation."""
    lineage = Project().lineage("demo")
    champion = lineage.champions.current()
    assert champion
    adapter = lineage.champions.adapter(champion)
    rows = gate_rows(lineage, adapter, champion.evaluation, 10_000, real_vllm.LONGEST)
    found = read_evaluation(project.store.fetch(evaluation_of(lineage, adapter, champion.evaluation)))
    assert len(rows.ids) == found["generated_rows"]
    return rows, found["contenders"]["challenger"]["exact_match"]


def matching(given: list[str], rows: GateRows) -> float:
    """Share of answers that match those of the rows exactly."""
    tokenizer = load_tokenizer(str(PACKAGED[BASE]))
    expected = [readable(tokenizer, ids[start:]) for ids, start in zip(rows.ids, rows.starts, strict=True)]
    found = [exact_match(answer.strip(), wanted) for answer, wanted in zip(given, expected, strict=True)]
    return sum(found) / len(found)


def chatted(url: str, model: str, rows: GateRows) -> list[str]:
    """A server's answers to the plain messages of rows."""
    return [real_vllm.chat(url, model, messages or [], ANSWER_TOKENS) for messages in rows.messages]


@pytest.fixture
def demo(project: TestProject, first_run: Path) -> None:
    """A store in which the demo is trained, evaluated and promoted."""
    (made,) = (first_run / ".finetune" / "store").glob("*-demo")
    shutil.copytree(made, project.store_root / project.namespace)


def test_a_champion_answers_as_in_its_evaluation(project: TestProject, demo: None, server: VllmProcess) -> None:
    """What the story below tells, without the daemon and its clients, and with one adapter."""
    vllm = VllmServer(server.url)
    configure(project, server.url, "demo")
    graph = Graph()
    run = graph.run([*UP_TO_CHAMPION, "served_adapter"])
    assert run.success, run.log
    assert run.reused >= {"lora_adapter", "adapter_evaluation", "champion_adapter"}
    record = served(project, "demo")
    assert record
    assert {*vllm.names()} == {record.name}
    assert record.numbers[vllm.shown]["distance_to_challenger"] < SAME
    assert record.numbers[vllm.shown]["distance_to_base"] > APART
    rows, share = evaluated(project)
    assert share > 0.3, "it has learned to answer"
    assert matching(chatted(server.url, record.name, rows), rows) == pytest.approx(share)


@pytest.mark.minutes
@pytest.mark.soak
def test_new_data_rollback_and_restart_under_traffic(project: TestProject, inbox: Path, server: VllmProcess) -> None:
    """Two experiments on one base model, one of them with `rank_pattern`; clients ask for both, and for the base."""
    lines = SAMPLE.read_text(encoding="utf-8").splitlines()
    vllm, prompt, token = VllmServer(server.url), [1, 35, 77, 200], 100
    configure(project, server.url, "demo", training={"epochs": EPOCHS})
    ranks = {"rank": 8, "rank_pattern": {"down_proj": 4}}
    short = {"max_steps": 30}
    configure(project, server.url, "ranks", lora=ranks, training=short, evaluation={"generated_rows": 4})
    client = Client(server.url, project.store, ("demo", "ranks"), BASE, prompt, token)
    expected = {BASE: vllm.logprob(BASE, prompt, token)}

    def learn(record: Served) -> None:
        expected[record.name] = vllm.logprob(record.name, prompt, token, salt=record.name)

    with daemon_running(project) as daemon, client.asking():
        drop(inbox, "a.jsonl", lines[:500])
        first = wait_for_record(daemon, "demo", 1)
        other = wait_for_record(daemon, "ranks", 1)
        assert other.numbers[vllm.shown]["distance_to_challenger"] < SAME
        assert other.numbers[vllm.shown]["distance_to_base"] > APART
        learn(first)

        dropped = time.time()
        drop(inbox, "b.jsonl", lines[500:])
        second = wait_for_record(daemon, "demo", 2)
        print("drop to served:", json.dumps(parts(daemon, dropped, "demo", second)), second.numbers)
        daemon.wait_for("no run", daemon.quiet, SECONDS)
        for record in ServedRecords(project.store, "ranks").history():
            learn(record)
        learn(second)
        assert abs(expected[first.name] - expected[second.name]) > SAME, "the running server's answer has changed"
        assert second.previous == first.name

        rows, share = evaluated(project)
        assert matching(chatted(server.url, second.name, rows), rows) == pytest.approx(share)

        trained = len(project.published(ADAPTERS.folder))
        configure(project, server.url, "demo", training={"max_steps": 2})
        daemon.wait_for("the worse challenger", lambda: len(project.published(ADAPTERS.folder)) > trained, SECONDS)
        daemon.wait_for_ticks("experiments_sensor")
        daemon.wait_for("no run", daemon.quiet, SECONDS)
        assert served(project, "demo") == second

        files = file_times(project.root / FOLDER)
        asked, began = len(client.answers), time.monotonic()
        champion = Champions(project.store, "demo").roll_back("a test", "tests")
        servers = servers_of(load_experiment(project.configs, "demo").config, project.root)
        assert servers
        back = move_back(project.store, champion, servers, "tests")
        answered = vllm.logprob(back.name, prompt, token)
        print(f"rollback: {time.monotonic() - began:.2f} s")
        assert back.name == first.name
        assert answered == pytest.approx(expected[first.name], abs=SAME)
        assert json.loads((project.root / FOLDER / "demo.json").read_text())["serves"] == first.name
        assert file_times(project.root / FOLDER) == files, "no bytes are moved"
        daemon.wait_for("an answer after the rollback", lambda: len(client.answers) > asked + 10)

        killed = time.monotonic()
        both = {*vllm.names()}
        server.kill()
        server.start()
        server.wait()
        daemon.wait_for("the adapters of before", lambda: both <= {*vllm.names()}, SECONDS)
        daemon.wait_for("no run", daemon.quiet, SECONDS)
        loaded = time.monotonic()
        assert served(project, "demo") == back
        assert vllm.logprob(first.name, prompt, token) == pytest.approx(expected[first.name], abs=SAME)
        asked = len(client.answers)
        daemon.wait_for("answers after the restart", lambda: len(client.answers) > asked + 10)

    assert client.failed((killed - 60, loaded)) == []
    assert {answer.name for answer in client.answers} == expected.keys()
    assert client.wrong(expected, SAME) == []
    print(f"{len(client.answers)} answers to clients")

    merged_model_answers_alike(project)


def merged_model_answers_alike(project: TestProject) -> None:
    """The champion merged into its base model: served as a plain model, and its GGUF file in transformers."""
    path = project.configs / "experiments" / "demo.yaml"
    path.write_text(path.read_text() + "merge: {gguf: [bf16]}\n")
    run = Graph().run("merged_model")
    assert run.success, run.log
    (merged,) = project.published(MERGED.folder)
    folder = project.store.fetch(project.store.resolve(MERGED.folder, merged, "merged_model"))
    rows, share = evaluated(project)
    with real_vllm.running(folder, "merged", project.root) as plain:
        assert matching(chatted(plain.url, "merged", rows), rows) == pytest.approx(share)
    gguf = AutoModelForCausalLM.from_pretrained(folder / "gguf", gguf_file="model-bf16.gguf", dtype=torch.float32)
    prompts = [rows.prompt(row) for row in range(len(rows.ids))]
    tokenizer = load_tokenizer(str(folder))
    assert matching(answers(gguf.eval(), tokenizer, prompts, ANSWER_TOKENS), rows) == pytest.approx(share)
