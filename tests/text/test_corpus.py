from __future__ import annotations

import itertools
import json
import os
import tracemalloc

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm.errors import InputError
from knnlm.text import corpus, textfiles
from knnlm.text.corpus import Document, read_documents, read_text_rows, text_bytes, thin, tokenize
from knnlm.text.hub import HubSet, parse_hub_set


@pytest.fixture
def write(tmp_path):
    def write(name, content=b""):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture
def small_limits(monkeypatch):
    """Documents of at most 100 characters, files read in blocks of 7 bytes."""
    monkeypatch.setattr(corpus, "DOCUMENT_CHARACTERS", 100)
    monkeypatch.setattr(textfiles, "BLOCK_BYTES", 7)


def parquet(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=50)
    return path


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def texts(*paths, **options):
    return [document.text for document in read_documents(paths, **options)]


def refusal(*paths, **options):
    """The one line that says what is wrong."""
    with pytest.raises(InputError) as caught:
        list(read_documents(paths, **options))
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# what is read


def test_a_text_file_is_one_document(write):
    path = write("a.txt", "One.\n\nTwo: Käse, 猫.\n")
    assert list(read_documents([path])) == [Document("One.\n\nTwo: Käse, 猫.\n", "a.txt", 1)]
    assert texts(str(path)) == list(d.text for d in read_documents(path))


def test_byte_order_mark_and_line_ends_are_not_text(write):
    assert texts(write("a.txt", b"\xef\xbb\xbfa\r\nb\rc\n")) == ["a\nb\nc\n"]
    assert texts(write("a.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n')) == ["a"]
    # Only at the start: elsewhere it is a character.
    assert texts(write("b.txt", "a\ufeffb")) == ["a\ufeffb"]


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0\r\ufeff"), max_size=60), st.integers(1, 9))
def test_text_files_are_decoded_across_blocks(tmp_path_factory, text, block):
    path = tmp_path_factory.mktemp("blocks") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(textfiles, "BLOCK_BYTES", block)
        assert "".join(textfiles.decode_blocks(path)) == text


def test_line_ends_across_blocks_are_one(write, small_limits):
    assert texts(write("a.txt", b"123456\r\n1234\r\n")) == ["123456\n1234\n"]


def test_each_json_line_is_a_document_with_its_line_number(write):
    path = write("a.jsonl", jsonl({"text": "one"}, {"text": "", "id": 2}, {"text": "three"}) + '\n \n{"text": "six"}')
    assert [(d.text, d.number) for d in read_documents([path])] == [("one", 1), ("three", 3), ("six", 6)]


def test_another_field_and_null(write):
    path = write("a.jsonl", jsonl({"body": "one", "text": 7}, {"body": None}, {"body": "three"}))
    assert texts(path, text_field="body") == ["one", "three"]


def test_half_a_surrogate_pair_is_replaced_and_a_whole_one_read(write):
    assert texts(write("a.jsonl", r'{"text": "a\ud800b \ud83d\ude00 \udc00"}')) == ["a\ufffdb 😀 \ufffd"]


def test_parquet_rows_are_documents_over_batches_and_row_groups(tmp_path):
    rows = [f"row {number}" for number in range(1, 201)]
    rows[99] = None
    path = parquet(tmp_path / "a.parquet", text=rows, other=range(200))
    found = list(read_documents([path]))
    assert [(d.text, d.number) for d in found] == [(text, n) for n, text in enumerate(rows, 1) if text]
    assert {d.source for d in found} == {"a.parquet"}


def test_folders_are_read_in_sorted_order_and_other_files_left_alone(write, tmp_path):
    write("b.txt", "b")
    write("a.txt", "a")
    write("sub/c.JSONL", jsonl({"text": "c"}))
    write("sub/deep/d.txt", "d")
    write("empty.txt")
    for name in ("readme.md", "e.json", ".hidden.txt", ".git/f.txt"):
        write(name, b"\0not text")
    parquet(tmp_path / "sub" / "a.parquet", text=["p"])
    assert texts(tmp_path) == ["a", "b", "p", "c", "d"]


def test_paths_are_read_in_the_order_given_and_each_file_once(write, tmp_path):
    first, second = write("b.txt", "b"), write("a.txt", "a")
    assert texts(first, second) == ["b", "a"]
    assert texts(first, tmp_path, second) == ["b", "a"]
    (tmp_path / "link.txt").symlink_to(first)
    assert texts(first, tmp_path / "link.txt", tmp_path / ".." / tmp_path.name / "b.txt") == ["b"]


# long documents


def test_long_documents_are_cut_at_borders_of_paragraphs(write, small_limits):
    paragraphs = [f"{number} " + "x" * 20 + "\n\n" for number in range(40)]
    for path in (write("a.txt", "".join(paragraphs)), write("a.jsonl", jsonl({"text": "".join(paragraphs)}))):
        found = list(read_documents([path]))
        assert "".join(d.text for d in found) == "".join(paragraphs)
        assert len(found) > 8
        assert all(50 < len(d.text) <= 100 and d.text.endswith("\n\n") for d in found[:-1])
    assert {d.number for d in found} == {1}
    assert [d.number for d in read_documents([write("b.txt", "".join(paragraphs))])] == list(range(1, len(found) + 1))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x" * 58 + "\n\n" + "y" * 20 + "\n" + "z z " * 20, 60),
        ("x" * 70 + "\n" + "y y " * 20, 71),
        ("x" * 10 + "\n\n" + "y " * 90, 100),  # a paragraph too early in the text
        ("x" * 80 + " " + "y" * 200, 81),
        ("x" * 300, 100),
    ],
)
def test_the_border_is_a_paragraph_else_a_line_else_a_word(small_limits, text, expected):
    assert len(next(corpus._cut([text]))) == expected


