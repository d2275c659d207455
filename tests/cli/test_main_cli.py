"""`slab` itself: verbs, messages, exit codes."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import Namespace
from torch import nn

from slabformer.cli import main as cli
from slabformer.cli.detect import VERBS as DETECT
from slabformer.cli.lm import VERBS as LM
from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.surgery.batches import run_batches
from tolerances import PATIENCE

LAUNCH = "import sys, slab_launcher; sys.exit(slab_launcher.main())"


def verb_that(run: Callable[[Namespace], Outcome | None]) -> types.ModuleType:
    """A verb's module with an option of its own and a nested one."""
    module = types.ModuleType("slabformer.cli.probe")

    def parser() -> Parser:
        made = Parser("slab probe", "For tests.")
        made.add_argument("--config", action="config")
        made.add_argument("--batch-size", type=int, default=1)
        made.add_argument("--optimizer.lr", type=float, default=0.1)
        return made

    module.parser, module.run = parser, run
    return module


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Namespace], None]], None]:
    """Adds the verb `probe`, which calls the function given."""

    def install(run: Callable[[Namespace], None]) -> None:
        monkeypatch.setitem(sys.modules, "slabformer.cli.probe", verb_that(run))
        monkeypatch.setitem(cli.VERBS, "probe", ("slabformer.cli.probe", "for tests"))

    monkeypatch.delenv("SLAB_DEBUG", raising=False)
    return install


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {verb} " in printed for verb in cli.VERBS)


def test_no_arguments_print_help_and_count_as_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage: slab" in capsys.readouterr().out


def test_help_and_mistakes_are_told_before_anything_heavy_is_imported() -> None:
    pytest.importorskip("transformers", reason="the language models' options name it where it is missing")
    verbs = [[verb] for verb in cli.VERBS] + [["detect", verb] for verb in DETECT] + [["lm", verb] for verb in LM]
    mistakes = [
        *(["trian"], ["train", "--epoch", "3"], ["train", "--epochs", "0"], ["train", "--gamma.shape", "round"]),
        *(["detect", "train", "--detector.box_fc_dim", "0"], ["lm", "train", "--model.context", "1"]),
        *(["fuse", "x", "--rtol", "-1"], ["bench", "x", "--seconds", "soon"]),
    ]
    calls = [[*verb, "--help"] for verb in verbs] + mistakes
    script = f"""
import sys, slab_launcher
codes = []
for call in {calls!r}:
    sys.argv = ["slab", *call]
    try:
        codes.append(slab_launcher.main())
    except SystemExit as done:
        codes.append(done.code)
    heavy = {{"torch", "timm", "transformers", "numpy"}} & set(sys.modules)
    assert not heavy, (call, heavy)
assert codes == {[0] * len(verbs) + [2] * len(mistakes)}, codes
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr


def test_version_is_the_distributions(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("slab 0.")
    assert [line.split()[0] for line in lines] == ["slab", "torch", "timm", "transformers"]
    assert f"torch {importlib.metadata.version('torch')}" in lines


def test_unknown_verb_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err == "slab: unknown command 'trian'; did you mean 'train'? `slab --help` lists all\n"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("no such\n  thing"), 2, "no such thing"),
        (ImportError("needs timm"), 2, "needs timm"),
        (FileNotFoundError(2, "No such file or directory", "x.pth"), 2, "No such file or directory: x.pth"),
        (OSError(28, "No space left on device", "x.onnx"), 1, "No space left on device: x.onnx"),
        (RuntimeError("outputs differ"), 1, "outputs differ"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=["value", "import", "missing-file", "disk-full", "runtime", "interrupt"],
)
def test_errors_become_one_line_and_a_code(
    probe: Callable[..., None], capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    def fail(config: Namespace) -> None:
        raise error

    probe(fail)
    assert cli.main(["probe"]) == code
    assert capsys.readouterr().err == f"slab: {line}\n"


def test_debug_shows_the_traceback(probe: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: Namespace) -> None:
        raise ValueError("shown in full")

    probe(fail)
    monkeypatch.setenv("SLAB_DEBUG", "1")
    with pytest.raises(ValueError, match="shown in full"):
        cli.main(["probe"])


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (lambda: None + 1, "TypeError: unsupported operand"),  # type: ignore[operator]
        (lambda: {}["missing"], "KeyError: 'missing'"),
        (lambda: importlib.import_module("slabformer.moved"), "No module named 'slabformer.moved'"),
        (lambda: exec("from slabformer._files import moved"), "cannot import name 'moved' from 'slabformer._files'"),
    ],
    ids=["operation", "key", "own-module", "own-name"],
)
def test_a_fault_of_ours_shows_its_traceback_and_asks_for_a_report(
    probe: Callable[..., None], capsys: pytest.CaptureFixture[str], fault: Callable[[], Any], line: str
) -> None:
    probe(lambda config: fault())
    assert cli.main(["probe"]) == 1
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown
    assert line in shown
    assert shown.endswith("not yours; please report what stands above\n")


def test_a_type_error_that_we_raise_is_one_line(probe: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    probe(lambda config: run_batches(nn.Identity(), ["text"]))
    assert cli.main(["probe"]) == 2
    assert capsys.readouterr().err.startswith("slab: cannot feed a batch of type str")


@pytest.mark.parametrize(
    ("options", "yaml", "expected"),
    [
        (["--batch-sise", "3"], None, "unknown option '--batch-sise'; did you mean '--batch-size'?"),
        (["--batch_sise", "3"], None, "unknown option '--batch_sise'; did you mean '--batch-size'?"),
        (["--optimizer.lrr", "3"], None, "unknown option '--optimizer.lrr'; did you mean '--optimizer.lr'?"),
        (["-x"], None, "unknown option '-x'"),
        ([], "batch_sizes: 3", "unknown setting 'batch_sizes'; did you mean 'batch_size'?"),
        ([], "optimizer:\n  lrr: 3", "unknown setting 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
        (["--batch-size", "x"], None, "--batch-size must be a whole number, got x"),
        (["--config", "missing.yaml"], None, "missing.yaml"),
    ],
    ids=["flag", "underscores", "nested-flag", "short", "yaml", "nested-yaml", "type", "missing-config"],
)
def test_wrong_options_are_one_line_with_the_nearest_name(
    probe: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    options: list[str],
    yaml: str | None,
    expected: str,
) -> None:
    probe(lambda config: pytest.fail("ran in spite of wrong options"))
    if yaml is not None:
        (tmp_path / "recipe.yaml").write_text(yaml)
        options = ["--config", str(tmp_path / "recipe.yaml")]
    assert cli.main(["probe", *options]) == 2
    printed = capsys.readouterr().err
    assert expected in printed
    assert printed.count("\n") == 1


def test_a_reader_that_goes_away_is_no_error() -> None:
    script = (
        "import importlib.util, sys, types\n"
        "from slabformer.cli.parser import Parser\n"
        f"spec = importlib.util.spec_from_file_location('main', {cli.__file__!r})\n"
        "cli = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(cli)\n"
        "probe = types.ModuleType('probe'); sys.modules['probe'] = probe\n"
        "probe.parser = lambda: Parser('slab probe', '')\n"
        "probe.run = lambda config: [print(line) for line in range(100_000)]\n"
        "cli.VERBS['probe'] = ('probe', '')\n"
        "sys.exit(cli.main(['probe']))\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        complaints = process.stderr.read()
    assert process.returncode == 141
    assert complaints == b""
