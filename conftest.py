import pytest
import torch

import wus_ext


@pytest.fixture(autouse=True)
def _documented_examples(doctest_namespace):
    doctest_namespace.update(torch=torch, wus_ext=wus_ext)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