@given(st.text("ab \n", max_size=400), st.integers(1, 60))
def test_cutting_loses_nothing(text, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "DOCUMENT_CHARACTERS", 37)
        parts = list(corpus._cut(text[i : i + block] for i in range(0, len(text), block)))
    assert "".join(parts) == text
    assert all(18 < len(part) <= 37 for part in parts[:-1]) and len(parts[-1]) <= 37


def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "DOCUMENT_CHARACTERS", 20_000)
    monkeypatch.setattr(textfiles, "BLOCK_BYTES", 5_000)

    def peak(path):
        tracemalloc.start()
        assert sum(len(d.text) for d in read_documents([path])) == path.stat().st_size
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    small, large = tmp_path / "small.txt", tmp_path / "large.txt"
    small.write_text("word " * 20_000)
    large.write_text("word " * 400_000)
    peak(small)
    assert peak(large) < 1.2 * peak(small) + 50_000


def test_reading_begins_before_the_end_is_known(write):
    path = write("a.jsonl", jsonl({"text": "one"}) + "not JSON")
    documents = read_documents([path])
    assert next(documents).text == "one"
    with pytest.raises(InputError):
        next(documents)


# what is refused


def test_paths_are_refused_before_anything_is_read(write, tmp_path):
    good = write("a.txt", "text")
    for bad in (tmp_path / "missing.txt", write("b.md", "text"), write("empty.txt")):
        for function in (read_documents, text_bytes):
            with pytest.raises(InputError):
                function([good, bad])
    with pytest.raises(InputError, match="no text was given"):
        read_documents([])


def test_missing_path(tmp_path):
    assert f"there is no file or folder {tmp_path / 'nope.txt'}" in refusal(tmp_path / "nope.txt")


def test_a_path_below_a_file(write):
    assert "cannot read" in refusal(write("a.txt", "text") / "b.txt")


@pytest.mark.parametrize("name", ["a.md", "a.json", "noend"])
def test_unknown_type_names_the_known_ones(write, name):
    message = refusal(write(name, "text"))
    assert name in message and ".txt, .jsonl, .parquet" in message


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_empty_file(write, name):
    assert f"{name} is empty (0 bytes)" in refusal(write(name))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", " \n\t\n"),
        ("a.txt", b"\xef\xbb\xbf"),
        ("a.jsonl", "\n\n"),
        ("a.jsonl", '{"text": " "}\n{"text": null}'),
    ],
)
def test_a_named_file_of_white_space(write, name, content):
    other = write("other.txt", "text")
    assert f"{name} has no text" in refusal(write(name, content))
    assert f"{name} has no text" in refusal(other, write(name, content))


def test_a_folder_of_empty_files(write, tmp_path):
    write("a.txt")
    write("b.txt", "\n")
    assert "there is no text in what was given" in refusal(tmp_path)


def test_a_folder_without_text_files(write, tmp_path):
    write("sub/a.md", "text")
    assert "has no file of a type that can be read: .txt, .jsonl, .parquet" in refusal(tmp_path)


