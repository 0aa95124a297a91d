"""Scores of edit pairs as OmniEdit's judges give them (Sec. 3.3, appendix A.2), 0 to 10.

    sc_score_1   is done what was asked          sc_score_2   is nothing else changed
    pq_score     is the edited picture well made, looked at alone
    o_score      sqrt(min(sc_score_1, sc_score_2) pq_score); pairs of 9 and more are kept

A judge is a function: rows -> a Verdict each (readers/served.py). A row that could not be judged has no
score and says why in its status; nothing is ever guessed. `open_judge` has them by name.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

import rewards
from factory import shards
from readers import served
from readers.edits import TASK_NAMES
from readers.served import Verdict
from scenes.dataset import EditScenes
from scenes.judge import load_parser, to_float, truth_distance
from scenes.judge_edits import ask, edit_cases, judge_edit, kept_facts

Judge = Callable[[list[dict]], list[Verdict]]
# of `truth`, ours: changed by this much outside the edit, nothing is left of sc_2; so far from the truth in
# it (scenes.judge.truth_distance) a picture is as well made as the truth: the same object moved by three
# hundredths of the side, median of 30 swaps at 64 pixels (tilted by 12 degrees: .10; left out: .33); so far,
# not at all
OVER, NEAR, FAR = 0.2, 0.19, 0.60


def overall(sc_1: float, sc_2: float, pq: float) -> float:
    return math.sqrt(min(sc_1, sc_2) * pq)


def truth(parser) -> Judge:
    """The judge of scenes: what was asked is read by the parser, and compared with the true target.

    sc_1: 10 if all that was asked reads as asked, else 0. sc_2: the share of the other facts that read as
    they should, less for pixels changed outside the edit. pq: by the distance to the true target where the
    edit is. An addition is its removal read backwards, and its true target the real picture.
    """

    def judge(rows):
        out, groups = [None] * len(rows), {}
        for k, row in enumerate(rows):
            at = json.loads(row["source"] or "null")
            if at is None or not at.get("pair") and at.get("pair") != 0:
                out[k] = Verdict(judge_status="no truth: not of scenes")
            elif at.get("drawn"):
                out[k] = Verdict(judge_status="no truth: its source was drawn, too")
            else:
                task = TASK_NAMES[row["task"]]
                size = row["height"], row["width"]
                groups.setdefault((task, at["scenes"], at["split"], size), []).append((k, at["pair"]))
        for (task, level, split, size), places in groups.items():
            back, pairs = task == "add", EditScenes(split, 0.0, level)
            c = edit_cases("remove" if back else task, [pair for _, pair in places], *size, pairs)
            asked = ask(c, parser)
            cells = [("src_img", "edited_img")[::-1 if back else 1] for _ in places]
            before, after = (torch.stack([to_float(shards.pixels(rows[k][cell[i]]))
                                          for (k, _), cell in zip(places, cells)]) for i in (0, 1))
            m = judge_edit(after, replace(c, image=before), asked, parser)
            asks = kept_facts(c, asked.pictures, asked.objects) > 0
            # of an addition the target is the real picture, and after refinement something near it
            made, right = (before, c.image) if back else (after, c.truth)
            far = truth_distance(made, right, c.region.float())
            for j, (k, _) in enumerate(places):
                if math.isnan(m["edit"][j]):
                    out[k] = Verdict(judge_status="unreadable: the source reads as edited")
                    continue
                share = float(m["kept_share"][j]) if asks[j] else 1.0
                over = 0.0 if math.isnan(m["over"][j]) else float(m["over"][j])
                sc_2 = 10 * share * max(0.0, 1 - over / OVER)
                pq = 10 * min(1.0, max(0.0, (FAR - float(far[j])) / (FAR - NEAR)))
                done = "done" if m["edit"][j] else "not done"
                sc_1 = 10.0 * float(m["edit"][j])
                out[k] = Verdict(
                    overall(sc_1, sc_2, pq), sc_1, sc_2,
                    f"{done}; {share:.0%} of the other facts kept; changed by {over:.3f} outside", pq,
                    f"{float(far[j]):.3f} from the truth")
        return out

    return judge


def ask_served(client: served.Served) -> Judge:
    """A served vision-language model. SystemExit once it has stopped or spent its budget: its rows are then
    judged by the next run; what it said already is in its cache."""
    def judge(rows):
        out = list(served.judge(client, (
            (shards.pixels(row["src_img"]), shards.pixels(row["edited_img"]), row["edited_prompt_list"][0])
            for row in rows)))
        over = any(v.judge_status.endswith("budget") for v in out)
        if client.stopped or over:
            why = client.stopped or f"the budget of {client.budget} requests is spent"
            raise SystemExit(f"error: --judge: {client.url}: {why}: the same command goes on where it ended")
        return out

    return judge


PASSING = re.compile(rf"(sc|pq): (timeout|transport|http ({'|'.join(map(str, served.RETRIED))}))")


def may_pass(lines: list[dict]) -> bool:
    """Whether a shard's log has a row that a served judge gave no score for a reason that may have gone."""
    return any(line["o_score"] is None and PASSING.match(line["status"]) for line in lines)


