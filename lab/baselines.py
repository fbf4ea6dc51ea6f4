"""Baselines for LiVO on tiny-sd: eleven other methods, tuned, trained and measured alike, in two core-hours and more.

    python -m lab.baselines                                  # all runs that are missing in runs/baselines
    python -m lab.baselines --list                           # the runs, and about how long each takes
    python -m lab.baselines --only UCE "Diffusion-DPO"       # some methods
    python -m lab.baselines --seeds 0                        # one training seed of three
    python -m lab.baselines --collect assets/baselines.json  # the tables, convergence.png and tradeoff.png

Any number of such processes may run at once in one folder: each takes the next run that no other has. A run that was
stopped (SIGTERM, Ctrl-C) resumes at its step, one that was killed at its last measurement.

First each method's few settings (SWEEP) are tried in short runs, on the prompts and noise of comparison.TUNING. The
best ones then run with each of three training seeds, and are measured on those of REPORT. LiVO has the settings of
tiny-sd/livo.toml and is not tuned here. A finished run is a file, OUT/tune/NAME.json or OUT/NAME.json.
"""

import re
import sys
import time
from collections import namedtuple
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

import train
import weights
from common import Parser, UserError, atomic, number, read_json, run, write_json
from data import PreferenceDataset
from diffusion import Schedule
from formats.disk import check_writable, locked
from formats.files import unpickle
from formats.messages import expecting
from lab import evaluate, portraits, toy, uce
from lab.classifier import digest, load_classifier
from lab.comparison import (BASE, MOST, NUMBERS, REPORT, TUNING, aims, is_result, mean_curve, measure,
                            rank, seconds_added, tables)
from lab.damage import load_detector
from lab.evaluate import UNTRAINED, fingerprint, generated, kept
from lab.finetuning import TRAINED, trainable
from lab.guidance import SLD, fair_diffusion, safe_latent_diffusion
from livo import is_bias
from runs import SAMPLING, caught_signals

PRESET = train.load_preset(train.TINY_SD)
VERSION = 5  # part of every run's key: raise it when the code trains or measures differently with the same settings

LIVO = "LiVO"
SWEEP = {  # the settings that are tried; a method with only one is not tuned
    LIVO: [{"lr": PRESET["lr"]}],
    "BT on the value encoder": [{"lr": 1e-3, "beta": 20.0}, {"lr": 1e-3, "beta": 100.0}, {"lr": 3e-4, "beta": 100.0}],
    "Diffusion-DPO": [{"lr": 3e-5, "beta": 100.0}, {"lr": 1e-4, "beta": 100.0}, {"lr": 1e-4, "beta": 20.0}],
    "text encoder": [{"lr": 1e-4}, {"lr": 3e-4}, {"lr": 1e-3}],
    "Concept Ablation": [{"lr": 3e-4}, {"lr": 1e-3}, {"lr": 3e-3}],
    "Concept Ablation, full UNet": [{"lr": 3e-5}, {"lr": 1e-4}, {"lr": 3e-4}],
    "SafeText": [{"lr": lr, "lam": lam} for lr in (1e-4, 1e-3) for lam in (30.0, 300.0)],
    "UCE": [{"strength": strength, "lam": 0.1} for strength in (1.0, 2.0, 4.0, 6.0)],
    "Fair Diffusion": [{"scale": scale, "threshold": threshold} for scale in (5.0, 10.0) for threshold in (0.5, 0.9)],
    "Safe Latent Diffusion": [{"strength": name} for name in SLD],
    "negative prompt": [{"phrases": 0}, {"phrases": 2}],
    "principle in the prompt": [{}]}
SEEDS, TUNING_SEED = (0, 1, 2), 100  # of training
MEASURED = (50, 100, 200, 300)  # steps, beside the last one
MARGINS = {name: PRESET.get(name) for name in ("gamma1", "gamma2", "margins")}
HINGES = LIVO, "text encoder"  # the methods that have margins
WAIT = 5  # seconds until a process looks again for a run that it can do

# ── Images of a method ───────────────────────────────────────────────────────────────────────────────────────────────

def images_of_model(model, value_encoder=None):
    """-> images_of(prompt, seeds) of a trained or edited model. Without a value encoder they depend on no principle."""
    images_of = partial(generated, model, value_encoder, SAMPLING | {"fraction": 1})
    if value_encoder is not None:
        return images_of
    once = cache(images_of)  # equal for gender and skin
    return lambda prompt, seeds: once(prompt._replace(principles=()), tuple(seeds))


