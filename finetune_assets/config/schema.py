"""Every setting of an experiment: the schema, the defaults and the documentation in one tree of dataclasses.

The text under each attribute is its documentation; `docs/settings.md` is generated from it. A field marked
`not_identity` cannot change an artifact's bytes, so changing it re-runs nothing.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

from finetune_assets.config.cluster import LauncherSettings
from finetune_assets.config.data_schema import Data, DataChecks, PromptTemplate, Retrieval, Tokenization
from finetune_assets.config.fields import ADDED, IN_FILE_ONLY, NOT_IDENTITY, added, not_identity
from finetune_assets.config.preference_schema import Preference

__all__ = ["Data", "DataChecks", "Preference", "PromptTemplate", "Retrieval", "Tokenization"]


@dataclass
class Model:
    """The frozen base model."""

    base_model: str = MISSING
    """A packaged name (`demo-base`), a Hub id (`owner/name`), or a local folder or GGUF file (`./path` or `/path`)."""
    revision: str = "main"
    """Branch, tag or commit on the Hub, pinned to its commit. Not used for a folder."""
    trust_remote_code: str | None = field(default=None, metadata={**NOT_IDENTITY, **IN_FILE_ONLY})
    """Allow the model's own Python code, for one version only: `owner/name@commit` with the 40-digit commit whose code
    you have read. Other versions are refused. With `null`, every model that requires its own code is refused."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """Quantize the base model's linear layers to 8 or 4 bits (bitsandbytes; nf4 with double quantization)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the base model's weights. `auto` is bfloat16 on a GPU that supports it, and on a CPU that is faster
    with it (see `training.precision`); otherwise float32."""
    attention: Literal["auto", "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"] = "auto"
    """Attention backend. `auto` uses variable-length attention without padding (PyTorch's FlashAttention on CUDA,
    scaled dot product attention elsewhere), or the model's own attention if the results differ. `eager`, `sdpa` and
    `flex_attention` train on padded rows."""


@dataclass
class Training:
    """How the adapter is trained."""

    objective: Literal["sft", "dpo", "kto"] = added("sft")
    """What is learned: `sft` learns the answers of instruction rows. `dpo` (arXiv:2305.18290) also prefers the chosen
    answer of a pair to the rejected one, and `kto` (arXiv:2402.01306) good answers to bad ones. Rows of other kinds are
    left out and counted."""
    preference: Preference = field(default_factory=Preference, metadata=ADDED)
    """How judged answers are learned."""
    epochs: float = 3.0
    """Passes over the training split."""
    max_steps: int | None = None
    """Number of optimizer steps; overrides `epochs`."""
    macro_batch_size: int = 8
    """Global batch size: sequences (packed, if packing) per optimizer step, over all processes and accumulation."""
    micro_batch_size: int = 4
    """Full-length sequences (or as many tokens of shorter ones) per process and forward pass. Lower values use less
    memory. With `dpo`, a sequence holds both answers of a pair."""
    learning_rate: float = 5e-4
    """Peak learning rate."""
    lr_scheduler: Literal["linear", "cosine", "constant"] = "cosine"
    """Decay of the learning rate after the warm-up."""
    warmup_steps: float = 0.03
    """Number of warm-up steps; below 1, a fraction of all steps."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """Optimizer: PyTorch's fused AdamW, or 8-bit AdamW of bitsandbytes (CUDA only)."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the adapter's weights."""
    max_grad_norm: float = 1.0
    """Maximum global gradient norm; 0 disables clipping."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "full_bf16", "full_fp16"] = "auto"
    """Mixed precision with float32 adapter weights (`bf16`, `fp16`), or everything in 16 bits (`full_bf16`,
    `full_fp16`). `auto` is bf16 on a GPU that supports it, and on a CPU with AVX512-bf16 or AMX instructions that
    multiplies faster in bf16 in a short measurement at the start; otherwise fp32."""
    gradient_checkpointing: bool | None = field(default=None, metadata=NOT_IDENTITY)
    """Recompute activations in the backward pass: much less memory, about a third slower. `null` enables it if the
    measured activations of one micro-batch do not fit."""
    sharding: Literal["none", "fsdp"] = not_identity("none")
    """`fsdp` shards the base model over all processes, for models that do not fit on one GPU; each layer is gathered
    for its computation."""
    compile: bool = False
    """Compile each layer with `torch.compile`. The first steps take minutes, so use it for long trainings on a GPU."""
    kernels: Literal["none", "liger"] = added("none")
    """`liger` computes rotary embeddings, RMSNorm and gated MLPs with the fused kernels of liger-kernel, which must be
    installed (the extra `liger`). On CUDA only, and not with `compile`, which fuses these operations too."""
    group_by_length: bool = True
    """Without packing: batch sequences of similar length, which reduces padding (see `model.attention`)."""
    warm_start: str | None = None
    """Adapter to initialize from: its fingerprint in the store, a folder (`./path` or `/path`), or `champion`, the
    experiment's adapter in service (a new adapter while there is none). It must be of the same base model, and `lora`
    must have its values, except for `dropout`."""
    seed: int = 42
    """Seed of the initial adapter weights, dropout and row order."""
    eval_steps: Any = field(default=None, metadata=NOT_IDENTITY)
    """Steps between measurements of the held-out loss on the validation split. `auto` chooses a number at which they
    take at most 5% of the training's time; `null` measures only before and after training."""
    keep: Literal["best", "last"] | None = field(default=None, metadata=NOT_IDENTITY)
    """Step whose adapter is published: that with the lowest held-out loss, or the last one. `null` is `best` with
    `eval_steps` and a validation split, otherwise `last`."""
    patience: int | None = field(default=None, metadata=NOT_IDENTITY)
    """Stop after this number of consecutive measurements without improvement; `null` never stops early."""
    min_improvement: float = not_identity(0.0)
    """Decrease of the held-out loss, in nats per token, that counts as an improvement for `patience`."""
    logging_steps: int = not_identity(10)
    """Steps between log lines with loss, gradient norm, learning rate and tokens per second."""
    save_steps: int | None = field(default=200, metadata=NOT_IDENTITY)
    """Steps between checkpoints, from which an interrupted run resumes; `null` saves none."""
    save_total_limit: int = not_identity(2)
    """Number of checkpoints to keep."""
    processes_per_node: str = not_identity("auto")
    """Number of torchrun processes per machine, or `auto`: one per GPU, one without a GPU."""


