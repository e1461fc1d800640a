"""The training mask against one made element by element, and what it promises: documents do not see each other."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from llmkit_speedrun.attention_mask import block_mask, dense_mask, document_ids  # noqa: E402

EOT = 9


def brute_force(ids: list[list[int]], window: int) -> Any:
    """(B, 1, T, T): walk back from every query until the document or the window ends."""
    mask = torch.zeros(len(ids), 1, len(ids[0]), len(ids[0]), dtype=torch.bool)
    for row, tokens in enumerate(ids):
        for query in range(len(tokens)):
            for key in range(query, max(-1, query - window), -1):
                mask[row, 0, query, key] = True
                if tokens[key] == EOT:  # it opens the document
                    break
    return mask


ROWS = st.integers(1, 12).flatmap(
    lambda length: st.lists(
        st.lists(st.sampled_from([1, 2, 3, EOT]), min_size=length, max_size=length), min_size=1, max_size=3
    )
)


@given(ids=ROWS, window=st.integers(1, 14))
def test_the_dense_mask_is_the_brute_force_one(ids: list[list[int]], window: int) -> None:
    found = dense_mask(document_ids(torch.tensor(ids), EOT), window)
    if found is None:  # plain causal attention
        length = len(ids[0])
        found = torch.ones(length, length, dtype=torch.bool).tril().expand(len(ids), 1, length, length)
    assert torch.equal(found, brute_force(ids, window))


@pytest.mark.parametrize("window", [1, 40, 300])
def test_the_block_mask_is_the_brute_force_one(window: int) -> None:
    from torch.nn.attention.flex_attention import create_mask

    ids = torch.randint(0, 6, (2, 256), generator=torch.Generator().manual_seed(0))
    ids[0, [0, 70, 71, 200]] = EOT
    expected = brute_force(ids.tolist(), window)
    mask = block_mask(document_ids(ids, EOT), window)
    assert torch.equal(create_mask(mask.mask_mod, 2, 1, 256, 256, device="cpu"), expected)
    # A block that the BlockMask leaves out has nothing that is allowed.
    blocks = expected.view(2, 1, 2, 128, 2, 128).any(dim=(3, 5))
    assert torch.equal(mask.to_dense()[:, :, :2, :2].bool(), blocks)


def test_without_an_end_of_text_token_a_row_is_one_document() -> None:
    assert document_ids(torch.tensor([[1, EOT, 2]]), None).tolist() == [[0, 0, 0]]


def test_no_mask_where_plain_causal_attention_does() -> None:
    ids = torch.tensor([[EOT, 1, 2, 3], [1, 2, 3, 1]])
    assert dense_mask(document_ids(ids, EOT), 4) is None
    assert dense_mask(document_ids(ids, EOT), 3) is not None


def test_flex_attention_with_the_block_mask_is_sdpa_with_the_dense_one() -> None:
    """The path that CUDA takes, through transformers; not compiled here, where it has no backward."""
    pytest.importorskip("transformers")
    from speedrun_support import random_model

    model = random_model(sliding_window=20)
    ids = torch.randint(0, 6, (2, 128), generator=torch.Generator().manual_seed(0))
    ids[0, [0, 70, 71]] = EOT
    documents = document_ids(ids, EOT)
    with torch.inference_mode():
        expected = model(ids, attention_mask=dense_mask(documents, 20)).logits
        model.config._attn_implementation = "flex_attention"
        with torch.compiler.set_stance("force_eager"):
            found = model(ids, attention_mask=block_mask(documents, 20)).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
