"""Looking at a run while it trains, and starting from weights that exist."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.caches import make_cache, make_images, make_layout
from tests.runs import final_tensors, settings, small_recipe
from xar_cli.checkpoint import latest_checkpoint
from xar_cli.config import load_config_file, load_recipe
from xar_cli.distributed import Ranks
from xar_cli.errors import UserError
from xar_cli.evaluate.networks import DigitNetwork
from xar_cli.logs import log, read_metrics
from xar_cli.model import build_grouping
from xar_cli.run_dir import RunDir
from xar_cli.sample import stage
from xar_cli.train import loop, preview
from xar_cli.train.loop import dry_run_plan, train
from xar_cli.train.preview import Measure, check_looks
from xar_cli.train.status import run_status
from xar_cli.weights import load_weights


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("cache") / "latents.h5")


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A run with previews, an evaluation each epoch, and TensorBoard."""
    folder = tmp_path_factory.mktemp("run")
    config = small_recipe(
        "train.preview_every=5", "train.preview_count=9", "train.eval_every=1", "train.eval_count=12",
        "train.loggers=[tensorboard]", "evaluate.protocol=digits",
    )  # fmt: skip
    train(settings(config, data, folder / "run", reference=make_images(folder / "real")))
    return RunDir(folder / "run")


def test_preview_grids(run):
    pictures = sorted(path.name for path in run.previews.iterdir())
    assert pictures == ["step-00000005.png", "step-00000010.png"]
    with Image.open(run.previews / pictures[0]) as first, Image.open(run.previews / pictures[1]) as last:
        assert first.size == last.size
        assert first.tobytes() != last.tobytes()


def test_evaluations_carry_their_count(run):
    found = [record for record in read_metrics(run.metrics) if "evaluation" in record]
    assert [record["step"] for record in found] == [5, 10]
    assert any("12" in name for name in found[0]["evaluation"])


def test_looking_changes_nothing(run, data, tmp_path):
    train(settings(small_recipe(), data, tmp_path / "run"))
    expected, found = final_tensors(tmp_path / "run"), final_tensors(run.root)
    assert all(found[name].equal(tensor) for name, tensor in expected.items())


def test_tensorboard_has_the_losses(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.root / "tensorboard")).Reload()
    losses = {record["step"]: record["loss"] for record in read_metrics(run.metrics) if "loss" in record}
    assert {event.step: event.value for event in events.Scalars("loss")} == pytest.approx(losses)
    assert len(events.Images("preview")) == 2


def test_every_average_can_be_sampled(run):
    checkpoint = latest_checkpoint(run)
    for decay in ("0.9", "0.5"):
        model, found = load_weights(checkpoint.path(f"ema-{decay}"), device="cpu")
        assert model.pos_encoder.equal(checkpoint.tensors(f"ema-{decay}")["pos_encoder"])
        assert found.kind == "ema"


