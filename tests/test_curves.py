"""runs/curves.py: the plot's geometry, and curves of a small PIE-Bench by a tiny random editor."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from test_benchmarks import pie

import checkpoint
import model

ROOT = Path(__file__).resolve().parents[1]
CURVES = runpy.run_path(str(ROOT / "runs/curves.py"))


def test_plot():
    """A curve that falls to the right, and one above it."""
    of = [{"image_guidance": g, "x": x, "y": y, "x_std": 0.0, "y_std": 0.0} for g, x, y in
          ((1.0, 0.1, 0.9), (1.5, 0.2, 0.8), (2.0, 0.3, 0.7))]
    im = CURVES["plot"]({"a": of, "b": [dict(p, y=p["y"] + 0.1) for p in of]}, "clip_dir", "clip_i_source")
    pixels = torch.frombuffer(bytearray(im.tobytes()), dtype=torch.uint8).view(im.height, im.width, 3)
    first, second = ((pixels[:, :780] == torch.tensor(c)).all(-1).nonzero().float()
                     for c in CURVES["COLOURS"][:2])
    left, right = first[first[:, 1].argmin()], first[first[:, 1].argmax()]
    assert left[0] < right[0] and second[:, 0].mean() < first[:, 0].mean()
    assert CURVES["plot"]({"a": of[:1]}, "x", "y").size == im.size  # a single point has no span


def test_table_and_deviation():
    at = {"image_guidance": 1.5, "x": 0.2, "y": 0.8, "x_std": 0.01, "y_std": 0.02}
    found = CURVES["table"]({"a": [at]}, "clip_dir", "clip_i_source")
    assert "| a | 1.5 | 0.2000 ± 0.0100 | 0.8000 ± 0.0200 |" in found
    assert [CURVES["deviation"](np.array(x)) for x in ([1.0, 2.0, 3.0], [1.0])] == [1.0, 0.0]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread_and_own_signals")
def test_curves_of_a_benchmark(tmp_path):
    torch.manual_seed(0)
    net = model.EditNet(model.PRESETS["test"])
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    meta = {"arch": net.arch, "config": {"image_size": 16}}
    checkpoint.write(tmp_path / "e", 1, {"model": net.state_dict()}, meta)
    cfg = CURVES["Config"](str(pie(tmp_path / "pie")), str(tmp_path / "e"), image_guidance="1,2", seeds="0,1",
                           x="l1_source", y="psnr_source", out=str(tmp_path / "o"),
                           flags="--partial True --steps 1 --device cpu")
    CURVES["main"](cfg)
    found = json.loads((tmp_path / "o/curves.json").read_text())["curves"][str(tmp_path / "e")]
    assert [p["image_guidance"] for p in found] == [1.0, 2.0] and found[0]["x"] != found[1]["x"]
    assert all(p["x_std"] > 0 and p["seeds"] == 2 for p in found)

    def times():
        return {p: p.stat().st_mtime_ns for p in (tmp_path / "o").rglob("results.json")}

    made = times()
    CURVES["main"](cfg)
    assert len(made) == 4 and made == times()
    with pytest.raises(SystemExit, match="error: --image_guidance: 1,x: use numbers"):
        CURVES["main"](CURVES["Config"](cfg.data, cfg.ckpt, image_guidance="1,x", out=str(tmp_path / "p")))
