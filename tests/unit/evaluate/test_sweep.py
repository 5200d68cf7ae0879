"""Sweeps: points, resuming, the front, the best."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from tests.thread_ranks import thread_ranks
from xar_cli.errors import UserError
from xar_cli.evaluate.sweep import (
    Point,
    Score,
    pareto_front,
    parse_numbers,
    parse_steps,
    plot,
    read_scores,
    run_sweep,
    table,
)


def make_score(point: Point) -> Score:
    """A valley with its bottom at guidance 2, and speed against steps."""
    value = (point.guidance_scale - 2) ** 2 + 20 / point.num_steps
    return Score(point, "FID-10k", value, 0.1, 400 / point.num_steps, {"fid": value})


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("1.5:3:0.25", (1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0)),
        ("0.1:0.3:0.1", (0.1, 0.2, 0.3)),
        ("1.5,2", (1.5, 2)),
        ("2", (2,)),
        ("2,2", (2,)),
        (None, ()),
    ],
)
def test_numbers(text, numbers) -> None:
    assert parse_numbers(text) == pytest.approx(numbers)


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "1:2",
        "2:1:0.5",
        "1:2:0",
        "1:2:-1",
        "",
        "0:1:0.0000001",
        "inf",
        "1.5,nan",
        "nan:1:1",
        "1:nan:1",
        "1:2:nan",
        "1:2:inf",
        "1:inf:1",
    ],
)
def test_wrong_numbers(text: str) -> None:
    with pytest.raises(UserError, match="--guidance-scale"):
        parse_numbers(text)


def test_steps_are_counts_or_schedules() -> None:
    assert parse_steps("20, 40,40:15") == (20, 40, "40:15")
    assert parse_steps(None) == ()
    for wrong in ("20,2.5", "0", "a", "40:", "-1", "²"):
        with pytest.raises(UserError, match="no list of step counts"):
            parse_steps(wrong)


def test_a_sweep_that_failed_before_its_first_point_binds_nobody(tmp_path) -> None:
    def fail(point: Point) -> Score:
        raise UserError("The reference does not fit.", "Give another.")

    with pytest.raises(UserError, match="does not fit"):
        run_sweep(tmp_path, {"reference_sha256": "a"}, (1.5,), (20,), fail)
    run_sweep(tmp_path, {"reference_sha256": "b"}, (1.5,), (20,), make_score)
    with pytest.raises(UserError, match="another reference_sha256"):
        run_sweep(tmp_path, {"reference_sha256": "a"}, (1.5,), (20,), make_score)


@pytest.mark.parametrize("content", ["", "{", "[1]", "1"])
def test_a_sweep_that_lost_what_its_points_share_is_refused(tmp_path, content) -> None:
    run_sweep(tmp_path, {"weights": "w"}, (1.5,), (20,), make_score)
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(UserError, match="is damaged"):
        run_sweep(tmp_path, {"weights": "w"}, (1.5,), (20,), make_score)


def test_points_within_both_errors_of_the_best_are_named() -> None:
    """2.0 and 2.8 with errors 0.3 and 0.8: closer than the root of the sum of squares, which either alone is not."""
    best, other, far = (
        Score(Point(scale, 20), "FID-10k", value, error, 1.0, {})
        for scale, value, error in ((1.0, 2.0, 0.3), (2.0, 2.84, 0.8), (3.0, 3.0, 0.8))
    )
    text = table([best, other, far], best)
    assert "guidance 2, 20 steps" in text
    assert "guidance 3, 20 steps" not in text


def test_a_sweep_scores_all_names_the_best_and_resumes(tmp_path) -> None:
    asked: list[Point] = []

    def score(point: Point) -> Score:
        asked.append(point)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return make_score(point)

    arguments = (tmp_path, {"weights": "w"}, (1.5, 2.0, 2.5), (20, 40))
    with pytest.raises(KeyboardInterrupt):
        run_sweep(*arguments, score)
    assert len(read_scores(tmp_path)) == 3
    result = run_sweep(*arguments, score)
    assert len(asked) == 4 + 3  # the interrupted point and the two after it
    assert result["best"]["point"] == {"guidance_scale": 2.0, "num_steps": 40}
    assert len(result["points"]) == 6
    assert "Best: guidance 2, 40 steps, FID-10k 0.50 ± 0.10." in result["text"]
    assert "Within its error" not in result["text"]
    again = run_sweep(*arguments, score)
    assert again["points"] == result["points"]
    assert len(asked) == 7
    more = run_sweep(tmp_path, {"weights": "w"}, (2.0,), (20, 40, 80), score)
    assert [found["point"]["num_steps"] for found in more["points"]] == [20, 40, 80]
    assert len(asked) == 8


def test_all_ranks_go_on_from_what_rank_0_sees(tmp_path) -> None:
    """Its folder need not be on a disk that the others see."""
    here, identity = tmp_path / "0", {"weights": "w"}
    run_sweep(here, identity, (2.0,), (20,), make_score)

    def work(ranks, identity) -> list[Point]:
        scored: list[Point] = []

        def score(point: Point) -> Score | None:
            scored.append(point)
            return make_score(point) if ranks.is_main else None

        run_sweep(tmp_path / str(ranks.rank), identity, (2.0, 3.0), (20,), score, ranks)
        return scored

    with ThreadPoolExecutor(2) as pool:
        zero, one = (pool.submit(work, ranks, identity) for ranks in thread_ranks(2))
        assert zero.result() == one.result() == [Point(3.0, 20)]
        assert not (tmp_path / "1").exists()
        for refused in [pool.submit(work, ranks, {"weights": "other"}) for ranks in thread_ranks(2)]:
            with pytest.raises(UserError, match="another weights"):
                refused.result()


def test_a_folder_of_another_sweep_is_refused(tmp_path) -> None:
    run_sweep(tmp_path, {"weights": "w", "count": 10}, (2.0,), (20,), make_score)
    run_sweep(tmp_path, {"weights": "w", "new": 1}, (2.0,), (20,), make_score)  # an older version did not tell
    with pytest.raises(UserError, match="another new"):
        run_sweep(tmp_path, {"weights": "w", "new": 2}, (2.0,), (20,), make_score)
    with pytest.raises(UserError, match="another weights"):
        run_sweep(tmp_path, {"weights": "other", "count": 10}, (2.0,), (20,), make_score)


def test_a_sweep_of_an_older_version_goes_on_with_the_reference_of_its_path_alone(tmp_path) -> None:
    run_sweep(tmp_path, {"weights": "w", "reference": "a"}, (2.0,), (20,), make_score)
    with pytest.raises(UserError, match="another reference"):
        run_sweep(tmp_path, {"weights": "w", "reference": "b", "reference_sha256": "B"}, (2.0,), (20,), make_score)
    run_sweep(tmp_path, {"weights": "w", "reference": "a", "reference_sha256": "A"}, (2.0,), (20,), make_score)
    run_sweep(tmp_path, {"weights": "w", "reference": "c", "reference_sha256": "A"}, (2.0,), (20,), make_score)
    with pytest.raises(UserError, match="another reference_sha256"):
        run_sweep(tmp_path, {"weights": "w", "reference": "c", "reference_sha256": "C"}, (2.0,), (20,), make_score)


def test_points_that_the_error_does_not_tell_apart_are_said() -> None:
    scores = [make_score(Point(scale, 20)) for scale in (1.0, 1.9, 2.0)]
    text = table(scores, scores[2])
    assert "Within its error: guidance 1.9, 20 steps." in text


def test_the_front_holds_what_nothing_beats() -> None:
    scores = [make_score(Point(scale, steps)) for scale in (1.0, 2.0) for steps in (10, 20, 40)]
    assert [found.point for found in pareto_front(scores)] == [Point(2.0, 10), Point(2.0, 20), Point(2.0, 40)]


def test_the_plot_is_a_picture() -> None:
    scores = [make_score(Point(scale, steps)) for scale in (1.0, 2.0) for steps in (10, 20)]
    with Image.open(io.BytesIO(plot(scores, scores[-1]))) as image:
        assert image.format == "PNG"
        assert image.width > 800
