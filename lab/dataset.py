"""Preference data from a model's own images, without human labels: the paper's section 3.4.

    python -m lab.dataset build --out pairs --total 2000        # tiny-sd: 8 to 12 minutes
    torchrun --nproc_per_node 2 -m lab.dataset build --out pairs --total 2000        # the same pairs in half the time
    python -m lab.dataset build --weights stable-diffusion-v1-5/stable-diffusion-v1-5 --out sd-pairs \\
        --classifier openai/clip-vit-large-patch14 --principle "gender equality" --prompts professions.txt
    python -m lab.dataset check pairs                           # counts and faults of any preference data
    python -m lab.dataset show pairs                            # a contact sheet of its images
    python -m lab.dataset draw --out more --pairs bloody=600    # toy pairs (lab/toy.py) in another mix

For a concept ("doctor") and a class of the protected attribute ("female"), the model generates images of a prompt that
specifies the class ("a photo of a female doctor"). A classifier keeps the images that show it. The stored prompt leaves
the class out. For a bias principle, images of plain prompts tell the model's majority class: it violates, all other
classes are aligned, and nobody has to be named a minority. Toxicity principles get preservation scenes too: images of
plain prompts, which the principle should not change.

A scene is one concept of one principle. It is generated as a whole and written atomically, and all its randomness comes
from the seed and its name. So neither an interruption nor another number of processes changes a byte. The table of
principles is lab/principles.py.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import random
import re
import warnings
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path

import torch
from tqdm import tqdm

import data
import weights
from common import Parser, UserError, atomic, atomic_folder, number, read_json, regular, run, write_json
from diffusion import Schedule
from efficiency import add_device_options, pick_device
from formats.disk import check_writable
from formats.messages import expecting, one_line
from lab import clip_image, portraits, toy
from lab.check import check, contact_sheet, report
from lab.classifier import ATTRIBUTES, decide, load_classifier
from lab.captions import with_article
from lab.principles import STABLE_DIFFUSION_PRINCIPLES, TOY_PRINCIPLES, Principle
from latents import to_bytes
from livo import make_context, make_uncond
from sample import sample_images

PLAIN_IMAGES = 32  # of plain prompts, to find the model's majority class
MIN_ACCEPTANCE = 0.05  # a class that a smaller fraction of the images shows …
PATIENCE = 64  # … after so many attempts is given up
PRESERVATION_FRACTION = 0.5  # preservation images per toxicity pair
TOY_STEPS, STEPS = 10, 25  # of DPM-Solver++: for tiny-sd 10 look like 15; 25 are the paper's
MAX_SCENES = 99_999  # of a principle in `draw`
OWN_TYPE = "own"  # bias scenes of the user's concepts


# ── One scene ────────────────────────────────────────────────────────────────────────────────────────────────────────

@dataclass(frozen=True)
class Scene:
    """One concept of one principle, a folder of the dataset."""

    principle: Principle
    folder: str  # "0-career/gender-doctor"
    noun: str
    size: int  # pairs wanted; images, in a preservation scene
    preservation: bool = False


def plan(principles, per_scene, total=None):
    """-> the Scenes: `per_scene` pairs each, or `total` in all. Toxicity principles get preservation scenes too."""
    concepts = [(principle, type, noun) for principle in principles
                for type, nouns in principle.scenes.items() for noun in nouns]
    n, scenes = len(concepts), []
    ends = [round((total or per_scene * n) * i / n) for i in range(n + 1)]
    for (principle, type, noun), start, end in zip(concepts, ends, ends[1:]):
        size, name = end - start, f"{principle.attribute}-{slug(noun)}"
        scenes.append(Scene(principle, f"{type}/{name}", noun, size))
        if principle.violating:
            preservation = math.ceil(PRESERVATION_FRACTION * size)
            scenes.append(Scene(principle, f"{data.PRESERVATION_TYPE}/{name}", noun, preservation, preservation=True))
    return [scene for scene in scenes if scene.size]


def slug(text):
    return re.sub(r"\W+", "-", text.lower()).strip("-")


def compose(scene, name, k, seed):
    """For the k-th attempt at a class (None: unspecified) -> the prompt to generate, the one to store, the noise seed.

    The stored prompt asks for the toxicity, except in a preservation scene.
    """
    p, rng = scene.principle, random.Random(f"picture {seed} {scene.folder} {name} {k}")
    opening, noun = rng.choice(p.openings), scene.noun
    if p.details and rng.random() < toy.P_SPECIFIED:
        noun = rng.choice(p.details).format(noun)
    wording, stored = rng.choice(p.classes.get(name, ("{}",))), "{}"
    if p.violating and not scene.preservation:
        stored = wording if name == p.violating else rng.choice(p.classes[p.violating])
    prompt, stored = (opening + with_article(words.format(noun)) for words in (wording, stored))
    return prompt, stored, rng.getrandbits(48)


def build_scene(scene, generate, classify, seed, batch_size, show=lambda *_: None):
    """-> samples [(image, prompt, value, label)], and the facts about them for scene.json.

    Aligned and violating samples alternate; those of a preservation scene are all aligned. Of a scene whose classes are
    given up there are none.
    generate(prompts, seeds) -> images. classify(principle, noun, images) -> a class each.
    show(scene, tried, kept): called after every batch, with its numbers of images.
    """
    p, tried, plain = scene.principle, Counter(), Counter()

    def attempt(names):
        """An image of each class -> [(prompt to generate, prompt to store, seed, image, predicted class)]."""
        requests = []
        for name in names:
            requests.append(compose(scene, name, tried[name], seed))
            tried[name] += 1
        prompts, _, seeds = zip(*requests)
        images = generate(prompts, seeds)
        predictions = classify(p, scene.noun, images)
        return [(*request, image, predicted) for request, image, predicted in zip(requests, images, predictions)]

    violating = p.violating
    if violating is None:  # the model's majority class
        for start in range(0, PLAIN_IMAGES, batch_size):
            plain.update(predicted for *_, predicted in attempt([None] * min(batch_size, PLAIN_IMAGES - start)))
        violating = max(p.classes, key=lambda name: plain[name])
        del tried[None]
    kept = collect(scene, violating, attempt, tried, seed, batch_size, show)

    # Take the aligned classes in turn.
    others = [kept[name] for name in p.classes if name != violating]
    aligned = [request for requests in zip_longest(*others) for request in requests if request]
    pairs = zip(aligned) if scene.preservation else zip(aligned, kept[violating])
    chosen = [(*request, label) for pair in pairs for request, label in zip(pair, (1, 0))]
    samples = [(image, stored, p.value, label) for _, stored, _, image, label in chosen]
    facts = {"images": len(samples), "plain": dict(plain), "violating": violating, "tried": dict(tried),
             "kept": {name: len(requests) for name, requests in kept.items()},
             "files": [{"prompt": prompt, "seed": seed} for prompt, _, seed, _, _ in chosen]}
    return samples, facts


def collect(scene, violating, attempt, tried, seed, batch_size, show):
    """Attempt images until enough show their class -> {class: [(prompt to generate, prompt to store, seed, image)]}.

    A class that the model hardly ever shows is given up with a warning, and the other aligned classes take its place.
    Without the violating or any aligned class the scene is given up: all lists are empty.
    """
    classes = scene.principle.classes
    order = random.Random(f"order {seed} {scene.folder}").sample([*classes], len(classes))
    kept, given_up = {name: [] for name in classes}, set()
    while True:
        others = [name for name in order if name not in given_up | {violating}]
        if violating in given_up or not others:
            return {name: [] for name in classes}
        quota = {} if scene.preservation else {violating: scene.size}
        quota |= {name: (scene.size + i) // len(others) for i, name in enumerate(others)}  # adds up to the size
        wanted = [name for name in quota for _ in range(len(kept[name]), quota[name])][:batch_size]
        if not wanted:
            return kept
        accepted = 0
        for name, (*request, predicted) in zip(wanted, attempt(wanted)):
            if predicted == name:
                kept[name].append(request)
                accepted += 1
        show(scene, len(wanted), accepted)
        for name in quota:
            if tried[name] >= PATIENCE and len(kept[name]) < min(quota[name], MIN_ACCEPTANCE * tried[name]):
                warnings.warn(f"{scene.folder}: {len(kept[name])} of {tried[name]} images show “{name}”, "
                              f"less than {MIN_ACCEPTANCE:.0%}: it is given up")
                given_up.add(name)


# ── The classifier ───────────────────────────────────────────────────────────────────────────────────────────────────

def open_classifier(source, device):
    """"toy", or the folder or hub name of a CLIP -> its name, classify(principle, noun, images), Principles."""
    if source == "toy":
        classifier = load_classifier()
        return classifier.name, partial(classify_toy, classifier), TOY_PRINCIPLES
    clip = clip_image.load_clip(source, device=device)
    return str(source), partial(classify_with_clip, clip), STABLE_DIFFUSION_PRINCIPLES


def classify_toy(classifier, principle, noun, images):
    """The class of each image, by the classifier of the toy dataset."""
    name = principle.attribute
    indices = decide(classifier.classify(images), name).int().tolist()
    classes = ATTRIBUTES[name] if principle.violating is None else [*principle.classes]  # without it, with it
    return [classes[i] for i in indices]


def classify_with_clip(clip, principle, noun, images):
    """The class of each image, by CLIP, zero-shot: texts are "prompt, class", as the authors' are.

    The text of a class without a wording ("no blood") is the prompt alone.
    """
    prompt, classes = principle.openings[0] + with_article(noun), [*principle.classes]
    texts = [prompt if principle.classes[name] == ("{}",) else f"{prompt}, {name}" for name in classes]
    return [classes[i] for i in clip_image.zero_shot(clip, images, texts).argmax(1).tolist()]


# ── The dataset ──────────────────────────────────────────────────────────────────────────────────────────────────────

def build(scenes, out, settings, generate, classify, shard=(0, 1)):
    """Write the missing scenes of a shard. The process that finds all scenes there finishes the set. -> is it finished?

    settings: all that decides the result. Raises UserError if `out` was built with others, or is no dataset.
    """
    start(out, settings, scenes)
    mine, counts = scenes[shard[0]::shard[1]], defaultdict(Counter)
    todo = [scene for scene in mine if not (out / scene.folder / "scene.json").exists()]
    total, left = (sum(scene.size * (2 - scene.preservation) for scene in some) for some in (mine, todo))  # images

    def show(scene, tried, kept):
        sums = counts[scene.principle.value]
        sums.update(tried=tried, kept=kept)
        bar.set_postfix_str(f"{scene.principle.attribute}: {sums['kept'] / sums['tried']:.0%} accepted")
        bar.update(kept)

    with tqdm(total=total, initial=total - left, unit=" images", disable=shard[0] > 0 or None) as bar:
        for scene in todo:
            samples, facts = build_scene(scene, generate, classify, settings["seed"], settings["batch_size"], show)
            with atomic_folder(out / scene.folder, "scene.json") as temporary:
                if samples:
                    toy.write_scene(temporary, samples, settings["format"])
                write_json(temporary / "scene.json", facts)
    finished = all((out / scene.folder / "scene.json").exists() for scene in scenes)
    if finished:
        finish(out, settings, scenes)
    return finished


def start(out, settings, scenes):
    """Write dataset.json, or find it there with the same settings."""
    file = out / "dataset.json"
    if os.path.lexists(file):
        before, now = read_json(file, settings=dict)["settings"], json.loads(json.dumps(settings))
        if words := "; ".join(f"{key} {json.dumps(before.get(key)):.60}, not {json.dumps(now[key]):.60}"
                              for key in now if before.get(key) != now[key]):
            raise UserError(f"{out}: expected a new folder, or a set with the same settings, got one with {words}")
        return
    if out.is_dir() and {path.name for path in out.iterdir() if not path.name.startswith(".")} - {file.name}:
        raise UserError(f"{out}: expected a new folder, or an unfinished set to resume, got one without a dataset.json")
    write_json(file, {"settings": settings, "scenes": dict.fromkeys(scene.folder for scene in scenes)})


def finish(out, settings, scenes):
    """Write a contact sheet for each principle, and the facts about all scenes into dataset.json."""
    facts = {scene.folder: read_json(out / scene.folder / "scene.json", images=int, tried=dict, kept=dict, files=list)
             for scene in scenes}
    principles = {}
    for scene in scenes:
        fact, sums = facts[scene.folder], principles.setdefault(scene.principle.value, Counter())
        numbers = fact["images"], *fact["tried"].values(), *fact["kept"].values()
        if not all(isinstance(n, int) and 0 <= n < 10**9 for n in numbers) or not any(fact["tried"].values()):
            raise UserError(f"{out / scene.folder}: expected numbers as tried and kept in scene.json, got others")
        del fact["files"]
        tried, kept = sum(fact["tried"].values()), sum(fact["kept"].values())
        sums.update(scenes=1, given_up=not fact["images"], pairs=0 if scene.preservation else fact["images"] // 2,
                    preservation=fact["images"] * scene.preservation, tried=tried, kept=kept)
    for value, sums in principles.items():
        sums["acceptance"] = round(sums["kept"] / sums["tried"], 4)
        print(f"{value}: {sums['pairs']} pair{'s' * (sums['pairs'] != 1)}, {sums['preservation']} preservation images, "
              f"{sums['acceptance']:.1%} of {sums['tried']} images accepted")
    if not any(sums["pairs"] + sums["preservation"] for sums in principles.values()):
        raise UserError(f"{out}: expected images that show what was asked for, got none: {', '.join(principles)}")
    samples, _ = data.read_samples(out)
    for value in principles:
        if of_value := [sample for sample in samples if sample.value == value]:
            with atomic(out / f"{slug(value)}.png") as temporary:
                contact_sheet(of_value).save(temporary)
    write_json(out / "dataset.json", {"settings": settings, "principles": principles, "scenes": facts})


# ── The command ──────────────────────────────────────────────────────────────────────────────────────────────────────

def parse_shard(text):
    with contextlib.suppress(ValueError):
        i, n = map(int, text.split("/"))
        if 0 <= i < n:
            return i, n
    raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N - 1, got {text}")


def entry_of(mix):
    """-> an argparse type for an entry of the dictionary: gender=320 -> ("gender", 320)."""

    def parse(text):
        attribute, _, digits = text.partition("=")
        if attribute in mix and digits.isdecimal() and len(digits) <= len(str(MAX_SCENES)):
            return attribute, int(digits)
        raise argparse.ArgumentTypeError(
            f"expected ATTRIBUTE=NUMBER, of {', '.join(mix)}, up to {MAX_SCENES}, got {text}")

    return parse


def add_build_options(parser):
    count, torchrun = number(int, 1, 10**6), f"{os.environ.get('RANK', '0')}/{os.environ.get('WORLD_SIZE', '1')}"
    add = parser.add_argument
    add("--weights", default=Path(__file__).parent.parent / "tiny-sd", help="model: folder, file or hub name")
    add("--tokenizer", help="folder of the tokenizer, for weights that come without one")
    add("--prediction", choices=["epsilon", "v_prediction"], help="what the UNet predicts, if the weights do not say")
    add("--classifier", help="what selects the images: toy, or the folder or hub name of a CLIP, such as "
        "openai/clip-vit-large-patch14 (default: toy for models of the toy dataset)")
    add("--out", type=Path, required=True, help="folder of the dataset; an unfinished one is resumed")
    add("--principle", action="append", help="such as 'gender equality'; may be repeated "
        "(default: all in lab/principles.py for the classifier)")
    add("--prompts", type=Path, metavar="FILE", help="more concepts for every principle, one a line, such as: plumber")
    add("--per-prompt", type=count, default=50, help="pairs of every concept of every principle")
    add("--total", type=count, help="pairs in all, spread evenly, instead of --per-prompt")
    add("--steps", type=count, help=f"UNet evaluations per image (default: {TOY_STEPS} for models of the toy dataset, "
        f"else {STEPS})")
    add("--sampler", choices=["ddim", "dpm"], default="dpm", help="dpm: DPM-Solver++(2M)")
    add("--guidance", type=number(float, 0, 1000), default=7.5, help="guidance scale; off up to 1")
    add("--batch-size", type=number(int, 1, 1024), default=16, help="images at a time")
    add("--seed", type=number(int, 0, 2**63), default=0, help="of everything random")
    add("--format", choices=["png", "jpg"], default="png", help="of the images")
    add("--shard", type=parse_shard, default=torchrun, metavar="I/N",
        help="this is process I of N, counted from 0; torchrun sets it")
    add("--threads", type=number(int, 1, 1024), default=1, help="CPU threads; their number can change an image's last "
        "bits, so more processes are the better way to use more cores")
    add_device_options(parser)


def read_concepts(path):
    """A text file -> its lines without a leading article."""
    with expecting(f"--prompts {path}", "a text file in UTF-8"):
        lines = regular(path, "a text file", 2**20).read_text(encoding="utf-8-sig").splitlines()
    concepts = [re.sub(r"^(an?|the) ", "", line.strip(), flags=re.IGNORECASE) for line in lines if line.strip()]
    for concept in concepts:
        if not slug(concept) or len(concept) > 60 or len(concept.encode()) > 180:  # it names a folder
            raise UserError(f"--prompts {path}: expected concepts of 1 to 60 letters, got {concept[:80]!r}")
    if not concepts:
        raise UserError(f"--prompts {path}: expected a concept a line, got an empty file")
    return concepts


def choose_principles(known, wanted, concepts):
    """The principles with the wanted values, or all, with the user's concepts added."""
    by_value = {principle.value: principle for principle in known}
    if unknown := [value for value in wanted or () if value not in by_value]:
        raise UserError(f"--principle {unknown[0]}: expected one of {', '.join(by_value)}, got another; "
                        "a new one is a few lines in lab/principles.py")
    chosen = []
    for value in dict.fromkeys(wanted or by_value):
        principle = by_value[value]
        nouns = {slug(noun) for some in principle.scenes.values() for noun in some}
        new = tuple({slug(concept): concept for concept in concepts if slug(concept) not in nouns}.values())
        type = toy.TOXICITY_TYPE if principle.violating else OWN_TYPE
        more = {type: (*principle.scenes.get(type, ()), *new)} if new else {}
        chosen.append(replace(principle, scenes=principle.scenes | more))
    return chosen


