"""Benchmarks through lm-evaluation-harness: what is asked, what is scored, what decoding writes, and bad input."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path

import processes
import pytest
import torch

pytest.importorskip("lm_eval")

from commandline import Run, byte_tokenizer, neox
from lm_eval.api.instance import Instance

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.assets import bundled
from dynamo_lm.errors import InputError
from dynamo_lm.evaluation.nlu import generation_tasks, harness
from dynamo_lm.evaluation.nlu.tasks import FOLDER, bench_folder, code, read

CHOICES = [
    {"query": "Question: who ran?", "choices": ["the red fox", "a house", "night"], "gold": 0},
    {"query": "Question: what is big?", "choices": ["the eyes of a bird", "sun", "it"], "gold": 1},
    {"query": "Question: when?", "choices": ["day", "then one day", "little"], "gold": 2},
]


@pytest.fixture
def run(capfd):
    return Run(capfd)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A bench folder of three-line files, and beside it model/ (frozen, heads only), base/ and other/ (another base)."""
    top = tmp_path_factory.mktemp("nlu")
    files = {
        "nlu/arc_easy.jsonl": CHOICES,
        "nlu/winogrande.jsonl": [
            {"context_options": ["the fox saw", "the bird saw"], "continuation": "a red house.", "gold": gold}
            for gold in (0, 1, 1)
        ],
        "nlu/lambada_openai.jsonl": [
            {"context": "the fox ran to a", "continuation": word} for word in ("fox", "bird", "sun")
        ],
        "nlu/triviaqa_small.jsonl": [
            {"context": f"Question: {what}?\nAnswer:", "answer": "fox", "aliases": ["fox", "the fox"]}
            for what in ("who ran", "what is red", "who saw it")
        ],
        "gsm8k_test.jsonl": [{"question": f"{i} and {i}?", "answer": f"{i}+{i}\n#### {i + i}"} for i in range(3)],
    }
    for name in (FOLDER / "blimp.yaml").read_text().split("file: ")[1:]:
        pairs = [{"sentence_good": "the fox ran.", "sentence_bad": "the fox fox."}] * 3
        files[name.split("}")[0]] = pairs
    for name, documents in files.items():
        (top / "bench" / name).parent.mkdir(parents=True, exist_ok=True)
        (top / "bench" / name).write_text("".join(json.dumps(document) + "\n" for document in documents))
    program = {"prompt": "def f(x):\n", "entry_point": "f", "canonical_solution": "    return x\n", "test": ""}
    with gzip.open(top / "bench" / "HumanEval.jsonl.gz", "wt") as out:
        out.write(json.dumps(program) + "\n")
    for name, seed in (("base", 0), ("other", 1)):
        base = neox(300, num_hidden_layers=2 + seed)
        for parameter in base.parameters():
            if parameter.ndim > 1:
                parameter.data.mul_(3)  # at the usual scale of 0.02 all tokens are nearly alike
        base.save_pretrained(top / name)
        byte_tokenizer().save_pretrained(top / name)
    DynaMoForCausalLM.from_base(str(top / "base"), num_heads=3).save_pretrained(top / "model", weights="heads")
    byte_tokenizer().save_pretrained(top / "model")
    return top


@pytest.fixture(scope="module")
def lm(folder):
    model = DynaMoForCausalLM.from_pretrained(str(folder / "model")).eval()
    return harness.DynaMoLM(model, byte_tokenizer(), batch_size=2)


@pytest.fixture(scope="module")
def question(folder):
    """Looks up one task of the fixture's bench folder."""
    return cache(lambda name: harness.questions([name], data=folder / "bench")[0])


