"""readers/prompts.py: texts from files, decoration, clusters, and choices that cover more than blind ones."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from readers import prompts


def test_open_texts(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a red star\n\n  a blue  box \na red star\n")
    (tmp_path / "b.jsonl").write_text(
        '{"prompt": "a dog"}\n{"file": 1}\n{"caption": "a cat", "prompt": "no"}\n')
    pq.write_table(pa.table({"n": [1, 2, 3], "text": ["a fox", None, "a dog"]}), tmp_path / "c.parquet")
    found = prompts.open_texts(",".join(str(tmp_path / f) for f in ("a.txt", "b.jsonl", "c.parquet")))
    assert found == ["a red star", "a blue box", "a dog", "a cat", "a fox"]
    assert "none of caption" in capsys.readouterr().err
    pq.write_table(pa.table({"n": [1]}), tmp_path / "d.parquet")
    for name, text in (("d.parquet", "no column of texts"), ("none.txt", "no such file")):
        with pytest.raises(SystemExit, match=text):
            prompts.open_texts(str(tmp_path / name))
    for code in ("utf-8-sig", "utf-16"):  # as Windows writes them
        (tmp_path / "w.txt").write_text("a red star\na blau\u00e9 box\n", encoding=code)
        assert prompts.open_texts(str(tmp_path / "w.txt")) == ["a red star", "a blau\u00e9 box"]
    (tmp_path / "e.txt").write_text("\n \n")
    with pytest.raises(SystemExit, match="no texts"):
        prompts.open_texts(str(tmp_path / "e.txt"))


def test_decoration():
    for text, kept in (
            ("A fantastic red fox, highly  detailed, 8k, trending on artstation --ar 16:9 --v 5",
             "A red fox"),
            ("stunning portrait of a woman, masterpiece", "portrait of a woman"),
            ("an epic, unbelievable castle on a hill", "an castle on a hill"),
            ("imperfect circles and epicycles", "imperfect circles and epicycles"),  # parts of words stay
            # what is not wanted is not asked for, and a flag without a value takes no word of the text
            ("a street in Paris --no people, cars, rain --v 5", "a street in Paris"),
            ("a street --no cars", "a street"), ("a castle --hd on a green hill", "a castle on a green hill"),
            ("a fox --test in deep snow", "a fox in deep snow"),
            ("a koi --niji in a pond", "a koi in a pond"),
            ("a koi \u2014niji 6 --style raw --q .5", "a koi"), ("a plane -v shape", "a plane -v shape"),
            ("a cat", "a cat")):
        got = prompts.plain(text)[0]
        assert got.replace("an, castle", "an castle") == kept, got
    texts, notes = prompts.undecorated([
        "a red fox in snow", "A red fox in SNOW, 8k", "epic cat",
        "masterpiece, stunning, gorgeous, best quality, a cat ok", "a blue bird on a branch"])
    assert texts == ["a red fox in snow", "a blue bird on a branch"]
    assert notes["said before"] == notes["too little left"] == notes["mostly decoration"] == 1
    assert notes["words taken out"] == 7


def blobs(sizes, dim=16, seed=0, spread=0.15):
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((len(sizes), dim))
    x = np.concatenate([c + spread * rng.standard_normal((n, dim)) for c, n in zip(centres, sizes)])
    return prompts.unit(x.astype(np.float32)), np.repeat(np.arange(len(sizes)), sizes)


def test_kmeans_finds_blobs():
    x, true = blobs([50, 20, 30, 40])
    at = prompts.kmeans(x, 4, seed=0)
    assert len({(a, t) for a, t in zip(at.tolist(), true.tolist())}) == 4
    assert (prompts.kmeans(x, 4, seed=0) == at).all()
    same = np.ones((10, 4), np.float32) / 2  # equal points, more clusters than points
    assert len(prompts.kmeans(same, 3)) == 10 and prompts.kmeans(x[:2], 5).max() <= 1


def test_neighbours():
    x, _ = blobs([30, 30], seed=3)
    who, how = prompts.neighbours(x, 4)
    d = np.linalg.norm(x[:, None] - x[None], axis=-1) + 9 * np.eye(60)
    assert np.allclose(np.sort(how, 1), np.sort(d, 1)[:, :4], atol=1e-3)
    assert all(set(w) == set(np.argsort(row)[:4]) for w, row in zip(who.tolist(), d))


def test_knn_takes_the_loneliest_of_each_cluster():
    """But not the very farthest 1 %; from a cluster as its root says; every index once."""
    x, true = blobs([400, 100], seed=1)
    chosen = prompts.select(x, 30, "knn", clusters=2, k=5)
    assert len(set(chosen.tolist())) == 30 and np.bincount(true[chosen]).tolist() == [20, 10]
    for blob, junk in ((0, 4), (1, 1)):
        members = np.flatnonzero(true == blob)
        lonely = members[np.argsort(-prompts.neighbours(x[members], 5)[1].mean(1), kind="stable")]
        assert set(chosen[true[chosen] == blob]) == set(lonely[junk:junk + (20, 10)[blob]])


@pytest.mark.parametrize("how", prompts.SELECT)
def test_choices(how):
    x, _ = blobs([300, 100, 50, 25, 12, 6, 3, 2, 1, 1], seed=2)
    one, again = (prompts.select(x, 20, how, clusters=10, seed=5) for _ in range(2))
    assert (one == again).all() and len(set(one.tolist())) == 20 and (np.diff(one) > 0).all()
    assert prompts.select(x, len(x), how, clusters=4).tolist() == list(range(len(x)))
    with pytest.raises(ValueError):
        prompts.select(x, len(x) + 1, how)


def test_diverse_choices_cover_rare_kinds():
    """Of twelve kinds, of 400 texts or of 8, twenty choices meet more than blind ones do, for every seed."""
    x, true = blobs([400] * 3 + [8] * 9, seed=2, spread=0.1)
    for seed in range(3):
        knn, blind = (len(set(true[prompts.select(x, 20, how, clusters=16, k=6, seed=seed)]))
                      for how in ("knn", "random"))
        assert knn >= blind + 3  # vote-k does not: it goes where most texts are
    some = prompts.select(x, 20, "knn", clusters=10)
    assert prompts.coverage(x, np.arange(len(x))) < 1e-3 < prompts.coverage(x, some)


def test_hashed():
    x = prompts.hashed(["a red star on grass"] * 2 + ["a red star on sand", "two dogs asleep"])
    same = x @ x.T
    assert np.allclose(np.diag(same), 1, atol=1e-5) and same[0, 1] > 0.999
    assert 0.999 > same[0, 2] > 0.3 > abs(same[0, 3])


def test_quotas():
    assert prompts.quotas([1, 1, 2], [9, 9, 9], 8).tolist() == [2, 2, 4]
    assert prompts.quotas([1, 1, 8], [9, 9, 2], 10).sum() == 10
    assert prompts.quotas([5, 1], [1, 3], 4).tolist() == [1, 3]
    assert prompts.quotas([1, 2], [5, 5], 1).sum() == 1
