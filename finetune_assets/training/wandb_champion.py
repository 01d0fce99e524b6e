"""`python -m finetune_assets.training.wandb_champion`: logs a champion to Weights & Biases.

Reads one line of JSON from stdin: `begin` and `adapter`, the arguments of `wandb_process.Tracker` and its `adapter`.
Writes one to stdout: where the run is found, and `lines` about the upload.
"""

import json
import os
import sys
from queue import SimpleQueue
from typing import Any

from finetune_assets.training.wandb_process import Message, WandbClient


def main() -> None:
    request = json.loads(sys.stdin.readline())
    answer_fd = os.dup(1)
    os.dup2(2, 1)  # keeps output of wandb out of the answer
    out: SimpleQueue[Message | None] = SimpleQueue()
    tracker = WandbClient(request["begin"], out)
    tracker.adapter(**request["adapter"])
    tracker.finish(exit_code=0)
    answer: dict[str, Any] = {"lines": []}
    while not out.empty():
        message = out.get() or {}
        answer |= message.get("begun", {})
        answer["lines"] += [message["line"]] if "line" in message else []
    with os.fdopen(answer_fd, "w", encoding="utf-8") as stdout:
        print(json.dumps(answer), file=stdout)


if __name__ == "__main__":
    main()
