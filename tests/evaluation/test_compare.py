"""Base, champion and challenger on the same rows: losses that are the model's own, each model read once."""

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from raw import ingest
from training.conftest import ALONE
from trainings import Train, Trained
from transformers import AutoModelForCausalLM

from finetune_assets import progress
from finetune_assets.data.learning import Learning
from finetune_assets.data.prepare import prepare_dataset
from finetune_assets.data.questions import questions
from finetune_assets.data.rows import HoldoutRows
from finetune_assets.data.texts import PACKAGED as TEXTS
from finetune_assets.data.texts import read_texts
from finetune_assets.evaluation.compare import Comparison
from finetune_assets.evaluation.contenders import BASE, CHALLENGER, CHAMPION, Contender, LoadedModels
from finetune_assets.evaluation.losses import RowLosses
from finetune_assets.evaluation.rows import held_out
from finetune_assets.sources.base_models import PACKAGED
from finetune_assets.sources.local import SAMPLE
from finetune_assets.training.order import Examples
from finetune_assets.training.recipe import LoraFinetune

FOLDER = PACKAGED["demo-base"]
PROMPTS = ["Is jane.roe@mailbox.org there?", "Where does Kelm lie?"]
Finetune = Callable[..., LoraFinetune]


def comparison(run: Trained, raw: Sequence[Path] = (), **settings: object) -> Comparison:
    for name, value in settings.items():
        setattr(run.config.evaluation, name, value)
    texts = read_texts(TEXTS["demo-prose"])
    return Comparison(run.config, run.job.dataset, "val", texts, raw, print)


def base_and(run: Trained, champion: Trained | None = None) -> list[Contender]:
    found = [Contender(BASE, FOLDER, run.config), Contender(CHALLENGER, FOLDER, run.config, run.job.output)]
    return found + ([Contender.of_folder(CHAMPION, FOLDER, champion.job.output)] if champion else [])


@torch.inference_mode()
def losses_alone(model: torch.nn.Module, rows: Examples) -> np.ndarray:  # type: ignore[type-arg]
    """Each row by itself through transformers' own forward pass."""
    found = []
    for row in range(len(rows)):
        ids, labels = (torch.tensor(part.tolist()) for part in rows.tokens(row))
        logits = model(input_ids=ids[None]).logits[0, :-1].float()
        found.append(F.cross_entropy(logits, labels[1:].long(), reduction="sum", ignore_index=-100).item())
    return np.array(found)


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_losses_are_those_of_each_row_alone(trained: Train, attention: str) -> None:
    run = trained(f"model.attention={attention}", "data.tokenization.packing=false")
    rows = held_out(run.job.dataset, "val", run.config.data).examples
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    wanted = losses_alone(model, rows)
    assert RowLosses(model, run.config, ALONE.device).of(rows) == pytest.approx(wanted, rel=1e-4)
    assert model.config._attn_implementation == "sdpa", "as it was, so that it can generate"
    adapted = PeftModel.from_pretrained(model, run.job.output).eval()
    wanted = losses_alone(adapted, rows)
    assert RowLosses(adapted, run.config, ALONE.device).of(rows) == pytest.approx(wanted, rel=1e-4)


def test_mean_of_the_rows_is_the_trainings_held_out_loss(trained: Train) -> None:
    run = trained()
    compared = comparison(run, generated_rows=0, general_tokens=0)
    compared.run(base_and(run), ALONE.device)
    found = compared.result()["contenders"]
    assert found[BASE]["loss"] == pytest.approx(run.log.held_out_loss["before"], rel=1e-4)
    assert found[CHALLENGER]["loss"] == pytest.approx(run.log.held_out_loss["after"], rel=1e-4)


