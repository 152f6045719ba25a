"""The network as it is trained: SigLIP tower, two-layer projector, Llama; names as in LLaVA's
files.  `packing.py` says what a training sequence is.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from . import packing
from .world import BOS, CHARACTERS, IMAGE_SIZE, LINE_FEED, MAX_VALUE, PAD, PATCH


@dataclass(frozen=True)
class Config:
    """Sizes of the network; `v_` is the vision tower."""

    vocabulary: int = 512
    v_width: int = 384
    v_layers: int = 5
    v_heads: int = 6
    v_mlp: int = 1024
    width: int = 384
    layers: int = 6
    heads: int = 6
    kv_heads: int = 2
    head_size: int = 64
    mlp: int = 768
    rope_theta: float = 10_000.0
    max_positions: int = 2048
    norm_eps: float = 1e-5
    v_norm_eps: float = 1e-6
    visual_tokens: int = (IMAGE_SIZE // PATCH) ** 2


class VisionAttention(nn.Module):
    """Bidirectional attention of the tower."""

    def __init__(self, c):
        super().__init__()
        self.heads = c.v_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(c.v_width, c.v_width) for _ in range(4)
        )

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = (
            proj(x).view(batch, length, self.heads, -1).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(out.transpose(1, 2).reshape(batch, length, width))


class VisionMLP(nn.Module):
    """The tower's feed-forward part."""

    def __init__(self, c):
        super().__init__()
        self.fc1 = nn.Linear(c.v_width, c.v_mlp)
        self.fc2 = nn.Linear(c.v_mlp, c.v_width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class VisionLayer(nn.Module):
    """A pre-norm encoder layer."""

    def __init__(self, c):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(c.v_width, eps=c.v_norm_eps)
        self.self_attn = VisionAttention(c)
        self.layer_norm2 = nn.LayerNorm(c.v_width, eps=c.v_norm_eps)
        self.mlp = VisionMLP(c)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Tower(nn.Module):
    """Patches, learned positions, encoder layers; no norm at the end."""

    def __init__(self, c):
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, c.v_width, PATCH, PATCH)
        self.position_embedding = nn.Embedding(c.visual_tokens, c.v_width)
        self.layers = nn.ModuleList(VisionLayer(c) for _ in range(c.v_layers))

    def forward(self, x):
        batch, _, height, width = x.shape
        x = x.view(batch, 3, height // PATCH, PATCH, width // PATCH, PATCH)
        x = x.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, 3 * PATCH * PATCH)
        weight = self.patch_embedding.weight.flatten(1)
        x = F.linear(x, weight, self.patch_embedding.bias) + self.position_embedding.weight
        for layer in self.layers:
            x = layer(x)
        return x


