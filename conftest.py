"""Fixtures and helpers of all tests. Small random models; no download."""

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anybody imports Triton, as diffusers does

import diffusers
import numpy as np
import pytest
import transformers

import data
from lab.prompts import make_prompts
from lab import classifier as classifier_module
from lab import portraits, toy
import train
import weights
from common import UserError
from clip_text import CLIPTextConfig, CLIPTextModel
from formats.export import save
from lab.tokenizer import train_tokenizer
from livo import ValueEncoder
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig


SHARED = Path(__file__).resolve().parent.parent / "shared"


TOKENIZER = Path(__file__).parent / "tiny-sd" / "tokenizer"


CROSS_DOWN, PLAIN_DOWN = "CrossAttnDownBlock2D", "DownBlock2D"


CROSS_UP, PLAIN_UP = "CrossAttnUpBlock2D", "UpBlock2D"


UNETS = {
    "1.x, two levels": dict(
        block_out_channels=(32, 64), down_block_types=(CROSS_DOWN, PLAIN_DOWN), up_block_types=(PLAIN_UP, CROSS_UP),
        cross_attention_dim=24, attention_head_dim=4, norm_num_groups=16),
    "1.x, four levels": dict(
        block_out_channels=(32, 64, 64, 64), down_block_types=(CROSS_DOWN,) * 3 + (PLAIN_DOWN,),
        up_block_types=(PLAIN_UP,) + (CROSS_UP,) * 3, cross_attention_dim=24, attention_head_dim=8,
        layers_per_block=1),
    "2.x": dict(
        block_out_channels=(32, 64, 64), down_block_types=(CROSS_DOWN, CROSS_DOWN, PLAIN_DOWN),
        up_block_types=(PLAIN_UP, CROSS_UP, CROSS_UP), cross_attention_dim=40, attention_head_dim=(2, 4, 4),
        use_linear_projection=True, upcast_attention=True),
}


def assert_close(ours, reference, tolerance=1e-4):
    assert (ours - reference).abs().max() <= tolerance * reference.abs().max()


CORPUS = 4 * [
    "a photo of a small cat on a red sofa", "a photo of the cat, café au lait, 8k", "don't paint the red cat",
    "a painting of two small dogs on the sofa", "the photo of a photo, highly detailed, highly realistic",
]


@pytest.fixture(scope="module")
def small_tokenizer():
    return train_tokenizer(CORPUS, 560)


SD1 = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
       "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "set_alpha_to_one": False,
       "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None, "clip_sample": False}


SMALL_UNET = dict(block_out_channels=(16, 32), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=24, attention_head_dim=2,
            layers_per_block=1, norm_num_groups=8, sample_size=8)


def pixels(images):
    return np.stack([np.asarray(image, dtype=int) for image in images])


@pytest.fixture(scope="module")
def shipped():
    sd = weights.load(TOKENIZER.parent)
    return sd, ValueEncoder.from_text_encoder(sd.text_encoder)


REPOSITORY = Path(train.__file__).parent


