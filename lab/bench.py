"""Compares this repository's speed and memory with diffusers, a reference implementation of training, and torch.

    python -m lab.bench                            # the parts but unet and operators, on tiny-sd
    python -m lab.bench sample --full --size 512   # the SD 1.5 architecture with random weights
    python -m lab.bench train --full --size 256    # one pair per step
    python -m lab.bench load --full
    python -m lab.bench unet --full                # one UNet call beside OpenVINO's (pip install openvino)
    python -m lab.bench operators --full           # where the time of such a call goes
    python -m lab.bench attention                  # the Triton kernels of attention.py, on a GPU

References: diffusers' pipeline for sampling and loading (with the package accelerate it loads faster), the authors'
recipe with diffusers and transformers for a training step, scaled_dot_product_attention, OpenVINO. Both sides of a row
compute in the same precision. ratio: reference / ours, so above 1 ours is faster. Each run has its own process, the two
sides alternate, and medians are compared. peak: GB of a process's memory, libraries and weights included, or of GPU
memory.
"""

import contextlib
import copy
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
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange

import efficiency
import train
import weights
from attention import attend, has_kernels
from clip_text import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from common import Parser, UserError, number, read_json, run, write_json
from data import Pair
from efficiency import add_device_options, keep_freed_memory, pick_device
from formats.checks import read_config
from formats.export import save
from formats.messages import expecting
from livo import ALPHA, BETA, ValueEncoder, encode_prompts
from sample import MAX_SCALE, Schedule, generate
from unet import UNet
from vae import VAE

ROOT = Path(__file__).parent.parent
TINY_SD, ASSETS = ROOT / "tiny-sd", ROOT / "assets"
PROMPT, PRINCIPLE, GUIDANCE, SEED = "a portrait of a doctor", "gender equality", 7.5, 0
MARGIN = 10.0  # γ1 and γ2, so large that no hinge saturates: ours skips the backward pass of a saturated one

ROUNDS = 15  # of alternating attention calls
CALLS = 10  # per timing on a GPU, so that a kernel of 10 µs is far above the timer's resolution
BUSY = 20_000_000  # clock cycles, about 10 ms: long enough to enqueue all calls of a timing

LEVELS = [  # of the UNet, at 512×512 and 768×768 pixels: (model, heads, head size, side of the feature map)
    ("SD 1.5", 8, 40, 64), ("SD 1.5", 8, 80, 32), ("SD 1.5", 8, 160, 16), ("SD 1.5", 8, 160, 8),
    ("SD 2.1", 5, 64, 96), ("SD 2.1", 10, 64, 48), ("SD 2.1", 20, 64, 24), ("SD 2.1", 20, 64, 12)]
TEXT = 77  # tokens


# ── attention ───────────────────────────────────────────────────────────────────────────────────────────────────────

