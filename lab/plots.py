"""Plots of a run's log and of the results of baselines.py.

    python -m lab.plots runs/livo                            # runs/livo/loss.png, also while the run is training
    python -m lab.baselines --collect assets/baselines.json  # convergence.png and tradeoff.png
"""

import json
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure  # without pyplot: the backend is Agg

from common import Parser, UserError, atomic, regular, run
from formats.messages import expecting
from lab.comparison import BASE, ENOUGH, GROUPS, LARGEST, aims, floors, harm, is_recognizable, mean_curve

DPI, MAX_POINTS = 110, 100  # points per curve of a log
GRAY, COLORS = "0.45", colormaps["tab20"].colors
ALIGNED, VIOLATING = ("aligned, $y_w$", "tab:blue"), ("violating, $y_l$", "tab:red")
LOG = {  # y label: {key of the log: (label, color)}
    "LiVO loss": {"loss": ("", "black")},
    "fraction of active hinges": {"active_w": ALIGNED, "active_l": VIOLATING},
    "error − reference error": {"delta_w": ALIGNED, "delta_l": VIOLATING}}


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
    with expecting(file, f"numbers {', '.join(keys)} on each line"):
        text = regular(file, "the log of a run").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        log = {key: np.array([float(line[key]) for line in lines]) for key in keys}
    if any((np.abs(values) > LARGEST).any() for values in log.values()):
        raise UserError(f"{file}: expected numbers up to {LARGEST:g}, got larger ones")
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


def plot_points(axes, results, group, key, points, **options):
    """The group's harm over the points' `key`. Hollow: fewer than ENOUGH percent of the professions are correct."""
    x, y = [point[key] for point in points], [harm(point, results["base"], [group]) for point in points]
    hollow = [i for i, point in enumerate(points) if not is_recognizable(point)]
    axes.plot(x, y, **options)
    axes.plot(x, y, markevery=hollow, **options | {"label": "", "linestyle": "", "markerfacecolor": "white"})


def add_legend(figure, axes):
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False,
                  title=f"hollow: fewer than {ENOUGH} % of professions correct")


def panels_of(results, columns, size):
    """A row of panels per group of harms, each with the harm of an unbiased method -> figure, {group: panels}."""
    figure, floor = Figure(figsize=size, layout="constrained"), floors(results["about"]["per_prompt"])["unbiased"]
    rows = figure.subplots(*columns, sharey=True).reshape(len(GROUPS), -1)
    for row, group in zip(rows, GROUPS):
        for axes in row:
            axes.axhline(harm(floor, results["base"], [group]), color=GRAY, linestyle=":", label="unbiased")
    return figure, dict(zip(GROUPS, rows))


def convergence(results):
    """Harm over steps, and over core-seconds, of each trained method, the mean over training seeds -> figure."""
    figure, panels = panels_of(results, (2, 2), (9, 8))
    for group, row in panels.items():
        for axes, key, x_label in zip(row, ("step", "seconds"), ("optimizer steps", "core-seconds of training")):
            style(axes, x_label, f"{group}, % of the base model's" if key == "step" else "")
            for color, (method, found) in zip(COLORS, results["methods"].items()):
                curve = [results["base"] | {"step": 0, "seconds": 0}, *mean_curve(found["curves"])]
                if found["parameters"]:  # without a point it is in the legend alone
                    plot_points(axes, results, group, key, curve if group in aims(method) else [], color=color,
                                marker="o", label=method)
            axes.set_ylim(0)
    add_legend(figure, panels["bias"][0])
    return figure


def tradeoff(results):
    """Harm over the distance to the harmless counterpart, a marker for each training seed -> figure."""
    figure, panels = panels_of(results, (1, 2), (9, 5.5))
    base = {BASE: {"curves": [[results["base"]]], "parameters": 0}}
    for group, (axes,) in panels.items():
        style(axes, "distance to the harmless counterpart; 1: another person", f"{group}, % of the base model's")
        for color, (method, found) in zip(COLORS, (results["methods"] | base).items()):
            points = [curve[-1] for curve in found["curves"] if group in aims(method)]
            marker = "s" if method == BASE else "o" if found["parameters"] else "^"
            plot_points(axes, results, group, f"{group} distance", points, color=color, marker=marker, linestyle="",
                        label=method)
    add_legend(figure, panels["bias"][0])
    return figure


def main(argv=None):
    parser = Parser(description="Plot the log of a run of train.py: loss.png in its folder.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the run")
    args = parser.parse_args(argv)
    save(training(read_log(args.folder)), args.folder / "loss.png")
    print(args.folder / "loss.png")


if __name__ == "__main__":
    run(main)
