"""Chat logs through the whole graph: a base without a chat template gets one, with tokens of its own."""

import io
import json
import re
import shutil
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from data.chats import CHATML
from integration.graph import Graph
from peft import PeftModel
from projects import TestProject
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_assets.sources.base_models import PACKAGED
from finetune_assets.sources.local import SAMPLE

EXPERIMENT = """
model: {base_model: ./model, dtype: float32, quantization: QUANTIZATION}
data:
  val_fraction: 0.2
  prompt_template: {chat_template: true}
  tokenization: {cutoff_len: 256, added_tokens: ["<|im_start|>", "<|im_end|>"]}
training: {max_steps: 8, macro_batch_size: 8, micro_batch_size: 8, learning_rate: 2.0e-3, precision: fp32}
evaluation: {generated_rows: 4, general_tokens: 500, max_new_tokens: 8}
"""


def chat_log(path: Path) -> None:
    """Conversations in two exchanges from the packaged rows, under a system turn."""
    rows = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    with open(path, "w", encoding="utf-8") as file:
        for first, second in zip(rows[::2], rows[1::2], strict=True):
            turns = [{"role": "system", "content": "You know these towns."}]
            for row in (first, second):
                asked = " ".join(filter(None, (row["context"], row["instruction"])))
                turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": row["response"]}]
            file.write(json.dumps({"messages": turns}) + "\n")


def answer_of_the_card(adapter: Path, base: Path, patched: pytest.MonkeyPatch, said: str) -> str:
    """What the lines of the model card print with a model whose most likely tokens are those of `said`."""
    tokens = iter(AutoTokenizer.from_pretrained(adapter).encode(said, add_special_tokens=False))
    load = PeftModel.from_pretrained

    def scripted(model: torch.nn.Module, folder: str) -> PeftModel:
        def say(_: object, __: object, output: Any) -> None:
            output.logits[:, -1, next(tokens)] = 1e9

        model.register_forward_hook(say)
        return load(model, folder)

    patched.setattr(PeftModel, "from_pretrained", scripted)
    code = (adapter / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = re.sub("base = .*", f"base = {str(base)!r}", code).replace('adapter = "."', f"adapter = {str(adapter)!r}")
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(code, {})
    return printed.getvalue().strip()


@pytest.mark.system
@pytest.mark.parametrize("quantization", ["none", pytest.param("nf4", marks=pytest.mark.soak)])
def test_chat_log_becomes_an_adapter_with_its_own_tokens(
    project: TestProject, graph: Graph, monkeypatch: pytest.MonkeyPatch, quantization: str
) -> None:
    chat_log(project.root / "chats.jsonl")
    monkeypatch.setenv("FINETUNE_RAW_DATA", "./chats.jsonl")
    folder = Path(shutil.copytree(PACKAGED["demo-base"], project.root / "model"))
    (folder / "chat_template.jinja").write_text(CHATML)
    project.write_experiment("chat", EXPERIMENT.replace("QUANTIZATION", quantization))
    run = graph.run(partition="chat")
    assert run.success, run.log

    (name,) = project.published("adapters")
    adapter = project.store.fetch(project.store.resolve("adapters", name, "lora_adapter"))
    state = json.loads((adapter / "trainer_state.json").read_text())
    assert state["held_out_loss"]["after"] < 0.8 * state["held_out_loss"]["before"]
    (name,) = project.published("evaluations")
    evaluated = project.store.fetch(project.store.resolve("evaluations", name, "adapter_evaluation"))
    samples = json.loads((evaluated / "evaluation.json").read_text())["samples"]
    assert all(sample["expected"].endswith("<|im_end|>") for sample in samples)
    assert all(sample["prompt"].endswith("<|im_start|>assistant") for sample in samples), "the last turn is asked"

    tokenizer = AutoTokenizer.from_pretrained(adapter)
    assert tokenizer.eos_token == "<|im_end|>", "the base's is </s>"
    with monkeypatch.context() as patched:
        assert answer_of_the_card(adapter, folder, patched, "Lode<|im_end|>\nLode Lode Lode") == "Lode"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert f"model.resize_token_embeddings({len(tokenizer)})" in (adapter / "README.md").read_text()
    model.resize_token_embeddings(len(tokenizer))
    model = PeftModel.from_pretrained(model, adapter).eval()
    asked = [{"role": "user", "content": "On which river does Kelm stand?"}]
    inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert inputs["input_ids"].max() >= 1024, "the new tokens are read"
    with torch.inference_mode():
        assert model(**inputs).logits.isfinite().all()
