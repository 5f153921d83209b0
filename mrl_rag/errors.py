"""Every error this package raises on purpose.

MrlRagError
├── InvalidInput (ValueError)
│   ├── InvalidDimension
│   ├── InvalidVectors
│   ├── InvalidTexts
│   ├── InvalidIds
│   ├── InvalidPlan
│   └── UnknownArgument (TypeError)
├── UnknownModel (ValueError)
├── ModelFilesError
├── EncoderClosed (RuntimeError)
├── RemoteEncoderError
├── EncoderOutOfMemory (MemoryError)
├── EncoderCacheError
├── MissingExtra (ImportError)
└── TwoStageIndexError
    ├── IndexMismatch
    │   ├── DimensionMismatch
    │   └── PlainCollection
    ├── ArchiveError
    ├── IndexNotWritable
    └── IndexClosed (RuntimeError)
"""


class MrlRagError(Exception):
    """Base of every error raised by mrl-rag."""


class InvalidInput(MrlRagError, ValueError):
    """An argument breaks a rule; nothing was done."""


class InvalidDimension(InvalidInput):
    """A dimension is not an integer in range."""


class InvalidVectors(InvalidInput):
    """Vectors have the wrong shape, or hold NaN or infinity."""


class InvalidTexts(InvalidInput):
    """A text is `None` or not a string, or a bare string stands where a list is needed."""


class InvalidIds(InvalidInput):
    """Ids are empty, repeated, or do not pair with what came with them."""


class InvalidPlan(InvalidInput):
    """A search plan or a number of hits can't be carried out."""


class UnknownArgument(InvalidInput, TypeError):
    """An argument has the name that another library gives it."""


class UnknownModel(MrlRagError, ValueError):
    """A model name is neither a known row, a folder nor a hub id that can be loaded."""


class ModelFilesError(MrlRagError):
    """A model's own files are missing, damaged or describe a recipe that is not supported."""


class EncoderClosed(MrlRagError, RuntimeError):
    """The encoder was closed, or is of use to a parent process alone; make a new one."""


class EncoderOutOfMemory(MrlRagError, MemoryError):
    """Not even one text alone fits the device's memory."""


class EncoderCacheError(MrlRagError):
    """A cache of vectors can't be read or written."""


class RemoteEncoderError(MrlRagError):
    """A server that encodes texts refused, kept failing, or gave an answer that isn't one."""


class MissingExtra(MrlRagError, ImportError):
    """An optional package is not installed."""


class TwoStageIndexError(MrlRagError):
    """Base of the errors about an index on disk or on a server."""


class IndexMismatch(TwoStageIndexError):
    """The index was filled with another model or format."""


class DimensionMismatch(IndexMismatch):
    """The index holds vectors of another length."""


class PlainCollection(IndexMismatch):
    """Under the index's name is a collection that Chroma alone, or another wrapper of it, has filled."""


class ArchiveError(TwoStageIndexError):
    """The archive of full vectors is missing or damaged."""


class IndexNotWritable(TwoStageIndexError):
    """The index's folder can't be written."""


class IndexClosed(TwoStageIndexError, RuntimeError):
    """The index was closed, or is of use to a parent process alone; open it again."""
