"""Pictures from prompts: noise schedule, samplers, classifier-free guidance, and the command that uses them.

    python sample.py --prompt "a photograph of a cat" -n 4 --out cats

writes cats/0000.png … 0003.png and cats/grid.png. Each file carries its prompt, seed and other settings as
text metadata. The picture of a seed depends neither on the batch size nor on the device that drew it (up to
rounding): the noise comes from one CPU generator per picture. Principles that apply to the prompt are found by
the retriever and followed by LiVO's value encoder, where there is one (livo.py).

x_t = √ᾱ_t x0 + √(1 - ᾱ_t) ε is a latent at time t; ᾱ, in code `abar`, falls from 1, clean, to 0, noise.
"""

import math
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import weights
from common import (Parser, UserError, add_device_options, atomic, check_writable, comparison, grid, number, pick_device,
                    run)
from livo import ValueEncoder, make_context, make_uncond
from retrieve import TOXIC, is_bias, retrieve

# What a scheduler_config.json may ask for, and the one answer there is to each here. A file without the key
# means that answer too. DDIM never looks at the second group, whichever scheduler the file was written for.
ONLY = {"trained_betas": None, "rescale_betas_zero_snr": False, "thresholding": False}
ONLY_DPM = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint",
            "final_sigmas_type": "zero", "use_karras_sigmas": False, "use_exponential_sigmas": False,
            "use_beta_sigmas": False, "use_lu_lambdas": False, "use_flow_sigmas": False}


def require(config, only):
    for key, answer in only.items():
        if config.get(key) not in (None, answer):
            raise UserError(f"scheduler_config.json: {key} {config[key]} is not supported, only {answer}")


class Schedule:
    """The noise levels that a model was trained at, from the dictionary in its scheduler_config.json.

    A missing key means what it means to diffusers' DDIMScheduler, and two keys are never read, because
    diffusers' pipeline overrules them: steps_offset is 1 and clip_sample is False. Raises UserError for
    what is not supported.
    """

    def __init__(self, config):
        require(config, ONLY)
        kind, power = config.get("beta_schedule", "linear"), {"linear": 1, "scaled_linear": 0.5}
        if kind not in power:
            raise UserError(f"scheduler_config.json: beta_schedule {kind} is not one of {', '.join(power)}")
        start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
        times = config.get("num_train_timesteps", 1000)
        betas = torch.linspace(start ** power[kind], end ** power[kind], times) ** (1 / power[kind])
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0)  # (T,) float32, on the CPU
        self.final = torch.tensor(1.0) if config.get("set_alpha_to_one", True) else self.alphas_cumprod[0]
        self.prediction_type = config.get("prediction_type", "epsilon")
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(f"prediction type {self.prediction_type} is not one of epsilon, v_prediction")
        self.config = config

    def timesteps(self, steps, sampler="ddim"):
        """The times at which to ask the UNet, most noise first: `steps` integers of 0 … T-1.

        Spacings as named in arXiv 2305.08891, table 2. Raises UserError if so many steps do not fit.
        """
        T = len(self.alphas_cumprod)
        spacing = self.config.get("timestep_spacing", "leading" if sampler == "ddim" else "linspace")
        misfit = UserError(f"{steps} steps do not fit the model's {T} times ({sampler}, {spacing} spacing)")
        if not 1 <= steps <= T:
            raise misfit
        points = steps + (sampler == "dpm")  # DPM-Solver's grid includes the clean end, with no UNet
        if spacing == "leading":
            t = np.arange(points)[::-1] * (T // points) + 1
        elif spacing == "linspace":
            t = np.linspace(0, T - 1, points).round()[::-1]
        elif spacing == "trailing":
            t = np.arange(T, 0, -T / steps).round() - 1
        else:
            raise UserError(f"timestep_spacing {spacing} is not one of leading, linspace, trailing")
        t = t[:steps].astype(int).tolist()
        if t[0] >= T or len(set(t)) < steps:
            raise misfit
        return t

    def trajectory(self, steps, sampler="ddim"):
        """The steps to take: a list of (t, ᾱ at t, ᾱ to go to)."""
        t = self.timesteps(steps, sampler)
        abar = self.alphas_cumprod[t]  # (steps,)
        if sampler == "dpm":
            require(self.config, ONLY_DPM)
            return list(zip(t, abar, [*abar[1:], torch.tensor(1.0)]))
        # A constant stride, as in diffusers. Where T is no multiple of `steps`, that is not quite the next t.
        after = [i - len(self.alphas_cumprod) // steps for i in t]
        return list(zip(t, abar, [self.alphas_cumprod[i] if i >= 0 else self.final for i in after]))


def x0_and_eps(output, x, abar, prediction_type):
    """What the UNet's output at x_t says of x0 and of ε. v = √ᾱ ε - √(1-ᾱ) x0: arXiv 2202.00512, app. D."""
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    if prediction_type == "v_prediction":
        return alpha * x - sigma * output, alpha * output + sigma * x
    return (x - sigma * output) / alpha, output


def ddim_step(x0, eps, abar, abar_prev, eta=0.0, noise=None):
    """From ᾱ to the cleaner ᾱ_prev: DDIM, arXiv 2010.02502, eq. 12, with σ of eq. 16.

    eta: 0 is deterministic, 1 is DDPM; above 0 it needs noise ~ N(0, 1) of the latents' shape.
    """
    sigma = eta * ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)).sqrt()
    x = abar_prev.sqrt() * x0 + (1 - abar_prev - sigma**2).sqrt() * eps
    return x + sigma * noise if eta else x


