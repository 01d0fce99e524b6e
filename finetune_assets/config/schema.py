"""Every setting of an experiment: the schema, the defaults and the documentation in one tree of dataclasses.

The text under each attribute is its documentation; `docs/settings.md` is generated from it. A field marked
`not_identity` cannot change the bytes of what is made, so changing it re-runs nothing.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

from finetune_assets.config.cluster import Launcher

NOT_IDENTITY = {"identity": False}


def not_identity(default: Any) -> Any:
    """A field that is left out of every fingerprint."""
    return field(default=default, metadata=NOT_IDENTITY)


@dataclass
class PromptTemplate:
    """How a row becomes text. `{instruction}` and `{context}` stand for the row's own."""

    description: str = not_identity("")
    """What this template is, for the reader."""
    prompt_input: str = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"
    )
    """Prompt of a row that has a context; must hold `{instruction}` and `{context}`."""
    prompt_no_input: str = (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:\n"
    )
    """Prompt of a row without a context; must hold `{instruction}`."""
    response_split: str = not_identity("### Response:")
    """The last words of both prompts, which is checked: who cuts an answer out of a generated text looks for them."""
    chat_template: bool = False
    """Use the tokenizer's own chat template instead of the prompts above; conversations of several turns need it.
    What the assistant says is learned, in every turn."""


@dataclass
class Tokenization:
    """How text becomes training examples."""

    cutoff_len: int = 512
    """Longest example in tokens; the rest of a longer one is cut off its end."""
    add_eos_token: bool = True
    """End every example that was not cut with the end-of-sequence token, so that the model learns to stop."""
    train_on_inputs: bool = False
    """Also train on the prompt's tokens. Off, only the response (and its end) is learned."""
    packing: bool = True
    """Put several examples into one sequence (best fit decreasing). Examples never see one another."""
    packing_length: int | None = None
    """Tokens of a packed sequence; `null` takes `cutoff_len`."""
    added_tokens: list[str] = field(default_factory=list)
    """Tokens that the base's tokenizer lacks, such as `["<|im_start|>"]`. Their embeddings are trained and saved in the
    adapter, whose own tokenizer knows them."""


@dataclass
class DataChecks:
    """What the checks of `tokenized_dataset` let pass, as shares from 0 to 1; each is a blocking check."""

    max_truncated_share: float = 0.2
    """Train examples that `cutoff_len` cuts (`truncated`)."""
    max_unlabelled_share: float = 0.05
    """Rows without a token to learn, most often as the prompt alone fills `cutoff_len` (`unlabelled`)."""
    max_overlap_share: float = 0.01
    """Held-out rows whose prompt is also trained on, but for case, spaces and punctuation (`overlap`)."""


@dataclass
class Data:
    """Which rows of the raw data an experiment takes, and how they are prepared."""

    num_samples: int | None = None
    """At most so many rows of the categories below, chosen by content, so that the choice outlives new data."""
    categories: list[str] | None = None
    """Take rows of these categories only; `null` takes all."""
    val_fraction: float = 0.1
    """Share of the rows held out of training to measure it; by content, so a row keeps its side for ever."""
    gate_fraction: float = 0.05
    """Share of the rows that only the champion gate ever sees."""
    prompt_template: PromptTemplate = field(default_factory=PromptTemplate)
    """How a row becomes text."""
    max_refused_share: float = not_identity(0.01)
    """Share of the rows that this experiment's template may refuse (a conversation where `prompt_input` is used, a
    system turn where the chat template has none) before the blocking check `refused_rows` fails."""
    checks: DataChecks = field(default_factory=DataChecks, metadata=NOT_IDENTITY)
    """What the other checks let pass."""
    tokenization: Tokenization = field(default_factory=Tokenization)
    """How text becomes training examples."""


