"""A server with vLLM's protocol for one test: adapters of the packaged base, loaded and unloaded at run time.

It computes real log-probabilities, with transformers and PEFT in this process. And it can be as unfaithful as a real
one: answer as another adapter, from a stale cache, at a wrong scale, forget to unload, fail, hang.
"""

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_assets.sources.base_models import PACKAGED

BASE: Path = PACKAGED["demo-base"]
LISTS = "/v1/models"


class Models:
    """Base model and adapters in this process; results are kept, for adapters by the content of their weights."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.tokenizer = AutoTokenizer.from_pretrained(BASE)
        self.base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
        self.peft: PeftModel | None = None
        self.loaded: dict[bytes, str] = {}
        self.results: dict[Any, torch.Tensor] = {}

    def logprobs(self, adapter: Path | None, ids: Sequence[int], scale: float) -> torch.Tensor:
        """Log-probabilities of the next token at each position; shape (tokens, vocabulary)."""
        weights = (adapter / "adapter_model.safetensors").read_bytes() if adapter else b""
        key = (hash(weights), tuple(ids), scale)
        with self.lock, torch.inference_mode():
            if key not in self.results:
                self.results[key] = self._logprobs(adapter, weights, ids, scale)
            return self.results[key]

    def _logprobs(self, adapter: Path | None, weights: bytes, ids: Sequence[int], scale: float) -> torch.Tensor:
        tokens = torch.tensor([[*ids]])
        if adapter is None:
            if self.peft is None:
                return torch.log_softmax(self.base(tokens).logits[0].float(), -1)
            with self.peft.disable_adapter():
                return torch.log_softmax(self.peft(tokens).logits[0].float(), -1)
        name = self.loaded.setdefault(weights, f"adapter{len(self.loaded)}")
        if self.peft is None:
            self.peft = PeftModel.from_pretrained(self.base, str(adapter), name).eval()
        elif name not in self.peft.peft_config:
            self.peft.load_adapter(str(adapter), name)
        self.peft.set_adapter(name)
        scaled = [layer for layer in self.peft.modules() if isinstance(getattr(layer, "scaling", None), dict)]
        layers = [layer for layer in scaled if name in layer.scaling]
        for layer in layers:
            layer.scaling[name] *= scale
        try:
            return torch.log_softmax(self.peft(tokens).logits[0].float(), -1)
        finally:
            for layer in layers:
                layer.scaling[name] /= scale


@dataclass
class Vllm:
    """What the server has loaded, what it was asked, and how it behaves.

    Attributes:
        base_name: Name of the base model.
        token: Bearer token that it wants; None for none.
        adapters: Folders of the loaded adapters, by name.
        requests: Method and path of each request, in order; with the name of the model, if it names one.
        template: Chat template; None renders with the adapter's own `chat_template.jinja`.
        answers_as: Answer to every adapter as this one, or as the base model ("").
        only_chat: `answers_as` concerns chat alone.
        base_as: Answer to the base model as this adapter.
        scale: Factor on every adapter's update.
        stale: Answer prompts that another adapter has seen as that one, except where a cache of one's own is asked for.
        leaks: Answer to adapters that were unloaded.
        failing: Answer these paths with a status.
        hangs: Seconds before each answer.
        running: Adapters that the metrics name as running.
        noise: Standard deviation of what is added to each log-probability.
    """

    base_name: str = "demo-base"
    token: str | None = None
    adapters: dict[str, Path] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    template: str | None = None
    answers_as: str | None = None
    only_chat: bool = False
    base_as: str = ""
    scale: float = 1.0
    stale: bool = False
    leaks: bool = False
    failing: dict[str, int] = field(default_factory=dict)
    hangs: float = 0.0
    running: list[str] = field(default_factory=list)
    noise: float = 0.0
    url: str = ""
    forgotten: dict[str, Path] = field(default_factory=dict)
    seen: dict[tuple[int, ...], str] = field(default_factory=dict)

    def well(self) -> None:
        """Behave from now on."""
        for name in ("answers_as", "only_chat", "scale", "stale", "leaks", "failing", "hangs", "template", "token"):
            default = Vllm.__dataclass_fields__[name]
            fresh = default.default if name != "failing" else {}
            setattr(self, name, fresh)
        self.forgotten.clear()

    def restart(self) -> None:
        """Lose the adapters, as a process that was started again."""
        self.adapters.clear()
        self.seen.clear()


@contextmanager
def running(models: Models, **behaviour: Any) -> Iterator[Vllm]:
    """A server on 127.0.0.1 until the context ends."""
    vllm = Vllm(**behaviour)

    class Handler(_Handler):
        served = vllm
        computed_by = models

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    vllm.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield vllm
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    served: Vllm
    computed_by: Models
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer(None)

    def do_POST(self) -> None:
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, body: dict[str, Any] | None) -> None:
        vllm, name = self.served, (body or {}).get("model") or (body or {}).get("lora_name") or ""
        vllm.requests.append(f"{self.command} {self.path} {name}".strip())
        time.sleep(vllm.hangs)
        if vllm.token and self.headers["Authorization"] != f"Bearer {vllm.token}":
            self.send(401, {"error": f"Unauthorized: {self.headers['Authorization']}"})
        elif status := vllm.failing.get(self.path):
            self.send(status, {"error": {"message": "planted", "code": status}})
        elif self.path == "/metrics":
            names = ",".join(vllm.running)
            gauge = f'vllm:lora_requests_info{{max_lora="4",running_lora_adapters="{names}",waiting_lora_adapters=""}}'
            self.send(200, f"# TYPE vllm:lora_requests_info gauge\n{gauge} 1.7e+09\n")
        else:
            routes = {
                LISTS: self.models,
                "/v1/load_lora_adapter": self.load,
                "/v1/unload_lora_adapter": self.unload,
                "/v1/completions": self.complete,
                "/v1/chat/completions": self.chat,
            }
            self.send(*routes[self.path](body or {}))

    def send(self, status: int, content: Any) -> None:
        raw = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)
        except OSError:
            self.close_connection = True  # the client has given up

    def models(self, body: dict[str, Any]) -> tuple[int, Any]:
        base = {"id": self.served.base_name, "object": "model", "parent": None, "max_model_len": 192}
        adapters = [{"id": name, "object": "model", "parent": base["id"]} for name in self.served.adapters]
        return 200, {"object": "list", "data": [base, *adapters]}

    def load(self, body: dict[str, Any]) -> tuple[int, Any]:
        name, folder = body["lora_name"], Path(body["lora_path"])
        if name in self.served.adapters:
            return 400, {"error": {"message": f"The lora adapter '{name}' has already been loaded.", "code": 400}}
        settings = json.loads((folder / "adapter_config.json").read_text())
        if settings["base_model_name_or_path"] != self.served.base_name:
            return 404, {"error": {"message": f"No adapter found for {name}", "code": 404}}
        self.served.adapters[name] = folder
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, body: dict[str, Any]) -> tuple[int, Any]:
        name = body["lora_name"]
        if name not in self.served.adapters:
            return 404, {"error": {"message": f"The lora adapter '{name}' cannot be found.", "code": 404}}
        folder = self.served.adapters.pop(name)
        if self.served.leaks:
            self.served.forgotten[name] = folder
        return 200, f"Success: LoRA adapter '{name}' removed successfully."

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        prompts = body["prompt"]
        if not isinstance(prompts[0], list):
            prompts = [prompts]
        if not self.has(body["model"]):
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist.", "code": 404}}
        choices = [{**self.choice(body, ids, "token_logprobs"), "index": at} for at, ids in enumerate(prompts)]
        return 200, {"object": "text_completion", "model": body["model"], "choices": choices}

    def chat(self, body: dict[str, Any]) -> tuple[int, Any]:
        if not self.has(body["model"]):
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist.", "code": 404}}
        folder = self.served.adapters.get(body["model"])
        template = self.served.template
        if template is None and folder and (folder / "chat_template.jinja").is_file():
            template = (folder / "chat_template.jinja").read_text()
        if not template:
            return 400, {"error": {"message": "default chat template is no longer allowed", "code": 400}}
        rendered = self.computed_by.tokenizer.apply_chat_template(
            body["messages"], chat_template=template, tokenize=True, add_generation_prompt=True, return_dict=False
        )
        choice = self.choice(body, rendered, "content")
        return 200, {"object": "chat.completion", "choices": [choice], "prompt_token_ids": rendered}

    def has(self, name: str) -> bool:
        return name in ({self.served.base_name} | self.served.adapters.keys() | self.served.forgotten.keys())

    def choice(self, body: dict[str, Any], ids: list[int], form: str) -> dict[str, Any]:
        vllm, name = self.served, self.answering(body, ids, form)
        folder = (vllm.adapters | vllm.forgotten).get(name)
        logprobs = self.computed_by.logprobs(folder, ids, vllm.scale if folder else 1.0)
        if vllm.noise:
            logprobs = logprobs + vllm.noise * torch.randn_like(logprobs)
        allowed = body.get("allowed_token_ids")
        token = allowed[int(logprobs[-1, allowed].argmax())] if allowed else int(logprobs[-1].argmax())
        first = {"token": self.computed_by.tokenizer.decode([token]), "logprob": float(logprobs[-1, token])}
        shown = {"content": [first]} if form == "content" else {"token_logprobs": [first["logprob"]]}
        return {"token_ids": [token], "logprobs": shown, "finish_reason": "length"}

    def answering(self, body: dict[str, Any], ids: list[int], form: str) -> str:
        """Name of the adapter that answers instead of the one that is asked for."""
        vllm, name = self.served, str(body["model"])
        if name == vllm.base_name:
            return vllm.base_as or name
        if vllm.answers_as is not None and (form == "content" or not vllm.only_chat):
            return vllm.answers_as
        if "cache_salt" in body:
            return name
        first = vllm.seen.setdefault(tuple(ids), name)
        return first if vllm.stale else name
