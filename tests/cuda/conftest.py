import pytest
import torch

import wus_ext


@pytest.fixture(autouse=True)
def _gpu():
    """Everything in this folder runs on a GPU, and only this folder needs one."""
    if wus_ext.build_info()["cuda"] is None:
        pytest.skip("wus_ext was built without CUDA")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
