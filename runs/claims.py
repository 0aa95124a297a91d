"""The papers' claims on scenes, each one command: its arms are trained, judged, and a verdict is written.

    python runs/claims.py                              what there is, and what each costs
    python runs/claims.py C1 C4 --out out/claims       train, judge, print; three seeds
    python runs/claims.py C5 --write RESULTS.md        ... and put the claim's row into the first table there
    python runs/claims.py all --quick True             one seed, few steps: an hour on two plain cores; it
                                                       shows that all runs, and decides little

The work is that of runs/pefl_scenes.sh, runs/editnet.sh and runs/pairs.sh: arms shared by claims are trained
once, what is done is not done again, a run that was cut resumes. OUT/C1.md has the arms and the verdict,
OUT/C1.png what was drawn: where the claim's arm gains most, the middle, and where it loses most. A claim
holds where every difference that it names is beyond its 95 % interval (runs/table.py: seeds and scenes), does
not hold where one is so the other way, and is not decided else; where it says that one thing matches another,
its interval must end before a margin instead. What is compared for quality is a measure that a blurred base
cannot win (evaluate.py). --arm noise+known asks the same of PeFL with other flags (C1 to C4).
"""

import os
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import tyro
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from log import contact_sheet  # noqa: E402
from runs.table import estimate  # noqa: E402
from scenes.dataset import EditScenes, Scenes  # noqa: E402
from scenes.judge import to_float  # noqa: E402
from scenes.judge_edits import edit_cases  # noqa: E402
from scenes.judge_holes import make_cases, paste  # noqa: E402


class Claim(NamedTuple):
    title: str
    paper: str
    script: str  # of runs/
    env: dict[str, str]  # what it is asked to do
    scores: str  # folder of the judge that decides, below the script's OUT
    metric: str
    higher: bool  # whether more of it is better
    better: str  # arm@steps, which the claim says is ahead of each of `than`
    than: tuple[str, ...]
    hours: float  # of two plain cores (AVX2, fp32), three seeds; computed from the rates in RESULTS.md
    quick: float  # minutes with --quick
    off_square: bool = False  # judged on pictures that are not square
    margin: float = 0.0  # up to which worse is as good: of the metric; a tenth of the base's texture in C4
    beside: tuple[str, ...] = ()  # compared, too, and of no part in the verdict


FEEDBACK, EDITS, PAIRS = "pefl_scenes.sh", "editnet.sh", "pairs.sh"
CLAIMS = {
    "C1": Claim("PeFL improves quality", "about 60 % ahead in outpainting (ByteEdit Fig. 6a)",
                FEEDBACK, {"ARMS": "pefl rewardless"}, "judge_C1", "texture", False,
                "pefl@20", ("base@20", "control@20", "rewardless@20"), 8, 12),
    "C2": Claim("the alignment reward raises adherence",
                "no ablation; the whole system: CLIPScore .255, the best rival .241",
                FEEDBACK, {"ARMS": "pefl no_alignment"}, "judge_C2", "attributes", True,
                "pefl@20", ("no_alignment@20",), 8, 12),
    "C3": Claim("the coherence reward raises coherence",
                "no ablation; the whole system: 3.54, the best rival 3.52",
                FEEDBACK, {"ARMS": "pefl no_coherence"}, "judge_C3", "texture", False,
                "pefl@20", ("no_coherence@20",), 8, 12),
    "C4": Claim("8 steps after progressive training match 20", "Fig. 6b",
                FEEDBACK, {"ARMS": "pefl"}, "judge_C4", "texture", False,
                "pefl@8", ("pefl@20", "base@20"), 5, 9, margin=0.05, beside=("first:pefl@8", "base@8")),
    "C5": Claim("EditNet > TextControl > ControlNet", "OmniEdit Table 7",
                EDITS, {"PARTS": "variants", "ARMS": "editnet textcontrol controlnet"},
                "judge_variants", "success", True, "editnet@10", ("textcontrol@10", "controlnet@10"), 5, 7),
    "C6": Claim("importance weights beat none at equal size", "OmniEdit Table 6",
                PAIRS, {"PARTS": "weights", "ARMS": "plain scorer"}, "judge_weights", "success", True,
                "scorer@10", ("plain@10",), 5, 12),
    "C7": Claim("refined pairs train a better editor", "CosXL-Edit Fig. 2",
                PAIRS, {"PARTS": "refine", "SCALES": "1.5", "ARMS": "raw refined unpaired"},
                "judge_refine_1.5", "success", True, "refined@10", ("raw@10", "unpaired@10"), 4, 6),
    "C8": Claim("region data help free-form edits", "UltraEdit: L1 .0614 against .0689",
                EDITS, {"PARTS": "region", "ARMS": "editnet freeform"}, "judge_region", "success", True,
                "editnet@10", ("freeform@10",), 4, 4),
    "C10": Claim("training at every aspect ratio holds from 9:16 to 16:9", "OmniEdit 5.1",
                 EDITS, {"PARTS": "aspects", "ARMS": "editnet aspects"}, "judge_aspects", "success", True,
                 "aspects@10", ("editnet@10",), 8, 8, True),
}


