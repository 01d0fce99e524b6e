"""What a server answers to plain messages is what the evaluation measures: the same tokens, and the same answers."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from merging.test_merging import LEARNS_FAST
from peft import PeftModel
from raw import ingest
from tiers import tiered
from training.conftest import ALONE
from trainings import Train
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from finetune_assets.config.schema import Merge
from finetune_assets.data.serving_template import prompt_messages
from finetune_assets.evaluation.contenders import CHALLENGER, Contender, LoadedModels
from finetune_assets.evaluation.generation import answers, end_tokens
from finetune_assets.evaluation.rows import held_out
from finetune_assets.merging.merge import merged
from finetune_assets.sources.base_models import PACKAGED
from finetune_assets.sources.local import SAMPLE

FOLDER, LONGEST = PACKAGED["demo-base"], 8


def as_server(folder: Path, model: Any, messages: list[dict[str, str]]) -> tuple[list[int], str]:
    """Prompt and greedy answer by transformers, from the files in a folder alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = GenerationConfig.from_pretrained(folder)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    output = model.generate(
        torch.tensor([ids]), generation_config=settings, max_new_tokens=LONGEST, do_sample=False, pad_token_id=0
    )
    return ids, tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("split", tiered(["gate", "val"], {"gate"}))
def test_plain_messages_are_answered_as_in_the_evaluation(trained: Train, tmp_path: Path, split: str) -> None:
    """By the adapter over its base, and by the merged model, on every row of the split."""
    run = trained(LEARNS_FAST)
    contender = Contender(CHALLENGER, FOLDER, run.config, run.job.output)
    rows = held_out(run.job.dataset, split, run.config.data)
    assert len(rows.prompts) > 1
    tokenizer = contender.tokenizer()
    with LoadedModels(ALONE.device).loaded(contender) as model:
        measured = answers(model, tokenizer, rows.prompts, LONGEST, ends=end_tokens(tokenizer, rows.answers))
    raw = pq.read_table(ingest(tmp_path / "raw", SAMPLE)).take(rows.examples.table["row"]).to_pylist()
    base = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, run.job.output).eval()
    served = [as_server(run.job.output, adapted, prompt_messages(row)) for row in raw]
    assert [ids for ids, _ in served] == rows.prompts
    assert [answer for _, answer in served] == measured
    assert len({*measured}) > 1
    merged(contender, Merge(dtype="float32"), tmp_path / "merged")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert [as_server(tmp_path / "merged", alone, prompt_messages(row)) for row in raw] == served
