"""Requests that name an adapter, after any sequence of loads, unloads and commits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.engines.stock.lora import LoadedLoras
from millrace.engines.stock.state import InvalidStateError
from millrace.types import GenerateRequest, SamplingParams

NAMES = ("a", "b")
steps = st.lists(st.tuples(st.sampled_from(["load", "unload", "commit"]), st.sampled_from(NAMES)))


def asked(name: str) -> GenerateRequest:
    return GenerateRequest((1,), SamplingParams(1), request_id="r", extra={"lora_path": name, "priority": 1})


@given(steps)
def test_a_request_has_its_adapter_none_or_is_refused(history: list[tuple[str, str]]) -> None:
    loras = LoadedLoras()
    became: dict[str, str] = {}  # for each name: on, off (by the last commit), away
    there: set[str] = set()
    for step, name in history:
        if step == "load" and name not in there:
            loras.book(name, len(there))
            there.add(name)
            became[name] = "on"
        elif step == "unload" and name in there:
            loras.unbook(name)
            there.remove(name)
            became[name] = "off" if became[name] == "off" else "away"
        elif step == "commit":
            loras.detach_all()
            for known in became:
                became[known] = "off" if known in there else "away"
    assert loras.loaded.keys() == there
    for name in NAMES:
        match became.get(name):
            case "on" | None:
                assert loras.served(asked(name)) == asked(name)
            case "off":
                assert loras.served(asked(name)).extra == {"priority": 1}
            case "away":
                with pytest.raises(InvalidStateError, match=f"the LoRA adapter {name} was unloaded"):
                    loras.served(asked(name))
