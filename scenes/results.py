"""Columns of the judge's tables: pictures of an editor, their controls, and what is told of them.

    1. Pictures of an editor, saved and read; controls     2. Cells, sheets, scores     3. Good, same, bad
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

import log
from log import bootstrap, sign_test
from readers.files import read_image
from scenes.judge import to_float, to_uint8
from scenes.judge_edits import EditCases
from scenes.judge_holes import Cases, blurred, paste

####################################################################################################
# 1. Pictures of an editor, saved and read; controls
####################################################################################################


@dataclass
class Result:
    """One column of the tables: pictures uint8 [S, N, H, W, 3] by key of the cases, nothing pasted yet."""

    kind: str  # scenes, edits; "": a control
    name: str
    size: int
    stride: int = 1  # sides of its pictures are multiples of this
    pictures: dict[str, np.ndarray] = field(default_factory=dict)
    method: str = ""  # of pipeline.METHODS, if it is a base's work
    level: str = "easy"  # of the scenes that it was drawn for


AnyCases = dict[str, Cases] | dict[str, EditCases]  # by folder: TASK, or ASPECT/TASK


def save_result(result: Result, cases: AnyCases, seeds: list[int], folder: Path) -> None:
    """FOLDER/TASK/seed_S/INDEX.png (edits: FOLDER/ASPECT/TASK/...) and judge.json."""
    for key, pictures in result.pictures.items():
        for seed, row in zip(seeds, pictures):
            at = folder / key / f"seed_{seed}"
            at.mkdir(parents=True, exist_ok=True)
            for index, picture in zip(cases[key].indices, row):
                Image.fromarray(picture).save(at / f"{index:06d}.png")
    about = {k: getattr(result, k) for k in ("kind", "name", "size", "stride", "level")}
    (folder / "judge.json").write_text(json.dumps(about))


def folder_of(result: Result) -> str:
    """The name of a result's folder below --save."""
    return result.name.replace("/", "_")


def open_result(folder: Path) -> Result:
    """The Result of a folder in the layout of save_result, without its pictures."""
    try:
        info = json.loads((folder / "judge.json").read_text())
        return Result(str(info.get("kind", "scenes")), str(info["name"]), int(info["size"]),
                      int(info.get("stride", 1)), level=str(info.get("level", "easy")))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SystemExit(f"error: {folder / 'judge.json'}: damaged: save the pictures again") from None


def read_result(result: Result, folder: Path, cases: AnyCases, seeds: list[int]) -> None:
    for key, c in cases.items():
        rows, (h, w) = [], c.image.shape[2:]
        for seed in seeds:
            for index in c.indices:
                file = folder / key / f"seed_{seed}" / f"{index:06d}.png"
                picture = read_image(file)
                if picture.shape != (h, w, 3):
                    got = f"{picture.shape[1]}x{picture.shape[0]}"
                    raise SystemExit(f"error: {file}: {got} instead of {w}x{h}: save the pictures again")
                rows.append(picture)
        result.pictures[key] = np.stack(rows).reshape(len(seeds), len(c.indices), h, w, 3)


def soft(r: Result, cases: AnyCases) -> Result:
    """A control: a result with its holes through a box filter. What it wins is no quality."""
    pictures = {key: np.stack([to_uint8(blurred(to_float(x), cases[key])).numpy() for x in of])
                for key, of in r.pictures.items()}
    return Result("", f"{r.name}, blurred", r.size, 1, pictures)


def known(which: str, cases: AnyCases) -> Result:
    """A column of bounds: the "truth", or the "image" as it was given."""
    pictures = {k: to_uint8(getattr(c, which))[None].numpy() for k, c in cases.items()}
    return Result("", "source" if which == "image" else which, 0, 1, pictures)


####################################################################################################
# 2. Cells, sheets, scores
####################################################################################################

# printed in percent
SHARE = ("drawn", "named", "success", "edit", "kept", "kept_share", "shape", "colour", "material",
         "objects", "background", "environment", "style", "empty", "attributes", "judged", "truth_read",
         "source_read", "kept_asked")
