"""What no setting may be, verb by verb: one line that names it, exit code 2, and nothing read or written before."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from slabformer.cli.main import main
from slabformer.tasks.classification.config import AugmentConfig
from slabformer.tasks.engine.build import check_optimizer
from slabformer.tasks.engine.config import OptimizerConfig
from slabformer.tasks.saved_file import DIGEST, digest_of
from slabformer.tasks.saved_model import create_model

TRAIN = ("train", "--data", "/nonexistent")
LANGUAGE = ("lm", "train", "--data", "/nonexistent")
DETECT = ("detect", "train", "--data.train-images", "/nonexistent")
MICRO: dict[str, Any] = {
    **{"model": "slab_deit_micro", "class_names": [], "input_size": [3, 32, 32]},
    **{"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 1.0},
}
LLAMA: dict[str, Any] = {
    **{"model_type": "slab_llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "vocab_size": 16},
}


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where relative outputs would go; afterwards nothing may have been written into it."""
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    yield
    assert list(place.iterdir()) == []


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line that `slab` answers ``arguments`` with."""
    code = main([str(argument) for argument in arguments])
    complaint = capsys.readouterr().err
    assert code == 2, complaint
    assert complaint.count("\n") == 1, complaint
    return complaint.removeprefix("slab: ").removesuffix("\n")


@pytest.mark.parametrize(
    ("flag", "value", "line"),
    [
        ("--optimizer.clip-norm", "-1", "--optimizer.clip-norm must be above 0, got -1.0"),
        ("--optimizer.layer-decay", "-1", "--optimizer.layer-decay must be above 0 and at most 1, got -1.0"),
        ("--optimizer.lr", "nan", "--optimizer.lr must be a finite number above 0, got nan"),
        ("--optimizer.lr-base-batch", "0", "--optimizer.lr-base-batch must be at least 1, got 0"),
        ("--optimizer.name", "adamww", "got 'adamww'; did you mean 'adamw'?"),
        ("--optimizer.args", '{"betas": [2, 2]}', "timm refuses optimizer 'adamw': Invalid beta parameter"),
        ("--augment.mixup", "-1", "--augment.mixup must be at least 0, got -1.0"),
        ("--augment.cutmix", "-1", "--augment.cutmix must be at least 0, got -1.0"),
        ("--augment.label-smoothing", "3", "--augment.label-smoothing must be at least 0 and below 1, got 3.0"),
        ("--augment.auto-augment", "rand-m9-xx1", "--augment.auto-augment must be a policy of timm's"),
        ("--augment.auto-augment", "rand-mnine", "--augment.auto-augment must be a policy of timm's"),
        ("--lr-schedule.warmup-epochs", "-1", "--lr-schedule.warmup-epochs must be at least 0, got -1.0"),
        ("--lr-schedule.warmup-epochs", "300", "lr_schedule.warmup_epochs (300) must be below epochs (300)"),
        ("--lr-schedule.name", "cosinus", "--lr-schedule.name must be 'cosine', 'tanh'"),
        ("--data.interpolation", "cubic", "--data.interpolation must be 'bicubic', 'bilinear', 'nearest' or 'lanczos'"),
        ("--data.mean", "[0.5]", "--data.mean must be a list of 3 values, each a finite number"),
        ("--data.std", "[0.5, 0, 0.5]", "--data.std[1] must be above 0, got 0.0"),
        ("--recalibrate.batches", "0", "--recalibrate.batches must be at least 1, got 0"),
        ("--ema.decay", "2", "--ema.decay must be at least 0 and below 1, got 2.0"),
        ("--seed", str(2**63), "--seed must be below 9223372036854775808"),
        ("--seed", "-1", "--seed must be at least 0, got -1"),
        ("--epochs", "1000000000", "--epochs must be in [1, 100000], got 1000000000"),
        ("--epochs", "1e9", "--epochs must be a whole number in [1, 100000], got 1000000000.0"),
        ("--batch-size", "0", "--batch-size must be at least 1, got 0"),
        ("--accumulate", "0", "--accumulate must be at least 1, got 0"),
        ("--num-workers", "-1", "--num-workers must be in [0, 4096], got -1"),
        ("--output", "", "--output must not be empty"),
        ("--model.name", "slab_deit_micra", "unknown model 'slab_deit_micra'; did you mean 'slab_deit_micro'?"),
        ("--model.args.drop-path-rate", "-1", "drop_path_rate must be at least 0 and below 1, got -1"),
        ("--model.args.embed-dim", "0", "embed_dim must be at least 1, got 0"),
        ("--model.args.depth", "-2", "depth must be at least 1, got -2"),
        ("--model.args.num-heads", "5", "num_heads must divide embed_dim (64), got 5"),
        ("--model.args.embed-dimm", "8", "did you mean 'embed_dim'?"),
        ("--model.weights", "nothing.safetensors", "no weights at 'nothing.safetensors': no such file"),
        ("--config", "nothing.yaml", "no recipe at 'nothing.yaml': no such file"),
    ],
)
def test_train_tells_a_setting_before_it_looks_for_data(
    capsys: pytest.CaptureFixture[str], flag: str, value: str, line: str
) -> None:
    assert line in refused(capsys, *TRAIN, flag, value)


def test_steps_of_more_batches_than_an_epoch_are_told_with_both_numbers(
    capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    small = ("--data.image-size", "32", "--augment.policy", "light", "--num-workers", "0", "--device", "cpu")
    line = refused(capsys, "train", "--data", "digits", *small, "--accumulate", "1000000")
    assert line == "accumulate must be at most 11, the batches of an epoch, got 1000000"


@pytest.mark.parametrize(
    ("model", "argument", "value", "line"),
    [
        ("slab_swin_tiny", "depths", "[2, -2, 6, 2]", "depths[1] must be at least 1, got -2"),
        (
            "slab_swin_tiny",
            "num_heads",
            "[3, 5, 12, 24]",
            "num_heads[1] must divide the 192 channels of its stage, got 5",
        ),
        ("slab_pvt_v2_b0", "mlp_ratios", "[8, 8, 4, 0]", "mlp_ratios[3] must be above 0, got 0"),
        ("slab_cswin_tiny", "stripe_widths", "[1, 0, 7, 7]", "stripe_widths[1] must be at least 1, got 0"),
        ("deit_tiny_patch16_224", "drop_rate", "1", "drop_rate must be at least 0 and below 1, got 1"),
    ],
)
def test_arguments_of_every_family_are_told_before_data(
    capsys: pytest.CaptureFixture[str], model: str, argument: str, value: str, line: str
) -> None:
    assert refused(capsys, *TRAIN, "--model.name", model, f"--model.args.{argument}", value) == line


@pytest.mark.parametrize(
    ("flag", "value", "line"),
    [
        ("--optimizer.clip-norm", "-1", "--optimizer.clip-norm must be above 0, got -1.0"),
        ("--optimizer.betas", "[1, 1]", "--optimizer.betas[0] must be at least 0 and below 1, got 1.0"),
        ("--optimizer.warmup-steps", "600", "optimizer.warmup_steps must be below steps (600), got 600"),
        ("--steps", "0", "--steps must be at least 1, got 0"),
        ("--output", "", "--output must not be empty"),
        ("--model.hidden-size", "0", "--model.hidden-size must be at least 1, got 0"),
        ("--model.hidden-size", "10", "model.hidden_size must be a multiple of twice the 4 heads"),
        ("--model.args.num-key-value-heads", "3", "model.args.num_key_value_heads must divide the 4 heads, got 3"),
        ("--model.args.bn-momentum", "7", "bn_momentum must be above 0 and at most 1, got 7"),
        ("--model.args.hidden-act", "7", "model.args: Validation error for field 'hidden_act'"),
        ("--model.args.bogus", "7", "unknown model.args.bogus"),
    ],
)
def test_lm_train_tells_a_setting_before_it_looks_for_text(
    capsys: pytest.CaptureFixture[str], flag: str, value: str, line: str
) -> None:
    assert line in refused(capsys, *LANGUAGE, flag, value)


@pytest.mark.parametrize(
    ("flag", "value", "line"),
    [
        ("--optimizer.clip-norm", "-1", "--optimizer.clip-norm must be above 0, got -1.0"),
        ("--optimizer.name", "adamww", "did you mean 'adamw'?"),
        ("--batch-size", "0", "--batch-size must be at least 1, got 0"),
        ("--output", "", "--output must not be empty"),
        ("--model.backbone", "slab_swin_tinny", "did you mean 'slab_swin_tiny'?"),
        ("--model.args.drop-path-rate", "-1", "drop_path_rate must be at least 0 and below 1, got -1"),
        ("--model.args.num-heads", "[5, 5, 5, 5]", "num_heads[0] must divide the"),
        ("--model.weights", __file__, "is truncated, or no safetensors file"),
        ("--model.weights", "nothing.safetensors", "no weights at 'nothing.safetensors': no such file"),
        ("--model.backbone-weights", "nothing.pth", "no weights at 'nothing.pth': no such file"),
    ],
)
def test_detect_train_tells_a_setting_before_it_looks_for_data(
    capsys: pytest.CaptureFixture[str], flag: str, value: str, line: str
) -> None:
    assert line in refused(capsys, *DETECT, flag, value)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("eval", "x.safetensors", "--data", "digits", "--batch-size", "0"), "--batch-size must be at least 1, got 0"),
        (("fuse", "slab_deit_micro", "--output", "f.txt"), "--output must be a .safetensors file, got 'f.txt'"),
        (("fuse", "slab_deit_micro", "--output", ""), "--output must not be empty"),
        (("fuse", "slab_deit_micro", "--output", "none/f.safetensors"), "--output has no folder 'none'"),
        (("fuse", "slab_deit_micro", "--output", "f.safetensors", "--rtol", "-1"), "--rtol must be at least 0"),
        (("fuse", "slab_deit_micro", "--output", "f.safetensors", "--rtol", "nan"), "--rtol must be a finite number"),
        (("verify", __file__, __file__, "--rtol", "-1"), "--rtol must be at least 0 and below 1, got -1.0"),
        (("verify", __file__, __file__, "--rtol", "nan"), "--rtol must be a finite number of at least 0"),
        (("audit", "slab_deit_micro", "--input-size", "0"), "--input-size must be in [1, 65536], got 0"),
        (("bench", "slab_deit_micro", "--batch-sizes", "0"), "--batch-sizes[0] must be at least 1, got 0"),
        (("visualize", "slab_deit_micro", "x.png", "--output", "f.txt"), "--output must be a .png, .svg or .pdf file"),
        (("export", "slab_deit_micro", "--output", "f.txt"), "cannot tell a format from f.txt"),
        (("quickstart", "--epochs", "0"), "epochs must be in [1, 100000], got 0"),
        (("quickstart", "--output="), "--output must not be empty"),
        (("recalibrate", "x", "--data", "digits", "--output", "f.txt"), "--output must be a .safetensors file"),
        (("lm", "generate", "x", "--prompt", "y"), "prompt is given without --prompt"),
    ],
)
def test_other_verbs_tell_an_option_before_they_load_a_model(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], line: str
) -> None:
    assert line in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("model", 7, "model must be text that is not empty, got 7"),
        ("class_names", None, "class_names must be a list of values"),
        ("class_names", [None] * 10, "class_names[0] must be text that is not empty, got None"),
        ("class_names", ["cat"], "class_names must name the 10 classes of slab_deit_micro, got 1 names"),
        ("std", [0, 0, 0], "std[0] must be above 0, got 0"),
        ("mean", [0.5], "mean must be a list of 3 values"),
        ("input_size", [3, 0, 0], "input_size[1] must be in [1, 65536], got 0"),
        ("interpolation", "cubic", "interpolation must be 'bicubic'"),
        ("model_args", {"embed_dim": 0}, "embed_dim must be at least 1, got 0"),
        ("model_args", {"num_heads": 5}, "num_heads must divide embed_dim (64), got 5"),
    ],
)
def test_a_header_out_of_range_is_told_with_the_field(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, value: Any, line: str
) -> None:
    write_model(tmp_path / "model.safetensors", json.dumps({**MICRO, name: value}))
    assert line in refused(capsys, "eval", tmp_path / "model.safetensors", "--data", "digits", "--device", "cpu")


def test_a_deeply_nested_header_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_model(tmp_path / "model.safetensors", "[" * 100_000)
    line = refused(capsys, "eval", tmp_path / "model.safetensors", "--data", "digits", "--device", "cpu")
    assert "it is nested too deeply" in line


def write_model(path: Path, header: str) -> None:
    tensors, metadata = {"a": torch.zeros(1)}, {"slabformer": header}
    if "class_names" in header:
        import timm

        tensors = timm.create_model("slab_deit_micro").state_dict()
    save_file(tensors, path, metadata={**metadata, DIGEST: digest_of(metadata, tensors)})


@pytest.mark.parametrize(
    ("recipe", "line"),
    [
        ("model: 7", "model must be a mapping of settings to values, got 7"),
        ("- 1\n- 2", "is no recipe: it must be a mapping of settings to values, got [1, 2]"),
        ("seven", "is no recipe: it must be a mapping of settings to values, got 'seven'"),
        ("augment: {mixup: -1}", "augment.mixup must be at least 0, got -1.0"),
        ("a: " + "[" * 20_000, "it is nested deeper than 64 levels"),
        (b"epochs: \xff", "is no text in UTF-8"),
    ],
    ids=["group", "list", "text", "range", "deep", "codec"],
)
def test_a_recipe_out_of_range_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, recipe: str | bytes, line: str
) -> None:
    (tmp_path / "recipe.yaml").write_bytes(recipe if isinstance(recipe, bytes) else recipe.encode())
    assert line in refused(capsys, *TRAIN, "--config", tmp_path / "recipe.yaml")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_text_file_is_no_model(capsys: pytest.CaptureFixture[str], tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"notes{suffix}"
    file.write_text("hello there, these are notes\n" * 10)
    assert str(file) in refused(capsys, *TRAIN, "--model.weights", file)
    line = refused(capsys, "eval", "slab_deit_micro", "--checkpoint", file, "--data", "digits", "--device", "cpu")
    assert line == (
        f"cannot read {file} as a checkpoint of plain tensors: it is truncated, or torch.save did not write it"
    )


def test_a_file_without_permission_is_told_as_such(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    opened = Path.open

    def open_other(path: Path, *args: Any, **kwargs: Any) -> Any:  # root may read whatever the mode
        if path == file:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_other)
    assert "no permission to read" in refused(capsys, "eval", file, "--data", "digits")
    assert "no permission to read" in refused(capsys, *TRAIN, "--config", file)


class Foreign:
    """Anything that is no tensor."""


@pytest.mark.parametrize(
    ("config", "weights", "line"),
    [
        ('{"hidden_size": ', None, "config.json is not JSON"),
        ("[" * 100_000, None, "config.json is not JSON (it is nested too deeply)"),
        ("[1]", None, "config.json must hold a mapping, got [1]"),
        ({**LLAMA, "hidden_size": 0}, None, "hidden_size must be at least 1, got 0"),
        ({**LLAMA, "hidden_size": "x"}, None, "Field 'hidden_size' expected int, got str"),
        (LLAMA, {"x": torch.zeros(1)}, "do not fit its configuration"),
        (LLAMA, {"x": Foreign()}, "it holds test_bad_values_cli.Foreign, and other objects than tensors may run code"),
        (LLAMA, b"hello" * 50, "it is truncated, or torch.save did not write it"),
        (LLAMA, None, "no language model at"),
    ],
    ids=["truncated", "deep", "list", "zero", "text", "other-tensors", "pickled", "garbage", "no-weights"],
)
def test_a_folder_that_is_no_language_model_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, config: Any, weights: Any, line: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if isinstance(weights, bytes):
        (folder / "pytorch_model.bin").write_bytes(weights)
    elif weights is not None:
        torch.save(weights, folder / "pytorch_model.bin")
    (tmp_path / "text.txt").write_text("some text\n")
    assert line in refused(capsys, "lm", "eval", folder, "--data", tmp_path / "text.txt")


def test_truncated_safetensors_of_a_language_model_are_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (tmp_path / "text.txt").write_text("some text\n")
    assert "Error while deserializing header" in refused(
        capsys, "lm", "eval", tmp_path, "--data", tmp_path / "text.txt"
    )


def test_a_folder_without_images_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
    assert "class 'cat' is empty: no images in" in refused(capsys, "train", "--data", tmp_path / "images")


@pytest.mark.parametrize(
    "policy",
    [
        "rand-m9-mstd0.5-inc1",
        "rand-m9-n3-p0.5-mmax10",
        "augmix-m5-w4-d2-b0",
        "original-mstd0.5",
        "originalr",
        "v0",
        "3a",
    ],
)
def test_every_form_of_a_policy_of_timm_passes(policy: str) -> None:
    assert AugmentConfig(auto_augment=policy).auto_augment == policy


@pytest.mark.parametrize("name", ["adamw", "AdamW", "sgd", "lookahead_adamw", "lamb"])
def test_every_form_of_an_optimizer_of_timm_passes(name: str) -> None:
    assert len(check_optimizer(OptimizerConfig(name=name)).param_groups) >= 1


@pytest.mark.parametrize(
    ("model", "arguments", "reason"),
    [
        ("deit_tiny_patch16_224", {"num_heads": 5}, "dim should be divisible by num_heads"),
        ("slab_deit_micro", {"global_pool": "best"}, "Only avg, avgmax, max"),
    ],
)
def test_what_timm_asserts_is_told_as_an_argument(model: str, arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=rf"^{model} refuses its arguments \({reason}"):
        create_model(model, **arguments)
