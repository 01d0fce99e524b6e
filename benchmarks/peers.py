"""Environments of the trainers that are compared with, each its own: `python -m benchmarks.peers [trl] [llamafactory]`.

They are created in `build/peers/`. A peer that cannot be installed is an error with the reason, and `benchmarks.train`
names it as missing.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.harness import ROOT

FOLDER = ROOT / "build" / "peers"
PEERS = {
    "trl": ["trl==1.16.0", "transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0", "datasets==5.2.0"],
    "llamafactory": ["llamafactory==0.9.5"],
}
TORCH = "torch==2.13.0"
"""First and exactly, as for the project itself."""
NEEDED_BY_RECIPES = ["omegaconf", "pyarrow"]
INSTALLED = "installed.txt"
"""Written last: an environment without it, or with other versions in it, is not complete."""
REASON_LINES = 3


class NotInstalled(Exception):
    """A peer cannot be installed here."""


def python_of(peer: str) -> Path:
    """The interpreter of a peer's environment, there or not."""
    return FOLDER / peer / "bin" / "python"


def is_installed(peer: str) -> bool:
    """Whether the environment of a peer is complete, in the versions of this file."""
    installed = FOLDER / peer / INSTALLED
    return installed.exists() and installed.read_text(encoding="utf-8") == _wanted(peer)


def install(peer: str) -> None:
    """Create the environment of a peer.

    Raises:
        NotInstalled: with the last lines of the failed command.
    """
    pip = [str(python_of(peer)), "-m", "pip"]
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(FOLDER / peer)],
        [*pip, "install", "--quiet", TORCH],
        [*pip, "install", "--quiet", TORCH, *PEERS[peer], *NEEDED_BY_RECIPES],
        # Of another build than the torch above, and then nothing of transformers can be imported
        [*pip, "uninstall", "--quiet", "--yes", "torchvision", "torchaudio"],
    ):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            reason = " ".join(done.stdout.strip().splitlines()[-REASON_LINES:])
            raise NotInstalled(f"{peer}: `{' '.join(command)}` failed: {reason}")
    (FOLDER / peer / INSTALLED).write_text(_wanted(peer), encoding="utf-8")


def _wanted(peer: str) -> str:
    return "\n".join([TORCH, *PEERS[peer], *NEEDED_BY_RECIPES]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"of {', '.join(PEERS)}; all by default")
    peers = parser.parse_args().peers or [*PEERS]
    if unknown := sorted({*peers} - {*PEERS}):
        parser.error(f"unknown peers {', '.join(unknown)}: choose from {', '.join(PEERS)}")
    failed = []
    for peer in peers:
        if is_installed(peer):
            continue
        print(f"Installing {peer} into {FOLDER / peer} ...", flush=True)
        try:
            install(peer)
        except NotInstalled as e:
            failed.append(str(e))
    if failed:
        sys.exit("\n".join([*failed, "Without these peers: python -m benchmarks.train names them as missing"]))


if __name__ == "__main__":
    main()
