import json
import time
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from rlattn.cli import main
from rlattn.config import ConfigError, read_tree
from rlattn.console import Console
from rlattn.locking import locked
from rlattn.study.command import look
from rlattn.study.config import LaunchConfig, StudyConfig, grid, load_study
from rlattn.study.report import as_json, notes, write
from rlattn.study.runner import Ended, execute
from rlattn.study.summary import band, compare, ema_of_peak, summarise
from rlattn.tracking import Tracker

STUDY = {
    "base": "quickstart",
    "overrides": ["trainer.steps=4"],
    "arms": {"plain": ["credit.name=uniform"], "anchor": ["credit.name=global_anchor"]},
    "baseline": "plain",
    "seeds": [0, 1, 2],
    "resamples": 500,
}


def study_file(folder, **changes):
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY | {"output_dir": str(folder / "out")} | changes, sort_keys=False))
    return path


def load(folder, **changes):
    study = load_study(study_file(folder, **changes))
    return study, grid(study)


def log(run, accuracies, until=None):
    """What a run of so many evaluations has written, one a step from step 0 on."""
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "config.yaml").write_text(yaml.safe_dump(run.config.model_dump(mode="json")))
    with Tracker(run.folder) as tracker:
        for step, accuracy in enumerate(accuracies[:until]):
            tracker.log(step, {"eval/accuracy": accuracy} | ({"reward": accuracy / 2} if step else {}))


def test_the_shipped_study_resolves_and_compares_every_strategy_seed_by_seed():
    study = load_study("quickstart")
    runs = grid(study)
    assert [run.arm for run in runs[:6]] == list(study.arms)  # all arms of a seed before the next seed
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert {run.config.credit.name for run in runs} == set(study.arms)
    assert len({run.folder for run in runs}) == len(runs) == 18
    plain = runs[0].config.model_dump() | {"credit": None, "seed": None, "output_dir": None}
    assert all(run.config.model_dump() | {"credit": None, "seed": None, "output_dir": None} == plain for run in runs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seedz": [1]}, "unknown key `seedz`; did you mean `seeds`?"),
        ({"launch": {"mod": "jobs"}}, "unknown key `launch.mod`; did you mean `launch.mode`?"),
        ({"baseline": "plane"}, "`baseline` = 'plane' is not an arm; arms: plain, anchor"),
        ({"seeds": [0, 1, 0]}, "names a seed twice"),
        ({"seeds": []}, "`seeds` = []: list should have at least 1 item"),
        ({"arms": {"a/b": []}}, "arm 'a/b' names a folder"),
        ({"ema": 0}, "`ema` = 0: input should be greater than 0"),
        ({"overrides": ["seed=3"]}, "overrides: 'seed=3' is set by the study's `seeds`"),
        ({"overrides": ["trainer.eval_steps=0"]}, "trainer.eval_steps=0 never logs `metric` = 'eval/accuracy'"),
        ({"arms": {"plain": [], "odd": ["credit.topq=1"]}}, "arm odd: unknown key `credit.topq`; did you mean"),
        ({"base": "quickstrt"}, "no config file at 'quickstrt'"),
        ({"launch": {"mode": "jobs"}}, "launch.mode=jobs needs `overrides: [ray.address=auto]`"),
    ],
)
def test_everything_is_checked_before_anything_starts(tmp_path, changes, message):
    with pytest.raises(ConfigError) as error:
        load(tmp_path, **changes)
    assert message in str(error.value)


def test_every_field_is_documented():
    for section in (StudyConfig, LaunchConfig):
        assert all(field.description for field in section.model_fields.values())


def test_ema_of_the_running_peak():
    x = [0.2, 0.6, 0.1, 0.7]
    # by hand, a = 0.5: 0.2; (0.6 + 0.2)/2 = 0.4; the peak so far is the EMA itself: 0.4; (0.7 + 0.4)/2 = 0.55
    np.testing.assert_allclose(ema_of_peak(x, 0.5), [0.2, 0.4, 0.4, 0.55])
    np.testing.assert_allclose(ema_of_peak(x, 1.0), np.maximum.accumulate(x))
    rising = ema_of_peak(np.random.default_rng(0).normal(size=50), 0.3)
    assert (np.diff(rising) >= 0).all()
    # a constant's step response: after n steps of 1 from 0 it is 1 - (1 - a)^n
    np.testing.assert_allclose(ema_of_peak([0, 1, 1, 1], 0.3), 1 - 0.7 ** np.arange(4))


