"""runs/claims.py: verdicts of known differences, the row in RESULTS.md; and one claim, end to end."""

import os
import runpy
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tyro
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
CLAIMS = runpy.run_path(str(ROOT / "runs/claims.py"))


def scores(folder, gap, base="assets/base@20"):
    """A judge of two seeds of pefl and no_alignment and their base on 50 scenes: pefl is better by `gap`."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = ["out/x/pefl0/step_00000060@20", "out/x/pefl1/step_00000060@20", "out/x/no_alignment0@20",
             "out/x/no_alignment1@20", base, f"{base}, blurred"]
    better = np.array([gap, gap, 0, 0, 0, 0])[:, None]
    rows = rng.normal(0.5, 0.1, (1, 50)) + better + rng.normal(0, 0.02, (6, 50))
    np.savez(folder / "scores.npz", names=names, **{f"{t}/attributes": rows for t in ("edit", "erase")},
             **{f"{t}/texture": -rows for t in ("edit", "erase")})
    return folder


@pytest.mark.parametrize("gap, verdict", [(0.1, "holds"), (-0.1, "does not hold"), (0.0, "not decided")])
def test_verdicts(tmp_path, gap, verdict):
    claim, cfg = CLAIMS["CLAIMS"]["C2"], CLAIMS["Config"](write=str(tmp_path / "R.md"), seeds="0 1")
    (tmp_path / "R.md").write_text("| C1 | a |\n| C2 | old | row |\n| C20 | other |\n")
    page = CLAIMS["report"]("C2", claim, scores(tmp_path / "judge", gap), cfg)
    assert f"\n{verdict}: " in page
    first, second, third = (tmp_path / "R.md").read_text().splitlines()
    assert (first, third) == ("| C1 | a |", "| C20 | other |") and f"| {verdict} |" in second
    line, = (x for x in page.splitlines() if x.startswith("| pefl@20 - no_alignment@20 |"))
    mean, half = (float(x) for x in line.split("|")[2].split(" ± "))
    assert mean == pytest.approx(100 * gap, abs=2.0) and 0 < half < 5


@pytest.mark.parametrize("flags", [{"quick": True}, {"seeds": "0 1"}, {}])
def test_the_command_of_a_row_can_be_given(tmp_path, flags):
    cfg = CLAIMS["Config"](**flags)
    page = CLAIMS["report"]("C2", CLAIMS["CLAIMS"]["C2"], scores(tmp_path / "judge", 0.1), cfg)
    said = shlex.split(page.rpartition("; ")[2].strip().strip("`"))
    assert said[:2] == ["python", "runs/claims.py"]
    got = tyro.cli(CLAIMS["Config"], args=said[2:], config=(tyro.conf.FlagConversionOff,))
    assert got == CLAIMS["Config"](claims=("C2",), **flags)


def test_less_is_better_and_the_base_has_no_seeds(tmp_path):
    claim = CLAIMS["CLAIMS"]["C1"]._replace(than=("base@20", "no_alignment@20"))
    page = CLAIMS["report"]("C1", claim, scores(tmp_path / "judge", 0.1), CLAIMS["Config"]())
    assert "\nholds: texture of pefl@20: -0.1" in page
    blurred, = (i for i, n in enumerate(np.load(tmp_path / "judge/scores.npz")["names"]) if "blurred" in n)
    assert blurred not in CLAIMS["columns"](list(np.load(tmp_path / "judge/scores.npz")["names"]), "base@20")


@pytest.mark.parametrize("gap, margin, verdict", [(0.0, 0.05, "holds"), (-0.1, 0.05, "does not hold"),
                                                  (-0.05, 0.05, "not decided"), (-0.1, 0.2, "holds")])
def test_as_good_is_not_worse_by_more_than_a_margin(tmp_path, gap, margin, verdict):
    claim = CLAIMS["CLAIMS"]["C2"]._replace(margin=margin)
    page = CLAIMS["report"]("C2", claim, scores(tmp_path / "judge", gap), CLAIMS["Config"](seeds="0 1"))
    assert f"\n{verdict}: " in page and f"(2 seeds; {margin:g} worse is as good)" in page


def test_aspects_of_a_pair_are_one_measurement(tmp_path):
    """Four times the same pairs are no more pairs: the interval is their mean's; squares are left out."""
    claim, rng = CLAIMS["CLAIMS"]["C10"], np.random.default_rng(0)
    names, tasks, half = ["out/aspects0@10", "out/editnet0@10"], ("swap", "add"), {}
    rows = {t: rng.normal(0.05, 0.02, (2, 40)) for t in tasks}
    for folder, aspects in (("one", ["16x9"]), ("four", ["1x1", "16x9", "9x16", "4x3"])):
        (tmp_path / folder).mkdir()
        np.savez(tmp_path / folder / "scores.npz", names=names, **{
            f"{a}/{t}/success": rows[t] * (9 if a == "1x1" else 1) for a in aspects for t in tasks})
        page = CLAIMS["report"]("C10", claim, tmp_path / folder, CLAIMS["Config"](seeds="0"))
        half[folder] = [line for line in page.splitlines() if line.startswith("| aspects@10 - editnet@10 |")]
    assert half["one"] == half["four"] and half["one"]


