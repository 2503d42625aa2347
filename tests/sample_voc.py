"""A tiny VOC2007 in the published layout."""

from pathlib import Path

from conftest import drawn_picture


def write_devkit(folder: Path) -> Path:
    """folder/VOCdevkit: 24 + 18 pictures; "red" is in every second one as a square, "blue" too."""
    root = folder / "VOCdevkit" / "VOC2007"
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "JPEGImages").mkdir()
    number = 0
    for part, count in (("trainval", 24), ("test", 18)):
        lines: dict[str, list[str]] = {"red": [], "blue": []}
        for index in range(count):
            picture = drawn_picture(number, 60, 48)
            red, blue = index % 2 == 0, index % 4 < 2
            if red:
                picture.paste((230, 10, 10), (0, 0, 30, 48))
            if blue:
                picture.paste((10, 10, 230), (30, 0, 60, 48))
            picture.save(root / "JPEGImages" / f"{number:06d}.jpg")
            difficult = index == 5
            lines["red"].append(f"{number:06d} {0 if difficult else 2 * red - 1:2d}")
            lines["blue"].append(f"{number:06d} {2 * blue - 1:2d}")
            number += 1
        for name, rows in lines.items():
            file = root / "ImageSets" / "Main" / f"{name}_{part}.txt"
            file.write_text("\n".join(rows) + "\n")
    return folder / "VOCdevkit"
