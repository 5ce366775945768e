from __future__ import annotations

import pytest
import torch

from visadapt.core import products
from visadapt.testing import tiny_backbone


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """More threads than one only fight for the cores that pytest's workers share."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def small_products():
    """Tiny networks are computed as large ones are, but in this process only; gives what others have."""
    with pytest.MonkeyPatch.context() as patch:
        given = products.SMALL
        patch.setattr(products, "SMALL", 1)
        yield given


@pytest.fixture(scope="session")
def vit_b_block():
    """A ViT-B of one block, with random weights; a test leaves it as it was."""
    return tiny_backbone(dict(type="TimmViT", name="vit_base_patch16_224", arch=dict(depth=1)))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter):
    """How many parity kits ran, and which ones nothing is there for yet."""
    reports = [r for r in terminalreporter.stats.get("passed", []) if "test_parity.py::" in r.nodeid]
    missing = [value for r in reports for key, value in r.user_properties if key == "parity_not_implemented"]
    if not missing:
        return
    ran = sum("::test_kit[" in r.nodeid for r in reports)
    count = len(missing[0].split())
    terminalreporter.write_line(f"parity: {ran} kits ran, {count} not yet implemented: {missing[0] or 'none'}")