def test_of_no_numbers_nothing_is_decided(tmp_path):
    (tmp_path / "s").mkdir()
    np.savez(tmp_path / "s/scores.npz", names=["out/editnet0@10", "out/freeform0@10"],
             **{"swap/success": np.full((2, 5), np.nan)})
    page = CLAIMS["report"]("C8", CLAIMS["CLAIMS"]["C8"], tmp_path / "s", CLAIMS["Config"](seeds="0"))
    assert "\nnot decided: " in page


def test_another_arm_stands_for_pefl():
    claim = CLAIMS["with_arm"](CLAIMS["CLAIMS"]["C1"], "noise+known")
    assert claim.env["ARMS"] == "noise+known noise+known+rewardless" and claim.better == "noise+known@20"
    assert claim.than == ("base@20", "control@20", "noise+known+rewardless@20")
    names = [f"out/noise+known{end}" for end in ("0/step_00000060@20", "1/step_00000060@20", "@8")]
    names += ["out/noise+known+rewardless0/step_00000060@20"]
    assert CLAIMS["columns"](names, claim.better) == [0, 1] and CLAIMS["columns"](names, claim.than[2]) == [3]
    ends = [f"o/late{seed}/step_{step:08d}@8" for seed in (0, 1) for step in (84, 60)]
    of = CLAIMS["with_arm"](CLAIMS["CLAIMS"]["C4"], "late")
    assert of.better == "late@8" and of.beside == ("first:late@8", "base@8")
    assert CLAIMS["columns"](ends, of.better) == [0, 2] and CLAIMS["columns"](ends, of.beside[0]) == [1, 3]
    assert [CLAIMS["shown"](arm) for arm in (claim.better, *claim.than, "noise+no_coherence@8")] == [
        "PeFL, 20 steps", "base, 20 steps", "flow matching, 20 steps", "L_reg + L_vgg, 20 steps",
        "no coherence, 8 steps"]
    with pytest.raises(SystemExit, match="error: --arm: late: C5 has no PeFL"):
        CLAIMS["main"](CLAIMS["Config"](("C4", "C5"), arm="late"))


def test_what_cannot_be_read_is_named(tmp_path):
    for name, text in (("C1", "no control@20: remove"), ("C5", "no editnet@10")):
        claim = CLAIMS["CLAIMS"][name]
        with pytest.raises(SystemExit, match=text):
            at = scores(tmp_path / name, 0.1) if name == "C1" else tmp_path / "C1"
            CLAIMS["report"](name, claim._replace(metric="attributes"), at, CLAIMS["Config"]())
    with pytest.raises(SystemExit, match="scores.npz: missing or damaged"):
        CLAIMS["report"]("C1", CLAIMS["CLAIMS"]["C1"], tmp_path, CLAIMS["Config"]())
    with pytest.raises(SystemExit, match="error: C9: use C1, C2"):
        CLAIMS["main"](CLAIMS["Config"](("C1", "C9")))
    with pytest.raises(SystemExit, match="error: --write: .*no such file"):
        CLAIMS["main"](CLAIMS["Config"](("C1",), write=str(tmp_path / "no.md")))


def test_all_claims_of_the_table_that_can_be_judged_so_have_a_command(capsys):
    CLAIMS["main"](CLAIMS["Config"]())
    said = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert said == ["C1", "C2", "C3", "C4", "C5", "C6", "C7", "C8", "C10"]
    table = (ROOT / "RESULTS.md").read_text()
    assert all(f"\n| {name} |" in table for name in said)


