"""`finetune demo`: the whole graph on the packaged rows and model, and a summary of its results."""

import sys
import time
from typing import Any

import click
from rich.table import Table

from finetune_assets.artifacts.kinds import ADAPTERS
from finetune_assets.cli.run import materialize
from finetune_assets.cli.terminal import out, shown_path, styled
from finetune_assets.errors import UserError
from finetune_assets.evaluation.files import read_evaluation
from finetune_assets.evaluation.metrics import METRICS
from finetune_assets.evaluation.metrics.exact_match import exact_match
from finetune_assets.resources import deployment
from finetune_assets.resources.project import Project
from finetune_assets.store.artifacts import ArtifactRef

EXPERIMENT = "demo"
WHAT = """\
A packaged model of two million parameters, which has read about invented towns, learns from 800 packaged rows to answer
questions about them. This shows the whole graph offline, from rows to a promoted adapter; the model is too small to
answer anything else, and it forgets much of its prose.
"""


@click.command()
def demo() -> None:
    """Train and evaluate a small model on packaged rows, offline, in a minute.

    The demo has a namespace and a Dagster home of its own, which `finetune --demo COMMAND` uses as well, so it never
    affects your experiments.

    \b
    Afterwards:
      finetune --demo ui
      finetune --demo chat demo
      finetune --demo adapter history demo
    """
    began = time.monotonic()
    out.print(WHAT)
    deployment.use_demo()
    trained_before = adapter_in_store() is not None
    code = materialize(EXPERIMENT)
    if code != 0:
        sys.exit(code)
    summarize(trained_before, time.monotonic() - began)


def adapter_in_store() -> ArtifactRef | None:
    """The demo's adapter, if the store has one of the current data and settings."""
    try:
        return Project().lineage(EXPERIMENT).expected(ADAPTERS)
    except UserError:
        return None


def summarize(trained_before: bool, seconds: float) -> None:
    """Print answers, measurements, the champion, and what to do next."""
    lineage = Project().lineage(EXPERIMENT)
    evaluation = read_evaluation(lineage.store.fetch(lineage.evaluation()))
    champion = lineage.champions.current()
    out.print()
    if trained_before:
        out.print(styled("Nothing was trained again:", "bold"), "same data, settings and code as in the last run.")
    out.print(answers(evaluation["samples"]))
    out.print(measurements(evaluation))
    if champion:
        out.print(styled(f"Champion {champion.number},", "bold"), f"{champion.action}: {champion.reason}")
    out.print(f"Done in {seconds:.0f} s. Adapter stored in\n  {shown_path(lineage.expected(ADAPTERS).uri)}")
    is_checkout = (deployment.root() / "Makefile").is_file()  # where the command is in .venv, which may not be active
    ui, command = ("make demo-ui", ".venv/bin/finetune") if is_checkout else ("finetune --demo ui", "finetune")
    out.print(
        f"\nExplore:     {ui}   (then http://127.0.0.1:3000, Lineage)\n"
        f"Ask:         {command} --demo chat demo\n"
        "Your data:   name it in configs/raw_data.yaml\n"
        f"Real model:  {command} new mine --from smollm2-135m-dolly   (from the Hub; without it, docs/real-model.md)"
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


def measurements(evaluation: dict[str, Any]) -> Table:
    """Losses and scores of the base model, the adapter, and the champion before it if there was one."""
    contenders = evaluation["contenders"]
    table = Table(title=f"Held-out evaluation ({evaluation['rows']} gate rows)")
    table.add_column("")
    for name in contenders:
        table.add_column({"challenger": "with adapter", "base": "base model"}.get(name, name))
    for metric in METRICS:
        if all(metric.name in scores for scores in contenders.values()):
            table.add_row(metric.title, *(metric.form.format(scores[metric.name]) for scores in contenders.values()))
    return table
