"""LiVO beside other ways to the same end: trained on the same pairs, noise, batch and number of images, or not at all.

    python baselines.py                                 # everything that is missing, in runs/baselines; hours
    python baselines.py --list                          # what that is, and about how long it takes
    python baselines.py --only "Diffusion-DPO"          # one method; others may run beside it, and share the cores
    python baselines.py --collect assets/baselines.json # finished runs as one file, convergence.png and tradeoff.png

A run is a method with its settings. Those of the sweep measure harm at their end, in a few pictures. Then the best
settings of each trained method run for longer, and measure every so many steps: the convergence. A killed run goes on
from its last measurement; a finished one is a file OUT/NAME.json, or OUT/long/NAME.json, and is not run again. LiVO is
a run as the others are, by train.py's own step. The classifier knows the portrait world only, so the model is tiny-sd.
"""

import copy
import functools
import inspect
import json
import math
import re
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
import data
from lab import toy
import livo
from lab import portraits
import sample
import train
from lab import uce
import weights
from common import Parser, UserError, atomic, check_writable, number
from lab.plots import best, convergence, show, tradeoff
from lab.evaluate import UNTRAINED, fingerprint, generated, kept, pixel_distance
from lab.metrics import TOXICITY, bootstrap, d1, d2, fair, share
from lab.classifier import digest, load_classifier
from livo import ValueEncoder, bradley_terry_loss, livo_loss, make_context
from sample import Schedule
from lab.evaluate import METRICS, prompts_about
from train import collate, denoising_error, predict, reference


def table(**columns):
    """Every combination of the columns' values: [{name: value}], a column of dictionaries being merged."""
    rows = [{}]
    for name, values in columns.items():
        rows = [row | (value if isinstance(value, dict) else {name: value}) for row in rows for value in values]
    return rows


def hinges(alpha, beta, gamma1, gamma2):
    return {"alpha": float(alpha), "beta": float(beta), "gamma1": float(gamma1), "gamma2": float(gamma2)}


# The sweep: every trained method gets three learning rates and two strengths of its loss, LiVO too. The second hinges
# have twice the margin: violating images are pushed away until their error is 0.2 above the frozen model's, not 0.1.
# Bradley-Terry's loss falls silent softly, a few times 1/β away from the frozen model's errors.
HINGES = [hinges(1000, 2000, 80, 100), hinges(500, 1000, 80, 100)]
SLOPES = [{"beta": 20.0}, {"beta": 100.0}]
STEEP = HINGES[0]["beta"]
SWEEP = {
    "LiVO": table(lr=[3e-4, 1e-3, 3e-3], loss=HINGES),
    "BT on the value encoder": table(lr=[3e-4, 1e-3, 3e-3], loss=SLOPES),
    "Diffusion-DPO": table(lr=[3e-5, 1e-4, 3e-4], loss=SLOPES),
    "text encoder": table(lr=[3e-4, 1e-3, 3e-3], loss=HINGES),
    "principle in the prompt": [{}],
    "negative prompt": table(phrases=[0, 2]),
    "UCE": table(strength=[1.0, 2.0, 4.0, 6.0], lam=[0.1, 1.0]),
}
# The trade-off: conformity and closeness to the frozen model, by the strengths of the loss alone.
GRID = {
    "LiVO": [{"lr": 1e-3} | hinges(*four) for four in [
        (1000, 2000, 80, 100), (250, 2000, 80, 25), (500, 2000, 80, 50), (2000, 2000, 80, 200), (1000, 2000, 80, 40),
        (1000, 500, 20, 100)]],
    "BT on the value encoder": table(lr=[1e-3], beta=[5.0, 20.0, 100.0, 400.0, 2000.0]),
}  # fmt: skip

PROFESSIONS = ("doctor", "firefighter", "nurse", "teacher")  # whose pictures are judged: two of men, two of women
SAMPLING = {"steps": 15, "sampler": "dpm", "guidance": 7.5, "batch_size": 16}
HARM_METRICS = {f"{attribute} {name}": metric for attribute in toy.PRINCIPLES.values()
                for name, metric in [METRICS.get(attribute, ("R", TOXICITY["R"]))]}  # fmt: skip

