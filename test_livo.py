"""The tests: networks, samplers and loaders against their peers (diffusers, transformers), then invariants.

    pytest -q test_livo.py                        # small random models and tiny-sd, no download
    FULL=1 pytest -q test_livo.py -k full_size    # the SD 1.5 architecture: 10 GB of memory, minutes

What needs ../shared (CLIP's vocabulary, real prompts) is skipped where that is absent.
"""

import copy
import csv
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anybody imports Triton, as diffusers does

import diffusers
import pytest
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import common
import data
from lab import evaluate
import livo
from lab import portraits
import sample
import train
import weights
from common import UserError, pick_device, run
from clip_text import BOS, EOS, CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from formats.export import save_tokenizer
from lab.tokenizer import train_tokenizer
from livo import (ValueEncoder, aligned_hinge, bradley_terry_loss, livo_loss, make_context, make_uncond,
                  violating_hinge)
from retrieve import BLOODY, GENDER, RACE, ZOMBIE, retrieve
from sample import Schedule, ddim_step, denoise, dpm_step, sample_noise, sample_images, grid, x0_and_eps
from unet import UNet, UNetConfig
from data import sample_latent
from vae import VAE, VAEConfig
from conftest import CORPUS, REPOSITORY, SD1, SHARED, SMALL_UNET, TOKENIZER, UNETS, assert_close, gradients, pairs_of, pixels, refused, relative, settings, trained_a_little


# ── unet.py, vae.py ──────────────────────────────────────────────────────────────────────────────────────────────

VAES = {
    "two levels": dict(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8),
    "three levels": dict(block_out_channels=(16, 32, 32), layers_per_block=2, norm_num_groups=4),
}


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


# ── clip_text.py ───────────────────────────────────────────────────────────────────────────────────────────────


VOCABULARY = SHARED / "clip-tokenizer"
needs_vocabulary = pytest.mark.skipif(not VOCABULARY.is_dir(), reason="no CLIP vocabulary in ../shared")


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

    save_tokenizer(ours, tmp_path / "saved")
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
    save_tokenizer(small_tokenizer, tmp_path / "ours")
    reference = transformers.CLIPTokenizer.from_pretrained(tmp_path / "ours")
    reference.save_pretrained(tmp_path / "theirs")  # tokenizer.json
    texts = CORPUS + NASTY
    expected = reference_ids(reference, texts)
    assert (small_tokenizer.bos_token_id, small_tokenizer.eos_token_id, reference.vocab_size) == (558, 559, 560)
    assert reference.model_max_length == 77 and expected.max() == 559
    assert not (tmp_path / "theirs" / "vocab.json").exists()
    for tokenizer in (small_tokenizer, CLIPTokenizer(tmp_path / "ours"), CLIPTokenizer(tmp_path / "theirs")):
        assert our_ids(tokenizer, texts).equal(expected)

    save_tokenizer(train_tokenizer(iter(CORPUS), 560), tmp_path / "again")
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
    save_tokenizer(small_tokenizer, tmp_path)
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
PLAIN_SCHEDULER = {"steps_offset": 1, "clip_sample": False}  # every other key left to the defaults
V = {**SD1, "prediction_type": "v_prediction"}
CONFIGS = {"sd1": SD1, "plain": PLAIN_SCHEDULER, "v": V} | {
    name: {**SD1, "timestep_spacing": name} for name in ("leading", "linspace", "trailing")}


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
            x = ddim_step(x0, eps, abar, abar_prev, eta, sample_noise(generators, x.shape[1:]) if eta else None)
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


@pytest.mark.parametrize("options", [dict(sampler="dpm"), dict(eta=1.0), dict(guidance=1.0)], ids=str)
def test_a_picture_does_not_depend_on_its_batch(options):
    sd, context, uncond = tiny_sd(), torch.randn(5, 77, 24), torch.randn(1, 77, 24)
    settings = dict(steps=3, height=24, width=12, **options)
    one, two, five = (pixels(sample_images(sd, context, uncond, range(7, 12), batch_size=size, **settings))
                      for size in (1, 2, 5))
    assert one.shape == (5, 24, 12, 3)
    assert abs(one - two).max() <= 1 and abs(one - five).max() <= 1
    alone = pixels(sample_images(sd, context[3:4], uncond, [10], **settings))
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
    common.keep_freed_memory()
    monkeypatch.setattr(common.ctypes, "CDLL", lambda name: types.SimpleNamespace())  # no mallopt
    common.keep_freed_memory(large=True)


