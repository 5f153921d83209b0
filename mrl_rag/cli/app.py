"""The subcommands, and what a process makes of errors, warnings and interruptions."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mrl_rag import MrlRagError, TwoStageIndex, TwoStageRetriever, __version__
from mrl_rag.cli.conditions import parse_integers, parse_where
from mrl_rag.errors import InvalidInput

if TYPE_CHECKING:
    from mrl_rag import Encoder

FINE, TROUBLE, USAGE, INTERRUPTED = 0, 1, 2, 130
# "\b" keeps the lines of a paragraph apart.
_EPILOG = """
\b
Examples:
  mrl-rag index ./notes
  mrl-rag search "how do I renew my passport?"
  mrl-rag doctor

Exit codes: 0 fine, 1 trouble found, 2 usage or refused, 130 interrupted.
"""

app = typer.Typer(
    name="mrl-rag",
    help="Search your files from the shell, and look after their index.",
    epilog=_EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

Db = Annotated[Path, typer.Option("--db", help="Folder of the index.")]
Collection = Annotated[str | None, typer.Option(help="Its collection; the only one there is, if not named.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")]
Folder = Annotated[Path | None, typer.Argument(metavar="DB", help="Folder of the index, as --db.")]
DataOrFolder = Annotated[
    Path | None, typer.Argument(metavar="DIR|DB", help="BEIR folder, or folder of an index, as --db.")
]
Dims = Annotated[str | None, typer.Option(metavar="N,N,...", help="Dimensions to try.")]


def _in_a_folder(file: Path | None) -> Path | None:
    """Refuse a file to write whose folder isn't there, before the work whose result it takes."""
    if file is not None and not file.absolute().parent.is_dir():
        raise typer.BadParameter(f"{file} can't be written: there is no folder {file.parent}.")
    return file


def run(arguments: Sequence[str] | None) -> int:
    """Run the command, and return its exit status; see `mrl_rag.cli.main`."""
    _write_everything()
    command = typer.main.get_command(app)
    with _plain_warnings():
        try:
            status = command.main(args=arguments, prog_name="mrl-rag", standalone_mode=False)
            sys.stdout.flush()
        except typer.TyperException as error:
            message = error.format_message().rstrip(".")
            _say(f"mrl-rag: {message}. See mrl-rag --help, or mrl-rag COMMAND --help.")
            return USAGE
        except MrlRagError as error:
            _say(f"mrl-rag: {error}")
            return USAGE
        except typer.Abort:
            status = INTERRUPTED
        except BrokenPipeError:
            # The reader of the pipe, such as `head`, has had enough.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FINE
        except SystemExit:
            # So rich and typer end a command at a closed pipe, and typer once it has printed a completion.
            return FINE
    if status == INTERRUPTED:
        if sys.stderr.isatty():
            # After the prompt or the bar that was interrupted.
            sys.stderr.write("\n")
        _say("mrl-rag: interrupted; what was stored stays. Run the same command again to go on.")
    return status if isinstance(status, int) else FINE


def _write_everything() -> None:
    """Escape what the terminal's encoding lacks, instead of failing at it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show each warning once, as one line without its place in the code."""
    with warnings.catch_warnings():
        warnings.simplefilter("once", UserWarning)
        warnings.showwarning = lambda message, *rest, **settings: _say(f"mrl-rag: {message}")
        yield


def _say(text: str) -> None:
    sys.stderr.write(" ".join(text.split()) + "\n")


def _print_json(value: object, indent: int | None = 2) -> None:
    # ASCII, which every encoding has.
    sys.stdout.write(json.dumps(value, indent=indent, default=str) + "\n")


def _show_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"mrl-rag {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Say what the index chooses and why.")] = False,
) -> None:
    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)


