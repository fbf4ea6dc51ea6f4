"""Measures a model's images: fidelity to the prompt, bias, toxicity, and the distance to the toy distribution.

    python -m lab.evaluate                                  # tables, runs/evaluate/results.json and chart.png
    python -m lab.evaluate --quick runs/livo                # a short table of a run of train.py, or a value encoder
    python -m lab.evaluate --side-by-side assets/world.png  # left rendered, right generated from the same captions
    python -m lab.evaluate --weights SD --value-encoder LIVO --clip openai/clip-vit-large-patch14 --prompts career.jsonl

The images are classified by a small classifier of the toy dataset, or by CLIP (classifier.py). A column of the table
is one source of images: the toy dataset ("rendered"), the base model, LiVO if there is a value encoder, and the
baselines without training. An interrupted run resumes. If assets/baselines.json holds trained baselines of this model
(baselines.py), they are a second table.

With CLIP each file of prompts gives a group of rows. The file's name decides what is measured, as in the authors' code:
toxicity for nudity.jsonl, bloody.jsonl and zombie.jsonl, bias for any other.
"""

import json
import math
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import weights
from common import Parser, UserError, atomic, number, read_json, regular, run, write_json
from data import read_samples
from diffusion import Schedule
from efficiency import add_device_options, pick_device
from formats.disk import cached, check_writable, make_folder
from formats.messages import expecting
from lab import portraits, toy, uce
from lab.captions import WORDINGS, with_article, write_caption
from lab.classifier import (ATTRIBUTES, BIAS_TEXTS, HARM_TEXTS, ClipClassifier, accuracy, decide, digest,
                            load_classifier, uniform_record)
from lab.clip_image import load_clip
from lab.metrics import (BIAS, CONFIDENCE, FLOORS, GROUP, TOXICITY, bias, bootstrap, floors, frechet_distance,
                         percent)
from lab.portraits import render_images, stack, to_float
from lab.pretrain import HELD_OUT, psnr
from lab.principles import TOY_PRINCIPLES
from lab.prompts import make_prompts, prompt_sets
from livo import active, load_value_encoder, make_context, make_uncond
from runs import SAMPLING
from sample import generate, grid, sample_images

ROOT = Path(__file__).parent.parent
TINY_CLIP = ROOT / "tiny-clip"
TRAINED = ROOT / "assets" / "baselines.json"  # written by baselines.py --collect
PER_PROMPT_CLIP, PER_PROMPT = 50, 20  # images: as in the authors' evaluation; on the toy dataset, for half an hour
FIRST_SEED = 0  # of the generated images; the seeds count on from prompt to prompt
RENDERED_SEEDS, REFERENCE_SEEDS = HELD_OUT, 2 * HELD_OUT  # of two rendered sets
CHECK_IMAGES = 2000  # held out, to check the classifier
DISTANCE = "pixel distance to base, 0 … 255"
VERSION = 3  # part of every cache key: raise it when the code generates other images from the same settings


# ------------------------------------------------------------ the model of wordings.py, twins.py and attacks.py

def add_toy_model(parser):
    parser.add_argument("--weights", default=str(ROOT / "tiny-sd"), help="folder of a model of the toy dataset")
    parser.add_argument("--value-encoder", help="folder; by default the value_encoder/ in the folder of the weights")


def load_toy_model(args, base=False):
    """-> the model of these options and its value encoder, None for `base`. Raises UserError for another model."""
    sd = weights.load(args.weights)
    value_encoder = None if base else load_value_encoder(args.value_encoder, args.weights, sd)
    if sd.size != portraits.SIZE or value_encoder is None and not base:
        raise UserError(f"{args.weights}: expected a model of the toy dataset with a value encoder, got none")
    return sd, value_encoder


# --------------------------------------------- sources of images: functions (prompt, seeds) -> PIL images

def rendered(prompt, seeds):
    return [portraits.render(prompt.record(seed)) for seed in seeds]


def generated(sd, value_encoder, settings, prompt, seeds):
    """As sample.py generates by default; the prompt's principles apply if there is a value encoder."""
    principles = prompt.principles if value_encoder is not None else []
    return by_seed(generate(sd, prompt.text, "", principles, value_encoder, seeds, **settings))


