import importlib
import os
import signal
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest

from rlattn import rewards
from rlattn.problem import Problem, Verdict
from rlattn.tasks.countdown import judge as countdown
from rlattn.verifiers import pool as module
from rlattn.verifiers.pool import VerifierPool, judge_all
from tests.make import make_rollouts

# Worker processes import the verifier by name, which they cannot from a test file: this one lies on sys.path.
HOSTILE = """
import ctypes, os, signal, sys, time
from rlattn.problem import Verdict

def judge(answer, completion):
    match completion.split()[:2]:
        case ["sleep", seconds]: time.sleep(float(seconds))
        case ["spin"]: 9**9**9
        case ["unstoppable"]:
            signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
            9**9**9
        case ["hog"]: return [bytes(2**24) for _ in range(10_000)]
        case ["exit", code]: os._exit(int(code))
        case ["segfault"]: ctypes.string_at(0)
        case ["kill"]: os.kill(os.getpid(), signal.SIGKILL)
        case ["raise"]: raise LookupError("no\\nluck")
        case ["leave"]: sys.exit("bye")
        case ["recurse"]: return judge(answer, completion)
        case ["bool"]: return True
        case ["unpicklable"]: return Verdict(True, None, None, "", "", {"part": lambda: 0})
        case ["parts"]: return Verdict(True, None, None, "", "", {"format": 0.5})
        case ["print"]: print("noise", flush=True)
    modules = ",".join(sorted({"torch", "transformers", "pydantic", "datasets"} & set(sys.modules)))
    return Verdict(completion == answer, completion, str(os.getpid()), answer, modules)
"""

