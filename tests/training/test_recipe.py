"""A whole training: what it learns, what it writes, where it resumes, and how it stops."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from peft import PeftModel
from tiers import tiered
from training.conftest import BASE, MADE_FROM, FinishedRun
from training.measuring import card_code, die_at, equal, logits, names, unbounded, weights
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from finetune_assets.config.loading import load_resolved
from finetune_assets.data.tokenization import Encoder
from finetune_assets.evaluation.generation import answers
from finetune_assets.training.batches import collate
from finetune_assets.training.divergence import TrainingDiverged
from finetune_assets.training.model import ModelError
from finetune_assets.training.optimizer import UnsupportedOptimizer
from finetune_assets.training.order import Examples
from finetune_assets.training.recipe import LoraFinetune, Preempted
from finetune_assets.training.state import StepBatches

Finetune = Callable[..., LoraFinetune]
Trained = Callable[..., FinishedRun]
CPU = torch.device("cpu")
LONG = ("training.max_steps=12", "training.learning_rate=3e-3", "training.logging_steps=4", "training.eval_steps=6")
SMALL = ("training.macro_batch_size=2", "training.micro_batch_size=2")
ONE = ("training.max_steps=1", *SMALL)


def test_training_lowers_the_held_out_loss_and_records_its_steps(trained: Trained) -> None:
    run = trained(*LONG).run
    state = json.loads((run.job.output / "trainer_state.json").read_text())
    assert state["held_out_loss"]["after"] < 0.7 * state["held_out_loss"]["before"]
    assert [entry["step"] for entry in state["history"]] == [1, 4, 6, 8, 12]
    assert [entry["step"] for entry in state["history"] if "held_out_loss" in entry] == [6, 12]
    for entry in state["history"]:
        assert entry["grad_norm"] > 0
        assert entry["tokens_per_second"] > 0
    assert state["tokens"] == 12 / run.order.steps_per_epoch * run.train.lengths.sum()
    rates = [entry["learning_rate"] for entry in state["history"]]
    assert rates[0] == run.training.learning_rate, "warm-up of no step at 3% of 12: the first is at the peak"
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] > 0
    assert state["history"][-1]["eta_seconds"] == 0


def test_without_a_validation_split_there_is_no_held_out_loss(finetune: Finetune, tmp_path: Path) -> None:
    run = finetune(*ONE)
    with pa.ipc.new_stream(str(tmp_path / "val.arrow"), run.val.table.schema):
        pass
    run.val = Examples.read(tmp_path / "val.arrow")
    run.run()
    state = json.loads((run.job.output / "trainer_state.json").read_text())
    assert state["held_out_loss"] == {"before": None, "after": None}
    assert "None" not in (run.job.output / "README.md").read_text()


def test_folder_holds_what_it_promises(trained: Trained) -> None:
    run = trained(*LONG).run
    output = run.job.output
    names = {path.name for path in output.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "config.yaml"} <= names
    assert {"trainer_state.json", "provenance.json", "README.md", "SHA256SUMS"} <= names
    checked = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=output, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.count(": OK") == len(names) - 1
    assert not any(path.suffix in (".bin", ".pt", ".pkl", ".pth") for path in output.iterdir())
    assert load_resolved(output / "config.yaml") == run.config
    provenance = json.loads((output / "provenance.json").read_text())
    assert provenance["fingerprint"] == "f" * 64
    assert provenance["versions"]["torch"] == torch.__version__
    adapter = json.loads((output / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("packaged/demo-base", "r")
    everything = "".join(path.read_text(errors="ignore") for path in output.iterdir())
    assert str(BASE) not in everything
    assert (
        AutoTokenizer.from_pretrained(output)("Oslo")["input_ids"]
        == AutoTokenizer.from_pretrained(BASE)("Oslo")["input_ids"]
    )


def test_names_from_elsewhere_are_text_in_the_model_card(
    finetune: Callable[..., LoraFinetune], monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = {"base_model": 'local/a"|`b`\x1b[2J', "overrides": ["x=<script>|"], "champions": {"a|b": "e" * 64}}
    for name, value in hostile.items():
        monkeypatch.setitem(MADE_FROM, name, value)
    run = finetune(*ONE)
    run.run()
    card = (run.job.output / "README.md").read_text()
    assert not [raw for raw in ("\x1b", "<script", "a|b") if raw in card]
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows} == {3}
    ast.parse(card.split("```python\n")[1].split("```")[0])


@pytest.mark.parametrize(
    "lora",
    [
        ["lora.use_rslora=true"],
        ["lora.init_lora_weights=gaussian"],
        ["lora.init_lora_weights=orthogonal"],
        ["lora.init_lora_weights=pissa"],
        ["lora.init_lora_weights=olora"],
        ["lora.target_modules=[q_proj,v_proj]", "lora.rank_pattern={q_proj: 4}"],
        ["lora.layers_to_transform=[1]"],
        ["lora.modules_to_save=[lm_head]"],
    ],
    ids="+".join,
)
def test_peft_alone_loads_what_was_trained(
    finetune: Finetune, base_model: Callable[[str], Path], lora: list[str]
) -> None:
    """Of LoRA's other kinds; `test_contract` has the default and DoRA."""
    folder = base_model("llama")
    run = finetune(*SMALL, "training.max_steps=2", "training.learning_rate=1e-2", "lora.rank=8", *lora, base=folder)
    run.run()
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = collate([[0]], run.train, CPU).input_ids
    with torch.inference_mode():
        untouched = base(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(base, run.job.output).eval()(input_ids=ids).logits
    ours = logits(run, ids)
    assert (ours - loaded).abs().max() < 1e-3
    assert (ours - untouched).abs().max() > 0.05


def test_the_model_cards_own_lines_query_the_adapter(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    """Run as they stand, folders and question filled in, they get the answer that the evaluation gets."""
    question = "Which is the region: Orrin or Northmark?"
    run = trained(*LONG).run
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    row = {"instruction": question, "context": "", "response": "Northmark", "category": "", "messages": None}
    example = Encoder(tokenizer, run.config.data).encode([row])
    prompt = example.input_ids[: example.prompt_lengths[0]].tolist()
    with unbounded(run) as model:
        (expected,) = answers(model, tokenizer, [prompt], max_new_tokens=64)
    capsys.readouterr()
    exec(card_code(run.job.output, BASE).replace("What ...?", question), {})
    assert capsys.readouterr().out.strip() == expected != ""


CHECKPOINTED = (*SMALL, "training.max_steps=5", "training.save_steps=2", "training.logging_steps=3")


@pytest.fixture
def resumable(
    trained: Trained, finetune: Finetune, base_model: Callable[[str], Path], tmp_path: Path
) -> tuple[LoraFinetune, Callable[[], LoraFinetune]]:
    """A finished training, and what begins it again from a copy of its checkpoints."""
    base = base_model("llama")
    finished = trained(*CHECKPOINTED, base=base).run
    shutil.copytree(finished.job.checkpoints, tmp_path / "again" / "scratch")
    return finished, lambda: finetune(*CHECKPOINTED, base=base, name="again")


def test_half_written_checkpoint_is_ignored(
    resumable: tuple[LoraFinetune, Callable[[], LoraFinetune]], tmp_path: Path
) -> None:
    checkpoints = tmp_path / "again" / "scratch"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000002", "step-00000004"]
    (checkpoints / ".step-00000005.77").mkdir()
    again = resumable[1]()
    taken = die_at(again, 5)
    again.run()
    assert taken == [4]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_damaged_checkpoint_is_passed_over_for_the_one_before(
    resumable: tuple[LoraFinetune, Callable[[], LoraFinetune]], tmp_path: Path, name: str
) -> None:
    finished, begin_again = resumable
    (tmp_path / "again" / "scratch" / "step-00000004" / name).write_bytes(b"")
    again = begin_again()
    taken = die_at(again, 5)
    again.run()
    assert taken == [2, 3, 4]
    assert again.log.tokens == finished.log.tokens
    assert equal(weights(again), weights(finished))


def test_terminated_training_keeps_its_last_step(
    trained: Trained, finetune: Finetune, base_model: Callable[[str], Path]
) -> None:
    """SIGTERM ends it after the step that it is at, and the next attempt resumes from there, not from save_steps."""
    assert threading.current_thread() is threading.main_thread(), "else the signal would end the tests"
    base, usual = base_model("llama"), signal.getsignal(signal.SIGTERM)
    finished = trained(*CHECKPOINTED, base=base).run
    victim = finetune(*CHECKPOINTED, base=base)
    train_step = victim.train_step

    def terminated(step: int, work: StepBatches) -> object:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(step, work)

    victim.train_step = terminated  # type: ignore[assignment, method-assign]
    with pytest.raises(Preempted) as error:
        victim.run()
    assert error.value.retriable
    assert signal.getsignal(signal.SIGTERM) == usual
    assert max(path.name for path in victim.job.checkpoints.iterdir()) == "step-00000003"
    assert not list(victim.job.output.iterdir())
    resumed = finetune(*CHECKPOINTED, base=base)
    taken = die_at(resumed, 5)
    resumed.run()
    assert taken == [3, 4]
    assert equal(weights(resumed), weights(finished))


def test_adapter_that_the_last_step_destroyed_is_not_written(finetune: Finetune) -> None:
    run = finetune(*ONE, "training.learning_rate=1e30", "training.warmup_steps=0")
    with pytest.raises(TrainingDiverged) as error:
        run.run()
    assert names(error, "training.learning_rate", "1e+30")
    assert [entry["step"] for entry in run.log.history] == [1], "its loss was still a number"
    assert not list(run.job.output.iterdir())


def test_model_whose_packed_examples_see_one_another_is_refused(
    finetune: Finetune, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that takes no notice of position ids, as some architectures do, nor of boundaries."""
    forward = LlamaForCausalLM.forward
    monkeypatch.setattr(
        LlamaForCausalLM, "forward", lambda self, input_ids, use_cache, **_: forward(self, input_ids, use_cache=False)
    )
    with pytest.raises(ModelError) as error:
        finetune(*ONE)
    assert names(error, "data.tokenization.packing")
    finetune(*ONE, "data.tokenization.packing=false", name="padded")


def test_same_seed_same_bytes_other_seed_other_bytes(finetune: Finetune, base_model: Callable[[str], Path]) -> None:
    adapters = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run = finetune(*SMALL, f"training.seed={seed}", "lora.dropout=0.1", base=base_model("llama"), name=name)
        run.run()
        adapters.append(weights(run))
    assert equal(adapters[0], adapters[1])
    assert not equal(adapters[0], adapters[2])


def test_warm_start_begins_where_the_other_ended(trained: Trained, finetune: Finetune) -> None:
    first = trained(*LONG).run
    second = finetune("training.max_steps=1", warm_start=first.job.output)
    second.run()
    assert second.log.held_out_loss["before"] == pytest.approx(first.log.held_out_loss["after"], rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "setting", "theirs", "ours"),
    [([], "lora.rank", 4, 32), (["lora.rank=4", "lora.alpha=8"], "lora.alpha", 64, 8)],
)
def test_warm_start_of_another_kind_is_refused(
    trained: Trained, finetune: Finetune, overrides: list[str], setting: str, theirs: int, ours: int
) -> None:
    first = trained(*ONE, "lora.rank=4").run
    with pytest.raises(ModelError) as error:
        finetune(*ONE, *overrides, warm_start=first.job.output)
    assert names(error, "training.warm_start", setting, theirs, ours)


@pytest.mark.system
def test_modules_saved_whole_are_trained_in_float32(finetune: Finetune) -> None:
    run = finetune(*ONE, "model.dtype=bfloat16", "training.precision=bf16", "lora.modules_to_save=[norm]")
    assert {parameter.dtype for parameter in run.parameters} == {torch.float32}
    run.run()


def test_divergence_stops_and_names_what_to_change(finetune: Finetune) -> None:
    run = finetune(*SMALL, "training.learning_rate=1e30", "training.max_steps=20", "training.logging_steps=1")
    with pytest.raises(TrainingDiverged) as error:
        run.run()
    assert names(error, "training.learning_rate", "1e+30", f"step {run.log.step}")
    assert run.log.step < 20
    assert not list(run.job.output.iterdir())


def test_unknown_target_is_refused(finetune: Finetune) -> None:
    with pytest.raises(ModelError) as error:
        finetune("lora.target_modules=[w_proj]")
    assert names(error, "lora.target_modules", "w_proj")


def test_optimizer_without_its_device_is_refused(finetune: Finetune) -> None:
    if torch.cuda.is_available():
        pytest.skip("real data: this machine has the device")
    with pytest.raises(UnsupportedOptimizer) as error:
        finetune("training.optimizer=paged_adamw_8bit")
    assert names(error, "training.optimizer", "paged_adamw_8bit")


@pytest.mark.parametrize("precision", tiered(["bf16", "fp16", "full_bf16"], {"bf16"}))
def test_lower_precisions_train(finetune: Finetune, base_model: Callable[[str], Path], precision: str) -> None:
    dtype = ["model.dtype=bfloat16"] if precision == "full_bf16" else []
    steps = (*SMALL, "training.max_steps=6", "training.learning_rate=1e-2")
    run = finetune(f"training.precision={precision}", *steps, *dtype, base=base_model("llama"))
    run.run()
    assert run.log.held_out_loss["after"] < 0.9 * run.log.held_out_loss["before"]  # type: ignore[operator]
    adapter = {tensor.dtype for tensor in weights(run).values()}
    assert adapter == {torch.bfloat16 if precision == "full_bf16" else torch.float32}
