"""What every worker is told on its command line."""

import argparse
from pathlib import Path


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """The arguments that all workers take; each adds the artifacts that it reads.

    Args:
        module: What is run.
        description: Its docstring.
    """
    parser = argparse.ArgumentParser(prog=module, description=description)
    parser.add_argument("--config", type=Path, required=True, help="resolved configuration")
    parser.add_argument("--made-from", type=Path, required=True, help="JSON file that names the inputs")
    parser.add_argument("--uris", type=Path, help="JSON file that says where the inputs lie in the store")
    parser.add_argument("--base-model", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--output", type=Path, required=True, help="empty folder for what is made")
    return parser
