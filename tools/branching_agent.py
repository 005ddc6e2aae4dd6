"""An agent whose conversations branch, for the picture of branches: it solves a problem twice, and asks twice about it.

millrace train examples/agents/run.yaml agent=tools/branching_agent.py:solve name=branches
"""

import json
import urllib.request
from typing import Any

EXPRESSION = {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]}
CALCULATOR = {"name": "calculator", "description": "Evaluates `a + b`.", "parameters": EXPRESSION}
Messages = list[dict[str, Any]]


def solve(prompt: str, base_url: str, api_key: str) -> str:
    asked: Messages = [{"role": "user", "content": prompt}]
    first, _ = (solved(asked, base_url, api_key) for _ in range(2))
    for question in ("Are you sure?", "Say it in other words."):
        turn([*first, {"role": "user", "content": question}], base_url, api_key)
    return str(first[-1].get("content") or "")


def solved(asked: Messages, base_url: str, api_key: str) -> Messages:
    """Return the conversation up to an answer without a tool call, after three turns at most."""
    messages = list(asked)
    for _ in range(3):
        said = turn(messages, base_url, api_key)
        messages.append(said)
        if not (calls := said.get("tool_calls")):
            break
        messages += [
            {"role": "tool", "tool_call_id": call["id"], "content": calculate(call["function"])} for call in calls
        ]
    return messages


def turn(messages: Messages, base_url: str, api_key: str) -> dict[str, Any]:
    body = {"model": "policy", "messages": messages, "tools": [{"type": "function", "function": CALCULATOR}]}
    headers = {"Authorization": f"Bearer {api_key}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{base_url}/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        said: dict[str, Any] = json.load(answer)["choices"][0]["message"]
    return said


def calculate(function: dict[str, str]) -> str:
    try:
        left, sign, right = json.loads(function["arguments"])["expression"].split()
        a, b = float(left), float(right)
        return f"{ {'+': a + b, '-': a - b, '*': a * b}[sign]:g}"
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        return f"Error: {error}"
