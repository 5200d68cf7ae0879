"""Where records go: the loggers get every number, also after a run has gone back to a checkpoint."""

import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from tests.caches import make_cache
from tests.runs import settings, small_recipe, train_until
from xar_cli.errors import UserError
from xar_cli.logs import log, read_metrics
from xar_cli.run_dir import RunDir
from xar_cli.train import records
from xar_cli.train.loop import train
from xar_cli.train.records import Records, WeightsAndBiases

WANDB = ("train.loggers=[wandb]",)


class StandIn:
    """As much of the wandb module as is used, with its rule that the counter of a run never goes back."""

    class Error(Exception):
        pass

    def __init__(self):
        self.inits, self.axes, self.history, self.counters, self.open = [], [], [], {}, 0

    def login(self):
        return True

    def init(self, **how):
        self.inits.append(how)
        self.open += 1
        return self

    def define_metric(self, name, step_metric=None):
        self.axes.append((name, step_metric))

    def log(self, values, step=None):
        run = self.inits[-1]["id"]
        counter = self.counters.get(run, 0)
        if step is not None and step < counter:
            return  # as the real one, which only warns
        self.counters[run] = counter + 1 if step is None else step
        self.history.append(values)

    def Image(self, path):  # noqa: N802
        return SimpleNamespace(path=path)

    def finish(self):
        self.open -= 1


@pytest.fixture
def wandb(monkeypatch):
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return stand_in


@pytest.fixture
def data(tmp_path):
    return make_cache(tmp_path / "latents.h5")


def test_a_run_that_goes_back_to_a_checkpoint_is_one_run_there(data, tmp_path, monkeypatch, wandb):
    """Killed before step 8, with a checkpoint of step 4: steps 5 to 7 are logged twice, and nothing is dropped."""
    config = small_recipe(*WANDB, "train.preview_every=5", "train.preview_count=4")
    train_until(monkeypatch, 7, config, data, tmp_path / "run")
    train(settings(config, data, tmp_path / "run"))
    first, again = wandb.inits
    assert first == again
    assert (first["project"], first["name"], first["resume"]) == ("xar", "run", "allow")
    assert first["config"]["train"]["base_lr"] == 0.03
    assert ("*", "step") in wandb.axes
    with_loss = [values["step"] for values in wandb.history if "loss" in values]
    assert with_loss == [1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8, 9, 10]
    pictures = [(values["step"], values["preview"].path) for values in wandb.history if "preview" in values]
    assert [step for step, _ in pictures] == [5, 5, 10]
    assert pictures[-1][1].endswith("step-00000010.png")
    assert wandb.open == 0


def test_another_folder_is_another_run_there(tmp_path, wandb):
    for name in ("a", "b"):
        WeightsAndBiases(RunDir(tmp_path / name), small_recipe(), 0).close()
    assert wandb.inits[0]["id"] != wandb.inits[1]["id"]


def test_lists_and_evaluations_become_numbers(tmp_path, wandb):
    records = Records(RunDir(tmp_path / "run"), small_recipe(*WANDB), 0, enabled=True)
    records.write({"step": 3, "loss": 0.5, "mfu": None, "loss_by_t": [0.1, None, 0.3]})
    records.write({"step": 3, "evaluation": {"FID (digits, 12 images)": 7.5}})
    records.close()
    assert wandb.history[0] == {"step": 3, "loss": 0.5, "loss_by_t/0": 0.1, "loss_by_t/2": 0.3}
    assert wandb.history[1] == {"step": 3, "evaluation/FID (digits, 12 images)": 7.5}


def test_a_full_disk_ends_neither_pictures_nor_the_list_of_skipped_steps(data, tmp_path, monkeypatch, wandb, caplog):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log, "propagate", True)
    config = small_recipe(*WANDB, "train.preview_every=5", "train.preview_count=4")
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        train(settings(config, data, tmp_path / "run"))
    assert "The preview of step 5 could not be written" in caplog.text
    assert not any("preview" in values for values in wandb.history)
    records = Records(RunDir(tmp_path / "run"), config, 10, enabled=True)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        records.bad_step(step=3)
    assert "A line of skipped_steps.jsonl could not be written" in caplog.text
    records.close()