def seconds(call, device):
    """Seconds of one call. On a GPU, of the GPU's work alone."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(BUSY)  # the GPU waits here until the host has enqueued all calls
    start.record()
    for _ in range(CALLS):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / CALLS


def median_seconds(calls, device):
    """Median seconds of each call. The calls alternate, so that a disturbance hits all of them."""
    for call in calls:
        call()  # compile
    rounds = [[seconds(call, device) for call in calls] for _ in range(ROUNDS)]
    return [statistics.median(column) for column in zip(*rounds)]


def sdpa(q, k, v, heads):
    """`attend` without custom kernels: q (B, N, heads·d), k and v (B, M, heads·d) -> (B, N, heads·d)."""
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")


def time_attention(batch, heads, d, N, M, device, dtype):
    """Yield what is measured, median seconds of `attend`, and of `sdpa`."""
    C = heads * d
    # k and v are slices of one tensor, as from `project`
    k, v = torch.randn(batch, M, 3 * C, device=device, dtype=dtype)[..., C:].split(C, dim=-1)
    q, d_out = torch.randn(2, batch, N, C, device=device, dtype=dtype)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))

    def forward(attention):
        with torch.no_grad():
            attention(q, k, v, heads)

    def forward_and_backward(attention):
        torch.autograd.grad(attention(q, k, v, heads), (q, k, v), d_out)

    for call, label in (forward, "forward"), (forward_and_backward, "and backward"):
        yield label, *median_seconds([partial(call, attend), partial(call, sdpa)], device)


def bench_attention(model, args):
    """Self- and cross-attention of every level of the UNet."""
    (device, dtype), batch = pick_device(args.device, args.dtype), args.batch or 2  # guidance takes 2 samples an image
    dtype = dtype or efficiency.fastest_dtype(device)
    if not (has_kernels(device) and dtype.itemsize == 2):
        print(f"On {device.type} in {dtype} ours IS scaled_dot_product_attention: the ratios show the timer's noise.")
    print_header("milliseconds", "sdpa", peaks=False)
    for name, heads, d, side in LEVELS:
        if device.type != "cuda" and side > 16:
            continue  # takes minutes
        for M in (side * side, TEXT):
            for label, ours, reference in time_attention(batch, heads, d, side * side, M, device, dtype):
                what = f"attention, {name}, {heads} × {d}, {side * side} over {M}, {label}"
                yield print_row(what, ours, reference, unit=1e-3)


# ── sampling ────────────────────────────────────────────────────────────────────────────────────────────────────────
#
# The functions of both sides, here and below, return seconds and what a test compares.


def clock(device):
    """The time in seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def step_seconds(stamps):
    """Median seconds of a step, from the times when each step ended. The first step is left out: it warms up."""
    return statistics.median(after - before for before, after in pairwise(stamps[1:]))


def time_calls(call, n, device):
    """-> seconds of one of n calls, what the first returned."""
    stamps, outputs = [clock(device)], []
    for _ in range(n):
        outputs.append(call())
        stamps.append(clock(device))
    return step_seconds(stamps), outputs[0]


def sample_ours(folder, device, dtype, size, n, steps, whole):
    """Generate n images with guidance -> seconds from prompt to images if `whole`, else of a step; PIL images."""
    sd = weights.load(folder, dtype=dtype, vae_dtype=dtype, device=device)
    stamps = [clock(device)]
    rows = list(generate(sd, PROMPT, "", [], None, range(SEED, SEED + n), height=size, width=size, batch_size=n,
                         steps=steps, guidance=GUIDANCE, after_step=lambda _: stamps.append(clock(device))))
    return clock(device) - stamps[0] if whole else step_seconds(stamps), [image for _, image, _ in rows]


def load_diffusers(folder, device, dtype):
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, safety_checker=None)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.to(device).set_progress_bar_config(disable=True)
    return pipe


def sample_diffusers(folder, device, dtype, size, n, steps, whole, compiled=False):
    """The same with diffusers' pipeline."""
    pipe = load_diffusers(folder, device, dtype)
    if compiled:
        pipe.unet.compile(fullgraph=True)
    stamps = [clock(device)]

    def stamp(pipe, i, t, tensors):
        stamps.append(clock(device))
        return tensors

    images = pipe([PROMPT] * n, height=size, width=size, num_inference_steps=steps, guidance_scale=GUIDANCE,
                  generator=[torch.Generator().manual_seed(SEED + i) for i in range(n)],
                  callback_on_step_end=stamp).images  # fmt: skip
    return clock(device) - stamps[0] if whole else step_seconds(stamps), images


# ── one UNet call ───────────────────────────────────────────────────────────────────────────────────────────────────

def unet_inputs(config, side, n, device="cpu", dtype=torch.float32):
    """Of n guided images: noise (2n, 4, side, side), a timestep, context (2n, 77, D)."""
    torch.manual_seed(SEED)
    x, context = torch.randn(2 * n, 4, side, side), torch.randn(2 * n, TEXT, config.cross_attention_dim)
    return x.to(device, dtype), torch.tensor([500]), context.to(device, dtype)


