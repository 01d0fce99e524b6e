"""An adapter on the Hub: its files as they are in the store, with what was measured added to its card."""

import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from finetune_assets.artifacts.layout import CARD, write_sums
from finetune_assets.errors import UserError
from finetune_assets.sources import hub


class PublishError(UserError):
    """The Hub does not take it."""


METRICS = {"loss": "Loss", "perplexity": "Perplexity", "exact_match": "Exact match", "rouge_l": "ROUGE-L"}


def publish(adapter: Path, evaluation: dict[str, Any] | None, repo: str, private: bool, workspace: Path) -> str:
    """Upload an adapter's folder as one commit; its address.

    Args:
        adapter: Its files.
        evaluation: What was measured of it, if it was.
        repo: `owner/name`; made if it is not there.
        private: Make it for its owner alone.
        workspace: Empty folder for what is uploaded.

    Raises:
        PublishError: naming the repository and what to do.
    """
    folder = workspace / "upload"
    shutil.copytree(adapter, folder, copy_function=shutil.copyfile)
    if evaluation:
        with_results(folder / CARD, evaluation, repo)
        write_sums(folder)
    where = f"publish to '{repo}'"
    with hub.explained(PublishError, where, repo, "The owner must be you, or an organization that you may write to"):
        client = hub.client()
        client.create_repo(repo, private=private, exist_ok=True)
        commit = client.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Adapter {adapter.parent.name}")
    return str(commit.commit_url)


def with_results(readme: Path, evaluation: dict[str, Any], repo: str) -> None:
    """Add to a card what the evaluation measured: as the Hub's own metadata, and as a table."""
    card = ModelCard.load(readme)
    found, rows = evaluation["contenders"], evaluation["rows"]
    card.data.model_name = repo.rpartition("/")[2]
    card.data.eval_results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out-rows",
            dataset_name=f"{rows} rows that nothing was chosen by",
            metric_type=metric,
            metric_name=title,
            metric_value=round(found["challenger"][metric], 6),
        )
        for metric, title in METRICS.items()
        if metric in found["challenger"]
    ]
    names = [name for name in ("base", "champion", "challenger") if name in found]
    titles = {"challenger": "this adapter", "champion": "the adapter before it"}
    lines = [f"| | {' | '.join(titles.get(name, name) for name in names)} |", "| --- |" + " --- |" * len(names)]
    for metric, title in {**METRICS, "general_loss": "Loss of general text"}.items():
        if all(metric in found[name] for name in names):
            lines.append(f"| {title} | {' | '.join(f'{found[name][metric]:.4f}' for name in names)} |")
    card.text = f"{card.text.rstrip()}\n\n## Held-out evaluation ({rows} rows)\n\n" + "\n".join(lines)
    card.save(readme)
