"""Many images through a deployed classifier: a pool of threads reads and classifies them, one line of CSV each.

    slab deploy runs/digits/model.safetensors --data digits --output deployed
    python examples/classify_folder.py deployed photos/ --workers 4 > classes.csv

Every worker reads an image and runs the model on it, with one thread of the runtime's own; onnxruntime runs calls side
by side, OpenVINO one after the other. Images that cannot be read are named on standard error, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import slabformer as sf
from slabformer.deployment.artifact import ArtifactError, LoadedModel
from slabformer.surgery.verify import VerificationError
from slabformer.tasks.classification.predict import deployed_transform
from slabformer.tasks.images import UNREADABLE, expand_paths, read_image, reason_of


@dataclass(frozen=True)
class Row:
    """The likeliest class of one image, or why it could not be read."""

    path: str
    name: str = ""
    score: float = 0.0
    error: str = ""


def classify(model: LoadedModel, paths: Sequence[str | Path], workers: int) -> Iterator[Row]:
    """One row for each of ``paths``, in order, as they are done.

    Raises:
        ValueError: If the folder of ``model`` does not say how images become inputs.
    """
    transform, names = deployed_transform(model.manifest.preprocessing), model.manifest.class_names

    def one(path: str | Path) -> Row:
        try:
            image = transform(read_image(path))
        except UNREADABLE as error:
            return Row(str(path), error=reason_of(error))
        score, label = model(image[None])[0].float().softmax(0).max(0)
        return Row(str(path), names[label] if names else str(int(label)), round(float(score), 4))

    pool = ThreadPoolExecutor(workers)
    try:
        yield from pool.map(one, paths)
    finally:  # also when nobody wants more, or Ctrl-C
        pool.shutdown(cancel_futures=True)


def main() -> None:
    """Classify, and write what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", help="that `slab deploy` wrote")
    parser.add_argument("images", nargs="+", help="files, or folders of them")
    parser.add_argument("--workers", type=int, default=4, help="threads, each with an image of its own")
    options = parser.parse_args()
    try:
        model, paths = sf.load_deployed(options.folder, threads=1), expand_paths(options.images)
        rows = classify(model, paths, options.workers)
        table, failed = csv.writer(sys.stdout), False
        for row in rows:
            if row.error:
                failed = True
                print(f"{row.path}: {row.error}", file=sys.stderr)
            else:
                table.writerow([row.path, row.name, row.score])
    except (ArtifactError, FileNotFoundError, ImportError, ValueError, VerificationError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(failed)


if __name__ == "__main__":
    main()
