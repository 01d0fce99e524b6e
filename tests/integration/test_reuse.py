"""Champions in use: merged into their base, and two of them stacked into one that is judged like any other."""

import json
from pathlib import Path

import pytest
import torch
from integration.graph import UP_TO_CHAMPION, Graph
from peft import PeftModel
from projects import TestProject
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_assets.artifacts.champions import PROMOTED, Champions
from finetune_assets.artifacts.kinds import MERGED, STACKS
from finetune_assets.sources.base_models import PACKAGED

STACK = """
model: {base_model: demo-base, dtype: float32}
stack:
  adapters: {one: 0.5, two: 0.5}
  method: svd
"""


@pytest.fixture
def champions(project: TestProject, graph: Graph) -> None:
    """Two experiments over one base, of which each has trained a champion; the first is also merged."""
    settings = (project.configs / "experiments" / "demo.yaml").read_text()
    settings = settings.replace("epochs: 15", "max_steps: 15").replace("batch_size: 8", "batch_size: 2")
    settings = settings.replace("max_new_tokens: 8", "generated_rows: 4\n  general_tokens: 2000")
    project.write_experiment("one", settings + "merge: {dtype: float32}\n")
    project.write_experiment("two", settings.replace("max_steps: 15", "max_steps: 15\n  seed: 7"))
    project.write_experiment("both", settings[: settings.index("model:")] + STACK + settings[settings.index("data:") :])
    for name in ("one", "two"):
        run = graph.run([*UP_TO_CHAMPION, "merged_model"], name)
        assert run.success, run.log
        assert run.metadata("champion_adapter")["champion"] == 1


def logits(model: torch.nn.Module) -> torch.Tensor:
    tokens = AutoTokenizer.from_pretrained(PACKAGED["demo-base"])("### Instruction: Where is it?", return_tensors="pt")
    with torch.inference_mode():
        return model(input_ids=tokens["input_ids"]).logits


def with_adapter(folder: Path) -> torch.nn.Module:
    base = AutoModelForCausalLM.from_pretrained(PACKAGED["demo-base"], dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder).eval()


@pytest.mark.system
def test_champions_are_merged_and_stacked(project: TestProject, graph: Graph, champions: None) -> None:
    store = project.store
    served = {name: store.fetch(Champions(store, name).champion()) for name in ("one", "two")}
    (name,) = project.published(MERGED.folder)
    merged = store.fetch(store.resolve(MERGED.folder, name, "merged_model"))
    alone = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    assert (logits(alone) - logits(with_adapter(served["one"]))).abs().max() < 1e-4
    assert json.loads((merged / "merge.json").read_text())["largest"] < 1e-4

    refused = graph.run("lora_adapter", "both")
    assert refused.failures.keys() == {"lora_adapter"}
    assert "stack" in refused.failures["lora_adapter"]

    select = ["tokenized_dataset", "stacked_adapter"]
    run = graph.run(select, "both")
    assert run.success, run.log
    (record,) = Champions(store, "both").history()
    assert (record.number, record.action, record.against) == (1, PROMOTED, None)
    assert record.numbers["rows"] == 51
    assert record.numbers["mean"] > 0
    stack = store.fetch(Champions(store, "both").champion())
    assert project.published(STACKS.folder) == [Champions(store, "both").champion().name]
    module = "base_model.model.model.layers.0.mlp.up_proj"

    def update(folder: Path) -> torch.Tensor:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        a, b = (tensors[f"{module}.lora_{side}.weight"] for side in "AB")
        return b @ a * (config["lora_alpha"] / config["r"])

    wanted = sum(0.5 * update(folder) for folder in served.values())
    assert torch.linalg.norm(update(stack) - wanted) < 0.5 * torch.linalg.norm(wanted), (
        "of a rank that is half of theirs"
    )
    logits(with_adapter(stack))

    again = graph.run(select, "both")
    assert again.reused >= {"stacked_adapter"}
    assert Champions(store, "both").history() == [record]
