"""E(h_1, ..., h_t): what comes later never matters, padding included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from head import EmbeddingHead


def make_head(seed=0):
    torch.manual_seed(seed)
    return EmbeddingHead(hidden_size=12, embedding_size=5, depth=2, width=16, heads=4)


@settings(max_examples=50)
@given(st.integers(2, 9), st.data())
def test_a_change_after_t_moves_no_output_at_or_before_t(T, data):
    t = data.draw(st.integers(0, T - 2))
    head, hidden = make_head(), torch.randn(2, T, 12)
    changed = hidden.clone()
    changed[:, t + 1:] = 100 * torch.randn(2, T - t - 1, 12)
    one, two = head(hidden), head(changed)
    assert torch.allclose(one[:, :t + 1], two[:, :t + 1], atol=1e-6)
    assert not torch.allclose(one[:, t + 1:], two[:, t + 1:], atol=1e-3)


@settings(max_examples=30)
@given(st.integers(1, 8), st.integers(1, 5))
def test_padding_on_the_right_reaches_no_real_position(T, padding):
    head, hidden = make_head(), torch.randn(1, T, 12)
    padded = torch.cat([hidden, 50 * torch.randn(1, padding, 12)], dim=1)
    assert torch.allclose(head(hidden), head(padded)[:, :T], atol=1e-6)


def test_earlier_positions_do_matter():
    head, hidden = make_head(), torch.randn(1, 4, 12)
    changed = hidden.clone()
    changed[:, 0] = torch.randn(12)
    assert not torch.allclose(head(hidden)[:, 3], head(changed)[:, 3], atol=1e-4)


def test_shapes_and_the_paper_s_size():
    assert make_head()(torch.randn(3, 7, 12)).shape == (3, 7, 5)
    head = EmbeddingHead(hidden_size=3072, embedding_size=768)
    assert len(head.blocks) == 6
    assert head.inputs[1].out_features == 768
    assert sum(p.numel() for p in head.parameters()) == pytest.approx(45.5e6, rel=0.01)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="must divide"):
        EmbeddingHead(12, 5, width=10, heads=4)
