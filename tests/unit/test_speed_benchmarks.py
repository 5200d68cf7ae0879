"""The benchmarks of speed print none for programs that do not give the same numbers; tiny networks, uncompiled."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import attention, decoder, sampling, timing, training
from xar_cli.model import attention as model_attention
from xar_cli.train.ema import WeightAverages

TOY = ["--set=model.dim=64", "--set=model.depth=1", "--set=model.heads=2", "--pairs=1", "--threads=1"]
SAMPLING = [*TOY, "--batch=1", "--steps=2", "--no-compile"]
TRAINING = [*TOY, "--batch=2", "--set=train.compile=false"]
FAULTS = {"no rotation": ("rotate", lambda x, table: x), "no attention": ("dot_product_attention", lambda q, *_: q * 0)}


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a benchmark with these arguments, and gives what it printed."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(timing, "matmul_peak", lambda *_: 1e12)

    def benchmark(module, arguments):
        monkeypatch.setattr("sys.argv", [module.__name__, *arguments])
        module.main()
        return json.loads(capsys.readouterr().out)

    yield benchmark
    torch.set_num_threads(threads)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_sampling_is_compared_and_timed(run, precision):
    found = run(sampling, [*SAMPLING, "--precision", precision])
    assert found["relative_difference"] <= sampling.TOLERANCE[precision]
    assert found["plain_time_over_ours"]["median"] > 0
    assert found["images_per_second"]["ours"] > 0


def test_training_is_compared_and_timed(run):
    found = run(training, TRAINING)
    assert found["compared"]["fp32"]["relative_difference"]["gradients"] < 1e-5
    assert found["compared"]["fp32"]["relative_difference"]["step of the average"] < 1e-3
    assert all(found[name]["median"] > 0 for name in (training.NOISE, training.SAME, training.FULL))


@pytest.mark.parametrize("arguments", [(sampling, SAMPLING), (training, TRAINING)], ids=["sampling", "training"])
@pytest.mark.parametrize("fault", FAULTS)
def test_no_speed_is_printed_of_another_network(run, monkeypatch, capsys, arguments, fault):
    monkeypatch.setattr(model_attention, *FAULTS[fault])
    with pytest.raises(SystemExit, match="no speed is printed"):
        run(*arguments)
    assert capsys.readouterr().out == ""


def test_no_speed_is_printed_of_another_step(run, monkeypatch):
    monkeypatch.setattr(WeightAverages, "update", lambda self: None)
    with pytest.raises(SystemExit, match="to the average differ"):
        run(training, TRAINING)


def test_images_that_are_far_apart_have_no_speed():
    reference = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert decoder.require_quality("bf16", reference + 1e-4, reference) > 60
    with pytest.raises(SystemExit, match=r"bf16: the images have .* dB, 40 at least: no speed"):
        decoder.require_quality("bf16", -reference, reference)


@pytest.mark.parametrize(
    ("module", "arguments", "sentence"),
    [
        (sampling, ["--set", "sample.num_steps=6"], "'--set sample.num_steps' is for an option"),
        (training, ["--set", "train.precision=fp32"], "'--set train.precision' is for an option"),
        (sampling, ["--recipe", "tiny"], "The plain code has the published cells"),
        (training, ["--recipe", "ablations/entity-token"], "The plain code has the published cells"),
        (sampling, ["--device", "cpux"], "There is no device called 'cpux'"),
        (attention, ["--dropout", "1.5"], "--dropout 1.5 is no probability"),
    ],
)
def test_what_a_person_can_mend_is_a_sentence(run, capsys, module, arguments, sentence):
    with pytest.raises(SystemExit) as caught:
        run(module, arguments)
    assert caught.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--pairs", "--batch", "--steps", "--threads"])
def test_counts_are_positive(run, capsys, option):
    with pytest.raises(SystemExit):
        run(sampling, [option, "0"])
    assert "'0' is no number of 1 or more" in capsys.readouterr().err