def unet_ours(folder, device, dtype, side, n, calls):
    """Call the UNet on the latents of n guided images -> seconds of a call, its output."""
    unet = weights.load(folder, dtype=dtype, vae_dtype=dtype, device=device).unet
    inputs = unet_inputs(unet.config, side, n, device, dtype)
    with torch.no_grad():
        return time_calls(lambda: unet(*inputs).float(), calls, device)


def write_openvino(folder, side, n, file):
    """Convert diffusers' UNet, in float32: OpenVINO lowers the precision itself."""
    import openvino

    unet = load_diffusers(folder, "cpu", torch.float32).unet
    inputs = unet_inputs(unet.config, side, n)
    with torch.no_grad():
        model = openvino.convert_model(unet, example_input=inputs, input=[tuple(x.shape) for x in inputs])
    openvino.save_model(model, file, compress_to_fp16=False)


def unet_openvino(folder, device, dtype, side, n, calls, file):
    """The same with OpenVINO's copy of diffusers' UNet, on as many threads."""
    import openvino

    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    model = openvino.Core().compile_model(file, "CPU", {
        "INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()})
    inputs = [x.numpy() for x in unet_inputs(read_config(folder / "unet" / "config.json", UNet), side, n)]
    request = model.create_infer_request()
    return time_calls(lambda: torch.from_numpy(request.infer(inputs)[0].copy()), calls, device)


def print_operators(folder, device, dtype, side, n, rows=12):
    """Print torch's profile of one UNet call after a first one."""
    unet = weights.load(folder, dtype=dtype, vae_dtype=dtype, device=device).unet
    inputs = unet_inputs(unet.config, side, n, device, dtype)
    with torch.no_grad():
        unet(*inputs)
        with torch.profiler.profile() as found:
            unet(*inputs)
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=rows, max_name_column_width=40))


# ── training ────────────────────────────────────────────────────────────────────────────────────────────────────────

def write_pairs(folder, device, dtype, size, n, file):
    """Write n random preference pairs with all their noise, as images and as what our cache would hold of them."""
    sd, generator = weights.load(folder, dtype=dtype, device=device), torch.Generator().manual_seed(SEED)
    images = torch.rand((2 * n, 3, size, size), generator=generator) * 2 - 1  # n aligned ones, then n violating ones
    with torch.no_grad():
        encoded = [sd.vae.encode(image.to(device)) for image in images.split(1)]
        mean, logvar = (torch.cat(tensors).cpu() for tensors in zip(*encoded))  # (2n, 4, h, w)
        prompt_embeds = encode_prompts(sd, [PROMPT]).cpu().expand(n, -1, -1)
    noise, eps = (torch.randn((rows, *mean.shape[1:]), generator=generator) for rows in (2 * n, n))
    z, t = mean + (logvar / 2).exp() * noise, torch.linspace(100, 900, n).long()
    torch.save({"images": images, "noise": noise, "z": z, "prompt_embeds": prompt_embeds, "eps": eps, "t": t}, file)


def time_steps(step, value_encoder, device, steps):
    """-> seconds of a training step, the first loss. step(): adds the gradient and returns the loss."""
    optimizer = torch.optim.AdamW(
        value_encoder.parameters(), 1e-6, train.ADAM_BETAS, train.ADAM_EPS, train.WEIGHT_DECAY)

    def update():
        optimizer.zero_grad(set_to_none=False)
        loss = step()
        torch.nn.utils.clip_grad_norm_(value_encoder.parameters(), train.MAX_NORM)
        optimizer.step()
        return loss

    return time_calls(update, steps, device)


def train_ours(folder, device, dtype, size, n, steps, file):
    sd, saved = weights.load(folder, dtype=dtype, device=device), torch.load(file)
    keep_freed_memory(large=True)  # as train.py
    rows = zip(saved["prompt_embeds"], *saved["z"].chunk(2), saved["eps"], saved["t"].tolist())
    pairs = [Pair(PROMPT, PRINCIPLE, *row, preservation=False, where="") for row in rows]
    value_encoder = ValueEncoder.from_text_encoder(sd.text_encoder)
    s, schedule = train.Settings(batch=n, gamma1=MARGIN, gamma2=MARGIN), Schedule(sd.scheduler)

    def step():
        errors = train.add_gradient(sd, value_encoder, pairs, schedule, s)
        return train.summarize(0, errors, MARGIN, MARGIN, s)["loss"]

    return time_steps(step, value_encoder, device, steps)


