"""`slab`: picks the verb, parses its options, and turns errors into one line and an exit code.

Nothing but the standard library is imported before a verb is chosen, and nothing heavy before its options are checked,
so that help and mistakes are told at once. A verb is one row of :data:`VERBS` and one file with ``parser() ->
slabformer.cli.parser.Parser`` and ``run(config) -> slabformer.cli.outcome.Outcome``, which is printed here; a group of
verbs is one row of :data:`GROUPS` and one package with ``VERBS`` of its own.
"""

from __future__ import annotations

import dis
import importlib
import importlib.metadata
import logging
import os
import sys
import textwrap
import traceback
from collections.abc import Mapping, Sequence

from slabformer._listing import NotRegularError
from slabformer.cli.suggest import did_you_mean

#: verb -> (module, what it does)
VERBS = {
    "quickstart": ("slabformer.cli.quickstart", "train, fuse, verify and benchmark a small model on real digits"),
    "train": ("slabformer.cli.train", "train a classifier while its LayerNorm fades out"),
    "convert": (
        "slabformer.cli.convert",
        "remove the norms of a trained model: fit, fade, distil, fuse, verify, report",
    ),
    "eval": ("slabformer.cli.eval", "measure the accuracy of a model on a data set"),
    "recalibrate": ("slabformer.cli.recalibrate", "replace running statistics with those of the whole training set"),
    "fuse": ("slabformer.cli.fuse", "fold every norm into its neighbours, verify, save"),
    "audit": ("slabformer.cli.audit", "show which norms of any model would fold, and why the others would not"),
    "verify": ("slabformer.cli.verify", "compare the outputs of two models"),
    "predict": ("slabformer.cli.predict", "classify images"),
    "export": ("slabformer.cli.export", "write ONNX or torch.export files, checked against PyTorch"),
    "quantize": ("slabformer.cli.quantize", "convert a fused model to 8-bit integers, for CPUs"),
    "deploy": ("slabformer.cli.deploy", "write a model for the runtime on which it is fastest, as a folder"),
    "push": ("slabformer.cli.push", "publish a model in timm's format, to a folder or the Hugging Face hub"),
    "bench": (
        "slabformer.cli.bench",
        "measure the speed of a model, fused and unfused, beside its LayerNorm baseline and its ceiling",
    ),
    "report": ("slabformer.cli.report", "plot accuracy against speed for the models that bench measured"),
    "visualize": ("slabformer.cli.visualize", "show what a token attends to, in several models side by side"),
    "list": ("slabformer.cli.list", "list models, published accuracies and released weights"),
    "completion": ("slabformer.cli.completion", "write a completion script for bash or zsh"),
}
#: verb that has verbs of its own -> (package that lists them, what they are about)
GROUPS = {
    "detect": ("slabformer.cli.detect", "detectors: check data, train, eval, predict, fuse, export, bench"),
    "lm": ("slabformer.cli.lm", "language models: train, eval, generate, import, fuse, bench, export"),
    "mindspore": ("slabformer.cli.mindspore", "classifiers in MindSpore: train, eval, convert, export, verify"),
}
USAGE_ERRORS = (
    *(ValueError, TypeError, ImportError),
    *(FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError),
    NotRegularError,
)
FAILURES = (RuntimeError, OSError)
DONE, FAILURE, USAGE, INTERRUPTED, BROKEN_PIPE, TERMINATED = 0, 1, 2, 130, 141, 143
#: of every verb
EXIT_CODES = {
    DONE: "done",
    FAILURE: "a check failed, or the command failed",
    USAGE: "wrong usage, or bad input",
    INTERRUPTED: "interrupted (Ctrl-C)",
    BROKEN_PIPE: "the output was closed by its reader (broken pipe)",
    TERMINATED: "terminated (SIGTERM)",
}
#: packages whose versions decide what works
PACKAGES = ("torch", "timm", "transformers")
LONGEST_MESSAGE = 600


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``slab`` with ``argv`` (the process's own by default) and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in ("-V", "--version"):
        return _print(versions(), DONE)
    command, verbs = "slab", VERBS
    if arguments and arguments[0] in GROUPS:
        group, *arguments = arguments
        command, verbs = f"slab {group}", importlib.import_module(GROUPS[group][0]).VERBS
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        return _print(usage(command, verbs), DONE if arguments else USAGE)
    verb, *options = arguments
    if verb not in verbs:
        near = did_you_mean(verb, [*verbs, *GROUPS] if verbs is VERBS else verbs)
        return _complain(f"unknown command {verb!r}{near or ';'} `{command} --help` lists all", USAGE)
    return _guarded(f"{command} {verb}", verbs[verb][0], options)


def usage(command: str = "slab", verbs: Mapping[str, tuple[str, str]] = VERBS) -> str:
    """What ``slab --help`` prints, or the same of a group."""
    rows = {verb: what for verb, (_, what) in ({**verbs, **GROUPS} if verbs is VERBS else verbs).items()}
    codes = "\n".join(f"  {code:<4}{meaning}" for code, meaning in EXIT_CODES.items())
    return (
        f"usage: {command} COMMAND [options]\n\n"
        "Transformers without LayerNorm: convert, train, fuse, verify, deploy.\n\n"
        f"{_listed(rows)}\n\n"
        f"exit codes:\n{codes}\n\n"
        f"`{command} COMMAND --help` shows a command's options, `slab --version` versions.\n"
        "With --json any command writes its result as JSON; SLAB_DEBUG=1 shows tracebacks."
    )


def versions() -> str:
    """What ``slab --version`` prints: this package and those it stands on, without importing them."""
    lines = [f"slab {importlib.metadata.version('slabformer')}"]
    for package in PACKAGES:
        try:
            lines.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{package} is not installed")
    return "\n".join(lines)


def _listed(rows: Mapping[str, str], width: int = 80) -> str:
    """Two columns in 80 characters."""
    left = max(map(len, rows)) + 4
    lines = []
    for name, text in rows.items():
        first, *others = textwrap.wrap(text, width - left)
        lines += [f"  {name:<{left - 2}}{first}", *(" " * left + other for other in others)]
    return "\n".join(lines)


def _guarded(command: str, module: str, options: list[str]) -> int:
    """Run a verb; users see one line for their own mistakes, a traceback and where to report it for ours."""
    try:
        fault = _run(command, module, options)
        sys.stdout.flush()
        return _complain(fault, FAILURE) if fault else DONE
    except BrokenPipeError:
        # the reader went away, as in `slab list | head`: the interpreter's own flush at exit must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    except Exception as error:
        if os.environ.get("SLAB_DEBUG") == "1":
            raise
        if _is_ours(error):
            traceback.print_exception(error)
            version = importlib.metadata.version("slabformer")
            return _complain(f"a mistake in slabformer {version}, not yours; please report what stands above", FAILURE)
        return _complain(_one_line(error), USAGE if isinstance(error, USAGE_ERRORS) else FAILURE)


def _run(command: str, module: str, options: list[str]) -> str:
    """Parse, run, print the result; what was found wrong, if anything."""
    from slabformer.cli.options import parse
    from slabformer.cli.outcome import nothing_else_on_stdout, present

    _log_to_stderr()
    verb = importlib.import_module(module)
    config = parse(verb.parser(), options, command)
    is_json, json_file = config.pop("json", False), config.pop("json_file", None)
    with nothing_else_on_stdout(is_json):
        outcome = verb.run(config)
    if outcome is None:  # another process of torchrun's tells
        return ""
    present(outcome, is_json, json_file)
    return outcome.fault


def _is_ours(error: Exception) -> bool:
    """Whether ``error`` is a mistake in this library: of a kind that is never raised on purpose, or Python's own."""
    if isinstance(error, ImportError) and error.name is not None:
        return error.name.partition(".")[0] == "slabformer"
    if isinstance(error, TypeError):
        return not _raised_on_purpose(error)
    return not isinstance(error, (*USAGE_ERRORS, *FAILURES))


def _raised_on_purpose(error: Exception) -> bool:
    """Whether a ``raise`` of this library made ``error``, rather than an operation that failed."""
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    ours = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0] == "slabformer"
    return ours and dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"


def _log_to_stderr() -> None:
    """The library's log: its messages as they are, warnings marked as such; other libraries' warnings only."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("slabformer").setLevel(logging.INFO)
    # compiling on a machine without a GPU warns that there is none
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    message = " ".join(str(error).split()) or type(error).__name__
    if len(message) > LONGEST_MESSAGE:
        message = f"{message[:LONGEST_MESSAGE]}... (SLAB_DEBUG=1 shows the rest)"
    return message


def _print(text: str, code: int) -> int:
    sys.stdout.write(f"{text}\n")
    return code


def _complain(message: str, code: int) -> int:
    sys.stderr.write(f"slab: {message}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
