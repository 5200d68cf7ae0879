"""The whole evaluation with a cheap network: what is computed once, what is refused, what ranks have to agree on."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import os
import shutil
import signal
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from tests.thread_ranks import thread_ranks
from tests.unit.evaluate.conftest import FakeInception, make_images, write_folder
from xar_cli.config.schema import ProtocolName
from xar_cli.errors import UserError
from xar_cli.evaluate import Evaluator, Settings, evaluate, evaluation, features, make_statistics, reference, stage
from xar_cli.evaluate.images import ArrayImages, GeneratedImages
from xar_cli.evaluate.judge import Judge
from xar_cli.evaluate.protocols import PROTOCOLS, counted, pick_protocols
from xar_cli.evaluate.reference import open_reference
from xar_cli.evaluate.weights import Weights

QUICK = Settings(error_bars="none", batch_size=4)


@pytest.fixture
def folders(tmp_path, fake_networks):
    return (
        write_folder(tmp_path / "samples", make_images(22)),
        write_folder(tmp_path / "reference", make_images(30, seed=1, brightness=0.8)),
    )


def test_features_are_extracted_once_per_network(folders, fake_networks) -> None:
    found = evaluate(*folders, "adm,torch-fidelity", settings=QUICK)
    assert list(found.results) == ["adm", "torch-fidelity"]
    assert list(fake_networks) == ["inception"]
    assert fake_networks["inception"].images_seen == 22 + 30
    assert found.results["adm"].metrics["fid"].value == found.results["torch-fidelity"].metrics["fid"].value


def test_one_evaluator_judges_many_sets_by_features_computed_once(folders, fake_networks) -> None:
    samples = [ArrayImages(make_images(22, seed=seed), f"samples {seed}") for seed in (0, 2)]
    alone = [evaluate(one, folders[1], "adm", settings=QUICK).as_dict() for one in samples]
    fake_networks.clear()
    judge = Evaluator(folders[1], "adm", settings=QUICK)
    found = [judge.evaluate(one).as_dict() for one in samples]
    assert fake_networks["inception"].images_seen == 22 + 30 + 22
    for one in (*alone, *found):
        for side in ("samples", "reference"):
            assert one[side].pop("images_per_second") > 0
    assert found == alone


def test_sets_that_come_and_go_keep_their_own_hash(folders, fake_networks) -> None:
    """Python gives the place of an object that is gone to the next one."""
    judge = Evaluator(folders[1], "adm", settings=QUICK)

    def sha256(brightness: float) -> str:
        return judge.evaluate(ArrayImages(make_images(22, brightness=brightness), "some")).samples.sha256

    assert len({sha256(brightness) for brightness in (1, 0.9, 0.8, 0.7)}) == 4


def by_two_ranks(work):
    """What `work`, given its ranks, returns on each of two."""
    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(work, ranks) for ranks in thread_ranks(2)]]


def test_two_ranks_give_the_numbers_of_one_and_fill_one_cache(folders, fake_networks, tmp_path) -> None:
    settings = QUICK.model_copy(update={"feature_cache": tmp_path / "cache"})
    alone = evaluate(*folders, "adm", settings=QUICK)
    two = by_two_ranks(lambda ranks: evaluate(*folders, "adm", settings=settings, ranks=ranks))
    for key, metric in alone.first.metrics.items():
        assert two[0].first.metrics[key].value == pytest.approx(metric.value, rel=1e-6)
    assert not two[1].results
    assert evaluate(*folders, "adm", settings=settings).first.metrics == two[0].first.metrics
    assert fake_networks["inception"].images_seen == 0


@pytest.mark.parametrize("change", ["less", "longer"])
@pytest.mark.parametrize("side", ["samples", "reference"])
def test_ranks_that_see_other_images_are_refused(folders, fake_networks, tmp_path, side, change) -> None:
    index = ("samples", "reference").index(side)
    copy = shutil.copytree(folders[index], tmp_path / "copy")
    if change == "less":
        (copy / "000021.png").unlink()
    else:
        (copy / "000021.png").write_bytes((copy / "000021.png").read_bytes() + b"?")
    of_rank = [folders, [copy if place == index else path for place, path in enumerate(folders)]]

    def work(ranks):
        with pytest.raises(UserError, match=f"Not all ranks have the same {side}.") as caught:
            evaluate(*of_rank[ranks.rank], "adm", settings=QUICK, ranks=ranks)
        assert "of which none is being written" in caught.value.next_step

    by_two_ranks(work)
    assert all(network.images_seen == 0 for network in fake_networks.values())


def test_ranks_that_draw_other_images_or_have_other_weights_are_refused(folders, tmp_path, monkeypatch) -> None:
    def drawn(ranks):
        images = GeneratedImages("some", np.zeros(4), lambda indices: make_images(len(indices)), f"seed {ranks.rank}")
        with pytest.raises(UserError, match="the same samples"):
            evaluate(images, folders[1], "adm", settings=QUICK, ranks=ranks)

    def weighed(ranks):
        given = QUICK.model_copy(update={"inception_weights": (ranks.rank,)})
        for measure in (
            lambda: evaluate(*folders, "adm", settings=given, ranks=ranks),
            lambda: make_statistics(folders[1], tmp_path / "s.npz", "adm", settings=given, ranks=ranks),
        ):
            with pytest.raises(UserError, match="the same network weights"):
                measure()

    by_two_ranks(drawn)
    monkeypatch.setattr(evaluation, "require_weights", lambda _, given, __: Weights(Path("w"), str(given[0]), False))
    by_two_ranks(weighed)


def test_statistics_of_ranks_that_see_other_images_are_refused(folders, tmp_path) -> None:
    def work(ranks):
        with pytest.raises(UserError, match="the same images"):
            make_statistics(folders[ranks.rank], tmp_path / "s.npz", "adm", settings=QUICK, ranks=ranks)

    by_two_ranks(work)


@pytest.mark.parametrize("cached", [False, True])
def test_a_folder_that_one_rank_does_not_see_is_a_sentence_on_both(
    folders, fake_networks, tmp_path, monkeypatch, cached
) -> None:
    """As a preview evaluates: whatever the ranks say to each other stays in pairs."""
    cache, here = tmp_path / "cache", threading.local()
    settings = QUICK.model_copy(update={"feature_cache": cache})
    place, name = (features, "_open_table") if cached else (os, "listdir")
    if cached:
        evaluate(*folders, "adm", settings=settings)

    real = getattr(place, name)

    def look(*arguments):
        if getattr(here, "rank", 0) == 1:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return real(*arguments)

    def work(ranks) -> None:
        here.rank = ranks.rank
        with pytest.raises(UserError, match=r"Rank 1 does not see the features in .*: No such file") as caught:
            ranks.on_all(lambda: evaluate(*folders, "adm", settings=settings, ranks=ranks))
        assert "on a disk shared by all machines" in caught.value.next_step

    monkeypatch.setattr(place, name, look)
    by_two_ranks(work)
    assert fake_networks["inception"].images_seen == 0
    assert not list(cache.glob(".*"))


def test_a_table_for_a_time_stays_until_all_ranks_have_opened_it(folders, monkeypatch) -> None:
    here = threading.local()

    def late(*arguments, real=features._open_table):
        if here.rank == 1:
            time.sleep(0.2)
        return real(*arguments)

    def work(ranks) -> int:
        here.rank = ranks.rank
        return evaluate(*folders, "adm", settings=QUICK, ranks=ranks).samples.count

    monkeypatch.setattr(features, "_open_table", late)
    assert by_two_ranks(work) == [22, 22]


def test_ctrl_c_never_breaks_into_the_handing_over_of_images(folders, monkeypatch) -> None:
    """There it could leave a thread waiting for ever. The evaluation ends before its next batch."""
    real, calls = ThreadPoolExecutor.submit, []

    def submit(self, *arguments):
        calls.append("begun")
        if len(calls) == 10:
            signal.raise_signal(signal.SIGINT)
            calls.append("gone on")
        return real(self, *arguments)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", submit)
    with pytest.raises(KeyboardInterrupt):
        evaluate(*folders, "adm", settings=QUICK)
    assert calls[10] == "gone on"
    assert len(calls) <= 1 + 3 * QUICK.batch_size  # the batch in work, and those that are decoded ahead of it


def test_sigterm_leaves_no_half_made_table_in_the_cache(folders, tmp_path, monkeypatch) -> None:
    real, begun = ThreadPoolExecutor.submit, []

    def submit(self, *arguments):
        begun.append(list((tmp_path / "cache").glob(".*")))
        if len(begun) == 10:
            signal.raise_signal(signal.SIGTERM)
        return real(self, *arguments)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", submit)
    with pytest.raises(SystemExit) as caught:
        evaluate(*folders, "adm", settings=QUICK.model_copy(update={"feature_cache": tmp_path / "cache"}))
    assert caught.value.code == 143
    assert begun[0]
    assert not list((tmp_path / "cache").glob(".*"))


@pytest.mark.parametrize("command", ["fid", "statistics"])
def test_sigterm_while_numbers_are_computed_leaves_no_tables(folders, tmp_path, monkeypatch, command) -> None:
    place, there = tmp_path / "temporary", []
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))

    def stopped(*_) -> None:
        there.append(len(list(place.iterdir())))
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Judge, "result", stopped)
    monkeypatch.setattr(evaluation, "write_statistics", stopped)
    settings = {
        "fid": stage.FidSettings(samples=folders[0], reference=folders[1], protocols=("adm",), measure=QUICK),
        "statistics": stage.StatisticsSettings(
            images=folders[1], out=tmp_path / "out.npz", protocol="adm", measure=QUICK
        ),
    }
    with pytest.raises(SystemExit) as caught:
        getattr(stage, command)(settings[command].model_copy(update={"device": "cpu"}))
    assert (caught.value.code, there) == (143, [2 if command == "fid" else 1])
    del caught  # and what its frames hold, as at the end of a process
    gc.collect()
    assert not list(place.iterdir())


def test_half_made_tables_of_killed_processes_go_after_a_day(folders, tmp_path) -> None:
    cache = tmp_path / "cache"
    old = [cache / name for name in (".0123456789abcdef.abcd_123", ".features-abcd_123", ".notes", ".0123.backup")]
    busy, fresh = cache / ".0123456789abcdef.busy1234", cache / ".0123456789abcdef.fresh123"
    for folder in (*old, busy, fresh):
        folder.mkdir(parents=True)
        (folder / "pool.npy").touch()
        if folder not in (busy, fresh):
            os.utime(folder / "pool.npy", (0, 0))
        if folder != fresh:
            os.utime(folder, (0, 0))
    evaluate(*folders, "adm", settings=QUICK.model_copy(update={"feature_cache": cache}))
    assert sorted(cache.glob(".*")) == sorted((*old[2:], busy, fresh))


@pytest.mark.parametrize("whose", ["ours", "another's"])
def test_tables_for_a_time_of_killed_processes_go_after_a_day_too(folders, tmp_path, monkeypatch, whose) -> None:
    place = tmp_path / "temporary"
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    old = place / ".features-abcd_123"
    old.mkdir(parents=True)
    os.utime(old, (0, 0))
    if whose != "ours":
        monkeypatch.setattr(os, "getuid", lambda: old.stat().st_uid + 1)
    found = evaluate(*folders, "adm", settings=QUICK)
    tables = [path for path in place.iterdir() if path != old]
    assert old.exists() == (whose != "ours")
    assert [path.stat().st_mode & 0o777 for path in tables] == [0o700, 0o700]
    del found
    gc.collect()
    assert not any(path.exists() for path in tables)


def test_what_each_protocol_reports(folders) -> None:
    found = evaluate(*folders, ["adm", "torch-fidelity", "clean-fid"], settings=QUICK)
    keys = {name: list(result.metrics) for name, result in found.results.items()}
    assert keys == {
        "adm": ["fid", "sfid", "is", "precision", "recall"],
        "torch-fidelity": ["fid", "is", "kid", "precision", "recall"],
        "clean-fid": ["fid", "kid"],
    }
    assert found.results["adm"].metrics["fid"].name == "FID-22"
    assert found.results["adm"].metrics["precision"].note == "inception features, k = 3, 30 reference images"
    # torch-fidelity's default for these two is VGG16: a number on Inception features would not be its own.
    assert found.results["torch-fidelity"].metrics["precision"].value is None
    assert "VGG16" in found.results["torch-fidelity"].metrics["precision"].note


def test_names_carry_the_count() -> None:
    assert counted("FID", 50_000) == "FID"
    assert counted("FID", 10_000) == "FID-10k"
    assert counted("sFID", 12_345) == "sFID-12345"
    assert counted("precision", 10_000) == "precision (10k images)"
    assert counted("FID", 49_999) != "FID"


def test_two_evaluations_name_their_count_too(folders) -> None:
    found = evaluate(*folders, "adm", settings=QUICK.model_copy(update={"count": 10}))
    assert found.samples.count == 10
    assert found.first.metrics["fid"].name == "FID-10"
    assert found.tables["inception"].rows.tolist() == [0, 2, 4, 6, 8, 11, 13, 15, 17, 19]  # spread over the set
    with pytest.raises(UserError, match="23 images are asked for and 22"):
        evaluate(*folders, "adm", settings=QUICK.model_copy(update={"count": 23}))


def test_features_are_cached_by_content(folders, fake_networks, tmp_path) -> None:
    settings = QUICK.model_copy(update={"feature_cache": tmp_path / "cache"})
    first = evaluate(*folders, "adm", settings=settings)
    seen = fake_networks["inception"].images_seen
    again = evaluate(*folders, "adm", settings=settings)
    assert fake_networks["inception"].images_seen == 0  # a new network that saw nothing
    assert seen == 52
    assert again.first.metrics == first.first.metrics
    assert again.samples.images_per_second is None
    Image.fromarray(make_images(1, seed=9)[0]).save(folders[0] / "000003.png")  # other content, same names
    changed = evaluate(*folders, "adm", settings=settings)
    assert fake_networks["inception"].images_seen == 22  # the samples alone
    assert changed.frechet_distance != first.frechet_distance
    assert not list((tmp_path / "cache").glob(".*"))  # no half-made table is left


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("table.json", content) for content in (None, b"{", b"[]", b"{}")),
        *(("pool.npy", content) for content in (None, b"", b"\x93NUMPY\x01")),
        ("rows.npy", b"?"),
    ],
)
def test_damaged_features_in_the_cache_are_made_again(folders, fake_networks, tmp_path, name, content) -> None:
    settings = QUICK.model_copy(update={"feature_cache": tmp_path / "cache"})
    first = evaluate(*folders, "adm", settings=settings)
    for file in (tmp_path / "cache").glob(f"*/{name}"):
        file.unlink() if content is None else file.write_bytes(content)
    again = evaluate(*folders, "adm", settings=settings)
    assert fake_networks["inception"].images_seen == 22 + 30
    assert again.first.metrics == first.first.metrics
    evaluate(*folders, "adm", settings=settings)
    assert fake_networks["inception"].images_seen == 0


def test_a_cut_off_table_in_the_cache_is_made_again(folders, tmp_path) -> None:
    settings = QUICK.model_copy(update={"feature_cache": tmp_path / "cache"})
    first = evaluate(*folders, "adm", settings=settings)
    for file in (tmp_path / "cache").glob("*/pool.npy"):
        os.truncate(file, file.stat().st_size - 100)
    assert evaluate(*folders, "adm", settings=settings).first.metrics == first.first.metrics


def test_a_damaged_note_of_a_content_hash_is_written_again(folders, tmp_path) -> None:
    settings = QUICK.model_copy(update={"feature_cache": tmp_path / "cache"})
    first = evaluate(*folders, "adm", settings=settings)
    notes = {note: note.read_text() for note in (tmp_path / "cache" / "hashes").iterdir()}
    for note in notes:
        note.write_bytes(b"\x80")
    assert evaluate(*folders, "adm", settings=settings).samples.sha256 == first.samples.sha256
    assert {note: note.read_text() for note in notes} == notes


def test_a_content_hash_that_cannot_be_kept_is_a_warning(folders, tmp_path, caplog) -> None:
    settings = QUICK.model_copy(update={"feature_cache": tmp_path / "cache"})
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "hashes").touch()
    evaluate(*folders, "adm", settings=settings)
    assert caplog.text.count("is not kept: File exists") == 2


def test_others_may_read_the_features_in_the_cache_as_the_umask_has_it(folders, tmp_path) -> None:
    before = os.umask(0o022)
    try:
        evaluate(*folders, "adm", settings=QUICK.model_copy(update={"feature_cache": tmp_path / "cache"}))
    finally:
        os.umask(before)
    for path in (tmp_path / "cache").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


def test_damaged_features_of_another_person_are_a_sentence(folders, tmp_path, monkeypatch) -> None:
    settings = QUICK.model_copy(update={"feature_cache": tmp_path / "cache"})
    evaluate(*folders, "adm", settings=settings)
    for path in (tmp_path / "cache").glob("*/table.json"):
        path.write_text("{")

    def refuse(*_) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(UserError, match="cannot be stored: Permission denied"):
        evaluate(*folders, "adm", settings=settings)


def test_a_table_of_another_shape_in_the_cache_is_made_again(folders, fake_networks, tmp_path) -> None:
    settings = QUICK.model_copy(update={"feature_cache": tmp_path / "cache"})
    first = evaluate(*folders, "adm", settings=settings)
    for path in (tmp_path / "cache").glob("*/pool.npy"):
        np.save(path, np.load(path)[:-1])
    assert evaluate(*folders, "adm", settings=settings).first.metrics == first.first.metrics
    assert fake_networks["inception"].images_seen == 22 + 30


def test_features_in_the_cache_that_cannot_be_read_are_kept(folders, tmp_path) -> None:
    settings = QUICK.model_copy(update={"feature_cache": tmp_path / "cache"})
    evaluate(*folders, "adm", settings=settings)
    notes = sorted((tmp_path / "cache").glob("*/table.json"))
    for note in notes:
        note.unlink()
        note.mkdir()
    with pytest.raises(UserError, match=r"features in .* cannot be read: Is a directory"):
        evaluate(*folders, "adm", settings=settings)
    assert all(note.with_name("pool.npy").is_file() for note in notes)


@pytest.mark.parametrize("bad", [False, True])
def test_features_are_on_the_disk_before_their_table_is_called_done(folders, tmp_path, monkeypatch, bad) -> None:
    real, flushed, complete = os.fsync, set(), []

    def fsync(descriptor: int) -> None:
        flushed.add(os.fstat(descriptor).st_ino)
        real(descriptor)

    def write_json(path, value, real=features.write_json) -> None:
        complete.append({file.stat().st_ino for file in path.parent.glob("*.npy")} <= flushed)
        real(path, value)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(features, "write_json", write_json)
    if bad:
        (folders[0] / "000003.png").write_bytes(b"?")
    evaluate(*folders, "adm", settings=QUICK.model_copy(update={"feature_cache": tmp_path / "cache", "skip_bad": bad}))
    assert complete == [True, True]


@pytest.mark.parametrize(("place", "name"), [(np.lib.format, "open_memmap"), (os, "pwrite"), (features, "write_json")])
def test_a_full_disk_is_a_sentence_and_leaves_nothing(folders, tmp_path, monkeypatch, place, name) -> None:
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(place, name, full)
    settings = QUICK.model_copy(update={"feature_cache": tmp_path / "cache"})
    with pytest.raises(UserError, match="features cannot be stored: No space left on device") as caught:
        evaluate(*folders, "adm", settings=settings)
    assert caught.value.exit_code == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["hashes"]


def test_a_disk_with_too_little_room_is_a_sentence_and_leaves_nothing(folders, tmp_path, monkeypatch) -> None:
    (tmp_path / "cache").mkdir()
    free = shutil.disk_usage(tmp_path)._replace(free=1 << 20)  # enough for the hashes
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(UserError, match=f"space for the features under '{tmp_path}/cache': 1.1 MB needed"):
        evaluate(*folders, "adm", settings=QUICK.model_copy(update={"feature_cache": tmp_path / "cache"}))
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["hashes"]


def test_rows_are_written_whole_and_nothing_beside_them(folders, monkeypatch) -> None:
    """Also where the disk takes a part at a time. The next rows may be another machine's."""
    expected, written = evaluate(*folders, "adm", settings=QUICK), []
    real = os.pwrite

    def pwrite(descriptor, data, offset):
        written.append(min(len(data), 17))
        return real(descriptor, data[:17], offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    found = evaluate(*folders, "adm", settings=QUICK)
    for layer, values in expected.tables["inception"].layers.items():
        np.testing.assert_array_equal(found.tables["inception"].layers[layer], values)
    assert sum(written) == (22 + 30) * (12 + 5 + 6) * 4


def test_a_batch_for_which_the_memory_does_not_suffice_is_a_sentence(folders, monkeypatch) -> None:
    def full(*_, **__) -> None:
        raise MemoryError

    monkeypatch.setattr(np, "stack", full)
    with pytest.raises(UserError, match=r"on 4 images at a time does not fit into the memory") as caught:
        evaluate(*folders, "adm", settings=QUICK)
    assert "Lower --batch-size" in caught.value.next_step


@pytest.mark.parametrize(("batch_size", "seen"), [(4, 24 + 32), (100, 22 + 30)])
def test_batches_are_filled_up_for_a_compiled_network_alone(folders, fake_networks, monkeypatch, batch_size, seen):
    settings = QUICK.model_copy(update={"batch_size": batch_size})
    plain = evaluate(*folders, "adm", settings=settings)
    assert fake_networks["inception"].images_seen == 22 + 30
    monkeypatch.setattr(FakeInception, "compiled", FakeInception.forward)
    assert evaluate(*folders, "adm", settings=settings).first.metrics == plain.first.metrics
    assert fake_networks["inception"].images_seen == seen


def test_statistics_give_the_number_of_the_images(folders, tmp_path) -> None:
    direct = evaluate(*folders, "adm", settings=QUICK)
    make_statistics(folders[1], tmp_path / "ref.npz", "adm", settings=QUICK)
    through = evaluate(folders[0], tmp_path / "ref.npz", "adm", settings=QUICK)
    for key in ("fid", "sfid"):
        assert through.first.metrics[key].value == pytest.approx(direct.first.metrics[key].value, rel=1e-9)
    assert through.first.metrics["precision"].value is None
    assert "statistics" in through.first.metrics["precision"].note
    assert through.reference.count == 30


def test_statistics_that_cannot_be_written_are_a_sentence(folders, tmp_path, monkeypatch) -> None:
    def full(*_) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(reference, "write_atomic", full)
    with pytest.raises(UserError, match=r"out.npz' could not be written: No space left on device\.") as caught:
        make_statistics(folders[1], tmp_path / "out.npz", "adm", settings=QUICK)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("kind", ["images", "foreign", "text", "folder"])
def test_statistics_never_replace_what_is_no_statistics_file(folders, tmp_path, kind) -> None:
    out = tmp_path / "out.npz"
    if kind == "images":
        np.savez(out, arr_0=make_images(9))
    elif kind == "foreign":
        np.savez(out, mu=np.zeros(12), sigma=np.eye(12))
    elif kind == "text":
        out.write_text("notes")
    else:
        out.mkdir()
    before = out.read_bytes() if out.is_file() else None
    source = out if kind == "images" else folders[1]
    with pytest.raises(UserError, match=r"out\.npz' is there already"):
        make_statistics(source, out, "adm", settings=QUICK)
    assert before is None or out.read_bytes() == before
    make_statistics(folders[1], tmp_path / "ref.npz", "adm", settings=QUICK)
    make_statistics(folders[0], tmp_path / "ref.npz", "adm", settings=QUICK)  # our own are


def test_vgg16_given_with_statistics_alone_does_not_stop_the_rest(folders, tmp_path) -> None:
    make_statistics(folders[1], tmp_path / "ref.npz", "torch-fidelity", settings=QUICK)
    settings = QUICK.model_copy(update={"vgg16_weights": tmp_path / "vgg16.pth"})
    found = evaluate(folders[0], tmp_path / "ref.npz", "torch-fidelity", settings=settings)
    assert found.first.metrics["fid"].value is not None
    assert found.first.metrics["precision"].value is None
    with_images = evaluate(*folders, "torch-fidelity", settings=settings)
    assert "vgg16 features" in with_images.first.metrics["precision"].note


def test_an_adm_batch_gives_statistics_to_fid_and_images_to_the_rest(folders, tmp_path) -> None:
    make_statistics(folders[1], tmp_path / "ref.npz", "adm", settings=QUICK)
    batch = tmp_path / "batch.npz"
    with np.load(tmp_path / "ref.npz") as arrays:
        named = {name: arrays[name] for name in ("mu", "sigma", "mu_s", "sigma_s")}
    np.savez(batch, arr_0=make_images(9, seed=3), **named)
    found = evaluate(folders[0], batch, "adm", settings=QUICK)
    direct = evaluate(*folders, "adm", settings=QUICK)
    assert found.frechet_distance == pytest.approx(direct.frechet_distance, rel=1e-9)
    assert "9 reference images" in found.first.metrics["precision"].note
    assert found.reference.sha256 == hashlib.sha256(batch.read_bytes()).hexdigest()  # statistics included


def test_clean_fid_never_takes_statistics_of_adm(folders, tmp_path) -> None:
    make_statistics(folders[1], tmp_path / "ref.npz", "adm", settings=QUICK)
    with pytest.raises(UserError, match="not of 'inception-clean'"):
        evaluate(folders[0], tmp_path / "ref.npz", "clean-fid", settings=QUICK)


def test_sfid_without_spatial_statistics_says_so(folders, tmp_path) -> None:
    make_statistics(folders[1], tmp_path / "ref.npz", "adm", settings=QUICK)
    with np.load(tmp_path / "ref.npz") as arrays:
        np.savez(tmp_path / "plain.npz", mu=arrays["mu"], sigma=arrays["sigma"])
    found = evaluate(folders[0], tmp_path / "plain.npz", "adm", settings=QUICK)
    assert found.first.metrics["sfid"].value is None
    assert "mu_s" in found.first.metrics["sfid"].note
    assert found.first.metrics["fid"].value is not None


@pytest.mark.parametrize("layer", ["mu_s", "mu"])
def test_statistics_of_another_width_are_refused_before_any_work(folders, fake_networks, tmp_path, layer) -> None:
    make_statistics(folders[1], tmp_path / "ref.npz", "adm", settings=QUICK)
    with np.load(tmp_path / "ref.npz") as arrays:
        named = {name: arrays[name] for name in ("mu", "sigma", "mu_s", "sigma_s")}
    named |= {layer: np.zeros(3), layer.replace("mu", "sigma"): np.eye(3)}
    np.savez(tmp_path / "narrow.npz", **named)
    with pytest.raises(UserError, match=rf"\({layer}\) of 3 dimensions where the network gives"):
        evaluate(folders[0], tmp_path / "narrow.npz", "adm", settings=QUICK)
    assert fake_networks["inception"].images_seen == 0


def test_statistics_that_do_not_fit_the_second_protocol_are_refused_before_any_work(
    folders, fake_networks, tmp_path
) -> None:
    make_statistics(folders[1], tmp_path / "ref.npz", "adm", settings=QUICK)
    with pytest.raises(UserError, match="not of 'inception-clean'"):
        evaluate(folders[0], tmp_path / "ref.npz", "adm,clean-fid", settings=QUICK)
    assert fake_networks["inception"].images_seen == 0


def test_an_opened_reference_is_not_read_again(folders, tmp_path) -> None:
    np.savez(tmp_path / "batch.npz", arr_0=make_images(9, seed=3))
    opened = open_reference(tmp_path / "batch.npz")
    direct = evaluate(folders[0], tmp_path / "batch.npz", "adm", settings=QUICK)
    (tmp_path / "batch.npz").unlink()
    assert (
        evaluate(folders[0], opened, "adm", settings=QUICK).as_dict()["reference"]["sha256"] == direct.reference.sha256
    )


def test_adm_is_is_shuffled_where_files_are_sorted_by_class(folders, fake_networks) -> None:
    images = make_images(40)
    sorted_set = ArrayImages(images, "sorted", np.repeat([0, 1], 20))
    mixed_set = ArrayImages(images, "mixed", np.tile([0, 1], 20))
    notes = [
        evaluate(one, folders[1], "adm", settings=QUICK).first.metrics["is"].note for one in (sorted_set, mixed_set)
    ]
    assert "fixed shuffle" in notes[0]
    assert "file order" in notes[1]


def test_one_corrupt_image_is_named_and_refused(folders) -> None:
    (folders[0] / "000007.png").write_bytes(b"\x89PNG not really")
    with pytest.raises(UserError, match=r"000007\.png") as caught:
        evaluate(*folders, "adm", settings=QUICK)
    assert "--skip-bad" in caught.value.next_step


def test_corrupt_images_are_skipped_by_flag_and_counted(folders) -> None:
    without = np.delete(np.arange(22), [7, 21])
    expected = evaluate(ArrayImages(make_images(22)[without], "whole"), folders[1], "adm", settings=QUICK)
    for name in ("000007", "000021"):
        (folders[0] / f"{name}.png").write_bytes(b"\x89PNG not really")
    found = evaluate(*folders, "adm", settings=QUICK.model_copy(update={"skip_bad": True}))
    assert found.samples.count == 20
    assert [name[-11:-1] for name in found.samples.skipped] == ["000007.png", "000021.png"]
    assert found.first.metrics["fid"].name == "FID-20"
    assert found.frechet_distance == pytest.approx(expected.frechet_distance, rel=1e-12)
    assert found.tables["inception"].rows.tolist() == without.tolist()


def test_mixed_sizes_are_refused_unless_cropped(folders) -> None:
    Image.fromarray(make_images(1, size=48)[0]).save(folders[0] / "000005.png")
    with pytest.raises(UserError, match=r"000005\.png.*48 x 48 pixels where 32 x 32") as caught:
        evaluate(*folders, "adm", settings=QUICK)
    assert "--image-size" in caught.value.next_step
    cropped = evaluate(*folders, "adm", settings=QUICK.model_copy(update={"image_size": 32}))
    assert cropped.samples.count == 22
    assert evaluate(*folders, "clean-fid", settings=QUICK).samples.count == 22  # its resize takes any size


def test_a_reference_of_another_resolution_is_refused(folders, tmp_path) -> None:
    other = write_folder(tmp_path / "other", make_images(8, size=64))
    with pytest.raises(UserError, match=r"32 x 32 pixels and the reference .* 64 x 64"):
        evaluate(folders[0], other, "adm", settings=QUICK)
    make_statistics(other, tmp_path / "other.npz", "adm", settings=QUICK)
    with pytest.raises(UserError, match="64 x 64"):
        evaluate(folders[0], tmp_path / "other.npz", "adm", settings=QUICK)


@pytest.mark.parametrize("side", [0, 1])
def test_another_resolution_is_seen_behind_bad_images(folders, fake_networks, tmp_path, side: int) -> None:
    pair = [folders[0], write_folder(tmp_path / "other", make_images(8, size=64))]
    for index in range(6):
        (pair[side] / f"{index:06d}.png").write_bytes(b"no")
    with pytest.raises(UserError, match=r"32 x 32 pixels and the reference .* 64 x 64"):
        evaluate(*pair, "adm", settings=QUICK.model_copy(update={"skip_bad": True}))
    assert not fake_networks


def test_a_generator_that_does_not_say_its_resolution_is_refused_afterwards(folders) -> None:
    images = make_images(22, size=64)
    generated = GeneratedImages("a model", np.zeros(22, int), lambda indices: images[list(indices)], "seed 0")
    with pytest.raises(UserError, match=r"64 x 64 pixels and the reference .* 32 x 32"):
        evaluate(generated, folders[1], "adm", settings=QUICK)


def test_a_cropped_reference_of_another_resolution_is_refused(folders, tmp_path) -> None:
    """--image-size crops files; a batch in an array keeps its size, which then is another one."""
    batch = ArrayImages(make_images(22, size=64), "batch")
    with pytest.raises(UserError, match=r"64 x 64 pixels and the reference .* 32 x 32"):
        evaluate(batch, folders[1], "adm", settings=QUICK.model_copy(update={"image_size": 32}))


def test_a_generator_of_another_resolution_is_refused_before_it_draws(folders, fake_networks) -> None:
    def draw(indices):
        raise AssertionError("drawn")

    generated = GeneratedImages("a model", np.zeros(22, int), draw, "seed 0", manifest={"image_size": 64})
    with pytest.raises(UserError, match=r"64 x 64 pixels and the reference .* 32 x 32"):
        evaluate(generated, folders[1], "adm", settings=QUICK)
    assert not fake_networks


def test_oblong_images_against_oblong_and_cropped_ones(tmp_path, fake_networks) -> None:
    """Folders of 16 x 32 pixels as they are; and the same ones cut out of photographs of 32 x 32."""
    photographs = make_images(30, seed=1)
    samples = write_folder(tmp_path / "samples", make_images(22)[:, 8:24])
    cut = write_folder(tmp_path / "cut", photographs[:, 8:24])
    whole = write_folder(tmp_path / "whole", photographs)
    found = evaluate(samples, cut, "adm", settings=QUICK)
    assert (found.samples.image_size, found.reference.image_size) == ((16, 32), (16, 32))
    with pytest.raises(UserError, match=r"16 x 32 pixels \(height x width\) and the reference .* 32 x 32"):
        evaluate(samples, whole, "adm", settings=QUICK)
    cropped = evaluate(samples, whole, "adm", settings=QUICK.model_copy(update={"image_size": (16, 32)}))
    assert cropped.frechet_distance == found.frechet_distance


@pytest.mark.parametrize("side", [0, 1])
def test_one_image_is_no_distribution(folders, tmp_path, side: int) -> None:
    single = write_folder(tmp_path / "single", make_images(1))
    pair = [folders[0], folders[1]]
    pair[side] = single
    with pytest.raises(UserError, match="1 usable image"):
        evaluate(*pair, "adm", settings=QUICK)


def test_swapped_arguments_are_noticed(folders) -> None:
    (folders[0] / "manifest.json").write_text(json.dumps({"format": "xar-samples", "labels": [0] * 22}))
    with pytest.raises(UserError, match="given as the reference"):
        evaluate(folders[1], folders[0], "adm", settings=QUICK)


def test_fewer_images_than_neighbours_leave_a_note(folders, tmp_path) -> None:
    few = write_folder(tmp_path / "few", make_images(3))
    found = evaluate(few, folders[1], "adm", settings=QUICK)
    assert found.first.metrics["recall"].value is None
    assert "more than 3 images" in found.first.metrics["recall"].note


def test_generated_images_are_judged_without_files(folders) -> None:
    images = make_images(22)
    drawn: list[int] = []

    def draw(indices):
        drawn.extend(indices)
        return images[list(indices)]

    generated = GeneratedImages("a model", np.zeros(22, int), draw, "seed 0")
    found = evaluate(generated, folders[1], "adm", settings=QUICK)
    assert drawn == list(range(22))  # each once
    assert found.frechet_distance == pytest.approx(evaluate(*folders, "adm", settings=QUICK).frechet_distance)


def test_the_protocols_that_a_recipe_may_name_are_those_that_there_are() -> None:
    assert list(get_args(ProtocolName)) == list(PROTOCOLS)


def test_unknown_protocols_offer_the_nearest() -> None:
    with pytest.raises(UserError) as caught:
        pick_protocols("cleanfid")
    assert "'clean-fid'" in caught.value.next_step
    with pytest.raises(UserError):
        pick_protocols([])
    assert [one.name for one in pick_protocols(["adm,digits", "adm"])] == ["adm", "digits"]


def test_missing_weights_are_named_before_any_work(tmp_path, monkeypatch) -> None:
    import torch

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    samples = write_folder(tmp_path / "s", make_images(4))
    with pytest.raises(UserError, match="weights-inception"):
        evaluate(samples, samples, "digits,adm", settings=QUICK)


def test_result_is_plain_json(folders) -> None:
    found = evaluate(*folders, "adm,clean-fid", settings=QUICK.model_copy(update={"error_bars": "subsets"}))
    plain = json.loads(json.dumps(found.as_dict()))
    assert plain["protocols"]["adm"]["metrics"]["fid"]["error"] > 0
    assert plain["protocols"]["adm"]["resize"]
    assert len(plain["samples"]["sha256"]) == 64
