"""Checkpoints: one string in, the networks of a Stable Diffusion out, and back to a folder.

    sd = load("stable-diffusion-v1-5/stable-diffusion-v1-5")     # a hub name, fetched once and then cached
    sd = load("models/sd15")                                     # a folder in the diffusers layout
    sd = load("v1-5-pruned-emaonly.safetensors")                 # one CompVis file, safetensors or ckpt
    livo = load_text_encoder("adstellaria/LiVO")                 # a value encoder
    save(sd, "models/mine")                                      # diffusers and transformers open this too

The networks come back frozen, on memory-mapped tensors: what already has the right dtype is never copied.
Every complaint is a UserError that names the file. No file can run code. Sources of the facts about the
formats: the published files themselves, and the loaders of diffusers and CompVis/stable-diffusion.
"""

import os
import re
import warnings
import zipfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

from formats import compvis
from common import UserError, atomic_folder, keep_freed_memory, read_json, write_json
from clip_text import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from formats.compvis import renamed
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

# config.json keys for which the networks here have one value built in. Another value is another network.
UNET_FIXED = dict(
    _class_name="UNet2DConditionModel", act_fn="silu", addition_embed_type=None, attention_type="default",
    center_input_sample=False, class_embed_type=None, class_embeddings_concat=False, conv_in_kernel=3,
    conv_out_kernel=3, cross_attention_norm=None, downsample_padding=1, dual_cross_attention=False,
    encoder_hid_dim=None, encoder_hid_dim_type=None, flip_sin_to_cos=True, freq_shift=0,
    mid_block_only_cross_attention=None, mid_block_scale_factor=1, mid_block_type="UNetMidBlock2DCrossAttn",
    num_attention_heads=None, num_class_embeds=None, only_cross_attention=False, resnet_out_scale_factor=1,
    resnet_skip_time_act=False, resnet_time_scale_shift="default", reverse_transformer_layers_per_block=None,
    time_cond_proj_dim=None, time_embedding_act_fn=None, time_embedding_dim=None,
    time_embedding_type="positional", timestep_post_act=None, transformer_layers_per_block=1,
)
VAE_FIXED = dict(
    _class_name="AutoencoderKL", act_fn="silu", latents_mean=None, latents_std=None,
    mid_block_add_attention=True, shift_factor=None, use_post_quant_conv=True, use_quant_conv=True,
)
BLOCK_TYPES = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D",
               "DownEncoderBlock2D", "UpDecoderBlock2D"}
SCHEDULER = dict(
    _class_name="DDIMScheduler", num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012,
    beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    timestep_spacing="leading",
)
PREDICTIONS = ("epsilon", "v_prediction")
# Channels from which on a UNet gains from bfloat16 on a CPU, 1.15 times at 160 but 0.7 times at tiny-sd's 64, and from
# having the channels of a pixel side by side in memory, in any precision: 1.07 times in float32 at 320.
WIDE = 160


@dataclass
class StableDiffusion:
    unet: UNet
    vae: VAE
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: dict  # of scheduler_config.json; its prediction_type is always there

    @property
    def size(self):
        """Of the pictures that it was trained at, in pixels."""
        return self.unet.config.sample_size * self.vae.config.factor


