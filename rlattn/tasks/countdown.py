"""Countdown: combine all given numbers with + - * / to hit a target (the TinyZero protocol).

Prompt, ranges and data columns (`nums`, `target`) follow github.com/Jiayi-Pan/TinyZero; 3 and 4 numbers. Generated
instances are solvable by construction: the target is the value of a random expression over the numbers.
"""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from rlattn.config import ConfigError, Section
from rlattn.problem import Problem, Verdict
from rlattn.tasks import Task
from rlattn.tasks.arithmetic import evaluate
from rlattn.tasks.search import combine, search_trace
from rlattn.verifiers.extract import stripped

OPEN, CLOSE = "<answer>", "</answer>"
Whole = Annotated[int, Field(ge=1, le=10_000)]

PROMPTS = {
    "tinyzero": (
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The "
        "assistant first thinks about the reasoning process in the mind and then provides the user with the answer.\n"
        "User: Using the numbers {numbers}, create an equation that equals {target}. You can use basic arithmetic "
        "operations (+, -, *, /) and each number can only be used once. Show your work in <think> </think> tags. And "
        "return the final answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>.\n"
        "Assistant: Let me solve this step by step.\n<think>"
    ),
    "compact": "Use {words} to make {target}.\n<think>",
}


class CountdownOptions(Section):
    """Options of the task `countdown`."""

    number_counts: Annotated[list[Annotated[int, Field(ge=2, le=6)]], Field(min_length=1)] = Field([3, 4])
    """How many numbers an instance may give; each as likely, as far as distinct instances last."""
    number_low: Whole = 1
    """Smallest given number."""
    number_high: Whole = 99
    """Largest given number."""
    target_low: Whole = 10
    """Smallest target."""
    target_high: Whole = 99
    """Largest target."""
    train_size: Annotated[int, Field(gt=0, le=1_000_000)] = 20_000
    """Generated training instances."""
    test_size: Annotated[int, Field(gt=0, le=100_000)] = 512
    """Generated test instances."""
    prompt: Literal["tinyzero", "compact"] = "tinyzero"
    """TinyZero's think/answer prompt, or one of a dozen words for tiny models."""
    format_reward: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Reward for `... </think> <answer> ... </answer>` around an arithmetic expression, right or wrong."""
    train_file: Path | None = None
    """JSON lines with `nums` and `target` to train on, in place of generated instances."""
    test_file: Path | None = None
    """JSON lines with `nums` and `target` to test on; goes with `train_file`."""

    @model_validator(mode="after")
    def _usable(self) -> CountdownOptions:
        for name in ("number", "target"):
            low, high = getattr(self, f"{name}_low"), getattr(self, f"{name}_high")
            if low > high:
                raise ValueError(f"{name}_low={low} must be at most {name}_high={high}")
        if (self.train_file is None) != (self.test_file is None):
            raise ValueError("train_file and test_file go together: give both or neither")
        return self


class Countdown(Task):
    """The task. `Problem.answer` is `{"numbers": [int, ...], "target": int}`; verifier: `judge`.

    Raises:
        ConfigError: the ranges hold too few distinct instances, or a data file is missing, empty or malformed.
    """

    Options: ClassVar[type[CountdownOptions]] = CountdownOptions
    bounded = True

    def __init__(self, options: CountdownOptions, seed: int) -> None:
        self.options = options
        self.verifier = partial(judge, format_reward=options.format_reward)
        if options.train_file and options.test_file:
            train, test = read_instances(options.train_file), read_instances(options.test_file)
        else:
            instances = generate(options, seed)
            test, train = instances[: options.test_size], instances[options.test_size :]
        self.train = [self._problem("train", row, *instance) for row, instance in enumerate(train)]
        self.test = [self._problem("countdown", row, *instance) for row, instance in enumerate(test)]

    def worked_solution(self, problem: Problem, rng: random.Random) -> str:
        """A completion for the warm start: a search of mixed quality, see `rlattn.tasks.search.search_trace`."""
        largest = max(self.options.target_high, self.options.number_high)
        return search_trace(problem.answer["numbers"], problem.answer["target"], rng, largest)

    def answer_span(self, completion: str) -> tuple[int, int] | None:
        """What stands in the last `<answer>...</answer>`."""
        span = _last_answer(completion)
        return span and stripped(completion, *span)

    def _problem(self, split: str, row: int, numbers: list[int], target: int) -> Problem:
        prompt = PROMPTS[self.options.prompt].format(numbers=numbers, words=" ".join(map(str, numbers)), target=target)
        return Problem(f"{split}-{row}", prompt, {"numbers": numbers, "target": target})


def judge(answer: dict[str, Any], completion: str, *, format_reward: float = 0.0) -> Verdict:
    """Judge a completion by its last `<answer>...</answer>`, under a millisecond for any text of a rollout.

    Right is an expression whose exact value is `answer["target"]` and that uses each of `answer["numbers"]` exactly
    once. Where `format_reward` is set, part `format` is that or 0.
    """
    start, end = _last_answer(completion) or (0, 0)
    before, text, after = completion[: max(0, start - len(OPEN))], completion[start:end], completion[end + len(CLOSE) :]
    numbers, target = sorted(answer["numbers"]), answer["target"]
    right = well_formed = False
    normalised = None
    try:
        value, used = evaluate(text)
    except ValueError as error:
        reason = str(error) if text else "no <answer>...</answer>"
    else:
        normalised = f"{value} from {sorted(used)}"
        right = value == target and sorted(used) == numbers
        well_formed = before.rstrip().endswith("</think>") and not after.strip() and before.count("</think>") == 1
        reason = f"value {value}, target {target}; uses {sorted(used)}, given {numbers}"
    parts = {"format": format_reward * well_formed} if format_reward else {}
    return Verdict(right, text.strip() or None, normalised, f"{target} from {numbers}", reason, parts)


def generate(options: CountdownOptions, seed: int) -> list[tuple[list[int], int]]:
    """`test_size + train_size` solvable (numbers, target), shuffled, no two alike in sorted numbers and target.

    Raises:
        ConfigError: the ranges do not give that many.
    """
    rng = random.Random(f"countdown {seed}")
    wanted = options.train_size + options.test_size
    found: dict[tuple[tuple[int, ...], int], list[int]] = {}
    counts = list(options.number_counts)
    while len(found) < wanted:
        if not counts:
            raise ConfigError(
                f"task.options: {options.number_counts} numbers in {options.number_low}..{options.number_high} with "
                f"targets in {options.target_low}..{options.target_high} gave only {len(found)} distinct instances of "
                f"the {wanted} wanted; widen the ranges, or lower train_size and test_size"
            )
        count = rng.choice(counts)
        if not _add_instance(found, count, options, rng):
            counts = [other for other in counts if other != count]  # its instances are used up
    instances = [(numbers, target) for (_, target), numbers in found.items()]
    rng.shuffle(instances)  # common instances are found first; the splits must not differ in that
    return instances


def _add_instance(
    found: dict[tuple[tuple[int, ...], int], list[int]], count: int, options: CountdownOptions, rng: random.Random
) -> bool:
    for _ in range(3000):
        numbers = [rng.randint(options.number_low, options.number_high) for _ in range(count)]
        target = _random_value(numbers, rng)
        if target is None or not options.target_low <= target <= options.target_high:
            continue
        key = (tuple(sorted(numbers)), target)
        if key not in found:
            found[key] = numbers
            return True
    return False


def read_instances(path: Path) -> list[tuple[list[int], int]]:
    """(nums, target) of every row of a JSON-lines file; blank lines are skipped.

    Raises:
        ConfigError: no such file, no rows, or a row that is not `{"nums": [whole numbers], "target": whole number}`.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"task.options: cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    instances = [_instance(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not instances:
        raise ConfigError(f'{path} holds no problems; give one {{"nums": [3, 5, 7], "target": 22}} a line')
    return instances


