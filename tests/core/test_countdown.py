import json
import random
import re
import time
import warnings
from fractions import Fraction
from itertools import permutations, product

import pytest

from rlattn.config import ConfigError, TaskConfig, load_config
from rlattn.problem import Problem
from rlattn.tasks import TeachableTask, check_problems, load_task
from rlattn.tasks.countdown import Countdown, CountdownOptions
from rlattn.tasks.search import PATIENCE, combine

SMALL = {"number_high": 20, "target_low": 5, "target_high": 40, "train_size": 300, "test_size": 100}


def countdown(seed: int = 0, **options) -> Countdown:
    return Countdown(CountdownOptions(**{**SMALL, **options}), seed)


def problem(numbers: list[int], target: int) -> Problem:
    return Problem("p", "prompt", {"numbers": numbers, "target": target})


def verify(task: Countdown, problem: Problem, completion: str) -> dict[str, float]:
    verdict = task.verifier(problem.answer, completion)
    return {"accuracy": float(verdict.right), **verdict.parts}


def accuracy(answer: str, numbers: list[int], target: int) -> float:
    return verify(TASK, problem(numbers, target), f"hm </think> <answer>{answer}</answer>")["accuracy"]


TASK = countdown()


def solvable(numbers: tuple[Fraction, ...], target: int) -> bool:
    if len(numbers) == 1:
        return numbers[0] == target
    for i, j in permutations(range(len(numbers)), 2):
        a, b = numbers[i], numbers[j]
        rest = tuple(n for k, n in enumerate(numbers) if k not in (i, j))
        for value in (a + b, a - b, a * b, *([a / b] if b else [])):
            if solvable((*rest, value), target):
                return True
    return False


class TestInstances:
    def test_default_sizes_ranges_and_disjoint_splits(self):
        started = time.process_time()
        task = load_task(TaskConfig(), seed=0)
        assert time.process_time() - started < 20
        assert (len(task.train), len(task.test)) == (20_000, 512)
        keys = [(tuple(sorted(p.answer["numbers"])), p.answer["target"]) for p in task.train + task.test]
        assert len(set(keys)) == len(keys)
        assert all(min(numbers) >= 1 and max(numbers) <= 99 and 10 <= target <= 99 for numbers, target in keys)
        three = sum(len(numbers) == 3 for numbers, _ in keys) / len(keys)
        assert 0.4 < three < 0.6
        assert {len(numbers) for numbers, _ in keys} == {3, 4}

    def test_every_instance_is_solvable(self):
        for p in TASK.test:
            assert solvable(tuple(map(Fraction, p.answer["numbers"])), p.answer["target"]), p.answer

    def test_seeded(self):
        assert countdown(3).train == countdown(3).train
        assert countdown(3).test != countdown(4).test

    def test_prompts(self):
        (numbers, target), p = TASK.test[0].answer.values(), TASK.test[0]
        assert f"Using the numbers {numbers}, create an equation that equals {target}." in p.prompt
        assert p.prompt.endswith("<think>")
        compact = countdown(prompt="compact").test[0]
        assert compact.answer == p.answer
        assert compact.prompt == f"Use {' '.join(map(str, numbers))} to make {target}.\n<think>"

    def test_too_narrow_ranges(self):
        with pytest.raises(ConfigError, match=r"gave only \d+ distinct instances of the 20512 wanted; widen"):
            load_task(TaskConfig(options={"number_high": 3, "target_high": 12}), seed=0)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"train_sise": 3}, "unknown key `task.options.train_sise`; did you mean `task.options.train_size`?"),
            ({"train_size": 0}, "`task.options.train_size` = 0: input should be greater than 0"),
            ({"number_low": 9, "number_high": 3}, "number_low=9 must be at most number_high=3"),
            ({"train_file": "a.jsonl"}, "train_file and test_file go together"),
        ],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(ConfigError) as error:
            load_task(TaskConfig(options=options), seed=0)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