def load(source, *, dtype=torch.float32, vae_dtype=None, device="cpu", tokenizer=None, prediction_type=None):
    """A folder, a file or a hub name -> StableDiffusion, frozen.

    dtype: of the UNet and the text encoder; None for the fastest.
    vae_dtype: float32, if left out, or the fastest too where that is bfloat16; its numbers overflow float16.
    tokenizer: a folder with CLIP's vocabulary, needed where a single file has none beside it.
    prediction_type: "epsilon" or "v_prediction", overrides the folder's; a single SD 2.x file cannot tell.
    """
    if prediction_type not in (None, *PREDICTIONS):
        raise UserError(f"prediction type: expected {' or '.join(PREDICTIONS)}, got {prediction_type}")
    device = torch.device(device)

    def choose_dtypes(unet=None):
        fast = dtype or fastest_dtype(device, unet)
        vae = vae_dtype or (fast if dtype is None and fast == torch.bfloat16 else torch.float32)
        return {"unet": fast, "vae": vae, "text_encoder": fast}

    path = locate(source, lambda names: sd_files(names, choose_dtypes(), source), ["unet/config.json"])
    if path.is_dir():
        check_sd_folder(listing(path), source)
        dtypes = choose_dtypes(read_config(path / "unet" / "config.json", UNet))
        file = path / "scheduler" / "scheduler_config.json"
        scheduler = read_json(file) if file.exists() else SCHEDULER
        parts = {name: read_network(path / name, NETWORKS[name], dtypes[name]) for name in NETWORKS}
        words = CLIPTokenizer(tokenizer or path / "tokenizer")
    else:
        scheduler = SCHEDULER
        parts = read_single_file(path, prediction_type)
        dtypes = choose_dtypes(parts["unet"].config)
        words = CLIPTokenizer(tokenizer or vocabulary_beside(path))
        if parts["unet"].config.use_linear_projection:
            words.pad_token_id, words.special_tokens["pad_token"] = 0, "!"  # what SD 2.x was trained with

    unet, vae, text = (parts[name].config for name in NETWORKS)
    prediction_type = prediction_type or scheduler.get("prediction_type")
    if not prediction_type and unet.use_linear_projection:
        raise UserError(f"{source}: expected to be told what this SD 2.x checkpoint predicts, got "
                        f"nothing; pass --prediction {'|'.join(PREDICTIONS)}")
    prediction_type = prediction_type or "epsilon"
    for what, got, expected in [
        ("input channels in the UNet (inpainting, depth and upscaling models have more)",
         unet.in_channels, vae.latent_channels),
        ("output channels in the UNet", unet.out_channels, vae.latent_channels),
        ("text channels in the UNet, as in the text encoder", unet.cross_attention_dim, text.hidden_size),
    ]:
        if got != expected:
            raise UserError(f"{source}: expected {expected} {what}, got {got}")
    if prediction_type not in PREDICTIONS:
        raise UserError(f"{source}: expected prediction_type {' or '.join(PREDICTIONS)}, "
                        f"got {prediction_type}")
    fit_to_tokenizer(text, words, source)
    networks = {name: build(NETWORKS[name], parts[name], dtypes[name], device) for name in NETWORKS}
    if unet.block_out_channels[0] >= WIDE:
        for name in ("unet", "vae"):
            networks[name].to(memory_format=torch.channels_last)
    if device.type == "cpu":
        keep_freed_memory()
    return StableDiffusion(**networks, tokenizer=words,
                           scheduler={**scheduler, "prediction_type": prediction_type})


