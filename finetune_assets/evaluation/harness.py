"""Tasks of EleutherAI's lm-evaluation-harness, for experiments that ask for some (the extra `lm-eval`)."""

from contextlib import chdir
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune_assets.config.schema import LmEval
from finetune_assets.errors import UserError


class HarnessError(UserError):
    """Tasks that cannot be run."""


def run_tasks(
    model: PeftModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: LmEval, own: Path | None
) -> dict[str, float]:
    """What a model reaches in each task, as `task/metric`.

    Args:
        model: In evaluation mode.
        tokenizer: Its tokenizer.
        settings: Which tasks, and how many rows of each.
        own: Folder of further tasks, each a YAML file as the harness knows it; `data_files` in them are relative to it.

    Raises:
        HarnessError: if the harness is not installed, knows no such task, or cannot load its data.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        raise HarnessError(
            f"evaluation.lm_eval: the harness is not installed ({e}); pip install 'finetune-assets[lm-eval]'"
        ) from e
    tasks = TaskManager(include_path=str(own) if own else None)
    if unknown := [name for name in settings.tasks if name not in tasks.all_tasks]:
        raise HarnessError(f"evaluation.lm_eval.tasks: {', '.join(unknown)}: the harness knows no such task")
    try:
        with chdir(own or Path.cwd()):
            found: Any = simple_evaluate(
                HFLM(pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size),
                tasks=list(settings.tasks),
                limit=settings.limit,
                task_manager=tasks,
                bootstrap_iters=0,
                log_samples=False,
            )
    except (OSError, ValueError) as e:
        raise HarnessError(
            f"evaluation.lm_eval.tasks: {', '.join(settings.tasks)}: {' '.join(str(e).split())}. A worker does not ask "
            "the Hub: have the tasks' data in its cache (HF_HOME), or name files in tasks of your own"
        ) from e
    return {
        f"{task}/{metric.partition(',')[0]}": float(value)
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and "stderr" not in metric and metric != "sample_len"
    }
