"""Environments of the trainers that are compared with, each its own: `python -m benchmarks.peers`.

They go to `build/peers/`. What cannot be installed is left out of the comparison, which says so.
"""

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


def python_of(peer: str) -> Path:
    """The interpreter of a peer's environment, there or not."""
    return FOLDER / peer / "bin" / "python"


def main() -> None:
    for peer, packages in PEERS.items():
        if python_of(peer).exists():
            continue
        print(f"installing {peer} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(FOLDER / peer)], check=True)
        pip = [str(python_of(peer)), "-m", "pip", "install", "--quiet"]
        for wanted in ([TORCH], [TORCH, *packages, "omegaconf", "pyarrow"]):
            if subprocess.run([*pip, *wanted], check=False).returncode:
                print(f"{peer} does not install here; it is left out")
        # Of another build than the torch above, and then nothing of transformers can be imported
        subprocess.run([*pip[:3], "uninstall", "--quiet", "--yes", "torchvision", "torchaudio"], check=False)


if __name__ == "__main__":
    main()