def fastest_dtype(device, unet=None):
    """In which a device draws fastest: float16 on a GPU; on a CPU with instructions for it bfloat16, if the UNet, of
    this config, is wide enough to gain; else float32."""
    if device.type == "cuda":
        return torch.float16
    cpu = torch.cpu.get_capabilities()
    able = device.type == "cpu" and (cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
    return torch.bfloat16 if able and (unet is None or unet.block_out_channels[0] >= WIDE) else torch.float32


def fit_to_tokenizer(config, tokenizer, source):
    """Give a CLIPTextConfig the tokenizer's end of text. Raises UserError where it has too few tokens for it."""
    if (ids := tokenizer.backend.get_vocab_size()) > config.vocab_size:
        raise UserError(f"{source}: expected at most {config.vocab_size} tokens in the tokenizer, as in the text "
                        f"encoder, got {ids}")
    config.eos_token_id = tokenizer.eos_token_id  # config.json is not to be trusted with it


def load_text_encoder(source, *, network=CLIPTextModel, dtype=torch.float32, device="cpu"):
    """A folder or hub name holding a text encoder or a value_encoder/ -> `network`, frozen."""

    def place(names):
        for prefix in ("value_encoder/", ""):
            if prefix + "config.json" in names:
                return prefix
        raise UserError(f"{source}: expected the config.json of a text encoder, or a value_encoder/, "
                        f"got {describe(names)}")

    def wanted(names):
        prefix = place(names)
        return [prefix + name for name in ["config.json", *weight_files(under(prefix, names), dtype, source)]]

    path = locate(source, wanted, ["config.json", "value_encoder/config.json"])
    if not path.is_dir():
        raise UserError(f"{path}: expected the folder of a text encoder, got a file")
    part = read_network(path / place(listing(path)), CLIPTextModel, dtype)
    return build(network, part, dtype, device)


# ── finding: a string to a local path, a folder to its weight files ─────────────────────────────────────────

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w./-]+)?")
FILE_SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")
WEIGHT_FILE = re.compile(  # with the two places that versions of diffusers gave a shard's variant
    r"(?:diffusion_pytorch_model|pytorch_model|model)"
    r"(?:\.(?P<variant>\w+))?(?:-\d+-of-(?P<shards>\d+))?(?:\.(?P<late_variant>\w+))?"
    r"\.(?P<format>safetensors|bin)"
)
SIGNS = {  # what gives another kind of folder away
    "transformer/": "an SD3 or Flux checkpoint",
    "text_encoder_2/": "an SDXL checkpoint",
    "pytorch_lora_weights": "a LoRA",
    "adapter_config.json": "a LoRA",
    "value_encoder/": "a LiVO value encoder",
    "config.json": "one network alone (a value encoder? a ControlNet?)",
}


def locate(source, wanted, markers):
    """A local path, or a hub name `owner/name` or `owner/name:folder` -> a local Path.

    wanted: chooses the files to fetch among a repository's. markers: a cached copy holds one of these.
    """
    source = str(source)
    path = os.path.expanduser(source)
    if os.path.exists(path):
        return Path(path)
    if not HUB_NAME.fullmatch(source) or source.endswith(FILE_SUFFIXES):
        raise UserError(f"{source}: expected a file, a folder or a hub name (owner/name), got nothing there")

    # Slow to import, and the only door to the network.
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache

    repository, _, folder = source.partition(":")
    prefix = folder.strip("/") + "/" if folder else ""
    try:
        names = under(prefix, [file.rfilename for file in HfApi().model_info(repository).siblings])
        chosen = [prefix + name for name in wanted(names)]
        return Path(snapshot_download(repository, allow_patterns=chosen), prefix)
    except UserError:
        raise
    except Exception as error:  # the classes of connection errors change with huggingface_hub's HTTP library
        if type(error).__name__ == "HFValidationError":
            raise UserError(f"{source}: expected a file, a folder or a hub name, got none: {error}") from error
        for marker in markers:
            if isinstance(cached := try_to_load_from_cache(repository, prefix + marker), str):
                warnings.warn(f"{source}: using the cached copy, the hub gave {type(error).__name__}")
                return Path(cached.removesuffix(marker))
        raise UserError(f"{source}: expected a local path or a repository of the hub, got neither "
                        f"({type(error).__name__}: {error})") from error


def listing(folder):
    """The files of a folder and of its folders, as a repository lists them: `unet/config.json`."""
    return [p.relative_to(folder).as_posix() for p in [*folder.glob("*"), *folder.glob("*/*")] if p.is_file()]


def under(prefix, names):
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def describe(names):
    """What a folder of these files seems to be, for an error."""
    kinds = [kind for sign, kind in SIGNS.items() if under(sign, names)]
    return kinds[0] if kinds else ", ".join(sorted(names)[:5]) or "no files"


