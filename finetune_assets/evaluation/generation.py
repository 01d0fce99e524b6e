"""Greedy generation of answers in batches."""

import time
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

BATCH_TOKENS = 16_384
BLOCK = 128
"""Number of prompts within which prompts of similar length are batched together. When the time limit is reached, whole
blocks are complete, so the answered prompts are not biased towards the longest or the shortest."""


@torch.inference_mode()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_new_tokens: int,
    progress: Callable[[int], None] = lambda done: None,
    ends: Collection[int] = (),
    kept: Sequence[str] = (),
    seconds: float = float("inf"),
) -> list[str | None]:
    """Generate an answer to each prompt, up to an end token, by greedy decoding.

    Args:
        model: The model, in evaluation mode.
        tokenizer: Tokenizer of the model.
        prompts: Token ids of each prompt.
        max_new_tokens: Maximum length of an answer, in tokens.
        progress: Called after each batch with the number of answers generated so far.
        ends: Ids of tokens that end an answer, in addition to the tokenizer's EOS token.
        kept: Special tokens to keep in the text of an answer.
        seconds: Time limit in seconds, after which no batch is started.

    Returns:
        The answers in the order of the prompts; None for a prompt not answered within the time limit.
    """
    deadline = time.monotonic() + seconds
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    stops = {*ends, tokenizer.eos_token_id} - {None}
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=padding, eos_token_id=sorted(stops) or None
    )
    texts: list[str | None] = [None] * len(prompts)
    done = 0
    for batch in _batches(prompts, max_new_tokens):
        if time.monotonic() > deadline:
            break
        width = max(len(prompts[i]) for i in batch)
        ids = torch.full((len(batch), width), padding)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        out = model.generate(ids.to(model.device), attention_mask=mask.to(model.device), generation_config=greedy)
        for i, ids in zip(batch, out[:, width:].tolist(), strict=True):
            texts[i] = readable(tokenizer, ids, kept)
        done += len(batch)
        progress(done)
    return texts


def end_tokens(tokenizer: PreTrainedTokenizerBase, expected: Sequence[Sequence[int]]) -> set[int]:
    """Return the ids of tokens that end an answer: the last special token of each expected answer.

    A chat template ends a turn with its own marker (such as `<|im_end|>`), which many tokenizers do not declare as EOS.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    last = (next((i for i in reversed(ids) if i in special), None) for ids in expected)
    return {i for i in last if i is not None}


def readable(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], kept: Sequence[str] = ()) -> str:
    """Decode token ids without special tokens, except those in `kept`, which may be the entire answer."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special and token.content not in kept}
    return str(tokenizer.decode([i for i in ids if i not in special])).strip()


def _batches(prompts: list[list[int]], max_new_tokens: int) -> Iterator[list[int]]:
    """Yield batches of prompt indices of similar length, at most `BATCH_TOKENS` tokens per batch, block by block."""
    for start in range(0, len(prompts), BLOCK):
        block = range(start, min(start + BLOCK, len(prompts)))
        batch: list[int] = []
        for i in sorted(block, key=lambda i: -len(prompts[i])):
            if batch and (len(batch) + 1) * (len(prompts[batch[0]]) + max_new_tokens) > BATCH_TOKENS:
                yield batch
                batch = []
            batch.append(i)
        yield batch