def rotate(x, cos, sin):
    """Apply rotary positions in the half-split layout of Llama."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class DecoderLayer(nn.Module):
    """A Llama layer."""

    def __init__(self, c):
        super().__init__()
        self.c = c

        def linear(inputs, outputs):
            return nn.Linear(inputs, outputs, bias=False)

        self.q_proj = linear(c.width, c.heads * c.head_size)
        self.k_proj = linear(c.width, c.kv_heads * c.head_size)
        self.v_proj = linear(c.width, c.kv_heads * c.head_size)
        self.o_proj = linear(c.heads * c.head_size, c.width)
        self.gate_proj = linear(c.width, c.mlp)
        self.up_proj = linear(c.width, c.mlp)
        self.down_proj = linear(c.mlp, c.width)
        self.input_layernorm = nn.Parameter(torch.ones(c.width))
        self.post_attention_layernorm = nn.Parameter(torch.ones(c.width))

    def forward(self, x, cos, sin, bias):
        batch, length, width = x.shape
        c = self.c
        y = F.rms_norm(x, (width,), self.input_layernorm, c.norm_eps)
        q = self.q_proj(y).view(batch, length, c.heads, -1).transpose(1, 2)
        k = self.k_proj(y).view(batch, length, c.kv_heads, -1).transpose(1, 2)
        v = self.v_proj(y).view(batch, length, c.kv_heads, -1).transpose(1, 2)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        k, v = (
            t[:, :, None].expand(-1, -1, c.heads // c.kv_heads, -1, -1).flatten(1, 2)
            for t in (k, v)
        )
        # The prefix is causal; what stands behind it sees as much of everything as `bias` says.
        prefix = length - len(bias)
        before, behind = q[:, :, :prefix], q[:, :, prefix:]
        mask = bias.to(q.dtype).expand(batch, c.heads, -1, -1)
        out = torch.cat(
            [
                F.scaled_dot_product_attention(
                    before, k[:, :, :prefix], v[:, :, :prefix], is_causal=True
                ),
                F.scaled_dot_product_attention(behind, k, v, attn_mask=mask),
            ],
            2,
        )
        x = x + self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))
        y = F.rms_norm(x, (width,), self.post_attention_layernorm, c.norm_eps)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


class TinyVLM(nn.Module):
    """The whole network, with the auxiliary head that only training uses."""

    def __init__(self, c=None):
        super().__init__()
        self.c = c = c or Config()
        self.tower = Tower(c)
        self.linear_1 = nn.Linear(c.v_width, c.width)
        self.linear_2 = nn.Linear(c.width, c.width)
        self.embed = nn.Embedding(c.vocabulary, c.width)
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c.layers))
        self.norm = nn.Parameter(torch.ones(c.width))
        self.lm_head = nn.Linear(c.width, c.vocabulary, bias=False)
        # Which glyph lies in the left and the right half of a patch, and which bar's value.
        self.aux = nn.Linear(c.v_width, 3 * (len(CHARACTERS) + 1))
        # The value of the bar that is asked for, from the tokens that end the question.
        self.aux_value = nn.Linear(c.width, MAX_VALUE + 2)
        self._initialise()

        position, visible = packing.layout(c.visual_tokens)
        frequency = 1.0 / c.rope_theta ** (torch.arange(0, c.head_size, 2).float() / c.head_size)
        angle = torch.cat([position[:, None] * frequency] * 2, -1)
        bias = torch.zeros(visible.shape).masked_fill_(~visible, -1e4)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def _initialise(self):
        for name, p in self.named_parameters():
            if p.ndim >= 2:
                is_table = "embed" in name or "lm_head" in name
                nn.init.normal_(p, std=0.02 if is_table else p[0].numel() ** -0.5 * 0.7)
                if any(part in name for part in ("out_proj", "fc2", "o_proj", "down_proj")):
                    p.data *= 0.3
            if name.startswith("aux") or name.endswith("bias"):
                # Auxiliary heads that start at zero leave alone what is trained already.
                nn.init.zeros_(p)

    def forward(self, images, tokens):
        """Run prefixes of two pictures with what is packed behind them.

        Parameters
        ----------
        images : float [2n, 3, H, W]
            In -1..1: n first pictures, then their n second ones.
        tokens : int64 [n, packing.WIDTH]

        Returns
        -------
        hidden : float32 [n, packing.WIDTH, width]
            Normed states of the tokens.
        features : float [2n, visual_tokens, v_width]
            The tower's output.
        """
        features = self.tower(images)
        visual = self.linear_2(F.gelu(self.linear_1(features)))
        width = tokens.shape[1]
        tokens = F.pad(tokens, (0, len(self.bias) - width), value=PAD)
        begin, between = (
            self.embed.weight[token].expand(len(tokens), 1, -1).to(visual.dtype)
            for token in (BOS, LINE_FEED)
        )
        first, second = visual.chunk(2)
        x = torch.cat([begin, first, between, second, self.embed(tokens).to(visual.dtype)], 1)
        prefix = x.shape[1] - len(self.bias)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin, self.bias)
        states = x[:, prefix : prefix + width].float()
        return F.rms_norm(states, (self.c.width,), self.norm, self.c.norm_eps), features
