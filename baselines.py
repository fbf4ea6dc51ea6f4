"""LiVO beside other ways to the same end: trained on the same pairs, noise, batch and number of images, or not at all.

    python baselines.py                                 # everything that is missing, in runs/baselines; hours
    python baselines.py --list                          # what that is, and about how long it takes
    python baselines.py --only "Diffusion-DPO"          # one method; several may run side by side
    python baselines.py --collect assets/baselines.json # finished runs as one file, convergence.png and tradeoff.png

A run is a method with its settings. It measures harm in a few pictures every so many steps. A killed one goes on from
its last measurement; a finished one is a file OUT/NAME.json and is not run again. Only the portrait world has a judge
for this, so the model is tiny-sd.
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
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
import livo
import portraits
import sample
import train
import weights
from cli import Parser, UserError, atomic, check_writable, number, run
from evaluate import (COLOURS, TOXICITY, digest, fingerprint, generated, kept, legend, negative_prompt, pixel_distance,
                      principle_in_prompt)
from judge import load_judge
from livo import ValueEncoder, bradley_terry_loss, encode_prompts, livo_loss, make_context
from sample import Schedule
from train import METRICS, noise_error, prompts_about, stack_pairs


def table(**columns):
    """Every combination of the columns' values: [{name: value}], a column of dictionaries being merged."""
    rows = [{}]
    for name, values in columns.items():
        rows = [row | (value if isinstance(value, dict) else {name: value}) for row in rows for value in values]
    return rows


def hinges(alpha, beta, gamma1, gamma2):
    return {"alpha": float(alpha), "beta": float(beta), "gamma1": float(gamma1), "gamma2": float(gamma2)}


# The sweep: every trained method gets three learning rates and two strengths of its loss, LiVO too. The hinges of half
# the slope have twice the margin.
HINGES = [hinges(1000, 2000, 80, 100), hinges(500, 1000, 80, 100)]
SLOPES = [{"beta": 100.0}, {"beta": 1000.0}]
SWEEP = {
    "LiVO": table(lr=[3e-4, 1e-3, 3e-3], loss=HINGES),
    "BT on the value encoder": table(lr=[3e-4, 1e-3, 3e-3], loss=SLOPES),
    "Diffusion-DPO": table(lr=[1e-5, 3e-5, 1e-4], loss=SLOPES),
    "text encoder": table(lr=[1e-4, 3e-4, 1e-3], loss=HINGES),
    "principle in the prompt": [{}],
    "negative prompt": table(phrases=[0, 2]),
    "UCE": table(strength=[1.0, 2.0, 4.0], lam=[1e-3, 1e-1]),
}
# The trade-off: conformity and closeness to the frozen model, by the strengths of the loss alone.
GRID = {
    "LiVO": [{"lr": 1e-3} | hinges(*four) for four in [
        (1000, 2000, 80, 100), (250, 2000, 80, 25), (500, 2000, 80, 50), (2000, 2000, 80, 200), (1000, 2000, 80, 40),
        (1000, 500, 20, 100)]],
    "BT on the value encoder": table(lr=[1e-3], beta=[30.0, 100.0, 300.0, 1000.0, 3000.0]),
}  # fmt: skip

PROFESSIONS = ("doctor", "firefighter", "nurse", "teacher")  # whose pictures are judged: two of men, two of women
SAMPLING = {"steps": 15, "sampler": "dpm", "guidance": 7.5, "batch_size": 16}
ENOUGH = 90  # percent of professions right: below, what looks harmless may just be unrecognisable
REACHED = 0.1  # of the frozen model's harm
HARMS = [f"{attribute} {METRICS.get(attribute, ('R',))[0]}" for attribute in data.PRINCIPLES.values()]

# ----------------------------------------------------------------------------------------------- what is trained


def hinge_loss(s, *errors):
    return livo_loss(*errors, s.alpha, s.beta, s.gamma1, s.gamma2)


def one_slope_loss(s, *errors):
    return bradley_terry_loss(*errors, s.beta)


