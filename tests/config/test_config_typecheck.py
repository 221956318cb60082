from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.config.typecheck import UNSOUND, Report, check_value, describe_type, signature_specs
from pretrain.config.violation import Violation, render


@dataclass(frozen=True)
class Point:
    x: int
    y: float = 0.0


@dataclass(frozen=True)
class Circle:
    name: Literal["circle"] = "circle"
    radius: int = 1
    ring_width: int = 0


@dataclass(frozen=True)
class Square:
    name: Literal["square"] = "square"
    side: int = 1
    width: int = 0


Shape = Circle | Square

ACCEPTED: list[tuple[Any, Any, Any]] = [
    (int | float, 3, 3),
    (float | None, 3, 3.0),
    (dict[str, float], {"a": 1}, {"a": 1.0}),
    (dict[str, list[int]], {"a": [1]}, {"a": [1]}),
    (Mapping[str, int], {}, {}),
    (Sequence[int], [1, 2], [1, 2]),
    (tuple[int, ...], [1, 2, 3], (1, 2, 3)),
    (tuple[int, str], [1, "a"], (1, "a")),
    (list, [1, "a"], [1, "a"]),
    (Point | None, {"x": 1, "y": 2}, Point(1, 2.0)),
    (list[Point], [{"x": 1}], [Point(1)]),
    (Literal[1, "two"], "two", "two"),
    (Any, {"k": [None]}, {"k": [None]}),
    (Shape, {"name": "square", "side": 2}, Square(side=2)),
    (Shape, {"radius": 3}, Circle(radius=3)),
    (Shape, {}, Circle()),
]


@pytest.mark.parametrize(("annotation", "value", "expected"), ACCEPTED)
def test_values_that_fit_come_back_typed(annotation: Any, value: Any, expected: Any) -> None:
    report = Report()
    result = check_value(value, annotation, "f", report)
    assert (result, type(result)) == (expected, type(expected))
    assert report.violations == []
    assert report.sound["f"] == expected


@pytest.mark.parametrize(
    ("annotation", "value", "paths"),
    [
        (dict[str, int], {"a": "x", "b": 1, "c": None}, ["f.a", "f.c"]),
        (dict[str, int], {1: 1}, ["f"]),
        (list[list[int]], [[1], ["x"]], ["f[1][0]"]),
        (Point | None, {"x": "a", "z": 1}, ["f.z", "f.x"]),
        (Point | None, 3, ["f"]),
        (list[Point], [{"y": 1}], ["f[0].x"]),
        (list[int] | None, ["x"], ["f[0]"]),
        (int | str, 1.5, ["f"]),
        (Literal[1], True, ["f"]),
        (tuple[int, str], [1, 2], ["f[1]"]),
        (Shape, {"name": "square", "radius": 1, "side": "x"}, ["f.radius", "f.side"]),
        (Shape, {"name": "squre", "side": "x"}, ["f.name"]),
        (Shape, {"name": ["square"]}, ["f.name"]),
        (Shape, {"name": "???", "radius": "x"}, ["f.name", "f.radius"]),
        (Shape, None, ["f"]),
    ],
)
def test_faults_are_placed_as_deep_as_they_lie(annotation: Any, value: Any, paths: list[str]) -> None:
    report = Report()
    assert check_value(value, annotation, "f", report) is UNSOUND
    assert [v.path for v in report.violations] == paths
    assert "f" not in report.sound


@pytest.mark.parametrize(
    ("value", "fix"),
    [
        ({"name": "squre"}, "did you mean f=square?"),
        ({"name": "square", "sidee": 1}, "did you mean f.side?"),
        ({"name": "square", "ring_width": 1}, "ring_width belongs to f circle; remove it here, or choose f=circle"),
        ({"name": "square", "height": 1}, "remove it; known keys here: name, side, width"),
    ],
)
def test_members_of_a_union_are_told_apart_by_name(value: dict[str, Any], fix: str) -> None:
    report = Report()
    check_value(value, Shape, "f", report)
    assert [v.fix for v in report.violations] == [fix]


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@given(scalars, st.sampled_from([int, float, str, bool, type(None)]))
def test_scalars_fit_their_own_type_only_but_for_whole_numbers_as_floats(value: Any, annotation: type) -> None:
    fits = type(value) is annotation or (annotation is float and type(value) is int)
    report = Report()
    result = check_value(value, annotation, "f", report)
    if value == "???":
        return
    assert (result is not UNSOUND) == fits == (not report.violations)
    if fits:
        assert type(result) is annotation


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int | None, "a whole number or null"),
        (Literal["a", None], "one of a, null"),
        (list[str], "a list in which each element is text"),
        (tuple[float, float], "a list of 2: a number, a number"),
        (tuple[int, ...], "a list in which each element is a whole number"),
        (Point, "a mapping with x, y"),
        (dict[str, int], "a mapping"),
        (Shape, "a mapping whose name is circle or square"),
    ],
)
def test_types_are_described_in_words(annotation: Any, words: str) -> None:
    assert describe_type(annotation) == words


def test_annotations_that_exist_for_type_checkers_only_accept_anything() -> None:
    def build(width: int, dtype: Any, *rest: int, bias: bool = True, **options: Any) -> None:
        """Not called."""

    build.__annotations__["dtype"] = "only_for_type_checkers.dtype"

    specs, is_open = signature_specs(build)
    assert [(s.name, s.annotation) for s in specs] == [("width", Any), ("dtype", Any), ("bias", Any)]
    assert is_open


def test_a_report_shows_four_parts_of_every_violation() -> None:
    text = render([Violation("a.b", "x" * 500, "line 1\nline 2", "do it"), Violation("c", None, "r", "f")])
    lines = text.splitlines()
    assert lines[0] == "the configuration has 2 faults:"
    assert lines[2:4] == ["  a.b", "    found  '" + "x" * 196 + "..."]
    assert lines[4:7] == ["    rule   line 1", "           line 2", "    fix    do it"]
    assert lines[8:] == ["  c", "    found  None", "    rule   r", "    fix    f"]
