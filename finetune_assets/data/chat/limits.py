"""Tries a chat template in a process with limits before it is used: templates of models are programs."""

import json
import subprocess
import sys
from functools import lru_cache
from typing import Any

from finetune_assets.data.chat import trial
from finetune_assets.data.errors import DataError

WAIT_SECONDS = 30
"""Time for the trial to end on a busy machine; its own limit is CPU time."""
LONGEST = 1 << 20
TEXT = "A text of ordinary length. " * 40
TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": TEXT},
    *({"role": role, "content": TEXT} for _ in range(3) for role in ("user", "assistant")),
]
CALL = {"type": "function", "id": "call00001", "function": {"name": "add", "arguments": {"a": 1}}}
CALLS: list[dict[str, Any]] = [
    {"role": "user", "content": TEXT},
    {"role": "assistant", "content": "", "reasoning_content": TEXT, "tool_calls": [CALL]},
    {"role": "tool", "name": "add", "tool_call_id": "call00001", "content": TEXT},
    {"role": "assistant", "content": TEXT},
]
TOOL = {"type": "function", "function": {"name": "add", "description": TEXT, "parameters": {"type": "object"}}}
CONVERSATIONS = [
    {"messages": TURNS, "tools": None, "prompt": False},
    {"messages": TURNS[1:], "tools": None, "prompt": False},
    {"messages": TURNS[1:2], "tools": None, "prompt": True},
    {"messages": CALLS, "tools": [TOOL], "prompt": False},
]
"""Conversations that are tried."""


def check_template(name: str, template: str, special: dict[str, Any]) -> None:
    """Check that a template renders short conversations in limited time and memory.

    Args:
        name: The tokenizer, for messages.
        template: The chat template.
        special: Special tokens of the tokenizer.

    Raises:
        DataError: if it does not.
    """
    if len(template) > LONGEST:
        raise DataError(f"{name}: a chat template of {len(template):,} characters; at most {LONGEST:,} are supported")
    if not _stays_within_limits(template, json.dumps(special, sort_keys=True, default=str)):
        raise DataError(
            f"{name}: the chat template requires more than {trial.CPU_SECONDS} s or "
            f"{trial.MEMORY_BYTES >> 20:,} MiB for a short conversation; repair it, or use another model"
        )


@lru_cache(maxsize=64)
def _stays_within_limits(template: str, special: str) -> bool:
    """Whether the trial ends within its limits; cached by content, since one takes a tenth of a second."""
    request = json.dumps({"template": template, "special": json.loads(special), "conversations": CONVERSATIONS})
    try:
        ended = subprocess.run(
            [sys.executable, "-P", trial.__file__],
            input=request.encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=WAIT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return False
    # The kernel ends the process with a signal at the limit of CPU time; any other exit code is not the template's
    return ended.returncode >= 0 and ended.returncode != trial.EXCEEDED
