"""`slab lm`: verbs that go together, mistakes in one line."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import PreTrainedTokenizerBase

from csv_files import csv_rows
from language_models import SIZES, sentences, somebody_elses, trained_looking, write_lines
from reference_files import description, published_state
from slabformer.cli.main import main
from slabformer.nn import Affine
from slabformer.nn.controls import prepbn_modules
from slabformer.tasks.language.config import TokenizerConfig
from slabformer.tasks.language.folders import load_model_folder, save_model_folder
from slabformer.tasks.language.fusing import fuse_language_model
from slabformer.tasks.language.tokens import train_tokenizer
from tolerances import FLOAT32, PATIENCE, assert_close

GOLDEN = "llama_prepbn_tiny"


def lm(*arguments: object) -> int:
    return main(["lm", *map(str, arguments)])


def saved(folder: Path, gamma: float = 0.0) -> Path:
    model = trained_looking()
    for norm in prepbn_modules(model).values():
        norm.set_gamma(gamma)
    save_model_folder(model, small_tokenizer(), folder)
    return folder


def small_tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(sentences(200), TokenizerConfig(vocab_size=300), 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_help_lists_the_verbs_of_the_group(capsys: pytest.CaptureFixture[str]) -> None:
    from slabformer.cli.lm import VERBS

    assert lm("--help") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: slab lm COMMAND")
    assert all(f"  {verb} " in printed for verb in VERBS)
    assert lm() == 2
    assert lm("trian") == 2
    assert "unknown command 'trian'; did you mean 'train'? `slab lm --help` lists all" in capsys.readouterr().err


def test_a_recipe_makes_a_folder_that_the_other_verbs_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = {"model": {**SIZES, "context": 16}, "tokenizer": {"vocab_size": 300}, "steps": 6, "batch_size": 4}
    recipe |= {"optimizer": {"warmup_steps": 1}, "device": "cpu", "data": {"document": "line"}, "log_every": 3}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    text, out = write_lines(tmp_path / "text.txt"), tmp_path / "out"
    train = ("train", "--config", tmp_path / "recipe.yaml", "--data", text, "--output", out)
    assert lm(*train) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"finished: {out}  perplexity ")
    assert "step 6/6" in captured.err
    assert "gamma 0.000" in captured.err
    assert lm(*train) == 0
    assert capsys.readouterr().out.startswith(f"already finished: {out}")
    assert lm("fuse", out, "--output", tmp_path / "fused") == 0
    shown = capsys.readouterr().out
    assert "lm_head" in shown
    assert "5 of 5" in shown
    assert lm("generate", tmp_path / "fused", "the norm", "--max-new-tokens", 3) == 0
    assert capsys.readouterr().out.startswith("the norm")


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_somebody_elses_model_is_fused_and_taken_by_the_other_verbs(
    architecture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = tmp_path / "theirs"
    save_model_folder(somebody_elses(architecture), small_tokenizer(), theirs)
    assert lm("fuse", theirs, "--output", tmp_path / "fused") == 0
    assert "5 of 5 norms folded" in capsys.readouterr().out
    texts = []
    for folder in (theirs, tmp_path / "fused"):
        assert lm("generate", folder, "a layer of", "--temperature", 0, "--max-new-tokens", 8) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert lm("fuse", tmp_path / "fused", "--output", tmp_path / "again") == 2
    assert "holds no RepBN to fold: it is fused already" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("architecture", ["slab_llama", "llama", "mistral"])
def test_streaming_writes_the_same_weights(architecture: str, tmp_path: Path) -> None:
    model = trained_looking() if architecture == "slab_llama" else somebody_elses(architecture)
    save_model_folder(model.bfloat16(), None, tmp_path / "model")
    assert lm("fuse", tmp_path / "model", "--bf16", "--output", tmp_path / "whole") == 0
    assert lm("fuse", tmp_path / "model", "--stream", "--output", tmp_path / "streamed") == 0
    assert sorted(p.name for p in (tmp_path / "streamed").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )
    streamed = load_model_folder(tmp_path / "streamed", torch.bfloat16).state_dict()
    whole = load_model_folder(tmp_path / "whole", torch.bfloat16).state_dict()
    assert streamed.keys() == whole.keys()
    assert all(torch.equal(streamed[name], whole[name]) for name in whole)


def test_a_folder_without_tokenizer_is_fused_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    save_model_folder(trained_looking(), None, tmp_path / "model")
    assert lm("fuse", tmp_path / "model", "--output", tmp_path / "fused") == 0
    assert "holds no tokenizer; copy one beside the weights" in caplog.text
    assert lm("generate", tmp_path / "fused", "the") == 2
    assert "no tokenizer at" in capsys.readouterr().err


def test_fused_and_unfused_texts_are_scored_alike(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_lines(tmp_path / "text.txt", 10)
    losses = []
    for options in ([], ["--fused"]):
        assert lm("eval", folder, "--data", text, "--document", "line", "--json", "-", *options) == 0
        (row,) = json.loads(capsys.readouterr().out)["perplexity"].values()
        losses.append(row["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert lm("eval", folder, "--data", text) == 0
    assert "bits/byte" in capsys.readouterr().out


def test_the_blend_is_scored_while_gamma_is_above_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_lines(tmp_path / "text.txt", 5)
    assert lm("eval", saved(tmp_path / "model", gamma=0.5), "--data", text, "--json", "-") == 0
    rows = json.loads(capsys.readouterr().out)["perplexity"]
    assert list(rows) == ["deployed", "blend, gamma 0.50"]
    assert rows["deployed"]["loss"] != rows["blend, gamma 0.50"]["loss"]


def test_greedy_text_is_the_same_fused_and_from_argument_file_or_stdin(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt.txt").write_text("a layer of\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("a layer of\n"))
    greedy = ("--temperature", 0, "--max-new-tokens", 8)
    texts = []
    for source in (["a layer of"], ["--file", tmp_path / "prompt.txt"], ["-"], ["a layer of", "--fused"]):
        assert lm("generate", folder, *source, *greedy) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("a layer of")
    assert len(texts[0]) > len("a layer of\n")
    assert set(texts) == {texts[0]}
    assert lm("generate", folder, "a layer of", "--only-new", *greedy) == 0
    assert texts[0] == "a layer of" + capsys.readouterr().out


def test_draws_follow_the_seed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in (1, 1, 2):
        assert lm("generate", folder, "the", "--temperature", 1.5, "--max-new-tokens", 12, "--seed", seed) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("fuse", [False, True], ids=["unfused", "fused"])
def test_the_published_folder_is_imported(fuse: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    (theirs / "config.json").write_text(json.dumps(description(GOLDEN)["config"]))
    torch.save(published_state(GOLDEN), theirs / "pytorch_model.bin")
    arguments = ("import", theirs, "--output", ours, *(["--fuse"] if fuse else []))
    assert lm(*arguments) == 0
    assert f"wrote {ours}" in capsys.readouterr().out
    assert json.loads((ours / "config.json").read_text())["norm"] == ("folded" if fuse else "prepbn")
    assert lm(*arguments) == 2
    assert "holds a model already; give another folder, or --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "nowhere/at/all"], "no text at 'nowhere/at/all'"),
        (
            ["train", "--model.hiden_size", 3],
            "unknown option '--model.hiden_size'; did you mean '--model.hidden-size'?",
        ),
        (["generate", "nowhere", "text"], "no language model at 'nowhere'"),
        (["generate", "MODEL"], "give a prompt, or --file"),
        (["generate", "MODEL", "the", "--max-new-tokens", 99], "do not fit the context of 64"),
        (["generate", "MODEL", "the", "--temperature", -1], "--temperature must be at least 0"),
        (["eval", "MODEL"], "nothing to evaluate on"),
        (["eval", "MODEL", "--tasks", "no/quiz.jsonl"], "no task file 'no/quiz.jsonl'"),
        (["eval", "MODEL", "--data", "pydoc", "--stride", 64], "stride must be in [1, 63]"),
        (["fuse", "FADING", "--output", "out"], "still holds its RMSNorms (gamma is 0.5)"),
        (["import", "nowhere", "--output", "out"], "folder must be a folder that exists, got 'nowhere'"),
        (
            ["fuse", "MODEL", "--stream", "--bf16", "--output", "out"],
            "--stream keeps the dtype that the weights are stored",
        ),
        (["fuse", "MODEL", "--stream", "--device", "meta", "--output", "out"], "leave out --device meta"),
        (["fuse", "MODEL", "--output", "BYTES"], "--output must be a folder to write into, but"),
        (["generate", "MODEL", "--file", "BYTES"], "is no text in UTF-8 (invalid start byte at byte 0)"),
        (["eval", "MODEL", "--tasks", "BYTES"], "is no text in UTF-8"),
        (["eval", "MODEL", "--data", "pydoc", "--batch-size", 0], "--batch-size must be at least 1, got 0"),
        (["bench", "MODEL", "--batch-sizes", 0], "--batch-sizes[0] must be at least 1, got 0"),
        (["bench", "MODEL", "--threads", 0], "--threads must be in [1, 4096], got 0"),
        (["bench", "MODEL", "--output", "BYTES"], "--output must be a folder to write into, but"),
        (["bench", "BAD.yaml"], "BAD.yaml is no recipe"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_cost_one_line(
    arguments: list[object],
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    known: dict[object, object] = {"MODEL": folder, "BYTES": tmp_path / "bytes.jsonl"}
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    (tmp_path / "BAD.yaml").write_text("steps: many\n")
    if "FADING" in arguments:
        known["FADING"] = saved(tmp_path / "fading", gamma=0.5)
    assert lm(*(known.get(argument, argument) for argument in arguments)) == 2
    complaint = capsys.readouterr().err.strip()
    assert message in complaint
    assert "\n" not in complaint.partition("slab: ")[2]


def test_bench_prints_every_form_of_a_folder_and_of_a_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, recipe = tmp_path / "model", tmp_path / "tiny.yaml"
    save_model_folder(trained_looking(max_position_embeddings=80), None, folder)
    recipe.write_text(yaml.safe_dump({"model": {**SIZES, "context": 80}, "tokenizer": {"vocab_size": 300}}))
    options = ("--batch-sizes", 1, "--prompt-tokens", 4, "--seconds", 0, "--no-compile", "--threads", 1)
    for model in (folder, recipe):
        assert lm("bench", model, *options, "--output", tmp_path / "out") == 0
        printed = capsys.readouterr().out
        assert all(name in printed for name in ("RMSNorm baseline", "as given", "fused", "ceiling", model.stem))
    assert (tmp_path / "out" / "decode.csv").exists()


def test_bench_gives_somebody_elses_converted_model_its_baseline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model_folder(somebody_elses("mistral", max_position_embeddings=80), None, tmp_path)
    options = ("--batch-sizes", 1, "--prompt-tokens", 4, "--seconds", 0, "--no-compile", "--threads", 1)
    assert lm("bench", tmp_path, *options, "--output", tmp_path / "out") == 0
    parameters = {row["variant"]: int(row["parameters"]) for row in csv_rows(tmp_path / "out" / "decode.csv")}
    assert parameters["LayerNorm baseline"] < parameters["as given"]


def test_bench_refuses_a_fused_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fused, _ = fuse_language_model(trained_looking())
    save_model_folder(fused, None, tmp_path)
    assert lm("bench", tmp_path, "--prompt-tokens", 4) == 2
    assert "this model is fused already; give the one it was fused from" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:# The axis name:UserWarning", "ignore::DeprecationWarning")
def test_export_writes_a_checked_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lm("export", folder, "--fused", "--output", tmp_path / "model.onnx") == 0
    assert "of PyTorch's scale, reading and writing" in capsys.readouterr().out
    assert (tmp_path / "model.onnx").stat().st_size > 10_000
    assert list(tmp_path.iterdir()) == [tmp_path / "model.onnx"]
    assert lm("export", folder, "--output", tmp_path / "nowhere" / "model.onnx") == 2
    assert "to write model.onnx into; create it first" in capsys.readouterr().err


def test_without_transformers_the_extra_that_brings_it_is_told() -> None:
    script = "import sys; sys.modules['transformers'] = None; from slabformer.cli.main import main; "
    script += "sys.exit(main(['lm', 'generate', 'm', 'text']))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 2, done.stderr
    assert "slab: slabformer needs transformers for this; pip install 'slabformer[lm]'" in done.stderr


def test_without_datasets_the_extra_that_brings_it_is_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert lm("eval", folder, "--data", write_lines(tmp_path / "text.txt", 3)) == 2
    assert "slab: slabformer needs datasets for this; pip install 'slabformer[lm]'" in capsys.readouterr().err


def test_layers_that_are_named_keep_their_norms_outputs(tmp_path: Path) -> None:
    norm = "model.layers.0.input_layernorm"
    save_model_folder(trained_looking(), None, tmp_path / "model")
    assert lm("fuse", tmp_path / "model", "--output", tmp_path / "fused", "--keep", norm) == 0
    fused = load_model_folder(tmp_path / "fused")
    assert [name for name, module in fused.named_modules() if isinstance(module, Affine)] == [norm]
    tokens = torch.arange(8)[None]
    assert_close(fused(input_ids=tokens).logits, trained_looking()(input_ids=tokens).logits, FLOAT32)