# ----------------------------------------------------------------------------------------------- what is trained


def hinge_loss(s, principles, *errors):
    return livo_loss(*errors, train.alphas(principles, s, errors[0].device), s.beta, s.gamma1, s.gamma2)


def one_slope_loss(s, principles, *errors):
    """Scaled to start with one slope for every β, LiVO's, so that its gradients meet MAX_NORM as the hinges' do.
    Unscaled, the principle with the largest gradients would get all there is."""
    return STEEP / s.beta * bradley_terry_loss(*errors, s.beta)


# Method: the part of the model that is trained, all else being frozen, and the loss. Diffusion-DPO is arXiv 2311.12908.
# The settings of train.py were found in runs as long as the long ones, so LiVO has such a run with them too.
AS_TRAIN = "LiVO as train.py"
TRAINED = {
    "LiVO": ("value_encoder", hinge_loss),
    "BT on the value encoder": ("value_encoder", one_slope_loss),
    "Diffusion-DPO": ("unet", one_slope_loss),
    "text encoder": ("text_encoder", hinge_loss),
    AS_TRAIN: ("value_encoder", hinge_loss),
}


def to_train(sd, part):
    """The float32 network that is trained: a copy of the frozen one. The value encoder's is the text encoder."""
    if part == "value_encoder":
        return ValueEncoder.from_text_encoder(sd.text_encoder)
    return copy.deepcopy(getattr(sd, part)).float().requires_grad_()


def with_part(sd, part, network):
    """-> the model that has the network in the place of the frozen one, and the value encoder or None."""
    return (sd, network) if part == "value_encoder" else (replace(sd, **{part: network}), None)


def add_gradient(sd, method, network, pairs, schedule, s):
    """As train.add_gradient, of any method: add to the network's .grad -> the errors (4, B).

    The reference is the frozen model with the plain prompt. A loss that takes both pictures at once, as Bradley-Terry's
    does, needs both in one pass.
    """
    part, loss = TRAINED[method]
    model, value_encoder = with_part(sd, part, network)
    prompt_embeds, z_w, z_l, eps, preservation, t = collate(pairs, sd.unet.conv_in.weight.device)
    principles = [pair.principle for pair in pairs]
    context = make_context(model, [pair.prompt for pair in pairs], [principles] if value_encoder else [], value_encoder,
                           prompt_embeds if model.text_encoder is sd.text_encoder else None)  # (B, 77 or 78, C)
    refs, targets = reference(sd.unet, schedule, eps, t, z_w, z_l, prompt_embeds, preservation)
    output, _ = predict(model.unet, schedule, eps, t, torch.cat([z_w, z_l]), torch.cat([context, context]))
    errs = denoising_error(output, torch.cat(targets)).chunk(2)
    errors = errs[0], refs[0], errs[1], refs[1]
    (loss(s, principles, *errors) * len(pairs) / s.batch).backward()
    return torch.stack(errors).detach()


# --------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Asked:
    """A prompt as evaluate.py's functions take it."""

    text: str
    profession: str
    principles: tuple


def regardless(pictures):
    """Of a model that hears of no principle: what it draws for one it draws for all."""
    once = functools.cache(pictures)
    return lambda asked, seeds: once(replace(asked, principles=()), seeds)


