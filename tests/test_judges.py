"""Judges: a reference model whose probabilities are known by hand, and an endpoint that is a real server on this machine."""

import itertools
import json
import math
import random
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from architectures import NAMES, base_of, markov_base, random_tokens
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertLMHeadModel, PreTrainedTokenizerFast

from dynamo_lm.errors import InputError
from dynamo_lm.evaluation.judges.endpoint import SCORE, VERDICT, EndpointJudge, _parse
from dynamo_lm.evaluation.judges.judges import Pair, ReferenceJudge, sanity, shuffle_words, wilson
from dynamo_lm.evaluation.judges.likelihoods import Reader, Text
from dynamo_lm.jsonl_cache import JsonlCache

LETTERS = ["<s>", "a", "b", "é"]
# Behind a comes b with 3/4, behind b comes a with 1/2; é is anybody's with 1/8 and 1/4, as after itself.
TRANSITION = torch.tensor(
    [[1 / 8, 1 / 2, 1 / 4, 1 / 8], [1 / 16, 1 / 16, 3 / 4, 1 / 8], [1 / 8, 1 / 2, 1 / 8, 1 / 4], [1 / 4] * 4]
)


@pytest.fixture(scope="session")
def letters(tmp_path_factory):
    """A folder with that chain and a tokenizer of one token a letter."""
    folder = tmp_path_factory.mktemp("reference") / "letters"
    markov_base(TRANSITION, context=16).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({letter: number for number, letter in enumerate(LETTERS)}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>").save_pretrained(folder)
    return folder


def reference(letters, **options) -> ReferenceJudge:
    return ReferenceJudge(str(letters), device="cpu", **options)


# ---------------------------------------------------------------------- the reference judge


def test_log_likelihood_is_nats_per_byte_of_the_completion_alone(letters):
    found = reference(letters).log_likelihoods([("a", "ba"), ("bb", "é"), ("a", ""), ("", "ab")])
    assert found[0] == pytest.approx((math.log(3 / 4) + math.log(1 / 2)) / 2, abs=1e-5)
    assert found[1] == pytest.approx(math.log(1 / 4) / 2, abs=1e-5)  # two bytes
    assert found[2] is None
    assert found[3] == pytest.approx((math.log(1 / 2) + math.log(3 / 4)) / 2, abs=1e-5)  # starts from <s>


def test_log_likelihoods_do_not_depend_on_the_batch(letters):
    rng = random.Random(0)
    items = [("a", "".join(rng.choices("abé", k=rng.randint(1, 12)))) for _ in range(40)]
    assert reference(letters, batch_size=7).log_likelihoods(items) == reference(letters, batch_size=1).log_likelihoods(items)


def test_a_long_prompt_loses_its_beginning_and_a_long_completion_has_no_likelihood(letters):
    found = reference(letters).log_likelihoods([("ab" * 20, "a"), ("a", "b" * 16), ("a", "b" * 15)])
    assert found[0] == pytest.approx(math.log(1 / 2), abs=1e-5)
    assert found[1] is None
    assert found[2] is not None


def test_the_likelier_completion_wins_and_a_small_difference_is_a_tie(letters):
    pairs = [Pair("a", "b", "a"), Pair("a", "a", "b"), Pair("a", "b", "b"), Pair("a", "b", "")]
    assert reference(letters).pairs(pairs) == [1, -1, 0, None]
    assert reference(letters, tie=3.0).pairs(pairs) == [0, 0, 0, None]
    assert reference(letters, tie=0).pairs(pairs) == [1, -1, 0, None]


def test_a_single_score_is_the_share_of_the_base_models_own_texts_that_it_beats(letters):
    judge = reference(letters)
    assert judge.singles([("a", "b")]) == [None]
    judge.set_pool([("a", "b"), ("a", "é"), ("a", "a"), ("b", "a")])
    # of 3/4, 1/8 and 1/16 behind a
    assert judge.singles([("a", "b"), ("a", "é"), ("a", "a")]) == pytest.approx([1 + 7.5, 1 + 4.5, 1 + 1.5], abs=0.01)
    assert judge.singles([("é", "a"), ("a", "")]) == [None, None]


def test_what_was_computed_is_read_from_disk(letters, tmp_path):
    items = [("a", "ba"), ("a", "é"), ("a", "")]
    first = reference(letters, cache=tmp_path / "seen.jsonl")
    values, features = first.log_likelihoods(items), first.features(items)
    again = reference(letters, cache=tmp_path / "seen.jsonl")
    size = (tmp_path / "seen.jsonl").stat().st_size
    assert again.log_likelihoods(items) == values
    assert np.array_equal(again.features(items), features)
    assert (tmp_path / "seen.jsonl").stat().st_size == size
    assert "ba" not in [json.loads(line)["value"] for line in (tmp_path / "seen.jsonl").read_text().splitlines()]


def test_features_are_unit_means_of_the_completions_states(letters):
    found = reference(letters).features([("a", "bb"), ("a", "ab"), "ab", ("a", "")])
    assert found.shape == (4, 4)
    assert found[0] == pytest.approx([0, 0, 1, 0], abs=1e-3)  # one-hot embeddings
    assert found[1] == pytest.approx([0, 0.5**0.5, 0.5**0.5, 0], abs=1e-3)
    assert found[2] == pytest.approx(found[1], abs=1e-3)
    assert found[3] == pytest.approx([0, 0, 0, 0])


def test_progress_ends_at_the_number_of_pairs(letters):
    seen: list[int] = []
    reference(letters, batch_size=2).pairs([Pair("a", "b" * n, "a" * n) for n in range(1, 5)], progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 4


@pytest.mark.parametrize("name", NAMES)
def test_reading_in_batches_equals_each_architectures_own_logits(name):
    model = base_of(name)
    texts = [Text(random_tokens(length, seed=length).tolist(), [length - 4, length - 1]) for length in (5, 9, 20)]
    reader = Reader(model, name)
    assert reader._readout is not None
    for text, (total, _) in zip(texts, reader.read(texts), strict=True):
        with torch.inference_mode():
            rows = model(torch.tensor([text.ids])).logits[0].log_softmax(-1)
        assert total == pytest.approx(float(sum(rows[place - 1, text.ids[place]] for place in text.scored)), abs=1e-3)


def test_a_model_that_cannot_be_taken_apart_is_used_as_a_whole():
    model = base_of("llama")
    texts = [Text(random_tokens(9, seed=seed).tolist(), [3, 8]) for seed in (1, 2)]
    parts, whole = Reader(model, "x"), Reader(model, "x")
    whole._readout = None
    for (mine, state), (theirs, other) in zip(parts.read(texts), whole.read(texts), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)
        assert state == pytest.approx(other, abs=1e-4)


def test_a_model_that_looks_ahead_is_refused():
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = BertLMHeadModel(BertConfig(**sizes)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.5, generator=generator)
    with pytest.raises(InputError, match="later words"):
        Reader(model, "bert")


def test_unusable_references_are_refused(letters, tmp_path):
    with pytest.raises(InputError, match="tie is -1"):
        reference(letters, tie=-1)
    with pytest.raises(InputError, match="batch size is 0"):
        reference(letters, batch_size=0)
    with pytest.raises(InputError, match="no config"):
        reference(tmp_path)
    markov_base(TRANSITION).save_pretrained(tmp_path / "bare")
    with pytest.raises(InputError, match="no tokenizer"):
        reference(tmp_path / "bare")


# ---------------------------------------------------------------------- sanity


class Opinion:
    """A judge with a rule instead of a model."""

    name, caveat = "opinion", "none"

    def __init__(self, rule):
        self.rule = rule

    def pairs(self, items, *, progress=None):
        return [self.rule(pair.first, pair.second) for pair in items]

    def singles(self, items, *, progress=None):
        return [None for _ in items]


def samples(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Sentences whose words rise, of random length."""
    rng = random.Random(seed)
    return [("Count:", " " + " ".join(sorted(rng.sample("abcdefghijklmnop", 8)))) for _ in range(count)]


def order(first: str, second: str) -> int:
    def rising(text):
        words = text.split()
        return sum(a < b for a, b in itertools.pairwise(words))

    return (rising(first) > rising(second)) - (rising(first) < rising(second))


def test_a_judge_that_sees_order_is_useful():
    found = sanity(Opinion(order), samples(40), samples(40, seed=1), seed=0)
    assert found["useful"]
    assert found["shuffled"] == {
        "wins": 40, "ties": 0, "losses": 0, "unusable": 0, "share": 1.0, "interval": wilson(40, 40)
    }  # fmt: skip
    assert found["same"]["ties"] == 40
    assert found["same"]["share"] == 0.5


@pytest.mark.parametrize(
    ("rule", "count", "reason"),
    [
        (lambda first, second: 1, 40, "shuffled words in"),  # always the first: sides are drawn, so half of the time
        (lambda first, second: 0, 40, "shuffled words in 50%"),
        (lambda first, second: -order(first, second), 40, "shuffled words in 0%"),
        (lambda first, second: None, 40, "no usable verdict for 40 of 40 pairs of shuffled words"),
        (lambda first, second: order(first, second) or 1, 40, "favourite side"),
        (lambda first, second: order(first, second) or None, 40, "for 40 of 40 pairs of two samples"),
        (order, 10, "With 10 texts .* too uncertain"),
        (order, 0, "for 0 of 0 pairs"),
    ],
)
def test_a_judge_that_cannot_tell_is_useless_and_says_why(rule, count, reason):
    found = sanity(Opinion(rule), samples(count), samples(count, seed=1), seed=0)
    assert not found["useful"]
    assert re.search(reason, found["reason"]), found["reason"]


def test_sanity_is_the_same_for_the_same_seed_and_wants_the_same_prompts():
    rule = Opinion(lambda first, second: 1 if first < second else -1)
    assert sanity(rule, samples(30), samples(30, 1), seed=3) == sanity(rule, samples(30), samples(30, 1), seed=3)
    with pytest.raises(InputError, match="different prompts"):
        sanity(rule, [("a", "b")], [("b", "b")], seed=0)


def test_sanity_gives_a_reference_its_pool(letters):
    judge = reference(letters)
    sanity(judge, [("a", "b")], [("a", "é")], seed=0)
    assert judge.singles([("a", "b")]) == [pytest.approx(1 + 9 * 0.75)]


@given(st.text("ab \n", max_size=20), st.integers(0, 99))
def test_shuffled_text_has_the_same_words_and_the_same_white_space(text, seed):
    mixed = shuffle_words(text, random.Random(seed))
    if len(set(text.split())) < 2:
        assert mixed is None
    else:
        assert mixed != text
        assert Counter(mixed.split()) == Counter(text.split())
        assert "".join(c for c in mixed if c.isspace()) == "".join(c for c in text if c.isspace())


def test_wilson_against_published_values():
    assert wilson(81, 263) == pytest.approx([0.2553, 0.3662], abs=1e-4)  # Newcombe 1998, table I, method 3
    assert wilson(15, 148) == pytest.approx([0.0624, 0.1605], abs=1e-4)
    assert wilson(0, 20) == pytest.approx([0.0, 0.1611], abs=1e-4)
    assert wilson(0, 0) is None


# ---------------------------------------------------------------------- an endpoint


class Server(ThreadingHTTPServer):
    """Chat completions whose answers are a function of the question; a status other than 200 is an error's."""

    daemon_threads = True

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.questions, self.stop = answer, [], threading.Event()
        self.bodies, self.keys = [], []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        server.questions.append(body["messages"][0]["content"])
        server.bodies.append(body)
        server.keys.append(self.headers["Authorization"])
        answer = server.answer(body)
        if answer is None:  # never
            server.stop.wait(20)
            return
        status, content = answer if isinstance(answer, tuple) else (200, answer)
        if isinstance(content, str) and status == 200:
            content = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [
                {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}]}  # fmt: skip
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status != 200:
            self.send_header("Retry-After-Ms", "1")  # openai's client would wait seconds before it asks again
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(monkeypatch):
    """Starts servers, ends them."""
    monkeypatch.setenv("JUDGE_KEY", "sk-secret-0123456789")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers = []

    def start(answer) -> Server:
        servers.append(Server(answer))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.stop.set()
        server.shutdown()
        server.server_close()


def endpoint(server, **options) -> EndpointJudge:
    options = {"key_from": "JUDGE_KEY", "retries": 0, "timeout": 10} | options
    return EndpointJudge("tiny", base_url=server if isinstance(server, str) else server.url, **options)


def error(code: str, message: str = "no", **more) -> dict:
    return {"error": {"message": message, "type": code, "code": code, "param": None} | more}


def shown(body) -> tuple[str, str]:
    """The texts A and B of a question."""
    question = body["messages"][0]["content"]
    first = question.split("=== TEXT A ===\n")[1].split("\n=== TEXT B ===")[0]
    return first, question.split("=== TEXT B ===\n")[1].split("\n=== END")[0]


def longer(body) -> str:
    first, second = shown(body)
    return "Length.\nVerdict: " + ("tie" if len(first) == len(second) else "A" if len(first) > len(second) else "B")


def test_pairs_are_asked_in_both_orders_and_agreement_counts(serve):
    server = serve(longer)
    judge = endpoint(server)
    assert judge.pairs([Pair("p", "long text", "text"), Pair("p", "a", "bcd"), Pair("p", "one", "two")]) == [1, -1, 0]
    assert Counter(map(shown, server.bodies)) == Counter(
        [("long text", "text"), ("text", "long text"), ("a", "bcd"), ("bcd", "a"), ("one", "two"), ("two", "one")]
    )
    assert server.bodies[0]["temperature"] == 0
    assert server.keys[0] == "Bearer sk-secret-0123456789"


def test_a_favourite_side_makes_ties_and_equal_texts_are_not_asked(serve):
    server = serve(lambda body: "Verdict: A")
    assert endpoint(server).pairs([Pair("p", "x", "y"), Pair("p", "x", "x")]) == [0, 0]
    assert len(server.bodies) == 2


def test_which_order_comes_first_depends_on_the_texts(serve):
    server = serve(longer)
    pairs = [Pair("p", f"{number}", f"{number}!") for number in range(20)]
    endpoint(server).pairs(pairs)
    first = {shown(body)[0].endswith("!") for body in server.bodies[::2]}
    assert first == {True, False}


def test_singles_are_scores_and_the_question_names_the_criteria(serve):
    server = serve(lambda body: "Fine.\n\nScore: 7")
    assert endpoint(server).singles([("Once", " upon {a} time")]) == [7.0]
    assert "=== TEXT ===\n upon {a} time\n" in server.questions[0]
    for word in ("grammar", "creativity", "depth", "logical flow", "coherence", "informativeness"):
        assert word in server.questions[0]


@pytest.mark.parametrize(
    ("answer", "value"),
    [("Score: 1", 1), ("why\n**Score: 10/10**\n", 10), ("score: 7.5", 7.5), ("Score: 11", None), ("Score: 0", None),
     ("Score: 7\nbut then again", None), ("Score: -3", None), ("I give it 7", None), ("", None), ("```\nScore: 3\n```", 3)],
)  # fmt: skip
def test_scores_are_read_from_the_last_line_only(answer, value):
    assert _parse(answer, SCORE) == value


@pytest.mark.parametrize(
    ("answer", "value"),
    [("Verdict: A", 1), ("x\nVerdict: B.", -1), ("**Verdict:** tie", 0), ("Verdict: Text A", 1), ("Verdict: C", None),
     ("Verdict: A or B", None), ("Verdict: A\nVerdict: B", -1), ("A", None)],
)  # fmt: skip
def test_verdicts_are_read_from_the_last_line_only(answer, value):
    assert _parse(answer, VERDICT) == value


def test_garbage_is_asked_once_more_and_then_is_no_verdict_and_is_not_paid_again(serve, tmp_path):
    answers = iter(["what?", "Score: 5", "what?", "who?"])
    server = serve(lambda body: next(answers))
    judge = endpoint(server, cache=tmp_path / "said.jsonl")
    assert judge.singles([("p", "one"), ("p", "two")]) == [5.0, None]
    assert endpoint(server, cache=tmp_path / "said.jsonl").singles([("p", "one"), ("p", "two")]) == [5.0, None]
    assert len(server.bodies) == 4


@pytest.mark.parametrize("reply", [b"<html>", {"choices": []}, {}, [], {"choices": [{"message": {}}]}, {"choices": [None]}])
def test_a_reply_that_is_no_chat_completion_is_garbage(serve, reply):
    server = serve(lambda body: (200, reply))
    assert endpoint(server).singles([("p", "x")]) == [None]
    assert len(server.bodies) == 2


def test_a_stopped_run_resumes_without_asking_twice(serve, tmp_path):
    quota = [4]  # requests

    def answer(body):
        quota[0] -= 1
        return longer(body) if quota[0] >= 0 else (429, error("insufficient_quota"))

    server = serve(answer)
    pairs = [Pair("p", "x" * number, "y") for number in range(2, 6)]
    with pytest.raises(InputError, match=r"quota of this key is used up.*kept.*run the same command again"):
        endpoint(server, cache=tmp_path / "said.jsonl").pairs(pairs)
    quota[0] = 100
    assert endpoint(server, cache=tmp_path / "said.jsonl").pairs(pairs) == [1, 1, 1, 1]
    assert quota[0] == 100 - 4  # two pairs were known


def test_a_stop_by_the_user_keeps_what_was_said(serve, tmp_path):
    server = serve(longer)

    def stop(done):
        if done == 2:
            raise KeyboardInterrupt

    pairs = [Pair("p", "x" * number, "y") for number in range(2, 6)]
    with pytest.raises(KeyboardInterrupt):
        endpoint(server, cache=tmp_path / "said.jsonl").pairs(pairs, progress=stop)
    assert len(JsonlCache(tmp_path / "said.jsonl")) == 4


def test_a_server_that_hangs_is_named(serve):
    server = serve(lambda body: None)
    with pytest.raises(InputError, match=r"no answer within 0.3 seconds, 1 times"):
        endpoint(server, timeout=0.3).singles([("p", "x")])


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (401, error("invalid_api_key", "Incorrect API key: sk-secret-0123456789"), "refuses the key in JUDGE_KEY"),
        (403, error("forbidden"), "refuses the key in JUDGE_KEY"),
        (404, error("model_not_found"), 'no model "tiny"'),
        (429, error("rate_limit_exceeded"), "over its rate limit after 0 retries"),
        (500, error("server_error", "sk-secret-0123456789 broke"), r"status 500 \(.*\*\*\* broke"),
        (400, error("bad", "too long"), r"status 400 \(.*too long"),
    ],
)
def test_an_endpoint_that_will_not_answer_is_named_and_the_key_is_not_shown(serve, tmp_path, status, body, message):
    server = serve(lambda _: (status, body))
    with pytest.raises(InputError, match=message) as raised:
        endpoint(server, cache=tmp_path / "said.jsonl").singles([("p", "x")])
    assert "sk-secret" not in str(raised.value)
    assert not (tmp_path / "said.jsonl").exists()


