"""Low-rank adapters as members over one shared Transformer.

    pip install "unisono[sklearn]"
    python examples/lora_adapters.py

A small Transformer learns scikit-learn's digits. Then eight members learn them turned by 90
degrees: each adds ``B A`` of rank 4 to the weights of some layers, which stay as they are and are
stored once. The method is that of Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models",
2021, https://arxiv.org/abs/2106.09685.
"""

from __future__ import annotations

import copy

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from unisono import Ensemble, combine, fit, optim

MEMBERS, RANK, EPOCHS = 8, 4, 20
WIDTH, HEADS, BLOCKS = 32, 4, 2


class Adapted(nn.Module):
    """A frozen linear layer and what a member adds: ``W x + b + B A x``."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))  # so it begins as the base

    def forward(self, x: Tensor) -> Tensor:
        """Where x is the same for all members, so is ``self.base(x)``: it is computed once."""
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


class Block(nn.Module):
    """Attention and a network of two layers, each added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, width) -> the same."""
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads.unbind())
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Reads an image row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, WIDTH)
        self.place = nn.Parameter(0.02 * torch.randn(8, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 8, 8) -> (B, 10)."""
        return self.head(self.blocks(self.embed(x) + self.place).mean(1))


def load() -> tuple[Tensor, Tensor]:
    """1,797 images of 8 x 8 pixels, and the digits that they show."""
    digits = load_digits()
    return torch.tensor(digits.images / 16, dtype=torch.float32), torch.tensor(digits.target)


def turn(images: Tensor) -> Tensor:
    """By 90 degrees."""
    return images.rot90(dims=(-2, -1))


def pretrain(x: Tensor, y: Tensor, *, epochs: int = 25) -> Transformer:
    """A Transformer that knows the upright digits."""
    one = Ensemble.build(Transformer, 1, seed=0, strategy="fused")
    optimizer = optim.Adam(one, lr=3e-3)
    fit(
        one,
        (x, y),
        loss=F.cross_entropy,
        optimizer=optimizer,
        epochs=epochs,
        batch_size=64,
        progress=False,
    )
    (base,) = one.unstack()
    assert isinstance(base, Transformer)
    return base


def adapt(base: Transformer, *, rank: int = RANK, blocks: int = BLOCKS) -> Transformer:
    """A copy of the base with adapters in its last blocks, to be trained; the rest is frozen."""
    model = copy.deepcopy(base).requires_grad_(False)
    for block in list(model.blocks)[BLOCKS - blocks :]:
        for name in ("qkv", "out", "up", "down"):
            setattr(block, name, Adapted(getattr(block, name), rank))
    return model


def build(base: Transformer, members: int, *, rank: int = RANK, blocks: int = BLOCKS) -> Ensemble:
    """Adapters from seeds of their own over one base: all that is frozen is shared."""
    model = adapt(base, rank=rank, blocks=blocks)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    return Ensemble.build(
        lambda: adapt(base, rank=rank, blocks=blocks), members, shared=frozen, strategy="fused"
    )


def train(ens: Ensemble, x: Tensor, y: Tensor, *, epochs: int = EPOCHS) -> None:
    """The optimizer has nothing but adapters to change."""
    fit(
        ens,
        (x, y),
        loss=F.cross_entropy,
        optimizer=optim.Adam(ens, lr=torch.logspace(-2.3, -1.7, len(ens)).tolist()),
        epochs=epochs,
        batch_size=64,
        sampling="shared",
        progress=False,
    )


def merge(member: nn.Module) -> nn.Module:
    """A member as a Transformer without adapters: its weights are ``W + B A``."""
    merged = copy.deepcopy(member)
    for module in list(merged.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Adapted):
                child.base.weight.data += child.b.data @ child.a.data
                setattr(module, name, child.base)
    return merged


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """Of each member, or of the one prediction."""
    return (logits.argmax(-1) == y).double().mean(-1)


@torch.no_grad()
def main() -> None:
    """Learn upright digits, then turned ones."""
    x, y = load()
    with torch.enable_grad():
        base = pretrain(x[:1000], y[:1000])
        ens = build(base, MEMBERS)
        train(ens, turn(x[1000:1400]), y[1000:1400])
    new, labels = turn(x[1400:]), y[1400:]
    print(f"base: {accuracy(base(x[1400:]), labels):.1%} upright, {accuracy(base(new), labels):.1%}"
          f" turned")  # fmt: skip
    logits = ens(new)
    own, together = accuracy(logits, labels), accuracy(combine.probabilities(logits), labels)
    print(f"adapted, turned: {own.min():.1%} to {own.max():.1%}, together {together:.1%}")
    size = sum(p.numel() for p in base.parameters())
    stored = sum(p.numel() for p in ens.parameters())
    print(f"parameters: base {size:,}, base and {MEMBERS} adapters {stored:,},"
          f" {MEMBERS} models {MEMBERS * size:,}")  # fmt: skip
    merged = merge(ens[0])(new)
    same = torch.allclose(merged, logits[0], atol=1e-4)
    print(f"member 0 merged into a plain Transformer: {'the same' if same else 'different'} logits")


if __name__ == "__main__":
    main()
