"""What baselines.py finds, as a table and two plots; and the drawing that evaluate.py's chart shares with them.

results: {"fair": {harm: percent}, "frozen": a point, "sweep", "grid" and "long": {method: [run]}}. A run is
{"settings", "curve"}, a curve a list of points, one per measurement: {"step", "seconds", "harm", each harm,
"profession right", "distance", "intervals": {each of these: [low, high]}}.
"""

import math

from PIL import Image, ImageDraw, ImageFont

from common import atomic

ENOUGH = 90  # percent of professions right: below, what looks harmless may just be unrecognisable
REACHED = 0.1  # of the frozen model's harm
COLOURS = ("#9aa5b1", "#d1603d", "#2a7f62", "#e0a526", "#5b6ee1", "#8d5a97", "#3c3c3c")


def legend(pen, names, x, font):
    """A square of each name's colour, and the name, in the uppermost 20 pixels from x on."""
    for name, colour in zip(names, COLOURS):
        pen.rectangle((x, 10, x + 10, 20), colour)
        pen.text((x + 15, 8), name, "black", font)
        x += 30 + font.getlength(name)


def is_recognised(point):
    return point["profession right"] >= ENOUGH


def best(runs):
    """The run that ends with the least harm, among those that still draw what the prompt says, if there are any."""
    return min(runs, key=lambda run: (not is_recognised(run["curve"][-1]), run["curve"][-1]["harm"]))


def reached(curve, what, frozen, fair):
    """The first point of a curve from which on what is above the harm of fair pictures is a tenth of the frozen
    model's, and professions are right, or None."""
    enough = fair[what] + REACHED * (frozen[what] - fair[what])
    first = None
    for point in reversed(curve):
        if point[what] > enough or not is_recognised(point):
            break
        first = point
    return first


def show(results):
    """Prints every run at its end, the best of each method marked, and how soon the best ones' harm fell."""
    frozen, fair = results["frozen"], results["fair"]
    columns = [what for what in frozen if what not in ("step", "seconds", "intervals")]

    def row(name, cells):
        print(f"{name:60}" + "".join(f"{cell:>22}" for cell in cells))

    def cell(point, what):
        low, high = point["intervals"][what]
        return f"{point[what]:.1f} [{low:5.1f}, {high:5.1f}]"

    titles = {"sweep": "percent, at the end; * best of its method", "grid": "trade-off", "long": "the best, for longer"}
    for kind, title in titles.items():
        print()
        row(title, columns)
        for method, runs in {"frozen": [{"settings": {}, "curve": [frozen]}], **results[kind]}.items():
            for this in runs:
                mark = "*" if kind == "sweep" and len(runs) > 1 and this is best(runs) else " "
                settings = " ".join(f"{name}={value:g}" for name, value in this["settings"].items())
                row(f"{mark} {method} {settings}", (cell(this["curve"][-1], what) for what in columns))
    print()
    row(f"steps, seconds until {REACHED:.0%} of the frozen model's harm is left", fair)
    row("above that of fair pictures", (f"{value:.1f}" for value in fair.values()))
    for method, (this,) in results["long"].items():
        points = (reached(this["curve"], what, frozen, fair) for what in fair)
        row(method, (f"{point['step']}, {point['seconds']:.0f} s" if point else "not reached" for point in points))


WIDTH, HEIGHT, EDGE, TICKS = 560, 380, 56, 4  # of a panel, in pixels


def tick(x):
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def draw_panel(pen, left, series, x_label, y_label, joined):
    """Of each name in `series` the points (x, y, whether filled), in the legend's colours; y is 0 … 100."""
    font = ImageFont.load_default(12)
    wide, high, bottom = WIDTH - 2 * EDGE, HEIGHT - 2 * EDGE, HEIGHT - EDGE
    x_max = max(x for points in series.values() for x, _, _ in points) or 1
    for i in range(TICKS + 1):
        x, y = left + EDGE + wide * i / TICKS, bottom - high * i / TICKS
        pen.line((left + EDGE, y, left + EDGE + wide, y), "#dddddd")
        pen.text((left + EDGE - 6, y), f"{100 * i / TICKS:g}", "black", font, anchor="rm")
        pen.text((x, bottom + 6), f"{tick(x_max * i / TICKS)}", "black", font, anchor="mt")
    pen.text((left + EDGE, EDGE - 8), y_label, "black", font, anchor="lb")
    pen.text((left + EDGE + wide, bottom + 24), x_label, "black", font, anchor="rt")
    for (name, points), colour in zip(series.items(), COLOURS):
        places = [(left + EDGE + wide * x / x_max, bottom - high * y / 100) for x, y, _ in points]
        if joined:
            pen.line(places, colour, 2)
        for (x, y), (_, _, filled) in zip(places, points):
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), colour if filled else "white", colour, 2)