def untrained(sd, method, settings, base):
    """-> images_of(prompt, seeds) of a method without training."""
    if method == BASE:
        return base
    if method == "UCE":
        return images_of_model(replace(sd, unet=uce.edit(sd, *uce.texts(settings["strength"]), settings["lam"])))
    if method == "Safe Latent Diffusion":
        return partial(safe_latent_diffusion, sd, SAMPLING, **SLD[settings["strength"]])
    if method == "Fair Diffusion":  # it has no direction for a toxic principle
        ours = partial(fair_diffusion, sd, SAMPLING, **settings)
        return lambda prompt, seeds: (ours if is_bias(prompt.principles[0]) else base)(prompt, seeds)
    return partial(UNTRAINED[method], sd, SAMPLING, fraction=1, **settings)


# ── The runs and their files ─────────────────────────────────────────────────────────────────────────────────────────

class Run(namedtuple("Run", "method settings seed folder tuning")):
    """settings: None for the best ones of the tuning. seed: of training, None without.

    The result is the file FOLDER.json. FOLDER holds the checkpoint, and is locked while a process works on the run.
    """

    @property
    def file(self):
        return self.folder.with_name(self.folder.name + ".json")


def plan(out, methods=tuple(SWEEP), seeds=SEEDS):
    """All runs in order: the base model, tuning, then each method with the first seed, with the second, …"""
    def make(method, settings, seed, tuning, *words):
        name = re.sub(r"[^\w.=-]+", "-", " ".join([method, *words]))
        return Run(method, settings, seed, (out / "tune" if tuning else out) / name, tuning)

    runs = [make(BASE, {}, None, tuning) for tuning in (False, True)]
    for method in methods:
        seed = TUNING_SEED if method in TRAINED else None
        runs += [make(method, settings, seed, True, *(f"{name}={value}" for name, value in settings.items()))
                 for settings in SWEEP[method] if len(SWEEP[method]) > 1]
    for seed in seeds:
        for method in methods:
            if method in TRAINED:
                runs.append(make(method, None, seed, False, f"seed={seed}"))
            elif seed == seeds[0]:
                runs.append(make(method, None, None, False))
    return runs


def load_curve(file, about=None, fewest=1):
    """-> the content of a run's file, {"about", "curve", …}. Raises UserError for one about something else."""
    found = read_json(file, about=dict, curve=list)
    if len(found["curve"]) < fewest or not is_result(found):
        raise UserError(f"{file}: expected settings, and points with {', '.join(NUMBERS)}, got others")
    if about and any(found["about"].get(key) != value for key, value in about.items()):
        raise UserError(f"{file}: expected a run of {about}, got one of {found['about']}; choose another --out")
    return found


def load_progress(file, about, start):
    """-> the curve of an unfinished run up to step `start` of its checkpoint, and the seconds of training."""
    if not start:
        return [], 0.0
    found = load_curve(file, about, fewest=0)
    step, seconds = found.get("step"), found.get("seconds")
    if type(step) is not int or type(seconds) not in (int, float) or step < start:
        raise UserError(f"{file}: expected a curve up to step {start}, got one of step {step}, {seconds} seconds")
    # The file is written before the checkpoint, so it may be ahead of it.
    return [point for point in found["curve"] if point["step"] <= start], seconds * start / step


def best_settings(out, method):
    """The best settings of a method; None while some of its tuning runs, or the base model's, are missing."""
    if len(SWEEP[method]) == 1:
        return SWEEP[method][0]
    runs = [this for this in plan(out, [method]) if this.tuning]
    if not all(this.file.exists() for this in runs):
        return None
    base, *points = (load_curve(this.file)["curve"][-1] for this in runs)
    return min(zip(runs[1:], points), key=lambda pair: rank(method, pair[1], base))[0].settings


def steps_of(this, args):
    if this.method not in TRAINED:
        return 0
    return args.tune_steps if this.tuning else args.steps


# ── Doing them ───────────────────────────────────────────────────────────────────────────────────────────────────────

