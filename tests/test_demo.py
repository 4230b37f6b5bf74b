"""`dynamo-lm demo`: what it prints, how it chooses threads, and that it ends in time. No test looks at a clock."""

import json
import subprocess
import sys
import time

import pytest
import torch
from commandline import Run

from dynamo_lm.bench.methods import ONE_TOKEN
from dynamo_lm.bench.prompts import Prompt
from dynamo_lm.bench.runners import Output
from dynamo_lm.cli import demo_view
from dynamo_lm.cli.demo import PASSIVE


@pytest.fixture
def run(capfd, monkeypatch):
    threads = torch.get_num_threads()
    for name, value in PASSIVE.items():  # so that they are as before when the test ends
        monkeypatch.setenv(name, value)
    yield Run(capfd)
    torch.set_num_threads(threads)


def test_threads_are_told_to_wait_passively_before_torch_is_loaded():
    code = (
        "import os, sys, time, types\n"
        "from dynamo_lm.cli.main import main\n"
        "def demo(model, options, began, json_output):\n"
        "    waiting = os.environ['OMP_WAIT_POLICY'], os.environ['GOMP_SPINCOUNT']\n"
        "    print('torch' in sys.modules, *waiting, options.time_limit, began < time.monotonic())\n"
        "sys.modules['dynamo_lm.cli.demo_view'] = types.SimpleNamespace(demo=demo)\n"
        "main(['demo', '--time-limit', '60'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False PASSIVE 0 60.0 True\n"


@pytest.mark.parametrize(
    ("speeds", "chosen"),
    [
        ({1: 10, 2: 18, 4: 30}, 4),
        ({1: 10, 2: 10.2, 4: 8}, 1),  # 2 % faster is not worth a second thread
        ({1: 10, 2: 15, 4: 3}, 2),
    ],
)
def test_the_number_of_threads_is_the_fastest_that_is_measured(monkeypatch, speeds, chosen):
    threads = [1]

    def runner(prompts, max_new_tokens, seed):
        return Output([[1] * max_new_tokens], max_new_tokens / speeds[threads[-1]], max_new_tokens)

    monkeypatch.setattr(demo_view.os, "sched_getaffinity", lambda process: range(4), raising=False)
    monkeypatch.setattr(demo_view, "set_threads", threads.append)
    monkeypatch.setattr(demo_view, "open_runner", lambda method, context: runner)
    rates = demo_view.measure_threads(None, ONE_TOKEN[0], Prompt("a", (5,)), None)
    assert max(rates, key=lambda count: rates[count]) == chosen
    assert set(threads) == {1, 2, 4}
    assert list(demo_view.measure_threads(None, ONE_TOKEN[0], Prompt("a", (5,)), 2)) == [2]


def test_a_demo_without_time_ends_after_one_prompt_and_says_so(run):
    printed = run("demo", "-n", "20", "--time-limit", "0", "--threads", "1")
    assert "Threads: 1" in printed and "of 16 new tokens, shorter than asked for" in printed
    assert "Once upon a time" in printed and "strict, greedy" in printed and "one run" in printed
    assert "Stopped after 0 s: 1 of 3 repetitions, 1 of 4 prompts" in " ".join(printed.split())


def test_the_time_that_importing_torch_took_counts(capsys):
    options = demo_view.DemoOptions(max_new_tokens=20, threads=1, time_limit=600)
    threads = torch.get_num_threads()
    demo_view.demo("story", options, began=time.monotonic() - 600)
    torch.set_num_threads(threads)
    assert "Stopped after 600 s: 1 of 3 repetitions, 1 of 4 prompts" in " ".join(capsys.readouterr().out.split())


def test_the_numbers_are_one_json_document(run):
    numbers = json.loads(run("demo", "--prompt", "Tom had", "-n", "8", "--threads", "1", "--json", "--time-limit", "600"))
    one, strict, sampled, dynamic = numbers["methods"]
    assert strict["identical"] == {"texts": 1, "of": 1, "tokens": 1.0} and strict["ceiling"] == 4
    assert one["steps"] == 8 * numbers["repetitions"] == 24 and strict["steps"] < 24
    assert (strict["baseline"], dynamic["baseline"]) == (one["name"], sampled["name"])
    assert not numbers["stopped"]


@pytest.mark.parametrize(("options", "message"), [(("--heads", "9"), "--heads"), (("--threads", "0"), "--threads")])
def test_bad_input_gets_one_sentence(run, options, message):
    run("demo", "--prompt", "Tom", *options, status=2)
    assert message in run.err and "Traceback" not in run.err
