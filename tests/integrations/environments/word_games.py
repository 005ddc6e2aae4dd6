"""A verifiers environment of the tests: a taskset and its own harness, a program that plays in one of the protocols."""

# verifiers is untyped where mypy runs.
# mypy: disable-error-code="misc, untyped-decorator, no-any-return"

import asyncio
import sys
from collections.abc import Iterator

import verifiers.v1 as vf

PROGRAM = """
import json, sys, urllib.request

url, key, word, tries, protocol = sys.argv[1:6]
def request(route, **body):
    headers = {"Authorization": f"Bearer {key}", "x-api-key": key, "Content-Type": "application/json"}
    return urllib.request.urlopen(urllib.request.Request(url + route, json.dumps(body).encode(), headers))

def asked(protocol, messages):
    if protocol == "chat":
        with request("/chat/completions", model="policy", messages=messages) as answer:
            return json.load(answer)["choices"][0]["message"]
    if protocol == "responses":
        with request("/responses", model="policy", input=messages) as answer:
            text = json.load(answer)["output"][-1]["content"][0]["text"]
    if protocol == "messages":
        system, *rest = messages
        body = {"model": "policy", "system": system["content"], "messages": rest, "max_tokens": 32}
        with request("/messages", stream=True, **body) as answer:
            events = [json.loads(line[6:]) for line in answer if line.startswith(b"data: ")]
        text = "".join(event["delta"].get("text", "") for event in events if event["type"] == "content_block_delta")
    return {"role": "assistant", "content": text}

messages = [{"role": "system", "content": "Guess."}, {"role": "user", "content": "Which word?"}]
for _ in range(int(tries)):
    try:
        message = asked(protocol, messages)
    except urllib.error.HTTPError as error:
        sys.exit(0 if error.code == 400 and b"context_length_exceeded" in error.read() else 3)
    messages.append(message)
    if message["content"] == word:
        break
    if message["content"] == "forget":
        del messages[1:]
    if message["content"] == "die":
        sys.exit("the harness died")
    messages.append({"role": "user", "content": f"No, not {message['content']}."})
"""


class WordData(vf.TaskData):
    word: str


class WordTask(vf.Task[WordData]):
    async def setup(self, trace: vf.Trace, runtime: vf.Runtime) -> None:
        if self.data.word == "broken":
            raise RuntimeError("no\nsuch word")

    @vf.reward(weight=1.0)
    async def right(self, trace: vf.Trace) -> float:
        reply = trace.assistant_messages[-1].content
        if reply == "raise":
            raise ValueError("the reward\nraised")
        if reply == "hang":
            await asyncio.sleep(60)
        return float(reply == self.data.word)

    @vf.reward(weight=-0.1)
    async def turns(self, trace: vf.Trace) -> float:
        return trace.num_turns


class WordsConfig(vf.TasksetConfig):
    words: tuple[str, ...] = ("eggs", "cards", "pens")


class Words(vf.Taskset[WordTask, WordsConfig]):
    def load(self) -> Iterator[WordTask]:
        for word in self.config.words:
            yield WordTask(WordData(prompt="Which word?", word=word, id=f"word-{word}"), self.config.task)


class WordHarnessConfig(vf.HarnessConfig):
    tries: int = 3
    protocol: str = "chat"  # or responses, or messages, which are streamed


class WordHarness(vf.Harness[WordHarnessConfig]):
    NEEDS_CONTAINER = False
    EXECUTES_CODE = False

    async def launch(
        self,
        ctx: vf.ModelContext,
        trace: vf.Trace,
        runtime: vf.Runtime,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: WordData,
    ) -> vf.ProgramResult:
        arguments = [endpoint, secret, data.word, str(self.config.tries), self.config.protocol]
        return await runtime.run_program([sys.executable, "-c", PROGRAM, *arguments], {})


__all__ = ["WordHarness", "Words"]
