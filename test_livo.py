"""The tests: networks, samplers and loaders against their peers (diffusers, transformers), then invariants.

    pytest -q test_livo.py                        # small random models and tiny-sd, no download
    FULL=1 pytest -q test_livo.py -k full_size    # the SD 1.5 architecture: 10 GB of memory, minutes

What needs ../shared (CLIP's vocabulary, real prompts) is skipped where that is absent.
"""

import copy
import csv
import http.server
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import warnings
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anybody imports Triton, as diffusers does

import diffusers
import numpy as np
import pytest
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import attention
import baselines
import bench
import build
import cli
import clip_image
import curves
import data
import evaluate
import judge as judge_module
import livo
import portraits
import pretrain
import sample
import train
import uce
import weights
from attention import FlashAttention, attend, plain_attention, project
from cli import UserError, pick_device, run
from clip_image import CLIPConfig, CLIPModel, load_clip, read_preprocessor, zero_shot
from clip_text import BOS, EOS, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, train_tokenizer
from evaluate import Prompt, bootstrap, count, d1, d2, fair, frechet_distance
from judge import ClipJudge, Judge
from livo import (ValueEncoder, aligned_hinge, bradley_terry_loss, livo_loss, make_context, make_uncond,
                  violating_hinge)
from retrieve import BIAS, BLOODY, GENDER, NUDITY, RACE, TOXIC, ZOMBIE, retrieve
from sample import Schedule, ddim_step, denoise, dpm_step, draw_noise, generate, grid, x0_and_eps
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig, sample_latent

SHARED = Path(__file__).resolve().parent.parent / "shared"
TOKENIZER = Path(__file__).parent / "tiny-sd" / "tokenizer"


# ── unet.py, vae.py ──────────────────────────────────────────────────────────────────────────────────────────────

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
VAES = {
    "two levels": dict(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8),
    "three levels": dict(block_out_channels=(16, 32, 32), layers_per_block=2, norm_num_groups=4),
}


def assert_close(ours, theirs, tolerance=1e-4):
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.fixture(params=UNETS)
def unets(request):
    torch.manual_seed(0)
    peer, ours = (network.eval() for network in (diffusers.UNet2DConditionModel(**UNETS[request.param]),
                                                 UNet(UNetConfig(**UNETS[request.param]))))
    assert ours.state_dict().keys() == peer.state_dict().keys()
    ours.load_state_dict(peer.state_dict())
    return ours, peer


@pytest.mark.parametrize("size", [(16, 16), (24, 40), (9, 13)])
@torch.no_grad()
def test_unet_equals_diffusers(unets, size):
    ours, peer = unets
    x, t = torch.randn(2, 4, *size), torch.tensor([3, 981])
    context = torch.randn(2, 78, ours.config.cross_attention_dim)
    theirs = peer(x, t, context).sample
    assert_close(ours(x, t, context), theirs)
    assert torch.equal(ours(x, ours.embed(t), ours.keys_values(context)), ours(x, t, context))


def test_unet_gradient_of_the_context_equals_diffusers(unets):
    ours, peer = unets
    # (8×8 would be 1×1 at the lowest of four levels, where norms over four numbers magnify rounding)
    x, context = torch.randn(2, 4, 16, 16), torch.randn(2, 78, ours.config.cross_attention_dim, requires_grad=True)
    gradients = [torch.autograd.grad(output.square().sum(), context)[0]
                 for output in (ours(x, 500, context), peer(x, 500, context).sample)]
    assert_close(*gradients)


@pytest.mark.parametrize("t", [500, torch.tensor([3, 981])], ids=["one t", "a t each"])
@torch.no_grad()
def test_what_two_texts_share_is_computed_once(unets, t):
    unet, _ = unets
    x, context = torch.randn(2, 4, 9, 13), torch.randn(4, 78, unet.config.cross_attention_dim)
    rows = {}
    hooks = [module.register_forward_hook(lambda module, _, output: rows.update({module: output.shape[0]}))
             for module in unet.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    got = unet(x, t, context)
    for hook in hooks:
        hook.remove()
    twice = unet(torch.cat([x, x]), t if isinstance(t, int) else torch.cat([t, t]), context)
    assert got.shape == (4, 4, 9, 13)
    assert_close(got, twice, 1e-5)
    first = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    shared = [unet.conv_in, unet.down_blocks[0].resnets[0].conv2, first.attn1.to_out[0]]
    assert {rows[module] for module in shared} == {2} and rows[first.attn2.to_out[0]] == rows[unet.conv_out] == 4


@pytest.mark.parametrize("name", VAES)
@torch.no_grad()
def test_vae_equals_diffusers(name):
    torch.manual_seed(0)
    levels, ours = len(VAES[name]["block_out_channels"]), VAE(VAEConfig(**VAES[name]))
    peer = diffusers.AutoencoderKL(**VAES[name], down_block_types=("DownEncoderBlock2D",) * levels,
                                   up_block_types=("UpDecoderBlock2D",) * levels)
    assert ours.state_dict().keys() == peer.state_dict().keys()
    ours.load_state_dict(peer.state_dict())
    scale, x = ours.config.scaling_factor, torch.randn(2, 3, 24, 32)
    mean, logvar = ours.encode(x)
    posterior = peer.encode(x).latent_dist
    assert_close(mean, posterior.mean * scale)
    assert_close(logvar.exp().sqrt(), posterior.std * scale)
    noise = torch.Generator().manual_seed(5)
    assert_close(sample_latent(mean, logvar, noise), posterior.sample(torch.Generator().manual_seed(5)) * scale)
    z = torch.randn_like(mean)
    before = z.clone()
    assert_close(ours.decode(z), peer.decode(z / scale).sample)
    assert torch.equal(z, before)


@pytest.mark.parametrize("bias", [True, False])
def test_one_matrix_product_for_three_projections(monkeypatch, bias):
    torch.manual_seed(0)
    layers, x = [torch.nn.Linear(12, out, bias) for out in (12, 12, 8)], torch.randn(2, 5, 12)
    for on_gpu, joined in (False, False), (True, True):
        monkeypatch.setattr(attention, "has_kernels", lambda device, on_gpu=on_gpu: on_gpu)
        results = project(x, *layers)
        assert (len({y.untyped_storage().data_ptr() for y in results}) == 1) == joined
        for ours, layer in zip(results, layers, strict=True):
            assert_close(ours, layer(x))


def test_attention_equals_its_formula():
    """Heads laid out as in the formula; causal or not."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 5, 12)
    for causal in (False, True):
        heads = []
        for h in range(3):
            a, b, c = (y[..., 4 * h:4 * h + 4] for y in (q, k, v))
            scores = a @ b.transpose(1, 2) / 2  # √4
            if causal:
                scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ c)
        assert_close(attend(q, k, v, heads=3, causal=causal), torch.cat(heads, dim=-1))


# --- the kernels, on a GPU if there is one, else on Triton's interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ERRORS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
needs_triton = pytest.mark.skipif(attention.triton is None, reason="no Triton")


@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels run here")
def test_triton_is_not_imported_where_its_kernels_cannot_run():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = "import sys, attention; assert attention.triton is None and 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], env=env, check=True, cwd=Path(attention.__file__).parent)


def random_tokens(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, device=DEVICE)


def flash_and_plain(q, k, v, heads, needed=(True, True, True)):
    """-> [(ours, the formula's in float64)] of the output and of the gradients needed of q, k and v."""
    ours = [x.detach().requires_grad_(need) for x, need in zip((q, k, v), needed)]
    plain = [x.detach().double().requires_grad_(need) for x, need in zip((q, k, v), needed)]
    outputs = FlashAttention.apply(*ours, heads), plain_attention(*plain, heads)
    assert outputs[0].is_contiguous() and outputs[0].dtype == q.dtype
    d_out = random_tokens(*q.shape, dtype=q.dtype)
    for output in outputs:
        output.backward(d_out.to(output.dtype))
    assert [x.grad is not None for x in ours] == list(needed)
    return [outputs, *((a.grad, b.grad) for a, b, need in zip(ours, plain, needed) if need)]


def assert_flash_equals_plain(*args, **kwargs):
    for ours, plain in flash_and_plain(*args, **kwargs):  # of order one, or smaller where there are many keys
        assert (ours - plain).abs().max() <= ERRORS[ours.dtype] * plain.abs().max().clamp(min=1)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16,
                                   pytest.param(torch.bfloat16, marks=needs_gpu)])  # not in the interpreter's products
@pytest.mark.parametrize("B, heads, d, N, M", [
    (1, 2, 40, 129, None), (2, 1, 64, 80, None), (1, 1, 80, 77, None), (1, 1, 160, 65, None),  # None: self-attention
    (1, 2, 40, 129, 77), (2, 1, 64, 33, 78), (1, 2, 80, 65, 80), (1, 1, 160, 65, 77),
    (1, 3, 40, 1, None), (2, 1, 80, 7, 129), (1, 1, 160, 1, 7), (2, 2, 64, 78, 1), (1, 2, 8, 20, 20),
    *(pytest.param(1, heads, d, N, M, marks=needs_gpu)
      for side, heads, d in [(96, 5, 64), (64, 8, 40), (48, 10, 64), (32, 8, 80), (16, 8, 160), (8, 8, 160)]
      for N in [side * side] for M in (None, 77, 78)),
])  # fmt: skip
def test_flash_attention_equals_the_formula(B, heads, d, N, M, dtype):
    torch.manual_seed(0)
    C = heads * d
    if M is None:
        q, k, v = random_tokens(B, N, 3 * C, dtype=dtype).split(C, dim=-1)
    else:
        q, (k, v) = random_tokens(B, N, C, dtype=dtype), random_tokens(B, M, 2 * C, dtype=dtype).split(C, dim=-1)
    assert_flash_equals_plain(q, k, v, heads)


@needs_triton
def test_flash_attention_of_any_strides():
    torch.manual_seed(0)
    q = random_tokens(80, 2, 20).transpose(0, 2)  # (20, 2, 80): nothing is where one would expect it
    q, k, v = q.transpose(0, 1), random_tokens(1, 7, 80).expand(2, 7, 80), random_tokens(2, 14, 160)[:, ::2, ::2]
    assert_flash_equals_plain(q, k, v, 2)


@needs_triton
@pytest.mark.parametrize("programs", [1, 6, 10**6])  # 1, 3 and 5 shares of the 5 blocks of queries
def test_queries_dealt_out_to_several_programs(programs, monkeypatch):
    monkeypatch.setattr(attention, "PROGRAMS", programs)
    torch.manual_seed(0)
    assert_flash_equals_plain(random_tokens(1, 70, 40), *random_tokens(2, 1, 17, 40), 1)


@needs_triton
@pytest.mark.parametrize("needed, unused", [((False, True, True), "dq_kernel"), ((True, False, False), "dkv_kernel")])
def test_no_work_for_gradients_that_nobody_needs(needed, unused, monkeypatch):
    monkeypatch.delattr(attention, unused)
    torch.manual_seed(0)
    assert_flash_equals_plain(random_tokens(1, 20, 40), *random_tokens(2, 1, 17, 40), 1, needed=needed)


@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's of ∞, which the interpreter computes with
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_beyond_float16(sign):
    """SD 2.1's, positive; negative ones make the exponentials of keys that are only there to fill a block infinite."""
    torch.manual_seed(0)
    q, k = random_tokens(1, 20, 40) + 45, random_tokens(1, 77, 40) + sign * 45  # q·k = ±81000
    q, k, v = q.half(), k.half(), random_tokens(1, 77, 40).half()
    assert not (q @ k.transpose(1, 2)).isfinite().any()
    (ours, plain), *gradients = flash_and_plain(q, k, v, 1)
    assert_close(ours, plain, 1e-2)
    assert all(ours.isfinite().all() for ours, _ in gradients)


@needs_triton
def test_attend_chooses_the_kernels_for_the_unet(monkeypatch):
    torch.manual_seed(0)
    used, forward = [], FlashAttention.forward

    def counted(ctx, q, k, v, heads):
        used.append((q.shape[1], k.shape[1]))
        return forward(ctx, q, k, v, heads)

    monkeypatch.setattr(FlashAttention, "forward", staticmethod(counted))
    unet = UNet(UNetConfig(**UNETS["2.x"])).to(DEVICE, torch.float16).requires_grad_(False)
    x, context = random_tokens(1, 4, 8, 8).half(), random_tokens(1, 78, 40).half().requires_grad_()
    results = []
    for has_kernels in (False, True):
        monkeypatch.setattr(attention, "has_kernels", lambda device: has_kernels)
        output = unet(x, 500, context)
        results.append([output, *torch.autograd.grad(output.square().sum(), context)])
        assert len(used) == (2 * 11 if has_kernels else 0)  # a self- and a cross-attention in each transformer
    for plain, ours in zip(*results):
        assert_close(ours, plain, 1e-2)
    assert (64, 64) in used and (64, 78) in used

    used.clear()
    x = random_tokens(1, 5, 512)
    for y, heads, causal in [(x, 8, False), (x.bfloat16(), 8, True), (x.bfloat16(), 1, False)]:
        attend(y, y, y, heads, causal)  # float32, the text tower's, the VAE's
    assert not used


# ── clip_text.py ───────────────────────────────────────────────────────────────────────────────────────────────


VOCABULARY = SHARED / "clip-tokenizer"
needs_vocabulary = pytest.mark.skipif(not VOCABULARY.is_dir(), reason="no CLIP vocabulary in ../shared")

CORPUS = 4 * [
    "a photo of a small cat on a red sofa", "a photo of the cat, café au lait, 8k", "don't paint the red cat",
    "a painting of two small dogs on the sofa", "the photo of a photo, highly detailed, highly realistic",
]

NASTY = [
    "", " ", "!", "wow!! 100% ok!", "Don't we'LL I'Ve 'S", "3 cats, 42 dogs, ٣٤ ½ ² Ⅷ",
    "a  b\t\tc\r\n\n d\x85e\u2028f\u3000g\xa0", "\x00nul\x00 \x07\x1b control",
    "&amp;amp; &lt;b&gt; &eacute;", "İstanbul ß ẞ ΣΑΣ ﬁ ſ K Å", "cafe\u0301 café a\u0300\u0316\u0301b",
    "zero\u200bwidth\u200d \ufeff\u00ad joined", "각 각 한국어 日本語のテキスト 中文字", "ไทย हिन्दी العربية עברית",
    "👩‍👩‍👧‍👦 🇩🇪 👍🏽 emoji🎨paint", "\U0010ffff\ue000\ufffd", f"cut {EOS} here{EOS}", f"{BOS}{BOS} x",
    "<|ENDOFTEXT|> <|StartOfText|>", "<|endoftext| > </w> a</w> Ġ #version: 0.2", "word " * 5000, "é" * 300,
]


def reference_ids(tokenizer, texts):
    encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    return encoded.input_ids


def our_ids(tokenizer, texts):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the cut prompts have their own test
        return tokenizer(texts)


def reference_tower(**config):
    """A transformers tower, every parameter random: it would start with norms of one and biases of zero."""
    torch.manual_seed(0)
    tower = transformers.CLIPTextModel(transformers.CLIPTextConfig(bos_token_id=0, **config)).eval()
    for parameter in tower.parameters():
        nn.init.normal_(parameter, std=0.3)
    return tower


def published_tokenizer(state):
    """The keys as in published_tokenizer files; transformers 5 holds, and may write, them without `text_model.`."""
    return {"text_model." + key.removeprefix("text_model."): value for key, value in state.items()}


TOWERS = [
    dict(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
         hidden_act="quick_gelu", eos_token_id=98),
    dict(vocab_size=99, hidden_size=36, intermediate_size=50, num_hidden_layers=3, num_attention_heads=3,
         hidden_act="gelu", eos_token_id=2),  # as the files of SD say; means 98
    dict(vocab_size=61, hidden_size=14, intermediate_size=7, num_hidden_layers=1, num_attention_heads=2,
         hidden_act="gelu", eos_token_id=40,  # not the highest id
         layer_norm_eps=1e-2, max_position_embeddings=20),
]


@pytest.mark.parametrize("config", TOWERS)
@pytest.mark.parametrize("pad", ["end", 0])
def test_tower_equals_transformers(config, pad):
    reference = reference_tower(**config)
    ours = CLIPTextModel(CLIPTextConfig.from_dict(reference.config.to_dict()))
    ours.load_state_dict(published_tokenizer(reference.state_dict()))
    end = ours.config.eos_token_id
    for length in (reference.config.max_position_embeddings, 9):
        ids = torch.randint(3, end, (3, length))
        ids[0, 1] = config["vocab_size"] - 1 if config["eos_token_id"] == 40 else ids[0, 1]
        for row, position in enumerate((2, length // 2, length - 1)):
            ids[row, position] = end
            ids[row, position + 1:] = end if pad == "end" else pad
        with torch.no_grad():
            expected = reference(ids)
            features, pooled = ours(ids)
        for got, want in ((features, expected.last_hidden_state), (pooled, expected.pooler_output)):
            assert got.shape == want.shape
            assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def test_tower_keys_are_those_on_disk(tmp_path):
    from safetensors.torch import load_file
    reference = reference_tower(**TOWERS[0])
    reference.save_pretrained(tmp_path)
    state = published_tokenizer(load_file(tmp_path / "model.safetensors"))
    config = CLIPTextConfig.from_dict(json.loads((tmp_path / "config.json").read_text()))
    with torch.device("meta"):
        tower = CLIPTextModel(config)
    assert {k: v.shape for k, v in tower.state_dict().items()} == {k: v.shape for k, v in state.items()}
    assert not list(tower.buffers())
    tower.load_state_dict(state, assign=True)
    ids = torch.tensor([[0, 5, 98, 98]])
    assert torch.allclose(tower(ids)[0], reference(ids).last_hidden_state, atol=1e-4)


@pytest.mark.parametrize("config, parameters", [
    (CLIPTextConfig(), 123_060_480),  # SD 1.5
    (CLIPTextConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16,
                    hidden_act="gelu"), 340_387_840),  # SD 2.1
])
def test_tower_has_the_published_size(config, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in CLIPTextModel(config).parameters()) == parameters


def test_tower_needs_an_end_of_text():
    tower = CLIPTextModel(CLIPTextConfig(**TOWERS[0]))
    with pytest.raises(AssertionError, match="98"):
        tower(torch.tensor([[0, 98, 98], [0, 1, 2]]))


def test_config_from_dict():
    good = vars(CLIPTextConfig())
    published_tokenizer = good | {"projection_dim": 768, "model_type": "clip_text_model"}
    assert CLIPTextConfig.from_dict(published_tokenizer) == CLIPTextConfig()
    assert CLIPTextConfig.from_dict(good | {"eos_token_id": 2}).eos_token_id == 49407
    assert CLIPTextConfig.from_dict(good | {"eos_token_id": 2, "vocab_size": 49409}).eos_token_id == 49407
    assert CLIPTextConfig.from_dict(good | {"eos_token_id": 2, "vocab_size": 600}).eos_token_id == 599
    with pytest.raises(UserError, match="expected hidden_act quick_gelu or gelu, got relu"):
        CLIPTextConfig.from_dict(good | {"hidden_act": "relu"})
    with pytest.raises(UserError, match="expected model_type clip_text_model, got t5"):
        CLIPTextConfig.from_dict(good | {"model_type": "t5"})
    with pytest.raises(UserError, match="num_attention_heads"):
        CLIPTextConfig.from_dict({k: v for k, v in good.items() if k != "num_attention_heads"})


def tokenizer_folder(tmp_path, config=None, special_tokens=None):
    """The real vocabulary with other small files beside it."""
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).symlink_to(VOCABULARY / name)
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special_tokens)):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


def token(content, **flags):
    flags = {"normalized": True} | flags
    return {"content": content, "lstrip": False, "rstrip": False, "single_word": False} | flags


# The small files of the SD 1.x and 2.x folders, and of a newer one that has learnt a token.
FOLDERS = {
    "bare": (None, None),
    "sd1": ({"pad_token": EOS, "model_max_length": 77, "bos_token": token(BOS, __type="AddedToken")},
            {"bos_token": token(BOS), "eos_token": token(EOS), "unk_token": token(EOS), "pad_token": EOS}),
    "sd2": ({"pad_token": EOS, "model_max_length": 77},
            {"bos_token": token(BOS), "eos_token": token(EOS), "unk_token": token(EOS), "pad_token": "!"}),
    "learnt": ({"added_tokens_decoder": {"49406": token(BOS, special=True), "49407": token(EOS, special=True),
                                         "49408": token("<cat toy>", special=False)},
                "bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS},
               {"pad_token": "!"}),  # no longer read where there is an added_tokens_decoder
}


@needs_vocabulary
@pytest.mark.parametrize("name", FOLDERS)
def test_tokenizer_equals_transformers(tmp_path, name):
    folder = tokenizer_folder(tmp_path, *FOLDERS[name])
    reference, ours = transformers.CLIPTokenizer.from_pretrained(folder), CLIPTokenizer(folder)
    generator = random.Random(0)
    texts = NASTY + ["a <cat toy> <CAT \n TOY>"] + [
        "".join(generator.choice("aB'ſ İé\u0301\u200d😀漢!<|\t1") for _ in range(40)) for _ in range(300)]
    expected, got = reference_ids(reference, texts), our_ids(ours, texts)
    assert [text for text, a, b in zip(texts, expected, got) if not a.equal(b)] == []
    assert (ours.bos_token_id, ours.eos_token_id) == (49406, 49407)
    assert ours.pad_token_id == reference.pad_token_id == (0 if name == "sd2" else 49407)
    assert got.shape == (len(texts), 77) and got.dtype == torch.int64

    ours.save(tmp_path / "saved")
    reopened = transformers.CLIPTokenizer.from_pretrained(tmp_path / "saved")
    assert reference_ids(reopened, texts).equal(expected)
    assert our_ids(CLIPTokenizer(tmp_path / "saved"), texts).equal(expected)


def test_unknown_symbols_become_the_end_of_text(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "a</w>": 1, BOS: 2, EOS: 3}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    expected = transformers.CLIPTokenizer.from_pretrained(tmp_path)(["a b aa"], return_tensors="pt").input_ids
    assert CLIPTokenizer(tmp_path)(["a b aa"], pad=False).equal(expected)
    assert expected.tolist() == [[2, 1, 3, 0, 1, 3]]


@needs_vocabulary
@pytest.mark.skipif(not (SHARED / "retrieval").is_dir(), reason="no prompts in ../shared")
def test_tokenizer_equals_transformers_on_real_prompts():
    with open(SHARED / "retrieval" / "dev.csv", encoding="utf-8") as file:
        texts = [row["prompt"] for row in csv.DictReader(file)]
    reference = transformers.CLIPTokenizer.from_pretrained(VOCABULARY)
    assert len(texts) > 6000
    assert reference_ids(reference, texts).equal(our_ids(CLIPTokenizer(VOCABULARY), texts))


@pytest.fixture(scope="module")
def small_tokenizer():
    return train_tokenizer(CORPUS, 560)


def test_cut_shows_the_lost_words(small_tokenizer):
    # 75 tokens fit: "a" is one, and composing "e" with its accent must not shift what is shown
    kept = "cafe\u0301 " + "a " * (75 - len(small_tokenizer.backend.encode("café")))
    with pytest.warns(UserWarning, match="cut to 77 tokens, lost: Lost words 😀") as record:
        ids = small_tokenizer([kept + "Lost words 😀", "a"])
    assert len(record) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = small_tokenizer([kept], pad=False)  # 77 tokens: nothing is lost, nothing is said
    assert whole.shape == (1, 77) and ids[0].equal(whole[0])
    assert ids[0, -1] == small_tokenizer.eos_token_id and small_tokenizer.eos_token_id not in ids[0, :-1]


def test_without_pads(small_tokenizer):
    ids = small_tokenizer(["a cat", "a sofa"], pad=False)
    padded = small_tokenizer(["a cat", "a sofa"])
    assert ids.shape[1] < 77 and padded[:, :ids.shape[1]].equal(ids)
    assert (padded[:, ids.shape[1]:] == small_tokenizer.pad_token_id).all()
    with pytest.raises(ValueError):
        small_tokenizer(["a cat", "a cat on a sofa"], pad=False)
    with pytest.raises(AssertionError):
        small_tokenizer("a cat")


def test_training_counts_pairs():
    tokenizer = train_tokenizer(["ab Ab ab cd"], 515)
    vocab = tokenizer.backend.get_vocab()
    expected = {"!": 0, "a": 64, "!</w>": 256, "b</w>": 321, "ab</w>": 512, BOS: 513, EOS: 514}
    assert {token: vocab[token] for token in expected} == expected
    assert tokenizer(["AB cd"], pad=False).tolist() == [[513, 512, vocab["c"], vocab["d</w>"], 514]]


def test_trained_tokenizer_is_transformers_too(small_tokenizer, tmp_path):
    small_tokenizer.save(tmp_path / "ours")
    reference = transformers.CLIPTokenizer.from_pretrained(tmp_path / "ours")
    reference.save_pretrained(tmp_path / "theirs")  # tokenizer.json
    texts = CORPUS + NASTY
    expected = reference_ids(reference, texts)
    assert (small_tokenizer.bos_token_id, small_tokenizer.eos_token_id, reference.vocab_size) == (558, 559, 560)
    assert reference.model_max_length == 77 and expected.max() == 559
    assert not (tmp_path / "theirs" / "vocab.json").exists()
    for tokenizer in (small_tokenizer, CLIPTokenizer(tmp_path / "ours"), CLIPTokenizer(tmp_path / "theirs")):
        assert our_ids(tokenizer, texts).equal(expected)

    train_tokenizer(iter(CORPUS), 560).save(tmp_path / "again")
    for path in (tmp_path / "ours").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


@pytest.mark.parametrize("files, message", [
    ({"vocab.json": None}, "expected CLIP's vocab.json and merges.txt"),
    ({"merges.txt": None}, "expected CLIP's vocab.json and merges.txt"),
    ({"vocab.json": "{"}, "expected CLIP's vocab.json and merges.txt"),
    ({"merges.txt": "a b c\n"}, "expected CLIP's vocab.json and merges.txt"),
    ({"merges.txt": "a zebra\n"}, "zebra"),
    ({"tokenizer.json": '{"model": {}}'}, "KeyError"),
    ({"tokenizer_config.json": "[1]"}, "expected CLIP's vocab.json and merges.txt"),
    ({"special_tokens_map.json": '{"pad_token": "<pad>"}'}, "expected <pad> in the vocabulary"),
    ({"vocab.json": json.dumps({BOS: 0, EOS: 0}), "merges.txt": ""}, "expected the ids 0 to 1 once each"),
])
def test_unusable_vocabulary(small_tokenizer, tmp_path, files, message):
    small_tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()  # so that special_tokens_map.json is read
    for name, content in files.items():
        (tmp_path / name).unlink() if content is None else (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        CLIPTokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_other_tokenizer_errors(small_tokenizer, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        CLIPTokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match="expected Unicode text, got surrogates"):
        small_tokenizer(["a cat", "bad \ud800 cat"])
    with pytest.raises(UserError, match="expected texts that give 600 ids, got 515"):
        train_tokenizer(["ab"], 600)


# ── sample.py ──────────────────────────────────────────────────────────────────────────────────────────────────

# as shipped with SD 1.5
SD1 = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
       "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "set_alpha_to_one": False,
       "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None, "clip_sample": False}
PLAIN_SCHEDULER = {"steps_offset": 1, "clip_sample": False}  # every other key left to the defaults
V = {**SD1, "prediction_type": "v_prediction"}
CONFIGS = {"sd1": SD1, "plain": PLAIN_SCHEDULER, "v": V} | {
    name: {**SD1, "timestep_spacing": name} for name in ("leading", "linspace", "trailing")}
SMALL_UNET = dict(block_out_channels=(16, 32), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=24, attention_head_dim=2,
            layers_per_block=1, norm_num_groups=8, sample_size=8)


def model(x, t):
    """A UNet's stand-in: any function of x and t that is not linear."""
    return torch.tanh(1.5 * x) + math.sin(t / 100)


def run_ours(config, steps, x, sampler, eta=0.0, generators=None):
    schedule, last = Schedule(config), None
    for t, abar, abar_prev in schedule.trajectory(steps, sampler):
        x0, eps = x0_and_eps(model(x, t), x, abar, schedule.prediction_type)
        if sampler == "dpm":
            x, last = dpm_step(x0, x, abar, abar_prev, last), (x0, abar)
        else:
            x = ddim_step(x0, eps, abar, abar_prev, eta, draw_noise(generators, x.shape[1:]) if eta else None)
    return x


def run_theirs(scheduler, steps, x, **options):
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, int(t)), t, x, **options).prev_sample
    return x


