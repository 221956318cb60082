"""Every kind of input gives the same documents, and what cannot be used is dropped or refused by name."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from prepare_helpers import random_texts, write_jsonl
from text_corpus import SMALL

from data_pipeline.baselines import document_texts
from data_pipeline.errors import DamagedDataError
from data_pipeline.prepare.corpus import text_corpus
from data_pipeline.prepare.records import Part, Record, read_part
from data_pipeline.prepare.streams import lines
from data_pipeline.prepare.text import PrepareReport, prepare_text

TEXTS = random_texts(40)


def prepare(source: Any, out: Path, **arguments: Any) -> PrepareReport:
    return prepare_text(source, out, **{"options": SMALL, "workers": 1, **arguments})


def texts_of(report: PrepareReport) -> list[str]:
    return sorted(t.decode() for split in report.manifest.splits for t in document_texts(report.manifest, split))


def write_parquet(path: Path, texts: list[Any], kind: Any = None, rows: int = 7) -> None:
    table = pyarrow.table({"id": list(range(len(texts))), "text": pyarrow.array(texts, type=kind)})
    pyarrow.parquet.write_table(table, path, row_group_size=rows, write_page_checksum=True)


def jsonl_bytes() -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS).encode()


def zst(data: bytes) -> bytes:
    half = len(data) // 2
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    return compressor.compress(data[:half]) + compressor.compress(data[half:])  # two frames, as pzstd writes


def write_inputs(folder: Path) -> None:
    """The same documents in every format, in a folder each."""
    files: dict[str, bytes] = {
        "jsonl/a.jsonl": jsonl_bytes(),
        "gz/a.jsonl.gz": gzip.compress(jsonl_bytes()[:500]) + gzip.compress(jsonl_bytes()[500:]),
        "zst/a.jsonl.zst": zst(jsonl_bytes()),
        **{f"plain/{number}.md": text.encode() for number, text in enumerate(TEXTS)},
        **{f"packed/{number}.txt.gz": gzip.compress(text.encode()) for number, text in enumerate(TEXTS)},
    }
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / "parquet").mkdir()
    write_parquet(folder / "parquet" / "a.parquet", TEXTS)


@pytest.mark.parametrize("name", ["jsonl", "gz", "zst", "plain", "packed", "parquet"])
@pytest.mark.parametrize("piece_bytes", [300, None])
def test_every_format_gives_the_documents(tmp_path: Path, name: str, piece_bytes: int | None) -> None:
    write_inputs(tmp_path)
    report = prepare(tmp_path / name, tmp_path / "out", piece_bytes=piece_bytes)
    assert texts_of(report) == sorted(TEXTS)
    assert report.manifest.origin["dropped"] == {}


@pytest.mark.parametrize("kind", [pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())])
def test_other_string_columns(tmp_path: Path, kind: Any) -> None:
    write_parquet(tmp_path / "a.parquet", TEXTS, kind)
    assert texts_of(prepare(tmp_path / "a.parquet", tmp_path / "out")) == sorted(TEXTS)


def test_files_globs_and_folders_together_and_each_file_once(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    sources = [tmp_path / "jsonl" / "a.jsonl", f"{tmp_path}/pla*/1?.md", tmp_path / "jsonl"]
    report = prepare(sources, tmp_path / "out")
    assert texts_of(report) == sorted([*TEXTS, *TEXTS[10:20]])
    assert report.manifest.origin["files"] == 11
    corpus = text_corpus(sources)
    assert [file.name for file in corpus.files[:2]] == ["a.jsonl", "plain/10.md"]
    with pytest.raises(ValueError, match=r"no file matches .*nothing"):
        prepare(f"{tmp_path}/nothing*", tmp_path / "other")


def test_format_can_be_given(tmp_path: Path) -> None:
    (tmp_path / "records.data").write_bytes(jsonl_bytes())
    assert texts_of(prepare(tmp_path / "records.data", tmp_path / "a", file_format="jsonl")) == sorted(TEXTS)
    write_inputs(tmp_path)
    whole = prepare(tmp_path / "jsonl", tmp_path / "b", file_format="text")
    assert texts_of(whole) == [jsonl_bytes().decode()]
    with pytest.raises(ValueError, match="format 'csv' is unknown"):
        prepare(tmp_path / "jsonl", tmp_path / "c", file_format="csv")


def test_bad_lines_are_dropped_counted_and_listed(tmp_path: Path) -> None:
    bad = [
        (b'{"text": "caf\xe9"}', "not UTF-8: byte 13 of the line"),
        (b'{"text": "cut', "not JSON: Unterminated string"),
        (b'{"text": NaN}', "not JSON: NaN is not JSON"),
        (b"[" * 100_000, "not JSON: "),
        (b'["text"]', "not a JSON object: list"),
        (b'{"body": "x", "id": 1}', "no text field: 'text' is not among body, id"),
        (b'{"text": 5}', "text is not a string: 'text' is int"),
        (b'{"text": null}', "text is not a string: 'text' is NoneType"),
        (b'{"text": ""}', "empty"),
        (b'{"text": "\\ud800"}', "not UTF-8: character 0 of the text is half a surrogate pair"),
        (b"", "blank line"),
    ]
    (tmp_path / "a.jsonl").write_bytes(b"".join(line + b"\n" for line, _ in bad) + jsonl_bytes()[:-1])
    report = prepare(tmp_path / "a.jsonl", tmp_path / "out")
    assert texts_of(report) == sorted(TEXTS)
    origin = report.manifest.origin
    assert origin["dropped"] == {
        "blank line": 1,
        "empty": 1,
        "no text field": 1,
        "not JSON": 3,
        "not UTF-8": 2,
        "not a JSON object": 1,
        "text is not a string": 2,
    }
    assert [item["path"] for item in origin["skipped"]] == [f"a.jsonl: line {n}" for n in range(1, len(bad) + 1)]
    for (_, why), item in zip(bad, origin["skipped"], strict=True):
        assert item["why"].startswith(why)
    assert report.counts.dropped == origin["dropped"]


def test_only_the_first_few_of_each_reason_are_listed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"{}\n" * 900 + b"x\n" + jsonl_bytes())
    origin = prepare(tmp_path / "a.jsonl", tmp_path / "out", piece_bytes=500).manifest.origin
    assert origin["dropped"] == {"no text field": 900, "not JSON": 1}
    listed = [item["why"].split(":")[0] for item in origin["skipped"]]
    assert listed == ["no text field"] * 5 + ["not JSON"]


def test_bad_parquet_values_are_dropped(tmp_path: Path) -> None:
    invalid = pyarrow.array([b"caf\xe9", None, b"", b"fine"], type=pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": invalid}), tmp_path / "a.parquet")
    report = prepare(tmp_path / "a.parquet", tmp_path / "out")
    assert texts_of(report) == ["fine"]
    assert [(item["path"], item["why"].split(":")[0]) for item in report.manifest.origin["skipped"]] == [
        ("a.parquet: row 0", "not UTF-8"),
        ("a.parquet: row 1", "text is not a string"),
        ("a.parquet: row 2", "empty"),
    ]


@pytest.mark.parametrize("cut", [0, 1, 100, -9, -1])
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_truncated_streams_are_errors(tmp_path: Path, name: str, cut: int) -> None:
    whole = gzip.compress(jsonl_bytes()) if name.endswith("gz") else zst(jsonl_bytes())
    (tmp_path / name).write_bytes(whole[:cut])
    with pytest.raises(DamagedDataError, match=rf"{name}: .*byte \d+: .*What to do: fetch this file again") as caught:
        prepare(tmp_path / name, tmp_path / "out")
    assert caught.value.shard == str(tmp_path / name)
    assert caught.value.byte == len(whole[:cut])
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_damaged_streams_are_errors(tmp_path: Path, name: str) -> None:
    whole = gzip.compress(jsonl_bytes()) if name.endswith("gz") else zst(jsonl_bytes())
    for damaged in (whole[:300] + bytes([whole[300] ^ 1]) + whole[301:], whole + b"trailing garbage"):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(DamagedDataError, match=rf"{name}: .*byte \d+: not valid (gzip|zstd)"):
            prepare(tmp_path / name, tmp_path / "out")


def test_damaged_parquet_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, TEXTS)
    whole = path.read_bytes()
    path.write_bytes(whole[:-6])
    with pytest.raises(DamagedDataError, match=r"a.parquet: footer: not a whole Parquet file.*What to do"):
        prepare(path, tmp_path / "out")
    metadata = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(whole)).metadata
    start = metadata.row_group(3).column(1).dictionary_page_offset
    path.write_bytes(whole[: start + 60] + b"\xff" + whole[start + 61 :])
    with pytest.raises(DamagedDataError, match=r"a.parquet: row group 3: cannot be read.*What to do"):
        prepare(path, tmp_path / "out")


def test_parquet_without_a_column_of_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, TEXTS)
    for field, message in (("body", "no column 'body'; it has id, text"), ("id", "column 'id' is int64")):
        options = dataclasses.replace(SMALL, text_field=field)
        with pytest.raises(ValueError, match=rf"a.parquet: .*{message}.*--text-field"):
            prepare(path, tmp_path / "out", options=options)


def test_text_field_is_taken(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "wrong", "body": "right"}\n')
    options = dataclasses.replace(SMALL, text_field="body")
    assert texts_of(prepare(tmp_path / "a.jsonl", tmp_path / "out", options=options)) == ["right"]


@given(
    texts=st.lists(st.text(alphabet="ab\u00e9\u6771\n", max_size=12), min_size=1, max_size=20),
    size=st.integers(1, 60),
    newline=st.booleans(),
)
def test_byte_ranges_of_jsonl_cover_every_line_once(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], size: int, newline: bool
) -> None:
    path = tmp_path_factory.mktemp("ranges") / "a.jsonl"
    data = "\n".join(json.dumps({"text": "x" + text}, ensure_ascii=False) for text in texts) + "\n" * newline
    path.write_bytes(data.encode())
    corpus = text_corpus([path])
    end = len(data.encode())
    parts = [Part(0, start, min(start + size, end)) for start in range(0, end, size)]
    records = [r for part in parts for r in read_part(corpus, part, "text", lambda n: None)]
    assert all(isinstance(record, Record) for record in records)
    assert [record.raw.decode()[1:] for record in records if isinstance(record, Record)] == texts
    assert [r.place for r in records if isinstance(r, Record)] == sorted(
        {r.place for r in records if isinstance(r, Record)}
    )


@given(data=st.binary(max_size=60).map(lambda raw: raw.replace(b"\x00", b"\n")), size=st.integers(1, 9))
def test_lines_do_not_depend_on_how_the_stream_is_cut(data: bytes, size: int) -> None:
    found = list(lines(data[start : start + size] for start in range(0, len(data), size)))
    expected = data.split(b"\n")[: -1 if data.endswith(b"\n") or not data else None]
    assert [line for _, line in found] == expected
    assert all(data[offset : offset + len(line)] == line for offset, line in found)


def test_memory_urls(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    filesystem = fsspec.filesystem("memory")
    for path in tmp_path.rglob("*.*"):
        filesystem.pipe(f"/inputs/{path.relative_to(tmp_path)}", path.read_bytes())
    filesystem.pipe("/inputs/.hidden.jsonl", b"not taken")
    try:
        for source in (
            "memory://inputs/plain",
            "memory://inputs/*/*.md",
            "memory://inputs/zst/a.jsonl.zst",
            "memory://inputs/gz",
            "memory://inputs/parquet/*.parquet",
        ):
            report = prepare(source, tmp_path / "out", force=True, piece_bytes=300)
            assert texts_of(report) == sorted(TEXTS)
        local = prepare(tmp_path / "jsonl", tmp_path / "local")
        url = prepare("memory://inputs/jsonl", tmp_path / "url")
        assert url.manifest.fingerprint == local.manifest.fingerprint
        assert {f.name for f in text_corpus(["memory://inputs"], "*/1*.md").files} == {
            f"plain/{n}.md" for n in (1, *range(10, 20))
        }
        with pytest.raises(ValueError, match=r"memory://inputs has no file that matches"):
            prepare("memory://inputs", tmp_path / "none", pattern="*.doc")
        with pytest.raises(ValueError, match=r"memory://absent cannot be listed"):
            prepare("memory://absent", tmp_path / "none")
    finally:
        filesystem.rm("/inputs", recursive=True)


class Quiet(http.server.SimpleHTTPRequestHandler):
    broken = False
    ranges = False

    def end_headers(self) -> None:
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def do_GET(self) -> None:
        if Quiet.broken:
            self.send_error(500)
        elif self.ranges and "Range" in self.headers:
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            data = Path(self.translate_path(self.path)).read_bytes()
            part = data[int(first) : int(last) + 1]
            self.send_response(206)
            self.send_header("Content-Length", str(len(part)))
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
            self.end_headers()
            self.wfile.write(part)
        else:
            super().do_GET()

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "web").mkdir()
    handler = functools.partial(Quiet, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("ranges", [True, False])
def test_web_urls_with_workers_and_a_server_that_fails(
    tmp_path: Path, web: str, ranges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Quiet, "ranges", ranges)
    monkeypatch.setattr("data_pipeline.prepare.text._WORTH_READING", 0)
    for number in range(4):
        write_jsonl(tmp_path / "web" / f"{number}.jsonl", TEXTS[number::4])
    packed = gzip.compress((tmp_path / "web" / "0.jsonl").read_bytes())
    (tmp_path / "web" / "5.jsonl.gz").write_bytes(packed)
    sources = [f"{web}/{number}.jsonl" for number in range(4)] + [f"{web}/5.jsonl.gz"]
    # A tokenizer and no held-out share: nothing but the sample is read before the work starts.
    prepare(tmp_path / "web", tmp_path / "first")
    options = dataclasses.replace(SMALL, validation_fraction=0, tokenizer=str(tmp_path / "first" / "tokenizer.json"))
    with pytest.raises(ValueError, match=rf"{web}/absent.jsonl cannot be listed.*FileNotFoundError"):
        prepare(f"{web}/absent.jsonl", tmp_path / "out")

    def fail(status: Any) -> None:
        Quiet.broken = status.phase == "tokenising" and status.counts.documents > 10

    try:
        with pytest.raises((OSError, DamagedDataError), match=r"http://127.*jsonl.*finished work is kept"):
            prepare(sources, tmp_path / "out", options=options, piece_bytes=500, progress=fail)
    finally:
        Quiet.broken = False
    report = prepare(sources, tmp_path / "out", options=options, piece_bytes=500, workers=2)
    assert report.counts.documents < len(TEXTS) + 10
    assert texts_of(report) == sorted([*TEXTS, *TEXTS[0::4]])


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("piece_bytes", [300, None])
def test_one_byte_order_mark_at_the_start_of_a_file_is_no_text(
    tmp_path: Path, packed: bool, piece_bytes: int | None
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    pack = gzip.compress if packed else bytes
    files = {
        "a.jsonl": BOM + jsonl_bytes() + BOM + b'{"text": "second"}\n',
        "b.jsonl": BOM + BOM + b'{"text": "two marks"}\n',
        "c.txt": BOM + b"plain",
        "d.txt": BOM + BOM + b"two",
        "e.txt": BOM,
        "f.jsonl": BOM + b"\n",
        "g.txt": BOM + b"caf\xe9",
    }
    for name, data in files.items():
        (folder / (name + ".gz" * packed)).write_bytes(pack(data))
    report = prepare(folder, tmp_path / "out", piece_bytes=piece_bytes)
    assert texts_of(report) == sorted([*TEXTS, "plain", "\ufefftwo"])
    assert report.manifest.origin["dropped"] == {"blank line": 1, "empty": 1, "not JSON": 2, "not UTF-8": 1}
    (bad,) = [item["why"] for item in report.manifest.origin["skipped"] if item["why"].startswith("not UTF-8")]
    assert bad.startswith("not UTF-8: byte 6 ")


@pytest.mark.parametrize("size", range(1, 12))
def test_a_byte_order_mark_moves_no_place(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.jsonl"
    data = BOM + b'{"text": "a"}\n{"text": "b"}\n'
    path.write_bytes(data)
    parts = [Part(0, start, min(start + size, len(data))) for start in range(0, len(data), size)]
    corpus = text_corpus([path])
    records = [r for part in parts for r in read_part(corpus, part, "text", lambda n: None)]
    assert [(r.place, r.raw, r.span) for r in records if isinstance(r, Record)] == [(0, b"a", 17), (17, b"b", 14)]
    assert len(records) == 2
