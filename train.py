"""Train a value encoder with the LiVO loss (livo.py).

    python train.py                              # tiny-sd on toy portraits: 6 to 8 minutes on two CPU cores
    python train.py --weights stable-diffusion-v1-5/stable-diffusion-v1-5 --data livo_data --out runs/sd
    torchrun --nproc_per_node 8 train.py …       # the same result as one process, up to rounding
    python train.py --resume runs/livo           # resume an interrupted run, bit for bit

A run's folder holds value_encoder/, log.jsonl (`python -m lab.plots` plots it), samples/, settings.json, checkpoint.pt.
"""

import formats.missing  # first: a package that is not installed gives one line, not a traceback
import math
import signal
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import weights
from common import Parser, UserError, run
from data import PreferenceDataset, is_preservation
from diffusion import Schedule
from efficiency import add_device_options, checkpoint_layers, keep_freed_memory, pick_device
from livo import (ALPHA, BETA, GAMMA1, GAMMA2, ValueEncoder, aligned_hinge, load_value_encoder, make_context,
                  violating_hinge)
from runs import (RANK, TOY, WORLD, Log, add_options, caught_signals, check_new, join_processes, load_preset, one_first,
                  parse_margins, parse_settings, resume, save_checkpoint, save_samples, save_settings, setting,
                  sum_over_processes, summarize, warn_if_saturated)
from unet import ResnetBlock, SpatialTransformer

TINY_SD = Path(__file__).parent / "tiny-sd"
ADAM_BETAS, ADAM_EPS, WEIGHT_DECAY, MAX_NORM = (0.9, 0.999), 1e-8, 1e-2, 1.0  # the authors'; MAX_NORM clips gradients


@dataclass
class Settings:
    """All that decides the result, one option each. Defaults: the published ones, or a livo.toml beside the weights."""

    weights: str = setting(str(TINY_SD), "model: folder, file or hub name")
    tokenizer: str = setting("", "folder of the tokenizer, for weights that come without one")
    prediction: str = setting("", "epsilon or v_prediction, if the weights do not say")
    init: str = setting("", "initial value encoder, folder or hub name; by default the frozen text encoder")
    data: str = setting("", "folder of preference data, or toy: rendered portraits for tiny-sd")
    steps: int = setting(15_000, "optimizer steps", 1)
    batch: int = setting(8, "pairs a step, over all processes", 1, 2**16)
    micro_batch: int = setting(8, "pairs at a time in one process; fewer take less memory", 1, 2**10)
    lr: float = setting(1e-6, "learning rate")
    warmup: int = setting(1000, "steps of linear warm-up", 1)  # asked for by the authors, ignored by their scheduler
    decay: float = setting(0.0, "last fraction of the steps, in which the rate falls to 0", 0, 1)
    alpha: float = setting(ALPHA, "slope α of the violating hinge")
    beta: float = setting(BETA, "slope β of the aligned hinge")
    gamma1: float = setting(GAMMA1, "margin of the aligned hinge")
    gamma2: float = setting(GAMMA2, "margin of the violating hinge")
    final_ln_lr_scale: float = setting(1.0, "factor on the rate of the final LayerNorm, which sets the token norm")
    margins: str = setting("", 'γ1 and γ2 of single principles, "gender equality: 2 2; racial equality: 0.5 1"')
    snr_gamma: float = setting(0.0, "γ of min-SNR weighting over timesteps (arXiv 2303.09556); 0: all weigh the same")
    seed: int = setting(0, "of the order of the pairs and of all noise", 0, 2**63)
    save_every: int = setting(500, "steps between checkpoints", 1)
    sample_every: int = setting(1000, "steps between sample sheets", 1)
    dtype: str = ""  # of the frozen networks; its option is that of every command


# ── One step ─────────────────────────────────────────────────────────────────────────────────────────────────────────

