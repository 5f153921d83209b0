"""Real text that every machine has: the docstrings of the standard library and of installed scientific packages."""

from __future__ import annotations

import importlib
import inspect
import random
import re
import warnings
from collections.abc import Collection, Iterator
from types import ModuleType
from typing import NamedTuple

STANDARD = """
argparse array asyncio base64 bisect calendar cmath codecs collections concurrent.futures configparser contextlib copy
csv ctypes datetime decimal difflib email.message enum fileinput fnmatch fractions ftplib functools gc getpass glob
graphlib gzip hashlib heapq hmac html http.client http.server imaplib inspect io ipaddress itertools json logging
logging.handlers lzma mailbox math mimetypes mmap multiprocessing operator os os.path pathlib pickle platform plistlib
pprint queue random re sched secrets select selectors shelve shlex shutil signal smtplib socket socketserver sqlite3 ssl
stat statistics string struct subprocess sys tarfile tempfile textwrap threading time timeit traceback types typing
unicodedata unittest unittest.mock urllib.parse urllib.request uuid warnings weakref xml.etree.ElementTree zipfile zlib
""".split()  # noqa: SIM905
SCIENTIFIC = """
numpy numpy.fft numpy.linalg numpy.random
scipy.cluster.hierarchy scipy.fft scipy.integrate scipy.interpolate scipy.linalg scipy.ndimage scipy.optimize
scipy.signal scipy.sparse.linalg scipy.spatial scipy.stats
sklearn.cluster sklearn.compose sklearn.decomposition sklearn.ensemble sklearn.feature_extraction.text
sklearn.impute sklearn.linear_model sklearn.metrics sklearn.model_selection sklearn.neighbors sklearn.pipeline
sklearn.preprocessing sklearn.svm sklearn.tree
""".split()  # noqa: SIM905


class Passage(NamedTuple):
    """What one class, function or method does.

    Attributes:
        name: as one would import it, "concurrent.futures.ThreadPoolExecutor".
        summary: the first paragraph of its docstring.
        text: both, with the name in words as well: "... (thread pool executor): Initializes a new ...".
        package: the first part of the name.
    """

    name: str
    summary: str
    text: str
    package: str


def read_passages(packages: Collection[str] | None = None) -> list[Passage]:
    """Return a passage for each public class, function and method that has a docstring, in a shuffled order.

    A short text about one thing is easier to find than a long one: the vector of a whole docstring is mostly about its
    parameters. Shuffled, so that the first passages, on which an index may fit its rotation, are like the rest.

    Args:
        packages: read these alone, such as {"json", "numpy"}; None: all that are installed.
    """
    passages = []
    seen: set[str] = set()
    for module_name in STANDARD + SCIENTIFIC:
        package = module_name.partition(".")[0]
        if packages is not None and package not in packages:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                module = importlib.import_module(module_name)
            except ImportError:
                continue
        for name, docstring in _documented(module, module_name):
            if docstring not in seen:
                seen.add(docstring)
                summary = summarize(docstring)
                passages.append(Passage(name, summary, f"{title(name)}: {summary}", package))
    random.Random(0).shuffle(passages)
    return passages


def summarize(docstring: str) -> str:
    """Return the first paragraph on one line; the second one where the first repeats how to call the thing."""
    first, _, rest = inspect.cleandoc(docstring).partition("\n\n")
    if re.fullmatch(r"[\w.]+\(.*\)( -> .*)?", first, re.DOTALL) and rest:
        first = rest.strip().partition("\n\n")[0]
    return " ".join(first.split())


def title(name: str) -> str:
    """Return the name, followed by its last part in words where it has several: an encoder reads words."""
    last = name.rpartition(".")[2]
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|_", " ", last).lower().split()
    return f"{name} ({' '.join(words)})" if len(words) > 1 else name


def _documented(module: ModuleType, module_name: str) -> Iterator[tuple[str, str]]:
    package = module_name.partition(".")[0]
    for name in sorted(getattr(module, "__all__", None) or dir(module)):
        try:
            value = getattr(module, name)
        except (AttributeError, ImportError):  # scikit-learn's experimental names
            continue
        home = str(getattr(value, "__module__", None) or module_name)
        # What a module merely imports from elsewhere is documented there.
        foreign = home.lstrip("_").partition(".")[0] not in (package, "builtins") and module_name in SCIENTIFIC
        alias = inspect.isclass(value) and home == "builtins"
        if name.startswith("_") or inspect.ismodule(value) or foreign or alias or not callable(value):
            continue
        yield from _docstring(f"{module_name}.{name}", value)
        if inspect.isclass(value) and module_name in STANDARD:
            for method, inner in sorted(vars(value).items()):
                if callable(inner) and (not method.startswith("_") or (method == "__init__" and not value.__doc__)):
                    yield from _docstring(f"{module_name}.{name}.{method}".removesuffix(".__init__"), inner)


def _docstring(name: str, value: object) -> Iterator[tuple[str, str]]:
    text = getattr(value, "__doc__", None)
    if isinstance(text, str) and len(text) > 20:
        yield name, text
