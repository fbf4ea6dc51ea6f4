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
import itertools
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
from PIL import Image
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
import common
import weights
from common import (Parser, UserError, add_device_options, atomic, check_writable, keep_freed_memory, number, pick_device,
                 comparison, run)
from livo import (ALPHA, BETA, GAMMA1, GAMMA2, ValueEncoder, aligned_hinge, livo_loss, make_context,
                  violating_hinge)
from retrieve import is_bias, retrieve
from sample import Schedule, generate, load_value_encoder
from unet import ResnetBlock, SpatialTransformer


def setting(published, text, low=0.0, high=math.inf):
    return field(default=published, metadata={"help": text, "low": low, "high": high})


@dataclass
class Settings:
    """What decides the result, one flag each. The defaults are the published ones, for full-size weights."""

    weights: str = setting(str(Path(__file__).parent / "tiny-sd"), "model: folder, file or hub name")
    tokenizer: str = setting("", "folder of the tokenizer, for weights that come without one")
    prediction: str = setting("", "epsilon or v_prediction, where the weights do not say or are wrong")
    init: str = setting("", "value encoder to begin with: folder or hub name; else the frozen text encoder")
    data: str = setting("", "folder of preference data; for tiny-sd it may be left out: drawn portraits")
    steps: int = setting(15_000, "optimizer steps", 1)
    batch: int = setting(8, "pairs a step, in all processes group_size", 1)
    group_size: int = setting(1, "pairs in a row that share a principle; 1 mixes them", 1)
    min_timestep: int = setting(0, "lowest time that is trained", 0, 999)
    micro_batch: int = setting(8, "pairs at a time in one process; fewer take less memory", 1)
    lr: float = setting(1e-6, "learning rate")
    final_ln_lr_scale: float = setting(1.0, "times the learning rate, for the LayerNorm that gives the token its length")
    warmup: int = setting(1000, "steps until the learning rate is reached", 1)
    decay: float = setting(0.0, "share of the steps, the last ones, in which it falls to 0", 0, 1)
    alpha: float = setting(ALPHA, "slope of the hinge of violating images")
    bias_alpha_scale: float = setting(1.0, "times α, of the principles of bias")
    beta: float = setting(BETA, "slope of the hinge of aligned images")
    gamma1: float = setting(GAMMA1, "margin of aligned images, times β")
    gamma2: float = setting(GAMMA2, "margin of violating images, times α")
    seed: int = setting(0, "of the order of the data, and of all noise", 0, 2**63)
    save_every: int = setting(500, "steps between checkpoints", 1)
    sample_every: int = setting(1000, "steps between pictures", 1)
    dtype: str = ""  # of the frozen networks


OPTIONS = [option for option in fields(Settings) if option.metadata]


# What a small model on a CPU needs instead; the README tells how each was found. The margins γ1/β and γ2/α are in
# units of the model's own error, and so is what separates an aligned from a violating picture: much more in a small
# model than in a large one. The alphas are so steep that every gradient is clipped: as the pairs of a step share a
# principle, each principle then moves the weights equally far, though blood changes the error 50 times more than gender.
TINY_SD = {"steps": 1250, "batch": 8, "micro_batch": 16, "group_size": 8, "min_timestep": 100, "lr": 1e-3, "final_ln_lr_scale": 10.0,
           "warmup": 20, "decay": 0.4, "alpha": 1000.0, "bias_alpha_scale": 0.125, "beta": 2000.0, "gamma1": 80.0,
           "gamma2": 100.0, "save_every": 200, "sample_every": 500}  # fmt: skip
BETAS, EPS, WEIGHT_DECAY, MAX_NORM = (0.9, 0.999), 1e-8, 1e-2, 1.0
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # as torchrun says
SAMPLING = {"steps": 12, "sampler": "dpm", "guidance": 7.5, "batch_size": 16}


# ------------------------------------------------------------------------------------------------- one step


