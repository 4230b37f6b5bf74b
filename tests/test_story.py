"""The bundled model keeps its promises: the base's own text, in fewer steps, in a package small enough to ship."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.assets import bundled
from dynamo_lm.bench.benchmark import open_context
from dynamo_lm.bench.methods import dynamo
from dynamo_lm.bench.prompts import Prompt
from dynamo_lm.bench.race import race
from dynamo_lm.bench.summary import log_likelihood, summaries

OPENINGS = (Path(__file__).parent.parent / "benchmarks" / "openings.txt").read_text().splitlines()


@pytest.fixture(scope="module")
def story():
    return DynaMoForCausalLM.from_pretrained(str(bundled())).eval(), AutoTokenizer.from_pretrained(bundled())


def test_the_folder_is_under_48_megabytes():
    assert sum(file.stat().st_size for file in bundled().iterdir()) < 48e6


def test_it_opens_in_float32_whatever_it_is_stored_in(story):
    assert story[0].dtype == torch.float32


def test_strict_greedy_is_transformers_own_greedy_in_less_than_half_the_passes(story):
    model, tokenizer = story
    tokens = forwards = 0
    for opening in OPENINGS[:3]:
        prompt = tokenizer(opening, return_tensors="pt")
        own = model.base.generate(**prompt, max_new_tokens=48, do_sample=False)
        ours = model.generate(**prompt, max_new_tokens=48, return_dict_in_generate=True)
        assert ours.sequences.tolist() == own.tolist()
        tokens, forwards = tokens + ours.statistics[0].new_tokens, forwards + ours.statistics[0].forwards
    assert tokens / forwards > 2.0


def test_a_race_counts_what_the_statistics_count_and_scores_by_the_base_alone(story):
    model, tokenizer = story
    prompts = [Prompt("a", tuple(tokenizer(opening).input_ids)) for opening in OPENINGS[:2]]
    one = dynamo("one", {"verify": "strict", "num_heads": 1})
    strict = dynamo("strict", {"verify": "strict", "num_heads": model.num_heads}, identical_to="one")
    context = open_context(model)
    outcome = race(context, prompts, [one, strict], max_new_tokens=20, repetitions=1, bandwidth_bytes=0)
    plain, fast = summaries(outcome, context)
    assert plain["tokens"] == fast["tokens"] == 40 and plain["steps"] == 40 and fast["steps"] < 40
    assert fast["identical"]["texts"] == 2 and plain["ratio"]["median"] == 1.0
    for output in outcome.results[1].outputs[0]:
        assert sum(output.step_sizes[0]) == 20 and len(output.step_sizes[0]) == output.steps
    assert sum(size * count for size, count in enumerate(fast["histogram"], start=1)) == 40
    total = sum(
        log_likelihood(model, torch.tensor([*prompt.tokens, *text]), len(prompt.tokens))
        for prompt, text in zip(prompts, outcome.results[0].texts(), strict=True)
    )
    assert plain["log_likelihood"] == pytest.approx(total / 40)
    assert plain["log_likelihood"] == pytest.approx(fast["log_likelihood"])


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8, 9])
def test_the_readout_fake_skinny_matmul_is_the_output_embedding(story, rows):
    model, _ = story
    hidden = torch.randn(1, rows, model.base.config.hidden_size, generator=torch.Generator().manual_seed(rows))
    with torch.inference_mode():
        torch.testing.assert_close(model.readout(hidden), model.base.get_output_embeddings()(hidden))
