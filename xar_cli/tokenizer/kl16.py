"""The KL-16 autoencoder of MAR: an image <-> moments on a grid with one position for each 16 x 16 pixels.

Owns the architecture, under the names of the published `kl16.ckpt`, and the reading of its files.
Latent scaling and uint8 are not here: codec.py owns them.

Shapes: B batch, C width of a level, Z = 16 latent channels, S image side, H = W = S / 16. They are written for
a square image; each axis goes by itself, so that a rectangle of multiples of 16 works alike.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xar_cli.compiler import compile_pays
from xar_cli.config.schema import KL16_CHANNELS, KL16_STRIDE
from xar_cli.errors import UserError
from xar_cli.hub import local_file
from xar_cli.precision import float32_arithmetic
from xar_cli.tensor_files import State, check_state, is_state, read_tensor_file
from xar_cli.tokenizer.protocol import Half

WIDTH = 128  # channels of the first level
MULTIPLIERS = (1, 1, 2, 2, 4)  # width of each level, in WIDTHs; each level but the last halves the side
ENCODER_BLOCKS = 2  # residual blocks a level
DECODER_BLOCKS = 3
LOGVAR_RANGE = (-30.0, 20.0)
PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ON_GPU_ONLY = ("tf32", "fp16")
FLOP_PER_PIXEL: dict[Half, float] = {"encode": 2.1e6, "decode": 3.8e6}


class KL16:
    """The loaded autoencoder, with the weights' identity (a `Tokenizer`).

    Args:
        network: the autoencoder, on its device and in its dtype, in eval mode.
        identity: `kl16:` and the sha256 of the weights.
        precision: `tf32` lets a GPU take TF32 for float32 weights; otherwise the weights' dtype says it.
    """

    kind = "kl16"
    stride = KL16_STRIDE
    image_channels = 3
    latent_channels = KL16_CHANNELS

    def __init__(self, network: AutoencoderKL, identity: str, precision: str = "fp32") -> None:
        self.network = network
        self.identity = identity
        self._precision = precision
        self._halves: dict[Half, Callable[[Tensor], Tensor]] = {"encode": network.encode, "decode": network.decode}
        parameter = next(network.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [-1, 1] -> float32 moments (B, 32, H, W): mean, clamped log-variance."""
        with float32_arithmetic(self._precision):
            return self._halves["encode"](self._place(images)).float()

    @torch.no_grad()
    def decode(self, raw_latents: Tensor) -> Tensor:
        """Unscaled latents (B, 16, H, W) -> images (B, 3, S, S) in float32, about [-1, 1], not clipped."""
        with float32_arithmetic(self._precision):
            return self._halves["decode"](self._place(raw_latents)).float()

    def expect(self, half: Half, pixels: int) -> None:
        """Get ready to encode or decode so many pixels: on a GPU that half is compiled where it pays."""
        if self.device.type == "cuda" and compile_pays(pixels * FLOP_PER_PIXEL[half], self.device):
            self.compile(half)

    def compile(self, half: Half) -> None:
        """Let a half go through torch.compile, at its next use."""
        self._halves[half] = CompiledForOneShape(self._halves[half])

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype).contiguous(memory_format=torch.channels_last)


class CompiledForOneShape:
    """A function compiled for the shape of its first input; others, such as a smaller last batch, are not worth it."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._eager, self._compiled = function, torch.compile(function, dynamic=False)
        self._shape: torch.Size | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """What the function gives for x."""
        if self._shape is None:
            self._shape = x.shape
        return self._compiled(x) if x.shape == self._shape else self._eager(x)


def load_kl16(source: str | Path, device: torch.device, precision: str = "fp32") -> KL16:
    """Read `kl16.ckpt`, or safetensors with the same or diffusers' names, and build the autoencoder.

    Args:
        source: the file of weights, or its `hf://` name.
        device: where the autoencoder runs.
        precision: a name in PRECISIONS.

    Raises:
        UserError: the file is missing, damaged, unsafe, or holds other tensors than KL-16's.
    """
    state = read_kl16_state(local_file(source))
    network = build_on_meta()
    network.load_state_dict(state, strict=True, assign=True)
    network = network.to(device, PRECISIONS[precision]).to(memory_format=torch.channels_last)
    for name, parameter in network.named_parameters():
        if parameter.data_ptr() == state[name].data_ptr():  # not copied so far: still mapped from the file
            parameter.data = parameter.data.clone()
    return KL16(network.eval().requires_grad_(False), identity_of(state), precision)


def build_on_meta() -> AutoencoderKL:
    """The autoencoder without memory for its weights: names and shapes only."""
    with torch.device("meta"):
        return AutoencoderKL()


def read_kl16_state(path: Path, content: Any = None) -> State:
    """The weights in a file under the names of `kl16.ckpt`; raises UserError as `load_kl16` does.

    Args:
        path: the file.
        content: what `read_tensor_file` gave for it, where that is at hand.
    """
    state = _state_in(read_tensor_file(path)[0] if content is None else content)
    if not is_state(state):
        raise UserError(
            f"'{path}' holds no weights: neither a state dict nor one under 'model'.",
            "Give kl16.ckpt, or the same weights as safetensors.",
        )
    expected = {name: tensor.shape for name, tensor in build_on_meta().state_dict().items()}
    state = from_diffusers(state, expected) if "encoder.conv_norm_out.weight" in state else dict(state)
    check_state(
        state,
        expected,
        f"'{path}' as the KL-16 tokenizer",
        "Give kl16.ckpt, or the same weights as safetensors.",
    )
    return state


def is_kl16(state: Any) -> bool:
    """Whether what a file holds is this tokenizer's weights, by a name that only it has."""
    state = _state_in(state)
    return is_state(state) and "post_quant_conv.weight" in state


