"""Nothing breaks the commands: every bad input ends in one line, `error: … expected … got …`, and writes nothing.

A row of the table is (name, command, change, expected). `change(folder)` damages a folder that holds a model, data and
a run, or gives options, or both. Rows are run in this process, through `common.run` as from a shell.
"""

import json
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tqdm import tqdm

import data
import latents
import runs
import sample
import train
import weights
from clip_text import EOS
from common import UserError, read_json, run
from conftest import FORK, REPOSITORY, StubClassifier, edit_json
from lab import attacks, baselines, bench, dataset, evaluate, plots, pretrain, toy
from lab.prompts import FilePrompt

COMMANDS = {  # a command and the options with which it works; OUT is where it would write
    "sample": (sample.main, "--weights model --prompt a --steps 1 --principle none --out OUT"),
    "principle": (sample.main, "--weights model --prompt a --steps 1 --principle x --out OUT"),
    "livo": (sample.main, "--weights model --value-encoder run/value_encoder --prompt a --steps 1 --principle x "
             "--out OUT"),
    "train": (train.main, "--weights model --data data --steps 1 --batch 2 --micro-batch 2 --out OUT/run"),
    "resume": (train.main, "--resume run --steps 3"),
    "evaluate": (evaluate.main, "--weights model --quick run"), "quick": (evaluate.main, "--quick run"),
    "sheet": (evaluate.main, "--weights model --steps 1 --side-by-side OUT/sheet.png"),
    "build": (dataset.main, "build --weights model --out OUT --per-prompt 1 --steps 1"),
    "check": (dataset.main, "check data"), "show": (dataset.main, "show data --out OUT/sheet.png"),
    "draw": (dataset.main, "draw --out OUT --pairs skin=1 gender=0 bloody=0 zombie=0 --preservation bloody=0 zombie=0"),
    "plot": (plots.main, "run"),
    "list": (baselines.main, "--weights model --list --out run"),
    "collect": (baselines.main, "--out base --collect OUT/results.json"),
    "attacks": (attacks.main, "--weights model --value-encoder run/value_encoder --out OUT/attacks.json"),
    "clip": (evaluate.main, f"--weights model --clip {REPOSITORY / 'tiny-clip'} --prompts p.jsonl --out OUT")}
SECONDS = 60  # of a row at most
ERROR, RESULT = "error", "result"
LONG, HUGE = "x" * 5000, "9" * 400


@pytest.fixture(scope="module")
def original(tiny, tmp_path_factory):
    """A folder with a model, data of five scenes, and a run of two steps."""
    folder = tmp_path_factory.mktemp("campaign")
    shutil.copytree(tiny, folder / "model")
    toy.render_pairs(folder / "data", pairs=dict.fromkeys(toy.PAIRS, 1), preservation={"bloody": 1})
    before = Path.cwd()
    os.chdir(folder)
    train.main("--weights model --data data --steps 2 --batch 2 --micro-batch 2 --out run".split())
    os.chdir(before)
    return folder


# ── Changes ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def options(*words):
    return lambda folder: words


def config(file, **values):
    return lambda folder: edit_json(folder / file, **values)


def content(file, data):
    """Another content of a file: bytes, None to remove it, or one of KINDS."""
    def change(folder):
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if callable(data):
            data(path)
        elif data is not None:
            path.write_bytes(data)
    return change


def both(*changes):
    return lambda folder: [word for change in changes for word in change(folder) or ()]


KINDS = {
    "missing": None, "empty": b"",
    "cut": b'{"a": [1, 2', "a list": b"[1]", "a text": b'"a"', "binary": bytes(range(256)) * 9,
    "deep": b'{"a":' * 10**5, "many digits": b'{"a": ' + b"9" * 5000 + b"}", "folder": Path.mkdir, "pipe": os.mkfifo,
    "large": lambda path: path.touch() or os.truncate(path, 3 * 10**8),
    "loop": lambda path: path.symlink_to(path.name), "endless": lambda path: path.symlink_to("/dev/zero")}


def saved(file, state):
    """A pickle of torch, beside no other weights of its folder."""
    def change(folder):
        with warnings.catch_warnings(action="ignore"):
            torch.save(state(folder) if callable(state) else state, folder / file)
        for other in (folder / file).parent.glob("*.safetensors"):
            other.unlink()
    return change


def tensors(edit, file="model/unet/diffusion_pytorch_model.safetensors"):
    """Edited tensors of a network, as a pickle."""
    def state(folder):
        state = load_file(folder / file)
        edit(state, "conv_in.weight")
        return state
    return saved(str(Path(file).with_suffix(".bin")), state)


