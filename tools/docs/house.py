"""Draw docs/images/house.svg: the packages of slabformer by floor, with the imports between them.

python tools/docs/house.py

Only arrows that no longer way replaces are drawn: `cli` imports `nn` too, and gets there through what is drawn. A test
holds the picture against the imports that it finds in the code.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "docs" / "images" / "house.svg"
Rooms = Mapping[str, set[str]]

#: what is drawn as one box
GROUND, LIBRARIES, PUBLIC = "settings, _torch, ...", "_timm, _transformers, ...", "slabformer"
#: package -> what happens there, in two or three words
CAPTIONS = {
    GROUND: "ranges, files, private names",
    LIBRARIES: "private names of libraries",
    "ops": "functions on tensors",
    "nn": "norms, attention",
    "progressive": "the fade",
    "surgery": "convert, fuse, verify",
    "testing": "redrawn norms",
    "models": "the zoo, its weights",
    "distillation": "learn from the original",
    "measure": "time, cost, distance",
    "export": "files for runtimes",
    "deployment": "the fastest form",
    "figures": "pictures",
    "quantize": "8-bit integers",
    "mindspore": "models for MindSpore",
    "bench": "benchmarks",
    PUBLIC: "the public names",
    "tasks": "data, training, evaluation",
    "quickstart": "the life of a model",
    "converting": "a trained model's norms",
    "cli": "the slab command",
}
WIDTH, BOX, HEIGHT, GAP = 900, 172, 44, 40


def grouped(imports: Rooms, ground: set[str], libraries: set[str]) -> dict[str, set[str]]:
    """``imports`` of packages and single files with those at the bottom as two boxes."""

    def box(room: str) -> str:
        return GROUND if room in ground else LIBRARIES if room in libraries else PUBLIC if room == "__init__" else room

    made: dict[str, set[str]] = {}
    for room, targets in imports.items():
        made.setdefault(box(room), set()).update(box(target) for target in targets)
    return {room: targets - {room} for room, targets in made.items()}


def floors_of(imports: Rooms) -> dict[str, int]:
    """The lowest floor on which each room stands above all that it imports."""

    @functools.cache
    def floor(room: str) -> int:
        return max((floor(target) + 1 for target in imports[room]), default=0)

    return {room: floor(room) for room in imports}


def direct(imports: Rooms) -> dict[str, set[str]]:
    """``imports`` without those that a longer way replaces."""

    @functools.cache
    def reached(room: str) -> frozenset[str]:
        return frozenset(imports[room]).union(*map(reached, imports[room]))

    return {
        room: {target for target in targets if not any(target in reached(other) for other in targets - {target})}
        for room, targets in imports.items()
    }


def places_of(imports: Rooms) -> dict[str, tuple[float, float]]:
    """Centre of each room's box; a room stands near what it imports."""
    floors, arrows = floors_of(imports), direct(imports)
    top = max(floors.values())
    places: dict[str, tuple[float, float]] = {}
    for floor in range(top + 1):
        row = sorted(room for room in imports if floors[room] == floor)
        row.sort(key=lambda room: sum(places[t][0] for t in arrows[room]) / max(1, len(arrows[room])))
        for number, room in enumerate(row):
            x = WIDTH * (2 * number + 1) / (2 * len(row))
            places[room] = (x, (top - floor) * (HEIGHT + GAP) + HEIGHT / 2 + 8)
    return places


def draw(imports: Rooms) -> str:
    """The picture as SVG."""
    places = places_of(imports)
    height = max(y for _, y in places.values()) + HEIGHT / 2 + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" font-family="sans-serif">',
        "<title>Packages of slabformer by floor; arrows are imports</title>",
        '<defs><marker id="tip" viewBox="0 0 6 6" refX="6" refY="3" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 6 3 0 6z" fill="#7A868F"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height:.0f}" fill="white"/>',
    ]
    for room, targets in sorted(direct(imports).items()):
        for target in sorted(targets):
            (x, y), (u, v) = places[room], places[target]
            start, end = y + HEIGHT / 2, v - HEIGHT / 2
            bend = (end - start) / 2
            parts.append(
                f'<path d="M{x:.0f} {start:.0f}C{x:.0f} {start + bend:.0f} {u:.0f} {end - bend:.0f} {u:.0f} {end:.0f}" '
                'fill="none" stroke="#7A868F" stroke-width="1.2" marker-end="url(#tip)"/>'
            )
    for room, (x, y) in sorted(places.items()):
        parts += [
            f'<rect x="{x - BOX / 2:.0f}" y="{y - HEIGHT / 2:.0f}" width="{BOX}" height="{HEIGHT}" rx="6" '
            'fill="#E9F5F1" stroke="#009E73"/>',
            f'<text x="{x:.0f}" y="{y - 3:.0f}" text-anchor="middle" font-size="14" font-weight="bold" '
            f'fill="#22303A">{escape(room)}</text>',
            f'<text x="{x:.0f}" y="{y + 14:.0f}" text-anchor="middle" font-size="11" '
            f'fill="#55626B">{escape(CAPTIONS[room])}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    """Write the picture."""
    sys.path.insert(0, str(ROOT / "tests"))
    import test_architecture as rules

    PICTURE.write_text(draw(grouped(rules.imports_between_rooms(), rules.GROUND, rules.FOREIGN)), encoding="utf-8")
    sys.stdout.write(f"wrote {PICTURE}\n")


if __name__ == "__main__":
    main()
