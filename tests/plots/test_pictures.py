"""Pictures show the numbers that they are given, are small, and are pictures."""

import base64
import io
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finetune_assets.artifacts.update_spectrum import Update
from finetune_assets.assets import pictures
from finetune_assets.plots import bars, data, memory, modules, preferences, training
from finetune_assets.plots.style import as_address, as_markdown, svg
from finetune_assets.store.results import Results
from finetune_assets.training.telemetry import Utilisation

HISTORY = [
    {"step": step, "loss": 14.0 / step, "learning_rate": 1e-3 / step, "grad_norm": 2.0 + step} for step in range(1, 31)
]
STATE = {"step": 30, "history": HISTORY, "held_out_loss": {"before": 14.5, "after": 0.5}}
CATEGORIES = [
    {"category": "open_qa", "rows": 9, "base": 3.0, "champion": 2.0, "challenger": 1.0},
    {"category": "a $strange$ <one>", "rows": 20, "base": 4.0, "champion": None, "challenger": 1.5},
]


def decoded(markdown: str) -> Image.Image:
    match = re.fullmatch(r"!\[[^\]]+\]\(data:image/png;base64,([A-Za-z0-9+/=]+)\)", markdown)
    assert match
    content = base64.b64decode(match[1])
    assert len(content) < 40_000
    return Image.open(io.BytesIO(content)).convert("RGB")


def drawings(folder: Path) -> dict[str, Any]:
    found = [Update(f"model.layers.{n}.self_attn.{kind}_proj", 8, n + 0.5, 2.0, 3) for n in (0, 1) for kind in "qv"]
    return {
        "memory": memory.by_part({"runtime": 490.0, "weights": 9.3, "activations": 80.0}, 700.0, 600.0),
        "raw": data.raw_rows({"3": 2, "5": 7}, {"open_qa": 7, "": 2}),
        "tokens": data.tokens({"width": 10, "counts": [0, 3, 5]}, 30, [0, 0, 4]),
        "tokens unpacked": data.tokens({"width": 10, "counts": [0, 3, 5]}, 30, []),
        "curves": training.curves(STATE),
        "utilisation": training.utilisation(sampled(folder)),
        "overlaid": training.overlaid([training.Curve(f"e{n}", [1, 10], [2.0, n + 0.1]) for n in range(20)]),
        "by category": bars.by_category(CATEGORIES, ["base", "champion", "challenger"]),
        "by run": bars.by_run({"demo": {"base": 3.0, "challenger": 1.0}}),
        "updates": modules.updates(found),
        "margins": preferences.margins(
            {"edges": [-1.0, 0.0, 1.0], "counts": {"champion": [3, 4], "challenger": [1, 6]}}
        ),
    }


def sampled(folder: Path) -> Path:
    """Two GPUs, one of which does not tell its memory, as a training writes them."""
    sampling = Utilisation()
    for second in range(5):
        sampling.rows += [(second, 1, 0, 90, 2048, 300.0, None), (second, 1, 1, 80 + second, None, None, 60)]
    sampling.write(folder / "gpu.csv")
    return folder / "gpu.csv"


def test_each_is_a_small_picture_with_something_on_it(tmp_path: Path) -> None:
    for name, figure in drawings(tmp_path).items():
        picture = decoded(as_markdown(figure, name))
        assert picture.width == 800
        assert len(picture.getcolors(picture.width * picture.height)) > 8, f"{name} is empty"


def test_a_figure_is_the_same_bytes_each_time_and_readable_on_any_page(tmp_path: Path) -> None:
    assert svg(training.curves(STATE)) == svg(training.curves(STATE))
    assert as_address(training.curves(STATE)).startswith("data:image/svg+xml;base64,")
    assert b"training loss" in svg(training.curves(STATE)), "its text is text"