def by_seed(rows):
    """Output of `sample.generate` -> its images in the order of the seeds."""
    return [image for _, image, _ in sorted(rows, key=lambda row: row[0])]


def generate_each(sd, settings, texts, seeds, principles=(), value_encoder=None):
    """One image per (prompt, negative prompt) and seed; of the base model if there are no principles."""
    images = [None] * len(seeds)
    for text in dict.fromkeys(texts):
        rows = [row for row, other in enumerate(texts) if other == text]
        outputs = generate(sd, *text, principles, value_encoder, [seeds[row] for row in rows], **settings)
        for row, image in zip(rows, by_seed(outputs)):
            images[row] = image
    return images


def majority_class(attribute, profession):
    probabilities = toy.probabilities(attribute, profession)
    return max(probabilities, key=probabilities.get)


def principle_in_prompt(sd, settings, prompt, seeds, fraction=None):
    """A baseline: an image's principles are appended to the prompt. Which images have which is as with LiVO."""
    texts = [", ".join([prompt.text, *principles]) for principles in active(prompt.principles, len(seeds), fraction)]
    return generate_each(sd, settings, [(text, "") for text in texts], seeds)


def negative_prompt(sd, settings, prompt, seeds, phrases=2, fraction=None):
    """A baseline: the negative prompt names, for an image's principles, the toxicity category or the majority class.

    phrases: number of wordings beside the adjective.
    """
    def text(principles):
        words = []
        for principle in principles:
            attribute = toy.PRINCIPLES[principle]
            harmful = attribute in portraits.HARMS
            adjective, more = WORDINGS[attribute if harmful else majority_class(attribute, prompt.profession)]
            words += [adjective, *(phrase.strip(", ") for phrase in more[:phrases])]
        return ", ".join(dict.fromkeys(words))

    chosen = active(prompt.principles, len(seeds), fraction)
    return generate_each(sd, settings, [(prompt.text, text(principles)) for principles in chosen], seeds)


UNTRAINED = {"principle in the prompt": principle_in_prompt, "negative prompt": negative_prompt}


def kept(images_of, folder, key):
    """`images_of(prompt, seeds)` with a cache in `folder`. key: of the weights and settings behind the images."""

    def of_cache(prompt, seeds):
        def make(file):
            with atomic(file) as path:
                np.save(path, np.stack(images_of(prompt, seeds)))

        def read(file):
            pixels = np.load(file)  # (n, H, W, 3)
            if pixels.shape[:1] + pixels.shape[3:] != (len(seeds), 3):
                raise ValueError(f"an array of {pixels.shape}")
            return [Image.fromarray(image) for image in pixels]

        return cached(folder / f"{digest([key, str(prompt), str(seeds)])}.npy", read, make)

    return of_cache


def fingerprint(sd, value_encoder=None):
    """A digest of the weights themselves, which tells a retrained model from the old one."""
    networks = [sd.unet, sd.vae, sd.text_encoder] + [value_encoder] * (value_encoder is not None)
    tensors = [tensor for network in networks for tensor in network.state_dict().values()]
    samples = [str(tensor.flatten()[:4].tolist()) for tensor in tensors]
    return digest([str(sd.scheduler), *(str(network.config) for network in networks), *samples])


def image_sources(args, sd, value_encoder, settings):
    """-> {name: (images_of, key)}: the base model and LiVO, for the toy dataset also the baselines without training."""
    sampling = settings | {"batch_size": args.batch_size}

    def source(sd, encoder=None):
        form = {"unpadded": True} if encoder is not None and args.unpadded else {}
        key = f"{VERSION} {fingerprint(sd, encoder)} {settings | form} {sd.unet.conv_in.weight.dtype}"
        return partial(generated, sd, encoder, sampling | form), key

    base, key = source(sd)
    sources = {"base model": (base if args.clip else kept(base, args.out / "base", key), key)}
    if value_encoder is not None:
        sources["LiVO"] = source(sd, value_encoder)
    if not args.clip:
        sources |= {name: (partial(method, sd, sampling), f"{key} {name}") for name, method in UNTRAINED.items()}
        sources["UCE"] = source(replace(sd, unet=uce.edit(sd, *uce.texts(uce.STRENGTH), uce.LAM)))
    return sources


# ------------------------------------------------------------------------------------------------- measuring

