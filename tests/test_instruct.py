"""`make_edits.py instruct`: what a model proposes, and which object it means."""

import json
import re

import numpy as np
import pytest
from inprocess import run_script
from PIL import Image
from staged import rows_of, stage
from test_served import Judge

from factory import instruct
from readers.served import Reply
from tests.hostile import kills


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return kills.base(tmp_path_factory.mktemp("base") / "base")


OBJECTS = [{"name": "disc", "box": [0, 0, 8, 8]}, {"name": "red disc", "box": [8, 8, 16, 16]},
           {"name": "dog", "segments": "s.png", "label": 2}]


@pytest.mark.parametrize("task, said, objects, expected", [
    ("swap", "the red disc", OBJECTS, ({"box": [8, 8, 16, 16]}, "")),  # the name with most words
    ("remove", "a blue disc", OBJECTS, ({"box": [0, 0, 8, 8]}, "")),
    ("attribute", "the dog on the left", OBJECTS, ({"segments": "s.png", "label": 2}, "")),
    ("swap", "the cat", OBJECTS, ({}, "no such object")),
    ("swap", "a dog", [OBJECTS[2], OBJECTS[2] | {"label": 3}], ({}, "which of several objects")),
    ("style", None, [], ({}, "")),
    ("background", None, [], ({}, "no object to keep")),
    ("background", None, OBJECTS[:1], ({"box": [0, 0, 8, 8]}, "")),
    ("background", None, OBJECTS[:2], ({"box": [[0, 0, 8, 8], [8, 8, 16, 16]]}, "")),
    ("environment", None, [OBJECTS[2], OBJECTS[2] | {"label": 3}],
     ({"segments": "s.png", "label": [2, 3]}, "")),
    ("environment", None, OBJECTS, ({}, "objects in several masks"))])
def test_the_object_that_a_model_means(task, said, objects, expected):
    assert instruct.place_of({"task": task, "object": said}, objects) == expected


def test_instructions_are_not_said_too_often():
    edit = dict.fromkeys(("object", "new_object", "behind", "inverse")) | {
        "task": "style", "instruction": "make it a sketch", "source_caption": "a", "target_caption": "b"}
    other = edit | {"instruction": "turn it into a drawing"}
    rows = [{"key": str(k), "source": f"{k}.png", "objects": []} for k in range(4)]
    replies = [Reply([edit, other], "ok")] * 3 + [Reply(None, "http 500")]
    found, counts, log = instruct.requests_of(rows, replies, 2)
    assert [r["key"] for r in found] == ["0-0", "0-1", "1-0", "1-1"]
    assert counts["said 2 times before"] == 2 and counts["no answer: http 500"] == 1 and counts["kept"] == 4
    assert [line["kept"] for line in log] == [2, 2, 0, 0] and log[3]["status"] == "http 500"
    same = [edit, edit | {"instruction": "make a sketch of it"}]
    found, counts, _ = instruct.requests_of(rows, [Reply(same, "ok")], 9)
    assert len(found) == 1 and counts["said twice of a picture"] == 1
    shown = instruct.examples([f"do {k}" for k in range(10)], "a", 0)
    assert len(set(shown)) == 6 and shown != instruct.examples([f"do {k}" for k in range(10)], "b", 0)


def test_instruct_writes_what_specialists_take(base, tmp_path):
    """Pictures, a server that proposes, and a specialist that does it; a second run asks nothing."""
    for k in range(2):
        Image.fromarray(np.full((16, 16, 3), 90 * k + 40, np.uint8)).save(tmp_path / f"{k}.png")
    rows = [{"source": f"{k}.png", "caption": "a disc on paper", "objects": OBJECTS[:1]} for k in range(2)]
    (tmp_path / "photos.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "seeds.txt").write_text("take the hat away\nput a cat there\n")
    removal = {"task": "remove", "object": "the disc", "new_object": None, "instruction": "remove the disc",
               "source_caption": "a disc on paper", "target_caption": "paper", "behind": "paper",
               "inverse": "add a disc"}

    def proposing(n, q):
        return {"id": q.mark, "edits": [removal, removal | {"object": "the disc of paper", "behind": None}]} \
            if "Propose" in q.text else None

    server = Judge(proposing)
    flags = dict(data=tmp_path / "photos.jsonl", out=tmp_path / "asked.jsonl", judge_model="judge",
                 judge=f"http://127.0.0.1:{server.server_port}/v1", seeds=tmp_path / "seeds.txt")
    said = stage("instruct", **flags)
    assert re.search(r"proposed +2\n", said) and re.search(r"kept +2\n", said)
    shown = [q.text for q in server.asked if "Propose" in q.text]
    assert len(shown) == 2 and all("take the hat away" in s or "put a cat there" in s for s in shown)
    first, asked = (tmp_path / "asked.jsonl").read_bytes(), len(server.asked)
    (tmp_path / "asked.jsonl.1.tmp").touch()  # of a run that was killed
    request = json.loads(first.splitlines()[0])
    assert request == {"source": "0.png", "key": "0-0", "task": "remove", "instruction": "remove the disc",
                       "source_caption": "a disc on paper", "target_caption": "paper", "behind": "paper",
                       "add_instruction": "add a disc", "box": [0, 0, 8, 8]}
    stage("instruct", **flags)
    assert (tmp_path / "asked.jsonl").read_bytes() == first and len(server.asked) <= asked + 14
    assert not list(tmp_path.glob("*.tmp"))
    out = tmp_path / "made"
    stage("specialist", data=tmp_path / "asked.jsonl", out=out, ckpt=base, tasks="remove,add", tries=1,
          steps=2, precision="fp32")
    assert sorted(r["task"] for r in rows_of(out)) == ["addition", "addition", "removal", "removal"]
    for change, words in (({"budget": 0}, "--budget: 0"), ({"out": tmp_path / "x/y.jsonl"}, "--out"),
                          ({"data": tmp_path / "no.jsonl"}, "no such"), ({"judge": "ftp://x"}, "--judge")):
        done = run_script("make_edits.py", "instruct", *(f"--{k}={v}" for k, v in (flags | change).items()))
        assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
    server.shutdown()
    server.server_close()
