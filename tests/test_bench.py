"""`dynamo-lm bench`: what is raced, what the floor is, and a small race as a user runs it. No test looks at a time."""

import json
from dataclasses import replace

import pytest
import torch
from commandline import Run, byte_tokenizer, neox
from transformers import LlamaConfig, LlamaForCausalLM

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.bench import gguf_file, methods, random_model, roofline, step_profile, tables
from dynamo_lm.bench import prompts as prompt_sets
from dynamo_lm.bench import race as measure
from dynamo_lm.bench.prompts import Prompt
from dynamo_lm.bench.runners import BenchmarkContext, Output, open_runner
from dynamo_lm.errors import InputError

PROMPTS = [Prompt("a", (5, 6, 7)), Prompt("b", (8, 9, 10, 11))]


@pytest.fixture(scope="module")
def among():
    model = DynaMoForCausalLM.from_base(neox(), num_heads=3, init="copy").eval()
    torch.manual_seed(1)
    draft = neox(num_hidden_layers=2).eval()
    return BenchmarkContext({"model": model}, (0,), 128, draft)


# ------------------------------------------------------------------ what is raced


def test_every_way_has_a_name_of_its_own_and_reproduces_one_that_exists():
    found = [*methods.ONE_TOKEN, *methods.ONE_TOKEN_SAMPLED, *methods.PEERS, *methods.dynamo(4, off_heads=3, eps_b=0.3)]
    names = [way.name for way in found]
    assert len(set(names)) == len(names)
    assert {way.identical_to for way in found} <= {None, *names}
    assert all(way.lossless and way.kind == "greedy" for way in found if way.identical_to)
    assert {way.kind for way in found if way.one_token} == {"greedy", "sampled"}


def test_dynamo_is_raced_at_every_number_of_heads_and_off_as_far_as_its_tables_reach():
    found = methods.dynamo(4, off_heads=3, eps_b=0.3)
    assert [way.name for way in found if way.compiles] == [
        *(f"DynaMo strict, n={n}, compiled" for n in (2, 3, 4)),
        "DynaMo budget 0.2, n=4, compiled",
        "DynaMo strict sampled, n=4, compiled",
        *(f"DynaMo off, eps_b=0.3, n={n}, compiled" for n in (2, 3)),
    ]
    names = [way.name for way in found if not way.compiles]
    assert [name for name in names if "strict, " in name] == [
        *(f"DynaMo strict, n={n}" for n in (2, 3, 4)),
        "DynaMo strict, n=4, chain",
    ]
    assert [name for name in names if "eps_b=0.3" in name] == [f"DynaMo off, eps_b=0.3, n={n}" for n in (2, 3)]
    assert "DynaMo off, eps_b=0, n=3" in names
    once = [way for way in methods.dynamo(2, off_heads=2, eps_b=0.0) if "off" in way.name and not way.compiles]
    assert len(once) == 1


def test_batches_race_only_what_takes_them_and_a_choice_keeps_its_baselines():
    found = [*methods.ONE_TOKEN, *methods.PEERS, *methods.dynamo(3, off_heads=1, eps_b=0.3), *methods.ONE_TOKEN_SAMPLED]
    assert all(way.batched and way.kind == "greedy" for way in methods.choose(found, batch=4))
    chosen = [way.name for way in methods.choose(found, batch=1, only=["strict, n=2"])]
    assert chosen == [*(way.name for way in methods.ONE_TOKEN), "DynaMo strict, n=2", "DynaMo strict, n=2, compiled"]
    chosen = methods.choose(found, batch=1, only=["strict sampled, n=2"])
    assert {way.name for way in methods.ONE_TOKEN_SAMPLED} < {way.name for way in chosen}


@pytest.mark.parametrize(
    "way",
    [
        methods.ONE_TOKEN[1],
        *(way for way in methods.PEERS if way.engine == "transformers"),
        *(way for way in methods.dynamo(3, off_heads=1, eps_b=0.3)[:2] if not way.compiles),
    ],
    ids=lambda way: way.name,
)
def test_lossless_ways_write_the_text_of_one_token_at_a_time(among, way):
    one = open_runner(methods.ONE_TOKEN[0], among)
    other = open_runner(way, among)
    for prompt in PROMPTS:
        expected, found = one([prompt.tokens], 12, 0), other([prompt.tokens], 12, 0)
        assert expected.steps == len(expected.texts[0])
        assert 1 <= found.steps <= len(found.texts[0])
        if way.lossless:
            assert found.texts == expected.texts


def test_rows_of_a_batch_are_written_as_each_alone(among):
    prompts = [prompt.tokens for prompt in PROMPTS]
    for way in (methods.ONE_TOKEN[0], methods.ONE_TOKEN[1], methods.dynamo(3, off_heads=1, eps_b=0.3)[1]):
        write = open_runner(way, among)
        assert write(prompts, 10, 0).texts == [write([prompt], 10, 0).texts[0] for prompt in prompts]


