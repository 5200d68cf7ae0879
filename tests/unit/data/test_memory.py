"""The copy in memory: read like the file, shared, cleaned up."""

import multiprocessing
import os
from collections import namedtuple

import numpy as np
import pytest
import torch

from tests.caches import N, make_cache, make_moments
from xar_cli.data import memory
from xar_cli.data.latents import LatentReader
from xar_cli.errors import UserError

EXPECTED = make_moments().astype(np.float16)


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """A folder of its own in the place of /dev/shm."""
    (tmp_path / "shm").mkdir()
    monkeypatch.setattr(memory, "SHARED_MEMORY", tmp_path / "shm")
    return tmp_path / "shm"


@pytest.fixture(params=[1, 3], ids=["one file", "three shards"])
def cache(request, tmp_path):
    return make_cache(tmp_path / "latents.h5", num_shards=request.param)


def test_the_copy_is_as_the_file(cache, shared):
    reader = LatentReader(cache, in_memory=True)
    mirrored = np.arange(N) % 2 == 1
    assert np.array_equal(reader.read(np.arange(N), mirrored)[0], EXPECTED[mirrored.astype(int), np.arange(N)])


def test_readers_share_one_copy_and_the_last_removes_it(cache, shared):
    first, second = LatentReader(cache, in_memory=True), LatentReader(cache, in_memory=True)
    assert len(list(shared.iterdir())) == 1
    first.close()
    assert len(list(shared.iterdir())) == 1
    assert np.array_equal(second.read(np.arange(N))[0], EXPECTED[0])
    del second
    assert list(shared.iterdir()) == []


def test_an_unfinished_copy_is_made_again(cache, shared):
    reader = LatentReader(cache, in_memory=True)
    (left,) = shared.iterdir()
    name, half = left.name, left.read_bytes()[:3000]
    reader.close()
    (shared / name).write_bytes(half)
    assert np.array_equal(LatentReader(cache, in_memory=True).read(np.arange(N))[0], EXPECTED[0])


def test_writes_that_come_in_pieces_make_a_whole_copy(cache, shared, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, place: pwrite(descriptor, data[:1000], place))
    assert np.array_equal(LatentReader(cache, in_memory=True).read(np.arange(N))[0], EXPECTED[0])


def _read_in_child(reader, queue):
    queue.put(reader.read(np.arange(N))[0])


def test_forked_children_read_it_and_leave_it(cache, shared):
    reader = LatentReader(cache, in_memory=True)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_read_in_child, args=(reader, queue))
    child.start()
    assert np.array_equal(queue.get(timeout=60), EXPECTED[0])
    child.join()
    assert np.array_equal(LatentReader(cache, in_memory=True).read(np.arange(N))[0], EXPECTED[0])
    assert len(list(shared.iterdir())) == 1


class _Samples(torch.utils.data.Dataset):
    def __init__(self, reader):
        self.reader = reader

    def __len__(self):
        return self.reader.num_samples

    def __getitem__(self, index):
        return self.reader.read(np.array([index]))[0][0]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_workers_read_through_their_own_handles(tmp_path, method):
    with LatentReader(make_cache(tmp_path / "latents.h5", num_shards=2)) as reader:
        loader = torch.utils.data.DataLoader(
            _Samples(reader), batch_size=8, num_workers=1, multiprocessing_context=method
        )
        assert np.array_equal(torch.cat(list(loader)).numpy(), EXPECTED[0])


def test_too_little_memory_is_said(cache, shared, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda _: usage(0, 0, 1000))
    with pytest.raises(UserError, match=r"needed, 1\.0 KB free"):
        LatentReader(cache, in_memory=True)
    assert list(shared.iterdir()) == []


def test_a_system_without_shared_memory_is_told(cache, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "SHARED_MEMORY", tmp_path / "nothing")
    with pytest.raises(UserError, match="no /dev/shm"):
        LatentReader(cache, in_memory=True)


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no /dev/shm here")
def test_real_shared_memory_works(tmp_path):
    reader = LatentReader(make_cache(tmp_path / "latents.h5"), in_memory=True)
    assert np.array_equal(reader.read(np.arange(N))[0], EXPECTED[0])