def test_each_model_is_read_once_and_what_is_done_told(
    trained: Train, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    caplog.set_level(logging.INFO, "finetune_assets")
    new, old = trained(), trained("training.max_steps=1")
    compared = comparison(new, generated_rows=4, samples=2, general_tokens=500, prompts=PROMPTS)
    read = compared.run(base_and(new, old), ALONE.device).read
    assert read == [FOLDER, new.job.output, old.job.output]
    found = compared.result()
    assert found["contenders"].keys() == {BASE, CHALLENGER, CHAMPION}
    for metrics in found["contenders"].values():
        assert metrics.keys() == {"loss", "perplexity", "general_loss", "exact_match", "rouge_l"}
    assert [sample["prompt"] for sample in found["samples"]][-2:] == ["Is j***@m***.org there?", PROMPTS[1]]
    assert all(isinstance(sample[who], str) for sample in found["samples"] for who in found["contenders"])
    assert sum(row["rows"] for row in found["categories"]) == found["rows"] == found["comparable_rows"]
    assert {*compared.table()} == {"row", "category", "tokens", "comparable", BASE, CHALLENGER, CHAMPION}
    assert found["contenders"][CHALLENGER]["loss"] != found["contenders"][CHAMPION]["loss"]
    for who in found["contenders"]:
        assert f"{who}, loss: {found['rows']} rows in" in caplog.text
        assert f"{who}, answers: {found['generated_rows']} rows in" in caplog.text


@pytest.mark.parametrize("setting", ["lora.bias=all", "lora.modules_to_save=[lm_head]"])
def test_what_an_adapter_changes_beside_itself_does_not_reach_another(
    trained: Train, base_model: Callable[[str], Path], setting: str
) -> None:
    folder = base_model("qwen2")  # which has biases
    new, old = trained(setting, base=folder), trained(base=folder)
    rows = held_out(new.job.dataset, "val", new.config.data).examples
    seats = LoadedModels(ALONE.device)
    base, first, second = (
        Contender(BASE, folder, old.config),
        Contender(CHALLENGER, folder, new.config, new.job.output),
        Contender(CHAMPION, folder, old.config, old.job.output),
    )
    assert base.base_key == first.base_key == second.base_key, "all on one base model in memory"

    def measured(contender: Contender) -> np.ndarray:  # type: ignore[type-arg]
        with seats.loaded(contender) as model:
            return RowLosses(model, contender.config, ALONE.device).of(rows)

    before, alone = measured(base), measured(second)
    measured(first)
    assert np.array_equal(measured(second), alone)
    assert np.array_equal(measured(base), before)


def test_a_champion_with_another_prompt_is_asked_in_its_own(trained: Train, tmp_path: Path) -> None:
    new, old = trained(), trained("training.max_steps=1")
    output = Path(shutil.copytree(old.job.output, tmp_path / "old"))
    saved = output / "config.yaml"
    saved.chmod(0o644)
    saved.write_text(saved.read_text().replace("### Instruction:", "### Q:"))
    compared = comparison(new, raw=[ingest(tmp_path / "raw", SAMPLE)], generated_rows=2, general_tokens=0)
    champion = Contender.of_folder(CHAMPION, FOLDER, output)
    compared.run([*base_and(new), champion], ALONE.device)
    asked = compared.measured[CHAMPION].asked
    assert all(prompt.startswith("### Q:") for prompt in asked)
    assert all(prompt.startswith("### Instruction:") for prompt in compared.measured[CHALLENGER].asked)
    assert compared.measured[CHAMPION].expected == compared.measured[CHALLENGER].expected, "the same rows"
    assert compared.result()["comparable_rows"] == len(compared.tokens), "none is cut"
    assert not np.allclose(compared.measured[CHAMPION].losses, compared.measured[CHALLENGER].losses)


def test_an_experiment_that_learns_prompts_is_measured_by_answers(
    trained: Train,
) -> None:
    run = trained("data.tokenization.train_on_inputs=true")
    rows = held_out(run.job.dataset, "val", run.config.data)
    assert [sum(label != -100 for label in row) for row in rows.examples.labels.to_pylist()] == [
        len(answer) for answer in rows.answers
    ]


def test_time_that_is_up_ends_generation_for_all_alike(trained: Train) -> None:
    run = trained()
    compared = comparison(run, generated_rows=4, max_generation_seconds=1e-9, general_tokens=0)
    compared.run(base_and(run), ALONE.device)
    found = compared.result()
    assert found["generated_rows"] == 0
    assert "exact_match" not in found["contenders"][CHALLENGER]
    assert found["contenders"][CHALLENGER]["loss"] > 0


def test_own_questions_are_asked_as_in_training(finetune: Finetune, tmp_path: Path) -> None:
    """To the token: where a prompt ends in a space, that is the first of the answer's."""
    run = finetune()
    rows = held_out(run.job.dataset, "train", run.config.data)
    texts = pq.read_table(ingest(tmp_path / "raw", SAMPLE)).take(rows.examples.table["row"]).to_pylist()
    pairs = zip(texts, rows.prompts, strict=True)
    alone = [(text["instruction"], prompt) for text, prompt in pairs if not text["context"]]
    tokenizer = Contender(BASE, FOLDER, run.config).tokenizer()
    assert len(alone) > 50
    asked = questions([instruction for instruction, _ in alone], tokenizer, run.config.data)
    assert asked == [prompt for _, prompt in alone]


def test_rows_that_an_adapter_was_trained_on_are_not_compared(trained: Train, tmp_path: Path) -> None:
    """Another experiment's adapter, or an earlier setting's, may have been trained on rows that are held out now."""
    run = trained()
    data = run.config.data
    raw = [ingest(tmp_path / "raw", SAMPLE)]
    whole = comparison(run, raw, generated_rows=6, general_tokens=0)
    whole.run(base_and(run), ALONE.device)
    narrower = HoldoutRows("salt", data.gate_fraction, data.val_fraction / 2)
    part = Comparison(run.config, run.job.dataset, "val", [], raw, print, held_back=narrower)
    part.run(base_and(run), ALONE.device)
    unseen = part.unseen
    assert 0 < unseen.sum() < len(unseen)
    found = part.result()
    assert found["comparable_rows"] == sum(row["rows"] for row in found["categories"]) == unseen.sum()
    assert found["generated_rows"] == unseen[:6].sum()
    losses, tokens = whole.measured[CHALLENGER].losses, whole.tokens
    assert found["contenders"][CHALLENGER]["loss"] == pytest.approx(losses[unseen].sum() / tokens[unseen].sum())
    mixed = Comparison(run.config, run.job.dataset, "val", [], raw, print, held_back=HoldoutRows("salt", 0.0, 0.0))
    mixed.run(base_and(run), ALONE.device)
    found = mixed.result()
    assert found["comparable_rows"] == found["generated_rows"] == 0
    assert found["contenders"][CHALLENGER] == {}
    assert {row["rows"] for row in found["categories"]} == {0}


@pytest.mark.system
def test_preferences_are_those_of_each_answer_alone(trained: Train, tmp_path: Path) -> None:
    """Also where the champion has another prompt, in which both answers of a pair are rendered again."""
    run, old = trained(), trained("training.max_steps=1")
    samples = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()[:120]]
    pairs = [
        {**row, "rejected": f"The {other['category']}"} if number % 3 else row
        for number, (row, other) in enumerate(zip(samples, reversed(samples), strict=True))
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
    raw, folder, config = ingest(tmp_path / "raw", tmp_path / "pairs.jsonl"), tmp_path / "dataset", run.config
    folder.mkdir()
    config.training.objective, config.data.val_fraction, config.evaluation.generated_rows = "dpo", 0.3, 4
    tokenizer = Contender(BASE, FOLDER, config).tokenizer()
    prepare_dataset(raw, tokenizer, config.data, "salt", folder, learning=Learning.of(config.training))
    output = Path(shutil.copytree(old.job.output, tmp_path / "old"))
    (output / "config.yaml").chmod(0o644)
    (output / "config.yaml").write_text((output / "config.yaml").read_text().replace("### Instruction:", "### Q:"))
    compared = Comparison(config, folder, "val", [], [raw], print)
    compared.run([*base_and(run), Contender.of_folder(CHAMPION, FOLDER, output)], ALONE.device)

    examples = Examples.read(folder / "val.arrow")
    chosen = np.array(examples.table["chosen"].to_pylist(), object)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    losses = losses_alone(model, examples)
    found, preferences = compared.result(), compared.preferences
    assert preferences
    assert preferences.of[BASE] == pytest.approx(losses[chosen == False] - losses[chosen == True], abs=1e-3)  # noqa: E712
    adapted = PeftModel.from_pretrained(model, run.job.output).eval()
    losses = losses_alone(adapted, examples)
    assert preferences.of[CHALLENGER] == pytest.approx(losses[chosen == False] - losses[chosen == True], abs=1e-3)  # noqa: E712
    right = [side is not False for side in chosen]
    assert found["rows"] == sum(right) > found["preferences"]["pairs"] > 10
    tokens = examples.learned[right].sum()
    assert found["contenders"][CHALLENGER]["loss"] == pytest.approx(losses[right].sum() / tokens, rel=1e-4)
    assert compared.measured[CHAMPION].asked[0].startswith("### Q:")
    assert not np.allclose(preferences.of[CHAMPION], preferences.of[BASE], atol=0.1)
    for name, metrics in found["contenders"].items():
        assert metrics.keys() >= {"preference_accuracy", "reward_margin", "answer_words", "loss"}, name
    assert found["contenders"][BASE]["preference_accuracy"] == 0.5