ORDER = (*SHARE, "exact", "over", "error", "hole", "seam", "sharpness", "texture", "textures", "outside_raw",
         "outside", "frechet", "frechet_hole")


def cell(name: str, v: dict) -> str:
    if v["n"] == 0:
        return "-"
    if name in SHARE:
        return f"{100 * v['mean']:.1f} [{100 * v['low']:.1f}, {100 * v['high']:.1f}]"
    return f"{v['mean']:.4f} [{v['low']:.4f}, {v['high']:.4f}]"


def sheet(results: list[Result], cases: AnyCases, rows: int) -> Image.Image:
    """source | what the mask leaves | each result, pasted | truth, for the first scenes of every case."""
    pictures, names, holes = [], [], results[0].kind == "scenes"
    for key, c in cases.items():
        for i in range(min(rows, len(c.indices))):
            left = [c.image[i] * (1 - c.mask[i])] if holes else []
            got = [to_float(r.pictures[key][0]) for r in results]
            got = [(paste(x, c) if holes else x)[i] for x in got]
            pictures.append([c.image[i], *left, *got, c.truth[i]])
            names.append(f"{key}: {c.caption[i]}")
    titles = ["source", *(["hole"] if holes else []), *(r.name for r in results), "truth"]
    return log.contact_sheet(pictures, titles, row_titles=names)


def save_scores(out: Path, results: list[Result], scores: dict[str, list[dict[str, np.ndarray]]]) -> None:
    """OUT/scores.npz, for differences of any two: "names", and by "KEY/METRIC" [editors, scenes], means
    of the noise seeds. scores: by key of the cases the metrics [S, N] of each editor."""
    rows = {f"{key}/{k}": np.stack([m[k].mean(0) for m in of_editors]).astype(np.float32)
            for key, of_editors in scores.items() for k in of_editors[0]}
    np.savez_compressed(out / "scores.npz", names=[r.name for r in results], **rows)


####################################################################################################
# 3. Good, same, bad
####################################################################################################


def verdicts(a: np.ndarray, b: np.ndarray, higher: bool, tie: float) -> np.ndarray:
    """+1 where a is better, -1 where b is, 0 for a tie, not-a-number where it was not asked of both. Errors
    tie within the fraction `tie` of the larger one, or within half a level of 8 bits; shares tie only when
    equal."""
    if higher:
        return np.sign(np.round(a - b, 9))
    return np.where(np.abs(a - b) <= np.maximum(tie * np.maximum(a, b), 0.5 / 255), 0, np.sign(b - a))


def gsb(v: np.ndarray) -> dict:
    """Good, same, bad of verdicts [S, N], of those that there are; superiority (G+S)/(S+B) in percent as in
    ByteEdit Sec. 4.3 (infinity: all are good; not-a-number: nothing was asked); net preference (G-B)/(G+S+B)
    with its interval; sign test over scenes (majority of the seeds)."""
    v = v[:, ~np.isnan(v).any(0)]
    good, same, bad = int((v > 0).sum()), int((v == 0).sum()), int((v < 0).sum())
    majority = np.sign(v.sum(0))
    superiority = 100 * (good + same) / (same + bad) if same + bad else math.inf if good else math.nan
    return {"good": good, "same": same, "bad": bad, "superiority": superiority,
            "net": bootstrap(v.mean(0)), "p": sign_test(int((majority > 0).sum()), int((majority < 0).sum()))}


def compare(a: dict[str, np.ndarray], b: dict[str, np.ndarray], tie: float) -> dict[str, dict]:
    """GSB of metrics [S, N] by criterion. overall, of filled holes: more attributes right wins, and where
    they are equal the texture nearer to the truth's. Of edits: success wins, and where it is equal the
    smaller error over the picture."""
    higher, lower = ("attributes",), ("texture", "exact", "seam")
    if "success" in a:
        higher, lower = ("success", "edit", "kept"), ("error", "over", "exact")
    each = {k: verdicts(a[k], b[k], k in higher, tie) for k in (*higher, *lower)}
    first = np.nan_to_num(each[higher[0]])
    overall = np.where(first != 0, first, each[lower[0]])
    return {k: gsb(v) for k, v in {"overall": overall, **each}.items()}
