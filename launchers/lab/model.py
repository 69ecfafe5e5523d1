"""A compact GPT whose weights have a leading replica axis, so that M replicas are one batched forward and backward.

Pre-norm, RoPE, SwiGLU, tied embeddings, no biases: the architecture of the reference GPT, without the overhead that
Megatron's modules have at these sizes. Every weight is one tensor (M, ...); replica m's own parameter is its slice m,
a contiguous view of the same memory, which is what that replica's optimizer steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

ROPE_BASE = 10_000.0


@dataclass(frozen=True)
class Size:
    """Shape of one model; `ffn` is the width of each half of the gated layer."""

    layers: int
    hidden: int
    heads: int
    ffn: int
    vocab: int
    seq_length: int


SIZES = {
    "nano": Size(layers=1, hidden=16, heads=2, ffn=24, vocab=512, seq_length=16),  # for tests
    "100k": Size(layers=2, hidden=64, heads=4, ffn=160, vocab=512, seq_length=64),
    "100k-short": Size(layers=2, hidden=64, heads=4, ffn=160, vocab=512, seq_length=16),
    "1m": Size(layers=4, hidden=128, heads=4, ffn=344, vocab=1024, seq_length=64),
    "wide": Size(layers=2, hidden=64, heads=4, ffn=512, vocab=512, seq_length=64),
    "4m": Size(layers=6, hidden=224, heads=7, ffn=600, vocab=2048, seq_length=128),
    "10m": Size(layers=8, hidden=320, heads=8, ffn=856, vocab=2048, seq_length=128),
}


class ReplicatedGpt:
    """`weights[name]` is (M, *shape), requires a gradient, and starts equal on all replicas."""

    def __init__(self, size: Size, replicas: int, seed: int, device: torch.device) -> None:
        self.size, self.replicas = size, replicas
        self.weights: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(seed)
        for name, shape in shapes(size).items():
            one = _initial(name, shape, size, generator).to(device)
            self.weights[name] = one.expand(replicas, *shape).contiguous().requires_grad_()
        head = size.hidden // size.heads
        self.cos, self.sin = _rotations(size.seq_length, head, device)

    def replica(self, m: int) -> list[tuple[str, torch.nn.Parameter]]:
        """The parameters of replica m, by name: views of the common memory."""
        return [(name, torch.nn.Parameter(stack.detach()[m])) for name, stack in self.weights.items()]

    def losses(self, tokens: Tensor) -> Tensor:
        """Mean next-token loss, nats per token, of each replica on its own (M, B, T + 1) tokens: (M,)."""
        return mean_losses(self.weights, self.size, tokens, self.cos, self.sin)

    @torch.no_grad()
    def logits(self, m: int, tokens: Tensor) -> Tensor:
        """Replica m's logits for the token after each of (N, T): (N, T, vocab)."""
        one = {name: stack.detach()[m : m + 1] for name, stack in self.weights.items()}
        return all_logits(one, self.size, tokens.unsqueeze(0), self.cos, self.sin).view(*tokens.shape, -1)

    @torch.no_grad()
    def evaluate(self, m: int, tokens: Tensor, at_once: int) -> float:
        """Mean loss of replica m's weights on (N, T + 1) tokens."""
        one = {name: stack.detach()[m : m + 1] for name, stack in self.weights.items()}
        total = 0.0
        for part in tokens.split(at_once):
            total += float(mean_losses(one, self.size, part.unsqueeze(0), self.cos, self.sin)) * len(part)
        return total / len(tokens)


def shapes(size: Size) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter; matrices are (outputs, inputs)."""
    found: dict[str, tuple[int, ...]] = {"embedding.weight": (size.vocab, size.hidden)}
    for i in range(size.layers):
        found |= {
            f"layers.{i}.attention_norm.weight": (size.hidden,),
            f"layers.{i}.attention.qkv.weight": (3 * size.hidden, size.hidden),
            f"layers.{i}.attention.out.weight": (size.hidden, size.hidden),
            f"layers.{i}.mlp_norm.weight": (size.hidden,),
            f"layers.{i}.mlp.gate_up.weight": (2 * size.ffn, size.hidden),
            f"layers.{i}.mlp.down.weight": (size.hidden, size.ffn),
        }
    return found | {"final_norm.weight": (size.hidden,)}


def parameter_count(size: Size) -> int:
    return sum(math.prod(shape) for shape in shapes(size).values())


def _initial(name: str, shape: tuple[int, ...], size: Size, generator: torch.Generator) -> Tensor:
    """GPT-2's: .02, residual outputs scaled down by the depth; norms are 1."""
    if len(shape) == 1:
        return torch.ones(shape)
    std = 0.02 / math.sqrt(2 * size.layers) if name.endswith(("out.weight", "down.weight")) else 0.02
    return torch.randn(shape, generator=generator) * std


def _rotations(length: int, head: int, device: torch.device) -> tuple[Tensor, Tensor]:
    frequencies = ROPE_BASE ** (-torch.arange(0, head, 2, dtype=torch.float32) / head)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    return angles.cos().to(device), angles.sin().to(device)


def mean_losses(weights: dict[str, Tensor], size: Size, tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each replica's mean loss: (M,). tokens (M, B, T + 1)."""
    inputs, labels = tokens[..., :-1], tokens[..., 1:]
    logits = all_logits(weights, size, inputs, cos, sin)
    nats = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return nats.view(len(inputs), -1).mean(1)


def all_logits(weights: dict[str, Tensor], size: Size, inputs: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(M, B * T, vocab) of (M, B, T) tokens."""
    M, B, T = inputs.shape
    table = weights["embedding.weight"]
    first = torch.arange(M, device=inputs.device).view(M, 1, 1) * size.vocab
    x = functional.embedding(inputs + first, table.flatten(0, 1)).view(M, B * T, size.hidden)
    for i in range(size.layers):
        layer = f"layers.{i}."
        x = x + _attention(weights, layer, _norm(x, weights[layer + "attention_norm.weight"]), size, B, cos, sin)
        x = x + _mlp(weights, layer, _norm(x, weights[layer + "mlp_norm.weight"]))
    return torch.bmm(_norm(x, weights["final_norm.weight"]), table.mT)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMS norm with each replica's own weight (M, d)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight.unsqueeze(1)


def _attention(
    weights: dict[str, Tensor], layer: str, x: Tensor, size: Size, batch: int, cos: Tensor, sin: Tensor
) -> Tensor:
    M, length = x.shape[0], x.shape[1] // batch
    qkv = torch.bmm(x, weights[layer + "attention.qkv.weight"].mT)
    q, k, v = qkv.view(M * batch, length, 3, size.heads, -1).permute(2, 0, 3, 1, 4)
    q, k = _rotate(q, cos[:length], sin[:length]), _rotate(k, cos[:length], sin[:length])
    mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return torch.bmm(
        mixed.transpose(1, 2).reshape(M, batch * length, size.hidden), weights[layer + "attention.out.weight"].mT
    )


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _mlp(weights: dict[str, Tensor], layer: str, x: Tensor) -> Tensor:
    gate, up = torch.bmm(x, weights[layer + "mlp.gate_up.weight"].mT).chunk(2, dim=-1)
    return torch.bmm(functional.silu(gate) * up, weights[layer + "mlp.down.weight"].mT)
