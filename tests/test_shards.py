"""Shards of made pairs: killed anywhere, resumed by other ranks, damaged, written twice."""

import os
import signal

import numpy as np
import pytest
from staged import files_of, killed

import checkpoint
import common
from factory import shards


def made(s):
    rng = np.random.default_rng(s)
    rows = [{"omni_edit_id": f"{s}-{k}", "task": ("swap", "env")[k % 2], "family": f"f{s}",
             "src_img": shards.picture(rng.integers(0, 255, (8, 8, 3), np.uint8)), "item": str(s), "try": k,
             "edited_img": shards.picture(rng.integers(0, 255, (8, 8, 3), np.uint8)),
             "edited_prompt_list": ["do it"], "width": 8, "height": 8} for k in range(3)]
    lines = [{"key": r["omni_edit_id"], "task": r["task"], "try": 0, "cause": None, "ms": 1.0} for r in rows]
    return rows, lines + [{"key": "x", "task": "env", "try": 0, "cause": "low score", "ms": 0.0}]


def produce(out, n, world, ranks=None, stop=None):
    """Shards of ranks, one after the other; stop: in a child that is killed at its stop-th file operation."""
    def work():
        shards.keep_plan(out, {"stage": "specialist", "shards": n, "items": 3 * n, "options": {"seed": 0}})
        names = [shards.name_of(s) for s in range(n)]
        for rank in ranks or range(world):
            shards.produce(out, n, made, common.Dist(rank, world))
        if shards.finish(out, names):
            shards.sheet(out, names, 4)

    return work() if stop is None else killed(work, stop)


def test_killed_anywhere_and_resumed_by_another_world_gives_the_same_bytes(tmp_path, capsys):
    produce(tmp_path / "whole", 4, 1)
    whole = files_of(tmp_path / "whole")
    assert {"00003.parquet", "manifest.json", "plan.json", "sheet.png"} <= whole.keys()
    ends = []
    for stop in (0, 3, 5, 17, 26, 28):
        out = tmp_path / str(stop)
        ends.append(produce(out, 4, 2, stop=stop))
        assert files_of(out) != whole
        produce(out, 4, 3, ranks=(1, 0))
        # of three ranks the last one has shard 2, which the first run had made by its 14th operation
        assert (out / "manifest.json").exists() == (stop >= 14)
        produce(out, 4, 3)
        assert files_of(out) == whole, f"killed at {stop}"
    assert set(ends) == {signal.SIGKILL}
    assert "low score 4" in capsys.readouterr().out


def test_a_shard_that_is_written_twice_is_always_there(tmp_path, monkeypatch):
    """As by a rank of a killed torchrun, beside the run that goes on."""
    produce(tmp_path, 1, 1)
    before, seen, real = files_of(tmp_path), [], checkpoint.fsync

    def fsync(path):
        seen.append(shards.verified(tmp_path / "00000.parquet"))
        real(path)

    monkeypatch.setattr(checkpoint, "fsync", fsync)
    shards.write(tmp_path / "00000.parquet", *made(0))
    assert seen == [True] * 6 and files_of(tmp_path) == before


@pytest.mark.parametrize("links", [True, False])
def test_of_two_ranks_that_begin_a_folder_with_other_plans_one_is_refused(tmp_path, monkeypatch, links):
    """No rank waits for another, and `auto` may choose another precision on other hardware."""
    def plan(precision):
        return {"stage": "specialist", "shards": 1, "items": 1, "options": {"precision": precision}}

    def fsync(path):  # the other rank, between this one's look and its writing
        if not (tmp_path / "plan.json").exists():
            (tmp_path / "plan.json").write_bytes(shards.text({"version": shards.VERSION, **plan("fp32")}))
        real(path)

    real = checkpoint.fsync
    if links:
        monkeypatch.setattr(checkpoint, "fsync", fsync)
        with pytest.raises(SystemExit, match="begun with precision 'fp32', not 'bf16'"):
            shards.keep_plan(tmp_path, plan("bf16"))
    else:
        monkeypatch.setattr(os, "link", lambda *a: (_ for _ in ()).throw(OSError(95, "not supported")))
    shards.keep_plan(tmp_path, plan("fp32"))
    shards.keep_plan(tmp_path, plan("fp32"))
    assert files_of(tmp_path).keys() == {"plan.json"}


def test_damage_is_made_anew_and_other_options_are_refused(tmp_path, capsys):
    produce(tmp_path, 2, 1)
    before = files_of(tmp_path)
    (tmp_path / "00001.parquet").write_bytes(before["00001.parquet"][:-1] + b"x")
    produce(tmp_path, 2, 1)
    assert files_of(tmp_path) == before and "damaged" in capsys.readouterr().err
    plan = {"stage": "specialist", "shards": 2, "items": 6, "options": {"seed": 1}}
    with pytest.raises(SystemExit, match="begun with seed 0, not 1"):
        shards.keep_plan(tmp_path, plan)
    with pytest.raises(SystemExit, match="is of the stage 'specialist'.*reads score"):
        shards.read_plan(tmp_path, ("score",))
    with pytest.raises(SystemExit, match="not a folder of a stage"):
        shards.read_plan(tmp_path / "none", ("score",))
    with pytest.raises(ValueError, match="no columns"):
        shards.write(tmp_path / "00009.parquet", [{"score": 1}], [])


def test_a_stage_waits_for_what_it_reads(tmp_path):
    there = {0}
    args = tmp_path, 2, made, common.Dist()
    assert shards.produce(*args, ready=there.__contains__) == 1
    assert not shards.finish(tmp_path, ["00000.parquet", "00001.parquet"])
    assert (tmp_path / "00000.json").exists() and not (tmp_path / "00001.json").exists()
    assert shards.produce(*args) == 0
