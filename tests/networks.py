"""Small networks for the tests, one of each shape that the library must take."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FeedForward(nn.Module):
    """Two linear layers with an odd width between them."""

    def __init__(self, width: int = 24, hidden: int = 50) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


class SelfAttention(nn.Module):
    """Attention with a fused qkv, as users and timm write it."""

    def __init__(self, width: int = 24, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer block of the two."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.attn = SelfAttention(width)
        self.mlp = FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class Transformer(nn.Module):
    """A user's own transformer: an embedding, two blocks, a head."""

    def __init__(self, width: int = 24, classes: int = 10) -> None:
        super().__init__()
        self.embed = nn.Linear(12, width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class ConvNet(nn.Module):
    """Every kind of convolution: strided, grouped, depthwise, 1×1, and all padding modes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 20, 3, padding=1, padding_mode="reflect")
        self.depthwise = nn.Conv2d(20, 20, 3, padding=1, groups=20)
        self.pointwise = nn.Conv2d(20, 36, 1, stride=2, padding=1)
        self.grouped = nn.Conv2d(36, 24, 3, padding=2, dilation=2, groups=2)
        self.grouped1x1 = nn.Conv2d(24, 24, 1, groups=2)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.pointwise(self.depthwise(self.stem(x))))
        return self.head(self.grouped1x1(torch.relu(self.grouped(x))).mean((2, 3)))


class Tied(nn.Module):
    """A language model whose embedding and head are one tensor."""

    def __init__(self, words: int = 40, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.hidden = nn.Linear(width, width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.embedding(tokens))))