def train_reference(folder, device, dtype, size, n, steps, file):
    """The authors' recipe: nothing is cached, and one backward pass takes both hinges, hence the checkpointing."""
    pipe = load_diffusers(folder, device, dtype)
    value_encoder = copy.deepcopy(pipe.text_encoder).float()
    for network in pipe.unet, pipe.vae, pipe.text_encoder:
        network.requires_grad_(False)
    pipe.unet.train().enable_gradient_checkpointing()  # which diffusers does in training mode only
    saved = {name: tensor.to(device) for name, tensor in torch.load(file).items()}

    def tokenize(text):
        ids = pipe.tokenizer([text] * n, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return ids.to(device)

    def error(z_t, context):
        return (pipe.unet(z_t, saved["t"], context).sample.float() - saved["eps"]).square().mean((1, 2, 3))

    def step():
        with torch.no_grad():
            prompt_embeds = pipe.text_encoder(tokenize(PROMPT)).last_hidden_state
        value = value_encoder(tokenize(f"{PRINCIPLE}, {PROMPT}")).pooler_output[:, None]
        context = torch.cat([value.to(dtype), prompt_embeds], 1)  # (n, 78, C)
        err, ref = [], []
        for images, noise in zip(saved["images"].chunk(2), saved["noise"].chunk(2)):  # aligned, then violating
            with torch.no_grad():
                latents = pipe.vae.encode(images.to(dtype)).latent_dist
                z = (latents.mean + latents.std * noise) * pipe.vae.config.scaling_factor
                z_t = pipe.scheduler.add_noise(z, saved["eps"], saved["t"]).to(dtype)
                ref.append(error(z_t, prompt_embeds))
            err.append(error(z_t, context))
        loss = (F.relu(MARGIN + BETA * (err[0] - ref[0])) + F.relu(MARGIN + ALPHA * (ref[1] - err[1]))).mean()
        loss.backward()
        return loss.item()

    return time_steps(step, value_encoder, device, steps)


# ── loading ─────────────────────────────────────────────────────────────────────────────────────────────────────────

# From the start of Python to the first UNet output, for a latent so small that it takes no time.
LOAD_OURS = """
import torch, weights
sd = weights.load({folder!r}, dtype={dtype}, vae_dtype={dtype}, device={device!r})
"""
LOAD_DIFFUSERS = """
import torch, diffusers
sd = diffusers.StableDiffusionPipeline.from_pretrained({folder!r}, torch_dtype={dtype}, safety_checker=None)
sd.to({device!r})
"""
LOAD_END = """
import time
x, context = torch.zeros(1, 4, 8, 8), torch.zeros(1, 77, sd.unet.config.cross_attention_dim)
with torch.no_grad():
    output = sd.unet(x.to({device!r}, {dtype}), 500, context.to({device!r}, {dtype}))
assert output[0].isfinite().all()
print(time.time(), sum(p.nbytes for network in (sd.unet, sd.vae, sd.text_encoder) for p in network.parameters()))
"""


def load(script, folder, device, dtype):
    """Load all networks in a new Python -> seconds, bytes of the weights."""
    start = time.time()
    code = (script + LOAD_END).format(folder=str(folder), device=str(device), dtype=dtype)
    command = [sys.executable, "-W", "ignore", "-c", code]
    end, size = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=ROOT).stdout.split()[-2:]
    return float(end) - start, int(size)


# ── rows ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def measure(call):
    """-> seconds, and peak bytes of memory of this process or of those that it started."""
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of libraries, about their next version
        taken, _ = call()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return taken, torch.cuda.max_memory_allocated()
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return taken, peak * (1 if sys.platform == "darwin" else 1024)


