"""Quick tests first: whatever is marked slow runs last. And torch's threads are left as a test found them."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture(autouse=True)
def threads():
    """A test that computes on one thread, for bit-identical sums, does not make the next one do so."""
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)