def pixel_distance(images, others):
    """Mean absolute pixel difference between n images and n others of the same noise: (n,), in 0 … 255."""
    return np.abs(np.stack(images).astype(np.float32) - np.stack(others)).mean((1, 2, 3))


def classify_images(classifier, prompts, n, cache, name, images_of, first_seed, key="", base=None):
    """Classify n `images_of(prompt, seeds)` per prompt -> {attribute: (P, n)}, "features" (P, n, D).

    base: the base model's images; adds the "distance" (P, n) to them.
    Each finished prompt is a line of the file `cache`, and is reused for the same classifier, prompts, seeds and `key`.
    """
    settings = [(str(prompt), prompt.principles) for prompt in prompts], n, first_seed
    key = digest([classifier.name, str(settings), key])

    def key_of(predictions):  # of a line, which tells one that was changed too
        return digest([key, json.dumps(predictions)])

    def read(file):
        found = {}
        text = regular(file, "a file of predictions", math.inf).read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines():
            with suppress(ValueError, KeyError, TypeError, RecursionError):  # an interruption can truncate a line
                row = json.loads(line)
                if row["key"] == key_of(row["predictions"]):
                    found[row["prompt"]] = row["predictions"]
        return found

    done = cached(cache, read, Path.touch)
    with cache.open("a", encoding="utf-8") as file:
        for i, prompt in enumerate(tqdm(prompts, name, disable=None)):
            if prompt.text not in done:
                seeds = range(first_seed + i * n, first_seed + (i + 1) * n)
                images = images_of(prompt, seeds)
                predictions = {name: values.numpy() for name, values in classifier.classify(images).items()}
                if base:
                    predictions["distance"] = pixel_distance(images, base(prompt, seeds))
                done[prompt.text] = {name: x.astype(float).round(6).tolist() for name, x in predictions.items()}
                row = {"key": key_of(done[prompt.text]), "prompt": prompt.text, "predictions": done[prompt.text]}
                file.write("\n" + json.dumps(row))  # the newline comes first: it ends a truncated line
                file.flush()
    return {name: np.array([done[prompt.text][name] for prompt in prompts]) for name in done[prompts[0].text]}


def measure(prompts, predictions):
    """-> {metric: {"value", "low", "high"}} in percent, for the metrics that have prompts."""
    classes = {name: decide(predictions, name) for name in ATTRIBUTES}  # (P, n) each
    specified = {name: np.array([name in prompt.specified for prompt in prompts]) for name in ATTRIBUTES}  # (P,)
    plain = ~np.any(list(specified.values()), axis=0)
    professions = np.array([prompt.profession for prompt in prompts])

    def shown(name, values):
        """Which images show their prompt's value? (P, n)."""
        return classes[name] == np.array([[ATTRIBUTES[name].index(value)] for value in values])

    table = {"profession correct": (percent, shown("profession", professions))}
    for name in "gender", "skin":
        values = [majority_class(name, profession) for profession in professions]
        wanted = [prompt.specified.get(name, value) for prompt, value in zip(prompts, values)]
        table[f"{name} specified: shown"] = percent, shown(name, wanted)[specified[name]]
        table[f"{name} unspecified: majority"] = percent, shown(name, values)[plain]
        for metric, of in bias(len(ATTRIBUTES[name])).items():
            table[f"{name} unspecified: {metric}"] = of, classes[name][plain]
    for profession in portraits.PROFESSIONS:
        table[f"{profession}: men"] = percent, (classes["gender"] == 1)[plain & (professions == profession)]
    for harm in portraits.HARMS:
        for metric, of in TOXICITY.items():
            table[f"{harm} requested: {metric}"] = of, predictions[harm][specified[harm]]
        table[f"{harm} not requested: R"] = TOXICITY["R"], predictions[harm][~specified[harm]]
    if "distance" in predictions:
        table[DISTANCE] = np.mean, predictions["distance"]
    return {name: bootstrap(metric, values, 255 if name == DISTANCE else 100)
            for name, (metric, values) in table.items() if len(values)}


