"""The embedding prediction head E of "Align-then-Unlearn" (Sec. 2, Fig. 3): ê_t = E(h_1, ..., h_t).

A causal transformer on the model's hidden states that predicts, at every position, the embedding of the
text that comes next. Causal, because the paper writes E(h_1, ..., h_t): a head that sees later positions
can read the very words it has to predict. No positional encoding, because the hidden states carry position.

Nothing local is imported: this file can be copied alone.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention: position t attends to 1..t. All (B, heads, T, W / heads)."""
    if q.device.type != "cpu":
        return scaled_dot_product_attention(q, k, v, is_causal=True)
    # the same written out: on CPUs the fused kernel takes three times as long in bf16, most of it in its backward
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5                         # (B, heads, T, T)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)              # (T, T)
    return scores.masked_fill(future, -torch.inf).softmax(-1) @ v


class Block(nn.Module):
    """One pre-norm transformer block, (B, T, W) -> (B, T, W): causal attention, then a feed-forward layer."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        B, T, W = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, W // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                               # each (B, heads, T, W / heads)
        attended = attention(q, k, v)                                      # (B, heads, T, W / heads)
        x = x + self.out(attended.transpose(1, 2).reshape(B, T, W))        # (B, T, W)
        return x + self.feed_forward(self.norm2(x))                        # (B, T, W)


class EmbeddingHead(nn.Module):
    """E, θ_E: hidden states (B, T, D) -> predicted embeddings ê_t (B, T, E), of any length.

    hidden_size: D. embedding_size: E. depth, width, heads: the paper's size is 6 blocks of width 768
    (Sec. 4.1), its authors' code has 8 heads; `heads` must divide `width`.

    Padding stands on the right of a text and so cannot reach a real position: by causality ê_t depends on
    h_1, ..., h_t alone, and no padding mask is needed. What is predicted at padding is masked in the losses.
    """

    def __init__(self, hidden_size: int, embedding_size: int, depth: int = 6, width: int = 768, heads: int = 8):
        super().__init__()
        if width % heads:
            raise ValueError(f"heads ({heads}) must divide width ({width})")
        self.inputs = nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.outputs = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, embedding_size))

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.inputs(hidden)     # (B, T, W)
        for block in self.blocks:
            x = block(x)            # (B, T, W)
        return self.outputs(x)      # (B, T, E)
