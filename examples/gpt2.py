"""GPT-2 small (Radford et al., 2019): 12 blocks of width 768, 1024 tokens, output weights tied."""

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """Causal attention and a perceptron of two layers, each after a layer normalisation."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(samples, tokens, width) -> the same."""
        parts = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attention = functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(attention.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT2(nn.Module):
    """Token and position embeddings, blocks, an output layer that shares its weights."""

    def __init__(
        self, vocabulary: int = 50257, tokens: int = 1024, width: int = 768, depth: int = 12
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.zeros(tokens, width))
        self.blocks = nn.ModuleList(Block(width, width // 64) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(samples, tokens) -> logits (samples, tokens, vocabulary)."""
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def build(batch: int = 8) -> tuple[nn.Module, tuple]:
    """The network, and a batch of 1024 tokens a sample with the next ones as labels."""
    tokens = torch.randint(50257, (2, batch, 1024))
    return GPT2(), (tokens[0], tokens[1])
