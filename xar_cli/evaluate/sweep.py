"""A sweep over sampling settings: every point scored once, a table, a plot, and the best point with its error bar.

Owns the points, their file (it makes the sweep resume) and the pictures. Who draws and scores a point is handed in.
"""

from __future__ import annotations

import io
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from xar_cli.distributed import Ranks
from xar_cli.errors import UserError
from xar_cli.evaluate.evaluation import ALONE
from xar_cli.evaluate.report import show_number
from xar_cli.logs import MetricsWriter, log, read_metrics
from xar_cli.run_dir import write_atomic, write_json

POINTS_FILE = "points.jsonl"
IDENTITY_FILE = "sweep.json"
MAX_POINTS = 1000
Steps = int | str  # evaluations per entity: a number, or first and last of a schedule, '40:15'


@dataclass(frozen=True)
class Point:
    """One combination of settings."""

    guidance_scale: float
    num_steps: Steps

    def __str__(self) -> str:
        return f"guidance {self.guidance_scale:g}, {self.num_steps} steps"


@dataclass(frozen=True)
class Score:
    """What came out at a point.

    Attributes:
        point: the settings.
        metric, value, error: name of the protocol's first metric, the number, its standard error.
        images_per_second: of drawing, over all ranks.
        metrics: all numbers of the protocol.
    """

    point: Point
    metric: str
    value: float
    error: float | None
    images_per_second: float
    metrics: Mapping[str, float | None]


def parse_numbers(text: str | None) -> tuple[float, ...]:
    """Guidance scales: `1.5:3:0.25` (both ends included) or `1.5,2`; nothing given is no number.

    Raises:
        UserError: it is neither, or makes too many points.
    """
    if text is None:
        return ()
    wrong = UserError(
        f"'--guidance-scale {text}' is neither START:STOP:STEP nor a list.", "For example 1.5:3:0.25, or 1.5,2."
    )
    try:
        if ":" not in text:
            numbers = tuple(dict.fromkeys(float(part) for part in text.split(",")))
            if not all(map(math.isfinite, numbers)):
                raise wrong
            return numbers
        start, stop, step = (float(part) for part in text.split(":"))
    except ValueError:
        raise wrong from None
    if not all(map(math.isfinite, (start, stop, step))) or step <= 0 or not 0 <= (stop - start) / step <= MAX_POINTS:
        raise wrong
    return tuple(round(start + index * step, 10) for index in range(int((stop - start) / step + 1e-9) + 1))


def parse_steps(text: str | None) -> tuple[Steps, ...]:
    """Step counts: `20,40`, or schedules over the entities as the recipe takes them, `40:15`; nothing given is none.

    Raises:
        UserError: a part is neither.
    """
    parts = [part.strip() for part in text.split(",")] if text else []
    for part in parts:
        if not all(number.isdecimal() and int(number) > 0 for number in part.split(":")):
            raise UserError(f"'--num-steps {text}' is no list of step counts.", "For example 20,40 or 40,40:15.")
    return tuple(dict.fromkeys(int(part) if part.isdecimal() else part for part in parts))