def by_hand(lm, context: str, answer: str) -> tuple[float, bool]:
    """log p(answer | context) by the base's own logits, and whether the base would say it."""
    prompt, whole = (lm.tokenizer(text)["input_ids"] for text in (context, context + answer))
    with torch.inference_mode():
        log_p = lm.model.base(torch.tensor([whole])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    target = torch.tensor(whole[len(prompt) :])
    return float(log_p.gather(-1, target[:, None]).sum()), bool((log_p.argmax(-1) == target).all())


def instance(kind: str, *arguments) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


class TestHead1:
    def test_likelihoods_are_the_bases_own(self, lm):
        pairs = [("the fox", " ran to a house"), ("then", " one"), ("it was a big red bird and", " sun"), ("then", " it")]
        found = lm.loglikelihood([instance("loglikelihood", *pair) for pair in pairs])
        for pair, (value, greedy) in zip(pairs, found, strict=True):
            expected, same = by_hand(lm, *pair)
            assert value == pytest.approx(expected, abs=1e-4)
            assert greedy == same

    @pytest.mark.parametrize("decoding", [{}, {"num_heads": 1}])
    def test_texts_are_the_bases_greedy_ones_cut_at_a_stop_string(self, lm, decoding):
        context = "the little fox"
        ids = torch.tensor([lm.tokenizer(context)["input_ids"]])
        whole = lm.model.base.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=lm.eot_token_id, pad_token_id=0)
        expected = lm.tok_decode(whole[0, ids.shape[1] :].tolist())
        text, statistics = lm.complete(context, {"max_gen_toks": 24, "do_sample": False}, **decoding)
        assert text == expected
        stop = expected[5:8]
        cut, fewer = lm.complete(context, {"until": [stop], "max_gen_toks": 24}, **decoding)
        assert cut == expected[: expected.index(stop)]
        assert fewer.new_tokens < statistics.new_tokens

    def test_generate_until_gives_texts_in_the_order_of_the_requests(self, lm):
        asked = {"until": ["\n"], "max_gen_toks": 6}
        contexts = ["the fox", "a bird", "sun"]
        texts = lm.generate_until([instance("generate_until", context, asked) for context in contexts])
        assert texts == [lm.complete(context, asked)[0] for context in contexts]

    def test_a_long_prompt_loses_its_beginning(self, lm):
        context = "fox " * 300  # far more than 128 tokens; 128 - 8 are kept
        ids = lm.tokenizer(context)["input_ids"][-120:]
        with torch.inference_mode():
            expected = int(lm.model.base(torch.tensor([ids])).logits[0, -1].argmax())
        text, statistics = lm.complete(context, {"max_gen_toks": 8})
        assert statistics.new_tokens <= 8
        assert text.startswith(lm.tok_decode([expected]))

    def test_verify_and_eps_b_reach_the_decoding(self, lm):
        one = lm.complete("the fox", {"max_gen_toks": 12}, verify="off", eps_b=1.0, alpha_c=0.0)[1]
        all_heads = lm.complete("the fox", {"max_gen_toks": 12}, verify="off", eps_b=0.0, alpha_c=0.0)[1]
        assert (one.tokens_per_step, all_heads.tokens_per_step) == (1.0, 3.0)

    def test_opens_by_name_as_the_harness_does(self, folder):
        from lm_eval.api.registry import get_model

        named = get_model("dynamo-lm").create_from_arg_obj(
            {"pretrained": str(folder / "model"), "verify": "off", "eps_b": 0.5}, {"batch_size": 1, "device": "cuda:0"}
        )
        assert named.decoding["verify"] == "off" and named.decoding["eps_b"] == 0.5
        assert named.model.num_heads == 3

    def test_a_tokenizer_without_special_tokens_is_refused(self, lm):
        bare = byte_tokenizer()
        bare.eos_token = None
        with pytest.raises(InputError, match="neither a first nor a last token"):
            harness.DynaMoLM(lm.model, bare)