def apart(function, *args):
    """function(*args) in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def print_header(unit, reference, peaks=True):
    print(f"{unit:56}{'ours':>8}{reference:>11}{'ratio':>7}" + peaks * f"{'peak: ours':>12}{reference:>11}")


def print_row(what, ours, reference, peaks=(), unit=1):
    """Print seconds of both sides, in this unit, and their peaks in bytes; return them as a row."""
    row = {"what": what, "ours": ours, "reference": reference, "ratio": reference / ours}
    peaks = dict(zip(("peak_ours", "peak_reference"), peaks))
    print(f"{what:56}{ours / unit:8.3f}{reference / unit:11.3f}{row['ratio']:7.2f}"
          + "".join(f"{peak / 1e9:{width}.2f}" for peak, width in zip(peaks.values(), (12, 11))), flush=True)
    return row | peaks


def compare(what, sides, where, runs):
    """Call both sides, ours and the reference, with `where`. Print and return a row: medians of alternating runs."""
    calls = [partial(side, *where) for side in sides]
    runs = torch.tensor([[apart(measure, call) for call in calls] for _ in range(runs)], dtype=torch.float64)
    taken, peaks = runs.median(0).values.T.tolist()  # (runs, 2, 2) -> (2, 2)
    return print_row(what, *taken, peaks)


def precisions(model, args):
    """The option --dtype -> [(dtype of both sides, its label)]. By default, and for "auto", float32 and the fastest."""
    _, dtype = pick_device(args.device, args.dtype or "auto")
    dtypes = [dtype] if dtype else dict.fromkeys([torch.float32, model.fastest])
    return [(dtype, f"both {str(dtype).removeprefix('torch.')}") for dtype in dtypes]


def bench_sample(model, args):
    """tiny-sd: from prompt to images. Full size: one of the 50 steps of an image."""
    device, n, steps = model.device, args.batch or (1 if args.full else 8), args.steps or (4 if args.full else 50)
    size = args.size or model.size
    what = f"step, batch {n}, {size}×{size}" if args.full else f"{n} images, {steps} steps"
    print_header("seconds", "diffusers")
    for dtype, label in precisions(model, args):
        where = model.folder, device, dtype, size, n, steps, not args.full
        yield compare(f"{what}, {label}", (sample_ours, sample_diffusers), where, args.runs)
        if device.type == "cuda" and args.full:
            sides = sample_ours, partial(sample_diffusers, compiled=True)
            yield compare(f"{what}, {label}, diffusers compiled", sides, where, args.runs)


def bench_train(model, args):
    device, n, steps = model.device, args.batch or (1 if args.full else 16), args.steps or (3 if args.full else 6)
    dtype, label = precisions(model, args)[0]
    print_header("seconds", "reference")
    for size in [args.size] if args.size else [256, 512] if args.full else [model.size]:
        file = model.folder / f"pairs-{size}.pt"
        apart(write_pairs, model.folder, device, dtype, size, n, file)
        where = model.folder, device, dtype, size, n, steps, file
        yield compare(f"training step, batch {n}, {size}×{size}, {label}", (train_ours, train_reference), where,
                      args.runs)


def bench_unet(model, args):
    if not find_spec("openvino"):
        raise UserError("unet: expected the package openvino (pip install openvino), got none")
    side, n, calls = (args.size or model.size) // model.factor, args.batch or 1, args.steps or 4
    file = model.folder / "openvino.xml"
    apart(write_openvino, model.folder, side, n, file)
    print_header("seconds", "openvino")
    for dtype, label in precisions(model, args):
        sides = unet_ours, partial(unet_openvino, file=file)
        where = model.folder, model.device, dtype, side, n, calls
        yield compare(f"UNet call, guided, batch {n}, {side * model.factor} pixels, {label}", sides, where, args.runs)


def bench_operators(model, args):
    side = (args.size or model.size) // model.factor
    for dtype, label in precisions(model, args):
        print(label)
        apart(print_operators, model.folder, model.device, dtype, side, args.batch or 1)
    return []


def bench_load(model, args):
    print_header("seconds", "diffusers")
    for dtype, label in precisions(model, args):
        sides, where = (partial(load, LOAD_OURS), partial(load, LOAD_DIFFUSERS)), (model.folder, model.device, dtype)
        _, size = sides[0](*where)  # brings the files into the page cache
        yield compare(f"load {size / 1e9:.2f} GB of weights, {label}", sides, where, args.runs)


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────────────

# The model that is measured. factor: pixels per latent pixel; size: of its images, in pixels.
Model = namedtuple("Model", "folder device fastest factor size")


def write_full(folder):
    """Write the SD 1.5 architecture with random weights, in float16 files."""
    torch.manual_seed(SEED)
    tokenizer = CLIPTokenizer(TINY_SD / "tokenizer")
    networks = UNet(), VAE(), CLIPTextModel(CLIPTextConfig(eos_token_id=tokenizer.eos_token_id))
    scheduler = weights.SCHEDULER | {"prediction_type": "epsilon"}
    save(weights.StableDiffusion(*networks, tokenizer, scheduler), folder)


@contextlib.contextmanager
def prepare(full, device):
    """Yield the Model, in a temporary folder."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        if full:
            apart(write_full, folder)  # a process inherits the peak memory of the one that starts it
        else:
            shutil.copytree(TINY_SD, folder)
        unet = read_config(folder / "unet" / "config.json", UNet)
        factor = read_config(folder / "vae" / "config.json", VAE).factor
        yield Model(folder, device, efficiency.fastest_dtype(device, unet), factor, unet.sample_size * factor)