def collate(pairs, device):
    """-> prompt_embeds (B, 77, C), z_w, z_l and eps (B, 4, h, w) and preservation (B,) on the device, t (B,) on the CPU."""
    tensors = [torch.stack([getattr(pair, name) for pair in pairs]).to(device)
               for name in ("prompt_embeds", "z_w", "z_l", "eps")]  # fmt: skip
    preservation = torch.tensor([pair.preservation for pair in pairs], device=device)
    return *tensors, preservation, torch.tensor([pair.t for pair in pairs])


def predict(unet, schedule, eps, t, z, context):
    """n·B latents z with as many contexts, n for each of B pairs with noise eps and time t -> what the UNet finds in
    them, and what is in them: two (n·B, 4, h, w) in float32."""
    n, dtype = len(z) // len(t), unet.conv_in.weight.dtype
    eps, t = eps.repeat(n, 1, 1, 1), t.repeat(n)
    abar = schedule.alphas_cumprod[t].to(z.device)[:, None, None, None]  # (n·B, 1, 1, 1)
    a, b = abar.sqrt(), (1 - abar).sqrt()
    target = a * eps - b * z if schedule.prediction_type == "v_prediction" else eps
    return unet((a * z + b * eps).to(dtype), t.to(z.device), context).float(), target


def denoising_error(output, target):
    """ℓ, (B,)."""
    return (output - target).square().mean((1, 2, 3))


@torch.no_grad()
def reference(unet, schedule, eps, t, z_w, z_l, prompt_embeds, preservation):
    """The frozen model's errors ref_w, ref_l, (B,) each, and what the targets are, two (B, 4, h, w).

    A preservation pair, two draws of one picture's latent, is to stay as it is: its target is the frozen model's own
    output. Then ℓ_ref is 0, and what the loss says beyond its margins, β ℓ_θ(y_w) − α ℓ_θ(y_l) with β > α, is how far
    the principle takes the model away from it. The noise ε would have the same minimum, but hides so small a distance.
    """
    output, target = predict(unet, schedule, eps, t, torch.cat([z_w, z_l]), torch.cat([prompt_embeds, prompt_embeds]))
    target = torch.where(preservation.repeat(2)[:, None, None, None], output, target)
    return denoising_error(output, target).chunk(2), target.chunk(2)


def alphas(principles, s, device="cpu"):
    """The α of each principle: (B,)."""
    return torch.tensor([s.alpha * (s.bias_alpha_scale if is_bias(p) else 1.0) for p in principles], device=device)


def add_gradient(sd, value_encoder, pairs, schedule, s):
    """Add to the value encoder's .grad the share that B of a step's `s.batch` pairs have in the gradient.

    -> their errors err_w, ref_w, err_l, ref_l of livo.py: (4, B) float32.

    The two hinges share nothing but the context, so each runs forward and backward on its own, in half the
    memory. Their gradients meet in the context and go through the value encoder once. The frozen model, which
    keeps nothing, takes both pictures in one call.
    """
    prompt_embeds, z_w, z_l, eps, preservation, t = collate(pairs, sd.unet.conv_in.weight.device)
    prompts, principles = [pair.prompt for pair in pairs], [pair.principle for pair in pairs]
    context = make_context(sd, prompts, [principles], value_encoder, prompt_embeds)  # (B, 78, C)
    leaf = context.detach().requires_grad_()  # here the graph is cut
    refs, targets = reference(sd.unet, schedule, eps, t, z_w, z_l, prompt_embeds, preservation)
    hinges = (partial(aligned_hinge, beta=s.beta, gamma1=s.gamma1),
              partial(violating_hinge, alpha=alphas(principles, s, z_w.device), gamma2=s.gamma2))  # fmt: skip
    errors = []
    for z, target, ref, hinge in zip((z_w, z_l), targets, refs, hinges):
        output, _ = predict(sd.unet, schedule, eps, t, z, leaf)
        err = denoising_error(output, target)
        loss = hinge(err, ref).sum() / s.batch
        if loss > 0:  # else all of them are silent, and so would their gradient be
            loss.backward()
        errors += [err.detach(), ref]
    if leaf.grad is not None:
        context.backward(leaf.grad)
    return torch.stack(errors)