class TestFiles:
    GOOD = '{"nums": [3, 5, 7], "target": 22}\n'

    def load(self, folder, train: str | None, test: str = GOOD):
        (folder / "test.jsonl").write_text(test)
        if train is not None:
            (folder / "train.jsonl").write_text(train)
        files = {"train_file": str(folder / "train.jsonl"), "test_file": str(folder / "test.jsonl")}
        return load_task(TaskConfig(options=files), seed=0)

    def test_rows(self, tmp_path):
        task = self.load(tmp_path, self.GOOD + "\n" + json.dumps({"nums": [1, 2], "target": 3, "more": "ignored"}))
        assert [p.answer for p in task.train] == [
            {"numbers": [3, 5, 7], "target": 22},
            {"numbers": [1, 2], "target": 3},
        ]
        assert verify(task, task.train[1], "<answer>1+2</answer>") == {"accuracy": 1.0}

    @pytest.mark.parametrize(
        ("train", "message"),
        [
            (None, "cannot read .*train.jsonl: No such file"),
            ("", "train.jsonl holds no problems; give one"),
            ("\n \n", "train.jsonl holds no problems; give one"),
            (GOOD + '{"nums": [3, 5]}\n', "train.jsonl:2 has no answer: `target` is missing"),
            (GOOD + '{"nums": [3, 5], "target": null}\n', "train.jsonl:2 has no answer"),
            (GOOD + "\n" + '{"nums": [3, 5], "target": "8"}\n', "train.jsonl:3: `target` is '8'"),
            ('{"nums": [], "target": 8}', "train.jsonl:1: `nums` is \\[\\]"),
            ('{"nums": [3, 2.5], "target": 8}', "train.jsonl:1: `nums` is \\[3, 2.5\\]"),
            ('{"nums": [3', "train.jsonl:1 is not JSON"),
            ("[" * 100_000, "train.jsonl:1 is not JSON"),
            ("[3]", "train.jsonl:1 must be an object"),
        ],
    )
    def test_errors_are_one_line(self, tmp_path, train, message):
        with pytest.raises(ConfigError, match=message) as error:
            self.load(tmp_path, train)
        assert "\n" not in str(error.value)

    def test_check_problems(self):
        with pytest.raises(ConfigError, match="train: no problems"):
            check_problems([], "train")
        with pytest.raises(ConfigError, match=r"train: row 1 \(id 'b'\) has no answer"):
            check_problems([problem([1], 1), Problem("b", "prompt", None)], "train")