def check_sd_folder(names, source):
    if not under("unet/", names) or under("text_encoder_2/", names):
        raise UserError(f"{source}: expected the unet/, vae/, text_encoder/ and tokenizer/ of Stable "
                        f"Diffusion 1.x or 2.x, got {describe(names)}")


def sd_files(names, dtypes, source):
    """Of a repository's files those to fetch: every network once, and no safety checker."""
    check_sd_folder(names, source)
    files = [name for name in names if name.startswith(("tokenizer/", "scheduler/"))]
    for network, dtype in dtypes.items():
        weights = weight_files(under(f"{network}/", names), dtype, f"{source} {network}/")
        files += [f"{network}/{name}" for name in ["config.json", *weights]]
    return files


def weight_files(names, dtype, where):
    """Of a folder's files, those that make up one network: a single one, or all its shards.

    safetensors before bin; then, for float16, the fp16 variant before the full one, otherwise the full one
    before fp16; other variants (non_ema) last."""
    found = {}
    for name in names:
        if match := WEIGHT_FILE.fullmatch(name):
            variant = match["variant"] or match["late_variant"] or "full"
            found.setdefault((match["format"], variant, int(match["shards"] or 1)), []).append(name)
    if not found:
        got = ", ".join(names[:5]) or "no files"
        raise UserError(f"{where}: expected weights (.safetensors or .bin), got {got}")
    order = ["fp16", "full"] if dtype == torch.float16 else ["full", "fp16"]
    best = min(found, key=lambda key: (key[0] == "bin", (order + [key[1]]).index(key[1]), key[2]))
    if len(found[best]) != best[2]:
        raise UserError(f"{where}: expected {best[2]} shards like {found[best][0]}, got {len(found[best])}")
    return found[best]


def vocabulary_beside(file):
    for folder in (file.parent / "tokenizer", file.parent):
        if (folder / "vocab.json").exists() or (folder / "tokenizer.json").exists():
            return folder
    raise UserError(f"{file}: expected CLIP's vocab.json and merges.txt in a tokenizer/ beside it, got none; "
                    f"pass --tokenizer with a folder that has them, such as that of any Stable Diffusion repository")


# ── reading: files to a config and tensors ──────────────────────────────────────────────────────────────────

NETWORKS = {"unet": UNet, "vae": VAE, "text_encoder": CLIPTextModel}


@dataclass
class Part:
    """One network as read: what `build` needs."""

    config: UNetConfig | VAEConfig | CLIPTextConfig
    tensors: dict  # name -> tensor
    where: Path  # for errors


class ModelCheckpoint:
    """Stands for pytorch_lightning's class of this name, which SD 1.x's .ckpt files mention. Does nothing."""


