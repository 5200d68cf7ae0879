"""The miniature of the paper's tables: its grids, enlarged and reduced digits, the order of its runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import entities
from xar_cli.config import load_recipe
from xar_cli.data.digits import load_digits
from xar_cli.model import XAR, build_grouping
from xar_cli.sample.manifest import MANIFEST
from xar_cli.train.plan import make_plan


def num_entities(study: entities.Study) -> int:
    config = entities.recipe_of(study)
    return build_grouping(config.entity, config.grid).num_entities


def test_reducing_an_enlarged_digit_gives_it_back():
    for digit in load_digits().images:
        enlarged = entities.enlarge(digit, 2)
        assert enlarged.shape == (16, 16)
        assert np.array_equal(entities.reduce(enlarged, 2), digit)


def test_a_pixel_becomes_a_square_and_a_square_its_mean():
    assert entities.enlarge(np.array([[1, 2]]), 2).tolist() == [[1, 1, 2, 2], [1, 1, 2, 2]]
    assert entities.reduce(np.array([[0, 255, 9, 9], [255, 255, 9, 8]], np.uint8), 2).tolist() == [[191, 9]]


def test_cells_of_table_4_are_the_papers():
    rows = entities.TABLES[4].rows
    assert [num_entities(row.study) for row in rows] == [256, 64, 16, 4, 1]
    for row in rows:
        paper, here = load_recipe(f"ablations/{row.recipe}"), entities.recipe_of(row.study)
        assert (here.entity, here.grid) == (paper.entity, paper.grid)


@pytest.mark.parametrize("study", entities.studies_of(entities.TABLES), ids=lambda study: study.slug)
def test_all_rows_of_a_grid_cost_the_same_training(study):
    def cost(study: entities.Study) -> float:
        config = entities.recipe_of(study)
        return make_plan(config, 1, config.data.num_images).total_steps * entities.flops_of_training(config)

    assert cost(study) == pytest.approx(cost(entities.YARDSTICKS[study.grid]), rel=0.003)  # of a whole step


@pytest.mark.parametrize("study", entities.studies_of(entities.TABLES), ids=lambda study: study.slug)
def test_what_a_trace_counts_is_equal_to_a_twentieth(study):
    """The docs say 4 %: what the count by shapes leaves out is the embedding of each entity's timestep."""

    def cost(study: entities.Study) -> float:
        config = entities.recipe_of(study)
        model = XAR(config).eval()
        x, t = (
            torch.randn(1, model.grouping.num_tokens, config.latent_channels),
            torch.rand(1, model.grouping.num_entities),
        )
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(x, t, torch.zeros(1, dtype=torch.long), context=x if study.context == "clean" else None)
        return make_plan(config, 1, config.data.num_images).total_steps * counter.get_total_flops()

    assert cost(study) == pytest.approx(cost(entities.YARDSTICKS[study.grid]), rel=0.05)


def test_seeds_come_one_after_the_other_and_of_each_the_longest_runs_first(tmp_path):
    runs = entities.in_order(entities.studies_of(entities.TABLES), 3)
    assert len(set(runs)) == len(runs) == 3 * 13
    assert [seed for _, seed in runs] == [0] * 13 + [1] * 13 + [2] * 13
    assert [num_entities(study) for study, _ in runs[:6]] == [256, 64, 16, 4, 1, 16]
    assert len({entities.result_of(tmp_path, *run) for run in runs}) == len(runs)


def test_a_table_brings_its_own_networks_alone():
    assert entities.studies_of([4]) == tuple(row.study for row in entities.TABLES[4].rows)
    assert len(entities.studies_of([3, 5])) == 5 + 4 - 1  # the cell with random context stands in both


def test_resized_images_keep_names_and_manifest(tmp_path):
    source = tmp_path / "samples"
    (source / "3").mkdir(parents=True)
    Image.fromarray(np.full((16, 16), 7, np.uint8)).save(source / "3" / "0001.png")
    (source / MANIFEST).write_text("{}")
    reduced = entities.resized(source, tmp_path / "reduced", entities.reduce, 2)
    with Image.open(reduced / "3" / "0001.png") as image:
        assert np.array_equal(np.asarray(image), np.full((8, 8), 7))
    assert (reduced / MANIFEST).exists()
    assert entities.resized(source, tmp_path / "none", entities.reduce, 1) == source


