"""The two Inception networks of the field, each with the resize that belongs to it.

Owns: 8-bit images in, features out, as torch-fidelity and clean-fid compute them. The blocks of the first network
come from torch-fidelity; its forward pass is our own, because sFID needs values from its middle, and because folded
batch norms and channels_last are faster at equal numbers. Where weights are found is weights.py.
Legend: B images, C channels.
"""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch_fidelity import feature_extractor_inceptionv3 as blocks
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

INPUT_SIZE = 299
POOL_FEATURES = 2048
LOGITS = 1008
SPATIAL_CHANNELS = 7  # ADM takes the first 7 channels of mixed_6/conv: 17 * 17 * 7 = 2023 values
SPATIAL_SIDE = 17
SPATIAL_FEATURES = SPATIAL_SIDE**2 * SPATIAL_CHANNELS


class InceptionV3(nn.Module):
    """The Inception of 2015 as torch-fidelity converted it; parameter names are those of its file."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = blocks.BasicConv2d(3, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = blocks.BasicConv2d(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = blocks.BasicConv2d(32, 64, kernel_size=3, padding=1)
        self.MaxPool_1 = nn.MaxPool2d(kernel_size=3, stride=2)
        self.Conv2d_3b_1x1 = blocks.BasicConv2d(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = blocks.BasicConv2d(80, 192, kernel_size=3)
        self.MaxPool_2 = nn.MaxPool2d(kernel_size=3, stride=2)
        self.Mixed_5b = blocks.InceptionA(192, pool_features=32)
        self.Mixed_5c = blocks.InceptionA(256, pool_features=64)
        self.Mixed_5d = blocks.InceptionA(288, pool_features=64)
        self.Mixed_6a = blocks.InceptionB(288)
        self.Mixed_6b = blocks.InceptionC(768, channels_7x7=128)
        self.Mixed_6c = blocks.InceptionC(768, channels_7x7=160)
        self.Mixed_6d = blocks.InceptionC(768, channels_7x7=160)
        self.Mixed_6e = blocks.InceptionC(768, channels_7x7=192)
        self.Mixed_7a = blocks.InceptionD(768)
        self.Mixed_7b = blocks.InceptionE_1(1280)
        self.Mixed_7c = blocks.InceptionE_2(2048)
        self.fc = nn.Linear(POOL_FEATURES, LOGITS)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pool features, logits without the bias, and the spatial features of sFID.

        Args:
            images: (B, 3, 299, 299), (pixel - 128) / 128.

        Returns:
            (B, 2048), (B, 1008), (B, 2023).
        """
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))  # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(self.MaxPool_1(x)))  # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(self.MaxPool_2(x))))  # (B, 288, 35, 35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # (B, 768, 17, 17)
        spatial = self.Mixed_6d.branch1x1(x)[:, :SPATIAL_CHANNELS]  # (B, 7, 17, 17)
        x = self.Mixed_6e(self.Mixed_6d(x))  # (B, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (B, 2048, 8, 8)
        pool = x.mean(dim=(2, 3))  # (B, 2048)
        logits = pool @ self.fc.weight.T  # (B, 1008)
        return pool, logits, spatial.permute(0, 2, 3, 1).flatten(1)  # NHWC order, as ADM  # fmt: skip

    def fold_batch_norms(self) -> InceptionV3:
        """Put every batch norm into the convolution before it: the same function with half the passes over memory."""
        for block in self.modules():
            if isinstance(block, blocks.BasicConv2d):
                block.conv = fuse_conv_bn_eval(block.conv, block.bn)
                block.bn = nn.Identity()
        return self


def resize_like_tensorflow(images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 to (B, 3, 299, 299) float, (pixel - 128) / 128, by TensorFlow 1's bilinear rule.

    Corners are not aligned and nothing is smoothed when shrinking: an odd rule, and the one behind every published FID.
    """
    size = (INPUT_SIZE, INPUT_SIZE)
    return (interpolate_bilinear_2d_like_tensorflow1x(images.float(), size, align_corners=False) - 128) / 128


def resize_like_clean_fid(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 to (299, 299, 3) float32 in [0, 255]: Pillow's antialiased bicubic, in float."""
    planes = [
        Image.fromarray(image[:, :, channel].astype(np.float32)).resize(
            (INPUT_SIZE, INPUT_SIZE), Image.Resampling.BICUBIC
        )
        for channel in range(3)
    ]
    return np.stack([np.asarray(plane) for plane in planes], axis=2).clip(0, 255)
