"""What holds for every kind of training: it resumes to the bit, PEFT alone loads it, checkpointing changes nothing."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiers import tiered
from training.conftest import make_run
from training.measuring import Killed, die_at, equal, gradients, logits, relative, token_losses, unbounded, weights
from transformers import AutoModelForCausalLM

from finetune_assets.training.batches import collate
from finetune_assets.training.recipe import LoraFinetune

CPU = torch.device("cpu")
TOKENS = 'data.tokenization.added_tokens=["### Instruction:", "### Response:"]'
STEPS = (
    "training.max_steps=5",
    "training.macro_batch_size=2",
    "training.micro_batch_size=1",
    "training.save_steps=2",
    "training.logging_steps=3",
    "training.eval_steps=1",
)
MEASURED_TIME = ("tokens_per_second", "mfu", "peak_memory_mib", "eta_seconds")


@dataclass(frozen=True)
class Variant:
    """A kind of training.

    Attributes:
        settings: Its overrides.
        base: Name of its base model.
        killed_at: Steps at which it is killed, one after the other.
    """

    settings: tuple[str, ...] = ()
    base: str = "llama"
    killed_at: tuple[int, ...] = (3,)


VARIANTS = {
    "plain": Variant(killed_at=(3, 4)),
    "tokens": Variant((TOKENS,), "llama-tied"),
    "tokens, untied": Variant((TOKENS,)),
    "dora": Variant(("lora.use_dora=true",)),
    "int8": Variant(("model.quantization=int8",)),
    "nf4": Variant(("model.quantization=nf4",)),
    "nf4, tokens": Variant(("model.quantization=nf4", TOKENS), "llama-tied"),
    "nf4, tokens, untied": Variant(("model.quantization=nf4", TOKENS)),
}
EXACT = [name for name in VARIANTS if name != "int8"]
"""Those that compute a token the same whatever is beside it; int8 rounds activations by what it reads with them."""
FOR_EVERY_CHANGE = ("plain", "dora", "int8", "nf4, tokens")
"""Variants of `make test`; each of the others is in `make soak`, and has only what one of these has too."""


@dataclass(frozen=True)
class Pair:
    """One training twice: undisturbed, and killed and resumed."""

    variant: Variant
    base: Path
    straight: LoraFinetune
    resumed: LoraFinetune
    taken: list[list[int]]


@pytest.fixture(scope="module")
def pair(
    request: pytest.FixtureRequest,
    base_model: Callable[[str], Path],
    dataset: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Pair:
    variant = VARIANTS[request.param]
    folder = tmp_path_factory.mktemp("contract")
    base = base_model(variant.base)
    settings = (*STEPS, *variant.settings, "lora.dropout=0.1")
    straight = make_run(folder / "straight", dataset, *settings, base=base)
    straight.run()
    taken = []
    for step in variant.killed_at:
        victim = make_run(folder / "resumed", dataset, *settings, base=base)
        taken.append(die_at(victim, step))
        with pytest.raises(Killed):
            victim.run()
    resumed = make_run(folder / "resumed", dataset, *settings, base=base)
    taken.append(die_at(resumed, -1))
    resumed.run()
    return Pair(variant, base, straight, resumed, taken)


@pytest.mark.parametrize("pair", tiered(VARIANTS, FOR_EVERY_CHANGE, ()), indirect=True, scope="module")
def test_resumed_training_ends_bit_equal(pair: Pair) -> None:
    """Killed between two checkpoints, and just after one."""
    begun = 0
    for taken, end in zip(pair.taken, (*pair.variant.killed_at, 5), strict=True):
        assert taken == list(range(begun, end))
        begun = max(begun, end // 2 * 2)
    assert equal(weights(pair.straight), weights(pair.resumed))
    assert all(torch.equal(a, b) for a, b in zip(pair.straight.parameters, pair.resumed.parameters, strict=True))


@pytest.mark.parametrize("pair", tiered(VARIANTS, FOR_EVERY_CHANGE, ()), indirect=True, scope="module")
def test_resumed_training_reports_the_same(pair: Pair) -> None:
    states = []
    for run in (pair.straight, pair.resumed):
        state = json.loads((run.job.output / "trainer_state.json").read_text())
        history = [{k: v for k, v in entry.items() if k not in MEASURED_TIME} for entry in state["history"]]
        states.append((history, state["tokens"], state["held_out_loss"], state["step"]))
    assert states[0] == states[1]
    assert states[0][3] == 5


@pytest.mark.parametrize("pair", ["plain", "dora"], indirect=True, scope="module")
def test_peft_alone_loads_what_was_trained(pair: Pair) -> None:
    run, ids = pair.straight, collate([[0]], pair.straight.train, CPU).input_ids
    base = AutoModelForCausalLM.from_pretrained(pair.base, dtype=torch.float32)
    with torch.inference_mode():
        untouched = base(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(base, run.job.output).eval()(input_ids=ids).logits
    ours = logits(run, ids)
    assert (ours - loaded).abs().max() < 1e-3
    assert (ours - untouched).abs().max() > 0.05


@pytest.mark.parametrize("pair", tiered(EXACT, FOR_EVERY_CHANGE, ()), indirect=True, scope="module")
def test_packed_equals_alone_token_by_token(pair: Pair) -> None:
    """An example packed between others has the loss that it has alone; the mean would hide a leak."""
    run = pair.straight
    packs = sorted(run.sequences, key=len, reverse=True)[:3]
    assert min(map(len, packs)) > 2
    packed = token_losses(run, collate(packs, run.train, CPU, run.flat))
    with unbounded(run):
        alone = [token_losses(run, collate([[example]], run.train, CPU)) for pack in packs for example in pack]
    assert (packed - torch.cat(alone)).abs().max() < 1e-4


@pytest.mark.parametrize("pair", tiered(VARIANTS, FOR_EVERY_CHANGE, ()), indirect=True, scope="module")
def test_checkpointing_gives_the_same_gradient(pair: Pair, dataset: Callable[..., Path], tmp_path: Path) -> None:
    same = (*STEPS, *pair.variant.settings, "training.max_grad_norm=0")
    plain, twice = (
        make_run(tmp_path / value, dataset, *same, f"training.gradient_checkpointing={value}", base=pair.base)
        for value in ("false", "true")
    )
    assert [run.log.active["gradient_checkpointing"] for run in (plain, twice)] == [False, True]
    assert relative(gradients(twice), gradients(plain)) < 1e-6