def test_only_what_the_picture_shows_is_kept(tmp_path):
    samples = tmp_path / "samples"

    def fill() -> None:
        samples.mkdir()
        (samples / MANIFEST).write_text(json.dumps({"labels": [1, 0, 0, 1, 1, 0]}))
        for place in range(6):
            Image.new("L", (8, 8)).save(entities.image_path(samples, place))

    fill()
    entities.keep_pictured(samples, seed=0)
    assert [path.stem for path in entities.pictured(samples)] == ["000001", "000002", "000000", "000003"]
    assert set(samples.glob("*.png")) == set(entities.pictured(samples))
    entities.keep_pictured(samples, seed=1)
    assert not samples.exists()


TOY = entities.Setup({entities.SMALL: 2.0, entities.LARGE: 3.0}, "bf16", 20, guidance=(1.0, 2.0))


def write_toy_results(
    out: Path, study: entities.Study, guidance: dict[str, list[float]], seed: int = 0, setup: entities.Setup = TOY
) -> None:
    """The result of a run that was never made, and black images for its picture."""
    result = {
        "steps": entities.steps_of(study, setup), "loss": 1.0, "seconds": 60.0, "device": "A GPU", "torch": "2.9",
        "compiled": True, "asked": setup.asked(study), "guidance": guidance,
    }  # fmt: skip
    path = entities.result_of(out, study, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
    for scale in guidance:
        samples = entities.samples_of(out, study, seed, float(scale))
        samples.mkdir(parents=True, exist_ok=True)
        (samples / MANIFEST).write_text(json.dumps({"labels": list(range(10)) * 2}))
        for place in range(20):
            Image.new("L", (8, 8)).save(entities.image_path(samples, place))


@pytest.fixture
def report(tmp_path, monkeypatch):
    """A copy of docs/entities.md that reports are written to."""
    path = tmp_path / "docs" / "entities.md"
    path.parent.mkdir()
    path.write_text(entities.REPORT.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(entities, "REPORT", path)
    return path


def test_only_chosen_tables_with_results_are_rewritten(tmp_path, report):
    before, out = report.read_text(encoding="utf-8"), tmp_path / "out"
    for size in (4, 16):
        write_toy_results(out, entities.Study(entities.LARGE, entities.cell(size)), {"1": [5.0, 0.5], "2": [4.0, 0.75]})
    write_toy_results(out, entities.Study(entities.SMALL, entities.cell(2)), {"1": [9.0, 0.1], "2": [9.0, 0.1]})

    entities.write_report(out, [3, 4, 5], TOY._replace(guidance=entities.GUIDANCE))  # nothing is judged at all four
    assert report.read_text(encoding="utf-8") == before

    entities.write_report(out, [4], TOY)
    begin, end = (mark.format(4) for mark in entities.MARKS)
    after = report.read_text(encoding="utf-8")
    assert after.partition(begin)[0] == before.partition(begin)[0]
    assert after.partition(end)[2] == before.partition(end)[2]
    made = after.partition(begin)[2].partition(end)[0]
    steps = entities.steps_of(entities.TABLES[4].rows[2].study, TOY)
    assert f"| 4 x 4 | 4 x 4 | 16 | {steps} | 4.00 | 2 | 5.00 | 0.750 | 1 |" in made
    assert made.count("\n| ") == 1 + 2
    assert "2 networks, with `--tables 4 --epochs 2 3 --precision bf16 --count 20 --guidance 1 2`." in made
    assert "Device: A GPU; torch 2.9; trained in bf16 compiled." in made
    assert "*From top to bottom: 4 x 4; 16 x 16.*" in made
    with Image.open(report.parent / "images" / "entities-table-4.png") as picture:
        assert picture.width > picture.height
    assert len(list((report.parent / "images").iterdir())) == 1

    entities.write_report(out, [4], TOY)  # once more finds its marks and changes nothing
    assert report.read_text(encoding="utf-8") == after
    shutil.rmtree(out / "samples")  # as where results alone were copied
    entities.write_report(out, [4], TOY)
    assert report.read_text(encoding="utf-8") == after


def test_fewer_guidance_scales_complete_a_run_for_those_alone():
    result = {"guidance": {"1": [5.0, 0.5], "2.5": [4.0, 0.75]}}
    assert entities.is_complete(result, (1.0, 2.5))
    assert not entities.is_complete(result, (1.0, 3.0))
    assert not entities.is_complete(result)


def test_without_the_unguided_scale_its_column_is_a_dash(tmp_path, report):
    write_toy_results(tmp_path, entities.Study(entities.LARGE, entities.cell(4)), {"2": [4.0, 0.75]})
    entities.write_report(tmp_path, [4], TOY._replace(guidance=(2.0,)))
    assert "| 4.00 | 2 | – | 0.750 | 1 |" in report.read_text(encoding="utf-8")


LONGER, FINER, MORE = {"epochs": {entities.LARGE: 60.0}}, {"precision": "fp32"}, {"images": 1000}


@pytest.mark.parametrize("other", [LONGER, FINER, MORE], ids=str)
def test_a_table_is_of_one_setting_and_says_what_it_leaves_out(other, tmp_path, report, caplog, monkeypatch):
    study = entities.TABLES[4].rows[2].study
    write_toy_results(tmp_path, study, {"1": [9.0, 0.5], "2": [4.0, 0.75]})
    write_toy_results(tmp_path, study, {"1": [1.0, 0.5], "2": [1.0, 0.5]}, seed=1, setup=TOY._replace(**other))
    monkeypatch.setattr(entities.log, "propagate", True)
    caplog.set_level("INFO", logger="xar")
    entities.write_report(tmp_path, [4], TOY)
    row = f"| 4 x 4 | 4 x 4 | 16 | {entities.steps_of(study, TOY)} | 4.00 | 2 | 9.00 | 0.750 | 1 |"
    assert row in report.read_text(encoding="utf-8")
    assert f"left out: {study.slug}-seed1" in caplog.text


def test_results_of_another_number_of_steps_do_not_count(tmp_path):
    """As those have that were made when the recipe or the count of operations was another one."""
    study = entities.TABLES[4].rows[2].study
    write_toy_results(tmp_path, study, {"1": [9.0, 0.5], "2": [4.0, 0.75]})
    write_toy_results(tmp_path, study, {"1": [9.0, 0.5], "2": [4.0, 0.75]}, seed=1)
    path = entities.result_of(tmp_path, study, 1)
    path.write_text(json.dumps({**json.loads(path.read_text()), "steps": 9999}))
    assert set(entities.results_of(tmp_path, study, TOY)) == {0}
    assert entities.left_out(tmp_path, 4, TOY) == [path]


def test_results_of_another_device_and_without_a_compiler_count(tmp_path):
    study = entities.TABLES[4].rows[2].study
    write_toy_results(tmp_path, study, {"1": [9.0, 0.5], "2": [4.0, 0.75]})  # on a GPU, compiled
    assert set(entities.results_of(tmp_path, study, TOY._replace(device="cpu", compiled=False))) == {0}


def test_the_picture_shows_no_network_of_another_setting(tmp_path):
    study = entities.TABLES[4].rows[2].study
    write_toy_results(tmp_path, study, {"1": [1.0, 0.5], "2": [1.0, 0.5]}, setup=TOY._replace(precision="fp32"))
    write_toy_results(tmp_path, study, {"1": [9.0, 0.5], "2": [4.0, 0.75]}, seed=1)
    assert entities.samples_to_picture(tmp_path, 4, TOY) == {}


def trained(done: dict[str, int], monkeypatch) -> list[entities.TrainSettings]:
    """What `run` hands to training, whose result is `done`; nothing is trained, drawn or judged."""
    calls: list[entities.TrainSettings] = []

    def train(settings):
        calls.append(settings)
        settings.out.mkdir(parents=True, exist_ok=True)
        return done

    monkeypatch.setattr(entities, "train", train)
    monkeypatch.setattr(entities, "draw", lambda config, run, samples, *rest: None)
    monkeypatch.setattr(entities, "resized", lambda samples, *rest: samples)
    monkeypatch.setattr(entities, "judge", lambda *arguments: (float(len(calls)), 0.5))
    monkeypatch.setattr(entities, "keep_pictured", lambda *arguments: None)
    return calls


@pytest.mark.parametrize("other", [LONGER, FINER, {"compiled": True}], ids=str)
def test_a_network_made_otherwise_is_another_run_and_takes_over_no_number(other, tmp_path, monkeypatch):
    study, more = entities.TABLES[4].rows[2].study, (1.0, 2.0, 3.0)
    calls = trained({"steps": 7, "loss": 1.0, "seconds": 60.0}, monkeypatch)
    entities.run(tmp_path, study, 0, TOY)
    path = entities.run(tmp_path, study, 0, TOY._replace(guidance=more))  # the same network, judged once more
    result = json.loads(path.read_text())
    assert calls[0].out == calls[1].out
    assert (result["seconds"], result["guidance"]) == (120.0, {"1": [1.0, 0.5], "2": [1.0, 0.5], "3": [2.0, 0.5]})

    result = json.loads(entities.run(tmp_path, study, 0, TOY._replace(guidance=more, **other)).read_text())
    assert calls[2].out != calls[0].out
    assert (result["seconds"], result["guidance"]) == (60.0, {scale: [3.0, 0.5] for scale in "123"})


def test_more_images_are_drawn_from_the_same_network(tmp_path, monkeypatch):
    study = entities.TABLES[4].rows[2].study
    calls = trained({"steps": 7, "loss": 1.0, "seconds": 60.0}, monkeypatch)
    entities.run(tmp_path, study, 0, TOY)
    result = json.loads(entities.run(tmp_path, study, 0, TOY._replace(**MORE)).read_text())
    assert calls[1].out == calls[0].out
    assert (result["seconds"], result["guidance"]) == (120.0, {"1": [2.0, 0.5], "2": [2.0, 0.5]})


def test_results_keep_the_names_of_earlier_studies(tmp_path):
    study = entities.TABLES[4].rows[3].study
    assert entities.result_of(tmp_path, study, 0) == tmp_path / "results" / "16px-patch1-cell-size-8-random-seed0.json"


def test_arithmetic_and_compiling_reach_the_recipe_of_a_run():
    study = entities.TABLES[4].rows[0].study
    train = entities.recipe_of(study, 2, entities.Setup(entities.EPOCHS, precision="bf16", compiled=True)).train
    assert (train.precision, train.compile, train.seed) == ("bf16", True, 2)
    train = entities.recipe_of(study).train
    assert (train.precision, train.compile) == ("fp32", False)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ("fp32", "cpu", False, 2, 13)),
        (["--device", "cuda", "--tables", "4"], ("bf16", "cuda", True, 6, 5)),
        (
            ["--device", "cuda", "--precision", "tf32", "--jobs", "3", "--tables", "3", "5"],
            ("tf32", "cuda", True, 3, 8),
        ),
        (["--tables", "4", "--precision", "bf16", "--compile"], ("bf16", "cpu", True, 2, 5)),
        (["--tables", "4", "--device", "cuda", "--no-compile"], ("bf16", "cuda", False, 6, 5)),
    ],
)
def test_defaults_follow_the_device(options, expected, monkeypatch):
    calls = []
    monkeypatch.setattr(entities, "run_all", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(entities, "write_report", lambda *arguments: None)
    monkeypatch.setattr("sys.argv", ["entities", *options])
    entities.main()
    ((_, studies, seeds, setup, jobs),) = calls
    assert (setup.precision, setup.device, setup.compiled, jobs, len(studies)) == expected
    assert (seeds, setup.guidance) == (3, entities.GUIDANCE)


def test_a_trial_leaves_the_docs_alone(monkeypatch):
    monkeypatch.setattr(entities, "run_all", lambda *arguments: None)
    monkeypatch.setattr(entities, "write_report", lambda *arguments: pytest.fail("written"))
    monkeypatch.setattr("sys.argv", ["entities", "--epochs", "1", "1", "--seeds", "1"])
    entities.main()


def test_the_report_is_of_the_options_alone(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(entities, "write_report", lambda *arguments: calls.append(arguments))
    options = "--tables 4 --epochs 60 60 --precision bf16 --count 1000 --guidance 1 2 3"
    monkeypatch.setattr("sys.argv", ["entities", "--report", "--out", str(tmp_path), *options.split()])
    entities.main()
    ((out, numbers, setup),) = calls
    assert (out, numbers, f"--tables 4 {setup.options}") == (tmp_path, [4], options)
    assert setup.asked(entities.YARDSTICKS[entities.LARGE]) == {"epochs": 60, "precision": "bf16", "images": 1000}


SMALL_GRID = entities.Setup({entities.SMALL: 60, entities.LARGE: 120})
LARGE_GRID = entities.Setup({entities.SMALL: 60, entities.LARGE: 60}, precision="bf16", guidance=(1.0, 2.0, 3.0))


@pytest.mark.parametrize(("number", "setup"), [(3, SMALL_GRID), (4, LARGE_GRID), (5, SMALL_GRID)])
def test_tables_in_docs_are_those_of_the_results_that_are_kept(tmp_path, number, setup):
    """Whoever goes on with them gets the numbers that are told."""
    shutil.copytree(entities.REPORT.parents[1] / "benchmarks" / "results" / "entities", tmp_path / "results")
    rows = entities.table(tmp_path, number, setup)
    assert len(rows.splitlines()) == 4 + len(entities.TABLES[number].rows)
    assert rows in entities.REPORT.read_text(encoding="utf-8")
