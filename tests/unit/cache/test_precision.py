"""The encoder in bf16, and what storing costs: both within stated tolerances of float32."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.caches import make_images
from tests.seeded import kl16_state
from xar_cli.cache import cache_latents
from xar_cli.config import load_recipe
from xar_cli.data.cache_file import CacheFile
from xar_cli.data.latents import LatentReader

SIDE = 64
RECIPE = load_recipe("base", ["data.num_classes=1", f"data.image_size={SIDE}", "entity.size=2"])
BF16_MEAN_RMS = 0.03  # of the standard deviation of the means, with seeded weights
BF16_LOGVAR_RMS = 0.03
FLOAT16_RELATIVE = 2**-11  # half a unit in the last place


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """The same four images cached in float32, in bf16, and in float32 stored as float16."""
    folder = tmp_path_factory.mktemp("kl16")
    save_file(kl16_state(), folder / "kl16.safetensors")
    images = make_images(folder / "images", 1, 4, side=80)
    made = {}
    for name, precision, dtype in (
        ("fp32", "fp32", "float32"),
        ("bf16", "bf16", "float32"),
        ("half", "fp32", "float16"),
    ):
        made[name] = folder / f"{name}.h5"
        cache_latents(
            images, made[name], RECIPE, device="cpu", tokenizer_weights=folder / "kl16.safetensors",
            precision=precision, dtype=dtype, flip="none", batch_size=4,
        )  # fmt: skip
    return made


def moments(path):
    return LatentReader(path).read(np.arange(4))[0].astype(np.float32)


def test_bf16_is_within_its_tolerance(caches):
    exact, rounded = moments(caches["fp32"]), moments(caches["bf16"])
    assert not np.array_equal(exact, rounded)
    error = np.sqrt(np.square(rounded - exact).mean((0, 2, 3)))
    assert error[:16].mean() <= BF16_MEAN_RMS * exact[:, :16].std()
    assert error[16:].mean() <= BF16_LOGVAR_RMS


def test_float16_rounds_and_nothing_more(caches):
    exact, stored = moments(caches["fp32"]), moments(caches["half"])
    assert np.abs(stored - exact).max() <= FLOAT16_RELATIVE * np.abs(exact).max()
    assert (
        np.sqrt(np.square(stored - exact).mean())
        < np.sqrt(np.square(torch.from_numpy(exact).bfloat16().float().numpy() - exact).mean()) / 4
    )  # why bfloat16 is no choice of --dtype: the same two bytes, an eighth of the resolution


def test_the_cache_says_what_encoded_it(caches):
    layouts = {name: CacheFile(path).layout for name, path in caches.items()}
    assert (layouts["bf16"].precision, layouts["fp32"].precision) == ("bf16", "fp32")
    assert layouts["bf16"].tokenizer == layouts["fp32"].tokenizer
    assert layouts["fp32"].tokenizer.startswith("kl16:")
    assert json.dumps(layouts["fp32"].grid) == "[4, 4]"
