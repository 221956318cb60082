from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pretrain.config.check import check
from pretrain.config.components import (
    ForeignComponent,
    add_import_paths,
    build_component,
    is_config_class,
    path_fields,
    resolve_target,
)
from pretrain.config.violation import InvalidConfigError

MakeTree = Callable[..., dict[str, Any]]
PARTS = "components_of_a_user.parts"


@pytest.fixture(autouse=True)
def _importable(package_folder: str) -> None:
    add_import_paths([package_folder])


def test_targets_resolve_to_classes_functions_and_attributes_of_classes() -> None:
    from collections import OrderedDict

    assert resolve_target("collections.OrderedDict", "x") is OrderedDict
    assert resolve_target("collections.OrderedDict.fromkeys", "x") == OrderedDict.fromkeys


@pytest.mark.parametrize(
    ("target", "rule", "fix"),
    [
        ("no_such_package_here.mod.Class", "no module named 'no_such_package_here'", "run.import_paths"),
        (f"{PARTS}.Modle", "must define 'Modle'", "did you mean 'Module'"),
        (f"{PARTS[:-5]}prats.Model", "must define 'prats'", "did you mean 'parts'"),
        ("components_of_a_user.needs_missing.X", "'a_package_nobody_has', which is not installed", "install"),
        ("components_of_a_user.raises.X", "RuntimeError: no license", "import components_of_a_user.raises"),
        (f"{PARTS}.NOT_CALLABLE", "must be a class or a function, not int", "class"),
        ("Model", "dotted import path", "package.module.Class"),
        ("a b.c", "dotted import path", "package.module.Class"),
    ],
)
def test_unusable_targets_say_why(make_tree: MakeTree, target: str, rule: str, fix: str) -> None:
    with pytest.raises(InvalidConfigError) as caught:
        check(make_tree(model___target_=target, train__steps="x"))
    assert [v.path for v in caught.value.violations] == ["train.steps", "model._target_"]
    violation = caught.value.violations[1]
    assert violation.found == target
    assert rule in violation.rule
    assert fix in violation.fix


def test_config_classes_are_told_from_other_callables() -> None:
    assert is_config_class(resolve_target(f"{PARTS}.Model", "x"))
    assert not is_config_class(resolve_target(f"{PARTS}.Inner", "x"))  # a dataclass, but nothing to build
    assert not is_config_class(resolve_target(f"{PARTS}.Module", "x"))


def test_config_classes_are_instantiated_and_built_with_the_build_arguments(make_tree: MakeTree) -> None:
    config = check(make_tree(model__width=32))
    assert build_component(config.model, layers="plain torch") == "model of width 32 from plain torch"


def test_other_callables_are_checked_by_signature_and_built_from_their_fields(make_tree: MakeTree) -> None:
    tree = make_tree(model={"_target_": f"{PARTS}.Module", "width": 4, "gain": 2})
    model = check(tree).model
    assert model == ForeignComponent(f"{PARTS}.Module", {"width": 4, "gain": 2.0})
    module = build_component(model, layers="unused by foreign modules")
    assert (module.width, module.vocab_size, module.gain) == (4, 256, 2.0)

    with pytest.raises(InvalidConfigError) as caught:
        check(make_tree(model={"_target_": f"{PARTS}.Module", "gain": "loud", "hight": 3}))
    assert {v.path for v in caught.value.violations} == {"model.width", "model.gain", "model.hight"}


def test_rules_reach_fields_and_defaults_of_foreign_components(make_tree: MakeTree) -> None:
    with pytest.raises(InvalidConfigError) as caught:
        check(make_tree(model={"_target_": f"{PARTS}.Module", "width": 4}, data__vocab_size=1000))
    assert [(v.path, v.found) for v in caught.value.violations] == [("model.vocab_size", 256)]


def test_keyword_arguments_accept_any_key(make_tree: MakeTree) -> None:
    node = {"_target_": f"{PARTS}.open_ended", "width": 4, "colour": "red"}
    assert build_component(check(make_tree(model=node)).model) == (4, {"colour": "red"})


def test_a_constructor_that_refuses_becomes_a_violation(make_tree: MakeTree) -> None:
    with pytest.raises(InvalidConfigError, match="13 brings bad luck"):
        check(make_tree(model__width=13))


def test_a_raw_node_is_checked_before_it_is_built() -> None:
    assert build_component({"_target_": f"{PARTS}.Data", "path": "p"}, seed=3) == "p with seed 3"
    with pytest.raises(InvalidConfigError) as caught:
        build_component({"_target_": f"{PARTS}.Data", "pth": "p"}, seed=3)
    assert [v.path for v in caught.value.violations] == ["component.pth"]


def test_path_fields_come_from_the_class() -> None:
    assert path_fields({"_target_": f"{PARTS}.Data"}) == ("path", "extra_paths")
    assert path_fields({"_target_": f"{PARTS}.Module"}) == ()
    assert path_fields({"_target_": "nowhere.at.All"}) == ()
    assert path_fields("text") == ()