class TestTasks:
    def test_accuracy_is_that_of_likelihoods_by_hand(self, lm, question):
        right, normed = 0, 0
        for document in CHOICES:
            scores = [by_hand(lm, document["query"] + "\nAnswer:", " " + choice)[0] for choice in document["choices"]]
            right += scores.index(max(scores)) == document["gold"]
            lengths = [len(choice) for choice in document["choices"]]
            scores = [score / length for score, length in zip(scores, lengths, strict=True)]
            normed += scores.index(max(scores)) == document["gold"]
        found = harness.ask(lm, question("arc_easy"), limit=None, shots=None, seed=0)
        assert found.samples == 3
        assert found.metrics["acc"]["value"] == pytest.approx(right / 3)
        assert found.metrics["acc_norm"]["value"] == pytest.approx(normed / 3)
        share = right / 3
        assert found.metrics["acc"]["stderr"] == pytest.approx((share * (1 - share) / 2) ** 0.5)  # of n - 1 = 2

    def test_one_document_has_no_standard_error(self, lm, question):
        found = harness.ask(lm, question("winogrande"), limit=1, shots=None, seed=0)
        assert found.samples == 1 and found.metrics["acc"]["stderr"] is None

    def test_winogrande_scores_the_ending_behind_both_beginnings(self, lm, question):
        scores = [by_hand(lm, beginning, " a red house.")[0] for beginning in ("the fox saw", "the bird saw")]
        best = scores.index(max(scores))
        found = harness.ask(lm, question("winogrande"), limit=None, shots=None, seed=0)
        assert found.metrics["acc"]["value"] == pytest.approx((1 if best == 0 else 2) / 3)

    def test_lambada_perplexity_is_that_of_the_last_word(self, lm, question):
        values = [by_hand(lm, "the fox ran to a", f" {word}")[0] for word in ("fox", "bird", "sun")]
        found = harness.ask(lm, question("lambada_openai"), limit=None, shots=None, seed=0)
        expected = torch.tensor(values).mean().neg().exp().item()
        assert found.metrics["perplexity"]["value"] == pytest.approx(expected, rel=1e-4)

    def test_blimp_is_one_number_and_one_for_each_phenomenon_and_file(self, lm, question):
        good, bad = (by_hand(lm, lm.tokenizer.eos_token, f" {text}")[0] for text in ("the fox ran.", "the fox fox."))
        found = harness.ask(lm, question("blimp"), limit=1, shots=None, seed=0)
        assert found.samples == 67
        assert found.metrics["acc"]["value"] == (good > bad)
        assert "binding" in found.parts and "binding/principle_A_c_command" in found.parts
        assert found.parts["binding"].samples == 7

    def test_shots_are_other_questions_with_their_answers(self, lm, question, monkeypatch):
        asked = []
        loglikelihood = lm.loglikelihood
        monkeypatch.setattr(
            lm, "loglikelihood", lambda reqs: (asked.extend(r.args[0] for r in reqs), loglikelihood(reqs))[1]
        )
        harness.ask(lm, question("arc_easy"), limit=1, shots=2, seed=0)
        for context in asked:
            assert context.endswith("Question: who ran?\nAnswer:")
            assert "Question: what is big?\nAnswer: sun\n\n" in context
            assert "Question: when?\nAnswer: little\n\n" in context

    def test_every_task_file_is_known_by_its_name(self):
        names = harness.local_tasks()
        assert {"arc_easy", "boolq", "blimp", "gsm8k", "humaneval"} <= set(names) and "humaneval_run" not in names
        for name, identity in names.items():
            assert f": {identity}\n" in (FOLDER / f"{name}.yaml").read_text()


