"""The benchmark's ratio of bfloat16 and float32 is a number where it is measured, and null with a reason elsewhere."""

import pytest
import torch

from benchmarks.bf16_ratio import bf16_ratio, precisions

TABLE = {"e ours, fp32": {"tokens_per_cpu_s": 120.0}, "e ours, bf16": {"tokens_per_cpu_s": 240.0}}


@pytest.mark.parametrize("capability", ["avx512_bf16", "amx_bf16", "avx512_f"])
def test_ratio_or_reason(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True})
    has_bf16 = capability != "avx512_f"
    assert precisions("cpu") == (["fp32", "bf16"] if has_bf16 else ["fp32"])
    assert bf16_ratio(TABLE, "tokens_per_cpu_s", "cpu") == {"bf16_vs_fp32": 2.0}
    alone = bf16_ratio({"e ours": {"tokens_per_cpu_s": 120.0}}, "tokens_per_cpu_s", "cpu")
    assert alone["bf16_vs_fp32"] is None
    assert ("avx512_bf16" in alone["bf16_vs_fp32_reason"]) == (not has_bf16)
    assert ("e ours, bf16" in alone["bf16_vs_fp32_reason"]) == has_bf16
