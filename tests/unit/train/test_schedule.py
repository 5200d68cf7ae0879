import pytest

from xar_cli.config import load_recipe
from xar_cli.train.schedule import learning_rate

STEPS = 8000


@pytest.fixture(scope="module")
def train():
    return load_recipe("base").train


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.0),
        (500, 2e-4),  # half of the warm-up of 1/8 of the run
        (1000, 4e-4),  # 5e-5 * 2048 / 256
        (5999, 4e-4),
        (6000, 4e-4),
        (7000, (4e-4 + 1e-5) / 2),  # half of the half-cosine
        (8000, 1e-5),
    ],
)
def test_published_values(train, step, expected):
    assert learning_rate(step, STEPS, train) == pytest.approx(expected, abs=1e-12)


def test_a_shorter_run_decays_too(train):
    assert [learning_rate(s, STEPS // 2, train) for s in range(0, STEPS // 2, 50)] == pytest.approx(
        [learning_rate(s, STEPS, train) for s in range(0, STEPS, 100)]
    )


def test_no_warmup_and_no_decay():
    train = load_recipe("base", ["train.warmup_fraction=0", "train.decay_start_fraction=1"]).train
    assert {learning_rate(step, STEPS, train) for step in (0, 4000, STEPS - 1, STEPS)} == {train.lr}
