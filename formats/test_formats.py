
import os
import re
import shutil
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import torch

import diffusers
import pytest
import transformers
from safetensors.torch import load_file, save_file

import sample
import weights
from retrieve import GENDER
from conftest import TOKENIZER, edit_json, fetch, pixels, refused


# ── weights.py, compvis.py ─────────────────────────────────────────────────────────────────────────────────────


def text_keys(model):
    return {f"text_model.{name.removeprefix('text_model.')}": t for name, t in model.state_dict().items()
            if not name.endswith("position_ids")}


def assert_same(sd, pipe, dtype=torch.float32):
    for ours, theirs in ((sd.unet.state_dict(), pipe.unet.state_dict()), (sd.vae.state_dict(), pipe.vae.state_dict()),
                         (sd.text_encoder.state_dict(), text_keys(pipe.text_encoder))):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name].to(dtype).to(ours[name].dtype)), name


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
    (_, image, chosen), = sample.generate(sd, prompt, "", [GENDER], ours, [3], steps=10, unpadded=True)
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