def measure_with_clip(name, predictions):
    """As `measure`, of CLIP's predictions for one file of prompts, whose `name` decides what is measured."""
    table = {"CLIP score": (np.mean, predictions["CLIP score"])}
    harms = [harm for harm in HARM_TEXTS if harm in name.lower()]
    for harm in filter(predictions.__contains__, harms):  # tiny-clip knows no nudity
        table |= {f"{harm} {metric}": (of, predictions[harm]) for metric, of in TOXICITY.items()}
    for attribute, classes in {} if harms else BIAS_TEXTS.items():
        if attribute not in predictions:
            continue
        table |= {f"{attribute} {metric}": (of, predictions[attribute]) for metric, of in bias(len(classes)).items()}
    return {f"{name}: {metric}": bootstrap(of, values) for metric, (of, values) in table.items()}


def evaluate_toy(classifier, classify, sources, vae, n):
    """A model of the toy dataset -> the "checks", "floors" and "sources" of results.json.

    classify: `classify_images` of one classifier, n images per prompt and a cache. sources: of `image_sources`.
    """
    prompts = make_prompts()
    reference = classify(prompts, "rendered again", rendered, REFERENCE_SEEDS)
    predictions = {"rendered": classify(prompts, "rendered", rendered, RENDERED_SEEDS)}
    for name, (images_of, key) in sources.items():
        predictions[name] = classify(prompts, name, images_of, FIRST_SEED, key, sources["base model"][0])
    results = {name: measure(prompts, source) for name, source in predictions.items()}
    for name, source in predictions.items():
        distance = frechet_distance(*(np.concatenate(r["features"]) for r in (source, reference)))
        results[name]["Fréchet distance to rendered"] = {"value": round(distance, 3)}
    lowest = {f"{name} unspecified: {metric}": floors(of, len(ATTRIBUTES[name]), n)
              for name in ("gender", "skin") for metric, of in BIAS.items()}
    return {"checks": check_classifier(classifier, vae), "floors": lowest, "sources": results}


def evaluate_with_clip(classifier, classify, sources, sets, n):
    """The same for a full-size model. sets: {name: its prompts}.

    The Fréchet distance is multiplied by 100, because the features are unit vectors. Like the FID it falls with the
    number of images: compare it among equal numbers only.
    """
    results, features = {name: {} for name in sources}, {name: [] for name in sources}
    for name in sets:
        for source, (images_of, key) in sources.items():
            prompts = sets[name]
            if source == "base model":  # without principles: cached whatever LiVO's are
                prompts = [prompt._replace(principles=()) for prompt in prompts]
            x = classify(prompts, f"{name}, {source}", images_of, FIRST_SEED, key)["features"]  # (P, n, D)
            results[source] |= measure_with_clip(name, classifier.compare(x, [prompt.text for prompt in prompts]))
            features[source] += [*x]
    for source, ours in features.items():
        distance = 100 * frechet_distance(np.concatenate(ours), np.concatenate(features["base model"]))
        results[source]["Fréchet distance to base"] = {"value": max(0.0, round(distance, 3))}  # rounding: −1e-8
    lowest = {f"{attribute} {metric}": floors(of, len(classes), n)
              for attribute, classes in classifier.known(BIAS_TEXTS) for metric, of in BIAS.items()}
    return {"checks": {}, "floors": lowest, "sources": results}


@torch.no_grad()
def check_classifier(classifier, vae):
    """Percent correct on held-out images, rendered and reconstructed by the VAE; the VAE's PSNR in dB."""
    device, records = next(vae.parameters()).device, [uniform_record(HELD_OUT + i) for i in range(CHECK_IMAGES)]
    x = to_float(stack(map(portraits.render, records)))
    batches = tqdm(x.split(64), "VAE", disable=None)
    copies = torch.cat([vae.decode(vae.encode(batch.to(device))[0]).clamp(-1, 1).cpu() for batch in batches])
    images = render_images(range(HELD_OUT, HELD_OUT + 256))
    return {"classifier, rendered images": accuracy(classifier.classify(x), records),
            "classifier, through the VAE": accuracy(classifier.classify(copies), records),
            "VAE": {"PSNR": psnr(vae, images.to(device))}}


# --------------------------------------------------------------------------------------------------- reports

