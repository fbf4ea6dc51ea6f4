"""Fixtures and helpers of all tests. Small random models; no download."""

import atexit
import http.server
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, as diffusers and attention.py do

import diffusers
import numpy as np
import pytest
import transformers
from tqdm import tqdm

try:  # transformers 5 gives the plain name to the one that needs torchvision
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as ImageProcessor
except ImportError:
    from transformers import CLIPImageProcessor as ImageProcessor

import data
import train
import weights
from clip_text import CLIPTextConfig, CLIPTextModel
from common import UserError
from formats.export import save, save_tokenizer
from lab import classifier as classifier_module
from lab import evaluate, portraits, toy
from lab.captions import write_caption
from lab.prompts import make_prompts
from lab.tokenizer import train_tokenizer
from livo import ValueEncoder
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

tqdm.set_lock(threading.RLock())  # the default one is shared with forked processes: one that is killed may hold it
REPOSITORY = Path(__file__).resolve().parent
SHARED, TINY_SD = REPOSITORY.parent / "shared", REPOSITORY / "tiny-sd"
TOKENIZER = Path(tempfile.mkdtemp(prefix="livo-tests-")) / "tokenizer"  # small, of 77 tokens as the published one
atexit.register(shutil.rmtree, TOKENIZER.parent)
CAPTIONS = [write_caption(portraits.sample_record(seed)) for seed in range(500)]
save_tokenizer(train_tokenizer(CAPTIONS, 704), TOKENIZER)
SD1 = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
       "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "set_alpha_to_one": False,
       "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None, "clip_sample": False}

# ── Helpers ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def levels(*channels):
    """Options of a UNet with these levels; all but the lowest cross-attend, as in Stable Diffusion."""
    n = len(channels) - 1
    return {"block_out_channels": channels, "down_block_types": ("CrossAttnDownBlock2D",) * n + ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * n}


UNETS = {
    "1.x, two levels": levels(32, 64) | dict(cross_attention_dim=24, attention_head_dim=4, norm_num_groups=16),
    "1.x, four levels": levels(32, 64, 64, 64) | dict(cross_attention_dim=24, attention_head_dim=8, layers_per_block=1),
    "distilled, no mid block": dict(
        block_out_channels=(32, 64, 64), down_block_types=("CrossAttnDownBlock2D",) * 3, layers_per_block=1,
        up_block_types=("CrossAttnUpBlock2D",) * 3, mid_block_type=None, cross_attention_dim=24, attention_head_dim=4),
    "2.x": levels(32, 64, 64) | dict(cross_attention_dim=40, attention_head_dim=(2, 4, 4), use_linear_projection=True,
                                     upcast_attention=True)}


def assert_close(ours, reference, tolerance=1e-4):
    assert (ours - reference).abs().max() <= tolerance * reference.abs().max()


def relative(a, b):
    """Norm of the difference of two dictionaries of tensors, relative to that of b."""
    a, b = (torch.cat([t.flatten() for t in tensors.values()]) for tensors in (a, b))
    return ((a - b).norm() / b.norm()).item()


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def pixels(images):
    return np.stack([np.asarray(image, dtype=int) for image in images])


def refused(pattern, call, *args, **kwargs):
    """The call raises a UserError that matches. -> its message"""
    with pytest.raises(UserError, match=pattern) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def trained_a_little(sd):
    """A value encoder whose token is no longer the initial one."""
    torch.manual_seed(1)
    value_encoder = ValueEncoder.from_text_encoder(sd.text_encoder)
    for parameter in value_encoder.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return value_encoder


def settings(**changes):
    return train.Settings(**{"weights": "", "batch": 4, "micro_batch": 4, "steps": 4, "lr": 1e-3, "warmup": 2,
                             "beta": 100.0, "alpha": 50.0, "save_every": 2, "sample_every": 10**6,
                             "margins": "gender equality: 0.4 0.2; racial equality: 0.4 0.2"} | changes)