GUILTY = {
    "sleep 60": "verifier ran over 2 s",
    "spin": "verifier ran over 2 s",
    "unstoppable": "verifier ran over 2 s",
    "hog": "verifier ran out of 512 MiB",
    "exit 0": "verifier died: exit status 0",
    "exit 3": "verifier died: exit status 3",
    "segfault": "verifier died: Segmentation fault",
    "kill": "verifier died: Killed",
    "raise": "verifier raised LookupError: no luck",
    "leave": "verifier raised SystemExit: bye",
    "recurse": "verifier raised RecursionError: maximum recursion depth exceeded",
    "bool": "verifier raised TypeError: returned bool, not Verdict",
    "unpicklable": "verifier raised ",
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verifier")
    (folder / "hostile.py").write_text(HOSTILE)
    sys.path.insert(0, str(folder))
    import hostile

    yield hostile.judge
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def pool():
    with VerifierPool(2, timeout_s=2, memory_mib=512) as pool:
        yield pool


def pids(pool):
    return [process.popen.pid for process in pool._processes]


def ended(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until(condition, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_same_verdicts_in_the_same_order_as_direct_calls(pool):
    verifier = partial(countdown, format_reward=0.1)
    pairs = [
        ({"numbers": [3, 5, n], "target": 15 + n}, f"{'x' * (n % 7)}</think> <answer>3 * 5 + {n - n % 2}</answer>")
        for n in range(1, 500)
    ]
    seen = []
    verdicts = pool.judge(verifier, pairs, lambda: seen.append(1))
    assert verdicts == [verifier(*pair) for pair in pairs]
    assert {verdict.right for verdict in verdicts} == {True, False}
    assert len(seen) == len(pairs)
    assert pool.judge(verifier, []) == []


def test_only_the_guilty_are_lost(pool, hostile):
    texts = [text for guilty in GUILTY for text in (f"good {guilty}", guilty, f"fine {guilty}")]
    verdicts = pool.judge(hostile, [(text, text) for text in texts] * 2)
    assert len(verdicts) == 2 * len(texts)
    for text, verdict in zip(texts * 2, verdicts, strict=True):
        if text in GUILTY:
            assert verdict.reason.startswith(GUILTY[text])
            assert verdict == Verdict(False, None, None, text, verdict.reason)
        else:
            assert verdict.right
            assert verdict.extracted == text


def test_every_completion_is_judged_once(pool, hostile, tmp_path):
    """Those that come after one that ends its process are handed on, not judged again."""
    log = tmp_path / "log"
    pairs = [(str(log), f"{n} {'die' if n % 5 == 0 else ''}") for n in range(100)]
    (tmp_path / "logging_verifier.py").write_text(
        "import os\nfrom rlattn.problem import Verdict\n"
        "def judge(answer, completion):\n"
        "    with open(answer, 'a') as file: file.write(completion.split()[0] + '\\n')\n"
        "    if 'die' in completion: os._exit(1)\n"
        "    return Verdict(True, None, None, '', '')\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        from logging_verifier import judge

        with VerifierPool(2) as fresh:
            verdicts = fresh.judge(judge, pairs)
    assert [verdict.right for verdict in verdicts] == [n % 5 != 0 for n in range(100)]
    assert sorted(map(int, log.read_text().split())) == list(range(100))


def test_worst_case_time(hostile):
    """n that hang: (n / workers + 1) * (time-out + restart), however they are batched and whatever they block."""
    with VerifierPool(3, timeout_s=0.5) as pool:
        start = time.monotonic()
        verdicts = pool.judge(hostile, [("", "unstoppable")] * 9)
        elapsed = time.monotonic() - start
    assert {verdict.reason for verdict in verdicts} == {"verifier ran over 0.5 s"}
    assert 1.5 <= elapsed < (9 / 3 + 1) * (0.5 + 1.5)


def test_slow_completions_inside_the_bound_are_judged(hostile):
    """The bound is for one completion, not for the batch that it comes in: four of these take longer than it."""
    with VerifierPool(1, timeout_s=1.5) as pool:
        assert all(verdict.right for verdict in pool.judge(hostile, [("sleep 0.4", "sleep 0.4")] * 8))


def test_long_completions_arrive_whole(pool, hostile):
    texts = [f"{n}" * 10_000_000 + "\0\ud800\u202e" for n in range(3)] + ["short"] * 20
    assert [verdict.extracted for verdict in pool.judge(hostile, [("", text) for text in texts])] == texts


def test_a_completion_beyond_the_memory_bound_is_the_only_one_lost(hostile):
    with VerifierPool(1, memory_mib=64) as pool:
        verdicts = pool.judge(hostile, [("", "a"), ("", "b" * 100_000_000), ("", "c")])
    assert [verdict.extracted for verdict in verdicts] == ["a", None, "c"]
    assert verdicts[1].reason == "verifier ran out of 64 MiB"


def test_processes_are_kept_light_and_quiet(hostile, capfd):
    with VerifierPool(2) as pool:
        for _ in range(2):
            verdicts = pool.judge(hostile, [("", "print")] * 50)
            assert {verdict.normalised for verdict in verdicts} <= set(map(str, pids(pool)))
            assert {verdict.reason for verdict in verdicts} == {""}  # none of the heavy modules
            assert len(pids(pool)) == 2
    assert capfd.readouterr().out == ""


def test_a_process_ended_from_outside_is_replaced(pool, hostile):
    assert pool.judge(hostile, [("a", "a")] * 50)[0].right
    for pid in pids(pool):
        os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: all(ended(pid) for pid in pids(pool)))
    assert all(verdict.right for verdict in pool.judge(hostile, [("a", "a")] * 50))


def test_close_ends_the_processes_and_the_pool_can_be_used_again(hostile):
    pool = VerifierPool(1)
    assert pids(pool) == []  # they start at first use
    pool.judge(hostile, [("a", "a")])
    before = pids(pool)
    pool.close()
    pool.close()
    assert all(ended(pid) for pid in before)
    assert pool.judge(hostile, [("a", "a")])[0].right
    pool.close()


def defined_in_a_test(answer, completion):
    """Not importable in a worker: --import-mode=importlib puts test files under names that only pytest knows."""


@pytest.mark.parametrize("verifier", [lambda answer, completion: None, defined_in_a_test], ids=["lambda", "test"])
def test_a_verifier_that_cannot_be_imported_is_an_error_not_a_verdict(verifier, pool, hostile, monkeypatch):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not os.path.isdir(os.path.join(p, "tests"))])
    with pytest.raises(ValueError, match="no worker process can import the verifier"):
        pool.judge(verifier, [("", "")])
    assert pool.judge(hostile, [("a", "a")])[0].right


@pytest.mark.parametrize("bad", [{"workers": 0}, {"timeout_s": 0}, {"timeout_s": float("inf")}, {"memory_mib": -1}])
def test_bad_settings(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"{name}=.* must be positive and finite"):
        VerifierPool(**bad)


@pytest.mark.parametrize(
    ("name", "statement", "message"),
    [
        ("slow_import", "time.sleep(60)", "not ready after 1 s"),
        ("dying_import", "os._exit(4)", "ended before it judged anything: exit status 4"),
    ],
)
def test_a_process_that_does_not_get_ready_is_an_error(name, statement, message, tmp_path, monkeypatch):
    text = f"import os, sys, time\nif 'pytest' not in sys.modules: {statement}\ndef judge(answer, completion): pass\n"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(module, "START_S", 1.0)
    with VerifierPool(1) as pool, pytest.raises(RuntimeError, match=message):
        pool.judge(importlib.import_module(name).judge, [("", "")])


DRIVER = """
import sys, hostile
from rlattn.verifiers.pool import VerifierPool
print("main", flush=True)
pool = VerifierPool(2, timeout_s=100)
for verdict in pool.judge(hostile.judge, [("", "")] * 40):
    last = verdict
print(*[process.popen.pid for process in pool._processes], flush=True)
pool.judge(hostile.judge, [("", text) for text in sys.argv[1:]])
"""


@pytest.fixture
def driver(hostile, tmp_path):
    """A script without an `if __name__` guard, and its worker processes once they run."""
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    path = os.pathsep.join([os.path.dirname(sys.modules["hostile"].__file__), *sys.path])
    started = []

    def start(*texts):
        process = subprocess.Popen(
            [sys.executable, "-P", str(script), *texts],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
            # As under a terminal: where the tests run in the background, a shell has had them ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "main\n"
        return process, list(map(int, process.stdout.readline().split()))

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=10)


@pytest.mark.parametrize("work", [[], ["spin", "sleep 60"]], ids=["idle", "busy"])
def test_processes_do_not_outlive_a_killed_driver(driver, work):
    process, children = driver(*work)
    assert children
    if work:
        time.sleep(0.3)
        assert not any(ended(pid) for pid in children)
        process.kill()
    assert wait_until(lambda: all(ended(pid) for pid in children), seconds=5)


def test_ctrl_c_ends_driver_and_processes_at_once(driver):
    process, children = driver("unstoppable")  # and one that is idle
    time.sleep(0.3)
    start = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does
    out, err = process.communicate(timeout=10)
    assert time.monotonic() - start < 8  # the second completion would go on for hours
    assert process.returncode == -signal.SIGINT
    assert err.count("Traceback") == 1
    assert out == ""  # the script ran once: no process ran it again
    assert all(ended(pid) for pid in children)


def test_bounded_tasks_are_judged_here(pool, hostile):
    here = SimpleNamespace(bounded=True, verifier=hostile)
    assert judge_all(here, [("a", "a")], pool)[0].normalised == str(os.getpid())
    elsewhere = SimpleNamespace(bounded=False, verifier=hostile)
    assert judge_all(elsewhere, [("a", "a")], pool)[0].normalised in map(str, pids(pool))


def test_rewards_of_completions_whose_verifier_was_ended_are_zero(pool, hostile):
    problems = [Problem(str(row), "", answer) for row, answer in enumerate(("a", "exit 1", "parts"))]
    rollouts = make_rollouts([1] * 3, [2] * 3).replace(problems=problems, texts=["a", "exit 1", "parts"])
    scored = rewards.judge(rollouts, SimpleNamespace(bounded=False, verifier=hostile), pool)
    assert scored.reward_parts.keys() == {"accuracy", "format"}
    assert scored.reward_parts["accuracy"].tolist() == [1, 0, 1]
    assert scored.reward_parts["format"].tolist() == [0, 0, 0.5]
    assert scored.rewards.tolist() == [1, 0, 1.5]
