"""Trains a value encoder with the preference loss: LiVO, arXiv 2410.12700, section 3.3.

    python train.py                              # tiny-sd on drawn portraits: ten minutes on two CPU cores
    python train.py --weights stable-diffusion-v1-5/stable-diffusion-v1-5 --data livo_data --out runs/sd
    torchrun --nproc_per_node 8 train.py …       # the same weights as one process, up to rounding
    python train.py --resume runs/livo           # goes on after an interruption as if there had been none

A run's folder holds value_encoder/ (transformers' CLIPTextModel opens it too), log.jsonl, loss.png, samples/,
and the settings and the checkpoint to resume from. Latents and contexts are cached beside it.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import random
import signal
import sys
import warnings
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
import weights
from cli import Parser, UserError, add_device_options, atomic, check_writable, number, pick_device, run
from livo import ALPHA, BETA, GAMMA1, GAMMA2, ValueEncoder, aligned_hinge, livo_loss, make_context, violating_hinge
from sample import Schedule, comparison, draw
from unet import ResnetBlock, SpatialTransformer


def setting(published, text, low=0.0, high=math.inf):
    return field(default=published, metadata={"help": text, "low": low, "high": high})


@dataclass
class Settings:
    """What decides the result, one flag each. The defaults are the published ones, for full-size weights."""

    weights: str = setting(str(Path(__file__).parent / "tiny-sd"), "model: folder, file or hub name")
    data: str = setting("", "preference data, <type>/<scene>/metadata.jsonl; empty: drawn portraits, for tiny-sd")
    steps: int = setting(15_000, "optimizer steps", 1)
    batch: int = setting(8, "pairs a step, in all processes together", 1)
    micro_batch: int = setting(8, "pairs at a time in one process; fewer take less memory", 1)
    lr: float = setting(1e-6, "learning rate")
    warmup: int = setting(1000, "steps until the learning rate is reached; then it is constant", 1)
    alpha: float = setting(ALPHA, "slope of the hinge of violating images")
    beta: float = setting(BETA, "slope of the hinge of aligned images")
    gamma1: float = setting(GAMMA1, "margin of aligned images, times β")
    gamma2: float = setting(GAMMA2, "margin of violating images, times α")
    seed: int = setting(0, "of the order of the data, and of all noise", 0, 2**63)
    save_every: int = setting(500, "steps between checkpoints", 1)
    sample_every: int = setting(1000, "steps between pictures", 1)
    dtype: str = "auto"  # of the frozen networks


OPTIONS = [option for option in fields(Settings) if option.metadata]


# The margins γ1/β and γ2/α are in units of the model's own error, and so is what separates an aligned from a
# violating picture: much more in a small model than in a large one.
TINY_SD = {"steps": 600, "batch": 16, "micro_batch": 16, "lr": 5e-4, "warmup": 20, "alpha": 50.0, "beta": 100.0,
           "gamma1": 4.0, "gamma2": 2.0, "save_every": 100, "sample_every": 200}  # fmt: skip
BETAS, EPS, WEIGHT_DECAY, MAX_NORM = (0.9, 0.999), 1e-8, 1e-2, 1.0
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # as torchrun says
SAMPLING = {"steps": 25, "sampler": "dpm", "guidance": 7.5, "batch_size": 16}


# ------------------------------------------------------------------------------------------------- one step


def add_gradient(sd, value_encoder, pairs, schedule, s):
    """Add to .grad of the value encoder what B of a step's `s.batch` pairs contribute to the gradient of the loss.

    -> (4, B) float32: the errors err_w, ref_w, err_l, ref_l of livo.py.

    The two hinges share nothing but the context, so each runs forward and backward on its own, which takes
    half the memory. Their gradients meet in the context, and go through the value encoder once.
    """
    device, dtype = sd.unet.conv_in.weight.device, sd.unet.conv_in.weight.dtype
    features, z_w, z_l, eps = (torch.stack([getattr(pair, name) for pair in pairs]).to(device)
                               for name in ("features", "z_w", "z_l", "eps"))  # fmt: skip
    t = torch.tensor([pair.t for pair in pairs])
    abar = schedule.alphas_cumprod[t].to(device)[:, None, None, None]  # (B, 1, 1, 1)
    t, a, b = t.to(device), abar.sqrt(), (1 - abar).sqrt()
    prompts, principles = [pair.prompt for pair in pairs], [pair.principle for pair in pairs]
    context = make_context(sd, prompts, [principles], value_encoder, features)  # (B, 78, C)
    leaf = context.detach().requires_grad_()

    def half(z, hinge):
        z_t = (a * z + b * eps).to(dtype)  # (B, 4, h, w)
        target = a * eps - b * z if schedule.prediction_type == "v_prediction" else eps

        def error(context):
            return (sd.unet(z_t, t, context).float() - target).square().mean((1, 2, 3))  # (B,)

        with torch.no_grad():
            ref = error(features)
        err = error(leaf)
        loss = hinge(err, ref).sum() / s.batch
        if loss > 0:  # else all of them are silent, and so would their gradient be
            loss.backward()
        return err.detach(), ref

    errors = torch.stack([*half(z_w, partial(aligned_hinge, beta=s.beta, gamma1=s.gamma1)),
                          *half(z_l, partial(violating_hinge, alpha=s.alpha, gamma2=s.gamma2))])  # fmt: skip
    if leaf.grad is not None:
        context.backward(leaf.grad)
    return errors


def checkpoint_activations(unet):
    """Keep only what enters each layer and compute the rest again on the way back: less memory, more time."""
    for layer in unet.modules():
        if isinstance(layer, (ResnetBlock, SpatialTransformer)):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def summarize(step, errors, s):
    """The errors (4, B) of a whole step -> a line of the log."""
    err_w, ref_w, err_l, ref_l = errors
    return {
        "step": step,
        "loss": livo_loss(*errors, s.alpha, s.beta, s.gamma1, s.gamma2).item(),
        "active_w": (aligned_hinge(err_w, ref_w, s.beta, s.gamma1) > 0).float().mean().item(),
        "active_l": (violating_hinge(err_l, ref_l, s.alpha, s.gamma2) > 0).float().mean().item(),
        "change_w": (err_w - ref_w).mean().item(),  # ℓ_θ − ℓ_ref
        "change_l": (err_l - ref_l).mean().item(),
        "ref": ((ref_w + ref_l) / 2).mean().item(),
    }


def warn_if_silent(lines, s):
    """Both hinges content although hardly anything has changed: the margins are too small for this model."""
    mean = {key: sum(line[key] for line in lines) / len(lines) for key in lines[0]}
    change = max(abs(mean["change_w"]), abs(mean["change_l"]))
    if max(mean["active_w"], mean["active_l"]) < 0.2 and change < 0.05 * mean["ref"]:
        margin = 0.5 * mean["ref"]
        warnings.warn(f"both hinges are silent for most samples, yet the errors have changed by less than 5 %: the "
                      f"margins γ1/β = {s.gamma1 / s.beta:.1g} and γ2/α = {s.gamma2 / s.alpha:.1g} are too small for "
                      f"this model; try --gamma1 {margin * s.beta:.1g} --gamma2 {margin * s.alpha:.1g}")


# ------------------------------------------------------------------------------------------------ the loop


def fit(sd, dataset, s, folder, signals=(), tensorboard=False):
    """Train from the folder's checkpoint, or from the frozen text encoder, to step `s.steps` -> ValueEncoder.

    Once there is a number in `signals`, write a checkpoint and exit. Raises UserError where an error or the
    gradient is not finite.
    """
    schedule, times = Schedule(sd.scheduler), sd.scheduler.get("num_train_timesteps", 1000)
    value_encoder = ValueEncoder.from_text_encoder(sd.text_encoder)
    parameters = list(value_encoder.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    start = resume(folder, value_encoder, optimizer)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    log = Log(folder, start, tensorboard) if RANK == 0 else None

    for step in (bar := tqdm(range(start, s.steps), initial=start, total=s.steps, disable=RANK > 0)):
        optimizer.param_groups[0]["lr"] = s.lr * min(1, (step + 1) / s.warmup)
        optimizer.zero_grad(set_to_none=False)
        errors = torch.zeros(4, s.batch, device=parameters[0].device)
        for start_row in range(RANK, s.batch, WORLD * s.micro_batch):
            rows = range(start_row, s.batch, WORLD)[:s.micro_batch]
            pairs = [dataset.pair(step * s.batch + row, s.seed, times) for row in rows]
            errors[:, list(rows)] = add_gradient(sd, value_encoder, pairs, schedule, s)
        sum_over_processes(errors, *(parameter.grad for parameter in parameters))

        if broken := (~errors.isfinite().all(0)).nonzero().flatten().tolist():
            where = dataset.pair(step * s.batch + broken[0], s.seed, times).where
            raise UserError(f"step {step}: expected finite errors, got {errors[:, broken[0]].tolist()} at {where}")
        if not torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM).isfinite():
            raise UserError(f"step {step}: expected a finite gradient, got none although the errors are finite")
        optimizer.step()

        line, done = summarize(step, errors, s), step + 1
        bar.set_postfix({key: f"{line[key]:.3g}" for key in ("loss", "active_w", "active_l", "change_w", "change_l")})
        stop = torch.tensor(float(sum(signals)), device=errors.device)
        sum_over_processes(stop)  # a signal may reach one process a step before another
        if RANK == 0:
            log.add(line)
            if done % 50 == 0:
                warn_if_silent(log.lines[-50:], s)
            if done % s.save_every == 0 or done == s.steps or stop:
                save_checkpoint(folder, value_encoder, optimizer, done)
                plot(log.lines, folder / "loss.png")
            if done % s.sample_every == 0 and done < s.steps and not stop:
                draw_samples(sd, value_encoder, dataset, folder / "samples" / f"{done:05}.png")
        if stop:
            print(f"stopped after step {done}; python train.py --resume {folder} goes on", file=sys.stderr)
            sys.exit(128 + max(signals, default=signal.SIGTERM))
    return value_encoder


def sum_over_processes(*tensors):
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


@contextlib.contextmanager
def caught_signals():
    """Yield a list that gets the number of a SIGINT or SIGTERM. A second one ends the process at once."""
    caught, numbers = [], (signal.SIGINT, signal.SIGTERM)

    def note(number, _):
        caught.append(number)
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)

    before = [signal.signal(number, note) for number in numbers]
    try:
        yield caught
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


def save_checkpoint(folder, value_encoder, optimizer, step):
    """No random state: the data and the noise of a step follow from its number."""
    with atomic(folder / "checkpoint.pt") as path:
        torch.save({"value_encoder": value_encoder.state_dict(), "optimizer": optimizer.state_dict(),
                    "step": step}, path)  # fmt: skip


def resume(folder, value_encoder, optimizer):
    """Load the folder's checkpoint, if there is one -> the number of steps done."""
    if not (folder / "checkpoint.pt").exists():
        return 0
    state = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    value_encoder.load_state_dict(state["value_encoder"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


class Log:
    """log.jsonl, a line for each step. On resuming it is cut to the steps that the checkpoint has seen."""

    def __init__(self, folder, steps, tensorboard=False):
        path = folder / "log.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines()[:steps] if path.exists() else []
        with atomic(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        self.lines, self.file = [json.loads(line) for line in lines], open(path, "a", buffering=1, encoding="utf-8")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # optional

            self.board = SummaryWriter(folder / "tensorboard", purge_step=steps)

    def add(self, line):
        self.lines.append(line)
        self.file.write(json.dumps(line) + "\n")
        if hasattr(self, "board"):
            for key, value in line.items():
                self.board.add_scalar(key, value, line["step"])


# -------------------------------------------------------------------------------------- what the reader sees


def draw_samples(sd, value_encoder, dataset, path, n=8):
    """Write a sheet: for each principle the pictures of one prompt, without it and, from the same noise, with it."""
    prompts, sheets = {}, []
    for sample, _ in dataset.aligned:
        prompts.setdefault(sample.value, []).append(sample.prompt)
    for principle, choice in prompts.items():
        prompt = random.Random(principle).choice(choice)
        rows = [[image for _, image, _ in draw(sd, prompt, "", principles, value_encoder, range(n), share=1, **SAMPLING)]
                for principles in ([], [principle])]  # fmt: skip
        sheets.append(comparison(*rows, f"{principle}: {prompt}"))
    sheet = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), "white")
    top = 0
    for part in sheets:
        sheet.paste(part, (0, top))
        top += part.height
    with atomic(path) as temporary:
        sheet.save(temporary)


CURVES = {  # title: keys of the log, drawn in COLOURS
    "loss": ["loss"],
    "share of active hinges: aligned blue, violating red": ["active_w", "active_l"],
    "error minus the frozen model's: aligned blue, violating red": ["change_w", "change_l"],
}
COLOURS, PANEL, EDGE = ((40, 90, 200), (210, 50, 40)), (640, 200), 24


def plot(lines, path):
    """Draw the log's curves over the steps, each point the mean of a few steps, into a PNG."""
    (width, height), image = PANEL, Image.new("RGB", (PANEL[0], PANEL[1] * len(CURVES)), "white")
    pen, size = ImageDraw.Draw(image), math.ceil(len(lines) / 100)
    for panel, (title, keys) in enumerate(CURVES.items()):
        curves = [[sum(line[key] for line in lines[i:i + size]) / len(lines[i:i + size])
                   for i in range(0, len(lines), size)] for key in keys]  # fmt: skip
        low, high = min(0, *map(min, curves), 0), max(map(max, curves))
        scale, bottom = (height - 2 * EDGE) / ((high - low) or 1), (panel + 1) * height - EDGE
        pen.text((EDGE, panel * height + 4), f"{title}; {low:.3g} ... {high:.3g} in {len(lines)} steps", "black")
        pen.line((EDGE, bottom + low * scale, width - EDGE, bottom + low * scale), (180, 180, 180))
        for curve, colour in zip(curves, COLOURS):
            step = (width - 2 * EDGE) / max(1, len(curve) - 1)
            pen.line([(EDGE + i * step, bottom - (y - low) * scale) for i, y in enumerate(curve)], colour, 2)
    with atomic(path) as temporary:
        image.save(temporary)


# --------------------------------------------------------------------------------------------- the command


def parse_args(argv):
    parser = Parser(description="Train a value encoder with LiVO's preference loss.")
    for option in OPTIONS:
        tiny = f", tiny-sd {TINY_SD[option.name]}" if option.name in TINY_SD else ""
        kind, low, high = type(option.default), option.metadata["low"], option.metadata["high"]
        parser.add_argument("--" + option.name.replace("_", "-"), type=str if kind is str else number(kind, low, high),
                            default=argparse.SUPPRESS,  # so that a value that was given can be told apart
                            help=f"{option.metadata['help']} (default: {option.default or 'none'}{tiny})")
    parser.add_argument("--out", type=Path, default=Path("runs/livo"), help="folder of the run")
    parser.add_argument("--resume", type=Path, help="folder of a run to go on with; settings given anew win")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations: less memory, slower")
    parser.add_argument("--tensorboard", action="store_true", help="log to OUT/tensorboard too")
    add_device_options(parser)
    return parser.parse_args(argv)


def choose_settings(args):
    """-> Settings and the folder of the run. What was given wins over the settings of a run to resume."""
    given = {option.name: getattr(args, option.name) for option in OPTIONS if hasattr(args, option.name)}
    given |= {"dtype": args.dtype} if args.dtype != "auto" else {}
    if args.resume:
        if not (args.resume / "settings.json").exists():
            raise UserError(f"--resume {args.resume}: expected the folder of a run, got no settings.json in it")
        return Settings(**json.loads((args.resume / "settings.json").read_text(encoding="utf-8")) | given), args.resume
    check_writable(args.out)
    if RANK == 0 and args.out.exists() and any(args.out.iterdir()):
        raise UserError(f"{args.out}: expected a new folder, got one with files in it; "
                        f"go on with --resume {args.out}, or choose another --out")
    is_tiny = Path(given.get("weights", Settings.weights)).name == "tiny-sd"
    s = Settings(**(TINY_SD if is_tiny else {}) | given)
    if not is_tiny and not s.data:
        raise UserError(f"--weights {s.weights}: expected --data too, a folder of preference data for this model")
    return s, args.out


def join_processes(device):
    """Under torchrun: join the other processes. -> the device to use."""
    if "RANK" not in os.environ:
        return device
    if device == "auto" and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    # the others wait while one encodes the data
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(days=2))
    return device


