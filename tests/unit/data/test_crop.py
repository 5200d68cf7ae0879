"""The crop to the pixel: stored numbers, and an independent computation of the rule beside them."""

import numpy as np
import pytest
from PIL import Image

from xar_cli.data.images import centre_crop

# (width, height, size): pixels of the crop of `pattern`
STORED = {
    (7, 5, 4): [[12, 20, 29, 38], [35, 51, 67, 83], [59, 83, 107, 134], [82, 114, 149, 125]],
    (33, 17, 4): [[121, 156, 162, 177], [185, 200, 169, 104], [166, 83, 90, 84], [56, 65, 108, 134]],
    (40, 3, 2): [[130, 145], [152, 180]],
    (3, 41, 2): [[213, 51], [35, 34]],
    (2, 3, 4): [[2, 3, 9, 11], [9, 11, 18, 21], [15, 19, 28, 31], [22, 27, 36, 42]],
    (8, 8, 4): [[12, 31, 50, 69], [43, 82, 121, 117], [74, 133, 128, 145], [105, 141, 157, 172]],
    (15, 31, 4): [[142, 181, 201, 189], [192, 196, 144, 110], [151, 93, 56, 60], [108, 73, 82, 114]],
    (4, 4, 4): [[0, 7, 14, 21], [13, 25, 37, 49], [26, 43, 60, 77], [39, 61, 83, 105]],
    (1, 1, 2): [[0, 0], [0, 0]],
    (9, 4, 4): [[14, 21, 28, 35], [37, 49, 61, 73], [60, 77, 94, 111], [83, 105, 127, 149]],
    (500, 375, 4): [[130, 130, 130, 132], [130, 130, 130, 131], [131, 131, 130, 130], [130, 131, 131, 131]],
}


def pattern(width: int, height: int) -> np.ndarray:
    """Grey pixels that differ in every direction, without a random generator."""
    y, x = np.mgrid[:height, :width]
    return ((x * 7 + y * 13 + (x * y) % 17 * 5) % 256).astype(np.uint8)


@pytest.mark.parametrize("case", STORED)
def test_crops_are_the_stored_ones(case):
    width, height, size = case
    assert np.asarray(centre_crop(Image.fromarray(pattern(width, height)), size)).tolist() == STORED[case]


def box(distance: np.ndarray) -> np.ndarray:
    return ((distance > -0.5 + 1e-9) & (distance <= 0.5 + 1e-9)).astype(float)


def bicubic(distance: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution with a = -0.5."""
    d = np.abs(distance)
    near = (1.5 * d - 2.5) * d * d + 1
    far = ((-0.5 * d + 2.5) * d - 4) * d + 2
    return np.where(d < 1, near, np.where(d < 2, far, 0))


def resample(values: np.ndarray, length: int, kernel) -> np.ndarray:
    """Resize the last axis: the kernel is stretched by the reduction, its weights sum to 1; rounded to whole
    numbers.
    """
    scale = values.shape[-1] / length
    centres = (np.arange(length) + 0.5) * scale
    weights = kernel((np.arange(values.shape[-1])[None] + 0.5 - centres[:, None]) / max(scale, 1))
    weights /= weights.sum(1, keepdims=True)
    return np.clip(np.floor(values @ weights.T + 0.5), 0, 255)


def resize(values: np.ndarray, width: int, height: int, kernel) -> np.ndarray:
    return resample(resample(values, width, kernel).T, height, kernel).T


def reference_crop(values: np.ndarray, size: int) -> np.ndarray:
    """SPEC 1 in plain numpy."""
    values = values.astype(float)
    while min(values.shape) >= 2 * size:
        values = resize(values, values.shape[1] // 2, values.shape[0] // 2, box)
    scale = size / min(values.shape)
    height, width = (round(side * scale) for side in values.shape)
    values = resize(values, width, height, bicubic)
    top, left = (height - size) // 2, (width - size) // 2
    return values[top : top + size, left : left + size]


@pytest.mark.parametrize("case", [*STORED, (64, 100, 16), (99, 59, 16), (30, 900, 16), (12, 13, 16)])
def test_crops_follow_the_rule(case):
    width, height, size = case
    pixels = pattern(width, height)
    ours = np.asarray(centre_crop(Image.fromarray(pixels), size)).astype(float)
    assert np.abs(ours - reference_crop(pixels, size)).max() <= 1  # the kernels of Pillow are in fixed point


def test_colours_are_cropped_alike():
    grey = pattern(37, 23)
    rgb = np.stack([grey, 255 - grey, grey // 2], axis=-1)
    cropped = np.asarray(centre_crop(Image.fromarray(rgb), 8))
    for channel in range(3):
        assert np.array_equal(cropped[..., channel], centre_crop(Image.fromarray(rgb[..., channel].copy()), 8))