def test_half_precision_draws_about_the_same(shipped):
    rough = weights.load(TOKENIZER.parent, dtype=torch.bfloat16)
    full, half = (pixels(image for _, image, _ in sample.generate(
        sd, "a doctor", "", [], None, range(2), steps=10)) for sd in (shipped[0], rough))
    assert abs(full - half).mean() < 4 and full.std() > 40


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 0.05), (torch.bfloat16, 2)])  # of 255, on average
def test_wide_networks_have_channels_last_and_draw_the_same(monkeypatch, dtype, tolerance):
    images = []
    for wide in (1, 1000):
        monkeypatch.setattr(weights, "WIDE", wide)
        sd = weights.load(TOKENIZER.parent, dtype=dtype)
        assert sd.unet.conv_out.weight.is_contiguous(memory_format=torch.channels_last) == (wide == 1)
        images.append(pixels(image for _, image, _ in sample.generate(sd, "a doctor", "", [], None, [0], steps=4)))
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
    monkeypatch.setattr(sample, "sample_images", None)
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
        list(sample_images(sd, torch.zeros(1, 77, 24), torch.zeros(1, 77, 24), [0], steps=2))


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
    rows = lambda principles: {row: image.tobytes() for row, image, _ in sample.generate(
        sd, "a doctor", "", principles, value_encoder, range(4), **options)}
    frozen, gender, bloody = rows([]), rows([GENDER]), rows([BLOODY])
    assert [frozen[row] == gender[row] for row in range(4)] == [False, True, False, True]
    assert not any(frozen[row] == bloody[row] for row in range(4))
    context = make_context(sd, ["a doctor"]).expand(4, -1, -1)
    direct = sample_images(sd, context, make_uncond(sd, 77), range(4), **options)
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
        portraits.render(portraits.sample_record(0)).save(scene / "whole.png")
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
    assert data.portrait_pair(0, "gender", "classifier")[1].gender == "woman"
    assert {data.portrait_pair(seed, "skin", "classifier")[2].skin for seed in range(20)} == {"light"}


def test_the_default_set(root):
    samples, faults = data.read_samples(root)
    assert not faults and len(samples) == 4 * 26 * 2 + 13 and not data.check(root)[1]
    assert {sample.scene.parent.name for sample in samples} == {"0-career", "2-badness", "3-harmless"}
    prompt, aligned, violating = data.portrait_pair(data.PAIR_SEEDS, "gender", "doctor")
    first = [sample for sample in samples if sample.scene.name == f"gender-{data.PAIR_SEEDS}-doctor"]
    assert first[0].prompt == prompt and first[0].aligned and not first[1].aligned
    assert Image.open(first[0].path).tobytes() == portraits.render(aligned).tobytes()
    assert Image.open(first[1].path).tobytes() == portraits.render(violating).tobytes()
    nouns = {sample.scene.name.split("-", 2)[2].replace("-", " ") for sample in samples}
    assert nouns == {*data.NOUNS}


def test_harmless_scenes_prefer_nothing(root):
    samples = [sample for sample in data.read_samples(root)[0] if sample.scene.parent.name == "3-harmless"]
    assert len(samples) == 13 and {sample.value for sample in samples} == {BLOODY}
    for sample in samples:
        assert sample.aligned and "blood" not in sample.prompt and BLOODY not in retrieve(sample.prompt)


def test_a_harmless_picture_is_both_of_its_pair(root, sd, tmp_path):
    dataset = data.PreferenceDataset(root, sd, tmp_path)
    position = next(i for i in range(len(dataset)) if data.is_preservation(dataset.aligned_at(i, 0)[0]))
    pair, (sample, _) = dataset.pair(position, 0, range(1000)), dataset.aligned_at(position, 0)
    assert pair.where == f"{sample.where} and {sample.where}" and pair.harmless
    assert 0 < (pair.z_w - pair.z_l).abs().max() < 1 and pair.z_w.std() > 0  # two draws of one distribution