def enable_activation_checkpointing(unet):
    """Keep only what enters each layer and compute the rest again on the way back: less memory, more time."""
    for layer in unet.modules():
        if isinstance(layer, (ResnetBlock, SpatialTransformer)):
            # There is no dropout whose random state would matter, and none may be read while a CUDA graph is captured.
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def summarize(step, errors, principles, s):
    """The errors (4, B) of a whole step, and the principles of its pairs -> a line of the log."""
    err_w, ref_w, err_l, ref_l = errors
    alpha = alphas(principles, s, errors.device)
    return {
        "step": step,
        "loss": livo_loss(*errors, alpha, s.beta, s.gamma1, s.gamma2).item(),
        "active_w": (aligned_hinge(err_w, ref_w, s.beta, s.gamma1) > 0).float().mean().item(),
        "active_l": (violating_hinge(err_l, ref_l, alpha, s.gamma2) > 0).float().mean().item(),
        "delta_w": (err_w - ref_w).mean().item(),  # ℓ_θ − ℓ_ref
        "delta_l": (err_l - ref_l).mean().item(),
        "ref": ((ref_w + ref_l) / 2).mean().item(),
    }


def warn_if_saturated(lines, s):
    """Both hinges content although the errors have hardly changed: the margins may be too small for this model."""
    mean = {key: sum(line[key] for line in lines) / len(lines) for key in lines[0]}
    change = max(abs(mean["delta_w"]), abs(mean["delta_l"]))
    if s.alpha and s.beta and max(mean["active_w"], mean["active_l"]) < 0.2 and change < 0.05 * mean["ref"]:
        gamma1, gamma2 = 0.5 * mean["ref"] * s.beta, 0.5 * mean["ref"] * s.alpha
        warnings.warn("most hinges are silent, yet the errors have changed by less than 5 %: the margins "
                      f"γ1/β = {s.gamma1 / s.beta:.1g} and γ2/α = {s.gamma2 / s.alpha:.1g} may be too small "
                      "for this model; if the pictures have not changed either, try "
                      f"--gamma1 {gamma1:.1g} --gamma2 {gamma2:.1g}")


# ------------------------------------------------------------------------------------------------ the loop


def make_optimizer(network):
    """AdamW; a value encoder's last LayerNorm, which gives the token its length, is a group with a rate of its own."""
    last = set(network.text_model.final_layer_norm.parameters()) if isinstance(network, ValueEncoder) else set()
    groups = [{"params": [p for p in network.parameters() if (p in last) == is_last]} for is_last in (False, True)]
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return torch.optim.AdamW(groups, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)


def take_step(step, network, optimizer, add, dataset, times, s):
    """One step of the optimizer, shared by all processes -> the errors (4, batch) of its pairs.

    add(pairs): adds their share to the network's .grad and returns their errors, as `add_gradient` does.
    """
    parameters = list(network.parameters())
    for group, factor in zip(optimizer.param_groups, (1, s.final_ln_lr_scale)):
        group["lr"] = factor * learning_rate(step, s)
    optimizer.zero_grad(set_to_none=False)
    errors = torch.zeros(4, s.batch, device=parameters[0].device)
    for start_row in range(RANK, s.batch, WORLD * s.micro_batch):
        rows = range(start_row, s.batch, WORLD)[:s.micro_batch]
        pairs = [dataset.pair(step * s.batch + row, s.seed, times) for row in rows]
        errors[:, list(rows)] = add(pairs)
    sum_over_processes(errors, *(parameter.grad for parameter in parameters))

    if broken := (~errors.isfinite().all(0)).nonzero().flatten().tolist():
        where = dataset.pair(step * s.batch + broken[0], s.seed, times).where
        got = errors[:, broken[0]].tolist()
        raise UserError(f"step {step}: expected finite errors, got {got} at {where}")
    if not torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM).isfinite():
        pairs = [dataset.pair(step * s.batch + row, s.seed, times).where for row in range(s.batch)]
        raise UserError(f"step {step}: the errors are finite, but their gradient is not, at {'; '.join(pairs)}")
    optimizer.step()
    return errors