def _state_in(content: Any) -> Any:
    """The state dict in what a file holds: under 'model', as in kl16.ckpt, or the whole of it."""
    return content.get("model", content) if isinstance(content, Mapping) else content


def identity_of(state: Mapping[str, Tensor]) -> str:
    """`kl16:` and the sha256 of the weights in name order (as float32), whatever file they came from."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name} {tuple(state[name].shape)}\n".encode())
        digest.update(state[name].detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return f"kl16:{digest.hexdigest()}"


def from_diffusers(state: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> State:
    """Rename weights from the names of diffusers' AutoencoderKL to those of `kl16.ckpt`.

    Diffusers counts decoder levels from the smallest image, and stores the 1x1 convolutions of attention as
    matrices; these get their trailing dimensions back. Names that no rule knows are kept for `check_state`.
    """
    renamed: State = {}
    for name, tensor in state.items():
        for pattern, replacement in _DIFFUSERS_NAMES:
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"^decoder\.up\.(\d+)", lambda m: f"decoder.up.{len(MULTIPLIERS) - 1 - int(m[1])}", name)
        if name in expected and len(expected[name]) == 4 and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        renamed[name] = tensor
    return renamed


_DIFFUSERS_NAMES = (
    (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
    (r"\.down_blocks\.(\d+)\.attentions\.", r".down.\1.attn."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.up_blocks\.(\d+)\.resnets\.", r".up.\1.block."),
    (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", r".up.\1.upsample."),
    (r"\.mid_block\.resnets\.0\.", r".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", r".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", r".mid.attn_1."),
    (r"\.conv_shortcut\.", r".nin_shortcut."),
    (r"\.conv_norm_out\.", r".norm_out."),
    (r"\.group_norm\.", r".norm."),
    (r"\.(to_q|query)\.", r".q."),
    (r"\.(to_k|key)\.", r".k."),
    (r"\.(to_v|value)\.", r".v."),
    (r"\.(to_out\.0|proj_attn)\.", r".proj_out."),
)


class AutoencoderKL(nn.Module):
    """LDM's AutoencoderKL at the size of KL-16: 66.46 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.decoder = Decoder()
        self.quant_conv = nn.Conv2d(2 * KL16_CHANNELS, 2 * KL16_CHANNELS, 1)
        self.post_quant_conv = nn.Conv2d(KL16_CHANNELS, KL16_CHANNELS, 1)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [-1, 1] -> moments (B, 2Z, H, W)."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return torch.cat([mean, logvar.clamp(*LOGVAR_RANGE)], dim=1)

    def decode(self, raw_latents: Tensor) -> Tensor:
        """Unscaled latents (B, Z, H, W) -> images (B, 3, S, S)."""
        return self.decoder(self.post_quant_conv(raw_latents))


class Encoder(nn.Module):
    """Images -> 2Z channels; attention after each block of the last level."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = _conv3(3, WIDTH)
        widths = [WIDTH * multiplier for multiplier in MULTIPLIERS]
        self.down = nn.ModuleList(
            EncoderLevel(width_in, width_out, last=level == len(widths) - 1)
            for level, (width_in, width_out) in enumerate(zip([WIDTH, *widths], widths, strict=False))
        )
        self.mid = Middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = _conv3(widths[-1], 2 * KL16_CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, 2Z, H, W)."""
        x = self.conv_in(x)  # (B, 128, S, S)
        for level in self.down:
            x = level(x)  # (B, C, S/2, S/2), four times; the last keeps its side
        return self.conv_out(norm_silu(self.norm_out, self.mid(x)))