@app.command(epilog="Example: mrl-rag index ./notes README.md --exclude drafts")
def index(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH", help="Files and folders.")],
    db: Db = Path("./db"),
    collection: Annotated[str, typer.Option(help="Its collection.")] = "docs",
    model: Annotated[
        str | None,
        typer.Option(help="Model of a new index: a short name (see `mrl-rag models`), hub id or folder; else minilm."),
    ] = None,
    glob: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Take only files like '*.md' from folders.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Leave out files and folders like this.")
    ] = None,
    keep_removed: Annotated[bool, typer.Option("--keep-removed", help="Keep what is gone from the folders.")] = False,
    chunk_tokens: Annotated[int | None, typer.Option(help="Longest passage in tokens; 256 if not named.")] = None,
    as_json: Json = False,
) -> int:
    """Put files into an index. Again: only what changed is encoded, and what is gone is removed."""
    from mrl_rag.cli.output import print_files
    from mrl_rag.files import index_files

    # The model before the folder, which isn't made for a model that can't be had.
    known = db.is_dir() and collection in TwoStageIndex.names(db)
    encoder = None if known and model is None else _encoder(model or "minilm")
    with TwoStageRetriever(encoder, db, collection) as retriever:
        report = index_files(
            paths,
            retriever,
            glob=glob or (),
            exclude=exclude or (),
            keep_removed=keep_removed,
            chunk_tokens=chunk_tokens,
            progress=True,
        )
    if as_json:
        _print_json(_as_dict(report))
    else:
        print_files(report)
    return FINE if report.ok else TROUBLE


@app.command(epilog="Example: mrl-rag search 'how do I pad an array?' -k 3 --where page=3")
def search(
    question: Annotated[str | None, typer.Argument(metavar="QUESTION", help="None to be asked.")] = None,
    db: Db = Path("./db"),
    collection: Collection = None,
    k: Annotated[int, typer.Option("-k", help="How many passages.")] = 5,
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION", help="Condition on metadata: KEY=VALUE, also with !=, <, <=, >, >=. All must hold."
        ),
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show what each stage made of a passage.")] = False,
    as_json: Json = False,
) -> int:
    """Find the passages that answer a question. Without one, asks for questions and keeps the model loaded."""
    from mrl_rag.cli.output import print_hits

    condition = parse_where(where or [])
    with _open(db, collection) as opened, TwoStageRetriever(None, opened) as retriever:
        for asked in [question] if question is not None else _questions():
            hits = retriever.search(asked, k, where=condition, explain=explain)
            if as_json:
                for hit in hits:
                    _print_json({"question": asked, **_as_dict(hit)}, indent=None)
            else:
                print_hits(asked, hits, explain)
            sys.stdout.flush()
    return FINE


def _questions() -> Iterator[str]:
    """Yield the lines of standard input; on a terminal, ask for them."""
    if not sys.stdin.isatty() or not sys.stdout.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    with suppress(ImportError):
        import readline  # noqa: F401  (gives `input` a history)
    with suppress(EOFError):
        while True:
            if asked := input("? ").strip():
                yield asked
    sys.stdout.write("\n")


@app.command(epilog="Example: mrl-rag info --db ./db")
def info(folder: Folder = None, db: Db = Path("./db"), collection: Collection = None, as_json: Json = False) -> int:
    """Show what a folder holds: models, dimensions, recall, bytes."""
    from mrl_rag.cli.output import print_info

    found = []
    for name in _collections(folder or db, collection):
        with TwoStageIndex(folder or db, name) as opened:
            found.append(opened.info())
    if as_json:
        _print_json([_as_dict(part) for part in found])
    else:
        print_info(found)
    return FINE


@app.command(epilog="Example: mrl-rag models --language multilingual")
def models(
    language: Annotated[
        Literal["en", "zh", "ja", "multilingual"] | None,
        typer.Option(help="Only models for this language; multilingual ones know it as well."),
    ] = None,
    as_json: Json = False,
) -> int:
    """List the models, and which are on this machine."""
    from mrl_rag.cli.output import print_models
    from mrl_rag.encoder import find_on_disk
    from mrl_rag.models import rows_for

    rows = rows_for(language)
    places = {row.name: find_on_disk(row.name) for row in rows}
    if as_json:
        keys = ("name", "hub_id", "full_dim", "dims", "max_length", "languages", "licence", "note")
        _print_json([{**{key: getattr(row, key) for key in keys}, "folder": places[row.name]} for row in rows])
    else:
        print_models(rows, places)
    return FINE