def test_differences_are_paired_by_seed():
    """Seeds that differ among themselves far more than the arms do: pairing takes that spread out."""
    baseline = {0: 0.10, 1: 0.50, 2: 0.90, 7: 0.0}
    arm = {2: 0.93, 0: 0.12, 1: 0.51, 9: 1.0}  # in another order, and with a seed that the baseline lacks
    found = compare(baseline, arm, 1000)
    d = np.array([0.02, 0.01, 0.03])
    assert found.paired.problems == 3
    assert found.paired.difference.value == pytest.approx(0.02)
    # with three seeds the bootstrap interval reaches from the smallest difference to the largest
    assert (found.paired.difference.low, found.paired.difference.high) == pytest.approx((0.01, 0.03))
    low, high = stats.t.interval(0.95, 2, loc=0.02, scale=d.std(ddof=1) / np.sqrt(3))
    assert found.t_half == pytest.approx((high - low) / 2)
    assert found.paired.p_value == pytest.approx(0.25)  # all three of one sign: 2 of 2^3 flips
    assert compare({0: 1.0}, {1: 1.0}, 1000) is None
    assert compare({0: 0.5}, {0: 0.6}, 1000).t_half == 0  # one seed: no spread known


def test_bands_are_of_the_mean_over_seeds_where_all_have_a_value():
    found = band([{0: 0.0, 2: 1.0, 4: 5.0}, {0: 2.0, 2: 3.0}], 500)
    assert (found.steps, found.seeds) == ([0, 2], 2)
    assert [value.value for value in found.values] == [1.0, 2.0]
    assert [(value.low, value.high) for value in found.values] == [(0.0, 2.0), (1.0, 3.0)]
    # smoothing is of each seed and before the mean: the peak of the mean would be another curve
    smooth = band([{0: 1.0, 1: 0.0}, {0: 0.0, 1: 1.0}], 500, smooth=1.0)
    assert [value.value for value in smooth.values] == [0.5, 1.0]


def test_a_study_is_summed_up_by_arm_and_seed(tmp_path):
    study, runs = load(tmp_path)
    for run in runs:
        final = 0.4 + 0.1 * run.seed + (0.05 if run.arm == "anchor" else 0)
        log(run, [0.2, 0.3, 0.2, 0.3, final])
    summary = summarise(study, look(study, runs))
    assert summary.missing == []
    plain, anchor = summary.arms
    assert plain.scores == pytest.approx({0: 0.4, 1: 0.5, 2: 0.6})
    assert plain.difference is None
    assert anchor.score.value == pytest.approx(0.55)
    assert anchor.difference.paired.difference.value == pytest.approx(0.05)
    assert anchor.raw["reward"].steps == [1, 2, 3, 4]
    assert [value.value for value in anchor.raw["eval/accuracy"].values][:2] == pytest.approx([0.2, 0.3])
    paths = {path.name: path for path in write(summary, study.output_dir)}
    assert json.loads(paths["table.json"].read_text()) == json.loads(json.dumps(as_json(summary)))
    text = paths["report.md"].read_text()
    assert "| anchor | 3/3 | 55.0 [45.0, 65.0] | +5.0" in text
    assert "75% of studies" in text
    assert "MISSING" not in text
    assert paths["curves.png"].read_bytes().startswith(b"\x89PNG")
    svg = paths["curves.svg"].read_text()
    for arm, metric, kind in product(study.arms, study.metrics, ("raw", "smooth")):
        assert f'id="{arm} {metric} {kind} band"' in svg
    assert "</svg>" in svg


def test_a_half_finished_study_says_what_is_missing_and_scores_only_what_is_finished(tmp_path, capsys):
    study, runs = load(tmp_path)
    by_name = {(run.arm, run.seed): run for run in runs}
    log(by_name["plain", 0], [0.2, 0.3, 0.3, 0.3, 0.4])
    log(by_name["anchor", 0], [0.2, 0.3, 0.3, 0.3, 0.5])
    log(by_name["plain", 1], [0.2, 0.9, 0.9], until=3)
    summary = summarise(study, look(study, runs))
    assert {(item.arm, item.seed, item.step, item.total) for item in summary.missing} == {
        ("plain", 1, 2, 4),
        ("plain", 2, None, 4),
        ("anchor", 1, None, 4),
        ("anchor", 2, None, 4),
    }
    assert summary.arms[0].scores == {0: 0.4}
    assert summary.arms[0].raw["eval/accuracy"].values[1].value == 0.3  # the unfinished seed does not bend the curve
    assert main(["study", str(tmp_path / "study.yaml"), "--report"]) == 0
    out = capsys.readouterr().out
    assert "MISSING: 4 of 6 runs are not finished." in out
    assert "plain: seed 1 at step 2 of 4, seed 2 not started" in out
    assert "+10.0" in out
    assert notes(summary)[-1] == "- anchor: seed 1 not started, seed 2 not started"


def test_before_any_run_is_finished_curves_end_where_the_slowest_started_run_is(tmp_path):
    study, runs = load(tmp_path)
    log(runs[0], [0.2, 0.3, 0.4], until=3)
    log(runs[2], [0.4, 0.5], until=2)
    plain, anchor = summarise(study, look(study, runs)).arms
    assert (plain.score, plain.finished) == (None, False)
    assert plain.raw["eval/accuracy"].steps == [0, 1]
    assert [value.value for value in plain.raw["eval/accuracy"].values] == pytest.approx([0.3, 0.4])
    assert anchor.raw["eval/accuracy"].steps == []