class TestRace:
    def test_every_arm_is_scored_and_timed_against_one_token(self, lm, question):
        ways = generation_tasks.arms([0.0, 1.0])
        for way in ways[2:]:
            way.decoding["alpha_c"] = 0.0  # no tables here
        answers, rows = generation_tasks.race(lm, question("triviaqa"), ways, limit=2, shots=1, seed=0)
        assert [row["arm"] for row in rows] == ["one token", "strict", "off, eps_b 1", "off, eps_b 0"]
        assert [row["ceiling"] for row in rows] == [1, 3, 3, 3]
        one, strict, slow, _ = rows
        assert one["tokens_per_step"] == 1 and one["speed_up"] == 1 and one["speed_up_interval"] == [1, 1]
        assert strict["same_text"] == 1 and strict["tokens"] == one["tokens"]
        assert slow["same_text"] == 1  # greedy, one token a step, no penalty: the base's own text
        assert answers["strict"].metrics == answers["one token"].metrics
        assert set(answers["strict"].metrics) == {"exact_match"}

    def test_gsm8k_reads_the_number_behind_the_marks(self, lm, question, monkeypatch):
        writes = iter(["2\n#### 0", "so 2.\n#### 2.", "4 apples"])  # right; right but for the dot; only the last number
        statistics = lm.complete("the", {"max_gen_toks": 2})[1]
        question = question("gsm8k")
        monkeypatch.setattr(lm, "complete", lambda context, asked, **way: (next(writes), statistics))
        found = harness.ask(lm, question, limit=None, shots=0, seed=0)
        assert found.metrics["exact_match, strict-match"]["value"] == pytest.approx(2 / 3)
        assert found.metrics["exact_match, flexible-extract"]["value"] == pytest.approx(1)

    def test_an_eps_b_beyond_one_is_refused(self):
        with pytest.raises(InputError, match=r"--eps-b is 1\.5; give numbers from 0 to 1"):
            generation_tasks.arms([0.5, 1.5])


DOUBLE = {
    "prompt": 'def f(x):\n    """Twice x."""\n',
    "entry_point": "f",
    "test": "def check(f):\n    assert f(2) == 4\n",
}


class TestCode:
    @pytest.mark.parametrize(
        ("text", "valid", "passes"),
        [
            ("    return 2 * x\n", 1, 1),
            ("    return x\n", 1, 0),
            ("    return (x\n", 0, 0),
            ("", 0, 0),  # a docstring alone is no function
            ("    import sys\n    sys.exit(0)\n", 1, 1),  # the harness's own metric has this hole, too
        ],
    )
    def test_scores(self, text, valid, passes):
        assert code.parsed(DOUBLE, [text]) == {"valid": valid}
        if valid:
            assert code.executed(DOUBLE, [text]) == {"pass@1": passes, "valid": valid}

    def test_an_endless_program_is_stopped(self):
        assert not code.succeeds("while True: pass", seconds=0.5)

    def test_humaneval_executes_nothing_unless_told(self, folder):
        (asked,) = harness.questions(["humaneval"], data=folder / "bench")
        assert asked.identity == "local_humaneval"
        (asked,) = harness.questions(["humaneval"], data=folder / "bench", run_code=True)
        assert asked.identity == "local_humaneval_run"


class TestBase:
    def test_a_frozen_model_is_measured_once(self, folder):
        model = DynaMoForCausalLM.from_pretrained(str(folder / "model"))
        base = harness.original_base(model, str(folder / "model"))
        assert base.same and base.model is model.base and base.name == "base"

    def test_a_model_trained_as_a_whole_has_its_recorded_base_beside_it(self, folder, tmp_path):
        model = DynaMoForCausalLM.from_base(str(folder / "base"), num_heads=2)
        with torch.no_grad():
            model.last_layer.mlp.dense_h_to_4h.weight.add_(0.1)
        model.save_pretrained(tmp_path / "joint")
        opened = DynaMoForCausalLM.from_pretrained(str(tmp_path / "joint"))
        base = harness.original_base(opened, str(tmp_path / "joint"))
        assert not base.same and base.name == "base"
        opened.config.base_name_or_path = None
        assert harness.original_base(opened, str(tmp_path / "joint")).model is None

    def test_another_dynamo_model_is_no_base(self, folder):
        model = DynaMoForCausalLM.from_pretrained(str(folder / "model"))
        with pytest.raises(InputError, match="is a DynaMo model itself"):
            harness.original_base(model, str(folder / "model"), str(folder / "model"))


