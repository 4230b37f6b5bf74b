"""`dynamo-lm bench`: what is raced, what the floor is, and a small race as a user runs it. No test looks at a time."""

import importlib.util
import json
import os
import sys
from dataclasses import replace

import pytest
import torch
from commandline import Run, byte_tokenizer, neox
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import other_programs, prompt_sets, race_plot, random_model, step_profile
from benchmarks.race import application
from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.bench import methods, race, roofline, summary, tables
from dynamo_lm.bench.options import RaceOptions
from dynamo_lm.bench.prompts import Prompt, batches, fitted
from dynamo_lm.bench.runners import BenchmarkContext, Output, open_runner
from dynamo_lm.errors import InputError
from dynamo_lm.export import gguf_base, llama_cpp
from dynamo_lm.kernels.quantized import quantize_modules

PROMPTS = [Prompt("a", (5, 6, 7)), Prompt("b", (8, 9, 10, 11))]


@pytest.fixture(scope="module")
def context():
    model = DynaMoForCausalLM.from_base(neox(), num_heads=3, init="copy").eval()
    torch.manual_seed(1)
    draft = neox(num_hidden_layers=2).eval()
    opened = BenchmarkContext({"model": model}, (0,), 128, draft)
    yield opened
    for close in opened.close:
        close()


# ------------------------------------------------------------------ what is raced


def test_every_method_has_a_name_of_its_own_and_reproduces_one_that_exists():
    listed = [*methods.ONE_TOKEN, *methods.ONE_TOKEN_SAMPLED, methods.PROMPT_LOOKUP, *other_programs.METHODS]
    listed += methods.heads(4, off_heads=3, eps_b=0.3)
    names = [method.name for method in listed]
    assert len(set(names)) == len(names)
    assert {method.identical_to for method in listed} <= {None, *names}
    assert all(method.lossless and method.kind == "greedy" for method in listed if method.identical_to)
    assert {method.kind for method in listed if method.one_token} == {"greedy", "sampled"}


def test_dynamo_is_raced_at_every_number_of_heads_and_off_as_far_as_its_tables_reach():
    listed = methods.heads(4, off_heads=3, eps_b=0.3)
    assert [method.name for method in listed if method.compiles] == [
        *(f"DynaMo strict, n={n}, compiled" for n in (2, 3, 4)),
        "DynaMo budget 0.2, n=4, compiled",
        "DynaMo strict sampled, n=4, compiled",
        *(f"DynaMo off, eps_b=0.3, n={n}, compiled" for n in (2, 3)),
    ]
    names = [method.name for method in listed if not method.compiles]
    assert [name for name in names if "strict, " in name] == [
        *(f"DynaMo strict, n={n}" for n in (2, 3, 4)),
        "DynaMo strict, n=4, chain",
        "DynaMo strict, n=4, prompt lookup",
    ]
    assert [name for name in names if "eps_b=0.3" in name] == [f"DynaMo off, eps_b=0.3, n={n}" for n in (2, 3)]
    assert "DynaMo off, eps_b=0, n=3" in names
    once = [method for method in methods.heads(2, off_heads=2, eps_b=0.0) if "off" in method.name and not method.compiles]
    assert len(once) == 1


def test_batches_race_only_what_takes_them_and_a_choice_keeps_its_baselines():
    listed = [*methods.ONE_TOKEN, methods.PROMPT_LOOKUP, *methods.heads(3, off_heads=1, eps_b=0.3)]
    listed += methods.ONE_TOKEN_SAMPLED
    assert all(method.batched and method.kind == "greedy" for method in methods.choose(listed, batch=4))
    chosen = [method.name for method in methods.choose(listed, batch=1, only=["strict, n=2"])]
    assert chosen == [*(one.name for one in methods.ONE_TOKEN), "DynaMo strict, n=2", "DynaMo strict, n=2, compiled"]
    chosen = methods.choose(listed, batch=1, only=["strict sampled, n=2"])
    assert {method.name for method in methods.ONE_TOKEN_SAMPLED} < {method.name for method in chosen}


