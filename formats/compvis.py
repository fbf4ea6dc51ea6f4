"""Single-file checkpoints of CompVis's code, such as `v1-5-pruned-emaonly.safetensors`.

One file holds the UNet, the VAE and the text encoder under the parameter names of CompVis/stable-diffusion, and no
configuration. That is inferred from the shapes of the tensors. The numbers of heads, which shapes do not show, are
those of the published models.
"""

import re

from clip_text import CLIPTextConfig, CLIPTokenizer
from common import UserError
from formats.fields import check_fields
from unet import UNetConfig
from vae import VAEConfig
from weights import SubModel, read_tensors

UNSUPPORTED = {  # parameter names of other formats
    r"^conditioner\.": "an SDXL checkpoint",
    r"double_blocks\.": "a Flux checkpoint",
    r"joint_blocks\.": "an SD3 checkpoint",
    r"^control_model\.": "a ControlNet",
    r"lora": "a LoRA",
    r"^text_model\.": "a text encoder alone",
    r"^(down_blocks|encoder)\.": "a UNet or VAE alone"}
CLIP_HEAD_WIDTH, CLIP_EOS = 64, 49407
UNET_NAMES = [
    (r"^time_embed\.0", "time_embedding.linear_1"), (r"^time_embed\.2", "time_embedding.linear_2"),
    (r"^input_blocks\.0\.0", "conv_in"), (r"^out\.0", "conv_norm_out"), (r"^out\.2", "conv_out"),
    (r"^middle_block\.0", "mid_block.resnets.0"), (r"^middle_block\.1", "mid_block.attentions.0"),
    (r"^middle_block\.2", "mid_block.resnets.1"),
    (r"\.in_layers\.0", ".norm1"), (r"\.in_layers\.2", ".conv1"), (r"\.emb_layers\.1", ".time_emb_proj"),
    (r"\.out_layers\.0", ".norm2"), (r"\.out_layers\.3", ".conv2"), (r"\.skip_connection", ".conv_shortcut")]
VAE_NAMES = [
    (r"\.down\.(\d+)\.block", r".down_blocks.\1.resnets"),
    (r"\.down\.(\d+)\.downsample", r".down_blocks.\1.downsamplers.0"),
    (r"\.up\.(\d+)\.block", r".up_blocks.\1.resnets"),
    (r"\.up\.(\d+)\.upsample", r".up_blocks.\1.upsamplers.0"),
    (r"\.mid\.block_1", ".mid_block.resnets.0"), (r"\.mid\.attn_1", ".mid_block.attentions.0"),
    (r"\.mid\.block_2", ".mid_block.resnets.1"),
    (r"\.nin_shortcut", ".conv_shortcut"), (r"\.norm_out", ".conv_norm_out")]
OPENCLIP_NAMES = [
    (r"^token_embedding", "embeddings.token_embedding"),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^transformer\.resblocks", "encoder.layers"), (r"^ln_final", "final_layer_norm"),
    (r"\.ln_(\d)", r".layer_norm\1"), (r"\.attn\.", ".self_attn."),
    (r"\.c_fc", ".fc1"), (r"\.c_proj", ".fc2")]
# SD 2.x takes the output of OpenCLIP-H's last layer but one.
OPENCLIP_UNUSED = ("transformer.resblocks.23.", "text_projection", "logit_scale")


def renamed(tensors, rules):
    """The same tensors; every (pattern, replacement) of the rules is applied to their names in turn."""

    def new(name):
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        return name

    return {new(name): tensor for name, tensor in tensors.items()}


def count(tensors, pattern):
    """Length of a list of modules, from the highest number at (\\d+) among the names."""
    return 1 + max((int(match[1]) for name in tensors if (match := re.match(pattern, name))), default=-1)


def read_single_file(path, tokenizer, prediction_type):
    """A CompVis file -> {name of a network: SubModel}, and the tokenizer from its folder or from beside the file.

    Averaged (EMA) weights of the UNet are preferred where the file has them: they give the better samples.
    """
    tensors = read_tensors(path)

    def section(prefix):
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    unet, averaged = section("model.diffusion_model."), section("model_ema.diffusion_model")
    vae = section("first_stage_model.") or section("vae.")
    clip, openclip = section("cond_stage_model.transformer."), section("cond_stage_model.model.")
    unsupported = [kind for sign, kind in UNSUPPORTED.items() if any(re.search(sign, name) for name in tensors)]
    if unsupported or not (unet and vae and (clip or openclip)):
        got = unsupported[0] if unsupported else f"the tensors {', '.join([*tensors][:3]) or '(none)'}"
        raise UserError(f"{path}: expected the UNet, VAE and text encoder of Stable Diffusion 1.x or 2.x, got {got}")
    if averaged:  # their names have no dots
        unet = {name: averaged[name.replace(".", "")] for name in unet if name.replace(".", "") in averaged}
    try:
        sub_models = {
            "unet": SubModel(*read_unet(unet, prediction_type), path),
            "vae": SubModel(*read_vae(vae), path),
            "text_encoder": SubModel(*(read_openclip(openclip) if openclip else read_clip(clip)), path)}
    except KeyError as error:
        raise UserError(f"{path}: expected the tensor {error.args[0]}, got none") from error
    except Exception as error:  # names and shapes can be anything: numbers of many digits, tensors without dimensions
        raise UserError(f"{path}: expected tensors of CompVis's shapes and names, got {error!r}") from error
    for sub_model in sub_models.values():
        check_fields(sub_model.config, path)
    tokenizer = CLIPTokenizer(tokenizer or vocabulary_beside(path))
    if sub_models["unet"].config.use_linear_projection:  # SD 2.x was trained with "!" as padding
        tokenizer.pad_token_id, tokenizer.special_tokens["pad_token"] = 0, "!"
    return sub_models, tokenizer