@dataclass
class Config:
    claims: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # C1 ... C10, or all; none: a list
    out: str = "out/claims"  # runs, judgements, a page for each claim
    seeds: str = ""  # of training; empty: 0 1 2, with --quick 0
    quick: bool = False  # few steps; runs/pefl_scenes.sh says which variables change their numbers
    arm: str = "pefl"  # of runs/pefl_scenes.sh, in place of PeFL as in the paper; C1 to C4
    write: str = ""  # a RESULTS.md whose first table has a row for each claim


def main(cfg: Config) -> None:
    names = list(CLAIMS) if cfg.claims == ("all",) else list(cfg.claims)
    if unknown := [name for name in names if name not in CLAIMS]:
        raise SystemExit(f"error: {unknown[0]}: use {', '.join(CLAIMS)}, or all")
    if cfg.write and not Path(cfg.write).is_file():
        raise SystemExit(f"error: --write: {cfg.write}: no such file: name a RESULTS.md")
    if wrong := [name for name in names if cfg.arm != "pefl" and CLAIMS[name].script != FEEDBACK]:
        raise SystemExit(f"error: --arm: {cfg.arm}: {wrong[0]} has no PeFL: leave it out")
    if not names:
        print("\n".join(f"{name:<4} {c.title}: {cost(c, False)}; --quick True {cost(c, True)}"
                        for name, c in CLAIMS.items()))
        return
    for name in names:
        claim, out = with_arm(CLAIMS[name], cfg.arm), Path(cfg.out)
        print(f"\n{name}: {claim.title} ({claim.paper}): {cost(claim, cfg.quick)} on two plain cores, less "
              "what is done already", flush=True)
        # what --quick trained is no start of the real thing
        folder = out / (claim.script.removesuffix(".sh") + "_quick" * cfg.quick)
        command(cfg, claim, folder)
        page = report(name, claim, folder / claim.scores, cfg)
        at = out / (name if cfg.arm == "pefl" else f"{name}_{cfg.arm}")
        at.with_suffix(".md").write_text(page)
        sheet(claim, folder).save(at.with_suffix(".png"))
        print(page, f"\nwrote {at}.md and {at.name}.png", sep="")


def with_arm(claim: Claim, arm: str) -> Claim:
    """The same of `arm` in place of pefl: no_alignment becomes arm+no_alignment; base and control stay."""
    if arm == "pefl":
        return claim
    own = {word: f"{arm}+{word}".removesuffix("+pefl") for word in claim.env["ARMS"].split()}

    def of(column: str) -> str:
        first, stem, steps = re.fullmatch(r"(first:)?(.*)@(\d+)", column).groups("")
        return f"{first}{own.get(stem, stem)}@{steps}"

    return claim._replace(title=f"{claim.title} ({arm})", env={"ARMS": " ".join(own.values())},
                          scores=f"{claim.scores}_{arm}", better=of(claim.better),
                          than=tuple(map(of, claim.than)), beside=tuple(map(of, claim.beside)))


def cost(claim: Claim, quick: bool) -> str:
    return f"about {claim.quick:g} minutes" if quick else f"about {claim.hours:g} hours"


