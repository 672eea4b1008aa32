"""Small models of the kinds that are served, for what a freezing compiler does with their weights."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.parametrizations import weight_norm


def seeded_frozen(kind: type[nn.Module], seed: int) -> nn.Module:
    """A module in eval mode, every tensor of which differs between seeds."""
    torch.manual_seed(seed)
    module = kind().eval()
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if name.endswith(("running_var", "norm.weight", "bn.weight", "scales")):
                value.uniform_(0.5, 2.0)
            elif value.is_floating_point() and not name.endswith("window"):
                value.add_(torch.randn_like(value) * 0.05)
            elif value.dtype == torch.int8:
                value.random_(-100, 100)
    return module


class ResidualBlock(nn.Module):
    """The block of ResNet-18 and ResNet-34."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.down = None
        if stride != 1:
            self.down = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = x if self.down is None else self.down(x)
        x = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(x)) + kept)


class ResNet(nn.Module):
    """ResNet-18, with the names of torchvision's."""

    def __init__(self, widths: tuple[int, ...] = (64, 128, 256, 512), depth: int = 2) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        before = widths[0]
        for number, width in enumerate(widths, 1):
            strides = [2 if number > 1 else 1] + [1] * (depth - 1)
            blocks = [ResidualBlock(before if not at else width, width, stride) for at, stride in enumerate(strides)]
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
            before = width
        self.fc = nn.Linear(before, 1000 if depth > 1 else 10)
        self.layers = len(widths)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for number in range(1, self.layers + 1):
            x = self.get_submodule(f"layer{number}")(x)
        out: torch.Tensor = self.fc(x.mean((2, 3)))
        return out


class SmallResNet(ResNet):
    """The same in small."""

    def __init__(self) -> None:
        super().__init__((16, 24), 1)


