import struct
from pathlib import Path

import pytest

from opsd_megatron.evaluation.exact_match import LengthScore
from opsd_megatron.evaluation.plot import plot_accuracy


def scores(*correct: int) -> list[LengthScore]:
    return [LengthScore(64 * 2**place, 200, count) for place, count in enumerate(correct)]


def test_the_picture_is_a_png_that_shows_its_runs(tmp_path: Path):
    pytest_runs = {"before": [scores(198, 190, 80)], "after": [scores(198, 196, 180), scores(197, 195, 170)]}
    both, one = tmp_path / "docs" / "both.png", tmp_path / "one.png"
    plot_accuracy(pytest_runs, both, "Exact match", baseline="before", mark=(128, "good up to here"))
    plot_accuracy({"before": pytest_runs["before"]}, one, "Exact match", baseline="before")
    for path in (both, one):
        head = path.read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", head[16:24])
        assert width > height > 500
    assert both.read_bytes() != one.read_bytes()


def test_lines_bands_and_labels_hold_the_numbers(monkeypatch, tmp_path: Path):
    from matplotlib import pyplot

    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    runs = {"before": [scores(198, 80)], "after": [scores(190, 180), scores(198, 160)]}
    plot_accuracy(runs, tmp_path / "a.png", baseline="before")
    (axes,) = figures[0].axes
    lines = {line.get_label(): line.get_ydata().tolist() for line in axes.lines if not line.get_label().startswith("_")}
    assert lines["after (2 seeds)"] == pytest.approx([0.97, 0.85])
    band = axes.collections[-1].get_paths()[0].vertices[:, 1]
    assert (round(float(band.min()), 6), round(float(band.max()), 6)) == (0.8, 0.99)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert sorted(labels) == ["after (2 seeds)", "before"]
