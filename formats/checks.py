"""Is it a Stable Diffusion 1.x or 2.x? Checks of a folder's files, of its config.json, and that its sub-models fit."""

import re
import warnings
from dataclasses import fields

from clip_text import ACTIVATIONS, CLIPTextConfig, CLIPTextModel
from common import UserError, read_json
from formats.fields import pick_fields
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

# Keys of config.json for which the networks here support one value only.
FIXED = {UNet: dict(
    _class_name="UNet2DConditionModel", act_fn="silu", addition_embed_type=None, attention_type="default",
    center_input_sample=False, class_embed_type=None, class_embeddings_concat=False, conv_in_kernel=3,
    conv_out_kernel=3, cross_attention_norm=None, downsample_padding=1, dual_cross_attention=False,
    encoder_hid_dim=None, encoder_hid_dim_type=None, flip_sin_to_cos=True, freq_shift=0,
    mid_block_only_cross_attention=None, mid_block_scale_factor=1,
    num_attention_heads=None, num_class_embeds=None, only_cross_attention=False, resnet_out_scale_factor=1,
    resnet_skip_time_act=False, resnet_time_scale_shift="default", reverse_transformer_layers_per_block=None,
    time_cond_proj_dim=None, time_embedding_act_fn=None, time_embedding_dim=None, time_embedding_type="positional",
    timestep_post_act=None, transformer_layers_per_block=1,
), VAE: dict(
    _class_name="AutoencoderKL", act_fn="silu", latents_mean=None, latents_std=None, mid_block_add_attention=True,
    shift_factor=None, use_post_quant_conv=True, use_quant_conv=True)}
BLOCK_TYPES = ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "DownEncoderBlock2D",
               "UpDecoderBlock2D")
MAX_SIZE = 2048  # height and width of an image in pixels, which only a damaged config exceeds
MID_BLOCK_TYPES = ("UNetMidBlock2DCrossAttn", None)
PREDICTIONS = ("epsilon", "v_prediction")
SCHEDULER = {  # options of scheduler_config.json and the values that diffusion.py supports
    "beta_schedule": ("linear", "scaled_linear"), "prediction_type": PREDICTIONS,
    "timestep_spacing": ("leading", "linspace", "trailing"), "trained_betas": (None,),
    "rescale_betas_zero_snr": (None, False), "thresholding": (None, False)}
SCHEDULER_DPM = dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas",
                               "use_flow_sigmas"), (None, False)) | {  # read for DPM-Solver++ alone
    "algorithm_type": (None, "dpmsolver++"), "solver_order": (None, 2), "solver_type": (None, "midpoint"),
    "final_sigmas_type": (None, "zero")}
SIGNS = {  # the start of a file's name -> what the folder is instead
    "transformer/": "an SD3 or Flux checkpoint",
    "text_encoder_2/": "an SDXL checkpoint",
    "pytorch_lora_weights": "a LoRA",
    "adapter_config.json": "a LoRA",
    "value_encoder/": "a LiVO value encoder",
    "config.json": "one network alone (a value encoder? a ControlNet?)"}


def listing(folder):
    """The files of a folder and of its folders, as a hub repository lists them: `unet/config.json`."""
    paths = [*folder.glob("*"), *folder.glob("[!.]*/*")]  # a hidden folder, which is being written, may vanish
    return [path.relative_to(folder).as_posix() for path in paths if path.is_file()]


def under(prefix, names):
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def describe(names):
    """What a folder of these files seems to be, for an error message."""
    kinds = [kind for sign, kind in SIGNS.items() if under(sign, names)]
    return kinds[0] if kinds else ", ".join(sorted(names)[:5]) or "no files"


def check_sd_files(names, source):
    if not under("unet/", names) or under("text_encoder_2/", names):
        raise UserError(f"{source}: expected the unet/, vae/, text_encoder/ and tokenizer/ of Stable Diffusion 1.x or "
                        f"2.x, got {describe(names)}")


def text_encoder_prefix(names, source):
    """Of the files of a folder -> where its text encoder is: "value_encoder/" or ""."""
    for prefix in ("value_encoder/", ""):
        if prefix + "config.json" in names:
            return prefix
    raise UserError(f"{source}: expected the config.json of a text encoder, or a value_encoder/, got {describe(names)}")


def text_encoder_folder(path, source):
    if not path.is_dir():
        raise UserError(f"{path}: expected the folder of a text encoder, got a file")
    names = [name for name in ("value_encoder/config.json", "config.json") if (path / name).is_file()]
    return path / text_encoder_prefix(names or listing(path), source)  # a listing takes longer than a swap of folders


def text_config(config, where):
    """The dictionary in a text encoder's config.json -> CLIPTextConfig. Raises UserError if it is unsupported."""
    if config.get("model_type", "clip_text_model") != "clip_text_model":
        raise UserError(f"{where}: expected model_type clip_text_model, got {config['model_type']}")
    if missing := [field.name for field in fields(CLIPTextConfig) if field.name not in config]:
        raise UserError(f"{where}: expected {', '.join(missing)}, as a text encoder's config has them, got none")
    config = pick_fields(CLIPTextConfig, config, where)
    if config.hidden_act not in ACTIVATIONS:
        raise UserError(f"{where}: expected hidden_act {' or '.join(ACTIVATIONS)}, got {config.hidden_act}")
    if config.eos_token_id == 2:
        # Published files of SD say 2, the id of "#". The end of text is CLIP's 49407, or a small vocabulary's last.
        config.eos_token_id = min(49407, config.vocab_size - 1)
    return config


