"""Let a language model search by itself: a retriever as a LangChain tool. Runs offline: the model is a stand-in."""

from collections.abc import Sequence
from typing import Any

from docstrings import read_passages  # examples/docstrings.py, beside this file
from langchain_core.language_models import BaseChatModel, GenericFakeChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.tools import BaseTool, create_retriever_tool
from langchain_mrl import MatryoshkaEmbeddings, MatryoshkaVectorStore, TwoStageRetriever

QUESTION = "Which function of Python's standard library tells how much space is left on a disk?"


class ScriptedModel(GenericFakeChatModel):
    """A stand-in for a model that calls tools: it replies from a script."""

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> "ScriptedModel":  # type: ignore[override]
        """Accept any tools."""
        return self


def make_tool() -> BaseTool:
    """Return a tool that searches what the functions of Python's shutil module do."""
    store = MatryoshkaVectorStore.from_texts([p.text for p in read_passages({"shutil"})], MatryoshkaEmbeddings())
    return create_retriever_tool(
        TwoStageRetriever(vectorstore=store, k=1),
        name="search_python_docs",
        description="Find functions of Python's standard library by what they do.",
    )


def ask(llm: BaseChatModel, tools: list[BaseTool], question: str) -> list[BaseMessage]:
    """Let the model call tools until it answers, and return the conversation.

    `create_agent(llm, tools)` of the langchain package does this and more.
    """
    by_name = {tool.name: tool for tool in tools}
    bound = llm.bind_tools(tools)
    messages: list[BaseMessage] = [HumanMessage(question)]
    while True:
        reply = bound.invoke(messages)
        messages.append(reply)
        if not reply.tool_calls:
            return messages
        messages += [by_name[call["name"]].invoke(call) for call in reply.tool_calls]


def main() -> None:
    """Ask a question that needs one search."""
    call = {"name": "search_python_docs", "args": {"query": "free space on a disk"}, "id": "1"}
    # For a real one: llm = ChatOpenAI(model="gpt-4o-mini")
    llm = ScriptedModel(messages=iter([AIMessage("", tool_calls=[call]), AIMessage("It is shutil.disk_usage.")]))
    for message in ask(llm, [make_tool()], QUESTION):
        for call in getattr(message, "tool_calls", []):
            print(f"model calls {call['name']}({call['args']['query']!r})\n")
        if message.content:
            print(f"{message.type} says: {message.content}\n")


if __name__ == "__main__":
    main()