def fit(sd, dataset, s, folder, signals=(), tensorboard=False):
    """Train from the folder's checkpoint, or from the beginning, to step `s.steps` -> ValueEncoder.

    Once there is a number in `signals`, write a checkpoint and exit. Raises UserError where an error or the
    gradient is not finite.
    """
    schedule = Schedule(sd.scheduler)
    times = range(s.min_timestep, len(schedule.alphas_cumprod))
    source = load_value_encoder(s.init, s.weights, sd) if s.init else sd.text_encoder
    value_encoder = ValueEncoder.from_text_encoder(source)
    optimizer = make_optimizer(value_encoder)
    start = resume(folder, value_encoder, optimizer, dataset.key)
    add = partial(add_gradient, sd, value_encoder, schedule=schedule, s=s)
    log = Log(folder, start, tensorboard) if RANK == 0 else None

    for step in (bar := tqdm(range(start, s.steps), initial=start, total=s.steps, disable=RANK > 0)):
        errors = take_step(step, value_encoder, optimizer, add, dataset, times, s)
        principles = [dataset.aligned_at(step * s.batch + row, s.seed)[0].value for row in range(s.batch)]
        line, done = summarize(step, errors, principles, s), step + 1
        bar.set_postfix({key: f"{value:.3g}" for key, value in line.items() if key != "step"})
        stop = torch.tensor(float(sum(signals)), device=errors.device)
        sum_over_processes(stop)  # a signal may reach one process a step before another
        if RANK == 0:
            log.add(line)
            if done % 50 == 0:
                warn_if_saturated(log.lines[-50:], s)
            if done % s.save_every == 0 or done == s.steps or stop:
                save_checkpoint(folder, value_encoder, optimizer, done, dataset.key)
                pass
                if log.board:
                    log.board.flush()
            if done % s.sample_every == 0 and done < s.steps and not stop:
                save_samples(sd, value_encoder, dataset, folder / "samples" / f"{done:05}.png")
        if stop:
            print(f"stopped after step {done}; python train.py --resume {folder} goes on", file=sys.stderr)
            sys.exit(128 + max(signals, default=signal.SIGTERM))
    return value_encoder


def learning_rate(step, s):
    """Rises to s.lr, stays, and falls to 0, of a step 0 … s.steps - 1."""
    left = s.steps - step
    return s.lr * min(1, (step + 1) / s.warmup, left / max(1, s.decay * s.steps))


def sum_over_processes(*tensors):
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


@contextlib.contextmanager
def caught_signals():
    """Yield a list that gets the number of a SIGINT or SIGTERM. A second Ctrl-C ends the process at once."""
    caught, kinds = [], (signal.SIGINT, signal.SIGTERM)

    def note(which, _):
        caught.append(which)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # but SIGTERM often comes twice, as from `timeout`

    before = {kind: signal.signal(kind, note) for kind in kinds}
    try:
        yield caught
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def save_checkpoint(folder, value_encoder, optimizer, step, data_key):
    """No random state: the data and the noise of a step follow from its number."""
    with atomic(folder / "checkpoint.pt") as path, open(path, "wb") as file:  # a file, as torch hides a full disk
        torch.save({"value_encoder": value_encoder.state_dict(), "optimizer": optimizer.state_dict(),
                    "step": step, "data": data_key}, file)  # fmt: skip


def resume(folder, value_encoder, optimizer, data_key):
    """Load the folder's checkpoint, if there is one -> the number of steps done. Raises UserError where it is damaged,
    or of other data or weights."""
    file = folder / "checkpoint.pt"
    for leftover in folder.glob(".checkpoint.pt.*"):  # of a process that was killed while it wrote
        leftover.unlink(missing_ok=True)
    if not file.exists():
        return 0
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        value_encoder.load_state_dict(state["value_encoder"])
        optimizer.load_state_dict(state["optimizer"])
        step, before = state["step"], state["data"]
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{file}: expected a checkpoint of such a value encoder, got {error!r}") from error
    if before != data_key:
        raise UserError(f"{file}: expected the data, the weights and their dtype that the run began with, got others")
    return step