@app.command(epilog="Example: mrl-rag doctor --db ./db")
def doctor(
    folder: Folder = None,
    db: Annotated[Path | None, typer.Option("--db", help="Also check the indexes in this folder.")] = None,
    as_json: Json = False,
) -> int:
    """Examine this machine, the model and a folder's indexes."""
    from mrl_rag.cli.output import print_findings
    from mrl_rag.doctor import examine

    findings = examine(folder or db)
    if as_json:
        _print_json([_as_dict(finding) for finding in findings])
    else:
        print_findings(findings)
    return TROUBLE if any(finding.kind == "trouble" for finding in findings) else FINE


@app.command(epilog="Example: mrl-rag evaluate ./db --pairs asked.csv --dims 192,64")
def evaluate(
    folder: DataOrFolder = None,
    db: Db = Path("./db"),
    collection: Collection = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Questions and passages that answer them: .jsonl, .csv or .tsv. Without DIR|DB, alone."
        ),
    ] = None,
    ask: Annotated[
        Literal["records", "sentences"],
        typer.Option(help="Without pairs, what an index is asked: records, or titles and first sentences."),
    ] = "records",
    model: Annotated[
        str | None, typer.Option(help="Model for a BEIR folder or pairs alone; minilm if not named.")
    ] = None,
    dims: Dims = None,
    sizes: Annotated[str, typer.Option(metavar="N,N,...", help="Shortlist sizes to try.")] = "50",
    precisions: Annotated[
        str, typer.Option(metavar="NAME,...", help="Of float32, float16, int8, binary.")
    ] = "float32,int8",
    save: Annotated[
        Path | None,
        typer.Option(metavar="FILE", dir_okay=False, callback=_in_a_folder, help="Also write the JSON here."),
    ] = None,
    as_json: Json = False,
) -> int:
    """Measure what fewer dimensions cost."""
    from mrl_rag.cli.output import print_evaluation
    from mrl_rag.evaluation import evaluate as evaluate_dataset
    from mrl_rag.evaluation import evaluate_index, read_dataset, read_pairs

    settings: dict[str, Any] = {
        "dims": parse_integers("--dims", dims) if dims else None,
        "sizes": parse_integers("--sizes", sizes),
        "precisions": [name.strip() for name in precisions.split(",")],
    }
    asked = read_pairs(pairs) if pairs else None
    named = read_dataset(folder, asked)
    if named is not None:
        with _encoder(model or "minilm") as encoder:
            found = evaluate_dataset(named, encoder, progress=True, **settings)
    else:
        with _open(folder or db, collection) as opened, ExitStack() as stack:
            texts = asked is not None or ask == "sentences"
            filled_by = stack.enter_context(TwoStageRetriever(None, opened)).encoder if texts else None
            found = evaluate_index(opened, filled_by, pairs=asked, ask=ask, **settings)
    if as_json:
        _print_json(json.loads(found.to_json()))
    else:
        print_evaluation(found)
    if save:
        try:
            save.write_text(found.to_json(), encoding="utf-8")
        except OSError as error:
            raise InvalidInput(f"{save} can't be written: {error}. Name another file.") from error
    return FINE


@app.command(epilog="Example: mrl-rag report ./db --color-by author")
def report(
    folder: DataOrFolder = None,
    db: Db = Path("./db"),
    collection: Collection = None,
    model: Annotated[str | None, typer.Option(help="Model for a BEIR folder; minilm if not named.")] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="What `mrl-rag evaluate --save` wrote; it is measured now, if not named.",
        ),
    ] = None,
    color_by: Annotated[str | None, typer.Option(metavar="KEY", help="Metadata key that colours the map.")] = None,
    output: Annotated[
        Path, typer.Option(metavar="FILE", dir_okay=False, callback=_in_a_folder, help="The page to write.")
    ] = Path("report.html"),
    as_json: Json = False,
) -> int:
    """Draw what dimensions cost and a map of the records, on one page."""
    from mrl_rag.evaluation import Evaluation, default_dims, encode_dataset, evaluate_index, read_dataset, sweep
    from mrl_rag.report import dataset_records, index_records, write_report

    found = Evaluation.from_json(evaluation.read_text("utf-8", errors="replace")) if evaluation else None
    named = read_dataset(folder, None)
    if named is not None:
        with _encoder(model or "minilm") as encoder:
            encoded = encode_dataset(named, encoder, progress=True)
            found, records = (
                found or sweep(encoded, default_dims(encoder.full_dim, encoder.dims)),
                dataset_records(encoded),
            )
    else:
        with _open(folder or db, collection) as opened:
            found, records = found or evaluate_index(opened), index_records(opened)
    options = {"--collection": collection, "--model": model, "--evaluation": evaluation, "--color-by": color_by}
    given = [str(part) for option in options.items() if option[1] is not None for part in option]
    command = shlex.join(["mrl-rag", "report", str(folder or db), *given])
    write_report(output, found, records, color_by, command=command)
    searches = len(found.results) + 1
    _report(
        as_json,
        f"{searches} searches of {found.records:,} records in {output}",
        {"file": str(output), "searches": searches},
    )
    return FINE


