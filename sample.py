"""Text-to-image with Stable Diffusion and LiVO's value tokens.

    python sample.py --prompt "a photograph of a cat" -n 4 --out cats       # cats/0000.png … 0003.png, cats/grid.png
    python sample.py --prompt "a portrait of a judge" --principle "gender equality" -n 8 --compare

Each image starts from a CPU generator of its own, so up to rounding it depends neither on the batch size nor on the
device. Which images get a bias principle's token depends on their row, `livo.active`. A PNG carries its prompt, seed
and other settings as text metadata. With `--principle auto`, the default, the retriever finds the principles that apply
to the prompt (retrieve.py).
"""

import formats.missing  # first: a package that is not installed gives one line, not a traceback
import math
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import livo
import weights
from common import Parser, UserError, atomic, number, run
from diffusion import Schedule, denoise, sample_noise
from efficiency import add_device_options, compile_unet, pick_device
from livo import active, load_value_encoder
from retrieve import TOXIC, retrieve

MAX_SCALE = 4  # height and width of an image at most, in sizes of the training's
MAX_PRINCIPLES = 16  # value tokens, beside 77 of the prompt
BATCH_SIZE, BATCH_PIXELS = 4, 4 * 64**2  # images at a time; more of small ones, as many latent pixels as 4 of 512×512