def dpm_step(x0, x, abar, abar_prev, last=None):
    """From ᾱ to the cleaner ᾱ_prev: DPM-Solver++(2M), arXiv 2211.01095, algorithm 2.

    last: (x0, ᾱ) of the step before, None on the first. In the paper's λ = log(√ᾱ / √(1-ᾱ)), the line through
    two x0 is drawn on to the middle of the step. Given that x0, the update is the deterministic DDIM's.
    The last step, to ᾱ_prev = 1, is infinitely long in λ and takes x0 as it is.
    """
    if last is not None and abar_prev < 1:
        x0_last, abar_last = last
        half_step = (abar_prev.logit() - abar.logit()) / 2  # logit(ᾱ) = 2λ: the factor cancels
        x0 = x0 + half_step / (abar.logit() - abar_last.logit()) * (x0 - x0_last)
    eps = (x - abar.sqrt() * x0) / (1 - abar).sqrt()
    return ddim_step(x0, eps, abar, abar_prev)


def sample_noise(generators, shape, device="cpu"):
    """N(0, 1) float32, row i from CPU generator i: (B, *shape)."""
    return torch.cat([torch.randn((1, *shape), generator=g) for g in generators]).to(device)


def one_launch(unet, x, keys_values):
    """`unet(x, time, keys_values)` as a function of x and time, (1, 4C). On a GPU it is recorded, and replayed by one
    launch: the thousand or so of a small batch take longer than the work that they start."""

    def call(x, time):
        return unet(x, time, keys_values)

    if not x.is_cuda:
        return call
    return torch.cuda.make_graphed_callables(call, (x.clone(), unet.embed(torch.zeros(1, device=x.device))))


