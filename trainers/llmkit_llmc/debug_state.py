"""llm.c's debug state: a batch with the logits, loss and gradients that another implementation found for it.

python -m llmkit_llmc.debug_state gpt2_124M.bin gpt2_124M_debug_state.bin

compares our C with such a file. `write` makes one, from PyTorch for example. Little-endian: 256 int32 (magic 20240327,
version 2, B, T), then int32 inputs and targets (B, T), fp32 logits (B, T, V), the mean loss, and gradients in the order
of a model file, wte with its padding rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmkit.gpt2 import PARAMETERS, GPT2Config, parameter_shape
from llmkit.llmc_files import read_model
from llmkit_llmc.library import F32, I32, Model, load

MAGIC, VERSION = 20240327, 2
TOLERANCE = 1e-3  # of the norm: two implementations in fp32, of any size of model


@dataclass(frozen=True)
class DebugState:
    """inputs, targets (B, T); logits (B, T, V); gradients under llm.c's names, all layers of a tensor stacked."""

    inputs: I32
    targets: I32
    logits: F32
    loss: float
    gradients: Mapping[str, F32]


def _shapes(shape: GPT2Config) -> dict[str, tuple[int, ...]]:
    sizes = {p.name: parameter_shape(p, shape) for p in PARAMETERS}
    return {p.name: (shape.depth, *sizes[p.name]) if p.layered else sizes[p.name] for p in PARAMETERS}


def read(path: Path, shape: GPT2Config) -> DebugState:
    """The file, for a model of this shape. Raises ValueError where it is another file, or of another model."""
    content = path.read_bytes()
    head = np.frombuffer(content, "<i4", 256) if len(content) >= 1024 else np.zeros(256, "<i4")
    if (head[0], head[1]) != (MAGIC, VERSION):
        raise ValueError(f"{path} is not a debug state of version {VERSION}")
    B, T = int(head[2]), int(head[3])
    shapes = {"logits": (B, T, shape.vocab), "loss": (), **_shapes(shape)}
    expected = 1024 + 2 * B * T * 4 + sum(4 * int(np.prod(one)) for one in shapes.values())
    if B < 1 or T < 1 or len(content) != expected:
        raise ValueError(f"{path} has {len(content)} bytes; for this model and {B} x {T} tokens it has {expected}")
    tokens = np.frombuffer(content, "<i4", 2 * B * T, 1024).reshape(2, B, T)
    at, arrays = 1024 + tokens.nbytes, {}
    for name, one in shapes.items():
        arrays[name] = np.frombuffer(content, "<f4", int(np.prod(one)), at).reshape(one)
        at += arrays[name].nbytes
    return DebugState(tokens[0], tokens[1], arrays.pop("logits"), float(arrays.pop("loss")), arrays)


def write(path: Path, state: DebugState) -> None:
    """Write the file; gradients may hold any of the layouts that flatten in order."""
    B, T = state.inputs.shape
    head = np.zeros(256, "<i4")
    head[:4] = MAGIC, VERSION, B, T
    floats = [state.logits, np.float32(state.loss), *(state.gradients[p.name] for p in PARAMETERS)]
    parts: list[npt.NDArray[Any]] = [head, *(np.asarray(x, "<i4") for x in (state.inputs, state.targets))]
    path.write_bytes(b"".join(part.tobytes() for part in [*parts, *(np.asarray(x, "<f4") for x in floats)]))


def compare(model: Model, state: DebugState) -> dict[str, float]:
    """Relative error (norm of the difference over the norm) of the loss, the last logits and each gradient."""
    loss = model.gradient(state.inputs, state.targets, scale=1 / state.inputs.size, accumulate=False)
    errors = {"loss": abs(loss - state.loss) / abs(state.loss)}
    last = [model.logits([int(t) for t in row]) for row in state.inputs]
    pairs = {"logits": (np.stack(last), state.logits[:, -1])}
    found = model.split(model.gradients())
    pairs |= {name: (found[name], expected) for name, expected in state.gradients.items()}
    for name, (got, expected) in pairs.items():
        difference = np.linalg.norm((got - expected).astype(np.float64).ravel())
        errors[name] = float(difference / (np.linalg.norm(expected.astype(np.float64).ravel()) + 1e-30))
    return errors


def main(arguments: list[str] | None = None) -> None:
    """The command line above; exit code 1 where something differs."""
    parser = argparse.ArgumentParser(
        prog="python -m llmkit_llmc.debug_state", description="Compare with a debug state."
    )
    parser.add_argument("model", type=Path, help="the model .bin that the state is of")
    parser.add_argument("state", type=Path, help="the debug state .bin")
    options = parser.parse_args(arguments)
    try:
        shape, arrays = read_model(options.model)
        state = read(options.state, shape)
        model = Model(load(), shape)
        model.load_arrays(arrays)
        errors = compare(model, state)
    except (OSError, ValueError) as error:
        sys.exit(f"debug_state: {error}")
    for name, value in errors.items():
        print(f"{name:<10} {value:.1e}{'' if value <= TOLERANCE else '  differs'}")
    sys.exit(max(errors.values()) > TOLERANCE)


if __name__ == "__main__":
    main()