def collate(pairs, device):
    """B pairs -> prompt_embeds (B, 77, C), z_w, z_l, eps (B, 4, h, w), preservation (B,), t (B,) on the CPU as ᾱ is."""
    names = "prompt_embeds", "z_w", "z_l", "eps"
    tensors = [torch.stack([getattr(pair, name) for pair in pairs]).to(device) for name in names]
    preservation = torch.tensor([pair.preservation for pair in pairs], device=device)
    return *tensors, preservation, torch.tensor([pair.t for pair in pairs])


def predict(unet, schedule, eps, t, z, context):
    """Noise latents z with eps and t of B pairs -> the UNet's output, and its target, eps or v: two like z, float32.

    z: (n·B, 4, h, w), of one image of each pair (n = 1), or of y_w and then of y_l (n = 2).
    """
    n, dtype = len(z) // len(t), unet.conv_in.weight.dtype
    eps, t = eps.repeat(n, 1, 1, 1), t.repeat(n)
    abar = schedule.alphas_cumprod[t].to(z.device)[:, None, None, None]  # (n·B, 1, 1, 1)
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()  # of the noise schedule; the slope α is s.alpha
    target = alpha * eps - sigma * z if schedule.prediction_type == "v_prediction" else eps
    z_t = alpha * z + sigma * eps
    return unet(z_t.to(dtype), t.to(z.device), context.to(dtype)).float(), target


def denoising_error(output, target):
    """ℓ, the mean squared error of each sample: (B,)."""
    return (output - target).square().mean((1, 2, 3))


@torch.no_grad()
def reference_errors(unet, schedule, eps, t, z_w, z_l, prompt_embeds, preservation):
    """The reference model's ref_w and ref_l, (B,) each, and the targets of y_w and y_l, (B, 4, h, w) each.

    In a preservation pair (y_l is y_w, the principle does not apply) the token should not change the output. Two
    different outputs can have the same error against eps, so the target is the reference model's output: ref is 0, err
    the squared change.
    """
    output, target = predict(unet, schedule, eps, t, torch.cat([z_w, z_l]), torch.cat([prompt_embeds, prompt_embeds]))
    target = torch.where(preservation.repeat(2)[:, None, None, None], output, target)
    return denoising_error(output, target).chunk(2), target.chunk(2)


def margins(principles, preservation, s):
    """γ1 and γ2 of each pair, (B,) each. preservation: (B,); such a pair has no violating image, so its γ2 is −∞."""
    own = parse_margins(s.margins)
    pairs = [own.get(principle, (s.gamma1, s.gamma2)) for principle in principles]
    gamma1, gamma2 = torch.tensor(pairs, device=preservation.device).unbind(1)
    return gamma1, gamma2.masked_fill(preservation, -math.inf)


def add_gradient(sd, value_encoder, pairs, schedule, s):
    """Add the gradient of `livo_loss` on B pairs of a step to the value encoder's .grad.

    -> err_w, ref_w, err_l, ref_l: (4, B) float32. Min-SNR weights multiply the errors: they scale the slopes, not the
    margins. The two hinges share only the context, so each runs forward and backward by itself, in half the memory.
    """
    prompt_embeds, z_w, z_l, eps, preservation, t = collate(pairs, sd.unet.conv_in.weight.device)
    prompts, principles = [pair.prompt for pair in pairs], [pair.principle for pair in pairs]
    refs, targets = reference_errors(sd.unet, schedule, eps, t, z_w, z_l, prompt_embeds, preservation)
    weight = schedule.min_snr_weight(t, s.snr_gamma).to(z_w.device)  # (B,)
    context = make_context(sd, prompts, [principles], value_encoder, prompt_embeds)  # one token each: (B, 78, C)
    leaf = context.detach().requires_grad_()  # sums the gradients of both hinges; then one backward pass of the encoder
    gamma1, gamma2 = margins(principles, preservation, s)
    hinges = partial(aligned_hinge, beta=s.beta, gamma1=gamma1), partial(violating_hinge, alpha=s.alpha, gamma2=gamma2)
    errors = []
    for z, target, ref, hinge in zip((z_w, z_l), targets, refs, hinges):
        output, _ = predict(sd.unet, schedule, eps, t, z, leaf)
        err, ref = weight * denoising_error(output, target), weight * ref  # (B,)
        loss = hinge(err, ref).sum() / s.batch
        if loss > 0:  # otherwise all of these hinges are saturated
            loss.backward()
        errors += [err.detach(), ref]
    if leaf.grad is not None:
        context.backward(leaf.grad)
    return torch.stack(errors)