def test_peers_reproduce_the_text_where_they_are_installed(among):
    one = open_runner(methods.ONE_TOKEN[0], among)
    for way in methods.PEERS:
        if way.engine in ("flashspec", "llama.cpp"):
            pytest.importorskip("gguf" if way.engine == "llama.cpp" else "flashspec")
            pytest.importorskip("xllamacpp" if way.engine == "llama.cpp" else "flashspec")
            tokens = PROMPTS[0].tokens
            assert open_runner(way, among)([tokens], 8, 0).texts == one([tokens], 8, 0).texts, way.name
    for close in among.close:
        close()


# ------------------------------------------------------------------ the floor


def test_a_step_reads_all_weights_but_an_embedding_table_of_its_own():
    untied, tied = neox(), neox(tie_word_embeddings=True)
    # A layer: two norms of 2 x 32, qkv 32 x 96 + 96, output 32 x 32 + 32, mlp 32 x 64 + 64 and 64 x 32 + 32.
    layer = 2 * 64 + (3072 + 96) + (1024 + 32) + (2048 + 64) + (2048 + 32)
    weights = 3 * layer + 64 + 300 * 32  # final norm, output embedding
    assert roofline.weight_bytes(untied) == roofline.weight_bytes(tied) == 4 * weights
    assert roofline.weight_bytes(untied.to(torch.bfloat16)) == 2 * weights
    assert sum(parameter.numel() for parameter in untied.parameters()) == weights + 300 * 32


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


def test_ratios_are_taken_within_a_repetition_and_the_fastest_one_token_way_is_the_baseline():
    slow, fast, several = (
        replace(methods.ONE_TOKEN[0], name="slow"),
        replace(methods.ONE_TOKEN[1], name="fast", identical_to="slow"),
        replace(methods.dynamo(2, off_heads=1, eps_b=0)[0], name="several", identical_to="slow"),
    )
    spent = {"slow": (2.0, 4.0), "fast": (1.0, 2.0), "several": (0.5, 2.0)}  # the machine was slower the second time
    found = []
    for way in (slow, fast, several):
        steps = 2 if way is several else 4
        groups = [{"a": measure.Tally(seconds, 4, steps)} for seconds in spent[way.name]]
        written = [[Output([[1, 2, 3, 9 if way is several else 4]], seconds, steps)] for seconds in spent[way.name]]
        found.append(measure.Result(way, groups=groups, written=written))
    race = measure.Race(found, [], [[PROMPTS[0]]], [], [])
    assert race.baseline("greedy").way.name == "fast"
    model = DynaMoForCausalLM.from_base(neox(), num_heads=2)
    rows = {row["name"]: row for row in measure.summaries(race, BenchmarkContext({"model": model}, (), 8), meaningful=False)}
    assert rows["several"]["ratio"] == {"median": 1.5, "min": 1.0, "max": 2.0}
    assert rows["several"]["tokens_per_step"] == 2 and rows["several"]["efficiency"] == 0.75
    assert rows["several"]["step_cost"] == pytest.approx((2.5 / 4) / (3 / 8))
    assert rows["several"]["identical"] == {"texts": 0, "of": 1, "tokens": 0.75}
    assert rows["fast"]["identical"] == {"texts": 1, "of": 1, "tokens": 1.0}


def test_what_cannot_run_is_left_out_with_a_reason(among):
    without = replace(among, draft=None)
    chosen = [*methods.ONE_TOKEN[:2], methods.PEERS[1]]
    race = measure.race(without, PROMPTS, chosen, batch=1, max_new_tokens=8, repetitions=1, bandwidth_bytes=2**16)
    assert [result.way.name for result in race.results] == [way.name for way in methods.ONE_TOKEN[:2]]
    why = "No draft model was given with --draft."
    assert race.skipped == [{"name": "transformers: assisted", "reason": why, "one_token": False}]


def test_shares_of_a_step_sum_to_one_and_the_engine_is_put_back(among):
    from dynamo_lm.decoding import batch, kv_cache

    before = DynaMoForCausalLM.hidden, DynaMoForCausalLM.readout, batch.decode, kv_cache.RaggedKVCache.update
    way = methods.dynamo(3, off_heads=1, eps_b=0)[1]
    device = torch.device("cpu")
    found = step_profile.profile(open_runner(way, among), [[PROMPTS[0].tokens]], max_new_tokens=8, seed=0, device=device)
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert {"stem", "last layer and heads", "output embedding", step_profile.REST} <= set(found["shares"])
    assert before == (DynaMoForCausalLM.hidden, DynaMoForCausalLM.readout, batch.decode, kv_cache.RaggedKVCache.update)
    assert len(tables.shares({way.name: found}).rows) == 1


# ------------------------------------------------------------------ prompts and models


