"""Our C beside PyTorch through llm.c's debug state file."""

# mypy: disable-error-code="no-untyped-call,union-attr,arg-type"

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import header, parameter_shapes

from llmkit.gpt2 import PARAMETERS, GPT2Config, from_llmc, to_llmc
from llmkit_llmc.debug_state import DebugState, compare, main, read, write
from llmkit_llmc.library import Library, Model
from llmkit_torch.model import GPT2, load_hf, to_hf

SHAPE = GPT2Config(vocab=70, context=12, depth=2, heads=2, width=16)


@pytest.fixture
def model(library: Library) -> Model:
    model = Model(library, SHAPE)
    model.initialise(3)
    return model


@pytest.fixture
def state(model: Model) -> DebugState:
    """What PyTorch finds in double precision."""
    rng = np.random.default_rng(0)
    x, y = (rng.integers(0, SHAPE.vocab, (3, 9)).astype(np.int32) for _ in range(2))
    twin = GPT2(SHAPE)
    load_hf(twin, from_llmc(model.split(model.get()), SHAPE))
    twin = twin.double()
    logits = twin(torch.from_numpy(x).long())
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(y).long().flatten())
    loss.backward()
    with torch.no_grad():
        for parameter in twin.parameters():  # gradients in the place of weights take the same way to llm.c's layout
            parameter.copy_(parameter.grad)
    gradients: Any = to_llmc(to_hf(twin.float()), SHAPE)
    return DebugState(x, y, logits.detach().float().numpy(), loss.item(), gradients)


def test_our_gradients_are_those_of_the_file(
    model: Model, state: DebugState, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "debug_state.bin"
    write(path, state)
    errors = compare(model, read(path, SHAPE))
    assert set(errors) == {"loss", "logits", *(p.name for p in PARAMETERS)}
    assert max(errors.values()) < 1e-4
    model.write(tmp_path / "model.bin")
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "model.bin"), str(path)])
    assert not ended.value.code and "differs" not in capsys.readouterr().out
    write(path, dataclasses.replace(state, gradients={**state.gradients, "fcb": state.gradients["fcb"] * 1.1}))
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "model.bin"), str(path)])
    assert ended.value.code and [line[:3] for line in capsys.readouterr().out.splitlines() if "differs" in line] == [
        "fcb"
    ]


def test_the_bytes_are_those_of_the_format(state: DebugState, tmp_path: Path) -> None:
    path = tmp_path / "debug_state.bin"
    write(path, state)
    content = path.read_bytes()
    assert content[:1024] == header(20240327, 2, 3, 9)
    assert content[1024 : 1024 + 216] == state.inputs.astype("<i4").tobytes() + state.targets.astype("<i4").tobytes()
    floats = np.frombuffer(content, "<f4", offset=1024 + 216)
    assert np.array_equal(floats[: 3 * 9 * 70], state.logits.ravel()) and floats[3 * 9 * 70] == np.float32(state.loss)
    shapes = parameter_shapes(V=70, T=12, C=16, L=2)
    assert len(floats) == 3 * 9 * 70 + 1 + sum(int(np.prod(shape)) for shape in shapes)
    first = floats[3 * 9 * 70 + 1 :][: 128 * 16].reshape(128, 16)
    assert np.array_equal(first, state.gradients["wte"]) and not first[70:].any()


def test_other_files_are_refused(state: DebugState, tmp_path: Path) -> None:
    path = tmp_path / "debug_state.bin"
    write(path, state)
    with pytest.raises(ValueError, match="for this model and 3 x 9 tokens it has"):
        read(path, dataclasses.replace(SHAPE, vocab=71))
    path.write_bytes(b"PK" + path.read_bytes()[2:])
    with pytest.raises(ValueError, match="is not a debug state of version 2"):
        read(path, SHAPE)