def read_tensors(path, dtype=None):
    """A .safetensors file or a pickle -> {name: memory-mapped tensor}. Nothing in the file is executed.

    dtype: what they are going to be, if it is known. Tensors of another one are converted here, each through a mapping
    of its own: as long as one of a mapping is in use, all that was read of it stays in memory.
    """
    path = Path(path)
    stub = (ModelCheckpoint, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            return {name: tensor if dtype in (None, tensor.dtype) else safe_open(path, "pt").get_tensor(name).to(dtype)
                    for name, tensor in tensors.items()}
        with torch.serialization.safe_globals([stub]), warnings.catch_warnings(action="ignore"):
            # files from before torch 1.6 are no zip archives, and cannot be mapped
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        while "state_dict" in tensors:  # twice, in some files
            tensors = tensors["state_dict"]
        return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
    except Exception as error:  # a damaged pickle can raise anything
        # torch wraps a refusal in the advice to allow everything; the refusal itself is the context
        reason = error.__context__ or error
        raise UserError(f"{path}: expected a file of tensors, got {reason!r}") from error


def read_config(path, network):
    """config.json -> the config of a UNet, VAE or CLIPTextModel. Raises UserError for any other."""
    config = read_json(path)
    if network is CLIPTextModel:
        try:
            return CLIPTextConfig.from_dict(config)
        except (UserError, TypeError) as error:
            raise UserError(f"{path}: expected the config of a text encoder, got: {error}") from error
    fixed = UNET_FIXED if network is UNet else VAE_FIXED
    wrong = [key for key, only in fixed.items() if (config.get(key, only) or None) != (only or None)]
    wrong = [f"{key} {fixed[key]!r}, got {config[key]!r}" for key in wrong]
    for key in ("down_block_types", "up_block_types"):
        kinds = config.get(key, [])
        if not isinstance(kinds, list) or not all(str(kind) in BLOCK_TYPES for kind in kinds):
            wrong.append(f"{key} with or without CrossAttn, got {kinds}")
    if wrong:
        raise UserError(f"{path}: expected {'; '.join(wrong[:3])}")
    cls = UNetConfig if network is UNet else VAEConfig
    values = {field.name: config[field.name] for field in fields(cls) if field.name in config}
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def read_network(folder, network, dtype):
    """A folder with config.json and weights in the diffusers or transformers layout -> Part."""
    config = read_config(folder / "config.json", network)
    tensors = {}
    for name in weight_files(sorted(os.listdir(folder)), dtype, folder):
        tensors |= read_tensors(folder / name, dtype)
    return Part(config, standard(network, tensors), folder)


def standard(network, tensors):
    """The tensors of any published spelling under today's names, and without what is no weight."""
    if network is VAE:
        tensors = renamed(tensors, VAE_ATTENTION_NAMES)
        # 1×1 convolutions (C, C, 1, 1) in older files
        return {name: t.flatten(1) if "attentions" in name and t.ndim > 2 else t
                for name, t in tensors.items()}
    if network is CLIPTextModel:
        names = {name: f"text_model.{name.removeprefix('text_model.')}" for name in tensors}
        return {names[name]: t for name, t in tensors.items() if not name.endswith("embeddings.position_ids")}
    return tensors


VAE_ATTENTION_NAMES = [  # CompVis says q and proj_out, older diffusers query and proj_attn
    (r"(attentions\.0)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.0)\.([qkv])(uery|ey|alue)?\.", r"\1.to_\2."),
    (r"(attentions\.0)\.proj_(out|attn)\.", r"\1.to_out.0."),
]


FOREIGN = {  # names of tensors that give another kind of file away
    r"^conditioner\.": "an SDXL checkpoint",
    r"double_blocks\.": "a Flux checkpoint",
    r"joint_blocks\.": "an SD3 checkpoint",
    r"^control_model\.": "a ControlNet",
    r"lora": "a LoRA",
    r"^text_model\.": "a text encoder alone",
    r"^(down_blocks|encoder)\.": "a UNet or VAE alone",
}


def read_single_file(path, prediction_type):
    """A CompVis file -> {name of a network: Part}, configured as the shapes of the tensors tell.

    Where it has averaged (EMA) weights of the UNet, those: they are the better ones to sample with.
    """
    tensors = read_tensors(path)

    def section(prefix):
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    unet, averaged = section("model.diffusion_model."), section("model_ema.diffusion_model")
    vae = section("first_stage_model.") or section("vae.")
    clip, openclip = section("cond_stage_model.transformer."), section("cond_stage_model.model.")
    foreign = [kind for sign, kind in FOREIGN.items() if any(re.search(sign, name) for name in tensors)]
    if foreign or not (unet and vae and (clip or openclip)):
        got = foreign[0] if foreign else f"the tensors {', '.join([*tensors][:3]) or '(none)'}"
        raise UserError(f"{path}: expected the UNet, VAE and text encoder of Stable Diffusion 1.x or 2.x, "
                        f"got {got}")
    if averaged:  # their names have lost all their dots
        unet = {name: averaged[name.replace(".", "")] for name in unet if name.replace(".", "") in averaged}
    try:
        parts = {
            "unet": compvis.read_unet(unet, prediction_type),
            "vae": compvis.read_vae(vae),
            "text_encoder": compvis.read_openclip(openclip) if openclip else compvis.read_clip(clip),
        }
    except KeyError as error:
        raise UserError(f"{path}: expected the tensor {error.args[0]}, got none") from error
    return {name: Part(config, standard(NETWORKS[name], tensors), path)
            for name, (config, tensors) in parts.items()}


# ── building: a config and tensors to a network ─────────────────────────────────────────────────────────────


class NoInitialisation(TorchFunctionMode):
    """Skips torch.nn.init. On the meta device that fills nothing, yet costs a second and 70 MB of imports."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) != "torch.nn.init":
            return function(*args, **(kwargs or {}))


def build(network, part, dtype, device):
    """A Part -> its network, frozen. Raises UserError unless the tensors are exactly the network's."""
    try:
        with torch.device("meta"), NoInitialisation():  # every tensor is about to be replaced
            model = network(part.config)
    except Exception as error:  # whatever a constructor makes of numbers that do not fit group_size
        raise UserError(f"{part.where}: expected a {network.__name__}'s config, got {error!r}") from error
    expected, tensors = model.state_dict(), part.tensors
    wrong = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "of another shape": [
            f"{name} {tuple(tensors[name].shape)} for {tuple(expected[name].shape)}"
            for name in expected if name in tensors and tensors[name].shape != expected[name].shape
        ],
    }
    if any(wrong.values()):
        got = "; ".join(f"{len(some)} {how}: {', '.join(some[:3])}" for how, some in wrong.items() if some)
        raise UserError(f"{part.where}: expected the {len(expected)} tensors of a {network.__name__}, "
                        f"got {got}")
    model.load_state_dict({name: tensors.pop(name).to(device, dtype) for name in expected}, assign=True)
    return model.eval().requires_grad_(False)


