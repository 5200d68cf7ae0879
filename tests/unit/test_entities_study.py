"""The miniature of the paper's tables: its grids, enlarged and reduced digits, the order of its runs."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import entities
from xar_cli.config import load_recipe
from xar_cli.data.digits import load_digits
from xar_cli.model import build_grouping
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
    rows = entities.TABLES["Table 4: size of the cell"]
    assert [num_entities(row.study) for row in rows] == [256, 64, 16, 4, 1]
    for row in rows:
        paper, here = load_recipe(f"ablations/{row.recipe}"), entities.recipe_of(row.study)
        assert (here.entity, here.grid) == (paper.entity, paper.grid)


@pytest.mark.parametrize("study", entities.STUDIES, ids=lambda study: study.slug)
def test_all_rows_of_a_grid_cost_the_same_training(study):
    def cost(study: entities.Study) -> float:
        config = entities.recipe_of(study)
        return make_plan(config, 1, config.data.num_images).total_steps * entities.flops_of_training(config)

    assert cost(study) == pytest.approx(cost(entities.YARDSTICKS[study.grid]), rel=0.003)  # of a whole step


def test_the_longest_runs_start_first_and_each_has_its_own_files(tmp_path):
    runs = entities.in_order(3)
    assert len(set(runs)) == len(runs) == 3 * 13
    assert [num_entities(study) for study, _ in runs[:6]] == [256] * 3 + [64] * 3
    assert len({entities.result_of(tmp_path, *run) for run in runs}) == len(runs)


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