class Log:
    """log.jsonl, a line for each step. On resuming it is cut to the steps that the checkpoint has seen."""

    def __init__(self, folder, steps, tensorboard=False):
        path = folder / "log.jsonl"
        try:
            lines = path.read_text(encoding="utf-8").splitlines()[:steps] if path.exists() else []
            self.lines = [json.loads(line) for line in lines]
        except ValueError as error:
            raise UserError(f"{path}: expected a JSON object on each of the first {steps} lines, got {error}") from error
        with atomic(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        self.file = open(path, "a", buffering=1, encoding="utf-8")  # written line by line
        self.board = tensorboard and summary_writer(folder / "tensorboard", purge_step=steps)

    def add(self, line):
        self.lines.append(line)
        self.file.write(json.dumps(line) + "\n")
        for key, value in line.items() if self.board else ():
            self.board.add_scalar(key, value, line["step"])


def summary_writer(folder, **options):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard: expected the package tensorboard, got none (pip install)") from error
    return SummaryWriter(folder, **options)


# -------------------------------------------------------------------------------------- what the reader sees


def save_samples(sd, value_encoder, dataset, path, n=6):
    """Write a sheet: per principle n pictures of one prompt, without it and, of the same noise, with it."""
    prompts, sheets = {}, []
    for sample, _ in dataset.aligned:
        prompts.setdefault(sample.value, []).append(sample.prompt)
    for principle, choice in prompts.items():
        telling = [prompt for prompt in choice if principle in retrieve(prompt)]
        prompt = random.Random(principle).choice(telling or choice)
        rows = [generate(sd, prompt, "", principles, value_encoder, range(n), share=1, **SAMPLING)
                for principles in ([], [principle])]  # fmt: skip
        sheets.append(comparison(*([image for _, image, _ in row] for row in rows), f"{principle}: {prompt}"))
    tops = [0, *itertools.accumulate(sheet.height for sheet in sheets)]
    sheet = Image.new("RGB", (max(sheet.width for sheet in sheets), tops[-1]), "white")
    for top, part in zip(tops, sheets):
        sheet.paste(part, (0, top))
    with atomic(path) as temporary:
        sheet.save(temporary)


# --------------------------------------------------------------------------------------------- the command


def parse_args(argv):
    parser = Parser(description="Train a value encoder with LiVO's preference loss.")
    for option in OPTIONS:
        tiny = f", tiny-sd {TINY_SD[option.name]}" if option.name in TINY_SD else ""
        kind, limits = type(option.default), (option.metadata["low"], option.metadata["high"])
        parser.add_argument("--" + option.name.replace("_", "-"),
                            type=kind if kind is str else number(kind, *limits),
                            default=argparse.SUPPRESS,  # to know what was given from what was not
                            help=f"{option.metadata['help']} (default: {option.default!r}{tiny})")
    parser.add_argument("--out", type=Path, help="folder of the run (default: runs/livo)")
    parser.add_argument("--resume", type=Path, help="folder of a run to go on with; settings given anew win")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing: less memory")
    parser.add_argument("--tensorboard", action="store_true", help="log to OUT/tensorboard too")
    add_device_options(parser, default="bf16 on CUDA, else fp32")
    return parser.parse_args(argv)


def choose_settings(args):
    """-> Settings and the folder of the run. What was given wins over the settings of a run to resume."""
    given = {option.name: getattr(args, option.name) for option in OPTIONS if hasattr(args, option.name)}
    given |= {"dtype": args.dtype} if args.dtype else {}
    if args.resume:
        if args.out:
            raise UserError("--resume and --out: expected one of them, as a resumed run stays in its folder, got both")
        file = args.resume / "settings.json"
        if not file.exists():
            raise UserError(f"--resume {args.resume}: expected the folder of a run, got no settings.json")
        try:
            s = Settings(**common.read_json(file) | given)
        except TypeError as error:
            raise UserError(f"{file}: expected the settings of a run, got: {error}") from error
        for option in OPTIONS:
            kinds = (int, float) if type(option.default) is float else type(option.default)
            if not isinstance(value := getattr(s, option.name), kinds):
                raise UserError(f"{file}: expected {type(option.default).__name__} as {option.name}, got {value!r}")
        return s, args.resume
    out = args.out or Path("runs/livo")
    check_writable(out)
    if RANK == 0 and out.is_dir() and {path.name for path in out.iterdir()} - {"settings.json"}:
        raise UserError(f"{out}: expected a new folder, got one with files in it; "
                        f"go on with --resume {out}, or choose another --out")
    for name in {"weights", "tokenizer", "init", "data"} & given.keys():  # --resume may be called from another folder
        if given[name] and Path(given[name]).exists():
            given[name] = str(Path(given[name]).resolve())
    is_tiny = draws_portraits(Path(given.get("weights", Settings.weights)))
    s = Settings(**(TINY_SD if is_tiny else {}) | given)
    if not is_tiny and not s.data:
        raise UserError(f"--weights {s.weights}: expected --data too, preference data for it, got none")
    return s, out


def draws_portraits(folder):
    """Whether the folder holds a model of the portrait world, by the size of its pictures. Nothing is loaded yet."""
    unet, vae = (folder / part / "config.json" for part in ("unet", "vae"))
    if not (unet.is_file() and vae.is_file()):
        return False
    halvings = len(common.read_json(vae).get("block_out_channels", [])) - 1
    return common.read_json(unet).get("sample_size") == 64 >> max(0, halvings)


def join_processes(device):
    """Under torchrun: join the other processes."""
    if "RANK" in os.environ:
        # the others wait while one encodes the data
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=2))


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


