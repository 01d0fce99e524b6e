"""Run tasks of EleutherAI's lm-evaluation-harness, if `evaluation.lm_eval` is set (requires the extra `lm-eval`)."""

from collections.abc import Sequence
from contextlib import chdir
from functools import cache
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune_assets.config.schema import LmEval
from finetune_assets.errors import UserError


class HarnessError(UserError):
    """Raised when tasks of the lm-evaluation-harness cannot be run."""


def run_tasks(
    model: PeftModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: LmEval, own: Path | None
) -> dict[str, float]:
    """Evaluate a model on each task.

    Args:
        model: The model, in evaluation mode.
        tokenizer: Tokenizer of the model.
        settings: Tasks, and the number of rows of each.
        own: Folder of additional tasks, as YAML files of the harness; their `data_files` are relative to this folder.

    Returns:
        Metric values by `task/metric`.

    Raises:
        HarnessError: if the harness is not installed, a task is unknown, or its data cannot be loaded.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as e:
        raise HarnessError(
            f"evaluation.lm_eval: lm-eval is not installed ({e}); run pip install 'finetune-assets[lm-eval]'"
        ) from e
    tasks = _tasks(settings.tasks, own)
    if unknown := [name for name in settings.tasks if name not in tasks.all_tasks]:
        raise HarnessError(
            f"evaluation.lm_eval.tasks: {', '.join(unknown)}: unknown task; add its YAML to evaluation.lm_eval.folder"
        )
    try:
        with chdir(own or Path.cwd()):
            results: Any = simple_evaluate(
                HFLM(pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size),
                tasks=list(settings.tasks),
                limit=settings.limit,
                task_manager=tasks,
                bootstrap_iters=0,
                log_samples=False,
            )
    except (OSError, ValueError) as e:
        raise HarnessError(
            f"evaluation.lm_eval.tasks: {', '.join(settings.tasks)}: {' '.join(str(e).split())}. Workers run offline: "
            "download the tasks' data to the Hub cache (HF_HOME) first, or use custom tasks with local files"
        ) from e
    return {
        f"{task}/{metric.partition(',')[0]}": float(value)
        for task, metrics in results["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and "stderr" not in metric and metric != "sample_len"
    }


def _tasks(names: Sequence[str], own: Path | None) -> Any:
    """The harness's index of tasks: that of the own folder if it has all of them and they are no groups."""
    index = _index(own, with_defaults=False) if own else None
    return index if index and {*names} <= {*index.all_subtasks} else _index(own, with_defaults=True)


@cache
def _index(own: Path | None, with_defaults: bool) -> Any:
    """An index of tasks, made once for all models: to read the harness's own 14,000 files takes 18 s of CPU time."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(own) if own else None, include_defaults=with_defaults)
