"""Any data set as a task: sources, templates, verifiers, and rows that lack something."""

import json

import pytest

from rlattn.config import ConfigError, TaskConfig
from rlattn.tasks import load_task


def rows():
    """A generator source."""
    yield {"problem": "1 + 1 =", "answer": "2", "hint": "count"}
    yield {"problem": "2 + 2 =", "answer": "4", "hint": "count on"}


def task(**options):
    return load_task(TaskConfig(name="dataset", options=options), 0)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return str(path)


def test_files_templates_and_columns(file):
    made = task(train=file, test=file, prompt="Q: {problem} ({hint})", limit=1)
    assert [problem.prompt for problem in made.train] == ["Q: 1 + 1 = (count)", "Q: 2 + 2 = (count on)"]
    assert len(made.test) == 1
    problem = made.train[1]
    assert problem.columns["hint"] == "count on"
    assert problem.chat
    assert made.verifier(problem.answer, "so \\boxed{4}").right
    assert not made.verifier(problem.answer, "so \\boxed{5}").right


def test_a_generator_and_no_verifier(monkeypatch, tmp_path):
    (tmp_path / "rows_for_a_task.py").write_text("def rows():\n    yield {'text': 'hello', 'id': 7}\n")
    monkeypatch.syspath_prepend(tmp_path)
    source = "rows_for_a_task:rows"
    made = task(train=source, test=source, prompt="{text}", verifier="none", chat=False)
    assert [(p.id, p.prompt, p.answer, p.chat) for p in made.train] == [("7", "hello", "", False)]
    assert not made.verifier("", "anything").right


def test_a_verifier_by_import_path(file):
    made = task(train=file, test=file, verifier="rlattn.verifiers.math:judge")
    assert made.verifier("2", "\\boxed{2}").right


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "{question}"}, "train row 1: `prompt` = '{question}' needs 'question'|test row 1: `prompt`"),
        ({"answer": "gold"}, "`answer` = '{gold}' needs 'gold'"),
        ({"verifier": "nothing"}, "accepted: math, none or package.module:function"),
        ({"train": "no.such:rows"}, "cannot generate rows by 'no.such:rows'"),
        ({"train": "missing.jsonl"}, "missing.jsonl: no such file"),
    ],
)
def test_what_cannot_be_read_is_named(file, options, message):
    with pytest.raises(ConfigError, match=message):
        task(**({"train": file, "test": file} | options))


def test_nested_columns_by_template(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"prompt": [{"role": "user", "content": "3 + 4?"}], "reward_model": {"ground_truth": "7"}}
    path.write_text(json.dumps(row) + "\n")
    made = task(train=str(path), test=str(path), prompt="{prompt[0][content]}", answer="{reward_model[ground_truth]}")
    assert (made.train[0].prompt, made.train[0].answer) == ("3 + 4?", "7")