def test_spec_bench_has_six_groups(tmp_path):
    categories = ["writing", "coding", "translation", "summarization", "qa", "math_reasoning", "rag"]
    lines = [json.dumps({"category": category, "turns": ["the fox", "a second"]}) for category in categories * 2]
    (tmp_path / "spec.jsonl").write_text("\n".join(lines))
    found = prompt_sets.read_spec_bench(tmp_path / "spec.jsonl", byte_tokenizer(), limit=1)
    assert sorted({prompt.group for prompt in found}) == [
        "math_reasoning",
        "mt-bench",
        "qa",
        "rag",
        "summarization",
        "translation",
    ]
    assert len(found) == 6
    (tmp_path / "spec.jsonl").write_text('{"turns": ["no category"]}')
    with pytest.raises(InputError, match="no question of Spec-Bench"):
        prompt_sets.read_spec_bench(tmp_path / "spec.jsonl", byte_tokenizer())


def test_long_prompts_end_in_the_prompt_and_too_long_ones_keep_their_end():
    longer = prompt_sets.lengthened(PROMPTS, 6, list(range(100, 108)))
    assert longer[0].tokens == (100, 101, 102, 5, 6, 7)
    assert longer[1].tokens == (103, 104, 8, 9, 10, 11)
    fitted, cut = prompt_sets.fitted(longer, 14, 10)
    assert fitted[0].tokens == (102, 5, 6, 7) and cut == 2
    with pytest.raises(InputError, match="no room"):
        prompt_sets.fitted(PROMPTS, 8, 8)


def test_batches_are_of_one_group_and_always_full():
    prompts = [Prompt("a", (i,)) for i in range(3)] + [Prompt("b", (9,))]
    found = [[prompt.tokens[0] for prompt in batch] for batch in prompt_sets.batches(prompts, 2)]
    assert found == [[0, 1], [2, 0], [9, 9]]


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
    named = dict(gguf_file.tensors(base))
    size = 16
    for kind in range(3):
        for head in range(2):
            start = (3 * head + kind) * size
            found = named["blk.0.attn_qkv.weight"][(2 * kind + head) * size :][:size]
            assert torch.equal(found, weight[start : start + size])
    assert torch.equal(named["output.weight"], base.embed_out.weight if hasattr(base, "embed_out") else base.lm_head.weight)
    with pytest.raises(InputError, match="float16"):
        gguf_file.check(neox().half())


# ------------------------------------------------------------------ the command


@pytest.fixture
def run(capfd):
    return Run(capfd)


def test_the_bundled_model_is_raced_into_a_record_a_table_and_a_picture(run, tmp_path):
    (tmp_path / "two.txt").write_text("Once upon a time\nTom had a dog\n")
    chosen = ("--only", "strict, n=2", "--only", "eps_b=0.3, n=2", "--repetitions", "1", "-n", "8", "--no-compile")
    said = run("bench", "story", "--prompts", tmp_path / "two.txt", *chosen, "--profile", "--out", tmp_path / "out")
    assert "one token: own loop compiled. Left out with --no-compile. The fastest one-token loop may be missing" in said
    assert "memory-bandwidth floor" in said and "share of a step" in said and "DynaMo strict, n=2" in said
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    (race,) = found["races"]
    rows = {row["name"]: row for row in race["ways"]}
    strict = rows["DynaMo strict, n=2"]
    assert strict["identical"] == {"texts": 2, "of": 2, "tokens": 1.0} and strict["ceiling"] == 2
    assert 0.5 < strict["efficiency_ceiling"] < 1 and rows[methods.OWN]["efficiency_ceiling"] is None
    assert strict["log_likelihood"] == rows[methods.OWN]["log_likelihood"]
    assert strict["baseline"] in {way.name for way in methods.ONE_TOKEN}
    assert rows[strict["baseline"]]["ratio"] == {"median": 1, "min": 1, "max": 1}
    assert set(found["profiles"]) >= {"DynaMo strict, n=2", "DynaMo off, eps_b=0.3, n=2"}
    assert str(tmp_path) not in json.dumps(found)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["bench.json", "bench.png", "bench.svg"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--batch", "0"), "--batch"),
        (("--batch", "many"), "--batch"),
        (("--context", "wide"), "--context"),
        (("--heads", "9"), "2 to 4"),
        (("--prompts", "nowhere.txt"), "cannot be read"),
        (("--spec-bench", "nowhere.jsonl"), "cannot be read"),
        (("--prompts", "a.txt", "--spec-bench", "b.jsonl"), "one source"),
        (("--shape", "pythia-9b"), "pythia-160m"),
        (("--shape", "pythia-70m", "--draft", "x"), "--draft"),
        (("--draft", "nowhere/at/all"), "nowhere/at/all"),
        (("--also", "nowhere/at/all"), "nowhere/at/all"),
        (("--context", "long", "--context-tokens", "1020"), "--context-tokens"),
        (("--context", "long", "--filler", "nowhere.txt"), "--filler"),
        (("--threads", "0"), "--threads"),
    ],
)
def test_bad_input_gets_one_sentence(run, options, said):
    assert said in run.refused("bench", "story", *options)


def test_heads_on_another_base_are_refused(run, tmp_path):
    DynaMoForCausalLM.from_base(neox(), num_heads=2).save_pretrained(str(tmp_path / "other"))
    byte_tokenizer().save_pretrained(tmp_path / "other")
    assert "another base" in run.refused("bench", "story", "--also", tmp_path / "other")