def test_nul_byte_names_its_position(write, small_limits):
    assert "byte 23 is NUL" in refusal(write("a.txt", "é" * 10 + "abc\0def"))
    assert "byte 24 is NUL" in refusal(write("a.jsonl", '{"text": "a"}\n{"text": "\0"}'))
    assert "byte 4 is NUL" in refusal(write("bom.txt", b"\xef\xbb\xbfa\0b"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfea\0", "byte 0 is 0xff"),
        (b"abcdefghijkl\xe9t\xe9", "byte 12 is 0xe9"),
        (b"abcde\xe2\x82", "byte 5 is 0xe2"),  # the end cuts a character
        (b"abcde\xe2\x82abc", "byte 5 is 0xe2"),  # begun in one block of 7, broken in the next
        (b"\xef\xbb\xbfabcdefg\x80", "byte 10 is 0x80"),
    ],
)
def test_invalid_utf8_names_its_position(write, small_limits, content, words):
    assert words in refusal(write("a.txt", content))


def test_invalid_utf8_in_json_lines_names_its_position_in_the_file(write):
    assert "byte 24 is 0xff" in refusal(write("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}'))


def test_json_line_without_the_field_names_line_and_fields(write):
    message = refusal(write("a.jsonl", jsonl({"text": "one"}, {"body": "two", "id": 2})))
    assert "line 2 of" in message and "no field 'text', only body, id" in message and "`text_field`" in message


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "two"', "is not JSON"),
        ("[1, 2]", "no JSON object but list"),
        ('"two"', "no JSON object but str"),
        ('{"text": 3}', "'text' in line 2 of"),
        ('{"text": ["two"]}', "no string but list"),
        ("[" * 200_000, "line 2 of"),
        ('{"text": "a", "n": ' + "1" * 5000 + "}", "cannot be read as JSON"),
    ],
)
def test_bad_json_line_names_its_number(write, line, words):
    message = refusal(write("a.jsonl", jsonl({"text": "one"}) + line))
    assert "line 2 of" in message and words in message


def test_an_endless_json_line_is_not_swallowed(write, monkeypatch):
    monkeypatch.setattr(textfiles, "LINE_BYTES", 50)
    assert texts(write("a.jsonl", '{"text": "' + "x" * 38 + '"}')) == ["x" * 38]
    assert "line 1 of" in refusal(write("a.jsonl", '{"text": "' + "x" * 60 + '"}'))


def test_parquet_without_the_column(tmp_path):
    message = refusal(parquet(tmp_path / "a.parquet", body=["one"], id=[1]))
    assert "no field 'text', only body, id" in message


def test_parquet_column_that_holds_no_text(tmp_path):
    assert "row 1 of" in refusal(parquet(tmp_path / "a.parquet", text=[1, 2]))


def invalid_utf8(*values):
    """A column that says text and holds other bytes."""
    return pyarrow.Array.from_buffers(pyarrow.string(), len(values), pyarrow.array(values, pyarrow.binary()).buffers())


def test_parquet_text_that_is_not_utf8_is_told_with_its_row(tmp_path):
    path = parquet(tmp_path / "a.parquet", text=invalid_utf8(*[b"good"] * 70, b"caf\xe9", b"good"))
    assert refusal(path) == f"row 71 of {path} is not UTF-8 text: byte 3 is 0xe9; convert it, or leave it out"


