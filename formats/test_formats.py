"""Checkpoints in every published form load to the same tensors; anything else is an error of one line."""

import json
import os
import random
import re
import shutil
import sys
import threading
import types
import warnings
from functools import partial
from pathlib import Path

import torch

import diffusers
import pytest
import transformers
from safetensors.torch import load_file, save_file

import sample
import weights
from clip_text import BOS, EOS, CLIPTokenizer
from conftest import SHARED, TINY_SD, TOKENIZER, edit_json, fetch, full_vocabulary_pipeline, pixels, refused
from formats import unpadded
from formats.compvis import renamed
from formats.export import save, save_tokenizer
from formats.files import weight_files
from lab.tokenizer import train_tokenizer
from livo import load_value_encoder
from retrieve import GENDER

WEIGHTS = "diffusion_pytorch_model.safetensors"


def published_names(model):
    """The parameters under the names of published files; transformers 5 may leave out `text_model.`."""
    return {f"text_model.{name.removeprefix('text_model.')}": t for name, t in model.state_dict().items()
            if not name.endswith("position_ids")}


def assert_same(sd, pipe, dtype=torch.float32):
    for ours, ref in ((sd.unet.state_dict(), pipe.unet.state_dict()), (sd.vae.state_dict(), pipe.vae.state_dict()),
                      (sd.text_encoder.state_dict(), published_names(pipe.text_encoder))):
        assert ours.keys() == ref.keys()
        for name in ours:
            assert torch.equal(ours[name], ref[name].to(dtype).to(ours[name].dtype)), name


# ── Folders ──────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("how", [
    {}, {"safe_serialization": False}, {"variant": "fp16"}, {"max_shard_size": "200KB"},
    {"max_shard_size": "200KB", "variant": "fp16"}, {"max_shard_size": "200KB", "safe_serialization": False},
], ids=str)
def test_folders_of_diffusers(pipe, tmp_path, how):
    for name in weights.NETWORKS:
        getattr(pipe, name).save_pretrained(tmp_path / name, **how)
    pipe.tokenizer.save_pretrained(tmp_path / "tokenizer")
    files = [path for path in (tmp_path / "unet").iterdir() if path.suffix != ".json"]
    assert len(files) == 1 if "max_shard_size" not in how else len(files) > 2
    sd = weights.load(tmp_path)
    assert_same(sd, pipe)
    mapped = Path("/proc/self/maps").read_text()  # a tensor of the right dtype is not copied
    assert all(str(file) in mapped for file in files)
    assert not any(p.requires_grad for p in sd.unet.parameters()) and not sd.unet.training
    assert sd.scheduler["prediction_type"] == "epsilon"


def test_all_shards_are_needed_under_both_names_of_variants():
    """The choice between variants is tested by the folders below and by the hub's."""
    for shard in "model.fp16-0000{}-of-00002.safetensors", "model-0000{}-of-00002.fp16.safetensors":
        shards = [shard.format(1), shard.format(2)]
        assert weight_files(["pytorch_model.bin", *shards], torch.float32, "here") == shards
        refused("expected 2 shards.*got 1", weight_files, shards[1:], torch.float32, "here")


