"""Several ranks open one source: the same weights everywhere, or a sentence."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.thread_ranks import thread_ranks
from tests.weight_files import save_safetensors
from xar_cli.checkpoint import latest_checkpoint, write_checkpoint
from xar_cli.errors import UserError
from xar_cli.run_dir import RunDir
from xar_cli.weights import open_weights
from xar_cli.weights.ranks import open_on_all


def opened_by_two(source, open_here):
    """What both ranks get."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda ranks: open_on_all(str(source), open_here(ranks), ranks), thread_ranks(2)))


@pytest.mark.parametrize("late", [0, 1])
def test_a_run_that_writes_a_checkpoint_meanwhile_gives_all_ranks_the_same(run_folder, late):
    run = RunDir(run_folder)
    tensors = dict(latest_checkpoint(run).tensors("ema-0.9999"))
    groups = {name: tensors for name in ("model", "ema-0.9999", "ema-0.9")}

    def opening(ranks):
        def open_here(source):
            if ranks.rank == late:
                write_checkpoint(run, 2000, groups, {})
            return open_weights(source)

        return open_here

    (one, one_hash), (other, other_hash) = opened_by_two(run_folder, opening)
    assert (one.step, other.step) == (1234, 1234)
    assert one_hash == other_hash == one.sha256
    assert open_weights(run_folder).step == 2000


def test_a_checkpoint_that_goes_away_before_it_is_opened_is_a_sentence(run_folder):
    def opening(ranks):
        def open_here(source):
            if ranks.is_main:
                shutil.rmtree(Path(source).parent)
            ranks.barrier()
            return open_weights(source)

        return open_here

    with pytest.raises(UserError, match="was removed while it was opened") as caught:
        opened_by_two(run_folder, opening)
    assert caught.value.exit_code == 1


def test_another_file_on_another_machine_is_refused_by_both(published, golden_config, tmp_path):
    paths = [save_safetensors(published, tmp_path / "a.safetensors")]
    name = next(iter(published))
    changed = {**published, name: published[name] + 1}
    paths.append(save_safetensors(changed, tmp_path / "b.safetensors"))

    def on_its_machine(ranks):
        object.__setattr__(ranks, "local_rank", 0)
        return lambda source: open_weights(paths[ranks.rank], golden_config)

    with pytest.raises(UserError, match="is not the same file on all ranks"):
        opened_by_two("weights.safetensors", on_its_machine)


def test_a_file_that_goes_away_is_a_sentence(bare_file, golden_config):
    def opening(ranks):
        def open_here(source):
            found = open_weights(source, golden_config)
            ranks.barrier()
            if ranks.is_main:
                bare_file.unlink()
            return found

        return open_here

    with pytest.raises(UserError, match=r"cannot be read: No such file") as caught:
        opened_by_two(bare_file, opening)
    assert caught.value.exit_code == 1
