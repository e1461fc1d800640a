"""LLMC_BLAS: the same results with a BLAS behind the fp32 products, where one can be linked."""

from __future__ import annotations

import numpy as np
import pytest
from support import error

from llmkit.gpt2 import GPT2Config
from llmkit_llmc.build import BuildError, build
from llmkit_llmc.library import Library, Model


def test_a_blas_gives_the_same_gradients(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_BLAS", "-lopenblas")
    try:
        with_blas = Library(build().library)
    except BuildError:
        pytest.skip("OpenBLAS cannot be linked here")
    shape = GPT2Config(vocab=333, context=40, depth=2, heads=3, width=57)
    x = np.random.default_rng(0).integers(0, 333, (2, 37))
    gradients, logits = [], []
    for chosen in (library, with_blas):
        model = Model(chosen, shape)
        model.initialise(1)
        model.gradient(x, x[:, ::-1], scale=1.0, accumulate=False)
        model.gradient(x, x[:, ::-1], scale=0.5, accumulate=True)
        gradients.append(model.gradients())
        logits.append(model.logits([1, 2, 3]))
    assert error(gradients[1], gradients[0]) < 1e-5 and error(logits[1], logits[0]) < 1e-5