@pytest.mark.parametrize(
    "method",
    [
        methods.ONE_TOKEN[1],
        methods.PROMPT_LOOKUP,
        *other_programs.METHODS[:2],
        *methods.heads(3, off_heads=1, eps_b=0.3)[:2],
    ],
    ids=lambda method: method.name,
)
def test_lossless_methods_write_the_text_of_one_token_at_a_time(context, method):
    one = open_runner(methods.ONE_TOKEN[0], context)
    other = open_runner(method, context)
    for prompt in PROMPTS:
        expected, output = one([prompt.tokens], 12, 0), other([prompt.tokens], 12, 0)
        assert expected.steps == len(expected.texts[0])
        assert 1 <= output.steps <= len(output.texts[0])
        if method.lossless:
            assert output.texts == expected.texts


def test_texts_of_a_batch_are_written_as_each_alone(context):
    prompts = [prompt.tokens for prompt in PROMPTS]
    for method in (methods.ONE_TOKEN[0], methods.ONE_TOKEN[1], methods.heads(3, off_heads=1, eps_b=0.3)[1]):
        write = open_runner(method, context)
        assert write(prompts, 10, 0).texts == [write([prompt], 10, 0).texts[0] for prompt in prompts]


@pytest.mark.parametrize("method", other_programs.add()[2:], ids=lambda method: method.name)
def test_other_programs_reproduce_the_text_where_they_are_installed(context, method):
    for package in ("flashspec",) if method.engine == "flashspec" else ("gguf", "xllamacpp"):
        if importlib.util.find_spec(package) is None:  # importing llama.cpp into this process would end it
            pytest.skip(f"{package} is not installed")
    one, tokens = open_runner(methods.ONE_TOKEN[0], context), PROMPTS[0].tokens
    assert open_runner(method, context)([tokens], 8, 0).texts == one([tokens], 8, 0).texts


XLLAMACPP = """
import os
__version__ = "0"
def get_system_info():
    return f"process {os.getpid()}"
class ggml_type:
    GGML_TYPE_F32 = 0
class CommonParams:
    def __init__(self):
        self.model, self.cpuparams, self.cpuparams_batch = type("Part", (), {}), type("Part", (), {}), type("Part", (), {})
class Server:
    def __init__(self, parameters):
        print("a message on stdout")
        if parameters.model.path == "damaged.gguf":
            os.abort()
    def handle_completions(self, request):
        if request["max_tokens"] > 9:
            return {"error": {"message": "too long"}}
        tokens = [{"id": len(request["prompt"])}, {"id": 5}] if "logprobs" in request else None
        choice = {"finish_reason": "stop", "logprobs": {"content": tokens}}
        return {"choices": [choice], "timings": {"prompt_ms": 500, "predicted_ms": 1500}}
"""


def test_llama_cpp_runs_in_a_process_of_its_own_whose_end_is_an_error_and_not_ours(tmp_path, monkeypatch):
    (tmp_path / "xllamacpp.py").write_text(XLLAMACPP)
    monkeypatch.syspath_prepend(tmp_path)
    known = llama_cpp.facts()
    assert known.startswith("xllamacpp 0: process ") and not known.endswith(f" {os.getpid()}")
    settings = {"context": 64, "threads": 1, "cache_type": "F32"}
    engine = llama_cpp.LlamaCpp("model.gguf", **settings)
    assert engine.generate([7, 8, 9], 4, [0]) == ([3, 5, 0], 2.0)
    with pytest.raises(RuntimeError, match="too long"):
        engine.generate([7], 10, [0])
    engine.close()
    with pytest.raises(RuntimeError, match="ended with exit status"):
        llama_cpp.LlamaCpp("damaged.gguf", **settings)
    assert "xllamacpp" not in sys.modules


