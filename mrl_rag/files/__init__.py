"""Files to chunks, and folders of files to an index (extra `files`)."""

from mrl_rag.files.chunks import Chunk, load
from mrl_rag.files.finding import Problem
from mrl_rag.files.indexing import FilesReport, index_files

__all__ = ["Chunk", "FilesReport", "Problem", "index_files", "load"]