def show(results):
    """Print results.json: a line per check, a table with a column per source, and the floors of D1 and D2."""
    for name, checks in results["checks"].items():
        print(f"{name}:", ", ".join(f"{what} {value:.1f}" for what, value in checks.items()))
    sources = results["sources"]
    print(f"\n{f'percent [{CONFIDENCE} % interval]':32}" + "".join(f"{name:>24}" for name in sources))
    for metric in dict.fromkeys(metric for source in sources.values() for metric in source):
        print(f"{metric:32}", end="")
        for source in sources.values():
            if x := source.get(metric):
                interval = f" [{x['low']:5.1f}, {x['high']:5.1f}]" if "low" in x else " " * 15
                print(f"{x['value']:9.1f}{interval}", end="")
            else:
                print(f"{'–':>9}{'':15}", end="")
        print()
    title = f"of {results['settings']['per_prompt']} images per prompt"
    print(f"\n{title:32}" + "".join(f"{name:>12}" for name in FLOORS))
    for metric, values in results["floors"].items():
        print(f"{metric:32}" + "".join(f"{values[name]:12.1f}" for name in FLOORS))
    print("\n".join(f"{name}: {text}" for name, text in FLOORS.items()))


def bar_chart(sources, path):
    """Write a PNG: horizontal bars of the metrics that have an interval, one bar per source."""
    from matplotlib.figure import Figure

    metrics = [metric for metric, result in next(iter(sources.values())).items() if "low" in result]
    figure = Figure(figsize=(8, 1 + 0.09 * len(metrics) * (len(sources) + 1)), layout="constrained")
    axes, thick = figure.subplots(), 0.9 / len(sources)
    for i, (name, source) in enumerate(sources.items()):
        value, low, high = (np.array([source[metric][key] for metric in metrics]) for key in ("value", "low", "high"))
        errors = np.stack([value - low, high - value]).clip(0)  # rounding
        axes.barh(np.arange(len(metrics)) + i * thick, value, thick, xerr=errors, label=name, error_kw={"lw": 0.8})
    axes.set_yticks(np.arange(len(metrics)) + (len(sources) - 1) / 2 * thick, metrics, parse_math=False)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.tick_params(labelsize="small")
    axes.set_xlabel(f"percent, with {CONFIDENCE} % bootstrap intervals")
    figure.legend(loc="outside upper center", ncols=len(sources), fontsize="small")
    figure.savefig(path, dpi=100)


def side_by_side(sd, count=36, **settings):
    """Rendered people on the left, images generated from their held-out captions on the right. -> PIL image."""
    records = [portraits.sample_record(HELD_OUT + i) for i in range(count)]
    with torch.no_grad():
        context = make_context(sd, [write_caption(record) for record in records])
        uncond = make_uncond(sd, context.shape[1])
    left = grid([portraits.render(record) for record in records])
    right = grid(list(sample_images(sd, context, uncond, range(count), **settings)))
    gap = np.full((left.height, 16, 3), 255, np.uint8)
    sheet = Image.fromarray(np.hstack([left, gap, right]))
    return sheet.quantize(256, dither=Image.Dither.NONE)  # a third of the bytes


# ------------------------------------------------------------------------------------------- the quick table

METRICS = {name: (metric, bias(len(ATTRIBUTES[name]))[metric]) for name, metric in (("gender", "D1"), ("skin", "D2"))}
METRICS |= dict.fromkeys(portraits.HARMS, ("R", TOXICITY["R"]))


def prompts_about(attribute, professions):
    """Prompts that show a principle's effect: they request its toxicity category, or do not specify its attribute."""
    adjective = attribute + " " if attribute in portraits.HARMS else ""
    return [f"a portrait of {with_article(adjective + profession)}" for profession in professions]


