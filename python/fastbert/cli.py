"""Command line: fastbert encode, classify, rerank, eval, info, bench; also python -m fastbert.

A command is a row of COMMANDS: its name, what declares its arguments, what runs it. What the user got wrong becomes one
line on stderr and exit status 2; anything else is a bug and keeps its traceback.
"""

import argparse
import codecs
import csv
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import islice, tee
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar

import numpy as np

from fastbert import _core, glue
from fastbert.benchmark import PEERS, Run, core_count, cpu_model, fastbert_runner, markdown, measure
from fastbert.classification import CrossEncoder, SequenceClassifier
from fastbert.encoder import Encoder, Floats, kernels

EXIT_USAGE = 2  # as argparse
EXIT_SIGINT, EXIT_SIGPIPE = 128 + 2, 128 + 13  # what a shell reports for a process that the signal ended

Model = TypeVar("Model", Encoder, SequenceClassifier, CrossEncoder)
Rows = Iterable[tuple[str, Floats]]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message} ({self.prog} --help lists the arguments)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: that of the process) and return its exit status."""
    parser = _Parser(prog="fastbert", description="BERT encoders on this CPU: text in, vectors out.")
    parser.add_argument("--version", action="version", version=f"fastbert {version('fastbert-cpu')}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (add_arguments, run) in COMMANDS.items():
        command = subparsers.add_parser(name, help=run.__doc__, description=run.__doc__)
        add_arguments(command)
        command.set_defaults(run=run)
    args = parser.parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python's own flush at exit fails too
        return EXIT_SIGPIPE
    except KeyboardInterrupt:
        return EXIT_SIGINT
    except OSError as error:
        return _complain(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except ValueError as error:
        return _complain(str(error))
    return 0


def _complain(text: str) -> int:
    print("fastbert: error:", " ".join(text.split()), file=sys.stderr)
    return EXIT_USAGE


# ---- the model ----


PRECISIONS = ("fp32", "int8")
ON_LONG = ("truncate", "warn", "error")


def _add_model_arguments(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """default None: --model must be given."""
    what = "folder, zip archive, TensorFlow checkpoint or hub id" + (f" (default: {default})" if default else "")
    parser.add_argument("-m", "--model", required=default is None, help=what)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="default: fp32")
    _add_load_arguments(parser)


def _add_load_arguments(parser: argparse.ArgumentParser) -> None:
    _add_strict(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="threads per call (default: what the machine grants)")
    parser.add_argument("--max-seq-length", type=int, metavar="N", help="tokens per text (default: the model's)")
    _add_hub_arguments(parser)


def _add_strict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--strict",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="fp32: the bits of all CPUs; --no-strict: AMX-BF16 where the CPU has it (default: --strict)",
    )


def _add_hub_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--cache-dir", metavar="DIR", help="the hub's cache")
    parser.add_argument("--local-files-only", action="store_true", help="never ask the hub")


def _load(kind: type[Model], args: argparse.Namespace, **options: Any) -> Model:
    names = ("precision", "strict", "threads", "max_seq_length", "revision", "cache_dir", "local_files_only")
    return kind(args.model, **{name: getattr(args, name) for name in names} | options)


def _add_on_long(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--on-long",
        choices=ON_LONG,
        default="truncate",
        help="what becomes of a text of too many tokens (default: truncate)",
    )


def _add_text_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("texts", nargs="*", metavar="TEXT", help=f"{what} (default: lines of standard input)")
    parser.add_argument("-i", "--input", metavar="FILE", help="UTF-8, one text per line; - is standard input")


# ---- encode ----


def _add_encode_arguments(parser: argparse.ArgumentParser) -> None:
    _add_text_arguments(parser, "texts to embed")
    parser.add_argument("-o", "--output", metavar="FILE", help="written whole or not at all (default: standard output)")
    parser.add_argument("-f", "--format", choices=FORMATS, help="default: what FILE ends in, else jsonl")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="texts in work at once (default: 256)")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt-name", metavar="NAME", help="put this prompt of the model in front of each text")
    prompt.add_argument("--prompt", metavar="TEXT", help="put TEXT in front of each text")
    parser.add_argument("--truncate-dim", type=int, metavar="N", help="keep the first N numbers of each vector")
    parser.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="scale vectors to unit length; --no- adds nothing to what the model itself does (default: what it says)",
    )
    _add_on_long(parser)
    _add_model_arguments(parser, "sentence-transformers/all-MiniLM-L6-v2")


def _encode(args: argparse.Namespace) -> None:
    """Turn texts into vectors."""
    suffix = Path(args.output or "").suffix.removeprefix(".")
    write = FORMATS[args.format or (suffix if suffix in FORMATS else "jsonl")]
    with _open_texts(args) as texts:
        encoder = _load(Encoder, args)
        shown, embedded = tee(texts)  # holds the texts of one batch
        vectors = encoder.iter_encode(
            embedded,
            args.prompt_name,
            args.prompt,
            args.batch_size,
            normalize_embeddings=args.normalize,
            truncate_dim=args.truncate_dim,
            on_long=args.on_long,
        )
        with _open_output(args.output) as file:
            write(file, zip(shown, vectors, strict=False), args.truncate_dim or encoder.get_embedding_dimension())


@contextmanager
def _open_texts(args: argparse.Namespace) -> Iterator[Iterator[str]]:
    if args.texts and args.input is not None:
        raise ValueError("expected texts as arguments or with --input, got both")
    if args.texts:
        yield _decode("argument", map(os.fsencode, args.texts))
    elif args.input not in (None, "-"):
        with open(args.input, "rb") as file:
            yield _decode(f"{args.input}: line", file)
    elif args.input is None and sys.stdin.isatty():
        raise ValueError("expected texts as arguments, with --input FILE or on standard input, got none")
    else:
        yield _decode("standard input: line", sys.stdin.buffer)


def _decode(place: str, lines: Iterable[bytes]) -> Iterator[str]:
    """The texts without line ends and byte order mark."""
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{place} {number}: expected UTF-8, got {error.object[error.start]:#04x}") from None
        yield text.removesuffix("\n").removesuffix("\r")


@contextmanager
def _open_output(path: str | None) -> Iterator[BinaryIO]:
    """Standard output, or a file that appears under its name only when all went well."""
    if path is None:
        yield sys.stdout.buffer
        return
    target = Path(path)
    if target.exists() and not target.is_file():  # a device or pipe is written to, not replaced
        with open(target, "wb") as file:
            yield file
        return
    target = target.resolve()  # a link stays, the file that it leads to is replaced
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    file = open(partial, "xb")
    try:
        with file:
            yield file
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _write_jsonl(file: BinaryIO, rows: Rows, dim: int) -> None:
    for text, vector in rows:
        line = json.dumps({"text": text, "embedding": vector.tolist()}, ensure_ascii=False)
        file.write(f"{line}\n".encode())
        file.flush()  # someone may be waiting for it


def _write_csv(file: BinaryIO, rows: Rows, dim: int) -> None:
    table = csv.writer(codecs.getwriter("utf-8")(file), lineterminator="\n")
    table.writerow(["text", *range(dim)])
    for text, vector in rows:
        table.writerow([text, *vector.tolist()])
        file.flush()


def _write_npy(file: BinaryIO, rows: Rows, dim: int) -> None:
    if file.isatty():
        raise ValueError("--format npy: expected --output FILE or a pipe, got a terminal")
    vectors = [vector for _, vector in rows]  # their number stands before them
    header = {"descr": "<f4", "fortran_order": False, "shape": (len(vectors), dim)}
    np.lib.format.write_array_header_1_0(file, header)
    for vector in vectors:
        file.write(vector.astype("<f4").tobytes())


FORMATS: dict[str, Callable[[BinaryIO, Rows, int], None]] = {
    "jsonl": _write_jsonl,
    "npy": _write_npy,
    "csv": _write_csv,
}


# ---- classify, rerank, eval ----


def _add_classify_arguments(parser: argparse.ArgumentParser) -> None:
    _add_text_arguments(parser, "texts to classify; with --pairs two to an example, parted by a tab")
    parser.add_argument("--pairs", action="store_true", help="each text is two, parted by a tab")
    parser.add_argument("--top-k", type=int, metavar="N", help="the N best labels of each text (default: the best)")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="texts in work at once (default: 256)")
    _add_on_long(parser)
    _add_model_arguments(parser)


def _classify(args: argparse.Namespace) -> None:
    """Print the labels of texts, a line of JSON for each."""
    if args.batch_size < 1:
        raise ValueError(f"--batch-size: expected at least 1, got {args.batch_size}")
    with _open_texts(args) as texts:
        classifier = _load(SequenceClassifier, args)
        first = 1
        while part := list(islice(texts, args.batch_size)):
            columns = [text.split("\t") for text in part] if args.pairs else [[text] for text in part]
            for number, cells in enumerate(columns, first):
                if len(cells) != 1 + args.pairs:
                    raise ValueError(f"text {number}: expected two texts parted by a tab, got {len(cells)}")
            results = classifier(*map(list, zip(*columns, strict=True)), top_k=args.top_k or 1, on_long=args.on_long)
            for text, result in zip(part, results, strict=True):
                answer = result if isinstance(result, dict) else {"labels": result}
                print(json.dumps({"text": text} | answer, ensure_ascii=False), flush=True)
            first += len(part)


def _add_rerank_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-q", "--query", required=True, help="what the texts are ranked by")
    _add_text_arguments(parser, "texts to rank")
    parser.add_argument("--top-k", type=int, metavar="N", help="the N best alone")
    _add_on_long(parser)
    _add_model_arguments(parser)


def _rerank(args: argparse.Namespace) -> None:
    """Print texts by their score with a query, best first, a line of JSON for each."""
    with _open_texts(args) as texts:
        encoder = _load(CrossEncoder, args)
        for result in encoder.rank(args.query, list(texts), args.top_k, True, on_long=args.on_long):
            print(json.dumps(result, ensure_ascii=False))


def _add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or hub id of a classifier")
    parser.add_argument("data", metavar="DATA", help="a labelled .tsv file of the task, as in GLUE's download")
    parser.add_argument("--task", required=True, metavar="TASK", help=", ".join(glue.TASKS))
    parser.add_argument("--labels", metavar="A,B,...", help="what the model's outputs mean (default: what it says)")
    parser.add_argument("--precision", choices=PRECISIONS, nargs="+", default=PRECISIONS, help="default: both")
    parser.add_argument("--json", action="store_true", help="print JSON")
    _add_on_long(parser)
    _add_load_arguments(parser)


def _eval(args: argparse.Namespace) -> None:
    """Measure a classifier by the official metric of a GLUE task."""
    examples = glue.read(args.data, args.task)
    labels = args.labels.split(",") if args.labels else None
    report = {"task": args.task, "examples": len(examples.texts)} | {
        precision: glue.evaluate(
            _load(SequenceClassifier, args, precision=precision), examples, args.task, labels, on_long=args.on_long
        )
        for precision in args.precision
    }
    print(json.dumps(report) if args.json else "\n".join(_table(report)))


# ---- info ----


def _add_info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
    _add_model_arguments(parser, "none, only the machine is described")


def _info(args: argparse.Namespace) -> None:
    """Describe this installation, this machine and, with --model, a model."""
    report: dict[str, Any] = {
        "versions": {name: version(name) for name in ("fastbert-cpu", "numpy", "tokenizers", "huggingface_hub")}
        | {"python": platform.python_version()},
        "machine": f"{platform.system()} {platform.machine()}",
        "kernels": {
            name: "chosen" if chosen else "supported" if supported else "not supported by this CPU"
            for name, supported, chosen in kernels()
        },
        "threads": _core.usable_threads(),
    }
    if args.model is not None:
        report["model"] = _load(Encoder, args).info()
    print(json.dumps(report, indent=2, ensure_ascii=False) if args.json else "\n".join(_table(report)))


def _table(report: dict[str, Any], indent: str = "") -> Iterator[str]:
    for name, value in report.items():
        if isinstance(value, dict):
            yield f"{indent}{name}"
            yield from _table(value, indent + "  ")
        elif name.endswith("_bytes"):
            yield f"{indent}{name.removesuffix('_bytes'):24} {value / 1e6:.1f} MB"
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            text = f"{value:.4g}" if isinstance(value, float) else text
            yield f"{indent}{name:24} {text or '-'}"


# ---- bench ----


def _add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder or hub id (default: all-MiniLM-L6-v2)")
    parser.add_argument(
        "--tokens", type=_numbers, default=(8, 32, 128), metavar="N,..", help="of a text (default: 8,32,128)"
    )
    parser.add_argument("--texts", type=_numbers, default=(1, 8), metavar="N,..", help="of a batch (default: 1,8)")
    parser.add_argument("--precision", choices=("fp32", "int8"), help="default: both")
    _add_strict(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="threads per call (default: what the machine grants)")
    parser.add_argument(
        "--against",
        type=lambda names: names.split(","),
        default=[],
        metavar="NAME,..",
        help=f"other engines, if installed: {', '.join(PEERS)}; in float32",
    )
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="for each case (default: 2)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    _add_hub_arguments(parser)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers with commas between them, got {text!r}") from None


def _bench(args: argparse.Namespace) -> None:
    """Measure latency and throughput of a model on this machine."""
    from tqdm import tqdm

    hub_options = {name: getattr(args, name) for name in ("revision", "cache_dir", "local_files_only")}
    runners: dict[str, Run] = {}
    for precision in (args.precision,) if args.precision else ("fp32", "int8"):
        encoder = Encoder(args.model, precision=precision, strict=args.strict, threads=args.threads, **hub_options)
        runners[f"fastbert {precision}"] = fastbert_runner(encoder)
    info = encoder.info()
    for name, numbers, most in (("tokens", args.tokens, info["max_position_embeddings"]), ("texts", args.texts, None)):
        if wrong := [n for n in numbers if n < 1 or (most and n > most)]:
            raise ValueError(f"--{name}: expected {f'1 to {most}' if most else 'at least 1'}, got {wrong[0]}")
    for name in args.against:
        if name not in PEERS:
            raise ValueError(f"--against: expected names out of {', '.join(PEERS)}, got {name!r}")
        runners[name] = PEERS[name](encoder.folder, info["threads"])
    cases = [(texts, tokens) for texts in args.texts for tokens in args.tokens]
    measured = measure(runners, cases, info["vocab_size"], args.seconds)
    figures = [figure for case in tqdm(measured, "Cases", len(cases), leave=False, disable=None) for figure in case]
    machine = {"cpu": cpu_model(), "cores": core_count(), "kernel set": info["isa"], "threads": info["threads"]}
    if args.json:
        rows = [figure._asdict() | {"tokens_per_second": figure.tokens_per_second} for figure in figures]
        print(json.dumps({"model": info["model"], **machine, "figures": rows}, indent=2, ensure_ascii=False))
        return
    print(f"{info['model']}\n{', '.join(f'{name}: {value}' for name, value in machine.items())}\n")
    cells = [
        [
            f"{figure.texts} x {figure.tokens}",
            figure.runner,
            "{median:.4g} ({low:.4g} .. {high:.4g})".format_map(figure.ms),
            f"{figure.tokens_per_second:.0f}",
            "{median:.2f} ({low:.2f} .. {high:.2f})".format_map(figure.ratio),
            f"{figure.cosine:.5f}",
        ]
        for figure in figures
    ]
    first = next(iter(runners))
    print(markdown(["texts x tokens", "engine", "ms", "tokens/s", f"time by {first}'s", f"cosine to {first}"], cells))


COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None]]] = {
    "encode": (_add_encode_arguments, _encode),
    "classify": (_add_classify_arguments, _classify),
    "rerank": (_add_rerank_arguments, _rerank),
    "eval": (_add_eval_arguments, _eval),
    "info": (_add_info_arguments, _info),
    "bench": (_add_bench_arguments, _bench),
}
