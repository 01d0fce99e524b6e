"""Chat templates and configurations of models that are made to take the machine down."""

import json
import random
import shutil
from pathlib import Path

import pytest
from limited import run_limited
from tiers import every_third, tiered

from finetune_assets.data.chat import limits
from finetune_assets.data.chat.jinja import Jinja
from finetune_assets.data.chat.limits import check_template
from finetune_assets.data.errors import DataError, RefusedRow
from finetune_assets.data.tokenization import load_tokenizer
from finetune_assets.sources.base_models import PACKAGED
from finetune_assets.sources.model_sizes import ModelSizeError, check_sizes, weights_in
from finetune_assets.training.adapter_config import AdapterConfigError, check_adapter

USUAL = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content | tojson }}{% endif %}{% endfor %}"
)
BOMBS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a long text": "{{ 'A' * 10**10 }}",
    "a text that doubles": "{% set n = namespace(t='a') %}"
    "{% for i in range(60) %}{% set n.t = n.t + n.t %}{% endfor %}",
    "a list that grows": "{{ ([1] * 10**9) | length }}",
    "loops over the messages": "{% for m in messages %}" + "{% for c in m.content %}" * 3 + "{% endfor %}" * 4,
}
ERRORS = ["{{ 1/0 }}", "{{ raise_exception('no') }}", "{{ messages[99].role }}", "{{ messages|nothing }}"]


def tokenizer_with(template: str) -> object:
    tokenizer = load_tokenizer(str(PACKAGED["demo-base"]))
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_without_bounds_is_refused(name: str) -> None:
    tokenizer = tokenizer_with(BOMBS[name])
    outcome = run_limited(lambda: Jinja(tokenizer))  # type: ignore[arg-type]
    outcome.check(("DataError",))
    assert str(PACKAGED["demo-base"]) in outcome.text


def test_a_template_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    check_template("one", USUAL, {"bos_token": "<s>"})
    monkeypatch.setattr(limits.subprocess, "run", lambda *_, **__: pytest.fail("tried again"))
    check_template("another", USUAL, {"bos_token": "<s>"})
    with pytest.raises(DataError, match="1,048,577"):
        check_template("one", "x" * ((1 << 20) + 1), {})


@pytest.mark.parametrize("template", ERRORS)
def test_errors_of_a_template_refuse_rows(template: str) -> None:
    jinja = Jinja(tokenizer_with(template))  # type: ignore[arg-type]
    with pytest.raises((RefusedRow, DataError)):
        jinja.render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    "template", ["{% for", "{% for a in messages %}" * 25 + "{% endfor %}" * 25, "{{ '\x1b[2J' + 1 }}"]
)
def test_invalid_templates_are_one_line(template: str) -> None:
    with pytest.raises((RefusedRow, DataError)) as refused:
        Jinja(tokenizer_with(template)).render([{"role": "user", "content": "x"}])  # type: ignore[arg-type]
    assert str(refused.value).isprintable()


PIECES = [
    "{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{", "}}", "{%", "%}", "{% if x %}",
    "{% endif %}", "{{ messages[0]['content'] * 99999999 }}", "{% for i in range(99999) %}", "{{ i }}",
    "{% macro f() %}", "{{ f() }}", "{% endmacro %}", "\x1b", "{% generation %}", "{% endgeneration %}",
    "{{ 1/0 }}", "{{ ''.__class__ }}", "{# ", "{{ range(10**9)|list }}", "{% set x = x + x %}",
    "{{ '%1000000000d' % 1 }}",
]  # fmt: skip


@pytest.mark.parametrize("seed", tiered(range(30), every_third(range(30))))
def test_hostile_templates_are_one_line(seed: int) -> None:
    rng = random.Random(seed)
    template = "".join(rng.choices(PIECES, k=rng.choice([3, 12, 60])))

    def render() -> str:
        Jinja(tokenizer_with(template)).render([{"role": "user", "content": "x"}])  # type: ignore[arg-type]
        return "rendered"

    outcome = run_limited(render)
    outcome.check(("", "DataError", "RefusedRow"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PACKAGED["demo-base"], tmp_path / "model"))


def set_in(folder: Path, file: str, **values: object) -> None:
    path = folder / file
    tree = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(tree | values))


def test_the_packaged_model_has_possible_sizes(model: Path) -> None:
    check_sizes(model, weights_in(model))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", 2_000_000_000), ("vocab_size", 10_000_000), ("max_position_embeddings", 10**15),
        ("num_hidden_layers", 10_000_000), ("intermediate_size", 2_000_000_000), ("hidden_size", 10**12),
        ("text_config", {"vocab_size": 2_000_000_000}), ("num_attention_heads", 10**9), ("vocab_size", 1e300),
    ],
)  # fmt: skip
def test_sizes_beyond_the_weights_are_refused(key: str, value: object, model: Path) -> None:
    set_in(model, "config.json", **{key: value})
    with pytest.raises(ModelSizeError, match=r"config\.json: .*(size|is) "):
        check_sizes(model, weights_in(model))


def test_a_deep_configuration_is_one_error(model: Path) -> None:
    (model / "config.json").write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    outcome = run_limited(lambda: check_sizes(model, 1))
    outcome.check(("ModelSizeError",))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target_modules", "(a+)+$"), ("exclude_modules", ".*.*.*.*.*x"), ("rank_pattern", {"(.*)*x": 4}),
        ("alpha_pattern", {"(a|ab)+": 4}), ("layers_pattern", ["(a+)+"]), ("target_modules", ["q"] * 20_000),
        ("layers_to_transform", [*range(20_000)]), ("r", 10**9), ("rank_pattern", {"q_proj": 10**9}),
    ],
)  # fmt: skip
def test_hostile_adapters_are_refused(key: str, value: object, tmp_path: Path) -> None:
    set_in(tmp_path, "adapter_config.json", r=8, target_modules=["q_proj"], rank_pattern={})
    check_adapter(tmp_path)
    set_in(tmp_path, "adapter_config.json", **{key: value})
    with pytest.raises(AdapterConfigError, match=r"adapter_config\.json"):
        check_adapter(tmp_path)