@dataclass
class Lora:
    """The adapter; the names are those of PEFT's `LoraConfig`."""

    rank: int = 16
    """Rank of the update."""
    alpha: float = 32.0
    """The update is scaled by alpha / rank (alpha / sqrt(rank) with rsLoRA)."""
    dropout: float = 0.05
    """Dropout of the adapter's input during training."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases to train as well."""
    target_modules: Any = "all-linear"
    """`all-linear`, or a list of module names such as `[q_proj, v_proj]`. As in all settings of names here, a name that
    is not in the base model is an error."""
    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    """PEFT's task type."""
    use_rslora: bool = False
    """Rank-stabilised scaling (arXiv:2312.03732)."""
    use_dora: bool = False
    """Weight-decomposed LoRA (arXiv:2402.09353)."""
    init_lora_weights: Any = True
    """`true` (Kaiming A, zero B), `gaussian`, `pissa`, `pissa_niter_N`, `olora`, or `orthogonal`."""
    layers_to_transform: list[int] | None = None
    """Layers to adapt; `null` adapts all."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Rank of individual modules, by name or regular expression, if it differs from `rank`. Names that match the same
    module must have the same rank."""
    modules_to_save: list[str] | None = None
    """Modules to train fully and save with the adapter, such as `[embed_tokens, lm_head]`."""


@dataclass
class LmEval:
    """Tasks of the lm-evaluation-harness for base model, champion and challenger; requires the extra `lm-eval`."""

    tasks: list[str] = field(default_factory=list)
    """Task names, such as `[arc_easy]`. Workers have no Hub access, so the data must be in the worker's cache."""
    folder: str | None = field(default=None, metadata=IN_FILE_ONLY)
    """Folder (`./path` or `/path`) with your own tasks: the harness's YAML files and their data, with paths relative
    to the folder. Its files run code: `!function` in a task's YAML calls a Python file of the folder."""
    limit: int | None = None
    """Maximum number of rows per task; `null` uses all."""
    batch_size: int = 8
    """Rows per batch."""


@dataclass
class Evaluation:
    """How base model, champion and challenger are compared. Changes re-run only the evaluation."""

    generated_rows: int = 200
    """Number of gate rows to generate answers for (exact match and ROUGE-L); 0 generates none."""
    max_new_tokens: int = 64
    """Maximum length of a generated answer, in tokens."""
    max_generation_seconds: float = 900.0
    """Time limit of generation, in seconds; rows answered by all models by then are compared."""
    samples: int = 5
    """Number of answers to show side by side."""
    prompts: list[str] = field(default_factory=list)
    """Your own prompts, answered by all models in every evaluation and shown with the samples."""
    general_text: str = "general"
    """Text to measure forgetting on: `general` (packaged English prose and code), `demo-prose` (the pretraining text of
    the packaged model), or a file `./path` of paragraphs (.txt) or `{"text": ...}` lines (.jsonl)."""
    general_tokens: int = 20_000
    """Maximum number of tokens of the general text; 0 disables the measurement."""
    lm_eval: LmEval | None = None
    """Tasks of the lm-evaluation-harness, or `null`."""
    modes: list[str] | None = field(default=None, metadata=ADDED)
    """With `data.retrieval`: what all models are given with each question. `closed_book` gives no passage, `golden` the
    golden one, `golden_and_distractors` as many passages as in training, and `retrieved` those that the index finds,
    as served; it is always measured. `null` measures all four."""


