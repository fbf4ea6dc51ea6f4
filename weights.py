"""Checkpoints: load a Stable Diffusion, load and save a value encoder.

    sd = load("tiny-sd")                                         # a folder in the diffusers layout
    sd = load("stable-diffusion-v1-5/stable-diffusion-v1-5")     # a hub name, fetched once: formats/hub.py
    sd = load("v1-5-pruned-emaonly.safetensors")                 # one CompVis file: formats/compvis.py
    value_encoder = load_text_encoder("adstellaria/LiVO")        # a folder or a hub name

Networks come back frozen. Tensors of the right dtype stay memory-mapped; those of wide networks are copied once, to
channels_last. No file can run code.
"""

import os
from collections import namedtuple
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

import efficiency
from clip_text import CLIPTextModel, CLIPTokenizer
from common import UserError, atomic_folder, regular, write_json
from unet import UNet
from vae import VAE

NETWORKS = {"unet": UNet, "vae": VAE, "text_encoder": CLIPTextModel}
SCHEDULER = dict(  # of a checkpoint that comes without one
    _class_name="DDIMScheduler", num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, clip_sample=False,
    beta_schedule="scaled_linear", set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading")
SubModel = namedtuple("SubModel", "config tensors where")  # a network as read; where: the file, for error messages


@dataclass
class StableDiffusion:
    unet: UNet
    vae: VAE
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: dict  # of scheduler_config.json; prediction_type is always set

    @property
    def size(self):
        """Height and width of the images in training, in pixels."""
        return self.unet.config.sample_size * self.vae.config.factor


def load(source, *, dtype=torch.float32, vae_dtype=None, text_dtype=None, device="cpu", tokenizer=None,
         prediction_type=None):
    """A folder, a CompVis file or a hub name -> StableDiffusion, frozen. Raises UserError.

    dtype: of the UNet and the text encoder; None for the fastest. vae_dtype: the VAE may overflow float16, so by
        default float32, or bfloat16 if dtype is None and that is the fastest. text_dtype: by default the UNet's.
    tokenizer: a folder with CLIP's vocabulary, for a single file that has none beside it.
    prediction_type: "epsilon" or "v_prediction", overrides the folder's; a single SD 2.x file does not specify it.
    """
    from formats import checks  # imported late, as the method does not need it
    device = torch.device(device)

    def pick_dtypes(unet=None):
        fast = dtype or efficiency.fastest_dtype(device, unet)
        full = torch.float32 if dtype or fast == torch.float16 else fast
        return {"unet": fast, "vae": vae_dtype or full, "text_encoder": text_dtype or fast}

    if not (path := local(source)):
        from formats.hub import fetch_sd
        path = fetch_sd(source, pick_dtypes())
    if path.is_dir():
        sub_models, tokenizer, scheduler = read_folder(path, source, pick_dtypes, tokenizer)
    else:
        from formats.compvis import read_single_file
        sub_models, tokenizer, scheduler = *read_single_file(path, tokenizer, prediction_type), SCHEDULER
    prediction = checks.check_fit(sub_models, tokenizer, prediction_type or scheduler.get("prediction_type"), source)
    networks = {name: build(NETWORKS[name], sub_models[name], dtype, device)
                for name, dtype in pick_dtypes(sub_models["unet"].config).items()}
    if networks["unet"].config.block_out_channels[0] >= efficiency.WIDE:
        for name in ("unet", "vae"):
            networks[name].to(memory_format=torch.channels_last)
    if device.type == "cpu":
        efficiency.keep_freed_memory()
    return StableDiffusion(**networks, tokenizer=tokenizer, scheduler={**scheduler, "prediction_type": prediction})


def load_text_encoder(source, *, network=CLIPTextModel, dtype=torch.float32, device="cpu"):
    """A folder or hub name with a text encoder or a value_encoder/ -> `network`, frozen. Raises UserError."""
    from formats.checks import text_encoder_folder
    if not (path := local(source)):
        from formats.hub import fetch_text_encoder
        path = fetch_text_encoder(source, dtype)
    return build(network, read_sub_model(text_encoder_folder(path, source), CLIPTextModel, dtype), dtype, device)


def local(source):
    """The Path of a file or folder of this machine, None for anything else."""
    path = os.path.expanduser(source)
    return Path(path) if os.path.exists(path) else None


def read_folder(path, source, pick_dtypes, tokenizer):
    """A folder in the diffusers layout -> its sub-models, tokenizer and scheduler_config.json."""
    from formats import checks
    from formats.fields import read_scheduler
    checks.check_sd_files(checks.listing(path), source)
    dtypes = pick_dtypes(checks.read_config(path / "unet" / "config.json", UNet))
    sub_models = {name: read_sub_model(path / name, NETWORKS[name], dtypes[name]) for name in NETWORKS}
    file = path / "scheduler" / "scheduler_config.json"
    scheduler = read_scheduler(file) if os.path.lexists(file) else SCHEDULER
    return sub_models, CLIPTokenizer(tokenizer or path / "tokenizer"), scheduler


def read_sub_model(folder, network, dtype):
    """A folder with config.json and weights -> SubModel."""
    from formats.checks import read_config
    config, tensors = read_config(folder / "config.json", network), {}
    files = [name for name in sorted(os.listdir(folder)) if name.endswith((".safetensors", ".bin"))]
    if files not in (["diffusion_pytorch_model.safetensors"], ["model.safetensors"]):  # shards, variants, pickles
        from formats.files import weight_files
        files = weight_files(sorted(os.listdir(folder)), dtype, folder)
    for name in files:
        tensors |= read_tensors(folder / name, dtype)
    return SubModel(config, tensors, folder)


def read_tensors(path, dtype=None):
    """A .safetensors file or a pickle -> {name: memory-mapped tensor}. Nothing in the file is executed.

    dtype: of the network, if known. Other floats are converted here, each in its own mapping, which frees its pages.
    """
    if Path(regular(path, "a file of tensors", float("inf"))).suffix != ".safetensors":
        from formats.files import check_tensors, read_pickle
        return check_tensors(read_pickle(path), path)
    try:
        return {name: safe_open(path, "pt").get_tensor(name).to(dtype)
                if dtype not in (None, tensor.dtype) and tensor.is_floating_point() else tensor
                for name, tensor in load_file(path).items()}
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(f"{path}: expected a file of tensors, got {error!r}") from error


class NoInitialisation(TorchFunctionMode):
    """Skips torch.nn.init, which on the meta device has no effect but costs a second and 140 MB of imports."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) != "torch.nn.init":
            return function(*args, **(kwargs or {}))


def build(network, sub_model, dtype, device):
    """A SubModel -> its network, frozen. Raises UserError unless the tensors are exactly those of the network."""
    config, tensors, where = sub_model
    try:
        with torch.device("meta"), NoInitialisation():  # every tensor is replaced below
            model = network(config)
    except Exception as error:  # constructors raise anything for numbers that do not fit together
        raise UserError(f"{where}: expected a {network.__name__}'s config, got {error!r}") from error
    expected = model.state_dict()
    if {name: t.shape for name, t in tensors.items() if t.is_floating_point()} != {
            name: t.shape for name, t in expected.items()}:
        from formats.files import match_names  # renames the parameters of older versions, or raises
        tensors = match_names(tensors, expected, network, where)
    model.load_state_dict({name: tensors.pop(name).to(device, dtype) for name in expected}, assign=True)
    return model.eval().requires_grad_(False)


def save_text_encoder(model, folder, dtype=torch.float32):
    """Write one text encoder, atomically; transformers' CLIPTextModel opens it too."""
    with atomic_folder(folder, "config.json") as root:
        write_network(model, root, "model", dtype, architectures=["CLIPTextModel"], model_type="clip_text_model")


def write_network(model, folder, stem, dtype, **config):
    write_json(folder / "config.json", asdict(model.config) | config)
    tensors = {name: t.to("cpu", dtype).contiguous() for name, t in model.state_dict().items()}
    save_file(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})
