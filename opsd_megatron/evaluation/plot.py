"""The picture of a result: accuracy by context length, before and after, with the spread over seeds."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opsd_megatron.errors import UserError
from opsd_megatron.evaluation.exact_match import LengthScore

# Okabe and Ito's palette: told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, FAINT = "#333333", "#dddddd"


def plot_accuracy(
    runs: Mapping[str, Sequence[Sequence[LengthScore]]],
    path: Path,
    title: str = "",
    baseline: str | None = None,
    mark: tuple[int, str] | None = None,
) -> None:
    """Draws one line per run and saves it as PNG (or as the suffix of `path` says).

    `runs` maps a name to its scores for each seed: the line is the mean, the band reaches from the lowest to the
    highest seed. With one seed, bars show the binomial standard error. The run named `baseline` is grey and dashed.
    `mark` is a context length and the words that stand above its line, for example where the baseline stops being good.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("drawing needs matplotlib; install opsd-megatron[plot]") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    colours = iter(COLOURS * (1 + len(runs) // len(COLOURS)))
    for name, seeds in runs.items():
        is_baseline = name == baseline
        _draw_run(axes, name, seeds, "#777777" if is_baseline else next(colours), "--" if is_baseline else "-")
    if mark is not None:
        axes.axvline(mark[0], color=FAINT, linewidth=1, zorder=0)
        axes.annotate(
            mark[1], (mark[0], 1.06), ha="center", va="bottom", color="#888888", fontsize=9, annotation_clip=False
        )
    _tidy(axes, sorted({score.length for seeds in runs.values() for scores in seeds for score in scores}), title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def _draw_run(axes: Any, name: str, seeds: Sequence[Sequence[LengthScore]], colour: str, style: str) -> None:
    by_length: dict[int, list[LengthScore]] = {}
    for scores in seeds:
        for score in scores:
            by_length.setdefault(score.length, []).append(score)
    lengths = sorted(by_length)
    accuracies = [[score.accuracy for score in by_length[length]] for length in lengths]
    means = [statistics.fmean(values) for values in accuracies]
    label = name if len(seeds) == 1 else f"{name} ({len(seeds)} seeds)"
    look = {"color": colour, "linestyle": style, "linewidth": 2, "marker": "o", "markersize": 5, "label": label}
    if len(seeds) == 1:
        errors = [by_length[length][0].standard_error for length in lengths]
        axes.errorbar(lengths, means, yerr=errors, capsize=3, elinewidth=1, **look)
        return
    axes.plot(lengths, means, **look)
    low, high = [min(values) for values in accuracies], [max(values) for values in accuracies]
    axes.fill_between(lengths, low, high, color=colour, alpha=0.18, linewidth=0)


def _tidy(axes: Any, lengths: Sequence[int], title: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.set_ylim(-0.03, 1.05)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, colors=INK)
    axes.set_xlabel("context length in tokens", color=INK)
    axes.set_ylabel("exact match", color=INK)
    if title:
        axes.set_title(title, loc="left", color=INK, fontsize=11, pad=18)
    axes.legend(frameon=False, labelcolor=INK)