def _instance(line: str, where: str) -> tuple[list[int], int]:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{where} must be an object with `nums` and `target`, not {type(row).__name__}")
    numbers, target = row.get("nums"), row.get("target")
    if target is None:
        raise ConfigError(f"{where} has no answer: `target` is missing; every row needs a whole number there")
    if type(target) is not int:
        raise ConfigError(f"{where}: `target` is {target!r}; it must be a whole number")
    if not isinstance(numbers, list) or not numbers or any(type(n) is not int or n < 0 for n in numbers):
        raise ConfigError(f"{where}: `nums` is {numbers!r}; it must be a list of whole numbers, none below 0")
    return numbers, target


def _random_value(numbers: list[int], rng: random.Random) -> int | None:
    # Any two of the pool are joined until one value is left, so every shape of expression can come up.
    pool = list(numbers)
    while len(pool) > 1:
        rng.shuffle(pool)
        value = combine(pool.pop(), rng.choice("+-*/"), pool.pop())
        if value is None:
            return None
        pool.append(value)
    return pool[0]


def _last_answer(completion: str) -> tuple[int, int] | None:
    # str.rfind, not a regular expression: linear in time on any text.
    end = completion.rfind(CLOSE)
    start = completion.rfind(OPEN, 0, max(end, 0))
    return None if start < 0 else (start + len(OPEN), end)
