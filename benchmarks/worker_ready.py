"""What `benchmarks.startup` runs as a worker: the trainer is imported, and nothing is trained."""

import sys
import time

from finetune_assets.training import recipe
from finetune_assets.worker.process import run_worker


def main() -> None:
    """Print the CPU seconds of this process so far: a worker that trains would begin here."""
    assert recipe.LoraFinetune
    print(time.process_time(), file=sys.stderr)


if __name__ == "__main__":
    run_worker("benchmarks.worker_ready")
