import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread(leaves_the_process_as_it_was):
    """Tiny products: handing them to other threads costs more than they do."""
    torch.set_num_threads(1)