def pairs_of(dataset, n=4):
    pairs = (dataset.pair(position, 0, range(1000)) for position in range(10 * n))
    return [pair for pair in pairs if not pair.preservation][:n]


# ── Models ───────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture(scope="session")
def shipped():
    """tiny-sd, and a value encoder before training."""
    sd = weights.load(TINY_SD)
    return sd, ValueEncoder.from_text_encoder(sd.text_encoder)


@pytest.fixture(scope="session")
def sd():
    """A random checkpoint with latents of 8×8 for images of 16×16. Tests that change it take a copy."""
    torch.manual_seed(0)
    unet = UNet(UNetConfig(sample_size=8, layers_per_block=1, cross_attention_dim=32, attention_head_dim=2,
                           **levels(32, 32)))
    vae = VAE(VAEConfig(block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=8))
    text = CLIPTextModel(CLIPTextConfig(vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                        num_attention_heads=2, eos_token_id=599))
    networks = [network.eval().requires_grad_(False) for network in (unet, vae, text)]
    tokenizer = train_tokenizer([*CAPTIONS, *toy.PRINCIPLES], 600)
    return weights.StableDiffusion(*networks, tokenizer, weights.SCHEDULER | {"prediction_type": "epsilon"})


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a random model of 64×64 images."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer([prompt.text for prompt in make_prompts()], 560)
    text = CLIPTextModel(CLIPTextConfig(vocab_size=560, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                        num_attention_heads=2, eos_token_id=tokenizer.eos_token_id))
    for parameter in text.text_model.embeddings.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    unet = UNet(UNetConfig(sample_size=16, layers_per_block=1, norm_num_groups=4, cross_attention_dim=32,
                           attention_head_dim=2, **levels(16, 16)))
    vae = VAE(VAEConfig(block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=4))
    folder = tmp_path_factory.mktemp("tiny") / "tiny-sd"
    save(weights.StableDiffusion(unet, vae, text, tokenizer, weights.SCHEDULER), folder)
    return folder


@pytest.fixture(scope="session")
def tiny_livo(tiny):
    """The folder of a value encoder for `tiny` whose token has an effect."""
    value_encoder = ValueEncoder.from_text_encoder(weights.load(tiny).text_encoder)
    torch.nn.init.normal_(value_encoder.text_model.final_layer_norm.weight, std=100)
    weights.save_text_encoder(value_encoder, tiny.parent / "livo")
    return tiny.parent / "livo"


def diffusers_pipeline(scheduler, unet, vae, text):
    """A random pipeline of diffusers with the tests' tokenizer. unet, vae, text: options of its networks."""
    torch.manual_seed(0)
    n = len(vae["block_out_channels"])
    vae |= {"down_block_types": ("DownEncoderBlock2D",) * n, "up_block_types": ("UpDecoderBlock2D",) * n}
    return diffusers.StableDiffusionPipeline(
        unet=diffusers.UNet2DConditionModel(**unet), vae=diffusers.AutoencoderKL(**vae), scheduler=scheduler,
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(num_hidden_layers=2, **text)),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(TOKENIZER), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False)


def write_pipeline(folder, config):
    """Save a random pipeline of 64×64 images, with the scheduler's config. -> folder"""
    unet = levels(16, 32) | dict(cross_attention_dim=24, attention_head_dim=2, layers_per_block=1, norm_num_groups=8,
                                 sample_size=8)
    vae = dict(block_out_channels=(8, 8, 16, 16), norm_num_groups=4, layers_per_block=1)
    text = dict(vocab_size=704, hidden_size=24, intermediate_size=48, num_attention_heads=2, eos_token_id=703)
    diffusers_pipeline(diffusers.PNDMScheduler.from_config(config), unet, vae, text).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def classifier():
    """A sixth of the real training, whose accuracy `python -m lab.evaluate` prints."""
    state = torch.random.get_rng_state()
    classifier = classifier_module.train_classifier(images=2000, epochs=2)
    assert torch.equal(torch.random.get_rng_state(), state)  # the caller's random numbers stay what they were
    classifier.name = "short"
    return classifier