@app.command(epilog="Example: mrl-rag export backup.parquet --db ./db")
def export(
    file: Annotated[
        str, typer.Argument(metavar="FILE|DIR|URL", help="A new file: .parquet or .jsonl. Or a folder of shards.")
    ],
    db: Db = Path("./db"),
    collection: Collection = None,
    as_json: Json = False,
) -> int:
    """Write all records to a file or to shards, as a backup. Others may search and write meanwhile."""
    with _open(db, collection) as opened:
        records = opened.export(file, progress=True)
    _report(as_json, f"{records:,} records in {file}", {"records": records, "file": file})
    return FINE


@app.command(epilog="Example: mrl-rag encode s3://bucket/corpus --output s3://bucket/shards --engine ray")
def encode(
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT", help="Parquet, JSON lines, folders or URLs of these, or an index's folder."),
    ],
    output: Annotated[str, typer.Option(metavar="DIR|URL", help="Folder of the shards.")],
    model: Annotated[
        str, typer.Option(help="Model: a short name (see `mrl-rag models`), hub id or folder.")
    ] = "minilm",
    engine: Annotated[Literal["local", "ray"], typer.Option(help="This process, or a Ray cluster.")] = "local",
    collection: Collection = None,
    shard_records: Annotated[int, typer.Option(help="Records per shard.")] = 10_000,
    workers: Annotated[
        int | None, typer.Option(help="Workers on Ray; one per GPU, or as many as there are cores for.")
    ] = None,
    cpus_per_worker: Annotated[int, typer.Option(help="Cores of a worker without a GPU.")] = 1,
    as_json: Json = False,
) -> int:
    """Encode a corpus into shards, to load anywhere. Again: shards that are there are kept."""
    from mrl_rag.scale import encode_dataset

    done = encode_dataset(
        inputs,
        output,
        model,
        engine=engine,
        collection=collection,
        shard_records=shard_records,
        workers=workers,
        cpus_per_worker=cpus_per_worker,
        progress=True,
    )
    text = f"{done.records:,} records in {output}; {done.reused:,} of {done.shards:,} shards were there already"
    _report(as_json, text, {**_as_dict(done), "output": output})
    return FINE


@app.command(epilog="Example: mrl-rag load ./shards --to http://localhost:8000")
def load(
    source: Annotated[
        str, typer.Argument(metavar="DIR|URL|FILE", help="What `mrl-rag encode` or `mrl-rag export` wrote.")
    ],
    to: Annotated[
        str, typer.Option(metavar="DB|URL", help="Folder of the index, or a Chroma server: http://HOST:PORT.")
    ] = "./db",
    collection: Annotated[str, typer.Option(help="Its collection.")] = "docs",
    shortlist_dim: Annotated[int | None, typer.Option(help="Dimension that a new index searches first.")] = None,
    as_json: Json = False,
) -> int:
    """Store shards or an exported file in an index. Records that are stored already are left alone."""
    from mrl_rag.scale import load as load_shards

    records = load_shards(source, to, collection, shortlist_dim=shortlist_dim, progress=True)
    _report(as_json, f"{records:,} records of {source} are in {to}", {"records": records, "to": to})
    return FINE


@app.command("import", epilog="Example: mrl-rag import backup.parquet --db ./restored")
def import_(
    file: Annotated[str, typer.Argument(metavar="FILE|DIR|URL", help="What `mrl-rag export` wrote.")],
    db: Db = Path("./db"),
    collection: Annotated[str, typer.Option(help="Its collection.")] = "docs",
    as_json: Json = False,
) -> int:
    """Store what was exported, as `load --to DB` does."""
    return load(file, str(db), collection, as_json=as_json)


