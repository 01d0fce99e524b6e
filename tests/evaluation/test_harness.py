"""Tasks of the lm-evaluation-harness, from a folder of one's own: the worker has no network."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from finetune_assets.config.schema import LmEval
from finetune_assets.data.tokenization import load_tokenizer
from finetune_assets.evaluation.harness import HarnessError, run_tasks
from finetune_assets.sources.base_models import PACKAGED

FOLDER = PACKAGED["demo-base"]
TASK = """
task: towns
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"question": "The river of Kelm is the", "choices": ["Issel", "teapot"], "answer": 0},
        {"question": "Kelm lies in the region of", "choices": ["seven", "Eastfold"], "answer": 1},
    ]
    (folder / "towns.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "towns.yaml").write_text(TASK.format(rows="towns.jsonl"))
    return folder


@pytest.fixture
def run(tasks: Path) -> Callable[..., dict[str, float]]:
    model = AutoModelForCausalLM.from_pretrained(FOLDER).eval()
    return lambda *names, **more: run_tasks(model, load_tokenizer(str(FOLDER)), LmEval([*names], **more), tasks)


@pytest.mark.system
def test_a_task_of_ones_own_and_what_is_not_there(run: Callable[..., dict[str, float]], tasks: Path) -> None:
    """In one test, for the harness takes longer to import than to run."""
    assert run("towns", limit=2) == {"towns/acc": 1.0}
    with pytest.raises(HarnessError, match=r"tasks: twons\b"):
        run("twons")
    (tasks / "towns.jsonl").unlink()
    with pytest.raises(HarnessError, match=r"lm_eval\.tasks: towns\b"):
        run("towns")