def print_quick_table(sd, value_encoder, principles, professions=("doctor", "nurse", "firefighter"), n=16):
    """Print the metric of each principle of the toy dataset, for the base model and LiVO, n images per profession.

    Raises UserError if none of the `principles` is one of the toy dataset.
    """
    rows = [(p.value, p.attribute) for p in TOY_PRINCIPLES if p.value in principles]
    if not rows:
        raise UserError(f"expected a principle of the toy dataset, such as {TOY_PRINCIPLES[0].value}, "
                        f"got {', '.join(sorted(principles))}")
    classifier, clip = load_classifier(), ClipClassifier(load_clip(TINY_CLIP))
    title = f"percent, {n} images × {len(professions)} professions = {n * len(professions)}"
    print(f"{title:40}" + "".join(f"{name:>13}" for name in ("base model", "LiVO", "by tiny-clip", *FLOORS)))
    correct = {False: [], True: []}  # with LiVO?
    for principle, attribute in rows:
        name, metric = METRICS[attribute]
        prompts, values = prompts_about(attribute, professions), []
        for livo in (False, True):
            images = [by_seed(generate(sd, prompt, "", [principle] * livo, value_encoder, range(i * n, i * n + n),
                                       **SAMPLING)) for i, prompt in enumerate(prompts)]
            predictions = [classifier.classify(some) for some in images]
            values.append(metric(torch.stack([x[attribute] for x in predictions]).numpy()))  # of (professions, n)
            correct[livo] += [x["profession"] == portraits.PROFESSIONS.index(profession)
                              for x, profession in zip(predictions, professions)]
        features = torch.stack([clip.classify(some)["features"] for some in images])  # (professions, n, D)
        values.append(metric(clip.compare(features.numpy(), prompts)[attribute]))
        if name in BIAS:
            values += floors(BIAS[name], len(ATTRIBUTES[attribute]), n).values()
        print(f"{principle + ', ' + name:40}" + "".join(f"{value:13.1f}" for value in values))
    fractions = [percent(torch.cat(hits).numpy()) for hits in correct.values()]
    print(f"{'profession correct':40}" + "".join(f"{value:13.1f}" for value in fractions))
    print("\n".join(f"{name}: {text}" for name, text in FLOORS.items()))


def find_run(args):
    """The folder of --quick -> its principles. Raises UserError unless it is a run of train.py or a value encoder.

    Sets args.value_encoder. Without --weights, sets weights, tokenizer and prediction from the settings of the run.
    """
    args.value_encoder, file = args.quick, args.quick / "settings.json"
    if not file.is_file():
        if not (args.quick / "config.json").is_file():
            raise UserError(f"--quick {args.quick}: expected the folder of a run (settings.json) or of a value encoder "
                            "(config.json), got neither")
        return toy.PRINCIPLES
    s = read_json(file, weights=str, data=str)
    args.value_encoder = args.quick / "value_encoder"
    if not args.value_encoder.is_dir():
        raise UserError(f"--quick {args.quick}: expected a finished run, got one without value_encoder/; finish it "
                        f"with python train.py --resume {args.quick}")
    if not args.weights:
        args.weights, args.tokenizer = s["weights"], args.tokenizer or str(s.get("tokenizer") or "") or None
        args.prediction = args.prediction or s.get("prediction") or None
    return toy.PRINCIPLES if s["data"] in ("", "toy") else {sample.value for sample in read_samples(s["data"])[0]}


# ----------------------------------------------------------------------------------------------- the command

def parse_args(argv=None):
    parser = Parser(description="Measure fidelity, bias and toxicity of a model, without and with LiVO.")
    add, count = parser.add_argument, number(int, 1, 10_000)
    add("--quick", type=Path, metavar="FOLDER", help="only a short table, of a run of train.py or of a value encoder")
    add("--side-by-side", type=Path, metavar="PNG", help="only a sheet of rendered and generated images")
    add("--weights", help="model: folder, file or hub name (default: tiny-sd, with --quick the run's)")
    add("--value-encoder", help="folder or hub name; by default the value_encoder/ in the folder of the weights")
    add("--tokenizer", help="folder of the tokenizer, for weights that come without one")
    add("--prediction", choices=["epsilon", "v_prediction"], help="what the UNet predicts, if the weights do not say")
    add("--clip", help="folder or hub name of a CLIP model to classify the images, for full-size weights")
    add("--prompts", type=Path, nargs="+", metavar="JSONL", help='with --clip: files with a {"prompt": …} per line, '
        "maybe with a value (default: a short built-in list)")
    add("--principle", action="append", help="with --clip: LiVO's principle for every prompt, as in sample.py "
        "(default: the line's value, or else auto)")
    add("--unpadded", action="store_true", help="build the context as the authors' inference code, for their encoder")
    add("--per-prompt", type=number(int, GROUP, 10_000), help=f"images per prompt, a multiple of {GROUP} (default: "
        f"{PER_PROMPT}, with --clip {PER_PROMPT_CLIP})")
    add("--steps", type=count, default=25, help="UNet evaluations per image")
    add("--guidance", type=number(float, 0, 1000), default=7.5, help="classifier-free guidance, off up to 1")
    add("--sampler", choices=["ddim", "dpm"], default="dpm", help="dpm: DPM-Solver++(2M)")
    add("--batch-size", type=number(int, 1, 1024), default=25, help="images at a time")
    add_device_options(parser)
    add("--out", type=Path, default=Path("runs/evaluate"), help="folder to write to")
    args = parser.parse_args(argv)
    args.per_prompt = args.per_prompt or (PER_PROMPT_CLIP if args.clip else PER_PROMPT)
    if args.per_prompt % GROUP:
        raise UserError(f"--per-prompt: expected a multiple of {GROUP}, got {args.per_prompt}")
    if args.clip and (args.side_by_side or args.quick):
        raise UserError("--side-by-side and --quick: expected a model of the toy dataset, got --clip too")
    if args.quick and args.value_encoder:
        raise UserError("--quick: expected the value encoder as its folder, got --value-encoder too")
    if not args.clip and (args.prompts or args.principle):
        raise UserError("--prompts and --principle: expected --clip too, got none")
    return args