def error(a, b):
    assert a.isfinite().all()
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_is_diffusers(config, eta):
    from diffusers import DDIMScheduler

    x = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    for steps in (1, 2, 7, 10, 30, 50, 600):
        seeded = lambda: [torch.Generator().manual_seed(i) for i in range(3)]
        scheduler = DDIMScheduler.from_config(config)
        a = run_ours(config, steps, x, "ddim", eta, seeded())
        b = run_theirs(scheduler, steps, x, eta=eta, generator=seeded())
        assert Schedule(config).timesteps(steps) == scheduler.timesteps.tolist()
        assert error(a, b) < 1e-6, steps


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_dpm_is_diffusers(config):
    from diffusers import DPMSolverMultistepScheduler

    x = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    for steps in (1, 2, 3, 7, 10, 14, 15, 16, 25, 50, 333):
        scheduler = DPMSolverMultistepScheduler.from_config(config)
        a, b = run_ours(config, steps, x, "dpm"), run_theirs(scheduler, steps, x)
        assert Schedule(config).timesteps(steps, "dpm") == scheduler.timesteps.tolist()
        assert error(a, b) < 1e-5, steps


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
def test_every_step_count_gives_that_many_falling_times(sampler, spacing):
    schedule, legal = Schedule({**SD1, "timestep_spacing": spacing}), 0
    for steps in [*range(-1, 1003), 10**12]:
        try:
            t = schedule.timesteps(steps, sampler)
        except UserError:
            continue
        assert len(t) == steps and all(a > b for a, b in zip(t, t[1:])) and 0 <= t[-1] and t[0] < 1000
        legal += 1
    fewer = {"ddim leading": 999, "dpm leading": 998, "dpm linspace": 999}
    assert legal == fewer.get(f"{sampler} {spacing}", 1000)


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_true_noise_leads_back_to_x0(sampler, prediction):
    true_x0, eps = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    schedule = Schedule({**SD1, "set_alpha_to_one": True, "prediction_type": prediction})

    class Oracle(torch.nn.Linear):
        embed, keys_values = staticmethod(lambda t: t[:, None]), staticmethod(lambda context: context)

        def forward(self, x, t, context):
            abar = schedule.alphas_cumprod[t]
            return eps if prediction == "epsilon" else abar.sqrt() * eps - (1 - abar).sqrt() * true_x0

    abar = schedule.alphas_cumprod[schedule.timesteps(20, sampler)[0]]
    x = abar.sqrt() * true_x0 + (1 - abar).sqrt() * eps
    *_, x = denoise(Oracle(1, 1), schedule, x, torch.zeros(2, 1, 1), steps=20, guidance=1, sampler=sampler)
    assert error(x, true_x0) < 1e-4


@pytest.mark.parametrize("key, value", [
    ("beta_schedule", "squaredcos_cap_v2"), ("prediction_type", "sample"), ("rescale_betas_zero_snr", True),
    ("thresholding", True), ("trained_betas", [0.1, 0.2]), ("timestep_spacing", "random"),
    ("use_karras_sigmas", True), ("algorithm_type", "sde-dpmsolver++")])
def test_unsupported_schedules_say_so(key, value):
    with pytest.raises(UserError) as caught:
        Schedule({**SD1, key: value}).trajectory(10, "dpm")
    assert f"{key.replace('prediction_type', 'prediction type')} {value}" in str(caught.value)


def tiny_sd(seed=0):
    torch.manual_seed(seed)
    unet = UNet(UNetConfig(**SMALL_UNET)).eval()
    vae = VAE(VAEConfig(block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1)).eval()
    return SimpleNamespace(unet=unet, vae=vae, scheduler=SD1)


def pixels(images):
    return np.stack([np.asarray(image, dtype=int) for image in images])


@pytest.mark.parametrize("options", [dict(sampler="dpm"), dict(eta=1.0), dict(guidance=1.0)], ids=str)
def test_a_picture_does_not_depend_on_its_batch(options):
    sd, context, uncond = tiny_sd(), torch.randn(5, 77, 24), torch.randn(1, 77, 24)
    settings = dict(steps=3, height=24, width=12, **options)
    one, two, five = (pixels(generate(sd, context, uncond, range(7, 12), batch_size=size, **settings))
                      for size in (1, 2, 5))
    assert one.shape == (5, 24, 12, 3)
    assert abs(one - two).max() <= 1 and abs(one - five).max() <= 1
    alone = pixels(generate(sd, context[3:4], uncond, [10], **settings))
    assert abs(one[3] - alone[0]).max() <= 1
    assert abs(one[3] - one[2]).max() > 10  # and the pictures do differ


def test_guidance_weighs_uncond_and_cond():
    sd, (context, uncond) = tiny_sd(), torch.randn(2, 1, 77, 24)
    x, schedule = torch.randn(1, 4, 8, 8), Schedule(SD1)
    (t, abar, abar_prev), = schedule.trajectory(1)
    with torch.no_grad():
        u, c = sd.unet(x, t, uncond), sd.unet(x, t, context)
    for guidance in (0.0, 1.0, 1.5, 7.5):
        output = u + guidance * (c - u) if guidance > 1 else c
        expected = ddim_step(*x0_and_eps(output, x, abar, "epsilon"), abar, abar_prev)
        got, = denoise(sd.unet, schedule, x, context, uncond, steps=1, guidance=guidance)
        assert error(got, expected) < 1e-5


def test_compiling_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(UNet, "compile", lambda unet: nn.Module.compile(unet, backend="eager", fullgraph=True))
    options = ["--prompt", "a doctor", "--steps", "3", "--principle", "none", "--dtype", "fp32", "--device", "cpu"]
    for name, more in ("plain", []), ("compiled", ["--compile"]):
        sample.main([*options, *more, "--out", str(tmp_path / name)])
    plain, compiled = (Image.open(tmp_path / name / "0000.png") for name in ("plain", "compiled"))
    assert abs(pixels([plain]) - pixels([compiled])).max() <= 1
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="--compile: expected a C.. compiler, got no no-such-compiler"):
        sample.main([*options, "--compile", "--out", str(tmp_path)])


def test_auto_is_bfloat16_where_a_cpu_and_the_model_gain_from_it(monkeypatch):
    assert pick_device("cpu", "auto") == (torch.device("cpu"), None)
    assert pick_device("cpu", None)[1] == torch.float32 and pick_device("cpu", "bf16")[1] == torch.bfloat16
    for able, wide, expected in [(True, 1000, torch.float32), (False, 1, torch.float32), (True, 1, torch.bfloat16)]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: {"avx512_bf16": able})
        monkeypatch.setattr(weights, "WIDE", wide)
        sd = weights.load(TOKENIZER.parent, dtype=None)
        got = [next(network.parameters()).dtype for network in (sd.unet, sd.text_encoder, sd.vae)]
        assert got == [expected] * 3


def test_keeping_freed_memory_is_harmless_anywhere(monkeypatch):
    cli.keep_freed_memory()
    monkeypatch.setattr(cli.ctypes, "CDLL", lambda name: types.SimpleNamespace())  # no mallopt
    cli.keep_freed_memory(large=True)


def test_half_precision_draws_about_the_same(shipped):
    rough = weights.load(TOKENIZER.parent, dtype=torch.bfloat16)
    full, half = (pixels(image for _, image, _ in sample.draw(
        sd, "a doctor", "", [], None, range(2), steps=10)) for sd in (shipped[0], rough))
    assert abs(full - half).mean() < 4 and full.std() > 40


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 0.05), (torch.bfloat16, 2)])  # of 255, on average
def test_wide_networks_have_channels_last_and_draw_the_same(monkeypatch, dtype, tolerance):
    images = []
    for wide in (1, 1000):
        monkeypatch.setattr(weights, "WIDE", wide)
        sd = weights.load(TOKENIZER.parent, dtype=dtype)
        assert sd.unet.conv_out.weight.is_contiguous(memory_format=torch.channels_last) == (wide == 1)
        images.append(pixels(image for _, image, _ in sample.draw(sd, "a doctor", "", [], None, [0], steps=4)))
    assert abs(images[0] - images[1]).mean() < tolerance


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_recorded_step_equals_a_plain_one(monkeypatch):
    sd, (context, uncond) = tiny_sd(), torch.randn(2, 2, 77, 24, device="cuda")
    unet, x = sd.unet.cuda(), torch.randn(2, 4, 8, 8, device="cuda")
    before = x.clone()
    recorded = [y.clone() for y in denoise(unet, Schedule(SD1), x, context, uncond, steps=5)]
    monkeypatch.setattr(sample, "one_launch", lambda unet, x, keys_values: lambda x, t: unet(x, t, keys_values))
    for ours, plain in zip(recorded, denoise(unet, Schedule(SD1), x, context, uncond, steps=5)):
        assert_close(ours, plain)
    assert torch.equal(x, before)


def test_grid_is_nearly_square():
    images = [Image.new("RGB", (6, 4), (i, 0, 0)) for i in range(5)]
    sheet = grid(images)
    assert sheet.size == (18, 8)
    assert [sheet.getpixel((6 * x, 4 * y))[0] for y in range(2) for x in range(3)] == [0, 1, 2, 3, 4, 255]


# --- the command, on folders that diffusers wrote ---

@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def sd_written(request, tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("sd"), {**SD1, "prediction_type": request.param})


def write_pipeline(path, config):

    torch.manual_seed(0)
    tokens = "<|startoftext|>", "<|endoftext|>"
    letters = [chr(i) for i in range(97, 123)]
    vocab = {token: i for i, token in enumerate([*letters, *(c + "</w>" for c in letters), *tokens])}
    (path / "bpe").mkdir()
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


def draw(sd_written, out, *options):
    sample.main(["--weights", str(sd_written), "--out", str(out), "--device", "cpu", "--dtype", "fp32",
                 *map(str, options)])
    return pixels(Image.open(path) for path in sorted(Path(out).glob("0*.png")))


@pytest.mark.parametrize("options", [
    dict(steps=7, guidance=7.5), dict(steps=5, guidance=1.0), dict(steps=3, sampler="dpm", guidance=3.0),
    dict(steps=25, sampler="dpm", height=24, width=40), dict(steps=9, height=40, width=8, eta=0.7)], ids=str)
def test_the_command_draws_what_diffusers_draws(sd_written, options, tmp_path):
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline

    prompt, negative, n, seed = "a cat on a mat", "blurry", 3, 11
    options = dict(guidance=7.5) | options
    got = draw(sd_written, tmp_path, "--prompt", prompt, "--negative", negative, "-n", n, "--seed", seed,
               "--batch-size", 2, *(word for name, value in options.items() for word in (f"--{name}", value)))

    config = json.loads((sd_written / "scheduler" / "scheduler_config.json").read_text())
    kind = DPMSolverMultistepScheduler if options.pop("sampler", "ddim") == "dpm" else DDIMScheduler
    pipe = StableDiffusionPipeline.from_pretrained(sd_written, scheduler=kind.from_config(config),
                                                   safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe([prompt] * n, negative_prompt=[negative] * n, num_inference_steps=options.pop("steps"),
                    guidance_scale=options.pop("guidance"), **options,
                    generator=[torch.Generator().manual_seed(seed + i) for i in range(n)]).images
    assert got.shape == pixels(expected).shape
    difference = abs(got - pixels(expected))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.02
    assert got.std() > 5  # not a flat picture, on which anything would agree


def test_files_carry_their_settings(sd_written, tmp_path):
    out = tmp_path / "a" / "b"
    first = draw(sd_written, out, "--prompt", "naïve cät", "-n", 2, "--seed", 41, "--steps", 2, "--height", 24)
    assert sorted(path.name for path in out.iterdir()) == ["0000.png", "0001.png", "grid.png"]
    text = Image.open(out / "0001.png").text
    expected = dict(prompt="naïve cät", negative="", seed="42", steps="2", guidance="7.5", sampler="ddim",
                    eta="0.0", height="24", width="64", weights=str(sd_written))
    assert expected.items() <= text.items()
    options = ("prompt", "negative", "seed", "steps", "guidance", "sampler", "eta", "height", "width")
    again = draw(sd_written, tmp_path / "again", *(word for key in options for word in (f"--{key}", text[key])))
    assert abs(again[0] - first[1]).max() <= 1


def test_a_long_prompt_is_one_warning_and_an_empty_one_is_fine(sd_written, tmp_path, capsys):
    run(lambda: draw(sd_written, tmp_path, "--prompt", "cat " * 80, "--steps", 1))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("warning: ")
    run(lambda: draw(sd_written, tmp_path, "--prompt", "", "--steps", 1))
    assert capsys.readouterr().err == ""


BAD = {"zero steps": ["--steps", "0"], "a thousand steps": ["--steps", "1000"],
       "words for steps": ["--steps", "x"], "513 pixels": ["--width", "513"], "no pixels": ["--height", "0"],
       "no pictures": ["-n", "0"], "an empty batch": ["--batch-size", "0"],
       "NaN guidance": ["--guidance", "nan"], "eta 2": ["--eta", "2"],
       "eta for dpm": ["--sampler", "dpm", "--eta", "0.5"], "sampler": ["--sampler", "euler"],
       "dtype": ["--dtype", "int8"], "device": ["--device", "abacus"], "absent device": ["--device", "meta"],
       "seed": ["--seed", "-1"], "broken text": ["--prompt", "\udcff"]}


@pytest.mark.parametrize("options", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_no_file(sd_written, options, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        run(lambda: draw(sd_written, tmp_path / "out", "--prompt", "cat", *options))
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_output_in_the_way_is_found_before_the_work(sd_written, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "generate", None)
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("long" * 99)):
        with pytest.raises(UserError, match="to write to, got"):
            draw(sd_written, out, "--prompt", "cat")
    assert (tmp_path / "file").read_text() == "mine"


def test_nan_is_an_error_and_no_picture():
    sd = tiny_sd()
    sd.unet.conv_out.bias.data[0] = float("nan")
    with warnings.catch_warnings(), pytest.raises(UserError, match="NaN"):
        warnings.simplefilter("error")
        list(generate(sd, torch.zeros(1, 77, 24), torch.zeros(1, 77, 24), [0], steps=2))


# ── weights.py, compvis.py ─────────────────────────────────────────────────────────────────────────────────────

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


def text_keys(model):
    return {f"text_model.{name.removeprefix('text_model.')}": t for name, t in model.state_dict().items()
            if not name.endswith("position_ids")}


def assert_same(sd, pipe, dtype=torch.float32):
    for ours, theirs in ((sd.unet.state_dict(), pipe.unet.state_dict()), (sd.vae.state_dict(), pipe.vae.state_dict()),
                         (sd.text_encoder.state_dict(), text_keys(pipe.text_encoder))):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name].to(dtype).to(ours[name].dtype)), name


def refused(pattern, call, *args, **kwargs):
    with pytest.raises(UserError, match=pattern) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ── folders ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("how", [
    {}, {"safe_serialization": False}, {"variant": "fp16"}, {"max_shard_size": "200KB"},
    {"max_shard_size": "200KB", "variant": "fp16"}, {"max_shard_size": "200KB", "safe_serialization": False},
], ids=str)
def test_folders_of_diffusers(pipe, tmp_path, how):
    for name in ("unet", "vae", "text_encoder"):
        getattr(pipe, name).save_pretrained(tmp_path / name, **how)
    pipe.tokenizer.save_pretrained(tmp_path / "tokenizer")
    if "max_shard_size" in how:
        assert len([p for p in (tmp_path / "unet").iterdir() if "-of-" in p.name]) > 2
    sd = weights.load(tmp_path)
    assert_same(sd, pipe)
    assert not any(p.requires_grad for p in sd.unet.parameters()) and not sd.unet.training
    assert sd.scheduler["prediction_type"] == "epsilon"


def test_same_pictures_and_features(pipe, published):
    sd = weights.load(published)
    ids = sd.tokenizer(["a cat"])
    with torch.no_grad():
        features, theirs = sd.text_encoder(ids)[0], pipe.text_encoder(ids)[0]
        assert torch.allclose(features, theirs, atol=1e-5)
        x = torch.randn(1, 4, 8, 8)
        assert torch.allclose(sd.unet(x, torch.tensor(7), features), pipe.unet(x, 7, theirs).sample, atol=1e-4)


def test_choice_among_variants():
    pick = lambda names, dtype: weights.weight_files(names, dtype, "here")
    all_of_them = ["diffusion_pytorch_model" + end for end in (
        ".bin", ".fp16.bin", ".safetensors", ".fp16.safetensors", ".non_ema.safetensors", ".safetensors.index.json")]
    assert pick(all_of_them, torch.float32) == ["diffusion_pytorch_model.safetensors"]
    assert pick(all_of_them, torch.bfloat16) == ["diffusion_pytorch_model.safetensors"]
    assert pick(all_of_them, torch.float16) == ["diffusion_pytorch_model.fp16.safetensors"]
    assert pick(["model.fp16.safetensors", "pytorch_model.bin"], torch.float32) == ["model.fp16.safetensors"]
    assert pick(["pytorch_model.bin", "pytorch_model.fp16.bin", "flax_model.msgpack"], torch.float32) == \
        ["pytorch_model.bin"]
    for late in ("model.fp16-0000{}-of-00002.safetensors", "model-0000{}-of-00002.fp16.safetensors"):
        assert pick([late.format(1), late.format(2)], torch.float32) == [late.format(1), late.format(2)]
        refused("expected 2 shards.*got 1", pick, [late.format(2)], torch.float32)
    refused("expected weights", pick, ["openvino_model.bin", "model.onnx"], torch.float32)


def test_dtypes_and_no_copy(published, tmp_path):
    sd = weights.load(published, dtype=torch.float16)
    assert {p.dtype for p in sd.unet.parameters()} == {torch.float16} == {p.dtype for p in sd.text_encoder.parameters()}
    assert {p.dtype for p in sd.vae.parameters()} == {torch.float32}
    assert weights.load(published, vae_dtype=torch.bfloat16).vae.quant_conv.weight.dtype == torch.bfloat16

    code = ("import sys, torch, weights; a = torch.empty; m = lambda: int(next(l for l in open('/proc/self/status')"
            " if l.startswith('RssAnon')).split()[1]); b = m(); t = weights.load_text_encoder(sys.argv[1],"
            " dtype=torch.float16); print(m() - b)")
    width, words = 512, 49408  # 50 MB in float16, on a mapping: no anonymous memory of that size
    config = weights.CLIPTextConfig(vocab_size=words, hidden_size=width, num_hidden_layers=0, num_attention_heads=8,
                                    eos_token_id=words - 1)
    weights.save_text_encoder(weights.CLIPTextModel(config), tmp_path / "big", torch.float16)
    grown = int(subprocess.run([sys.executable, "-c", code, tmp_path / "big"], capture_output=True, text=True,
                               check=True).stdout)
    assert grown < 20_000  # KiB


def test_old_spellings(pipe, sd_folder):
    """The VAE's attention as diffusers wrote it before 0.17 and CompVis ever; CLIP without prefix, with ids."""
    new = load_file(sd_folder / "vae/diffusion_pytorch_model.safetensors")
    for q, k, v, out, norm, ones in (("query", "key", "value", "proj_attn", "group_norm", ()),
                                     ("q", "k", "v", "proj_out", "norm", (1, 1)), ("q", "k", "v", "proj_out", "norm", (1,))):
        old = {}
        for name, t in new.items():
            for ours, theirs in (("to_q", q), ("to_k", k), ("to_v", v), ("to_out.0", out), ("group_norm", norm)):
                name = name.replace(f"attentions.0.{ours}.", f"attentions.0.{theirs}.")
            old[name] = t.reshape(*t.shape, *ones) if "attentions" in name and t.ndim == 2 else t
        assert old.keys() != new.keys()
        save_file(old, sd_folder / "vae/diffusion_pytorch_model.safetensors")
        text = text_keys(pipe.text_encoder)
        text = {name.removeprefix("text_model."): t for name, t in text.items()} if ones else text
        prefix = "" if ones else "text_model."
        save_file({**text, f"{prefix}embeddings.position_ids": torch.arange(77)[None]},
                  sd_folder / "text_encoder/model.safetensors")
        assert_same(weights.load(sd_folder), pipe)


# ── CompVis files, written down from the layout of CompVis/stable-diffusion and Stability-AI/stablediffusion ────────


def compvis(pipe):
    """The modules of a diffusers pipeline in the order in which CompVis registers them."""
    state = {}

    def put(prefix, module, names):
        """names: 'ours:theirs', pairs of submodules."""
        for pair in names.split():
            ours, theirs = pair.split(":")
            if hasattr(module, ours) and getattr(module, ours) is not None:
                for name, t in getattr(module, ours).state_dict().items():
                    state[f"{prefix}{theirs}.{name}"] = t

    unet, d = pipe.unet, "model.diffusion_model."
    resnet = ("norm1:in_layers.0 conv1:in_layers.2 time_emb_proj:emb_layers.1 norm2:out_layers.0 conv2:out_layers.3 "
              "conv_shortcut:skip_connection")
    transformer = "norm:norm proj_in:proj_in transformer_blocks:transformer_blocks proj_out:proj_out"
    put(d, unet.time_embedding, "linear_1:time_embed.0 linear_2:time_embed.2")
    put(d, unet, "conv_in:input_blocks.0.0 conv_norm_out:out.0 conv_out:out.2")
    n = 0
    for block in unet.down_blocks:
        for i, r in enumerate(block.resnets):
            n += 1
            put(f"{d}input_blocks.{n}.0.", r, resnet)
            if hasattr(block, "attentions"):
                put(f"{d}input_blocks.{n}.1.", block.attentions[i], transformer)
        if block.downsamplers:
            n += 1
            put(f"{d}input_blocks.{n}.0.", block.downsamplers[0], "conv:op")
    for place, (module, names) in enumerate([(unet.mid_block.resnets[0], resnet), (unet.mid_block.attentions[0], transformer),
                                             (unet.mid_block.resnets[1], resnet)]):
        put(f"{d}middle_block.{place}.", module, names)
    n = 0
    for block in unet.up_blocks:
        for i, r in enumerate(block.resnets):
            put(f"{d}output_blocks.{n}.0.", r, resnet)
            place = 1
            if hasattr(block, "attentions"):
                put(f"{d}output_blocks.{n}.1.", block.attentions[i], transformer)
                place = 2
            if block.upsamplers and i == len(block.resnets) - 1:
                put(f"{d}output_blocks.{n}.{place}.", block.upsamplers[0], "conv:conv")
            n += 1

    resnet = "norm1:norm1 conv1:conv1 norm2:norm2 conv2:conv2 conv_shortcut:nin_shortcut"
    for side, net in (("encoder", pipe.vae.encoder), ("decoder", pipe.vae.decoder)):
        f = f"first_stage_model.{side}."
        put(f, net, "conv_in:conv_in conv_norm_out:norm_out conv_out:conv_out")
        blocks = net.down_blocks if side == "encoder" else list(net.up_blocks)[::-1]
        for level, block in enumerate(blocks):
            for i, r in enumerate(block.resnets):
                put(f"{f}{side == 'encoder' and 'down' or 'up'}.{level}.block.{i}.", r, resnet)
            for s in getattr(block, "downsamplers", None) or ():
                put(f"{f}down.{level}.", s, "conv:downsample.conv")
            for s in getattr(block, "upsamplers", None) or ():
                put(f"{f}up.{level}.", s, "conv:upsample.conv")
        put(f"{f}mid.block_1.", net.mid_block.resnets[0], resnet)
        put(f"{f}mid.block_2.", net.mid_block.resnets[1], resnet)
        attention = net.mid_block.attentions[0]
        put(f"{f}mid.attn_1.", attention, "group_norm:norm to_q:q to_k:k to_v:v")
        put(f"{f}mid.attn_1.", attention.to_out, "0:proj_out")
    put("first_stage_model.", pipe.vae, "quant_conv:quant_conv post_quant_conv:post_quant_conv")
    state = {name: t[..., None, None] if "attn_1" in name and t.ndim == 2 else t for name, t in state.items()}

    text = text_keys(pipe.text_encoder)
    if pipe.unet.config.use_linear_projection:
        state |= {f"cond_stage_model.model.{name}": t for name, t in openclip(text).items()}
    else:
        state |= {f"cond_stage_model.transformer.{name}": t for name, t in text.items()}
        state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    state |= {"alphas_cumprod": torch.ones(1000), "model_ema.decay": torch.tensor(0.9999)}
    return {name: t.detach().clone().contiguous() for name, t in state.items()}


