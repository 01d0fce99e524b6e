"""The registry of metrics. A metric of your own is a file in this folder and an entry in METRICS."""

from finetune_assets.evaluation.metrics.exact_match import EXACT_MATCH
from finetune_assets.evaluation.metrics.metric import Metric
from finetune_assets.evaluation.metrics.rouge_l import ROUGE_L

LOSS = Metric("loss", "held-out loss", "{:.4f}")
"""Mean cross-entropy of the answers' tokens, in nats per token."""
PERPLEXITY = Metric("perplexity", "perplexity", "{:.4g}")
GENERAL_LOSS = Metric("general_loss", "loss on general text", "{:.4f}")
"""Mean cross-entropy on text that has nothing to do with the rows; how much it rises is called forgetting."""

ANSWER_METRICS = (
    EXACT_MATCH,
    ROUGE_L,
)
"""Metrics of generated answers. Raise the code version of `EVALUATIONS` in artifacts/kinds.py with each change, so that
adapters are evaluated again."""
ROW_METRICS = (LOSS, PERPLEXITY, *ANSWER_METRICS)
"""Metrics of held-out rows."""
METRICS = (*ROW_METRICS, GENERAL_LOSS)
"""All metrics, in the order in which they are shown."""
