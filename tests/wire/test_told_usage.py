"""Token counts from the metadata of an access log's entry, as Envoy writes it."""

from typing import Any

import pytest
from google.protobuf.struct_pb2 import Struct  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st

from picker.types import Usage
from picker.wire.told_usage import IN_EVENTS, IN_JSON, usage_told


def told(**values: Any) -> Usage | None:
    struct = Struct()
    struct.update(values)
    return usage_told(struct.fields)


@pytest.mark.parametrize(
    ("values", "usage"),
    [
        ({"usage": '{"prompt_tokens": 9, "completion_tokens": 3}'}, Usage(9, 3)),
        (
            {"usage": '{"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 8}}'},
            Usage(9, 3, 8),
        ),
        ({"response": '{"input_tokens": 9, "output_tokens": 3}'}, Usage(9, 3)),
        (
            {"message": '{"input_tokens": 2, "cache_read_input_tokens": 7}', "usage": '{"output_tokens": 3}'},
            Usage(9, 3, 7),
        ),
        ({"message": '{"input_tokens": 2}', "usage": "no JSON"}, Usage(2, 0)),
        ({"usage": "{}"}, None),
    ],
)
def test_of_events_the_last_usage_counts_and_adds_to_the_first(values: dict[str, Any], usage: Usage | None) -> None:
    assert told(**values) == usage


@pytest.mark.parametrize(
    ("values", "usage"),
    [
        ({"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": 8}, Usage(9, 3, 8)),
        ({"input_tokens": 9, "output_tokens": 3, "input_tokens_details": 8}, Usage(9, 3, 8)),
        ({"input_tokens": 2, "output_tokens": 3, "cache_read_input_tokens": 7}, Usage(9, 3, 7)),
        ({"completion_tokens": 3}, None),
        ({"prompt_tokens": 1.5}, None),
        ({"prompt_tokens": float("inf")}, None),
        ({"prompt_tokens": "9"}, None),
        ({}, None),
    ],
)
def test_of_other_answers_each_count_is_told_by_itself(values: dict[str, Any], usage: Usage | None) -> None:
    assert told(**values) == usage


_values = st.one_of(st.none(), st.booleans(), st.floats(), st.text(), st.lists(st.floats(), max_size=2))


@given(st.dictionaries(st.sampled_from([*IN_EVENTS, *IN_JSON]), _values))
def test_whatever_an_engine_says_is_no_error(values: dict[str, Any]) -> None:
    told(**values)
