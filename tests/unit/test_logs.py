"""Log lines, progress without a terminal, metrics.jsonl."""

from __future__ import annotations

import json

from xar_cli import logs
from xar_cli.logs import MetricsWriter, log, progress, read_metrics, setup_logs


def test_lines_go_to_stderr_with_the_rank_of_others(capsys):
    setup_logs(0)
    log.info("hello")
    setup_logs(3)
    log.info("not shown")
    log.warning("careful")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "hello\n[rank 3] careful\n"


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys, monkeypatch):
    setup_logs(0)
    now = [0.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    with progress(100, "cache", initial=10) as bar:
        now[0] = 10.0
        bar.update(20)
        assert capsys.readouterr().err == ""
        now[0] = 30.0
        bar.update(10, failed=2)
        assert capsys.readouterr().err == "cache: 40/100 images, 1.0/s, 01:00 left failed=2\n"
    assert capsys.readouterr().err.startswith("cache: 40/100 images")


def test_progress_of_a_silent_rank_prints_nothing(capsys):
    with progress(10, "cache", enabled=False) as bar:
        bar.update(10)
    assert capsys.readouterr().err == ""


def test_metrics_survive_a_torn_last_line(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write(step=1, loss=0.5)
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 0.5}]
    writer = MetricsWriter(path)
    writer.write(step=2, loss=0.25)
    writer.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 0.25},
    ]


def test_metrics_of_a_run_that_has_none(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []
