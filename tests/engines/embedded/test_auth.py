"""Each key opens its own routes."""

import pytest

from millrace.engines.embedded.auth import Keys, allowed

A, B = "Bearer a", "Bearer b"


@pytest.mark.parametrize(
    ("keys", "opens"),
    [
        # For each header, whether it may use: health, read, control.
        (Keys(None, None), {None: "hrc", A: "hrc"}),
        (Keys("a", None), {None: "h", A: "hrc", B: "h"}),
        (Keys(None, "b"), {None: "hr", A: "hr", B: "hrc"}),
        (Keys("a", "b"), {None: "h", A: "hr", B: "hrc", "a": "h", "Basic a": "h", "bearer a": "hr", "Bearer ä": "h"}),
    ],
)
def test_each_key_opens_its_routes(keys: Keys, opens: dict[str | None, str]) -> None:
    for header, kinds in opens.items():
        assert allowed("/health", header, keys) == ("h" in kinds)
        for path in ("/generate", "/model_info", "/server_info", "/v1/loads", "/health_generate"):
            assert allowed(path, header, keys) == ("r" in kinds), (header, path)
        for path in ("/abort_request", "/end_weight_update", "/inject_fault", "/anything_new"):
            assert allowed(path, header, keys) == ("c" in kinds), (header, path)


def test_a_key_is_not_printed() -> None:
    assert "secret" not in repr(Keys("secret", "secret"))