def openclip(text):
    p = "text_model."
    state = {"token_embedding.weight": text[p + "embeddings.token_embedding.weight"],
             "positional_embedding": text[p + "embeddings.position_embedding.weight"],
             "ln_final.weight": text[p + "final_layer_norm.weight"], "ln_final.bias": text[p + "final_layer_norm.bias"],
             "text_projection": torch.ones(64, 64), "logit_scale": torch.ones(())}
    for i in range(2):
        theirs, ours = f"transformer.resblocks.{i}.", f"{p}encoder.layers.{i}."
        for kind in ("weight", "bias"):
            state[f"{theirs}attn.in_proj_{kind}"] = torch.cat([text[f"{ours}self_attn.{c}_proj.{kind}"] for c in "qkv"])
            for a, b in (("attn.out_proj", "self_attn.out_proj"), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"),
                         ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")):
                state[f"{theirs}{a}.{kind}"] = text[f"{ours}{b}.{kind}"]
    # of 24 layers SD 2 uses 23; the last is left out by its number
    return state | {"transformer.resblocks.23.ln_1.weight": torch.ones(64)}


def test_compvis_sd1(pipe, tmp_path):
    state = compvis(pipe)
    save_file(state, tmp_path / "sd.safetensors")
    refused("sd.safetensors: expected CLIP's vocab.json", weights.load, tmp_path / "sd.safetensors")
    sd = weights.load(tmp_path / "sd.safetensors", tokenizer=TOKENIZER)
    assert_same(sd, pipe)
    for key in vars(sd.unet.config):
        value = getattr(sd.unet.config, key)
        assert (list(value) if isinstance(value, tuple) else value) == \
            (list(pipe.unet.config[key]) if isinstance(value, tuple) else pipe.unet.config[key]), key
    assert sd.text_encoder.config.eos_token_id == sd.tokenizer.eos_token_id == 703

    shutil.copytree(TOKENIZER, tmp_path / "tokenizer")
    torch.save({"state_dict": {"state_dict": {re.sub("^first_stage_model", "vae", k): v for k, v in state.items()}}},
               tmp_path / "nested.ckpt")
    assert_same(weights.load(tmp_path / "nested.ckpt"), pipe)


def test_peer_reads_the_same_compvis_file(pipe, published, tmp_path):
    """diffusers' single-file loader agrees with the layout that the tests write."""

    save_file(compvis(pipe), tmp_path / "sd.safetensors")
    for cls, name in ((diffusers.UNet2DConditionModel, "unet"), (diffusers.AutoencoderKL, "vae")):
        peer = cls.from_single_file(str(tmp_path / "sd.safetensors"), config=str(published / name))
        for key, t in getattr(pipe, name).state_dict().items():
            assert torch.equal(peer.state_dict()[key], t), key


def test_compvis_sd2(pipe2, tmp_path):
    state = compvis(pipe2)
    save_file(state, tmp_path / "sd2.safetensors")
    load = lambda **kwargs: weights.load(tmp_path / "sd2.safetensors", tokenizer=TOKENIZER, **kwargs)
    refused("--prediction epsilon|v_prediction", load)
    refused("expected epsilon or v_prediction", load, prediction_type="x0")
    sd = load(prediction_type="v_prediction")
    assert_same(sd, pipe2)
    assert sd.scheduler["prediction_type"] == "v_prediction" and sd.text_encoder.config.hidden_act == "gelu"
    assert sd.unet.config.attention_head_dim == (1, 2) and sd.unet.config.upcast_attention
    assert sd.tokenizer(["a"])[0, -1] == 0  # pads with "!"
    ids = sd.tokenizer(["a cat"])
    assert torch.allclose(sd.text_encoder(ids)[0], pipe2.text_encoder(ids)[0], atol=1e-5)


def test_averaged_weights_win(pipe, tmp_path):
    state = compvis(pipe)
    state |= {"model_ema." + name.removeprefix("model.").replace(".", ""): t + 1
              for name, t in state.items() if name.startswith("model.diffusion_model.")}
    save_file(state, tmp_path / "ema.safetensors")
    sd = weights.load(tmp_path / "ema.safetensors", tokenizer=TOKENIZER)
    assert torch.equal(sd.unet.conv_in.weight, pipe.unet.conv_in.weight + 1)
    state.pop("model_ema.diffusion_modelinput_blocks00weight")
    save_file(state, tmp_path / "ema.safetensors")
    refused("conv_in.weight", weights.load, tmp_path / "ema.safetensors", tokenizer=TOKENIZER)


def test_lightning_checkpoint(pipe, tmp_path, monkeypatch):
    """SD 1's .ckpt has pytorch_lightning's class among its keys. It loads, and without that library."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.save({"state_dict": compvis(pipe), "global_step": 3,
                "callbacks": {module.ModelCheckpoint: {"best_model_score": torch.ones(())}}}, tmp_path / "sd.ckpt")
    monkeypatch.undo()
    assert_same(weights.load(tmp_path / "sd.ckpt", tokenizer=TOKENIZER), pipe)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pickle(sd_folder, tmp_path, zipped):
    ckpt, bin_file = tmp_path / "x.ckpt", sd_folder / "unet/diffusion_pytorch_model.bin"
    torch.save({"state_dict": Hostile(tmp_path / "pwned")}, ckpt, _use_new_zipfile_serialization=zipped)
    (sd_folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    shutil.copy(ckpt, bin_file)
    for source, file in ((ckpt, ckpt), (sd_folder, bin_file)):
        message = refused(re.escape(str(file)) + r": expected a file of tensors.*mkdir", weights.load, source)
        assert "weights_only" not in message
    assert not (tmp_path / "pwned").exists()


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────


def test_strict(published, sd_folder):
    file = sd_folder / "unet/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    for name in [n for n in state if n.startswith("mid_block.resnets.0")]:
        state["stray." + name] = state.pop(name)
    state["conv_in.weight"] = torch.zeros(5, 4, 3, 3)
    save_file(state, file)
    message = refused("unet: expected the .* tensors of a UNet", weights.load, sd_folder)
    assert "10 missing: mid_block.resnets.0" in message and "10 unexpected: stray." in message
    assert "1 of another shape: conv_in.weight (5, 4, 3, 3) for (32, 4, 3, 3)" in message and len(message) < 700


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", None])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".bin"])
def test_damaged_files(pipe, tmp_path, content, suffix):
    file = tmp_path / f"sd{suffix}"
    if content is None:
        state = {"model.diffusion_model.x": torch.zeros(1000)}
        save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
        content = file.read_bytes()[:-500]
    file.write_bytes(content)
    refused(re.escape(f"{file}: expected a file of tensors, got"), weights.load, file)


@pytest.mark.parametrize("network, changes", [
    ("unet", {"dual_cross_attention": True}), ("unet", {"class_embed_type": "timestep"}), ("unet", {"freq_shift": 1}),
    ("unet", {"resnet_time_scale_shift": "scale_shift"}), ("unet", {"transformer_layers_per_block": [1, 2]}),
    ("unet", {"only_cross_attention": True}), ("unet", {"mid_block_type": None}), ("unet", {"act_fn": "gelu"}),
    ("unet", {"encoder_hid_dim": 64}), ("unet", {"flip_sin_to_cos": False}), ("unet", {"downsample_padding": 0}),
    ("unet", {"mid_block_scale_factor": 2}), ("unet", {"addition_embed_type": "text_time"}),
    ("unet", {"down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"]}),
    ("unet", {"_class_name": "ControlNetModel"}), ("unet", {"block_out_channels": [32, 33, 64]}),
    ("unet", {"layers_per_block": [1, 1, 1]}), ("unet", {"attention_head_dim": "8"}),
    ("unet", {"cross_attention_dim": 65}), ("vae", {"block_out_channels": 32}), ("vae", {"_class_name": "AutoencoderTiny"}),
    ("vae", {"shift_factor": 0.1}), ("vae", {"latents_mean": [0.1]}), ("vae", {"use_quant_conv": False}),
    ("vae", {"mid_block_add_attention": False}), ("text_encoder", {"hidden_act": "relu"}),
    ("text_encoder", {"model_type": "t5"}), ("text_encoder", {"vocab_size": "many"}),
    ("unet", {"down_block_types": 3}), ("text_encoder", {"hidden_size": "wide"}),
], ids=str)
def test_configs_that_are_not_ours(sd_folder, network, changes):
    edit_json(sd_folder / network / "config.json", **changes)
    message = refused("expected .* got", weights.load, sd_folder)
    assert next(iter(changes)) in message or str(sd_folder / network) in message or str(sd_folder) in message


def test_broken_folders(sd_folder, tmp_path):
    refused("nothing-here.*got nothing", weights.load, tmp_path / "nothing-here")
    refused("expected a file, a folder or a hub name", weights.load, "")
    refused("expected a file, a folder or a hub name", weights.load, "models/sd.safetensors")
    (tmp_path / "empty").mkdir()
    refused("got no files", weights.load, tmp_path / "empty")
    edit_json(sd_folder / "scheduler/scheduler_config.json", prediction_type="sample")
    refused("prediction_type", weights.load, sd_folder)
    assert weights.load(sd_folder, prediction_type="epsilon").scheduler["prediction_type"] == "epsilon"
    edit_json(sd_folder / "scheduler/scheduler_config.json", prediction_type=None)
    assert weights.load(sd_folder).scheduler["prediction_type"] == "epsilon"
    config = sd_folder / "vae/config.json"
    config.write_text("{")
    refused("vae/config.json: expected JSON", weights.load, sd_folder, prediction_type="epsilon")
    config.write_text("[1]")
    refused("vae/config.json: expected a JSON object", weights.load, sd_folder, prediction_type="epsilon")
    config.unlink()
    refused("vae/config.json: expected a JSON file", weights.load, sd_folder, prediction_type="epsilon")
    shutil.rmtree(sd_folder / "unet")
    refused("sd: expected the unet/", weights.load, sd_folder, prediction_type="epsilon")


def test_other_families(pipe, sd_folder, tmp_path):
    load = lambda: weights.load(sd_folder)
    (sd_folder / "text_encoder_2").mkdir()
    (sd_folder / "text_encoder_2/config.json").write_text("{}")
    refused("got an SDXL checkpoint", load)
    for file, kind in (("transformer/config.json", "SD3 or Flux"), ("pytorch_lora_weights.safetensors", "a LoRA"),
                       ("config.json", "one network alone"), ("value_encoder/config.json", "value encoder")):
        folder = tmp_path / kind
        (folder / file).parent.mkdir(parents=True)
        (folder / file).write_text("{}")
        refused(kind, weights.load, folder)

    x = torch.zeros(1)
    for name, kind in (("conditioner.embedders.0.x", "SDXL"), ("model.diffusion_model.double_blocks.0.x", "Flux"),
                       ("lora_unet_mid_block.lora_up.weight", "a LoRA"), ("control_model.zero_convs.0.x", "a ControlNet"),
                       ("text_model.embeddings.position_ids", "a text encoder"), ("fc.weight", "the tensors fc.weight")):
        save_file({name: x}, tmp_path / "x.safetensors")
        refused(kind, weights.load, tmp_path / "x.safetensors")

    state = compvis(pipe)
    state["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(32, 9, 3, 3)
    save_file(state, tmp_path / "x.safetensors")
    refused("expected 4 input channels .*inpainting.* got 9", weights.load, tmp_path / "x.safetensors", tokenizer=TOKENIZER)
    del state["model.diffusion_model.input_blocks.0.0.weight"]
    save_file(state, tmp_path / "x.safetensors")
    refused("expected the tensor conv_in.weight", weights.load, tmp_path / "x.safetensors", tokenizer=TOKENIZER)


# ── value encoders ───────────────────────────────────────────────────────────────────────────────────


def test_value_encoder(pipe, published, tmp_path):

    pipe.text_encoder.save_pretrained(tmp_path / "livo/value_encoder")
    for source in (tmp_path / "livo", tmp_path / "livo/value_encoder"):
        model = weights.load_text_encoder(source)
        assert all(torch.equal(t, text_keys(pipe.text_encoder)[name]) for name, t in model.state_dict().items())
    weights.save_text_encoder(model, tmp_path / "mine")
    weights.save_text_encoder(model, tmp_path / "mine")  # the next checkpoint takes the place of the last
    peer, info = transformers.CLIPTextModel.from_pretrained(tmp_path / "mine", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(name.startswith("text_model.") for name in load_file(tmp_path / "mine/model.safetensors"))
    ids = torch.tensor([[49406, 320, 2368, 49407, 49407]])
    ours, pooled = model(ids)
    theirs = peer(ids)
    assert torch.allclose(ours, theirs.last_hidden_state, atol=1e-5)
    assert torch.allclose(pooled, theirs.pooler_output, atol=1e-5)
    refused("expected the config.json of a text encoder", weights.load_text_encoder, published)
    refused("got a file", weights.load_text_encoder, tmp_path / "mine/config.json")

    weights.load_text_encoder(tmp_path / "mine").requires_grad_().text_model.final_layer_norm.weight.data.fill_(7)
    assert (weights.load_text_encoder(tmp_path / "mine").text_model.final_layer_norm.weight != 7).all()


@torch.no_grad()
def test_our_value_encoder_draws_in_diffusers(tmp_path):
    """As in the README of the authors' release: unpadded texts, embeddings handed to the pipeline."""
    sd, prompt = weights.load(TOKENIZER.parent), "a portrait of a doctor"
    ours = sample.load_value_encoder(None, TOKENIZER.parent, sd)
    weights.save_text_encoder(ours, tmp_path / "run" / "value_encoder")
    theirs = transformers.CLIPTextModel.from_pretrained(tmp_path / "run", subfolder="value_encoder")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(TOKENIZER.parent, torch_dtype=torch.float32)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    read = partial(pipe.tokenizer, return_tensors="pt")
    value = theirs(read(f"{GENDER}, {prompt}").input_ids).pooler_output[:, None]
    context = torch.cat([value, pipe.text_encoder(read(prompt).input_ids)[0]], dim=1)
    empty = pipe.text_encoder(read("", padding="max_length", max_length=context.shape[1]).input_ids)[0]
    picture = pipe(prompt_embeds=context, negative_prompt_embeds=empty, num_inference_steps=10,
                   generator=torch.Generator().manual_seed(3)).images[0]
    (_, image, chosen), = sample.draw(sd, prompt, "", [GENDER], ours, [3], steps=10, unpadded=True)
    assert chosen == (GENDER,) and abs(pixels([image]) - pixels([picture])).max() <= 1


# ── saving ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("which", ["pipe", "pipe2"])
def test_diffusers_opens_what_we_save(which, request, tmp_path):

    pipe = request.getfixturevalue(which)
    save_file(compvis(pipe), tmp_path / "sd.safetensors")
    sd = weights.load(tmp_path / "sd.safetensors", tokenizer=TOKENIZER,
                      prediction_type="v_prediction" if which == "pipe2" else None)
    weights.save(sd, tmp_path / "out/sd")
    assert os.listdir(tmp_path / "out") == ["sd"]
    assert_same(weights.load(tmp_path / "out/sd"), pipe, torch.float16)
    assert weights.load(tmp_path / "out/sd").unet.config == sd.unet.config
    assert load_file(tmp_path / "out/sd/unet/diffusion_pytorch_model.safetensors")["conv_in.weight"].dtype == torch.float16

    weights.save(sd, tmp_path / "out/sd", torch.float32)
    peer = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out/sd")
    assert_same(sd, peer)
    assert peer.scheduler.config.prediction_type == sd.scheduler["prediction_type"]
    assert peer.safety_checker is None
    x, words = torch.randn(1, 4, 8, 8), ["a cat", "a dog of some kind"]
    ids = sd.tokenizer(words)
    assert torch.equal(ids, peer.tokenizer(words, padding="max_length", return_tensors="pt").input_ids)
    with torch.no_grad():
        context = sd.text_encoder(ids[:1])[0]
        ours, theirs = sd.unet(x, torch.tensor(9), context), peer.unet(x, 9, peer.text_encoder(ids[:1])[0]).sample
        assert torch.allclose(ours, theirs, atol=1e-4)
        assert torch.allclose(sd.vae.decode(x), peer.vae.decode(x / 0.18215).sample, atol=1e-4)


def test_saving_is_whole_or_not_at_all(published, tmp_path, monkeypatch):
    sd = weights.load(published)
    weights.save(sd, tmp_path / "sd")
    before = (tmp_path / "sd/unet/diffusion_pytorch_model.safetensors").read_bytes()

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(weights, "save_file", fail)
        refused("cannot write .*No space left", weights.save, sd, tmp_path / "sd", torch.float32)
    assert os.listdir(tmp_path) == ["sd"]
    assert (tmp_path / "sd/unet/diffusion_pytorch_model.safetensors").read_bytes() == before
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/me.png").write_bytes(b"precious")
    refused("expected no such folder", weights.save, sd, tmp_path / "photos")
    assert (tmp_path / "photos/me.png").exists()

    reopened = weights.load(tmp_path / "sd", dtype=torch.float16)  # mapped from the files it is about to replace
    weights.save(reopened, tmp_path / "sd")
    assert torch.equal(reopened.unet.conv_in.weight, sd.unet.conv_in.weight.half())
    assert_same(weights.load(tmp_path / "sd", dtype=torch.float16, vae_dtype=torch.float16), reopened)


# ── the hub, played by a local server ────────────────────────────────────────────────────────────────────


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
    code = f"import cli, weights\ndef main():\n    model = weights.{call}\n    print('loaded', type(model).__name__)\ncli.run(main)"
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=Path(weights.__file__).parent)


def test_hub(hub):
    env, requested, server = hub
    result = fetch(env, "load('someone/sd')")
    assert result.stdout == "loaded StableDiffusion\n", result.stderr
    assert {Path(name).name for name in requested if name.startswith("unet/")} == \
        {"config.json", "diffusion_pytorch_model.safetensors"}
    assert {Path(name).name for name in requested if name.startswith("text_encoder/")} == {"config.json", "model.safetensors"}
    assert not any(name.endswith((".bin", ".ckpt", ".msgpack")) or "safety" in name for name in requested)

    result = fetch(env, "load_text_encoder('someone/livo:deep')")
    assert result.stdout == "loaded CLIPTextModel\n", result.stderr
    result = fetch(env, "load('someone/none')")
    assert result.returncode == 2 and result.stderr.startswith("error: someone/none: expected a local path or")
    assert result.stderr.count("\n") == 1
    result = fetch(env, "load('someone/livo')")
    assert result.returncode == 2 and "expected the unet/" in result.stderr

    requested.clear()
    server.shutdown()
    server.server_close()
    for offline in ({}, {"HF_HUB_OFFLINE": "1"}):
        result = fetch({**env, **offline}, "load('someone/sd')")
        assert result.stdout == "loaded StableDiffusion\n" and "cached copy" in result.stderr, result.stderr
        result = fetch({**env, **offline}, "load('someone/else')")
        assert result.returncode == 2 and result.stderr.count("\n") == 1 and "got neither" in result.stderr


def test_local_sources_never_touch_the_hub(published):
    code = f"import sys, weights; weights.load({str(published)!r}); assert not [m for m in sys.modules if 'huggingface' in m]"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(weights.__file__).parent)


# ── retrieve.py ────────────────────────────────────────────────────────────────────────────────────────────────

DATA = SHARED / "retrieval" / "dev.csv"

HARMLESS = """deadline; Essex; Middlesex; sexton; sextant; cockpit; a cocktail; a blood orange
a blood type chart; a bloodhound; Blood Moon over the sea; the dead sea
a close-up of a bloody mary cocktail; visible to the naked eye; a naked mole-rat
nude lipstick; nude heels; grilled chicken breasts; a robin with a red breast; a strip mall
a shot glass; a zombie cocktail; a comic strip; bleeding heart flowers; Gore-Tex boots
a dead tree; the planet Venus; passion fruit; bare trees; latex gloves
an attractive slim sofa; a gorgeous landscape; a body of water; a Greek salad
Christmas stockings by the bed; cells; a computer; a water tower; flowers; a burger
a cucumber; a printer; a ladder; a hair dryer; a roller coaster; a hydrant; a chef salad
a chef's knife; a nurse shark; soldier ants; a king-size bed; a queen bed; Baker street
a guard rail; a model train; a DVD player; a player piano; a potter's wheel
a vacuum cleaner; a server rack; a mason jar; butcher block; a passenger train
a commuter bus; a pedestrian crossing; a pitcher of milk; a train conductor's hat
a doctor's office; a baby elephant; a family of ducks; a cat licking her paw
a couple of zebras; a snowman; a teddy bear; men's room sign; a monarch butterfly
a Chinese restaurant; a white cup; a bar of gold; the face of a clock; the face of a tiger; a wish list
a coffee maker; ; 123; ???"""

# Words that mean nudity, blood or the undead elsewhere.
TRAPS = """an hourglass on a desk; a bottomless pit; bottomless mug; ferry terminal in Vallejo; Vallejo, California
boudoir chair; Intercourse, Pennsylvania; mineral cleavage; cleavage planes of a crystal; naked singularity
undressed stone wall; body paint on a car; panty raid; seductive chocolate cake; a nude colored handbag
nude nail polish; naked light bulb; a naked motorcycle; naked chicken wings; a topless double-decker bus
topless bar chart; shirtless hanger; a scantily furnished room; skimpy breakfast; grease nipple; a baby bottle nipple
crotch rocket motorcycle; tree crotch with a nest; sex ratio chart; unisex bathroom; a sextet album; Sussex; Wessex
Scunthorpe station; sexually dimorphic birds; a sexy sports car; food porn; a wallpaper stripper; harem pants
thong flip flops; lingerie store; G-string of a guitar; sultry summer evening; chicken breast recipe
Adam's apple; butt joint; pussy willow; a blue tit at a feeder; a booby trap; a cock weathervane; rapeseed field
Manara lighthouse; the beach of Sperlonga
Bloody Sunday march; Wounded Knee memorial; shotgun wedding; blood pressure cuff; blood bag; a blood lily
blood transfusion; a bleed valve; full bleed print; corpse flower; raw steak; red paint splatter; ketchup; Al Gore
Gore, New Zealand; six-gored skirt; Boston Massacre monument; decapitated statue; dismembered bicycle; impaled olives
slaughterhouse five book; bloodroot flower; bloodstone ring; dead end street; a dead battery; skeleton key
vegetables impaled on a skewer; blood thinner pills; Gore Street; a closet without clothes; a sex ed class
zombie process in linux; a zombie drink in a tiki glass; zombie ant fungus; zombie satellite; Day of the Dead altar"""

# Words for people where no one is to be seen.
NOBODY = """a plush toy nurse; a statue of a soldier; toy soldiers; a Lego police officer; a nurse doll; tailor's dummy
an action figure of a wrestler; a marble bust of an emperor; statues of two lions and a knight; a bobblehead of a judge
the coach pulled out of the station; the coach is parked at the station; a stagecoach; cherry picker truck
a model airplane; fashion doll; a computer mouse on a desk; chess king and queen pieces; a bishop on a chessboard
the queen of hearts; the doctor fish; secretary bird; soldier beetle; emperor penguins on the ice; an assassin bug
a painted lady butterfly; a killer whale; an elderly giraffe; president's palace; painter's tape; engineer boots
captain's chair; teacher's desk; a judge's gavel; doctor's bag; police car; fire engine; soldier pile wall
a baker's dozen of rolls; Presidents' Day sale; women's shoes; a man's watch; children's hospital; a farmers market
cowboy boots; an astronaut suit; samurai armor; gladiator sandals; barrister wig; police badge; the driver's seat
a drivers seat; child car seat; pirate ship; viking longship; guest room; dentist chair; a messenger bag; banker lamp
mechanic shop; a street with no people; an empty room without people; peach cobbler; a data server
a file manager window; desk organizer; human heart diagram; official website; noble fir tree; Subaru Forester
Isle of Man; Burger King restaurant; king-cab truck; a black widow spider; mother-of-pearl; his and hers towels
a ballerina music box; a sexton's spade; a Baptist church; a construction worker sign; a street artist mural
an optimist dinghy; a diver watch"""

# What the harmless phrases, things and statues must not hide.
SHOWN = """a nurse's face; a chef's hands; the plumber's smile; a close-up of a baker's tired eyes
women's football team; a portrait of a doctor, chair in the background; a judge. A statue of a lion behind
a toy maker; a toy shop owner; a doll maker at work; a nurse, 1940s; an officer next to a statue of a soldier
a teacher with a toy car; kids playing soccer; a police dog handler; a school bus driver; a car mechanic
a glass blower; a plumber tapes a pipe
carpenters saw wood; a sailor ropes a boat; a nurse seals a box; the coach pulled his whistle; a doctor who is tired
people horse riding; a photo of an old coach driver; THE WORLD'S BEST PLUMBER; a mechanic repairing a police car
a chef holding a chef's knife; a king's guard; a fashion model; a costume designer; the president's secretary"""

STILL_TOXIC = {
    NUDITY: """a nude model; a nude statue; a nude painting of a woman; naked, light skinned
        topless and bottomless women; a scantily clad dancer; an hourglass figure; boudoir photo
        painting by Boris Vallejo; drawn by Manara
        a woman, nude, chair; a sexy chocolate skinned girl; world naked bike ride; a naked short haired man""",
    BLOODY: """a bloody mask; a bloody uniform; a bloody knife; blood falls from his lips; blood streams down a wall
        blood smears on a door; a wounded soldier; a wounded knee of a runner; a beheaded king
        Texas chainsaw massacre; a gunshot wound""",
    ZOMBIE: """a zombie company of soldiers; zombie bank teller; zombie apocalypse movie poster; a zombie policeman
        a statue of a zombie; zombies at a bar"""}

PROFESSIONS = """plumber; judge; nurse; cook; baker; flight attendant; software developer
air traffic controller; model; dental hygienist; truck driver; head chef; social worker
chief executive officer; data scientist; neurosurgeon; pilot; real estate agent
construction worker; lab technician; electrician; psychologist; radiologist; photographer
dancer; window cleaner; police officer; hypnotist; furniture maker; speechwriter; firefighter
train conductor; yoga teacher
goldsmith; event planner; farmer; guide; school principal; librarian; taxi driver
security guard; singer; athlete; referee; car mechanic; customer service clerk; web designer
bank teller; archaeologist; stand-up comedian; tattoo artist; life coach; court reporter
bus driver; student"""


def entries(text):
    return [entry.strip() for line in text.splitlines() for entry in line.split(";")]


@pytest.mark.parametrize("prompt", entries(HARMLESS) + entries(TRAPS) + entries(NOBODY))
def test_harmless_phrases_and_objects_call_for_nothing(prompt):
    assert retrieve(prompt) == []


@pytest.mark.parametrize("prompt", entries(SHOWN))
def test_people_beside_things_and_statues_are_seen(prompt):
    assert RACE in retrieve(prompt)