class StubClassifier:
    """Predicts the first pixel's red as the class."""

    name = "stub"

    def classify(self, images):
        red = torch.tensor([image.getpixel((0, 0))[0] for image in images])
        return {name: red for name in classifier_module.ATTRIBUTES} | {"features": red[:, None].float()}


@pytest.fixture
def run_evaluate(tiny, tmp_path, monkeypatch):
    """A function of options -> results.json, and the (prompt, principles, value encoder, seeds) generated for it."""
    monkeypatch.setattr(evaluate, "generate", spy := Mock(wraps=evaluate.generate))

    def run(*more):
        spy.reset_mock()
        evaluate.main(["--weights", str(tiny), "--per-prompt", "5", "--steps", "2", "--device", "cpu",
                       "--batch-size", "5", "--out", str(tmp_path / "out"), *map(str, more)])
        calls = [(prompt, *others) for (_, prompt, _, *others), _ in spy.call_args_list]
        return json.loads((tmp_path / "out" / "results.json").read_text()), calls

    return run


def full_vocabulary_pipeline(sd2):
    """Small, but with the vocabulary and the number of norm groups of the published models, which files do not tell."""
    scheduler = diffusers.DDIMScheduler.from_config(
        SD1 | {"prediction_type": "v_prediction" if sd2 else "epsilon"})
    unet = dict(cross_attention_dim=64, sample_size=96 if sd2 else 64, use_linear_projection=sd2, upcast_attention=sd2)
    unet |= levels(64, 128) | dict(attention_head_dim=[1, 2]) if sd2 else levels(32, 64, 64) | dict(layers_per_block=1)
    text = dict(vocab_size=49408, hidden_size=64, intermediate_size=96, num_attention_heads=1, eos_token_id=2,
                hidden_act="gelu" if sd2 else "quick_gelu")
    return diffusers_pipeline(scheduler, unet, dict(block_out_channels=(32, 64), layers_per_block=2), text)


@pytest.fixture(scope="session")
def pipe():
    return full_vocabulary_pipeline(sd2=False)


@pytest.fixture(scope="session")
def published(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "sd"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def sd_folder(published, tmp_path):
    return Path(shutil.copytree(published, tmp_path / "sd"))


# ── The hub, on a local server ───────────────────────────────────────────────────────────────────────────────────────

def answer(path, repositories, requested):
    """A request's path -> status, headers and body, as the hub answers."""
    kind = re.fullmatch(r"/(api/models/)?([^/]+/[^/]+?)(?:/(revision|resolve|tree)/[^/]+/?(.*))?", path.split("?")[0])
    folder = kind and repositories.get(kind[2])
    if not folder:
        return 404, {"X-Error-Code": "RepoNotFound"}, b""
    if not kind[1]:
        requested.append(kind[4])
        return 200, {"ETag": f'"{abs(hash(kind[4]))}"'}, (folder / kind[4]).read_bytes()
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    listing = {"id": kind[2], "sha": "c" * 40, "siblings": [{"rfilename": name} for name in files]}
    if kind[3] == "tree":
        listing = [{"type": "file", "path": name, "size": path.stat().st_size, "oid": "e" * 40}
                   for name, path in files.items()]
    return 200, {"Content-Type": "application/json"}, json.dumps(listing).encode()


@pytest.fixture
def hub(published, tmp_path):
    """Repositories with files that should not be fetched too. -> (environment, files requested, server)"""
    repositories, requested = {"someone/sd": tmp_path / "repo", "someone/livo": tmp_path / "livo"}, []
    shutil.copytree(published, tmp_path / "repo")
    shutil.copytree(published / "text_encoder", tmp_path / "livo/deep/value_encoder")
    for junk in ("safety_checker/model.safetensors", "unet/diffusion_pytorch_model.bin", "sd-v1-5.ckpt",
                 "vae/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin", "text_encoder/flax_model.msgpack",
                 "unet/diffusion_pytorch_model.non_ema.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"):
        (tmp_path / "repo" / junk).parent.mkdir(exist_ok=True)
        (tmp_path / "repo" / junk).write_bytes(b"should not be fetched")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers, body = answer(self.path, repositories, requested)
            self.send_response(status)
            for key, value in {"X-Repo-Commit": "c" * 40, **headers, "Content-Length": len(body)}.items():
                self.send_header(key, str(value))
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else body)

        do_HEAD, log_message = do_GET, lambda *args: None

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "cache"),
           "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    yield env, requested, server
    server.shutdown()
    server.server_close()