def take_step(step, network, optimizer, add, dataset, timesteps, s):
    """One optimizer step over all processes -> the errors (4, batch) of its pairs. add(pairs): `add_gradient`.

    Raises UserError if an error or the gradient is not finite.
    """
    parameters = list(network.parameters())
    for group in optimizer.param_groups:
        group["lr"] = group["scale"] * learning_rate(step, s)
    optimizer.zero_grad(set_to_none=False)
    errors = torch.zeros(4, s.batch, device=parameters[0].device)
    mine = range(RANK, s.batch, WORLD)  # the rows of the batch that this process has
    for start in range(0, len(mine), s.micro_batch):
        rows = mine[start:start + s.micro_batch]
        errors[:, list(rows)] = add([dataset.pair(step * s.batch + row, s.seed, timesteps) for row in rows])
    sum_over_processes(errors, *(parameter.grad for parameter in parameters))

    finite = errors.isfinite().all(0)  # (batch,)
    if not (torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM).isfinite() and finite.all()):
        rows = [row for row in range(s.batch) if not finite[row]] or range(s.batch)
        where = "; ".join(dataset.pair(step * s.batch + row, s.seed, timesteps).where for row in rows)
        raise UserError(f"step {step}: expected finite errors and gradients, got others at {where}")
    optimizer.step()
    return errors


# ── The loop ─────────────────────────────────────────────────────────────────────────────────────────────────────────

def make_optimizer(network, final_ln_lr_scale=1.0):
    """AdamW with the authors' options. The final LayerNorm of a text encoder may have a learning rate of its own."""
    final, others = {"params": [], "scale": final_ln_lr_scale}, {"params": [], "scale": 1.0}
    for name, parameter in network.named_parameters():
        parameter.grad = torch.zeros_like(parameter)  # never None: summed over processes even if all hinges saturate
        (final if "final_layer_norm" in name else others)["params"].append(parameter)
    groups = [group for group in (others, final) if group["params"]]
    return torch.optim.AdamW(groups, betas=ADAM_BETAS, eps=ADAM_EPS, weight_decay=WEIGHT_DECAY)


def learning_rate(step, s):
    """Linear warm-up to s.lr, constant, linear decay to 0."""
    return s.lr * min(1, (step + 1) / s.warmup, (s.steps - step) / max(1, s.decay * s.steps))


