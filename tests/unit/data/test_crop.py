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

# (width, height, (height, width)): pixels of the crop of `pattern` to a rectangle
OBLONG = {
    (7, 5, (2, 3)): [[19, 49, 79], [58, 119, 117]],
    (33, 17, (2, 6)): [[68, 121, 167, 169, 148, 97], [159, 182, 154, 119, 83, 98]],
    (17, 33, (3, 2)): [[101, 171], [158, 104], [98, 140]],
    (40, 3, (2, 4)): [[133, 130, 145, 157], [176, 152, 180, 203]],
    (3, 41, (2, 3)): [[247, 8, 25], [4, 26, 48]],
    (2, 3, (3, 4)): [[2, 3, 9, 11], [9, 11, 18, 21], [15, 19, 28, 31]],
    (500, 375, (2, 3)): [[130, 130, 131], [131, 131, 131]],
    (14, 12, (4, 2)): [[62, 86], [125, 138], [160, 183], [201, 183]],
    (1, 1, (1, 2)): [[0, 0]],
    (8, 8, (2, 4)): [[43, 82, 121, 117], [74, 133, 128, 145]],
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
    """ADM's centre crop in plain numpy."""
    values = values.astype(float)
    while min(values.shape) >= 2 * size:
        values = resize(values, values.shape[1] // 2, values.shape[0] // 2, box)
    scale = size / min(values.shape)
    height, width = (round(side * scale) for side in values.shape)
    values = resize(values, width, height, bicubic)
    top, left = (height - size) // 2, (width - size) // 2
    return values[top : top + size, left : left + size]


def reference_rectangle(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """The rule for rectangles in plain numpy, told by the side that binds: the one nearer to its target."""
    values = values.astype(float)
    while values.shape[0] >= 2 * height and values.shape[1] >= 2 * width:
        values = resize(values, values.shape[1] // 2, values.shape[0] // 2, box)
    rows, columns = values.shape
    if rows * width <= columns * height:  # the image is wider than the target: its height binds
        values = resize(values, round(columns * height / rows), height, bicubic)
    else:
        values = resize(values, width, round(rows * width / columns), bicubic)
    top, left = (values.shape[0] - height) // 2, (values.shape[1] - width) // 2
    return values[top : top + height, left : left + width]


@pytest.mark.parametrize("case", [*STORED, (64, 100, 16), (99, 59, 16), (30, 900, 16), (12, 13, 16)])
def test_crops_follow_the_rule(case):
    width, height, size = case
    pixels = pattern(width, height)
    ours = np.asarray(centre_crop(Image.fromarray(pixels), size)).astype(float)
    assert np.abs(ours - reference_crop(pixels, size)).max() <= 1  # the kernels of Pillow are in fixed point


@pytest.mark.parametrize("case", OBLONG)
def test_crops_to_a_rectangle_are_the_stored_ones_and_follow_the_rule(case):
    width, height, size = case
    pixels = pattern(width, height)
    ours = np.asarray(centre_crop(Image.fromarray(pixels), size))
    assert ours.tolist() == OBLONG[case]
    assert np.abs(ours - reference_rectangle(pixels, *size)).max() <= 1


def test_a_rectangle_is_halved_only_while_both_sides_allow_it():
    exact = pattern(6, 4)  # 6 wide, 4 high
    image = Image.fromarray(np.kron(exact, np.ones((4, 4), np.uint8)))
    assert np.array_equal(centre_crop(image, (4, 6)), exact)  # halved twice, then as it is
    wide = pattern(24, 4)
    assert np.array_equal(centre_crop(Image.fromarray(wide), (4, 6)), wide[:, 9:15])  # cut, never halved
    tall = pattern(6, 40)
    assert np.array_equal(centre_crop(Image.fromarray(tall), (4, 6)), tall[18:22])


def test_colours_are_cropped_alike():
    grey = pattern(37, 23)
    rgb = np.stack([grey, 255 - grey, grey // 2], axis=-1)
    cropped = np.asarray(centre_crop(Image.fromarray(rgb), 8))
    for channel in range(3):
        assert np.array_equal(cropped[..., channel], centre_crop(Image.fromarray(rgb[..., channel].copy()), 8))