def test_a_passing_failure_is_asked_again(serve):
    answers = iter([(500, error("server_error")), "Score: 4"])
    server = serve(lambda body: next(answers))
    assert endpoint(server, retries=1).singles([("p", "x")]) == [4.0]


def test_options_that_a_model_does_not_take_are_left_out(serve):
    def answer(body):
        for name in ("max_tokens", "temperature"):
            if name in body:
                return 400, error("unsupported_parameter", f"'{name}' is not supported with this model.", param=name)
        return "Score: 6"

    server = serve(answer)
    assert endpoint(server).singles([("p", "x"), ("p", "y")]) == [6.0, 6.0]
    assert len(server.bodies) == 4


def test_nobody_listening_is_named():
    with pytest.raises(InputError, match=r"at http://127.0.0.1:9/v1 cannot be reached"):
        endpoint("http://127.0.0.1:9/v1", key_from=None).singles([("p", "x")])


def test_the_key_is_nowhere_on_disk(serve, tmp_path):
    endpoint(serve(longer), cache=tmp_path / "said.jsonl").pairs([Pair("p", "x", "yy")])
    assert "sk-secret" not in (tmp_path / "said.jsonl").read_text()


def test_unusable_options_of_an_endpoint_are_refused(monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(InputError, match="environment variable JUDGE_KEY"):
        endpoint("http://localhost/v1")
    for options in ({"timeout": 0}, {"retries": -1}, {"requests_per_minute": 0}, {"price_in": -1.0}):
        with pytest.raises(InputError):
            endpoint("http://localhost/v1", key_from=None, **options)
    for url in ("localhost:80", "http://me:secret@localhost/v1"):
        with pytest.raises(InputError, match="URL"):
            endpoint(url, key_from=None)


def test_an_estimate_names_requests_tokens_and_cost():
    judge = endpoint("http://localhost/v1", key_from=None, price_in=1.0, price_out=2.0, requests_per_minute=60)
    found = judge.estimate(10, 5, 400)
    assert found["requests"] == 25
    assert found["tokens_out"] == 25 * 50
    assert found["tokens_in"] >= (20 * 800 + 5 * 400) / 4
    assert found["cost"] == pytest.approx((found["tokens_in"] + 2 * found["tokens_out"]) / 1e6)
    assert found["minutes"] == pytest.approx(25 / 60)
    assert endpoint("http://localhost/v1", key_from=None).estimate(1, 1, 1)["cost"] is None
