"""The registry of metrics. A metric of your own is a file in this folder and an entry in METRICS."""

from finetune_assets.evaluation.metrics.exact_match import EXACT_MATCH
from finetune_assets.evaluation.metrics.metric import Metric
from finetune_assets.evaluation.metrics.rouge_l import ROUGE_L
from finetune_assets.evaluation.metrics.token_f1 import TOKEN_F1

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
PASSAGE_METRICS = (TOKEN_F1,)
"""Further metrics of generated answers of experiments with retrieval."""
CITATIONS = Metric("citations", "golden citations", "{:.1%}")
"""With `cite`: mean share of the cited passages that are golden, 0 for an answer without a citation, over the rows with
a golden passage among their passages."""
REFUSALS = Metric("refusals", "refusals without golden", "{:.1%}")
"""With refusals: share of refusals among the rows without a golden passage among their passages."""
FALSE_REFUSALS = Metric("false_refusals", "refusals with golden", "{:.1%}")
"""With refusals: share of refusals among the rows with a golden passage among their passages."""
PREFERENCE_ACCURACY = Metric("preference_accuracy", "preference accuracy", "{:.1%}")
"""With judgements: share of held-out judgements that the model follows more than the base model does; the base model
has 50%. Ties count half."""
REWARD_MARGIN = Metric("reward_margin", "reward margin", "{:+.3f}")
"""With judgements: mean reward of the chosen answer minus that of the rejected one; the base model has 0."""
ANSWER_WORDS = Metric("answer_words", "words per answer", "{:.1f}")
"""With judgements: mean number of words of the generated answers, which preferences often lengthen."""
PREFERENCE_METRICS = (PREFERENCE_ACCURACY, REWARD_MARGIN, ANSWER_WORDS)
"""Metrics of experiments with judgements alone."""
ROW_METRICS = (LOSS, PERPLEXITY, *ANSWER_METRICS)
"""Metrics of held-out rows."""
RETRIEVAL_METRICS = (*PASSAGE_METRICS, CITATIONS, REFUSALS, FALSE_REFUSALS)
"""Metrics of held-out rows of experiments with retrieval alone."""
METRICS = (*ROW_METRICS, *RETRIEVAL_METRICS, *PREFERENCE_METRICS, GENERAL_LOSS)
"""All metrics, in the order in which they are shown."""