class Decoder(nn.Module):
    """Z channels -> images; its levels have no attention. `up[0]` makes the largest image, and runs last."""

    def __init__(self) -> None:
        super().__init__()
        widths = [WIDTH * multiplier for multiplier in MULTIPLIERS]
        self.conv_in = _conv3(KL16_CHANNELS, widths[-1])
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList(
            DecoderLevel(width_in, width_out, last=level == 0)
            for level, (width_in, width_out) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True))
        )
        self.norm_out = _norm(widths[0])
        self.conv_out = _conv3(widths[0], 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, Z, H, W) -> (B, 3, S, S)."""
        x = self.mid(self.conv_in(x))  # (B, 512, H, W)
        for level in reversed(self.up):
            x = level(x)  # (B, C, 2H, 2W), four times; the last keeps its side
        return self.conv_out(norm_silu(self.norm_out, x))


class EncoderLevel(nn.Module):
    """Residual blocks, then half the side; the last level has attention after each block instead."""

    def __init__(self, width_in: int, width_out: int, last: bool) -> None:
        super().__init__()
        self.block = _blocks(ENCODER_BLOCKS, width_in, width_out)
        self.attn = nn.ModuleList(AttentionBlock(width_out) for _ in range(ENCODER_BLOCKS if last else 0))
        self.downsample = nn.Identity() if last else Downsample(width_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H/2, W/2), or (B, C_out, H, W) in the last level."""
        for index, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        return self.downsample(x)


class DecoderLevel(nn.Module):
    """Residual blocks of one width, then twice the side, except in the last level."""

    def __init__(self, width_in: int, width_out: int, last: bool) -> None:
        super().__init__()
        self.block = _blocks(DECODER_BLOCKS, width_in, width_out)
        self.upsample = nn.Identity() if last else Upsample(width_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, 2H, 2W), or (B, C_out, H, W) in the last level."""
        for block in self.block:
            x = block(x)
        return self.upsample(x)


class Middle(nn.Module):
    """Residual, attention, residual at the smallest side."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(width, width)
        self.attn_1 = AttentionBlock(width)
        self.block_2 = ResidualBlock(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.block_2(self.attn_1(self.block_1(x)))


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on x where the width changes."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.norm1 = _norm(width_in)
        self.conv1 = _conv3(width_in, width_out)
        self.norm2 = _norm(width_out)
        self.conv2 = _conv3(width_out, width_out)
        self.nin_shortcut = nn.Identity() if width_in == width_out else nn.Conv2d(width_in, width_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H, W)."""
        h = self.conv1(norm_silu(self.norm1, x))
        h = self.conv2(norm_silu(self.norm2, h))
        return self.nin_shortcut(x) + h


class AttentionBlock(nn.Module):
    """Single-head attention over all positions, scale 1/sqrt(C), added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))  # (B, 1, HW, C)
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)  # (B, C, H, W)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Halve the side: one row and column of zeros after the last, then a 3x3 convolution of stride 2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H/2, W/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the side by repeating pixels, then a 3x3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = _conv3(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """SiLU of the normalised x; in eager code it is written over the norm's own output."""
    if torch.compiler.is_compiling():
        return F.silu(group_norm(norm, x)).to(x.dtype)
    return F.silu(norm(x), inplace=True)


def group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """The norm of x (B, C, H, W), from the moments of its channels: (B, C, H, W) in float32.

    Torch's own kernel on a GPU copies from channels-last to another layout and back. Moments of a channel are a sum
    over rows of memory, and the rest is one multiplication and one addition for each value, which compiles into
    the reading of x.
    """
    wide = x.float()
    var, mean = (moment.unflatten(1, (norm.num_groups, -1)) for moment in torch.var_mean(wide, (2, 3), correction=0))
    group_mean = mean.mean(-1, keepdim=True)  # (B, groups, 1)
    group_var = var.mean(-1, keepdim=True) + (mean - group_mean).square().mean(-1, keepdim=True)
    scale = norm.weight.float() * torch.rsqrt(group_var + norm.eps).expand_as(mean).flatten(1)  # (B, C)
    shift = norm.bias.float() - group_mean.expand_as(mean).flatten(1) * scale
    return wide * scale[..., None, None] + shift[..., None, None]


def _blocks(count: int, width_in: int, width_out: int) -> nn.ModuleList:
    return nn.ModuleList(ResidualBlock(width_in if i == 0 else width_out, width_out) for i in range(count))


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, width, eps=1e-6)


def _conv3(width_in: int, width_out: int) -> nn.Conv2d:
    return nn.Conv2d(width_in, width_out, 3, padding=1)