def fit(sd, dataset, s, folder, signals=(), tensorboard=False):
    """Train from the folder's checkpoint, or from the start, to step `s.steps` -> ValueEncoder.

    A number in `signals` makes it write a checkpoint and exit. Raises UserError for non-finite errors.
    """
    schedule = Schedule(sd.scheduler)
    timesteps = range(len(schedule.alphas_cumprod))
    initial = load_value_encoder(s.init, s.weights, sd) if s.init else sd.text_encoder
    value_encoder = ValueEncoder.from_text_encoder(initial)
    optimizer = make_optimizer(value_encoder, s.final_ln_lr_scale)
    start = resume(folder, value_encoder, optimizer, dataset.key, s.steps)
    add = partial(add_gradient, sd, value_encoder, schedule=schedule, s=s)
    if RANK == 0:
        log = Log(folder, start, tensorboard)
        save_settings(folder, s)  # after the checks, so that a refused run keeps its former ones

    for step in (bar := tqdm(range(start, s.steps), initial=start, total=s.steps, disable=RANK > 0)):
        errors = take_step(step, value_encoder, optimizer, add, dataset, timesteps, s)
        samples = [dataset.aligned_at(step * s.batch + row, s.seed)[0] for row in range(s.batch)]  # of all processes
        preservation = torch.tensor([is_preservation(sample) for sample in samples], device=errors.device)
        gammas = margins([sample.value for sample in samples], preservation, s)
        line, done = summarize(step, errors, *gammas, s), step + 1
        bar.set_postfix({key: f"{value:.3g}" for key, value in line.items() if key != "step"})
        stop = torch.tensor(float(sum(signals)), device=errors.device)
        sum_over_processes(stop)  # a signal may reach one process a step before another
        if RANK == 0:
            log.add(line)
            warn_if_saturated(log.lines, s)
            if done % s.sample_every == 0 and done < s.steps and not stop:  # first, so that a kill loses none
                save_samples(sd, value_encoder, dataset, folder / "samples" / f"{done:05}.png")
            if done % s.save_every == 0 or done == s.steps or stop:
                save_checkpoint(folder, value_encoder, optimizer, done, dataset.key)
        if stop:
            print(f"stopped after step {done}; resume with python train.py --resume {folder}", file=sys.stderr)
            sys.exit(128 + max(signals, default=signal.SIGTERM))
    return value_encoder


# ── The command ──────────────────────────────────────────────────────────────────────────────────────────────────────

def parse_args(argv=None):
    parser = Parser(description="Train a value encoder with the LiVO loss.")
    add_options(parser, Settings, load_preset(TINY_SD))
    folder = parser.add_mutually_exclusive_group()
    folder.add_argument("--out", type=Path, help="folder of the run (default: runs/livo)")
    folder.add_argument("--resume", type=Path, help="folder of a run to resume; options given anew win")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing: less memory")
    parser.add_argument("--tensorboard", action="store_true", help="log to OUT/tensorboard too")
    add_device_options(parser, default="bf16 on CUDA, else fp32")
    return parse_settings(parser, Settings, argv)


def main(argv=None):
    args, s, folder = parse_args(argv)
    device, dtype = pick_device(args.device, s.dtype)
    if device.type == "cuda" and s.dtype in ("", "auto"):
        dtype = torch.bfloat16  # float16 underflows for small gradients
    join_processes(device)
    sd = weights.load(s.weights, dtype=dtype, text_dtype=torch.float32,  # the value encoder is a copy
                      device=device, tokenizer=s.tokenizer or None, prediction_type=s.prediction or None)
    keep_freed_memory(large=True)
    if args.checkpointing:
        checkpoint_layers(sd.unet, (ResnetBlock, SpatialTransformer))
    from formats.disk import locked
    with locked(folder) if RANK == 0 else nullcontext():
        carry_out(args, s, folder, sd)


def carry_out(args, s, folder, sd):
    """Read the data, train, and write the results."""
    if s.data == TOY:
        from lab import toy  # the one place where the core imports the lab
    if not args.resume:
        check_new(folder)  # again, as another run may have ended here meanwhile
        if RANK == 0:
            save_settings(folder, s)  # before the long work, so that it can be resumed
    with one_first():
        root = toy.default_pairs(folder.parent) if s.data == TOY else s.data
        dataset = PreferenceDataset(root, sd, folder.parent / "cache")
    with caught_signals() as signals:
        value_encoder = fit(sd, dataset, s, folder, signals, args.tensorboard)
    if signals:  # one that came while the last checkpoint was written
        sys.exit(128 + max(signals))
    if RANK == 0:
        weights.save_text_encoder(value_encoder, folder / "value_encoder")
        save_samples(sd, value_encoder, dataset, folder / "samples" / "final.png")
        if s.data == TOY:
            toy.print_table(sd, value_encoder)
        elif load_preset(s.weights).get("data") == TOY:
            print(f"measure it with: python -m lab.evaluate --quick {folder}")
        print(f"the value encoder is in {folder / 'value_encoder'}, images are in {folder / 'samples'}")


if __name__ == "__main__":
    run(main)
