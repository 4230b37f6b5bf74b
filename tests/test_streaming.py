"""Text that is tokenized while it is trained on: the blocks are those of a plain loop over all of it, from any number on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import processes
import pyarrow
import pyarrow.parquet
import pytest
import torch
from commandline import byte_tokenizer, neox, texts
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import word_tokenizer, write, write_lines

from dynamo_lm.cli.main import BAD_INPUT, main
from dynamo_lm.data import sources
from dynamo_lm.data.packing import Blocks
from dynamo_lm.data.streaming import ENDS, Position, StreamedBlocks, TextStream, WindowLog
from dynamo_lm.errors import InputError

WORDS = {"<unk>": 0, "<eos>": 1, "<bos>": 2} | {f"w{number}": number for number in range(3, 40)}
TOKENIZER = word_tokenizer(WORDS)


def ids(text: str) -> list[int]:
    return [WORDS[word] for word in text.split()] + [1]


def reference(shards: list[list[str]], number: int, window: int, block_size: int, seed: int) -> list[np.ndarray]:
    """Block `number`: all text of as many epochs as it takes in one list, cut into windows and each of them into blocks."""
    which, index = divmod(number, window // block_size)
    tokens: list[int] = []
    borders = [0]  # of documents
    epoch = 0
    while len(tokens) < (which + 1) * window:
        for shard in np.random.default_rng((seed, epoch, 1)).permutation(len(shards)):
            for text in shards[shard]:
                if text.strip():
                    tokens += ids(text)
                    borders.append(len(tokens))
        epoch += 1
    begin, end = which * window, (which + 1) * window
    inside = [begin, *(border for border in borders if begin < border < end), end]
    store: Any = SimpleNamespace(tokens=np.array(tokens[begin:end]), offsets=np.array(inside) - begin, responses=None)
    return list(Blocks(store, np.arange(len(inside) - 1), block_size, seed=seed).block(which, index))


def write_shards(folder: Path, shards: list[list[str]]) -> list[str]:
    return [write_lines(folder / f"{number}.jsonl", *texts) for number, texts in enumerate(shards)]


def streamed(paths: list[str], window: int, block_size: int, log: Path, *, resume: bool = False, **options: Any):
    stream = TextStream(paths, TOKENIZER, window, seed=options.pop("seed", 0), **options)
    return StreamedBlocks(WindowLog(stream, log, resume=resume).window, window, block_size, seed=stream.seed)


def blocks_of(blocks: StreamedBlocks, numbers: range) -> list[list[list[int]]]:
    blocks.prepare(numbers)
    rows = blocks.rows(numbers)
    return [[rows[name][i].tolist() for name in Blocks.names] for i in range(len(numbers))]


document = st.lists(st.integers(3, 39), max_size=12).map(lambda numbers: " ".join(f"w{number}" for number in numbers))
corpora = st.lists(st.lists(document, max_size=5), min_size=1, max_size=4).filter(
    lambda shards: any(text for shard in shards for text in shard)
)


@settings(max_examples=25)
@given(corpora, st.integers(1, 4), st.integers(1, 9), st.integers(0, 3), st.integers(0, 30), st.integers(1, 7))
def test_blocks_are_those_of_a_plain_loop_and_of_a_run_that_resumes(
    tmp_path_factory, shards, per_window, block_size, seed, begin, batch
):
    folder, window = tmp_path_factory.mktemp("stream"), per_window * block_size
    paths = write_shards(folder, shards)
    expected = [
        [part.tolist() for part in reference(shards, number, window, block_size, seed)]
        for number in range(begin, begin + batch)
    ]
    numbers, log = range(begin, begin + batch), folder / "log.jsonl"
    assert blocks_of(streamed(paths, window, block_size, log, seed=seed), numbers) == expected
    assert blocks_of(streamed(paths, window, block_size, log, seed=seed, resume=True), numbers) == expected
    log.unlink()  # it only saves reading
    again = streamed(paths, window, block_size, log, seed=seed, resume=True)
    assert blocks_of(again, numbers) == expected
    assert blocks_of(again, range(batch)) == blocks_of(streamed(paths, window, block_size, log, seed=seed), range(batch))


def test_every_epoch_has_every_token_once_and_shards_in_another_order(tmp_path):
    shards = [[f"w{3 + 4 * shard + i}" for i in range(4)] for shard in range(8)]  # 64 tokens with their ends
    blocks = streamed(write_shards(tmp_path, shards), 64, 8, tmp_path / "log")
    epochs = [blocks_of(blocks, range(8 * epoch, 8 * epoch + 8)) for epoch in range(3)]
    flat = [[token for tokens, _, _ in blocks for token in tokens] for blocks in epochs]
    assert all(sorted(tokens) == sorted([*range(3, 35), *[1] * 32]) for tokens in flat)
    assert flat[0] != flat[1] != flat[2]


def test_a_run_that_resumes_reads_only_the_shards_from_where_it_stopped(tmp_path):
    shards = [[" ".join([f"w{3 + shard}"] * 99)] * 1000 for shard in range(6)]  # 100,000 tokens each
    paths, log = write_shards(tmp_path, shards), tmp_path / "log"
    before = blocks_of(streamed(paths, 50_000, 25_000, log), range(16, 20))
    order = np.random.default_rng((0, 0, 1)).permutation(6)
    for shard in order[:3]:  # blocks 16.. begin where the fourth ends
        content = bytearray(Path(paths[shard]).read_bytes())
        content[ENDS:-ENDS] = b"x" * (len(content) - 2 * ENDS)
        Path(paths[shard]).write_bytes(content)
    assert blocks_of(streamed(paths, 50_000, 25_000, log, resume=True), range(16, 20)) == before


def test_text_is_read_no_further_than_a_batch_beyond_the_next_window(tmp_path):
    lines = "".join(json.dumps({"text": f"w{3 + i % 30}"}) + "\n" for i in range(4000))
    path = write(tmp_path / "a.jsonl", lines + "no JSON\n")
    blocks = streamed([path], 100, 10, tmp_path / "log")
    assert len(blocks_of(blocks, range(300))) == 300  # 1,500 documents; the tokenizer takes 1,000 at a time
    with pytest.raises(InputError, match=r"a\.jsonl is not JSON at line 4001"):
        blocks_of(blocks, range(300, 1000))


def test_json_lines_parquet_and_data_sets_of_the_hub_are_the_same_stream(tmp_path, monkeypatch):
    shards = [[f"w{3 + i}", "", f"w{4 + i} w{5 + i}"] for i in range(0, 12, 3)]
    lines = write_shards(tmp_path / "lines", shards)
    tables = [str(tmp_path / f"{number}.parquet") for number in range(len(shards))]
    for path, texts_ in zip(tables, shards, strict=True):
        pyarrow.parquet.write_table(pyarrow.table({"id": [0, 1, 2], "text": texts_}), path)
    opened = datasets.load_dataset

    def load_dataset(name: str, *, split: str, streaming: bool):  # as a data set of the hub opens, from files that are here
        assert (name, split) == ("owner/name", "train")
        return opened("parquet", data_files=tables, split=split, streaming=streaming, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [shard.number for shard in sources.shards("owner/name")] == list(range(4))
    numbers = range(7, 20)
    found = [
        blocks_of(streamed(paths, 12, 4, tmp_path / f"log-{i}"), numbers)
        for i, paths in enumerate((lines, tables, ["owner/name"], [str(tmp_path / "lines")]))
    ]
    assert found[0] == found[1] == found[2] == found[3]
    assert blocks_of(streamed(["owner/name"], 12, 4, tmp_path / "log-2", resume=True), range(15, 20)) == found[0][-5:]
    hub = sources.Shard("owner/name", None, 3, 4)
    assert list(hub.texts()) == shards[3] and list(hub.texts(start=1)) == shards[3][1:]


def test_held_out_documents_are_never_trained_on(tmp_path):
    shards = [[f"w{3 + (7 * shard + i) % 36}" for i in range(12)] for shard in range(3)]
    paths = write_shards(tmp_path, shards)
    stream = TextStream(paths, TOKENIZER, 36, seed=1, held_out=0.3)
    held_out = list(stream.held_out_texts())
    assert 3 < len(held_out) < 18
    trained = {token for i in range(3) for token in stream.read(Position(epoch=i))[0].tokens.tolist()} - {1}
    assert trained.isdisjoint(WORDS[text] for text in held_out)
    assert trained | {WORDS[text] for text in held_out} == {WORDS[text] for shard in shards for text in shard}


def test_the_tokens_of_the_first_window_stand_for_those_of_the_text(tmp_path):
    blocks = streamed(write_shards(tmp_path, [["w3 w3 w4"], ["w3 w3 w4"]]), 4, 2, tmp_path / "log")
    blocks.prepare(range(10, 12))
    assert blocks.learned_counts(6).tolist() == [0, 1, 0, 2, 1, 0]
    assert blocks.learned_counts(6).dtype == torch.int64


# --- bad input ------------------------------------------------------------------


def test_a_shard_that_changed_after_it_was_read_is_refused(tmp_path):
    line = json.dumps({"text": "w3 w4 w5"}) + "\n"
    path = Path(write(tmp_path / "a.jsonl", 10_000 * line))
    log = tmp_path / "log"
    blocks_of(streamed([str(path)], 10, 5, log), range(3998, 4000))
    middle = 4999 * line + line.replace("w4", "w7") + 5000 * line  # of the same size, and the same at both ends
    for changed in (path.read_text() + line, path.read_text().replace("w4", "w7", 1)):
        path.write_text(changed)
        with pytest.raises(InputError, match='log" is of other text or of another --look-ahead or --seed'):
            streamed([str(path)], 10, 5, log, resume=True)
    path.write_text(middle)
    with pytest.raises(InputError, match=r"The text is not what it was .* \(window 2,000 of 10 tokens differs\)"):
        blocks_of(streamed([str(path)], 10, 5, log, resume=True), range(3998, 4000))
    streamed([str(path)], 10, 5, log)  # a new run


def test_a_log_of_another_window_and_a_damaged_one_are_refused(tmp_path):
    paths, log = write_shards(tmp_path, [["w3 w4 w5"] * 20]), tmp_path / "log"
    blocks_of(streamed(paths, 10, 5, log), range(4))
    for options in ({"window": 20}, {"window": 10, "seed": 1}):
        with pytest.raises(InputError, match="of another --look-ahead or --seed"):
            streamed(paths, options.pop("window"), 5, log, resume=True, **options)
    whole = log.read_text()
    log.write_text(whole[:-9])  # the last line was cut off by a kill
    blocks_of(streamed(paths, 10, 5, log, resume=True), range(4))
    head, first, *others = whole.splitlines(keepends=True)
    for damaged in (
        first + "".join(others),
        "".join([head, *others, first]),
        whole.replace("next", "ne}xt", 1),
        whole.replace('{"window": 0', "window 0"),
        whole.replace("[0, 0, 2, 2]", '["a", 0]'),
        whole.replace("[0, 0, 2, 2]", "[0, 0, -2, 2]"),
    ):
        assert damaged != whole
        log.write_text(damaged)
        with pytest.raises(InputError, match='log" is damaged; delete it'):
            streamed(paths, 10, 5, log, resume=True)


@pytest.mark.parametrize(
    "files, message",
    [
        ({"a.parquet": b"PAR1 and no more"}, r"a\.parquet is not a readable Parquet file"),
        ({"a.jsonl": '{"text": "w3"}\n', "b.jsonl": '{"story": "w3", "id": "1"}\n'}, r"b\.jsonl, line 1: no field 'text'"),
        ({"a.jsonl": '{"text": 3}\n'}, r"a\.jsonl, line 1: the field 'text' is int, not text"),
        ({"a.jsonl": '{"text": "w3"', "b.jsonl": '{"text": "w3"}\n'}, r"a\.jsonl is not JSON at line 1"),
    ],
)
def test_a_broken_shard_is_one_sentence_before_the_first_step(tmp_path, files, message):
    for name, content in files.items():
        write(tmp_path / "text" / name, content)
    with pytest.raises(InputError, match=message):
        TextStream([str(tmp_path / "text")], TOKENIZER, 10, seed=0).check()


def test_a_parquet_file_that_was_cut_off_is_refused_and_empty_shards_are_none(tmp_path):
    whole = tmp_path / "text" / "b.parquet"
    whole.parent.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["w3"] * 500}), whole)
    pyarrow.parquet.write_table(
        pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "text" / "a.parquet"
    )
    write(tmp_path / "text" / "c.jsonl", "")
    stream = TextStream([str(tmp_path / "text")], TOKENIZER, 10, seed=0)
    stream.check()
    assert stream.read(Position())[0].tokens.tolist() == [3, 1] * 5
    whole.write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"b\.parquet is not a readable Parquet file"):
        stream.check()


def test_text_without_a_document_to_train_on_is_refused(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", "", "  ")
    with pytest.raises(InputError, match=r"a\.jsonl holds no document with any text to train on"):
        blocks_of(streamed([path], 10, 5, tmp_path / "log"), range(1))
    with pytest.raises(InputError, match="No document is held out to measure on"):
        list(TextStream([path], TOKENIZER, 10, seed=0, held_out=0.5).held_out_texts())
    with pytest.raises(InputError, match="must be at least 0 and below 1, not 1"):
        TextStream([path], TOKENIZER, 10, seed=0, held_out=1.0)
    with pytest.raises(InputError, match=r'missing\.jsonl" does not exist'):
        TextStream([str(tmp_path / "missing.jsonl")], TOKENIZER, 10, seed=0)


# --- the command ----------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a base and three shards."""
    folder = tmp_path_factory.mktemp("made")
    neox().save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    for shard in range(3):
        write_lines(folder / "text" / f"{shard}.jsonl", *texts(20, seed=shard))
    return folder