@dataclass
class Gate:
    """When a challenger replaces the champion (`champion_adapter`). Changes re-run only the decision."""

    min_gain: float = 0.0
    """Minimum improvement over the champion (or the base model, if there is no champion), in nats per token on the gate
    rows."""
    confidence: float = 0.95
    """Confidence of the improvement's lower bound, which is compared with `min_gain` (paired bootstrap over rows)."""
    max_forgetting: float = 0.5
    """Maximum increase of the loss on general text over the base model, in nats per token."""
    min_rows: int = 30
    """Minimum number of comparable gate rows for automatic promotion; of judgements, if the training learns from
    them."""
    min_preference_gain: float = added(0.0)
    """With `training.objective` `dpo` or `kto`, in place of `min_gain`: minimum improvement of the preference accuracy
    over the champion (or the base model), as a fraction of the held-out judgements."""
    max_loss_increase: float = added(0.1)
    """With `training.objective` `dpo` or `kto`: maximum increase of the held-out loss over the champion (or the base
    model), in nats per token."""
    mode: str | None = field(default=None, metadata=ADDED)
    """With `data.retrieval`: the mode (`evaluation.modes`) in which the challenger must improve; `null` is `retrieved`,
    the mode that serves."""
    max_loss_of: dict[str, float] = field(default_factory=dict, metadata=ADDED)
    """With `data.retrieval`: by mode, the maximum increase of the loss over the champion (or the base model), in nats
    per token, such as `{closed_book: 0.1}`."""


@dataclass
class Merge:
    """How the champion is merged into its base model (`merged_model`), for servers without adapter support."""

    onto: Literal["trained", "published"] = "trained"
    """Base weights to merge into: `trained` uses the weights of the training (a quantized base is dequantized first);
    `published` uses the original weights."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Data type of the merged weights."""
    compared_rows: int = 32
    """Number of held-out rows on which the logits of the merged model and of base plus adapter are compared."""
    max_difference: float | None = not_identity(None)
    """Maximum mean difference of the logits for the blocking check `merge`, as a fraction of their spread; `null` uses
    1e-5 for float32, and 0.02 for 16 bits or an int8 base."""
    gguf: list[str] | None = field(default=None, metadata=ADDED)
    """Formats of GGUF files to write as well, for llama.cpp and Ollama: `f16`, `bf16` (16 bits) and `q8_0` (8 bits).
    An Ollama Modelfile names the first one."""
    modelfile: bool = added(True)
    """Write the Ollama Modelfile. Disable it for a chat template that Ollama cannot express."""
    gguf_max_difference: float | None = not_identity(None)
    """Like `max_difference`, for the GGUF files; `null` uses 0.02 for 16 bits and 0.05 for 8 bits."""


@dataclass
class Stack:
    """Combines champions of other experiments with the same base model (`stacked_adapter`) instead of training."""

    adapters: dict[str, float] = field(default_factory=dict)
    """Experiments whose champions are combined, with weights, such as `{questions: 0.5, summaries: 0.5}`."""
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
    """Method of PEFT's `add_weighted_adapter` (TIES: arXiv:2306.01708, DARE: arXiv:2311.03099). Adapters of different
    ranks require `cat` or a method with `svd`."""
    density: float = 0.5
    """Fraction of the values that `ties`, `dare_*` and `magnitude_prune` keep."""
    svd_rank: int | None = None
    """Rank of the result for methods with `svd`; `null` uses the largest rank of the adapters."""


