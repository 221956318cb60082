"""Draws keyed by what they are for."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy
import pytest
import torch

from pretrain.ops.keyed_random import keyed_generator, keyed_seed


def draw(*key) -> torch.Tensor:
    return torch.randn(4, generator=keyed_generator(*key))


def test_draws_depend_on_the_key_alone():
    first = draw(0, "layers.3.mixer.A_log")
    torch.manual_seed(123)
    draw(0, "another")
    assert torch.equal(draw(0, "layers.3.mixer.A_log"), first)
    assert not torch.equal(draw(1, "layers.3.mixer.A_log"), first)


def test_keys_that_look_alike_are_different():
    keys = [(1, 23), (12, 3), (123,), ("1", 23), ((1, 23),), (1, (23,)), (True, 23), (None, 23), (1, "23")]
    assert len({keyed_seed(*key) for key in keys}) == len(keys)


def test_seed_is_the_same_in_another_process():
    """Also where Python's own hash() of a string is another."""
    code = "from pretrain.ops.keyed_random import keyed_seed; print(keyed_seed(7, 'dropout', (1, None)))"
    environment = {"PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(run.stdout) == keyed_seed(7, "dropout", (1, None))


def test_normal_draws_of_neighbouring_keys_are_independent():
    """Mean, variance and lag correlation of one draw per consecutive key, within 5 standard errors."""
    values = torch.cat([torch.randn(1, generator=keyed_generator(0, step, "site")) for step in range(4000)])
    error = 5 / len(values) ** 0.5
    assert abs(values.mean()) < error
    assert abs(values.var() - 1) < error * 2**0.5
    assert abs((values[1:] * values[:-1]).mean()) < error


@pytest.mark.parametrize("key", [(), (1.5,), (numpy.int64(3),), (torch.tensor(1),), (1, (2.0,))])
def test_unsuitable_keys_are_refused(key):
    with pytest.raises(ValueError, match="keyed_seed"):
        keyed_seed(*key)