def new_plot(panels, names):
    image = Image.new("RGB", (panels * WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(12)
    legend(pen, names, EDGE, font)
    pen.text((EDGE, HEIGHT - 16), f"hollow: less than {ENOUGH} % of professions right", "black", font)
    return image, pen


def convergence(results):
    """Harm over steps, and over seconds, of each trained method's long run. -> PIL image.

    A hollow point draws less than ENOUGH professions right.
    """
    curves = {method: this["curve"] for method, (this,) in results["long"].items()}
    image, pen = new_plot(2, ["frozen", *curves])
    for left, x, label in (0, "step", "steps"), (WIDTH, "seconds", "seconds of training"):
        series = {method: [(point[x], point["harm"], is_recognised(point)) for point in curve]
                  for method, curve in curves.items()}
        last = max((curve[-1][x] for curve in curves.values()), default=0)
        frozen = [(end, results["frozen"]["harm"], True) for end in (0, last)]
        draw_panel(pen, left, {"frozen": frozen} | series, label, "harm, percent", joined=True)
    return image


def tradeoff(results):
    """Conformity against distance to the frozen model's pictures, of the grid's runs at their end, and of the long
    runs with the same loss and network. -> PIL image."""
    ends = {"frozen": [results["frozen"]]}
    for method, runs in results["grid"].items():
        long = [this for name, (this,) in results["long"].items() if name.startswith(method)]
        ends[method] = [this["curve"][-1] for this in runs + long]
    image, pen = new_plot(1, ends)
    series = {method: [(point["distance"], 100 - point["harm"], is_recognised(point)) for point in points]
              for method, points in ends.items()}
    x_label, y_label = "distance to the frozen model's pictures, 0 … 255", "conformity: 100 - harm"
    draw_panel(pen, 0, series, x_label, y_label, joined=False)
    return image


CURVES = {"loss": ["loss"], "active hinges, aligned blue, violating red": ["active_w", "active_l"],
          "error minus the frozen model's, aligned blue, violating red": ["delta_w", "delta_l"]}
COLOURS, WIDTH, HEIGHT, EDGE = ((40, 90, 200), (210, 50, 40)), 640, 200, 24  # of a panel, in pixels


def plot(lines, path):
    """Draw the log's curves over the steps into a PNG; a point is the mean of a hundredth of them."""
    image = Image.new("RGB", (WIDTH, HEIGHT * len(CURVES)), "white")
    pen, size = ImageDraw.Draw(image), math.ceil(len(lines) / 100)
    parts = [lines[i:i + size] for i in range(0, len(lines), size)]
    for panel, (title, keys) in enumerate(CURVES.items()):
        curves = [[sum(line[key] for line in part) / len(part) for part in parts] for key in keys]
        low, high = min(0, *map(min, curves)), max(0, *map(max, curves))
        bottom, scale = (panel + 1) * HEIGHT - EDGE, (HEIGHT - 2 * EDGE) / ((high - low) or 1)
        pen.text((EDGE, panel * HEIGHT + 4), f"{title}: {low:.3g} to {high:.3g}, {len(lines)} steps", "black")
        pen.line((EDGE, bottom + low * scale, WIDTH - EDGE, bottom + low * scale), (180, 180, 180))  # 0
        for curve, colour in zip(curves, COLOURS):
            dx = (WIDTH - 2 * EDGE) / max(1, len(curve) - 1)
            pen.line([(EDGE + i * dx, bottom - (y - low) * scale) for i, y in enumerate(curve)], colour, 2)
    with atomic(path) as temporary:
        image.save(temporary)