@app.command(epilog="Example: mrl-rag reencode --db ./db --model nomic-v1.5")
def reencode(
    folder: Folder = None,
    db: Db = Path("./db"),
    collection: Collection = None,
    model: Annotated[str | None, typer.Option(help="The new model.")] = None,
    drop_old: Annotated[bool, typer.Option("--drop-old", help="Remove what the old model made.")] = False,
    as_json: Json = False,
) -> int:
    """Encode by another model. The old one answers until that is done, and is kept until --drop-old."""
    if model is None and not drop_old:
        raise typer.BadParameter("name the new model by --model, or drop what old ones made by --drop-old.")
    with _open(folder or db, collection) as opened:
        kept = None
        if model is not None:
            with _encoder(model) as encoder:
                kept = opened.reencode(
                    lambda texts: encoder.encode_documents(texts, encoder.full_dim),
                    model,
                    encoder.fingerprint,
                    progress=True,
                )
        dropped = opened.drop_old() if drop_old else []
        lines = [f"{opened.name}: model {opened.model}, {len(opened):,} records"]
        lines += [f"the old one is kept as {kept}; --drop-old removes it"] if kept and not drop_old else []
        lines += [f"removed {', '.join(dropped) or 'nothing: no old one was kept'}"] if drop_old else []
        _report(as_json, "\n".join(lines), {"model": opened.model, "kept": kept, "dropped": dropped})
    return FINE


@app.command("fit-head", epilog="Example: mrl-rag fit-head --pairs asked.csv --output head.safetensors")
def fit_head(
    folder: Folder = None,
    db: Db = Path("./db"),
    collection: Collection = None,
    pairs: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Questions and passages that answer them: .jsonl, .csv or .tsv."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model for the pairs; minilm if not named.")] = None,
    output: Annotated[Path, typer.Option(dir_okay=False, callback=_in_a_folder, help="The new file.")] = Path(
        "head.safetensors"
    ),
    seed: Annotated[int, typer.Option(help="Of what is held out.")] = 0,
    apply: Annotated[bool, typer.Option("--apply", help="Also put it on the index's vectors.")] = False,
    as_json: Json = False,
) -> int:
    """Fit a map that makes cut vectors lose less. On an index, or on pairs."""
    from mrl_rag.cli.output import print_head
    from mrl_rag.evaluation import read_pairs

    if pairs is None:
        with _open(folder or db, collection) as opened:
            head = opened.fit_head(seed=seed, progress=True)
    else:
        questions, passages = zip(*read_pairs(pairs).pairs, strict=True)
        with _encoder(model or "minilm") as encoder:
            head = encoder.fit_head(questions, passages, seed=seed, data=f"pairs of {pairs.name}", progress=True)
    head.save(output)
    if apply:
        with _open(folder or db, collection) as opened:
            opened.apply_head(head, progress=True)
    assert head.card is not None
    if as_json:
        _print_json({**_as_dict(head.card), "file": str(output)})
    else:
        print_head(head.card, output)
    return FINE


@app.command(epilog="Example: mrl-rag compact --db ./db")
def compact(folder: Folder = None, db: Db = Path("./db"), collection: Collection = None, as_json: Json = False) -> int:
    """Give back unused disk space."""
    from mrl_rag.cli.output import size

    with _open(folder or db, collection) as opened:
        freed = opened.compact()
    _report(as_json, f"{size(freed)} given back", {"bytes": freed})
    return FINE


@app.command(epilog="Example: mrl-rag verify --db ./db")
def verify(folder: Folder = None, db: Db = Path("./db"), collection: Collection = None, as_json: Json = False) -> int:
    """Compare Chroma and the full vectors, and try the search."""
    return _check(folder or db, collection, as_json, lambda opened: opened.verify())


