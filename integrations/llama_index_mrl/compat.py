"""llama-index-core: the keys under which a node is stored beside its metadata, as its public function writes them."""

from __future__ import annotations

from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores.utils import node_to_metadata_dict

TESTED = ">=0.14,<0.15"

_DOCUMENT = "a document"
_STORED = node_to_metadata_dict(
    TextNode(relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=_DOCUMENT)}), remove_text=True
)

# All of them: a record that has these was written by LlamaIndex.
NODE_KEYS = frozenset(_STORED)
# The kind of the node, as its class's `class_name()`.
TYPE_KEY = next(key for key, value in _STORED.items() if value == TextNode.class_name())
# The document that the node is a part of.
DOCUMENT_KEY = next(key for key, value in _STORED.items() if value == _DOCUMENT)