FETCH = """
import sys, warnings, common, formats.messages, weights, lab.clip_image
for call in sys.argv[1:]:
    with warnings.catch_warnings(record=True) as caught:
        try:
            print(type(eval(call)).__name__, *(warning.message for warning in caught))
        except common.UserError as error:
            print("error:", formats.messages.one_line(error))
"""


def fetch(env, *calls):
    """-> for each call a line, what it loads and warns of, or its error.

    In a process of its own, because huggingface_hub reads the environment when it is imported.
    """
    return subprocess.run([sys.executable, "-c", FETCH, *calls], env=env, stdout=subprocess.PIPE, text=True,
                          cwd=REPOSITORY, check=True).stdout.splitlines()


# ── Data and training runs ───────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture(scope="session")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "portraits"
    toy.render_pairs(root, pairs=dict.fromkeys(toy.PAIRS, 26), preservation={"bloody": 13})
    return root


@pytest.fixture(scope="session")
def folder(sd, root, tmp_path_factory):
    """Where commands run: the checkpoint as a folder, and the cache of the data already there."""
    folder = tmp_path_factory.mktemp("work")
    save(sd, folder / "model", torch.float32)
    data.PreferenceDataset(root, weights.load(folder / "model"), folder / "cache")
    return folder


@pytest.fixture(scope="session")
def dataset(sd, root, folder):
    return data.PreferenceDataset(root, sd, folder / "cache")


def run_settings(folder, root, **changes):
    options = {"weights": folder / "model", "data": root, "steps": 10, "batch": 4, "micro-batch": 4, "lr": 1e-3,
               "warmup": 2, "beta": 100, "alpha": 50, "save-every": 2, "sample-every": 1000,
               "snr-gamma": 2, "margins": "gender equality: 0.5 0.25", "decay": 0.5}
    options |= {key.replace("_", "-"): value for key, value in changes.items()}
    return [text for key, value in options.items() for text in (f"--{key}", str(value))]


@pytest.fixture(scope="session")
def whole_run(folder, root):
    """A run that nothing interrupted, in this process."""
    torch.set_num_threads(1)
    train.main([*run_settings(folder, root), "--out", str(folder / "whole")])
    return folder / "whole"


def start(*args, **env):
    """train.py in a process of its own."""
    command = [sys.executable, "-W", "ignore", str(REPOSITORY / "train.py"), *map(str, args)]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"} | env, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def wait_for_steps(process, run, steps):
    log = run / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= steps):
        time.sleep(0.002)


# ── Kills ────────────────────────────────────────────────────────────────────────────────────────────────────────────

KILLS = int(os.environ.get("KILLS", 30))
FORK = multiprocessing.get_context("fork")  # all imports are done, so that a process starts at once


def quietly(main, arguments):
    """main(arguments) without output, on one thread: those of OpenMP do not survive a fork."""
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    torch.set_num_threads(1)
    main(arguments)


def run_with_kills(main, arguments, kills, seconds, rng=random.Random(0)):
    """Run main(arguments()) in a process of its own and kill it at a random moment, again and again, until it ends.

    kills: at most so many. seconds: the longest life. -> the kills that are left
    """
    while True:
        process = FORK.Process(target=quietly, args=(main, arguments()))
        process.start()
        process.join(rng.uniform(0, seconds) if kills else None)
        process.kill()
        process.join()
        if process.exitcode == 0:
            return kills
        assert process.exitcode == -signal.SIGKILL
        kills -= 1