class TestCommand:
    def ask(self, run, folder, *arguments: object, status: int = 0) -> str:
        return run("eval", "nlu", folder / "model", "--data", folder / "bench", *arguments, status=status)

    def test_base_and_model_side_by_side(self, run, folder, tmp_path):
        said = self.ask(run, folder, "--tasks", "arc_easy,local_winogrande", "--limit", 2, "--out", tmp_path / "out")
        assert said.splitlines()[0].split() == ["task", "metric", "base", "DynaMo", "samples"]
        saved = json.loads((tmp_path / "out" / "nlu.json").read_text())
        assert list(saved["tasks"]) == ["arc_easy", "winogrande"]
        entry = saved["tasks"]["arc_easy"]
        assert entry["samples"] == 2 and entry["base"] == entry["dynamo"]
        assert set(entry["dynamo"]["acc"]) == {"value", "stderr"}
        assert saved["settings"]["base"]["same"] is True
        assert run.err == ""

        said = self.ask(run, folder, "--tasks", "lambada_openai,arc_easy", "--limit", 2, "--out", tmp_path / "out", "--json")
        assert list(json.loads(said)["tasks"]) == ["arc_easy", "winogrande", "lambada_openai"]
        assert "Kept from the run before: arc_easy, winogrande." in run.err

    def test_another_base_is_measured_by_itself(self, run, folder):
        said = self.ask(run, folder, "--tasks", "lambada_openai", "--base", folder / "other", "--json")
        entry = json.loads(said)["tasks"]["lambada_openai"]
        assert entry["base"]["perplexity"]["value"] != entry["dynamo"]["perplexity"]["value"]

    def test_texts_have_a_table_of_speeds(self, run, folder, monkeypatch):
        ways = [generation_tasks.Arm(generation_tasks.ONE, {"num_heads": 1}), generation_tasks.Arm("strict", {})]
        monkeypatch.setattr(generation_tasks, "arms", lambda eps_b: ways)
        said = self.ask(run, folder, "--tasks", "triviaqa", "--limit", 2, "--shots", 0)
        assert "triviaqa, 2 texts, greedy: exact_match against speed" in said
        assert said.count("one token") == 2 and "strict" in said

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (("--tasks", "arc_eesy"), 'There is no task "arc_eesy"; give one of arc_challenge'),
            (("--tasks", ","), "--tasks is empty; give one or more of arc_challenge"),
            (("--limit", 0), "--limit is 0; give 1 or more."),
            (("--shots", -1), "--shots is -1; give 0 or more."),
            (("--batch-size", 0), "--batch-size is 0; give 1 or more."),
            (("--tasks", "boolq"), "boolq.jsonl"),
            (("--tasks", "arc_easy", "--base", "nowhere/at-all"), "nowhere/at-all"),
        ],
    )
    def test_bad_input_gets_one_sentence(self, run, folder, arguments, sentence):
        said = run.refused("eval", "nlu", folder / "model", "--data", folder / "bench", *arguments)
        assert sentence in said

    def test_no_benchmarks(self, run, folder):
        assert "name the one with nlu/ and blimp/ by --data" in run.refused(
            "eval", "nlu", folder / "model", "--data", folder / "none"
        )

    def test_a_model_without_heads(self, run, folder):
        said = run.refused("eval", "nlu", folder / "base", "--data", folder / "bench", "--tasks", "arc_easy")
        assert "has no DynaMo heads" in said

    def test_results_of_another_model_are_not_mixed_in(self, run, folder, tmp_path):
        other = {"kind": "nlu", "model": {"name": "x", "identity": "0"}}
        (tmp_path / "nlu.json").write_text(json.dumps(other))
        said = run.refused(
            "eval", "nlu", folder / "model", "--data", folder / "bench", "--tasks", "arc_easy", "--out", tmp_path
        )
        assert "holds results of another model" in said


