"""The walk over tars of other writers agrees with the standard library wherever it accepts, and refuses every
header that changes what a member is."""

from __future__ import annotations

import io
import re
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from store_sets import archive, foreign_archive, located
from webdataset.tariterators import base_plus_ext

from data_pipeline.errors import DamagedDataError
from data_pipeline.store import tar
from data_pipeline.store.grouping import extension_problem, is_metadata, split_name

LONG = "folder/" * 20 + "name.txt"
MEMBERS = [("a.jpg", b"x" * 700), ("a.txt", b""), (LONG, b"y" * 512), ("größe.txt", b"z"), ("b.c/d.e.json", b"{}")]


def walk(data: bytes) -> list[tar.TarMember]:
    return list(tar.walk(io.BytesIO(data), "shard.tar", foreign=True))


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_walk_agrees_with_the_standard_library(form: int) -> None:
    data = foreign_archive(MEMBERS if form != tarfile.USTAR_FORMAT else MEMBERS[:2], form)
    found = walk(data)
    assert [(m.name, m.offset, m.length) for m in found] == located(data)
    # Headers follow each other without a gap: what is not payload or padding belongs to the next member.
    ends = [0] + [m.offset + m.length + -m.length % 512 for m in found]
    assert [m.start for m in found] == ends[:-1]


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=130).filter(
                lambda name: name != ".."
            ),
            st.integers(0, 1100),
        ),
        unique_by=lambda pair: pair[0],
        max_size=6,
    ),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
