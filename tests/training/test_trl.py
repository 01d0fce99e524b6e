"""Loss, gradients and log-probabilities of judged answers are TRL's, on the same pairs, model and adapter."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from judgements import BASE, Rows, configured, labelled, pairs, prepared
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from training.conftest import ALONE, MADE_FROM
from training.measuring import gradients, relative
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_assets.config.schema import ExperimentConfig
from finetune_assets.training.judged import JudgedExamples
from finetune_assets.training.model import peft_config
from finetune_assets.training.recipe import LoraFinetune
from finetune_assets.training.reporting import Reporter
from finetune_assets.training.state import TrainingPaths
from finetune_assets.worker.rendezvous import RANKS_FILE

pytestmark = pytest.mark.system
SETTINGS = (
    "training.macro_batch_size=64",
    "training.micro_batch_size=1",
    "training.max_grad_norm=0",
    "data.tokenization.cutoff_len=80",
    "data.val_fraction=0",
    "data.gate_fraction=0",
    "data.near_duplicate_threshold=null",
)
ROWS: dict[str, Callable[[int], Rows]] = {"dpo": pairs, "kto": labelled}
TWO_RANKS = """
import sys
from pathlib import Path
import torch
from judgements import configured
from training.measuring import gradients
from training.test_trl import training
from finetune_assets.training.distributed import joined
dataset, folder, *overrides = sys.argv[1:]
with joined() as process:
    run = training(configured(*overrides), Path(dataset), Path(folder) / str(process.rank), process)
    torch.save(gradients(run), Path(folder) / f"gradients-{process.rank}.pt")
"""


def training(
    config: ExperimentConfig,
    dataset: Path,
    folder: Path,
    process: Any = ALONE,
    warm_start: Path | None = None,
    reference: Path | None = None,
) -> LoraFinetune:
    """A training before its first step, with its reference."""
    folder.mkdir(parents=True)
    job = TrainingPaths(BASE, dataset, folder, folder / "scratch", MADE_FROM, warm_start, reference=reference)
    run = LoraFinetune(job, config, process, Reporter(print))
    assert run.objective
    run.objective.prepare_reference()
    return run


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., LoraFinetune]:
    """Makes trainings of one step over all judged rows."""

    def make(objective: str, *overrides: str, rows: int = 9, **paths: Any) -> LoraFinetune:
        config = configured(f"training.objective={objective}", *SETTINGS, *overrides)
        folder = tmp_path / str(len([*tmp_path.iterdir()]))
        return training(config, prepared(folder, ROWS[objective](rows), config), folder / "run", **paths)

    return make


def trl(run: LoraFinetune, folder: Path, initial: Path | None = None, **settings: Any) -> tuple[float, Tensor, Any]:
    """Loss, gradients and metrics of TRL's trainer, with the adapter of a training, on all its examples at once.

    Args:
        run: The training.
        folder: A folder for TRL.
        initial: Adapter to begin from, of which TRL makes the reference; by default, the base model is.
        settings: Settings of TRL's trainer.
    """
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    is_dpo = run.training.objective == "dpo"
    examples = trl_examples(run.judged[0])
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    common = {
        **{"output_dir": str(folder), "report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False},
        **{"per_device_train_batch_size": len(examples), "beta": run.training.preference.beta, **settings},
    }
    model = PeftModel.from_pretrained(base, initial, is_trainable=True) if initial else base
    texts: dict[str, Any] = {"prompt": ["a"] * 4, "chosen": ["b"] * 4, "rejected": ["c"] * 4}
    if not is_dpo:
        texts = {"prompt": ["a"] * 4, "completion": ["b", "c", "d", "e"], "label": [True, False] * 2}
    trainer = (DPOTrainer if is_dpo else KTOTrainer)(
        model=model,
        args=(DPOConfig if is_dpo else KTOConfig)(**common),
        train_dataset=Dataset.from_dict(texts),
        processing_class=AutoTokenizer.from_pretrained(BASE),
        peft_config=None if initial else peft_config(run.config.lora, base),
    )
    set_peft_model_state_dict(trainer.model, get_peft_model_state_dict(run.model))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
    loss.backward()
    trained = dict(trainer.model.named_parameters())
    names = [name for name, parameter in run.model.named_parameters() if parameter.requires_grad]
    return float(loss), torch.cat([trained[name].grad.flatten() for name in names]), trainer._metrics["train"]


def trl_examples(judged: JudgedExamples) -> list[dict[str, Any]]:
    """The judged examples as TRL's trainers tokenize them."""
    table = judged.examples.table.to_pylist()
    split = [(row["input_ids"][: row["prompt_length"]], row["input_ids"][row["prompt_length"] :]) for row in table]
    if judged.is_dpo:
        both = zip(split[::2], split[1::2], strict=True)
        return [{"prompt_ids": good[0], "chosen_ids": good[1], "rejected_ids": bad[1]} for good, bad in both]
    answers = [answer for _, answer in split]
    return [
        {"prompt_ids": prompt, "completion_ids": answer, "KL_completion_ids": other, "label": row["desirable"]}
        for (prompt, answer), other, row in zip(split, answers[-1:] + answers[:-1], table, strict=True)
    ]


