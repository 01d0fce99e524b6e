"""`make demo`: the whole graph on the packaged rows and model, and what came out of it."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from finetune_assets.artifacts.kinds import ADAPTERS
from finetune_assets.errors import UserError
from finetune_assets.evaluation.files import read_evaluation
from finetune_assets.evaluation.metrics import exact_match
from finetune_assets.resources.project import Project
from finetune_assets.store.artifacts import ArtifactRef

EXPERIMENT = "demo"
COMMAND = ["dagster", "asset", "materialize", "--select", "*", "--partition", EXPERIMENT]
COMMAND += ["-m", "finetune_assets.definitions"]
INFO_ONLY = json.dumps({"loggers": {"console": {"config": {"log_level": "INFO"}}}})


def main() -> None:
    """Materialize the demo experiment and print its story."""
    console, began = Console(), time.monotonic()
    os.environ["FINETUNE_RAW_DATA"] = "sample"  # the demo is of the packaged rows, whatever else is set
    trained_before = adapter_in_store() is not None
    console.print(f"[bold]$ {shlex.join(COMMAND)}[/bold]", highlight=False, soft_wrap=True)
    quiet = {**os.environ, "PYTHONWARNINGS": "ignore"}
    code = subprocess.call([sys.executable, "-m", *COMMAND, "--config-json", INFO_ONLY], env=quiet)
    if code != 0:
        sys.exit(code)
    tell(console, trained_before, time.monotonic() - began)


def adapter_in_store() -> ArtifactRef | None:
    """The demo's adapter, if one was trained from the data and settings of now."""
    try:
        return Project().lineage(EXPERIMENT).expected(ADAPTERS)
    except UserError:
        return None


def tell(console: Console, trained_before: bool, seconds: float) -> None:
    """Print what was measured, some answers, and where to go on."""
    lineage = Project().lineage(EXPERIMENT)
    evaluation = read_evaluation(lineage.store.fetch(lineage.evaluation()))
    champion = lineage.champions.current()
    console.print()
    console.print(answers(evaluation["samples"]))
    console.print(measurements(evaluation))
    if champion:
        told = f"[bold]Champion {champion.number}[/bold], {champion.action}: {champion.reason}"
        console.print(told, highlight=False, soft_wrap=True)
    if trained_before:
        console.print("[bold]Nothing was trained again[/bold]: data, settings and code are those of the last run.")
    uri = lineage.expected(ADAPTERS).uri
    shown = uri.removeprefix("file://").removeprefix(f"{Path.cwd()}/")
    console.print(f"Done in {seconds:.0f} s. Adapter stored in\n  {shown}", highlight=False, soft_wrap=True)
    console.print(
        "\nSee it:   make ui   (then http://127.0.0.1:3000, Lineage)\n"
        "Go on:    docs/your-data.md, docs/your-model.md; a real model is one YAML line away:\n"
        "          configs/experiments/smollm2-135m-dolly.yaml",
        highlight=False,
        soft_wrap=True,
    )


def answers(samples: list[dict[str, str]]) -> Table:
    """Questions and both models' answers, side by side."""
    table = Table(title="Held-out questions", show_lines=True)
    for name in ("question", "expected", "base model", "with adapter", ""):
        table.add_column(name)
    for sample in samples:
        asked = sample["prompt"].removeprefix("### Instruction: ").split("### Response")[0]
        question = asked.replace("### Input:", "Context:").strip()
        right = "✓" if exact_match(sample["challenger"], sample["expected"]) else "✗"
        table.add_row(question, sample["expected"], sample["base"], sample["challenger"], right)
    return table


METRICS = {
    "loss": ("held-out loss", "{:.3f}"),
    "exact_match": ("exact match", "{:.0%}"),
    "rouge_l": ("ROUGE-L", "{:.2f}"),
    "general_loss": ("loss of general text", "{:.3f}"),
}


def measurements(evaluation: dict[str, Any]) -> Table:
    """What base and adapter (and the champion before it, if there was one) lose and get right."""
    contenders = evaluation["contenders"]
    table = Table(title=f"Held-out evaluation ({evaluation['rows']} gate rows)")
    table.add_column("")
    for name in contenders:
        table.add_column({"challenger": "with adapter", "base": "base model"}.get(name, name))
    for metric, (title, form) in METRICS.items():
        if all(metric in found for found in contenders.values()):
            table.add_row(title, *(form.format(found[metric]) for found in contenders.values()))
    return table


if __name__ == "__main__":
    main()