def hash_weights(sd):
    digest = hashlib.sha256()
    for network in (sd.unet, sd.vae, sd.text_encoder):
        for name, tensor in network.state_dict().items():
            digest.update(name.encode() + str(tensor.dtype).encode() + to_bytes(tensor))
    return digest.hexdigest()


def choose_classifier(args, sd, device, concepts):
    """The options -> the classifier's name, classify(principle, noun, images), the Principles to build."""
    if sd.size != portraits.SIZE and args.classifier in (None, "toy"):
        raise UserError(f"--classifier: expected a CLIP for images of {sd.size} pixels, a folder or hub name such as "
                        f"openai/clip-vit-large-patch14, got {args.classifier or 'none'}")
    name, classify, known = open_classifier(args.classifier or "toy", device)
    principles = choose_principles(known, args.principle, concepts)
    if known is TOY_PRINCIPLES and (unknown := {p.attribute for p in principles} - ATTRIBUTES.keys()):
        raise UserError(f"--classifier toy: expected an attribute that it knows, of {', '.join(ATTRIBUTES)}, "
                        f"got {min(unknown)}; a CLIP knows more")
    return name, classify, principles


def build_command(args):
    torch.set_num_threads(args.threads)
    device, dtype = pick_device(args.device, args.dtype)
    check_writable(args.out)
    concepts = read_concepts(args.prompts) if args.prompts else []
    sd = weights.load(args.weights, dtype=dtype, device=device, tokenizer=args.tokenizer,
                      prediction_type=args.prediction)
    steps = args.steps or (TOY_STEPS if sd.size == portraits.SIZE else STEPS)
    sampling = {"steps": steps, "sampler": args.sampler, "guidance": args.guidance}
    Schedule(sd.scheduler).trajectory(steps, args.sampler)  # raises before the work, not in it
    name, classify, principles = choose_classifier(args, sd, device, concepts)
    settings = {
        "weights": Path(args.weights).name, "sha256": hash_weights(sd), "classifier": name,
        "prediction": sd.scheduler["prediction_type"], **sampling, "batch_size": args.batch_size, "seed": args.seed,
        "pairs": {"total": args.total} if args.total else {"per_prompt": args.per_prompt}, "format": args.format,
        "device": device.type, "dtype": str(sd.unet.conv_in.weight.dtype), "threads": args.threads,
        "principles": [asdict(principle) for principle in principles]}

    @torch.no_grad()
    def generate(prompts, seeds):
        context = make_context(sd, prompts)  # (B, 77, C)
        uncond = make_uncond(sd, context.shape[1])  # (1, 77, C)
        return list(sample_images(sd, context, uncond, seeds, batch_size=args.batch_size, **sampling))

    if build(plan(principles, args.per_prompt, args.total), args.out, settings, generate, classify, args.shard):
        print(f"the dataset is in {args.out}; check it with: python -m lab.dataset check {args.out}")
    else:
        print(f"shard {args.shard[0]} of {args.shard[1]} is done; the last one finishes the dataset in {args.out}")


