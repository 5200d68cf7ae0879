import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """Networks this small are faster on one thread, by far when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def _one_thread_for_module_fixtures():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
