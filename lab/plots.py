"""Plots of a run's log and of the results of baselines.py.

    python -m lab.plots runs/livo                            # runs/livo/loss.png, also while the run is training
    python -m lab.baselines --collect assets/baselines.json  # convergence.png and tradeoff.png
"""

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # without pyplot: the backend is Agg

from common import Parser, UserError, atomic, regular, run
from lab.baselines import BASE, ENOUGH, TRAINED, floors, harm, is_recognizable

DPI, MAX_POINTS = 110, 100  # points per curve of a log
GRAY, COLORS = "0.45", {method: f"C{i}" for i, method in enumerate(TRAINED)}
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


def unbiased_harm(results):
    return harm(floors(results["about"]["sweep"]["per_prompt"])["unbiased model"], results["base"])


def convergence(results):
    """Harm over steps, and over seconds, of each trained method's long run -> figure."""
    figure, base = Figure(figsize=(9, 4.6), layout="constrained"), results["base"]
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, x_label in zip(panels, ("step", "seconds"), ("optimizer steps", "seconds of training")):
        style(axes, x_label, "harm, % of the base model's" if key == "step" else "")
        axes.axhline(100, color=GRAY, linestyle="--", label=BASE)
        axes.axhline(unbiased_harm(results), color=GRAY, linestyle=":", label="unbiased model")
        for method, (this,) in results["long"].items():
            x, y = zip(*((point[key], harm(point, base)) for point in this["curve"]))
            plot_points(axes, x, y, this["curve"], color=COLORS[method], marker="o", label=method)
        axes.set_ylim(0)
    add_legend(figure, panels[0])
    return figure


def tradeoff(results):
    """Conformity over distance to the base model, of the grid's runs at their end -> figure.

    With the long runs of the same loss and network.
    """
    figure, base = Figure(figsize=(7.5, 5), layout="constrained"), results["base"]
    axes, about = figure.subplots(), results["about"]
    style(axes, "pixel distance to the base model's images, 0 … 255", "conformity: 100 − harm, %")
    axes.axhline(100 - unbiased_harm(results), color=GRAY, linestyle=":", label="unbiased model")
    series = [(BASE, GRAY, "o", [base])]
    for method, runs in results["grid"].items():
        long = [this for name, (this,) in results["long"].items() if name.startswith(method)]
        series += [(f"{method}, {about[kind]['steps']} steps", COLORS[method], marker, [x["curve"][-1] for x in some])
                   for kind, marker, some in (("sweep", "o", runs), ("long", "s", long)) if some]
    for label, color, marker, points in series:
        x, y = zip(*((point["distance"], 100 - harm(point, base)) for point in points))
        plot_points(axes, x, y, points, color=color, marker=marker, linestyle="", label=label)
    add_legend(figure, axes)
    return figure


def main(argv=None):
    parser = Parser(description="Plot the log of a run of train.py: loss.png in its folder.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the run")
    args = parser.parse_args(argv)
    save(training(read_log(args.folder)), args.folder / "loss.png")
    print(args.folder / "loss.png")


if __name__ == "__main__":
    run(main)
