"""Rotary positions (Su et al. 2021): frequencies of the variants that transformers knows, and tables of cos and sin.

Within the context that a configuration announces, `dynamic` scaling has no effect (it only grows with longer
sequences), and an engine feeds no more than that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmkit.engine import UnsupportedModel

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    FloatArray = npt.NDArray[np.float32]

NEEDS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("original_max_position_embeddings",),
}


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of config.json in one form: `rope_type`, `rope_theta`, and what the type needs.

    transformers 5 writes rope_parameters, earlier versions rope_theta and rope_scaling, with `type` for rope_type.
    """
    given = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    given["rope_type"] = given.get("rope_type") or given.pop("type", None) or "default"
    given.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    given.setdefault("max_position_embeddings", config["max_position_embeddings"])
    if given["rope_type"] in ("llama3", "yarn"):
        given.setdefault(
            "original_max_position_embeddings",
            config.get("original_max_position_embeddings") or config["max_position_embeddings"],
        )
    return given


def check_rope(parameters: Mapping[str, Any]) -> None:
    """Raise UnsupportedModel for a variant that `frequencies` does not compute."""
    kind = parameters["rope_type"]
    if kind not in NEEDS:
        raise UnsupportedModel(f"the rope type {kind!r}")
    if missing := [name for name in NEEDS[kind] if parameters.get(name) is None]:
        raise UnsupportedModel(f"rope type {kind!r} without {missing[0]}")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModel(f"partial_rotary_factor={parameters['partial_rotary_factor']}")


def frequencies(parameters: Mapping[str, Any], head_dim: int) -> tuple[FloatArray, float]:
    """(head_dim / 2) angles a position in radians, and the factor on cos and sin; in fp32, as transformers has them."""
    import numpy as np

    kind, base = parameters["rope_type"], parameters["rope_theta"]
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    spread = np.float32(base) ** exponents
    plain = (np.float32(1) / spread).astype(np.float32)
    if kind == "linear":
        return plain / np.float32(parameters["factor"]), 1.0
    if kind == "llama3":
        return _llama3(plain, parameters), 1.0
    if kind == "yarn":
        return _yarn(spread, parameters, head_dim)
    return plain, 1.0


def _llama3(plain: FloatArray, parameters: Mapping[str, Any]) -> FloatArray:
    """Llama 3.1's: long waves are stretched by `factor`, short ones kept, those between interpolated."""
    import numpy as np

    factor, original = parameters["factor"], parameters["original_max_position_embeddings"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    waves = 2 * math.pi / plain
    smooth = (original / waves - low) / (high - low)
    between = (1 - smooth) * plain / factor + smooth * plain
    result = np.where(waves > original / low, plain / factor, np.where(waves < original / high, plain, between))
    return result.astype(np.float32)


def _yarn(spread: FloatArray, parameters: Mapping[str, Any], head_dim: int) -> tuple[FloatArray, float]:
    """YaRN (Peng et al. 2023): interpolates slow dimensions, keeps fast ones, and sharpens attention a little."""
    import numpy as np

    original, base = parameters["original_max_position_embeddings"], parameters["rope_theta"]
    factor = parameters.get("factor") or parameters["max_position_embeddings"] / original

    def mscale(scale: float, by: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * by * math.log(scale) + 1.0

    def dimension(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    sharpen = parameters.get("attention_factor")
    if sharpen is None:
        one, all_ = parameters.get("mscale"), parameters.get("mscale_all_dim")
        sharpen = mscale(factor, one) / mscale(factor, all_) if one and all_ else mscale(factor)
    low, high = dimension(parameters.get("beta_fast") or 32), dimension(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    mixed = 1 / (factor * spread) * ramp + 1 / spread * (1 - ramp)
    return mixed.astype(np.float32), float(sharpen)


def tables(parameters: Mapping[str, Any], head_dim: int, positions: int) -> tuple[FloatArray, FloatArray]:
    """cos and sin, both (positions, head_dim / 2) fp32, times the variant's attention factor."""
    import numpy as np

    angles, factor = frequencies(parameters, head_dim)
    grid = np.arange(positions, dtype=np.float32)[:, None] * angles
    scale = np.float32(factor)
    return np.cos(grid) * scale, np.sin(grid) * scale