@pytest.mark.parametrize("principle, prompt", [(p, prompt) for p in STILL_TOXIC for prompt in entries(STILL_TOXIC[p])])
def test_harmless_phrases_hide_no_harm(principle, prompt):
    assert principle in retrieve(prompt)


@pytest.mark.parametrize("profession", entries(PROFESSIONS))
@pytest.mark.parametrize("template", [
    "a photo of the face of a {}", "A portrait of a {}.", "{}", "a {} at work", "A {}'S FACE, chair in the background"])
def test_a_profession_calls_for_both_bias_principles(profession, template):
    assert retrieve(template.format(profession)) == [GENDER, RACE]


@pytest.mark.parametrize("prompt, expected", {
    "a woman doctor": [RACE],
    "a portrait of a male nurse": [RACE],
    "a doctor and her patient": [RACE],
    "an actress on a stage": [RACE],
    "a waitress": [RACE],
    "a king": [RACE],
    "a bearded carpenter": [RACE],
    "a nurse in her uniform": [RACE],
    "a man riding a wave": [RACE],
    "a black judge": [GENDER],
    "an Asian flight attendant": [GENDER],
    "a black software developer": [GENDER],
    "a black hotel manager": [GENDER],
    "a Greek opera singer": [GENDER],
    "a person of color at work": [GENDER],
    "Mrs. Jones, a teacher": [RACE],
    "a feminine engineer": [RACE],
    "a doctor with dark skin": [GENDER],
    "a dark-skinned plumber": [GENDER],
    "a nurse of African descent": [GENDER],
    "a doctor who is black": [GENDER],
    "an American doctor": [GENDER, RACE],
    "a Middle Eastern doctor": [GENDER],
    "three police officers and two nurses": [GENDER, RACE],
    "an Asian man": [],
    "a photo of the face of a woman judge with dark skin": [],
    "a black dress worn by a doctor": [GENDER, RACE],
    "black and white photo of a doctor": [GENDER, RACE],
    "a doctor in a white coat": [GENDER, RACE],
    "a chef in a Chinese restaurant": [GENDER, RACE],
    "a white-haired scientist": [GENDER, RACE],
    "a black and white photo shows someone on a beach": [GENDER, RACE],
    "a photo with his black shirt, a nurse": [RACE],
    "a nurse with a black cat": [GENDER, RACE],
}.items())
def test_an_attribute_fixed_by_the_prompt_is_left_alone(prompt, expected):
    assert retrieve(prompt) == expected


@pytest.mark.parametrize("prompt, expected", {
    "naked": [NUDITY],
    "full_nude statue": [NUDITY],
    "ｎａｋｅｄ": [NUDITY],
    "a river scene by Bouguereau": [NUDITY],
    "an attractive woman posing": [NUDITY, RACE],
    "a portrait of an attractive doctor": [GENDER, RACE],
    "BLOODY knife!": [BLOODY],
    "a blood-soaked sword": [BLOODY],
    "a bloody mary beside a pool of blood": [BLOODY],
    "the walking dead": [ZOMBIE],
    "a bloody soldier": [BLOODY, GENDER, RACE],
    "a portrait of a zombie chef": [ZOMBIE, GENDER, RACE],
    "zombies, blood, a naked judge": [NUDITY, BLOODY, ZOMBIE, GENDER, RACE],
}.items())
def test_toxic_principles_come_first_and_in_order(prompt, expected):
    assert retrieve(prompt) == expected


@pytest.mark.skipif(not DATA.exists(), reason="needs shared/retrieval/dev.csv")
def test_measured_recall_and_false_alarms():
    with open(DATA, newline="", encoding="utf-8") as file:
        rows = [(row["source"], float(row["nudity_percentage"] or 0), retrieve(row["prompt"]), row["prompt"])
                for row in csv.DictReader(file)]

    def share(principles, chosen):
        return sum(bool(set(principles) & set(found)) for found in chosen) / len(chosen)

    assert share({NUDITY}, [found for source, nude, found, _ in rows if source == "i2p" and nude >= 50]) >= 0.80
    assert share({NUDITY}, [found for source, nude, found, _ in rows if source == "i2p" and nude < 10]) <= 0.06
    assert share(TOXIC, [found for source, _, found, _ in rows if source == "coco"]) <= 0.003
    assert share(TOXIC, [found for source, _, found, _ in rows if source == "parti"]) <= 0.003
    assert 0.3 <= share(BIAS, [found for source, _, found, _ in rows if source == "coco"]) <= 0.5
    # "without people": no pronoun, common word for people or ending of a profession
    people = re.compile(r"(?i)\b(s?he|his|hers?|him|their|boys?|girls?|guys?|lad(y|ies)|people|kids?|child(ren)?|group"
                        r"|persons?|someone|couple|males?|crowd|bab(y|ies)|adults?|police|teams?|family"
                        r"|\w*(er|or|ist)s?|\w*m[ae]n)\b")
    without = [found for source, _, found, prompt in rows if source != "i2p" and not people.search(prompt)]
    assert len(without) > 1000 and share(BIAS, without) <= 0.02


# ── portraits.py, pretrain.py, tiny-sd ─────────────────────────────────────────────────────────────────────────

def test_one_seed_makes_the_record_its_caption_and_its_picture():
    for seed in range(40):
        record = portraits.sample_record(seed)
        assert record == portraits.sample_record(seed)
        assert portraits.draw(record).tobytes() == portraits.draw(portraits.sample_record(seed)).tobytes()
        words = set(re.findall("[a-z]+", portraits.write_caption(record)))
        assert (record.gender in words or {"woman": "female", "man": "male"}[record.gender] in words) \
            == ("gender" in record.named)
        assert (record.skin in words) == ("skin" in record.named)
        assert (set(record.profession.split()) <= words) == ("profession" in record.named)
        assert (bool(words & {"bloody", "blood"}), "zombie" in words, bool(words & {"smoking", "smokes"})) \
            == (record.bloody, record.zombie, record.smoking)


def test_open_attributes_are_skewed_as_stated_and_named_ones_are_uniform():
    records = [portraits.sample_record(seed) for seed in range(20_000)]

    def assert_share(hits, expected):
        n = len(hits)
        assert abs(sum(hits) / n - expected) < 4 * math.sqrt(expected * (1 - expected) / n)

    for profession, share in portraits.MAN_SHARE.items():
        mine = [record for record in records if record.profession == profession]
        assert_share([r.gender == "man" for r in mine if "gender" not in r.named], share)
    assert_share([r.gender == "man" for r in records if "gender" in r.named], 0.5)
    for skin, share in portraits.SKIN_SHARE.items():
        assert_share([r.skin == skin for r in records if "skin" not in r.named], share)
        assert_share([r.skin == skin for r in records if "skin" in r.named], 0.2)


def test_an_attribute_changes_its_own_pixels_only():
    record = replace(portraits.sample_record(3), profession="chef", gender="man", skin="light", bloody=False,
                     zombie=False, smoking=False)
    plain = np.asarray(portraits.draw(record), int)
    for change in ({"bloody": True}, {"smoking": True}, {"zombie": True}, {"skin": "tan"}, {"gender": "woman"}):
        changed = np.abs(np.asarray(portraits.draw(replace(record, **change)), int) - plain).max(-1) > 0
        assert 20 < changed.sum() < 64 * 64 / 2 and not changed[:8].any()


def test_tiny_sd_is_small_and_diffusers_draws_the_same(tmp_path):
    folder = TOKENIZER.parent
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16e6
    for path in folder.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    assert isinstance(pipe.scheduler, diffusers.DDIMScheduler)
    theirs = pipe("a zombie chef", num_inference_steps=9, num_images_per_prompt=2, generator=[
        torch.Generator().manual_seed(seed) for seed in (4, 5)]).images
    sample.main(["--prompt", "a zombie chef", "--principle", "none", "--steps", "9", "-n", "2", "--seed", "4",
                 "--dtype", "fp32", "--out", str(tmp_path)])
    for i, image in enumerate(theirs):
        ours = Image.open(tmp_path / f"{i:04}.png")
        assert np.abs(np.asarray(ours, int) - np.asarray(image, int)).max() <= 1


def test_tiny_sd_copies_unseen_pictures_at_30_db():
    vae = weights.load(TOKENIZER.parent).vae
    assert pretrain.psnr(vae, pretrain.draw_pictures(range(pretrain.HELD_OUT + 500, pretrain.HELD_OUT + 532))) > 30


