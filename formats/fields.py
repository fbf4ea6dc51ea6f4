"""The fields of a config.json: their types, the ranges of a Stable Diffusion, and which must divide which."""

from dataclasses import dataclass, fields, is_dataclass
from types import NoneType
from typing import get_args

from common import UserError, read_json

LEVELS = 8  # of a UNet or VAE at most
NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
LIMITS = {  # least and largest value of a number, or of each number of a list
    "sample_size": (1, 256), "in_channels": (1, 64), "out_channels": (1, 64), "latent_channels": (1, 64),
    "block_out_channels": (2, 2**14), "layers_per_block": (1, 16), "cross_attention_dim": (1, 2**14),
    "attention_head_dim": (1, 256), "norm_num_groups": (1, 2**14), "norm_eps": (1e-12, 1),
    "scaling_factor": (1e-3, 1e3), "vocab_size": (3, 10**6), "hidden_size": (1, 2**14), "intermediate_size": (1, 2**16),
    "num_hidden_layers": (0, 128), "num_attention_heads": (1, 256), "max_position_embeddings": (3, 10**4),
    "layer_norm_eps": (1e-12, 1), "eos_token_id": (0, 10**6), "image_size": (1, 2048), "patch_size": (1, 2048),
    "projection_dim": (1, 2**14), "num_train_timesteps": (1, 10**4), "beta_start": (1e-9, 0.999),
    "beta_end": (1e-9, 0.999)}
DIVISORS = {"block_out_channels": ("norm_num_groups", "attention_head_dim"), "hidden_size": ("num_attention_heads",)}


@dataclass
class SchedulerConfig:
    """The fields of scheduler_config.json that diffusion.Schedule calculates with; the defaults are diffusers'."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"


def read_scheduler(path):
    """scheduler_config.json -> its dictionary. Raises UserError for a field of the wrong type or range."""
    config = read_json(path)
    pick_fields(SchedulerConfig, config, path)
    return config


def pick_fields(cls, config, where):
    """A dictionary -> the dataclass with those of its keys that are fields, checked."""
    return check_fields(cls(**{field.name: config[field.name] for field in fields(cls) if field.name in config}), where)


def check_fields(config, where):
    """Return the config, a dataclass. Raise UserError unless each field has its type and a value that is usable."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            check_fields(value, where)
        elif expected := expectation(field, value):
            raise UserError(f"{where}: expected {expected} as {field.name}, got {value!r:.80}")
    for name, divisors in DIVISORS.items():
        for divisor in divisors if hasattr(config, name) else ():
            check_divisible(config, name, divisor, where)
    return config


def expectation(field, value):
    """-> what the value of a field should be, in words; "" if it is that."""
    kinds = get_args(field.type) or (field.type,)  # int | tuple has two
    several = type(value) is tuple and tuple in kinds
    low, high = LIMITS.get(field.name, (None, None))
    kind = kinds[0] if kinds[0] is not tuple else str if low is None else int  # of each element

    def is_usable(x):
        return (type(x) is kind or kind is float and type(x) is int) and (low is None or low <= x <= high)

    items = value if several else () if kinds == (tuple,) else (value,)
    if 1 <= len(items) <= LEVELS and all(map(is_usable, items)) or value is None and NoneType in kinds:
        return ""
    return (f"a list of 1 to {LEVELS}, each " if kinds == (tuple,) else "") + NAMES[kind] + (
        "" if low is None else f" from {low} to {high}")


def check_divisible(config, name, divisor, where):
    """Each of a network's widths is a multiple of its number of heads and of its groups of channels."""
    widths, divisors = getattr(config, name), getattr(config, divisor, 1)
    widths = widths if isinstance(widths, tuple) else (widths,)
    divisors = divisors if isinstance(divisors, tuple) else (divisors,) * len(widths)
    if len(divisors) != len(widths) or any(width % by for width, by in zip(widths, divisors)):
        raise UserError(f"{where}: expected a divisor of {name} {widths} as {divisor}, got {getattr(config, divisor)}")
