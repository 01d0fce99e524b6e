"""Where a generated answer ends."""

import torch
from transformers import AutoModelForCausalLM

from finetune_assets.data.tokenization import load_tokenizer
from finetune_assets.evaluation.generation import answers, end_tokens, readable
from finetune_assets.sources.base_models import PACKAGED

BASE = str(PACKAGED["demo-base"])


def test_the_mark_that_ends_a_turn_ends_an_answer() -> None:
    tokenizer = load_tokenizer(BASE, ["<|im_end|>"])
    mark = tokenizer.convert_tokens_to_ids("<|im_end|>")
    expected = [tokenizer.encode(text, add_special_tokens=False) for text in ("Oslo<|im_end|>\n", "<|im_end|> a", "no")]
    assert end_tokens(tokenizer, expected) == {mark}
    assert end_tokens(tokenizer, [tokenizer.encode("Oslo</s>", add_special_tokens=False)]) == {tokenizer.eos_token_id}
    assert readable(tokenizer, expected[0]) == "Oslo"
    assert readable(tokenizer, expected[0], ["<|im_end|>"]) == "Oslo<|im_end|>"


def test_generation_stops_at_any_end_token() -> None:
    tokenizer, model = load_tokenizer(BASE), AutoModelForCausalLM.from_pretrained(BASE).eval()
    prompt = tokenizer.encode("The river of Kelm is")
    (free,) = answers(model, tokenizer, [prompt], max_new_tokens=12)
    with torch.inference_mode():
        out = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
    third = next(token for i, token in enumerate(out) if i >= 2 and token not in out[:i])
    (stopped,) = answers(model, tokenizer, [prompt], max_new_tokens=12, ends={third})
    assert stopped == tokenizer.decode(out[: out.index(third) + 1]).strip()
    assert len(stopped) < len(free)
