"""DPO against TRL's DPOTrainer, and in memory against cross-entropy: `python -m benchmarks.preference`.

Same random model, same pairs of real rows in the same tokens, same adapter with dropout, same global batch in pairs;
one epoch in float32 on one thread of a CPU, of which the first step is not counted. Both sides compute the reference's
log-probabilities before the first step. Each first runs a few steps with several settings; the best of them is
measured. Cross-entropy is measured with as many tokens in a micro-batch, on both answers of every pair.

- `vs_trl_dpo`: tokens per CPU-second, ours over TRL's; a padded position is no token.
- `memory_vs_sft`: peak RSS with pairs over that with cross-entropy.
"""

import json
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import arguments, interleaved, median, report
from benchmarks.train import ROWS, best_settings, run
from benchmarks.train_candidates import Recipe
from benchmarks.train_subject import Subject, write_model
from finetune_assets.sources.local import SAMPLE

FIGURE = "tokens_per_cpu_s"
LENGTH = 512
RECIPES = {
    "TRL": Recipe("trl_dpo", [*({"micro": size} for size in (1, 2, 4, 8)), {"micro": 2, "precompute": False}]),
    "ours": Recipe("ours", [{"micro": size, "precision": "fp32", "objective": "dpo"} for size in (1, 2, 4)]),
}


@dataclass(frozen=True)
class Work:
    """Amount of work.

    Attributes:
        pairs: Number of pairs.
        steps: Number of global batches that the pairs make up.
        tried_steps: Number of steps with each candidate; the first one is not counted.
    """

    pairs: int
    steps: int
    tried_steps: int


FULL, QUICK = Work(80, 5, 3), Work(24, 3, 2)


def subjects(folder: Path, rows: Path, work: Work) -> dict[str, Path]:
    """Files with the subjects of pairs and of cross-entropy, on the same tokens."""
    sources = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()[: 2 * work.pairs]]
    halves = sources[: work.pairs], sources[work.pairs :]
    pairs = [
        {**row, "chosen": row["response"], "rejected": other["response"]} for row, other in zip(*halves, strict=True)
    ]
    answers = [{**row, "response": row[side]} for row in pairs for side in ("chosen", "rejected")]
    plain = [{key: row[key] for key in ("instruction", "context", "response", "category")} for row in answers]
    model = write_model(folder, "13m", rows, "cpu")
    made = {}
    for objective, written in (("dpo", pairs), ("sft", plain)):
        place = folder / objective
        place.mkdir()
        subject = _prepared(place, model, written, objective, work)
        made[objective] = place / "subject.json"
        subject.write(made[objective])
    return made


def _prepared(folder: Path, model: Path, rows: list[dict[str, Any]], objective: str, work: Work) -> Subject:
    import pyarrow as pa

    from finetune_assets.config.raw_data_schema import Columns
    from finetune_assets.config.schema import Data, Tokenization
    from finetune_assets.data.ingest import PARQUET, write_raw
    from finetune_assets.data.learning import Learning
    from finetune_assets.data.prepare import prepare_dataset
    from finetune_assets.data.readers import SourceFile
    from finetune_assets.data.tokenization import load_tokenizer
    from finetune_assets.training.order import read_packs

    file, packed, plain = folder / "pairs.jsonl", folder / "packed", folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    packed.mkdir()
    write_raw([SourceFile(file.name, file)], Columns(), folder)
    data = Data(val_fraction=0.0, gate_fraction=0.0, tokenization=Tokenization(cutoff_len=LENGTH))
    learning = Learning(objective)
    prepare_dataset(folder / PARQUET, load_tokenizer(str(model)), data, "benchmark", packed, learning=learning)
    table = pa.ipc.open_stream(pa.memory_map(str(packed / "train.arrow"))).read_all().to_pylist()
    examples = len(table)
    if objective == "dpo":
        examples //= 2
        with plain.open("w", encoding="utf-8") as out:
            for good, bad in zip(table[::2], table[1::2], strict=True):
                start = good["prompt_length"]
                ids = {
                    "chosen_ids": good["input_ids"][start:],
                    "rejected_ids": bad["input_ids"][bad["prompt_length"] :],
                }
                out.write(json.dumps({"prompt_ids": good["input_ids"][:start], **ids}) + "\n")
    packs = len(read_packs(packed) or [])
    return Subject(
        str(model), str(packed), str(plain), examples, LENGTH, -(-examples // work.steps), -(-packs // work.steps)
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=Path, default=ROWS if ROWS.exists() else SAMPLE, help="JSON Lines of rows")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="measure memory alone, without TRL")
    args = parser.parse_args()
    work, runs = (QUICK, 1) if args.quick else (FULL, args.runs)
    recipes = {name: each for name, each in RECIPES.items() if name == "ours" or not args.memory}
    if args.quick:
        recipes = {name: replace(each, candidates=each.candidates[1:2]) for name, each in recipes.items()}
    with tempfile.TemporaryDirectory() as folder:
        made = subjects(Path(folder), args.rows, work)
        best = {
            name: best_settings(name, recipe, made["dpo"], "cpu", work.tried_steps, FIGURE)["settings"]
            for name, recipe in recipes.items()
        }
        sides = {name: partial(run, recipe.module, made["dpo"], best[name], "cpu") for name, recipe in recipes.items()}
        ours = best["ours"]
        same_tokens = {**ours, "objective": "sft", "micro": 2 * ours["micro"]}
        sides["ours, sft"] = partial(run, "ours", made["sft"], same_tokens, "cpu")
        measured = interleaved(sides, runs)
    figures = {
        name: {figure: median(runs, figure) for figure in (FIGURE, "peak_memory_mib")}
        for name, runs in measured.items()
    }
    ratios = {"memory_vs_sft": figures["ours"]["peak_memory_mib"] / figures["ours, sft"]["peak_memory_mib"]}
    if not args.memory:
        ratios["vs_trl_dpo"] = figures["ours"][FIGURE] / figures["TRL"][FIGURE]
    lines = [
        (name, f"{each[FIGURE]:,.0f} tokens/CPU-s, {each['peak_memory_mib']:,.0f} MiB, {best.get(name, same_tokens)}")
        for name, each in figures.items()
    ]
    report(f"DPO on 13m, median of {runs}", lines, ratios, args.json)


if __name__ == "__main__":
    main()
