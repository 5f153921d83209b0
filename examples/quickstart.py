from mrl_rag import MatryoshkaEncoder, TwoStageRetriever

texts = [
    "numpy.pad adds zeros or other values around an array.",
    "concurrent.futures.ThreadPoolExecutor runs functions in a pool of threads.",
    "json.loads turns a JSON text into Python objects.",
]
retriever = TwoStageRetriever(MatryoshkaEncoder(), "./db")
retriever.index_texts(texts)
for hit in retriever.search("how do I run tasks in parallel?", k=2):
    print(f"{hit.score:.2f}  {hit.document}")
