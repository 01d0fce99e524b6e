"""llama.cpp itself reads the exported files: the same tokens and the same greedy answers as the evaluation."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from merging.test_gguf import LEARNS_FAST, exports, model
from servers import llama_cpp
from training.conftest import BASE
from trainings import Train
from transformers import AutoModelForCausalLM

from finetune_assets.config.schema import Merge
from finetune_assets.data.tokenization import load_tokenizer
from finetune_assets.evaluation.contenders import Contender, LoadedModels
from finetune_assets.evaluation.generation import answers
from finetune_assets.evaluation.metrics.exact_match import ExactMatch
from finetune_assets.evaluation.rows import held_out
from finetune_assets.merging.gguf import export
from finetune_assets.merging.gguf_tokenizer import PROBE
from finetune_assets.sources.gguf.convert import convert
from finetune_assets.sources.gguf.pre_tokenizers import PRE_TOKENIZERS

__all__ = ["model"]
pytestmark = pytest.mark.system
TEXTS = [PROBE, "In 1984, it's 12345  people\n\n in Haloholm.", "<s>a</s> b", " \t x\r\n\r\n y ", "naïve ſtraße I'LL ½ ²³"]
MOST = 8