# ── saving ──────────────────────────────────────────────────────────────────────────────────────────────────


def save(sd, folder, dtype=torch.float16):
    """Write the diffusers layout, whole or not at all; diffusers' StableDiffusionPipeline opens it too."""
    index = dict(
        _class_name="StableDiffusionPipeline", _diffusers_version="0.20.0", feature_extractor=[None, None],
        requires_safety_checker=False, safety_checker=[None, None],
        scheduler=["diffusers", sd.scheduler.get("_class_name", SCHEDULER["_class_name"])],
        text_encoder=["transformers", "CLIPTextModel"], tokenizer=["transformers", "CLIPTokenizer"],
        unet=["diffusers", "UNet2DConditionModel"], vae=["diffusers", "AutoencoderKL"],
    )
    with atomic_folder(folder, "model_index.json") as root:
        write_json(root / "model_index.json", index)
        write_json(root / "scheduler" / "scheduler_config.json", sd.scheduler)
        sd.tokenizer.save(root / "tokenizer")
        for network in NETWORKS:
            write_network(getattr(sd, network), root / network, dtype)


def save_text_encoder(model, folder, dtype=torch.float32):
    """Write one text encoder, whole or not at all; transformers' CLIPTextModel opens it too."""
    with atomic_folder(folder, "config.json") as root:
        write_network(model, root, dtype)


def write_network(model, folder, dtype):
    stem, config = "diffusion_pytorch_model", asdict(model.config)
    if isinstance(model, CLIPTextModel):
        stem = "model"
        config |= {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
    elif isinstance(model, VAE):
        levels = len(model.config.block_out_channels)
        config |= VAE_FIXED | {"down_block_types": ["DownEncoderBlock2D"] * levels,
                               "up_block_types": ["UpDecoderBlock2D"] * levels}
    else:
        config |= UNET_FIXED
    write_json(folder / "config.json", config)
    tensors = {name: t.to("cpu", dtype).contiguous() for name, t in model.state_dict().items()}
    save_file(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})