@app.command(epilog="Example: mrl-rag repair --encode --db ./db")
def repair(
    folder: Folder = None,
    db: Db = Path("./db"),
    collection: Collection = None,
    encode: Annotated[
        bool, typer.Option("--encode", help="Encode records without a sound full vector again, by the index's model.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Mend what verify finds, losing nothing."""

    def mend(opened: TwoStageIndex) -> Any:
        if not encode:
            return opened.repair()
        with TwoStageRetriever(None, opened) as retriever:
            return retriever.repair()

    return _check(folder or db, collection, as_json, mend)


@app.command(epilog="Example: mrl-rag reindex --shortlist-dim 64 --db ./db")
def reindex(
    folder: Folder = None,
    db: Db = Path("./db"),
    collection: Collection = None,
    shortlist_dim: Annotated[int | None, typer.Option(help="Dimension that is searched first; as now.")] = None,
    rotation: Annotated[
        Literal["fit", "none"] | None,
        typer.Option(help="Fit a rotation to the vectors there are, or drop it; as now."),
    ] = None,
    as_json: Json = False,
) -> int:
    """Search at another dimension, encoding nothing."""

    def rebuild(opened: TwoStageIndex) -> Any:
        opened.reindex(shortlist_dim, rotation, progress=True)
        return opened.verify()

    return _check(folder or db, collection, as_json, rebuild)


@app.command(epilog="Example: mrl-rag tune --db ./db --target 0.99")
def tune(
    folder: Folder = None,
    db: Db = Path("./db"),
    collection: Collection = None,
    target: Annotated[float, typer.Option(help="Share of the exact top 10 to find.")] = 0.99,
    dims: Dims = None,
    apply: Annotated[bool, typer.Option("--apply", help="Search so from now on; encodes nothing.")] = False,
    as_json: Json = False,
) -> int:
    """Find the cheapest search that reaches a recall."""
    from mrl_rag.cli.output import print_tuning

    with _open(folder or db, collection) as opened:
        tried = parse_integers("--dims", dims) if dims else None
        tuning = opened.tune(target, dims=tried, apply=apply, progress=True)
        if as_json:
            _print_json({**_as_dict(tuning), "plan": tuning.plan and _as_dict(tuning.plan), "reached": tuning.reached})
        else:
            print_tuning(opened, tuning)
    return FINE


@app.command(epilog="Example: mrl-rag clear --db ./db --yes")
def clear(
    folder: Folder = None,
    db: Db = Path("./db"),
    collection: Collection = None,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    as_json: Json = False,
) -> int:
    """Remove every record of an index."""
    with _open(folder or db, collection) as opened:
        records = len(opened)
        if not yes:
            if not sys.stdin.isatty():
                raise InvalidInput("clear asks before it removes records, and nobody can answer here; pass --yes.")
            if not typer.confirm(f"Remove {records:,} records of {opened.name} in {folder or db}?", err=True):
                _report(as_json, "nothing was removed", {"removed": 0})
                return TROUBLE
        opened.clear()
    _report(as_json, f"{records:,} records removed", {"removed": records})
    return FINE


def _check(db: Path, collection: str | None, as_json: bool, work: Any) -> int:
    """Do something to an index, and print the report of its health that it returns."""
    from mrl_rag.cli.output import print_health

    with _open(db, collection) as opened:
        report = work(opened)
        if as_json:
            _print_json({**_as_dict(report), "ok": report.ok})
        else:
            print_health(opened, report, db)
    return FINE if report.ok else TROUBLE


def _report(as_json: bool, text: str, value: object) -> None:
    if as_json:
        _print_json(value)
    else:
        sys.stdout.write(f"{text}\n")


def _encoder(model: str) -> Encoder:
    from mrl_rag import MatryoshkaEncoder

    return MatryoshkaEncoder(model)


def _collections(db: Path, wanted: str | None) -> list[str]:
    if not db.is_dir():
        raise InvalidInput(f"there is no folder {db}; name the one with the index by --db, or fill it: mrl-rag index.")
    there = TwoStageIndex.names(db)
    if wanted is None and there:
        return there
    if wanted not in there:
        asked = f"no index {wanted}" if wanted else "no index"
        listed = f"Name one of these by --collection: {', '.join(there)}." if there else "Fill it: mrl-rag index PATH."
        raise InvalidInput(f"{db} has {asked}. {listed}")
    return [wanted]


def _open(db: Path, wanted: str | None) -> TwoStageIndex:
    there = _collections(db, wanted)
    if len(there) > 1:
        raise InvalidInput(f"{db} has several indexes. Name one of these by --collection: {', '.join(there)}.")
    return TwoStageIndex(db, there[0])


def _as_dict(value: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(value)