def test_a_folder_with_another_config_is_refused_by_name(tmp_path, capsys):
    _, runs = load(tmp_path)
    log(runs[0], [0.2] * 5)
    path = study_file(tmp_path, overrides=["trainer.steps=4", "credit.top_q=0.2"])
    assert main(["study", str(path), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert f"{runs[0].folder} holds a run of another config: credit.top_q was 0.4, now 0.2" in error
    # what shapes no result may change: where it runs, how long it may wait, what it keeps
    free = ["trainer.steps=4", "ray.num_cpus=4", "trainer.save_steps=1", "rollout.generate_timeout_s=9000"]
    assert main(["study", str(study_file(tmp_path, overrides=free)), "--dry-run"]) == 0
    assert "finished" in capsys.readouterr().out


def test_a_metric_that_was_never_logged_is_named_with_the_nearest(tmp_path):
    study, runs = load(tmp_path, metric="eval/acuracy")
    log(runs[0], [0.2] * 5)
    with pytest.raises(ConfigError, match=r"never logged 'eval/acuracy'; did you mean 'eval/accuracy'\?"):
        look(study, runs)


def test_dry_run_starts_nothing(tmp_path, capsys):
    assert main(["study", str(study_file(tmp_path)), "--dry-run", "seeds=[0,5]"]) == 0
    out = capsys.readouterr().out
    assert "4 runs, 16 steps" in out
    assert "credit.name=global_anchor" in out
    assert not (tmp_path / "out").exists()


class Writes:
    """A launcher whose runs log a step a poll; `broken` ones end at once and `silent` ones never log."""

    def __init__(self, at_once, broken=(), silent=()):
        self.at_once, self.broken, self.silent = at_once, broken, silent
        self.steps, self.order, self.most, self.stopped = {}, [], 0, []

    def start(self, run):
        self.steps[run.name] = 0
        self.order.append(run.name)
        self.most = max(self.most, len(self.steps))

    def poll(self, run):
        if run.name in self.broken or run.name in self.stopped:
            del self.steps[run.name]
            return Ended("exit code 1", "a log", ["Traceback", "out of memory"])
        if run.name not in self.silent:
            log(run, [0.1], until=1) if not self.steps[run.name] else None
            with Tracker(run.folder) as tracker:
                self.steps[run.name] += 1
                tracker.log(self.steps[run.name], {"reward": 0.5, "eval/accuracy": 0.5})
        if self.steps[run.name] < run.config.trainer.steps:
            return None
        del self.steps[run.name]
        return Ended("exit code 0", "a log", [])

    def stop(self, run):
        self.stopped.append(run.name)

    def leave(self):
        return ""


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_run_that_fails_or_stalls_does_not_stop_the_others(tmp_path, monkeypatch, capsys, at_once):
    monkeypatch.setattr("rlattn.study.runner.POLL_S", 0.02)
    study, runs = load(tmp_path)
    launcher = Writes(at_once, broken=["anchor, seed 0"], silent=["plain, seed 1"])
    with Console() as console:
        failed = execute(runs, 0, launcher, 0.5, console)
    assert failed.keys() == {"anchor, seed 0", "plain, seed 1"}
    assert "launch.stall_timeout_s = 0.5 s" in failed["plain, seed 1"].reason
    assert launcher.order == [run.name for run in runs]
    assert launcher.most == at_once
    assert launcher.stopped == ["plain, seed 1"]
    out = capsys.readouterr().out
    assert "[2/6] anchor, seed 0: FAILED, exit code 1; the end of a log:\n    Traceback\n    out of memory" in out
    assert "[6/6] anchor, seed 2: finished" in out
    finished = [run.name for run, found in look(study, runs) if found.finished]
    assert len(finished) == 4


OTHER = "another `rlattn study`"


def test_one_study_at_a_time_in_a_folder(tmp_path, monkeypatch):
    with locked(tmp_path, OTHER):
        later = time.monotonic
        monkeypatch.setattr("rlattn.locking.time.monotonic", lambda: later() * 1e6)  # 10 s pass at once
        with (
            pytest.raises(ConfigError, match="another `rlattn study` works in"),
            locked(tmp_path, OTHER),
        ):
            pass
    with locked(tmp_path, OTHER):
        pass


def test_a_shipped_study_is_found_by_name_and_others_are_listed():
    assert read_tree("quickstart", shelf="studies")["baseline"] == "uniform"
    with pytest.raises(ConfigError, match=r"no config file at 'quick'.*\(countdown, quickstart\)"):
        load_study("quick")


def test_the_example_of_the_documentation_resolves():
    text = (Path(__file__).parents[2] / "docs" / "study.md").read_text()
    example, jobs = (yaml.safe_load(block.split("```")[0]) for block in text.split("```yaml")[1:])
    study = StudyConfig.model_validate(example)
    assert len(grid(study)) == 15
    both = StudyConfig.model_validate(example | {**jobs, "overrides": example["overrides"] + jobs["overrides"]})
    assert grid(both)[0].config.ray.address == "auto"
