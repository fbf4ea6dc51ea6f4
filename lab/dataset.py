"""Preference data of a model's own pictures, without human labels: half of what the paper contributes.

    python data.py build --out pairs --total 2000                          # tiny-sd: a quarter of an hour
    torchrun --nproc_per_node 2 data.py build --out pairs --total 2000     # the same pairs in half the time
    python data.py build --weights stable-diffusion-v1-5/stable-diffusion-v1-5 --out pairs \\
        --classifier openai/clip-vit-large-patch14 --principle "gender equality" --prompts mine.txt

Concepts ("doctor") → prompts with an answer written in ("a photo of a female doctor") → the model's pictures → a
classifier keeps those that show the answer → by the principle they are aligned or violating. The prompt that is
kept has no answer in it. For a bias principle the model itself is asked first, with plain prompts, which answer it
over-produces: that one violates, all others are aligned, and nobody is named a minority here. A harm gets preservation
scenes too, as in toy.PRESERVATION: pictures of plain prompts, for the principle to leave alone.

A scene, one concept of one principle, is drawn as a whole and written at once. All that is random in it comes from
the seed and its name, so that an interruption or another division among processes changes no byte. A new principle
is a few lines in TOY_PRINCIPLES or STABLE_DIFFUSION.
"""

import argparse
import hashlib
import json
import math
import os
import random
import re
import shutil
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, replace
from itertools import chain, pairwise, zip_longest
from pathlib import Path

import torch
from PIL import Image, ImageOps
from tqdm import tqdm

import data
from lab import portraits, toy
import weights
from common import Parser, UserError, add_device_options, atomic, captioned, check_writable, number, pick_device, run
from data import is_preservation, read_lines, read_sample, read_samples
from lab.classifier import ATTRIBUTES, decide, load_classifier
from livo import make_context, make_uncond
from lab.portraits import PROFESSIONS, WORDINGS, with_article
from lab.toy import PAIRS, render_pairs
from retrieve import BLOODY, GENDER, NUDITY, RACE, ZOMBIE
from sample import Schedule, sample_images
from common import atomic_folder, read_json, write_json

ASK = 32  # pictures of the plain prompts, to see which answer the model over-produces
MIN_ACCEPTANCE = 0.05  # an answer that a smaller share of the pictures shows …
PATIENCE = 64  # … after so many is given up
PRESERVATION = 0.5  # images of prompts that a harm has nothing to do with, for each pair of others
SHEET_SCENES, SHEET_COLUMNS, SHEET_SIDE = 3, 8, 96  # of a contact sheet: scenes per principle, images, pixels
PORTRAIT_STEPS, STEPS = 10, 25  # of DPM-Solver++: for tiny-sd 10 give what 15 give; 25 are the paper's

# --------------------------------------------------------------------------------------------- the principles


@dataclass(frozen=True)
class Principle:
    """What to draw. In a wording {} stands for the noun: "{} with dark skin"."""

    value: str  # the principle, as the value encoder reads it
    attribute: str  # what it is about, in a word: the classifier's name for it
    scenes: dict  # {type: nouns}; the types are folders
    answers: dict  # {answer: its wordings}
    violating: str | None = None  # the answer that violates; None asks the model for the one it over-produces
    openings: tuple = ("a photo of the face of ", "a photo of ")
    details: tuple = ()  # wordings of what some prompts tell besides


def bias(value, attribute, scenes, answers, **more):
    """A principle of balance: aligned are the answers that the model under-produces."""
    return Principle(value, attribute, scenes, answers, **more)


def harm(value, attribute, scenes, *wordings, **more):
    """A principle of absence: violating is what these wordings ask for."""
    return Principle(value, attribute, scenes, {f"no {attribute}": ("{}",), attribute: wordings}, attribute, **more)


def told(*words):
    """The wordings of the portrait world's captions: "zombie" -> "zombie {}", "{} as a zombie"."""
    return tuple(wording for word in words for adjective, phrases in [WORDINGS[word]]
                 for wording in (adjective + " {}", *("{} " + phrase for phrase in phrases)))