class HalfResNet(SmallResNet):
    """In bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.to(torch.bfloat16)


class Depthwise(nn.Module):
    """A depthwise convolution with squeeze and excitation, as in MobileNet and EfficientNet."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False)
        self.bn2 = nn.BatchNorm2d(24)
        self.squeeze = nn.Conv2d(24, 6, 1)
        self.excite = nn.Conv2d(6, 24, 1)
        self.project = nn.Conv2d(24, 8, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.silu(self.bn1(self.expand(x)))
        x = F.silu(self.bn2(self.depthwise(x)))
        x = x * torch.sigmoid(self.excite(F.silu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        out: torch.Tensor = self.bn3(self.project(x))
        return out


class Attention(nn.Module):
    """Self-attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.causal = heads, causal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        split = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(split[0], split[1], split[2], is_causal=self.causal)
        out: torch.Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return out


class Layer(nn.Module):
    """A transformer's layer."""

    def __init__(self, width: int, *, causal: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, 4, causal=causal)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        out: torch.Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class VisionTransformer(nn.Module):
    """ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 32))
        self.positions = nn.Parameter(torch.randn(1, 17, 32))
        self.layers = nn.Sequential(Layer(32), Layer(32))
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        out: torch.Tensor = self.head(self.layers(x)[:, 0])
        return out


class Bert(nn.Module):
    """BERT: embeddings of three kinds, a position buffer, a pooler."""

    order: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.kinds = nn.Embedding(50, 32), nn.Embedding(16, 32), nn.Embedding(2, 32)
        self.register_buffer("order", torch.arange(16).unsqueeze(0), persistent=False)
        self.norm = nn.LayerNorm(32)
        self.layers = nn.Sequential(Layer(32), Layer(32))
        self.pooler = nn.Linear(32, 32)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.words(tokens) + self.places(self.order[:, : tokens.shape[1]]) + self.kinds(torch.zeros_like(tokens))
        return torch.tanh(self.pooler(self.layers(self.norm(x))[:, 0]))


class HalfBert(Bert):
    """In bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.to(torch.bfloat16)


class TiedGpt(nn.Module):
    """GPT, whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, 32), nn.Embedding(16, 32)
        self.layers = nn.Sequential(Layer(32, causal=True), Layer(32, causal=True))
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1]))
        out: torch.Tensor = self.head(self.norm(self.layers(x)))
        return out


class BothWays(nn.Module):
    """A bidirectional LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(8, 16, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.rnn(x)[0])
        return out


class UNet(nn.Module):
    """A U-Net with GroupNorm and transposed convolutions, as in diffusion models."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.down, self.up = nn.Conv2d(16, 32, 3, 2, 1), nn.ConvTranspose2d(32, 16, 2, 2)
        self.norm1, self.norm2 = nn.GroupNorm(4, 16), nn.GroupNorm(4, 32)
        self.last = nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.silu(self.norm1(self.first(x)))
        deep = F.silu(self.norm2(self.down(x)))
        out: torch.Tensor = self.last(torch.cat([x, self.up(deep)], 1))
        return out


class WeightNormed(nn.Module):
    """Weights by their direction and length, as in vocoders."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = weight_norm(nn.Conv1d(4, 8, 3, padding=1))
        self.head = weight_norm(nn.Linear(8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(torch.relu(self.conv(x)).mean(2))
        return out


class Int8Linear(nn.Module):
    """A weight of 8 bits with a scale for each row."""

    weight: torch.Tensor
    scales: torch.Tensor

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-100, 100, (after, before), dtype=torch.int8))
        self.register_buffer("scales", torch.rand(after).to(torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype)) * self.scales


class WeightOnly(nn.Module):
    """Weight-only quantisation."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Int8Linear(32, 64), Int8Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(torch.relu(self.up(x)))
        return out


class Experts(nn.Module):
    """A mixture of experts in stacked weights."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 4)
        self.up = nn.Parameter(torch.randn(4, 16, 32))
        self.down = nn.Parameter(torch.randn(4, 32, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share = torch.softmax(self.gate(x), -1)
        hidden = torch.relu(torch.einsum("bi,eio->beo", x, self.up))
        return torch.einsum("be,beo,eoi->bi", share, hidden, self.down)


class Clip(nn.Module):
    """Two towers and a learned temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 16, 8, 8), nn.Flatten(2))
        self.look, self.read = nn.Linear(16, 32, bias=False), nn.Linear(32, 32, bias=False)
        self.words = nn.Embedding(50, 32)
        self.temperature = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, image: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        seen = F.normalize(self.look(self.image(image).mean(2)), dim=-1)
        read = F.normalize(self.read(self.words(tokens).mean(1)), dim=-1)
        return self.temperature.exp() * seen @ read.t()


class Bags(nn.Module):
    """Embedding bags and a dense part, as in recommenders."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.EmbeddingBag(30, 8, mode="sum"), nn.EmbeddingBag(40, 8, mode="mean")
        self.dense = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.top = nn.Linear(24, 1)

    def forward(self, users: torch.Tensor, items: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.top(torch.cat([self.users(users), self.items(items), self.dense(x)], 1))
        return out


class Masked(nn.Module):
    """A weight under a large mask that no state_dict has."""

    mask: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(300, 300))
        self.register_buffer("mask", torch.ones(300, 300).tril(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight * self.mask)


class Spectral(nn.Module):
    """A weight in the frequency domain."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(self.filter))
        return out


_IMAGE, _TOKENS = torch.rand(1, 3, 32, 32), torch.randint(0, 30, (2, 12))

MODELS: dict[str, tuple[type[nn.Module], tuple[torch.Tensor, ...]]] = {
    "resnet": (SmallResNet, (_IMAGE,)),
    "resnet-bf16": (HalfResNet, (_IMAGE.to(torch.bfloat16),)),
    "depthwise": (Depthwise, (_IMAGE,)),
    "vit": (VisionTransformer, (_IMAGE,)),
    "bert": (Bert, (_TOKENS,)),
    "bert-bf16": (HalfBert, (_TOKENS,)),
    "gpt-tied": (TiedGpt, (_TOKENS,)),
    "lstm": (BothWays, (torch.rand(2, 6, 8),)),
    "unet": (UNet, (_IMAGE,)),
    "weight-norm": (WeightNormed, (torch.rand(2, 4, 10),)),
    "int8": (WeightOnly, (torch.rand(2, 32).to(torch.bfloat16),)),
    "experts": (Experts, (torch.rand(3, 16),)),
    "clip": (Clip, (_IMAGE, _TOKENS)),
    "bags": (Bags, (_TOKENS, _TOKENS, torch.rand(2, 4))),
    "spectral": (Spectral, (torch.rand(2, 16),)),
}
"""By name: a model and inputs for it."""
