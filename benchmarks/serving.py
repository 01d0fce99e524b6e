"""What one vLLM server for N adapters costs against N servers: `python -m benchmarks.serving`, on the CPU.

One server of the packaged model with 1, 4 and 16 adapters, and servers of one model each, as merged models need. Memory
is what all processes of the servers have for themselves (PSS: a page that several share counts once). Throughput is
generated tokens a second of as many clients at a time, each asking for the next adapter or server. Installs vLLM into
`build/vllm` where it is missing.
"""

import json
import os
import random
import re
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import requests
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks import vllm_server
from benchmarks.harness import arguments, report
from finetune_assets.serving.vllm import VllmServer
from finetune_assets.sources.base_models import PACKAGED

BASE, NAME, LONGEST, RANK = PACKAGED["demo-base"], "demo-base", 192, 32
ADAPTERS, SERVERS = (1, 4, 16), (1, 4)
"""Numbers of adapters on one server, and of servers. Servers beyond four are not started: each takes as much again."""
CLIENTS, PROMPT_TOKENS, ANSWER_TOKENS = 8, 48, 32
SECONDS, QUICK_SECONDS = 30.0, 5.0
MIB = 1 << 20
Figures = dict[str, float]


def main() -> None:
    args = arguments(__doc__).parse_args()
    seconds = QUICK_SECONDS if args.quick else SECONDS
    vllm_server.install()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        one = one_server(folder, ADAPTERS[:2] if args.quick else ADAPTERS, seconds)
        many = {} if args.quick else {count: servers(folder, count, seconds) for count in SERVERS}
    rows = [(f"one server, {shown(count, 'adapter')}", line(figures)) for count, figures in one.items()]
    rows += [(f"{shown(count, 'server')} without adapters", line(figures)) for count, figures in many.items()]
    report("Serving", rows, ratios(one, many), args.json)
    if args.json:
        print(json.dumps({"one_server": one, "servers": many}))


def ratios(one: dict[int, Figures], many: dict[int, Figures]) -> dict[str, float]:
    """Of the largest number of each that both have."""
    found = {
        "memory_of_16_adapters_vs_1": one[16]["memory_mib"] / one[1]["memory_mib"] if 16 in one else None,
        "throughput_of_16_adapters_vs_1": one[16]["tokens_per_s"] / one[1]["tokens_per_s"] if 16 in one else None,
        "memory_of_4_servers_vs_4_adapters": many[4]["memory_mib"] / one[4]["memory_mib"] if 4 in many else None,
        "throughput_of_4_servers_vs_4_adapters": many[4]["tokens_per_s"] / one[4]["tokens_per_s"]
        if 4 in many
        else None,
    }
    return {name: ratio for name, ratio in found.items() if ratio is not None}


def shown(count: int, thing: str) -> str:
    return f"{count} {thing}{'s' if count > 1 else ''}"


def line(figures: Figures) -> str:
    return f"{figures['memory_mib']:,.0f} MiB, {figures['tokens_per_s']:,.0f} tokens/s"


def one_server(folder: Path, counts: Sequence[int], seconds: float) -> dict[int, Figures]:
    """Figures of one server with so many adapters, by their number."""
    slots = ["--max-loras", str(max(counts) + 1), "--max-cpu-loras", str(max(counts) + 1)]
    measured = {}
    with running(folder, 1, slots) as (server,):
        client, loaded = VllmServer(server.url), list[str]()
        for count in counts:
            for number in range(len(loaded), count):
                client.load(f"adapter-{number}", adapter(folder / f"adapter-{number}", number))
                loaded.append(f"adapter-{number}")
            measured[count] = figures([server], [(server.url, name) for name in loaded], seconds)
    return measured


def servers(folder: Path, count: int, seconds: float) -> Figures:
    """Figures of so many servers of one model each."""
    with running(folder, count, []) as started:
        return figures(started, [(server.url, NAME) for server in started], seconds)


@contextmanager
def running(folder: Path, count: int, more: Sequence[str]) -> Iterator[list[vllm_server.VllmProcess]]:
    command = vllm_server.command(BASE, NAME, LONGEST, *more)
    if not more:
        command.remove("--enable-lora")
    with ExitStack() as stack:
        logs = [folder / f"server-{len(more)}-{number}.log" for number in range(count)]
        yield [stack.enter_context(vllm_server.running(command, log)) for log in logs]


def adapter(folder: Path, seed: int) -> Path:
    """A random adapter of all linear layers."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(model, config)
    model.peft_config["default"].base_model_name_or_path = NAME
    model.save_pretrained(folder)
    return folder


def figures(started: Sequence[vllm_server.VllmProcess], models: Sequence[tuple[str, str]], seconds: float) -> Figures:
    """Throughput of all models in turn, and the memory afterwards."""
    speed = throughput(models, seconds)
    return {"tokens_per_s": speed, "memory_mib": sum(map(memory, started)) / MIB}


def memory(server: vllm_server.VllmProcess) -> int:
    """Proportional set size of a server's processes, in bytes."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if server.process and os.getsid(int(folder.name)) == server.process.pid:
                (pss,) = re.findall(r"^Pss: +(\d+) kB", (folder / "smaps_rollup").read_text(), re.MULTILINE)
                total += int(pss) << 10
    return total


def throughput(models: Sequence[tuple[str, str]], seconds: float) -> float:
    """Generated tokens a second of `CLIENTS` clients, each of which asks the models in turn."""
    generated, end = [0] * CLIENTS, time.monotonic() + seconds

    def ask(client: int) -> None:
        rng, session, turn = random.Random(client), requests.Session(), client
        while time.monotonic() < end:
            url, name = models[turn % len(models)]
            prompt = [1, *rng.choices(range(3, 1000), k=PROMPT_TOKENS)]
            body = {"model": name, "prompt": prompt, "max_tokens": ANSWER_TOKENS, "ignore_eos": True, "temperature": 0}
            answer = session.post(f"{url}/v1/completions", json=body, timeout=300)
            answer.raise_for_status()
            generated[client] += answer.json()["usage"]["completion_tokens"]
            turn += 1

    began = time.monotonic()
    threads = [threading.Thread(target=ask, args=(client,)) for client in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(generated) / (time.monotonic() - began)


if __name__ == "__main__":
    main()
