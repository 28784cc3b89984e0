import signal
from importlib.util import find_spec

import pytest
import torch
import torch._dynamo  # imported while there is a process group, it would keep that for good

import wus_ext

# A process started in the background may ignore interrupts, and so would all that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Documented examples of the extra [integrations], where its libraries are not installed.
collect_ignore = [
    f"wus_ext/integrations/{name}.py"
    for name in ("lightning", "transformers")
    if find_spec(name) is None
]


@pytest.fixture(autouse=True)
def _documented_examples(doctest_namespace):
    doctest_namespace.update(torch=torch, wus_ext=wus_ext)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
