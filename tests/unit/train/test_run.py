import json
from pathlib import Path

import pytest

from tests.caches import make_cache, make_layout
from tests.runs import small_recipe
from xar_cli import run_dir
from xar_cli.config import load_config_file
from xar_cli.data.latents import LatentReader
from xar_cli.errors import UserError
from xar_cli.logs import MetricsWriter, read_metrics
from xar_cli.run_dir import RunDir
from xar_cli.train.loop import dry_run_plan
from xar_cli.train.run import HARMLESS, STEERING, check_run, config_differences, cut_records, open_run

PLAN = {"total_steps": 10}


@pytest.fixture
def reader(tmp_path):
    with LatentReader(make_cache(tmp_path / "latents.h5")) as reader:
        yield reader


@pytest.fixture
def run(tmp_path, reader):
    run = RunDir(tmp_path / "run")
    open_run(run, small_recipe(), tmp_path / "latents.h5", reader, PLAN)
    return run


def test_a_new_folder_is_not_created_by_the_check(tmp_path):
    check_run(tmp_path / "new", small_recipe(), 0)
    assert not (tmp_path / "new").exists()


def test_opening_writes_config_and_identity(run, reader):
    assert load_config_file(run.config) == small_recipe()
    identity = json.loads(run.identity.read_text())
    assert identity["data_hash"] == reader.content_hash
    assert identity["class_names"][0] == "digit-0"


def test_the_same_config_is_accepted(run):
    assert check_run(run.root, small_recipe(), 0) == run


RISING = ("train.min_lr=0.01", "train.base_lr=0.016")  # 8 images a step: a peak of 0.0005


def test_no_new_run_begins_with_a_learning_rate_that_rises(tmp_path):
    with pytest.raises(UserError) as caught:
        check_run(tmp_path / "new", small_recipe(*RISING), 0)
    words = "train.min_lr: 0.01 is above the peak learning rate, 0.0005 (base_lr 0.016 * 8 / 256)"
    assert words in caught.value.message
    check_run(tmp_path / "new", small_recipe("train.min_lr=0.0005", "train.base_lr=0.016"), 0)


@pytest.mark.parametrize("overrides", [RISING, ["evaluate.protocol=admm"], ["evaluate.count=1"]])
def test_a_run_that_began_so_goes_on(tmp_path, reader, overrides):
    before, config = RunDir(tmp_path / "before"), small_recipe(*overrides)
    open_run(before, config, tmp_path / "latents.h5", reader, PLAN)
    assert load_config_file(before.config) == config
    assert check_run(before.root, config, 0) == before
    assert dry_run_plan(config, None, before.root, 1).total_steps
    with pytest.raises(UserError, match="1 fault"):
        dry_run_plan(config, None, tmp_path / "new", 1)


def test_differences_are_listed(run):
    with pytest.raises(UserError) as caught:
        check_run(run.root, small_recipe("train.epochs=3", "model.depth=2"), 0)
    assert "model.depth: 1 there, 2 here" in caught.value.message
    assert "train.epochs: 2" in caught.value.message


def test_differences_of_lists_and_kinds():
    found = config_differences(
        small_recipe(), small_recipe("train.ema_decays=[0.9]", "entity={kind: subsample, stride: 2}")
    )
    assert found["train.ema_decays"] == "train.ema_decays: [0.9, 0.5] there, [0.9] here"
    assert found["entity.kind"] == "entity.kind: cell there, subsample here"


def test_names_and_other_stages_do_not_count():
    assert not config_differences(small_recipe(), small_recipe("name=mine", "sample.num_steps=9", "evaluate.count=7"))


def test_harmless_changes_need_the_flag(run):
    changed = small_recipe("train.log_every=7", "train.max_batch_per_rank=4")
    with pytest.raises(UserError, match=r"train\.log_every: 1 there, 7 here") as caught:
        check_run(run.root, changed, 0)
    assert "--allow-recipe-change" in caught.value.next_step
    assert check_run(run.root, changed, 0, allow_change=True) == run


def test_changes_that_break_checkpoints_are_never_allowed(run):
    for change in ("model.dim=32", "train.ema_decays=[0.9]", "train.global_batch_size=4", "train.seed=1"):
        with pytest.raises(UserError, match=change.split("=")[0]):
            check_run(run.root, small_recipe(change), 0, allow_change=True)


