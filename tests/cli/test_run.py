"""What `finetune run` prints, and how it ends, in a process of its own."""

import json
import shutil
import subprocess
import sys

import dagster as dg
import pytest
import terminals
from integration.cli import environment
from projects import TestProject


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "finetune_assets.cli", "run", *arguments]
    return subprocess.run(command, env={**environment(), "COLUMNS": "80"}, capture_output=True, text=True, check=False)


@pytest.mark.system
def test_the_account_has_what_was_computed_found_and_stored(project: TestProject) -> None:
    first, second = (run("demo", "--select", "dolly_raw,cached_base_model") for _ in range(2))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    (raw,) = project.published("raw")
    for ended, outcome in ((first, "computed in"), (second, "cache hit in")):
        _, _, of_asset = ended.stdout.partition("dolly_raw\n")
        found, stored = [line for line in of_asset.splitlines() if "✓" in line or "stored at" in line][:2]
        assert outcome in found
        assert "800 rows, 0 quarantined" in found
        assert f"/raw/{raw}/" in stored
    assert "2 computed, 0 cache hits" in first.stdout
    assert "0 computed, 2 cache hits" in second.stdout
    with dg.DagsterInstance.from_config(str(project.root / "dagster_home")) as instance:
        made = instance.fetch_materializations(dg.AssetKey("dolly_raw"), limit=9).records
        runs = [instance.get_run_by_id(record.run_id) for record in made]
    assert [ended.tags["dagster/partition"] for ended in runs if ended] == ["demo", "demo"], "the UI shows the runs"


@pytest.mark.system
def test_a_failure_ends_with_its_error_and_without_a_traceback(project: TestProject) -> None:
    rows = [{"question": f"What is {number}?", "answer": f"Number {number}."} for number in range(20)]
    rows[7].pop("answer")
    (project.root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (project.configs / "raw_data.yaml").write_text("source: ./rows.jsonl\n")
    ended = run("demo", "--select", "dolly_raw,cached_base_model,tokenized_dataset")
    assert ended.returncode == 1
    *_, last = ended.stderr.splitlines()
    assert last.startswith("Error: dolly_raw: check quarantine failed: ")
    assert "rows.jsonl:8: " in last
    assert "Trace" not in ended.stdout + ended.stderr
    assert (ended.stdout + ended.stderr).count("rows.jsonl:8: ") == 1
    assert "tokenized_dataset" not in ended.stdout


@pytest.mark.system
def test_an_asset_that_there_is_not(project: TestProject) -> None:
    ended = run("demo", "--select", "lora_adaptr")
    assert ended.returncode == 1
    assert ended.stderr.startswith("Error: ")
    assert "lora_adaptr" in ended.stderr
    assert '"lora_adapter"' in ended.stderr
    assert "Trace" not in ended.stderr


@pytest.mark.minutes
@pytest.mark.system
def test_ctrl_c_saves_a_checkpoint_from_which_the_same_command_goes_on(project: TestProject) -> None:
    command = ["run", "demo", "--select", "dolly_raw,cached_base_model,tokenized_dataset,lora_adapter"]
    command += ["--set", "training.max_steps=12", "--set", "training.processes_per_node=2"]
    trains = lambda seen: seen.ever("training", " of 12 steps", "loss", "tokens/s", "ETA")  # noqa: E731
    seen = terminals.run("-m", "finetune_assets.cli", *command, shows=trains, interrupt=True)
    assert seen.code == 130
    assert b"Traceback" not in seen.raw
    shutil.rmtree(project.cache)  # as on another machine
    again = run(*command[1:])
    assert again.returncode == 0
    assert "Resuming from checkpoint at step " in again.stdout