def run_sweep(
    out: Path,
    identity: Mapping[str, Any],
    guidance_scales: Sequence[float],
    step_counts: Sequence[Steps],
    score: Callable[[Point], Score | None],
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Score every combination that is not scored yet; every rank calls this, rank 0 reads and writes.

    Args:
        out: folder of the sweep; holds one line a point, so that a stopped sweep goes on.
        identity: what all points share (weights, reference, protocol, count, seed); another one is refused. What a
            sweep of an older version does not tell is taken to be the same. Where both tell the `reference_sha256`,
            `reference` may be another path.
        score: draws and scores a point; None on ranks other than 0.
        ranks: who scores.

    Returns:
        What `--json` prints: the points, the best, the paths. Empty on other ranks.

    Raises:
        UserError: the folder belongs to another sweep, or no point is asked for.
    """
    wanted = [Point(scale, steps) for scale, steps in itertools.product(guidance_scales, step_counts)]
    if not wanted:
        raise UserError("The sweep has no point.", "Give --guidance-scale and --num-steps.")
    done = ranks.on_main(lambda: _scores_to_go_on_from(out, identity))
    missing = [point for point in wanted if point not in done]
    if ranks.is_main:
        write_json(out / IDENTITY_FILE, identity)
        log.info(f"{len(wanted) - len(missing)} of {len(wanted)} points are done already")
    writer = MetricsWriter(out / POINTS_FILE) if ranks.is_main else None
    try:
        for number, point in enumerate(missing, 1):
            log.info(f"point {number} of {len(missing)}: {point}")
            found = score(point)
            if found is not None and writer is not None:
                writer.write(**asdict(found))
                done[point] = found
                log.info(f"{point}: {found.metric} {show_number(found.value, found.error)}")
    finally:
        if writer is not None:
            writer.close()
    return summary(out, [done[point] for point in wanted]) if ranks.is_main else {}


def _scores_to_go_on_from(out: Path, identity: Mapping[str, Any]) -> dict[Point, Score]:
    done = {found.point: found for found in read_scores(out)}
    if done:  # a sweep that failed before its first point binds nobody
        _check_identity(out, identity)
    return done


def summary(out: Path, scores: Sequence[Score]) -> dict[str, Any]:
    """Write sweep.md and sweep.png; returns points, best, paths and the table as text."""
    best = min(scores, key=lambda found: found.value)
    text = table(scores, best)
    write_atomic(out / "sweep.md", text + "\n")
    write_atomic(out / "sweep.png", plot(scores, best))
    return {
        "points": [asdict(found) for found in scores],
        "best": asdict(best),
        "table": str(out / "sweep.md"),
        "plot": str(out / "sweep.png"),
        "text": text,
    }


def read_scores(out: Path) -> list[Score]:
    """All points of a sweep folder that are done."""
    return [Score(**{**record, "point": Point(**record["point"])}) for record in read_metrics(out / POINTS_FILE)]


def table(scores: Sequence[Score], best: Score) -> str:
    """A Markdown table of the points, the best, and those that its error bar does not tell from it."""
    lines = [f"| guidance | steps | {best.metric} | images/s |", "|---|---|---|---|"]
    lines += [
        f"| {found.point.guidance_scale:g} | {found.point.num_steps} | {show_number(found.value, found.error)} "
        f"| {found.images_per_second:.1f} |"
        for found in scores
    ]
    close = [found for found in scores if found is not best and _within_error(found, best)]
    lines += ["", f"Best: {best.point}, {best.metric} {show_number(best.value, best.error)}."]
    if close:
        lines.append(f"Within its error: {'; '.join(str(found.point) for found in close)}.")
    return "\n".join(lines)


def pareto_front(scores: Sequence[Score]) -> list[Score]:
    """The points that no other beats in both speed and metric, fastest first."""
    front: list[Score] = []
    for found in sorted(scores, key=lambda found: (-found.images_per_second, found.value)):
        if not front or found.value < front[-1].value:
            front.append(found)
    return front


def plot(scores: Sequence[Score], best: Score) -> bytes:
    """A PNG: the metric against guidance, one line per step count; and against images/s, with the Pareto front."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for steps in dict.fromkeys(found.point.num_steps for found in scores):
        line = sorted(
            (found for found in scores if found.point.num_steps == steps), key=lambda f: f.point.guidance_scale
        )
        scales, values = [f.point.guidance_scale for f in line], [f.value for f in line]
        errors = [f.error or 0 for f in line]
        left.errorbar(scales, values, errors, marker="o", capsize=3, label=f"{steps} steps")
        right.scatter([f.images_per_second for f in line], values, label=f"{steps} steps")
    front = pareto_front(scores)
    right.plot([f.images_per_second for f in front], [f.value for f in front], color="grey", zorder=0, label="front")
    left.plot(best.point.guidance_scale, best.value, "*", color="black", markersize=14, label="best")
    left.set(xlabel="guidance scale", ylabel=best.metric)
    right.set(xlabel="images/s", ylabel=best.metric)
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _within_error(found: Score, best: Score) -> bool:
    spread = ((found.error or 0) ** 2 + (best.error or 0) ** 2) ** 0.5
    return found.value - best.value <= spread


def _check_identity(out: Path, identity: Mapping[str, Any]) -> None:
    path = out / IDENTITY_FILE
    if not path.is_file():
        return
    here = json.loads(json.dumps(identity))
    try:
        there = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise UserError(f"'{path}' is damaged: what its points share is not known.", "Give another --out.") from None
    if "reference_sha256" in there:  # its content counts; a sweep of an older version tells its path alone
        here.pop("reference", None)
    other = [key for key, value in here.items() if there.get(key, value) != value]
    if other:
        raise UserError(
            f"'{out}' holds a sweep with another {', '.join(other)}.", "Give another --out, or the same settings."
        )
