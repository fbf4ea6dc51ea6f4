"""Plots of a run's log and of the results of baselines.py.

    python -m lab.plots runs/livo                            # runs/livo/loss.png, also while the run is training
    python -m lab.baselines --collect assets/baselines.json  # convergence.png and tradeoff.png
"""

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # without pyplot: the backend is Agg

from common import Parser, UserError, atomic, regular, run
from lab.baselines import AIMS, BASE, ENOUGH, GROUPS, SWEEP, TRAINED, floors, harm, is_recognizable, mean_curve

DPI, MAX_POINTS = 110, 100  # points per curve of a log
GRAY = "0.45"
COLORS = {BASE: GRAY} | {method: f"C{i % 10}" for i, method in enumerate(SWEEP)}
MARKERS = {BASE: "s"} | {method: "o" if method in TRAINED else "^" for method in SWEEP}
ALIGNED, VIOLATING = ("aligned, $y_w$", "tab:blue"), ("violating, $y_l$", "tab:red")
LOG = {  # y label: {key of the log: (label, color)}
    "LiVO loss": {"loss": ("", "black")},
    "fraction of active hinges": {"active_w": ALIGNED, "active_l": VIOLATING},
    "error − reference error": {"delta_w": ALIGNED, "delta_l": VIOLATING},
}


def save(figure, path):
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=DPI, pil_kwargs={"optimize": True})


def style(axes, x_label, y_label):
    axes.set(xlabel=x_label, ylabel=y_label, axisbelow=True)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def read_log(folder):
    """log.jsonl of a run's folder -> {key: values of all steps}. Raises UserError for another folder or file."""
    file, keys = folder / "log.jsonl", ["step", *(key for curves in LOG.values() for key in curves)]
    try:
        text = regular(file, "the log of a run").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        log = {key: np.array([float(line[key]) for line in lines]) for key in keys}
    except OSError as error:
        raise UserError(f"{file}: expected the log of a run of train.py, got {error.strerror}") from error
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise UserError(f"{file}: expected numbers {', '.join(keys)} on each line, got {error!r}") from error
    if not lines:
        raise UserError(f"{file}: expected a line per step, got an empty file")
    return log


def training(log):
    """Loss, active hinges and errors over the steps -> figure. A point is the mean of consecutive steps."""
    figure, steps = Figure(figsize=(8, 7.5), layout="constrained"), len(log["step"])
    points = min(steps, MAX_POINTS)
    means = {key: [part.mean() for part in np.array_split(values, points)] for key, values in log.items()}
    panels = figure.subplots(len(LOG), sharex=True)
    for axes, (title, curves) in zip(panels, LOG.items()):
        for key, (label, color) in curves.items():
            axes.plot(means["step"], means[key], color=color, label=label, marker="." if points < 20 else "")
        style(axes, "", title)
        axes.axhline(0, color=GRAY, linewidth=0.8)
        if len(curves) > 1:
            axes.legend(frameon=False)
    panels[-1].set_xlabel("step" if steps == points else f"step, means of {steps / points:.3g}")
    return figure


def plot_points(axes, x, y, points, **options):
    """A marker per point, hollow if fewer than ENOUGH percent of its professions are correct."""
    hollow = [i for i, point in enumerate(points) if not is_recognizable(point)]
    axes.plot(x, y, **options)
    axes.plot(x, y, markevery=hollow, **options | {"label": "", "linestyle": "", "markerfacecolor": "white"})


def add_legend(figure, axes):
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False,
                  title=f"hollow: fewer than {ENOUGH} % of professions correct")


def unbiased_harm(results, group):
    return harm(floors(results["about"]["per_prompt"])["unbiased, half unchanged"], results["base"], GROUPS[group])


def convergence(results):
    """Harm over steps, and over seconds, of each trained method, the mean over training seeds -> figure."""
    figure, base = Figure(figsize=(9, 8), layout="constrained"), results["base"]
    panels = figure.subplots(2, 2, sharey=True)
    for row, group in zip(panels, GROUPS):
        for axes, key, x_label in zip(row, ("step", "seconds"), ("optimizer steps", "seconds of training")):
            style(axes, x_label, f"{group}, % of the base model's" if key == "step" else "")
            axes.axhline(100, color=GRAY, linestyle="--", label=BASE)
            axes.axhline(unbiased_harm(results, group), color=GRAY, linestyle=":", label="unbiased")
            for method, found in results["methods"].items():
                if method in TRAINED and group in AIMS.get(method, GROUPS):
                    curve = mean_curve(found["curves"])
                    x = [0, *(point[key] for point in curve)]
                    y = [100, *(harm(point, base, GROUPS[group]) for point in curve)]
                    plot_points(axes, x, y, [base, *curve], color=COLORS[method], marker="o", label=method)
            axes.set_ylim(0)
    add_legend(figure, panels[1, 0])
    return figure


def tradeoff(results):
    """Conformity over the distance to the harmless counterpart, of each method that aims at it -> figure.

    A panel for bias, one for toxicity; a marker for each training seed.
    """
    figure, base = Figure(figsize=(9, 5), layout="constrained"), results["base"]
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (group, names) in zip(panels, GROUPS.items()):
        style(axes, "distance to the harmless counterpart; 1: another person", "conformity: 100 − harm, %")
        axes.set_title(group)
        axes.axhline(100 - unbiased_harm(results, group), color=GRAY, linestyle=":", label="unbiased")
        for method, found in [(BASE, {"curves": [[base]]}), *results["methods"].items()]:
            shown = group in AIMS.get(method, GROUPS)  # the others are in the legend alone
            points = [curve[-1] for curve in found["curves"]] if shown else []
            x = [point[f"{group} distance"] for point in points]
            y = [100 - harm(point, base, names) for point in points]
            plot_points(axes, x, y, points, color=COLORS[method], marker=MARKERS[method], linestyle="", label=method)
    add_legend(figure, panels[0])
    return figure


def main(argv=None):
    parser = Parser(description="Plot the log of a run of train.py: loss.png in its folder.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the run")
    args = parser.parse_args(argv)
    save(training(read_log(args.folder)), args.folder / "loss.png")
    print(args.folder / "loss.png")


if __name__ == "__main__":
    run(main)