@dataclass
class Serving:
    """vLLM servers that answer with the champion. Adapters are checked for them before training
    (`training_plan`)."""

    servers: list[str] = field(default_factory=list, metadata={**NOT_IDENTITY, **IN_FILE_ONLY})
    """Servers: `http://host:port` or `https://host:port` of a vLLM, one for each replica, or `folder:./path` of vLLM's
    adapter resolver. The bearer token is read from the environment variable `FINETUNE_SERVING_TOKEN`."""
    max_rank: int = not_identity(64)
    """Largest rank of an adapter that the servers load, as in vLLM's `--max-lora-rank`: 1, 8, 16, 32, 64, 128, 256, 320
    or 512."""
    base_name: str | None = field(default=None, metadata=NOT_IDENTITY)
    """Name of the base model on the servers, as in vLLM's `--served-model-name`; `null` is `model.base_model`."""
    verify_rows: int = not_identity(32)
    """Number of gate rows whose log-probabilities on the servers are compared with the evaluation's."""


@dataclass
class Wandb:
    """Weights & Biases. Without this group (`null`), wandb is never imported."""

    project: str = MISSING
    """Project of the run: up to 128 characters, and none of `/ \\ # ? % :`."""
    entity: str | None = None
    """User or team; `null` uses the account's default."""
    run_name: str | None = None
    """Name of the run; `null` uses the experiment's name."""
    watch: Literal["off", "gradients", "parameters", "all"] = "off"
    """Log histograms of the adapter's weights, of their unclipped gradients, or of both, with each log line."""
    log_model: bool = False
    """Also upload the adapter as an artifact, with dataset and base model as its inputs."""
    mode: Literal["online", "offline"] = "online"
    """`offline` writes a folder to upload later with `wandb beta sync`; see [Weights & Biases](wandb.md)."""


@dataclass
class Hardware:
    """Hardware that a training is planned for (`training_plan`, `finetune plan`); defaults to this machine."""

    gpu: str | None = None
    """GPU name, such as `H100`."""
    memory_gib: float | None = None
    """Memory per GPU, in GiB; `null` uses the usual memory of the named GPU."""
    count: int = 1
    """GPUs per machine, if neither `training.processes_per_node` nor `launcher.gpus_per_node` is set."""
    price_per_hour: float | None = None
    """Price per GPU and hour, in your currency."""


@dataclass
class ExperimentConfig:
    """One experiment: a file in `configs/experiments/`, merged over `configs/base.yaml` and these defaults."""

    model: Model = field(default_factory=Model)
    """The base model."""
    description: str = not_identity("")
    """Purpose of the experiment."""
    subscribed: bool = not_identity(False)
    """Train automatically when new data has passed its checks."""
    data: Data = field(default_factory=Data)
    """Rows and their preparation."""
    training: Training = field(default_factory=Training)
    """How the adapter is trained."""
    lora: Lora = field(default_factory=Lora)
    """The adapter."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    """How base, champion and challenger are compared."""
    gate: Gate = field(default_factory=Gate, metadata=NOT_IDENTITY)
    """When a challenger replaces the champion."""
    merge: Merge | None = None
    """How the champion is merged into its base model; `null` disables merging, an empty group merges with defaults."""
    stack: Stack | None = None
    """Champions of other experiments to combine instead of training."""
    serving: Serving | None = field(default=None, metadata=NOT_IDENTITY)
    """Servers that answer with the champion; with `null`, it is not served."""
    hardware: Hardware = field(default_factory=Hardware, metadata=NOT_IDENTITY)
    """Hardware that a training is planned for."""
    launcher: LauncherSettings = field(default_factory=LauncherSettings, metadata=NOT_IDENTITY)
    """Where jobs run."""
    wandb: Wandb | None = field(default=None, metadata=NOT_IDENTITY)
    """Weights & Biases, or `null`."""


@dataclass
class SweepConfig:
    """A sweep: a file in `configs/sweeps/` that defines many experiments. None of them trains automatically."""

    experiment: str = MISSING
    """Experiment whose settings every point starts from."""
    description: str = ""
    """Purpose of the sweep."""
    grid: dict[str, Any] = field(default_factory=dict)
    """Dotted settings and their values, such as `lora.rank: [4, 8, 16]`; every combination is a point."""
    sample: int | None = None
    """Number of points to draw from the grid with `seed`, at least 1; `null` uses all."""
    seed: int = 0
    """Seed of the draw."""


@dataclass
class StoreConfig:
    """What `finetune store gc` may remove: `configs/store.yaml`, or these defaults."""

    keep_raw: int = 20
    """Number of versions of the raw data to keep."""
    keep_adapters: int = 20
    """Number of adapters per experiment to keep, with their inputs and evaluations. Champions are always kept."""
    keep_indexes: int = 5
    """Number of retrieval indexes to keep. Those that a kept dataset or adapter was made with are always kept."""
    keep_reports: int = 5
    """Number of `experiment_report` pages to keep."""
    keep_days: float = 7.0
    """Minimum age in days of what is removed, which protects files of running jobs."""