def read_config(path, network):
    """config.json -> the config of a UNet, VAE or CLIPTextModel. Raises UserError for any other."""
    config = read_json(path)
    if network is CLIPTextModel:
        return text_config(config, path)
    # None, False, 0 and a missing key are the same.
    wrong = [f"{key} {only!r}, got {config[key]!r}" for key, only in FIXED[network].items()
             if (config.get(key, only) or None) != (only or None)]
    for key in ("down_block_types", "up_block_types"):
        kinds = config.get(key, [])
        if not isinstance(kinds, list) or any(kind not in BLOCK_TYPES for kind in kinds):
            wrong.append(f"{key} with or without CrossAttn, got {kinds}")
    if (kind := config.get("mid_block_type")) not in MID_BLOCK_TYPES:
        wrong.append(f"mid_block_type {' or '.join(map(str, MID_BLOCK_TYPES))}, got {kind!r}")
    if wrong:
        raise UserError(f"{path}: expected {'; '.join(wrong[:3])}")
    cls, version = UNetConfig if network is UNet else VAEConfig, str(config.get("_diffusers_version"))
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    config |= {field.name: False for field in fields(cls) if field.type is bool and config.get(field.name) is None}
    config = pick_fields(cls, config, path)
    # Before 0.9 the conversion script of diffusers wrote sample_size 32 for models of 64. Its pipeline takes 64.
    if network is UNet and re.match(r"0\.[0-8](?!\d)", version) and config.sample_size < 64:
        warnings.warn(f"{path}: sample_size {config.sample_size} of diffusers {version:.20} is taken as 64")
        config.sample_size = 64
    return config


def check_scheduler(config, supported=SCHEDULER):
    """Raise UserError for an option of scheduler_config.json that is not supported."""
    for key, values in supported.items():
        if key in config and config[key] not in values:
            raise UserError(f"scheduler_config.json: expected {key} {' or '.join(map(str, values))}, got {config[key]}")


def check_fit(sub_models, tokenizer, prediction_type, source):
    """-> the prediction type. Raises UserError where it is unknown, or where the sub-models do not fit together."""
    unet, vae, text = (sub_models[name].config for name in ("unet", "vae", "text_encoder"))
    if not prediction_type and unet.use_linear_projection:
        raise UserError(f"{source}: expected to be told what this SD 2.x checkpoint predicts, got nothing; "
                        f"pass --prediction {'|'.join(PREDICTIONS)}")
    for what, got, expected in [
        ("input channels in the UNet (inpainting, depth and upscaling models have more)",
         unet.in_channels, vae.latent_channels),
        ("color channels in the images of the VAE", max(vae.in_channels, vae.out_channels), 3),
        ("output channels in the UNet", unet.out_channels, vae.latent_channels),
        ("text channels in the UNet, as in the text encoder", unet.cross_attention_dim, text.hidden_size),
    ]:
        if got != expected:
            raise UserError(f"{source}: expected {expected} {what}, got {got}")
    if (size := unet.sample_size * vae.factor) > MAX_SIZE:
        raise UserError(f"{source}: expected images of at most {MAX_SIZE} pixels, got {size}")
    if prediction_type not in (None, *PREDICTIONS):
        raise UserError(f"{source}: expected prediction_type {' or '.join(PREDICTIONS)}, got {prediction_type}")
    fit_to_tokenizer(text, tokenizer, source)
    return prediction_type or "epsilon"


def check_value_encoder(config, sd, source):
    """Raise UserError for a value encoder's CLIPTextConfig that does not fit the model. Sets its end-of-text id."""
    for key in ("hidden_size", "vocab_size", "max_position_embeddings"):
        got, expected = getattr(config, key), getattr(sd.text_encoder.config, key)
        if got != expected:
            raise UserError(f"{source}: expected a value encoder for this model, with {key} {expected}, got {got}")
    config.eos_token_id = sd.tokenizer.eos_token_id


def fit_to_tokenizer(config, tokenizer, source):
    """Give a CLIPTextConfig the tokenizer's end-of-text id. Raises UserError where the tokenizer does not fit it."""
    if (ids := tokenizer.backend.get_vocab_size()) > config.vocab_size:
        raise UserError(f"{source}: expected at most {config.vocab_size} tokens in the tokenizer, as in the text "
                        f"encoder, got {ids}")
    if (length := tokenizer.max_length) > config.max_position_embeddings:
        raise UserError(f"{source}: expected a tokenizer length of at most {config.max_position_embeddings}, the text "
                        f"encoder's max_position_embeddings, got {length}")
    config.eos_token_id = tokenizer.eos_token_id  # published files have a wrong one in config.json