def vocabulary_beside(file):
    for folder in (file.parent / "tokenizer", file.parent):
        if (folder / "vocab.json").exists() or (folder / "tokenizer.json").exists():
            return folder
    raise UserError(f"{file}: expected CLIP's vocab.json and merges.txt in a tokenizer/ beside it, got none; "
                    f"pass --tokenizer with a folder that has them, such as that of any Stable Diffusion repository")


def read_unet(tensors, prediction_type):
    """-> UNetConfig and the tensors under our names.

    CompVis numbers the layers of all levels in one sequence. A level of the down path, after conv_in, is `layers`
    residual blocks and a downsampler. A level of the up path is `layers` + 1 residual blocks, and the upsampler goes
    with the last. So every level takes `layers` + 1 numbers.
    """
    downsamplers = [int(n) for n in re.findall(r"input_blocks\.(\d+)\.0\.op\.weight", " ".join(tensors))]
    layers = min(downsamplers, default=1) - 1

    def numbered(match):
        path, n, place, resampler = match.groups()
        level, i = divmod(int(n) - (path == "in"), layers + 1)
        side = "down" if path == "in" else "up"
        if resampler:
            return f"{side}_blocks.{level}.{side}samplers.0.conv"
        return f"{side}_blocks.{level}.{'resnets' if place == '0' else 'attentions'}.{i}"

    layer = r"^(in|out)put_blocks\.(\d+)\.(\d)(\.op|\.conv(?=\.))?"
    tensors = renamed(tensors, [*UNET_NAMES, (layer, numbered)])
    levels = range(count(tensors, r"down_blocks\.(\d+)\."))
    widths = tuple(tensors[f"down_blocks.{i}.resnets.0.conv2.weight"].shape[0] for i in levels)

    def block_types(side):
        attends = [f"{side.lower()}_blocks.{i}.attentions.0.norm.weight" in tensors for i in levels]
        return tuple(f"{'CrossAttn' if attend else ''}{side}Block2D" for attend in attends)

    is_sd2 = tensors["mid_block.attentions.0.proj_in.weight"].ndim == 2
    is_v = is_sd2 and prediction_type == "v_prediction"
    return UNetConfig(
        sample_size=96 if is_v else 64,
        in_channels=tensors["conv_in.weight"].shape[1],
        out_channels=tensors["conv_out.weight"].shape[0],
        block_out_channels=widths,
        down_block_types=block_types("Down"),
        up_block_types=block_types("Up"),
        layers_per_block=layers,
        cross_attention_dim=tensors["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        attention_head_dim=tuple(max(1, width // 64) for width in widths) if is_sd2 else 8,
        use_linear_projection=is_sd2,
        upcast_attention=is_v,  # needed by 2.1 at 768 pixels alone
    ), tensors


def read_vae(tensors):
    """-> VAEConfig and the tensors under our names. CompVis counts the decoder's levels backwards."""
    levels = count(tensors, r"encoder\.down\.(\d+)")
    flip = (r"\.up_blocks\.(\d+)", lambda match: f".up_blocks.{levels - 1 - int(match[1])}")
    tensors = renamed(tensors, [*VAE_NAMES, flip])
    return VAEConfig(
        in_channels=tensors["encoder.conv_in.weight"].shape[1],
        out_channels=tensors["decoder.conv_out.weight"].shape[0],
        latent_channels=tensors["post_quant_conv.weight"].shape[0],
        block_out_channels=tuple(
            tensors[f"encoder.down_blocks.{i}.resnets.0.conv2.weight"].shape[0] for i in range(levels)
        ),
        layers_per_block=count(tensors, r"encoder\.down_blocks\.0\.resnets\.(\d+)"),
    ), tensors


def read_clip(tensors, activation="quick_gelu"):
    """-> CLIPTextConfig and the tensors under our names."""
    tensors = {name.removeprefix("text_model."): t for name, t in tensors.items()}
    vocabulary, width = tensors["embeddings.token_embedding.weight"].shape
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=tensors["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=count(tensors, r"encoder\.layers\.(\d+)"),
        num_attention_heads=max(1, width // CLIP_HEAD_WIDTH),
        max_position_embeddings=tensors["embeddings.position_embedding.weight"].shape[0],
        hidden_act=activation,
        eos_token_id=min(CLIP_EOS, vocabulary - 1),
    ), tensors


def read_openclip(tensors):
    """The same for SD 2.x's text encoder, whose q, k and v are one tensor."""
    tensors = {name: t for name, t in tensors.items() if not name.startswith(OPENCLIP_UNUSED)}
    for name in [name for name in tensors if ".in_proj_" in name]:
        for letter, tensor in zip("qkv", tensors.pop(name).chunk(3)):
            tensors[name.replace(".in_proj_", f".{letter}_proj.")] = tensor
    return read_clip(renamed(tensors, OPENCLIP_NAMES), activation="gelu")