@dataclass
class Model:
    """The base model, which stays frozen."""

    base_model: str = MISSING
    """A packaged name (`demo-base`), a Hub id (`owner/name`), or a local folder (`./path` or `/path`)."""
    revision: str = "main"
    """Branch, tag or commit on the Hub; pinned to the commit it stands for. A folder has none."""
    trust_remote_code: str | None = not_identity(None)
    """Run the Python code that this one version of the model brings: `owner/name@commit`, the 40-digit commit whose
    code you have read. Another version is refused; while this is `null`, so is every model that needs its own code."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """Keep the base's linear layers in 8 or 4 bits (bitsandbytes; nf4 with double quantization)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the base's weights; `auto` takes bfloat16 where the device computes in it, float32 elsewhere."""
    attention: Literal["auto", "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"] = "auto"
    """Attention backend. `auto` computes each example by itself, without padding (PyTorch's variable-length
    FlashAttention on CUDA, its scaled dot product attention elsewhere), and takes the model's own where that does not
    compute the same. `eager`, `sdpa` and `flex_attention` train on padded rows."""


@dataclass
class Training:
    """How the adapter is trained."""

    epochs: float = 3.0
    """Passes over the training rows."""
    max_steps: int | None = None
    """Optimizer steps; where set, it wins over `epochs`."""
    macro_batch_size: int = 64
    """Sequences (packed ones, if packing) of one optimizer step, over all processes and accumulation."""
    micro_batch_size: int = 4
    """Sequences of full length that one process computes at once, or as many tokens of shorter ones; the lower, the
    less memory."""
    learning_rate: float = 2e-4
    """Peak learning rate."""
    lr_scheduler: Literal["linear", "cosine", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_steps: float = 0.03
    """Steps over which the learning rate rises; below 1, a share of all steps."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """AdamW by PyTorch (fused), or by bitsandbytes in 8 bits (CUDA only)."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the adapter's weights."""
    max_grad_norm: float = 1.0
    """Clip the global gradient norm to this; 0 does not clip."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "full_bf16", "full_fp16"] = "auto"
    """What is computed in: mixed precision with float32 adapter weights (`bf16`, `fp16`), or adapter and all in 16
    bits (`full_bf16`, `full_fp16`). `auto` takes bf16 where the device computes in it, fp32 elsewhere."""
    gradient_checkpointing: bool | None = field(default=None, metadata=NOT_IDENTITY)
    """Compute activations twice instead of keeping them: much less memory, about a third slower. `null` does so where
    what one micro-batch keeps is measured not to fit beside the model."""
    sharding: Literal["none", "fsdp"] = not_identity("none")
    """`fsdp` spreads the base model over all processes, for one that does not fit a single GPU; each layer is gathered
    while it is computed."""
    compile: bool = False
    """Compile each layer with `torch.compile`. The first steps take minutes, so it pays in long trainings on a GPU."""
    group_by_length: bool = True
    """Without packing: put sequences of like length into one global batch, so that little is padded where the attention
    needs padding (see `model.attention`)."""
    warm_start: str | None = None
    """An adapter to begin from: its fingerprint in the store, or a folder (`./path` or `/path`)."""
    seed: int = 42
    """Seed of the adapter's initial weights, the dropout and the order of the rows."""
    eval_steps: int | None = field(default=None, metadata=NOT_IDENTITY)
    """Measure the held-out loss every so many steps; `null` measures before and after training only."""
    logging_steps: int = not_identity(10)
    """Report loss, gradient norm, learning rate and tokens per second every so many steps."""
    save_steps: int | None = field(default=200, metadata=NOT_IDENTITY)
    """Keep a checkpoint every so many steps, from which a run that died goes on; `null` keeps none."""
    save_total_limit: int = not_identity(2)
    """Newest checkpoints of a training to keep."""
    processes_per_node: str = not_identity("auto")
    """torchrun processes: `auto` (one a GPU, one without any) or a number."""