@pytest.fixture(scope="module")
def sd():
    """A random checkpoint with latents of 8×8 for images of 16×16."""
    torch.manual_seed(0)
    text = CLIPTextConfig(vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                          num_attention_heads=2, eos_token_id=599)
    unet = UNetConfig(sample_size=8, block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=32,
                      attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                      up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    vae = VAEConfig(block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=8)
    captions = [portraits.write_caption(portraits.sample_record(seed)) for seed in range(500)]
    networks = [network.eval().requires_grad_(False) for network in (UNet(unet), VAE(vae), CLIPTextModel(text))]
    tokenizer = train_tokenizer([*captions, *toy.PRINCIPLES], 600)
    return weights.StableDiffusion(*networks, tokenizer, weights.SCHEDULER | {"prediction_type": "epsilon"})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "portraits"
    toy.render_pairs(root, pairs=dict.fromkeys(toy.PAIRS, 26), preservation={"bloody": 13})
    return root


@pytest.fixture(scope="module")
def folder(sd, root, tmp_path_factory):
    """Where commands run: the checkpoint as a folder, and the cache of the data already there."""
    folder = tmp_path_factory.mktemp("work")
    save(sd, folder / "model", torch.float32)
    data.PreferenceDataset(root, weights.load(folder / "model"), folder / "cache")
    return folder


@pytest.fixture(scope="module")
def dataset(sd, root, folder):
    return data.PreferenceDataset(root, sd, folder / "cache")


def settings(**changes):
    return train.Settings(**{"weights": "", "batch": 4, "micro_batch": 4, "steps": 4, "lr": 1e-3, "warmup": 2,
                             "beta": 100.0, "alpha": 50.0, "bias_alpha_scale": 0.4, "save_every": 2,
                             "sample_every": 10**6} | changes)


def pairs_of(dataset, n=4):
    pairs = (dataset.pair(position, 0, range(1000)) for position in range(10 * n))
    return [pair for pair in pairs if not pair.preservation][:n]


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def relative(a, b):
    a, b = (torch.cat([t.flatten() for t in tensors.values()]) for tensors in (a, b))
    return ((a - b).norm() / b.norm()).item()


def trained_a_little(sd):
    """A value encoder whose token is no longer the initial one."""
    torch.manual_seed(1)
    value_encoder = ValueEncoder.from_text_encoder(sd.text_encoder)
    for parameter in value_encoder.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return value_encoder


CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")


def tiny_pipeline(sd2=False):

    torch.manual_seed(0)
    widths = (64, 128) if sd2 else (32, 64, 64)
    down = (CROSS[0],) * (len(widths) - 1) + (PLAIN[0],)
    up = (PLAIN[1],) + (CROSS[1],) * (len(widths) - 1)
    unet = diffusers.UNet2DConditionModel(
        sample_size=64, block_out_channels=widths, down_block_types=down, up_block_types=up,
        cross_attention_dim=64, attention_head_dim=[1, 2] if sd2 else 8, use_linear_projection=sd2,
        layers_per_block=2 if sd2 else 1)
    vae = diffusers.AutoencoderKL(block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2,
                                  up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=2)
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=49408, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=1,
        hidden_act="gelu" if sd2 else "quick_gelu", eos_token_id=2))
    tokenizer = transformers.CLIPTokenizer.from_pretrained(TOKENIZER)
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction" if sd2 else "epsilon")
    return diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False)


@pytest.fixture(scope="session")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="session")
def pipe2():
    return tiny_pipeline(sd2=True)


@pytest.fixture(scope="session")
def published(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "sd"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def sd_folder(published, tmp_path):
    return Path(shutil.copytree(published, tmp_path / "sd"))


def refused(pattern, call, *args, **kwargs):
    with pytest.raises(UserError, match=pattern) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def hub(published, tmp_path):
    """A repository with everything that could be fetched and should not be. -> (environment, files requested)"""
    root, requested = Path(shutil.copytree(published, tmp_path / "repo")), []
    livo = tmp_path / "livo"
    shutil.copytree(published / "text_encoder", livo / "deep/value_encoder")
    for junk in ("safety_checker/model.safetensors", "unet/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.bin",
                 "text_encoder/pytorch_model.bin", "unet/diffusion_pytorch_model.non_ema.safetensors",
                 "unet/diffusion_pytorch_model.fp16.safetensors", "sd-v1-5.ckpt", "text_encoder/flax_model.msgpack"):
        (root / junk).parent.mkdir(exist_ok=True)
        (root / junk).write_bytes(b"should not be fetched")
    repositories = {"someone/sd": root, "someone/livo": livo}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.split("?")[0]
            match = re.fullmatch(r"/(api/models/)?([^/]+/[^/]+)/(revision|resolve|tree)/[^/]+/?(.*)", path) or \
                re.fullmatch(r"/(api/models/)([^/]+/[^/]+)()()", path)
            folder = repositories.get(match[2]) if match else None
            headers, body = {"X-Repo-Commit": "c" * 40}, b""
            if folder is None:
                status, headers = 404, {"X-Error-Code": "RepoNotFound"}
            elif match[1]:
                status, files = 200, sorted(p for p in folder.rglob("*") if p.is_file())
                names = [p.relative_to(folder).as_posix() for p in files]
                listing = {"id": match[2], "sha": "c" * 40, "siblings": [{"rfilename": n} for n in names]}
                if match[3] == "tree":
                    listing = [{"type": "file", "path": n, "size": p.stat().st_size, "oid": "e" * 40}
                               for n, p in zip(names, files)]
                body, headers["Content-Type"] = json.dumps(listing).encode(), "application/json"
            else:
                status, body = 200, (folder / match[4]).read_bytes()
                headers["ETag"] = f'"{abs(hash(match[4]))}"'
                requested.append(match[4])
            self.send_response(status)
            for key, value in {**headers, "Content-Length": len(body)}.items():
                self.send_header(key, str(value))
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else body)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "cache"),
           "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    yield env, requested, server
    server.shutdown()
    server.server_close()