def test_an_accepted_change_is_written_down(run, reader, tmp_path):
    changed = small_recipe("train.base_lr=0.01")
    open_run(run, changed, tmp_path / "latents.h5", reader, PLAN)
    assert load_config_file(run.config) == changed
    assert json.loads(run.identity.read_text())["changes"] == [["train.base_lr: 0.03 there, 0.01 here"]]


def test_every_key_of_the_lists_exists():
    keys = {
        f"{section}.{key}"
        for section in ("train", "data", "model")
        for key in getattr(small_recipe(), section).model_dump()
    }
    assert keys >= HARMLESS | STEERING
    assert not HARMLESS & STEERING


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"")
    with pytest.raises(UserError, match="is not empty and is not a run folder"):
        check_run(tmp_path / "photos", small_recipe(), 0)


@pytest.mark.parametrize("killed_at", ["run.json", "config.yaml", "between"])
def test_a_start_that_was_killed_is_begun_again(tmp_path, reader, monkeypatch, killed_at):
    """Killed inside either write, or between the two: what is left is taken over or removed."""
    run, replace, written = RunDir(tmp_path / "run"), run_dir.os.replace, []

    def kill(source, target):
        written.append(target)
        if target.name == killed_at:
            raise KeyboardInterrupt
        replace(source, target)
        if killed_at == "between":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_dir.os, "replace", kill)
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # no clearing up after SIGKILL
        with pytest.raises(KeyboardInterrupt):
            open_run(run, small_recipe(), tmp_path / "latents.h5", reader, PLAN)
    run.lock.touch()
    left = {path.name for path in run.root.iterdir()}
    assert left > {".lock"}
    assert "config.yaml" not in left
    check_run(run.root, small_recipe(), 0)
    open_run(run, small_recipe(), tmp_path / "latents.h5", reader, PLAN)
    assert sorted(path.name for path in run.root.iterdir()) == [".lock", "config.yaml", "run.json"]
    assert load_config_file(run.config) == small_recipe()


@pytest.mark.parametrize("content", ["{}", "[1]", "run: 5", '{"data_hash": 1}'])
def test_somebody_elses_run_json_is_not_taken_over(tmp_path, content):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "run.json").write_text(content)
    if "data_hash" in content:  # ours, but beside other things
        (tmp_path / "theirs" / "cat.png").write_bytes(b"")
    with pytest.raises(UserError, match="is not empty and is not a run folder"):
        check_run(tmp_path / "theirs", small_recipe(), 0)


def test_no_disk_space(tmp_path):
    with pytest.raises(UserError, match="Not enough disk space for checkpoints"):
        check_run(tmp_path / "run", small_recipe(), 10**18)


def test_another_cache_is_refused(run, tmp_path):
    from tests.caches import LABELS

    LABELS[0] = 3
    try:
        other = make_cache(tmp_path / "other.h5")
    finally:
        LABELS[0] = 0
    with LatentReader(other) as reader, pytest.raises(UserError, match="made with another latent cache"):
        open_run(run, small_recipe(), other, reader, PLAN)


def test_mirror_without_mirror_images(tmp_path):
    path = make_cache(tmp_path / "plain.h5", make_layout(flip=False))
    with LatentReader(path) as reader, pytest.raises(UserError, match="cache holds none"):
        reader.check_matches(small_recipe())


@pytest.mark.parametrize("name", ["metrics.jsonl", "skipped_steps.jsonl"])
@pytest.mark.parametrize("torn", ["", '{"step": 4, "lo'])
@pytest.mark.parametrize("last", [4, 7])  # with something to cut, and without
def test_records_are_cut_back_to_the_checkpoint(run, name, torn, last):
    path = run.root / name
    writer = MetricsWriter(path)
    for step in range(1, last + 1):
        writer.write(step=step, loss=float("nan") if step == 3 else 1.0)
    writer.close()
    whole = path.read_text()
    path.write_text(whole + torn)
    cut_records(run, 4)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4]
    assert path.read_text() == "".join(whole.splitlines(keepends=True)[:4])


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(run_dir.os, "access", lambda *_: False)
    with pytest.raises(UserError, match="Cannot write checkpoints under"):
        check_run(tmp_path / "run", small_recipe(), 0)
