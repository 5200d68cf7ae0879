import shutil
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tests.runs import small_recipe
from xar_cli.distributed import Ranks
from xar_cli.model import XAR
from xar_cli.model.transformer import init_weights
from xar_cli.train import parallel

ALONE = Ranks(0, 0, 1, torch.device("cpu"))


def forward_and_backward(*overrides):
    config = small_recipe("model.depth=3", *overrides)
    model = XAR(config)
    init_weights(model, torch.Generator().manual_seed(0))
    wrapped = parallel.spread(model.train(), config.train, ALONE)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, model.grouping.num_tokens, 1, generator=generator)
    torch.manual_seed(2)  # dropout
    out = wrapped(x, torch.rand(2, model.grouping.num_entities, generator=generator), torch.tensor([1, 2]))
    out.square().mean().backward()
    return out.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def test_recomputing_activations_changes_nothing():
    out, grads = forward_and_backward()
    again, grads_again = forward_and_backward("train.activation_checkpointing=true")
    assert again.equal(out)
    assert grads.keys() == grads_again.keys()
    assert all(grads_again[name].equal(grad) for name, grad in grads.items())


@pytest.mark.parametrize(
    "entity",
    [
        "{kind: cell, size: 4}",
        "{kind: token}",  # 64 tokens in one masked call
        "{kind: subsample, stride: 2}",
        "{kind: scale, sizes: [1, 2, 4, 8]}",
        "{kind: image}",
    ],
)
def test_one_graph_serves_all_blocks(monkeypatch, entity):
    torch._dynamo.reset()
    counter = CompileCounter()
    compile_whole = partial(torch.compile, backend=counter, fullgraph=True)
    monkeypatch.setattr(parallel.torch, "compile", lambda forward, options: compile_whole(forward))
    out, _ = forward_and_backward("train.compile=true", f"entity={entity}")
    plain, _ = forward_and_backward(f"entity={entity}")
    torch.testing.assert_close(out, plain)
    assert counter.frame_count == 1  # 6 blocks


def test_without_a_compiler_the_blocks_stay_eager(monkeypatch, caplog):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    model = XAR(small_recipe())
    before = [block.forward for block in model.blocks]
    parallel.compile_blocks(model)
    assert [block.forward for block in model.blocks] == before


def test_gradient_norm_and_scaling():
    model = torch.nn.Linear(2, 1)
    model.weight.grad, model.bias.grad = torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])
    assert parallel.gradient_norm(model) == 5
    parallel.scale_gradients(model, torch.tensor(0.2))
    assert parallel.gradient_norm(model) == 1


@pytest.mark.slow
def test_compiled_dropout_draws_what_eager_dropout_draws():
    out, grads = forward_and_backward()
    compiled, compiled_grads = forward_and_backward("train.compile=true")
    torch.testing.assert_close(compiled, out, rtol=1e-4, atol=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(compiled_grads[name], grad, rtol=1e-3, atol=1e-5)