def fetch(env, call):
    """In a process of its own: huggingface_hub reads the environment when it is imported."""
    code = f"import common, weights\ndef main():\n    model = weights.{call}\n    print('loaded', type(model).__name__)\ncommon.run(main)"
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=Path(weights.__file__).parent)


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random model of 64×64 images."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer([prompt.text for prompt in make_prompts()], 560)
    text = CLIPTextModel(CLIPTextConfig(vocab_size=560, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                        num_attention_heads=2, eos_token_id=tokenizer.eos_token_id))
    for parameter in text.text_model.embeddings.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    unet = UNet(UNetConfig(sample_size=16, block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=4,
                           cross_attention_dim=32, attention_head_dim=2,
                           down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                           up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")))
    vae = VAE(VAEConfig(block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=4))
    sd = weights.StableDiffusion(unet, vae, text, tokenizer, weights.SCHEDULER)
    folder = tmp_path_factory.mktemp("tiny") / "tiny-sd"
    save(sd, folder)
    return folder

def write_pipeline(path, config):
    """A random pipeline of 64×64 images, saved by diffusers. -> path"""
    torch.manual_seed(0)
    tokens = "<|startoftext|>", "<|endoftext|>"
    letters = [chr(i) for i in range(97, 123)]
    vocab = {token: i for i, token in enumerate([*letters, *(c + "</w>" for c in letters), *tokens])}
    (path / "bpe").mkdir(parents=True)
    (path / "bpe" / "vocab.json").write_text(json.dumps(vocab))
    (path / "bpe" / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(path / "bpe" / "vocab.json"), str(path / "bpe" / "merges.txt"),
                                           model_max_length=77)
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=len(vocab), hidden_size=24, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, bos_token_id=len(vocab) - 2, eos_token_id=len(vocab) - 1,
        pad_token_id=len(vocab) - 1))
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8, 16, 16), norm_num_groups=4, layers_per_block=1,
                                  down_block_types=("DownEncoderBlock2D",) * 4,
                                  up_block_types=("UpDecoderBlock2D",) * 4)
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=diffusers.UNet2DConditionModel(**SMALL_UNET),
        scheduler=diffusers.PNDMScheduler.from_config(config), safety_checker=None, feature_extractor=None)
    pipe.save_pretrained(path)
    return path


@pytest.fixture
def small_sd():
    torch.manual_seed(0)
    unet = UNet(UNetConfig(**SMALL_UNET)).eval()
    vae = VAE(VAEConfig(block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1)).eval()
    return SimpleNamespace(unet=unet, vae=vae, scheduler=SD1)


# ── Training runs ────────────────────────────────────────────────────────────────────────────────────────────────────


def run_settings(folder, root, **changes):
    options = {"weights": folder / "model", "data": root, "steps": 10, "batch": 4, "micro-batch": 4, "lr": 1e-3,
               "warmup": 2, "beta": 100, "alpha": 50, "save-every": 2, "sample-every": 1000, "group-size": 2,
               "min-timestep": 50, "final-ln-lr-scale": 5, "decay": 0.5}
    options |= {key.replace("_", "-"): value for key, value in changes.items()}
    return [text for key, value in options.items() for text in (f"--{key}", str(value))]


def start(*args, **env):
    """train.py in a process of its own."""
    command = [sys.executable, "-W", "ignore", str(REPOSITORY / "train.py"), *map(str, args)]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"} | env, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def steps_in(run):
    log = run / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def wait_for_steps(process, run, steps):
    while steps_in(run) < steps and process.poll() is None:
        time.sleep(0.002)


@pytest.fixture(scope="module")
def whole_run(folder, root):
    """A run that nothing interrupted, in this process."""
    torch.set_num_threads(1)
    train.main([*run_settings(folder, root), "--out", str(folder / "whole")])
    return folder / "whole"
