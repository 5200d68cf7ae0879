"""The report: what it says, and that a real browser shows it without asking anybody for anything."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xar_cli.config import load_recipe
from xar_cli.data.digits import split_digits
from xar_cli.errors import UserError
from xar_cli.evaluate import Settings, evaluate
from xar_cli.evaluate.html import sheet
from xar_cli.evaluate.images import ArrayImages, GeneratedImages, open_images
from xar_cli.evaluate.report import (
    differences,
    differences_of_sampling,
    facts_of_sampling,
    markdown,
    metric_rows,
    published_figures,
    report_content,
    sample_strips,
    show_number,
    write_report,
)

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
COUNT = 40
COST = {"entities": 4, "conditional": 80, "null": 60, "commits": 6, "total_per_image": 146}
FIGURES = len(set(split_digits()[1].labels[:COUNT])) + 8  # one a class, eight samples with their neighbours

# Run inside the page: which images decoded, what was asked of the network, whether anything sticks out on a phone.
PROBE = """<script>
window.addEventListener("load", () => {
  const images = [...document.images];
  const found = {
    images: images.length,
    decoded: images.filter((image) => image.complete && image.naturalWidth > 0).length,
    requests: performance.getEntriesByType("resource").map((entry) => entry.name).filter((n) => !n.startsWith("data:")),
    page: document.documentElement.scrollWidth, window: window.innerWidth,
    dark: getComputedStyle(document.body).backgroundColor,
  };
  document.body.setAttribute("data-found", JSON.stringify(found));
});
</script>"""


@pytest.fixture(scope="module")
def report(tmp_path_factory, digit_folders) -> dict[str, Path]:
    """A report of 40 digits that a manifest calls samples of the tiny recipe, with a name that must be escaped."""
    folder = tmp_path_factory.mktemp("report")
    _, heldout = split_digits()
    (folder / "samples").mkdir()
    for index, image in enumerate(heldout.images[:COUNT]):
        Image.fromarray(image).save(folder / "samples" / f"{index:06d}.png")
    config = load_recipe("tiny")
    names = ["<b>nought</b> & co", *map(str, range(1, 10))]
    manifest = {
        "format": "xar-samples", "version": 1, "recipe": "tiny", "weights": "runs/tiny", "weights_sha256": "ab" * 32,
        "seed": 0, "solver": "euler", "num_steps": 20, "guidance_scale": 2.5, "image_size": 8, "count": COUNT,
        "class_names": names, "labels": heldout.labels[:COUNT].tolist(), "config": config.model_dump(mode="json"),
        "evaluations": COST,
    }  # fmt: skip
    (folder / "samples" / "manifest.json").write_text(json.dumps(manifest))
    settings, samples = Settings(), open_images(folder / "samples")
    found = evaluate(samples, digit_folders[0], "digits", settings=settings)
    return write_report(folder / "out", found, facts_of_sampling(samples), samples, digit_folders[0], settings)


def test_json_says_everything(report) -> None:
    content = json.loads(report["json"].read_text())
    assert (content["format"], content["version"]) == ("xar-report", 1)
    assert {
        "samples",
        "reference",
        "protocols",
        "published",
        "differences",
        "sampling",
        "cost",
        "settings",
        "machine",
    } <= set(content)
    metric = content["protocols"]["digits"]["metrics"]["fid"]
    assert metric["name"] == "Frechet distance (40 images)"
    assert metric["error"] > 0
    assert content["sampling"]["weights_sha256"] == "ab" * 32
    assert content["machine"]["torch"]
    assert content["cost"] == COST  # as the manifest has it


def test_markdown_has_a_row_for_each_metric(report) -> None:
    text = report["md"].read_text()
    content = json.loads(report["json"].read_text())
    for metric in content["protocols"]["digits"]["metrics"].values():
        assert f"| {metric['name']} |" in text
    for difference in content["differences"]:
        assert difference in text


def test_html_is_one_file_with_the_same_numbers(report) -> None:
    page = report["html"].read_text()
    content = json.loads(report["json"].read_text())
    for metric in content["protocols"]["digits"]["metrics"].values():
        assert show_number(metric["value"], metric["error"]) in page
    for address in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert address.startswith("data:")
    assert "<script" not in page
    assert "http://" not in page
    assert "<b>nought</b>" not in page
    assert "&lt;b&gt;nought&lt;/b&gt; &amp; co" in page
    assert page.count("<figure>") == FIGURES


def test_pictures_in_the_page_are_the_samples(report) -> None:
    page = report["html"].read_text()
    encoded = re.search(r'src="data:image/png;base64,([^"]+)"', page)
    assert encoded is not None
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded[1]))))
    _, heldout = split_digits()
    first_nought = heldout.images[np.flatnonzero(heldout.labels[:COUNT] == 0)[0]]
    assert np.array_equal(picture[2 + 6 : 2 + 96 : 12, 2 + 6 : 2 + 96 : 12, 0], first_nought)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")
def test_a_real_browser_shows_it_on_a_phone_in_the_dark(report, tmp_path) -> None:
    probed = tmp_path / "report.html"
    probed.write_text(report["html"].read_text().replace("</body>", PROBE + "</body>"))
    done = subprocess.run(
        [
            CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--blink-settings=preferredColorScheme=0", f"--user-data-dir={tmp_path / 'profile'}",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=500,900", "--enable-logging=stderr",
            "--virtual-time-budget=5000", "--dump-dom", probed.as_uri(),
        ],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    match = re.search(r'data-found="([^"]*)"', done.stdout)
    assert match is not None, done.stderr[-2000:]
    found = json.loads(match[1].replace("&quot;", '"'))
    assert found["images"] == found["decoded"] == FIGURES
    assert found["requests"] == []
    assert found["page"] <= found["window"]  # nothing sticks out: wide tables scroll in their own box
    assert found["dark"] == "rgb(13, 17, 23)"
    assert "CONSOLE" not in done.stderr


def test_published_figures_come_from_the_recipe() -> None:
    manifest = {"recipe": "base", "config": load_recipe("base").model_dump(mode="json")}
    figures = published_figures(manifest)
    assert (figures["fid"], figures["is"], figures["precision"], figures["recall"]) == (1.72, 280.4, 0.82, 0.59)
    assert "2502.20388" in figures["source"]
    assert published_figures({"recipe": "tiny", "config": load_recipe("tiny").model_dump(mode="json")}) == {}
    assert published_figures({}) == {}


@pytest.mark.parametrize(("change", "compared"), [("sample.num_steps=20", True), ("train.epochs=10", False)])
def test_published_figures_are_of_the_recipe_as_it_is_shipped(change: str, compared: bool) -> None:
    config = load_recipe("base", [change]).model_dump(mode="json")
    assert bool(published_figures({"recipe": "base", "config": config})) == compared
    assert published_figures({"recipe": "base", "config": {**config, "colour": "red"}}) == {}


def test_differences_name_count_protocol_and_reference(digit_folders) -> None:
    found = evaluate(digit_folders[1], digit_folders[0], "digits", settings=Settings(error_bars="none"))
    told = " ".join(differences(found))
    for word in ("297 samples here, 50000 in papers", "ADM's suite; this is digits", str(digit_folders[0])):
        assert word in told


def drawn_with(changes: list[str], **manifest: object) -> ArrayImages:
    """Samples of the recipe `base` by their manifest."""
    images, config = ArrayImages(np.zeros((2, 8, 8), np.uint8), "some"), load_recipe("base", changes)
    known = {"recipe": "base", "ema": True, "labels": list(range(1000)), "config": config.model_dump(mode="json")}
    images.manifest = {**known, **manifest}
    return images


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("sample.solver=heun", "Solver: heun here, euler_maruyama in the recipe"),
        ("sample.num_steps=40:15", "Steps: 40:15 here, 40 in the recipe"),
        ("sample.guidance_scale=1.5", "Guidance scale: 1.5 here, 2.7 in the recipe"),
        ("sample.guidance_schedule=constant", "Guidance schedule: constant here, linear in the recipe"),
        ("sample.guidance_interval=[0.1, 0.9]", "Guidance interval: 0.1, 0.9 here, 0.0, 1.0 in the recipe"),
        ("sample.decoder_precision=bf16", "Precision of the decoder: bf16 here, fp32 in the recipe"),
        ("train.precision=fp32", "Precision of the network: fp32 here, bf16 in the recipe"),
    ],
)
def test_what_was_drawn_otherwise_than_the_published_figures_is_said(change: str, sentence: str) -> None:
    (told,) = differences_of_sampling(drawn_with([change]))
    assert told.startswith(sentence)


def test_raw_weights_and_missing_classes_are_said() -> None:
    assert differences_of_sampling(drawn_with([])) == []
    assert "raw ones" in differences_of_sampling(drawn_with([], ema=False))[0]
    told = differences_of_sampling(drawn_with([], labels=[207, 207, 30]))
    assert told == ["Classes: 2 of 1000 were drawn; published figures are of all of them."]
    tiny = drawn_with([], config=load_recipe("tiny", ["sample.num_steps=3"]).model_dump(mode="json"))
    assert differences_of_sampling(tiny) == []  # no figures to compare with


def test_a_crop_of_the_samples_is_said(digit_folders) -> None:
    assert differences_of_sampling(open_images(digit_folders[1])) == []
    told = differences_of_sampling(open_images(digit_folders[1], 4))
    assert told == ["Crop: the samples were cropped to 4 x 4 by --image-size."]


def test_the_page_lists_what_was_drawn_otherwise(digit_folders) -> None:
    found = evaluate(digit_folders[1], digit_folders[0], "digits", settings=Settings(error_bars="none"))
    made = facts_of_sampling(drawn_with(["sample.solver=heun"]))
    assert "- Solver: heun here" in markdown(report_content(found, made, Settings()))


def test_names_with_bars_and_line_breaks_do_not_break_the_tables(digit_folders) -> None:
    found = evaluate(digit_folders[1], digit_folders[0], "digits", settings=Settings(error_bars="none"))
    content = report_content(found, facts_of_sampling(open_images(digit_folders[1])), Settings())
    content["protocols"]["digits"]["per_class"] = {"a|b\nc": {"count": 3, "accuracy": 0.5}}
    content["sampling"] = {"weights": "runs/a|b"}
    text = markdown(content)
    assert "| a\\|b c | 3 | 0.500 |" in text
    assert "| weights | runs/a\\|b |" in text


def test_classes_of_one_name_stay_apart() -> None:
    digits = split_digits()[1]
    samples = ArrayImages(digits.images[digits.labels < 2], "digits", np.arange(2)[digits.labels[digits.labels < 2]])
    samples.class_names = ("1", "1")
    found = evaluate(samples, ArrayImages(digits.images, "all"), settings=Settings(error_bars="none"))
    counts = {name: row["count"] for name, row in found.first.per_class.items()}
    assert counts == {f"1 ({label})": int((digits.labels == label).sum()) for label in (0, 1)}
    assert [strip.caption for strip in sample_strips(samples, found)] == ["1 (0)", "1 (1)"]


def test_names_that_are_no_utf_8_stand_in_the_report(digit_folders, tmp_path) -> None:
    samples = tmp_path / os.fsdecode(b"digits \xff")
    shutil.copytree(digit_folders[1] / "3", samples / os.fsdecode(b"class \xfe"))
    settings, opened = Settings(error_bars="none"), open_images(samples)
    opened.manifest = {"weights": os.fsdecode(b"runs/\xfd")}
    found = evaluate(opened, digit_folders[0], "digits", settings=settings)
    paths = write_report(tmp_path / "out", found, facts_of_sampling(opened), opened, digit_folders[0], settings)
    assert "digits \\xff" in paths["md"].read_text()
    assert "class \\xfe" in paths["html"].read_text()
    assert json.loads(paths["json"].read_text())["samples"]["name"].endswith("digits \\xff")


def test_samples_without_a_manifest_or_with_an_old_one_tell_no_cost() -> None:
    images = ArrayImages(np.zeros((2, 8, 8), np.uint8), "some")
    assert facts_of_sampling(images) == {"published": {}, "sampling": {}, "cost": {}, "differences": []}
    images.manifest = {"recipe": "tiny", "config": load_recipe("tiny").model_dump(mode="json")}
    assert facts_of_sampling(images) == {
        "published": {}, "sampling": {"recipe": "tiny"}, "cost": {}, "differences": [],
    }  # fmt: skip


def test_the_numbers_are_written_before_the_pictures_are_drawn(digit_folders, tmp_path) -> None:
    images = split_digits()[1].images[:COUNT, :, :, None].repeat(3, axis=-1)
    drawn: list[int] = []

    def draw(indices):
        drawn.extend(indices)
        if len(drawn) > COUNT:
            raise UserError("No memory is left.", "Try again.")
        return images[list(indices)]

    settings = Settings(error_bars="none")
    samples = GeneratedImages("a model", np.zeros(COUNT, int), draw, "seed 0", manifest={"image_size": 8})
    found = evaluate(samples, digit_folders[0], "digits", settings=settings)
    with pytest.raises(UserError, match="No memory"):
        write_report(tmp_path, found, facts_of_sampling(samples), samples, digit_folders[0], settings)
    assert json.loads((tmp_path / "report.json").read_text())["protocols"] == found.as_dict()["protocols"]


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [(1.23456, 0.0123, "1.235 ± 0.012"), (312.3, 4.2, "312.3 ± 4.2"), (0.5, None, "0.5"), (None, None, "-")],
)
def test_numbers_show_the_digits_that_mean_something(value, error, text: str) -> None:
    assert show_number(value, error) == text


def test_large_images_are_reduced_and_small_ones_enlarged() -> None:
    assert sheet([np.zeros((256, 128, 3), np.uint8)] * 3).shape == (96 + 4, 3 * 50 + 2, 3)
    assert sheet([np.zeros((8, 8, 3), np.uint8)] * 9).shape == (2 * 98 + 2, 8 * 98 + 2, 3)


def test_images_of_several_sizes_fit_on_one_sheet() -> None:
    images = [np.full((*size, 3), 9, np.uint8) for size in ((90, 60), (60, 96))]
    picture = sheet(images)
    assert picture.shape == (90 + 4, 2 * 96 + 6, 3)
    assert (picture == 9).all(axis=-1).sum() == 90 * 60 + 60 * 96


@pytest.mark.parametrize(("protocol", "theirs"), [("adm", "1.72"), ("torch-fidelity", "")])
def test_published_figures_stand_beside_those_of_their_own_protocol(protocol: str, theirs: str) -> None:
    result = {
        "protocol": protocol,
        "metrics": {
            "fid": {"name": "FID-50k", "value": 2.5, "error": 0.1, "note": "n"},
            "kid": {"name": "KID-50k", "value": 0.1, "error": None, "note": ""},
        },
    }
    assert metric_rows(result, {"fid": 1.72}) == [
        ("FID-50k", "2.50 ± 0.10", theirs, "n"), ("KID-50k", "0.1", "", "")
    ]  # fmt: skip
