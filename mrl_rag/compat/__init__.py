"""Undocumented parts of other libraries that this package relies on, one module per library.

Each module says which versions it was tested with (`TESTED`), and each function what is used instead where a version
lacks the part. `tests/test_compat.py` fails when a part changes.
"""
