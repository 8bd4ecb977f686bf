"""The code of docs/tasks.md runs."""

import re
from pathlib import Path

from rlattn.reward_functions import call

DOCS = Path(__file__).parents[2] / "docs" / "tasks.md"


def test_the_examples_do_what_they_say():
    namespace: dict = {}
    for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL):
        exec(block, namespace)
    columns = {"prompts": ["p"] * 2, "completions": ["a", "b" * 300], "answer": [None] * 2}
    assert call(namespace["short"], "short", columns, {}) == [1, 0]
    made = namespace["Doubles"](namespace["DoublesOptions"](count=5), 0)
    assert (len(made.train), len(made.test)) == (5, 10)
    assert made.verifier(made.train[0].answer, " 20 ").right
    assert made.train[0].prompt == "2 * 10 ="
