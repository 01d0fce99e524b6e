"""A whole training: what it learns, what it writes, how it goes on, and how it stops."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from training.measuring import unbounded
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from finetune_assets.config.loading import load_resolved
from finetune_assets.data.tokenization import Encoder
from finetune_assets.evaluation.generation import answers
from finetune_assets.store.base_models import PACKAGED
from finetune_assets.training.batches import collate
from finetune_assets.training.health import TrainingDiverged
from finetune_assets.training.model import ModelError
from finetune_assets.training.optimizer import UnsupportedOptimizer
from finetune_assets.training.order import Examples
from finetune_assets.training.recipe import LoraFinetune
from finetune_assets.training.state import Work

Finetune = Callable[..., LoraFinetune]
BASE = PACKAGED["demo-base"]
CPU = torch.device("cpu")


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter_model.safetensors")


def assert_equal(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_training_lowers_the_held_out_loss_and_tells_its_way(finetune: Finetune) -> None:
    run = finetune("training.max_steps=12", "training.logging_steps=4", "training.eval_steps=6")
    run.run()
    state = json.loads((run.job.output / "trainer_state.json").read_text())
    assert state["held_out_loss"]["after"] < 0.7 * state["held_out_loss"]["before"]
    assert [entry["step"] for entry in state["history"]] == [1, 4, 6, 8, 12]
    assert [entry["step"] for entry in state["history"] if "held_out_loss" in entry] == [6]
    for entry in state["history"]:
        assert entry["grad_norm"] > 0
        assert entry["tokens_per_second"] > 0
    assert state["tokens"] == 12 / run.order.steps_per_epoch * run.train.lengths.sum()
    rates = [entry["learning_rate"] for entry in state["history"]]
    assert rates[0] == run.training.learning_rate, "warm-up of no step at 3% of 12: the first is at the peak"
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] > 0
    assert state["history"][-1]["eta_seconds"] == 0


def test_nothing_held_out_is_not_measured(finetune: Finetune, tmp_path: Path) -> None:
    run = finetune("training.max_steps=1")
    with pa.ipc.new_stream(str(tmp_path / "val.arrow"), run.val.table.schema):
        pass
    run.val = Examples.read(tmp_path / "val.arrow")
    run.run()
    assert run.log.held_out_loss == {"before": None, "after": None}
    assert "| held-out loss" not in (run.job.output / "README.md").read_text()


def test_folder_holds_what_it_promises(finetune: Finetune) -> None:
    run = finetune("training.max_steps=1")
    run.run()
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


@pytest.mark.parametrize(
    "lora",
    [
        [],
        ["lora.use_rslora=true"],
        ["lora.use_dora=true"],
        ["lora.init_lora_weights=gaussian"],
        ["lora.init_lora_weights=orthogonal"],
        ["lora.init_lora_weights=pissa"],
        ["lora.init_lora_weights=olora"],
        ["lora.target_modules=[q_proj,v_proj]", "lora.rank_pattern={q_proj: 4}"],
        ["lora.layers_to_transform=[0,3]"],
        ["lora.modules_to_save=[lm_head]"],
    ],
    ids=lambda lora: "+".join(lora) or "default",
)
def test_peft_alone_loads_what_was_trained(finetune: Finetune, lora: list[str]) -> None:
    run = finetune("training.max_steps=2", *lora)
    run.run()
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, run.job.output).eval()
    ids = collate([[0]], run.train, CPU).input_ids
    with torch.inference_mode():
        ours, theirs = unbounded(run).eval()(input_ids=ids).logits, loaded(input_ids=ids).logits
        untouched = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)(input_ids=ids).logits
    assert (ours - theirs).abs().max() < 1e-3
    assert (ours - untouched).abs().max() > 0.05


def test_the_model_cards_own_lines_ask_the_adapter(finetune: Finetune, capsys: pytest.CaptureFixture[str]) -> None:
    """Run as they stand, folders and question filled in, they get the answer that the evaluation gets."""
    question = "Which is the region: Orrin or Northmark?"
    run = finetune("training.max_steps=10", "training.learning_rate=3e-3")
    run.run()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    row = {"instruction": question, "context": "", "response": "Northmark", "category": "", "messages": None}
    example = Encoder(tokenizer, run.config.data).encode([row])
    prompt = example.input_ids[: example.prompt_lengths[0]].tolist()
    (expected,) = answers(unbounded(run).eval(), tokenizer, [prompt], max_new_tokens=64)
    code = (run.job.output / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace('adapter = "."', "adapter = " + repr(str(run.job.output)))
    code = code.replace('"the folder of packaged/demo-base"', repr(str(BASE)))
    capsys.readouterr()
    exec(code.replace("What ...?", question), {})
    assert capsys.readouterr().out.strip() == expected != ""


class Killed(Exception):
    """Stands for what ends a process."""


@pytest.mark.parametrize("killed_at", [3, 5, 6])
def test_resumed_training_ends_bit_equal(finetune: Finetune, killed_at: int) -> None:
    settings = ("training.max_steps=8", "training.save_steps=2", "lora.dropout=0.1", "training.logging_steps=3")
    undisturbed = finetune(*settings, name="undisturbed")
    undisturbed.run()
    victim = finetune(*settings, name="victim")
    train_step = victim.train_step

    def dying(step: int, work: Work) -> object:
        if step == killed_at:
            raise Killed
        return train_step(step, work)

    victim.train_step = dying  # type: ignore[assignment, method-assign]
    with pytest.raises(Killed):
        victim.run()
    resumed = finetune(*settings, name="victim")
    taken: list[int] = []
    train_step = resumed.train_step
    resumed.train_step = lambda step, work: taken.append(step) or train_step(step, work)  # type: ignore
    resumed.run()
    assert taken == list(range(killed_at // 2 * 2, 8))
    assert_equal(undisturbed.job.output, resumed.job.output)


def test_half_written_checkpoint_is_not_taken(finetune: Finetune) -> None:
    run = finetune("training.max_steps=5", "training.save_steps=2", name="one")
    run.run()
    checkpoints = sorted(run.job.checkpoints.iterdir())
    assert [path.name for path in checkpoints] == ["step-00000002", "step-00000004"]
    (run.job.checkpoints / ".step-00000005.77").mkdir()
    again = finetune("training.max_steps=5", "training.save_steps=2", name="one")
    again._resume()
    assert again.log.step == 4


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_damaged_checkpoint_is_passed_over_for_the_one_before(finetune: Finetune, name: str) -> None:
    settings = ("training.max_steps=5", "training.save_steps=2", "training.logging_steps=3")
    undisturbed = finetune(*settings, name="one")
    undisturbed.run()
    before = undisturbed.log.tokens
    (undisturbed.job.checkpoints / "step-00000004" / name).write_bytes(b"")
    expected = weights(undisturbed.job.output)
    again = finetune(*settings, name="one")
    again._resume()
    assert again.log.step == 2
    again.run()
    assert again.log.tokens == before
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(again.job.output).items())


def test_adapter_that_the_last_step_destroyed_is_not_written(finetune: Finetune) -> None:
    run = finetune("training.max_steps=1", "training.learning_rate=1e30", "training.warmup_steps=0")
    with pytest.raises(TrainingDiverged, match="not finite"):
        run.run()
    assert not list(run.job.output.iterdir())


def test_model_whose_packed_examples_see_one_another_is_refused(
    finetune: Finetune, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that takes no notice of position ids, as some architectures do, nor of boundaries."""
    forward = LlamaForCausalLM.forward
    monkeypatch.setattr(
        LlamaForCausalLM, "forward", lambda self, input_ids, use_cache, **_: forward(self, input_ids, use_cache=False)
    )
    with pytest.raises(ModelError, match=r"packed examples see one another.*packing to false"):
        finetune("training.max_steps=1")
    finetune("training.max_steps=1", "data.tokenization.packing=false", name="padded")


