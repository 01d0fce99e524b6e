"""What `benchmarks.startup` runs as a worker: the trainer is imported, and nothing is trained."""

from finetune_assets.training import recipe


def main() -> None:
    """Nothing: a worker that trains would begin here."""
    assert recipe.LoraFinetune
