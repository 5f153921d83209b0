"""Every error this package raises on purpose.

MrlRagError
├── InvalidInput (ValueError)
│   ├── InvalidDimension
│   ├── InvalidVectors
│   ├── InvalidTexts
│   ├── InvalidIds
│   ├── InvalidPlan
│   ├── HeadMismatch
│   └── UnknownArgument (TypeError)
├── UnknownModel (ValueError)
├── ModelFilesError
├── EncoderClosed (RuntimeError)
├── RemoteEncoderError
├── EncoderOutOfMemory (MemoryError)
├── EncoderCacheError
├── MissingExtra (ImportError)
├── ShardError
├── WorkerError
└── TwoStageIndexError
    ├── IndexMismatch
    │   ├── DimensionMismatch
    │   └── PlainCollection
    ├── ArchiveError
    ├── IndexNotWritable
    ├── ServerUnavailable (ConnectionError)
    └── IndexClosed (RuntimeError)
"""


class MrlRagError(Exception):
    """Base of every error raised by mrl-rag."""


class InvalidInput(MrlRagError, ValueError):
    """An argument is wrong; nothing was done."""


class InvalidDimension(InvalidInput):
    """A dimension is not an integer in range."""


class InvalidVectors(InvalidInput):
    """Vectors have the wrong shape, or hold NaN or infinity."""


class InvalidTexts(InvalidInput):
    """A text is not a string, or a single string was given for a list."""


class InvalidIds(InvalidInput):
    """Ids are empty or repeated, or there are not as many as texts, vectors or metadatas."""


class InvalidPlan(InvalidInput):
    """A search plan or a number of hits can't be carried out."""


class HeadMismatch(InvalidInput):
    """A head was fitted on the vectors of another encoder, or an index has one already."""


class UnknownArgument(InvalidInput, TypeError):
    """An argument was given under the name that it has in another library."""


class UnknownModel(MrlRagError, ValueError):
    """A model's name is neither a short name, a folder nor a hub id that can be loaded."""


class ModelFilesError(MrlRagError):
    """A model's files are missing or damaged, or ask for a step that is not supported."""


class EncoderClosed(MrlRagError, RuntimeError):
    """The encoder was closed, or belongs to a parent process; make a new one."""


class EncoderOutOfMemory(MrlRagError, MemoryError):
    """The device's memory doesn't hold a single text."""


class EncoderCacheError(MrlRagError):
    """A cache of vectors can't be read or written."""


class RemoteEncoderError(MrlRagError):
    """An embedding server refused, kept failing, or gave an answer that can't be read."""


class MissingExtra(MrlRagError, ImportError):
    """An optional package is not installed."""


class ShardError(MrlRagError):
    """A folder of shards is damaged or not complete, or one of its files isn't what the manifest says."""


class WorkerError(MrlRagError):
    """Workers on a cluster kept failing, or the cluster did."""


class TwoStageIndexError(MrlRagError):
    """Base of the errors about an index on disk or on a server."""


class IndexMismatch(TwoStageIndexError):
    """The index was filled by another model, or has another format."""


class DimensionMismatch(IndexMismatch):
    """The index holds vectors of another length."""


class PlainCollection(IndexMismatch):
    """The collection has records that were not written by a two-stage index."""


class ArchiveError(TwoStageIndexError):
    """The archive of full vectors is missing or damaged."""


class IndexNotWritable(TwoStageIndexError):
    """The index's folder can't be written."""


class ServerUnavailable(TwoStageIndexError, ConnectionError):
    """The Chroma server didn't answer in time, or can't be reached."""


class IndexClosed(TwoStageIndexError, RuntimeError):
    """The index was closed, or belongs to a parent process; open it again."""
