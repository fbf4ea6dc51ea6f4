"""Times of this repository beside those of what one would use otherwise, measured in one run.

    python bench.py                            # all parts, on tiny-sd
    python bench.py sample --full --size 512   # the SD 1.5 architecture with random weights
    python bench.py train --full --size 256    # one pair a step
    python bench.py load --full
    python bench.py attention                  # the kernels of attention.py, on a GPU

Theirs is diffusers' pipeline, the authors' training step rewritten with diffusers and transformers, and
scaled_dot_product_attention. (With the package accelerate, diffusers loads faster.) ratio: theirs / ours, so that
above 1 ours is the faster one. Every run has a process of its own, ours and theirs in turns, and the median counts.
peak: of a process's memory, with all that it has loaded; on a GPU, of the GPU's. floor: the time that ours would
take if it were nothing but matrix products.
"""

import contextlib
import json
import multiprocessing
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch.utils.flop_counter import FlopCounterMode

import train
import common
import weights
from attention import attend, has_kernels
from common import Parser, UserError, add_device_options, atomic, keep_freed_memory, number, pick_device, run
from clip_text import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from data import Pair
from livo import ALPHA, BETA, ValueEncoder, encode_prompts, make_context, make_uncond
from sample import Schedule, sample_images
from unet import UNet, UNetConfig
from vae import VAE

TINY_SD = Path(__file__).parent.parent / "tiny-sd"
PROMPT, PRINCIPLE, GUIDANCE, SEED = "a portrait of a doctor", "gender equality", 7.5, 0
MARGIN = 10.0  # γ1 and γ2, so wide that no hinge is silent: a silent one would spare us, not them, the way back
PRODUCT = 2048  # rows and columns of the matrices whose product gives the floor's rate

ROUNDS = 15  # of runs in alternation, of which the median counts
CALLS = 10  # in one run on a GPU, so that a kernel of 10 µs is far above the timer's resolution
BUSY = 20_000_000  # clock cycles, some 10 ms: in that time a GPU is given all calls of a run

ATTENTION = [  # of the levels of the UNet: (model, heads, head size, side of the map)
    *(("SD 1.5, 512×512", 8, d, side) for d, side in [(40, 64), (80, 32), (160, 16), (160, 8)]),
    *(("SD 2.1, 768×768", heads, 64, side) for heads, side in [(5, 96), (10, 48), (20, 24), (20, 12)]),
]
TEXT = 77  # tokens


# ── attention ───────────────────────────────────────────────────────────────────────────────────────────────────────


def seconds(call, device):
    """Of one call. On a GPU, of its work there alone: it is kept busy until the host has asked for everything."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(BUSY)
    start.record()
    for _ in range(CALLS):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / CALLS


def medians(calls, device):
    """Seconds of each call, medians of runs in alternation: what disturbs one disturbs the others as well."""
    for call in calls:
        call()  # compiles
    times = [[seconds(call, device) for call in calls] for _ in range(ROUNDS)]
    return [statistics.median(column) for column in zip(*times)]


def sdpa(q, k, v, heads):
    """`attend` as it would be written without kernels of one's own. q (B, N, heads·d) -> (B, N, heads·d)."""
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")


def bench_attention(model, args):
    """Self- and cross-attention of every level, forward and with the gradients of q, k and v."""
    (device, dtype), batch = pick_device(args.device, args.dtype), args.batch or 2  # guidance makes 2 of a picture
    dtype = dtype or weights.fastest_dtype(device)
    if not (has_kernels(device) and dtype.itemsize == 2):
        print(f"On {device.type} in {dtype} ours IS scaled_dot_product_attention: the ratios show the timer's noise.")
    print(f"{'milliseconds':28}{'forward':>24}{'and backward':>26}")
    print(f"{'':28}{'ours':>8}{'theirs':>8}{'ratio':>8}{'ours':>10}{'theirs':>8}{'ratio':>8}")
    shown, rows = None, []
    for name, heads, d, side in ATTENTION:
        if device.type != "cuda" and side > 16:
            continue  # would take minutes
        if name != shown:
            print(shown := name)
        N, C = side * side, heads * d
        for M in (N, TEXT):
            # slices of larger products, as they come from `project`
            k, v = torch.randn(batch, M, 3 * C, device=device, dtype=dtype)[..., C:].split(C, dim=-1)
            q, d_out = torch.randn(2, batch, N, C, device=device, dtype=dtype)
            q, k, v = (x.detach().requires_grad_() for x in (q, k, v))

            def forward(attention):
                with torch.no_grad():
                    attention(q, k, v, heads)

            def both(attention):
                torch.autograd.grad(attention(q, k, v, heads), (q, k, v), d_out)

            row = what = f"  {heads:2} × {d:3}, {N:4} over {M:4}"
            for call, label, width in ((forward, "forward", 8), (both, "and backward", 10)):
                ours, theirs = medians([lambda f=f: call(f) for f in (attend, sdpa)], device)
                row += f"{ours * 1e3:{width}.3f}{theirs * 1e3:8.3f}{theirs / ours:8.2f}"
                rows.append({"what": f"attention, {name},{what}, {label}", "ours": ours, "theirs": theirs,
                             "ratio": theirs / ours})  # fmt: skip
            print(row)
    return rows