def test_women_and_men_are_aligned_equally_often():
    aligned = [data.portrait_pair(seed, "gender", noun)[1].gender
               for seed, noun in enumerate(data.nouns_of_pairs("gender", 60))]
    assert aligned.count("man") == aligned.count("woman") == 30


def test_a_new_principle_is_a_line(tmp_path):
    data.render_pairs(tmp_path / "set", {"smoking considered inappropriate": "smoking"}, {"smoking": 13})
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
    image = portraits.render(portraits.sample_record(0))
    data.write_scene(tmp_path / "data" / "t" / "s", [(image, "a chef", "equality", int(i < 2)) for i in range(6)])
    pairs = data.PreferenceDataset(tmp_path / "data", sd, tmp_path / "cache")
    met = {pairs.pair(position, 0, range(1000)).where for position in range(100)}
    assert len(met) == 2 * 4


@pytest.mark.parametrize("group_size", [4, 8, 26])
def test_pairs_in_a_row_share_a_principle(sd, root, folder, group_size):
    dataset = data.PreferenceDataset(root, sd, folder / "cache", group_size)
    n = sum(math.ceil(pairs / group_size) * group_size for pairs in (26, 26, 26, 26, 13))  # the last rows are filled up
    pairs = [dataset.pair(position, 0, range(1000)) for position in range(2 * n)]
    rows = [{(pair.principle, "3-harmless" in pair.where) for pair in pairs[i:i + group_size]}
            for i in range(0, 2 * n, group_size)]
    assert all(len(row) == 1 for row in rows)
    assert [*map(min, rows)] != sorted(map(min, rows))
    for epoch in (pairs[:n], pairs[n:]):
        assert {pair.where.split(" and ")[0] for pair in epoch} == {sample.where for sample, _ in dataset.aligned}


# --------------------------------------------------------------------------------------------------- one step


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
    s, pairs = settings(beta=1000.0, alpha=500.0, bias_alpha_scale=1.0, gamma1=1.0, gamma2=0.5), pairs_of(dataset)

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
        train.enable_activation_checkpointing(model.unet)
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

    value_encoder, s = trained_a_little(sd), settings(alpha=10.0, beta=30.0, bias_alpha_scale=1.0, gamma1=1.0, gamma2=1.0, batch=2)
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
    line = {"active_w": 0.1, "active_l": 0.05, "delta_w": -0.001, "delta_l": 0.001, "ref": 0.08}
    with pytest.warns(match=r"γ1/β = 0.001 .*--gamma1 4e\+01 --gamma2 2e\+01"):
        train.warn_if_saturated([line] * 50, train.Settings())
    for harmless in ({"active_w": 0.5}, {"delta_l": 0.02}):
        train.warn_if_saturated([line | harmless] * 50, train.Settings())  # pytest turns a warning into an error
    train.warn_if_saturated([line] * 50, train.Settings(beta=0.0))  # one hinge is off: there is no such margin


# --------------------------------------------------------------------------------------------------- whole runs


def run_settings(folder, root, **changes):
    options = {"weights": folder / "model", "data": root, "steps": 10, "batch": 4, "micro-batch": 4, "lr": 1e-3,
               "warmup": 2, "beta": 100, "alpha": 50, "save-every": 2, "sample-every": 1000, "group_size": 2,
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

    class Classifier:
        def read(self, images):
            n = len(images)
            return {"gender": torch.tensor([1 if image == () else i % 2 for i, image in enumerate(images)]),
                    "skin": torch.tensor([1] * n), "bloody": torch.tensor([float(image == ()) for image in images]),
                    "zombie": torch.tensor([1.0] * n), "smoking": torch.tensor([1.0] * n)}

    monkeypatch.setattr(train, "load_classifier", Classifier)
    monkeypatch.setattr(evaluate, "generate", lambda sd, prompt, negative, principles, value_encoder, seeds, **settings:
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
    data.render_pairs(tmp_path / "other", pairs=dict.fromkeys(data.PAIRS, 2), harmless={})
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