@dataclass
class Lora:
    """The adapter, as PEFT's `LoraConfig` knows it."""

    rank: int = 16
    """Rank of the update."""
    alpha: float = 32.0
    """The update is scaled by alpha / rank (alpha / sqrt(rank) with rsLoRA)."""
    dropout: float = 0.05
    """Dropout of the adapter's input while training."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained too."""
    target_modules: Any = "all-linear"
    """`all-linear`, or a list of module names such as `[q_proj, v_proj]`."""
    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    """PEFT's task type."""
    use_rslora: bool = False
    """Rank-stabilised scaling (arXiv:2312.03732)."""
    use_dora: bool = False
    """Weight-decomposed LoRA (arXiv:2402.09353)."""
    init_lora_weights: Any = True
    """`true` (Kaiming A, zero B), `gaussian`, `pissa`, `pissa_niter_N`, `olora`, or `orthogonal`."""
    layers_to_transform: list[int] | None = None
    """Adapt these layers only."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Rank of single modules, by name or regular expression, where it differs from `rank`."""
    modules_to_save: list[str] | None = None
    """Modules trained whole and saved with the adapter, such as `[embed_tokens, lm_head]`."""


@dataclass
class LmEval:
    """Tasks of the lm-evaluation-harness that base, champion and challenger are put to; needs the extra `lm-eval`."""

    tasks: list[str] = field(default_factory=list)
    """Names of tasks, such as `[arc_easy]`. The worker does not ask the Hub: their data must be in its cache."""
    folder: str | None = None
    """Folder (`./path` or `/path`) of tasks of your own: the harness's YAML files, and the data that they name, by
    paths relative to it."""
    limit: int | None = None
    """At most so many rows of each task; `null` takes all."""
    batch_size: int = 8
    """Rows at a time."""


@dataclass
class Evaluation:
    """How base, champion and challenger are compared. Changing it re-runs the evaluation alone."""

    generated_rows: int = 200
    """Rows of the gate that each of them answers, for exact match and ROUGE-L; 0 generates none."""
    max_new_tokens: int = 64
    """Longest generated answer in tokens."""
    max_generation_seconds: float = 900.0
    """Stop generating after so long; what all of them have answered by then is compared."""
    samples: int = 5
    """Answers shown side by side."""
    prompts: list[str] = field(default_factory=list)
    """Questions of your own that all of them answer in every evaluation, shown beside the samples."""
    general_text: str = "general"
    """Text that no adapter is trained on, by which forgetting is measured: `general` (packaged English prose and code),
    `demo-prose` (what the packaged base has read), or a file `./path` of paragraphs (.txt) or `{"text": ...}` lines
    (.jsonl)."""
    general_tokens: int = 20_000
    """Read at most so many tokens of it; 0 reads none."""
    lm_eval: LmEval | None = None
    """Tasks of the lm-evaluation-harness, or `null`."""


@dataclass
class Gate:
    """When a challenger takes the champion's place (`champion_adapter`). Changing it makes nothing anew."""

    min_gain: float = 0.0
    """By how many nats a token the challenger must beat the champion (or, where there is none, the base) on the rows of
    the gate."""
    confidence: float = 0.95
    """How sure that must be: the gain's lower bound of this confidence (paired bootstrap over rows) is what counts."""
    max_forgetting: float = 0.5
    """By how many nats a token the challenger may be worse than the base on the general text."""
    min_rows: int = 30
    """Promote nothing by itself on fewer rows than this."""


@dataclass
class Merge:
    """How the champion is merged into its base (`merged_model`), for whoever serves without adapters."""

    onto: Literal["trained", "published"] = "trained"
    """The base as it was in training: a quantized one is dequantized first, so that the merged model computes what was
    trained. Or as published, with weights that a quantized training never saw."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type of the merged weights."""
    compared_rows: int = 32
    """Held-out rows on which the merged model's logits are compared with those of base and adapter."""
    max_difference: float | None = not_identity(None)
    """Mean difference of the logits above which the blocking check `merge` fails, as a share of their spread; `null`
    takes what rounding explains: 1e-5 for float32, 0.02 for 16 bits and over int8."""