# ── sampling ────────────────────────────────────────────────────────────────────────────────────────────────────────
#
# Each side of a comparison, here and below, gives seconds, and what a test compares.


def clock(device):
    """Seconds, once the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def between(stamps):
    """Seconds of a step, given when each ended. The first is left out: it prepares what the others use."""
    return statistics.median(after - before for before, after in pairwise(stamps[1:]))


def drawing_ours(folder, device, dtype, size, n, steps, whole):
    """n pictures, guided -> seconds from the prompt to the pictures, or else of a step; PIL images."""
    sd = weights.load(folder, dtype=dtype, device=device)
    stamps = [clock(device)]
    with torch.no_grad():
        context, uncond = make_context(sd, [PROMPT]), make_uncond(sd, 77)
    images = list(sample_images(sd, context, uncond, range(SEED, SEED + n), height=size, width=size, batch_size=n,
                           steps=steps, guidance=GUIDANCE,
                           after_step=lambda _: stamps.append(clock(device))))  # fmt: skip
    return clock(device) - stamps[0] if whole else between(stamps), images


def drawing_theirs(folder, device, dtype, size, n, steps, whole, compiled=False):
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, safety_checker=None)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.to(device).set_progress_bar_config(disable=True)
    if compiled:
        pipe.unet.compile(fullgraph=True)
    stamps = [clock(device)]

    def stamp(pipe, i, t, tensors):
        stamps.append(clock(device))
        return tensors

    images = pipe([PROMPT] * n, height=size, width=size, num_inference_steps=steps, guidance_scale=GUIDANCE,
                  generator=[torch.Generator().manual_seed(SEED + i) for i in range(n)],
                  callback_on_step_end=stamp).images  # fmt: skip
    return clock(device) - stamps[0] if whole else between(stamps), images


# ── training ────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_pairs(folder, device, dtype, size, n, file):
    """n pairs of pictures with all their noise, and what our cache would hold of them."""
    sd, generator = weights.load(folder, dtype=dtype, device=device), torch.Generator().manual_seed(SEED)
    images = torch.rand((2 * n, 3, size, size), generator=generator) * 2 - 1  # the aligned ones, then the violating
    with torch.no_grad():
        mean, logvar = (torch.cat(parts).cpu() for parts in zip(
            *(sd.vae.encode(x.to(device)) for x in images.split(1))))
        prompt_embeds = encode_prompts(sd, [PROMPT]).cpu().expand(n, -1, -1)
    noise, eps = (torch.randn((rows, *mean.shape[1:]), generator=generator) for rows in (2 * n, n))
    torch.save({"images": images, "noise": noise, "z": mean + (logvar / 2).exp() * noise, "prompt_embeds": prompt_embeds,
                "eps": eps, "t": torch.linspace(100, 900, n).long()}, file)
    return 0.0, None


def timed_steps(step, value_encoder, device, steps):
    """-> seconds of a training step, the first loss. step() adds the gradient and gives the loss."""
    optimizer = torch.optim.AdamW(value_encoder.parameters(), 1e-6, train.BETAS, train.EPS, train.WEIGHT_DECAY)
    stamps, losses = [clock(device)], []
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=False)
        losses.append(step())
        torch.nn.utils.clip_grad_norm_(value_encoder.parameters(), train.MAX_NORM)
        optimizer.step()
        stamps.append(clock(device))
    return between(stamps), losses[0]


def training_ours(folder, device, dtype, size, n, steps, file):
    sd, saved = weights.load(folder, dtype=dtype, device=device), torch.load(file)
    keep_freed_memory(large=True)  # as train.py
    z_w, z_l = saved["z"].chunk(2)
    pairs = [Pair(PROMPT, PRINCIPLE, *row, int(t), False, "") for *row, t in zip(
        saved["prompt_embeds"], z_w, z_l, saved["eps"], saved["t"])]  # fmt: skip
    value_encoder = ValueEncoder.from_text_encoder(sd.text_encoder)
    s, schedule = train.Settings(batch=n, gamma1=MARGIN, gamma2=MARGIN), Schedule(sd.scheduler)

    def step():
        return train.summarize(0, train.add_gradient(sd, value_encoder, pairs, schedule, s), [PRINCIPLE] * n, s)["loss"]

    return timed_steps(step, value_encoder, device, steps)


def training_theirs(folder, device, dtype, size, n, steps, file):
    """The authors' step: nothing is cached, and both hinges go backward at once, hence the checkpointing."""
    import diffusers
    import transformers

    part = {name: kind.from_pretrained(folder, subfolder=name, torch_dtype=dtype).to(device).requires_grad_(False)
            for name, kind in [("unet", diffusers.UNet2DConditionModel), ("vae", diffusers.AutoencoderKL),
                               ("text_encoder", transformers.CLIPTextModel)]}  # fmt: skip
    value_encoder = transformers.CLIPTextModel.from_pretrained(folder, subfolder="text_encoder",
                                                               torch_dtype=torch.float32).to(device)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    scheduler = diffusers.DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    unet, vae = part["unet"].train(), part["vae"]  # only in training does it recompute
    unet.enable_gradient_checkpointing()
    saved = {name: tensor.to(device) for name, tensor in torch.load(file).items()}
    t, eps = saved["t"], saved["eps"]

    def ids(text):
        return tokenizer([text] * n, padding="max_length", max_length=77, truncation=True,
                         return_tensors="pt").input_ids.to(device)  # fmt: skip

    def error(z_t, context):
        return (unet(z_t, t, context).sample.float() - eps).square().mean((1, 2, 3))

    def errors(images, noise, context, prompt_embeds):
        with torch.no_grad():
            latents = vae.encode(images.to(dtype)).latent_dist
            z = (latents.mean + latents.std * noise) * vae.config.scaling_factor
            z_t = scheduler.add_noise(z, eps, t).to(dtype)
            ref = error(z_t, prompt_embeds)
        return error(z_t, context), ref

    def step():
        with torch.no_grad():
            prompt_embeds = part["text_encoder"](ids(PROMPT)).last_hidden_state
        value = value_encoder(ids(f"{PRINCIPLE}, {PROMPT}")).pooler_output[:, None]
        context = torch.cat([value.to(dtype), prompt_embeds], 1)
        (err_w, ref_w), (err_l, ref_l) = (errors(images, noise, context, prompt_embeds) for images, noise
                                          in zip(saved["images"].chunk(2), saved["noise"].chunk(2)))
        loss = (F.relu(MARGIN + BETA * (err_w - ref_w)) + F.relu(MARGIN + ALPHA * (ref_l - err_l))).mean()
        loss.backward()
        return loss.item()

    return timed_steps(step, value_encoder, device, steps)