def command(cfg: Config, claim: Claim, folder: Path) -> None:
    """Run the script, unless it was run for the same arms, seeds and numbers; SystemExit where it fails."""
    env = {"OUT": str(folder.resolve()), "SEEDS": seeds_of(cfg), "PYTHON": sys.executable}
    if claim.script == FEEDBACK:
        env |= {"JUDGE": claim.scores, "PROBE": "0", "QUICK": str(int(cfg.quick))}
    elif cfg.quick:
        few = {"STEPS": "60", "N": "20"} | (
            {"REQUESTS": "350", "JUDGED": "175", "READS": "100"} if claim.script == PAIRS else {})
        env |= {k: os.environ.get(k, v) for k, v in few.items()}
    env |= claim.env
    known, asked = folder / f"{claim.scores}.asked", repr(sorted(env.items()))
    if known.is_file() and known.read_text() == asked:
        return
    done = subprocess.run(["bash", f"runs/{claim.script}"], cwd=ROOT, env={**os.environ, **env})
    if done.returncode:
        raise SystemExit(f"error: runs/{claim.script}: ended with {done.returncode}: mend what the last "
                         "lines say; the same command goes on here")
    known.write_text(asked)


def seeds_of(cfg: Config) -> str:
    return cfg.seeds or ("0" if cfg.quick else "0 1 2")


def columns(names: list[str], arm: str) -> list[int]:
    """Where in `names` the seeds of ARM@STEPS are: OUT/ARM0/step_00000700@20, or assets/base@20. Of several
    checkpoints of a seed the last one is meant; in first:ARM@STEPS the first, of PeFL the end of phase 1."""
    stem, steps = arm.removeprefix("first:").split("@")
    pattern = rf"((?:.*/)?{re.escape(stem)}\d*)(?:/step_(\d+))?@{steps}( \(\d+\))?"
    found = {}
    for i, name in enumerate(names):
        if m := re.fullmatch(pattern, name):
            found.setdefault((m[1], m[3]), []).append((int(m[2] or 0), i))
    return [sorted(of)[0 if arm.startswith("first:") else -1][1] for of in found.values()]