def measure(classifier, pictures, frozen, n, hears):
    """Harm in n `pictures(asked, seeds)` of each profession and principle -> {what: percent}, "distance" of 0 … 255.

    Metrics are evaluate.py's, and so are the "intervals"; "harm" is the mean of the four. frozen: the frozen model's
    pictures. hears: whether the principle plays a part, which for bias it does in half of the pictures only. A method
    that hears of none may undo a bias in all of them or overshoot, so for each bias it gets what is less harmful: all
    pictures its own, or every other one the frozen model's.
    """
    seen, right, distances = [], [], []
    for (principle, attribute), metric in zip(toy.PRINCIPLES.items(), HARM_METRICS.values()):
        prompts = enumerate(zip(PROFESSIONS, prompts_about(attribute, PROFESSIONS)))
        asked = [(Asked(text, profession, (principle,)), range(i * n, i * n + n)) for i, (profession, text) in prompts]
        before = [frozen(replace(one, principles=()), seeds) for one, seeds in asked]
        ways = [[pictures(*one) for one in asked]]
        if attribute in METRICS and not hears:
            ways.append([[other if i % 2 else own for i, (own, other) in enumerate(zip(*both))]
                         for both in zip(ways[0], before)])  # fmt: skip
        predictions = [[classifier.classify(images) for images in way] for way in ways]  # of each way and profession
        found = [np.stack([read[attribute].numpy() for read in way]) for way in predictions]
        least = min(range(len(ways)), key=lambda way: metric(found[way]))
        seen.append(found[least])
        right += [(read["profession"] == portraits.PROFESSIONS.index(profession)).numpy()
                  for read, profession in zip(predictions[least], PROFESSIONS)]
        distances += map(pixel_distance, ways[least], before)
    seen = np.stack(seen, -1)  # (professions, n, harms)
    mean_harm = lambda seen: np.mean([metric(seen[..., i]) for i, metric in enumerate(HARM_METRICS.values())])
    measures = {"harm": (mean_harm, seen)}
    measures |= {name: (metric, seen[..., i]) for i, (name, metric) in enumerate(HARM_METRICS.items())}
    measures |= {"profession right": (share, np.stack(right)), "distance": (np.mean, np.stack(distances))}
    results = {what: bootstrap(metric, values, 255 if what == "distance" else 100)
               for what, (metric, values) in measures.items()}
    return {what: round(result["value"], 2) for what, result in results.items()} | {
        "intervals": {what: [round(result["low"], 2), round(result["high"], 2)] for what, result in results.items()}}


# -------------------------------------------------------------------------------------------------------- runs


@dataclass
class Run:
    method: str
    settings: dict

    @property
    def name(self):
        return re.sub(r"[^\w.=-]+", "-", " ".join([self.method, *(f"{k}={v}" for k, v in self.settings.items())]))


def all_runs(only=None):
    """Of each method, or one, the sweep and then what else the trade-off needs; no run twice."""
    runs = [Run("frozen", {})]
    runs += [Run(method, settings) for method in SWEEP for settings in SWEEP[method] + GRID.get(method, [])
             if only in (None, method)]
    return [*{run.name: run for run in runs}.values()]


def load_curve(file, about):
    """-> the curve that was written for a run like this. Raises UserError for one of another length or model."""
    found = common.read_json(file)
    if found["about"] != about:
        raise UserError(f"{file}: expected a run of {about}, got one of {found['about']}; choose another --out")
    return found["curve"]


def save_curve(file, about, curve):
    with atomic(file) as path:
        common.write_json(path, {"about": about, "curve": curve})


def train_method(sd, dataset, run, s, measure, about, folder):
    """Trains to step s.steps, from the folder's checkpoint if there is one -> the curve, a point per measurement: at
    the end, and every about["every"] steps if that is not None."""
    part, _ = TRAINED[run.method]
    network, schedule = to_train(sd, part), Schedule(sd.scheduler)
    optimizer, times = train.make_optimizer(network), range(s.min_timestep, len(schedule.alphas_cumprod))
    start, file = train.resume(folder, network, optimizer, dataset.key), folder / "curve.json"
    # The curve is written before the checkpoint, so it may be a point ahead.
    curve = [point for point in load_curve(file, about) if point["step"] <= start] if file.exists() else []
    seconds = curve[-1]["seconds"] if curve else 0.0
    if run.method in ("LiVO", AS_TRAIN):
        add = partial(train.add_gradient, sd, network, schedule=schedule, s=s)
    else:
        add = partial(add_gradient, sd, run.method, network, schedule=schedule, s=s)
    for step in tqdm(range(start, s.steps + 1), run.name, initial=start, total=s.steps, disable=None):
        due = step == s.steps or about["every"] and step % about["every"] == 0
        if due and not (curve and curve[-1]["step"] == step):
            model, value_encoder = with_part(sd, part, network)
            pictures = partial(generated, model, value_encoder, SAMPLING)
            pictures = pictures if value_encoder is not None else regardless(pictures)
            point = measure(pictures, hears=value_encoder is not None)
            curve.append({"step": step, "seconds": round(seconds, 2)} | point)
            save_curve(file, about, curve)
            train.save_checkpoint(folder, network, optimizer, step, dataset.key)
        if step < s.steps:
            begin = time.perf_counter()
            train.take_step(step, network, optimizer, add, dataset, times, s)
            seconds += time.perf_counter() - begin
    return curve


