"""All concerns together: side by side, in order, each on its own, and what commands make of the result."""

from __future__ import annotations

import io
import json
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest

from pretrain.planning.preflight import findings as parts
from pretrain.planning.preflight.findings import Finding, Findings, Level, PreflightError, error, ok, warning
from pretrain.planning.preflight.registry import CONCERNS, Concern, examine
from pretrain.planning.preflight.subject import Subject

Check = Callable[[Subject], Iterator[Finding]]


@pytest.fixture
def concern(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Check], Concern]:
    """A concern of one's own, as a planner would add it: a module with ``check``."""

    def add(name: str, check: Check, needs: tuple[str, ...] = ()) -> Concern:
        module = ModuleType(f"concern_of_test_{name}")
        module.check = check  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return Concern(module.__name__, needs)

    return add


def test_findings_come_in_the_order_of_the_table(
    subject: Callable[..., Subject], concern: Callable[..., Concern]
) -> None:
    done = threading.Event()

    def slow(made: Subject) -> Iterator[Finding]:
        assert done.wait(10)
        yield ok("slow", "")

    def quick(made: Subject) -> Iterator[Finding]:
        yield error("quick", "", "", "")
        done.set()

    found = examine(subject(), {"first": concern("slow", slow), "second": concern("quick", quick)}, 20)
    assert [(finding.concern, finding.what) for finding in found.findings] == [("first", "slow"), ("second", "quick")]


def test_a_broken_check_and_a_silent_one_are_warnings(
    subject: Callable[..., Subject], concern: Callable[..., Concern]
) -> None:
    release = threading.Event()

    def broken(made: Subject) -> Iterator[Finding]:
        yield ok("before", "")
        raise RuntimeError("oh")

    def silent(made: Subject) -> Iterator[Finding]:
        yield ok("so far", "")
        release.wait(30)

    found = examine(subject(), {"broken": concern("broken", broken), "silent": concern("silent", silent)}, 0.2)
    release.set()
    assert [(finding.what, finding.level) for finding in found.findings] == [
        ("before", Level.OK),
        ("broken", Level.WARNING),
        ("so far", Level.OK),
        ("silent", Level.WARNING),
    ]
    assert found.passed


def test_nothing_is_said_of_faulty_nodes(subject: Callable[..., Subject], concern: Callable[..., Concern]) -> None:
    def check(made: Subject) -> Iterator[Finding]:
        yield error("judged", "", "", "")

    made = subject()
    faulty = Subject(made.tree, made.config, unusable=frozenset({"train"}))
    found = examine(faulty, {"one": concern("one", check, ("train",)), "two": concern("two", check, ("data",))}, 20)
    assert [finding.level for finding in found.findings] == [Level.UNKNOWN, Level.ERROR]


def test_every_concern_of_the_table_is_there(subject: Callable[..., Subject]) -> None:
    found = examine(subject(), CONCERNS, 60)
    named = {finding.concern for finding in found.findings}
    assert named == set(CONCERNS) - {"vocabulary"}  # these data have none
    assert found.passed


def test_errors_stop_unless_forced_and_warnings_are_printed() -> None:
    both = Findings((error("disk", "1 B", "2 B", "tidy up"), warning("server", "silent", "an answer", "wait")))
    out = io.StringIO()
    with pytest.raises(PreflightError, match="tidy up") as raised:
        parts.stop_on_errors(both, stream=out)
    assert raised.value.findings is both
    assert "silent" in out.getvalue()
    assert "tidy up" not in out.getvalue()
    out = io.StringIO()
    parts.stop_on_errors(both, force=True, stream=out)
    assert "tidy up" in out.getvalue()
    out = io.StringIO()
    parts.stop_on_errors(Findings((ok("all", "well"),)), stream=out)
    assert out.getvalue() == ""


def test_both_ways_of_showing_hold_everything() -> None:
    found = Findings((ok("a", "1"), error("b", "2", "3", "4", bytes=5), parts.unknown("c", "6")))
    out = io.StringIO()
    parts.show(found, out)
    lines = out.getvalue().splitlines()
    assert all(any(word in line for line in lines) for word in ("found     2", "expected  3", "fix       4", "6"))
    assert lines[-1] == "1 error, 0 warnings: the run would not start"
    plain = json.loads(json.dumps(found.to_json()))
    assert (plain["passed"], plain["errors"], plain["unknowns"], plain["ok"]) == (False, 1, 1, 1)
    assert plain["findings"][1]["figures"] == {"bytes": 5}