def test_curves_are_those_of_the_trainer_state() -> None:
    above, below, rate = training.curves(STATE).axes
    loss, held_out, *_ = above.get_lines()
    assert [*zip(*loss.get_data(), strict=True)] == [(entry["step"], entry["loss"]) for entry in HISTORY]
    assert [*zip(*held_out.get_data(), strict=True)] == [(0, 14.5), (30, 0.5)]
    assert above.get_yscale() == "log"
    assert [*below.get_lines()[0].get_ydata()] == [entry["grad_norm"] for entry in HISTORY]
    assert [*rate.get_lines()[0].get_ydata()] == [entry["learning_rate"] for entry in HISTORY]


def test_held_out_loss_within_a_training_is_a_line() -> None:
    history = [{**entry, "held_out_loss": 3.0} if entry["step"] == 10 else entry for entry in HISTORY]
    (_, held_out, *_), *_ = (axes.get_lines() for axes in training.curves({**STATE, "history": history}).axes)
    assert [*held_out.get_xdata()] == [0, 10, 30]
    assert held_out.get_linestyle() == "-"


def test_the_published_step_is_marked() -> None:
    history = [{**entry, "held_out_loss": 3.0} if entry["step"] == 10 else entry for entry in HISTORY]
    best = {"step": 10, "held_out_loss": 3.0, "saved_steps": 0, "is_published": True}
    above = training.curves({**STATE, "history": history, "best": best}).axes[0]
    _, held_out, marked, *_ = above.get_lines()
    assert [*zip(*held_out.get_data(), strict=True)] == [(0, 14.5), (10, 3.0)], "none after the last step"
    assert [*marked.get_xdata()] == [10, 10]


def test_utilisation_is_a_line_a_gpu(tmp_path: Path) -> None:
    busy, memory = training.utilisation(sampled(tmp_path)).axes  # type: ignore[union-attr]
    assert [line.get_label() for line in busy.get_lines()] == ["GPU 0", "GPU 1"]
    assert [*busy.get_lines()[1].get_ydata()] == [80, 81, 82, 83, 84]
    assert [*memory.get_lines()[0].get_ydata()] == [2.0] * 5, "GiB"
    (tmp_path / "gpu.csv").write_text((tmp_path / "gpu.csv").read_text().splitlines()[0])
    assert training.utilisation(tmp_path / "gpu.csv") is None


def test_bars_are_as_long_as_the_losses() -> None:
    (panel,) = bars.by_category(CATEGORIES, ["base", "champion", "challenger"]).axes
    widths = [[bar.get_width() for bar in contender] for contender in panel.containers]
    assert widths == [[4.0, 3.0], [0.0, 2.0], [1.5, 1.0]], "the category of most rows first"
    assert [label.get_text() for label in panel.get_yticklabels()] == [
        r"a \$strange\$ <one>, 20 rows",
        "open_qa, 9 rows",
    ]


def test_rare_categories_are_counted_together() -> None:
    _, panel = data.raw_rows({"5": 100}, {f"c{n}": 20 - n for n in range(20)}).axes
    assert panel.get_yticklabels()[-1].get_text() == "8 others"
    assert panel.containers[0][-1].get_width() == sum(range(1, 9))


def test_no_pyplot_is_loaded() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from finetune_assets.plots import data, style;"
        "style.png(data.raw_rows({'5': 1}, {'a': 1})); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("lengths", [{}, {"7": 3}])
def test_little_is_drawn_too(lengths: dict[str, int]) -> None:
    decoded(as_markdown(data.raw_rows(lengths, {}), "rows"))


def test_a_plot_is_drawn_once_for_the_same_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, drawn = {"memory_mib": {"weights": 9.3, "activations": 80.0}, "usable_mib": 700.0}, Results(tmp_path)
    first = pictures.of_plan(plan, drawn)
    decoded(str(first["memory_by_part"].value))
    monkeypatch.delattr(memory, "by_part")
    assert pictures.of_plan(plan, drawn) == first
    assert pictures.of_plan({**plan, "usable_mib": 701.0}, drawn) == {}, "drawn again, which fails here"
    assert pictures.of_plan(plan, drawn, 600.0) == {}