@settings(deadline=None)
def test_any_names_agree_with_the_standard_library(members: list[tuple[str, int]], form: int) -> None:
    data = foreign_archive([(name, bytes(length)) for name, length in members], form)
    assert [(m.name, m.offset, m.length) for m in walk(data)] == located(data)


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=110), st.integers(0, 8**12))
@settings(deadline=None)
def test_member_header_is_the_standard_librarys(name: str, length: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = length, 0o444, 0
    try:
        expected = info.tobuf(tarfile.USTAR_FORMAT)
    except ValueError:
        with pytest.raises(ValueError):
            tar.member_header(name, length)
    else:
        assert tar.member_header(name, length) == expected


def test_gnu_tar_and_webdataset_write_what_is_accepted(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name, payload in MEMBERS:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(payload)
    for form in ("gnu", "pax", "ustar"):
        out = tmp_path / f"{form}.tar"
        # The folders are members too, as in most tars that people make.
        subprocess.run(["tar", f"--format={form}", "-cf", out, "-C", source, "a.jpg", "b.c", "folder"], check=True)
        assert {m.name for m in walk(out.read_bytes())} == {"a.jpg", "b.c/d.e.json", LONG}
    out = tmp_path / "webdataset.tar"
    with webdataset.TarWriter(str(out)) as writer:
        writer.write({"__key__": "k", "txt": "words", "cls": 3})
    data = out.read_bytes()
    assert [(m.name, m.offset, m.length) for m in walk(data)] == located(data)
    with pytest.raises(DamagedDataError, match="not a regular file"):  # not what our own writers write
        list(tar.walk(io.BytesIO(data), "shard.tar"))


def special(kind: bytes, **fields: object) -> bytes:
    info = tarfile.TarInfo("a.txt")
    info.type = kind
    for name, value in fields.items():
        setattr(info, name, value)
    return info.tobuf(tarfile.GNU_FORMAT, errors="surrogateescape") + tar.END_OF_ARCHIVE


def pax(headers: dict[str, str], kind: str = "x") -> bytes:
    info = tarfile.TarInfo("a.txt")
    info.size = 3
    body = info.tobuf(tarfile.USTAR_FORMAT) + b"abc".ljust(512, b"\0") + tar.END_OF_ARCHIVE
    records = b"".join(record(key, value) for key, value in headers.items())
    info = tarfile.TarInfo("pax")
    info.type, info.size = kind.encode(), len(records)
    return info.tobuf(tarfile.USTAR_FORMAT) + records.ljust(-(-len(records) // 512) * 512, b"\0") + body


def record(key: str, value: str) -> bytes:
    body = f" {key}={value}\n".encode()
    length = len(body)
    while len(str(length)) + len(body) != length:
        length = len(str(length)) + len(body)
    return f"{length}".encode() + body


@pytest.mark.parametrize(
    "data",
    [
        pax({"mtime": "1700000000.25", "uname": "someone", "comment": "x=y"}),
        pax({"SCHILY.xattr.user.note": "\n=\n"}),
        pax({"comment": "0" * 40}, "g"),
    ],
)
def test_harmless_records_are_accepted(data: bytes) -> None:
    assert [(m.name, m.length) for m in walk(data)] == [("a.txt", 3)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pax({"size": "5"}), "overrides what its member is .*size='5'"),
        (pax({"linkpath": "/etc/passwd"}), "overrides"),
        (pax({"GNU.sparse.major": "1", "GNU.sparse.realsize": "9"}), "overrides .*GNU.sparse.major"),
        (pax({"path": "b.txt"}, "g"), "overrides .*path"),
        (pax({"unheard.of": "1"}), "overrides"),
        (pax({"path": "/etc/cron.d/job"}), "unsafe"),
        (pax({"path": "a/../../b.txt"}), "unsafe"),
        (pax({"path": "a\0b.txt"}), "unsafe"),
        (pax({"mtime": "1"}).replace(b"11 mtime=1\n", b"99 mtime=1\n"), "cannot be read"),
        (pax({"mtime": "1"}).replace(b"11 mtime=1\n", b"mtime=1    "), "cannot be read"),
        (pax({"mtime": "1"})[:1024] + tar.END_OF_ARCHIVE, "no member after it"),
        (special(tarfile.SYMTYPE, linkname="/etc/passwd"), "not a regular file"),
        (special(tarfile.LNKTYPE, linkname="b.txt"), "not a regular file"),
        (special(tarfile.CHRTYPE), "not a regular file"),
        (special(tarfile.BLKTYPE), "not a regular file"),
        (special(tarfile.FIFOTYPE), "not a regular file"),
        (special(tarfile.GNUTYPE_SPARSE), "not a regular file"),
        (special(tarfile.GNUTYPE_LONGLINK), "not a regular file"),
        (archive([("/a.txt", b"x")]), "unsafe"),
        (archive([("b/../../a.txt", b"x")]), "unsafe"),
        (archive([("a.txt", b"x"), ("a.txt", b"y")]), "appears twice"),
        (archive([("a.txt", b"x")])[:-1024], "header cut short"),
        (archive([("a.txt", b"x")])[:-512], "marker cut short"),
        (archive([("a.txt", b"x")]) + b"tail", "after the end"),
        (archive([("a.txt", b"x" * 5_000)])[:2_000], "ends inside member"),
        (special(tarfile.REGTYPE, name="\udcff.txt"), "is not UTF-8"),
        (archive([("a.txt", b"x")]).replace(b"ustar", b"USTAR"), "not a valid member header|not ustar"),
        (b"", "header cut short"),
    ],
)
def test_everything_else_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(DamagedDataError, match=rf"shard\.tar: byte \d+: .*({message}).* What to do: ") as caught:
        walk(data)
    assert caught.value.shard == "shard.tar"
    assert caught.value.byte is not None
    assert int(re.findall(r"byte (\d+)", str(caught.value))[0]) == caught.value.byte


def test_reported_faults_do_not_end_the_walk() -> None:
    entries = [("a.txt", b"x"), ("/b.txt", b"x"), ("a.txt", b"y"), ("c.txt", b"z")]
    faults: list[DamagedDataError] = []
    found = list(tar.walk(io.BytesIO(archive(entries)), "s.tar", report=faults.append))
    assert [m.name for m in found] == ["a.txt", "c.txt"]
    assert [(fault.byte, fault.member) for fault in faults] == [(1024, "/b.txt"), (2048, "a.txt")]


@given(st.text(st.sampled_from("ab./_\n"), max_size=12))
@settings(max_examples=400, deadline=None)
def test_key_rule_is_webdatasets(name: str) -> None:
    key, extension = base_plus_ext(name)
    expected = None if key is None else (key, extension.lower())
    # To theirs, the hidden file ``a/.b`` is the extension ``b`` of the key ``a/``, and names end at a line break.
    if "\n" not in name and not name.rpartition("/")[2].startswith("."):
        assert split_name(name) == expected


@pytest.mark.parametrize(
    ("name", "meta"), [("__info__", True), ("__info__/a.txt", True), ("__a.txt", False), ("a__.txt", False)]
)
def test_metadata_is_what_webdataset_passes_over(name: str, meta: bool, tmp_path: Path) -> None:
    assert is_metadata(name) == meta
    (tmp_path / "a.tar").write_bytes(archive([(name, b"x"), ("k.txt", b"y")]))
    samples = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert (len(samples) == 1) == (meta or split_name(name) is None)


@pytest.mark.parametrize("extension", ["jpg", "seg.png", "000.flac", "lat.npy", "txt", "json"])
def test_known_extensions(extension: str) -> None:
    assert extension_problem(extension) is None


@pytest.mark.parametrize("extension", ["pyd", "pickle", "pkl", "pth", "pt", "pyd.txt", "x.pt", "pkl.gz"])
def test_pickles_are_refused_even_when_allowed(extension: str) -> None:
    assert "pickled Python objects" in str(extension_problem(extension, (extension,)))


def test_unknown_extensions_can_be_admitted() -> None:
    check: Callable[..., str | None] = extension_problem
    assert "unknown extension 'exe'" in str(check("exe"))
    assert check("exe", ("exe",)) is None
    assert "unknown" in str(check(""))