# ── loading ─────────────────────────────────────────────────────────────────────────────────────────────────────────

# From the start of Python to the first noise predicted, of a latent so small that it takes no time.
LOAD_OURS = """
import weights, torch
networks = vars(weights.load({folder!r}, dtype={dtype}, device={device!r}))
output = lambda *inputs: networks["unet"](*inputs)
"""
LOAD_THEIRS = """
import diffusers, torch
networks = diffusers.StableDiffusionPipeline.from_pretrained({folder!r}, torch_dtype={dtype},
                                                             safety_checker=None).to({device!r}).components
output = lambda *inputs: networks["unet"](*inputs).sample
"""
LOAD_END = """
import time
weight = next(networks["unet"].parameters())
x, context = weight.new_zeros(1, 4, 8, 8), weight.new_zeros(1, 77, networks["unet"].config.cross_attention_dim)
with torch.no_grad():
    assert output(x, 500, context).isfinite().all()
print(time.time(), sum(p.nbytes for n in networks.values() if hasattr(n, "parameters") for p in n.parameters()))
"""


def loading(script, folder, device, dtype):
    """-> seconds, the bytes of the weights."""
    start = time.time()
    code = (script + LOAD_END).format(folder=str(folder), device=str(device), dtype=dtype)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    if result.returncode:
        raise RuntimeError(result.stderr)
    end, size = result.stdout.split()[-2:]
    return float(end) - start, int(size)


