"""`python -m finetune_assets.evaluation --config ... --base-model DIR --adapter DIR --dataset DIR --output DIR`."""

import argparse
import json
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from finetune_assets.config.loading import load_resolved
from finetune_assets.config.schema import ExperimentConfig
from finetune_assets.evaluation.generation import answers, end_tokens, readable
from finetune_assets.evaluation.metrics import exact_match
from finetune_assets.training.batches import Examples
from finetune_assets.training.distributed import joined
from finetune_assets.training.embeddings import experiment_tokenizer, make_room
from finetune_assets.training.model import load_base
from finetune_assets.training.output import TRAINER_STATE
from finetune_assets.training.reporting import Reporter, reporter


def main() -> None:
    parser = argparse.ArgumentParser(prog="finetune_assets.evaluation", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="resolved configuration")
    parser.add_argument("--made-from", type=Path, required=True, help="JSON file that names the inputs")
    parser.add_argument("--base-model", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--dataset", type=Path, required=True, help="folder of the tokenized dataset")
    parser.add_argument("--adapter", type=Path, required=True, help="folder of the adapter")
    parser.add_argument("--output", type=Path, required=True, help="empty folder for evaluation.json")
    args = parser.parse_args()

    config = load_resolved(args.config)
    config.wandb = None
    with joined() as process, reporter(process, config, experiment="", run_id="") as voice:
        base = load_base(args.base_model, config.model, config.training, process.device)
        tokenizer = experiment_tokenizer(args.base_model, config)
        make_room(base, tokenizer, config)
        model = PeftModel.from_pretrained(base, args.adapter).eval()
        evaluation = compare(model, tokenizer, args.dataset, config, voice)
    held_out = json.loads((args.adapter / TRAINER_STATE).read_text(encoding="utf-8"))["held_out_loss"]
    for when, loss in held_out.items():
        if loss is not None:
            evaluation["metrics"][f"held_out_loss_{when}"] = loss
    (args.output / "evaluation.json").write_text(json.dumps(evaluation, ensure_ascii=False, indent=1), encoding="utf-8")


def compare(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, dataset: Path, config: ExperimentConfig, voice: Reporter
) -> dict[str, Any]:
    """Let base and adapter answer validation rows.

    Returns:
        `metrics` (exact match of both, a share of 1) and `samples` (prompt, expected, base's and adapter's answer).
    """
    settings, kept = config.evaluation, config.data.tokenization.added_tokens
    rows = Examples(dataset / "val.arrow").table.slice(0, settings.generated_rows)
    columns = rows.select(["input_ids", "prompt_length"]).to_pydict()
    pairs = list(zip(columns["input_ids"], columns["prompt_length"], strict=True))
    prompts = [ids[:length] for ids, length in pairs]
    expected = [readable(tokenizer, ids[length:], kept) for ids, length in pairs]
    ends = end_tokens(tokenizer, [ids[length:] for ids, length in pairs])

    def answered(by: str) -> list[str]:
        def say(done: int, total: int) -> None:
            voice.say(f"{by} answered {done}/{total} held-out rows")

        return answers(model, tokenizer, prompts, settings.max_new_tokens, say, ends, kept)

    with model.disable_adapter():
        by_base = answered("base")
    by_adapter = answered("adapter")
    metrics: dict[str, Any] = {"generated_rows": len(prompts)}
    for name, texts in (("before", by_base), ("after", by_adapter)):
        if texts:
            hits = sum(map(exact_match, texts, expected))
            metrics[f"exact_match_{name}"] = hits / len(texts)
            voice.say(f"exact match {name}: {hits}/{len(texts)}")
    table = zip(prompts, expected, by_base, by_adapter, strict=True)
    samples = [
        {"prompt": readable(tokenizer, p, kept), "expected": e, "base": b, "adapter": a}
        for p, e, b, a in list(table)[: settings.samples]
    ]
    return {"metrics": metrics, "samples": samples}