class TestFiles:
    @pytest.mark.parametrize(
        ("content", "sentence"),
        [
            ("", "is empty"),
            ('{"query": 1}\n{"query"\n', "Line 2 of .* is not valid JSON"),
            ("[1]\n", "Line 1 of .* is not a JSON object"),
        ],
    )
    def test_damaged_files_are_named(self, tmp_path, content, sentence):
        (tmp_path / "x.jsonl").write_text(content)
        with pytest.raises(InputError, match=sentence):
            read(file="x.jsonl", data=tmp_path)

    def test_files_of_other_fields_are_named(self, tmp_path):
        (tmp_path / "nlu").mkdir()
        (tmp_path / "nlu" / "arc_easy.jsonl").write_text('{"question": "why?"}\n')
        with pytest.raises(InputError, match='The file of "arc_easy" does not have the fields'):
            harness.questions(["arc_easy"], data=tmp_path)

    def test_the_real_files_ask_what_the_harness_asks(self):
        try:
            data = bench_folder()
        except InputError as error:
            pytest.skip(str(error))
        expected = {
            "arc_easy": ("Question: Which statement best explains why photosynthesis is", "food webs?\nAnswer:"),
            "boolq": (
                "All biomass goes through at least",
                "\nQuestion: does ethanol take more energy make that produces?\nAnswer:",
            ),
            "piqa": ("Question: How do I ready a guinea pig cage", "new occupants?\nAnswer:"),
            "copa": ("The man turned on the faucet, therefore", "therefore"),
            "openbookqa": ("A person wants to start saving money", "the best way to save money is to"),
            "triviaqa": ("Question: Who was the man behind The Chipmunks?", "\nAnswer:"),
        }
        for name, (begin, end) in expected.items():
            (asked,) = harness.questions([name], data=data)
            (task,) = asked.loaded["tasks"].values()
            text = task.doc_to_text(task.eval_docs[0])
            assert text.startswith(begin) and text.endswith(end), name

    def test_a_story_model_knows_grammar(self):
        """One of BLiMP's simplest paradigms: far above the half that guessing gives."""
        try:
            pairs = read(file="blimp/regular_plural_subject_verb_agreement_1.jsonl")["test"].select(range(24))
        except InputError as error:
            pytest.skip(str(error))
        lm = harness.DynaMoLM(str(bundled()), batch_size=8)
        sides = ("sentence_good", "sentence_bad")
        asked = [instance("loglikelihood", "", " " + pair[side]) for pair in pairs for side in sides]
        scores = [score for score, _ in lm.loglikelihood(asked)]
        assert sum(good > bad for good, bad in zip(scores[::2], scores[1::2], strict=True)) >= 15


def test_the_harness_own_command_line_finds_our_tasks():
    typed = ["--model", "dynamo-lm", "--tasks", "local_arc_easy"]
    assert harness.arguments(typed) == [*typed, "--include_path", str(FOLDER)]
    assert harness.arguments([*typed, "--include_path=mine"]) == [*typed, "--include_path=mine"]
    assert harness.arguments(["ls", "tasks"]) == ["ls", "tasks"]


def asked_as_a_rank(where: str) -> None:
    """A model opened by name is asked, as the harness's command line does; the first rank writes what it found."""
    top = Path(where)
    lm = harness.DynaMoLM(str(top / "model"), batch_size=2)
    (asked,) = harness.questions(["arc_easy"], data=top / "bench")
    with harness.quiet():
        found = harness.evaluate(lm, asked.loaded, bootstrap_iters=0, log_samples=False)
    if lm.rank == 0:
        numbers = {name: value for name, value in found["results"][asked.identity].items() if isinstance(value, float)}
        (top / "found.json").write_text(json.dumps({"ranks": lm.world_size, **numbers}))


def test_ranks_share_the_documents_and_find_what_one_process_finds(folder, tmp_path):
    started = processes.start_ranks(2, asked_as_a_rank, str(folder), folder=tmp_path)
    for rank, process in enumerate(started):
        process.join(120)
        assert process.exitcode == 0, (tmp_path / f"stderr-{rank}").read_text()
    together = json.loads((folder / "found.json").read_text())
    assert together.pop("ranks") == 2
    asked_as_a_rank(str(folder))
    alone = json.loads((folder / "found.json").read_text())
    assert alone.pop("ranks") == 1
    assert together == pytest.approx(alone)