class TestVerify:
    @pytest.mark.parametrize("answer", ["(3 + 5) * 4", " 4*(5+3) ", "4 * ( 3\n+ 5 )", "((4))*((5)+3)"])
    def test_right(self, answer):
        assert accuracy(answer, [3, 4, 5], 32) == 1

    @pytest.mark.parametrize(
        "answer",
        [
            "(3 + 5) * 4 + 0",  # a number that was not given
            "3 * 4 + 5 * 4",  # one used twice
            "4 * 8",  # not the given ones
            "(3 + 4) * 5",  # another value
            "(3 + 5) * 4 = 32",
            "32",
            "",
            "+(3 + 5) * 4",
            "-(0 - 3 - 5) * 4",
            "(3 + 5) * 4.0",
            "(3 + 5) * 0x4",
            "(3 + 5) * 4 # right",
            "(3 + 5) × 4",
            "(3 + 5) * ４",
            "(3, 5) * 4",
            "(3 + 5)(4)",
            "(3 + 5) * 4)",
            "__import__('os')",
        ],
    )
    def test_wrong(self, answer):
        assert accuracy(answer, [3, 4, 5], 32) == 0

    def test_exact_arithmetic(self):
        assert accuracy("8 / (3 - 8 / 3)", [3, 3, 8, 8], 24) == 1
        assert accuracy("1 / 3 * 3", [1, 3, 3], 1) == 1
        # doubles call this one equal
        assert 10**17 / 3 * 3 + 1 == 10**17
        assert accuracy("100000000000000000 / 3 * 3 + 1", [10**17, 3, 3, 1], 10**17) == 0

    def test_no_powers_or_floors(self):
        assert accuracy("2 ** 3", [2, 3], 8) == 0
        assert accuracy("9 // 2", [9, 2], 4) == 0
        assert accuracy("5 / 0", [5, 0], 0) == 0

    def test_last_answer_counts(self):
        p = problem([1, 2], 3)
        assert verify(TASK, p, "<answer>1</answer> <answer>1 + 2</answer>")["accuracy"] == 1
        assert verify(TASK, p, "<answer>1 + 2</answer> <answer>2 - 1</answer>")["accuracy"] == 0
        assert verify(TASK, p, "<answer>1 + 2</answer> <answer>2 - 1")["accuracy"] == 1
        for text in ("1 + 2", "<answer>1 + 2", "1 + 2</answer>", "</answer>1 + 2<answer>", ""):
            assert verify(TASK, p, text)["accuracy"] == 0

    def test_format_reward(self):
        task, p = countdown(format_reward=0.1), problem([1, 2], 3)
        assert verify(task, p, " hm </think>\n<answer>1 + 2</answer>\n") == {"accuracy": 1.0, "format": 0.1}
        assert verify(task, p, " hm </think> <answer>2 - 1</answer>") == {"accuracy": 0.0, "format": 0.1}
        for text in (
            "<answer>1 + 2</answer>",
            "</think> so <answer>1 + 2</answer>",
            "</think> <answer>1 + 2</answer> ok",
        ):
            assert verify(task, p, text) == {"accuracy": 1.0, "format": 0.0}
        assert verify(task, p, "</think> <answer>three</answer>") == {"accuracy": 0.0, "format": 0.0}

    @pytest.mark.parametrize(
        "text",
        [
            "<answer>" * 100_000,
            "</answer>" * 100_000,
            "<answer></answer>" * 50_000,
            *(f"<answer>{body}</answer>" for body in (
                "(" * 1_000_000, "(" * 250, "(" * 120 + "1" + ")" * 120, "-" * 255 + "1", "9**" * 80 + "9",
                "9" * 250, "9" * 120 + "*" + "9" * 120, "1/" * 127 + "1", "1+" * 127 + "1", "(1" * 85,
                "((1+" * 60, "1(" * 120, "1 " * 120,
                "\0", "\ud800", "1\r\n+\t2", "(1)" * 80, "/".join("9" * 50 for _ in range(5)),
            )),
        ],
    )  # fmt: skip
    @pytest.mark.usefixtures("quiet_gc")
    def test_hostile_text_is_cheap(self, text):
        started = time.thread_time()
        assert verify(TASK, problem([1, 2, 3], 3), text)["accuracy"] == 0
        assert time.thread_time() - started < 0.05


def oracle(completion: str, numbers: list[int], target: int) -> bool:
    """An independent judge: Python's own evaluation over Fractions, after a check of every character."""
    text = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", completion, re.S)[-1]
    if not re.fullmatch(r"[0-9+\-*/()\s]+", text) or "**" in text or "//" in text:
        return False
    value = eval(re.sub(r"[0-9]+", r"Fraction(\g<0>)", text).replace("\n", " "), {"Fraction": Fraction})
    return sorted(map(int, re.findall("[0-9]+", text))) == sorted(numbers) and value == target