def test_float16_takes_the_fp16_variant_and_keeps_the_vae_in_float32(sd_folder):
    file = sd_folder / "unet" / WEIGHTS
    save_file({name: torch.zeros_like(t).half() for name, t in load_file(file).items()},
              file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    sd = weights.load(sd_folder, dtype=torch.float16)
    assert [next(network.parameters()).dtype for network in (sd.unet, sd.text_encoder, sd.vae)] == [
        torch.float16, torch.float16, torch.float32]
    assert not sd.unet.conv_in.weight.any() and weights.load(sd_folder).unet.conv_in.weight.any()
    assert weights.load(sd_folder, vae_dtype=torch.bfloat16).vae.quant_conv.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("old, ones, prefix", [
    (("query", "key", "value", "proj_attn", "group_norm"), (), "text_model."),
    (("q", "k", "v", "proj_out", "norm"), (1, 1), ""), (("q", "k", "v", "proj_out", "norm"), (1,), "")])
def test_old_parameter_names(pipe, sd_folder, old, ones, prefix):
    """The VAE's attention as in diffusers before 0.17 and in CompVis; CLIP without prefix, with position_ids."""
    state, older = load_file(sd_folder / "vae" / WEIGHTS), {}
    for name, t in state.items():
        for new, earlier in zip(("to_q", "to_k", "to_v", "to_out.0", "group_norm"), old):
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{earlier}.")
        older[name] = t.reshape(*t.shape, *ones) if "attentions" in name and t.ndim == 2 else t
    assert older.keys() != state.keys()
    save_file(older, sd_folder / "vae" / WEIGHTS)
    text = {prefix + name.removeprefix("text_model."): t for name, t in published_names(pipe.text_encoder).items()}
    text[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
    save_file(text, sd_folder / "text_encoder/model.safetensors")
    assert_same(weights.load(sd_folder), pipe)


# ── CompVis files, in the layout of CompVis/stable-diffusion and Stability-AI/stablediffusion ────────────────────────

RESNET = [("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"),
          ("norm2", "out_layers.0"), ("conv2", "out_layers.3"), ("conv_shortcut", "skip_connection")]
UNET = [(rf"(resnets\.\d)\.{ours}", rf"\1.{ref}") for ours, ref in RESNET] + [
    (r"time_embedding\.linear_1", "time_embed.0"), (r"time_embedding\.linear_2", "time_embed.2"),
    ("^conv_in", "input_blocks.0.0"), ("^conv_norm_out", "out.0"), ("^conv_out", "out.2"),
    (r"mid_block\.resnets\.0", "middle_block.0"), (r"mid_block\.attentions\.0", "middle_block.1"),
    (r"mid_block\.resnets\.1", "middle_block.2")]
VAE = [("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out"), ("group_norm", "norm"),
       (r"to_out\.0", "proj_out"), (r"to_([qkv])", r"\1"), (r"mid_block\.resnets\.0", "mid.block_1"),
       (r"mid_block\.resnets\.1", "mid.block_2"), (r"mid_block\.attentions\.0", "mid.attn_1"),
       (r"(down|up)_blocks\.(\d)\.resnets", r"\1.\2.block"),
       (r"(down|up)_blocks\.(\d)\.\1samplers\.0", r"\1.\2.\1sample")]
OPENCLIP = [(r"text_model\.(embeddings\.|encoder\.)?", ""), ("position_embedding.weight", "positional_embedding"),
            ("^layers", "transformer.resblocks"), ("final_layer_norm", "ln_final"), (r"layer_norm(\d)", r"ln_\1"),
            ("self_attn", "attn"), (r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj")]


def compvis_unet(pipe):
    config = pipe.unet.config
    n, attends = config.layers_per_block + 1, ["CrossAttn" in kind for kind in config.up_block_types]

    def place(match):
        path, level, kind, i = match[1], int(match[2]), match[3], int(match[4])
        if "samplers" in kind:
            return f"input_blocks.{(level + 1) * n}.0.op" if path == "down" else \
                f"output_blocks.{level * n + n - 1}.{1 + attends[level]}.conv"
        number = level * n + i + (path == "down")
        return f"{'in' if path == 'down' else 'out'}put_blocks.{number}.{int(kind == 'attentions')}"

    layer = r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)(?:(?<=samplers\.0)\.conv)?"
    return renamed(pipe.unet.state_dict(), [*UNET, (layer, place)])


def compvis_vae(pipe):
    top = len(pipe.vae.config.block_out_channels) - 1
    flip = (r"up_blocks.(\d)", lambda match: f"up_blocks.{top - int(match[1])}")
    state = renamed(pipe.vae.state_dict(), [flip, *VAE])
    return {name: t[..., None, None] if "attn_1" in name and t.ndim == 2 else t for name, t in state.items()}


def openclip(pipe):
    """SD 2 uses 23 of OpenCLIP's 24 layers; the last is left out by its number."""
    text = published_names(pipe.text_encoder)
    for kind in ("weight", "bias"):
        for layer in (f"text_model.encoder.layers.{i}.self_attn." for i in range(2)):
            text[f"{layer}in_proj_{kind}"] = torch.cat([text.pop(f"{layer}{c}_proj.{kind}") for c in "qkv"])
    unused = ("text_projection", "logit_scale", "transformer.resblocks.23.ln_1.weight")
    return renamed(text, OPENCLIP) | {name: torch.ones(64) for name in unused}


def compvis(pipe):
    """The parameters of a diffusers pipeline under the names of CompVis."""
    if pipe.unet.config.use_linear_projection:  # SD 2
        text = {f"model.{name}": t for name, t in openclip(pipe).items()}
    else:
        text = published_names(pipe.text_encoder) | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
        text = {f"transformer.{name}": t for name, t in text.items()}
    sections = {"model.diffusion_model": compvis_unet(pipe), "first_stage_model": compvis_vae(pipe),
                "cond_stage_model": text}
    state = {f"{prefix}.{name}": t.detach().clone().contiguous() for prefix, tensors in sections.items()
             for name, t in tensors.items()}
    return state | {"alphas_cumprod": torch.ones(1000), "model_ema.decay": torch.tensor(0.9999)}


@pytest.fixture(params=[False, True], ids=["SD 1", "SD 2"])
def single_file(request, pipe, tmp_path):
    """-> the pipeline, its file, and what the file loads to."""
    pipe, file = full_vocabulary_pipeline(sd2=True) if request.param else pipe, tmp_path / "sd.safetensors"
    save_file(compvis(pipe), file)
    prediction = "v_prediction" if request.param else None
    return pipe, file, weights.load(file, tokenizer=TOKENIZER, prediction_type=prediction)


def test_compvis_files_load(single_file):
    pipe, file, sd = single_file
    assert_same(sd, pipe)
    for key, value in vars(sd.unet.config).items():
        ref = pipe.unet.config[key]
        assert value == (tuple(ref) if isinstance(ref, list) else ref), key
    assert sd.scheduler["prediction_type"] == pipe.scheduler.config.prediction_type
    if pipe.unet.config.use_linear_projection:
        refused(r"--prediction epsilon\|v_prediction", weights.load, file, tokenizer=TOKENIZER)
        refused("expected prediction_type epsilon or v_prediction, got x0", weights.load, file, tokenizer=TOKENIZER,
                prediction_type="x0")
        assert sd.tokenizer(["a"])[0, -1] == 0  # pads with "!"
    else:
        refused("sd.safetensors: expected CLIP's vocab.json", weights.load, file)


def test_diffusers_opens_what_we_save(single_file, tmp_path):
    pipe, file, sd = single_file
    folder = tmp_path / "out/sd"
    save(sd, folder)
    assert os.listdir(tmp_path / "out") == ["sd"]
    again = weights.load(folder)
    assert_same(again, pipe, torch.float16)
    assert all(getattr(again, name).config == getattr(sd, name).config for name in weights.NETWORKS)
    assert load_file(folder / "unet" / WEIGHTS)["conv_in.weight"].dtype == torch.float16

    save(sd, folder, torch.float32)
    ref = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    assert_same(sd, ref)
    assert ref.scheduler.config.prediction_type == sd.scheduler["prediction_type"] and ref.safety_checker is None
    x, ids = torch.randn(1, 4, 8, 8), ref.tokenizer("a cat", padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(sd.tokenizer(["a cat"]), ids)
    with torch.no_grad():
        context = sd.text_encoder(ids)[0]
        for saved in ref, pipe:
            assert torch.allclose(context, saved.text_encoder(ids)[0], atol=1e-4)
            assert torch.allclose(sd.unet(x, 9, context), saved.unet(x, 9, context).sample, atol=1e-4)
            assert torch.allclose(sd.vae.decode(x), saved.vae.decode(x / 0.18215).sample, atol=1e-4)
    # diffusers' own loader agrees with the CompVis layout that these tests write
    for cls, name in ((diffusers.UNet2DConditionModel, "unet"), (diffusers.AutoencoderKL, "vae")):
        loaded = cls.from_single_file(str(file), config=str(folder / name)).state_dict()
        assert all(torch.equal(loaded[key], t) for key, t in getattr(pipe, name).state_dict().items())


def test_pickled_checkpoints(pipe, tmp_path, monkeypatch):
    """SD 1's .ckpt has pytorch_lightning's class among its keys. It loads without that library, as do nested ones."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    state = {re.sub("^first_stage_model", "vae", name): t for name, t in compvis(pipe).items()}
    torch.save({"state_dict": {"state_dict": state}, "global_step": 3,
                "callbacks": {module.ModelCheckpoint: {"best_model_score": torch.ones(())}}}, tmp_path / "sd.ckpt")
    monkeypatch.undo()
    shutil.copytree(TOKENIZER, tmp_path / "tokenizer")  # found beside the file
    assert_same(weights.load(tmp_path / "sd.ckpt"), pipe)


def test_ema_weights_are_preferred(pipe, tmp_path):
    state, file = compvis(pipe), tmp_path / "ema.safetensors"
    state |= {"model_ema." + name.removeprefix("model.").replace(".", ""): t + 1
              for name, t in state.items() if name.startswith("model.diffusion_model.")}
    save_file(state, file)
    sd = weights.load(file, tokenizer=TOKENIZER)
    assert torch.equal(sd.unet.conv_in.weight, pipe.unet.conv_in.weight + 1)
    state.pop("model_ema.diffusion_modelinput_blocks00weight")
    save_file(state, file)
    refused("conv_in.weight", weights.load, file, tokenizer=TOKENIZER)


# ── Errors ───────────────────────────────────────────────────────────────────────────────────────────────────────────

class Hostile:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


class Large:
    def __reduce__(self):
        return bytearray, (10**9,)  # torch allows the call


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_execute_nothing(sd_folder, tmp_path, zipped, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ckpt, bin_file = tmp_path / "x.ckpt", sd_folder / "unet/diffusion_pytorch_model.bin"
    torch.save({"state_dict": Hostile()}, ckpt, _use_new_zipfile_serialization=zipped)
    (sd_folder / "unet" / WEIGHTS).unlink()
    shutil.copy(ckpt, bin_file)
    for source, file in ((ckpt, ckpt), (sd_folder, bin_file)):
        message = refused(re.escape(str(file)) + r": expected a file of tensors.*mkdir", weights.load, source)
        assert "weights_only" not in message
    assert not (tmp_path / "pwned").exists()
    torch.save({"a": Large()}, ckpt, _use_new_zipfile_serialization=zipped)
    refused("expected a file of tensors, got one that makes a bytearray", weights.load, ckpt)


@pytest.mark.parametrize("network, key, value", [
    ("unet", "_class_name", "ControlNetModel"), ("unet", "dual_cross_attention", True), ("unet", "freq_shift", 1),
    ("unet", "class_embed_type", "timestep"), ("unet", "resnet_time_scale_shift", "scale_shift"),
    ("unet", "transformer_layers_per_block", [1, 2]), ("unet", "addition_embed_type", "text_time"),
    ("unet", "mid_block_type", "UNetMidBlock2D"), ("unet", "layers_per_block", [1, 1, 1]),
    ("unet", "down_block_types", ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"]),
    ("vae", "_class_name", "AutoencoderTiny"), ("vae", "shift_factor", 0.1), ("vae", "latents_mean", [0.1]),
    ("vae", "use_quant_conv", False), ("vae", "scaling_factor", float("nan")), ("text_encoder", "hidden_act", "relu"),
], ids=str)
def test_other_architectures_are_refused(sd_folder, network, key, value):
    """Values of the wrong type or range are in lab/test_campaign.py."""
    edit_json(sd_folder / network / "config.json", **{key: value})
    assert str(sd_folder) in refused(f"expected .*{key}.* got", weights.load, sd_folder)


@pytest.mark.parametrize("version, size", [("0.6.0", 32), ("0.8.1.dev0", 8), ("0.9.0.dev0", 32), ("0.30.2", 32)])
def test_sample_size_of_old_conversions_is_that_of_diffusers(sd_folder, version, size):
    edit_json(sd_folder / "unet/config.json", sample_size=size, _diffusers_version=version)
    expected = diffusers.StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None).unet.config.sample_size
    with warnings.catch_warnings(record=True) as caught:
        assert weights.load(sd_folder).unet.config.sample_size == expected
    assert [str(warning.message)[-14:] for warning in caught] == ["is taken as 64"] * (expected == 64)


def test_prediction_type_of_the_caller_or_else_of_the_folder(sd_folder):
    for folders, callers in ("sample", "epsilon"), (None, None):
        edit_json(sd_folder / "scheduler/scheduler_config.json", prediction_type=folders)
        assert weights.load(sd_folder, prediction_type=callers).scheduler["prediction_type"] == "epsilon"


def test_other_model_families_are_named(pipe, sd_folder, tmp_path):
    (sd_folder / "text_encoder_2").mkdir()
    (sd_folder / "text_encoder_2/config.json").write_text("{}")
    refused("got an SDXL checkpoint", weights.load, sd_folder)
    refused("expected a file, a folder or a hub name", weights.load, "models/sd.safetensors")
    for name, kind in (("transformer/config.json", "SD3 or Flux"), ("pytorch_lora_weights.safetensors", "a LoRA"),
                       ("config.json", "one network alone"), ("value_encoder/config.json", "value encoder")):
        folder = tmp_path / kind
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("{}")
        refused(kind, weights.load, folder)

    state, first = compvis(pipe), "model.diffusion_model.input_blocks.0.0.weight"
    unsupported = {"conditioner.embedders.0.x": "SDXL", "model.diffusion_model.double_blocks.0.x": "Flux",
                   "lora_unet_mid_block.lora_up.weight": "a LoRA", "control_model.x": "a ControlNet",
                   "text_model.embeddings.position_ids": "a text encoder", "fc.weight": "tensors fc.weight"}
    for tensors, message in [
            *(({name: torch.zeros(1)}, kind) for name, kind in unsupported.items()),
            (state | {first: torch.zeros(32, 9, 3, 3)}, "expected 4 input channels .*inpainting.* got 9"),
            ({name: t for name, t in state.items() if name != first}, "expected the tensor conv_in.weight")]:
        save_file(tensors, tmp_path / "x.safetensors")
        refused(message, weights.load, tmp_path / "x.safetensors", tokenizer=TOKENIZER)


# ── Value encoders ───────────────────────────────────────────────────────────────────────────────────────────────────

def test_value_encoder_files(published, tmp_path):
    mine, model = tmp_path / "mine", weights.load_text_encoder(published / "text_encoder")
    for _ in range(2):  # the next checkpoint replaces the last
        weights.save_text_encoder(model, mine / "value_encoder")
    assert all(name.startswith("text_model.") for name in load_file(mine / "value_encoder/model.safetensors"))
    # training does not write through the mapping into the file
    weights.load_text_encoder(mine).requires_grad_().text_model.final_layer_norm.weight.data.fill_(7)
    for source in (mine, mine / "value_encoder"):
        again = weights.load_text_encoder(source).state_dict()
        assert all(torch.equal(again[name], t) for name, t in model.state_dict().items())
    refused("expected the config.json of a text encoder", weights.load_text_encoder, published)


def test_a_reader_always_finds_a_complete_value_encoder(published, tmp_path):
    value_encoder = weights.load_text_encoder(published / "text_encoder")
    weights.save_text_encoder(value_encoder, tmp_path / "value_encoder")
    writer = threading.Thread(target=lambda: [weights.save_text_encoder(value_encoder, tmp_path / "value_encoder")
                                              for _ in range(30)])
    writer.start()
    reads = 0
    while writer.is_alive():
        weights.load_text_encoder(tmp_path)
        reads += 1
    assert reads > 10 and os.listdir(tmp_path) == ["value_encoder"]


@torch.no_grad()
def test_unpadded_context_is_that_of_the_authors(tmp_path):
    """As in the README of the authors' release: unpadded texts, embeddings passed to diffusers' pipeline."""
    sd, prompt = weights.load(TINY_SD), "a portrait of a doctor"
    ours = load_value_encoder(None, TINY_SD, sd)
    weights.save_text_encoder(ours, tmp_path / "value_encoder")
    ref = transformers.CLIPTextModel.from_pretrained(tmp_path, subfolder="value_encoder")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(TINY_SD, torch_dtype=torch.float32)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    read = partial(pipe.tokenizer, return_tensors="pt")
    value = ref(read(f"{GENDER}, {prompt}").input_ids).pooler_output[:, None]
    context = torch.cat([value, pipe.text_encoder(read(prompt).input_ids)[0]], dim=1)
    empty = pipe.text_encoder(read("", padding="max_length", max_length=context.shape[1]).input_ids)[0]
    assert torch.allclose(unpadded.make_context(sd, [prompt], [GENDER], ours), context, atol=1e-5)
    assert torch.allclose(unpadded.make_uncond(sd, context.shape[1]), empty, atol=1e-5)
    expected = pipe(prompt_embeds=context, negative_prompt_embeds=empty, num_inference_steps=10,
                    generator=torch.Generator().manual_seed(3)).images[0]
    # a fraction of the images is the base model's, with the padded context
    (_, base, none), (_, image, chosen) = sorted(sample.generate(
        sd, prompt, "", [GENDER], ours, [3, 3], fraction=0.5, steps=10, unpadded=True), key=lambda row: row[2])
    assert chosen == (GENDER,) and abs(pixels([image]) - pixels([expected])).max() <= 1
    (_, alone, _), = sample.generate(sd, prompt, "", [], None, [3], steps=10)
    assert none == () and abs(pixels([base]) - pixels([alone])).max() <= 1

    with pytest.warns(match="prompt cut"):
        long = unpadded.make_context(sd, ["very " * 100 + prompt], [GENDER], ours)
    assert long.shape[1] == sd.tokenizer.max_length  # a value token, and a prompt cut to one less that still ends
    end = sd.tokenizer.eos_token_id
    assert unpadded.cut(torch.tensor([[1, 2, 3, end]]), 3, sd.tokenizer).tolist() == [[1, 2, end]]


# ── Saving, the hub (on a local server) ──────────────────────────────────────────────────────────────────────────────

def test_saving_replaces_a_checkpoint_that_is_in_use_and_no_other_folder(published, tmp_path):
    sd = weights.load(published)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/me.png").write_bytes(b"precious")
    refused("expected no such folder", save, sd, tmp_path / "photos")
    assert (tmp_path / "photos/me.png").exists()
    save(sd, tmp_path / "sd")
    reopened = weights.load(tmp_path / "sd", dtype=torch.float16)  # mapped from the files that are then replaced
    save(reopened, tmp_path / "sd")
    assert torch.equal(reopened.unet.conv_in.weight, sd.unet.conv_in.weight.half())
    assert_same(weights.load(tmp_path / "sd", dtype=torch.float16, vae_dtype=torch.float16), reopened)


def test_hub(hub):
    env, requested, server = hub
    sd, text_encoder, missing, no_sd = fetch(
        env, "weights.load('someone/sd')", "weights.load_text_encoder('someone/livo:deep')",
        "weights.load('someone/none')", "weights.load('someone/livo')")
    assert (sd, text_encoder) == ("StableDiffusion", "CLIPTextModel")
    assert missing.startswith("error: someone/none: expected a local path or") and "expected the unet/" in no_sd
    for network, file in (("unet", WEIGHTS), ("text_encoder", "model.safetensors")):
        assert {name for name in requested if name.startswith(f"{network}/")} == \
            {f"{network}/config.json", f"{network}/{file}"}
    assert not any(name.endswith((".bin", ".ckpt", ".msgpack")) or "safety" in name for name in requested)

    server.shutdown()
    server.server_close()
    for offline in ({}, {"HF_HUB_OFFLINE": "1"}):
        sd, missing = fetch(env | offline, "weights.load('someone/sd')", "weights.load('someone/else')")
        assert sd.startswith("StableDiffusion") and "cached copy" in sd and "got neither" in missing


# ── Tokenizers ───────────────────────────────────────────────────────────────────────────────────────────────────────

VOCABULARY = SHARED / "clip-tokenizer"
TEXTS = ["", "!", "wow!! 100% ok!", "Don't we'LL I'Ve 'S", "a  b\t\tc\r\n\n d\x85e", "&amp;amp; &eacute;", "İ ß ﬁ K Å",
         "cafe\u0301 café", "zero\u200bwidth\u200d \ufeff", "日本語 각", "👩‍👩‍👧 🇩🇪", f"cut {EOS} here{EOS}",
         f"{BOS}{BOS} x", "<|ENDOFTEXT|> <|StartOfText|>", "<|endoftext| > </w> a</w> Ġ", "word " * 500,
         "a <cat toy> <CAT \n TOY>"]


def token(content, **flags):
    return {"content": content, "lstrip": False, "rstrip": False, "single_word": False, "normalized": True} | flags


# tokenizer_config.json and special_tokens_map.json of SD 1.x, of SD 2.x, and of a newer folder with a learned token
SPECIAL = {"bos_token": token(BOS), "eos_token": token(EOS), "unk_token": token(EOS)}
FOLDERS = {
    "sd1": ({"pad_token": EOS, "model_max_length": 77, "bos_token": token(BOS, __type="AddedToken")},
            SPECIAL | {"pad_token": EOS}),
    "sd2": ({"pad_token": EOS, "model_max_length": 77}, SPECIAL | {"pad_token": "!"}),
    "learned": ({"added_tokens_decoder": {"49406": token(BOS, special=True), "49407": token(EOS, special=True),
                                          "49408": token("<cat toy>", special=False)},
                 "bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS},
                {"pad_token": "!"}),  # not read where there is an added_tokens_decoder
}


def ids_of(tokenizer, texts):
    if not isinstance(tokenizer, CLIPTokenizer):
        return tokenizer(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    with warnings.catch_warnings(action="ignore"):  # of prompts that are cut
        return tokenizer(texts)


@pytest.mark.skipif(not VOCABULARY.is_dir(), reason="no CLIP vocabulary in ../shared")
@pytest.mark.parametrize("name", FOLDERS)
def test_tokenizer_folders_equal_transformers(tmp_path, name):
    for file in ("vocab.json", "merges.txt"):
        (tmp_path / file).symlink_to(VOCABULARY / file)
    for file, content in zip(("tokenizer_config.json", "special_tokens_map.json"), FOLDERS[name]):
        (tmp_path / file).write_text(json.dumps(content))
    reference, ours = transformers.CLIPTokenizer.from_pretrained(tmp_path), CLIPTokenizer(tmp_path)
    generator = random.Random(0)
    texts = TEXTS + ["".join(generator.choice("aB'ſ İé\u0301\u200d😀漢!<|\t1") for _ in range(40)) for _ in range(100)]
    expected = ids_of(reference, texts)
    assert [text for text, a, b in zip(texts, expected, ids_of(ours, texts)) if not a.equal(b)] == []
    assert ours.pad_token_id == reference.pad_token_id == (0 if name == "sd2" else 49407)
    save_tokenizer(ours, tmp_path / "saved")
    for reopened in (transformers.CLIPTokenizer.from_pretrained(tmp_path / "saved"), CLIPTokenizer(tmp_path / "saved")):
        assert ids_of(reopened, texts).equal(expected)


def test_trained_tokenizers_have_the_ids_of_clip_and_are_reproducible(tmp_path):
    for name in ("first", "again"):
        save_tokenizer(train_tokenizer(iter(["ab Ab ab cd"]), 515), tmp_path / name)
    expected = {"!": 0, "a": 64, "!</w>": 256, "b</w>": 321, "ab</w>": 512, BOS: 513, EOS: 514}
    assert expected.items() <= json.loads((tmp_path / "first/vocab.json").read_text()).items()
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    refused("expected texts that give 600 ids, got 515", train_tokenizer, ["ab"], 600)


def test_tokenizer_json_instead_of_vocab_json(tmp_path):
    reference = transformers.CLIPTokenizer.from_pretrained(TOKENIZER)
    reference.save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists() and reference.model_max_length == 77
    for folder in (TOKENIZER, tmp_path):
        assert ids_of(CLIPTokenizer(folder), TEXTS).equal(ids_of(reference, TEXTS))


@pytest.mark.parametrize("length, n", [(16, 16), (10**30, 77), (None, 77), ("16", 77), (0, 77)])
def test_padding_length_is_that_of_the_tokenizer(sd_folder, length, n):
    edit_json(sd_folder / "tokenizer/tokenizer_config.json", model_max_length=length)
    sd = weights.load(sd_folder)
    assert sd.tokenizer(["a cat", "a"]).shape == (2, n) and sd.text_encoder(sd.tokenizer(["a"]))[0].shape[1] == n


@pytest.mark.parametrize("files, message", [
    ({"special_tokens_map.json": '{"pad_token": "<pad>"}'}, "expected <pad> in the vocabulary"),
    ({"vocab.json": json.dumps({"a": 0, "a</w>": 1, "aa</w>": 2, BOS: 3, EOS: 3}), "merges.txt": "a a</w>"},
     "expected the ids 0 to 4 once each")], ids=str)
def test_unusable_vocabularies(tmp_path, files, message):
    """Damaged files are in lab/test_campaign.py."""
    shutil.copytree(TOKENIZER, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").unlink()  # so that special_tokens_map.json is read
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert str(tmp_path) in refused(message, CLIPTokenizer, tmp_path)


def test_integers_are_no_weights(sd_folder):
    file = sd_folder / "unet/diffusion_pytorch_model.safetensors"
    save_file({name: tensor.to(torch.int8) for name, tensor in load_file(file).items()}, file)
    refused("of no floats", weights.load, sd_folder)
