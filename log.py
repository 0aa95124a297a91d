"""What a run says: progress, metrics to files and W&B, contact sheets, speed.

    1. progress and memory     2. metrics     3. pictures     4. speed     5. results of a judge
"""

import contextlib
import datetime
import json
import math
import netrc
import os
import platform
import re
import secrets
import socket
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import torch
import torch.distributed as td
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from tqdm import tqdm

from common import Dist, git_revision, one_line, print0

########################################## 1. progress and memory ############################################


class _Lines:
    """stderr in a file, for tqdm: a bar that is drawn again and again would run into the lines of errors."""

    def write(self, text):
        if text.strip():
            sys.stderr.write(text.strip("\r\n") + "\n")

    def flush(self):
        sys.stderr.flush()


def progress(total, start=0, desc="", dist=Dist()):
    """A tqdm bar on rank 0 (on stderr; a line every 30 s at most when stderr is a file), silent elsewhere."""
    look = dict(mininterval=30, file=_Lines(), ncols=100)
    if sys.stderr.isatty():
        look = dict(mininterval=0.2, dynamic_ncols=True)
    return tqdm(total=total, initial=start, desc=desc, disable=dist.rank != 0, **look)


def peak_bytes():
    """Peak memory so far, in bytes: allocated on the GPU, without one the resident memory of this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_memory():
    """`peak_bytes` as text."""
    where = "GPU" if torch.cuda.is_available() and torch.cuda.is_initialized() else "host"
    return f"{where} peak {peak_bytes() / 2**30:.2f} GiB"


########################################## 2. metrics ######################################################


class Metrics:
    """Means, to stdout, OUT/metrics.jsonl and W&B. Rank 0 writes. A failing logger never stops a run.
    OUT/starts.jsonl gets a row for each start: command, commit, machine, config.

    wandb: "auto" (WANDB_MODE if set, else online with an API key, else offline), "online", "offline", "off".
    Its project is WANDB_PROJECT, else feedback-editing.
    run_id: W&B id from the checkpoint (put `metrics.run_id` into its meta): a resumed run goes on there.
    resumed_from: step of that checkpoint. A row marks it, as rows of steps that are now repeated stand above.
    """

    def __init__(self, out_dir, dist, config, wandb="auto", run_id=None, resumed_from=None):
        self.out_dir, self.dist = Path(out_dir), dist
        self.run_id = run_id or secrets.token_hex(4)
        self.sums, self.counts = {}, {}
        self.file = self.run = self.wandb = None
        self.failures = 0
        if dist.rank != 0:
            return
        self._open()
        if resumed_from is not None:
            self._row({"resumed_from": resumed_from})
        if self.file:
            self._say_start(config, resumed_from)
        self._start_wandb(wandb, config)

    def _open(self):
        try:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            self.file = open(self.out_dir / "metrics.jsonl", "a+b", buffering=0)
            if self.file.tell() and os.pread(self.file.fileno(), 1, self.file.tell() - 1) != b"\n":
                self.file.write(b"\n")  # the last row was cut off by a kill
        except OSError as e:
            self.file = None
            print0(f"warning: {self.out_dir}/metrics.jsonl: {e.strerror}; it is not written")

    def _say_start(self, config, resumed_from):
        row = provenance(time.time()) | {"ranks": self.dist.world, "resumed_from": resumed_from,
                                         "config": portable(config)}
        row.pop("seconds")  # of a judge
        try:
            with open(self.out_dir / "starts.jsonl", "a", encoding="utf-8") as f:
                f.write(json.dumps(_no_nan(row), default=str) + "\n")
        except OSError as e:
            print0(f"warning: {self.out_dir}/starts.jsonl: {e.strerror}; it is not written")

    def _start_wandb(self, mode, config):
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if _wandb_key() else "offline")
        if mode in ("off", "disabled"):
            return
        if mode not in ("online", "offline"):
            raise SystemExit(f"error: wandb mode: {mode}: use auto, online, offline or off")
        if mode == "online" and (why := _unreachable()):
            print0(f"warning: wandb online failed ({why}), going on offline")
            mode = "offline"
        for mode in ("online", "offline")[mode == "offline":]:
            try:
                import wandb  # 0.6 s and 33 packages: only when it is used
                settings = wandb.Settings(silent=True, console="off", init_timeout=20, reinit="create_new")
                project = os.environ.get("WANDB_PROJECT") or "feedback-editing"
                self.run = wandb.init(project=project, id=self.run_id, resume="allow", mode=mode,
                                      config=config, dir=self.out_dir, settings=settings)
                self.run.define_metric("trainer/step")
                self.run.define_metric("*", step_metric="trainer/step")
                self.wandb = wandb
                where = self.run.url if mode == "online" else Path(self.run.dir).parent  # for `wandb sync`
                print0(f"wandb: {mode}, id {self.run_id}, {where}")
                return
            except Exception as e:  # no package, no key, no network, no space: none of them is worth a run
                instead = "offline" if mode == "online" else "without it"
                print0(f"warning: wandb {mode} failed ({one_line(e)}), going on {instead}")
                self.run = None

    def add(self, **values):
        """Add tensors (every element counts) or floats. Sums stay on the device: no synchronisation."""
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                self.counts[name] = self.counts.get(name, 0) + value.numel()
                value = value.detach().sum(dtype=torch.float64)
            else:
                self.counts[name] = self.counts.get(name, 0) + 1
            self.sums[name] = self.sums.get(name, 0.0) + value

    def add_where(self, chosen, **values):
        """Add the elements of tensors where `chosen`, bool of their shape, is true; they are counted on the
        device."""
        for name, value in values.items():
            value = torch.where(chosen, value.detach(), 0).sum(dtype=torch.float64)
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + chosen.sum()

    def flush(self, step, extra={}):
        """{name: mean over ranks and elements since the last flush} | extra (rank 0's, not reduced).

        Every rank calls it. Ranks may have added different names. NaN is kept here, null in metrics.jsonl.
        """
        names = list(self.sums)
        if self.dist.world > 1:
            everyone = [None] * self.dist.world
            td.all_gather_object(everyone, names)
            names = names if all(n == names for n in everyone) else sorted(set().union(*everyone))
        like = {"dtype": torch.float64, "device": self.dist.device}
        table = torch.zeros(2, len(names), **like)
        for n, column in zip(names, table.unbind(1)):
            column[0], column[1] = self.sums.get(n, 0.0), self.counts.get(n, 0)
        if self.dist.world > 1 and names:
            td.all_reduce(table)
        row = {n: total / count for n, total, count in zip(names, *table.tolist()) if count}
        row |= {k: v.item() if isinstance(v, torch.Tensor | np.generic) else v for k, v in extra.items()}
        self.sums, self.counts = {}, {}
        if self.dist.rank == 0:
            shown = [f"| {k} {v:.4g}" if isinstance(v, float) else f"| {k} {v}" for k, v in row.items()]
            print0(f"step {step:6d}", *shown[:10])
            self._row({"step": step, "time": round(time.time(), 1), **row})
            self._log({"trainer/step": step, **row})  # never step=: W&B drops rows of earlier steps
        return row

    def images(self, step, pictures):
        """{key: PIL picture} to OUT/images/step_STEP_KEY.png and to W&B, on rank 0."""
        if self.dist.rank != 0:
            return
        for key, picture in pictures.items():
            try:
                key = re.sub(r"[^A-Za-z0-9_.-]+", "_", key)
                path = self.out_dir / "images" / f"step_{step:08d}_{key}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                save_sheet(picture, path)
            except OSError as e:
                print0(f"warning: {path}: {one_line(e)}; the picture is not saved")
        if self.run:
            self._log({"trainer/step": step}, pictures)

    def _row(self, row):
        if self.file:
            try:
                if not os.fstat(self.file.fileno()).st_nlink:
                    print0(f"warning: {self.out_dir}/metrics.jsonl: was deleted; begun anew")
                    self.file.close()
                    self._open()
                text = json.dumps(_no_nan(row), default=str, allow_nan=False) + "\n"
                if self.file:
                    self.file.write(text.encode())
            except OSError as e:
                print0(f"warning: {self.out_dir}/metrics.jsonl: {e.strerror}; a row is lost")

    def _log(self, row, pictures={}):
        if not self.run:
            return
        try:
            self.run.log(row | {k: self.wandb.Image(p, file_type="jpg") for k, p in pictures.items()})
            self.failures = 0
        except Exception as e:  # a full disk raises OSError here, out of the middle of a training step
            self.failures += 1
            if self.failures == 1:
                print0(f"warning: wandb.log failed ({one_line(e)}), going on")
            if self.failures == 5:
                print0("warning: wandb.log failed 5 times in a row, going on without it")
                self.run = None

    def close(self):
        """Finish W&B and close the file."""
        if self.run:
            try:
                self.run.finish()
            except Exception as e:
                print0(f"warning: wandb.finish failed ({one_line(e)})")
        if self.file:
            self.file.close()
        self.run = self.file = None


def _unreachable(seconds=4):
    """Why W&B's host cannot be reached, asked in so many seconds, where W&B itself waits a minute; "" if it
    can, or if a proxy is in between."""
    at = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai")
    if not at.hostname or urllib.request.getproxies():
        return ""
    try:
        port = at.port or (80 if at.scheme == "http" else 443)
        socket.create_connection((at.hostname, port), seconds).close()
    except (OSError, ValueError) as e:
        return one_line(e)
    return ""


def _wandb_key():
    """Whether W&B could log in without asking: it would wait for an answer on a terminal."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _no_nan(value):
    if isinstance(value, dict):
        return {k: _no_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_no_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


########################################## 3. pictures #####################################################


def to_pil(picture):
    """PIL RGB from a PIL picture, a float tensor [3, H, W] in [-1, 1] or a mask [1, H, W] in [0, 1]."""
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    x = picture.detach().float().cpu()
    x = x.expand(3, -1, -1) if x.shape[0] == 1 else (x + 1) / 2
    x = (x.nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(x.permute(1, 2, 0).contiguous().numpy())


def contact_sheet(rows, titles, row_titles=None, scale=None, smooth=False, scores=None):
    """One PIL picture from rows of what `to_pil` takes, or None for an empty cell.

    titles: one per column. row_titles: one per row, wrapped, at the left. scale: integer magnification; None
    brings pictures of at most 64 px to about 128. smooth: Lanczos; nearest shows the pixels as they are.
    scores: {name: a number per row}, not drawn. They, the titles and where the pictures are stand as JSON in
    .info["cells"], which `save_sheet` keeps, so that readers/report.py can cut them apart again.
    """
    pictures = [[None if p is None else to_pil(p) for p in row] for row in rows]
    longest = max([1] + [max(p.size) for row in pictures for p in row if p])
    if scale is None:
        scale = 128 // longest if longest <= 64 else 1
    how = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
    pictures = [[p and p.resize((p.width * scale, p.height * scale), how) for p in row] for row in pictures]
    n = max([len(titles)] + [len(row) for row in pictures])
    font, line, gap = ImageFont.load_default(size=14), 18, 8
    widths = [max([84] + [row[c].width for row in pictures if c < len(row) and row[c]]) for c in range(n)]
    titles = list(titles) + [""] * (n - len(titles))
    heads = [_wrap(str(t), font, w + gap - 2, 3) for t, w in zip(titles, widths)]
    left = 176 if row_titles else 0
    sides = [_wrap(str(t), font, left - gap, 12) for t in row_titles or []] + [[]] * len(pictures)
    heights = [max([line * len(s)] + [p.height for p in row if p]) for row, s in zip(pictures, sides)]
    top = gap + line * max([len(h) for h in heads] + [0])
    size = gap + left + sum(w + gap for w in widths), top + gap + sum(h + gap for h in heights)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    x0 = gap + left
    for head, w in zip(heads, widths):
        for i, text in enumerate(head):
            place = x0 + w / 2, top - line * (len(head) - i)
            draw.text(place, text, fill="#202020", font=font, anchor="ma")
        x0 += w + gap
    y, boxes = top + gap // 2, []
    for row, side, h in zip(pictures, sides, heights):
        boxes.append([])
        for i, text in enumerate(side):
            draw.text((gap, y + line * i), text, fill="#202020", font=font)
        x = gap + left
        for p, w in zip(row, widths):
            place = (x + (w - p.width) // 2, y) if p else None
            boxes[-1].append(place and [*place, *p.size])
            if p:
                sheet.paste(p, place)
            x += w + gap
        y += h + gap
    texts = [[str(t)[:400] for t in part] for part in (titles, row_titles or [])]
    sheet.info["cells"] = json.dumps(_no_nan({"titles": texts[0], "rows": texts[1], "boxes": boxes,
                                              "scale": 1 if smooth else scale, "scores": scores or {}}))
    return sheet


def save_sheet(sheet, path):
    """A picture as PNG; of a `contact_sheet` with where its cells are."""
    about = PngImagePlugin.PngInfo()
    if "cells" in sheet.info:
        about.add_text("cells", sheet.info["cells"])
    sheet.save(path, format="PNG", pnginfo=about)


def _wrap(text, font, width, limit):
    """Lines of `text` that fit `width` pixels, at most `limit` of them."""
    text = "".join(c if c.isprintable() else " " for c in text.encode("utf-8", "replace").decode())[:400]
    lines, current = [], ""
    for word in text.split():
        while font.getlength(word) > width and len(word) > 1:  # a word wider than the column is cut
            cut = max(k for k in range(1, len(word)) if k == 1 or font.getlength(word[:k]) <= width)
            lines, current, word = lines + ([current] if current else []) + [word[:cut]], "", word[cut:]
        joined = f"{current} {word}".strip()
        if font.getlength(joined) <= width:
            current = joined
        else:
            lines, current = lines + [current], word
    lines += [current] if current else []
    return lines if len(lines) <= limit else lines[:limit - 1] + [lines[limit - 1] + " ..."]


def image_stats(x: torch.Tensor) -> dict[str, float]:
    """Statistics that reward hacking moves, to compare with the real pictures' (default ours, paper silent).

    x [B, 3, H, W] in [-1, 1] -> saturation, contrast, Laplacian variance (sharpness, grain), share clipped.
    """
    x = x.float()
    grey = x.mean(1, keepdim=True)
    rows = grey[..., :-2, 1:-1] + grey[..., 2:, 1:-1]
    cols = grey[..., 1:-1, :-2] + grey[..., 1:-1, 2:]
    laplace = 4 * grey[..., 1:-1, 1:-1] - rows - cols
    return {"saturation": (x.amax(1) - x.amin(1)).mean().item(),
            "contrast": grey.flatten(1).std(1).mean().item(),
            "laplacian": laplace.var().item(),
            "clipped": (x.abs() > 0.99).float().mean().item()}


########################################## 4. speed ##########################################################

# Dense bf16 with fp32 sums, TFLOP/s, from the makers' data sheets; the first name that is part of the card's
PEAK = {"B200": 2250, "H200": 989, "H100 NVL": 835, "H100 PCIe": 756, "H100": 989, "H800": 989, "A100": 312,
        "A800": 312, "L40S": 362, "RTX 4090": 165, "MI300X": 1307}
STARVED = 0.1  # share of the time without a batch from which it is said


def peak_flops(name):
    """Of the card of that name, FLOP/s; 0 for one that is not in the table."""
    return next((tera * 1e12 for part, tera in PEAK.items() if part in name), 0.0)


class Perf:
    """How fast a training run is, and whether its device is fed.

        with perf.wait(): batch = next(it)
        perf.add(pictures, flops)
        row = perf.read()

    perf/img_s          pictures a second, of all ranks
    perf/data_wait      share of the time that the host waited for a batch
    perf/gpu_busy       share of the time that a GPU was not out of work for want of a batch. Gaps between the
                        kernels of a step are not seen: perf/mfu tells of them
    perf/mfu            FLOPs a second over the card's peak in bf16, where that is known
    perf/host_rss_gib   resident memory of rank 0

    what: the data's flag and value, for the line that says that they come too slowly.
    """

    def __init__(self, device=torch.device("cpu"), bf16=False, what="the data"):
        self.cuda, self.what, self.windows, self.said = device.type == "cuda", what, 0, False
        self.peak = peak_flops(torch.cuda.get_device_name(device)) if self.cuda and bf16 else 0.0
        self.restart()

    def restart(self):
        self.start, self.waited, self.images, self.flops, self.waits = time.perf_counter(), 0.0, 0, 0, []

    def _moment(self):
        """An event after all that the GPU was given so far."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def wait(self):
        t, before = time.perf_counter(), self._moment() if self.cuda else None
        yield
        self.waited += time.perf_counter() - t
        if self.cuda:  # the GPU passes both at once if it still works on what it had before
            self.waits.append((before, self._moment()))

    def add(self, images, flops=0):
        """images: of all ranks; flops: of this one."""
        self.images, self.flops = self.images + images, self.flops + flops

    def read(self):
        """The table above since the last read. A GPU is waited for: read where metrics are written."""
        if self.waits:
            self.waits[-1][1].synchronize()
        seconds = max(time.perf_counter() - self.start, 1e-9)
        row = {"perf/img_s": self.images / seconds, "perf/data_wait": self.waited / seconds}
        idle = row["perf/data_wait"]
        if self.cuda:
            idle = min(sum(a.elapsed_time(b) for a, b in self.waits) / 1000 / seconds, 1.0)
            row["perf/gpu_busy"] = 1 - idle
        if self.peak and self.flops:
            row["perf/mfu"] = self.flops / seconds / self.peak
        with contextlib.suppress(OSError):  # Linux only
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            row["perf/host_rss_gib"] = pages * os.sysconf("SC_PAGE_SIZE") / 2**30
        self.windows += 1
        if self.windows == 1:  # optimiser and average stand from the first step on
            print0(f"memory, measured: {peak_memory()}")
        if idle > STARVED and self.windows > 1 and not self.said:  # the workers start in the first one
            self.said = True
            print0(f"warning: {self.what}: {idle:.0%} of the time went by waiting for batches: give "
                          "more --workers, or draw and decode ahead with `python make_pack.py`")
        self.restart()
        return row


########################################## 5. results of a judge #############################################


def open_out(folder: str) -> Path:
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)


def portable(value):
    """Texts of a config or a command without the names of this machine and its user: paths below the folder
    that the script was started in are relative to it, those below the home folder begin with ~."""
    if isinstance(value, dict):
        return {k: portable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [portable(v) for v in value]
    if not isinstance(value, str | os.PathLike):
        return value
    text = str(value)
    for folder, instead in ((os.getcwd(), ""), (os.path.expanduser("~"), "~/")):
        if folder != "/":
            text = re.sub(rf"(?<![\w./-]){re.escape(folder)}/+", instead, text)
    return text


def provenance(started: float) -> dict:
    device = f"{torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    now = datetime.datetime.now(datetime.timezone.utc)
    command = " ".join(["python", Path(sys.argv[0]).name, *portable(sys.argv[1:])])
    return {"command": command, "commit": git_revision(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {device}", "torch": torch.__version__,
            "date": now.isoformat(timespec="seconds"), "seconds": round(time.time() - started, 1)}


def write_json(path: Path, content: dict) -> None:
    """Not-a-number becomes null."""
    path.write_text(json.dumps(_no_nan(content), indent=1) + "\n")


def table(head: list[str], rows: list[list[str]]) -> str:
    """Columns wide enough, the first to the left, the others to the right."""
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    return "\n".join("  ".join([r[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(r[1:], widths[1:]))])
                     for r in [head, *rows])


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p of a fair coin; ties are left out."""
    n, k = wins + losses, min(wins, losses)
    if n == 0:
        return 1.0
    logs = (math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(k + 1))
    return min(1.0, 2 * sum(math.exp(x - n * math.log(2)) for x in logs))


def wilson(right: float, n: float, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a fraction right / n (Wilson 1927), 95 % by default; (0, 1) for n = 0.

    Answers about one picture or prompt are not independent: with many of each the true interval is wider.
    """
    if not n:
        return 0.0, 1.0
    centre = (right + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(right * (n - right) / n + z * z / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(*groups: np.ndarray, draws: int = 1000, seed: int = 0) -> dict:
    """Mean and 95% percentile interval of values [N] over resampled rows (not-a-number: not asked of this
    one) -> {"mean", "low", "high", "n"}. Of several groups: the mean of their means, each resampled on its
    own, whatever their sizes (a group without values does not count)."""
    groups = [np.asarray(g, np.float64) for g in groups]
    groups = [g for g in (g[~np.isnan(g)] for g in groups) if len(g)]
    if not groups:
        return {"mean": math.nan, "low": math.nan, "high": math.nan, "n": 0}
    rng = np.random.default_rng(seed)
    means = np.mean([g[rng.integers(0, len(g), (draws, len(g)))].mean(1) for g in groups], 0)
    low, high = np.percentile(means, (2.5, 97.5))
    mean = float(np.mean([g.mean() for g in groups]))
    return {"mean": mean, "low": float(low), "high": float(high), "n": sum(map(len, groups))}


def spread(x: torch.Tensor) -> torch.Tensor:
    """Features [N, D] -> R [min(N, D), D], float64, of which R^T R is their covariance (over N - 1)."""
    x = (x - x.mean(0)) / max(len(x) - 1, 1) ** 0.5
    return x if len(x) <= x.shape[1] else torch.linalg.qr(x, "r").R


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Frechet distance of Gaussians fitted to features a [N, D] and b [M, D] (Heusel et al. 2017,
    Eq. 6): |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)). Biased upwards, by about D^2 / (2 N)
    where N = M and variances are 1: compare at equal N only.

    With C = R^T R the last trace is the sum of the singular values of R_a R_b^T, [min(N, D), min(M, D)]: a
    fraction of the time of a root of C_a C_b for fewer pictures than features, and exact where that is
    singular. (Not numpy's: its threads spin, which takes minutes where other jobs run.)
    """
    a, b = (torch.from_numpy(np.array(x, np.float64)) for x in (a, b))
    ra, rb = spread(a), spread(b)
    cross = torch.linalg.svdvals(ra @ rb.T).sum()
    apart = (a.mean(0) - b.mean(0)).square().sum()
    return max((apart + ra.square().sum() + rb.square().sum() - 2 * cross).item(), 0.0)


def frechet_interval(a: np.ndarray, b: np.ndarray, draws: int = 40, seed: int = 0) -> dict:
    """Frechet distance of paired features [S, N, D] (S noise seeds), interval = 1.96 bootstrap standard
    deviations. Not the percentiles: a resample repeats scenes, which shifts the distance itself upwards."""
    S, N, D = a.shape
    rng = np.random.default_rng(seed)
    value = frechet(a.reshape(-1, D), b.reshape(-1, D))
    resampled = []
    for _ in range(draws):
        i = rng.integers(0, N, N)
        resampled.append(frechet(a[:, i].reshape(-1, D), b[:, i].reshape(-1, D)))
    half = 1.96 * float(np.std(resampled))
    return {"mean": value, "low": max(value - half, 0.0), "high": value + half, "n": N}