def test_a_line_after_a_torn_one_is_whole(tmp_path):
    records = Records(RunDir(tmp_path / "run"), small_recipe(), 0, enabled=True)
    records.bad_step(step=1)
    with (tmp_path / "run" / "skipped_steps.jsonl").open("a") as file:
        file.write('{"step": 2, "not')
    records.bad_step(step=3)
    records.close()
    assert read_metrics(tmp_path / "run" / "skipped_steps.jsonl") == [{"step": 1}, {"step": 3}]


@pytest.mark.parametrize("call", ["login", "init"])
def test_what_weights_and_biases_refuses_is_a_sentence(data, tmp_path, monkeypatch, wandb, call):
    def refuse(**_):
        raise wandb.Error("No API key configured.")

    monkeypatch.setattr(wandb, call, refuse)
    with pytest.raises(UserError, match="did not start: No API key configured") as caught:
        train(settings(small_recipe(*WANDB), data, tmp_path / "run"))
    assert caught.value.exit_code == 1
    assert "wandb login" in caught.value.next_step
    assert (tmp_path / "run").exists() == (call == "init")  # a login that is missing is found before


def test_a_logger_that_does_not_open_closes_the_others(tmp_path, monkeypatch):
    open_there = []

    class Other:
        def __init__(self, *_):
            open_there.append(self)

        def close(self):
            open_there.remove(self)

    def refuse(*_):
        assert open_there
        raise UserError("Not today.", "Ask tomorrow.")

    monkeypatch.setattr("xar_cli.train.records.LOGGERS", {"tensorboard": Other, "wandb": refuse})
    with pytest.raises(UserError, match="Not today"):
        Records(RunDir(tmp_path / "run"), small_recipe("train.loggers=[tensorboard, wandb]"), 0, enabled=True)
    assert not open_there


def entries(log):
    """The entries of a file in LevelDB's log format, which has blocks of 32 KiB; 7 bytes before the first one."""
    place, parts = 7, []
    while place + 7 <= len(log):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", log, place)
        parts.append(log[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def test_the_real_wandb_offline(tmp_path, monkeypatch):
    """What the package writes for a later `wandb sync`: every record, those of an earlier step too."""
    pytest.importorskip("wandb", reason="the extra xar-cli[wandb] is not installed")
    from wandb.proto import wandb_internal_pb2

    for name, value in {"MODE": "offline", "SILENT": "true", "CACHE_DIR": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "preview.png")
    for steps in ((1, 2, 3), (2, 3, 4)):
        logger = WeightsAndBiases(run, small_recipe(), steps[0] - 1)
        for step in steps:
            logger.write(step, {"loss": 1 / step})
        logger.image(steps[-1], tmp_path / "preview.png")
        logger.close()
    found, ids = [], set()
    for path in sorted((run.root / "wandb").glob("offline-run-*/run-*.wandb")):
        for data in entries(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                items = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
                found.append((int(items["step"]), "loss" in items, "preview" in str(items)))
    assert len(ids) == 1
    assert [step for step, has_loss, _ in found if has_loss] == [1, 2, 3, 2, 3, 4]
    assert [step for step, _, has_picture in found if has_picture] == [3, 4]


def test_a_logger_that_fails_is_left_out_and_the_run_goes_on(data, tmp_path, monkeypatch, wandb, caplog):
    monkeypatch.setattr(log, "propagate", True)

    def log_values(values, step=None):
        raise OSError(28, "No space left on device")

    wandb.log = log_values
    train(settings(small_recipe(*WANDB), data, tmp_path / "run"))
    assert caplog.text.count("WeightsAndBiases failed") == 1
    assert "No space left on device" in caplog.text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_under_tensorboard(data, tmp_path, monkeypatch, caplog):
    """The real event writer, whose thread raises its fault at a later call."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    monkeypatch.setattr(log, "propagate", True)

    written = []

    def write(self, data, real=RecordWriter.write):
        written.append(1)
        if len(written) > 40:
            raise OSError(28, "No space left on device")
        real(self, data)

    monkeypatch.setattr(RecordWriter, "write", write)
    train(settings(small_recipe("train.loggers=[tensorboard]"), data, tmp_path / "run"))
    assert "TensorBoard failed" in caplog.text


def test_a_full_disk_when_tensorboard_starts(data, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(records.LOGGERS, "tensorboard", fail)
    with pytest.raises(UserError, match="tensorboard did not start"):
        train(settings(small_recipe("train.loggers=[tensorboard]"), data, tmp_path / "run"))