@contextlib.contextmanager
def one_first():
    """The first process of each machine goes through the block before the others do, and fills the cache."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not first:
        warnings.simplefilter("ignore")  # the first one has said it
        dist.barrier()
    yield
    if first and dist.is_initialized():
        dist.barrier()


def portraits(folder):
    """The default preference data. Another version of data.py draws another one."""
    version = hashlib.sha256(Path(data.__file__).read_bytes()).hexdigest()[:8]
    if not (folder / f"portraits-{version}").exists():
        data.build_portrait_pairs(folder / f"portraits-{version}")
    return folder / f"portraits-{version}"


def main(argv=None):
    args = parse_args(argv)
    s, folder = choose_settings(args)
    device, dtype = pick_device(join_processes(args.device), s.dtype)
    if device.type == "cuda" and s.dtype == "auto":
        dtype = torch.bfloat16  # the smallest gradients vanish in float16
    sd = weights.load(s.weights, dtype=dtype, device=device)
    if args.checkpointing:
        checkpoint_activations(sd.unet)
    with one_first():
        dataset = data.PreferenceDataset(s.data or portraits(folder.parent), sd, folder.parent / "cache")
    if RANK == 0:
        with atomic(folder / "settings.json") as path:
            path.write_text(json.dumps(asdict(s), indent=2) + "\n", encoding="utf-8")
    with caught_signals() as signals:
        value_encoder = fit(sd, dataset, s, folder, signals, args.tensorboard)
    if RANK == 0:
        weights.save_text_encoder(value_encoder, folder / "value_encoder")
        draw_samples(sd, value_encoder, dataset, folder / "samples" / "final.png")
        print(f"{folder / 'value_encoder'}, {folder / 'loss.png'}, {folder / 'samples' / 'final.png'}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
