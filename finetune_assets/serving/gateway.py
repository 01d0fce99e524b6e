"""Manifests for a gateway that holds the alias: `InferenceModelRewrite` of the Gateway API's inference extension.

They are examples to review and apply, checked as YAML only. Recent releases of llm-d have the same resource in the API
group `llm-d.ai/v1alpha2`.
"""

from typing import Any

import yaml

from finetune_assets.serving.state import Served

API_VERSION = "inference.networking.x-k8s.io/v1alpha2"
CANARY_PERCENT = 10
HEADER = """\
# {purpose}
# Written by served_adapter; an example to review and apply with kubectl. Set spec.poolRef.name to the InferencePool of
# the servers. With llm-d, apiVersion may be llm-d.ai/v1alpha2.
"""


def manifests(record: Served) -> dict[str, str]:
    """Manifests of a record, by file name: all requests to what serves and, as a canary, a tenth of them."""
    files = {
        f"{record.experiment}.gateway.yaml": _text(
            f"Requests for the model {record.experiment} are answered by {record.name}.", record, {record.name: 100}
        )
    }
    if record.previous:
        weights = {record.previous: 100 - CANARY_PERCENT, record.name: CANARY_PERCENT}
        purpose = f"Canary: {CANARY_PERCENT}% of the requests for {record.experiment} are answered by {record.name}."
        files[f"{record.experiment}.canary.yaml"] = _text(purpose, record, weights)
    return files


def _text(purpose: str, record: Served, weights: dict[str, int]) -> str:
    manifest: dict[str, Any] = {
        "apiVersion": API_VERSION,
        "kind": "InferenceModelRewrite",
        "metadata": {"name": record.experiment.lower().replace("_", "-")},
        "spec": {
            "poolRef": {"group": "inference.networking.k8s.io", "kind": "InferencePool", "name": "vllm"},
            "rules": [
                {
                    "matches": [{"model": {"type": "Exact", "value": record.experiment}}],
                    "targets": [{"modelRewrite": name, "weight": weight} for name, weight in weights.items()],
                }
            ],
        },
    }
    return HEADER.format(purpose=purpose) + yaml.safe_dump(manifest, sort_keys=False)
