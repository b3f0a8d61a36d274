"""Paella v1 in its plain form: what one writes down first from the paper (arXiv 2211.07292, first version).

Feature maps stay (b, c, h, w); the condition is expanded to every position; guidance is two forwards; the typical
filter sorts all classes. Parameter names are those of the released checkpoints (dome272/Paella@b1f88ef), so that the
shipped converter copies the weights.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ModulatedNorm(nn.Module):
    """LayerNorm over channels, then gain * w * n + shift * w, w the projected condition."""

    def __init__(self, channels: int):
        super().__init__()
        self.ln = nn.LayerNorm(channels, eps=1e-6)
        self.gamma = nn.Parameter(torch.randn(1, 1, 1))
        self.beta = nn.Parameter(torch.randn(1, 1, 1))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return self.gamma * w * self.ln(x) + self.beta * w


class ResBlock(nn.Module):
    def __init__(self, channels: int, cond: int, skip: int = 0):
        super().__init__()
        self.depthwise = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3, groups=channels))
        self.ln = ModulatedNorm(channels)
        self.channelwise = nn.Sequential(
            nn.Linear(channels + skip, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6))
        self.cond_mapper = nn.Linear(cond, channels)

    def forward(self, x: Tensor, s: Tensor, skip: Tensor | None = None) -> Tensor:
        """x (b, c, h, w), condition map s (b, d, 1, 1) or (b, d, h', w')."""
        size = x.shape[-2:]
        if s.shape[-2:] == (1, 1):
            s = s.expand(-1, -1, *size)
        elif s.shape[-2:] != size:
            s = F.interpolate(s, size=size, mode="bilinear", align_corners=False)
        w = self.cond_mapper(s.permute(0, 2, 3, 1))  # at every position
        h = self.ln(self.depthwise(x).permute(0, 2, 3, 1), w)
        if skip is not None:
            h = torch.cat([h, skip.permute(0, 2, 3, 1)], dim=-1)
        h = self.channelwise(h).permute(0, 3, 1, 2)
        return x + self.gamma[:, None, None] * h


class DenoiseUNet(nn.Module):
    """The token predictor, finest width `c_hidden / 2**(levels - 1)`.

    Args:
        num_labels, c_hidden, c_clip, c_r, down_levels, up_levels: as the released checkpoints name them.
    """

    def __init__(
        self,
        num_labels: int = 8192,
        c_hidden: int = 1280,
        c_clip: int = 1024,
        c_r: int = 64,
        down_levels: tuple[int, ...] = (4, 8, 16),
        up_levels: tuple[int, ...] = (16, 8, 4),
    ):
        super().__init__()
        self.c_r = c_r
        levels, cond = len(down_levels), c_clip + c_r
        widths = [c_hidden // 2 ** (levels - 1 - i) for i in range(levels)]
        self.embedding = nn.Embedding(num_labels, widths[0])
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for i, width in enumerate(widths):
            blocks: list[nn.Module] = [nn.Conv2d(widths[i - 1], width, 4, stride=2, padding=1)] if i > 0 else []
            blocks += [ResBlock(width, cond) for _ in range(down_levels[i])]
            self.down_blocks.append(nn.ModuleList(blocks))
        for j, width in enumerate(reversed(widths)):
            blocks = [ResBlock(width, cond, skip=width if k == 0 < j else 0) for k in range(up_levels[j])]
            if j < levels - 1:
                blocks.append(nn.ConvTranspose2d(width, width // 2, 4, stride=2, padding=1))
            self.up_blocks.append(nn.ModuleList(blocks))
        self.clf = nn.Conv2d(widths[0], num_labels, 1)

    def embed_time(self, r: Tensor) -> Tensor:
        half = self.c_r // 2
        frequencies = torch.exp(torch.arange(half, device=r.device) * -(math.log(10000) / (half - 1)))
        phase = 10000 * torch.cos(r * math.pi / 2)[:, None] * frequencies
        return F.pad(torch.cat([phase.sin(), phase.cos()], dim=1), (0, self.c_r % 2))

    def forward(self, x: Tensor, c: Tensor, r: Tensor) -> Tensor:
        """Tokens (b, h, w), condition (b, d) or (b, d, h, w), times (b,) -> logits (b, v, h, w)."""
        time = self.embed_time(r)[:, :, None, None].to(c.dtype)
        c = c[:, :, None, None] if c.ndim == 2 else c
        s = torch.cat([c, time.expand(-1, -1, *c.shape[-2:])], dim=1)
        x = self.embedding(x).permute(0, 3, 1, 2)
        skips = []
        for level in self.down_blocks:
            for block in level:
                x = block(x, s) if isinstance(block, ResBlock) else block(x)
            skips.append(x)
        x = skips.pop()
        for j, level in enumerate(self.up_blocks):
            skip = skips.pop() if j > 0 else None
            for k, block in enumerate(level):
                if isinstance(block, ResBlock):
                    x = block(x, s, skip if k == 0 else None)
                else:
                    x = block(x)
        return self.clf(x)


def typical_filter(logits: Tensor, mass: float = 0.2) -> Tensor:
    """Locally typical filtering of rows (n, v) with a full sort (arXiv 2202.00666)."""
    log_p = F.log_softmax(logits, dim=-1)
    entropy = -(log_p.exp() * log_p).nansum(dim=-1, keepdim=True)
    distance = (-log_p - entropy).abs()
    ordered, order = distance.sort(dim=-1)
    cumulative = logits.gather(-1, order).softmax(dim=-1).cumsum(dim=-1)
    last = (cumulative < mass).sum(dim=-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    return logits.masked_fill(distance > ordered.gather(-1, last), -torch.inf)


def add_noise(tokens: Tensor, r: float, noise: Tensor) -> Tensor:
    """Each token is replaced with probability cos(pi r / 2)."""
    share = max(math.cos(r * math.pi / 2), 0.0)
    return torch.where(torch.rand(tokens.shape, device=tokens.device) < share, noise, tokens)


def draw_tokens(
    logits_cond: Tensor, logits_null: Tensor, scale: float, temperature: float, mass: float | None, uniforms: Tensor
) -> Tensor:
    """The tail of a step: guidance, filter, Gumbel draw. Logits (b, v, h, w), uniforms (b*h*w, v) -> (b, h, w)."""
    logits = torch.lerp(logits_null, logits_cond, scale)
    b, v, h, w = logits.shape
    rows = logits.permute(0, 2, 3, 1).reshape(-1, v)
    if mass is not None:
        rows = typical_filter(rows, mass)
    gumbel = -torch.log(-torch.log(uniforms + 1e-20) + 1e-20)
    return (rows / max(temperature, 1e-10) + gumbel).argmax(dim=1).view(b, h, w)


@torch.no_grad()
def sample(
    model: nn.Module,
    c: Tensor,
    tokens: Tensor,
    *,
    steps: int = 12,
    scale: float = 5.0,
    temperature: float = 1.0,
    mass: float | None = 0.2,
) -> Tensor:
    """Tokens (b, h, w) sampled from the initial ones, which renoising puts back."""
    initial = tokens
    for i in range(steps):
        r = torch.full((len(tokens),), i / steps, device=tokens.device)
        logits_cond, logits_null = model(tokens, c, r), model(tokens, torch.zeros_like(c), r)
        uniforms = torch.rand(tokens.numel(), logits_cond.shape[1], device=tokens.device)
        tokens = draw_tokens(logits_cond.float(), logits_null.float(), scale, temperature, mass, uniforms)
        if i < steps - 1:
            tokens = add_noise(tokens, (i + 1) / steps, initial)
    return tokens
