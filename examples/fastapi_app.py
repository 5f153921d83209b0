"""A search service: several workers, each with the model, over one Chroma server.

    pip install fastapi uvicorn && chroma run --path ./chroma_data --port 8001
    CHROMA_PORT=8001 uvicorn --app-dir examples fastapi_app:app --workers 2
    curl localhost:8000/texts -H content-type:application/json -d '{"texts": ["A thread pool runs functions."]}'
    curl 'localhost:8000/search?question=parallel%20work&k=3'

Every worker may write, and the others find it at their next search.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import chromadb
from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from mrl_rag import MatryoshkaEncoder, MrlRagError, TwoStageIndex, TwoStageRetriever
from mrl_rag.errors import ServerUnavailable


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Load the model once per worker, after it was forked."""
    client = chromadb.HttpClient(os.environ.get("CHROMA_HOST", "localhost"), int(os.environ.get("CHROMA_PORT", "8001")))
    index = TwoStageIndex(collection=os.environ.get("COLLECTION", "docs"), client=client)
    with MatryoshkaEncoder() as encoder, index:
        app.state.retriever = TwoStageRetriever(encoder, index)
        yield


app = FastAPI(lifespan=lifespan)


class Texts(BaseModel):
    """Texts to store, and metadata of each."""

    texts: list[str]
    metadatas: list[dict[str, str | int | float | bool] | None] | None = None


@app.exception_handler(MrlRagError)
def refuse(request: Request, error: MrlRagError) -> JSONResponse:
    """Say what is wrong with a request, or that Chroma's server is out of reach."""
    return JSONResponse({"detail": str(error)}, 503 if isinstance(error, ServerUnavailable) else 422)


@app.post("/texts")
def store(body: Texts, request: Request) -> dict[str, Any]:
    """Store texts. FastAPI runs this in a thread, so that other requests are answered meanwhile."""
    ids = request.app.state.retriever.index_texts(body.texts, metadatas=body.metadatas)
    return {"ids": ids, "worker": os.getpid()}


@app.get("/search")
def search(question: Annotated[str, Query(min_length=1)], request: Request, k: int = 5) -> dict[str, Any]:
    """Return the k nearest texts."""
    return {"hits": request.app.state.retriever.search(question, k), "worker": os.getpid()}