def train(made: Path, out: Path, *options: str) -> int:
    line = [
        "train",
        str(made / "base"),
        "--data",
        str(made / "text"),
        "--streaming",
        "--look-ahead",
        "600",
        "--out",
        str(out),
    ]
    line += ["--freeze", "--block-size", "32", "--batch-size", "4", "--validation-fraction", "0.2"]
    return main([*line, *options])


def losses(folder: Path) -> list[list[float]]:
    return [json.loads(line)["losses"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_stream_trains_and_resumes_to_the_same_losses(made, tmp_path, capfd):
    steps = ("--steps", "30", "--checkpoint-every", "10")
    assert train(made, tmp_path / "whole", *steps) == 0
    record = json.loads((tmp_path / "whole" / "training.json").read_text())
    assert record["data"]["look_ahead"] == 576 and record["data"]["training_tokens"] is None
    assert record["data"]["validation_tokens"] > 0 and "PPL_1" in record["perplexities"]
    assert train(made, tmp_path / "parts", *steps) == 0
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-00000030")  # as if it had been killed after step 20
    capfd.readouterr()
    assert train(made, tmp_path / "parts", "--look-ahead", "1000", *steps) == BAD_INPUT
    assert "of other text or of another --look-ahead or --seed" in capfd.readouterr().err
    assert train(made, tmp_path / "parts", *steps) == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "A stream does not tell how long it is; give --steps with --streaming."),
        (["--epochs", "1"], "give --steps with --streaming"),
        (["--steps", "2", "--dry-run"], "leave --streaming out"),
        (["--steps", "2", "--look-ahead", "0"], "--look-ahead is 0; give the number of tokens"),
        (["--steps", "2", "--feature-cache", "1"], "--feature-cache keeps blocks that come again"),
        (["--steps", "2", "--validation-fraction", "0.0001"], "No document is held out to measure on"),
        (["--steps", "2", "--text-field", "story"], "no field 'story'; its fields are 'text'"),
    ],
)
def test_what_a_stream_cannot_do_is_one_sentence(made, tmp_path, capfd, options, message):
    assert train(made, tmp_path / "run", *options) == BAD_INPUT
    error = capfd.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_shard_that_breaks_in_the_middle_ends_every_rank_with_one_sentence(made, tmp_path):
    lines = [json.dumps({"text": text}) + "\n" for text in texts(40)]
    bad = write(tmp_path / "text" / "bad.jsonl", "".join(lines * 26) + "[\n")  # beyond what the first window reads
    line = ["train", str(made / "base"), "--data", bad, "--streaming", "--look-ahead", "600", "--out", str(tmp_path / "run")]
    line += ["--freeze", "--block-size", "32", "--batch-size", "64", "--validation-fraction", "0", "--steps", "1000"]
    started = processes.start_ranks(2, processes.command, *line, "--threads", "1", folder=tmp_path)
    for process in started:
        process.join(timeout=300)
    errors = [(tmp_path / f"stderr-{rank}").read_text() for rank in range(2)]
    assert [process.exitcode for process in started] == [BAD_INPUT, BAD_INPUT], errors
    assert all("bad.jsonl is not JSON at line 1041" in error and "Traceback" not in error for error in errors), errors
    assert len(losses(tmp_path / "run")) > 5  # what could be read was trained on