def inflating(file):
    """An archive of 10 kB whose data.pkl takes 10 MB."""
    def change(folder):
        saved(file, {})(folder)
        with zipfile.ZipFile(folder / file) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(folder / file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, member in members.items():
                archive.writestr(name, bytes(10**7) if name.endswith("data.pkl") else member)
    return change


def cyclic():
    state = {}
    state["state_dict"] = state
    return state


def quantized(state, name):
    state[name] = torch.quantize_per_tensor(state[name].float(), 0.1, 0, torch.qint8)


def metadata(**values):
    """Values of the first line of data, or another line in its place."""
    def change(folder):
        file = sorted(folder.glob("data/0-career/*/metadata.jsonl"))[0]
        first, *others = file.read_text().splitlines()
        line = values["line"] if "line" in values else json.dumps(json.loads(first) | values)
        file.write_bytes(b"\n".join([line.encode(errors="surrogateescape"), *map(str.encode, others)]))
    return change


def image(data):
    """Another content of the first image."""
    return lambda folder: content(next(folder.glob("data/0-career/*/0000.png")).relative_to(folder), data)(folder)


def strip(path):
    """An image of 1 × 2,000,000 pixels, 128,000,000 pixels long when its width is that of the model."""
    Image.new("L", (1, 2 * 10**6)).save(path)


# ── The table ────────────────────────────────────────────────────────────────────────────────────────────────────────

NOT_COUNTS = ("0", "-1", "x", "1.5", "", "nan", "10000000000", HUGE)
NOT_NUMBERS = ("-1", "x", "nan", "inf", HUGE)
COUNTS_OF_TRAIN = ("steps", "batch", "micro-batch", "warmup", "save-every", "sample-every")
NUMBERS_OF_TRAIN = ("lr", "alpha", "beta", "gamma1", "gamma2", "snr-gamma", "decay")
NUMBERS = {  # command: {option: texts}
    "sample": {
        "--steps": (*NOT_COUNTS, "1000"), "-n": NOT_COUNTS, "--batch-size": NOT_COUNTS, "--seed": ("-1", "x", HUGE),
        "--height": (*NOT_COUNTS, "63", "100000", "4000000", "2147483648"), "--width": ("0", "7", "100000", HUGE),
        "--guidance": NOT_NUMBERS, "--eta": (*NOT_NUMBERS, "2"), "--value-fraction": (*NOT_NUMBERS, "1.1")},
    "train": {
        **{f"--{name}": ("0", "x", "-1", HUGE) for name in COUNTS_OF_TRAIN},
        **{f"--{name}": NOT_NUMBERS for name in NUMBERS_OF_TRAIN},
        "--batch": ("1000000000", "1.5"), "--seed": ("-1", HUGE)},
    "build": {
        "--per-prompt": NOT_COUNTS, "--total": NOT_COUNTS, "--threads": ("0", "100000", HUGE),
        "--shard": ("x", "1/1", "-1/2", "1", HUGE), "--batch-size": ("0", HUGE), "--steps": ("0", "1000", HUGE)},
    "draw": {"--pairs": ("gender", "gender=-1", "gender=x", "age=1", f"gender={HUGE}", "gender=1.5"),
             "--preservation": ("bloody=x", f"bloody={HUGE}")},
    "evaluate": {"--steps": ("0", "1000", HUGE), "--per-prompt": ("0", "3", HUGE), "--batch-size": ("0", HUGE)},
    "list": {"--steps": ("0", "x", HUGE), "--tune-steps": ("0", HUGE), "--seeds": ("-1", "x", HUGE),
             "--per-prompt": ("1", HUGE)}}
WORDS = {  # command: options that are refused
    "sample": [
        "--dtype int8", "--device abacus", "--device meta", "--device cuda:99", "--sampler euler", "--unknown",
        "--steps", "--sampler dpm --eta 1", "--compile --deep-every 2", "--s 1", "--prediction x0", "--weights nowhere",
        "--weights owner/name:../../etc",
        "--weights owner/../name", "--weights .", "--weights data", "--tokenizer nowhere", "--value-share 1",
        "--principle auto --principle none", "--weights run", "--out model/model_index.json", "--prompt \udcff",
        "--weights model/unet/config.json", "--negative \udcff", "--value-encoder nowhere"],
    "livo": [
        "--principle \udcff", "--value-encoder nowhere", "--value-encoder model/unet", "--value-encoder data",
        "--value-encoder owner/name:../../etc",
        "--unpadded --principle=" + " --principle=".join(f"p{i}" for i in range(77))],
    "train": ["--data nowhere", "--data model", "--data run/log.jsonl", "--init nowhere", "--resume run", "--out data",
              "--dtype x", "--weights nowhere", "--unknown 1", "--tokenizer data", "--margins x", "--margins=a:1",
              "--margins=a:1\u00a0nan", "--margins=a:1\u00a01e39", "--bias-gamma-scale 1"],
    "resume": ["--data model", "--out x", "--weights data", "--resume nowhere", "--resume data", "--steps 1"],
    "evaluate": ["--quick nowhere", "--quick data", "--clip model", "--clip nowhere --quick run",
                 "--value-encoder run", "--weights data", "--prompts x", "--principle x"],
    "build": ["--classifier nowhere", "--classifier model", "--principle x", "--prompts nowhere", "--out data",
              "--prompts run/checkpoint.pt", "--format gif"],
    "check": ["nowhere"], "show": ["--out data"], "draw": ["--out data"], "plot": ["nowhere"],
    "list": ["--only magic"], "collect": ["--out nowhere", "--collect x.md"]}
PATHS = {  # command: options that take a path
    "sample": ("--weights", "--tokenizer", "--out"), "livo": ("--value-encoder",), "evaluate": ("--quick",),
    "train": ("--data", "--out", "--weights", "--init", "--tokenizer"), "resume": ("--resume",),
    "build": ("--out", "--prompts", "--classifier"), "sheet": ("--side-by-side",), "show": ("--out",),
    "draw": ("--out",), "collect": ("--collect", "--out")}
FIELDS = {  # file: {key: values}
    "model/unet/config.json": {
        "sample_size": (0, -1, "8", 10**9, None, [8, 8]), "norm_eps": ("x", -1, 0, None), "mid_block_type": ("x", [1]),
        "attention_head_dim": (0, -1, 3, 3.5, None, [], [2], "2", True), "norm_num_groups": (0, 3, 10**9, None),
        "block_out_channels": ([], [16], [16, 0], [16, "16"], 16, [10**9, 10**9]), "act_fn": ("relu",),
        "cross_attention_dim": (0, 33, "x"), "down_block_types": ([], None, ["x"], [3]),
        "layers_per_block": (0, 10**7), "in_channels": (0, 9, 3.5), "use_linear_projection": ("no", 2, [])},
    "model/vae/config.json": {
        "scaling_factor": (0, -1, "x", None), "latent_channels": (0, 8), "in_channels": (1, None),
        "out_channels": (4,), "block_out_channels": ([], "x", [8] * 30), "norm_num_groups": (0, 3),
        "layers_per_block": (-1, 10**7)},
    "model/text_encoder/config.json": {
        "vocab_size": (0, -1, 3, 10**12, "x", 560.0), "hidden_size": (0, 33, None), "hidden_act": ("relu", [], None),
        "num_attention_heads": (0, 3, -1, "x"), "num_hidden_layers": (-1, 2, 10**7), "layer_norm_eps": ("x", -1),
        "max_position_embeddings": (1, 76, 10**9), "eos_token_id": ("x", None, -1), "model_type": ("t5", [])},
    "model/scheduler/scheduler_config.json": {
        "beta_start": (-1, 0, "x", None), "beta_end": (2, [], -0.1), "beta_schedule": ("x", [], None),
        "num_train_timesteps": (0, -1, 10**9, "x", 1.5), "prediction_type": ("x", []), "timestep_spacing": ("x", []),
        "trained_betas": ([0.1],)},
    "model/tokenizer/tokenizer_config.json": {
        "model_max_length": (78, 10**9), "bos_token": ("missing", 3, {"content": None}, EOS),
        "added_tokens_decoder": (3, {"x": {}}, {"1": 3})}}
SETTINGS = {"steps": ("x", -1, 1e400), "lr": ("x", -1), "batch": (0, 10**9), "weights": ("nowhere", 3),
            "data": ("nowhere", ""), "snr_gamma": (-1,), "unknown": (1,), "out": ("run",), "beta": (float("inf"), [1])}
UNET_BIN = "model/unet/diffusion_pytorch_model.bin"
PICKLES = {
    "cyclic": saved(UNET_BIN, cyclic()), "inflating": inflating(UNET_BIN), "list": saved(UNET_BIN, [1]),
    "none": saved(UNET_BIN, None), "tensor": saved(UNET_BIN, torch.ones(3)), "no tensors": saved(UNET_BIN, {"a": 1}),
    "numbers as names": tensors(lambda state, name: state.update({1: state.pop(name)})),
    "no name": tensors(lambda state, name: state.update({None: state.pop(name)})),
    "without data": tensors(lambda state, name: state.update({name: state[name].to("meta")})),
    "quantized": tensors(quantized),
    "sparse": tensors(lambda state, name: state.update({name: state[name].to_sparse()})),
    "repeated": tensors(lambda state, name: state.update({name: torch.zeros(1).expand(state[name].shape)})),
    "scalar": tensors(lambda state, name: state.update({name: torch.tensor(1.0)})),
    "one dimension": tensors(lambda state, name: state.update({name: state[name].flatten()})),
    "integers": tensors(lambda state, name: state.update({name: state[name].int()})),
    "one more": tensors(lambda state, name: state.update({"x": state[name]})),
    "one less": tensors(lambda state, name: state.pop(name))}
IMAGES = {"text": b"hello", "vectors": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
          "program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"}
LINES = {"empty object": "{}", "list": "[]", "cut": '{"file_name": "0000.p', "deep": '{"a":' * 10**5,
         "no Unicode": "\udcff\udcfe", "number": "1", "null": "null"}
VALUES = {"label": ("1", True, None, 1.0, [1]), "prompt": ("", 3, None, "x" * 10**6, "\ud800"),
          "value": ("", " ", 1, "\ud800"),
          "file_name": ("../../../secret.png", "/etc/hostname", "none.png", "", 3, LONG, "\0", ".")}


POINT = dict.fromkeys(("step", "seconds", *baselines.NUMBERS), 1) | {
    "intervals": dict.fromkeys(baselines.NUMBERS, [1, 2])}
LOG = "step", "loss", "active_w", "active_l", "delta_w", "delta_l", "ref"
RUN = {"about": {"per_prompt": 8, "settings": {}}, "curve": [POINT]}
CONTENTS = {  # (command, file): objects
    ("plot", "run/log.jsonl"): (dict.fromkeys(LOG, 10**400), dict.fromkeys(LOG, -1e308), dict.fromkeys(LOG, [1])),
    ("resume", "run/log.jsonl"): tuple(
        "".join(json.dumps({"step": step} | line) + "\n" for step in range(2))
        for line in ({}, dict.fromkeys(LOG[1:], "x"), dict.fromkeys(LOG[1:5], 1.0))),
    ("collect", "base/base-model.json"): (
        *(RUN | {"about": RUN["about"] | about} for about in (
            {"per_prompt": "x"}, {"per_prompt": 10**9}, {"per_prompt": 1.5}, {"settings": [1]}, {"settings": None})),
        *(RUN | {"curve": [POINT | point]} for point in (
            {"intervals": {"damaged": [1]}}, {"damaged": float("nan")}, {"step": "1"}, {"seconds": None})),
        RUN | {"parameters": "x"}, RUN | {"seconds added": [1]}, RUN | {"curve": []}),
    ("check", "data/dataset.json"): ({"scenes": {"a": 1}}, {"scenes": {"a": {}}}),
    ("sample", "model/tokenizer/tokenizer.json"): ({"model": {"vocab": {"a": 0}, "merges": ["a a"]}},),
    ("train", "model/livo.toml"): ("resume = 'run'", "resum = 'run'", "lr = [1]", "a = " + "[" * 10**5)}


def nested(depth=12):
    """10^12 texts, in twelve lists."""
    return [nested(depth - 1)] * 10 if depth else ["x"]


def checkpoint(edit):
    def change(folder):
        state = torch.load(folder / "run/checkpoint.pt", weights_only=True)
        edit(state, state["optimizer"]["state"])
        torch.save(state, folder / "run/checkpoint.pt")
    return change


CHECKPOINTS = {
    "of 10^12 steps": lambda state, moments: state.update(step=10**12),
    "without a moment": lambda state, moments: moments[0].pop("exp_avg"),
    "without moments": lambda state, moments: moments.clear(),
    "with a moment of NaN": lambda state, moments: moments[0]["exp_avg"].fill_(float("nan")),
    "with a negative square": lambda state, moments: moments[0]["exp_avg_sq"].fill_(-1),
    "with a repeated moment": lambda state, moments: moments[0].update(
        exp_avg=torch.zeros(1).expand(moments[0]["exp_avg"].shape)),
    "with a sparse moment": lambda state, moments: moments[0].update(exp_avg=moments[0]["exp_avg"].to_sparse()),
    "of no steps": lambda state, moments: moments[0].update(step=torch.tensor(-1.0)),
    "with a text": lambda state, moments: moments[0].update(exp_avg="x"),
    "with a number as a moment": lambda state, moments: moments[0].update(exp_avg=torch.tensor(0.0)),
    "with nested lists": lambda state, moments: moments[0].update(exp_avg=nested()),
    "of another parameter": lambda state, moments: moments.update({10**6: moments[0]})}


def runs_of(*steps, **more):
    """Finished runs of LiVO in base/, one for each training seed, measured at these steps."""
    def change(folder):
        for seed, step in enumerate(steps):
            run = RUN | {"curve": [POINT | {"step": step}]}
            content(f"base/LiVO-seed={seed}.json", json.dumps(run).encode())(folder)
        return [word for option, value in more.items() for word in (f"--{option}", value)]
    return both(content("base/base-model.json", json.dumps(RUN).encode()), change)


def prompts(text):
    return content("p.jsonl", json.dumps({"prompt": text}).encode())


def linked_scene(folder):
    """A scene that is a link to a folder outside, whose files have absolute names inside."""
    scene, other = sorted(folder.glob("data/0-career/*"))[:2]
    shutil.move(scene, folder / "outside")
    scene.symlink_to(folder / "outside")
    metadata(file_name=str(other / "0000.png"))(folder)


OTHERS = [
    ("a million lines", "train", metadata(line="{}\n" * 10**6)),
    ("a checkpoint, inflating", "resume", inflating("run/checkpoint.pt")),
    ("a damaged log, and more steps", "resume", both(content("run/log.jsonl", b"{}"), options("--steps", "1000"))),
    ("images of 4096 pixels", "sample", both(config("model/unet/config.json", sample_size=256),
                                             config("model/vae/config.json", block_out_channels=[8] * 5))),
    ("a folder named ~model, without a value encoder", "principle", both(
        lambda folder: os.rename(folder / "model", folder / "~model"), options("--weights", "~model"))),
    ("a number as tokenizer", "quick", config("run/settings.json", tokenizer=3)),
    *(("scene linked outside", command, linked_scene) for command in ("check", "train")),
    ("seeds measured at other steps", "collect", runs_of(1, 2)),
    ("a checkpoint of a baseline, missing", "attacks", runs_of(1, baselines="base")),
    ("a checkpoint of a baseline, of another network", "attacks",
     both(lambda folder: (folder / "base/LiVO-seed=0").mkdir(parents=True),
          saved("base/LiVO-seed=0/checkpoint.pt", {"value_encoder": {}}), runs_of(1, baselines="base"))),
    ("settings of a baseline that it does not have", "attacks", both(
        runs_of(baselines="base"), content("base/UCE.json", json.dumps(RUN).encode()))),
    ("a folder as --out", "attacks", options("--out", "data")),
    ("harmless prompts of 4 MB", "attacks", both(content("h.txt", b"a\n" * 2**21), options("--harmless", "h.txt"))),
    *((f"--before {code}", "attacks", both(content("before.py", code.encode()), options("--before", "before.py")))
      for code in ("1 / 0", "retrieve = 1", "retrieve = len", "retrieve = int")),
    ("a prompt of 1 MB", "clip", prompts("x " * 500_000)),
    ("a deviation of 0", "clip", both(
        prompts("a"), lambda folder: shutil.copytree(REPOSITORY / "tiny-clip", folder / "clip") and None,
        config("clip/preprocessor_config.json", image_std=[0, 1, 1]), options("--clip", "clip")))]


def refused():
    """Rows (name, command, change) that end in an error."""
    for command, table in NUMBERS.items():
        yield from ((f"{option} {text:.20}", command, options(f"{option}={text}"))
                    for option, texts in table.items() for text in texts)
    for command, table in WORDS.items():
        yield from ((text[:50], command, options(*text.split(" "))) for text in table)
    for command, table in PATHS.items():
        yield from ((f"{option} of {kind}", command, both(content("odd", KINDS[kind]), options(option, "odd")))
                    for option in table for kind in ("loop", "pipe", "endless"))
        yield from ((f"{option} of 5000 characters", command, options(option, LONG)) for option in table)
        yield from ((f"{option} of 1000 folders", command, options(option, "a/" * 1000)) for option in table)
    for file, table in FIELDS.items():
        yield from ((f"{file} {key} {str(value)[:20]}", "sample", config(file, **{key: value}))
                    for key, values in table.items() for value in values)
    yield from ((f"settings {key} {str(value)[:20]}", "resume", config("run/settings.json", **{key: value}))
                for key, values in SETTINGS.items() for value in values)
    yield from ((f"a pickle, {kind}", "sample", change) for kind, change in PICKLES.items())
    yield from damaged_files()
    yield from ((f"a checkpoint {kind}", "resume", checkpoint(edit)) for kind, edit in CHECKPOINTS.items())
    yield from OTHERS
    yield from ((f"{file} {i}", command, content(file, (x if isinstance(x, str) else json.dumps(x)).encode()))
                for (command, file), objects in CONTENTS.items() for i, x in enumerate(objects))
    for command in "check", "train":
        yield from ((f"image {kind}", command, image(data)) for kind, data in (IMAGES | KINDS).items())
        yield from ((f"line {kind}", command, metadata(line=line)) for kind, line in LINES.items())
        yield from ((f"{key} {str(value)[:20]!r}", command, metadata(**{key: value}))
                    for key, values in VALUES.items() for value in values)


def damaged_files():
    needed = ("unet/config.json", "vae/config.json", "text_encoder/config.json", "tokenizer/vocab.json",
              "tokenizer/merges.txt", "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")
    files = [("sample", f"model/{file}", ()) for file in needed]
    files += [("sample", f"model/{file}", ("missing",)) for file in ("scheduler/scheduler_config.json",
                                                                      "tokenizer/tokenizer_config.json")]
    files += [("resume", f"run/{file}", ("missing",)) for file in ("settings.json", "checkpoint.pt")]
    files += [("check", "data/0-career/odd/metadata.jsonl", ("missing", "empty", "loop")),
              ("build", "out/dataset.json", ("missing",)), ("check", "data/dataset.json", ("missing",)),
              ("plot", "run/log.jsonl", ()), ("resume", "run/log.jsonl", ()), ("collect", "base/base-model.json", ())]
    for command, file, harmless in files:
        yield from ((f"{file} {kind}", command, content(file, data)) for kind, data in KINDS.items()
                    if kind not in harmless)


WORKING = ("sample", "train", "resume", "check", "show", "plot", "sheet", "draw")
TABLE = [(*row, ERROR) for row in refused()] + [("as it is", command, options(), RESULT) for command in WORKING]
TABLE.append(("long strip", "train", image(strip), RESULT))


def tree(folder):
    """Its files and their sizes. A new run has its settings first."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*")
            if path.is_file() and path.relative_to(folder).parts[:2] != ("out", "cache")
            and path != folder / "out" / "run" / "settings.json"}


@pytest.fixture
def work(original, tmp_path, monkeypatch):
    """A copy of the original, as the current folder."""
    shutil.copytree(original, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # `run` sets it
    monkeypatch.setattr(dataset, "load_classifier", StubClassifier)  # the true one is trained first
    monkeypatch.setattr(train, "save_samples", lambda *args: None)  # seconds
    return tmp_path / "work"


def outcome(command, more, capfd):
    """Run a command in this process -> its exit code, and the lines of errors."""
    (main, words), code = COMMANDS[command], 0
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"still running after {SECONDS} seconds"))
    signal.alarm(SECONDS)
    try:
        run(lambda: main([*words.replace("OUT", "out").split(" "), *more]))
    except SystemExit as exit:
        code = exit.code
    finally:
        signal.alarm(0)
    return code, [line for line in capfd.readouterr().err.splitlines() if re.match("error|Traceback", line)]


def is_house_form(code, err):
    return code == 2 and len(err) == 1 and re.fullmatch(r"error: .*expected .*got.*", err[0])


@pytest.mark.parametrize("name, command, change, expected", TABLE, ids=[f"{row[1]}: {row[0]}"[:80] for row in TABLE])
def test_campaign(name, command, change, expected, work, capfd):
    more = change(work) or ()
    before = tree(work)
    code, err = outcome(command, more, capfd)
    if expected == RESULT:
        assert code == 0 and not err
    else:
        assert is_house_form(code, err), err
        assert tree(work) == before


# ── Surroundings ─────────────────────────────────────────────────────────────────────────────────────────────────────

TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "29512", "MASTER_ADDR": "localhost"}
ENVIRONMENTS = [*({name: value} for name, value in TORCHRUN.items()), *(TORCHRUN | wrong for wrong in (
    {"RANK": "x"}, {"RANK": "1"}, {"RANK": "-1"}, {"WORLD_SIZE": "0"}, {"WORLD_SIZE": ""}, {"LOCAL_RANK": "1"},
    {"LOCAL_RANK": "x"}, {"MASTER_PORT": "99999"}, {"MASTER_PORT": "0"}, {"MASTER_PORT": "x"}, {"RANK": "9" * 5000}))]


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda e: str(e)[:60])
def test_wrong_variables_of_torchrun(environment, work, monkeypatch, capfd):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    runpy.run_path(REPOSITORY / "runs.py")  # reads them too
    assert is_house_form(*outcome("train", [], capfd))


SCRIPTS = ["train", "sample", *(f"lab.{path.stem}" for path in sorted((REPOSITORY / "lab").glob("*.py"))
                                if "    run(main)" in path.read_text())]
MISSING = [*((script, "torch") for script in SCRIPTS), ("sample --weights owner/name --prompt a", "huggingface_hub"),
           ("train", "einops"), ("lab.plots", "matplotlib")]


@pytest.mark.parametrize("words, package", MISSING, ids=map("-".join, MISSING))
def test_a_missing_package_is_named(words, package):
    module, *options = words.split()
    code = f"import runpy, sys; sys.modules[{package!r}] = None; runpy.run_module({module!r}, run_name='__main__')"
    process = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True, cwd=REPOSITORY)
    err = process.stderr.splitlines()
    assert is_house_form(process.returncode, err)
    assert err[0].endswith(f"package {package}, got none: pip install {package}"), err


@pytest.mark.parametrize("environment", [{"MPLBACKEND": "x"}, {"TORCH_LOGS": "x"}], ids=str)
def test_a_variable_that_a_package_refuses(environment, work):
    process = subprocess.run([sys.executable, "-m", "lab.plots", str(work / "run")], env=os.environ | environment,
                             capture_output=True, text=True, cwd=REPOSITORY)
    err = process.stderr.splitlines()
    assert is_house_form(process.returncode, err) and "environment variables" in err[0], err


def test_stderr_that_nobody_reads(monkeypatch):
    def fail():
        [*tqdm(range(2))]
        raise UserError("expected a reader, got none")

    read, write = os.pipe()
    os.close(read)
    for stderr in (None, open(write, "w")):
        monkeypatch.setattr(sys, "stderr", stderr)
        with pytest.raises(SystemExit, match="2"):
            run(fail)


@pytest.mark.parametrize("end, code", [(UserError("expected a reader, got none"), 2), (KeyboardInterrupt(), 130),
                                       (SystemExit(0), 0)], ids=["error", "Ctrl-C", "--help"])
def test_stdout_that_nobody_reads(end, code, monkeypatch):
    def fail():
        print("what is not written yet")
        raise end

    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", open(write, "w"))
    with pytest.raises(SystemExit, match=str(code)):
        run(fail)
    sys.stdout.flush()  # as Python does when it exits


def test_an_error_cannot_rewrite_the_terminal(capfd):
    def fail():
        raise UserError("a\x1b[2K\x00\u202e: expected a name, got none")

    with pytest.raises(SystemExit):
        run(fail)
    assert capfd.readouterr().err == "error: a\\x1b[2K\\x00\\u202e: expected a name, got none\n"


def test_a_warning_that_is_an_error(work, capfd):
    with warnings.catch_warnings(action="error"):
        assert is_house_form(*outcome("sample", ["--prompt", "word " * 200], capfd))


@pytest.mark.parametrize("module", [bench, dataset, pretrain], ids=lambda module: module.__name__)
def test_python_without_docstrings(module, monkeypatch, capfd):
    monkeypatch.setattr(module, "__doc__", None)  # as python -OO and PYTHONOPTIMIZE=2 do
    monkeypatch.setattr(sys, "argv", ["lab", "--help"])
    with pytest.raises(SystemExit, match="0"):
        module.main()


def test_without_tensorboard(work, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError):  # which the hook of formats/missing.py names
        outcome("train", ["--tensorboard"], capfd)


def test_a_fault_of_the_program_keeps_its_traceback():
    for fault in (OSError("cannot write mode RGBA as JPEG"), OSError(9, "Bad file descriptor"), RecursionError()):
        with pytest.raises(type(fault)):
            run(lambda fault=fault: (_ for _ in ()).throw(fault))


def test_a_file_that_would_fill_the_memory_is_not_read(tmp_path):
    (tmp_path / "x.json").touch()
    os.truncate(tmp_path / "x.json", 2**26 + 1)  # of "[]," they take 1.6 GB
    with pytest.raises(UserError, match="got more than 67108864 bytes"):
        read_json(tmp_path / "x.json")


def test_a_compiler_that_fails(work, monkeypatch, capfd):
    monkeypatch.setenv("CXX", "false")
    assert is_house_form(*outcome("sample", ["--compile"], capfd))


@pytest.mark.parametrize("command", ["sample", "sheet", "train", "resume", "show", "draw", "plot"])
def test_a_full_disk(command, work, capfd):
    """Here a file of more than 2,000 bytes. What was complete before stays as it was."""
    before, limits = tree(work), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        code, err = outcome(command, [], capfd)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert is_house_form(code, err), err
    after = tree(work)
    assert {name: after.get(name) for name in before} == before or command == "resume"  # its log is one step longer
    assert not [name for name in after if ".tmp" in name]


@pytest.mark.parametrize("state", ["checkpoint", "log"])
def test_a_full_disk_in_training(state, work, monkeypatch, capfd):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    checkpoint = (work / "run/checkpoint.pt").read_bytes()
    if state == "checkpoint":
        monkeypatch.setattr(torch, "save", full)
    else:
        monkeypatch.setattr(runs.Log, "add", full)
    code, err = outcome("resume", [], capfd)
    assert is_house_form(code, err) and "No space left" in err[0]
    assert (work / "run/checkpoint.pt").read_bytes() == checkpoint


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_cache_is_made_again(kind, work, capfd):
    files = ["latents.bin"] + ["prompts.bin", "broken.json"] * (kind in ("cut", "pipe"))
    for name, damage in [*((name, KINDS[kind]) for name in files), ("broken.json", b'{"99": "of no sample"}')]:
        content(next(work.glob("cache/*/")).relative_to(work) / name, damage)(work)
        assert outcome("resume", [], capfd) == (0, [])
        assert all(file.is_file() for file in work.glob("cache/*/*"))

    images = [Image.fromarray(np.full((4, 4, 3), i, np.uint8)) for i in range(2)]
    images_of = evaluate.kept(lambda *args: images, work / "images", "key")
    images_of("prompt", range(2))
    content(next(work.glob("images/*.npy")).relative_to(work), KINDS[kind])(work)
    prompts, cache = [FilePrompt("a doctor", ())], work / "predictions.jsonl"
    content("predictions.jsonl", KINDS[kind])(work)
    with warnings.catch_warnings(action="ignore"):
        assert [*map(np.array, images_of("prompt", range(2)))][1].tolist() == np.array(images[1]).tolist()
        for _ in range(2):
            found = evaluate.classify_images(StubClassifier(), prompts, 2, cache, "", lambda *_: images, 0)
            assert found["gender"].tolist() == [[0, 1]]


@pytest.mark.parametrize("damage", [{"a": 1}, torch.ones(2, 3), torch.ones(2, 1, 4, 16, 16),
                                    torch.rand(2, 1, 4, 16, 16).half().to_sparse()],
                         ids=["a dictionary", "another shape", "another dtype", "sparse"])
def test_damaged_latents_of_pretraining_are_made_again(damage, tmp_path):
    torch.save(damage, tmp_path / "latents.pt")
    vae, images = pretrain.VAE(pretrain.VAE_CONFIG).eval(), torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8)
    with pytest.warns(match="sound cache"):
        mean, _ = pretrain.encode_images(vae, images, tmp_path)
    assert mean.shape == (1, 4, 16, 16)


def test_of_two_first_runs_one_makes_the_pairs_and_the_latents(tmp_path, original, monkeypatch):
    def counted(f):
        def call(*args):
            with open(tmp_path / f.__name__, "a") as file:
                file.write("x")
            f(*args)
        return call

    def first_run(barrier):
        barrier.wait()
        data.PreferenceDataset(toy.default_pairs(tmp_path), sd, tmp_path / "cache")

    monkeypatch.setattr(toy.render_pairs, "__defaults__", (toy.PRINCIPLES, dict.fromkeys(toy.PAIRS, 1), {}))
    monkeypatch.setattr(toy, "render_pairs", counted(toy.render_pairs))
    monkeypatch.setattr(latents, "encode_samples", counted(latents.encode_samples))
    torch.set_num_threads(1)  # those of OpenMP do not survive a fork
    sd, barrier = weights.load(original / "model"), FORK.Barrier(3)
    processes = [FORK.Process(target=first_run, args=(barrier,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 3
    assert [(tmp_path / name).read_text() for name in ("render_pairs", "encode_samples")] == ["x", "x"]
    next(tmp_path.glob("portraits-*/*/*/0000.png")).unlink()
    with pytest.warns(match="no file 0000.png; it is made again"):
        assert not data.read_samples(toy.default_pairs(tmp_path))[1]


@pytest.mark.parametrize("how", ["closed pipe", "ASCII terminal", "no Unicode"])
def test_a_process_of_its_own(how, work):
    words = [sys.executable, "-m", "lab.dataset", "check", str(work / "data")]
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    if how == "ASCII terminal":
        words, env = [*words[:-1], "nöwhere"], env | {"PYTHONIOENCODING": "ascii"}
    if how == "no Unicode":
        options = ["--prompt", "a", "--steps", "1", "--principle", b"\xff", "--out", "out"]
        words = [sys.executable, str(REPOSITORY / "sample.py"), *options]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    if how == "closed pipe":
        process.stdout.close()
    err = process.stderr.read().decode().splitlines()
    assert is_house_form(process.wait(), err), err
