"""ViT-tiny, a decoder as in GPT-2, and DLRM."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.models.small import mlp


class Block(nn.Module):
    """Attention and an MLP four times as wide, each after a layer norm.

    Args:
        width: Features of a token.
        heads: Attention heads.
        causal: Whether a token sees only those before it.
    """

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) to the same."""
        b, t, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, width))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2020); by default ViT-tiny, 5,717,416 parameters.

    Args:
        side: Of the images.
        patch: Side of a patch.
        width: Features of a token.
        depth: Number of blocks.
        heads: Attention heads.
        classes: Outputs.
    """

    def __init__(
        self,
        side: int = 224,
        patch: int = 16,
        width: int = 192,
        depth: int = 12,
        heads: int = 3,
        classes: int = 1000,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, (side // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, side, side) to (B, classes)."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class GPT(nn.Module):
    """A decoder in the form of GPT-2 (Radford et al. 2019), its embedding tied to the output.

    Args:
        words: Size of the vocabulary.
        length: Longest sequence.
        width: Features of a token.
        depth: Number of blocks.
        heads: Attention heads.
    """

    def __init__(
        self,
        words: int = 1000,
        length: int = 64,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
    ) -> None:
        super().__init__()
        self.wte = nn.Embedding(words, width)
        self.wpe = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        nn.init.normal_(self.wte.weight, std=0.02)
        self.head.weight = self.wte.weight

    def forward(self, words: Tensor) -> Tensor:
        """(B, T) word numbers to (B, T, words) logits."""
        x = self.wte(words) + self.wpe(torch.arange(words.shape[1], device=words.device))
        return self.head(self.norm(self.blocks(x)))


class DLRM(nn.Module):
    """DLRM (Naumov et al. 2019) with the layers of its Criteo Kaggle example, and small tables.

    Args:
        rows: Rows of each embedding table.
        tables: Number of tables.
    """

    def __init__(self, rows: int = 1000, tables: int = 26) -> None:
        super().__init__()
        self.bottom = nn.Sequential(mlp(13, 512, 256, 64, 16), nn.ReLU())
        self.bags = nn.ModuleList(nn.EmbeddingBag(rows, 16, mode="sum") for _ in range(tables))
        pairs = (tables + 1) * tables // 2
        self.top = mlp(16 + pairs, 512, 256, 1)
        rows_and_columns = torch.tril_indices(tables + 1, tables + 1, offset=-1)
        self.register_buffer("pairs", rows_and_columns, persistent=False)

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        """(B, 13) numbers and (B, tables, L) indices to (B, 1) probabilities."""
        x = self.bottom(dense)
        found = [bag(sparse[:, k]) for k, bag in enumerate(self.bags)]
        features = torch.stack([x, *found], dim=1)
        products = features @ features.transpose(1, 2)
        crossed = products[:, self.pairs[0], self.pairs[1]]
        return torch.sigmoid(self.top(torch.cat([x, crossed], dim=1)))
