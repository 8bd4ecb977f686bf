"""Reward functions by import path: what is accepted, what is refused and how."""

import pytest

from rlattn.config import ConfigError, RewardFunctionConfig, RunConfig
from rlattn.reward_functions import RewardError, call, load_function

COLUMNS = {"prompts": ["p", "q"], "completions": ["ab", "abcd"], "answer": ["1", "2"]}


def test_a_function_of_a_file_and_of_a_module(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def length(completions, scale=1, **_):\n    return [scale * len(c) for c in completions]\n")
    function = load_function(RewardFunctionConfig(function=f"{file}:length"))
    assert call(function, "length", COLUMNS, {"scale": 2}) == [4.0, 8.0]
    assert load_function(RewardFunctionConfig(function="math:sqrt"))(4) == 2


def test_async_functions_are_awaited_and_none_is_kept():
    async def later(completions, **_):
        return [None, len(completions)]

    assert call(later, "later", COLUMNS, {}) == [None, 2.0]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0], "'f' returned 1 values for 2 completions"),
        ([1.0, 2.0, 3.0], "'f' returned 3 values for 2 completions"),
        (0.5, "'f' returned a float, not a list of 2 values"),
        ("ab", "'f' returned a str"),
    ],
)
def test_another_number_of_values_is_an_error(answer, message):
    with pytest.raises(RewardError, match=message):
        call(lambda **_: answer, "f", COLUMNS, {})


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("no.such.module:f", "'no.such.module:f' cannot be imported: ModuleNotFoundError"),
        ("math:nothing", "AttributeError"),
        ("math:pi", "is a float, not a function"),
        ("nowhere.py:f", "FileNotFoundError"),
    ],
)
def test_what_cannot_be_imported_is_named(function, message):
    with pytest.raises(ConfigError, match=message):
        load_function(RewardFunctionConfig(function=function))


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ({"functions": [{"function": "length"}]}, "package.module:name"),
        ({"functions": [{"function": "a:f"}, {"function": "b:f"}]}, "two functions are logged as 'f'"),
        ({"verifier_weight": 0}, "leaves no reward"),
    ],
)
def test_settings_are_checked_at_the_door(rewards, message):
    with pytest.raises(ValueError, match=message):
        RunConfig.model_validate({"rewards": rewards})