def apply_method(sd, run, measure):
    """What needs no training -> a curve of one point, whose seconds are those of the edit."""
    begin = time.perf_counter()
    if run.method == "UCE":
        unet = uce.edit(sd, *uce.texts(run.settings["strength"]), run.settings["lam"])
        pictures = regardless(partial(generated, replace(sd, unet=unet), None, SAMPLING))
    elif run.method == "frozen":
        pictures = regardless(partial(generated, sd, None, SAMPLING))
    else:
        pictures = partial(UNTRAINED[run.method], sd, SAMPLING, **run.settings)
    seconds = round(time.perf_counter() - begin, 2)
    return [{"step": 0, "seconds": seconds} | measure(pictures, hears=run.method in UNTRAINED)]


# ------------------------------------------------------------------------------------------------- what comes out


def finished(folder, runs):
    """-> {method: [{"settings", "curve"}]} of those runs whose file the folder has, and what they are runs of."""
    found, about = {}, None
    for run in runs:
        if (file := folder / f"{run.name}.json").exists():
            about = about or common.read_json(file)["about"]
            found.setdefault(run.method, []).append({"settings": run.settings, "curve": load_curve(file, about)})
    return found, about


def chosen(found, choices):
    """Of what `finished` found, the runs with the settings of SWEEP or GRID."""
    some = {method: [run for run in found.get(method, []) if run["settings"] in choices[method]] for method in choices}
    return {method: runs for method, runs in some.items() if runs}


def long_runs(sweep):
    """Each trained method of {method: [run]} with the settings that were best, and LiVO with train.py's too."""
    runs = [Run(method, best(runs)["settings"]) for method, runs in sweep.items() if method in TRAINED]
    return runs + [Run(AS_TRAIN, {})] * ("LiVO" in sweep)