WOMAN, MAN = told("woman", "female"), told("man", "male")
SKINS = {skin: told(skin) for skin in portraits.SKINS}
PEOPLE = (*PROFESSIONS, "person")
PORTRAITS = {"openings": portraits.OPENINGS, "details": (*WOMAN, *MAN)}

TOY_PRINCIPLES = (
    bias(GENDER, "gender", {"0-career": PEOPLE}, {"woman": WOMAN, "man": MAN},
         openings=portraits.OPENINGS, details=tuple(chain(*SKINS.values()))),
    bias(RACE, "skin", {"0-career": PEOPLE}, SKINS, **PORTRAITS),
    harm(BLOODY, "bloody", {"2-badness": PEOPLE}, *told("bloody"), **PORTRAITS),
    harm(ZOMBIE, "zombie", {"2-badness": PEOPLE}, *told("zombie"), **PORTRAITS),
    # not in the paper
    harm("smoking considered inappropriate", "smoking", {"2-badness": PEOPLE},
         "smoking {}", "{} smoking a cigarette", "{} who smokes", **PORTRAITS),
)  # fmt: skip

CONCEPTS = {
    "0-career": ("doctor", "nurse", "firefighter", "police officer", "chef", "farmer", "builder", "soldier", "classifier",
                 "teacher", "artist", "astronaut", "engineer", "secretary", "scientist", "lawyer", "cleaner", "pilot",
                 "chief executive", "librarian"),
    "1-goodness": ("kind person", "clever person", "brave person", "successful person", "generous person"),
    "2-badness": ("lazy person", "rude person", "greedy person", "dishonest person", "violent person"),
}  # fmt: skip
TOXIC = {"openings": ("a photo of ", "a painting of ")}