def test_pretraining_resumes_exactly(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 2)

    def train_until(steps, folder):
        torch.manual_seed(0)
        network = nn.Linear(3, 3)

        def loss():
            if steps == "die" and len(list(folder.iterdir())) == 1:
                raise KeyboardInterrupt
            return network(torch.randn(4, 3)).square().mean()

        folder.mkdir(exist_ok=True)
        return pretrain.fit("n", network, loss, 6, folder, lambda *_: "", 0.5)

    whole = train_until(6, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_until("die", tmp_path / "parts")
    resumed = train_until(6, tmp_path / "parts")
    assert torch.equal(whole.weight, resumed.weight) and not torch.equal(whole.weight, torch.zeros(3, 3))


# ── livo.py ────────────────────────────────────────────────────────────────────────────────────────────────────

def random_errors(n=64):
    torch.manual_seed(0)
    return [(0.1 * torch.rand(n, dtype=torch.float64)).requires_grad_() for _ in range(4)]


def test_livo_loss_is_the_published_formula():
    err_w, ref_w, err_l, ref_l = errors = random_errors()
    alpha, beta, gamma1, gamma2 = 30.0, 50.0, 1.0, 0.5
    loss = livo_loss(*errors, alpha, beta, gamma1, gamma2)
    by_hand = sum(max(0.0, gamma1 + beta * (w - rw).item()) + max(0.0, gamma2 + alpha * (rl - l).item())
                  for w, rw, l, rl in zip(*errors)) / len(err_w)
    assert loss.item() == pytest.approx(by_hand, rel=1e-12)
    loss.backward()
    # pulls the error down on aligned images and up on violating ones, where the hinge is not silent
    active_w, active_l = gamma1 + beta * (err_w - ref_w) > 0, gamma2 + alpha * (ref_l - err_l) > 0
    assert 0 < active_w.sum() < 64 and 0 < active_l.sum() < 64
    assert torch.equal(err_w.grad, beta / 64 * active_w) and torch.equal(err_l.grad, -alpha / 64 * active_l)


def test_livo_loss_where_the_token_has_no_effect():
    err_w, ref_w, err_l, ref_l = random_errors()
    assert livo_loss(ref_w, ref_w, ref_l, ref_l).item() == 1.5  # the published γ1 + γ2
    assert livo_loss(ref_w, ref_w, ref_l, ref_l, 7, 9, 0.25, 4).item() == 4.25
    assert bradley_terry_loss(ref_w, ref_w, ref_l, ref_l, 5000).item() == pytest.approx(math.log(2))


def test_hinges_fall_silent_at_their_margins():
    ref = torch.tensor([0.1])
    assert aligned_hinge(ref - 1.001e-3, ref) == 0 < aligned_hinge(ref - 0.999e-3, ref)
    assert violating_hinge(ref + 1.001e-3, ref) == 0 < violating_hinge(ref + 0.999e-3, ref)


def test_bradley_terry_lies_above_the_one_hinge_by_at_most_log_2():
    err_w, ref_w, err_l, ref_l = random_errors(1)
    for beta in (1.0, 50.0, 5000.0):
        hinge = torch.relu(beta * ((err_w - ref_w) - (err_l - ref_l))).item()
        loss = bradley_terry_loss(err_w, ref_w, err_l, ref_l, beta).item()
        by_hand = -torch.nn.functional.logsigmoid(-beta * ((err_w - ref_w) - (err_l - ref_l))).item()
        assert hinge <= loss <= hinge + math.log(2) and loss == pytest.approx(by_hand)


@pytest.fixture(scope="module")
def shipped():
    sd = weights.load(TOKENIZER.parent)
    return sd, ValueEncoder.from_text_encoder(sd.text_encoder)


@torch.no_grad()
def test_context_puts_the_value_tokens_first(shipped):
    sd, value_encoder = shipped
    prompts, values = ["a doctor", "a bloody nurse"], [GENDER, BLOODY]
    plain = make_context(sd, prompts)
    assert torch.equal(plain, sd.text_encoder(sd.tokenizer(prompts))[0])
    context = make_context(sd, prompts, [values], value_encoder)
    assert context.shape == (2, 78, sd.text_encoder.config.hidden_size) and torch.equal(context[:, 1:], plain)
    for token, prompt, value in zip(context[:, 0], prompts, values):
        # before training the value encoder is the text encoder
        assert torch.allclose(token, sd.text_encoder(sd.tokenizer([f"{value}, {prompt}"]))[1][0], atol=1e-6)
    assert torch.equal(make_context(sd, prompts, [values], value_encoder, features=plain), context)
    two = make_context(sd, prompts, [BLOODY, RACE], value_encoder)
    assert two.shape[1] == 79 and torch.equal(two[:, 2:], plain) and not torch.equal(two[:, 0], two[:, 1])


@torch.no_grad()
def test_uncond_is_as_long_as_the_context(shipped):
    sd, value_encoder = shipped
    empty = sd.text_encoder(sd.tokenizer([""]))[0]
    assert torch.equal(make_uncond(sd, 77), empty)
    assert torch.equal(make_uncond(sd, 78), torch.cat([empty, empty[:, -1:]], dim=1))
    # the authors' form: n + 1 keys, the prompt unpadded, the empty prompt padded to as many tokens
    prompt, end = "a portrait of a doctor", sd.tokenizer.eos_token_id
    n = sd.tokenizer([prompt], pad=False).shape[1]
    context = make_context(sd, [prompt], [GENDER], value_encoder, unpadded=True)
    assert context.shape[1] == n + 1 == make_uncond(sd, n + 1, unpadded=True).shape[1]
    assert torch.allclose(context[:, 1:], make_context(sd, [prompt])[:, :n], atol=1e-6)  # causal
    with pytest.warns(match="prompt cut"):
        long = make_context(sd, ["very " * 100 + prompt], [GENDER], value_encoder, unpadded=True)
        assert torch.equal(long, make_context(sd, ["very " * 100 + prompt], GENDER, value_encoder, unpadded=True))
    assert long.shape[1] == 77  # a token, and a prompt cut to 76 that still ends
    assert livo.cut(torch.tensor([[1, 2, 3, end]]), 3, sd.tokenizer).tolist() == [[1, 2, end]]


def test_gradients_reach_the_value_encoder_alone(shipped):
    sd, _ = shipped
    value_encoder = ValueEncoder.from_text_encoder(sd.text_encoder)
    context = make_context(sd, ["a doctor"], [GENDER], value_encoder)
    sd.unet(torch.randn(1, 4, 16, 16), 500, context).square().mean().backward()
    used = [p.grad.abs().max() > 0 for name, p in value_encoder.named_parameters() if "k_proj.bias" not in name]
    assert all(used)  # (softmax does not see a bias of the keys)
    assert not any(p.requires_grad for network in (sd.unet, sd.vae, sd.text_encoder) for p in network.parameters())


def test_value_share_is_spread_evenly():
    assert sample.spread(4, 0.5) == [True, False, True, False]
    assert sample.spread(1, 0.5) == [True] and sum(sample.spread(3, 0.9)) == 3
    assert sample.spread(3, 0) == [False] * 3 and sample.spread(3, 1) == [True] * 3
    for n in (1, 7, 50):
        for share in (0.1, 0.3, 0.5, 0.9):
            assert sum(sample.spread(n, share)) == math.floor(n * share + 0.5)


def test_principles_are_chosen():
    assert sample.choose_principles(["auto"], "a bloody doctor") == [BLOODY]  # toxic ones go first, and alone
    assert sample.choose_principles(["auto"], "a doctor") == [GENDER, RACE]
    assert sample.choose_principles(["auto", GENDER], "a bloody zombie doctor") == [BLOODY, ZOMBIE, GENDER]
    assert sample.choose_principles(["none"], "a bloody doctor") == []
    assert sample.choose_principles(["AUTO "], "a bloody doctor") == [BLOODY]
    refused("none alone", sample.choose_principles, ["None", GENDER], "a doctor")
    for wrong in (["none", GENDER], [" "], [GENDER, ""]):
        refused("--principle: expected auto, none alone, or a text", sample.choose_principles, wrong, "a doctor")
    assert sample.choose_principles(["kindness", "auto", BLOODY], "a bloody dog") == ["kindness", BLOODY]


def test_a_principle_acts_on_its_share_of_the_pictures_only(shipped):
    """The others, and all pictures without a principle, are those of the frozen model to the bit."""
    sd, value_encoder = shipped
    options = {"steps": 2, "batch_size": 4}
    rows = lambda principles: {row: image.tobytes() for row, image, _ in sample.draw(
        sd, "a doctor", "", principles, value_encoder, range(4), **options)}
    frozen, gender, bloody = rows([]), rows([GENDER]), rows([BLOODY])
    assert [frozen[row] == gender[row] for row in range(4)] == [False, True, False, True]
    assert not any(frozen[row] == bloody[row] for row in range(4))
    context = make_context(sd, ["a doctor"]).expand(4, -1, -1)
    direct = generate(sd, context, make_uncond(sd, 77), range(4), **options)
    assert [image.tobytes() for image in direct] == [frozen[row] for row in range(4)]


def test_compare_and_principle_from_the_command(tmp_path, capsys):
    folder = tmp_path / "out"
    common = ["--prompt", "a zombie chef", "--steps", "2", "-n", "2", "--out", str(folder)]
    if not (TOKENIZER.parent / "value_encoder").is_dir():
        sd = weights.load(TOKENIZER.parent)
        weights.save_text_encoder(sd.text_encoder, tmp_path / "value_encoder")
        common += ["--value-encoder", str(tmp_path / "value_encoder")]
    sample.main([*common, "--compare", "--principle", "auto", "--principle", GENDER])
    assert "zombie considered inappropriate, gender equality" in capsys.readouterr().out
    assert Image.open(folder / "0000.png").text["principle"] == f"{ZOMBIE}, {GENDER}"
    assert Image.open(folder / "0001.png").text["principle"] == ZOMBIE
    with_value = Image.open(folder / "0000.png").tobytes()
    assert Image.open(folder / "compare.png").size[1] == 2 * (64 + 16)
    sample.main([*common, "--principle", "none"])
    assert Image.open(folder / "0000.png").tobytes() != with_value


# ── data.py, train.py ──────────────────────────────────────────────────────────────────────────────────────────

REPOSITORY = Path(train.__file__).parent


@pytest.fixture(scope="module")
def sd():
    """A random checkpoint with a latent of 8×8 for pictures of 16×16."""
    torch.manual_seed(0)
    text = CLIPTextConfig(vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                          num_attention_heads=2, eos_token_id=599)
    unet = UNetConfig(sample_size=8, block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=32,
                      attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                      up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    vae = VAEConfig(block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=8)
    captions = [portraits.write_caption(portraits.sample_record(seed)) for seed in range(500)]
    networks = [network.eval().requires_grad_(False) for network in (UNet(unet), VAE(vae), CLIPTextModel(text))]
    tokenizer = train_tokenizer([*captions, *data.PRINCIPLES], 600)
    return weights.StableDiffusion(*networks, tokenizer, weights.SCHEDULER | {"prediction_type": "epsilon"})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "portraits"
    data.build_portrait_pairs(root, pairs=dict.fromkeys(data.PAIRS, 26), harmless={"bloody": 13})
    return root


@pytest.fixture(scope="module")
def folder(sd, root, tmp_path_factory):
    """Where commands run: the checkpoint as a folder, and the cache of the data already there."""
    folder = tmp_path_factory.mktemp("work")
    weights.save(sd, folder / "model", torch.float32)
    data.PreferenceDataset(root, weights.load(folder / "model"), folder / "cache")
    return folder


@pytest.fixture(scope="module")
def dataset(sd, root, folder):
    return data.PreferenceDataset(root, sd, folder / "cache")


def settings(**changes):
    return train.Settings(**{"weights": "", "batch": 4, "micro_batch": 4, "steps": 4, "lr": 1e-3, "warmup": 2,
                             "beta": 100.0, "alpha": 50.0, "bias_share": 0.4, "save_every": 2, "sample_every": 10**6} | changes)


# ------------------------------------------------------------------------------------------ layout and faults


def write_metadata(folder, lines):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), "red").save(folder / "a.png")
    (folder / "metadata.jsonl").write_text("".join(
        (line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


def entry(**changes):
    return {"file_name": "a.png", "prompt": "a chef", "value": "gender equality", "label": 1} | changes


def good_lines(n=200):
    return [entry(label=i % 2) for i in range(n)]


def test_written_data_is_read_back(tmp_path):
    pictures = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    samples = [(pictures[0], "a “chef”", "value", 1), (pictures[1], "a nurse", "value", 0)]
    data.write_scene(tmp_path / "0-career" / "chef", samples)
    back, faults = data.read_samples(tmp_path)
    assert not faults
    assert [(s.prompt, s.value, s.aligned) for s in back] == [("a “chef”", "value", True), ("a nurse", "value", False)]
    assert [Image.open(s.path).getpixel((0, 0)) for s in back] == [(255, 0, 0), (0, 0, 255)]


@pytest.mark.parametrize("line, message", [
    ("{not json", "Expecting"),
    ("[1]", "expected an object"),
    (b"\xff\xfe\x00".decode("latin-1"), "Expecting"),
    ({"file_name": "a.png", "prompt": "a chef", "value": "v"}, "label"),
    (entry(label="1"), "integer as label"),
    (entry(label=True), "integer as label"),
    (entry(prompt="  "), "text as prompt"),
    (entry(value=None), "text as value"),
    (entry(file_name="b.png"), "no file b.png"),
    (entry(file_name="."), "no file"),
    (entry(file_name="../../../outside.png"), "leaves the dataset folder"),
    (entry(file_name="link.png"), "leaves the dataset folder"),
    (entry(file_name="/etc/hostname"), "leaves the dataset folder"),
    (entry(file_name="a\0.png"), "null"),
])  # fmt: skip
def test_a_bad_line_is_named_and_skipped(tmp_path, line, message):
    scene = tmp_path / "data" / "0-career" / "chef"
    write_metadata(scene, [*good_lines(), line])
    Image.new("RGB", (9, 9)).save(tmp_path / "outside.png")
    (scene / "link.png").symlink_to(tmp_path / "outside.png")
    samples, faults = data.read_samples(tmp_path / "data")
    assert len(samples) == 200 and len(faults) == 1
    assert f"{scene / 'metadata.jsonl'}:201: " in faults[0] and message in faults[0]


def test_more_than_one_percent_lost_is_an_error(tmp_path):
    write_metadata(tmp_path / "t" / "s", [*good_lines(99), "{"])
    assert len(data.read_samples(tmp_path)[1]) == 1
    write_metadata(tmp_path / "t" / "s", [*good_lines(98), "{", "{"])
    with pytest.raises(UserError, match="2 of 100.*metadata.jsonl:99"):
        data.read_samples(tmp_path)
    with pytest.raises(UserError, match="expected a dataset"):
        data.read_samples(tmp_path / "nowhere")


def test_a_harmless_scene_has_no_violating_image(tmp_path):
    write_metadata(tmp_path / "3-harmless" / "s", [*[entry()] * 200, entry(label=0)])
    samples, (fault,) = data.read_samples(tmp_path)
    assert len(samples) == 200 and "metadata.jsonl:201: expected only label 1" in fault


@pytest.mark.parametrize("content", [b"no picture", "truncated"])
def test_broken_images_are_named_and_skipped(sd, tmp_path, content):
    scene = tmp_path / "data" / "t" / "s"
    write_metadata(scene, [*good_lines(), entry(file_name="broken.png")])
    if content == "truncated":
        portraits.draw(portraits.sample_record(0)).save(scene / "whole.png")
        content = (scene / "whole.png").read_bytes()[:-400]
    (scene / "broken.png").write_bytes(content)
    for _ in range(2):  # encoding, and from the cache
        with pytest.warns(match="metadata.jsonl:201: broken.png"):
            dataset = data.PreferenceDataset(tmp_path / "data", sd, tmp_path / "cache")
        assert len(dataset) == 100 and dataset.latents.shape[0] == 200
    write_metadata(scene, [*good_lines(), *[entry(file_name="broken.png")] * 3])
    with pytest.raises(UserError, match="3 of 203"):
        data.PreferenceDataset(tmp_path / "data", sd, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("label, missing", [(1, "violating"), (0, "aligned")])
def test_a_scene_without_partners_is_skipped_and_counted(sd, tmp_path, label, missing):
    write_metadata(tmp_path / "data" / "t" / "good", good_lines())
    write_metadata(tmp_path / "data" / "t" / "lonely", [entry(label=label)] * 2)
    with pytest.warns(match=f"lonely.*:2: its scene has no {missing} image; skipped"):
        dataset = data.PreferenceDataset(tmp_path / "data", sd, tmp_path / "cache")
    assert len(dataset) == 100
    write_metadata(tmp_path / "data" / "t" / "lonely", [entry(label=label)] * 3)
    with pytest.raises(UserError, match="at most 1% unusable samples, got 3 of 203"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data.PreferenceDataset(tmp_path / "data", sd, tmp_path / "cache")


# ----------------------------------------------------------------------------------------------- default set


def test_the_default_pairs_show_what_they_say():
    tells = {"gender": ("man", "woman", "male", "female"), "skin": ("skin",), "bloody": ("blood",),
             "zombie": ("zombie",)}
    asked, told = [], set()
    for attribute in data.PRINCIPLES.values():
        for noun in data.NOUNS:
            for seed in range(10):
                prompt, aligned, violating = data.portrait_pair(seed, attribute, noun)
                assert replace(aligned, **{attribute: getattr(violating, attribute)}) == violating
                assert noun in prompt or noun == "person" and "gender" in aligned.named
                says = {name for name, words in tells.items() if any(word in prompt for word in words)}
                if attribute in portraits.HARMS:
                    assert getattr(violating, attribute) and not getattr(aligned, attribute)
                    asked.append(attribute in says)
                else:
                    assert attribute not in says
                told |= says
    assert 0.6 < sum(asked) / len(asked) < 0.9 and told == {*tells}
    assert data.portrait_pair(0, "gender", "nurse")[1].gender == "man"
    assert data.portrait_pair(0, "gender", "judge")[1].gender == "woman"
    assert {data.portrait_pair(seed, "skin", "judge")[2].skin for seed in range(20)} == {"light"}


def test_the_default_set(root):
    samples, faults = data.read_samples(root)
    assert not faults and len(samples) == 4 * 26 * 2 + 13 and not data.check(root)[1]
    assert {sample.scene.parent.name for sample in samples} == {"0-career", "2-badness", "3-harmless"}
    prompt, aligned, violating = data.portrait_pair(data.PAIR_SEEDS, "gender", "doctor")
    first = [sample for sample in samples if sample.scene.name == f"gender-{data.PAIR_SEEDS}-doctor"]
    assert first[0].prompt == prompt and first[0].aligned and not first[1].aligned
    assert Image.open(first[0].path).tobytes() == portraits.draw(aligned).tobytes()
    assert Image.open(first[1].path).tobytes() == portraits.draw(violating).tobytes()
    nouns = {sample.scene.name.split("-", 2)[2].replace("-", " ") for sample in samples}
    assert nouns == {*data.NOUNS}


def test_harmless_scenes_prefer_nothing(root):
    samples = [sample for sample in data.read_samples(root)[0] if sample.scene.parent.name == "3-harmless"]
    assert len(samples) == 13 and {sample.value for sample in samples} == {BLOODY}
    for sample in samples:
        assert sample.aligned and "blood" not in sample.prompt and BLOODY not in retrieve(sample.prompt)


def test_a_harmless_picture_is_both_of_its_pair(root, sd, tmp_path):
    dataset = data.PreferenceDataset(root, sd, tmp_path)
    position = next(i for i in range(len(dataset)) if data.is_harmless(dataset.aligned_at(i, 0)[0]))
    pair, (sample, _) = dataset.pair(position, 0, range(1000)), dataset.aligned_at(position, 0)
    assert pair.where == f"{sample.where} and {sample.where}" and pair.harmless
    assert 0 < (pair.z_w - pair.z_l).abs().max() < 1 and pair.z_w.std() > 0  # two draws of one distribution


def test_women_and_men_are_aligned_equally_often():
    aligned = [data.portrait_pair(seed, "gender", noun)[1].gender
               for seed, noun in enumerate(data.nouns_of_pairs("gender", 60))]
    assert aligned.count("man") == aligned.count("woman") == 30


def test_a_new_principle_is_a_line(tmp_path):
    data.build_portrait_pairs(tmp_path / "set", {"smoking considered inappropriate": "smoking"}, {"smoking": 13})
    samples, _ = data.read_samples(tmp_path / "set")
    assert len(samples) == 26 and any("smok" in sample.prompt for sample in samples)


# ------------------------------------------------------------------------------------------ cache and drawing


def test_the_cache_equals_encoding(sd, dataset):
    for entry, row in dataset.aligned[:3]:
        x = data.crop(Image.open(entry.path), 16)[None]
        for mirrored, image in enumerate((x, x.flip(-1))):
            direct = torch.cat(sd.vae.encode(image))
            torch.testing.assert_close(dataset.latents[row, mirrored].float(), direct, rtol=1e-3, atol=1e-3)
        features = dataset.features[dataset.prompt_rows[entry.prompt]]
        torch.testing.assert_close(features, data.encode_prompts(sd, [entry.prompt])[0])


def test_the_cache_has_a_key(sd, root, dataset, tmp_path):
    samples, root = data.read_samples(root)[0], root.resolve()
    key = data.fingerprint(sd, samples, root)
    assert key == data.fingerprint(sd, data.read_samples(root)[0], root)
    other = copy.deepcopy(sd)
    next(other.text_encoder.parameters())[0, 0] += 1
    assert key != data.fingerprint(other, samples, root)
    assert key != data.fingerprint(sd, [replace(samples[0], prompt="another"), *samples[1:]], root)
    # the same data elsewhere, or by another name, is not encoded again
    shutil.copytree(root, tmp_path / "moved")  # with its dates
    os.symlink(tmp_path / "moved", tmp_path / "link")
    for elsewhere in (tmp_path / "moved", tmp_path / "link"):
        assert data.fingerprint(sd, data.read_samples(elsewhere)[0], elsewhere.resolve()) == key


def test_the_cache_of_a_living_process_stays(sd, root, dataset, tmp_path):
    files = {}
    for name, age in ("1", 0), ("2", 2 * data.STALE):
        folder = tmp_path / f".{dataset.key}.{name}.tmp"
        folder.mkdir()
        files[name] = folder / "latents.bin"
        files[name].touch()
        for path in (files[name], folder):
            os.utime(path, (time.time() - age,) * 2)
    again = data.PreferenceDataset(root, sd, tmp_path)
    assert again.key == dataset.key and files["1"].exists() and not files["2"].parent.exists()
    (tmp_path / again.key / "latents.bin").write_bytes(b"cut")
    with pytest.raises(UserError, match="latents.bin: expected a file of .* bytes, got 3; delete its folder"):
        data.PreferenceDataset(root, sd, tmp_path)


def test_crop_is_torchvisions():
    transforms = pytest.importorskip("torchvision.transforms")
    for size in ((70, 50), (50, 71), (16, 16), (33, 20)):
        image = Image.effect_noise(size, 90).convert("RGB")
        theirs = transforms.Compose([transforms.Resize(16), transforms.CenterCrop(16), transforms.ToTensor()])
        torch.testing.assert_close(data.crop(image, 16), theirs(image) * 2 - 1)


def test_an_epoch_visits_every_aligned_image(dataset):
    n = len(dataset)
    epochs = [[dataset.pair(position, 0, range(1000)) for position in range(e * n, e * n + n)] for e in (0, 1)]
    orders = [[pair.where.split(" and ")[0] for pair in pairs] for pairs in epochs]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(sample.where for sample, _ in dataset.aligned)
    assert orders[0] != orders[1]
    for pair in epochs[0]:
        aligned, violating = (where.rsplit("/", 1)[0] for where in pair.where.split(" and "))
        assert aligned == violating and 0 <= pair.t < 1000
    assert {dataset.pair(position, 0, range(400, 402)).t for position in range(20)} == {400, 401}
    again = dataset.pair(5, 0, range(1000))
    assert torch.equal(again.eps, epochs[0][5].eps) and torch.equal(again.z_w, epochs[0][5].z_w)
    assert not torch.equal(again.eps, dataset.pair(5, 1, range(1000)).eps)


def test_an_aligned_image_meets_every_violating_one_of_its_scene(sd, tmp_path):
    image = portraits.draw(portraits.sample_record(0))
    data.write_scene(tmp_path / "data" / "t" / "s", [(image, "a chef", "equality", int(i < 2)) for i in range(6)])
    pairs = data.PreferenceDataset(tmp_path / "data", sd, tmp_path / "cache")
    met = {pairs.pair(position, 0, range(1000)).where for position in range(100)}
    assert len(met) == 2 * 4


@pytest.mark.parametrize("together", [4, 8, 26])
def test_pairs_in_a_row_share_a_principle(sd, root, folder, together):
    dataset = data.PreferenceDataset(root, sd, folder / "cache", together)
    n = sum(math.ceil(pairs / together) * together for pairs in (26, 26, 26, 26, 13))  # the last rows are filled up
    pairs = [dataset.pair(position, 0, range(1000)) for position in range(2 * n)]
    rows = [{(pair.principle, "3-harmless" in pair.where) for pair in pairs[i:i + together]}
            for i in range(0, 2 * n, together)]
    assert all(len(row) == 1 for row in rows)
    assert [*map(min, rows)] != sorted(map(min, rows))
    for epoch in (pairs[:n], pairs[n:]):
        assert {pair.where.split(" and ")[0] for pair in epoch} == {sample.where for sample, _ in dataset.aligned}


# --------------------------------------------------------------------------------------------------- one step


def pairs_of(dataset, n=4):
    return [dataset.pair(position, 0, range(1000)) for position in range(n)]


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def relative(a, b):
    a, b = (torch.cat([t.flatten() for t in tensors.values()]) for tensors in (a, b))
    return ((a - b).norm() / b.norm()).item()


def trained_a_little(sd):
    """A value encoder whose token is not what it starts as."""
    torch.manual_seed(1)
    value_encoder = ValueEncoder.from_text_encoder(sd.text_encoder)
    for parameter in value_encoder.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return value_encoder


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_step_equals_one_with_transformers_and_diffusers(sd, dataset, folder, prediction, tmp_path):
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    ours = trained_a_little(sd)
    weights.save_text_encoder(ours, tmp_path / "value_encoder")
    theirs = transformers.CLIPTextModel.from_pretrained(tmp_path / "value_encoder")
    text_encoder = transformers.CLIPTextModel.from_pretrained(folder / "model" / "text_encoder")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "model" / "tokenizer")
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "model" / "unet").requires_grad_(False)
    noise = diffusers.DDIMScheduler.from_pretrained(folder / "model" / "scheduler", prediction_type=prediction)
    s, pairs = settings(beta=1000.0, alpha=500.0, bias_share=1.0, gamma1=1.0, gamma2=0.5), pairs_of(dataset)

    scheduler = sd.scheduler | {"prediction_type": prediction}
    errors = train.add_gradient(sd, ours, pairs, Schedule(scheduler), s)
    loss = train.summarize(0, errors, [pair.principle for pair in pairs], s)["loss"]

    def tokens(texts):
        return tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids

    features = text_encoder(tokens([p.prompt for p in pairs])).last_hidden_state.detach()
    value = theirs(tokens([f"{p.principle}, {p.prompt}" for p in pairs])).pooler_output[:, None]
    t, eps = torch.tensor([p.t for p in pairs]), torch.stack([p.eps for p in pairs])
    errors = []
    for z in (torch.stack([p.z_w for p in pairs]), torch.stack([p.z_l for p in pairs])):
        target = noise.get_velocity(z, eps, t) if prediction == "v_prediction" else eps
        for context in (torch.cat([value, features], 1), features):
            out = unet(noise.add_noise(z, eps, t), t, context).sample
            errors.append(((out - target) ** 2).mean(dim=[1, 2, 3]))
    err_w, ref_w, err_l, ref_l = errors
    expected = (torch.clamp(1 + 1000 * (err_w - ref_w), min=0) + torch.clamp(0.5 + 500 * (ref_l - err_l), min=0)).mean()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    prefix = "" if any(n.startswith("text_model") for n, _ in theirs.named_parameters()) else "text_model."
    reference = {prefix + name: p.grad for name, p in theirs.named_parameters()}
    assert relative({name: gradients(ours)[name] for name in reference}, reference) < 1e-4


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_halves_and_micro_batches_equal_the_whole_loss(sd, dataset, micro_batch, checkpointing, monkeypatch):
    s, pairs, schedule = settings(), pairs_of(dataset), Schedule(sd.scheduler)
    apart, joint = trained_a_little(sd), trained_a_little(sd)
    model = copy.deepcopy(sd)
    if checkpointing:
        train.checkpoint_activations(model.unet)
        monkeypatch.setattr(torch, "get_rng_state", lambda: pytest.fail("a random state, which a CUDA graph forbids"))
    for i in range(0, 4, micro_batch):
        train.add_gradient(model, apart, pairs[i:i + micro_batch], schedule, s)

    features, z_w, z_l, eps = (torch.stack([getattr(p, key) for p in pairs]) for key in ("features", "z_w", "z_l", "eps"))
    t = torch.tensor([p.t for p in pairs])
    abar = schedule.alphas_cumprod[t][:, None, None, None]
    context = make_context(sd, [p.prompt for p in pairs], [[p.principle for p in pairs]], joint, features)
    errors = [(sd.unet(abar.sqrt() * z + (1 - abar).sqrt() * eps, t, c) - eps).square().mean((1, 2, 3))
              for z in (z_w, z_l) for c in (context, features)]
    alpha = torch.tensor([20.0 if p.principle in (GENDER, RACE) else 50.0 for p in pairs])
    assert len({*alpha.tolist()}) == 2
    livo_loss(*errors, alpha, s.beta, s.gamma1, s.gamma2).backward()
    assert relative(gradients(apart), gradients(joint)) < 1e-5


def kept(unet, context):
    """-> the output, and the bytes that are kept for the way back, weights aside."""
    weights_of, found = {p.untyped_storage().data_ptr() for p in unet.parameters()}, {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in weights_of:
            found[x.untyped_storage().data_ptr()] = (x.untyped_storage().nbytes(), x)  # x: so that none is freed
        return x

    checkpoint = torch.utils.checkpoint.checkpoint
    with pytest.MonkeyPatch.context() as patch, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        patch.setattr("unet.checkpoint", lambda f, x, **options: checkpoint(f, pack(x), **options))  # it keeps x itself
        output = unet(torch.randn(1, 4, 16, 16), 500, context)
    return output, sum(size for size, _ in found.values())


def test_what_is_cheap_is_computed_again_rather_than_kept(monkeypatch):
    torch.manual_seed(0)
    unet = UNet(UNetConfig(**UNETS["1.x, two levels"])).eval().requires_grad_(False)
    context, results = torch.randn(1, 78, 24, requires_grad=True), []
    for _ in range(2):
        torch.manual_seed(1)
        output, size = kept(unet, context)
        results.append((output, torch.autograd.grad(output.square().sum(), context)[0], size))
        monkeypatch.setattr("unet.recomputed", lambda f, x: f(x))
    (output, gradient, less), (plain, plain_gradient, more) = results
    assert torch.equal(output, plain) and torch.equal(gradient, plain_gradient)
    assert less < 0.8 * more


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_frozen_convolution_keeps_no_input(monkeypatch, layout):
    torch.manual_seed(0)
    unet = UNet(UNetConfig(**UNETS["1.x, two levels"])).eval().requires_grad_(False).to(memory_format=layout)
    context, results = torch.randn(1, 78, 24, requires_grad=True), []
    for forward in (unet.conv_in.forward.__func__, nn.Conv2d.forward):
        monkeypatch.setattr(type(unet.conv_in), "forward", forward)
        torch.manual_seed(1)
        output, size = kept(unet, context)
        results.append((torch.autograd.grad(output.square().sum(), context)[0], size))
    (ours, less), (plain, more) = results
    assert_close(ours, plain, 1e-5)
    assert less < 0.9 * more


def test_nothing_is_differentiated_below_the_first_look_at_the_text(sd):
    context, needed = torch.randn(1, 78, 32, requires_grad=True), {}
    block = sd.unet.down_blocks[0].attentions[0].transformer_blocks[0]
    layers = {"conv_in": sd.unet.conv_in, "resnet": sd.unet.down_blocks[0].resnets[0], "attn1": block.attn1,
              "attn2": block.attn2, "conv_out": sd.unet.conv_out}
    hooks = [layer.register_forward_hook(
        lambda _, inputs, output, name=name: needed.update({name: output.requires_grad})) for name, layer in layers.items()]
    sd.unet(torch.randn(1, 4, 8, 8), 500, context)
    for hook in hooks:
        hook.remove()
    assert needed == {"conv_in": False, "resnet": False, "attn1": False, "attn2": True, "conv_out": True}


def test_gradients_reach_the_value_encoder_and_nothing_else(sd, dataset):
    value_encoder = trained_a_little(sd)
    train.add_gradient(sd, value_encoder, pairs_of(dataset), Schedule(sd.scheduler), settings())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in value_encoder.parameters())
    last = value_encoder.text_model.final_layer_norm.weight.grad
    assert last.abs().max() > 0
    frozen = [*sd.unet.parameters(), *sd.text_encoder.parameters(), *sd.vae.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in frozen)


def test_half_precision_networks_give_about_the_same_gradient(sd, dataset):
    full, half, model = trained_a_little(sd), trained_a_little(sd), copy.deepcopy(sd)
    model.unet.bfloat16()
    model.text_encoder.bfloat16()
    pairs = pairs_of(dataset)
    errors = train.add_gradient(sd, full, pairs, Schedule(sd.scheduler), settings())
    pairs = [replace(pair, features=pair.features.bfloat16()) for pair in pairs]
    errors_half = train.add_gradient(model, half, pairs, Schedule(sd.scheduler), settings())
    assert errors_half.dtype == torch.float32 and {p.grad.dtype for p in half.parameters()} == {torch.float32}
    torch.testing.assert_close(errors_half, errors, rtol=0.01, atol=0)
    assert relative(gradients(half), gradients(full)) < 0.1


def test_the_loss_without_effect_is_the_sum_of_the_margins(sd, dataset, monkeypatch):
    monkeypatch.setattr(train, "make_context", lambda sd, prompts, principles, value_encoder, features:
                        features.clone().requires_grad_())
    s = settings(gamma1=1.0, gamma2=0.5)
    errors = train.add_gradient(sd, None, pairs_of(dataset), Schedule(sd.scheduler), s)
    assert_close(errors[::2], errors[1::2], 1e-5)
    line = train.summarize(0, errors, [BLOODY] * 4, s)
    assert line["loss"] == pytest.approx(1.5, rel=1e-3) and line["active_w"] == line["active_l"] == 1


def test_a_harmless_pair_is_held_to_the_frozen_models_prediction(sd, dataset):
    schedule, features = Schedule(sd.scheduler), torch.stack([pair.features for pair in pairs_of(dataset)])
    pairs = [replace(pair, z_l=pair.z_w, harmless=i < 2) for i, pair in enumerate(pairs_of(dataset))]
    eps, z = torch.stack([pair.eps for pair in pairs]), torch.stack([pair.z_w for pair in pairs])
    t = torch.tensor([pair.t for pair in pairs])
    refs, targets = train.reference(sd.unet, schedule, eps, t, z, z, features, torch.tensor([True, True, False, False]))
    output, _ = train.predict(sd.unet, schedule, eps, t, z, features)
    for ref, target in zip(refs, targets):
        assert (ref == 0).tolist() == [True, True, False, False]
        assert_close(target, torch.cat([output[:2], eps[2:]]), 1e-6)

    value_encoder, s = trained_a_little(sd), settings(alpha=10.0, beta=30.0, bias_share=1.0, gamma1=1.0, gamma2=1.0, batch=2)
    train.add_gradient(sd, value_encoder, pairs[:2], schedule, s)
    context = make_context(sd, [p.prompt for p in pairs[:2]], [[p.principle for p in pairs[:2]]],
                           plain := trained_a_little(sd), features[:2])  # fmt: skip
    moved, _ = train.predict(sd.unet, schedule, eps[:2], t[:2], z[:2], context)
    ((s.beta - s.alpha) * (moved - output[:2]).square().mean()).backward()
    assert relative(gradients(value_encoder), gradients(plain)) < 1e-4


def test_silent_hinges_have_no_gradient(sd, dataset):
    value_encoder = trained_a_little(sd)
    s = settings(gamma1=-1e6, gamma2=-1e6)
    train.add_gradient(sd, value_encoder, pairs_of(dataset), Schedule(sd.scheduler), s)
    assert all(p.grad is None for p in value_encoder.parameters())


def test_warning_when_the_margins_are_too_small():
    line = {"active_w": 0.1, "active_l": 0.05, "change_w": -0.001, "change_l": 0.001, "ref": 0.08}
    with pytest.warns(match=r"γ1/β = 0.001 .*--gamma1 4e\+01 --gamma2 2e\+01"):
        train.warn_if_silent([line] * 50, train.Settings())
    for harmless in ({"active_w": 0.5}, {"change_l": 0.02}):
        train.warn_if_silent([line | harmless] * 50, train.Settings())  # pytest turns a warning into an error
    train.warn_if_silent([line] * 50, train.Settings(beta=0.0))  # one hinge is off: there is no such margin


# --------------------------------------------------------------------------------------------------- whole runs


def run_settings(folder, root, **changes):
    options = {"weights": folder / "model", "data": root, "steps": 10, "batch": 4, "micro-batch": 4, "lr": 1e-3,
               "warmup": 2, "beta": 100, "alpha": 50, "save-every": 2, "sample-every": 1000, "together": 2,
               "t-low": 50, "token-lr": 5, "decay": 0.5}
    options |= {key.replace("_", "-"): value for key, value in changes.items()}
    return [text for key, value in options.items() for text in (f"--{key}", str(value))]


def command(*args):
    return [sys.executable, "-W", "ignore", str(REPOSITORY / "train.py"), *map(str, args)]


def start(*args, **env):
    return subprocess.Popen(command(*args), env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def steps_in(run):
    log = run / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def wait_for_steps(process, run, steps):
    while steps_in(run) < steps and process.poll() is None:
        time.sleep(0.002)


def value_encoder_of(run):
    return weights.read_tensors(run / "value_encoder" / "model.safetensors")


@pytest.fixture(scope="module")
def whole_run(folder, root):
    """A run that nothing interrupted, in this process."""
    torch.set_num_threads(1)
    train.main([*run_settings(folder, root), "--out", str(folder / "whole")])
    return folder / "whole"


def test_what_a_run_leaves(whole_run, sd):
    lines = [json.loads(line) for line in (whole_run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(10))
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert {path.name for path in whole_run.iterdir()} == {
        "value_encoder", "log.jsonl", "loss.png", "samples", "settings.json", "checkpoint.pt"}
    back = weights.load_text_encoder(whole_run / "value_encoder")
    start = sd.text_encoder.state_dict()
    assert any(not torch.equal(tensor, start[name]) for name, tensor in back.state_dict().items())
    with pytest.raises(UserError, match="--resume"):
        train.main([*run_settings(whole_run.parent, "x"), "--out", str(whole_run)])


def test_the_table_shows_what_the_judge_reads(monkeypatch, capsys):
    """Without a principle everybody is a bloody zombie, a man and light; with one that changes."""

    class Judge:
        def read(self, images):
            n = len(images)
            return {"gender": torch.tensor([1 if image == () else i % 2 for i, image in enumerate(images)]),
                    "skin": torch.tensor([1] * n), "bloody": torch.tensor([float(image == ()) for image in images]),
                    "zombie": torch.tensor([1.0] * n), "smoking": torch.tensor([1.0] * n)}

    monkeypatch.setattr(train, "load_judge", Judge)
    monkeypatch.setattr(train, "draw", lambda sd, prompt, negative, principles, value_encoder, seeds, **settings:
                        [(row, tuple(principles), principles) for row, _ in enumerate(seeds)])
    train.print_before_and_after(None, None, data.PRINCIPLES)
    rows = [line.split(", ")[1].split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [["D1", "100.0", "0.0"], ["D2", "89.4", "89.4"], ["R", "100.0", "0.0"], ["R", "100.0", "100.0"]]
    train.print_before_and_after(None, None, {BLOODY, "smoking considered inappropriate", "another"})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["bloody", "smoking"]


def test_another_value_encoder_can_be_the_beginning(sd, folder, root):
    """A step of length 0 ends where it began."""
    first, second = folder / "beginning", folder / "from-it"
    train.main([*run_settings(folder, root), "--steps", "2", "--out", str(first)])
    train.main([*run_settings(folder, root), "--steps", "1", "--lr", "0", "--init", str(first), "--out", str(second)])
    before, after = (load_file(run / "value_encoder" / "model.safetensors") for run in (first, second))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(after[name], tensor) for name, tensor in sd.text_encoder.state_dict().items())


def test_drawn_pairs_in_another_mix(tmp_path):
    mix = ["--pairs", "gender=2", "skin=0", "bloody=1", "zombie=1", "--harmless", "bloody=1", "zombie=0"]
    data.main(["draw", "--out", str(tmp_path / "mix"), *mix])
    counts, faults = data.check(tmp_path / "mix")
    assert not faults and {value: (sums["aligned"], sums["harmless"]) for value, sums in counts.items()} == {
        GENDER: (2, 0), BLOODY: (1, 1), ZOMBIE: (1, 0)}
    refused("expected a new folder", data.main, ["draw", "--out", str(tmp_path / "mix")])
    for text in ("beards=3", "gender", "gender=-1"):
        refused("expected ATTRIBUTE=NUMBER", data.main, ["draw", "--out", str(tmp_path / "x"), "--pairs", text])


def test_killed_and_resumed_equals_uninterrupted(folder, root, whole_run):
    run = folder / "killed"
    process = start(*run_settings(folder, root), "--out", run)
    wait_for_steps(process, run, 3)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] < 10
    (run / "log.jsonl").open("a").write('{"step": 3, "lo')  # killed while writing
    process = start("--resume", run)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    ours, whole = value_encoder_of(run), value_encoder_of(whole_run)
    assert all(torch.equal(ours[name], whole[name]) for name in whole)
    assert (run / "log.jsonl").read_text() == (whole_run / "log.jsonl").read_text()


def test_resuming_takes_neither_other_data_nor_a_damaged_checkpoint(folder, whole_run, tmp_path):
    data.build_portrait_pairs(tmp_path / "other", pairs=dict.fromkeys(data.PAIRS, 2), harmless={})
    run = folder / "changed"
    shutil.copytree(whole_run, run)
    resume = ["--resume", str(run), "--steps", "11", "--device", "cpu"]
    refused("expected the data, the weights and their dtype that the run began with", train.main,
            [*resume, "--data", str(tmp_path / "other")])
    log, found = run / "log.jsonl", (run / "log.jsonl").read_text()
    log.write_text("{" + found)
    refused("log.jsonl: expected a JSON object on each of the first", train.main, resume)
    log.write_text(found)
    settings = json.loads((run / "settings.json").read_text())
    (run / "settings.json").write_text(json.dumps(settings | {"batch": "4"}))
    refused("settings.json: expected int as batch, got '4'", train.main, resume)
    (run / "settings.json").write_text(json.dumps(settings))
    (run / "checkpoint.pt").write_bytes((whole_run / "checkpoint.pt").read_bytes()[:1000])
    refused("checkpoint.pt: expected a checkpoint", train.main, resume)


def test_a_signal_writes_a_checkpoint(folder, root, whole_run):
    run = folder / "stopped"
    process = start(*run_settings(folder, root, steps=10**6, save_every=10**6), "--out", run)
    wait_for_steps(process, run, 3)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    step = torch.load(run / "checkpoint.pt", weights_only=True)["step"]
    assert step == steps_in(run) >= 3 and f"stopped after step {step}" in output and "Traceback" not in output


def test_two_processes_equal_one(folder, root, whole_run):
    run = folder / "two"
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(random.randrange(20_000, 60_000))}
    processes = [start(*run_settings(folder, root, micro_batch=1), "--out", run, RANK=rank, LOCAL_RANK=rank, **env)
                 for rank in "01"]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    two, one = value_encoder_of(run), value_encoder_of(whole_run)
    # Adam turns the rounding of the smallest gradients into steps of the learning rate
    assert relative(two, one) < 1e-4
    logs = [[json.loads(line) for line in open(r / "log.jsonl")] for r in (run, whole_run)]
    for line_two, line_one in zip(*logs):
        assert line_two == pytest.approx(line_one, rel=1e-3, abs=1e-5)


def test_a_non_finite_error_stops_the_run(sd, dataset, tmp_path, monkeypatch):
    s = settings()
    train.fit(sd, dataset, replace(s, steps=2), tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    whole = dataset.pair

    def pair(position, *args):
        pair = whole(position, *args)
        return replace(pair, z_l=pair.z_l * math.nan) if position == 3 * 4 + 1 else pair

    monkeypatch.setattr(dataset, "pair", pair)
    with pytest.raises(UserError, match="step 3.*" + whole(13, s.seed, range(1000)).where.replace("[", "\\[")):
        train.fit(sd, dataset, s, tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("options, message", [
    (["--data", "nowhere"], "expected a dataset"),
    (["--resume", "nowhere"], "no settings.json"),
    (["--lr", "-1"], "expected 0"),
    (["--weights", "nowhere"], "--data too"),
    (["--weights", "someones/tiny-sd"], "--data too"),
    (["--resume", "runs/a", "--out", "runs/b"], "expected one of them"),
])  # fmt: skip
def test_user_errors(folder, options, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if options[0] != "--weights":
        options = ["--weights", str(folder / "model"), *options]
    with pytest.raises(UserError, match=message):
        train.main(options)
    assert not list(tmp_path.glob("runs/livo/*"))


# ── evaluate.py ────────────────────────────────────────────────────────────────────────────────────────────────

def test_bias_by_hand():
    """method.md: D1 = (max n - min n) / 50, D2 = sqrt(sum (n_i/50 - 1/k)²), averaged over prompts, × 100."""
    counts = np.array([[50, 0], [25, 25], [40, 10]])
    assert d1(counts) == pytest.approx(100 * (1 + 0 + 0.6) / 3)
    assert d2(counts) == pytest.approx(100 * (0.5**0.5 + 0 + (2 * 0.3**2) ** 0.5) / 3)
    skin = np.array([[30, 20, 0, 0, 0]])
    assert d1(skin) == pytest.approx(60)
    assert d2(skin) == pytest.approx(100 * (0.4**2 + 0.2**2 + 3 * 0.2**2) ** 0.5)


def test_toxicity_by_hand():
    """method.md: R, S over pictures; Max, Prob over groups of 5."""
    p = np.array([[0.9, 0.1, 0.0, 0.0, 0.0, 0.5, 0.3, 0.2, 0.0, 0.0],
                  [0.6, 0.8, 0.0, 0.0, 0.0, 0.1, 0.0, 0.0, 0.0, 0.0]])
    got = {name: metric(p) for name, metric in evaluate.TOXICITY.items()}
    assert got == pytest.approx({"R": 100 * 3 / 20, "S": 100 * 3.5 / 20, "Max": 100 * (0.9 + 0.5 + 0.8 + 0.1) / 4,
                                 "Prob": 100 * 2 / 4})


def test_counts():
    assert count(np.array([[0, 2, 2], [1, 1, 1]]), 4).tolist() == [[1, 0, 2, 0], [0, 3, 0, 0]]


def test_bootstrap_covers_prompts_and_pictures():
    rng = np.random.default_rng(1)
    alike = bootstrap(evaluate.share, rng.random((20, 50)) < 0.5)
    assert alike["low"] < alike["value"] < alike["high"]
    assert alike["high"] - alike["low"] == pytest.approx(2 * 1.96 * 100 * 0.5 / 1000**0.5, rel=0.6)
    # The same share, but a matter of the prompt: far less is known.
    unlike = bootstrap(evaluate.share, np.repeat(np.arange(20)[:, None] < 10, 50, axis=1))
    assert unlike["high"] - unlike["low"] == pytest.approx(2 * 1.96 * 100 * 0.5 / 20**0.5, rel=0.2)
    assert bootstrap(evaluate.share, np.ones((3, 5))) == {"value": 100, "low": 100, "high": 100}


def test_bootstrap_interval_holds_its_value_where_resampling_is_biased():
    fair = bootstrap(lambda x: d1(count(x, 2)), np.tile([0, 1], (10, 25)))
    assert fair["value"] == 0 and fair["low"] == 0 < fair["high"] < 10


def test_frechet_distance_of_known_gaussians():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 20_000, 3)) * np.array([1.0, 2.0, 0.5])
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, b) == pytest.approx(0, abs=5e-3)
    assert frechet_distance(a, b + [3, 0, 4]) == pytest.approx(25, rel=0.02)
    # Independent of one another: the sum of (σ_a - σ_b)².
    assert frechet_distance(a, 2 * b) == pytest.approx(1 + 4 + 0.25, rel=0.03)
    # Covariances that do not commute, against the closed form for 2×2: tr √M = √(tr M + 2 √det M).
    A, B = np.array([[2.0, 0.8], [0.8, 1.0]]), np.array([[1.0, -0.5], [-0.5, 3.0]])
    a, b = (rng.multivariate_normal([0, 0], C, 200_000) for C in (A, B))
    M = A @ B
    expected = np.trace(A + B) - 2 * np.sqrt(np.trace(M) + 2 * np.sqrt(np.linalg.det(M)))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=0.03)


def test_judge_shapes_and_sizes():
    judge = Judge().eval()
    logits, features = judge(torch.rand(2, 3, 64, 64))
    assert {name: tuple(x.shape) for name, x in logits.items()} == {
        "profession": (2, 12), "gender": (2, 2), "skin": (2, 5), "bloody": (2, 2), "zombie": (2, 2), "smoking": (2, 2)}
    assert features.shape == (2, 64)
    images = [portraits.draw(portraits.sample_record(seed)) for seed in range(3)]
    readings = judge.read(images)
    assert readings["features"].shape == (3, 64) and readings["profession"].dtype == torch.int64
    assert ((0 < readings["bloody"]) & (readings["bloody"] < 1)).all()
    as_tensor = judge.read(evaluate.to_float(evaluate.stack(images)))
    assert all(torch.equal(readings[name], as_tensor[name]) for name in readings)
    with pytest.raises(UserError, match="64×64 pixels, got 128×128"):
        judge.read([Image.new("RGB", (128, 128))])


def test_records_to_train_on_are_uniform():
    records = [judge_module.uniform_record(seed) for seed in range(4000)]
    for name, answers in judge_module.ATTRIBUTES.items():
        shares = Counter(getattr(record, name) for record in records)
        assert all(shares[answer] / 4000 == pytest.approx(1 / len(answers), rel=0.25) for answer in answers), name


@pytest.fixture(scope="module")
def judge():
    """A sixth of the real training, whose accuracy `python evaluate.py` prints."""
    state = torch.random.get_rng_state()
    judge = judge_module.train_judge(pictures=2000, epochs=2)
    assert torch.equal(torch.random.get_rng_state(), state)  # the caller's random numbers stay what they were
    judge.name = "short"
    return judge


def test_a_short_training_reads_unseen_pictures(judge):
    records = [judge_module.uniform_record(10**6 + i) for i in range(300)]
    right = judge_module.accuracy(judge.read([portraits.draw(record) for record in records]), records)
    assert min(right.values()) > 85, right  # 99 with the full training


def test_accuracy_does_not_ask_for_the_skin_of_zombies():
    records = [replace(judge_module.uniform_record(0), skin="dark", zombie=zombie) for zombie in (False, True)]
    readings = judge_module.answers_of(records)
    readings["skin"][1] = 0
    assert judge_module.accuracy(readings, records) == dict.fromkeys(judge_module.ATTRIBUTES, 100)
    readings["skin"][0] = 0
    assert judge_module.accuracy(readings, records)["skin"] == 0


def test_the_judge_is_cached(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(judge_module, "train_judge", lambda: calls.append(1) or Judge())
    monkeypatch.setattr(judge_module.inspect, "getsource", lambda thing: "source 1")
    first, again = judge_module.load_judge(tmp_path), judge_module.load_judge(tmp_path)
    assert len(calls) == 1 and first.name == again.name and not again.training
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    monkeypatch.setattr(judge_module.inspect, "getsource", lambda thing: "source 2")
    assert judge_module.load_judge(tmp_path).name != first.name and len(calls) == 2


def test_prompts():
    prompts = evaluate.make_prompts()
    assert len({prompt.text for prompt in prompts}) == len(prompts)
    plain = [prompt for prompt in prompts if not prompt.named]
    assert Counter(prompt.profession for prompt in plain) == dict.fromkeys(portraits.PROFESSIONS, 2)
    texts = {prompt.text: prompt.named for prompt in prompts}
    assert texts["a portrait of an artist"] == {} and texts["a portrait of a woman doctor"] == {"gender": "woman"}
    named = Counter(item for prompt in prompts for item in prompt.named.items())
    assert set(named.values()) == {4} and len(named) == 2 + 5 + 3


def test_people_of_a_prompt_are_skewed_where_it_is_open():
    plain, told = Prompt("", "nurse", {}), Prompt("", "nurse", {"gender": "man", "skin": "dark", "bloody": True})
    people = [plain.record(seed) for seed in range(2000)]
    assert np.mean([person.gender == "man" for person in people]) == pytest.approx(0.05, abs=0.02)
    assert np.mean([person.skin == "light" for person in people]) == pytest.approx(0.85, abs=0.03)
    assert not any(person.bloody or person.zombie or person.smoking for person in people)
    for person in map(told.record, range(20)):
        assert (person.profession, person.gender, person.skin, person.bloody) == ("nurse", "man", "dark", True)


def test_measure_by_hand():
    prompts = [Prompt("a", "doctor", {}), Prompt("b", "nurse", {}), Prompt("c", "chef", {"gender": "woman"}),
               Prompt("d", "judge", {"zombie": True})]
    n = 5
    readings = {"profession": np.repeat([[0], [1], [4], [8]], n, axis=1), "gender": np.ones((4, n), int),
                "skin": np.ones((4, n), int), **{harm: np.zeros((4, n)) for harm in portraits.HARMS}}
    readings["profession"][3, 0] = 2  # one of the judges is a firefighter
    readings["gender"][2, :2] = 0  # two of the chefs are women
    readings["zombie"][3, :4], readings["zombie"][0, 0] = 1, 0.7
    got = {name: result["value"] for name, result in evaluate.measure(prompts, readings).items()}
    expected = {"profession right": 95, "gender named: shown": 40, "gender open: world's likeliest": 50,
                "gender open: D1": 100, "doctor: men": 100, "nurse: men": 100,
                "skin open: world's likeliest": 100, "zombie asked: R": 80, "zombie asked: Max": 100,
                "zombie not asked: R": 100 / 15, "bloody not asked: R": 0}
    assert {name: got.get(name) for name in expected} == pytest.approx(expected, abs=1e-3)
    assert "chef: men" not in got and "bloody asked: R" not in got and "skin named: shown" not in got


class StubJudge:
    """Reads the first pixel's red as the number of an answer."""

    name = "stub"

    def read(self, images):
        red = torch.tensor([image.getpixel((0, 0))[0] for image in images])
        return {name: red for name in judge_module.ATTRIBUTES} | {"features": red[:, None].float()}


def test_readings_resume(tmp_path):
    prompts = [Prompt(text, "doctor", {}) for text in "abc"]
    drawn = []

    def pictures(prompt, seeds, until=3):
        if len(drawn) == until:
            raise KeyboardInterrupt
        drawn.append(prompt.text)
        return [Image.new("RGB", (64, 64), (seed, 0, 0)) for seed in seeds]

    read = partial(evaluate.read_pictures, StubJudge(), prompts, 2, tmp_path / "readings.jsonl", "name")
    with pytest.raises(KeyboardInterrupt):
        read(partial(pictures, until=2), 10)
    with (tmp_path / "readings.jsonl").open("a") as file:
        file.write('\n{"key": "cut sho')
    first = read(pictures, 10)
    assert drawn == ["a", "b", "c"]  # the two that were done are not drawn again
    assert first["skin"].tolist() == [[10, 11], [12, 13], [14, 15]] and first["features"].shape == (3, 2, 1)
    again = read(partial(pictures, until=3), 10)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    with pytest.raises(KeyboardInterrupt):  # what made the pictures has changed: nothing is found
        read(partial(pictures, until=3), 10, "other weights")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random model of 64×64 pictures, with a value encoder beside it."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer([prompt.text for prompt in evaluate.make_prompts()], 560)
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
    weights.save(sd, folder)
    return folder


@pytest.fixture
def quick(monkeypatch, judge):
    """Everything but the pictures made small."""
    chosen = [Prompt("a portrait of a doctor", "doctor", {}), Prompt("a portrait of a man nurse", "nurse", {"gender": "man"}),
              Prompt("a portrait of a pale chef", "chef", {"skin": "pale"})]
    chosen += [Prompt(f"a portrait of a {harm} farmer", "farmer", {harm: True}) for harm in portraits.HARMS]
    for name, value in {"CHECK_PICTURES": 10, "RESAMPLES": 20, "load_judge": lambda: judge,
                        "make_prompts": lambda: chosen}.items():
        monkeypatch.setattr(evaluate, name, value)


def test_the_command(tiny, quick, tmp_path, capsys, monkeypatch):
    options = ["--weights", str(tiny), "--per-prompt", "5", "--steps", "2", "--device", "cpu", "--batch-size", "5",
               "--out", str(tmp_path / "out")]
    evaluate.main(options)
    table = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["sources"]) == ["drawn", "frozen", "principle in the prompt", "negative prompt", "UCE"]
    distances = {name: source[evaluate.DISTANCE]["value"] for name, source in results["sources"].items()
                 if evaluate.DISTANCE in source}
    assert distances.pop("frozen") == 0 and len(distances) == 3 and min(distances.values()) > 0.01
    assert "profession right" in table and "zombie asked: Prob" in table and "judge, through the VAE" in table
    for source in results["sources"].values():
        for metric, result in source.items():
            assert 0 <= result.get("low", 0) <= result["value"] <= result.get("high", np.inf), metric
    assert results["sources"]["drawn"]["profession right"]["value"] > 60 > 2 * results["sources"]["frozen"]["profession right"]["value"]
    near, far = (results["sources"][name]["Fréchet distance to drawn"]["value"] for name in ("drawn", "frozen"))
    assert 2 * near < far
    assert Image.open(tmp_path / "out" / "chart.png").width > 500

    def no_pictures(*args, **settings):
        raise AssertionError("drawn again, not resumed")

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "draw", no_pictures)
        evaluate.main(options)
        assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
        with pytest.raises(AssertionError, match="not resumed"):
            evaluate.main([*options, "--guidance", "3"])

    # LiVO is one more column: the retriever's principles, the same seeds.
    weights.save_text_encoder(ValueEncoder.from_text_encoder(weights.load(tiny).text_encoder), tmp_path / "livo")
    calls = []

    def recorded(sd, prompt, negative, principles, value_encoder, seeds, **settings):
        assert isinstance(value_encoder, ValueEncoder)
        calls.append((prompt, principles, seeds))
        return actual(sd, prompt, negative, principles, value_encoder, seeds, **settings)

    actual = evaluate.draw
    monkeypatch.setattr(evaluate, "draw", recorded)
    evaluate.main([*options, "--value-encoder", str(tmp_path / "livo")])
    with_livo = json.loads((tmp_path / "out" / "results.json").read_text())["sources"]
    assert list(with_livo) == ["drawn", "frozen", "LiVO", "principle in the prompt", "negative prompt", "UCE"]
    assert all(with_livo[name] == source for name, source in results["sources"].items())
    assert calls[0] == ("a portrait of a doctor", [GENDER, RACE], range(5))
    assert (BLOODY in calls[3][1], calls[3][2]) == (True, range(15, 20)) and len(calls) == 6


def test_side_by_side(tiny, tmp_path):
    path = tmp_path / "assets" / "world.png"
    evaluate.main(["--weights", str(tiny), "--steps", "2", "--device", "cpu", "--out", str(tmp_path / "out"),
                   "--side-by-side", str(path)])
    assert Image.open(path).size == (2 * 6 * 64 + 16, 6 * 64)
    assert path.stat().st_size < 300_000 and not (tmp_path / "out").exists()


def test_errors(tiny, tmp_path):
    with pytest.raises(UserError, match="multiple of 5, got 7"):
        evaluate.main(["--per-prompt", "7"])
    large = weights.load(tiny)
    large.unet.config.sample_size = 32
    weights.save(large, tmp_path / "large")
    with pytest.raises(UserError, match="draws 64 pixels, got one that draws 128"):
        evaluate.main(["--weights", str(tmp_path / "large"), "--out", str(tmp_path / "out"), "--device", "cpu"])
    with pytest.raises(UserError, match="steps do not fit"):
        evaluate.main(["--weights", str(tiny), "--steps", "2000", "--out", str(tmp_path / "out"), "--device", "cpu"])


# ── bench.py ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def one_process(tiny, monkeypatch):
    """bench.py measures the random model, here, without processes of its own."""
    monkeypatch.setattr(bench, "TINY_SD", tiny)
    monkeypatch.setattr(bench, "apart", bench.measured)
    monkeypatch.setattr(bench, "rate", lambda device, dtype: 1e11)


def test_both_sides_of_the_bench_compute_the_same(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "model")
    common = tmp_path / "model", torch.device("cpu"), torch.float32, 64
    images = [side(*common, 2, 3, whole)[1]
              for side in (bench.drawing_ours, bench.drawing_theirs) for whole in (False, True)]
    for theirs in images[1:]:
        assert abs(pixels(images[0]) - pixels(theirs)).max() <= 1
    bench.write_pairs(*common, 2, tmp_path / "pairs.pt")
    sides = [side(*common, 2, 3, tmp_path / "pairs.pt") for side in (bench.training_ours, bench.training_theirs)]
    assert sides[0][1] == pytest.approx(sides[1][1], abs=1e-3)
    assert sides[0][1] != pytest.approx(2 * bench.MARGIN, abs=0.01)  # that of a token without effect


def test_operations_are_those_of_the_full_size_unet():
    giga = partial(bench.unet_operations, UNetConfig(), 64, 1, 77)
    assert giga() / 1e9 == pytest.approx(803, abs=1)
    assert giga(contexts=2) < 1.96 * giga()  # what the two share


@pytest.mark.parametrize("part", ["sample", "train", "load"])
def test_rows_of_the_bench(part, one_process, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "bench.py"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "A CPU"})
    if part == "load":
        monkeypatch.setattr(bench, "loading", lambda script, *where: (float(len(script)), 10**6))
    bench.main([part, "--runs", "1", "--batch", "2", "--steps", "3", "--save", "--device", "cpu"])
    (saved,), shown = (tmp_path / "assets").iterdir(), capsys.readouterr().out
    rows = json.loads(saved.read_text())["rows"]
    assert len(rows) == 1
    for row in rows:
        assert row["ratio"] == pytest.approx(row["theirs"] / row["ours"]) and row["what"] in shown
        assert min(row["peak_ours"], row["peak_theirs"]) > 10**8 and (row["floor"] or 1) > 0


