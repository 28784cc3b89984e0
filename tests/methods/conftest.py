import pytest

from wus_ext.methods import policy


@pytest.fixture(autouse=True, scope="module")
def stub_switch():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "set_skip", lambda model, on, **_: model.switched.append(on))
        patch.setattr(policy, "trains_nothing", lambda model: False)
        yield
