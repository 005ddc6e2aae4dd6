"""How a turn of the model becomes an action of OpenEnv. tests/integrations/environments plays on a real server."""

from typing import Any

import pytest

from millrace.rollout.adapters.openenv import Field, required_field


@pytest.mark.parametrize(
    ("schema", "field"),
    [
        ({"properties": {"code": {"type": "string"}}, "required": ["code"]}, Field("code", is_text=True)),
        ({"properties": {"number": {"type": "integer"}}, "required": ["number"]}, Field("number", is_text=False)),
        ({"properties": {"any": {}}, "required": ["any"]}, Field("any", is_text=False)),
        ({"properties": {"x": {}, "y": {}}, "required": ["x", "y"]}, None),
        ({"properties": {"x": {}}}, None),
    ],
)
def test_a_plain_text_becomes_the_one_field_that_is_required(schema: dict[str, Any], field: Field | None) -> None:
    assert required_field(schema) == field