# ── the floor ───────────────────────────────────────────────────────────────────────────────────────────────────────


def unet_operations(config, side, n, tokens, contexts=1, backward=False):
    """Of the matrix products and convolutions in a UNet call of n latents, side × side, and, if asked for, in the way
    back from it to the contexts."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:  # "meta": shapes without values
        unet = UNet(config).requires_grad_(False)
        context = torch.empty(contexts * n, tokens, config.cross_attention_dim, requires_grad=backward)
        output = unet(torch.empty(n, config.in_channels, side, side), 500, context)
        if backward:
            output.sum().backward()
    return counter.get_total_flops()


def rate(device, dtype):
    """Operations a second of the machine's matrix product, at its best."""
    a, b = torch.randn(2, PRODUCT, PRODUCT, device=device, dtype=dtype)
    return 2 * PRODUCT**3 / min(seconds(lambda: a @ b, device) for _ in range(ROUNDS))


# ── rows ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def measured(call):
    """-> seconds, bytes of memory at the peak, of this process or of those that it has started."""
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of libraries, about their next version
        taken, _ = call()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return taken, torch.cuda.max_memory_allocated()
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return taken, peak * (1 if sys.platform == "darwin" else 1024)


def apart(call):
    """`measured(call)` in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measured, call).result()


def compare(what, ours, theirs, runs, floor=None):
    """Print and return a row: medians of runs in turns."""
    taken = torch.tensor([[apart(ours), apart(theirs)] for _ in range(runs)], dtype=torch.float64)  # (runs, 2, 2)
    (seconds_ours, peak_ours), (seconds_theirs, peak_theirs) = taken.median(0).values.tolist()
    row = {"what": what, "ours": seconds_ours, "theirs": seconds_theirs, "ratio": seconds_theirs / seconds_ours,
           "peak_ours": peak_ours, "peak_theirs": peak_theirs, "floor": floor}
    print(f"{what:52}{seconds_ours:9.3f}{seconds_theirs:9.3f}{row['ratio']:7.2f}{peak_ours / 1e9:8.2f}"
          f"{peak_theirs / 1e9:8.2f}" + (f"{floor:9.3f}" if floor else ""), flush=True)
    return row


def short(dtype):
    return str(dtype).removeprefix("torch.")


HEADER = f"{'seconds, GB at the peak':52}{'ours':>9}{'theirs':>9}{'ratio':>7}{'peak':>8}{'peak':>8}{'floor':>9}"


def dtypes(model, args):
    """The option --dtype -> [(label, our dtype, theirs)]. Without it, float32 on both sides, and then our "auto", which
    is None, beside float32, diffusers' default."""
    if args.dtype not in (None, "auto"):
        _, dtype = pick_device(args.device, args.dtype)
        return [(short(dtype), dtype, dtype)]
    fastest = weights.fastest_dtype(model.device, model.unet)
    rows = [("float32", torch.float32, torch.float32)]
    return rows + [(f"auto: {short(fastest)}, theirs float32", None, torch.float32)] * (fastest != torch.float32)


