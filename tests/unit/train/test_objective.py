import pytest
import torch

from tests.runs import small_recipe
from xar_cli.model.entities import build_grouping
from xar_cli.train.draws import draw_step
from xar_cli.train.objective import batch_loss


class Recorder(torch.nn.Module):
    """Predicts zero and keeps what it was asked."""

    def forward(self, x_t, t, labels, context=None):
        self.x_t, self.t, self.labels, self.context = x_t, t, labels, context
        return torch.zeros_like(x_t)


def run(*overrides):
    config = small_recipe(*overrides)
    grouping = build_grouping(config.entity, config.grid)
    draws = draw_step(config, grouping, 0, torch.device("cpu"))
    moments = torch.zeros(8, 2, 8, 8)
    moments[:, 0], moments[:, 1] = 3.0, -30.0  # mean 3, no variance
    model = Recorder()
    losses = batch_loss(model, config, grouping, moments, torch.arange(8), draws)
    return model, draws, losses


def test_interpolant_and_target_by_hand():
    model, draws, losses = run("tokenizer.latent_scale=0.5")
    x = torch.full((8, 64, 1), 1.5)
    t = draws.t.repeat_interleave(16, dim=1)[..., None]
    torch.testing.assert_close(model.x_t, (1 - t) * x + t * draws.noise, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses, (draws.noise - x).square().mean(-1), atol=1e-4, rtol=1e-4)
    assert torch.equal(model.t, draws.t)
    assert losses.shape == (8, 64)


def test_dropped_labels_become_the_null_class():
    model, draws, _ = run("train.label_dropout=0.5")
    assert draws.drop_label.any()
    assert model.labels.tolist() == [10 if drop else i for i, drop in enumerate(draws.drop_label.tolist())]


def test_without_classes_there_is_only_the_null_class():
    model, _, _ = run("data.num_classes=0")
    assert model.labels.tolist() == [0] * 8


@pytest.mark.parametrize("context", ["random", "increasing", "decreasing"])
def test_noisy_context_is_what_the_network_sees_anyway(context):
    model, draws, _ = run(f"train.context={context}")
    assert model.context is None
    assert torch.equal(model.t, draws.t)


def test_clean_context_is_the_data_as_it_is():
    model, draws, _ = run("train.context=clean")
    torch.testing.assert_close(model.context, torch.full((8, 64, 1), 3.0))
    assert torch.equal(model.t, draws.t)
