"""What holds in every verb: how flags are spelled, what help says, exit codes, JSON."""

from __future__ import annotations

import functools
import importlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ActionYesNo, Namespace
from PIL import Image

import saved_digits
from slabformer.cli import main as cli
from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import SHORT, Parser, flags_of, type_of

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "recipes").glob("*.yaml"))]
#: module of every verb by what is typed
MODULES = {
    **{(verb,): module for verb, (module, _) in cli.VERBS.items()},
    **{
        (group, verb): module
        for group, (package, _) in cli.GROUPS.items()
        for verb, (module, _) in importlib.import_module(package).VERBS.items()
    },
}
WITHOUT_RESULT = {("completion",)}
each_verb = pytest.mark.parametrize("verb", MODULES, ids=" ".join)
each_verb_with_result = pytest.mark.parametrize("verb", [v for v in MODULES if v not in WITHOUT_RESULT], ids=" ".join)


@functools.cache
def parser_of(verb: tuple[str, ...]) -> Parser:
    return importlib.import_module(MODULES[verb]).parser()


def options_of(verb: tuple[str, ...]) -> Iterator[Any]:
    yield from (
        action for action in parser_of(verb)._actions if action.option_strings and action.help != "==SUPPRESS=="
    )


@each_verb
def test_flags_are_spelled_with_dashes_and_short_forms(verb: tuple[str, ...]) -> None:
    for action in options_of(verb):
        for flag in action.option_strings:
            assert re.fullmatch(r"--[a-z][a-z0-9.\-]*\+?|-[a-z]", flag), flag
        short = {SHORT[flag] for flag in action.option_strings if flag in SHORT}
        assert short <= set(action.option_strings)
    assert parser_of(verb)._option_string_actions["-h"].dest == "help"


@each_verb
def test_what_is_written_is_called_output(verb: tuple[str, ...]) -> None:
    flags = {flag for action in options_of(verb) for flag in action.option_strings}
    assert not flags & {"--out", "--folder", "--fix", "--dest", "--output-dir", "--save"}


@each_verb
def test_underscores_are_understood(verb: tuple[str, ...]) -> None:
    parser = parser_of(verb)
    for action in options_of(verb):
        for flag in action.option_strings:
            assert parser.spelled(["--" + flag[2:].replace("-", "_")] if flag.startswith("--") else [flag]) == (
                parser.spelled([flag])
            )


@each_verb
def test_truth_values_are_switches(verb: tuple[str, ...]) -> None:
    parser = parser_of(verb)
    for action in options_of(verb):
        assert isinstance(action, ActionYesNo) or type_of(action) is not bool, action.option_strings
        if isinstance(action, ActionYesNo):
            yes, no = action.option_strings
            assert no == f"--no-{yes[2:]}"
            for value, flag in (("true", yes), ("false", no)):
                assert parser.spelled([yes, value, "next"]) == [flag, "next"]
                assert parser.spelled([f"{yes}={value}"]) == [flag]
            assert parser.spelled([yes, "next"]) == [yes, "next"]