def test_two_columns_of_one_name(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 3, names=["text", "id", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert "a.parquet has 2 columns 'text'" in refusal(tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet", text_field="id") == ["a"]
    pyarrow.parquet.write_table(table.rename_columns(["id", "text", "id"]), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == ["a"]


def test_parquet_columns_of_every_kind_of_text(tmp_path):
    values = ["one", None, "two", "one"]
    kinds = (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view())
    columns = [pyarrow.array(values, kind) for kind in kinds]
    for column in (*columns, pyarrow.array(values).dictionary_encode()):
        assert texts(parquet(tmp_path / "a.parquet", text=column)) == ["one", "two", "one"]
    assert texts(parquet(tmp_path / "a.parquet", **{"a.b": values, "a": [{"b": 1}] * 4}), text_field="a.b")[0] == "one"


@pytest.mark.parametrize(
    "column",
    [
        [{"text": "a"}],
        [["a"]],
        [b"a"],
        pyarrow.array([2**62], pyarrow.timestamp("ms")),
        pyarrow.array([2**30], pyarrow.date32()),
        pyarrow.array([], pyarrow.string()),
        pyarrow.nulls(3),
    ],
)
def test_parquet_columns_of_anything_else_are_told_in_one_line(column, tmp_path):
    assert "a.parquet" in refusal(parquet(tmp_path / "a.parquet", text=column))


def test_pipe_in_a_folder_is_not_waited_for(write, tmp_path):
    write("a.txt", "one")
    os.mkfifo(tmp_path / "b.txt")
    (tmp_path / "c.jsonl").mkdir()
    write("c.jsonl/d.txt", "two")
    assert texts(tmp_path) == ["one", "two"]


def test_broken_parquet(write, tmp_path):
    assert "not readable Parquet" in refusal(write("a.parquet", b"PAR1 no, it is not PAR1"))
    # The pages are spoilt, the metadata at the end is whole.
    path = parquet(tmp_path / "b.parquet", text=[f"row {number}" * 50 for number in range(200)])
    data = bytearray(path.read_bytes())
    data[4:400] = b"\xff" * 396
    path.write_bytes(data)
    assert "b.parquet" in refusal(path)


def test_a_file_without_permission(write, monkeypatch):
    path = write("a.txt", "text")

    def refuse(path, flags):
        raise PermissionError(13, "Permission denied", str(path))

    # The tests may run as root, who may read everything.
    monkeypatch.setattr("knnlm.regular.os.open", refuse)
    assert refusal(path).startswith(f"cannot read {path}: Permission denied")


def test_a_folder_without_permission(write, tmp_path, monkeypatch):
    write("sub/a.txt", "text")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", refuse)
    assert refusal(tmp_path) == f"cannot read {tmp_path}: Permission denied; check the path and its permissions"


# sizes


def test_text_bytes_adds_files_and_gives_up_on_hub_sets(write, tmp_path):
    write("a.txt", "12345")
    write("sub/b.jsonl", jsonl({"text": "1234567"}))
    write("c.md", "not counted")
    assert text_bytes([tmp_path]) == 12
    assert text_bytes([tmp_path, "hf:some/set"]) is None
    path = parquet(tmp_path / "c.parquet", text=["some words " * 10_000])
    assert text_bytes([path]) > 110_000 > 10 * path.stat().st_size  # not the size of the compressed file


@pytest.mark.parametrize("copies", [1, 3])
def test_text_bytes_are_those_of_the_field(write, tmp_path, copies):
    """Of JSON Lines by the first rows, whatever else is in them and however its characters are escaped."""
    words = [f"the {number}th row “of” words\n" * (5 + number % 7) for number in range(999)]
    other = ["x" * 900] * len(words)
    for place in range(copies):
        write(f"{place}.jsonl", jsonl(*({"other": o, "body": w} for o, w in zip(other, words, strict=True))))
        parquet(tmp_path / f"{place}.parquet", other=[f"{number}{o}" for number, o in enumerate(other)], body=words)
    true = copies * sum(len(text.encode()) for text in words)
    for suffix in ("jsonl", "parquet"):
        found = text_bytes([tmp_path / f"{place}.{suffix}" for place in range(copies)], text_field="body")
        assert found == pytest.approx(true, rel=0.1)
        with pytest.raises(InputError, match="no field 'text', only other, body"):
            text_bytes([tmp_path / f"0.{suffix}"])


# rows as they are


def library_rows(kind, path, **options):
    """What `datasets` itself makes of a file, as run_clm.py asks it to."""
    stream = datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True, **options)
    return [row["text"] for row in stream]


def text_rows(path):
    return [row.text for row in read_text_rows(path)]


def test_rows_of_a_text_file_are_those_of_the_library(write):
    path = write("a.txt", " = T = \n\n one\x0ctwo\u2028three\x85four\r\n \t\nend\rlast".encode())
    assert text_rows(path) == library_rows("text", path, keep_linebreaks=True)
    assert text_rows(path)[:3] == [" = T = \n", "\n", " one\x0ctwo\u2028three\x85four\n"]


def test_rows_of_a_text_file_are_whole_over_parts_of_it(write, small_limits):
    path = write("a.txt", "".join(f"line {number}\n\n" for number in range(100)))
    assert text_rows(path) == library_rows("text", path, keep_linebreaks=True)
    assert [row.number for row in read_text_rows(path)] == list(range(1, 201))


def test_other_rows_are_those_of_the_library_empty_ones_too(write, tmp_path):
    rows = [" = T = \n", "", "two\nlines\n", " ", "", "end"]
    path = write("a.jsonl", jsonl(*({"text": row} for row in rows)))
    assert text_rows(path) == library_rows("json", path) == rows
    path = parquet(tmp_path / "a.parquet", text=rows)
    assert text_rows(path) == library_rows("parquet", path) == rows


def test_rows_without_any_text_are_refused(write):
    with pytest.raises(InputError, match="only white space or empty documents"):
        text_rows(write("a.jsonl", jsonl({"text": ""}, {"text": " "})))


# hub sets


@pytest.mark.parametrize(
    ("name", "repo", "config", "split"),
    [
        ("hf:imdb", "imdb", None, None),
        ("hf:imdb:test", "imdb", None, "test"),
        ("hf:org/name", "org/name", None, None),
        ("hf:wikitext/wikitext-103-raw-v1:train", "wikitext/wikitext-103-raw-v1", None, "train"),
        ("hf:org/na.me/20231101.en:validation", "org/na.me", "20231101.en", "validation"),
        ("hf:org/name/a config", "org/name", "a config", None),
    ],
)
def test_grammar_of_hub_sets(name, repo, config, split):
    assert parse_hub_set(name) == HubSet(name, repo, config, split)


@pytest.mark.parametrize("name", ["hf:", "hf:/name", "hf:org/", "hf:a/b/c/d", "hf:a:b:c", "hf:a:", "hf:a b"])
def test_what_is_no_hub_set_is_refused_at_once(name):
    with pytest.raises(InputError, match="write hf:REPO"):
        read_documents([name])


@pytest.fixture
def hub(monkeypatch):
    """A hub that knows `wikitext` in two configurations, and `org/name`."""
    asked = []

    def stream(rows):
        def generate():
            yield from ({"text": row, "id": number} for number, row in enumerate(rows))

        return datasets.IterableDataset.from_generator(generate)

    def load_dataset(path, name=None, *, streaming):
        asked.append((path, name))
        assert streaming
        if path == "wikitext" and name is None:
            raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['raw']")
        if (path, name) == ("wikitext", "raw"):
            return {"train": stream(["one", "", "three"]), "test": stream(["t"])}
        if path == "org/name":
            return {"validation": stream(["v"])}
        gated = "Dataset 'org/gated' is a gated dataset" if path == "org/gated" else f"Dataset {path!r} doesn't exist"
        raise datasets.exceptions.DatasetNotFoundError(gated)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_hub_set_by_name_and_configuration(hub):
    found = list(read_documents(["hf:wikitext/raw"]))
    assert found == [Document("one", "hf:wikitext/raw", 1), Document("three", "hf:wikitext/raw", 3)]
    assert hub == [("wikitext/raw", None), ("wikitext", "raw")]
    assert texts("hf:wikitext/raw:test") == ["t"]
    assert text_rows("hf:wikitext/raw") == ["one", "", "three"]


def test_hub_set_by_organisation_and_name_takes_the_only_split(hub):
    assert texts("hf:org/name") == ["v"]
    assert hub == [("org/name", None)]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hf:wikitext", "cannot read hf:wikitext: Config name is missing"),
        ("hf:wikitext/raw:dev", "no split 'dev', only train, test"),
        ("hf:nope", "'nope' doesn't exist"),
        ("hf:org/nope", "'org/nope' doesn't exist"),
        ("hf:org/gated", "is a gated dataset"),
        ("hf:a/b/c", "'a/b' doesn't exist"),
    ],
)
def test_hub_sets_that_cannot_be_loaded(hub, name, words):
    assert words in refusal(name)


def test_hub_set_without_the_field(hub):
    assert "row 1 of hf:org/name has no field 'body', only text, id" in refusal("hf:org/name", text_field="body")


def test_the_network_fails_half_way(monkeypatch):
    def rows():
        yield {"text": "one"}
        raise ConnectionError("the line is dead\nlong trace")

    stream = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": stream})
    assert refusal("hf:org/name") == "cannot read hf:org/name: the line is dead"


def test_the_library_itself_reads_a_local_set(write, tmp_path, monkeypatch):
    write("org/name/train.jsonl", jsonl({"text": "one", "id": 1}, {"text": "two", "id": 2}))
    write("org/name/test.jsonl", jsonl({"text": "three", "id": 3}))
    parquet(tmp_path / "org" / "columns" / "train.parquet", text=["p"], id=[1])
    monkeypatch.chdir(tmp_path)
    assert texts("hf:org/name") == ["one", "two"]
    assert texts("hf:org/name:test") == ["three"]
    assert texts("hf:org/columns") == ["p"]
    assert "hf:org/columns has no field 'body', only text, id" in refusal("hf:org/columns", text_field="body")


def test_an_unreachable_hub_is_one_line():
    assert refusal("hf:org/name").startswith("cannot read hf:org/name: ")


# tokens


def codes(text):
    return np.array([ord(character) for character in text], np.int32)


def documents(*parts):
    return [Document(text, "a.txt", number) for number, text in enumerate(parts, start=1)]


def test_documents_of_one_token_are_skipped():
    found = list(tokenize(documents("ab", "c", "def"), codes))
    assert [(d.tokens.tolist(), d.source, d.number) for d in found] == [
        ([97, 98], "a.txt", 1),
        ([100, 101, 102], "a.txt", 3),
    ]
    assert found[0].tokens.dtype == np.int32
    assert next(tokenize(documents("ab"), lambda text: codes(text).astype(np.int64))).tokens.dtype == np.int32


@pytest.mark.parametrize(
    ("limit", "lengths"),
    [(2, [2]), (3, [3]), (4, [4]), (5, [4]), (6, [4, 2]), (9, [4, 4]), (100, [4, 4, 4])],
)
def test_the_stream_ends_at_max_tokens(limit, lengths):
    found = list(tokenize(documents("abcd", "efgh", "ijkl"), codes, max_tokens=limit))
    assert [len(d.tokens) for d in found] == lengths


def test_nothing_is_encoded_beyond_max_tokens():
    endless = (Document("abcd", "a.txt", number) for number in itertools.count(1))
    assert len(list(tokenize(endless, codes, max_tokens=8))) == 2


@pytest.mark.parametrize("parts", [(), ("a",), ("a", "b", "")])
def test_a_text_of_less_than_two_tokens(parts):
    with pytest.raises(InputError, match="no document of the text has two tokens"):
        list(tokenize(documents(*parts), codes))


def test_max_tokens_of_one_is_refused():
    with pytest.raises(InputError, match="`max_tokens` is 1,"):
        list(tokenize(documents("abc"), codes, max_tokens=1))


# Rows with all their fields


def test_rows_keep_all_fields_and_say_where_they_stand(write):
    path = write("a.jsonl", jsonl({"question": "Why?", "choices": ["a", "b"]}) + "\n" + jsonl({"question": "How?"}))
    first, second = corpus.read_rows(path)
    assert (first.fields["choices"], first.source, first.number) == (["a", "b"], "a.jsonl", 1)
    assert (second.fields, second.number, second.where) == ({"question": "How?"}, 3, f"line 3 of {path}")


def test_rows_of_a_hub_set(hub):
    (row,) = corpus.read_rows("hf:wikitext/raw:test")
    assert (row.fields, row.source, row.number) == ({"text": "t", "id": 0}, "hf:wikitext/raw:test", 1)
    assert row.where == "row 1 of hf:wikitext/raw:test"
    with pytest.raises(InputError, match="no split 'dev', only train, test"):
        list(corpus.read_rows("hf:wikitext/raw:dev"))


@pytest.mark.parametrize("name", ["a.txt", "."])
def test_rows_come_from_json_lines_only(write, tmp_path, name):
    write("a.txt", "text")
    with pytest.raises(InputError, match=r"is no \.jsonl file; give JSON Lines"):
        corpus.read_rows(tmp_path / name)


def test_rows_of_a_missing_file(tmp_path):
    with pytest.raises(InputError, match="there is no file or folder"):
        corpus.read_rows(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_a_share_of_the_text_comes_evenly_from_all_of_it(share):
    """Two documents hold nearly all of it: every tenth document once was eight of the short ones."""
    texts = [f"{number % 10}" * length for number, length in enumerate([50, 470_000, 20, 300, 470_000, 7, 9_000])]
    documents = [Document(text, "a", number) for number, text in enumerate(texts)]
    kept = list(thin(iter(documents), share, section=1000))
    assert sum(len(one.text) for one in kept) == pytest.approx(share * sum(map(len, texts)), abs=1000)
    for number in (1, 4):
        part = sum(len(one.text) for one in kept if one.number == number)
        assert part == pytest.approx(share * 470_000, abs=1000)
        assert all(set(one.text) == {str(number)} for one in kept if one.number == number)