@dataclass
class Stack:
    """Champions of other experiments over one base, combined into one (`stacked_adapter`) in place of training."""

    adapters: dict[str, float] = field(default_factory=dict)
    """The experiments whose champions are combined, with their weights, such as `{questions: 0.5, summaries: 0.5}`."""
    method: Literal[
        "linear",
        "cat",
        "svd",
        "ties",
        "ties_svd",
        "dare_linear",
        "dare_ties",
        "dare_linear_svd",
        "dare_ties_svd",
        "magnitude_prune",
        "magnitude_prune_svd",
    ] = "linear"
    """As PEFT's `add_weighted_adapter` knows it (TIES: arXiv:2306.01708, DARE: arXiv:2311.03099). Adapters of several
    ranks can be combined by `cat` and by those with `svd` only."""
    density: float = 0.5
    """Share of the values that `ties`, `dare_*` and `magnitude_prune` keep."""
    svd_rank: int | None = None
    """Rank that methods with `svd` reduce to; `null` takes the largest of the adapters'."""


@dataclass
class Wandb:
    """Weights & Biases. Leave the whole group out (or `null`) and it is never imported."""

    project: str = MISSING
    """Project of the run."""
    entity: str | None = None
    """User or team; `null` takes the account's default."""
    run_name: str | None = None
    """Name of the run; `null` takes the experiment's."""
    watch: Literal["off", "gradients", "parameters", "all"] = "off"
    """Histograms of the adapter's weights, of their gradients before clipping, or of both, at each report."""
    log_model: bool = False
    """Also upload the adapter, as an artifact that was made from dataset and base model."""
    mode: Literal["online", "offline"] = "online"
    """`offline` writes a folder that `wandb beta sync` uploads later; see [Weights & Biases](wandb.md)."""


@dataclass
class Hardware:
    """What a training is planned for (`training_plan`, `finetune-plan`); with none of this, the machine at hand."""

    gpu: str | None = None
    """The GPU's name, such as `H100`."""
    memory_gib: float | None = None
    """Memory of one, in GiB; `null` takes what a GPU of that name usually has."""
    count: int = 1
    """How many of one machine train together, where neither `training.processes_per_node` nor `launcher.gpus_per_node`
    says it."""
    price_per_hour: float | None = None
    """Of one, in your currency."""


@dataclass
class ExperimentConfig:
    """One experiment: a file in `configs/experiments/`, over `configs/base.yaml`, over these defaults."""

    model: Model = field(default_factory=Model)
    """The base model."""
    description: str = not_identity("")
    """What this experiment is for."""
    subscribed: bool = not_identity(False)
    """Train by itself whenever new data has been checked."""
    data: Data = field(default_factory=Data)
    """Rows and their preparation."""
    training: Training = field(default_factory=Training)
    """How the adapter is trained."""
    lora: Lora = field(default_factory=Lora)
    """The adapter."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    """How base, champion and challenger are compared."""
    gate: Gate = field(default_factory=Gate, metadata=NOT_IDENTITY)
    """When a challenger takes the champion's place."""
    merge: Merge | None = None
    """How the champion is merged into its base; `null` merges it not."""
    stack: Stack | None = None
    """Champions of other experiments to combine, in place of training."""
    hardware: Hardware = field(default_factory=Hardware, metadata=NOT_IDENTITY)
    """What a training is planned for."""
    launcher: Launcher = field(default_factory=Launcher, metadata=NOT_IDENTITY)
    """Where its jobs run."""
    wandb: Wandb | None = field(default=None, metadata=NOT_IDENTITY)
    """Weights & Biases, or `null`."""


@dataclass
class SweepConfig:
    """A sweep: a file in `configs/sweeps/` that stands for many experiments. None of them trains by itself."""

    experiment: str = MISSING
    """The experiment whose settings every point begins with."""
    description: str = ""
    """What is looked for."""
    grid: dict[str, Any] = field(default_factory=dict)
    """Dotted settings and the values that each takes, such as `lora.rank: [4, 8, 16]`; every combination is a point."""
    sample: int | None = None
    """Take so many points of the grid, drawn with `seed`; `null` takes all."""
    seed: int = 0
    """Seed of the draw."""


