"""What `make_edits.py pack` keeps, and how it parts families; a data set of it: test_make_edits.py."""

import numpy as np

from factory import pack


def light(k, task="swap", o=9.5, item=None, attempt=0, family=None, source=None, said="do", changed=0.5,
          hashes=None, target=None):
    rng = np.random.default_rng(k)
    return {"omni_edit_id": str(k), "task": task, "edited_prompt_list": [said], "o_score": o, "try": attempt,
            "family": family or f"f{k}", "item": item or f"i{k}", "twin_of": None, "judge_status": "ok",
            "refined_from": None, "source": source or f"s{k}", "target": target or f"t{k}",
            "changed": changed, "hashes": hashes or tuple(int(h) for h in rng.integers(0, 2**63, 2))}


def test_what_pack_keeps():
    rows = [light(0, o=9.2, item="a"), light(1, o=9.8, item="a", attempt=1), light(2, o=None),
            light(3, o=8.9), light(4, changed=0.0), light(5, "style", changed=0.0),
            light(6, hashes=(5, 9), said="Do it!"), light(7, hashes=(4, 8), said="do  it"),
            light(8, hashes=(4, 8), said="another"),
            *[light(10 + k, source="one", said=f"say {k}") for k in range(5)],
            light(20, o=9.8, item="a", attempt=2)]
    kept, cause = pack.choose(rows, 9.0)
    assert cause == {0: "a better try", 2: "no score", 3: "low score", 4: "nothing changed", 7: "a copy",
                     13: "many of one source", 14: "a better try"}
    assert sorted([*kept, *cause]) == list(range(len(rows)))
    assert 2 in pack.choose(rows, None)[0]
    kept, cause = pack.choose(rows, 9.0, equal=True)
    assert sorted(rows[k]["task"] for k in kept) == ["style", "swap"] and "balance" in cause.values()


def test_families_are_never_split():
    """A twin, a refined copy or another request of the same picture under another name: one family."""
    rows = [light(0, family="a", source="x", target="y"), light(1, family="b", source="y", target="z"),
            light(2, family="c", source="w", target="z"), light(3, family="d")]
    pack.join_families(rows)
    assert len({row["family"] for row in rows[:3]}) == 1 and rows[3]["family"] == "d"
    many = [light(k, family=f"f{k // 3}") for k in range(300)]
    files = pack.split(many, list(range(300)), 0.2, 64)
    assert sorted(k for places in files.values() for k in places) == list(range(300))
    sides = {name: {many[k]["family"] for k in places} for name, places in files.items()}
    dev = set().union(*(s for n, s in sides.items() if n.startswith("dev")))
    train = set().union(*(s for n, s in sides.items() if n.startswith("train")))
    assert not dev & train and 10 < len(dev) < 30 and "train-00000-of-00004.parquet" in files


def test_difference_hash():
    x = np.kron(np.arange(256, dtype=np.uint8).reshape(16, 16), np.ones((4, 4), np.uint8))
    x = x[..., None].repeat(3, 2)
    near = np.clip(x.astype(int) + 3, 0, 255).astype(np.uint8)
    assert (pack.difference_hash(x) ^ pack.difference_hash(near)).bit_count() <= 3
    assert (pack.difference_hash(x) ^ pack.difference_hash(x[:, ::-1])).bit_count() > 40