def test_evaluation_needs_a_reference(data, tmp_path):
    with pytest.raises(UserError, match="nothing to compare with"):
        train(settings(small_recipe("train.eval_every=1"), data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_what_an_evaluation_needs_is_asked_for_first(data, tmp_path):
    looking = small_recipe("train.eval_every=1", "evaluate.protocol=adm")
    nowhere, real = tmp_path / "nowhere", make_images(tmp_path / "real")
    for reference, message in ((nowhere, "nowhere"), (real, "weights-inception")):
        with pytest.raises(UserError, match=message):
            train(settings(looking, data, tmp_path / "run", reference=reference))
        with pytest.raises(UserError, match=message):
            dry_run_plan(looking, data, tmp_path / "run", 1, reference=reference)
    with pytest.raises(UserError, match="nothing to compare with"):
        dry_run_plan(looking, data, tmp_path / "run", 1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "option"),
    [
        ({"reference": Path("real")}, "--reference"),
        ({"measure": Measure(inception_weights=(Path("inception.pth"),))}, "--inception-weights"),
    ],
)
def test_what_no_evaluation_would_read_is_refused(data, tmp_path, more, option):
    message = rf"{option} is given, and train\.eval_every is 0: no evaluation would be made"
    with pytest.raises(UserError, match=message) as caught:
        train(settings(small_recipe("train.preview_every=5"), data, tmp_path / "run", **more))
    assert caught.value.next_step == f"Add --set train.eval_every=EPOCHS, or leave {option} away."
    for cache in (data, None):
        with pytest.raises(UserError, match=message):
            dry_run_plan(small_recipe(), cache, tmp_path / "run", 1, **more)
    assert not (tmp_path / "run").exists()


def test_tokenizer_weights_that_nothing_is_drawn_with_are_told(data, tmp_path, monkeypatch):
    warned: list[str] = []
    monkeypatch.setattr(log, "warning", lambda text, *_: warned.append(text))
    weights = {"tokenizer_weights": Path("kl16.ckpt")}
    dry_run_plan(small_recipe("train.preview_every=5"), None, tmp_path / "run", 1, **weights)
    assert not warned
    for start in (
        lambda: dry_run_plan(small_recipe(), None, tmp_path / "run", 1, **weights),
        lambda: train(settings(small_recipe("train.epochs=0.2"), data, tmp_path / "run", **weights)),
    ):
        warned.clear()
        start()
        assert sum("--tokenizer-weights has no effect" in text for text in warned) == 1


def test_a_dry_run_asks_for_what_previews_and_evaluations_need(data, tmp_path):
    """The tokenizer's weights, and, also for another machine, something to compare with."""
    with pytest.raises(UserError, match="nothing to compare with"):
        dry_run_plan(small_recipe("train.eval_every=1"), None, tmp_path / "run", 1)
    with pytest.raises(UserError, match="needs the weights of the tokenizer KL-16"):
        check_looks(load_recipe("base", ["train.preview_every=2"]), None, None, Measure())
    on_hub = Path("hf://xwen99/mar-vae-kl16/kl16.ckpt")
    check_looks(load_recipe("base", ["train.preview_every=2"]), on_hub, None, Measure())


@pytest.mark.parametrize(("every", "steps"), [(0.5, [2, 4, 6, 8, 10]), (0.01, list(range(1, 11)))])
def test_evaluations_at_fractions_of_an_epoch(data, tmp_path, every, steps):
    """5 steps an epoch; more often than every step cannot be."""
    config = small_recipe(f"train.eval_every={every}", "train.eval_count=8", "evaluate.protocol=digits")
    run = RunDir(tmp_path / "run")
    train(settings(config, data, run.root, reference=make_images(tmp_path / "real")))
    records = [record for record in read_metrics(run.metrics) if "evaluation" in record]
    assert [record["step"] for record in records] == steps
    assert {record["measured_with"] for record in records} == {"digits; euler, 2 steps, guidance 2"}
    assert run_status(run).measured_with == "digits; euler, 2 steps, guidance 2"


def test_a_reference_of_another_size_is_refused_before_the_first_step(data, tmp_path, monkeypatch):
    monkeypatch.setattr(DigitNetwork, "input_size", None)  # as of Inception, which resizes
    config = small_recipe("train.eval_every=1", "evaluate.protocol=digits")
    reference = make_images(tmp_path / "large", side=16)
    with pytest.raises(UserError, match=r"The samples have 8 x 8 pixels and the reference .* 16 x 16"):
        dry_run_plan(config, data, tmp_path / "run", 1, reference=reference)
    with pytest.raises(UserError, match="16 x 16"):
        train(settings(config, data, tmp_path / "run", reference=reference))
    assert not (tmp_path / "run").exists()


def test_an_evaluation_of_a_model_without_classes_has_no_accuracy(data, tmp_path):
    config = small_recipe("data.num_classes=0", "train.eval_every=2", "train.eval_count=12", "evaluate.protocol=digits")
    run = RunDir(tmp_path / "run")
    train(settings(config, data, run.root, reference=make_images(tmp_path / "real")))
    found = next(record["evaluation"] for record in read_metrics(run.metrics) if "evaluation" in record)
    assert found
    assert not any("accuracy" in name for name in found)


def test_an_evaluation_that_is_killed_costs_no_step(data, tmp_path, monkeypatch):
    def evaluate(self, state, interrupt):
        raise KeyboardInterrupt

    monkeypatch.setattr(preview.Preview, "evaluate", evaluate)
    config = small_recipe("train.eval_every=0.6", "train.checkpoint_every=100", "evaluate.protocol=digits")
    with pytest.raises(KeyboardInterrupt):
        train(settings(config, data, tmp_path / "run", reference=make_images(tmp_path / "real")))
    assert latest_checkpoint(RunDir(tmp_path / "run")).step == 3


def test_a_dry_run_looks_at_the_weights_to_start_from(data, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        dry_run_plan(small_recipe(), data, tmp_path / "run", 1, init_from=str(tmp_path / "nowhere"))


def test_a_failed_evaluation_does_not_end_the_run(data, tmp_path, caplog):
    """The first image of the reference is spoilt after the checks: its features cannot be made."""
    log.propagate = True  # for caplog
    real = make_images(tmp_path / "real")
    bad = sorted(real.rglob("*.png"))[0]
    bad.write_bytes(bad.read_bytes()[:40])
    config = small_recipe("train.eval_every=1", "train.eval_count=8", "evaluate.protocol=digits")
    found = train(settings(config, data, tmp_path / "run", reference=real))
    assert found["steps"] == 10
    assert "The evaluation of step 5 failed, and the run goes on" in caplog.text
    assert not [record for record in read_metrics(RunDir(tmp_path / "run").metrics) if "evaluation" in record]


@pytest.mark.parametrize("grid", [True, False], ids=["grid", "evaluation"])
def test_memory_that_does_not_suffice_for_a_look_does_not_end_the_run(data, tmp_path, monkeypatch, caplog, grid):
    """Training holds its memory; what is drawn beside it comes on top."""

    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    log.propagate = True  # for caplog
    monkeypatch.setattr(stage, "sample_latents", full)
    look = ("train.preview_every=5",) if grid else ("train.eval_every=1", "train.eval_count=12")
    reference = None if grid else make_images(tmp_path / "real")
    config = small_recipe(*look, "evaluate.protocol=digits", "sample.batch_size=4")
    assert train(settings(config, data, tmp_path / "run", reference=reference))["steps"] == 10
    what = "preview" if grid else "evaluation"
    assert f"The {what} of step 5 failed, and the run goes on: Drawing 4 images at a time does not fit" in caplog.text


def test_a_network_that_one_rank_cannot_hold_is_drawn_by_none(data, tmp_path, monkeypatch, caplog):
    """The error is exchanged: no rank waits for one that has gone on."""
    told = []

    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    def gather(self, value):
        told.append(value)
        return [value]

    log.propagate = True  # for caplog
    monkeypatch.setattr(preview, "ready_network", full)
    monkeypatch.setattr(Ranks, "gather", gather)
    train(settings(small_recipe("train.preview_every=5", "train.epochs=1"), data, tmp_path / "run"))
    assert "The preview of step 5 failed, and the run goes on: A copy of the network" in caplog.text
    assert "A copy of the network" in str(next(value for value in told if isinstance(value, UserError)))


LOOKING = ("train.preview_every=5", "train.preview_count=9", "train.eval_every=1", "train.eval_count=12",
           "evaluate.protocol=digits")  # fmt: skip


@pytest.mark.parametrize(("batch", "step"), [(0, 5), (2, 5), (3, 6)])
def test_a_signal_while_drawing_stops_and_what_it_left_out_is_made_later(data, tmp_path, monkeypatch, batch, step):
    """The grid of step 5 takes batches 0 and 1, its evaluation 2 and 3; before them a checkpoint was written.

    A signal in the last batch finds nothing to interrupt, and stops the run after the next step.
    """
    real, out = make_images(tmp_path / "real"), tmp_path / "run"
    drawn = []

    def draw_images(*arguments, real=preview.draw_images, **options):
        if len(drawn) == batch:
            os.kill(os.getpid(), signal.SIGTERM)
        drawn.append(1)
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(preview, "draw_images", draw_images)
        with pytest.raises(UserError, match=f"Stopped by SIGTERM after step {step}") as caught:
            train(settings(small_recipe(*LOOKING), data, out, reference=real))
    assert len(drawn) == batch + 1
    assert caught.value.exit_code == 143
    assert run_status(RunDir(out)).state == "stopped"
    assert latest_checkpoint(RunDir(out)).step == step
    train(settings(small_recipe(*LOOKING), data, out, reference=real))
    assert sorted(path.name for path in RunDir(out).previews.iterdir()) == ["step-00000005.png", "step-00000010.png"]
    records = read_metrics(RunDir(out).metrics)
    assert [record["step"] for record in records if "evaluation" in record] == [5, 10]
    assert run_status(RunDir(out)).state == "finished"


def test_a_signal_while_a_grid_is_drawn_writes_the_checkpoint_and_the_record(data, tmp_path, monkeypatch):
    """None is due at step 5: without them its steps would be lost. Meanwhile the run says that it is saving."""
    out, states = RunDir(tmp_path / "run"), []

    def draw_images(*arguments, real=preview.draw_images, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **options)

    def finish(*arguments, real=loop._finish_writing):
        states.append(json.loads(out.status.read_text())["state"])
        return real(*arguments)

    monkeypatch.setattr(preview, "draw_images", draw_images)
    monkeypatch.setattr(loop, "_finish_writing", finish)
    due = ("train.preview_every=5", "train.preview_count=9", "train.checkpoint_every=100", "train.log_every=100")
    with pytest.raises(UserError, match="Stopped by SIGTERM after step 5; a checkpoint is written"):
        train(settings(small_recipe(*due), data, out.root))
    assert latest_checkpoint(out).step == 5
    assert [record["step"] for record in read_metrics(out.metrics)] == [5]
    assert states == ["saving"]


@pytest.mark.parametrize("going_on", [False, True], ids=["dry run", "run"])
def test_checkpoints_that_cannot_be_read_are_a_sentence(data, tmp_path, going_on):
    config, out = small_recipe("train.epochs=0.2"), tmp_path / "run"
    train(settings(config, data, out))
    shutil.rmtree(out / "checkpoints")
    (out / "checkpoints").write_text("not a folder")
    with pytest.raises(UserError, match=r"checkpoints' cannot be read"):
        train(settings(config, data, out)) if going_on else dry_run_plan(config, data, out, 1)


def test_the_last_evaluation_is_made_up_for(run, data, tmp_path):
    """Killed in its last evaluation, after the last checkpoint."""
    out = RunDir(tmp_path / "run")
    shutil.copytree(run.root, out.root)
    real, config = make_images(tmp_path / "real"), load_config_file(out.config)
    lines = out.metrics.read_text().splitlines(keepends=True)
    out.metrics.write_text("".join(line for line in lines if '"evaluation"' not in line or '"step": 10' not in line))
    assert [record["step"] for record in read_metrics(out.metrics) if "evaluation" in record] == [5]
    train(settings(config, data, out.root, reference=real))
    train(settings(config, data, out.root, reference=real))
    assert [record["step"] for record in read_metrics(out.metrics) if "evaluation" in record] == [5, 10]


def test_features_of_the_reference_are_made_once(run):
    assert len(list(run.features.glob("*/table.json"))) == 1


def test_a_logger_that_is_not_installed(data, tmp_path, monkeypatch):
    from xar_cli.train import records

    monkeypatch.setitem(records.PACKAGES, "wandb", "no_such_package_here")
    with pytest.raises(UserError, match="wandb, which is not installed"):
        train(settings(small_recipe("train.loggers=[wandb]"), data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_starting_from_another_run(run, data, tmp_path):
    config = small_recipe("train.base_lr=1e-30", "train.min_lr=0", "train.epochs=0.2")
    train(settings(config, data, tmp_path / "run", init_from=str(run.root)))
    ours, theirs = final_tensors(tmp_path / "run"), final_tensors(run.root)
    for name in ("pos_encoder", "class_embedding.weight"):
        torch.testing.assert_close(ours[f"model/{name}"], theirs[f"ema-0.9/{name}"])


def test_a_new_class_table(run, data, tmp_path):
    """Without classes only the null class is taken over."""
    config = small_recipe("train.base_lr=1e-30", "train.min_lr=0", "train.epochs=0.2", "data.num_classes=0")
    train(settings(config, data, tmp_path / "run", init_from=str(run.root)))
    ours, theirs = final_tensors(tmp_path / "run"), final_tensors(run.root)
    assert ours["model/class_embedding.weight"].shape == (1, 16)
    torch.testing.assert_close(ours["model/class_embedding.weight"][0], theirs["ema-0.9/class_embedding.weight"][10])


@pytest.mark.parametrize("change", ["dim", "depth", "heads"])
def test_another_network_cannot_be_started_from(run, data, tmp_path, change):
    """A shallower one would take the first blocks of each stack, one with other heads fits by all shapes."""
    other = 2 * getattr(small_recipe().model, change)
    config, out = small_recipe(f"model.{change}={other}"), tmp_path / "run"
    with pytest.raises(UserError, match=rf"was trained with {change} \d+; recipe 'tiny' asks for {change} {other}"):
        train(settings(config, data, out, init_from=str(run.root)))
    with pytest.raises(UserError, match=f"asks for {change} {other}"):
        dry_run_plan(config, data, out, 1, init_from=str(run.root))
    assert not out.exists()


def test_a_shallower_network_cannot_be_started_from(run, data, tmp_path):
    deep = tmp_path / "deep"
    train(settings(small_recipe("model.depth=2", "train.epochs=0.2"), data, deep))
    with pytest.raises(UserError, match="was trained with depth 2; recipe 'tiny' asks for depth 1"):
        train(settings(small_recipe("model.depth=1"), data, tmp_path / "run", init_from=str(deep)))


def test_another_scale_of_the_latents_cannot_be_started_from(run, tmp_path):
    config = small_recipe("tokenizer.latent_scale=2")
    cache = make_cache(tmp_path / "scaled.h5", make_layout(latent_scale=2.0))
    with pytest.raises(UserError, match="was trained with tokenizer"):
        train(settings(config, cache, tmp_path / "run", init_from=str(run.root)))


@pytest.mark.parametrize(
    "entity",
    ["{kind: cell, size: 4, order: [2, 0, 3, 1]}", "{kind: token}", "{kind: subsample, stride: 2}", "{kind: image}"],
)
def test_learned_positions_go_with_their_tokens(run, data, tmp_path, entity):
    """The position that a token of the grid had is the position that it has in the new order."""
    still = ("train.base_lr=1e-30", "train.min_lr=0", "train.epochs=0.2")
    config, theirs = small_recipe(f"entity={entity}", *still), load_config_file(run.config)
    train(settings(config, data, tmp_path / "run", init_from=str(run.root)))
    started, source = final_tensors(tmp_path / "run"), final_tensors(run.root)

    def on_grid(positions, config):
        return build_grouping(config.entity, config.grid).to_latents(positions)

    for name in ("pos_encoder", "pos_decoder"):
        found, expected = on_grid(started[f"model/{name}"], config), on_grid(source[f"ema-0.9/{name}"], theirs)
        torch.testing.assert_close(found, expected)
        assert not torch.equal(started[f"model/{name}"], source[f"ema-0.9/{name}"])


def test_entities_of_other_tokens_cannot_be_started_from(run, data, tmp_path):
    scales = tmp_path / "scales"
    entity = "entity={{kind: scale, sizes: [{}, 8]}}"
    train(settings(small_recipe(entity.format("[4, 2]"), "train.epochs=0.2"), data, scales))
    config = small_recipe(entity.format("[2, 4]"))  # as many tokens, at other places
    with pytest.raises(UserError, match=r"2 scales of 4 x 2, 8 .* learned positions do not fit"):
        train(settings(config, data, tmp_path / "run", init_from=str(scales)))


def test_as_many_tokens_on_another_grid_cannot_be_started_from(run, tmp_path):
    """4 x 16 pixels have the 64 tokens of 8 x 8: the shapes agree, and the learned positions mean other places."""
    config = small_recipe("data.image_size=[4, 16]")
    cache = make_cache(tmp_path / "oblong.h5", make_layout(image_size=(4, 16), grid=(4, 16)))
    with pytest.raises(UserError, match=r"was trained with image_size 8; recipe 'tiny' asks for image_size \(4, 16\)"):
        train(settings(config, cache, tmp_path / "run", init_from=str(run.root)))
    assert not (tmp_path / "run").exists()


def test_training_without_classes(data, tmp_path):
    train(settings(small_recipe("data.num_classes=0"), data, tmp_path / "run"))
    model, _ = load_weights(tmp_path / "run", device="cpu")
    assert model.class_embedding.weight.shape[0] == 1