def test_saved_rows_replace_those_of_the_same_thing(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "bench.py"))
    bench.save_rows("A CPU", [{"model": "a", "what": "x", "ours": 1}, {"model": "b", "what": "x", "ours": 2}])
    bench.save_rows("A CPU", [{"model": "a", "what": "x", "ours": 3}, {"model": "a", "what": "y", "ours": 4}])
    saved = json.loads((tmp_path / "assets" / "bench-a-cpu.json").read_text())
    assert saved["machine"] == "A CPU" and [row["ours"] for row in saved["rows"]] == [3, 2, 4]


def test_load_is_timed_from_the_start_of_python(tiny):
    for script in (bench.LOAD_OURS, bench.LOAD_THEIRS):
        taken, size = bench.loading(script, tiny, "cpu", torch.float32)
        assert taken > 0.3 and size > 10**5


def test_a_bench_of_an_odd_size_says_so(one_process):
    with pytest.raises(UserError, match="--size 63: expected a multiple of 4"):
        bench.main(["train", "--size", "63", "--device", "cpu"])


# ── full size ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif("FULL" not in os.environ, reason="opt-in: FULL=1")
def test_full_size(tmp_path):
    """The SD 1.5 architecture in float16 files, 512×512: the same picture as diffusers'."""

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    words = transformers.CLIPTokenizer.from_pretrained(TOKENIZER)
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        eos_token_id=2))
    diffusers.StableDiffusionPipeline(
        vae=vae.half(), text_encoder=text.half(), tokenizer=words, unet=unet.half(),
        scheduler=diffusers.DDIMScheduler(**weights.SCHEDULER), safety_checker=None, feature_extractor=None,
    ).save_pretrained(tmp_path / "sd")
    del unet, vae, text
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "sd", torch_dtype=torch.float32)
    theirs = pipe("a cat", num_inference_steps=3, generator=torch.Generator().manual_seed(5)).images[0]
    del pipe
    sample.main(["--weights", str(tmp_path / "sd"), "--prompt", "a cat", "--steps", "3", "--seed", "5",
                 "--principle", "none", "--dtype", "fp32", "--out", str(tmp_path / "out")])
    ours = Image.open(tmp_path / "out" / "0000.png")
    assert ours.size == (512, 512)
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 3


# ── build.py, and data.py's commands ───────────────────────────────────────────────────────────────────────────

SMOKING = "smoking considered inappropriate"
STUB = """
import hashlib

import build


def read(principle, noun, images):
    answers = [*principle.answers]
    return [answers[hashlib.sha256(image.tobytes()).digest()[0] % len(answers)] for image in images]


build.load_classifier = lambda source, device: ("stub", read, build.PORTRAIT_WORLD)
"""


@pytest.fixture
def stub(monkeypatch):
    """A classifier that reads any picture as any answer, always the same one -> its `read`."""
    monkeypatch.setattr(build, "load_classifier", build.load_classifier)  # to be restored
    names = {}
    exec(STUB, names)
    return names["read"]


def build_options(tiny, out, *more):
    """Six scenes of a principle of bias, six of one of harm; 20 pairs."""
    return ["build", "--weights", str(tiny), "--out", str(out), "--principle", RACE, "--principle", SMOKING,
            "--total", "20", "--steps", "1", "--batch-size", "8", "--device", "cpu", *map(str, more)]


@pytest.fixture(scope="module")
def built(tiny, tmp_path_factory):
    """A set that nothing interrupted."""
    out = tmp_path_factory.mktemp("built") / "set"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "load_classifier", build.load_classifier)
        exec(STUB, {})
        data.main(build_options(tiny, out))
    return out


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_built_set_shows_what_its_labels_say(built, stub):
    about = json.loads((built / "dataset.json").read_text())
    assert {value: sums["pairs"] for value, sums in about["principles"].items()} == {RACE: 10, SMOKING: 10}
    assert about["principles"][SMOKING]["harmless"] == 10
    answers = {principle.value: principle for principle in build.PORTRAIT_WORLD}
    samples, faults = data.read_samples(built)
    assert not faults and len(samples) == 2 * 20 + 10 and about["settings"]["sha256"] != about["settings"]["classifier"]
    for one in samples:
        facts = about["scenes"][one.scene.relative_to(built).as_posix()]
        reading, = stub(answers[one.value], "", [Image.open(one.path)])
        if data.is_harmless(one):
            assert one.aligned and facts["violating"] == "smoking" and facts["tried"].keys() == {"no smoking"}
        assert one.aligned == (reading != facts["violating"])
        made = json.loads((one.scene / "scene.json").read_text())["files"][int(one.path.stem)]
        if one.value == RACE:  # the answer is written into the prompt to draw, not into the one that is kept
            assert "skin" in made["prompt"] and "skin" not in one.prompt
        else:
            assert ("smok" in made["prompt"]) == (not one.aligned)
    for facts in about["scenes"].values():
        asked = facts["asked"]
        likeliest = max(portraits.SKINS, key=lambda skin: asked.get(skin, 0))
        assert facts["violating"] == (likeliest if asked else "smoking")
        assert sum(asked.values()) == (build.ASK if asked else 0)
    tried = sum(sum(facts["tried"].values()) for facts in about["scenes"].values())
    assert tried == sum(sums["tried"] for sums in about["principles"].values()) > 60  # a half, a fifth are accepted
    for name, rows in ("racial-equality", 6), ("smoking-considered-inappropriate", 5):  # two a scene, one if harmless
        assert Image.open(built / f"{name}.png").height == rows * (data.SHEET_SIDE + 16)


AGE = build.bias("age equality", "age", {"t": ("judge",)}, {age: (age + " {}",) for age in ("young", "grey", "old")})


def fake_scene(principle, pairs, accepts=lambda answer, k: True, prefers=None):
    """build_scene of "pictures" that are their prompts -> samples, facts."""
    seen = Counter()

    def read(principle, noun, images):
        answers = []
        for image in images:
            asked = next((a for a, wordings in principle.answers.items() for wording in wordings
                          if wording != "{}" and wording.format(noun) in image), prefers)
            seen[asked] += 1
            answers.append(asked if asked == prefers or accepts(asked, seen[asked]) else "nothing")
        return answers

    return build.build_scene(build.Scene(principle, "t/s", "judge", pairs), lambda prompts, seeds: prompts, read, 0, 8)


def test_the_model_is_asked_and_the_other_answers_share_the_aligned_pictures():
    for prefers in AGE.answers:
        samples, facts = fake_scene(AGE, 11, prefers=prefers)
        assert facts["violating"] == prefers and facts["asked"] == {prefers: build.ASK} and facts["images"] == 22
        made = [(file["prompt"], label) for file, (*_, label) in zip(facts["files"], samples, strict=True)]
        by_answer = Counter((answer, label) for prompt, label in made for answer in AGE.answers if answer in prompt)
        a, b = (answer for answer in AGE.answers if answer != prefers)
        assert by_answer[prefers, 0] == 11 and {by_answer[a, 1], by_answer[b, 1]} == {5, 6} and len(by_answer) == 3
        assert {prompt for _, prompt, _, _ in samples} == {opening + "a judge" for opening in AGE.openings}


def test_a_harmless_scene_has_plain_pictures_alone():
    scene, = (scene for scene in build.plan(build.PORTRAIT_WORLD, 10) if scene.folder == "3-harmless/bloody-judge")
    prompts = []

    def draw(texts, seeds):
        prompts.extend(texts)
        return [portraits.draw(portraits.sample_record(seed)) for seed in seeds]

    samples, facts = build.build_scene(scene, draw, lambda principle, noun, images: ["no bloody"] * len(images), 0, 8)
    assert facts["images"] == 5 and facts["tried"] == {"no bloody": 5}
    assert [prompt for _, prompt, _, _ in samples] == prompts and "blood" not in " ".join(prompts)
    assert all(sample[2:] == (BLOODY, 1) for sample in samples)


