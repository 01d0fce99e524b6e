"""llama.cpp's server, from a wheel of PyPI that has it built in (`xllamacpp`), in a process of its own.

Installed once into the cache of this machine, outside of the project's environment.
"""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PACKAGE = "xllamacpp==2026.10.11549"
SERVE = """
import sys
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.n_gpu_layers = sys.argv[1], 1024, 1, 0
params.hostnames, params.port, params.use_jinja, params.offline, params.warmup = ["127.0.0.1"], 0, True, True, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
print("listening", server.listening_address, flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class LlamaCpp:
    """A server that is running.

    Attributes:
        url: Its address.
    """

    url: str

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=300) as answer:
            return dict(json.load(answer))

    def tokens(self, text: str, add_special: bool = True) -> list[int]:
        body = {"content": text, "add_special": add_special, "parse_special": True}
        return list(self.post("/tokenize", **body)["tokens"])

    def answer(self, prompt: str | list[int], most: int) -> str:
        """The greedy answer to a prompt."""
        return str(self.post("/completion", prompt=prompt, n_predict=most, temperature=0)["content"])


def pip_cache() -> Path:
    """Folder of what tests install or download once on this machine."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "finetune-assets-tests"


def download(package: str) -> Path:
    """A folder with a package of PyPI, installed with `pip` once; skips the test where PyPI cannot be reached."""
    folder = pip_cache() / package.replace("==", "-")
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.{os.getpid()}")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:"]
        ended = subprocess.run([*command, "--target", partial, package], capture_output=True, text=True, timeout=600)
        if ended.returncode:
            pytest.skip(f"real data: {package} cannot be installed: {ended.stderr.strip().splitlines()[-1:]}")
        try:
            partial.rename(folder)
        except OSError:  # another process was first
            assert folder.exists()
    return folder


@contextmanager
def running(model: Path) -> Iterator[LlamaCpp]:
    """Run the server with a GGUF file."""
    environment = {**os.environ, "PYTHONPATH": str(download(PACKAGE))}
    command = [sys.executable, "-c", SERVE, str(model)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        assert process.stdin
        assert process.stdout
        try:
            lines = iter(process.stdout.readline, "")
            url = next((line.split()[1] for line in lines if line.startswith("listening")), None)
            assert url, f"llama.cpp did not load {model}"
            yield LlamaCpp(url)
        finally:
            process.stdin.close()
            process.kill()
