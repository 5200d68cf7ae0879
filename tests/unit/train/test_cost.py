import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

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


def test_many_entities_keep_more():
    """The modulation of each, in every block: of 256 tokens 252 more than of 4 cells."""
    cells, tokens = (load_recipe("base", [f"entity={entity}"]) for entity in ("{kind: cell, size: 8}", "{kind: token}"))
    more = activation_bytes(tokens, meta_model(tokens)) - activation_bytes(cells, meta_model(cells))
    assert more == 2 * 8 * 252 * 6 * 768 * 2


def test_a_batch_by_estimate_fits_and_the_next_does_not():
    config = load_recipe("base")
    batch, model = batch_that_fits(config, 8, 80 * 10**9), meta_model(config)

    def needed(images):
        return state_bytes(config, model, 8) + images * activation_bytes(config, model)

    assert needed(batch) <= 0.85 * 80e9 < needed(batch + 1)
    assert batch_that_fits(config, 8, 10**6) == 1


def test_clean_context_costs_what_a_trace_of_the_doubled_pass_counts():
    def forward_flops(context):
        config = load_recipe("base", ["model={dim: 32, depth: 1, heads: 2, dropout: 0.0}", f"train.context={context}"])
        model = XAR(config).eval()
        x, t, labels = torch.randn(1, 256, 16), torch.rand(1, 4), torch.zeros(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model(x, t, labels, context=x if context == "clean" else None)
        return counter.get_total_flops(), training_flops(config, model) / 3

    (noisy, noisy_counted), (clean, clean_counted) = forward_flops("random"), forward_flops("clean")
    assert clean / noisy == pytest.approx(clean_counted / noisy_counted, rel=0.01)
    assert clean_counted / noisy_counted > 1.9