def first_step(run: LoraFinetune) -> tuple[float, Tensor, Tensor]:
    """Loss, gradients and sums of the rewards of the first step, with the adapter of `measuring.gradients`."""
    gradient = gradients(run)
    assert run.objective
    torch.manual_seed(1)
    for parameter in run.parameters:
        torch.nn.init.normal_(parameter, std=0.02)
    loss = sum(float(part.detach()) for part in run.objective.losses(run.work(0)))
    return loss, gradient, run.objective.sums


@pytest.mark.parametrize("packing", ["true", "false"])
@pytest.mark.parametrize(
    ("objective", "overrides", "settings"),
    [
        ("dpo", (), {}),
        ("dpo", ("training.preference.length_normalised=true",), {"loss_type": ["sigmoid_norm"]}),
        ("kto", (), {}),
        (
            "kto",
            ("training.preference.undesirable_weight=1.5", "training.preference.beta=0.5"),
            {"undesirable_weight": 1.5},
        ),
    ],
)
def test_loss_gradients_and_log_probabilities_are_trls(
    make: Callable[..., LoraFinetune],
    tmp_path: Path,
    objective: str,
    overrides: tuple[str, ...],
    settings: dict[str, Any],
    packing: str,
) -> None:
    run = make(objective, f"data.tokenization.packing={packing}", *overrides)
    loss, gradient, sums = first_step(run)
    assert len(run.work(0).batches) > 1
    theirs, their_gradient, metrics = trl(run, tmp_path / "trl", **settings)
    assert loss == pytest.approx(theirs, rel=1e-5)
    assert relative(gradient, their_gradient) < 1e-5
    if objective == "dpo" and not overrides:
        good, bad, correct, count = (float(sums[index]) for index in (0, 1, 2, 3))
        assert good / count == pytest.approx(metrics["rewards/chosen"][0], rel=1e-4)
        assert bad / count == pytest.approx(metrics["rewards/rejected"][0], rel=1e-4)
        assert correct / count == pytest.approx(metrics["rewards/accuracies"][0])


def test_the_champion_as_reference_is_trls_copy_of_the_initial_adapter(
    make: Callable[..., LoraFinetune], tmp_path: Path
) -> None:
    """Whether training begins from the champion, or only compares with it."""
    first = make("dpo")
    gradients(first)
    champion = tmp_path / "champion"
    first.model.save_pretrained(champion)
    base = [float(part) for part in first.judged[0].reference]
    references = []
    for warm_start in (champion, None):
        run = make("dpo", "training.preference.reference=champion", warm_start=warm_start, reference=champion)
        references.append(run.judged[0].reference)
        loss, gradient, _ = first_step(run)
        assert [*run.model.peft_config] == ["default"]
        theirs, their_gradient, _ = trl(run, tmp_path / "trl", initial=champion)
        assert loss == pytest.approx(theirs, rel=1e-5)
        assert relative(gradient, their_gradient) < 1e-5
    assert torch.allclose(*references, rtol=1e-6)
    assert max(abs(a - b) for a, b in zip(base, references[0].tolist(), strict=True)) > 0.01


@pytest.mark.soak
@pytest.mark.system
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_two_ranks_have_the_gradient_of_one(make: Callable[..., LoraFinetune], tmp_path: Path, objective: str) -> None:
    overrides = (f"training.objective={objective}", *SETTINGS)
    run = make(objective, rows=16)
    alone = gradients(run)
    folder = tmp_path / "ranks"
    folder.mkdir()
    (folder / "script.py").write_text(TWO_RANKS)
    command = [sys.executable, str(folder / "script.py"), str(run.job.dataset), str(folder), *overrides]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", RANKS_FILE: str(folder / "store")}
    common |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ranks = [
        subprocess.Popen(command, env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in (0, 1)
    ]
    assert [rank.wait(500) for rank in ranks] == [0, 0]
    for rank in (0, 1):
        assert relative(torch.load(folder / f"gradients-{rank}.pt"), alone) < 1e-5