def test_llama_cpp_that_is_not_installed_is_left_out_with_a_reason(context, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert llama_cpp.facts() is None
    chosen = [methods.ONE_TOKEN[0], methods.llama_cpp(tmp_path / "model-Q8.gguf")]
    outcome = race.race(context, PROMPTS, chosen, max_new_tokens=8, repetitions=1, bandwidth_bytes=0)
    assert outcome.skipped[0]["name"] == "llama.cpp: model-Q8" and "pip install xllamacpp" in outcome.skipped[0]["reason"]


# ------------------------------------------------------------------ the floor


def test_a_step_reads_all_weights_but_an_embedding_table_of_its_own():
    untied, tied = neox(), neox(tie_word_embeddings=True)
    # A layer: two norms of 2 x 32, qkv 32 x 96 + 96, output 32 x 32 + 32, mlp 32 x 64 + 64 and 64 x 32 + 32.
    layer = 2 * 64 + (3072 + 96) + (1024 + 32) + (2048 + 64) + (2048 + 32)
    weights = 3 * layer + 64 + 300 * 32  # final norm, output embedding
    assert roofline.weight_bytes(untied) == roofline.weight_bytes(tied) == 4 * weights
    assert roofline.weight_bytes(untied.to(torch.bfloat16)) == 2 * weights
    assert sum(parameter.numel() for parameter in untied.parameters()) == weights + 300 * 32


@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_weights_are_read_in_their_bits_with_a_scale_and_an_offset_of_two_bytes_for_every_group(bits):
    of_group = 2 if bits == 8 else 4  # 8 bits have no offset
    layer = (32 * 96 + 32 * 32 + 32 * 64 + 64 * 32) * (bits / 8 + of_group / 32) + 4 * (2 * 64 + 96 + 32 + 64 + 32)
    output = 304 * 32 * (1 + 2 / 32)  # 8 bits at least; rows in blocks of 16
    for tied in (False, True):
        base = neox(tie_word_embeddings=tied)
        quantize_modules(base, bits)
        assert roofline.weight_bytes(base) == 3 * layer + 4 * 64 + output


def test_a_step_reads_keys_and_values_of_every_layer_and_position():
    assert roofline.cache_bytes(neox(), 10) == 2 * 3 * 32 * 10 * 4
    grouped = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=8,
        )
    )
    assert roofline.cache_bytes(grouped, 10.5) == 2 * 2 * 16 * 10.5 * 4


def test_heads_add_their_layers_to_what_a_step_reads():
    model = DynaMoForCausalLM.from_base(neox(tie_word_embeddings=True), num_heads=3)
    layer = 2 * 64 + (3072 + 96) + (1024 + 32) + (2048 + 64) + (2048 + 32)
    assert [roofline.head_bytes(model, n) for n in (1, 2, 3)] == [0, 4 * layer, 8 * layer]


def test_the_floor_is_bytes_over_bandwidth_and_batches_share_the_weights():
    base = neox()
    read, cached = roofline.weight_bytes(base), roofline.cache_bytes(base, 5)
    assert roofline.floor_seconds(base, 5, 1e6) == (read + cached) / 1e6
    assert roofline.floor_seconds(base, 5, 1e6, batch=4) == (read + 4 * cached) / 1e6
    measured = roofline.measure_bandwidth(torch.device("cpu"), size=2**16, repetitions=1)
    assert measured.read > 0 and measured.best == max(measured.read, measured.copy)


# ------------------------------------------------------------------ numbers


def test_ratios_are_taken_within_a_repetition_and_the_fastest_one_token_method_is_the_baseline():
    slow, fast, several = (
        replace(methods.ONE_TOKEN[0], name="slow"),
        replace(methods.ONE_TOKEN[1], name="fast", identical_to="slow"),
        replace(methods.heads(2, off_heads=1, eps_b=0)[0], name="several", identical_to="slow"),
    )
    spent = {"slow": (2.0, 4.0), "fast": (1.0, 2.0), "several": (0.5, 2.0)}  # the machine was slower the second time
    results = []
    for method in (slow, fast, several):
        steps = 2 if method is several else 4
        groups = [{"a": race.Tally(seconds, 4, steps)} for seconds in spent[method.name]]
        outputs = [[Output([[1, 2, 3, 9 if method is several else 4]], seconds, steps)] for seconds in spent[method.name]]
        results.append(race.Result(method, groups=groups, outputs=outputs))
    outcome = race.Race(results, [], [[PROMPTS[0]]], [], [])
    assert outcome.baseline("greedy").method.name == "fast"
    model = DynaMoForCausalLM.from_base(neox(), num_heads=2)
    context = BenchmarkContext({"model": model}, (), 8)
    rows = {row["name"]: row for row in summary.summaries(outcome, context, trained=False)}
    assert rows["several"]["ratio"] == {"median": 1.5, "min": 1.0, "max": 2.0}
    assert rows["several"]["tokens_per_step"] == 2 and rows["several"]["efficiency"] == 0.75
    assert rows["several"]["step_cost"] == pytest.approx((2.5 / 4) / (3 / 8))
    assert rows["several"]["identical"] == {"texts": 0, "of": 1, "tokens": 0.75}
    assert rows["fast"]["identical"] == {"texts": 1, "of": 1, "tokens": 1.0}