def ask_scorer(net: rewards.EditScorer, device: torch.device) -> Judge:
    """A scorer of train_scorer.py: one number a pair, the overall score."""
    def judge(rows):
        out, groups = [None] * len(rows), {}
        for k, row in enumerate(rows):
            groups.setdefault((row["height"], row["width"]), []).append(k)
        chunks = [places[at:at + 32] for places in groups.values() for at in range(0, len(places), 32)]
        for places in chunks:  # a shard of large pictures is gigabytes
            source, edited = (torch.stack([to_float(shards.pixels(rows[k][cell])) for k in places]).to(device)
                              for cell in ("src_img", "edited_img"))
            said = [rows[k]["edited_prompt_list"][0] for k in places]
            for k, o in zip(places, rewards.score_edits(net, source, edited, said)):
                out[k] = Verdict(float(o))
        return out

    return judge


def open_judge(spec: str, parser: str, device: torch.device, model: str = "", cache: Path | None = None,
               budget: int | None = None) -> Judge:
    """"truth" (scenes; parser: the judge's folder), "scorer:FOLDER" (of train_scorer.py), or the address of a
    served model, http://HOST/v1 (model: its name; cache: file of its replies; budget: requests at most),
    which is asked first whether it can see two pictures."""
    kind, _, path = spec.partition(":")
    if spec == "truth":
        return truth(load_parser(parser, device))
    if kind == "scorer" and path:
        return ask_scorer(rewards.open_scorer(path, device), device)
    if re.match("https?://", spec):
        if not model:
            raise SystemExit("error: --judge_model: empty: say which model the server is to ask")
        client = served.Served(spec, model, cache=cache, budget=budget)
        served.self_test(client)
        return ask_served(client)
    raise SystemExit(f"error: --judge: {spec}: not a judge: use truth, scorer:FOLDER or http://HOST/v1")


def scored(rows: list[dict], judge: Judge, name: str) -> list[dict]:
    """Rows with the judge's columns filled in."""
    out = []
    for row, v in zip(rows, judge(rows), strict=True):
        parts = v.sc_score_1, v.sc_score_2, v.pq_score
        if (v.judge_status == "ok") != (v.o_score is not None) or not 0 <= (v.o_score or 0) <= 10:
            raise ValueError(f"{name}: status {v.judge_status!r} with the score {v.o_score}")
        whole = [None if x is None else round(x) for x in parts]
        out.append(row | dict(zip(("sc_score_1", "sc_score_2", "pq_score"), whole))
                   | {"sc_reasoning": v.sc_reasoning or None, "pq_reasoning": v.pq_reasoning or None,
                      "judge": name, "judge_status": v.judge_status, "o_score": v.o_score})
    return out


def yields(rows: list[dict], min_score: float) -> list[dict]:
    """What tries bring, by task: rows with task, item, try, o_score -> dict(task, items, tries, precision: of
    tries that were scored, the share of min_score and more; yield: {n: share of items of which one of the
    first n tries is}, unscored: tries without a score)."""
    out = []
    for task in sorted({row["task"] for row in rows}):
        mine = [row for row in rows if row["task"] == task]
        known = [row for row in mine if row["o_score"] is not None]
        items = {row["item"] for row in mine}
        most = max(row["try"] for row in mine) + 1
        good = [row for row in known if row["o_score"] >= min_score]
        found = {n: len({row["item"] for row in good if row["try"] < n}) / len(items)
                 for n in (1, 2, 4, 8, 16, 32) if n < most} | {
                     most: len({row["item"] for row in good}) / len(items)}
        out.append({"task": task, "items": len(items), "tries": len(mine), "unscored": len(mine) - len(known),
                    "precision": len(good) / len(known) if known else math.nan, "yield": found})
    return out


def yield_table(found: list[dict], min_score: float) -> str:
    """`yields` as text."""
    most = sorted({n for row in found for n in row["yield"]})
    lines = [f"{'task':24} items  tries  o >= {min_score:g}, % of tries" + "".join(
        f"  of items, {n} tr{'y' if n == 1 else 'ies'}" for n in most)]
    for row in found:
        lines.append(f"{row['task']:24} {row['items']:5}  {row['tries']:5}  {100 * row['precision']:21.1f}"
                     + "".join(f"  {100 * row['yield'].get(n, math.nan):16.1f}" for n in most)
                     + (f"   ({row['unscored']} without a score)" if row["unscored"] else ""))
    return "\n".join(lines)