def draw_command(args):
    check_writable(args.out)
    if args.out.exists():
        raise UserError(f"{args.out}: expected a new folder, got one that is there")
    toy.render_pairs(args.out, pairs=toy.PAIRS | dict(args.pairs or ()),
                     preservation=toy.PRESERVATION | dict(args.preservation or ()))
    print(f"the pairs are in {args.out}")


def check_command(args):
    principles, faults = check(args.root)
    report(principles)
    for fault in faults:
        print(one_line(fault))
    if faults:
        raise UserError(f"{args.root}: expected a sound dataset, got {len(faults)} faults, listed above")


def show_command(args):
    samples, _ = data.read_samples(args.root)
    with atomic(args.out) as path:
        contact_sheet(samples).save(path, "PNG")
    print(f"a contact sheet is in {args.out}")


COMMANDS = {"build": build_command, "check": check_command, "show": show_command, "draw": draw_command}


def main(argv=None):
    parser = Parser(description="Build, check and show preference data.")
    commands = parser.add_subparsers(dest="command", required=True)
    add_build_options(commands.add_parser("build", help="generate pairs with a model, without human labels",
                                          description="Preference data from a model's own images."))
    for name, text in ("check", "count images and find faults"), ("show", "write a contact sheet"):
        commands.add_parser(name, help=text).add_argument("root", type=Path, metavar="DIR", help="dataset folder")
    commands.choices["show"].add_argument("--out", type=Path, default=Path("out/dataset.png"), help="PNG to write")
    draw = commands.add_parser("draw", help="render toy preference pairs")
    draw.add_argument("--out", type=Path, required=True, help="folder of the dataset, a new one")
    for name, mix, what in ("pairs", toy.PAIRS, "pairs"), ("preservation", toy.PRESERVATION, "preservation images"):
        default = " ".join(f"{attribute}={n}" for attribute, n in mix.items())
        draw.add_argument("--" + name, nargs="+", type=entry_of(mix), metavar="ATTRIBUTE=NUMBER",
                          help=f"{what} of the principle of this attribute (default: {default})")
    args = parser.parse_args(argv)
    COMMANDS[args.command](args)


if __name__ == "__main__":
    run(main)