@torch.no_grad()
def denoise(unet, schedule, latents, context, uncond=None, *, steps, guidance=7.5, sampler="ddim", eta=0.0,
            generators=None):
    """Yield the latents (B, 4, h, w) float32 after each of `steps` steps, from noise to pictures.

    context, uncond: (B, L, C), of the prompts and of what to steer away from. guidance above 1 is
    classifier-free guidance, arXiv 2207.12598 (its w + 1); up to 1 it is off, and `uncond` unused.
    generators: one per row, the source of the noise if eta > 0 (ddim only).
    """
    guided = guidance > 1
    keys_values = unet.keys_values(torch.cat([uncond, context]) if guided else context)
    dtype = next(unet.parameters()).dtype
    call = one_launch(unet, latents.to(dtype), keys_values)
    trajectory = schedule.trajectory(steps, sampler)
    times = unet.embed(torch.tensor([t for t, _, _ in trajectory], device=latents.device))  # (steps, 4C)
    x, last = latents, None
    for time, (_, abar, abar_prev) in zip(times.split(1), trajectory):
        output = call(x.to(dtype), time).float()
        if guided:
            out_uncond, out_cond = output.chunk(2)  # (2B, 4, h, w) -> (B, 4, h, w) each
            output = out_uncond + guidance * (out_cond - out_uncond)
        x0, eps = x0_and_eps(output, x, abar, schedule.prediction_type)
        if sampler == "dpm":
            x, last = dpm_step(x0, x, abar, abar_prev, last), (x0, abar)
        else:
            noise = sample_noise(generators, x.shape[1:], x.device) if eta else None
            x = ddim_step(x0, eps, abar, abar_prev, eta, noise)
        yield x


