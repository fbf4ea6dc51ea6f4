"""Plots: the training log of a run, and the results of baselines.py.

    python -m lab.plots runs/livo                            # runs/livo/loss.png, also while the run goes on
    python -m lab.baselines --collect assets/baselines.json  # convergence.png and tradeoff.png
"""

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # without pyplot: the Agg backend

from common import Parser, UserError, atomic, run
from lab.baselines import BASE, ENOUGH, TRAINED, floors, harm, is_recognizable

DPI, MAX_POINTS = 110, 100  # points per curve of a log
GRAY, BLUE, RED = "0.45", "tab:blue", "tab:red"
COLORS = {method: f"C{i}" for i, method in enumerate(TRAINED)}
LOG = {  # y label: {key of the log: (label, color)}
    "LiVO loss": {"loss": ("", "black")},
    "fraction of active hinges": {"active_w": ("aligned, $y_w$", BLUE), "active_l": ("violating, $y_l$", RED)},
    "error − reference error": {"delta_w": ("aligned, $y_w$", BLUE), "delta_l": ("violating, $y_l$", RED)},
}


def save(figure, path):
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format="png", pil_kwargs={"optimize": True})


def style(axes, x_label=""):
    axes.set_xlabel(x_label)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


# ── The log of a run ─────────────────────────────────────────────────────────────────────────────────────────────────


def read_log(folder):
    """log.jsonl of a run's folder -> {key: values of all steps}. Raises UserError for a folder without a proper one."""
    file, keys = folder / "log.jsonl", ["step", *(key for curves in LOG.values() for key in curves)]
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        log = {key: np.array([line[key] for line in lines], dtype=float) for key in keys}
    except OSError as error:
        raise UserError(f"{file}: expected the log of a run of train.py, got {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file}: expected numbers {', '.join(keys)} on each line, got {error!r}") from error
    if not lines:
        raise UserError(f"{file}: expected a line per step, got an empty file")
    return log


def training(log):
    """The log's curves over the steps -> figure. Each of at most MAX_POINTS points is the mean of as many steps."""
    figure, steps = Figure(figsize=(8, 7.5), layout="constrained"), len(log["step"])
    points = min(steps, MAX_POINTS)
    means = {key: [part.mean() for part in np.array_split(values, points)] for key, values in log.items()}
    for axes, (title, curves) in zip(figure.subplots(len(LOG), sharex=True), LOG.items()):
        for key, (label, color) in curves.items():
            axes.plot(means["step"], means[key], color=color, label=label, marker="." if points < 20 else "")
        style(axes)
        axes.set_ylabel(title)
        axes.axhline(0, color=GRAY, linewidth=0.8)
        if len(curves) > 1:
            axes.legend(frameon=False)
    axes.set_xlabel(f"step (a point is the mean of {steps / points:.3g} steps)" if steps > points else "step")
    return figure


# ── The results of baselines.py ──────────────────────────────────────────────────────────────────────────────────────


def draw_points(axes, x, y, points, **style):
    """A marker per point, hollow if fewer than ENOUGH percent of its professions are correct."""
    hollow = [i for i, point in enumerate(points) if not is_recognizable(point)]
    axes.plot(x, y, **style)
    axes.plot(x, y, markevery=hollow, **style | {"label": "", "linestyle": "", "markerfacecolor": "white"})


def finish(figure, axes, y_label, unbiased):
    axes.axhline(unbiased, color=GRAY, linestyle=":", label="unbiased model")
    axes.set_ylabel(y_label)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False,
                  title=f"hollow: fewer than {ENOUGH} % of professions correct")
    return figure


def unbiased_harm(results):
    return harm(floors(results["about"]["sweep"]["per_prompt"])["unbiased model"], results["base"])


def convergence(results):
    """Harm over steps, and over seconds, of each trained method's long run -> figure."""
    figure, base = Figure(figsize=(9, 4.4), layout="constrained"), results["base"]
    axes = figure.subplots(1, 2, sharey=True)
    for panel, key, label in zip(axes, ("step", "seconds"), ("optimizer steps", "seconds of training")):
        style(panel, label)
        panel.axhline(100, color=GRAY, linestyle="--", label=BASE)
        for method, (this,) in results["long"].items():
            x, y = zip(*((point[key], harm(point, base)) for point in this["curve"]))
            draw_points(panel, x, y, this["curve"], color=COLORS[method], marker="o", label=method)
        panel.set_ylim(0)
    axes[1].axhline(unbiased_harm(results), color=GRAY, linestyle=":")
    return finish(figure, axes[0], "harm, % of the base model's", unbiased_harm(results))


def tradeoff(results):
    """Conformity over the distance to the base model's images -> figure.

    Of the grid's runs at their end, and of the long runs with the same loss and network.
    """
    figure, base = Figure(figsize=(7.5, 5), layout="constrained"), results["base"]
    axes = figure.subplots()
    style(axes, "pixel distance to the base model's images, 0 … 255")
    series = [(BASE, "o", GRAY, [base])]
    for method, runs in results["grid"].items():
        long = [this for name, (this,) in results["long"].items() if name.startswith(method)]
        series += [(f"{method}, {kind}", marker, COLORS[method], [this["curve"][-1] for this in some])
                   for kind, marker, some in (("grid", "o", runs), ("long", "s", long)) if some]
    for label, marker, color, points in series:
        x, y = zip(*((point["distance"], 100 - harm(point, base)) for point in points))
        draw_points(axes, x, y, points, color=color, marker=marker, linestyle="", label=label)
    return finish(figure, axes, "conformity: 100 − harm, %", 100 - unbiased_harm(results))


def main(argv=None):
    parser = Parser(description="Plot the log of a run of train.py: loss.png in its folder.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the run")
    args = parser.parse_args(argv)
    save(training(read_log(args.folder)), args.folder / "loss.png")
    print(args.folder / "loss.png")


if __name__ == "__main__":
    run(main)