@torch.no_grad()
def to_images(vae, latents, batch_size=BATCH_SIZE):
    """latents (B, 4, h, w) -> B PIL images, 8 times as large in SD. Raises UserError for NaN, not a black image."""
    images = []
    for z in latents.split(batch_size):  # the decoder has the largest feature maps of all
        x = vae.decode(z.to(next(vae.parameters()).dtype))  # (b, 3, H, W), about [-1, 1]
        if not x.isfinite().all():
            raise UserError("expected finite pixels, got NaN or infinity: "
                            "the weights are damaged, or too large for half precision (try --dtype fp32)")
        x = ((x.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte()
        images += [Image.fromarray(image) for image in x.permute(0, 2, 3, 1).cpu().numpy()]
    return images


def latent_size(sd, height=None, width=None):
    """Pixels -> (h, w) of the latents. None is the size that the model was trained at."""
    f, default = sd.vae.config.factor, sd.unet.config.sample_size
    for name, pixels in ("height", height), ("width", width):
        if pixels is not None and (pixels % f or not 1 <= pixels <= MAX_SCALE * sd.size):
            raise UserError(f"--{name}: expected a multiple of {f} up to {MAX_SCALE * sd.size} pixels, got {pixels}")
    return (height // f if height else default), (width // f if width else default)


def sample_images(sd, context, uncond, seeds, *, height=None, width=None, batch_size=BATCH_SIZE,
                  after_step=lambda b: None, **settings):
    """Yield one PIL image for each of the N seeds, batch by batch.

    context, uncond: (N, L, C), or (1, L, C) for all seeds; the same L. height, width: in pixels.
    after_step(b): called after every step of a batch of b. settings: steps, guidance, sampler, eta, deep_every of
        `denoise`.
    """
    h, w = latent_size(sd, height, width)
    schedule, device = Schedule(sd.scheduler), next(sd.unet.parameters()).device
    context, uncond = context.expand(len(seeds), -1, -1), uncond.expand(len(seeds), -1, -1)
    for start in range(0, len(seeds), batch_size):
        rows = slice(start, start + batch_size)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[rows]]
        latents = sample_noise(generators, (sd.unet.config.in_channels, h, w), device)
        for latents in denoise(sd.unet, schedule, latents, context[rows], uncond[rows],
                               generators=generators, **settings):
            after_step(len(latents))
        yield from to_images(sd.vae, latents)


def generate(sd, prompt, negative, principles, value_encoder, seeds, *, fraction=None, unpadded=False, **settings):
    """Yield (row, PIL image, its principles) for each of the seeds, in batches of equal principles.

    fraction: of the images that get a value token. By default 0.5 for bias principles, so that the majority class and
        the others balance, and 1 for toxic ones (livo.active).
    unpadded: the context of the authors' inference code. settings: see `sample_images`.
    """
    of_row = active(principles, len(seeds), fraction)  # the principles of each image
    for chosen in sorted(set(of_row), key=len):  # images of equal principles have equal contexts
        rows = [row for row in range(len(seeds)) if of_row[row] == chosen]
        form = livo  # the module whose make_context and make_uncond are used
        if unpadded and chosen:
            from formats import unpadded as form
        with torch.no_grad():
            context = form.make_context(sd, [prompt], chosen, value_encoder)  # (1, P + 77, C)
            uncond = form.make_uncond(sd, context.shape[1], negative)
        images = sample_images(sd, context, uncond, [seeds[row] for row in rows], **settings)
        for row, image in zip(rows, images):
            yield row, image, chosen


def grid(images):
    """PIL images of one size on a sheet, row by row: a full rectangle, the squarest if it is at most twice as wide."""
    n, (width, height) = len(images), images[0].size
    full = [rows for rows in range(1, math.isqrt(n) + 1) if n % rows == 0 and n // rows <= 2 * rows]
    columns = n // full[-1] if full else math.ceil(math.sqrt(n))
    sheet = Image.new("RGB", (columns * width, math.ceil(n / columns) * height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


def captioned(rows):
    """[(caption, PIL images of one size)] -> a sheet, each caption above its row."""
    font, (width, height), strip = ImageFont.load_default(), rows[0][1][0].size, 16
    rows = [(" ".join(caption.split())[:200], images) for caption, images in rows]
    widths = [max(len(images) * width, math.ceil(font.getlength(caption)) + 8) for caption, images in rows]
    sheet = Image.new("RGB", (max(widths), len(rows) * (height + strip)), "white")
    for row, (caption, images) in enumerate(rows):
        top = row * (height + strip)
        ImageDraw.Draw(sheet).text((4, top + 2), caption, "black", font)
        for column, image in enumerate(images):
            sheet.paste(image, (column * width, top + strip))
    return sheet


def save_png(image, path, settings):
    """Write a PNG with `settings` as text metadata, atomically."""
    info = PngInfo()
    for key, value in settings.items():
        info.add_text(key, str(value).encode(errors="replace").decode())  # a path may be no Unicode
    with atomic(path) as temporary:
        image.save(temporary, pnginfo=info)


def automatic(found):
    """The principles that "auto" applies, of those that a retriever found.

    The toxic ones, or the bias principles if there are none. In training a context has one value token: beside a toxic
    principle's token those of bias principles change less, and more images are damaged.
    """
    return [principle for principle in found if principle in TOXIC] or found


def choose_principles(choices, prompt):
    """The option --principle -> the principles to apply.

    "none" is none. "auto" is `automatic` of what the retriever finds.
    Raises UserError for a blank choice, or "none" beside others.
    """
    choices = [choice.strip() for choice in choices]
    choices = [choice.lower() if choice.lower() in ("auto", "none") else choice for choice in choices]
    if "" in choices or "none" in choices and len(choices) > 1:
        raise UserError(f"--principle: expected auto, none alone, or a text, got {', '.join(map(repr, choices))}")
    auto = automatic(retrieve(prompt))
    chosen = [{"auto": auto, "none": []}.get(choice, [choice]) for choice in choices]
    chosen = list(dict.fromkeys(principle for some in chosen for principle in some))
    if len(chosen) > MAX_PRINCIPLES:
        raise UserError(f"--principle: expected at most {MAX_PRINCIPLES}, got {len(chosen)}")
    return chosen


def find_value_encoder(args, sd):
    """-> the principles to apply and the value encoder. Raises UserError where a principle is asked for without one."""
    principles = choose_principles(args.principle or ["auto"], args.prompt)
    needed = principles or args.value_encoder  # the latter may be wrong
    value_encoder = load_value_encoder(args.value_encoder, args.weights, sd) if needed else None
    if principles and value_encoder is None:
        if wanted := [choice for choice in args.principle or () if choice.strip().lower() not in ("auto", "none")]:
            raise UserError(f"--principle {wanted[0]}: expected a value encoder, got none in {args.weights}; "
                            "pass --value-encoder")
        print(f"{', '.join(principles)} would apply, but the weights have no value encoder")
        principles = []
    print("principle:", ", ".join(principles) or "none")
    return principles, value_encoder


def parse_args(argv=None):
    parser = Parser(description="Generate images from a prompt with Stable Diffusion, and from a principle with LiVO.")
    add, count = parser.add_argument, number(int, 1, 10_000)
    add("--prompt", required=True, help="what to generate; may be empty")
    add("--negative", default="", help="negative prompt, with --guidance above 1")
    add("--principle", action="append", help="auto, none or a text such as 'gender equality'; given more than once, "
        "one value token each; auto retrieves from the prompt (default: auto)")
    add("--value-encoder", help="folder or hub name; by default the value_encoder/ in the folder of the weights")
    add("--value-fraction", type=number(float, 0, 1), help="fraction of the images that get the value token (default: "
        "0.5 for bias principles, 1 for others)")
    add("--unpadded", action="store_true", help="build the context as the authors' inference code, for their encoder")
    add("--compare", action="store_true", help="also compare.png: base model above, LiVO below, from the same noise")
    add("--weights", default=Path(__file__).parent / "tiny-sd", help="model: folder, file or hub name")
    add("--tokenizer", help="folder of the tokenizer, for weights that come without one")
    add("--prediction", choices=["epsilon", "v_prediction"], help="what the UNet predicts, if the weights do not say")
    add("--steps", type=count, default=50, help="denoising steps")
    add("--guidance", type=number(float, 0, 1000), default=7.5, help="classifier-free guidance, off up to 1")
    add("--sampler", choices=["ddim", "dpm"], default="ddim", help="dpm: DPM-Solver++(2M)")
    add("--eta", type=number(float, 0, 1), default=0.0, help="ddim: fresh noise per step")
    add("--seed", type=number(int, 0, 2**63), default=0, help="of the first image")
    add("-n", type=count, default=1, help="number of images")
    add("--batch-size", type=number(int, 1, 1024), help=f"images at a time (default: {BATCH_SIZE}, more of small ones)")
    for side in ("--height", "--width"):
        add(side, type=number(int, 1, 2**14), help="in pixels; by default as in training")
    add_device_options(parser)
    add("--deep-every", type=count, default=1, help="compute the UNet's lower resolutions in every so many steps alone "
        "(DeepCache): 3 is 1.5 times as fast and changes the image a little")
    add("--compile", action="store_true", help="torch.compile the UNet: a minute or more at first, then faster")
    add("--out", type=Path, default=Path("out"), help="folder to write to")
    args = parser.parse_args(argv)
    if args.eta and args.sampler == "dpm":
        raise UserError("--eta: expected 0 with --sampler dpm, got more")
    if args.compile and args.deep_every > 1:  # which calls the UNet's blocks, not the compiled UNet
        raise UserError("--compile: expected it without --deep-every, got both")
    return args


def main(argv=None):
    from formats.disk import check_writable  # imported late, as the method does not need it
    args = parse_args(argv)
    device, dtype = pick_device(args.device, args.dtype)
    check_writable(args.out)
    sd = weights.load(args.weights, dtype=dtype, device=device, tokenizer=args.tokenizer,
                      prediction_type=args.prediction)
    if args.compile:
        compile_unet(sd.unet)
    Schedule(sd.scheduler).trajectory(args.steps, args.sampler)  # raise before the work, not in it
    f, (h, w) = sd.vae.config.factor, latent_size(sd, args.height, args.width)
    principles, value_encoder = find_value_encoder(args, sd)

    settings = {"height": h * f, "width": w * f, "steps": args.steps, "guidance": args.guidance,
                "sampler": args.sampler, "eta": args.eta, "deep_every": args.deep_every}
    texts = {"prompt": args.prompt, "negative": args.negative, **settings, "dtype": sd.unet.conv_in.weight.dtype,
             "weights": args.weights, "prediction": sd.scheduler["prediction_type"]}
    if value_encoder is not None:
        texts |= {"value_encoder": args.value_encoder or "beside the weights", "value_fraction": args.value_fraction,
                  "unpadded": args.unpadded}
    seeds, counts = range(args.seed, args.seed + args.n), Counter()  # counts: images of each principle
    images, base_images = [None] * args.n, [None] * args.n
    with tqdm(total=args.n * args.steps * (1 + args.compare), disable=None) as bar:  # None: if stderr is no terminal
        settings |= {"fraction": args.value_fraction, "unpadded": args.unpadded, "after_step": bar.update,
                     "batch_size": args.batch_size or max(BATCH_SIZE, BATCH_PIXELS // (h * w))}
        of_prompt = partial(generate, sd, args.prompt, args.negative, seeds=seeds, **settings)
        for row, image, chosen in of_prompt(principles, value_encoder):
            images[row] = image
            counts.update(chosen)
            save_png(image, args.out / f"{row:04}.png",
                     texts | {"seed": seeds[row], "principle": ", ".join(chosen) or "none"})
        if args.compare:
            for row, image, _ in of_prompt([], None):
                base_images[row] = image

    texts |= {"seed": args.seed, "n": args.n, "principle": ", ".join(principles) or "none"}
    if args.n > 1:
        save_png(grid(images), args.out / "grid.png", texts)
    if args.compare:
        caption = "; ".join(f"{principle}, in {counts[principle]} of {args.n}" for principle in principles)
        rows = [("without a principle", base_images), (caption or "none", images)]
        save_png(captioned(rows), args.out / "compare.png", texts)
    print(f"{args.n} image{'s' * (args.n > 1)} in {args.out}")


if __name__ == "__main__":
    run(main)
