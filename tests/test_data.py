"""Text to tokens on disk (`data`) and tokens to packed blocks and labels (`packing`)."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dynamo_lm.data import token_store
from dynamo_lm.data.packing import Blocks, targets
from dynamo_lm.data.token_store import TokenStore, documents, tokenize, tokenizer_fingerprint
from dynamo_lm.errors import InputError

VOCABULARY = {"<unk>": 0, "<eos>": 1, "<bos>": 2, "a": 3, "b": 4, "c": 5, "d": 6}


def word_tokenizer(vocabulary=VOCABULARY, template: str = "", **special) -> PreTrainedTokenizerFast:
    """One token per word; `template` is what it puts around a text, "<bos> $A" say."""
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<bos>", 2), ("<eos>", 1)])
    special = {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def write_lines(path: Path, *texts: str) -> str:
    return write(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))


def store_of(*lengths: int) -> SimpleNamespace:
    """Documents of the tokens 0, 1, 2, .. numbered through."""
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    return SimpleNamespace(tokens=np.arange(offsets[-1]), offsets=offsets, responses=None)


# --- text -----------------------------------------------------------------------


def test_a_txt_file_is_one_document_without_byte_order_mark_and_with_plain_newlines(tmp_path):
    source = write(tmp_path / "a.txt", b"\xef\xbb\xbfOnce\r\n\r\nupon\ra \xc3\xa9t\xc3\xa9\n")
    assert list(documents(source)) == ["Once\n\nupon\na été\n"]


def test_jsonl_reads_the_text_field_and_skips_blank_lines_empty_texts_and_nulls(tmp_path):
    lines = '\ufeff{"text": "one", "title": "x"}\n\n{"text": "  \\n"}\n{"text": null}\n{"text": "two\u2028three"}'
    assert list(documents(write(tmp_path / "a.jsonl", lines))) == ["one", "two\u2028three"]


def test_json_may_be_an_array_or_lines(tmp_path):
    array = write(tmp_path / "array.json", ' [\n{"text": "one"},\n{"text": "two"}]')
    lines = write(tmp_path / "lines.json", '{"text": "one"}\n{"text": "two"}\n')
    assert list(documents(array)) == list(documents(lines)) == ["one", "two"]


@pytest.mark.parametrize(
    "content, texts",
    [
        ('{\n  "text": "one",\n  "more": [1, 2]\n}\n', ["one"]),
        ('\ufeff\n{\r\n"text": "one"\r\n}', ["one"]),
        ('{\n"text": "one"\n}\n\n{\n"text": "two"\n}\n', ["one", "two"]),
        ('{"text": "one"}', ["one"]),
        ('{"text": "one"} {"text": "two"}', ["one", "two"]),
        ('[{"text":\n"one\u2028two\u0085"}]', ["one\u2028two\u0085"]),
    ],
)
def test_json_values_may_span_lines(tmp_path, content, texts):
    assert list(documents(write(tmp_path / "a.json", content))) == texts


def test_json_that_spans_lines_says_where_its_records_are(tmp_path):
    file = write(tmp_path / "a.json", '{\n"text": "one"\n}\n\n{\n"text": 2\n}\n')
    with pytest.raises(InputError, match=r"a\.json, line 5: the field 'text' is int, not text"):
        list(documents(file))
    with pytest.raises(InputError, match=r"a\.json.* is not JSON at line 3: Expecting"):
        list(documents(write(tmp_path / "a.json", '{\n"text": "one"\n"more": 2\n}')))


def test_json_lines_end_at_the_line_feed_alone(tmp_path):
    text = "".join(map(chr, (0x0B, 0x0C, 0x1C, 0x1D, 0x1E, 0x85, 0x2028, 0x2029)))
    line = json.dumps({"text": f"a{text}b"}, ensure_ascii=False)
    assert list(documents(write(tmp_path / "a.jsonl", f"{line}\r\n{line}\n"))) == [f"a{text}b"] * 2
    assert list(documents(write(tmp_path / "a.txt", f"a{text}b"))) == [f"a{text}b"]


def test_a_byte_order_mark_before_a_record_or_its_text_is_dropped(tmp_path):
    lines = '\ufeff{"text": "\ufeffone"}\n\ufeff{"text": "two\ufeff"}\n'  # files put one behind the other
    assert list(documents(write(tmp_path / "a.jsonl", lines))) == ["one", "two\ufeff"]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["\ufeffone"]}), tmp_path / "a.parquet")
    assert list(documents(str(tmp_path / "a.parquet"))) == ["one"]


def test_the_only_string_field_is_the_text_when_none_is_called_text(tmp_path):
    source = write(tmp_path / "a.jsonl", '{"story": "one", "words": 1}\n{"story": "two", "by": "a second string"}\n')
    assert list(documents(source)) == ["one", "two"]


def test_text_field_chooses_among_several(tmp_path):
    source = write(tmp_path / "a.jsonl", '{"text": "no", "output": "yes"}\n')
    assert list(documents(source, text_field="output")) == ["yes"]


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary("int32", "string")])
def test_parquet_streams_the_text_column_across_row_groups(tmp_path, kind):
    rows = pyarrow.array(["one", None, "", "two", "three"]).cast(kind)
    table = pyarrow.table({"id": range(5), "tags": [["x"]] * 5, "story": rows})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert list(documents(str(tmp_path / "a.parquet"))) == ["one", "two", "three"]


def test_a_folder_is_all_its_files_in_sorted_order_hidden_and_unknown_ones_left_out(tmp_path):
    write(tmp_path / "b.txt", "third")
    write(tmp_path / "a" / "z.TXT", "second")
    write_lines(tmp_path / "a" / "b.jsonl", "first")
    write(tmp_path / "README.md", "no")
    write(tmp_path / ".cache" / "a.txt", "no")
    assert list(documents(str(tmp_path))) == ["first", "second", "third"]


def test_a_glob_is_sorted_and_a_file_with_brackets_in_its_name_is_a_file(tmp_path):
    for name in ("2.txt", "1.txt", "[x].txt"):
        write(tmp_path / name, name)
    assert list(documents(str(tmp_path / "[0-9].txt"))) == ["1.txt", "2.txt"]
    assert list(documents(str(tmp_path / "[x].txt"))) == ["[x].txt"]


def test_anything_like_owner_slash_name_streams_from_the_hub(monkeypatch):
    asked = []

    def load_dataset(name, *, split, streaming):
        asked.append((name, split, streaming))
        return iter([{"id": 1, "story": "one"}, {"id": 2, "story": "two"}])

    fake = SimpleNamespace(load_dataset=load_dataset, exceptions=SimpleNamespace(DatasetsError=RuntimeError))
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert list(documents("owner/name")) == ["one", "two"]
    assert list(documents("owner/name:test")) == ["one", "two"]
    assert asked == [("owner/name", "train", True), ("owner/name", "test", True)]


def test_a_data_set_that_cannot_be_loaded_is_an_input_error(monkeypatch):
    def load_dataset(name, **options):
        raise ConnectionError("Couldn't reach the Hub\nand much more")

    fake = SimpleNamespace(load_dataset=load_dataset, exceptions=SimpleNamespace(DatasetsError=RuntimeError))
    monkeypatch.setitem(sys.modules, "datasets", fake)
    with pytest.raises(InputError, match=r"data/misspelled is neither a file .* Couldn't reach the Hub\.$"):
        list(documents("data/misspelled"))


@pytest.mark.parametrize("module, source", [("pyarrow", "a.parquet"), ("datasets", "owner/name")])
def test_a_missing_optional_package_names_the_extra(tmp_path, monkeypatch, module, source):
    write(tmp_path / "a.parquet", b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)  # makes its import fail
    with pytest.raises(InputError, match=rf"{module}: pip install 'dynamo-lm\[train\]'"):
        list(documents(source))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"fine\nab\xff", r"a\.txt.* is not UTF-8: line 2, byte 3 is 0xff"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "\xe9"}\n', r"a\.jsonl.* is not UTF-8: line 2, byte 11 is 0xe9"),
        ("a.jsonl", '{"text": "fine"}\n\n{"text": }\n', r"a\.jsonl.* is not JSON at line 3: Expecting value"),
        ("a.jsonl", '{\n "text": "fine"\n}', r"not JSON at line 1: .*; a \.jsonl file has one value a line\."),
        ("a.json", '[\n{"text": "fine"},\n{"text" "x"}]', r"a\.json.* is not JSON at line 3: Expecting ':'"),
        ("a.json", "[" * 100_000, r"a\.json.* holds JSON that cannot be read"),
        ("a.jsonl", '{"text": "fine"}\n["x"]\n', r"line 2: expected an object with a text field, found list"),
        (
            "a.jsonl",
            '{"ask": "x", "say": "y"}\n',
            r"line 1: no field 'text'; its fields are 'ask', 'say'; .*--text-field",
        ),
        ("a.jsonl", '{"text": "x"}\n{"say": "y"}\n', r"line 2: no field 'text'; its fields are 'say'"),
        ("a.json", '[{"text": "x"}, {"text": 7}]', r"element 2: the field 'text' is int, not text"),
        ("a.jsonl", '{"text": "\\ud800"}', r"line 1: the field 'text' holds half a surrogate pair"),
        ("a.parquet", b"PAR1 not really PAR1", r"a\.parquet.* is not a readable Parquet file"),
        ("a.txt", " \n\t", r"a\.txt.* holds no document with any text"),
        ("a.jsonl", "", r"a\.jsonl.* holds no document with any text"),
        ("a.csv", "text\nx", r"a\.csv.* has a type that cannot be read; .*\.txt, \.jsonl, \.json, \.parquet"),
    ],
)
def test_unusable_files_are_refused_in_a_sentence(tmp_path, name, content, message):
    source = write(tmp_path / name, content)
    with pytest.raises(InputError, match=message):
        list(documents(source))


def test_a_wrong_text_field_and_a_table_without_text_name_what_is_there(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", "x")
    with pytest.raises(InputError, match=r"line 1: no field 'story'; its fields are 'text'\.$"):
        list(documents(source, text_field="story"))
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "tags": [["x"]]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="no field 'text'; its fields are 'id', 'tags'"):
        list(documents(str(tmp_path / "a.parquet")))


@pytest.mark.parametrize("source", ["missing.jsonl", "./missing", "/no/such/folder", "stories/missing.txt", ""])
def test_a_missing_path_is_reported_at_once_and_never_asked_of_the_hub(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f'"{source}" does not exist'):
        documents(source)  # not even iterated


def test_a_glob_or_folder_without_usable_files_is_an_input_error(tmp_path):
    write(tmp_path / "README.md", "no")
    for source in (str(tmp_path), str(tmp_path / "*.txt")):
        with pytest.raises(InputError, match="matches no file to read"):
            documents(source)


# --- tokens on disk -------------------------------------------------------------


def test_documents_become_tokens_each_ending_in_the_end_of_text_token(tmp_path):
    store = tokenize([write_lines(tmp_path / "a.jsonl", "a b c", "d x")], word_tokenizer(), tmp_path / "store")
    assert store.tokens.tolist() == [3, 4, 5, 1, 6, 0, 1]
    assert store.offsets.tolist() == [0, 4, 7] and store.offsets.dtype == np.int64
    assert [document.tolist() for document in store] == [[3, 4, 5, 1], [6, 0, 1]]
    assert len(store) == 2 and store.num_tokens == 7 and store.vocab_size == 7
    assert store.tokens.dtype == np.uint16 and isinstance(store.tokens, np.memmap)
    assert store.document(1).tolist() == [6, 0, 1]
    with pytest.raises(IndexError):
        store.document(2)


def test_the_fingerprint_is_the_sha256_of_the_tokens_as_they_lie_on_disk(tmp_path):
    store = tokenize([write_lines(tmp_path / "a.jsonl", "a")], word_tokenizer(), tmp_path / "store")
    # printf '\003\000\001\000' | sha256sum
    assert store.fingerprint == "8b629f0ae492bf759467c837708c9b685397c876aa5ba456fa3e3a623ff930a8"


@pytest.mark.parametrize(
    "template, expected",
    [("", [3, 4, 1]), ("<bos> $A", [2, 3, 4, 1]), ("$A <eos>", [3, 4, 1]), ("<bos> $A <eos>", [2, 3, 4, 1])],
)
def test_special_tokens_are_the_tokenizers_own_and_the_end_is_never_doubled(tmp_path, template, expected):
    store = tokenize([write(tmp_path / "a.txt", "a b")], word_tokenizer(template=template), tmp_path / "store")
    assert store.tokens.tolist() == expected


def test_a_vocabulary_above_65536_is_stored_in_32_bits(tmp_path):
    words = {**VOCABULARY, **{f"w{i}": i for i in range(7, 65537)}}
    source = write(tmp_path / "a.txt", "a w65536")
    store = tokenize([source], word_tokenizer(words), tmp_path / "store")
    assert store.tokens.dtype == np.uint32 and store.tokens.tolist() == [3, 65536, 1] and store.vocab_size == 65537
    del words["w65536"]
    assert tokenize([source], word_tokenizer(words), tmp_path / "store").tokens.dtype == np.uint16


def test_several_sources_and_batches_follow_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(token_store, "BATCH_DOCUMENTS", 2)
    seen = []
    sources = [write_lines(tmp_path / "b.jsonl", "a", "b b", "c"), write(tmp_path / "a.txt", "d")]
    store = tokenize(sources, word_tokenizer(), tmp_path / "store", progress=lambda *totals: seen.append(totals))
    assert store.tokens.tolist() == [3, 1, 4, 4, 1, 5, 1, 6, 1]
    assert store.offsets.tolist() == [0, 2, 5, 7, 9]
    assert seen == [(2, 5), (4, 9)]  # documents and tokens so far


@pytest.mark.parametrize(
    "limit, offsets", [(1, [0, 1]), (2, [0, 2]), (4, [0, 2, 4]), (5, [0, 2, 5]), (7, [0, 2, 5, 7]), (99, [0, 2, 5, 7])]
)
@pytest.mark.parametrize("batch", [1, 2, 1000])
def test_limit_tokens_cuts_exactly_there(tmp_path, monkeypatch, limit, offsets, batch):
    monkeypatch.setattr(token_store, "BATCH_DOCUMENTS", batch)
    source = write_lines(tmp_path / "a.jsonl", "a", "b b", "c")
    store = tokenize([source], word_tokenizer(), tmp_path / "store", limit_tokens=limit)
    assert store.offsets.tolist() == offsets
    assert store.tokens.tolist() == [3, 1, 4, 4, 1, 5, 1][:limit]


def test_text_longer_than_the_models_context_gives_no_warning(tmp_path, caplog, capfd):
    tokenizer = word_tokenizer(model_max_length=2)
    with caplog.at_level(logging.WARNING):
        tokenize([write(tmp_path / "a.txt", "a b c d")], tokenizer, tmp_path / "store")
    assert not caplog.records and capfd.readouterr().err == ""


def test_a_store_is_reused_for_the_same_inputs_and_rebuilt_for_others(tmp_path):
    builds = []
    source, folder = write(tmp_path / "a.txt", "a b"), tmp_path / "store"

    def again(tokenizer=None, **options) -> TokenStore:
        return tokenize(
            [source], tokenizer or word_tokenizer(), folder, progress=lambda *totals: builds.append(totals), **options
        )

    first = again()
    assert again().fingerprint == first.fingerprint and len(builds) == 1
    again(limit_tokens=2)
    assert len(builds) == 2
    again(word_tokenizer({**VOCABULARY, "e": 7}))
    assert len(builds) == 3
    again(word_tokenizer(eos_token="<bos>"))
    assert len(builds) == 4
    again()
    assert len(builds) == 5
    write(tmp_path / "a.txt", "a b c")
    assert again().tokens.tolist() == [3, 4, 5, 1] and len(builds) == 6
    os.utime(source, (0, 0))
    again()
    assert len(builds) == 7
    assert len(list(folder.glob("tokens-*"))) == len(list(folder.glob("offsets-*"))) == 1  # nothing piles up


def test_who_asks_for_a_folder_while_another_builds_it_waits_and_reuses_it(tmp_path):
    source, builds = write(tmp_path / "a.txt", "a b"), []

    def slow(*totals: int) -> None:
        builds.append(totals)
        time.sleep(0.1)

    def ask(_: int) -> list[int]:
        return tokenize([source], word_tokenizer(), tmp_path / "store", progress=slow).tokens.tolist()

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(ask, range(3))) == [[3, 4, 1]] * 3
    assert len(builds) == 1


def damage(folder: Path, what: str) -> None:
    about, tokens, offsets = folder / "store.json", next(folder.glob("tokens-*")), next(folder.glob("offsets-*"))
    match what:
        case "no description":
            about.unlink()
        case "description is not JSON":
            about.write_text("{")
        case "description is a list":
            about.write_text("[]")
        case "field missing":
            about.write_text(json.dumps({"format": token_store.FORMAT}))
        case "old format":
            about.write_text(json.dumps(json.loads(about.read_text()) | {"format": 0}))
        case "tokens missing":
            tokens.unlink()
        case "tokens empty":
            tokens.write_bytes(b"")
        case "tokens cut":
            tokens.write_bytes(tokens.read_bytes()[:-2])
        case "tokens cut in a token":
            tokens.write_bytes(tokens.read_bytes()[:-1])
        case "offsets missing":
            offsets.unlink()
        case "offsets cut":
            offsets.write_bytes(offsets.read_bytes()[:-8])
        case "offsets are text":
            offsets.write_text("no")


@pytest.mark.parametrize(
    "what",
    [
        *("no description", "description is not JSON", "description is a list", "field missing", "old format"),
        *("tokens missing", "tokens empty", "tokens cut", "tokens cut in a token"),
        *("offsets missing", "offsets cut", "offsets are text"),
    ],
)
def test_a_damaged_or_old_store_is_refused_when_opened_and_rebuilt_by_tokenize(tmp_path, what):
    source, folder = write(tmp_path / "a.txt", "a b"), tmp_path / "store"
    tokenize([source], word_tokenizer(), folder)
    damage(folder, what)
    with pytest.raises(InputError, match="is not a usable token store"):
        TokenStore(folder)
    assert tokenize([source], word_tokenizer(), folder).tokens.tolist() == [3, 4, 1]


def test_a_failed_build_leaves_the_old_store_and_nothing_else(tmp_path):
    good, folder = write(tmp_path / "good.txt", "a b"), tmp_path / "store"
    tokenize([good], word_tokenizer(), folder)
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(InputError, match="not UTF-8"):
        tokenize([good, write(tmp_path / "bad.txt", b"\xff")], word_tokenizer(), folder)
    assert sorted(path.name for path in folder.iterdir()) == before
    assert TokenStore(folder).tokens.tolist() == [3, 4, 1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("full", ["tokens-", "offsets-", "store.json"])
def test_a_full_disk_is_an_input_error_and_leaves_the_old_store(tmp_path, monkeypatch, full):
    good, folder = write(tmp_path / "good.txt", "a b"), tmp_path / "store"
    tokenize([good], word_tokenizer(), folder)

    def full_disk(path, mode):
        return open("/dev/full" if full in Path(path).name and "w" in mode else path, mode)

    def write_bytes(path, data):
        with full_disk(path, "wb") as file:
            file.write(data)

    monkeypatch.setattr(token_store, "open", full_disk, raising=False)
    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(InputError, match=r"store.* No space left on device"):
        tokenize([good], word_tokenizer(), folder, limit_tokens=2)
    assert TokenStore(folder).tokens.tolist() == [3, 4, 1]


def test_a_store_cannot_be_written_where_a_file_is(tmp_path):
    source = write(tmp_path / "a.txt", "a")
    with pytest.raises(InputError, match=r"cannot be written to .*a\.txt"):
        tokenize([source], word_tokenizer(), source)


def test_what_tokenize_cannot_do_is_an_input_error(tmp_path):
    source = write(tmp_path / "a.txt", "a")
    with pytest.raises(InputError, match="no end-of-text token"):
        tokenize([source], word_tokenizer(eos_token=None), tmp_path / "store")
    with pytest.raises(InputError, match="token limit must be at least 1, not 0"):
        tokenize([source], word_tokenizer(), tmp_path / "store", limit_tokens=0)
    with pytest.raises(InputError, match="no source to read"):
        tokenize([], word_tokenizer(), tmp_path / "store")


def test_tokenizer_fingerprints_see_the_vocabulary_and_pipeline_but_not_truncation_or_padding(tmp_path):
    plain = tokenizer_fingerprint(word_tokenizer())
    assert len(plain) == 16 and int(plain, 16) >= 0
    used = word_tokenizer(pad_token="<eos>")
    before = tokenizer_fingerprint(used)
    used(["a b c", "a"], truncation=True, max_length=2, padding=True)
    assert tokenizer_fingerprint(used) == before
    assert tokenizer_fingerprint(word_tokenizer(template="<bos> $A")) != plain
    assert tokenizer_fingerprint(word_tokenizer({**VOCABULARY, "a": 4, "b": 3})) != plain
    word_tokenizer().save_pretrained(tmp_path)
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path)) == plain


def test_split_holds_out_a_fraction_by_content_so_that_copies_stay_together(tmp_path):
    texts = ["a " * (1 + i) for i in range(100)] * 2  # each text twice
    store = tokenize([write_lines(tmp_path / "a.jsonl", *texts)], word_tokenizer(), tmp_path / "store")
    training, validation = store.split(0.1, seed=0)
    assert sorted([*training, *validation]) == list(range(200))
    assert len(validation) == 20 and training.dtype == validation.dtype == np.int64
    assert {i % 100 for i in validation}.isdisjoint({i % 100 for i in training})
    assert store.split(0.1, seed=0)[1].tolist() == validation.tolist()
    assert store.split(0.1, seed=1)[1].tolist() != validation.tolist()


def test_split_holds_out_at_least_one_document_and_none_at_fraction_zero(tmp_path):
    store = tokenize([write_lines(tmp_path / "a.jsonl", "a", "b", "c")], word_tokenizer(), tmp_path / "store")
    assert [len(side) for side in store.split(0.01, seed=0)] == [2, 1]
    assert [side.tolist() for side in store.split(0, seed=0)] == [[0, 1, 2], []]
    for wrong in (-0.1, 1, float("nan")):
        with pytest.raises(InputError, match="validation fraction"):
            store.split(wrong, seed=0)
    single = tokenize([write(tmp_path / "a.txt", "a")], word_tokenizer(), tmp_path / "store")
    with pytest.raises(InputError, match=r"leaves none to train on"):
        single.split(0.03, seed=0)


# --- packed blocks --------------------------------------------------------------


def test_blocks_cut_the_concatenated_documents_and_number_pieces_and_positions():
    blocks = Blocks(store_of(3, 6, 1, 4), np.arange(4), 4, seed=0, shuffle=False)
    #    document     0  0  0  1 | 1  1  1  1 | 1  2  3  3 | 3  3 dropped
    expected = [
        ([0, 1, 2, 3], [0, 0, 0, 1], [0, 1, 2, 0]),
        ([4, 5, 6, 7], [0, 0, 0, 0], [0, 1, 2, 3]),
        ([8, 9, 10, 11], [0, 1, 2, 2], [0, 0, 0, 1]),
    ]
    assert blocks.num_blocks(0) == 3
    for index, block in enumerate(expected):
        found = blocks.block(0, index)
        assert [part.tolist() for part in found] == list(block)
        assert all(part.dtype == np.int64 for part in found)
    with pytest.raises(IndexError):
        blocks.block(0, 3)


def test_blocks_take_only_the_documents_they_are_given_in_that_order_without_shuffling():
    blocks = Blocks(store_of(3, 6, 1, 4), np.array([3, 0]), 7, seed=0, shuffle=False)
    tokens, segments, positions = blocks.block(5, 0)  # every epoch is the same
    assert tokens.tolist() == [10, 11, 12, 13, 0, 1, 2]
    assert segments.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert positions.tolist() == [0, 1, 2, 3, 0, 1, 2]


def test_documents_without_tokens_leave_no_trace():
    tokens, segments, _ = Blocks(store_of(0, 2, 0, 0, 2, 0), np.arange(6), 4, seed=0, shuffle=False).block(0, 0)
    assert tokens.tolist() == [0, 1, 2, 3] and segments.tolist() == [0, 0, 1, 1]


def test_epochs_differ_in_the_order_of_documents_and_of_blocks_and_repeat_under_the_same_seed():
    def epoch(seed: int, epoch: int) -> list[int]:
        blocks = Blocks(store_of(*[5] * 20), np.arange(20), 10, seed=seed)
        return [int(t) for i in range(blocks.num_blocks(epoch)) for t in blocks.block(epoch, i)[0]]

    assert sorted(epoch(0, 0)) == list(range(100))
    assert epoch(0, 0) == epoch(0, 0)
    assert epoch(0, 0) != epoch(0, 1) and epoch(0, 0) != epoch(1, 0)
    # one long document cannot be reordered, its blocks can
    blocks = Blocks(store_of(40), np.arange(1), 4, seed=0)
    firsts = [int(blocks.block(0, i)[0][0]) for i in range(10)]
    assert sorted(firsts) == list(range(0, 40, 4)) != firsts


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=12),
    block_size=st.integers(1, 9),
    seed=st.integers(0, 5),
    shuffle=st.booleans(),
    data=st.data(),
)
def test_packing_loses_and_doubles_no_token_but_the_dropped_tail(lengths, block_size, seed, shuffle, data):
    store = store_of(*lengths)
    chosen = np.array(data.draw(st.lists(st.sampled_from(range(len(lengths))), min_size=1, unique=True)))
    wanted = [t for i in chosen for t in range(store.offsets[i], store.offsets[i + 1])]
    if len(wanted) < block_size:
        with pytest.raises(InputError):
            Blocks(store, chosen, block_size, seed=seed)
        return
    blocks = Blocks(store, chosen, block_size, seed=seed, shuffle=shuffle)
    owner = np.repeat(np.arange(len(lengths)), lengths)  # the document of each token
    found: list[int] = []
    for index in range(blocks.num_blocks(1)):
        tokens, segments, positions = blocks.block(1, index)
        found += tokens.tolist()
        # a piece is a run of consecutive tokens of one document, and its segment and positions say so
        starts = np.flatnonzero(positions == 0)
        assert starts[0] == 0 and segments.tolist() == (np.cumsum(positions == 0) - 1).tolist()
        for piece in np.split(np.arange(block_size), starts[1:]):
            assert tokens[piece].tolist() == list(range(tokens[piece[0]], tokens[piece[0]] + len(piece)))
            assert positions[piece].tolist() == list(range(len(piece)))
            assert len(set(owner[tokens[piece]])) == 1
        assert all(owner[tokens[i]] != owner[tokens[i - 1]] for i in starts[1:])
    assert len(found) == len(set(found)) == len(wanted) // block_size * block_size
    assert set(found) <= set(wanted)
    if not shuffle:
        assert found == wanted[: len(found)]


def test_a_batch_is_a_function_of_seed_and_step_so_that_resuming_changes_nothing():
    def run(start: int, count: int) -> list[dict[str, torch.Tensor]]:
        blocks = Blocks(store_of(7, 3, 8, 5, 9), np.arange(5), 4, seed=3)  # 8 blocks: 2 2/3 steps an epoch
        return [blocks.batch(step, 3) for step in range(start, start + count)]

    whole = run(0, 20)
    for start in (1, 2, 3, 7, 15):
        for found, expected in zip(run(start, 5), whole[start : start + 5], strict=True):
            assert found.keys() == expected.keys() == {"tokens", "segments", "positions"}
            assert all(torch.equal(found[name], expected[name]) for name in found)
    assert all(part.dtype == torch.int64 and part.shape == (3, 4) for part in whole[0].values())


def test_batches_span_the_border_between_epochs():
    blocks = Blocks(store_of(7, 3, 8, 5, 9), np.arange(5), 4, seed=3)
    batch = blocks.batch(2, 3)["tokens"]  # blocks 6, 7 of epoch 0 and 0 of epoch 1
    assert batch.tolist() == [blocks.block(e, i)[0].tolist() for e, i in ((0, 6), (0, 7), (1, 0))]


def test_blocks_that_cannot_be_cut_are_an_input_error():
    with pytest.raises(InputError, match=r"hold 7 tokens, fewer than one block of 2,048; .* smaller --block-size"):
        Blocks(store_of(3, 4), np.arange(2), 2048, seed=0)
    with pytest.raises(InputError, match="no document"):
        Blocks(store_of(3, 4), np.arange(0), 2, seed=0)
    with pytest.raises(InputError, match="at least 1, not 0"):
        Blocks(store_of(3, 4), np.arange(2), 0, seed=0)
    with pytest.raises(InputError, match="seed"):
        Blocks(store_of(3, 4), np.arange(2), 2, seed=-1)
    with pytest.raises(InputError, match="step >= 0"):
        Blocks(store_of(3, 4), np.arange(2), 2, seed=0).batch(-1, 1)


# --- labels ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "shift, expected",
    [
        #   11    12    13    14 |  21    22    23 |  31
        (1, [12, 13, 14, -100, 22, 23, -100, -100]),
        (2, [13, 14, -100, -100, 23, -100, -100, -100]),
        (3, [14, -100, -100, -100, -100, -100, -100, -100]),
        (4, [-100] * 8),
        (8, [-100] * 8),  # as long as the block
        (9, [-100] * 8),
    ],
)
def test_the_label_is_the_token_shift_ahead_inside_the_same_piece(shift, expected):
    tokens = torch.tensor([[11, 12, 13, 14, 21, 22, 23, 31]])
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2]])
    labels = targets(tokens, segments, shift)
    assert labels.tolist() == [expected] and labels.dtype == torch.int64


def test_labels_without_borders_are_the_tokens_moved_left_in_each_row():
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]])
    alone = torch.zeros_like(tokens)
    assert targets(tokens, alone, 1).tolist() == [[2, 3, 4, 5, 6, -100], [8, 9, 10, 11, 12, -100]]
    assert targets(tokens, alone, 4).tolist() == [[5, 6, -100, -100, -100, -100], [11, 12, -100, -100, -100, -100]]


def test_a_piece_in_between_is_never_jumped_over_and_inputs_are_left_alone():
    tokens, segments = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[0, 1, 2, 2]])
    assert targets(tokens, segments, 2).tolist() == [[-100, -100, -100, -100]]
    assert targets(tokens, segments, 1).tolist() == [[-100, -100, 4, -100]]
    assert tokens.tolist() == [[1, 2, 3, 4]]
    with pytest.raises(InputError, match="at least 1 token ahead"):
        targets(tokens, segments, 0)
