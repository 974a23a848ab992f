"""Code that is wrong, slow, greedy or sly does not pass, and leaves nothing behind."""

import subprocess
import time

import pytest

from llm_jax.evals.sandbox import run_code


def test_what_runs_to_its_end_passes():
    assert run_code("def f(x):\n    return x + 1\nassert f(1) == 2\nprint('你好')").passed
    assert run_code("import io, sys\nsys.stdout = io.StringIO()").passed
    assert run_code("import atexit\natexit.register(print, 'bye')").passed


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("assert 1 == 2, 'not equal'", "AssertionError: not equal"),
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(0)", "before its end"),
        ("import os; os._exit(0)", "before its end"),
        ("raise SystemExit", "before its end"),
        ("x = bytearray(4 << 30)", "MemoryError"),
        ("open('big', 'wb').write(bytes(4 << 20))", ""),
        ("import os; assert not os.environ, list(os.environ)\nassert False, 'empty'", "empty"),
        ("input()", "EOFError"),
    ],
)
def test_what_does_not_is_told_why(code, reason):
    outcome = run_code(code)
    assert not outcome.passed
    assert reason in outcome.reason
    assert "\n" not in outcome.reason


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(60)"])
def test_what_does_not_end_is_ended(code):
    start = time.monotonic()
    outcome = run_code(code, seconds=1)
    assert not outcome.passed
    assert outcome.reason == "no end after 1 s"
    assert time.monotonic() - start < 20


def test_children_end_with_it():
    mark = "3141592653"
    code = f"import subprocess\nsubprocess.Popen(['/bin/sleep', '{mark}'])"
    assert run_code(code).passed
    assert mark not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


def test_the_output_of_one_cannot_pass_for_another():
    assert not run_code("print('\\n' + '0' * 32)\nimport os\nos._exit(0)").passed