def bench_sample(model, args):
    """tiny-sd's pictures as a whole; of the full size a step, of which a picture takes 50."""
    device, n, steps = model.device, args.batch or (1 if args.full else 8), args.steps or (4 if args.full else 50)
    size = args.size or model.size
    what = f"step, {n} × {size}×{size}" if args.full else f"{n} pictures, {steps} steps"
    for label, ours, theirs in dtypes(model, args):
        ours, theirs = (partial(side, model.folder, device, dtype, size, n, steps, whole=not args.full)
                        for side, dtype in ((drawing_ours, ours), (drawing_theirs, theirs)))  # fmt: skip
        count = unet_operations(model.unet, size // model.factor, n, 77, contexts=2) * (1 if args.full else steps)
        floor = count / rate(device, ours.args[2] or weights.fastest_dtype(device, model.unet))
        yield compare(f"{what}, {label}", ours, theirs, args.runs, floor)
        if device.type == "cuda" and args.full:
            yield compare(f"{what}, {label}, compiled", ours, partial(theirs, compiled=True), args.runs, floor)


def bench_train(model, args):
    device, n, steps = model.device, args.batch or (1 if args.full else 16), args.steps or (3 if args.full else 6)
    _, dtype, _ = dtypes(model, args)[0]
    for size in [args.size] if args.size else [256, 512] if args.full else [model.size]:
        file, side = model.folder / f"pairs-{size}.pt", size // model.factor
        apart(partial(write_pairs, model.folder, device, dtype, size, n, file))
        calls = [partial(call, model.folder, device, dtype, size, n, steps, file)
                 for call in (training_ours, training_theirs)]
        count = 2 * (unet_operations(model.unet, side, n, 77) + unet_operations(model.unet, side, n, 78, backward=True))
        yield compare(f"training step, {n} pairs, {size}×{size}, {short(dtype)}", *calls, args.runs,
                      count / rate(device, dtype))


def bench_load(model, args):
    for label, ours, theirs in dtypes(model, args):
        calls = [partial(loading, script, model.folder, model.device, dtype)
                 for script, dtype in ((LOAD_OURS, ours), (LOAD_THEIRS, theirs))]
        size = calls[0]()[1]  # and the files are in the page cache
        yield compare(f"load {size / 1e9:.2f} GB of weights, {label}", *calls, args.runs)


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Model:
    """What is measured, and where."""

    folder: Path
    unet: UNetConfig
    factor: int  # pixels per latent pixel
    size: int  # in pixels
    device: torch.device


def write_full(folder):
    """The SD 1.5 architecture with random weights, in float16 files."""
    torch.manual_seed(SEED)
    words = CLIPTokenizer(TINY_SD / "tokenizer")
    networks = UNet(), VAE(), CLIPTextModel(CLIPTextConfig(eos_token_id=words.eos_token_id))
    weights.save(weights.StableDiffusion(*networks, words, weights.SCHEDULER | {"prediction_type": "epsilon"}), folder)
    return 0.0, None


@contextlib.contextmanager
def prepared(full, device):
    """Yield the Model, in a temporary folder."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        if full:
            apart(partial(write_full, folder))
        else:
            shutil.copytree(TINY_SD, folder)
        unet, vae = (weights.read_config(folder / part / "config.json", kind)
                     for part, kind in (("unet", UNet), ("vae", VAE)))  # fmt: skip
        yield Model(folder, unet, vae.factor, unet.sample_size * vae.factor, device)


def machine(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} cores of {torch.cpu.get_capabilities().get('cpu_name', platform.processor())}"


def save_rows(machine, rows):
    """Into assets/bench-MACHINE.json, in the place of older ones of the same model and thing."""
    slug = re.sub(r"\W+", "-", machine.lower())
    file = Path(__file__).parent.parent / "assets" / f"bench-{slug}.json"
    found = common.read_json(file)["rows"] if file.exists() else []
    by_what = {(row["model"], row["what"]): row for row in [*found, *rows]}
    with atomic(file) as path:
        text = json.dumps({"machine": machine, "rows": [*by_what.values()]}, indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


PARTS = {"sample": bench_sample, "train": bench_train, "load": bench_load, "attention": bench_attention}


def main(argv=None):
    parser, count = Parser(description=__doc__.splitlines()[0]), number(int, 1, 1024)
    parser.add_argument("part", nargs="?", choices=PARTS, help="one of them; all if left out")
    parser.add_argument("--full", action="store_true", help="the SD 1.5 architecture with random weights, not tiny-sd")
    parser.add_argument("--runs", type=count, default=3, help="of each side; of an even number the lower median counts")
    parser.add_argument("--size", type=count, help="of the pictures, in pixels; the model's own if left out")
    parser.add_argument("--batch", type=count, help="pictures, pairs, or samples to attend")
    parser.add_argument("--steps", type=number(int, 3, 1000), help="of a run")
    parser.add_argument("--save", action="store_true", help="write the rows into assets/bench-MACHINE.json")
    add_device_options(parser)
    args = parser.parse_args(argv)
    os.environ |= {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    device, _ = pick_device(args.device, args.dtype)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    rows = []
    with prepared(args.full, device) as model:
        if args.size and args.size % model.factor:
            raise UserError(f"--size {args.size}: expected a multiple of {model.factor}")
        name = "SD 1.5, random" if args.full else "tiny-sd"
        print(f"{machine(device)}, torch {torch.__version__}, {name}")
        if args.part != "attention":
            print(HEADER)
        for part in [args.part] if args.part else PARTS:
            rows += PARTS[part](model, args)
    if args.save:
        about = {"model": name, "torch": torch.__version__, "runs": args.runs}
        save_rows(machine(device), [about | row for row in rows])


if __name__ == "__main__":
    run(main)
