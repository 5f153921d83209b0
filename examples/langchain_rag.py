"""Answer a question from documents with a LangChain chain. Runs offline: the language model is a stand-in."""

from docstrings import read_passages  # examples/docstrings.py, beside this file
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel, ParrotFakeChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnablePassthrough
from langchain_mrl import MatryoshkaEmbeddings, MatryoshkaVectorStore, TokenBudget, TwoStageRetriever

PROMPT = ChatPromptTemplate.from_template(
    "Answer from these passages alone, and name the function.\n\n{context}\n\nQuestion: {question}"
)


def make_chain(store: MatryoshkaVectorStore, llm: BaseChatModel) -> Runnable[str, str]:
    """Return a chain from a question to an answer."""
    retriever = TwoStageRetriever(vectorstore=store, k=5)
    budget = TokenBudget(max_tokens=300, reserve=200)

    def as_context(documents: list[Document]) -> str:
        return "\n\n".join(document.page_content for document in budget.compress_documents(documents, ""))

    return {"context": retriever | as_context, "question": RunnablePassthrough()} | PROMPT | llm | StrOutputParser()


def main() -> None:
    """Index what the functions of Python's shutil module do, and ask a question."""
    documents = [Document(id=p.name, page_content=p.text) for p in read_passages({"shutil"})]
    store = MatryoshkaVectorStore.from_documents(documents, MatryoshkaEmbeddings())
    print(f"{len(documents)} documents are indexed.\n")

    question = "How do I copy a whole folder?"
    print(f"{question}\nThe nearest documents:")
    for document, cosine in store.similarity_search_with_score(question, k=3):
        print(f"  {cosine:.2f}  {document.id}")

    # The stand-in repeats its prompt. For a real answer: llm = ChatOpenAI(model="gpt-4o-mini")
    llm = ParrotFakeChatModel()
    print(f"\nWhat a language model is asked:\n\n{make_chain(store, llm).invoke(question)}")


if __name__ == "__main__":
    main()