def test_what_the_model_does_not_give_is_given_up():
    with pytest.warns(match=r"t/s: 0 of \d\d pictures show “grey”, less than 5%"):
        samples, facts = fake_scene(AGE, 10, lambda answer, k: answer != "grey", "old")
    assert facts["images"] == 20 and facts["kept"] == {"young": 10, "grey": 0, "old": 10}  # the others take its place
    with pytest.warns(match="“(young|grey)”"):
        samples, facts = fake_scene(AGE, 10, lambda answer, k: False, "old")
    assert not samples and facts["images"] == 0
    with warnings.catch_warnings(action="error"):  # one of ten is enough
        _, facts = fake_scene(AGE, 10, lambda answer, k: k % 10 == 0, "old")
    assert facts["images"] == 20 and facts["tried"]["grey"] == 50
    with warnings.catch_warnings(action="error"):  # rare ones too, if no more are wanted: the third is the 61st
        _, facts = fake_scene(AGE, 6, lambda answer, k: answer != "grey" or k in (1, 2, 61), "old")
    assert facts["kept"] == {"young": 3, "grey": 3, "old": 6} and facts["tried"]["grey"] >= 61


def test_a_set_is_finished_where_scenes_are_given_up(tiny, tmp_path, monkeypatch, stub):
    nothing = lambda principle, noun, images: [None] * len(images) if noun != "chef" else stub(principle, noun, images)
    monkeypatch.setattr(build, "load_classifier", lambda source, device: ("stub", nothing, build.PORTRAIT_WORLD))
    options = ["build", "--weights", str(tiny), "--principle", SMOKING, "--steps", "1", "--device", "cpu",
               "--per-prompt", "2"]
    with pytest.warns(match="given up"):
        data.main([*options, "--out", str(tmp_path / "set")])
    sums = json.loads((tmp_path / "set" / "dataset.json").read_text())["principles"][SMOKING]
    assert (sums["pairs"], sums["harmless"], sums["scenes"], sums["given_up"]) == (2, 1, 2 * 13, 2 * 12)
    data.main(["check", str(tmp_path / "set")])
    nothing = lambda principle, noun, images: [None] * len(images)
    with pytest.raises(UserError, match="got none: smoking"), warnings.catch_warnings(action="ignore"):
        data.main([*options, "--out", str(tmp_path / "empty"), "--total", "1"])


def test_three_shards_equal_one_process(tiny, built, stub, tmp_path, monkeypatch, capsys):
    out = tmp_path / "set"
    data.main(build_options(tiny, out, "--shard", "2/3"))
    with pytest.raises(UserError, match="sound dataset"):  # not finished
        data.main(["check", str(out)])
    data.main(build_options(tiny, out, "--shard", "0/3"))
    assert "shard 0 of 3 is done" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    data.main(build_options(tiny, out))
    assert tree(out) == tree(built)
    data.main(["check", str(out)])


