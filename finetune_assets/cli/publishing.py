"""Publish an adapter to the Hub: its files as they are in the store, with the evaluation added to its model card."""

import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from finetune_assets.artifacts.layout import CARD, write_sums
from finetune_assets.cli.signing import sign
from finetune_assets.errors import UserError
from finetune_assets.evaluation.metrics import METRICS, ROW_METRICS
from finetune_assets.sources import hub


class PublishError(UserError):
    """The Hub rejected the upload."""


def publish(
    adapter: Path,
    evaluation: dict[str, Any] | None,
    repo: str,
    private: bool,
    workspace: Path,
    signing_key: Path | None = None,
) -> str:
    """Upload an adapter's folder as one commit, and return the commit's URL.

    Args:
        adapter: Folder of the adapter.
        evaluation: Content of its evaluation.json, if it was evaluated.
        repo: `owner/name`; created if it does not exist.
        private: Create it as private.
        workspace: Empty folder for the files to upload.
        signing_key: Private key that signs these files.

    Raises:
        PublishError: naming the repository and what to do.
        SignatureError: if the key cannot be used; nothing is uploaded then.
    """
    folder = workspace / "upload"
    shutil.copytree(adapter, folder, copy_function=shutil.copyfile)
    if evaluation:
        with_results(folder / CARD, evaluation, repo)
        write_sums(folder)
    if signing_key:
        sign(folder, signing_key)
    where = f"publish to '{repo}'"
    with hub.explained(PublishError, where, repo, "The owner must be you, or an organization that you may write to"):
        client = hub.client()
        client.create_repo(repo, private=private, exist_ok=True)
        commit = client.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Adapter {adapter.parent.name}")
    return str(commit.commit_url)


def with_results(readme: Path, evaluation: dict[str, Any], repo: str) -> None:
    """Add an evaluation to a model card: as metadata of the Hub, and as a table."""
    card = ModelCard.load(readme)
    contenders, rows = evaluation["contenders"], evaluation["rows"]
    card.data.model_name = repo.rpartition("/")[2]
    card.data.eval_results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out-rows",
            dataset_name=f"{rows} held-out rows",
            metric_type=metric.name,
            metric_name=metric.title,
            metric_value=round(contenders["challenger"][metric.name], 6),
        )
        for metric in ROW_METRICS
        if metric.name in contenders["challenger"]
    ]
    names = [name for name in ("base", "champion", "challenger") if name in contenders]
    titles = {"challenger": "this adapter", "champion": "the adapter before it"}
    lines = [f"| | {' | '.join(titles.get(name, name) for name in names)} |", "| --- |" + " --- |" * len(names)]
    for metric in METRICS:
        if all(metric.name in contenders[name] for name in names):
            values = " | ".join(metric.form.format(contenders[name][metric.name]) for name in names)
            lines.append(f"| {metric.title} | {values} |")
    card.text = f"{card.text.rstrip()}\n\n## Held-out evaluation ({rows} rows)\n\n" + "\n".join(lines)
    card.save(readme)