def test_what_cannot_run_is_left_out_with_a_reason(context):
    without = replace(context, draft=None)
    chosen = [*methods.ONE_TOKEN[:2], other_programs.METHODS[0]]
    outcome = race.race(without, PROMPTS, chosen, max_new_tokens=8, repetitions=1, bandwidth_bytes=2**16)
    assert [result.method.name for result in outcome.results] == [method.name for method in methods.ONE_TOKEN[:2]]
    why = "There is no draft model."
    assert outcome.skipped == [{"name": "transformers: assisted", "reason": why, "one_token": False}]


@pytest.mark.parametrize(("limit", "prompts", "repetitions"), [(0.0, 1, 1), (45.0, 2, 2), (1000.0, 2, 3)])
def test_a_race_with_a_time_limit_keeps_what_all_methods_have_done(context, monkeypatch, limit, prompts, repetitions):
    now = [0.0]
    monkeypatch.setattr(race.time, "monotonic", lambda: now[0])

    def five_seconds(method, context):
        def run(prompts, max_new_tokens, seed):
            now[0] += 0 if max_new_tokens == 1 else 5  # warming up takes no time
            return Output([[1] * max_new_tokens], 5.0, max_new_tokens)

        return run

    monkeypatch.setattr(race, "open_runner", five_seconds)
    outcome = race.race(
        context,
        PROMPTS,
        methods.ONE_TOKEN[:2],
        max_new_tokens=4,
        repetitions=3,
        bandwidth_bytes=0,
        warm_up_tokens=1,
        time_limit=limit,
    )  # a batch takes 10 seconds, a repetition 20
    assert (len(outcome.prompts), outcome.repetitions) == (prompts, repetitions)
    assert outcome.stopped == (limit < 60)
    for result in outcome.results:
        assert [len(outputs) for outputs in result.outputs] == [prompts] * repetitions
        assert result.tally().tokens == 4 * prompts * repetitions


def test_one_run_has_no_spread_and_an_efficiency_above_its_ceiling_is_marked():
    method = {
        "name": "several",
        "baseline": "one",
        "kind": "greedy",
        "identical": None,
        "ceiling": 2,
        "lossless": True,
        "regret": 0.0,
        "log_likelihood": -1.0,
        "distinct_bigrams": 0.5,
        "tokens_per_second": {"median": 30.0},
        "ratio": {"median": 1.9, "min": 1.9, "max": 1.9},
        "tokens_per_step": 2.0,
        "efficiency": 0.95,
        "efficiency_ceiling": 0.88,
    }
    floor = {"name": "floor", "weight_bytes": 1, "mean_length": 9, "tokens_per_second": 9.0, "ratio": 3.0, "multiples": {}}
    floor |= {"bytes_per_second": {"read": 1, "copy": 1, "resident": 1}, "resident_tokens_per_second": 9.0}
    record = {"context": "short", "batch": 1, "repetitions": 1, "cut_prompts": 0, "skipped": [], "floor": floor}
    once = {**record, "methods": [method]}
    cells = [next(iter(column.cells)) for column in tables.table(once).columns]
    assert cells[2] == "1.90" and cells[4] == "0.95^ of 0.88"
    assert "one run" in tables.table(once).columns[2].header
    assert any(note.startswith("^:") for note in tables.notes(once)) and any("no spread" in n for n in tables.notes(once))
    often = {**record, "repetitions": 3, "methods": [{**method, "efficiency": 0.8}]}
    cells = [next(iter(column.cells)) for column in tables.table(often).columns]
    assert cells[2] == "1.90 (1.90-1.90)" and cells[4] == "0.80 of 0.88"
    assert not any(note.startswith("^:") or "no spread" in note for note in tables.notes(often))