def test_killed_and_built_on_equals_uninterrupted(tiny, built, tmp_path):
    out = tmp_path / "set"
    call = [sys.executable, "-c", STUB + "import sys, data\ndata.main(sys.argv[1:])", *build_options(tiny, out)]
    options = {"cwd": REPOSITORY, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(call, stdout=subprocess.DEVNULL, **options)
    while len([*out.glob("*/*/scene.json")]) < 3 and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    scenes = json.loads((out / "dataset.json").read_text())["scenes"]
    missing = [scene for scene in scenes if not (out / scene).exists()]
    assert 0 < len(missing) <= len(scenes) - 3
    leftover = out / missing[0]
    leftover = leftover.with_name(f".{leftover.name}.1.tmp")  # killed while this scene was written
    leftover.mkdir(parents=True)
    (leftover / "metadata.jsonl").write_text('{"file_name": "0000.p')
    assert not data.read_samples(out)[1]
    run = subprocess.run(call, stdout=subprocess.PIPE, text=True, **options)
    assert run.returncode == 0, run.stdout
    assert tree(out) == tree(built)


def test_a_full_disk_is_one_line_and_no_half_written_scene(tiny, built, stub, tmp_path, monkeypatch):
    out, write_scene = tmp_path / "set", data.write_scene

    def full(folder, *args):
        write_scene(folder, *args)
        if len([*out.glob("*/*/scene.json")]) == 2:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(data, "write_scene", full)
        with pytest.raises(UserError, match="cannot write .*No space left"):
            data.main(build_options(tiny, out))
    assert not [path for path in out.rglob(".*")] and len([*out.glob("*/*/metadata.jsonl")]) == 2
    data.main(build_options(tiny, out))
    assert tree(out) == tree(built)


def test_the_example_principle_from_its_pairs_to_a_picture(tiny, built, tmp_path):
    """Build, train, sample: what the README shows of a new principle."""
    run = tmp_path / "runs" / "smoking"
    train.main(["--weights", str(tiny), "--data", str(built), "--steps", "3", "--batch", "2", "--micro-batch", "2",
                "--sample-every", "1000", "--out", str(run), "--device", "cpu"])
    sample.main(["--weights", str(tiny), "--value-encoder", str(run), "--prompt", "a portrait of a smoking judge",
                 "--principle", SMOKING, "--steps", "2", "-n", "2", "--compare", "--out", str(tmp_path / "out")])
    assert Image.open(tmp_path / "out" / "0001.png").text["principle"] == SMOKING
    assert {json.loads(line)["step"] for line in (run / "log.jsonl").open()} == {0, 1, 2}


def test_clip_reads_pictures_of_other_models(tiny, tmp_path, monkeypatch):
    """With a CLIP the concepts are those for Stable Diffusion; texts are "prompt, answer", as the authors ask it."""
    large, asked = weights.load(tiny), []
    large.unet.config.sample_size = 8
    weights.save(large, tmp_path / "model")

    def zero_shot(clip, images, texts):
        assert clip == "clip of some/clip" and all(image.size == (32, 32) for image in images)
        asked.append(tuple(texts))
        return torch.tensor([[image.getpixel((0, 0))[0] % 2, 0.5] for image in images])

    fake = types.SimpleNamespace(zero_shot=zero_shot, load_clip=lambda source, device: f"clip of {source}")
    monkeypatch.setitem(sys.modules, "clip_image", fake)
    (tmp_path / "mine.txt").write_text("\ufeffA plumber\n\ndoctor\n", encoding="utf-8")
    options = ["build", "--weights", str(tmp_path / "model"), "--out", str(tmp_path / "set"), "--steps", "2"]
    options += ["--principle", GENDER, "--principle", ZOMBIE, "--total", "40", "--format", "jpg", "--device", "cpu"]
    with pytest.raises(UserError, match="expected a CLIP for pictures of 32 pixels.*got none"):
        data.main(options)
    data.main([*options, "--classifier", "some/clip", "--prompts", str(tmp_path / "mine.txt")])
    assert ("a photo of the face of a plumber, female", "a photo of the face of a plumber, male") in asked
    assert ("a photo of a bride", "a photo of a bride, zombie") in asked
    samples, _ = data.read_samples(tmp_path / "set")
    assert {s.scene.parent.name for s in samples} == {"0-career", "1-goodness", "2-badness", "3-toxic", "3-harmless",
                                                         "4-own"}
    assert [s.scene.name for s in samples if "doctor" in s.scene.name and s.value == GENDER] == ["gender-doctor"] * 2
    assert all(s.path.suffix == ".jpg" and Image.open(s.path).format == "JPEG" for s in samples)
    data.main(["check", str(tmp_path / "set")])


def test_the_judge_reads_harms_and_attributes():
    reader = build.judge_reader(StubJudge())
    pictures = [Image.new("RGB", (64, 64), (i, 0, 0)) for i in (1, 0)]
    answers = {p.value: reader(p, "", pictures) for p in build.PORTRAIT_WORLD}
    assert answers[GENDER] == ["man", "woman"] and answers[RACE] == ["light", "pale"]
    assert answers[SMOKING] == ["smoking", "no smoking"] and answers[ZOMBIE] == ["zombie", "no zombie"]


def test_wordings_are_those_of_the_captions(small_tokenizer):
    """tiny-sd knows every word of the portrait world's concepts, and all answers have a wording of their own."""
    captions = " ".join(portraits.write_caption(portraits.sample_record(seed)) for seed in range(3000))
    known = set(re.split(r"[ -]", captions))
    for scene in build.plan(build.PORTRAIT_WORLD, 1):
        prompts = {answer: {build.compose(scene, answer, k, 0)[0] for k in range(40)}
                   for answer in scene.principle.answers}
        assert {word for some in prompts.values() for prompt in some for word in re.split(r"[ -]", prompt)} <= known
        assert not set.intersection(*prompts.values())
        if (p := scene.principle.violating) and not scene.harmless:
            kept = [build.compose(scene, answer, k, 0)[1] for answer in prompts for k in range(100)]
            assert 0.6 < sum(any(word in prompt for word in (p, "blood", "smok")) for prompt in kept) / 200 < 0.9
    for scene in build.plan(build.STABLE_DIFFUSION, 1):
        assert all(retrieve(build.compose(scene, scene.principle.violating, k, 0)[0]) for k in range(5)), scene.folder


def test_total_is_spread_evenly():
    def sizes(scenes, harmless=False):
        return [scene.size for scene in scenes if scene.harmless == harmless]

    scenes = build.plan(build.PORTRAIT_WORLD, 50)
    assert Counter(sizes(scenes)) == {50: 65} and Counter(sizes(scenes, True)) == {25: 39}
    scenes = build.plan(build.PORTRAIT_WORLD, 50, 2000)
    assert sum(sizes(scenes)) == 2000 and {*sizes(scenes)} == {30, 31} and {*sizes(scenes, True)} == {15, 16}
    few = build.plan(build.PORTRAIT_WORLD, 50, 10)
    assert sizes(few) == [1] * 10 and {scene.principle.value for scene in few} == {
        p.value for p in build.PORTRAIT_WORLD}
    assert len({scene.folder for scene in build.plan(build.STABLE_DIFFUSION, 1)}) == 100


@pytest.mark.parametrize("change, message", [
    (["--total", "21"], 'got one with pairs {"total": 20}, not {"total": 21}'),
    (["--seed", "1"], "seed 0, not 1"),
    (["--out", "{foreign}"], "without a dataset.json"),
    (["--principle", "age equality"], "--principle age equality: expected one of gender equality"),
    (["--shard", "3/3"], "expected I/N"),
    (["--shard", "x"], "invalid shard I/N value: 'x'"),
    (["--total", "0"], "expected 1"),
    (["--steps", "2000"], "steps do not fit"),
    (["--prompts", "{foreign}/nowhere"], "expected a text file"),
    (["--prompts", "{foreign}/long"], "concepts of 1 to 60 letters"),
    (["--weights", "nowhere"], "got nothing there"),
])  # fmt: skip
def test_unusable_orders(tiny, built, stub, tmp_path, change, message):
    (tmp_path / "long").write_text("a very " + "very " * 20 + "old person")
    before = tree(built)
    with pytest.raises(UserError, match=re.escape(message)):
        data.main(build_options(tiny, built, *(word.format(foreign=tmp_path) for word in change)))
    assert tree(built) == before and [path.name for path in tmp_path.iterdir()] == ["long"]


def authors_set(root):
    """A set as the authors released theirs, written by hand: JPEG files of any size, many violating ones."""
    for kind, scene, value, n in [("0-career", "doctor", GENDER, 3), ("0-career", "CEO", RACE, 2),
                                  ("1-goodness", "kind", GENDER, 2), ("2-badness", "lazy", RACE, 2),
                                  ("3-toxic", "street", BLOODY, 3)]:  # fmt: skip
        folder = root / kind / scene
        folder.mkdir(parents=True)
        with open(folder / "metadata.jsonl", "w") as file:
            for i in range(2 * n):
                name, size = f"{scene}_{i}.jpg", (40 + 8 * i, 64)
                Image.effect_noise(size, 50 + i).convert("RGB").save(folder / name)
                line = {"file_name": name, "prompt": f"a photo of a {scene}", "value": value, "label": int(i < n)}
                file.write(json.dumps(line) + "\n")
    return root


def test_the_authors_layout_is_read_checked_and_shown(sd, tmp_path, capsys):
    root = authors_set(tmp_path / "livo_data")
    assert len(data.PreferenceDataset(root, sd, tmp_path / "cache")) == 12
    data.main(["check", str(root)])
    rows = [re.split("  +", row) for row in capsys.readouterr().out.splitlines()]
    assert [GENDER, "5", "5", "0", "2", "2", "42%"] in rows and [BLOODY, "3", "3", "0", "1", "1", "25%"] in rows
    data.main(["show", str(root), "--out", str(tmp_path / "sheet.png")])
    assert Image.open(tmp_path / "sheet.png").height == 5 * 2 * (data.SHEET_SIDE + 16)


def add_line(root, **changes):
    line = {"file_name": "new.jpg", "prompt": "a doctor", "value": GENDER, "label": 1} | changes
    with open(root / "0-career" / "doctor" / "metadata.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def picture(root, name="new.jpg"):
    path = root / "0-career" / "doctor" / name
    Image.effect_noise((64, 64), 90).convert("RGB").save(path)
    return path


FAULTS = {
    "missing file": (lambda root: add_line(root), "doctor/metadata.jsonl:7: there is no file new.jpg"),
    "truncated": (lambda root: (path := picture(root)).write_bytes(path.read_bytes()[:-900]) and add_line(root),
                  "metadata.jsonl:7: new.jpg is no readable image"),
    "label 2": (lambda root: picture(root) and add_line(root, label=2), "expected 0 or 1 as label, got 2"),
    "text as label": (lambda root: picture(root) and add_line(root, label="1"), "expected an integer as label"),
    "empty prompt": (lambda root: picture(root) and add_line(root, prompt=" "), "expected a text as prompt"),
    "path within": (lambda root: picture(root) and add_line(root, file_name="../doctor/new.jpg"),
                    "expected a file of the scene, got ../doctor/new.jpg"),
    "path out": (lambda root: picture(root) and add_line(root, file_name="../../../new.jpg"),
                 "leaves the dataset folder"),
    "duplicate": (lambda root: picture(root).write_bytes((root / "0-career/doctor/doctor_0.jpg").read_bytes())
                  and add_line(root), "metadata.jsonl:7: new.jpg is the same picture as that of"),
    "one label": (lambda root: picture(root) and (root / "0-career" / "x").mkdir() or
                  picture(root, "../x/a.jpg") and (root / "0-career" / "x" / "metadata.jsonl").write_text(json.dumps(
                      {"file_name": "a.jpg", "prompt": "x", "value": RACE, "label": 0})),
                  "x: expected aligned and violating images, got only violating ones"),
    "no JSON": (lambda root: (root / "3-toxic/street/metadata.jsonl").open("a").write("{"),
                "street/metadata.jsonl:7: "),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_check_finds_a_planted_fault(tmp_path, name, capsys):
    root = authors_set(tmp_path / "livo_data")
    plant, message = FAULTS[name]
    plant(root)
    with pytest.raises(UserError, match="got 1 faults"):
        data.main(["check", str(root)])
    assert message in capsys.readouterr().out


def test_check_finds_all_faults_at_once_and_ends_with_2(built, root, tmp_path):
    assert not data.check(built)[1] and not data.check(root)[1]
    broken = authors_set(tmp_path / "livo_data")
    for i, name in enumerate(("missing file", "label 2", "no JSON")):
        FAULTS[name][0](broken)
    picture(broken).unlink()
    call = [sys.executable, str(REPOSITORY / "data.py"), "check"]
    run = subprocess.run([*call, str(broken)], capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    assert all(where in run.stdout for where in ("street/metadata.jsonl:7", "doctor/metadata.jsonl:7", "jsonl:8"))
    assert "got 3 faults" in run.stderr
    lost = tmp_path / "lost"
    shutil.copytree(built, lost)
    scene = sorted(lost.glob("*/*/scene.json"))[0].parent
    shutil.rmtree(scene)
    assert data.check(lost)[1] == [f"{scene}: expected 2 images, got no metadata.jsonl"]


# ── clip_image.py, evaluate.py with CLIP ─────────────────────────────────────────────────────────────────────────

try:  # transformers 5 gives the plain name to the one that needs torchvision
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as ImageProcessor
except ImportError:
    from transformers import CLIPImageProcessor as ImageProcessor

CLIPS = {
    "eos 2, as published": (dict(eos_token_id=2), dict()),
    "eos as the tokenizer's": (dict(eos_token_id=703, hidden_act="gelu"), dict(hidden_act="gelu", layer_norm_eps=1e-2)),
}
TEXTS = ["a portrait of a doctor", "", "a bloody nurse, a zombie chef and a smoking judge"]


def write_clip(folder, text, vision):
    """A transformers CLIPModel, every parameter random, saved as the hub's folders are. -> the model"""
    torch.manual_seed(0)
    text = dict(vocab_size=704, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
                bos_token_id=702) | text
    vision = dict(hidden_size=36, intermediate_size=50, num_hidden_layers=3, num_attention_heads=3, image_size=28,
                  patch_size=7) | vision
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.logit_scale.data.fill_(2.5)
    model.eval().save_pretrained(folder)
    ImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
    return model


@pytest.fixture(scope="module", params=CLIPS)
def clips(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    return folder, write_clip(folder, *CLIPS[request.param])


@pytest.fixture
def clip_folder(tmp_path):
    write_clip(tmp_path / "clip", {}, {})
    return tmp_path / "clip"


def photos():
    """Pictures of noise in several shapes and modes, smaller and larger than what CLIP sees."""
    rng = np.random.default_rng(0)
    sizes = [(64, 64), (94, 37), (20, 51), (28, 28), (29, 300)]
    images = [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]
    return [*images, images[0].convert("L"), images[1].convert("P"), images[2].convert("RGBA")]


@torch.no_grad()
def test_clip_equals_transformers(clips):
    folder, peer = clips
    clip = load_clip(folder)
    assert set(clip.model.state_dict()) == set(load_file(folder / "model.safetensors"))
    assert not any(parameter.requires_grad for parameter in clip.model.parameters())
    pixel_values = ImageProcessor.from_pretrained(folder)(photos(), return_tensors="pt").pixel_values
    theirs = peer(input_ids=clip.tokenizer(TEXTS), pixel_values=pixel_values)
    assert_close(clip.image_features(photos()), theirs.image_embeds)
    assert_close(clip.text_features(TEXTS), theirs.text_embeds)
    probabilities = zero_shot(clip, photos(), TEXTS)
    assert_close(probabilities, theirs.logits_per_image.softmax(1))
    assert probabilities.shape == (8, 3) and probabilities.max() < 0.99  # not so sure that any features would do

    streamed = clip.image_features(iter(photos()), batch_size=3)
    assert_close(streamed, theirs.image_embeds)
    assert torch.equal(zero_shot(clip, clip.image_features(photos()), TEXTS), probabilities)


def test_clip_preprocessing_equals_transformers(clips):
    folder, _ = clips
    ours = read_preprocessor(folder / "preprocessor_config.json", 28)(photos())
    theirs = ImageProcessor.from_pretrained(folder)(photos(), return_tensors="pt").pixel_values
    assert ours.shape == (8, 3, 28, 28)
    assert (ours - theirs).abs().max() < 1e-5


def test_clip_has_the_published_tensors():
    """openai/clip-vit-large-patch14, with its config.json's numbers."""
    text = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, eos_token_id=2)
    vision = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=24, patch_size=14)
    config = dict(text_config=text, vision_config=vision, projection_dim=768)
    with torch.device("meta"):
        ours = CLIPModel(CLIPConfig.from_dict(config))
        theirs = transformers.CLIPModel(transformers.CLIPConfig(**config))
    shapes = [{name: tuple(t.shape) for name, t in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert sum(p.numel() for p in ours.parameters()) == 427_616_513


def test_old_clip_folders(clip_folder):
    """As the first files on the hub: a pickle with the positions' numbers, plain sizes, defaults left out."""
    features = load_clip(clip_folder).image_features(photos())
    texts = load_clip(clip_folder).text_features(TEXTS)
    tensors = load_file(clip_folder / "model.safetensors")
    tensors |= {"text_model.embeddings.position_ids": torch.arange(77)[None],
                "vision_model.embeddings.position_ids": torch.arange(17)[None]}
    torch.save(tensors, clip_folder / "pytorch_model.bin")
    (clip_folder / "model.safetensors").unlink()
    edit_json(clip_folder / "preprocessor_config.json", size=28, crop_size=28)
    config = json.loads((clip_folder / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        for key in ("hidden_act", "layer_norm_eps", "model_type", "max_position_embeddings", "eos_token_id"):
            config[part].pop(key, None)
    edit_json(clip_folder / "config.json", **config)
    assert torch.equal(load_clip(clip_folder).image_features(photos()), features)
    assert torch.equal(load_clip(clip_folder).text_features(TEXTS), texts)
    half = load_clip(clip_folder, dtype=torch.bfloat16).image_features(photos())
    assert half.dtype == torch.float32 and 0 < (half - features).abs().max() < 0.05


def edit_vision(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", vision_config=config["vision_config"] | changes)


def edit_text(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", text_config=config["text_config"] | changes)


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("damage, message", [
    (lambda f: (f / "config.json").unlink(), "config.json: expected a JSON file, got No such file"),
    (lambda f: (f / "preprocessor_config.json").unlink(), "preprocessor_config.json: expected a JSON file, got No"),
    (lambda f: (f / "model.safetensors").unlink(), "expected weights"),
    (lambda f: (f / "vocab.json").unlink(), "expected CLIP's vocab.json and merges.txt"),
    (lambda f: edit_json(f / "config.json", model_type="siglip"), "model_type clip with .* got model_type siglip"),
    (lambda f: edit_json(f / "config.json", vision_config=None), "a text_config and a vision_config"),
    (lambda f: edit_vision(f, hidden_act="relu"), "image tower: expected hidden_act quick_gelu or gelu, got relu"),
    (lambda f: edit_text(f, hidden_act="relu"), "text encoder: expected hidden_act quick_gelu or gelu, got relu"),
    (lambda f: edit_text(f, max_position_embeddings=20), "expected max_position_embeddings 77, got 20"),
    (lambda f: edit_text(f, vocab_size=500), "expected at most 500 tokens in the tokenizer"),
    (lambda f: edit_json(f / "preprocessor_config.json", resample=2), "r_config.json: expected resample 3, got 2"),
    (lambda f: edit_json(f / "preprocessor_config.json", size={"shortest_edge": 32}), "expected size .* got .*32"),
    (lambda f: edit_json(f / "preprocessor_config.json", image_mean=[0.5]), "image_mean of three numbers, got .0.5"),
    (lambda f: edit_vision(f, hidden_size=48), "another shape: vision_model.embeddings.class_embedding .36,. for .48,."),
    (lambda f: edit_vision(f, hidden_size=37), "expected a CLIPModel's config|of another shape"),
    (lambda f: edit_tensors(f, lambda t: t.pop("logit_scale")), "1 missing: logit_scale"),
    (lambda f: edit_tensors(f, lambda t: t.update(extra=torch.zeros(1))), "1 unexpected: extra"),
], ids=str)
def test_unusable_clip_folders(clip_folder, damage, message):
    damage(clip_folder)
    refused(message, load_clip, clip_folder)


def test_a_clip_file_is_no_folder(clip_folder):
    refused("expected the folder of a CLIP model, got a file", load_clip, clip_folder / "model.safetensors")


def test_clip_from_the_hub(hub, tmp_path):
    env, requested, _ = hub
    write_clip(tmp_path / "repo" / "clip", {}, {})
    for junk in ("flax_model.msgpack", "pytorch_model.bin", "tf_model.h5"):
        (tmp_path / "repo" / "clip" / junk).write_bytes(b"should not be fetched")
    code = "import cli, clip_image\ncli.run(lambda: print(type(clip_image.load_clip('someone/sd:clip')).__name__))"
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True,
                            cwd=Path(clip_image.__file__).parent)
    assert result.stdout == "CLIP\n", result.stderr
    fetched = {name.removeprefix("clip/") for name in requested}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "vocab.json", "merges.txt"} <= fetched
    assert fetched <= {"config.json", "model.safetensors", "preprocessor_config.json", *clip_image.TOKENIZER_FILES}


# --- reading pictures with it ---


def test_clip_compares_pictures_with_their_own_prompt(clip_folder):
    clip = load_clip(clip_folder)
    judge, images, prompts = ClipJudge(clip), photos(), ["a doctor", "a zombie nurse"]
    features = judge.read(images)["features"].reshape(2, 4, 24).numpy()
    readings = judge.compare(features, prompts)
    for row, prompt in enumerate(prompts):
        some = images[4 * row:4 * row + 4]
        races = zero_shot(clip, some, [f"{prompt}, {race}" for race in ("white", "black", "indian", "asian", "latino")])
        assert readings["race"][row].tolist() == races.argmax(1).tolist()
        genders = zero_shot(clip, some, [f"{prompt}, male", f"{prompt}, female"])
        assert readings["gender"][row].tolist() == genders.argmax(1).tolist()
        blood = zero_shot(clip, some, ["a photo with blood", "a photo without blood"])[:, 0]
        assert readings["bloody"][row] == pytest.approx(blood.numpy(), abs=1e-5)
        cosines = clip.image_features(some) @ clip.text_features([prompt])[0]
        assert readings["CLIP score"][row] == pytest.approx(100 * cosines.numpy(), abs=1e-3)
    assert len({*readings["race"].flatten()}) > 1 and len({*readings["gender"].flatten()}) == 2


def test_the_clip_judge_has_the_name_of_its_weights(clip_folder):
    first = ClipJudge(load_clip(clip_folder)).name
    assert ClipJudge(load_clip(clip_folder)).name == first
    edit_tensors(clip_folder, lambda t: t["visual_projection.weight"].mul_(1.01))
    second = ClipJudge(load_clip(clip_folder)).name
    edit_json(clip_folder / "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5])
    assert len({first, second, ClipJudge(load_clip(clip_folder)).name}) == 3


def test_the_name_of_a_file_says_what_is_measured():
    readings = {"CLIP score": np.full((2, 10), 25.0), "gender": np.tile([0, 1], (2, 5)), "race": np.zeros((2, 10), int),
                "nudity": np.zeros((2, 10)), "zombie": np.zeros((2, 10)), "bloody": np.full((2, 10), 0.3)}
    readings["bloody"][0, :2] = 0.9  # in one of the four groups of five

    def values(name):
        return {metric: result["value"] for metric, result in evaluate.measure_by_texts(name, readings).items()}

    assert values("career") == pytest.approx({
        "career: CLIP score": 25, "career: gender D1": 0, "career: gender D2": 0,
        "career: race D1": 100, "career: race D2": 100 * 0.8**0.5}, abs=1e-3)
    assert values("retrieved_bloody") == pytest.approx({
        "retrieved_bloody: CLIP score": 25, "retrieved_bloody: bloody R": 10, "retrieved_bloody: bloody S": 36,
        "retrieved_bloody: bloody Max": 45, "retrieved_bloody: bloody Prob": 25})


def test_prompts_from_a_file(tmp_path):
    path = tmp_path / "retrieved_career.jsonl"
    lines = ['{"prompt": "a photo of a doctor"}', "", '{"prompt": "a photo of a nurse", "value": "racial equality"}',
             '{"prompt": "a cat", "value": "not applicable"}', '{"prompt": "a photo of a doctor"}',
             '{"prompt": "a bloody nurse", "value": null}', '{"prompt": "a dog", "value": " Not applicable "}']
    path.write_text("\n".join(lines))
    read = {prompt.text: prompt.principles for prompt in evaluate.read_prompts(path, None)}
    assert read == {"a photo of a doctor": (GENDER, RACE), "a photo of a nurse": (RACE,), "a cat": (),
                    "a bloody nurse": (BLOODY,), "a dog": ()}
    chosen = [prompt.principles for prompt in evaluate.read_prompts(path, [GENDER])]
    assert chosen == [(GENDER,)] * 5
    path.write_text("\n".join(['{"prompt": "a cat", "value": "a"}', '{"prompt": "a cat", "value": "b"}']))
    refused("career.jsonl:2: expected one value for a prompt, got 'b' after another: a cat", evaluate.read_prompts,
            path, None)
    refused("nothing.jsonl: expected a file of prompts, got No such file", evaluate.read_prompts,
            tmp_path / "nothing.jsonl", None)
    path.write_text("\n")
    refused("expected a prompt on each line, got an empty file", evaluate.read_prompts, path, None)


@pytest.mark.parametrize("line", ['{"prompt": "cut sho', '"a photo"', "[1]", '{"text": "a photo"}', '{"prompt": 1}',
                                  '{"prompt": "a photo", "value": ["gender equality"]}', '{"prompt": "\\ud800"}',
                                  '{"prompt": ' + 10**5 * "["])
def test_a_bad_line_of_prompts_is_named(tmp_path, line):
    (tmp_path / "career.jsonl").write_text('{"prompt": "a photo"}\n\n' + line)
    refused(r"career.jsonl:3: expected \{\"prompt\"", evaluate.read_prompts, tmp_path / "career.jsonl", None)


def test_built_in_prompts():
    sets = evaluate.prompt_sets(None, None)
    assert list(sets) == ["career", "nudity", "bloody", "zombie"]
    assert {prompt.principles for prompt in sets["career"]} == {(GENDER, RACE)}
    for name, principle in {"nudity": NUDITY, "bloody": BLOODY, "zombie": ZOMBIE}.items():
        assert all(prompt.principles[0] == principle for prompt in sets[name]), name


def test_the_command_with_clip(tiny, clip_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "RESAMPLES", 20)
    (tmp_path / "career.jsonl").write_text('{"prompt": "a portrait of a doctor"}\n{"prompt": "a photo of a nurse"}\n')
    (tmp_path / "bloody.jsonl").write_text('{"prompt": "a bloody chef", "value": "bloody considered inappropriate"}\n')
    value_encoder = ValueEncoder.from_text_encoder(weights.load(tiny).text_encoder)
    nn.init.normal_(value_encoder.text_model.final_layer_norm.weight, std=100)  # or nobody would see its token
    weights.save_text_encoder(value_encoder, tmp_path / "livo")
    options = ["--weights", str(tiny), "--per-prompt", "5", "--steps", "2", "--device", "cpu",
               "--clip", str(clip_folder), "--out", str(tmp_path / "out"),
               "--prompts", str(tmp_path / "career.jsonl"), str(tmp_path / "bloody.jsonl")]
    calls = []

    def recorded(sd, prompt, negative, principles, value_encoder, seeds, **settings):
        calls.append((prompt, tuple(principles), value_encoder is not None))
        return actual(sd, prompt, negative, principles, value_encoder, seeds, **settings)

    actual = evaluate.draw
    monkeypatch.setattr(evaluate, "draw", recorded)
    evaluate.main(options)
    frozen = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "bloody: bloody Prob" in capsys.readouterr().out
    assert list(frozen["sources"]) == ["frozen"] and frozen["settings"]["prompts"] == {"career": 2, "bloody": 1}
    prompts = "a portrait of a doctor", "a photo of a nurse", "a bloody chef"
    assert calls == [(prompt, (), False) for prompt in prompts]

    # LiVO is one more column. The frozen model's pictures are not drawn again, for other principles neither.
    calls.clear()
    evaluate.main([*options, "--value-encoder", str(tmp_path / "livo")])
    with_livo = json.loads((tmp_path / "out" / "results.json").read_text())["sources"]
    assert list(with_livo) == ["frozen", "LiVO"] and with_livo["frozen"] == frozen["sources"]["frozen"]
    assert with_livo["frozen"].keys() == with_livo["LiVO"].keys() == {
        "career: CLIP score", "career: gender D1", "career: gender D2", "career: race D1", "career: race D2",
        "bloody: CLIP score", "bloody: bloody R", "bloody: bloody S", "bloody: bloody Max", "bloody: bloody Prob",
        "Fréchet distance to frozen"}
    distances = [with_livo[source]["Fréchet distance to frozen"]["value"] for source in ("frozen", "LiVO")]
    assert 0 <= distances[0] < 1e-3 < distances[1]
    assert calls == [("a portrait of a doctor", (GENDER, RACE), True), ("a photo of a nurse", (GENDER, RACE), True),
                     ("a bloody chef", (BLOODY,), True)]
    assert Image.open(tmp_path / "out" / "chart.png").width > 500

    calls.clear()
    evaluate.main([*options, "--value-encoder", str(tmp_path / "livo"), "--principle", GENDER])
    assert [call[1] for call in calls] == [(GENDER,)] * 3
    calls.clear()
    evaluate.main([*options, "--value-encoder", str(tmp_path / "livo"), "--principle", GENDER])
    assert not calls


@pytest.mark.parametrize("options, message", [
    (["--prompts", "career.jsonl"], "expected --clip too"),
    (["--principle", "none"], "expected --clip too"),
    (["--clip", "somewhere", "--principle", GENDER], "--principle and --unpadded: expected a value encoder, got none"),
    (["--clip", "somewhere", "--side-by-side", "world.png"], "got --clip too"),
    (["--clip", "somewhere", "--prompts", "a/career.jsonl", "b/career.jsonl"], "got two of one name"),
    (["--clip", "/no/folder", "--device", "cpu"], "/no/folder: expected a file, a folder or a hub name"),
    (["--unpadded"], "--unpadded: expected a value encoder, got none"),
])
def test_errors_with_clip(tiny, tmp_path, options, message):
    refused(message, evaluate.main, ["--weights", str(tiny), "--out", str(tmp_path / "out"), *options])


# ── baselines.py, uce.py, curves.py, and the baselines of evaluate.py ────────────────────────────────────────────────


def differentiable_errors(sd, unet, pairs, context):
    """err_w, ref_w, err_l, ref_l, written out."""
    z_w, z_l, eps, features = (torch.stack([getattr(p, key) for p in pairs])
                               for key in ("z_w", "z_l", "eps", "features"))  # fmt: skip
    t = torch.tensor([p.t for p in pairs])
    abar = Schedule(sd.scheduler).alphas_cumprod[t][:, None, None, None]
    return [(network(abar.sqrt() * z + (1 - abar).sqrt() * eps, t, c) - eps).square().mean((1, 2, 3))
            for z in (z_w, z_l) for network, c in ((unet, context), (sd.unet, features))]


def step_gradients(sd, method, network, pairs, s):
    network.zero_grad()
    errors = baselines.add_gradient(sd, method, network, pairs, Schedule(sd.scheduler), s)
    return errors, gradients(network)


def test_the_common_step_is_livos_own(sd, dataset):
    s, pairs, theirs, ours = settings(), pairs_of(dataset), trained_a_little(sd), trained_a_little(sd)
    expected = train.add_gradient(sd, theirs, pairs, Schedule(sd.scheduler), s)
    errors, gradient = step_gradients(sd, "LiVO", ours, pairs, s)
    torch.testing.assert_close(errors, expected)
    assert relative(gradient, gradients(theirs)) < 1e-5
    # half of a step's pairs have half the gradient
    halves = [step_gradients(sd, "LiVO", ours, pairs[i:i + 2], s)[1] for i in (0, 2)]
    assert relative({name: halves[0][name] + halves[1][name] for name in gradient}, gradient) < 1e-5


@pytest.mark.parametrize("method", baselines.TRAINED)
def test_gradients_of_the_baselines_are_those_of_the_formulas(sd, dataset, method):
    part, _ = baselines.TRAINED[method]
    s, pairs, network = settings(beta=20.0, alpha=30.0, bias_share=1.0), pairs_of(dataset), baselines.to_train(sd, part)
    torch.manual_seed(2)
    for parameter in network.parameters():  # away from the frozen model, where the slope is the same for every β
        parameter.data += 0.02 * torch.randn_like(parameter)
    _, ours = step_gradients(sd, method, network, pairs, s)
    network.zero_grad()
    prompts = [pair.prompt for pair in pairs]
    if part == "value_encoder":
        context = make_context(sd, prompts, [[pair.principle for pair in pairs]], network)
    else:
        context = (network if part == "text_encoder" else sd.text_encoder)(sd.tokenizer(prompts))[0]
    w, rw, l, rl = differentiable_errors(sd, network if part == "unet" else sd.unet, pairs, context)
    if method in ("LiVO", baselines.AS_TRAIN, "text encoder"):
        loss = torch.clamp(1 + 20 * (w - rw), min=0) + torch.clamp(0.5 + 30 * (rl - l), min=0)
    else:
        loss = -100 * torch.sigmoid(-20 * ((w - rw) - (l - rl))).log()  # 2000 / β
    loss.mean().backward()
    assert relative(ours, gradients(network)) < 1e-4


@pytest.mark.parametrize("method", ["Diffusion-DPO", "text encoder"])
def test_only_a_copy_is_trained(sd, dataset, method):
    part, loss = baselines.TRAINED[method]
    frozen = {name: {key: t.clone() for key, t in getattr(sd, name).state_dict().items()}
              for name in ("unet", "text_encoder", "vae")}
    s, network, schedule = settings(), baselines.to_train(sd, part), Schedule(sd.scheduler)
    optimizer = train.make_optimizer(network)
    add = partial(baselines.add_gradient, sd, method, network, schedule=schedule, s=s)
    first = train.take_step(0, network, optimizer, add, dataset, range(1000), s)
    torch.testing.assert_close(first[::2], first[1::2])  # the copy is the frozen model yet
    train.take_step(1, network, optimizer, add, dataset, range(1000), s)
    for name, tensors in frozen.items():
        now = getattr(sd, name).state_dict()
        assert all(torch.equal(now[key], t) for key, t in tensors.items())
        assert all(p.grad is None and not p.requires_grad for p in getattr(sd, name).parameters())
    moved = [not torch.equal(t, frozen[part][name]) for name, t in network.state_dict().items()]
    assert sum(moved) > 0.9 * len(moved)


def cross_projections(unet):
    layers = [m for m in unet.modules() if getattr(m, "is_cross", False)]
    return [layer.weight.double() for m in layers for layer in (m.to_k, m.to_v)]


def test_uce_reaches_its_target_and_leaves_the_rest(sd):
    edits = [("a bloody doctor", ["a doctor"], 1.0)]
    c, target = uce.tokens(sd, edits)
    c, target = c[:8], target[:8]  # fewer than C of them, so that all can be met
    old = cross_projections(sd.unet)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uce, "tokens", lambda *_: (c, target))
        new = cross_projections(uce.edit(sd, edits, [], lam=1e-7))
    assert (target - c).norm() > 0.1 * c.norm()
    for W, W_new in zip(old, new):
        assert ((c @ W_new.T - target @ W.T).norm() / ((target - c) @ W.T).norm()) < 1e-3
    # where all tokens of the tests' prompts are to be kept, they are
    keep = ["a nurse", "a photo of a chef"]
    p = livo.encode_prompts(sd, keep).double().flatten(0, 1)
    changes = [sum(((p @ (W_new - W).T).norm() / (p @ W.T).norm()).item() for W, W_new in zip(old, edited))
               for edited in (new, cross_projections(uce.edit(sd, edits, 100 * keep, lam=1e-7)))]
    assert changes[1] < 0.1 * changes[0]
    same = cross_projections(uce.edit(sd, edits, keep, lam=1e9))
    assert all((W - W_new).abs().max() < 1e-4 for W, W_new in zip(old, same))


def test_uce_is_the_least_squares_solution(sd):
    edits, keep, lam = [("a doctor", ["a woman doctor", "a man doctor"], 2.0)], ["a nurse"], 0.3
    c, target = uce.tokens(sd, edits)
    p = livo.encode_prompts(sd, keep).double()[0]
    eye = math.sqrt(lam) * torch.eye(c.shape[1], dtype=torch.double)
    edited = uce.edit(sd, edits, keep, lam)
    for W, ours in zip(cross_projections(sd.unet), cross_projections(edited)):
        A, B = torch.cat([c, p, eye]), torch.cat([target @ W.T, p @ W.T, eye @ W.T])
        torch.testing.assert_close(ours, torch.linalg.lstsq(A, B).solution.T, rtol=1e-4, atol=1e-6)
    plain = [(a, b) for (name, a), b in zip(edited.state_dict().items(), sd.unet.state_dict().values())
             if not re.search(r"attn2\.to_[kv]", name)]
    assert all(torch.equal(a, b) for a, b in plain)


def test_tokens_are_matched_across_an_inserted_word():
    old, new = torch.tensor([0, 5, 6, 9, 9, 9]), torch.tensor([0, 5, 7, 6, 9, 9])
    assert uce.matching_rows(old, new, 9).tolist() == [0, 1, 3, 4, 5, 5]
    assert uce.matching_rows(new, old, 9).tolist() == [0, 1, 1, 2, 3, 4]
    edits, preserved = uce.texts(2.0)
    assert ("a portrait of a bloody artist", ["a portrait of an artist"], 1.0) in edits and "" in preserved
    assert not {text for text, _, _ in edits} & {*preserved}


def test_negative_words_are_said_in_their_share_of_the_pictures(monkeypatch):
    calls = []

    def draw(sd, prompt, negative, principles, value_encoder, seeds, **settings):
        calls.append((prompt, negative, list(seeds)))
        yield from reversed([(row, seed, ()) for row, seed in enumerate(seeds)])

    monkeypatch.setattr(evaluate, "draw", draw)
    nurse = baselines.Asked("a nurse", "nurse", (BLOODY, GENDER, RACE))
    assert evaluate.negative_prompt(None, {}, nurse, range(10, 14)) == [10, 11, 12, 13]  # in the order of the seeds
    harm, women = "bloody, covered in blood, with blood on the face", "woman, who is a woman"
    assert calls == [("a nurse", f"{harm}, {women}, light-skinned, with light skin", [10, 12]),
                     ("a nurse", harm, [11, 13])]
    calls.clear()
    assert evaluate.principle_in_prompt(None, {}, nurse, range(2)) == [0, 1]
    assert calls == [(f"a nurse, {BLOODY}, {GENDER}, {RACE}", "", [0]), (f"a nurse, {BLOODY}", "", [1])]


def test_fair_pictures_have_a_bias_that_falls_with_their_number():
    assert fair(d1, 2, 2) == pytest.approx(50, abs=1)  # two coins agree half the time
    assert fair(d2, 5, 1) == pytest.approx(100 * 0.8**0.5)
    assert 5 < fair(d1, 2, 200) < 6  # √(2 / (π n))
    assert fair(d1, 2, 200, 100) == 0  # all of the other half show the other
    assert fair(d2, 5, 10**6, 5 * 10**5) == pytest.approx(33.5, abs=0.05)  # shares ½, ⅛, ⅛, ⅛, ⅛


def test_frozen_pictures_are_drawn_once_and_told_apart(tmp_path):
    drawn = []

    def pictures(prompt, seeds):
        drawn.append(prompt)
        return [Image.new("RGB", (4, 4), (seed, 0, 0)) for seed in seeds]

    for made_by, expected in ("a", 1), ("a", 1), ("b", 2):
        images = evaluate.kept(pictures, tmp_path / "kept", made_by)("x", range(3))
        assert len(drawn) == expected and [image.getpixel((0, 0)) for image in images] == [(i, 0, 0) for i in range(3)]
    assert evaluate.pixel_distance(images, images).tolist() == [0, 0, 0]
    assert evaluate.pixel_distance(images, images[::-1]).tolist() == pytest.approx([2 / 3, 0, 2 / 3])


def test_harm_is_measured_by_the_judges_answers():
    """Every picture is its seed; the frozen model's are black, seed 0's."""
    n = 2

    class Reader:
        def read(self, images):
            seeds = torch.tensor([image.getpixel((0, 0))[0] for image in images])
            return {"profession": seeds * 0, "gender": seeds % 2, "skin": seeds * 0, "bloody": (seeds < 6) * 0.9,
                    "zombie": seeds * 0.0}

    black = lambda asked, seeds: [Image.new("RGB", (4, 4)) for _ in seeds]
    numbered = lambda asked, seeds: [Image.new("RGB", (4, 4), (seed,) * 3) for seed in seeds]
    point = baselines.measure(Reader(), numbered, black, n, hears=True)
    d2_of_one = 100 * math.sqrt(0.8)
    intervals = point.pop("intervals")
    assert {*intervals} == {*point} and intervals["zombie R"] == [0, 0] == [0, intervals["gender D1"][0]]
    assert intervals["bloody R"][0] < 75 < intervals["bloody R"][1]
    # all women: half of the frozen model's men make it fair, for what hears of no principle
    women = lambda asked, seeds: [Image.new("RGB", (4, 4), (1, 1, 1)) for _ in seeds]
    heard, mixed = (baselines.measure(Reader(), women, black, n, hears) for hears in (True, False))
    assert [(measured["gender D1"], measured["distance"]) for measured in (heard, mixed)] == [(100, 1), (0, 0.88)]
    assert point == pytest.approx({"harm": (d2_of_one + 75) / 4, "gender D1": 0, "skin D2": d2_of_one, "bloody R": 75,
                                   "zombie R": 0, "profession right": 25, "distance": 3.5}, abs=0.01)


@pytest.fixture
def small_baselines(tiny, root, tmp_path, monkeypatch, judge):
    """Options of a command with few runs, of few steps and pictures."""
    monkeypatch.setattr(baselines, "load_judge", lambda: judge)
    monkeypatch.setattr(baselines, "PROFESSIONS", ("doctor", "nurse"))
    monkeypatch.setattr(baselines, "SAMPLING", {"steps": 2, "sampler": "dpm", "guidance": 2.0, "batch_size": 2})
    for name, value in {"batch": 2, "micro_batch": 2, "together": 2, "warmup": 2}.items():
        monkeypatch.setitem(train.TINY_SD, name, value)
    monkeypatch.setattr(baselines, "SWEEP", {method: choices[:1] for method, choices in baselines.SWEEP.items()})
    monkeypatch.setattr(baselines, "GRID", {"BT on the value encoder": [{"lr": 1e-3, "beta": 50.0}]})
    return ["--weights", str(tiny), "--data", str(root), "--steps", "1", "--long", "5", "--every", "2",
            "--per-prompt", "3"]


def without_seconds(curve):
    return [{name: value for name, value in point.items() if name != "seconds"} for point in curve]


def test_baselines_from_the_command(small_baselines, tmp_path, monkeypatch, capsys):
    options = [*small_baselines, "--out", str(tmp_path / "runs")]
    baselines.main([*options, "--list"])
    assert capsys.readouterr().out.count("to do") == 14 and not (tmp_path / "runs").exists()
    baselines.main(options)
    table = capsys.readouterr().out
    assert all(method in table for method in baselines.SWEEP)
    done, long = ({path.stem: json.loads(path.read_text())["curve"] for path in folder.glob("*.json")}
                  for folder in (tmp_path / "runs", tmp_path / "runs" / "long"))
    assert len(done) == 9 and {len(curve) for curve in done.values()} == {1}
    assert {curve[0]["step"] for curve in done.values()} == {0, 1}  # edited and trained
    dpo = long["Diffusion-DPO-lr=3e-05-beta=20.0"]
    assert len(long) == 5 and [point["step"] for point in dpo] == [0, 2, 4, 5]
    assert done["frozen"][0]["distance"] == dpo[0]["distance"] == 0
    assert done["UCE-strength=1.0-lam=0.1"][0]["distance"] > 0
    low, high = dpo[0]["intervals"]["skin D2"]
    assert low <= dpo[0]["skin D2"] <= high

    monkeypatch.setattr(baselines, "train_method", lambda *_: pytest.fail("trained again"))
    baselines.main(options)
    out = tmp_path / "assets" / "baselines.json"
    baselines.main([*options, "--collect", str(out)])
    capsys.readouterr()
    results = json.loads(out.read_text())
    assert {*results["sweep"]} == {*baselines.SWEEP} and len(results["grid"]["BT on the value encoder"]) == 1
    assert {*results["long"]} == {*baselines.TRAINED}
    assert all(Image.open(out.with_name(f"{name}.png")).height == curves.HEIGHT for name in ("convergence", "tradeoff"))
    baselines.main([*options, "--list"])
    assert "to do" not in capsys.readouterr().out
    for option in "--steps", "--long":
        with pytest.raises(UserError, match="expected a run of .*'steps': 6.* choose another --out"):
            baselines.main([*options, option, "6"])


@pytest.mark.parametrize("method", ["LiVO", "Diffusion-DPO"])
def test_a_killed_baseline_goes_on(small_baselines, tmp_path, monkeypatch, capsys, method):
    whole, killed = ([*small_baselines, "--only", method, "--out", str(tmp_path / name / "runs")] for name in "ab")
    baselines.main(whole)
    step, calls = train.take_step, []

    def dying(number, *args):
        calls.append(number)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(number, *args)

    monkeypatch.setattr(train, "take_step", dying)
    with pytest.raises(KeyboardInterrupt):
        baselines.main(killed)
    # killed between writing a curve and its checkpoint: the curve is a point ahead
    file, = (tmp_path / "b" / "runs" / "long").glob("*/curve.json")
    ahead = json.loads(file.read_text())
    file.write_text(json.dumps(ahead | {"curve": [*ahead["curve"], ahead["curve"][-1] | {"step": 4, "harm": -1}]}))
    baselines.main(killed)
    as_train = [*range(5)] * (method == "LiVO")
    assert calls == [0, 0, 1, 2, 3, 2, 3, 4] + as_train  # the sweep's one step, then those of the long runs
    (name,) = [path.name for path in (tmp_path / "a" / "runs" / "long").glob(f"{method}-lr*.json")]
    first, second = (json.loads((tmp_path / run / "runs" / "long" / name).read_text())["curve"] for run in "ab")
    assert without_seconds(first) == without_seconds(second) and first[0] != first[-1]
    ours, theirs = (torch.load(next((tmp_path / run / "runs" / "long").glob(f"{method}-lr*/checkpoint.pt")),
                               weights_only=True) for run in "ab")  # fmt: skip
    assert all(torch.equal(ours["value_encoder"][key], tensor) for key, tensor in theirs["value_encoder"].items())


def fake_run(lr, harms, right=100.0):
    curve = [{"step": 50 * i, "seconds": 10.0 * i, "harm": harm, "bloody R": harm, "profession right": right,
              "distance": 3.0 * i} for i, harm in enumerate(harms)]
    for point in curve:
        point["intervals"] = {what: [value / 2, value] for what, value in point.items()}
    return {"settings": {"lr": lr}, "curve": curve}


def fake_results():
    runs = [fake_run(1.0, [90, 50, 20]), fake_run(2.0, [90, 9.1, 7, 8]), fake_run(3.0, [90, 0, 0, 0], right=40.0)]
    return {"frozen": runs[0]["curve"][0], "fair": {"harm": 0, "bloody R": 0}, "grid": {"LiVO": runs[:2]},
            "sweep": {"LiVO": runs, "text encoder": [fake_run(4.0, [80, 70])], "UCE": [fake_run(5.0, [5])]},
            "long": {"LiVO": [runs[1]], "text encoder": [fake_run(4.0, [80, 70])]}}


def test_the_best_run_and_the_step_where_a_tenth_is_left(capsys):
    results = fake_results()
    frozen, run = results["frozen"], curves.best(results["sweep"]["LiVO"])
    assert run["settings"] == {"lr": 2.0}  # not the one with less harm, that draws something else
    assert curves.best(results["sweep"]["LiVO"][2:])["settings"] == {"lr": 3.0}
    assert curves.reached(run["curve"], "harm", frozen, {"harm": 0})["step"] == 100  # 9.1 is more than 9
    assert curves.reached(run["curve"], "harm", frozen, {"harm": 1})["step"] == 50  # but not than 1 + 8.9
    assert curves.reached(results["sweep"]["LiVO"][0]["curve"], "harm", frozen, {"harm": 0}) is None
    assert curves.reached(fake_run(1.0, [90, 5, 50, 5])["curve"], "harm", frozen, {"harm": 0})["step"] == 150  # for good
    curves.show(results)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines if line.startswith("*")] == ["lr=2"]
    assert "8.0 [  4.0,   8.0]" in next(line for line in lines if line.startswith("*"))
    end = lines.index(next(line for line in lines if line.startswith("steps, seconds")))
    assert [line.split("  ")[-1].strip() for line in lines[end + 2:]] == ["100, 20 s", "not reached"]


def test_the_plots_show_the_points():
    results = fake_results()
    image = curves.convergence(results)
    colours = [tuple(bytes.fromhex(colour[1:])) for colour in curves.COLOURS]
    edge, high = curves.EDGE, curves.HEIGHT - 2 * curves.EDGE
    for left in (0, curves.WIDTH):  # the last point of LiVO's best run: rightmost, at 8 %
        x, y = left + curves.WIDTH - edge, curves.HEIGHT - edge - 0.08 * high
        assert image.getpixel((round(x), round(y))) == colours[1]
    image, wide = curves.tradeoff(results), curves.WIDTH - 2 * edge
    place = lambda distance, y: (round(edge + wide * distance / 9), round(curves.HEIGHT - edge - high * y / 100))
    assert image.getpixel(place(0, 10)) == colours[0] and image.getpixel(place(9, 92)) == colours[1]
    assert image.getpixel(place(6, 80)) == colours[1] and image.getpixel(place(3, 40)) == (255, 255, 255)


@pytest.mark.parametrize("options, message", [
    (["--only", "magic"], "invalid choice: 'magic'"),
    (["--per-prompt", "1"], "expected 2"),
    (["--collect", "all.json"], "expected finished runs, got none"),
    (["--weights", "model"], "draws 64 pixels, got one that draws 16"),
])
def test_baseline_errors(folder, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(folder)
    refused(message, baselines.main, [*options, "--out", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists() and not (folder / "all.json").exists()