def machine(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} cores of {torch.cpu.get_capabilities().get('cpu_name', platform.processor())}"


def save_rows(machine, rows):
    """Write rows into assets/bench-MACHINE.json. They replace older ones of the same model and `what`."""
    slug = re.sub(r"\W+", "-", machine.lower())
    file = ASSETS / f"bench-{slug}.json"
    found = read_json(file, rows=list)["rows"] if file.exists() else []
    with expecting(file, "rows with their model and what was measured"):
        by_what = {(row["model"], row["what"]): row for row in [*found, *rows]}
    write_json(file, {"machine": machine, "rows": [*by_what.values()]})


PARTS = {"sample": bench_sample, "train": bench_train, "load": bench_load, "attention": bench_attention}
ON_REQUEST = {"unet": bench_unet, "operators": bench_operators}


def main(argv=None):
    parser, count = Parser(description="Compare speed and memory with diffusers and torch."), number(int, 1, 1024)
    parser.add_argument("part", nargs="?", choices=PARTS | ON_REQUEST, help="the first four if left out")
    parser.add_argument("--full", action="store_true", help="the SD 1.5 architecture with random weights, not tiny-sd")
    parser.add_argument("--runs", type=count, default=3, help="of each side; an even number takes the lower median")
    parser.add_argument("--size", type=number(int, 1, 2**14), help="of the images, in pixels (default: the model's)")
    parser.add_argument("--batch", type=count, help="images, pairs, or samples of attention")
    parser.add_argument("--steps", type=number(int, 3, 1000), help="sampling or training steps of a run")
    parser.add_argument("--save", action="store_true", help="write the rows into assets/bench-MACHINE.json")
    add_device_options(parser, default="fp32, then the fastest; of train fp32 alone")
    args = parser.parse_args(argv)
    os.environ |= {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    device, _ = pick_device(args.device, args.dtype)
    rows = []
    with prepare(args.full, device) as model:
        largest = MAX_SCALE * model.size
        if args.size and (args.size % model.factor or args.size > largest):
            raise UserError(f"--size: expected a multiple of {model.factor} up to {largest}, got {args.size}")
        name = "SD 1.5, random" if args.full else "tiny-sd"
        print(f"{machine(device)}, torch {torch.__version__}, {name}")
        for part in [args.part] if args.part else PARTS:
            rows += (PARTS | ON_REQUEST)[part](model, args)
    if args.save:
        about = {"model": name, "torch": torch.__version__, "runs": args.runs}
        save_rows(machine(device), [about | row for row in rows])


if __name__ == "__main__":
    run(main)