def test_shares_of_a_step_sum_to_one_and_the_engine_is_put_back(context):
    from dynamo_lm.decoding import batch, kv_cache

    before = DynaMoForCausalLM.hidden, DynaMoForCausalLM.readout, batch.decode, kv_cache.RaggedKVCache.update
    listed = [*methods.ONE_TOKEN, *methods.heads(3, off_heads=1, eps_b=0)]
    profiles = step_profile.profiles(context, listed, RaceOptions(only=["strict, n=3"]), PROMPTS[:1], 8)
    strict = "DynaMo strict, n=3"
    assert list(profiles) == [methods.ONE, strict, f"{strict}, chain", f"{strict}, prompt lookup"]
    for profile in profiles.values():
        assert sum(profile["shares"].values()) == pytest.approx(1)
        assert {"stem", "output embedding", step_profile.REST} <= set(profile["shares"])
    assert "last layer and heads" in profile["shares"]
    assert before == (DynaMoForCausalLM.hidden, DynaMoForCausalLM.readout, batch.decode, kv_cache.RaggedKVCache.update)
    assert len(step_profile.shares(profiles).rows) == len(profiles)


# ------------------------------------------------------------------ prompts and models


def test_spec_bench_has_six_groups(tmp_path):
    categories = ["writing", "coding", "translation", "summarization", "qa", "math_reasoning", "rag"]
    lines = [json.dumps({"category": category, "turns": ["the fox", "a second"]}) for category in categories * 2]
    (tmp_path / "spec.jsonl").write_text("\n".join(lines))
    prompts = prompt_sets.read_spec_bench(tmp_path / "spec.jsonl", byte_tokenizer(), limit=1)
    assert sorted({prompt.group for prompt in prompts}) == [
        "math_reasoning",
        "mt-bench",
        "qa",
        "rag",
        "summarization",
        "translation",
    ]
    assert len(prompts) == 6
    (tmp_path / "spec.jsonl").write_text('{"turns": ["no category"]}')
    with pytest.raises(InputError, match="not a question of Spec-Bench"):
        prompt_sets.read_spec_bench(tmp_path / "spec.jsonl", byte_tokenizer())


def test_long_prompts_end_in_the_prompt_and_too_long_ones_keep_their_end():
    longer = prompt_sets.lengthened(PROMPTS, 6, list(range(100, 108)))
    assert longer[0].tokens == (100, 101, 102, 5, 6, 7)
    assert longer[1].tokens == (103, 104, 8, 9, 10, 11)
    cut_prompts, cut = fitted(longer, 14, 10)
    assert cut_prompts[0].tokens == (102, 5, 6, 7) and cut == 2
    with pytest.raises(InputError, match="no room"):
        fitted(PROMPTS, 8, 8)


def test_batches_are_of_one_group_and_always_full():
    prompts = [Prompt("a", (i,)) for i in range(3)] + [Prompt("b", (9,))]
    ids = [[prompt.tokens[0] for prompt in batch] for batch in batches(prompts, 2)]
    assert ids == [[0, 1], [2, 0], [9, 9]]


def test_a_model_of_a_shape_has_random_tables_and_no_end():
    small = random_model.config("pythia-70m")
    assert (small.hidden_size, small.num_hidden_layers, small.vocab_size) == (512, 6, 50304)
    small.hidden_size, small.intermediate_size, small.num_hidden_layers, small.vocab_size = 32, 64, 2, 200
    model = random_model.random_model(small, num_heads=3, dtype=torch.float32, device="cpu", table_rows=500, seed=0)
    assert model.cooccurrence.order == 3 and model.cooccurrence.total(3) == 600
    prompt = random_model.random_prompts(200, count=1, length=4, seed=0)[0]
    one = open_runner(methods.ONE_TOKEN[0], BenchmarkContext({"model": model}, (), 64))
    assert len(one([prompt.tokens], 20, 0).texts[0]) == 20
    with pytest.raises(InputError, match="pythia-160m"):
        random_model.config("pythia-9b")


