"""Save a whole Stable Diffusion as a folder that diffusers and transformers open too."""

import json
import shutil
from pathlib import Path

import torch

from common import atomic, atomic_folder, write_json
from formats.checks import FIXED
from formats.vocabulary import TOKEN_FLAGS
from unet import UNet
from vae import VAE
from weights import SCHEDULER, save_text_encoder, write_network


def save(sd, folder, dtype=torch.float16, preset=None):
    """Write the diffusers layout, atomically. preset: path of a livo.toml that is copied into it, if there is one."""
    index = dict(
        _class_name="StableDiffusionPipeline", _diffusers_version="0.20.0", feature_extractor=[None, None],
        requires_safety_checker=False, safety_checker=[None, None],
        scheduler=["diffusers", sd.scheduler.get("_class_name", SCHEDULER["_class_name"])],
        text_encoder=["transformers", "CLIPTextModel"], tokenizer=["transformers", "CLIPTokenizer"],
        unet=["diffusers", "UNet2DConditionModel"], vae=["diffusers", "AutoencoderKL"])
    levels, stem = len(sd.vae.config.block_out_channels), "diffusion_pytorch_model"
    vae = FIXED[VAE] | {"down_block_types": ["DownEncoderBlock2D"] * levels,
                        "up_block_types": ["UpDecoderBlock2D"] * levels}
    with atomic_folder(folder, "model_index.json") as root:
        write_json(root / "model_index.json", index)
        write_json(root / "scheduler" / "scheduler_config.json", sd.scheduler)
        save_tokenizer(sd.tokenizer, root / "tokenizer")
        write_network(sd.unet, root / "unet", stem, dtype, **FIXED[UNet])
        write_network(sd.vae, root / "vae", stem, dtype, **vae)
        save_text_encoder(sd.text_encoder, root / "text_encoder", dtype)
        if preset and preset.is_file():  # it may lie in the folder that is replaced
            shutil.copy(preset, root / "livo.toml")


def save_tokenizer(tokenizer, folder):
    """Write vocab.json, merges.txt and the names of the special tokens, as transformers reads them."""
    model = json.loads(tokenizer.backend.to_str())["model"]
    added = {key: {flag: getattr(token, flag) for flag in TOKEN_FLAGS}
             for key, token in sorted(tokenizer.backend.get_added_tokens_decoder().items())}
    config = {**tokenizer.special_tokens, "added_tokens_decoder": added, "model_max_length": tokenizer.max_length,
              "tokenizer_class": "CLIPTokenizer"}
    for name, content in {
        "vocab.json": json.dumps(model["vocab"], ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in model["merges"]),
        "tokenizer_config.json": json.dumps(config, indent=2),
        "special_tokens_map.json": json.dumps(tokenizer.special_tokens, indent=2),
    }.items():
        with atomic(Path(folder) / name) as path:
            path.write_text(content, encoding="utf-8")
