"""Times of this repository beside those of what one would use otherwise, measured in one run.

    python bench.py attention                  # the kernels of attention.py, on a GPU
    python bench.py attention --dtype bf16 --batch 8

ratio: theirs / ours, so that above 1 ours is the faster one.
"""

import statistics
import time

import torch
import torch.nn.functional as F
from einops import rearrange

from attention import attend, has_kernels
from cli import Parser, add_device_options, number, pick_device, run

ROUNDS = 15  # of runs in alternation, of which the median counts
CALLS = 10  # in one run on a GPU, so that a kernel of 10 µs is far above the timer's resolution
BUSY = 20_000_000  # clock cycles, some 10 ms: in that time a GPU is given all calls of a run

ATTENTION = [  # of the levels of the UNet: (model, heads, head size, side of the map)
    *(("SD 1.5, 512×512", 8, d, side) for d, side in [(40, 64), (80, 32), (160, 16), (160, 8)]),
    *(("SD 2.1, 768×768", heads, 64, side) for heads, side in [(5, 96), (10, 48), (20, 24), (20, 12)]),
]
TEXT = 77  # tokens


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


def bench_attention(device, dtype, batch):
    """Self- and cross-attention of every level, forward and with the gradients of q, k and v."""
    if not (has_kernels(device) and dtype.itemsize == 2):
        print(f"On {device.type} in {dtype} ours IS scaled_dot_product_attention: the ratios show the timer's noise.")
    print(f"{'milliseconds':28}{'forward':>24}{'and backward':>26}")
    print(f"{'':28}{'ours':>8}{'theirs':>8}{'ratio':>8}{'ours':>10}{'theirs':>8}{'ratio':>8}")
    model = None
    for name, heads, d, side in ATTENTION:
        if device.type != "cuda" and side > 16:
            continue  # would take minutes
        if name != model:
            print(model := name)
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

            row = f"  {heads:2} × {d:3}, {N:4} over {M:4}"
            for measured, width in ((forward, 8), (both, 10)):
                ours, theirs = medians([lambda f=f: measured(f) for f in (attend, sdpa)], device)
                row += f"{ours * 1e3:{width}.3f}{theirs * 1e3:8.3f}{theirs / ours:8.2f}"
            print(row)


PARTS = {"attention": bench_attention}


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--batch", type=number(int, 1, 1024), default=2, help="samples; guidance makes 2 of a picture")
    add_device_options(parser)
    args = parser.parse_args()
    device, dtype = pick_device(args.device, args.dtype)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, {dtype}, batch {args.batch}")
    PARTS[args.part](device, dtype, args.batch)


if __name__ == "__main__":
    run(main)
