"""Garbage collection while traffic passes."""

from __future__ import annotations

import gc

import pytest

from picker.frontends import collector


def test_what_is_there_at_the_start_is_not_walked_again_and_all_ends_as_it_was() -> None:
    before = gc.get_threshold()
    with collector.seldom():
        assert gc.get_freeze_count() > 0
        assert gc.get_threshold() > before
    assert (gc.get_freeze_count(), gc.get_threshold()) == (0, before)


def test_an_error_within_ends_it_too() -> None:
    before = gc.get_threshold()
    with pytest.raises(KeyError), collector.seldom():
        raise KeyError
    assert gc.get_threshold() == before
