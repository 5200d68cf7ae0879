import pytest
import torch

from xar_cli.config import load_recipe
from xar_cli.model import XAR
from xar_cli.train.cost import activation_bytes, batch_that_fits, state_bytes, training_flops


def meta_model(config):
    with torch.device("meta"):
        return XAR(config)


@pytest.mark.parametrize(("name", "gigaflops"), [("base", 182), ("large", 641), ("huge", 1245)])
def test_flops_counted_from_shapes(name, gigaflops):
    config = load_recipe(name)
    assert training_flops(config, meta_model(config)) / 1e9 == pytest.approx(gigaflops, rel=0.01)


def test_shards_and_recomputation_save_memory():
    plain = load_recipe("huge")
    sharded = load_recipe("huge", ["train.parallel=fsdp"])
    recomputed = load_recipe("huge", ["train.activation_checkpointing=true"])
    model = meta_model(plain)
    assert state_bytes(sharded, model, 8) * 8 == pytest.approx(state_bytes(plain, model, 8), rel=1e-6)
    assert activation_bytes(recomputed, model) < activation_bytes(plain, model) / 5


def test_a_batch_by_estimate_fits_and_the_next_does_not():
    config = load_recipe("base")
    batch, model = batch_that_fits(config, 8, 80 * 10**9), meta_model(config)

    def needed(images):
        return state_bytes(config, model, 8) + images * activation_bytes(config, model)

    assert needed(batch) <= 0.85 * 80e9 < needed(batch + 1)
    assert batch_that_fits(config, 8, 10**6) == 1
