"""Settings of an experiment's data, `data`: part of the schema in `schema.py`."""

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from finetune_assets.config.fields import ADDED, NOT_IDENTITY, added, not_identity


@dataclass
class PromptTemplate:
    """How a row is rendered as text. `{instruction}` and `{context}` are replaced by the row's values."""

    description: str = not_identity("")
    """Description for readers of the file."""
    prompt_input: str = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"
    )
    """Prompt of a row with a context; must contain `{instruction}` and `{context}`."""
    prompt_no_input: str = (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:\n"
    )
    """Prompt of a row without a context; must contain `{instruction}`."""
    response_split: str = not_identity("### Response:")
    """Last words of both prompts (validated). Code that extracts an answer from generated text searches for them."""
    chat_template: bool = False
    """Use the tokenizer's own chat template instead of the prompts above; required for multi-turn conversations.
    Every assistant turn is learned."""


@dataclass
class Tokenization:
    """How text becomes training examples."""

    cutoff_len: int = 512
    """Maximum length of an example, in tokens; longer ones are truncated at the end."""
    add_eos_token: bool = True
    """Append the end-of-sequence token to every example that was not truncated, so that the model learns to stop."""
    train_on_inputs: bool = False
    """Also compute the loss on prompt tokens. If false, only the response and its end token are learned."""
    packing: bool = True
    """Pack several examples into one sequence (best-fit decreasing). Attention never crosses examples."""
    packing_length: int | None = None
    """Length of a packed sequence, in tokens; `null` uses `cutoff_len`."""
    added_tokens: list[str] = field(default_factory=list)
    """Tokens to add to the base model's tokenizer, such as `["<|im_start|>"]`. Their embeddings are trained and saved
    with the adapter, as is the extended tokenizer."""


@dataclass
class Retrieval:
    """Passages of a document set in the contexts of the rows, in place of the rows' own contexts.

    The golden passage of a row is its context, found in the documents. See [Retrieval](retrieval.md).
    """

    documents: str = MISSING
    """Document set to retrieve from: the name of a file in `configs/documents/`."""
    passages: int = 3
    """Number of passages of a row. Fewer are used where they do not fit `cutoff_len`, the lowest-ranked left out
    first, or where the documents have fewer."""
    fewest_passages: int | None = added(None)
    """Fewest passages of a training row: each has so many to `passages`, drawn by its content, so that the adapter also
    reads fewer of them. `null` is as many as `passages`."""
    golden_share: float = 0.8
    """Fraction of the training rows whose golden passage is among their passages. The others, drawn by content, have
    distractors only."""
    distractors: Literal["retrieved", "random"] = "retrieved"
    """The other passages of a row: `retrieved` uses the highest-ranked wrong ones of the index that also serves,
    `random` draws them by content from all documents. Golden passages of held-out rows are no distractors in
    training."""
    order: Literal["seeded", "ranked"] = "seeded"
    """Order of the passages in training rows: `seeded` shuffles them by content, `ranked` orders them as the index
    does. In the mode `retrieved`, passages are always ranked."""
    cite: bool = False
    """End each answer with the number of its golden passage, such as `[2]`."""
    without_golden: Literal["answer", "refuse"] = "answer"
    """Text to learn where no golden passage is among the passages: the row's answer, or the `refusal`. This includes
    rows whose golden passage is not in the documents."""
    refusal: str = ""
    """Text of a refusal, such as `The documents do not answer this.`; required by `without_golden: refuse`."""
    closed_book: bool = False
    """Train on the questions alone, without passages: a control that shows what training with passages gains.
    Held-out rows have the same passages with either value."""
    retrain: bool = not_identity(False)
    """Train automatically when only the documents have changed. By default, a change of the documents evaluates the
    champion again and trains nothing."""


@dataclass
class DataChecks:
    """Thresholds of the checks of `tokenized_dataset`, as fractions from 0 to 1. Each check is blocking, except
    those that warn."""

    max_truncated_share: float = 0.2
    """Training examples truncated at `cutoff_len` (check `truncated`)."""
    max_unlabelled_share: float = 0.05
    """Rows without a label token, usually because the prompt alone fills `cutoff_len` (check `unlabelled`)."""
    max_overlap_share: float = 0.01
    """Held-out rows with a near-duplicate in the training split (check `overlap`); there are none unless
    `data.near_duplicate_threshold` is `null`."""
    max_left_out_share: float = 0.2
    """Training rows left out as near-duplicates of held-out rows; above it, the check `left_out` warns."""
    max_contaminated_share: float = 0.0
    """Training rows with 13 words in a row that also occur in the evaluation's general text or in the files of
    `evaluation.lm_eval.folder`; above it, the check `contamination` warns."""
    max_conflicting_share: float = 0.05
    """Pairs and labelled answers that contradict another one of the same answers (check `conflicting_judgements`)."""
    max_length_bias: float = 0.5
    """Difference between the mean lengths of preferred and other answers, as a fraction of the latter; above it, the
    check `length_bias` warns."""
    max_changed_prompts_share: float = 0.01
    """Training rows whose prompt has other tokens without an answer, as a server renders it, than in training; up to
    2,000 rows are compared. Above it, the check `prompt_boundary` warns."""


@dataclass
class Data:
    """Rows of the raw data that an experiment uses, and their preparation."""

    sources: list[str] | None = field(default=None, metadata=NOT_IDENTITY)
    """Names of the raw data sources to use (`sources` in raw_data.yaml); `null` uses all. A single source without a
    name is called `sample` (the packaged rows) or `default`."""
    replay: float = added(0.0)
    """Fraction of the training tokens that are rows of earlier versions of the raw data, which the current version does
    not contain any more; such rows counteract forgetting. 0 uses none."""
    num_samples: int | None = None
    """Maximum number of rows of the categories below. Rows are chosen by content, so new data does not change the
    choice."""
    categories: list[str] | None = None
    """Categories to use; `null` uses all."""
    val_fraction: float = 0.1
    """Fraction of rows in the validation split. Rows are split by content, so a row never changes its split."""
    gate_fraction: float = 0.05
    """Fraction of rows held out for the champion gate alone."""
    processes: str = not_identity("auto")
    """Number of processes that prepare the rows on this machine; `auto` uses the cores of this job, up to 16, and fewer
    for few rows. The examples are the same with every number."""
    near_duplicate_threshold: float | None = added(0.8)
    """Leave a row out of training if a held-out row has the same question (up to case, spaces and punctuation), the
    same question and answer under another system turn, or at least this estimated similarity: the Jaccard index of
    three-word sequences of instruction and context, or of all turns of a conversation. `null` keeps such rows."""
    prompt_template: PromptTemplate = field(default_factory=PromptTemplate)
    """How a row is rendered as text."""
    max_refused_share: float = not_identity(0.01)
    """Fraction of rows that the template may reject (a conversation with `prompt_input`, a system turn with a chat
    template that has none) before the blocking check `refused_rows` fails."""
    checks: DataChecks = field(default_factory=DataChecks, metadata=NOT_IDENTITY)
    """Thresholds of the other checks."""
    tokenization: Tokenization = field(default_factory=Tokenization)
    """How text becomes training examples."""
    retrieval: Retrieval | None = field(default=None, metadata=ADDED)
    """Passages in the rows' contexts; `null` keeps the contexts as they are."""
