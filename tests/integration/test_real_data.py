"""Real rows on a real model, through the whole graph."""

import json
from pathlib import Path

import pytest
from integration.graph import Graph
from projects import TestProject

from finetune_assets.artifacts.champions import Champions

EXPERIMENT = """
model: {{base_model: {model}, dtype: float32}}
data:
  val_fraction: 0.02
  gate_fraction: 0.05
  tokenization: {{cutoff_len: 512, packing: false}}
  checks: {{max_truncated_share: 1.0, max_unlabelled_share: 1.0}} # a vocabulary of 512 makes long rows
  prompt_template:
    prompt_input: "### Instruction:\\n{{instruction}}\\n\\n### Input:\\n{{context}}\\n\\n### Response:\\n"
    prompt_no_input: "### Instruction:\\n{{instruction}}\\n\\n### Response:\\n"
training:
  max_steps: 25
  macro_batch_size: 12
  micro_batch_size: 6
  learning_rate: 7.0e-3
  lr_scheduler: linear
  warmup_steps: 2
  processes_per_node: 2
lora: {{dropout: 0.0}}
evaluation: {{generated_rows: 4, max_new_tokens: 16}}
"""


@pytest.mark.minutes
@pytest.mark.real_data
@pytest.mark.soak
@pytest.mark.system
def test_all_of_dolly_through_the_graph(
    project: TestProject, graph: Graph, dolly: Path, stories260k: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """15,011 rows prepared, at most 300 of them trained on by two processes: the held-out loss falls by a fifth,
    and the gate promotes on over 500 rows that were never seen."""
    monkeypatch.setenv("FINETUNE_RAW_DATA", str(dolly))
    project.write_experiment("real", EXPERIMENT.format(model=stories260k))
    run = graph.run("*champion_adapter", "real")
    assert run.success, run.log

    (tokenized,) = project.published("tokenized")
    dataset = project.store.fetch(project.store.resolve("tokenized", tokenized, "tokenized_dataset"))
    statistics = json.loads((dataset / "statistics.json").read_text())
    assert statistics["rows_read"] == 15_011
    left_out = statistics["near_duplicates_left_out"]
    assert sum(statistics["examples"].values()) + statistics["without_label"] + left_out == 15_011
    assert 50 <= left_out <= 100, "about 70 held-out rows of Dolly have near-duplicates by instruction and context"

    (name,) = project.published("adapters")
    adapter = project.store.fetch(project.store.resolve("adapters", name, "lora_adapter"))
    state = json.loads((adapter / "trainer_state.json").read_text())
    assert state["step"] * 12 <= 300
    held_out = state["held_out_loss"]
    assert held_out["after"] <= 0.8 * held_out["before"], held_out

    (name,) = project.published("evaluations")
    evaluation = project.store.fetch(project.store.resolve("evaluations", name, "adapter_evaluation"))
    found = json.loads((evaluation / "evaluation.json").read_text())
    assert found["rows"] >= 500
    assert sum(row["rows"] for row in found["categories"]) == found["rows"]
    assert {row["category"] for row in found["categories"]} >= {"closed_qa", "brainstorming", "summarization"}
    assert all(row["challenger"] < row["base"] for row in found["categories"])
    (record,) = Champions(project.store, "real").history()
    assert record.numbers["lower"] > 0
    assert record.reason in run.log