@torch.no_grad()
def to_images(vae, latents, batch_size=4):
    """latents (B, 4, h, w) -> B PIL images of 8h × 8w pixels. NaN is a UserError, not a black picture."""
    images = []
    for z in latents.split(batch_size):  # the decoder's maps are the largest tensors of all
        x = vae.decode(z.to(next(vae.parameters()).dtype))  # (b, 3, 8h, 8w), about [-1, 1]
        if not x.isfinite().all():
            raise UserError("the picture came out as NaN or infinity: "
                            "the weights are damaged, or too large for half precision (try --dtype fp32)")
        x = ((x.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte()
        images += [Image.fromarray(picture) for picture in x.permute(0, 2, 3, 1).cpu().numpy()]
    return images


def latent_size(sd, height=None, width=None):
    """Pixels -> (h, w) of the latents; None means the size the model was trained at."""
    f, default = sd.vae.config.factor, sd.unet.config.sample_size
    for name, pixels in ("height", height), ("width", width):
        if pixels is not None and (pixels < 1 or pixels % f):
            raise UserError(f"{name} {pixels} is not a positive multiple of {f} pixels")
    return (height // f if height else default), (width // f if width else default)


def sample_images(sd, context, uncond, seeds, *, height=None, width=None, batch_size=4, after_step=lambda b: None,
             **settings):
    """Yield one PIL image per seed, as their batches get done.

    context, uncond: (N, L, C) with one row for each of the N seeds, or (1, L, C) for all of them; both of the
    same L. height, width in pixels. after_step(b) is called after every step of a batch of b, for a progress
    bar. settings: `steps`, `guidance`, `sampler`, `eta`, as for `denoise`.
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


def save_png(image, path, settings):
    """Write a PNG that carries `settings` as text, or nothing."""
    info = PngInfo()
    for key, value in settings.items():
        info.add_text(key, str(value))
    with atomic(path) as temporary:
        image.save(temporary, pnginfo=info)


def choose_principles(choices, prompt):
    """The option --principle -> the principles to apply. "none" is none; "auto" takes what the prompt calls for: the
    toxic principles, or those of bias where there are none. A value encoder learns one principle at a time, and
    the token of a harm is too weak beside two others. Raises UserError for a blank one, or "none" beside others."""
    choices = [choice.strip() for choice in choices]
    choices = [choice.lower() if choice.lower() in ("auto", "none") else choice for choice in choices]
    if "" in choices or "none" in choices and len(choices) > 1:
        raise UserError(f"--principle: expected auto, none alone, or a text, got {', '.join(map(repr, choices))}")
    found = retrieve(prompt)
    auto = [principle for principle in found if principle in TOXIC] or found
    chosen = []
    for choice in choices:
        chosen += {"auto": auto, "none": []}.get(choice, [choice])
    return list(dict.fromkeys(chosen))


def spread(n, share):
    """Which of n pictures get a value token: `share` of them, rounded, evenly spread; a list of n booleans."""
    passed = [math.floor(i * share + 0.5) for i in range(n + 1)]
    return [after > before for before, after in zip(passed, passed[1:])]


def generate(sd, prompt, negative, principles, value_encoder, seeds, *, share=None, unpadded=False, **settings):
    """Yield (row, PIL image, its principles) for each of the seeds, in batches of equal principles.

    share: of the pictures that get a value token; None is 0.5 for the bias principles, so that the over- and
    the under-produced attribute balance, and 1 for the others. settings: see `sample_images`.
    """
    gets = {p: spread(len(seeds), (0.5 if is_bias(p) else 1) if share is None else share) for p in principles}
    active = [tuple(p for p in principles if gets[p][row]) for row in range(len(seeds))]
    for chosen in sorted(set(active), key=len):
        rows = [row for row in range(len(seeds)) if active[row] == chosen]
        form = unpadded and bool(chosen)  # without a principle it is the frozen model's own
        with torch.no_grad():
            context = make_context(sd, [prompt], chosen, value_encoder, unpadded=form)  # (1, L, C)
            uncond = make_uncond(sd, context.shape[1], negative, form)
        images = sample_images(sd, context, uncond, [seeds[row] for row in rows], **settings)
        for row, image in zip(rows, images):
            yield row, image, chosen


def load_value_encoder(source, weights_source, sd):
    """The value encoder at `source`, or else the one that lies in the folder of the weights, or None."""
    if source is None:
        source = Path(weights_source).expanduser() / "value_encoder"
        if not source.is_dir():
            return None
    device = next(sd.unet.parameters()).device
    value_encoder = weights.load_text_encoder(source, network=ValueEncoder, device=device)
    for key in ("hidden_size", "vocab_size", "max_position_embeddings"):
        got, expected = (getattr(network.config, key) for network in (value_encoder, sd.text_encoder))
        if got != expected:
            raise UserError(f"{source}: expected a value encoder for {weights_source}, with {key} {expected}, got {got}")
    value_encoder.config.eos_token_id = sd.tokenizer.eos_token_id
    return value_encoder


def compile_unet(unet):
    """Fuse what torch can. The first call takes a minute or more. Raises UserError where there is no compiler."""
    if not shutil.which(compiler := os.environ.get("CXX", "g++")):
        raise UserError(f"--compile: expected a C++ compiler, got no {compiler}")
    unet.compile()


def parse_args(argv=None):
    parser = Parser(description="Draw pictures of a prompt with Stable Diffusion, and of a value principle with LiVO.")
    count = number(int, 1, 10_000)
    parser.add_argument("--prompt", required=True, help="what to draw; may be empty")
    parser.add_argument("--negative", default="", help="what to steer away from, with --guidance above 1")
    parser.add_argument("--principle", action="append", help="auto, none or a text such as 'gender equality'; given "
                        "more than once, one value token each; auto retrieves from the prompt (default: auto)")
    parser.add_argument("--value-encoder", help="LiVO's trained part: folder or hub name; by default the "
                        "value_encoder/ in the folder of the weights")
    parser.add_argument("--value-fraction", type=number(float, 0, 1), help="share of the pictures that get the value "
                        "token (default: 0.5 for bias principles, 1 for others)")
    parser.add_argument("--unpadded", action="store_true", help="build the context as the authors' inference code "
                        "does, for their value encoder")
    parser.add_argument("--compare", action="store_true", help="also compare.png: without the principle above, with "
                        "it below, from the same noise")
    parser.add_argument("--weights", default=Path(__file__).parent / "tiny-sd", help="model: folder, file or hub name")
    parser.add_argument("--tokenizer", help="folder of the tokenizer, for weights that come without one")
    parser.add_argument("--prediction", choices=["epsilon", "v_prediction"],
                        help="what the UNet predicts, where the weights do not say or are wrong")
    parser.add_argument("--steps", type=count, default=50, help="UNet evaluations per picture")
    parser.add_argument("--guidance", type=number(float, 0, 1000), default=7.5, help="off up to 1")
    parser.add_argument("--sampler", choices=["ddim", "dpm"], default="ddim", help="dpm: DPM-Solver++(2M)")
    parser.add_argument("--eta", type=number(float, 0, 1), default=0.0, help="ddim: fresh noise per step")
    parser.add_argument("--seed", type=number(int, 0, 2**63), default=0, help="of the first picture")
    parser.add_argument("-n", type=count, default=1, help="how many pictures")
    parser.add_argument("--batch-size", type=count, default=4, help="pictures at a time")
    parser.add_argument("--height", type=int, help="in pixels; the model's own if left out")
    parser.add_argument("--width", type=int, help="in pixels; the model's own if left out")
    add_device_options(parser)
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet: a minute or more at first, "
                        "then faster")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder to write to")
    args = parser.parse_args(argv)
    if args.eta and args.sampler == "dpm":
        raise UserError("--eta is an option of --sampler ddim")
    return args


def main(argv=None):
    args = parse_args(argv)
    device, dtype = pick_device(args.device, args.dtype)
    check_writable(args.out)
    sd = weights.load(args.weights, dtype=dtype, device=device, tokenizer=args.tokenizer,
                      prediction_type=args.prediction)
    if args.compile:
        compile_unet(sd.unet)
    Schedule(sd.scheduler).trajectory(args.steps, args.sampler)  # complain before the work, not in it
    f, (h, w) = sd.vae.config.factor, latent_size(sd, args.height, args.width)

    principles = choose_principles(args.principle or ["auto"], args.prompt)
    value_encoder = load_value_encoder(args.value_encoder, args.weights, sd) if principles else None
    if principles and value_encoder is None:
        if wanted := [choice for choice in args.principle or () if choice.strip().lower() not in ("auto", "none")]:
            raise UserError(f"--principle {wanted[0]}: expected a value encoder, got none in {args.weights}; "
                            "pass --value-encoder")
        print(f"{', '.join(principles)} would apply, but the weights have no value encoder")
        principles = []
    print("principle:", ", ".join(principles) or "none")

    settings = {"height": h * f, "width": w * f, "steps": args.steps, "guidance": args.guidance,
                "sampler": args.sampler, "eta": args.eta}
    texts = {"prompt": args.prompt, "negative": args.negative, **settings, "dtype": sd.unet.conv_in.weight.dtype,
             "weights": args.weights, "prediction": sd.scheduler["prediction_type"]}
    if value_encoder is not None:
        texts |= {"value_encoder": args.value_encoder or "beside the weights", "value_fraction": args.value_fraction,
                  "unpadded": args.unpadded}
    seeds = range(args.seed, args.seed + args.n)
    runs = [principles, []] if args.compare else [principles]
    images, chosen = [[None] * args.n for _ in runs], []
    with tqdm(total=args.n * args.steps * len(runs), disable=None) as bar:  # None: where stderr is no terminal
        settings |= {"share": args.value_fraction, "unpadded": args.unpadded, "batch_size": args.batch_size,
                     "after_step": bar.update}
        for run_images, run_principles in zip(images, runs):
            for row, image, active in generate(sd, args.prompt, args.negative, run_principles, value_encoder, seeds,
                                           **settings):
                run_images[row] = image
                if run_images is images[0]:
                    chosen.append(active)
                    save_png(image, args.out / f"{row:04}.png",
                             texts | {"seed": seeds[row], "principle": ", ".join(active) or "none"})
    texts |= {"seed": args.seed, "n": args.n, "principle": ", ".join(principles) or "none"}
    if args.n > 1:
        save_png(grid(images[0]), args.out / "grid.png", texts)
    if args.compare:
        gets = Counter(principle for active in chosen for principle in active)
        caption = "; ".join(f"{principle}, in {gets[principle]} of {args.n}" for principle in principles)
        save_png(comparison(images[1], images[0], caption or "none"), args.out / "compare.png", texts)
    print(f"{args.n} picture{'s' * (args.n > 1)} in {args.out}")


if __name__ == "__main__":
    run(main)