def test_same_seed_same_bytes_other_seed_other_bytes(finetune: Finetune) -> None:
    outputs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run = finetune(f"training.seed={seed}", "lora.dropout=0.1", name=name)
        run.run()
        outputs.append(run.job.output)
    assert_equal(outputs[0], outputs[1])
    with pytest.raises(AssertionError):
        assert_equal(outputs[0], outputs[2])


def test_warm_start_begins_where_the_other_ended(finetune: Finetune) -> None:
    first = finetune("training.max_steps=10", name="first")
    first.run()
    second = finetune("training.max_steps=1", name="second", warm_start=first.job.output)
    second.run()
    assert second.log.held_out_loss["before"] == pytest.approx(first.log.held_out_loss["after"], rel=1e-5)


def test_warm_start_of_another_rank_is_told(finetune: Finetune) -> None:
    first = finetune("training.max_steps=1", "lora.rank=4", name="first")
    first.run()
    with pytest.raises(ModelError, match=r"rank 4.*lora\.rank is 32.*set it to 4"):
        finetune("training.max_steps=1", name="second", warm_start=first.job.output)
    with pytest.raises(ModelError, match=r"alpha 64.*lora\.alpha is 8"):
        finetune("lora.rank=4", "lora.alpha=8", name="third", warm_start=first.job.output)


def test_modules_saved_whole_are_trained_in_float32(finetune: Finetune) -> None:
    run = finetune("model.dtype=bfloat16", "training.precision=bf16", "lora.modules_to_save=[norm]")
    assert {parameter.dtype for parameter in run.parameters} == {torch.float32}
    run.run()


def test_all_linear_on_some_layers_names_what_peft_would(finetune: Finetune) -> None:
    everywhere = finetune("training.max_steps=1").model.targeted_module_names
    some = finetune("training.max_steps=1", "lora.layers_to_transform=[1]", name="some").model.targeted_module_names
    assert sorted(some) == sorted(name for name in everywhere if ".layers.1." in name)


def test_divergence_stops_and_says_what_to_do(finetune: Finetune) -> None:
    run = finetune("training.learning_rate=1e30", "training.max_steps=20", "training.logging_steps=1")
    with pytest.raises(TrainingDiverged, match=r"step \d+: the loss is .*learning_rate"):
        run.run()
    assert not list(run.job.output.iterdir())


def test_unknown_target_is_told(finetune: Finetune) -> None:
    with pytest.raises(ModelError, match=r"lora\.target_modules.*w_proj"):
        finetune("lora.target_modules=[w_proj]")


def test_optimizer_without_its_device_is_told(finetune: Finetune) -> None:
    if torch.cuda.is_available():
        pytest.skip("real data: this machine has the device")
    with pytest.raises(UnsupportedOptimizer, match="paged_adamw_8bit needs CUDA; use adamw"):
        finetune("training.optimizer=paged_adamw_8bit")


@pytest.mark.parametrize("precision", ["bf16", "fp16", "full_bf16"])
def test_lower_precisions_train(finetune: Finetune, precision: str) -> None:
    dtype = ["model.dtype=bfloat16"] if precision == "full_bf16" else []
    small = ("training.max_steps=6", "training.macro_batch_size=2", "training.micro_batch_size=2")
    run = finetune(f"training.precision={precision}", *small, *dtype)
    run.run()
    assert run.log.held_out_loss["after"] < 0.9 * run.log.held_out_loss["before"]  # type: ignore[operator]
    adapter = {tensor.dtype for tensor in weights(run.job.output).values()}
    assert adapter == {torch.bfloat16 if precision == "full_bf16" else torch.float32}
