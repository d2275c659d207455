"""Benchmarks of several models go together, or say why not."""

from __future__ import annotations

import csv
from itertools import pairwise
from pathlib import Path

import pytest

from bench_files import MACHINE, bench_file
from slabformer.figures.comparison import compare_files
from slabformer.figures.comparison_picture import accuracy_over_speed
from slabformer.figures.plots import to_svg
from slabformer.measure.timing import Machine


def test_the_best_that_all_models_share_is_compared(tmp_path):
    bench_file(tmp_path, "slab_deit_tiny", batch_sizes=(1, 8, 64))
    bench_file(tmp_path, "slab_swin_tiny", speed=3.0)
    comparison = compare_files([tmp_path])
    assert (comparison.mode, comparison.batch_size) == ("compiled", 8)
    assert comparison.where == "abacus, 1 thread; torch 9.9"
    points = {point.model: point for pair in comparison.pairs for point in pair.points()}
    assert {name: round(point.images_per_second, 6) for name, point in points.items()} == {
        "slab_deit_tiny": 24,
        "deit_tiny_patch16_224": 20,
        "slab_swin_tiny": 6,
        "swin_tiny_patch4_window7_224": 5,
    }
    assert points["slab_deit_tiny"].top1 == 74.3
    assert points["swin_tiny_patch4_window7_224"].top1 == 81.3
    assert {point.source for point in points.values()} == {"published"}
    assert [pair.over_baseline for pair in comparison.pairs] == [1.2, 1.2]


def test_files_with_the_old_names_are_read_alike(tmp_path):
    path = bench_file(tmp_path, "slab_deit_tiny")
    before = compare_files([path])
    path.write_text(path.read_text().replace("baseline", "twin"))
    assert compare_files([path]) == before
    assert before.pairs[0].over_baseline == 1.2


def test_mode_and_batch_size_may_be_chosen(tmp_path):
    path = bench_file(tmp_path, "slab_deit_tiny")
    comparison = compare_files([path], mode="eager", batch_size=1)
    assert (comparison.mode, comparison.batch_size) == ("eager", 1)
    assert comparison.pairs[0].fused.images_per_second == 12


def test_a_measured_accuracy_takes_the_place_of_the_published_one(tmp_path):
    bench_file(tmp_path, "slab_deit_tiny")
    bench_file(tmp_path, "slab_deit_micro", baseline=False)
    known = {"slab_deit_tiny": 74.0, "slab_deit_micro": 97.5}
    comparison = compare_files([tmp_path], accuracy=known)
    fused = {pair.fused.model: (pair.fused.top1, pair.fused.source) for pair in comparison.pairs}
    assert fused == {"slab_deit_tiny": (74.0, "measured"), "slab_deit_micro": (97.5, "measured")}
    assert [pair.baseline and pair.baseline.source for pair in comparison.pairs] == [None, "published"]
    (unknown,) = [pair.fused for pair in compare_files([tmp_path]).pairs if pair.fused.source is None]
    assert (unknown.model, unknown.top1) == ("slab_deit_micro", None)


def test_the_figure_names_fused_models_and_marks_what_was_published(tmp_path):
    bench_file(tmp_path, "slab_deit_tiny")
    bench_file(tmp_path, "slab_deit_small")
    figure = accuracy_over_speed(compare_files([tmp_path], accuracy={"slab_deit_small": 79.5}))
    text = to_svg(figure)
    for shown in (
        "slab_deit_tiny",
        "slab_deit_small",
        "compiled, batch 8",
        "as published, not measured here",
        "abacus",
    ):
        assert shown in text
    faces = [line.get_markerfacecolor() for line in figure.axes[0].lines]
    assert faces.count("white") == 3  # both baselines and slab_deit_tiny
    assert len(faces) == 4


def test_names_do_not_lie_on_one_another(tmp_path):
    for name in ("slab_deit_small", "deit_small_prepbn", "pvt_small_prepbn"):
        bench_file(tmp_path, name)
    accuracy = dict.fromkeys(("slab_deit_small", "deit_small_prepbn", "pvt_small_prepbn"), 80.0)
    figure = accuracy_over_speed(compare_files([tmp_path], accuracy=accuracy))
    figure.draw_without_rendering()
    heights = sorted(text.xyann[1] for text in figure.axes[0].texts if text.get_text())
    assert len(heights) == 3
    assert all(upper - lower > 8 for lower, upper in pairwise(heights))  # letters of 8 points


def write(path: Path, *rows: dict[str, str]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def two_machines(folder: Path) -> list[Path]:
    other = Machine(**{**MACHINE.to_dict(), "device": "sliderule", "threads": 2})
    return [bench_file(folder, "slab_deit_tiny"), bench_file(folder, "slab_swin_tiny", machine=other)]


ONE_SIZE_EACH = {"slab_deit_tiny": 1, "slab_swin_tiny": 8}
MISTAKES = {
    "empty": (lambda folder: [folder], r"no \.csv below .*`slab bench --output FOLDER` writes them"),
    "other": (
        lambda folder: [write(folder / "x.csv", {"model": "x", "epoch": "1"})],
        "x.csv is no benchmark of `slab bench`: it lacks variant, mode, .*",
    ),
    "machines": (two_machines, "on one machine alone, .* 2: abacus, 1 thread; sliderule, 2 threads"),
    "twice": (
        lambda folder: [bench_file(folder / "a", "slab_deit_tiny"), bench_file(folder / "b", "slab_deit_tiny")],
        "slab_deit_tiny was measured in .* and in .*; give one of them",
    ),
    "nothing in common": (
        lambda folder: [bench_file(folder, name, batch_sizes=(n,)) for name, n in ONE_SIZE_EACH.items()],
        r"not every model was measured fused, .* in common \(slab_deit_tiny: compiled 1, eager 1; slab_swin_tiny: .*\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), MISTAKES.values(), ids=MISTAKES)
def test_files_that_do_not_go_together_are_refused_in_a_line(make, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        compare_files(make(tmp_path))
    assert "\n" not in str(error.value)


def test_what_is_asked_for_must_have_been_measured(tmp_path):
    path = bench_file(tmp_path, "slab_deit_tiny", modes=("eager",))
    with pytest.raises(ValueError, match="measured fused, compiled, batch 8, in common"):
        compare_files([path], mode="compiled", batch_size=8)
    with pytest.raises(ValueError, match="given for 'slab_swin_tiny', which is not among slab_deit_tiny"):
        compare_files([path], accuracy={"slab_swin_tiny": 80.0})
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv"):
        compare_files([tmp_path / "nowhere.csv"])