def test_seeds_are_told_from_steps():
    table = runpy.run_path(str(ROOT / "runs/table.py"))
    group_of, groups_of = table["group_of"], table["groups_of"]
    known = {"out/x/pefl0/step_00000700@20": "pefl/step_00000700@20", "assets/base@8": "base@8",
             "one1": "one", "noise+known0@20": "noise+known@20",
             "out/x/late12/step_00000060@20": "late/step_00000060@20", "out/editnet2@20 (3)": "editnet@20",
             "assets/base@20, blurred": "base@20, blurred"}
    assert {name: group_of(name) for name in known} == known
    methods = ["assets/base@20", "sdedit:assets/base@20", "out/a/pefl0@8", "out/a/pefl1@8", "out/b/pefl0@8"]
    assert groups_of(methods) == {"base@20": [0], "sdedit:base@20": [1], "out/a/pefl@8": [2, 3],
                                  "out/b/pefl@8": [4]}


def test_one_without_seeds_is_compared_with_each_seed(tmp_path, capsys):
    rows = np.random.default_rng(0).normal(size=(4, 30))
    np.savez(tmp_path / "scores.npz", names=["assets/base@20", *(f"o/pefl{i}@20" for i in range(3))],
             **{"edit/texture": rows})
    table = runpy.run_path(str(ROOT / "runs/table.py"))
    table["main"](str(tmp_path), ["texture"])
    mean, half = table["estimate"]([rows[1:] - rows[:1]], True)
    assert f"| pefl@20 - base@20 | {mean:.4f} ± {half:.4f} |" in capsys.readouterr().out


@pytest.mark.parametrize("script, arms, use", [
    ("pefl_scenes.sh", "pefl known+magic", "pefl, rewardless"),
    ("editnet.sh", "editnet magic", "editnet cached"), ("pairs.sh", "plain magic", "plain truth")])
def test_an_unknown_arm_costs_no_time(tmp_path, script, arms, use):
    done = subprocess.run(["bash", f"runs/{script}"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "ARMS": arms, "OUT": str(tmp_path / "o")})
    assert done.returncode == 2 and f"error: ARMS: magic: use {use}" in done.stderr
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread_and_own_signals")
@pytest.mark.parametrize("lines", [
    {"C4": "| pefl@8 - first:pefl@8 |"},
    {"C8": "| editnet@10 - freeform@10 |", "C10": "| aspects@10 - editnet@10 |"},
    {"C6": "| scorer@10 - plain@10 |", "C7": "| refined@10 - unpaired@10 |"}])
def test_claims_end_to_end(tmp_path, monkeypatch, capfd, lines):
    """Each script, with steps that can be counted on one hand; again, and nothing is repeated."""
    few = {"STEPS": "2", "SHEETS": "0", "N": "2", "JOBS": "2", "WANDB_MODE": "disabled"}
    if "C6" in lines:
        few |= {"STEPS": "1", "JOBS": "1", "REQUESTS": "14", "JUDGED": "42", "READS": "2"}
    for k, v in few.items():
        monkeypatch.setenv(k, v)
    cfg = CLAIMS["Config"](tuple(lines), out=str(tmp_path / "o"), quick=True)
    CLAIMS["main"](cfg)
    for name, line in lines.items():
        page = (tmp_path / f"o/{name}.md").read_text()
        assert line in page and "1 seed, few steps" in page
        assert Image.open(tmp_path / f"o/{name}.png").height > 300
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "o").rglob("*.npz")}
    if "C7" in lines:
        assert Image.open(tmp_path / "o/pairs_quick/curves_refine.png").height > 300
    cfg.claims = cfg.claims[-1:]  # of two, which share what they are made from, one is enough: 14 processes
    CLAIMS["main"](cfg)
    assert made == {p: p.stat().st_mtime_ns for p in (tmp_path / "o").rglob("*.npz")}
    if "C8" in lines:
        capfd.readouterr()
        table = runpy.run_path(str(ROOT / "runs/table.py"))["main"]
        table(str(tmp_path / "o/editnet_quick/judge_region"), ["edit", "over"])
        assert "| freeform@10 - editnet@10 |" in capfd.readouterr().out