STABLE_DIFFUSION = (
    bias(GENDER, "gender", CONCEPTS, {"female": ("female {}",), "male": ("male {}",)}),
    bias(RACE, "race", CONCEPTS, {race: (race + " {}",) for race in ("white", "black", "indian", "asian", "latino")}),
    harm(NUDITY, "nudity", {"3-toxic": ("woman", "man", "couple", "dancer", "swimmer", "model")},
         "nude {}", "naked {}", **TOXIC),
    harm(BLOODY, "blood", {"3-toxic": ("person", "soldier", "boxer", "surgeon", "knife", "street", "hospital room")},
         "bloody {}", "{} covered in blood", **TOXIC),
    harm(ZOMBIE, "zombie", {"3-toxic": ("person", "doctor", "bride", "soldier", "crowd", "family", "chef")},
         "zombie {}", "{} as a zombie", **TOXIC),
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ a scene


@dataclass(frozen=True)
class Scene:
    """One concept of one principle, a folder of the dataset."""

    principle: Principle
    folder: str  # "0-career/gender-doctor"
    noun: str
    size: int  # pairs wanted; preservation ones have images instead
    preservation: bool = False  # of prompts that the harm has nothing to do with, as in toy.PRESERVATION

    @property
    def images(self):
        return self.size if self.preservation else 2 * self.size


def plan(principles, per_scene, total=None):
    """-> the Scenes to draw: `per_scene` pairs each, or `total` spread over them; of a harm preservation ones too."""
    concepts = [(principle, kind, noun) for principle in principles
                for kind, nouns in principle.scenes.items() for noun in nouns]
    sizes = [per_scene] * len(concepts)
    if total is not None:
        sizes = [b - a for a, b in pairwise(round(total * i / len(concepts)) for i in range(len(concepts) + 1))]
    scenes = []
    for (principle, kind, noun), size in zip(concepts, sizes):
        name = f"{principle.attribute}-{slug(noun)}"
        scenes.append(Scene(principle, f"{kind}/{name}", noun, size))
        if principle.violating:
            scenes.append(Scene(principle, f"{data.PRESERVATION_TYPE}/{name}", noun, math.ceil(PRESERVATION * size), True))
    return [scene for scene in scenes if scene.size]


def slug(text):
    return re.sub(r"\W+", "-", text.lower()).strip("-")


def compose(scene, answer, k, seed):
    """For the k-th try at an answer, None for the plain prompt -> the prompt to draw, the prompt to keep, the seed
    of the noise.

    A harm is in toy.ASKED of the prompts to keep, and never in those of a preservation scene.
    """
    p, rng = scene.principle, random.Random(f"picture {seed} {scene.folder} {answer} {k}")
    opening, noun = rng.choice(p.openings), scene.noun
    if p.details and rng.random() < toy.TELLS:
        noun = rng.choice(p.details).format(noun)
    drawn, kept = rng.choice(p.answers.get(answer, ("{}",))), "{}"
    if p.violating and not scene.preservation and rng.random() < toy.ASKED:
        kept = drawn if answer == p.violating else rng.choice(p.answers[p.violating])
    drawn, kept = (opening + with_article(wording.format(noun)) for wording in (drawn, kept))
    return drawn, kept, rng.getrandbits(48)


def build_scene(scene, draw, read, seed, batch_size, show=lambda counts: None):
    """-> [(image, prompt, value, label)], aligned and violating in turn, or all aligned in a preservation scene, and the
    facts about them for scene.json.

    draw(prompts, seeds) -> images; read(principle, noun, images) -> their answers. After every batch show(counts)
    gets the number of pictures {"tried", "kept"} in it. Where the model does not give what is asked there is a
    warning, and the answer is given up, or the scene, which then has no samples.
    """
    p, tried = scene.principle, Counter()
    kept = {answer: [] for answer in p.answers}
    order = random.Random(f"order {seed} {scene.folder}").sample([*p.answers], len(p.answers))

    def draw_batch(answers):
        """One picture for each of these answers -> (prompt to draw, prompt to keep, seed, image, reading) each."""
        requests = []
        for answer in answers:
            requests.append(compose(scene, answer, tried[answer], seed))
            tried[answer] += 1
        drawn, _, seeds = zip(*requests)
        images = draw(drawn, seeds)
        return [(*request, image, got) for request, image, got in zip(requests, images, read(p, scene.noun, images))]

    violating, asked = p.violating, Counter()
    if violating is None:
        for start in range(0, ASK, batch_size):
            asked.update(got for *_, got in draw_batch([None] * min(batch_size, ASK - start)))
        violating = max(p.answers, key=lambda answer: asked[answer])

    given_up = set()
    while True:
        others = [answer for answer in order if answer not in given_up | {violating}]
        if violating in given_up or not others:
            kept = {answer: [] for answer in kept}
            break
        quota = {} if scene.preservation else {violating: scene.size}
        quota |= {answer: (scene.size + i) // len(others) for i, answer in enumerate(others)}  # adds up to the size
        wanted = [answer for answer in quota for _ in range(len(kept[answer]), quota[answer])][:batch_size]
        if not wanted:
            break
        accepted = 0
        for answer, (*request, got) in zip(wanted, draw_batch(wanted)):
            if got == answer:
                kept[answer].append(request)
                accepted += 1
        show({"tried": len(wanted), "kept": accepted})
        for answer in quota:
            if tried[answer] >= PATIENCE and len(kept[answer]) < min(quota[answer], MIN_ACCEPTANCE * tried[answer]):
                warnings.warn(f"{scene.folder}: {len(kept[answer])} of {tried[answer]} pictures show “{answer}”, "
                              f"less than {MIN_ACCEPTANCE:.0%}: it is given up")
                given_up.add(answer)

    aligned = [*filter(None, chain(*zip_longest(*(kept[answer] for answer in p.answers if answer != violating))))]
    if scene.preservation:
        pictures = [(*request, 1) for request in aligned]
    else:
        pictures = [(*request, label) for pair in zip(aligned, kept[violating]) for request, label in zip(pair, (1, 0))]
    samples = [(image, prompt, p.value, label) for _, prompt, _, image, label in pictures]
    del tried[None]
    facts = {"images": len(samples), "asked": dict(asked), "violating": violating, "tried": dict(tried),
             "kept": {answer: len(some) for answer, some in kept.items()},
             "files": [{"prompt": prompt, "seed": seed} for prompt, _, seed, _, _ in pictures]}
    return samples, facts


# ---------------------------------------------------------------------------------------------- the classifier


def classifier_reader(classifier):
    """-> read(principle, noun, images): the answers that the classifier of the portrait world sees."""

    def read(principle, noun, images):
        name = principle.attribute
        numbers = decide(classifier.classify(images), name).int().tolist()
        answers = ATTRIBUTES[name] if principle.violating is None else [*principle.answers]  # no harm, harm
        return [answers[i] for i in numbers]

    return read


def clip_reader(clip):
    """-> read(principle, noun, images): the answers that CLIP finds nearest, as the authors ask it, among
    "prompt, answer", and the prompt alone where that is how the answer is written."""
    from lab.clip_image import zero_shot

    def read(principle, noun, images):
        prompt = principle.openings[0] + with_article(noun)
        texts = [prompt if wordings == ("{}",) else f"{prompt}, {answer}"
                 for answer, wordings in principle.answers.items()]
        answers = [*principle.answers]
        return [answers[i] for i in zero_shot(clip, images, texts).argmax(1).tolist()]

    return read


def open_classifier(source, device):
    """"classifier", or the folder or hub name of a CLIP -> its name, its `read`, and the principles it can tell."""
    if source == "classifier":
        classifier = load_classifier()
        return classifier.name, classifier_reader(classifier), TOY_PRINCIPLES
    from lab.clip_image import load_clip

    return str(source), clip_reader(load_clip(source, device=device)), STABLE_DIFFUSION


# ------------------------------------------------------------------------------------------------ the dataset


def build(scenes, out, settings, draw, read, shard=(0, 1)):
    """Write the scenes of a shard that are not there yet; whoever finds all of them there finishes the set.
    -> is it finished?

    settings: what decides the result. Raises UserError where `out` was built with others, or is no dataset.
    """
    start(out, settings, scenes)
    mine, ratio = scenes[shard[0]::shard[1]], {}
    todo = [scene for scene in mine if not (out / scene.folder / "scene.json").exists()]
    total, left = (sum(scene.images for scene in some) for some in (mine, todo))
    with tqdm(total=total, initial=total - left, unit=" pictures", disable=shard[0] > 0 or None) as bar:
        for scene in todo:
            counts = ratio.setdefault(scene.principle.value, Counter())

            def show(more, counts=counts, name=scene.principle.attribute):
                counts.update(more)
                bar.set_postfix_str(f"{name}: {counts['kept'] / counts['tried']:.0%} accepted")
                bar.update(more["kept"])

            samples, facts = build_scene(scene, draw, read, settings["seed"], settings["batch_size"], show)
            folder = out / scene.folder
            for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):  # of a kill while this scene was written
                shutil.rmtree(leftover, ignore_errors=True)
            with atomic_folder(folder, "scene.json") as temporary:
                if samples:
                    data.write_scene(temporary, samples, settings["format"])
                write_json(temporary / "scene.json", facts)
    finished = all((out / scene.folder / "scene.json").exists() for scene in scenes)
    if finished:
        finish(out, settings, scenes)
    return finished


def start(out, settings, scenes):
    """Write dataset.json, or find it there with the same settings."""
    file = out / "dataset.json"
    if file.exists():
        before, now = read_json(file).get("settings", {}), json.loads(json.dumps(settings))
        if other := [key for key in now if before.get(key) != now[key]]:
            words = "; ".join(f"{key} {shorten(before.get(key))}, not {shorten(now[key])}" for key in other)
            raise UserError(f"{out}: expected a new folder, or a set of the same settings, got one with {words}")
        return
    if out.is_dir() and {path.name for path in out.iterdir() if not path.name.startswith(".")} - {file.name}:
        raise UserError(f"{out}: expected a new folder, or a set to go on with, got one without a dataset.json")
    with atomic(file) as temporary:
        write_json(temporary, {"settings": settings, "scenes": dict.fromkeys(scene.folder for scene in scenes)})


def shorten(value, length=60):
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= length else text[:length] + "…"


def finish(out, settings, scenes):
    """Write the contact sheets, and what became of all scenes into dataset.json."""
    facts = {scene.folder: read_json(out / scene.folder / "scene.json") for scene in scenes}
    principles = {}
    for scene in scenes:
        fact, sums = facts[scene.folder], principles.setdefault(scene.principle.value, Counter())
        del fact["files"]
        sums.update(scenes=1, given_up=not fact["images"], pairs=0 if scene.preservation else fact["images"] // 2,
                    preservation=fact["images"] * scene.preservation, tried=sum(fact["tried"].values()),
                    kept=sum(fact["kept"].values()))
    for value, sums in principles.items():
        sums["acceptance"] = round(sums["kept"] / sums["tried"], 4)
        print(f"{value}: {sums['pairs']} pairs, {sums['preservation']} preservation images, "
              f"{sums['acceptance']:.1%} of {sums['tried']} pictures accepted")
    if not any(sums["pairs"] + sums["preservation"] for sums in principles.values()):
        raise UserError(f"{out}: expected pictures that show what was asked for, got none: {', '.join(principles)}")
    samples, _ = data.read_samples(out)
    for value, sums in principles.items():
        if sums["pairs"] + sums["preservation"]:
            with atomic(out / f"{slug(value)}.png") as temporary:
                contact_sheet([sample for sample in samples if sample.value == value]).save(temporary)
    with atomic(out / "dataset.json") as temporary:
        write_json(temporary, {"settings": settings, "principles": principles, "scenes": facts})


def sha256(sd):
    """Of all weights."""
    digest = hashlib.sha256()
    for network in (sd.unet, sd.vae, sd.text_encoder):
        for name, tensor in network.state_dict().items():
            digest.update(name.encode() + str(tensor.dtype).encode() + data.to_bytes(tensor))
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ the command


def parse_shard(text):
    i, n = map(int, text.split("/"))
    if not 0 <= i < n:
        raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N - 1, got {text}")
    return i, n


parse_shard.__name__ = "shard I/N"  # argparse's words for text that is none at all


def add_options(parser):
    count, torchrun = number(int, 1, 10**6), f"{os.environ.get('RANK', '0')}/{os.environ.get('WORLD_SIZE', '1')}"
    parser.add_argument("--weights", default=Path(__file__).parent.parent / "tiny-sd", help="model: folder, file or hub name")
    parser.add_argument("--tokenizer", help="folder of the tokenizer, for weights that come without one")
    parser.add_argument("--prediction", choices=weights.PREDICTIONS,
                        help="what the UNet predicts, where the weights do not say or are wrong")
    parser.add_argument("--classifier", help="what keeps the pictures: classifier, or the folder or hub name of a CLIP, "
                        "such as openai/clip-vit-large-patch14 (default: classifier for the portrait world)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the dataset; one begun is gone on with")
    parser.add_argument("--principle", action="append", help="such as 'gender equality'; may be given more than once "
                        "(default: all that dataset.py knows for the classifier)")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="more concepts for every principle, one a line, "
                        "such as: plumber")
    parser.add_argument("--per-prompt", type=count, default=50, help="pairs of every concept of every principle")
    parser.add_argument("--total", type=count, help="pairs in all, spread evenly, in place of --per-prompt")
    parser.add_argument("--steps", type=count, help="UNet evaluations per picture (default: "
                        f"{PORTRAIT_STEPS} for the portrait world, else {STEPS})")
    parser.add_argument("--sampler", choices=["ddim", "dpm"], default="dpm", help="dpm: DPM-Solver++(2M)")
    parser.add_argument("--guidance", type=number(float, 0, 1000), default=7.5, help="off up to 1")
    parser.add_argument("--batch-size", type=count, default=16, help="pictures at a time")
    parser.add_argument("--seed", type=number(int, 0, 2**63), default=0, help="of everything random")
    parser.add_argument("--format", choices=["png", "jpg"], default="png", help="of the pictures")
    parser.add_argument("--shard", type=parse_shard, default=torchrun, metavar="I/N",
                        help="of N processes this is number I, from 0, as torchrun says without it")
    parser.add_argument("--threads", type=count, default=1, help="of the CPU: they can change the last bits of a "
                        "picture, so more processes are the better way to use more cores")
    add_device_options(parser)


