"""`MatryoshkaTranslator`: the filters of a `SelfQueryRetriever` in Chroma's language."""

from __future__ import annotations

from typing import Any

from langchain_core.structured_query import Comparator, Comparison, Operation, Operator, StructuredQuery, Visitor


class MatryoshkaTranslator(Visitor):
    """Translates the structured queries of LangChain's `SelfQueryRetriever` for a `MatryoshkaVectorStore`.

    `SelfQueryRetriever` finds a translator by itself for LangChain's own stores only, so pass this one:

        SelfQueryRetriever.from_llm(llm, store, "what the documents are", fields,
                                    structured_query_translator=MatryoshkaTranslator())
    """

    allowed_operators = (Operator.AND, Operator.OR)
    allowed_comparators = (
        Comparator.EQ,
        Comparator.NE,
        Comparator.GT,
        Comparator.GTE,
        Comparator.LT,
        Comparator.LTE,
        Comparator.IN,
        Comparator.NIN,
    )

    def visit_operation(self, operation: Operation) -> dict[str, Any]:
        """Translate "and" or "or".

        Raises:
            ValueError: another operator.
        """
        self._validate_func(operation.operator)
        return {f"${operation.operator.value}": [part.accept(self) for part in operation.arguments]}

    def visit_comparison(self, comparison: Comparison) -> dict[str, Any]:
        """Translate a comparison.

        Raises:
            ValueError: a comparator that Chroma doesn't have.
        """
        self._validate_func(comparison.comparator)
        return {comparison.attribute: {f"${comparison.comparator.value}": comparison.value}}

    def visit_structured_query(self, structured_query: StructuredQuery) -> tuple[str, dict[str, Any]]:
        """Return the question, and the search arguments for it."""
        wanted = structured_query.filter
        return structured_query.query, {} if wanted is None else {"filter": wanted.accept(self)}
