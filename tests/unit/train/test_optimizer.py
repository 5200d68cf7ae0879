import pytest
import torch

from tests.runs import small_recipe
from xar_cli.model import XAR
from xar_cli.model.transformer import init_weights
from xar_cli.train.optimizer import build_optimizer, load_optimizer, optimizer_tensors


@pytest.fixture
def model():
    model = XAR(small_recipe())
    init_weights(model, torch.Generator().manual_seed(0))
    return model


def take_step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def test_decay_on_matrices_only(model):
    optimizer = build_optimizer(model, small_recipe().train)
    decayed, free = optimizer.param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] == 0.02
    assert free["weight_decay"] == 0
    assert decayed["betas"] == (0.9, 0.96)
    assert {"pos_encoder", "class_embedding.weight", "encoder.0.attention.qkv.weight"} <= {
        names[p] for p in decayed["params"]
    }
    assert all(names[p].endswith("bias") or "norm" in names[p] for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(names)


def test_first_step_is_adamw_by_hand(model):
    train = small_recipe().train
    optimizer = build_optimizer(model, train)
    before = model.pos_encoder.detach().clone()
    take_step(model, optimizer, 1)
    gradient = model.pos_encoder.grad  # the first Adam step has size lr in the direction of the gradient's sign
    expected = before * (1 - train.lr * 0.02) - train.lr * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(model.pos_encoder.detach(), expected)


def test_state_goes_through_tensors_exactly(model):
    train = small_recipe().train
    optimizer = build_optimizer(model, train)
    take_step(model, optimizer, 1)
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(model, optimizer).items()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    take_step(model, optimizer, 2)
    expected = model.pos_decoder.detach().clone()

    model.load_state_dict(weights)
    fresh = build_optimizer(model, train)
    load_optimizer(model, fresh, saved)
    take_step(model, fresh, 2)
    assert model.pos_decoder.detach().equal(expected)