def read_concepts(path):
    """A text file -> its lines without a leading article."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path}: expected a text file in UTF-8, got: {error}") from error
    concepts = [re.sub(r"^(an?|the) ", "", line.strip(), flags=re.IGNORECASE) for line in lines if line.strip()]
    for concept in concepts:
        if not slug(concept) or len(concept) > 60:  # it names a folder
            raise UserError(f"--prompts {path}: expected concepts of 1 to 60 letters, got {concept[:80]!r}")
    if not concepts:
        raise UserError(f"--prompts {path}: expected a concept a line, got an empty file")
    return concepts


def choose_principles(known, wanted, concepts):
    """The principles with these values, or all; with further concepts."""
    by_value = {principle.value: principle for principle in known}
    if unknown := [value for value in wanted or () if value not in by_value]:
        raise UserError(f"--principle {unknown[0]}: expected one of {', '.join(by_value)}, got another; "
                        "a new one is a few lines in dataset.py")
    chosen = []
    for value in dict.fromkeys(wanted or by_value):
        nouns = {slug(noun) for some in by_value[value].scenes.values() for noun in some}
        new = {slug(concept): concept for concept in concepts if slug(concept) not in nouns}
        scenes = by_value[value].scenes | ({"4-own": tuple(new.values())} if new else {})
        chosen.append(replace(by_value[value], scenes=scenes))
    return chosen


def build_command(args):
    torch.set_num_threads(args.threads)
    device, dtype = pick_device(args.device, args.dtype)
    check_writable(args.out)
    concepts = read_concepts(args.prompts) if args.prompts else []
    sd = weights.load(args.weights, dtype=dtype, device=device, tokenizer=args.tokenizer,
                      prediction_type=args.prediction)
    is_portrait = sd.size == portraits.SIZE
    if not is_portrait and args.classifier in (None, "classifier"):
        raise UserError(f"--classifier: expected a CLIP for pictures of {sd.size} pixels, the folder or hub name, such as "
                        f"openai/clip-vit-large-patch14, got {args.classifier or 'none'}")
    sampling = {"steps": args.steps or (PORTRAIT_STEPS if is_portrait else STEPS), "sampler": args.sampler,
                "guidance": args.guidance}
    Schedule(sd.scheduler).trajectory(sampling["steps"], args.sampler)  # complain before the work, not in it
    classifier, read, known = open_classifier(args.classifier or "classifier", device)
    principles = choose_principles(known, args.principle, concepts)
    if known is TOY_PRINCIPLES and (strange := {p.attribute for p in principles} - ATTRIBUTES.keys()):
        raise UserError(f"the classifier reads {', '.join(ATTRIBUTES)}, not {min(strange)}: pass a CLIP as --classifier")
    settings = {
        "weights": Path(args.weights).name, "sha256": sha256(sd), "classifier": classifier,
        "prediction": sd.scheduler["prediction_type"], **sampling, "batch_size": args.batch_size, "seed": args.seed,
        "pairs": {"total": args.total} if args.total else {"per_prompt": args.per_prompt}, "format": args.format,
        "device": device.type, "dtype": str(sd.unet.conv_in.weight.dtype), "threads": args.threads,
        "principles": [asdict(principle) for principle in principles],
    }

    @torch.no_grad()
    def draw(prompts, seeds):
        context = make_context(sd, prompts)  # (B, 77, C)
        uncond = make_uncond(sd, context.shape[1])
        return list(sample_images(sd, context, uncond, seeds, batch_size=args.batch_size, **sampling))

    scenes = plan(principles, args.per_prompt, args.total)
    if build(scenes, args.out, settings, draw, read, args.shard):
        print(f"the dataset is in {args.out}; python data.py check {args.out} reads all of it")
    else:
        print(f"shard {args.shard[0]} of {args.shard[1]} is done; the last one finishes the dataset in {args.out}")


# ---------------------------------------------------------------------------------------- to check and to show


def check(root):
    """Read a whole dataset folder, pixels too -> {principle: what there is of it}, [fault].

    Finds what training would skip or stumble over, and also what it would take without a word: a label other
    than 0 and 1, a path with "..", a picture that a principle has twice, a set that is not finished. Raises
    UserError where there is no dataset.
    """
    root, principles, faults, seen = Path(root), {}, [], {}
    labels = {}  # of the lines of each scene that can be used
    for line, scene, where in tqdm(read_lines(root), "checking", disable=None, leave=False, unit=" lines"):
        try:
            sample = read_sample(line, scene, root, where)
        except (ValueError, OSError, RecursionError) as error:
            faults.append(f"{where}: {error}")
            continue
        entry = json.loads(line)
        if entry["label"] not in (0, 1):
            faults.append(f"{where}: expected 0 or 1 as label, got {entry['label']}: training reads it as violating")
        if ".." in Path(entry["file_name"]).parts:
            faults.append(f"{where}: expected a file of the scene, got {entry['file_name']}")
        try:
            with Image.open(sample.path) as image:
                pixels = hashlib.sha256(repr(image.size).encode() + image.convert("RGB").tobytes()).digest()
        except Exception as error:  # a damaged file can raise anything in Pillow
            faults.append(f"{where}: {sample.path.name} is no readable image: {error}")
            continue
        if (first := seen.setdefault((sample.value, pixels), where)) != where:
            faults.append(f"{where}: {sample.path.name} is the same picture as that of {first}")
        if not is_preservation(sample):
            labels.setdefault(scene, set()).add(sample.aligned)
        nothing = {"aligned": 0, "violating": 0, "preservation": 0, "scenes": set(), "prompts": set()}
        counts = principles.setdefault(sample.value, nothing)
        counts["preservation" if is_preservation(sample) else "aligned" if sample.aligned else "violating"] += 1
        counts["scenes"].add(scene)
        counts["prompts"].add(sample.prompt)
    for scene, found in labels.items():
        if len(found) < 2:
            faults.append(f"{scene}: expected aligned and violating images, got only "
                          f"{'aligned' if True in found else 'violating'} ones")
    about = root / "dataset.json"  # of a built set: what became of every scene, None until it is all there
    scenes = read_json(about).get("scenes", {}) if about.exists() else {}
    if not isinstance(scenes, dict):
        raise UserError(f"{about}: expected an object as scenes, got {type(scenes).__name__}")
    if unfinished := [scene for scene, facts in scenes.items() if facts is None]:
        faults.append(f"{about}: the set of {len(unfinished)} scenes is not finished: build it again to go on")
    faults += [f"{root / scene}: expected {facts['images']} images, got no metadata.jsonl"
               for scene, facts in scenes.items()
               if facts and facts["images"] and not (root / scene / "metadata.jsonl").exists()]  # fmt: skip
    return principles, faults


COUNTS = ("aligned", "violating", "preservation", "scenes", "prompts")


def report(principles):
    """Print the counts of `check`."""
    print(f"{'principle':40}" + "".join(f"{name:>11}" for name in COUNTS) + f"{'share':>10}")
    total = sum(counts["aligned"] for counts in principles.values())
    for value, counts in principles.items():
        sizes = [counts[name] if isinstance(counts[name], int) else len(counts[name]) for name in COUNTS]
        print(f"{value:40}" + "".join(f"{size:11}" for size in sizes) + f"{counts['aligned'] / max(1, total):10.0%}")


def contact_sheet(samples):
    """-> PIL image: of some scenes of every principle, a row of aligned pictures over one of violating ones."""
    scenes = {}  # by principle: {scene: its samples}
    for sample in samples:
        scenes.setdefault(sample.value, {}).setdefault(sample.scene, []).append(sample)
    rows = []
    for value, of_value in scenes.items():
        step = math.ceil(len(of_value) / SHEET_SCENES)
        for scene in [*of_value][::step]:
            for aligned, name in (True, "aligned"), (False, "violating"):
                chosen = [sample for sample in of_value[scene] if sample.aligned == aligned][:SHEET_COLUMNS]
                thumbnails = [crop_image(sample.path, SHEET_SIDE) for sample in chosen]
                rows += [(f"{value}, {scene.name}: {name}", thumbnails)] if thumbnails else []
    return captioned(rows)


def crop_image(path, size):
    """The middle of a picture file as a PIL image of size × size pixels."""
    try:
        with Image.open(path) as image:
            return ImageOps.fit(image.convert("RGB"), (size, size))
    except Exception as error:  # a damaged file can raise anything in Pillow
        raise UserError(f"{path}: expected a readable image, got {error}") from error


# --------------------------------------------------------------------------------------------- the command


class Mix(argparse.Action):
    """gender=320 bloody=520 … -> the default's dictionary with these numbers in it."""

    def __call__(self, parser, namespace, texts, option=None):
        mix = dict(self.default)
        for text in texts:
            attribute, _, number = text.partition("=")
            if attribute not in mix or not number.isdecimal():
                raise UserError(f"{option}: expected ATTRIBUTE=NUMBER, of {', '.join(mix)}, got {text}")
            mix[attribute] = int(number)
        setattr(namespace, self.dest, mix)


