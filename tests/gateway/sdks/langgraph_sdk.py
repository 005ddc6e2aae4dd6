"""LangGraph with langchain's clients, by chat completions, responses, and Anthropic's messages."""

from typing import Any

from langchain_anthropic import ChatAnthropic
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition

from tests.gateway.sdks.task import QUESTION, Site, clock, main, weather


def model(site: Site, max_tokens: int = 500) -> Any:
    settings: Any = {"model": "policy", "api_key": site.key, "max_tokens": max_tokens, "streaming": site.streamed}
    if site.protocol == "messages":
        return ChatAnthropic(base_url=site.url, **settings)
    return ChatOpenAI(base_url=f"{site.url}/v1", use_responses_api=site.protocol == "responses", **settings)


def play(site: Site) -> str:
    bound = model(site).bind_tools([weather, clock])
    graph: Any = StateGraph(MessagesState)
    graph.add_node("model", lambda state: {"messages": [bound.invoke(state["messages"])]})
    graph.add_node("tools", ToolNode([weather, clock]))
    graph.add_edge(START, "model")
    graph.add_conditional_edges("model", tools_condition)
    graph.add_edge("tools", "model")
    message = graph.compile().invoke({"messages": [("user", QUESTION)]})["messages"][-1]
    return str(message.text() if callable(message.text) else message.text)


def ask(site: Site) -> tuple[int, int]:
    usage = model(site, 8).invoke(QUESTION).usage_metadata
    return usage["input_tokens"], usage["output_tokens"]


if __name__ == "__main__":
    main(play, ask)
