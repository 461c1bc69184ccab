"""Templates that loop over the content of messages want parts; vLLM's guess, for the shapes found in models."""

from __future__ import annotations

import jinja2
import pytest

from picker.tokenizers.content_format import wants_parts

MACRO = "{% macro r(x) %}{% for c in x %}{% endfor %}{% endmacro %}"


@pytest.mark.parametrize(
    "source",
    [
        "{% for message in messages %}{% for part in message['content'] %}{% endfor %}{% endfor %}",
        "{% for m in messages %}{% for part in m.content %}{% endfor %}{% endfor %}",
        "{% for m in messages[1:] %}{% for c in m.content | list %}{% endfor %}{% endfor %}",
        "{% set seen = messages %}{% for m in seen %}{% for c in m.content %}{% endfor %}{% endfor %}",
        "{% set a = messages[1:] %}{% set b = a %}{% for m in b %}{% for c in m.content %}{% endfor %}{% endfor %}",
        "{% for m in messages %}{% set content = m.content %}{% for c in content %}{% endfor %}{% endfor %}",
        MACRO + "{% for m in messages %}{{ r(m.content) }}{% endfor %}",
        MACRO + "{% for m in messages %}{{ r(x=m.content) }}{% endfor %}",
    ],
)
def test_a_loop_over_content_wants_parts(source: str) -> None:
    assert wants_parts(jinja2.Environment().parse(source))


@pytest.mark.parametrize(
    "source",
    [
        "{% for message in messages %}{{ message.content }}{% endfor %}",
        "{% for m in messages %}{% for call in m.tool_calls %}{% endfor %}{% endfor %}",
        "{% for m in others %}{% for c in m.content %}{% endfor %}{% endfor %}",
        "{% macro r(content) %}{% for c in content %}{% endfor %}{% endmacro %}{{ r(x) }}",
        "{% for m in messages %}{% for a, b in m.content %}{% endfor %}{% endfor %}",
        "{% for i, m in messages %}{% for c in m.content %}{% endfor %}{% endfor %}",
        "{% set a = messages %}{% set messages = a %}{{ a }}",
        "",
    ],
)
def test_other_templates_want_strings(source: str) -> None:
    assert not wants_parts(jinja2.Environment().parse(source))