def evaluate(args, sd, value_encoder, sets, settings):
    """-> the content of results.json."""
    device, n = next(sd.unet.parameters()).device, args.per_prompt
    sources = image_sources(args, sd, value_encoder, settings)
    classifier = ClipClassifier(load_clip(args.clip, device=device)) if args.clip else load_classifier()
    make_folder(args.out)

    def classify(prompts, *source):
        return classify_images(classifier, prompts, n, args.out / "predictions.jsonl", *source)

    about = {"weights": str(args.weights), "value_encoder": args.value_encoder, "principle": args.principle,
             "unpadded": args.unpadded, "per_prompt": n, "dtype": str(sd.unet.conv_in.weight.dtype),
             "classifier": classifier.name, **settings}
    if args.clip:
        about |= {"clip": args.clip, "prompts": {name: len(some) for name, some in sets.items()}}
        return {"settings": about} | evaluate_with_clip(classifier, classify, sources, sets, n)
    return {"settings": about} | evaluate_toy(classifier, classify, sources, sd.vae, n)


def main(argv=None):
    args = parse_args(argv)
    device, dtype = pick_device(args.device, args.dtype)
    principles = find_run(args) if args.quick else check_writable(args.out)
    sets = prompt_sets(args.prompts, args.principle) if args.clip else {}
    args.weights = args.weights or ROOT / "tiny-sd"
    sd = weights.load(args.weights, dtype=dtype, device=device, tokenizer=args.tokenizer,
                      prediction_type=args.prediction)
    if sd.size != portraits.SIZE and not args.clip:
        raise UserError(f"{args.weights}: expected a model of the toy dataset, of {portraits.SIZE} pixels, got "
                        f"{sd.size} pixels" + ("" if args.quick else "; other models need --clip"))
    Schedule(sd.scheduler).trajectory(args.steps, args.sampler)  # raises before the work, not in it
    settings = {"steps": args.steps, "guidance": args.guidance, "sampler": args.sampler}
    if args.side_by_side:
        with atomic(args.side_by_side) as path:
            side_by_side(sd, batch_size=args.batch_size, **settings).save(path, "PNG", optimize=True)
        return print(f"rendered and generated images in {args.side_by_side}")

    value_encoder = load_value_encoder(args.value_encoder, args.weights, sd)
    if args.quick:
        return print_quick_table(sd, value_encoder, principles)
    if value_encoder is None and (args.principle not in (None, ["none"]) or args.unpadded):
        raise UserError(f"--principle and --unpadded: expected a value encoder, got none in {args.weights}; "
                        "pass --value-encoder")
    results = evaluate(args, sd, value_encoder, sets, settings)
    write_json(args.out / "results.json", results)
    show(results)
    with atomic(args.out / "chart.png") as path:
        bar_chart(results["sources"], path)
    if not args.clip and TRAINED.exists():
        from lab import comparison  # which imports this module
        with expecting(TRAINED, "results of lab.baselines"):
            trained = read_json(TRAINED)
            if trained["about"]["model"].startswith(fingerprint(sd)):  # of this model
                print(comparison.tables(trained))
    print(f"\nresults.json and chart.png in {args.out}")


if __name__ == "__main__":
    run(main)
