"""Every setting that comes from outside is of its type and in its range, or named."""

import dataclasses
import json
import typing

import pytest

from wus_ext.training import ConfigError, TrainConfig
from wus_ext.training.compare import CompareConfig
from wus_ext.training.settings import check_type, check_types, differences, from_plain, reading

from . import tiny

HINTS = typing.get_type_hints(TrainConfig)
#: Values that JSON can hold and none of which is of the type.
WRONG = {
    bool: ["no", 0, 1, None, [], 1.0],
    int: ["3", 3.0, True, None, [3], 2**63, -(2**63) - 1, 10**400],
    float: ["0.5", True, None, [0.5], {}, 10**400],
    str: [3, True, None, ["digits"], {}],
    str | None: [3, True, ["x"], {}],
    int | None: ["3", 3.0, True, [3], 2**63],
    float | None: ["0.5", True, [0.5]],
    tuple[float, ...]: ["0.5", 0.5, None, ["0.5"], [True], {}],
    tuple[str, ...]: ["features", 3, None, [3], [None], {}],
}


@pytest.mark.parametrize("name", HINTS)
def test_every_setting_must_be_of_its_type(name):
    """New settings, too: a type that is not in the table fails here."""
    for value in WRONG[HINTS[name]]:
        with pytest.raises(ConfigError, match=f"^{name} must "):
            TrainConfig().replace(**{name: value}).validate()
        with pytest.raises(ConfigError, match=f"^{name} must "):
            TrainConfig.from_dict(TrainConfig().to_dict() | {name: value})


def test_plain_values_come_back_as_they_were():
    config = tiny.CONFIG.replace(skip_layers=("features", "0"), limit_train=30, lr=1)
    plain = json.loads(json.dumps(config.to_dict()))
    assert TrainConfig.from_dict(plain) == config
    assert plain.keys() == HINTS.keys()
    assert TrainConfig.from_dict({}) == TrainConfig()
    comparison = CompareConfig(base=config, models=("alexnet", "vgg11"), seeds=3, control=False)
    again = CompareConfig.from_dict(json.loads(json.dumps(comparison.to_dict())))
    assert again.to_dict() == comparison.to_dict()


@pytest.mark.parametrize("values", [[], "text", None, 3, [["lr", 0.1]]])
def test_settings_are_names_with_values(values):
    with pytest.raises(ConfigError, match="settings must be names with values, got"):
        TrainConfig.from_dict(values)


def test_from_plain_checks_what_does_not_depend_on_the_machine():
    elsewhere = TrainConfig(device="cuda:99").to_dict()
    with pytest.raises(ConfigError, match="is not present"):
        TrainConfig.from_dict(elsewhere).validate()
    for wrong, message in (
        ({"lr": -1.0}, "lr must be positive"),
        ({"method": "sgd"}, "method must be one of"),
        ({"watch": "validation"}, "needs a validation fraction"),
        ({"method": "wus+lr", "schedule": "constant"}, "needs the schedule"),
    ):
        with pytest.raises(ConfigError, match=message):
            TrainConfig.from_dict(elsewhere | wrong)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seeds": True}, "seeds must be an integer, got True"),
        ({"seeds": "3"}, "seeds must be an integer, got '3'"),
        ({"control": "no"}, "control must be true or false, got 'no'"),
        ({"models": "vgg11"}, "models must be a tuple of values, got 'vgg11'"),
        ({"methods": [1]}, r"methods must be a tuple of values, got \(1,\)"),
        ({"lr": "fast"}, "lr must be a number, got 'fast'"),
        ({"colour": 1}, "unknown setting: colour"),
        ({"base": {}}, "unknown setting: base"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_of_a_comparison_are_checked_alike(values, message):
    with pytest.raises(ConfigError, match=message):
        CompareConfig.from_dict(CompareConfig(base=tiny.CONFIG).to_dict() | values)
    if "colour" not in values and "base" not in values and "lr" not in values:
        with pytest.raises(ConfigError, match=message.replace(r"\(1,\)", r"\[1\]")):
            dataclasses.replace(CompareConfig(base=tiny.CONFIG), **values).validate()


@pytest.mark.parametrize("value", [1e308, 2.0**33, float("inf"), float("nan"), -1.0])
def test_a_budget_must_be_a_number_of_bytes(value):
    with pytest.raises(ConfigError, match=r"packed_budget must be in \[0, 2\*\*33\)"):
        TrainConfig(packed_budget=value).validate()
    assert TrainConfig(packed_budget=2.0**33 - 1).skip_settings()["memory_budget"] < 2**63


@dataclasses.dataclass
class Several:
    names: tuple[str, ...] = dataclasses.field(default=(), metadata={"metavar": "PATTERN"})
    size: int | None = None


def test_a_dataclass_is_read_from_plain_values():
    assert from_plain(Several, {"names": ["a"], "size": 3}) == Several(("a",), 3)
    check_types(Several(("a", "b")))
    with pytest.raises(ConfigError, match="names must be a tuple of patterns, got 'a'"):
        check_types(Several("a"))
    with pytest.raises(ConfigError, match="size must fit into 64 bits, got 9223372036854775808"):
        from_plain(Several, {"size": 2**63})
    check_type("size", 2**63 - 1, int | None)


def test_differences_are_named_but_for_those_that_do_not_matter():
    first, second = {"lr": 0.1, "seed": 0, "device": "cpu"}, {"lr": 0.2, "seed": 1, "device": "x"}
    assert differences(first, second, ("there", "here"), ignore={"device"}) == [
        "lr is 0.1 there, 0.2 here",
        "seed is 0 there, 1 here",
    ]
    assert differences(first, first, ("there", "here")) == []


def test_a_file_of_settings_that_cannot_be_read_is_named(tmp_path):
    missing, some = tmp_path / "nowhere.json", tmp_path / "some.json"
    some.write_text('{"a": 1}')
    with pytest.raises(ConfigError, match=r"nowhere\.json is not readable: "), reading(missing):
        pass
    message = r"some\.json is not readable: it lacks 'b'"
    with pytest.raises(ConfigError, match=message), reading(some) as values:
        values["b"]