def collect(out):
    """The finished runs of a folder -> {"about", "fair": {harm: percent}, "frozen": a point, "sweep", "grid" and
    "long": {method: [run]}}. The harm of fair pictures is not 0 where it is a bias; of both kinds, all attributes
    equally likely or half of the pictures left as they were, it is that of the larger harm."""
    found, about = finished(out, all_runs())
    if "frozen" not in found:
        raise UserError(f"{out}: expected finished runs, got none")
    sweep, n = chosen(found, SWEEP), about["per_prompt"]
    of_fair = dict.fromkeys(HARM_METRICS, 0.0)
    for name, metric, k in ("gender D1", d1, len(portraits.GENDERS)), ("skin D2", d2, len(portraits.SKINS)):
        of_fair[name] = max(fair(metric, k, n), fair(metric, k, n, n // 2))
    long, about_long = finished(out / "long", long_runs(sweep))
    return {"about": {"sweep": about, "long": about_long}, "fair": {"harm": np.mean([*of_fair.values()]), **of_fair},
            "frozen": found["frozen"][0]["curve"][0], "sweep": sweep, "grid": chosen(found, GRID), "long": long}


# --------------------------------------------------------------------------------------------- the command

# Measured on one thread beside another such run on two cores: for --list only.
STEP_SECONDS = {"LiVO": 0.4, "BT on the value encoder": 0.4, "Diffusion-DPO": 0.5, "text encoder": 0.4, AS_TRAIN: 0.4}
PICTURE_SECONDS = 0.16


def list_runs(args):
    """Prints the state of every run, and about how long what is missing will take."""
    total, sweep = 0, all_runs(args.only)
    long = {run.method: run for run in long_runs(chosen(finished(args.out, sweep)[0], SWEEP))}
    long = [long.get(method, Run(method, {})) for method in TRAINED
            if args.only in (None, method) or method == AS_TRAIN and args.only == "LiVO"]  # fmt: skip
    kinds = [(args.out, args.steps, args.steps, sweep), (args.out / "long", args.long, args.every, long)]
    for folder, steps, every, run in [(*kind, run) for *kind, runs in kinds for run in runs]:
        trained, left, state = run.method in TRAINED, steps, "to do"
        if (folder / f"{run.name}.json").exists():
            left, state = 0, "done"
        elif (file := folder / run.name / "curve.json").exists():
            left = steps - common.read_json(file)["curve"][-1]["step"]
            state = f"at step {steps - left}"
        measured = math.ceil(left / every) if trained else left > 0
        pictures = len(PROFESSIONS) * len(toy.PRINCIPLES) * args.per_prompt
        total += STEP_SECONDS.get(run.method, 0) * left + measured * pictures * PICTURE_SECONDS
        print(f"{state:14}{folder / run.name}")
    print(f"about {total / 3600:.1f} hours on one core")


def parse_args(argv):
    parser = Parser(description="Train, edit and measure baselines beside LiVO, on tiny-sd.")
    parser.add_argument("--only", choices=[*SWEEP], help="one method")
    parser.add_argument("--steps", type=number(int, 1, 10**6), default=400, help="optimizer steps of the sweep's runs")
    parser.add_argument("--long", type=number(int, 1, 10**6), default=train.TINY_SD["steps"], help="of the best ones")
    parser.add_argument("--every", type=number(int, 1, 10**6), default=100, help="steps between their measurements")
    parser.add_argument("--per-prompt", type=number(int, 2, 10_000), default=8, help="pictures of a prompt, to measure")
    parser.add_argument("--weights", default=train.Settings.weights, help="model of the portrait world")
    parser.add_argument("--data", help="folder of preference data (default: drawn portraits)")
    parser.add_argument("--out", type=Path, default=Path("runs/baselines"), help="folder of the runs")
    parser.add_argument("--list", action="store_true", help="only list the runs, and estimate the time")
    parser.add_argument("--collect", type=Path, metavar="JSON", help="only gather the finished runs into this file, "
                        "and draw convergence.png and tradeoff.png beside it")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.list:
        return list_runs(args)
    if args.collect:
        results = collect(args.out)
        with atomic(args.collect) as path:
            path.write_text(json.dumps(results) + "\n", encoding="utf-8")
        for name, image in ("convergence", convergence(results)), ("tradeoff", tradeoff(results)):
            with atomic(args.collect.with_name(f"{name}.png")) as path:
                image.save(path, optimize=True)
        show(results)
        return print(f"\n{args.collect}, convergence.png and tradeoff.png beside it")

    check_writable(args.out)
    sd = weights.load(args.weights)
    if sd.size != portraits.SIZE:
        raise UserError(f"{args.weights}: expected a model of the portrait world, which draws {portraits.SIZE} pixels, "
                        f"got one that draws {sd.size}")
    s, classifier = train.Settings(**train.TINY_SD), load_classifier()
    dataset = data.PreferenceDataset(args.data or toy.default_pairs(args.out.parent), sd, args.out.parent / "cache",
                                     s.group_size)
    settings = map(str, (train.TINY_SD, SAMPLING, PROFESSIONS, classifier.name, dataset.key))
    model = f"{fingerprint(sd)} {digest([*map(inspect.getsource, (livo, sample, uce)), *settings])}"
    frozen = kept(partial(generated, sd, None, SAMPLING), args.out / "frozen", model)
    judged = partial(measure, classifier, frozen=frozen, n=args.per_prompt)

    def carry_out(runs, folder, steps, every):
        about = {"steps": steps, "every": every, "per_prompt": args.per_prompt, "model": model}
        for run in tqdm(runs, f"runs of {steps} steps", disable=None):
            if (file := folder / f"{run.name}.json").exists():
                load_curve(file, about)
            elif run.method in TRAINED:
                settings = replace(s, steps=steps, **run.settings)
                curve = train_method(sd, dataset, run, settings, judged, about, folder / run.name)
                save_curve(file, about, curve)
            else:
                save_curve(file, about, apply_method(sd, run, judged))

    runs = all_runs(args.only)
    carry_out(runs, args.out, args.steps, every=None)
    sweep = chosen(finished(args.out, runs)[0], SWEEP)
    carry_out(long_runs(sweep), args.out / "long", args.long, args.every)
    show(collect(args.out))


if __name__ == "__main__":
    common.run(main)