@dataclass
class Columns:
    """What the source calls the columns of a row, where it uses other names than those that are known."""

    instruction: str | None = None
    """What is asked; `null` takes `instruction`."""
    context: str | None = None
    """Text to answer from; `null` takes `context` or `input`."""
    response: str | None = None
    """The answer to learn; `null` takes `response` or `output`."""
    category: str | None = None
    """Kind of task; `null` takes `category`."""
    system: str | None = None
    """What the assistant is told first; `null` takes `system`."""
    messages: str | None = None
    """A conversation: a list of turns with `role` and `content` (or `from` and `value`); `null` takes `messages` or
    `conversations`."""


@dataclass
class HubDataset:
    """Which part of a Hub dataset is read."""

    subset: str | None = None
    """The dataset's configuration, where it has several."""
    split: str = "train"
    """The dataset's split. All of it is read; which rows are held out is decided here, by content."""


@dataclass
class Arrivals:
    """When new raw data is read by itself (`raw_data_sensor`), and how much may be trained on it."""

    quiet_seconds: float = 4.0
    """Read it when it has not changed for so long: files that arrive together are read together, and none while it is
    still written. A writer that pauses for longer gives its file a name that begins with a dot until it is whole."""
    min_new_rows: int = 0
    """Wait for so many rows more (or fewer) than were read last."""
    max_wait_seconds: float = 3600.0
    """Read a change of fewer rows after so long."""
    gpu_hours_a_day: float | None = None
    """Start no training by itself when today's (UTC) have taken so many GPU-hours; what waits is trained tomorrow.
    `null` sets no limit."""


@dataclass
class RawChecks:
    """What the checks of `dolly_raw` let pass. A share is one of all rows, from 0 to 1."""

    max_duplicate_share: float = 0.05
    """Rows that repeat another one exactly; above it, the blocking check `duplicates` fails."""
    max_near_duplicate_share: float = 0.1
    """Rows that repeat another one but for case, spaces and punctuation; above it, `near_duplicates` warns."""
    max_leakage_share: float = 0.01
    """Rows whose response stands word for word in the instruction; above it, the blocking check `leakage` fails."""
    max_row_fall: float = 0.5
    """Share of the rows of the last good version that may be gone before the blocking check `row_count` fails."""
    max_drift: float = 0.2
    """Distance (total variation, from 0 to 1) of categories or of lengths from the last good version, above which the
    check `drift` warns."""


@dataclass
class RawDataConfig:
    """The deployment's one stream of raw data: `configs/raw_data.yaml`."""

    source: str = "sample"
    """`sample` (the packaged rows); a file or a folder of `.jsonl`, `.json`, `.csv` and `.parquet` files, also
    `s3://bucket/prefix`; or `hf://datasets/owner/name@revision` (branch, tag or commit; `main` without).
    `FINETUNE_RAW_DATA` wins over it."""
    columns: Columns = field(default_factory=Columns)
    """The source's names of columns."""
    hub: HubDataset = field(default_factory=HubDataset)
    """Which part of a Hub dataset is read."""
    max_quarantine_share: float = not_identity(0.01)
    """Share of bad rows over which the blocking check `quarantine` fails. Bad rows are set aside, never dropped."""
    checks: RawChecks = field(default_factory=RawChecks, metadata=NOT_IDENTITY)
    """What the other checks let pass."""
    arrivals: Arrivals = field(default_factory=Arrivals, metadata=NOT_IDENTITY)
    """When new data is read by itself."""
    split_salt: str = "finetune-assets"
    """Decides with a row's content which side of the split it falls on. Change it and every row is dealt anew."""


@dataclass
class StoreConfig:
    """What `finetune-store gc` may remove: `configs/store.yaml`, or these defaults without it."""

    keep_raw: int = 20
    """Newest versions of the raw data to keep."""
    keep_adapters: int = 20
    """Newest adapters of each experiment to keep, with all that they were made from, and their evaluations. Champions
    stay whatever their age."""
    keep_reports: int = 5
    """Newest pages of `experiment_report` to keep."""
    keep_days: float = 7.0
    """Nothing younger is removed, so that what some run is about to publish or to use stays."""