def test_gguf_separates_what_gpt_neox_keeps_by_attention_head():
    base = neox()
    weight = base.gpt_neox.layers[0].attention.query_key_value.weight  # (head, q k v, size) x hidden
    named = dict(gguf_base.tensors(base))
    size = 16
    for kind in range(3):
        for head in range(2):
            start = (3 * head + kind) * size
            part = named["blk.0.attn_qkv.weight"][(2 * kind + head) * size :][:size]
            assert torch.equal(part, weight[start : start + size])
    assert torch.equal(named["output.weight"], base.embed_out.weight if hasattr(base, "embed_out") else base.lm_head.weight)
    with pytest.raises(InputError, match="float64"):
        gguf_base.check(neox().double())


# ------------------------------------------------------------------ the command


@pytest.fixture
def run(capfd):
    return Run(capfd)


def test_the_bundled_model_is_raced_into_a_record_and_a_table(run, tmp_path):
    (tmp_path / "two.txt").write_text("Once upon a time\nTom had a dog\n")
    chosen = ("--only", "strict, n=2", "--only", "eps_b=0.3, n=2", "--repetitions", "1", "-n", "8", "--no-compile")
    printed = run("bench", "story", "--prompts", tmp_path / "two.txt", *chosen, "--out", tmp_path / "out")
    assert "one token: own loop compiled. Left out with --no-compile. The fastest one-token loop may be missing" in printed
    assert "memory-bandwidth floor" in printed and "(one run)" in printed and "DynaMo strict, n=2" in printed
    record = json.loads((tmp_path / "out" / "bench.json").read_text())
    (raced,) = record["races"]
    rows = {row["name"]: row for row in raced["methods"]}
    strict = rows["DynaMo strict, n=2"]
    assert strict["identical"] == {"texts": 2, "of": 2, "tokens": 1.0} and strict["ceiling"] == 2
    assert 0.5 < strict["efficiency_ceiling"] < 1 and rows[methods.ONE]["efficiency_ceiling"] is None
    assert strict["log_likelihood"] == rows[methods.ONE]["log_likelihood"]
    assert strict["baseline"] in {method.name for method in methods.ONE_TOKEN}
    assert rows[strict["baseline"]]["ratio"] == {"median": 1, "min": 1, "max": 1}
    assert str(tmp_path) not in json.dumps(record)
    pytest.importorskip("matplotlib")
    assert race_plot.save_all(record, tmp_path / "out") == ["bench.svg", "bench.png"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["bench.json", "bench.png", "bench.svg"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch", "0"), "--batch"),
        (("--batch", "many"), "--batch"),
        (("--heads", "9"), "2 to 4"),
        (("--prompts", "nowhere.txt"), "cannot be read"),
        (("--gguf", "nowhere.gguf"), "--gguf"),
        (("--repetitions", "0"), "--repetitions"),
        (("--threads", "0"), "--threads"),
    ],
)
def test_bad_input_gets_one_sentence(run, options, message):
    assert message in run.refused("bench", "story", *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--context", "wide"), "--context"),
        (("--spec-bench", "nowhere.jsonl"), "cannot be read"),
        (("--prompts", "a.txt", "--spec-bench", "b.jsonl"), "one source"),
        (("--shape", "pythia-9b"), "pythia-160m"),
        (("--shape", "pythia-70m", "--draft", "x"), "--draft"),
        (("--draft", "nowhere/at/all"), "nowhere/at/all"),
        (("--also", "nowhere/at/all"), "nowhere/at/all"),
        (("--context", "long", "--context-tokens", "1020"), "--context-tokens"),
        (("--context", "long", "--filler", "nowhere.txt"), "--filler"),
    ],
)
def test_the_repository_race_refuses_bad_input(options, message):
    with pytest.raises(InputError, match=message):
        application()(["story", *options], standalone_mode=False)


def test_heads_on_another_base_are_refused(tmp_path):
    DynaMoForCausalLM.from_base(neox(), num_heads=2).save_pretrained(str(tmp_path / "other"))
    byte_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="another base"):
        application()(["story", "--also", str(tmp_path / "other")], standalone_mode=False)