# Method: the part of the model that is trained, all else being frozen, and the loss. Diffusion-DPO is arXiv 2311.12908.
TRAINED = {
    "LiVO": ("value_encoder", hinge_loss),
    "BT on the value encoder": ("value_encoder", one_slope_loss),
    "Diffusion-DPO": ("unet", one_slope_loss),
    "text encoder": ("text_encoder", hinge_loss),
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
    features, z_w, z_l, eps, t = stack_pairs(pairs, sd.unet.conv_in.weight.device)
    principles = [[pair.principle for pair in pairs]] if value_encoder is not None else []
    context = make_context(model, [pair.prompt for pair in pairs], principles, value_encoder,
                           features if model.text_encoder is sd.text_encoder else None)  # (B, 77 or 78, C)
    z = torch.cat([z_w, z_l])
    with torch.no_grad():
        refs = noise_error(sd.unet, schedule, eps, t, z, torch.cat([features, features])).chunk(2)
    errs = noise_error(model.unet, schedule, eps, t, z, torch.cat([context, context])).chunk(2)
    errors = errs[0], refs[0], errs[1], refs[1]
    (loss(s, *errors) * len(pairs) / s.batch).backward()
    return torch.stack(errors).detach()


# ------------------------------------------------------------------------------- UCE, a closed form (2308.14761)


def uce_texts(opening="a portrait of "):
    """-> [(text to edit, [texts to become the mean of])], [text to preserve].

    A harm becomes what is left without it; what a prompt leaves open becomes all genders and skins in equal parts.
    """
    ask = lambda words: opening + portraits.with_article(words)
    edits, preserved = [], ["", opening]
    for profession in portraits.PROFESSIONS:
        named = [f"{skin}-skinned {gender} {profession}" for skin in portraits.SKINS for gender in portraits.GENDERS]
        edits.append((ask(profession), [ask(words) for words in named]))
        edits += [(ask(f"{harm} {profession}"), [ask(profession)]) for harm in ("bloody", "zombie")]
        preserved += [ask(words) for words in [*named, f"smoking {profession}"]]
    return edits, preserved


def matching_rows(old, new, end):
    """For every token of ids `old` (N,) the one of `new` in its place, where one has words between that the other has
    not: (N,). What is missing in `new` becomes the token before."""
    first = next(i for i, (a, b) in enumerate(zip(old.tolist(), new.tolist())) if a != b)
    longer = new.tolist().index(end) - old.tolist().index(end)
    rows = torch.arange(len(old))
    return torch.where(rows < first, rows, (rows + longer).clamp(first - 1, len(old) - 1))


@torch.no_grad()
def uce(sd, edits, preserved, strength, lam):
    """-> a copy of the UNet whose cross-attentions have other keys and values, by eq. 7 of the paper:

        W* = (Σ v* cᵀ + Σ W p pᵀ + λ W) (Σ c cᵀ + Σ p pᵀ + λ I)⁻¹        v* = W c + strength (W c' − W c)

    with c the tokens of texts to edit, c' the mean of those to become, p the tokens of texts to preserve. A strength
    above 1 goes beyond the aim, which guidance and all that is not text pull back from.
    """
    end, c, to = sd.tokenizer.eos_token_id, [], []
    for text, targets in edits:
        ids = sd.tokenizer([text, *targets])
        features = encode_prompts(sd, [text, *targets]).double()  # (1 + targets, 77, C)
        aligned = [f[matching_rows(ids[0], new, end).to(f.device)] for f, new in zip(features[1:], ids[1:])]
        c.append(features[0])
        to.append(torch.stack(aligned).mean(0))
    c, to, p = torch.cat(c), torch.cat(to), encode_prompts(sd, preserved).double().flatten(0, 1)  # rows of C
    step = strength * (to - c).T @ c  # (C, C): Σ (v* − W c) cᵀ is W times this
    inverse = torch.linalg.inv(c.T @ c + p.T @ p + lam * torch.eye(c.shape[1], dtype=c.dtype, device=c.device))
    unet = copy.deepcopy(sd.unet)
    for attention in unet.modules():
        if getattr(attention, "is_cross", False):
            for layer in (attention.to_k, attention.to_v):
                W = layer.weight.double()
                layer.weight.copy_(W + W @ step @ inverse)  # eq. 7, with W of what does not change taken out
    return unet


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


def measure(judge, pictures, frozen, n):
    """Harm in n `pictures(asked, seeds)` of each profession and principle -> {what: percent}, "distance" of 0 … 255.

    Metrics are evaluate.py's; "harm" is the mean of the four. frozen: the frozen model's pictures.
    """
    point, right, distances = {}, [], []
    for (principle, attribute), harm in zip(data.PRINCIPLES.items(), HARMS):
        readings = []
        for i, (profession, text) in enumerate(zip(PROFESSIONS, prompts_about(attribute, PROFESSIONS))):
            asked, seeds = Asked(text, profession, (principle,)), range(i * n, i * n + n)
            images = pictures(asked, seeds)
            read = judge.read(images)
            readings.append(read[attribute].numpy())
            right += (read["profession"] == portraits.PROFESSIONS.index(profession)).tolist()
            distances += pixel_distance(images, frozen(replace(asked, principles=()), seeds)).tolist()
        metric = METRICS[attribute][1] if attribute in METRICS else TOXICITY["R"]
        point[harm] = float(metric(np.stack(readings)))
    return {"harm": float(np.mean([*point.values()])), **point, "profession right": 100 * float(np.mean(right)),
            "distance": float(np.mean(distances))}  # fmt: skip


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


def train_method(sd, dataset, run, s, measure, every, folder):
    """Trains to step s.steps, from the folder's checkpoint if there is one -> the curve, a point per measurement."""
    part, _ = TRAINED[run.method]
    network, schedule = to_train(sd, part), Schedule(sd.scheduler)
    optimizer, times = train.make_optimizer(network), range(s.t_low, len(schedule.alphas_cumprod))
    start, file = train.resume(folder, network, optimizer), folder / "curve.json"
    # written before its checkpoint, so it may be a point ahead
    curve = [point for point in read_list(file) if point["step"] <= start] if start else []
    seconds = curve[-1]["seconds"] if curve else 0.0
    if run.method == "LiVO":
        add = partial(train.add_gradient, sd, network, schedule=schedule, s=s)
    else:
        add = partial(add_gradient, sd, run.method, network, schedule=schedule, s=s)
    for step in tqdm(range(start, s.steps + 1), run.name, initial=start, total=s.steps, disable=None):
        if (step % every == 0 or step == s.steps) and not (curve and curve[-1]["step"] == step):
            model, value_encoder = with_part(sd, part, network)
            pictures = partial(generated, model, value_encoder, SAMPLING)
            pictures = pictures if value_encoder is not None else regardless(pictures)
            curve.append({"step": step, "seconds": seconds} | measure(pictures))
            write_list(file, curve)
            train.save_checkpoint(folder, network, optimizer, step)
        if step < s.steps:
            begin = time.perf_counter()
            train.take_step(step, network, optimizer, add, dataset, times, s)
            seconds += time.perf_counter() - begin
    return curve


def apply_method(sd, run, measure):
    """What needs no training -> a curve of one point, whose seconds are those of the edit."""
    begin = time.perf_counter()
    if run.method == "UCE":
        pictures = regardless(partial(generated, replace(sd, unet=uce(sd, *uce_texts(), **run.settings)), None, SAMPLING))
    elif run.method == "frozen":
        pictures = regardless(partial(generated, sd, None, SAMPLING))
    else:
        make = {"principle in the prompt": principle_in_prompt, "negative prompt": negative_prompt}[run.method]
        pictures = partial(make, sd, SAMPLING, **run.settings)
    return [{"step": 0, "seconds": time.perf_counter() - begin} | measure(pictures)]