@each_verb
def test_help_can_be_read(verb: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = parser_of(verb).format_help()
    assert [line for line in text.splitlines() if len(line) > 80] == []
    for word in ("<class", "Union[", "Optional[", "Annotated", "typing.", "NoneType", "slabformer.", "==SUPPRESS=="):
        assert word not in text
    does, usage, examples, _ = text.split("\n\n", 3)
    assert does.endswith(".")
    assert usage.startswith(f"usage: slab {' '.join(verb)}")
    assert examples.startswith("examples:\n  ")
    assert f"slab {' '.join(verb)}" in examples.replace("-m slabformer", "slab")
    assert [action.option_strings for action in options_of(verb) if not action.help] == []


@each_verb
def test_help_says_type_range_and_default_in_words(verb: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = " ".join(parser_of(verb).format_help().split())
    for action in options_of(verb):
        if type_of(action) is not None and action.default not in (None, [], {}, "==SUPPRESS==") and not action.needed:
            assert re.search(rf"{re.escape(flags_of(action)[-1])} .*?default ", text), action.dest


def test_the_words_of_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = " ".join(parser_of(("train",)).format_help().split())
    assert "--batch-size INT Samples per batch in each process (INT >= 1, default 128)" in text
    assert "(FLOAT 0 to 1, default 0.2)" in text
    assert re.search(r"--model.name TEXT [^(]* \(default slab_deit_micro\)", text)  # the type is not said twice
    assert "(FLOAT > 0 or null, default 5.0)" in text
    assert "--precision {fp32,bf16,fp16}" in text
    assert "--tensorboard, --no-tensorboard Write TensorBoard events (default on)" in text
    assert "--overwrite Delete the run in `output` and start again (default off)" in text


@pytest.mark.parametrize("verb", [("train",), ("detect", "train"), ("lm", "train")], ids=" ".join)
def test_what_is_used_most_stands_first_and_sections_follow(verb: tuple[str, ...]) -> None:
    text = parser_of(verb).format_help()
    places = [text.index(f"\n{section}:\n") for section in ("most used", "model", "data", "optimizer", "general")]
    assert places == sorted(places)
    first = text[places[0] : text.index("\n\n", places[0])]
    flags = re.findall(r"^  (?:-\w, )?(--[\w.\-]+)", first, re.MULTILINE)
    wanted = ["--config", "--model.name", "--model.backbone", "--data", "--output", "--epochs", "--steps"]
    assert flags == [flag for flag in [*wanted, "--batch-size", "--optimizer.lr"] if flag in flags]
    assert {"--config", "--data", "--output", "--batch-size", "--optimizer.lr"} <= set(flags)
    assert "Everything about a training run" in text  # the docstring describes the section


def stub(monkeypatch: pytest.MonkeyPatch, verb: tuple[str, ...], run: Callable[[Namespace], Any]) -> None:
    """Let ``verb`` run ``run`` whatever its options."""
    module = importlib.import_module(MODULES[verb])
    monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(
        "slabformer.cli.options.parse",
        lambda parser, options, command: Namespace(**({"json": True} if "--json" in options else {})),
    )
    monkeypatch.setattr(module, "parser", lambda: None)
    monkeypatch.delenv("SLAB_DEBUG", raising=False)


def raises(error: BaseException) -> Callable[[Namespace], Any]:
    def run(config: Namespace) -> Any:
        raise error

    return run


@each_verb
def test_exit_codes_are_the_same(
    verb: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*verb, "--no-such-flag"]) == cli.USAGE == 2
    assert capsys.readouterr().err.startswith("slab: unknown option '--no-such-flag'")
    outcomes: list[tuple[int, Callable[[Namespace], Any]]] = [
        (0, lambda config: Outcome(data={})),
        (1, lambda config: Outcome(data={}, fault="2 of 3 are wrong")),
        (1, raises(RuntimeError("outputs differ"))),
        (2, raises(ValueError("no such model"))),
        (2, raises(FileNotFoundError(2, "No such file or directory", "x"))),
        (130, raises(KeyboardInterrupt())),
    ]
    for code, run in outcomes:
        stub(monkeypatch, verb, run)
        assert cli.main(list(verb)) == code
        complaint = capsys.readouterr().err
        assert complaint.count("\n") == (code != 0)
        assert "Traceback" not in complaint


def test_exit_codes_are_documented() -> None:
    page = (ROOT / "docs" / "commands.md").read_text()
    for code, meaning in cli.EXIT_CODES.items():
        assert re.search(rf"^  {code} +{re.escape(meaning)}$", cli.usage(), re.MULTILINE)
        assert f"| {code} | {meaning} |" in page


@each_verb_with_result
def test_json_is_all_of_standard_output(
    verb: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--json" in parser_of(verb)._option_string_actions

    def run(config: Namespace) -> Outcome:
        print("chatter of some library")
        return Outcome(data={"loss": float("nan"), "at": Path("a")}, shown=["a table"], files=[Path("b")], fault="bad")

    stub(monkeypatch, verb, run)
    assert cli.main([*verb, "--json"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"loss": None, "at": "a", "files": ["b"]}
    assert printed.err == "chatter of some library\nslab: bad\n"
    assert cli.main([*verb]) == 1
    assert capsys.readouterr().out == "chatter of some library\na table\nwrote b\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a picture."""
    folder = tmp_path_factory.mktemp("verbs")
    saved_digits.save_digits_model(folder / "model.safetensors")
    Image.new("RGB", (16, 16)).save(folder / "one.png")
    (folder / "bad.png").write_text("no picture")
    return folder


DATA = ("--data", "digits", "--device", "cpu", "--num-workers", "0")
TINY = ("--num-train", "2", "--num-validation", "1")
#: what is run -> exit code, and a key of its document, or None where that is a list
RUNS: list[tuple[str, int, str | None]] = [
    ("list slab_deit_micro", 0, None),
    ("audit slab_deit_micro --no-time", 0, "num_folded"),
    ("fuse model.safetensors -o fused.safetensors", 0, "verify"),
    ("verify model.safetensors model.safetensors", 0, "equal"),
    ("predict model.safetensors one.png --device cpu", 0, None),
    ("predict model.safetensors bad.png one.png --device cpu", 1, None),
    (f"eval model.safetensors {' '.join(DATA)}", 0, "deployed"),
    (f"recalibrate model.safetensors {' '.join(DATA)} --num-batches 1 -o new.safetensors", 0, "norms"),
    ("push model.safetensors -o shared", 0, "files"),
    (f"detect digits -o example {' '.join(TINY)}", 0, "files"),
    ("detect browse --data example --num 1 -o batch.png", 0, "files"),
    ("detect check-data --data example", 0, None),
]


@pytest.mark.parametrize(("command", "code", "key"), RUNS, ids=[command.split(" -")[0] for command, _, _ in RUNS])
def test_real_results_are_one_document(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], command: str, code: int, key: str
) -> None:
    monkeypatch.chdir(place)
    assert cli.main([*command.split(), "--json"]) == code
    document = json.loads(capfd.readouterr().out)
    assert key in document if key else isinstance(document, list)
    for file in document["files"] if key == "files" else []:
        assert Path(file).exists()


def test_a_file_behind_json_is_written_as_before(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(place)
    assert cli.main(["audit", "slab_deit_micro", "--no-time", "--json", "audit.json"]) == 0
    assert "would fold" in capsys.readouterr().out
    assert json.loads((place / "audit.json").read_text())["num_folded"] > 0
    assert "--json FILE is deprecated" in caplog.text
    assert cli.main(["list", "--json=list.json"]) == 2
    assert "--json takes no value" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "spelled"),
    [
        (["--model.args.embed-dim", "64"], ["--model.args.embed_dim", "64"]),
        (["--lr_schedule.warmup_epochs=3"], ["--lr-schedule.warmup-epochs=3"]),
        (["--data", "digits"], ["--data.path", "digits"]),
        (["-o", "runs/a_b", "-cx_y.yaml"], ["--output", "runs/a_b", "--config=x_y.yaml"]),
        (["--model.convert_norms", "true", "--tensorboard", "no"], ["--model.convert-norms", "--no-tensorboard"]),
        (["--no_tensorboard=false"], ["--tensorboard"]),
        (["--nothing_like_it"], ["--nothing_like_it"]),
    ],
    ids=["mapping", "nested", "data", "short", "switches", "twice-no", "unknown"],
)
def test_older_spellings_mean_todays(given: Sequence[str], spelled: Sequence[str]) -> None:
    assert parser_of(("train",)).spelled(given) == spelled


@pytest.mark.parametrize(
    ("verb", "old", "new"),
    [
        (("push",), "--folder", "--output"),
        (("detect", "browse"), "--out", "--output"),
        (("detect", "predict"), "--out", "--output"),
        (("detect", "check-data"), "--fix", "--output"),
    ],
    ids=["push", "browse", "predict", "check-data"],
)
def test_old_names_of_outputs_are_understood(verb: tuple[str, ...], old: str, new: str) -> None:
    assert parser_of(verb).spelled([old, "x"]) == [new, "x"]
    assert f" {old} " not in parser_of(verb).format_help()


def test_a_switch_with_another_value_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--overwrite=maybe"]) == 2
    assert "--overwrite is a switch; give it alone, or --no-overwrite" in capsys.readouterr().err


def commands_in(text: str) -> Iterator[str]:
    """What a reader would type: lines that begin with `slab`, and `slab ...` between backticks."""
    joined = re.sub(r"\\\n[#\s]*", " ", text)
    yield from re.findall(r"^[#\s]*(slab \w.*)$", joined, re.MULTILINE)
    yield from re.findall(r"`(slab [a-z][^`]*)`", joined)


def wrong_flags(command: str) -> list[str]:
    """Flags of ``command`` that its verb does not have, or does not show."""
    words = shlex.split(command, comments=True)[1:]
    for piped in ("|", "&&", ">"):
        words = words[: words.index(piped)] if piped in words else words
    verb = tuple(words[:2]) if words[0] in cli.GROUPS else tuple(words[:1])
    if verb not in MODULES:
        return [] if verb[-1].startswith("-") or verb[-1].isupper() or verb[0] in cli.GROUPS else list(verb)
    parser = parser_of(verb)
    flags = [word.partition("=")[0] for word in words[len(verb) :] if re.match(r"-{1,2}[a-z]", word)]
    return [flag for flag in flags if parser.spelled([flag])[0].partition("=")[0] not in known(parser) or "_" in flag]


def known(parser: Parser) -> set[str]:
    return {flag for action in parser._actions if action.help != "==SUPPRESS==" for flag in action.option_strings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_documents_can_be_typed(page: Path) -> None:
    assert {command: wrong_flags(command) for command in commands_in(page.read_text()) if wrong_flags(command)} == {}


def test_the_readme_holds_commands() -> None:
    assert len(list(commands_in((ROOT / "README.md").read_text()))) > 10
    assert wrong_flags("slab eval model.safetensors --batchsize 3") == ["--batchsize"]
    assert wrong_flags("slab train --batch_size 3") == ["--batch_size"]


@each_verb
def test_examples_in_help_can_be_typed(verb: tuple[str, ...]) -> None:
    for example in parser_of(verb).examples:
        command = example[example.index("slab") :].replace("slabformer ", "slab ", 1)
        assert wrong_flags(command) == [], example


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_in_prose_have_dashes(page: Path) -> None:
    assert re.findall(r"--[a-z][\w.\-]*_[\w.\-]*", page.read_text()) == []


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_verbs_and_flags(
    shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("shtab", reason="shtab writes the script")
    monkeypatch.setattr("slabformer.cli.completion.parser_of", lambda module: _BY_MODULE[module]())
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(verb[-1] in script for verb in MODULES)
    for flag in ("--batch-size", "--optimizer.weight-decay", "--no-tensorboard", "--output", "--json"):
        assert flag in script
    assert not re.search(r"--[a-z]+_[a-z]", script)
    if shell == "bash":
        (tmp_path / "slab").write_text(script)
        subprocess.run(["bash", "-n", tmp_path / "slab"], check=True)


_BY_MODULE = {module: functools.partial(parser_of, verb) for verb, module in MODULES.items()}


def test_the_package_runs_as_the_command_does() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "slabformer", "trian"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "slab: unknown command 'trian'; did you mean 'train'? `slab --help` lists all\n"