def judged(claim: Claim, scores: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """Names of the columns, and TASK -> the metric that decides, [columns, scenes]."""
    try:
        found = dict(np.load(scores / "scores.npz"))
        names = found.pop("names").tolist()
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        raise SystemExit(f"error: {scores / 'scores.npz'}: missing or damaged: remove {scores}.asked and run "
                         "the same command again") from None
    tasks = {key.rsplit("/", 1)[0]: rows for key, rows in found.items() if key.endswith(f"/{claim.metric}")}
    if claim.off_square:  # the same pairs at every aspect: their mean is one measurement
        aspects = {}
        for key, rows in tasks.items():
            aspect, _, task = key.rpartition("/")
            if aspect != "1x1":
                aspects.setdefault(task, []).append(rows)
        tasks = {task: np.mean(rows, 0) for task, rows in aspects.items()}
    return names, tasks


def report(name: str, claim: Claim, scores: Path, cfg: Config) -> str:
    """Markdown: the arms, the differences, the verdict; the row goes into --write."""
    names, tasks = judged(claim, scores)
    shared = claim.script == FEEDBACK  # all tasks are asked of the same scenes
    scale = 100 if claim.higher else 1

    def value(of: list[np.ndarray]) -> tuple[str, float, float]:
        mean, half = estimate(of, shared)
        digits = 1 if claim.higher else 4
        return f"{scale * mean:.{digits}f} ± {scale * half:.{digits}f}", mean, half

    lines = [f"| | {claim.metric}{', %' if claim.higher else ' (less is better)'} |", "|---|---|"]
    for arm in (claim.better, *claim.than, *claim.beside):
        if not columns(names, arm):
            raise SystemExit(f"error: {scores / 'scores.npz'}: no {arm}: remove {scores}.asked and run the "
                             "same command again")
        lines.append(f"| {arm} | {value([rows[columns(names, arm)] for rows in tasks.values()])[0]} |")
    signs, told = [], []
    for arm in (*claim.than, *claim.beside):
        a, b = columns(names, claim.better), columns(names, arm)
        b = b * len(a) if len(b) == 1 else b  # the base has no seeds
        text, mean, half = value([rows[a] - rows[b] for rows in tasks.values()])
        lines.append(f"| {claim.better} - {arm} | {text} |")
        if arm in claim.beside:
            continue
        told.append(f"{text} against {arm}")
        gain = (mean if claim.higher else -mean) + claim.margin
        signs.append((1 if gain > 0 else -1) if abs(gain) > half else 0)  # of NaN nothing is decided
    verdict = "does not hold" if -1 in signs else "holds" if set(signs) == {1} else "not decided"
    n = len(seeds_of(cfg).split())
    seeds = f"{n} seed{'s' * (n > 1)}{', few steps' * cfg.quick}"
    seeds += f"; {claim.margin:g} worse is as good" * (claim.margin > 0)
    here = f"{claim.metric} of {claim.better}: {'; '.join(told)} ({seeds})"
    call = f"python runs/claims.py {name}{' --quick True' * cfg.quick}"
    call += f" --arm {cfg.arm}" * (cfg.arm != "pefl")
    call = f"`{call} --seeds \"{cfg.seeds}\"`" if cfg.seeds else f"`{call}`"
    row = f"| {name} | {claim.title} | {claim.paper} | {here} | {verdict} | {call} |"
    if cfg.write:
        path = Path(cfg.write)
        text, n = re.subn(rf"^\| {name} \|.*$", lambda m: row, path.read_text(), count=1, flags=re.M)
        if not n:
            raise SystemExit(f"error: --write: {path}: has no row that begins with '| {name} |'")
        path.write_text(text)
    return f"## {name}: {claim.title}\n\n" + "\n".join(lines) + f"\n\n{verdict}: {here}; {call}\n"


SHOWN = dict.fromkeys(("pefl", "noise", "known", "late", "two", "global"), "PeFL") | {  # arm -> of a sheet
    "control": "flow matching", "rewardless": "L_reg + L_vgg", "editnet": "EditNet",
    "textcontrol": "TextControl", "controlnet": "ControlNet", "freeform": "no regions", "plain": "no weights",
    "scorer": "weights", "raw": "raw pairs", "unpaired": "two noises", "aspects": "every aspect"}


def shown(arm: str) -> str:
    """noise+known+rewardless@20 -> L_reg + L_vgg, 20 steps."""
    stem, steps = arm.split("@")
    word = stem.split("+")[-1]
    return f"{SHOWN.get(word, word.replace('_', ' '))}, {steps} steps"


def sheet(claim: Claim, folder: Path) -> Image.Image:
    """Scenes by how much the claim's arm is ahead of the first one that it is compared with: the three best,
    two from the middle, the three worst, those of the same number in an order drawn by lot. source | hole or
    instruction | the arms, a seed each | truth. Where several aspects are one measurement, the tallest is
    shown."""
    names, tasks = judged(claim, folder / claim.scores)
    first = {arm: columns(names, arm)[0] for arm in (claim.better, *claim.than)}
    ahead = (1 if claim.higher else -1) * np.concatenate(
        [rows[first[claim.better]] - rows[first[claim.than[0]]] for rows in tasks.values()])
    place = [(task, i) for task, rows in tasks.items() for i in range(rows.shape[1])]
    lot = np.random.default_rng(0).permutation(len(ahead))  # many edits are 1 ahead, of all tasks
    order = [int(i) for i in lot[np.argsort(-ahead[lot], kind="stable")] if not np.isnan(ahead[i])]
    middle = len(order) // 2
    chosen = dict.fromkeys(order[:3] + order[middle - 1:middle + 1] + order[-3:])
    saved = {arm: folder / "pictures" / names[i].replace("/", "_") for arm, i in first.items()}
    pictures, titles = [], []
    for i in chosen:
        task, row = place[i]
        task = f"9x16/{task}" if claim.off_square else task
        files = {arm: sorted((at / task / "seed_0").glob("*.png"))[row] for arm, at in saved.items()}
        index = int(files[claim.better].stem)
        made = [to_float(np.array(Image.open(file))[None]) for file in files.values()]
        h, w = made[0].shape[2:]
        if claim.script == FEEDBACK:
            c = make_cases(task, [index], h, Scenes("heldout"))
            left = [c.image, c.image * (1 - c.mask) + 0.5 * c.mask]
            made = [paste(x, c) for x in made]
        else:
            c = edit_cases(task.split("/")[-1], [index], h, w, EditScenes("heldout"))
            left = [c.image]
        pictures.append([x[0] for x in (*left, *made, c.truth)])
        titles.append(f"{ahead[i]:+.3f} {task.removeprefix('1x1/')}: {c.caption[0]}")
    heads = ["picture", *(["hole"] if claim.script == FEEDBACK else []), *map(shown, first), "truth"]
    return contact_sheet(pictures, heads, row_titles=titles)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, config=(tyro.conf.FlagConversionOff,)))