class Setup:
    """What all runs share: the model, the data, and how to measure."""

    def __init__(self, args):
        self.args, self.sd = args, weights.load(args.weights)
        if self.sd.size != portraits.SIZE:
            raise UserError(f"{args.weights}: expected a model of the toy dataset, of {portraits.SIZE} pixels, "
                            f"got {self.sd.size} pixels")
        root = args.data or toy.default_pairs(args.out.parent)
        self.dataset = PreferenceDataset(root, self.sd, args.out.parent / "cache")
        self.classifier, self.detector = load_classifier(), load_detector()
        others = {name: value for name, value in PRESET.items() if name not in {*MARGINS, "lr"}}  # each has its own lr
        key = VERSION, evaluate.VERSION, others, SAMPLING, TUNING, REPORT, self.classifier.name, self.dataset.key
        self.model = f"{fingerprint(self.sd)} {digest(map(str, key))}"
        self.generate = partial(generated, self.sd, None, SAMPLING)
        self.base = kept(self.generate, args.out / "images", self.model)

    def about(self, this):
        return {"method": this.method, "settings": this.settings, "seed": this.seed, "model": self.model,
                "steps": steps_of(this, self.args), "per_prompt": self.args.per_prompt,
                "margins": MARGINS if this.method in HINGES else {}}

    def carry_out(self, this):
        """Do a run, or what is left of it, and write its file."""
        parameters, curve, images_of = self.train(this) if this.method in TRAINED else self.apply(this)
        result = {"about": self.about(this), "parameters": parameters, "curve": curve}
        if not this.tuning and this.method != BASE and this.seed in (None, SEEDS[0]):
            result["seconds added"] = seconds_added(this.method, images_of, self.generate, self.args.per_prompt)
        write_json(this.file, result)

    def point(self, this, step, seconds, images_of):
        prompts = TUNING if this.tuning else REPORT
        measured = measure(self.classifier, self.detector, images_of, self.base, prompts, self.args.per_prompt)
        return {"step": step, "seconds": round(seconds, 2)} | measured

    def apply(self, this):
        """A method without training -> 0, a curve of one point, images_of. Its seconds are those of the edit."""
        begin = time.process_time()
        images_of = untrained(self.sd, this.method, this.settings, self.base)
        return 0, [self.point(this, 0, time.process_time() - begin, images_of)], images_of

    def train(self, this):
        """Train from the folder's checkpoint, if there is one, to the end -> number of parameters, curve, images_of.

        Seconds are of a core, so that other processes do not count.
        """
        part, add = TRAINED[this.method]
        steps, about, file = steps_of(this, self.args), self.about(this), this.folder / "curve.json"
        s = SimpleNamespace(**vars(train.Settings(**PRESET)) | this.settings | {"steps": steps, "seed": this.seed})
        schedule, (network, model, value_encoder) = Schedule(self.sd.scheduler), trainable(self.sd, part)
        add = partial(add, self.sd, model, value_encoder, schedule=schedule, s=s)
        optimizer, timesteps = train.make_optimizer(network, s.final_ln_lr_scale), range(len(schedule.alphas_cumprod))
        start = train.resume(this.folder, network, optimizer, self.dataset.key, steps)
        curve, seconds = load_progress(file, about, start)
        due = {steps} if this.tuning else {*MEASURED, steps}
        due -= {point["step"] for point in curve}
        with caught_signals() as signals:
            for step in tqdm(range(start, steps + 1), this.folder.name, initial=start, total=steps, disable=None):
                images_of = images_of_model(model, value_encoder)
                if step in due:
                    curve.append(self.point(this, step, seconds, images_of))
                if step in due or signals and step:
                    write_json(file, {"about": about, "curve": curve, "step": step, "seconds": seconds})
                    train.save_checkpoint(this.folder, network, optimizer, step, self.dataset.key)
                if signals:
                    sys.exit(128 + max(signals))
                if step < steps:
                    begin = time.process_time()
                    train.take_step(step, network, optimizer, add, self.dataset, timesteps, s)
                    seconds += time.process_time() - begin
        return sum(parameter.numel() for parameter in network.parameters()), curve, images_of


def attempt(this, setup):
    """Do a run unless it is done, another process does it, or its method is not tuned yet. -> whether it was done."""
    if this.settings is None:
        this = this._replace(settings=best_settings(setup.args.out, this.method))
    if this.settings is None:
        return False
    if this.file.exists():
        load_curve(this.file, setup.about(this))
        return False
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(this.folder))
        except UserError:  # another process has it
            return False
        if not this.file.exists():  # finished meanwhile
            setup.carry_out(this)
        return True


def collect(out):
    """The finished runs of a folder -> the results, as comparison.py describes them."""
    base, *runs = plan(out)
    if not base.file.exists():
        raise UserError(f"{out}: expected finished runs, got none")
    found = load_curve(base.file)
    about = {key: found["about"].get(key) for key in ("model", "per_prompt")}
    results = {"about": about, "base": found["curve"][-1], "tuning": [], "methods": {}}
    for this in runs:
        if not this.file.exists():
            continue
        found = load_curve(this.file, about)
        if this.tuning:
            results["tuning"].append({"method": this.method, "settings": this.settings, "point": found["curve"][-1]})
            continue
        entry = results["methods"].setdefault(this.method, {"settings": found["about"]["settings"], "curves": []})
        entry["curves"].append(found["curve"])
        entry |= {"parameters": 0} | {key: found[key] for key in ("parameters", "seconds added") if key in found}
        mean_curve(entry["curves"])  # raises here, before anything is written
    return results


