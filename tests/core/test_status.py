"""`rlattn status`: what it says of a run that works, has ended, was killed, or is elsewhere; and traces."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from rlattn import trace
from rlattn.cli import main
from rlattn.status import DONE, STATUS, Status, StatusFile, alive, describe, read_status
from rlattn.timing import PhaseTimer
from rlattn.tracking import Tracker


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    return tmp_path


def test_a_run_that_works(run_dir, capsys):
    with Tracker(run_dir) as tracker:
        tracker.log(0, {"eval/accuracy": 0.25})
        tracker.log(
            6,
            {"timing_s/step": 3.0, "reward": 0.5, "perf/tokens_per_second/engine 0": 4812.4, "rollout/engines_lost": 1},
        )
    status = StatusFile(run_dir, 16)
    status.phase(7, "generate")
    folder = run_dir / "checkpoints" / "step-4"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    assert main(["status", str(run_dir)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("running: step 7 of 16, generate for 0.")
    assert f"driver {os.getpid()} on {socket.gethostname()}" in shown[0]
    assert shown[1] == "last step   6/16  reward 0.500"
    assert shown[2] == "sampled    engine 0 4,812 tok/s; 1 lost so far"
    assert shown[3] == "accuracy   25.0% at step 0"
    assert shown[4].startswith("checkpoint step-4, ")
    status.detail("312 of 512 completions")
    assert describe(run_dir)[0].endswith(": 312 of 512 completions")
    status.phase(7, "score")
    assert describe(run_dir)[0].endswith(")")  # which says nothing of the phase before


def test_a_killed_run_says_where_it_ended(run_dir):
    code = "import sys; from pathlib import Path; from rlattn import status; "
    code += "status.StatusFile(Path(sys.argv[1]), 9).phase(3, 'update')"
    subprocess.run([sys.executable, "-P", "-c", code, str(run_dir)], check=True, timeout=60)
    assert alive(read_status(run_dir)) is False
    assert describe(run_dir) == ["not running: ended at step 3 of 9, update; --resume goes on from the checkpoint"]


def test_runs_elsewhere_and_runs_that_are_done_or_have_not_begun(run_dir):
    assert describe(run_dir) == ["the run has not begun a step yet"]
    other = Status(3, 9, "score", time.time(), 1, "another-host")
    (run_dir / STATUS).write_text(json.dumps(vars(other)))
    assert "on another-host, which cannot be asked from here" in describe(run_dir)[0]
    StatusFile(run_dir, 9).phase(9, DONE)
    assert describe(run_dir) == ["done: all 9 steps"]


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert main(["status", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_a_trace_has_a_row_for_each_and_spans_in_microseconds(tmp_path):
    phases = []
    timer = PhaseTimer(phases.append)
    with timer("reward"):
        pass  # before the trace: not in it
    with trace.recording(tmp_path / "trace.json"), timer("generate"):
        start = time.perf_counter()
        time.sleep(0.05)
        trace.span("engine 0", "sampling", start)
    with timer("weights"):
        pass
    assert phases == ["reward", "generate", "weights"]
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    spans = {(names[event["tid"]], event["name"]): event for event in events if event["ph"] == "X"}
    assert spans.keys() == {("driver", "generate"), ("engine 0", "sampling")}
    inner, outer = spans["engine 0", "sampling"], spans["driver", "generate"]
    assert 5e4 <= inner["dur"] <= outer["dur"]
    assert outer["ts"] == 0 <= inner["ts"]


def test_nothing_is_written_where_no_trace_is_asked_for(tmp_path):
    with trace.recording(None):
        trace.span("engine 0", "sampling", 0.0)
    assert list(tmp_path.iterdir()) == []