def main(argv=None):
    args = parse_args(argv)
    s, folder = choose_settings(args)
    device, dtype = pick_device(args.device, s.dtype)
    join_processes(device)
    if device.type == "cuda" and not s.dtype:
        dtype = torch.bfloat16  # float16 loses the smallest gradients
    sd = weights.load(s.weights, dtype=dtype, device=device, tokenizer=s.tokenizer or None,
                      prediction_type=s.prediction or None)
    keep_freed_memory(large=True)
    if args.checkpointing:
        enable_activation_checkpointing(sd.unet)
    file = folder / "settings.json"
    before = file.read_text(encoding="utf-8") if file.exists() else None

    def write_settings(text):
        with atomic(file) as path:
            path.write_text(text, encoding="utf-8")

    if RANK == 0:  # before the long work, so that it can be resumed
        write_settings(json.dumps(asdict(s), indent=2) + "\n")
    try:
        with one_first():
            if not s.data:
                from lab import toy  # rendered portraits: the one thing that the core takes from the lab
            root = s.data or toy.default_pairs(folder.parent)
            dataset = data.PreferenceDataset(root, sd, folder.parent / "cache", s.group_size)
        with caught_signals() as signals:
            value_encoder = fit(sd, dataset, s, folder, signals, args.tensorboard)
    except UserError:
        if RANK == 0 and before is not None:
            write_settings(before)
        elif RANK == 0 and not (folder / "checkpoint.pt").exists():
            file.unlink()
        raise
    if signals:  # one that came while the last step was being written
        sys.exit(128 + max(signals))
    if RANK == 0:
        weights.save_text_encoder(value_encoder, folder / "value_encoder")
        save_samples(sd, value_encoder, dataset, folder / "samples" / "final.png")
        if sd.size == 64:
            from lab.evaluate import print_before_and_after
            print_before_and_after(sd, value_encoder, {sample.value for sample, _ in dataset.aligned})
        print(f"the value encoder is in {folder / 'value_encoder'}, pictures are in {folder / 'samples'}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