def finished(out, sd):
    """-> {method: images_of(prompt, seeds)} of the finished runs against toxicity, with the first training seed."""
    base, key, found = partial(generated, sd, None, SAMPLING), fingerprint(sd), {}
    for this in plan(out, [method for method in SWEEP if "toxicity" in aims(method)], SEEDS[:1]):
        if this.tuning or this.method == BASE or not this.file.exists():
            continue
        about = load_curve(this.file)["about"]
        if not str(about.get("model")).startswith(key):
            raise UserError(f"{this.file}: expected a run on this model, got one on another")
        if this.method in TRAINED:
            network, model, value_encoder = trainable(sd, TRAINED[this.method].part)
            file = this.folder / "checkpoint.pt"
            with expecting(file, f"a checkpoint of {this.method}"):
                network.load_state_dict(unpickle(file)["value_encoder"])
            found[this.method] = images_of_model(model, value_encoder)
        else:
            settings = about["settings"]
            if settings not in SWEEP[this.method]:
                raise UserError(f"{this.file}: expected settings among {SWEEP[this.method]}, got {settings}")
            found[this.method] = untrained(sd, this.method, settings, base)
    if not found:
        raise UserError(f"{out}: expected finished runs, got none")
    return found


# ── The command ──────────────────────────────────────────────────────────────────────────────────────────────────────

# Core-seconds, for --list only.
STEP_SECONDS = dict.fromkeys(TRAINED, 0.5) | {
    "Diffusion-DPO": 0.6, "Concept Ablation": 0.25, "Concept Ablation, full UNet": 0.3, "SafeText": 0.05}
IMAGE_SECONDS = 0.15


def list_runs(args):
    """Print the state of every run, and about how long the missing ones take."""
    total = 0
    for this in plan(args.out, args.only, args.seeds):
        steps, prompts = steps_of(this, args), TUNING if this.tuning else REPORT
        points = 1 if this.tuning else len({step for step in (*MEASURED, steps) if step <= steps} or [0])
        images = 3 * len(prompts.professions) * args.per_prompt  # half as many for a bias principle
        minutes = (steps * STEP_SECONDS.get(this.method, 0) + points * images * IMAGE_SECONDS) / 60
        state, minutes = ("done", 0) if this.file.exists() else (f"{minutes:.1f} min", minutes)
        total += minutes
        print(f"{state:10}{this.folder}")
    print(f"about {total:.0f} minutes on one core")


def write_results(out, file):
    """Write the JSON file, with the tables and the plots beside it."""
    from lab import plots  # it imports matplotlib
    results = collect(out)
    text = tables(results)
    write_json(file, results)
    with atomic(file.with_suffix(".md")) as path:
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    for name, plot in ("convergence", plots.convergence), ("tradeoff", plots.tradeoff):
        plots.save(plot(results), file.with_name(f"{name}.png"))
    print(text)
    print(f"{file}, {file.stem}.md, convergence.png and tradeoff.png beside it")


def parse_args(argv):
    parser = Parser(description="Tune, train and measure baselines beside LiVO, on tiny-sd.")
    add, steps = parser.add_argument, number(int, 1, 10**6)
    add("--only", nargs="+", choices=[*SWEEP], default=[*SWEEP], metavar="METHOD", help="some methods")
    add("--seeds", nargs="+", type=int, choices=SEEDS, default=[*SEEDS], help="training seeds")
    add("--steps", type=steps, default=400, help="optimizer steps of a run")
    add("--tune-steps", type=steps, default=100, help="optimizer steps of a tuning run")
    add("--per-prompt", type=number(int, 2, MOST), default=8, help="measured images per prompt")
    add("--weights", default=train.Settings.weights, help="model of the toy dataset")
    add("--data", help="folder of preference data (default: rendered portraits)")
    add("--out", type=Path, default=Path("runs/baselines"), help="folder of the runs")
    add("--list", action="store_true", help="only list the runs, and estimate the time")
    add("--collect", type=Path, metavar="JSON", help="only collect the finished runs in this file, with the tables in "
        "Markdown, convergence.png and tradeoff.png beside it")
    args = parser.parse_args(argv)
    if args.collect and args.collect.suffix != ".json":  # other files are written beside it
        raise UserError(f"--collect: expected the name of a .json file, got {args.collect}")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.list:
        return list_runs(args)
    if args.collect:
        return write_results(args.out, args.collect)
    check_writable(args.out)
    setup, runs = Setup(args), plan(args.out, args.only, args.seeds)
    while True:
        done = [attempt(this, setup) for this in tqdm(runs, "runs", disable=None)]
        if all(this.file.exists() for this in runs):
            break
        if not any(done):
            time.sleep(WAIT)  # other processes have what is left
    print(tables(collect(args.out)))


if __name__ == "__main__":
    run(main)
