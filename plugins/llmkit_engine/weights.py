"""Weights: from a checkpoint's files into the packed form that the compiled products read.

Matrices are packed once when the model is opened, straight from the mapped file. Norms and biases become fp32; the
token embedding stays where it lies in the file, since a step reads a few rows of it only.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llmkit.checkpoint import Checkpoint, CheckpointError
from llmkit_engine import library as lib
from llmkit_engine.library import library
from llmkit_engine.spec import Linear, Mixing, ModelSpec, NormNames

if TYPE_CHECKING:
    from collections.abc import Mapping

Array = npt.NDArray[Any]

KINDS = {"F32": lib.F32, "BF16": lib.BF16, "F16": lib.F16}
LINE = 64  # bytes of a cache line, at which matrices begin
FP32_INPUTS = "LLMKIT_ENGINE_FP32_INPUTS"  # environment variable


class Weights:
    """The C structure `Model` of a checkpoint, and the memory it points into.

    Attributes:
        model: what lk_open takes.
        bytes: size of the packed matrices.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        *,
        dtype: str,
        quantize: str | None,
        fp32_inputs: bool | None,
        threads: int,
    ) -> None:
        """Read and pack. Raises CheckpointError for missing tensors, or tensors of other shapes or types.

        `fp32_inputs`: whether to keep what is multiplied with bf16 or int8 weights in fp32, although the processor has
        instructions for narrower numbers; None: as the environment variable says, else what is faster.
        """
        self._checkpoint, self._spec, self._threads = checkpoint, spec, threads
        self._bf16, self._int8 = dtype == "bf16", quantize == "int8"
        if fp32_inputs is None and (said := os.environ.get(FP32_INPUTS)):
            fp32_inputs = said != "0"
        kinds = 0 if fp32_inputs else library().lk_kinds()
        self._pairs, self._bytes = bool(kinds & (4 if fp32_inputs is None else 1)), bool(kinds & 2)
        self._kept: list[Array] = []  # what C points at
        files = checkpoint.weights
        self._names: Mapping[str, str] = {
            **{f"{spec.base_prefix}{name}": name for name in files},
            **{name: name for name in files},
        }
        self.model = self._build()

    def _build(self) -> lib.Model:
        spec = self._spec
        head = Linear((spec.head or spec.embedding,), (spec.vocab,), spec.width)
        linears = [linear for block in spec.blocks for linear in (block.qkv, block.out, block.up, block.down)]
        # One piece of memory for all, which the system can give in huge pages: reading weights is most of a step, and
        # looking up small pages would be a part of that.
        self.bytes = sum(map(self._packed_bytes, [*linears, head]))
        space = np.zeros(self.bytes + LINE, dtype=np.uint8)
        self._space = space[-space.ctypes.data % LINE :]
        layers = (lib.Layer * len(spec.blocks))()
        for layer, block in zip(layers, spec.blocks):
            for index, norm in ((1, block.norm1), (2, block.norm2)):
                weight, bias = self._norm(norm)
                setattr(layer, f"norm{index}_w", weight)
                setattr(layer, f"norm{index}_b", bias)
            for name in ("qkv", "out", "up", "down"):
                setattr(layer, name, self._pack(getattr(block, name)))
            layer.stream = 1.0
            if block.mixing is not None:
                self._mix(layer, block.mixing)
        self._layers = layers
        embedding = self._stored(spec.embedding, (spec.vocab, spec.width))
        positions = self._stored(spec.positions, (spec.context, spec.width)) if spec.positions else None
        if embedding.dtype == np.float16 or (positions is not None and positions.dtype != embedding.dtype):
            embedding = self._float(spec.embedding, (spec.vocab, spec.width))
            positions = self._float(spec.positions, (spec.context, spec.width)) if spec.positions else None
        self._kept += [embedding] if positions is None else [embedding, positions]
        final_w, final_b = self._norm(spec.final_norm)
        return lib.Model(
            layers=len(spec.blocks),
            width=spec.width,
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            ffn=spec.ffn,
            vocab=spec.vocab,
            rotary_dim=spec.head_dim if spec.rope is not None else 0,
            norm=lib.NORMS[spec.norm],
            activation=lib.ACTIVATIONS[spec.activation],
            gated=int(spec.gated),
            embedding_dtype=lib.BF16 if embedding.dtype == np.uint16 else lib.F32,
            qk_norm=int(spec.qk_norm),
            mixes=int(spec.mixes),
            window=spec.window or 0,
            eps=spec.eps,
            attention_scale=spec.attention_scale or spec.head_dim**-0.5,
            softcap=spec.softcap,
            layer=ctypes.cast(layers, ctypes.POINTER(lib.Layer)),
            final_w=final_w,
            final_b=final_b,
            head=self._pack(head),
            embedding=embedding.ctypes.data,
            positions=None if positions is None else positions.ctypes.data,
        )

    def _stored(self, name: str, shape: tuple[int, ...]) -> Array:
        """The tensor as it lies in the file, mapped: fp32, fp16, or bf16 as uint16."""
        files = self._checkpoint.weights
        where = self._names.get(name)
        if where is None:
            raise CheckpointError(f"checkpoint {self._checkpoint.path} is incomplete: tensor {name} is missing")
        if files.shapes[where] != shape:
            raise CheckpointError(
                f"checkpoint {self._checkpoint.path} is damaged: tensor {name} has shape {list(files.shapes[where])} "
                f"where its config.json says {list(shape)}"
            )
        if files.dtype(where) not in KINDS:
            raise CheckpointError(
                f"tensor {name} of checkpoint {self._checkpoint.path} is {files.dtype(where)}; engine 'llmkit' reads "
                f"{', '.join(KINDS)}"
            )
        return files.stored(where)

    def _float(self, name: str, shape: tuple[int, ...]) -> Array:
        self._stored(name, shape)  # checks it
        return np.ascontiguousarray(self._checkpoint.weights[self._names[name]])

    def _mix(self, layer: lib.Layer, names: Mixing) -> None:
        if names.lambdas is not None:
            layer.stream, layer.embedded = self._float(names.lambdas, (2,))
        if names.value is not None:
            layer.value = self._float(names.value, (1,))[0]
        if names.skip is not None:
            name, length, index = names.skip
            layer.skip = self._float(name, (length,))[index]

    def _norm(self, names: NormNames | None) -> tuple[int | None, int | None]:
        if names is None:
            return None, None
        weight = self._vector([names.weight], [self._spec.width])
        return weight, None if names.bias is None else self._vector([names.bias], [self._spec.width])

    def _vector(self, names: Sequence[str], sizes: Sequence[int]) -> int:
        """The address of fp32 vectors, one after the other."""
        self._kept.append(np.concatenate([self._float(name, (size,)) for name, size in zip(names, sizes)]))
        return int(self._kept[-1].ctypes.data)

    def _parts(self, linear: Linear) -> list[Array]:
        shapes = [(linear.inputs, n) if linear.transposed else (n, linear.inputs) for n in linear.outputs]
        return [self._stored(name, shape) for name, shape in zip(linear.weights, shapes)]

    def _kind(self, linear: Linear) -> int:
        if self._int8:
            return lib.BYTES if self._bytes else lib.INT8
        if self._bf16:
            return lib.PAIRS if self._pairs else lib.BF16
        # bf16 weights widen exactly, so they stay bf16 whatever the arithmetic.
        return lib.BF16 if all(part.dtype == np.uint16 for part in self._parts(linear)) else lib.F32

    def _packed_bytes(self, linear: Linear) -> int:
        """Of one linear layer, in whole cache lines."""
        size: int = library().lk_packed_bytes(sum(linear.outputs), linear.inputs, self._kind(linear))
        return -(-size // LINE) * LINE

    def _pack(self, linear: Linear) -> lib.Packed:
        """A linear layer in the form that its products read."""
        outputs, inputs, kind, size = sum(linear.outputs), linear.inputs, self._kind(linear), self._packed_bytes(linear)
        data, self._space = self._space[:size], self._space[size:]
        scale = np.zeros(outputs, dtype=np.float32) if self._int8 else None
        at = 0
        for part, count in zip(self._parts(linear), linear.outputs):
            source = {"float32": lib.F32, "uint16": lib.BF16, "float16": lib.F16}[part.dtype.name]
            strides = (1, count) if linear.transposed else (inputs, 1)
            failed = library().lk_pack(
                data.ctypes.data,
                None if scale is None else scale.ctypes.data,
                kind,
                at,
                part.ctypes.data,
                source,
                count,
                inputs,
                *strides,
                self._threads,
            )
            if failed:
                raise MemoryError("no memory to pack the weights")
            at += count
        self._kept += [data] if scale is None else [data, scale]
        bias = self._vector(linear.biases, linear.outputs) if linear.biases else None
        scale_at = None if scale is None else scale.ctypes.data
        return lib.Packed(n=outputs, k=inputs, kind=kind, data=data.ctypes.data, scale=scale_at, bias=bias)
