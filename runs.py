"""A training run on disk and over processes: its settings, checkpoint, log, sample sheets, signals and torchrun.

None of it is the method. A checkpoint needs no random state: data and noise of a step follow from its number.
"""

import atexit
import contextlib
import json
import os
import signal
import sys
import tomllib
import warnings
from dataclasses import field, fields
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from common import UserError, atomic, number, read_json, regular, write_json
from data import is_preservation
from livo import aligned_hinge, livo_loss, violating_hinge
from sample import MAX_PRINCIPLES, captioned, generate

TOY = "toy"  # as --data: the rendered portraits of lab/toy.py
RANK, WORLD = (int(text) if (text := os.environ.get(name, "")[:9]).isdecimal() else default  # set by torchrun
               for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
LOGGED = "active_w", "active_l", "delta_w", "delta_l", "ref"  # numbers of a line of the log
SAMPLING = {"steps": 12, "sampler": "dpm", "guidance": 7.5, "batch_size": 16}  # of sample sheets and the last table

# ── Settings ─────────────────────────────────────────────────────────────────────────────────────────────────────────

def setting(default, text, low=0.0, high=1e9):
    """A field of the dataclass of settings, with the help and the limits of its option."""
    return field(default=default, metadata={"help": text, "limits": (low, high)})


def add_options(parser, cls, preset):
    """An option for each setting of the dataclass. The help also states the preset's value."""
    for option in filter(lambda option: option.metadata, fields(cls)):
        kind, text = type(option.default), option.metadata["help"]
        text += f" (tiny-sd: {preset[option.name]})" if option.name in preset else ""
        parser.add_argument("--" + option.name.replace("_", "-"), default=option.default, help=text,
                            type=kind if kind is str else number(kind, *option.metadata["limits"]))


def load_preset(weights):
    """The settings that come with a checkpoint, livo.toml in its folder: {name: value}, empty without one."""
    file = Path(os.path.expanduser(weights)) / "livo.toml"  # as weights.local: it never raises
    try:
        return tomllib.loads(regular(file, "settings", 2**20).read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: expected settings in TOML, got: {error}") from error


def parse_settings(parser, cls, argv):
    """-> parsed arguments, settings, the run's folder.

    Options win over the settings of a resumed run, and over those that come with the weights.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.resume:
        folder, file = args.resume, args.resume / "settings.json"
        values = read_json(file)
    else:
        folder, file = args.out or Path("runs/livo"), f"{args.weights}/livo.toml"
        check_new(folder)
        values = load_preset(args.weights)
    try:  # as if typed before the user's options: checked the same way, and overruled by these
        if folders := [name for name in values if "out".startswith(name) or "resume".startswith(name)]:  # or shortened
            raise UserError(f"expected no folder of a run, got {', '.join(folders)}")
        typed = [f"--{name.replace('_', '-')}={value}" for name, value in values.items() if value != ""]
        args = parser.parse_args([*typed, *argv])
    except UserError as error:
        raise UserError(f"{file}: expected options of train.py, got: {error}") from error
    s = cls(**{option.name: getattr(args, option.name) for option in fields(cls)})
    parse_margins(s.margins)
    if not s.data:
        raise UserError(f"--weights {s.weights}: expected --data too, preference data for it, got none")
    for name in ("weights", "tokenizer", "init", "data"):  # --resume may be called from another folder
        if (value := getattr(s, name)) not in ("", TOY) and Path(value).exists():
            setattr(s, name, str(Path(value).resolve()))
    return args, s, Path(os.path.realpath(folder))  # the parent of "." would be "."; the cache is in the parent


def check_new(folder):
    from formats.disk import check_writable
    check_writable(folder)
    names = {path.name for path in folder.glob("[!.]*")}  # a killed run may have left a hidden temporary file
    if RANK == 0 and names - {"settings.json"}:
        raise UserError(f"{folder}: expected a new folder, got one with files in it; "
                        f"resume with --resume {folder}, or choose another --out")


def parse_margins(text):
    """"gender equality: 2 2; racial equality: 0.5 1" -> {principle: (γ1, γ2)}. Raises UserError for other texts."""
    try:
        rows = [row.split(":") for row in text.split(";") if row.strip()]
        found = {principle.strip(): tuple(map(float, numbers.split())) for principle, numbers in rows}
        if all(len(pair) == 2 and all(0 <= x <= 1e9 for x in pair) for pair in found.values()):
            return found
    except ValueError:
        pass
    raise UserError(f'--margins: expected "principle: γ1 γ2; …", got {text!r}')


def save_settings(folder, s):
    write_json(folder / "settings.json", vars(s))


# ── Checkpoint, log, sample sheets ───────────────────────────────────────────────────────────────────────────────────

def save_checkpoint(folder, value_encoder, optimizer, step, data_key):
    with atomic(folder / "checkpoint.pt") as path, open(path, "wb") as file:  # a file, as torch hides a full disk
        torch.save({"value_encoder": value_encoder.state_dict(), "optimizer": optimizer.state_dict(),
                    "step": step, "data": data_key}, file)


def resume(folder, value_encoder, optimizer, data_key, steps):
    """Load the folder's checkpoint, if any -> the number of steps done.

    Raises UserError if it is damaged, of other data or weights, or beyond the last of `steps`.
    """
    from formats.files import load_adamw, unpickle  # imported late, as the method does not need it
    from formats.messages import expecting
    file = folder / "checkpoint.pt"
    if not os.path.lexists(file):
        return 0
    with expecting(file, "a checkpoint of such a value encoder"):
        state = unpickle(file)
        step, before = state["step"], state["data"]
        value_encoder.load_state_dict(state["value_encoder"])
        load_adamw(optimizer, state["optimizer"], step, file)
    if before != data_key:
        raise UserError(f"{file}: expected the data, VAE, text encoder and dtype that the run began with, got others")
    if step > steps:
        raise UserError(f"--steps: expected at least {step}, those of {file}, got {steps}")
    return step


def summarize(step, errors, gamma1, gamma2, s):
    """The errors (4, B) of a step's pairs, and their margins, (B,) each -> a line of the log.

    All but the loss is a mean over the pairs with a violating image: a preservation pair's hinge never saturates.
    """
    err_w, ref_w, err_l, ref_l = errors

    def mean(x):
        return x[ref_w > 0].float().mean().nan_to_num().item()  # ref is 0 in preservation pairs; 0 if all are

    return {
        "step": step,
        "loss": livo_loss(*errors, s.alpha, s.beta, gamma1, gamma2).item(),
        "active_w": mean(aligned_hinge(err_w, ref_w, s.beta, gamma1) > 0),
        "active_l": mean(violating_hinge(err_l, ref_l, s.alpha, gamma2) > 0),
        "delta_w": mean(err_w - ref_w),  # ℓ_θ − ℓ_ref
        "delta_l": mean(err_l - ref_l),
        "ref": mean((ref_w + ref_l) / 2),
    }


class Log:
    """log.jsonl, one line a step. On resuming it is cut to the steps of the checkpoint."""

    def __init__(self, folder, steps, tensorboard=False):
        path = folder / "log.jsonl"
        try:
            text = regular(path, "a log").read_text(encoding="utf-8") if steps or os.path.lexists(path) else ""
            lines = text.splitlines()[:steps]
            self.lines = [json.loads(line) for line in lines]
            numbers = [line["step"] for line in self.lines if {type(line[key]) for key in LOGGED} == {float}]
            if len(lines) < steps or numbers != [*range(steps)]:  # steps may be 10^12
                raise ValueError(f"{len(numbers)} of them")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(f"{path}: expected each of the checkpoint's {steps} steps, got {error}") from error
        with atomic(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        self.file = open(path, "a", buffering=1, encoding="utf-8")  # line by line
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter
        self.board = SummaryWriter(folder / "tensorboard", purge_step=steps) if tensorboard else None

    def add(self, line):
        self.lines.append(line)
        self.file.write(json.dumps(line) + "\n")
        if self.board:
            for key, value in line.items():
                self.board.add_scalar(key, value, line["step"])


def warn_if_saturated(lines, s, every=50):
    """Warn if most hinges are saturated although the errors have hardly changed: the margins may be too small."""
    if len(lines) % every or s.margins:  # margins of single principles: the means say nothing of them
        return
    lines = lines[-every:]
    mean = {key: sum(line[key] for line in lines) / len(lines) for key in LOGGED}
    delta = max(abs(mean["delta_w"]), abs(mean["delta_l"]))
    if s.alpha and s.beta and max(mean["active_w"], mean["active_l"]) < 0.2 and delta < 0.05 * mean["ref"]:
        warnings.warn("most hinges are saturated, yet the errors have changed by less than 5 %: the margins "
                      f"γ1/β = {s.gamma1 / s.beta:.1g} and γ2/α = {s.gamma2 / s.alpha:.1g} may be too small "
                      "for this model; if the images have not changed either, try "
                      f"--gamma1 {0.5 * mean['ref'] * s.beta:.1g} --gamma2 {0.5 * mean['ref'] * s.alpha:.1g}")


def save_samples(sd, value_encoder, dataset, path, n=6):
    """Write a sheet: for each principle n images of one prompt, base model above, LiVO below, from the same noise."""
    prompts, rows = {}, []
    for sample, _ in sorted(dataset.aligned, key=lambda row: is_preservation(row[0])):  # preservation pairs last
        prompts.setdefault(sample.value, sample.prompt)
    for principle, prompt in [*prompts.items()][:MAX_PRINCIPLES]:
        for caption, principles in ("without a principle", []), (f"{principle}: {prompt}", [principle]):
            images = generate(sd, prompt, "", principles, value_encoder, range(n), fraction=1, **SAMPLING)
            rows.append((caption, [image for _, image, _ in images]))
    with atomic(path) as temporary:
        captioned(rows).save(temporary)


# ── Signals and processes ────────────────────────────────────────────────────────────────────────────────────────────

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


def join_processes(device):
    """Under torchrun: join the other processes. They wait while one of them encodes the data."""
    from formats.processes import check_environment, meet
    check_environment()
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=2),
                                store=dist.PrefixStore("livo", meet(RANK, WORLD)), rank=RANK, world_size=WORLD)
        atexit.register(dist.destroy_process_group)


def sum_over_processes(*tensors):
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


@contextlib.contextmanager
def one_first():
    """The first process of each machine passes the block before the others, and fills the cache."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not first:
        warnings.simplefilter("ignore")  # the first one has warned
        dist.barrier()
    yield
    if first and dist.is_initialized():
        dist.barrier()