@pytest.mark.usefixtures("quiet_gc")
@pytest.mark.usefixtures("quiet_gc")
def test_fuzz_100_000_answers():
    rng = random.Random(0)
    alphabet = [*"0123456789+-*/()  ", "**", "//", ".", "e", "_", "j", "=", ",", "<answer>", "</answer>", "é", "\n"]
    right = [(p, s) for p in TASK.train for s in [TASK.worked_solution(p, rng)] if verify(TASK, p, s)["accuracy"]]
    assert len(right) > 50
    slowest, scored_right, mutated_right = 0.0, 0, 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for index in range(100_000):
            p, completion = rng.choice(right)
            numbers, target = p.answer["numbers"], p.answer["target"]
            if index % 4 == 0:  # noise
                body = "".join(rng.choices(alphabet, k=rng.randint(0, 40)))
                completion = f"<answer>{body}</answer>"
            elif index % 4 == 1:  # well-formed expressions over the given numbers, in any order
                chain = [str(n) for n in rng.sample(numbers, len(numbers))]
                body = "".join(a + b for a, b in zip(chain, rng.choices("+-*/", k=len(chain)), strict=True))[:-1]
                completion = f"<answer>{body}</answer>"
            else:  # a right answer with one to three edits
                start = completion.index("<answer>")
                letters = list(completion[start:])
                for _ in range(rng.randint(1, 3)):
                    at = rng.randrange(len(letters))
                    letters[at : at + rng.randint(0, 2)] = rng.choices(alphabet, k=rng.randint(0, 2))
                completion = completion[:start] + "".join(letters)
            started = time.thread_time()
            reward = verify(TASK, p, completion)
            slowest = max(slowest, time.thread_time() - started)
            assert set(reward) == {"accuracy"}
            if reward["accuracy"]:
                scored_right += 1
                mutated_right += index % 4 > 1
                assert oracle(completion, numbers, target), (p.answer, completion)
    assert slowest < 0.05
    assert scored_right > 2_000
    assert mutated_right > 1_000


def test_every_chain_is_judged_as_the_oracle_does():
    numbers = [2, 3, 4, 6]
    for target, order, operators in product((6, 24), permutations(numbers), product("+-*/", repeat=3)):
        a, b, c, d = order
        x, y, z = operators
        for text in (f"{a}{x}{b}{y}{c}{z}{d}", f"(({a}{x}{b}){y}{c}){z}{d}"):
            assert accuracy(text, numbers, target) == oracle(f"<answer>{text}</answer>", numbers, target)


class TestWorkedSolutions:
    def test_mixed_quality(self):
        """On the task that the warm start is shipped for."""
        task, rng = load_task(load_config("quickstart").task, 0), random.Random(0)
        assert isinstance(task, TeachableTask)
        solutions = [(p, task.worked_solution(p, rng)) for p in task.train[:5000]]
        right = [verify(task, p, s)["accuracy"] for p, s in solutions]
        assert 0.25 < sum(right) / len(right) < 0.6
        gave_up = [s.count("~") for (_, s), good in zip(solutions, right, strict=True) if not good]
        assert set(gave_up) >= {most for most, _ in PATIENCE}  # some stop early, some only after a long search
        assert max(s.count("~") for _, s in solutions) <= max(most for most, _ in PATIENCE)

    def test_every_step_is_true_and_the_answer_is_the_last_attempt(self):
        rng = random.Random(0)
        for p in TASK.train:
            solution = TASK.worked_solution(p, rng)
            thoughts, answer = solution.split(" </think> <answer> ")
            attempts = re.findall(r" (.*?) ~(\d+) (.) (\d+) =(\d+) (yes|no)(?= |$)", thoughts)
            for chain, target, op, left_over, result, verdict in attempts:
                value, *steps = chain.split()
                used = [int(value), int(left_over)]
                for operator, number, reached in zip(steps[::3], steps[1::3], steps[2::3], strict=True):
                    assert combine(int(value), operator, int(number)) == int(reached[1:])
                    used.append(int(number))
                    value = reached[1:]
                assert sorted(used) == sorted(p.answer["numbers"])
                assert combine(int(value), op, int(left_over)) == int(result)
                assert int(target) == p.answer["target"]
                assert (result == target) == (verdict == "yes")
            verdicts = [attempt[-1] for attempt in attempts]
            assert verdicts[:-1] == ["no"] * (len(attempts) - 1)
            assert verify(TASK, p, solution)["accuracy"] == (verdicts[-1] == "yes")
            chain, _, op, left_over, _, _ = attempts[-1]
            said = re.sub(r" =\d+", "", chain) + op + left_over
            assert re.sub(r"[() ]", "", answer.removesuffix(" </answer>")) == said.replace(" ", "")

    def test_seeded(self):
        p = TASK.train[0]
        assert TASK.worked_solution(p, random.Random(5)) == TASK.worked_solution(p, random.Random(5))