def main(argv=None):
    parser = Parser(description="Draw, build, check and look at preference data.")
    commands = parser.add_subparsers(dest="command", required=True)
    drawing = commands.add_parser("draw", help="pairs of drawn portraits")
    drawing.add_argument("--out", type=Path, required=True, help="folder of the dataset, a new one")
    for name, mix, what in ("pairs", PAIRS, "pairs"), ("preservation", toy.PRESERVATION, "images of preservation prompts"):
        drawing.add_argument("--" + name, nargs="+", action=Mix, default=mix, metavar="ATTRIBUTE=NUMBER",
                             help=f"how many {what} of a principle on this attribute")
    add_options(commands.add_parser("build", help="pairs of a model's own pictures, without human labels",
                                          description=__doc__.splitlines()[0]))
    for name, text in ("check", "count, and find what is broken"), ("show", "write a contact sheet"):
        commands.add_parser(name, help=text).add_argument("root", type=Path, metavar="DIR", help="dataset folder")
    commands.choices["show"].add_argument("--out", type=Path, default=Path("out/dataset.png"), help="PNG to write")
    args = parser.parse_args(argv)
    if args.command == "build":
        build_command(args)
    elif args.command == "draw":
        check_writable(args.out)
        if args.out.exists():
            raise UserError(f"{args.out}: expected a new folder, got one that is there")
        render_pairs(args.out, pairs=args.pairs, preservation=args.preservation)
        print(f"the pairs are in {args.out}")
    elif args.command == "check":
        principles, faults = check(args.root)
        report(principles)
        for fault in faults:
            print(fault)
        if faults:
            raise UserError(f"{args.root}: expected a sound dataset, got {len(faults)} faults, listed above")
    else:
        samples, _ = read_samples(args.root)
        with atomic(args.out) as path:
            contact_sheet(samples).save(path, "PNG")
        print(f"a contact sheet is in {args.out}")


if __name__ == "__main__":
    run(main)
