"""The first minutes on one GPU, in one command that ends by itself: checks, benchmarks, then better assets.

    python runs/gpu.py --minutes 7 --out out/gpu
    python runs/gpu.py --rehearse True --minutes 20 --out out/rehearsal     # all of it, small, on a CPU

Every part is a command with a time of its own, the most telling first: when that is over it gets SIGTERM, at
which a training saves, and then SIGKILL with all that it started. What fails is named and passed over; what
no longer fits is left out, and the JSON says so. OUT gets eight files, each whole at every moment:

    gpu.json     machine; each part's command, exit code, seconds, numbers and last lines; after every part
    judge.png    held-out scenes: the models of assets/ and the new ones
    base/ editnet/ pefl/    weights in bf16 and manifest.json, as runs/ship.py writes them into assets/

    ptxas      which can be used: --ptxas, perhaps packed (NAME.xz), if what it makes runs on this driver
    selftest   kernels against fp64, a process for every core; beside it the tests, and 3 steps of training
               so that Triton has compiled what the trainings need
    sd3        SD3-medium's shapes: steps of EditNet and PeFL, samples (runs/bench_sd3.py)
    kernels    attention and the others beside what else computes them (kernels/bench.py)
    compiled   SD3's samples with compiled blocks; flex: attention by FlexAttention and torch.compile
    t2i        text to image, at a constant rate, until its time is over; beside it rewards from assets/base
    inpaint    on top of it; the cosine ends with its time, by the pictures per second that t2i had
    edit       an EditNet on that; beside it pefl
    judge      evaluate.py: holes and edits

With --skip ptxas,selftest,tests,sd3,kernels,compiled,flex a second call trains for all of its time.
"""

import json
import lzma
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tyro
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("ptxas", "selftest", "tests", "sd3", "kernels", "compiled", "flex", "t2i", "rewards", "inpaint",
         "edit", "pefl", "judge")
PROBE = """
import torch, triton, triton.language as tl
@triton.jit
def double(x, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, 2 * tl.load(x + i, i < n), i < n)
x = torch.ones(1000, device="cuda")
double[(1,)](x, 1000, BLOCK=1024)
assert x.sum().item() == 2000
print(torch.__version__, triton.__version__, torch.cuda.get_device_name(), triton.knobs.nvidia.ptxas.version)
"""


@dataclass
class Config:
    out: str = "out/gpu"  # folder for what is kept
    minutes: float = 7.0  # for everything
    skip: str = ""  # parts that are left out, with commas
    ptxas: str | None = None  # a ptxas of CUDA 13.3 or later, perhaps packed: NAME.xz
    batch: int = 256  # pictures of a training step; pairs: half as many
    train: str = ""  # further flags of train_omni.py
    rehearse: bool = False  # small sizes, for a machine without a GPU


@dataclass
class Log:
    """What is known so far, and how long there is."""

    out: Path
    scratch: Path
    end: float  # of everything, by time.monotonic()
    env: dict
    content: dict = field(default_factory=lambda: {"parts": {}, "left_out": []})
    running: list[subprocess.Popen] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)  # parts end in two threads

    def left(self) -> float:
        return self.end - time.monotonic()


def save(log: Log) -> None:
    part = log.out / "gpu.json.part"
    part.write_text(json.dumps(log.content, indent=1) + "\n")
    part.replace(log.out / "gpu.json")


def start(log: Log, command: str, **env: str) -> tuple[subprocess.Popen, Path, float]:
    """-> the process, in a process group of its own, the file with its output, the time."""
    with tempfile.NamedTemporaryFile(dir=log.scratch, suffix=".txt", delete=False) as said:
        process = subprocess.Popen([sys.executable, *shlex.split(command)], cwd=ROOT, env=log.env | env,
                                   stdout=said, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                   process_group=0)
    log.running.append(process)
    return process, Path(said.name), time.monotonic()


def finish(log: Log, name: str, started: tuple, seconds: float, numbers=None, grace: float = 15) -> bool:
    """Wait until `seconds` after its start. Then SIGTERM, and after `grace` SIGKILL to its whole group.
    numbers() -> what the JSON should say of it. -> whether it ended well; a training stopped in time did."""
    process, said, began = started
    late = False
    try:
        process.wait(max(min(began + seconds, log.end) - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        late = True
        process.terminate()
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            pass
    kill(process)  # and whatever it has left behind
    code = process.wait()
    log.running.remove(process)
    row = {"command": shlex.join(process.args[1:]), "code": code, "late": late,
           "seconds": round(time.monotonic() - began, 1)}
    how = "stopped, its time is over" if late else f"FAILED, code {code}" if code else "done"
    if numbers:
        try:
            row["numbers"] = numbers()
        except (OSError, ValueError, LookupError, statistics.StatisticsError) as e:
            row["numbers"] = f"none: {type(e).__name__}: {e}"
    row["said"] = [line[:300] for line in said.read_text(errors="replace").splitlines()[-60:]]
    with log.lock:
        log.content["parts"][name] = row
        save(log)
        print(f"{log.left():6.0f} s left  {name}: {how}, {row['seconds']} s", flush=True)
    return code == 0


def kill(process: subprocess.Popen) -> None:
    """Its whole group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def stop(log: Log, why: str) -> None:
    """What runs ends now, nothing more begins, what is known is kept."""
    log.end = time.monotonic()
    for process in list(log.running):
        kill(process)
    raise SystemExit(f"error: {why}: {log.out / 'gpu.json'} has what was found until then")


def part(log: Log, name: str, seconds: float, command: str, numbers=None, **env: str) -> bool:
    if log.left() < 5:
        leave_out(log, name, "no time is left")
        return False
    return finish(log, name, start(log, command, **env), seconds, numbers)


def leave_out(log: Log, name: str, why: str) -> None:
    with log.lock:
        log.content["left_out"].append(f"{name}: {why}")
        save(log)
        print(f"{log.left():6.0f} s left  {name}: left out, {why}", flush=True)


def read(path: Path):
    return lambda: json.loads(path.read_text())


def progress(run: Path):
    """Of a training: its last metrics; pictures per second without the first row, which holds the start."""
    def numbers() -> dict:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        rates = [row["perf/img_s"] for row in rows if "perf/img_s" in row]
        return {**rows[-1], "perf/img_s": statistics.median(rates[1:] or rates)}
    return numbers


def usable_ptxas(log: Log, given: str | None) -> None:
    """Make a given ptxas Triton's, in every part, if a kernel made by it runs here."""
    tool, probe = None, log.scratch / "probe.py"
    probe.write_text(PROBE)  # triton.jit reads its source from a file
    if given:
        tool = log.scratch / "ptxas"
        packed = Path(given).read_bytes()
        tool.write_bytes(lzma.decompress(packed) if given.endswith(".xz") else packed)
        tool.chmod(0o755)
    env = {"TRITON_PTXAS_PATH": str(tool)} if tool else {}
    works = part(log, "ptxas", 40, str(probe), TRITON_CACHE_DIR=str(log.scratch / "probe"), **env)
    if works:
        log.env |= env


def checks(log: Log, skip: list[str], warm: str, small: bool) -> None:
    """Self-test, tests and the warm-up, side by side."""
    cores, started = os.cpu_count() or 1, {}
    if "tests" not in skip:
        which = "-k 'sampler or samples'" if small else "-n 4 -m 'not slow'"
        started["tests"] = start(log, f"-m pytest -q -p no:cacheprovider {which} tests/test_gpu.py",
                                 TRITON_INTERPRET="1" if small else "0")
    if not small:
        started["warm"] = start(log, f"{warm} --steps 3 --out {log.scratch / 'warm'}")
    if "selftest" not in skip:
        which = "--part 0/6" if small else f"--jobs {max(1, cores - 4)}"  # all takes the interpreter minutes
        part(log, "selftest", box(100, small), f"-m kernels.selftest {which}")
    for name, process in started.items():
        finish(log, name, process, box(100, small))


def box(seconds: float, small: bool) -> float:
    """A rehearsal takes the time it needs, as far as --minutes go."""
    return 3600 if small else seconds


def benchmarks(log: Log, skip: list[str], keep: float, small: bool) -> None:
    """keep: seconds that training must have."""
    sd3 = "runs/bench_sd3.py " + ("--rehearse True --precision fp32 --how eager" if small else "--how bf16")
    bench = f"kernels/bench.py --ms {1 if small else 40}"
    shapes = "test" if small else "sd3-1024,editnet-1024,tiny,sd3-512,editnet-1024-bias,4k-d128"
    who = "eager,ours,flash" if small else "ours,triton,flash,cudnn,efficient"
    planned = [("sd3", 80, f"{sd3} --out", 80),
               ("kernels", 70, f"{bench} --shapes {shapes} --only {who} --json", 40)]
    if not small:  # minutes of a CPU's compiler
        planned += [("compiled", 75, "runs/bench_sd3.py --only sample --how blocks --out", 60),
                    ("flex", 60, f"{bench} --ops attention --shapes sd3-1024,editnet-1024-bias "
                                 "--only flex,compile --json", 40)]
    for name, seconds, command, least in planned:
        if name in skip:
            continue
        if log.left() - least < keep:
            leave_out(log, name, f"{log.left():.0f} s are left, training has {keep:.0f} of them")
            continue
        file = log.scratch / f"{name}.json"
        part(log, name, min(box(seconds, small), log.left() - keep), f"{command} {file}", read(file))


def rewards(log: Log, small: bool, until: float) -> bool:
    """Aesthetic and alignment reward as runs/demo.py trains them, from pictures of assets/base."""
    n, captions, steps = (12, 40, (2, 2)) if small else (240, 3000, (250, 350))
    at = log.scratch
    if not part(log, "prefs", until - time.monotonic(), "make_prefs.py --ckpt assets/base "
                f"--steps 4,6,8,20 --n {n} --captions {captions} --out {at / 'prefs'}"):
        return False
    flags = "--lr 5e-4 --warmup 50 --dropout 0 --batch_size 32 --noise 0.3 --eval_every 0 --wandb off"
    started = {
        "aesthetic": start(log, f"train_reward.py --pairs {at / 'prefs/aesthetic.json'} --preset tiny "
                                f"--augment 2 --steps {steps[0]} {flags} --out {at / 'aesthetic'}"),
        "alignment": start(log, f"train_reward.py --pairs {at / 'prefs/alignment.jsonl'} --preset tiny-p16 "
                                f"--steps {steps[1]} {flags} --out {at / 'alignment'}")}
    return all([finish(log, name, process, until - process[2]) for name, process in started.items()])


def train(log: Log, cfg: Config, skip: list[str], flags: str, judging: float) -> None:
    """Text to image, inpainting, EditNet, PeFL in the time that is left but for `judging`."""
    small, at, command = cfg.rehearse, log.scratch, f"python runs/gpu.py --minutes {cfg.minutes:g}"
    batch = 4 if small else cfg.batch
    begun, share = time.monotonic(), max(log.left() - judging, 0)

    def seconds(fraction: float) -> float:
        """How long until that fraction of the training's time is over."""
        return box(begun + fraction * share - time.monotonic(), small)

    def steps(name: str, fraction: float, batch: int, slower: float = 1.0) -> int:
        """As many as fit until then at the rate of the training `name`, less 12 s to start and to save: a
        cosine that ends too early costs less than one that is cut off."""
        rate = rate_of(log, name, 5000) / slower
        return 2 if small else max(50, int(0.92 * rate * (seconds(fraction) - 12) / batch))

    base, before = "assets/base", []
    with ThreadPoolExecutor(1) as aside:
        judges = aside.submit(rewards, log, small, time.monotonic() + seconds(0.6)) \
            if "rewards" not in skip else None
        if "t2i" not in skip:
            part(log, "t2i", seconds(0.3), f"{flags} --batch_size {batch} --stage base "
                 f"--preset {'test' if small else 'tiny'} --t_shift 4 --lr_schedule constant --ema 0.996 "
                 f"--steps {2 if small else 10**6} --out {at / 't2i'}", progress(at / "t2i"))
            before = [at / "t2i"] if saved(at / "t2i") else []
        if "inpaint" not in skip:
            part(log, "inpaint", seconds(0.6), f"{flags} --batch_size {batch} --stage inpaint "
                 f"--init {(before or [base])[0]} --t_shift 4 --ema 0.996 "
                 f"--tasks t2i=9.7,inpaint=6,edit=5,outpaint=5,erase=2 --steps {steps('t2i', 0.6, batch)} "
                 f"--out {at / 'inpaint'}", progress(at / "inpaint"))
            if saved(at / "inpaint") and ship(log, "base", command, *before, at / "inpaint"):
                base = str(log.out / "base")
        tuning = None
        if judges and judges.result() and "pefl" not in skip:
            phases = "20/15/10x1,8/6/3x1" if small else "20/15/10x120,8/6/3x48"
            tuning = aside.submit(
                part, log, "pefl", seconds(1.0), f"train_pefl.py --base {base} --phases {phases} "
                f"--aesthetic {at / 'aesthetic'} --alignment {at / 'alignment'} "
                f"--disc_init {at / 'aesthetic'} --disc_first {0 if small else 48} "
                f"--batch_size {4 if small else 64} --lr 2e-5 --warmup 10 --ema 0.95 --disc_lr 3e-4 "
                "--reward_noise 0.2 --eta 0.05 --w_aesthetic 0.001 --w_alignment 0.001 --w_coherence 0.1 "
                "--adversarial_from 1 --tasks outpaint=7,edit=7,inpaint=3,erase=3 --sample_every 0 "
                "--save_every 1000000 --wandb off "
                f"--out {at / 'pefl'}", progress(at / "pefl"))
        if "edit" not in skip:
            pairs = batch // 2  # which take their workers twice as long: 3 to 4.5 ms, not 1.8
            rate = "inpaint" if "inpaint" in log.content["parts"] else "t2i"
            part(log, "edit", seconds(1.0), f"{flags} --batch_size {pairs} --stage edit --init {base} "
                 f"--t_shift 4 --ema 0.997 --steps {steps(rate, 1.0, pairs, slower=2)} --out {at / 'edit'}",
                 progress(at / "edit"))
            if saved(at / "edit"):
                ship(log, "editnet", command, at / "edit")
        if tuning:
            tuning.result()
            if saved(at / "pefl"):
                ship(log, "pefl", command, at / "pefl")


def saved(run: Path) -> bool:
    return any(run.glob("step_*/manifest.json"))


def rate_of(log: Log, name: str, default: float) -> float:
    """Pictures per second of a training that ran."""
    numbers = log.content["parts"].get(name, {}).get("numbers")
    return numbers["perf/img_s"] if isinstance(numbers, dict) else default


def ship(log: Log, name: str, command: str, *runs: Path) -> bool:
    words = ["runs/ship.py", str(log.out / name), command, *map(str, runs)]
    return part(log, f"ship {name}", 40, shlex.join(words))


def judge(log: Log, small: bool) -> None:
    """What was made beside what is in assets/; the two sheets, one below the other, become judge.png."""
    how, started = "--rows 2 " + ("--steps 2 --n 4" if small else "--steps 20 --n 150"), {}
    holes = [str(log.out / name) for name in ("base", "pefl") if (log.out / name).exists()]
    edits = [str(log.out / name) for name in ("editnet",) if (log.out / name).exists()]
    for name, task, old, new in (("judge", "scenes", "base", holes),
                                 ("judge_edits", "edits", "editnet", edits)):
        if new:
            started[name] = start(log, f"evaluate.py {task} --ckpt assets/{old},{','.join(new)} {how} "
                                       f"--out {log.scratch / name}")
    sheets = []
    for name, process in started.items():
        folder = log.scratch / name
        if finish(log, name, process, log.left(), read(folder / "results.json"), grace=1):
            sheets.append(Image.open(folder / "sheet.png"))
    if sheets:
        sheet = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), "white")
        for i, picture in enumerate(sheets):
            sheet.paste(picture, (0, sum(s.height for s in sheets[:i])))
        sheet.save(log.out / "judge.png")


def goals(parts: dict) -> list[dict]:
    """What was aimed at on an H100 (SXM), and what was found; only what was measured."""
    def numbers(*names: str) -> list[dict]:
        found = (parts.get(name, {}).get("numbers") for name in names)
        return [row for content in found if isinstance(content, dict) for row in content.get("rows", [])]

    def attention(shape: str, who: str, mode: str) -> list[float]:
        return [row[mode]["TFLOP/s"] for row in numbers("kernels") if mode in row
                and (row["op"], row["shape"], row["who"]) == ("attention", shape, who)]

    def step(part: str, size: int, key: str) -> list:
        return [row[key] for row in numbers("sd3", "compiled") if key in row
                and (row["part"], row["size"]) == (part, size)]

    trained = parts.get("t2i", {}).get("numbers")
    rows = [("SD3's joint attention at 1024, forward, TFLOP/s", 380,
             attention("sd3-1024", "ours", "forward")),
            ("the same backward", 300, attention("sd3-1024", "ours", "backward")),
            ("over cuDNN with its joining and splitting, forward and backward", 1.0,
             [a / b for a, b in zip(attention("sd3-1024", "ours", "both"),
                                    attention("sd3-1024", "cudnn", "both"))]),
            ("EditNet training step on SD3 at 1024, MFU", 0.4, step("edit", 1024, "mfu")),
            ("a sample at 1024, 28 steps with guidance, per second", 1 / 1.4,
             [1e3 / ms[1] for ms in step("sample", 1024, "ms")]),
            ("tiny preset, text to image, pictures/s", 40000,
             [trained["perf/img_s"]] if isinstance(trained, dict) else [])]
    return [{"what": what, "goal": goal, "found": max(found)} for what, goal, found in rows if found]


def main(cfg: Config) -> dict:
    began, skip = time.monotonic(), [name for name in cfg.skip.split(",") if name]
    for name in skip:
        if name not in PARTS:
            raise SystemExit(f"error: --skip: {name}: use some of {', '.join(PARTS)}")
    if cfg.ptxas and not Path(cfg.ptxas).is_file():
        raise SystemExit(f"error: --ptxas: {cfg.ptxas}: no such file")
    out = Path(cfg.out).resolve()
    if (out / "gpu.json").exists():
        raise SystemExit(f"error: --out: {out}: holds the results of an earlier run: give another folder")
    out.mkdir(parents=True, exist_ok=True)
    env = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "WANDB_MODE": "disabled", "PYTHONUNBUFFERED": "1"}
    log = Log(out, Path(tempfile.mkdtemp(prefix="gpu_")), began + 60 * cfg.minutes, env)
    log.content["config"] = asdict(cfg)
    before = {number: signal.signal(number, lambda number, _: stop(log, signal.Signals(number).name))
              for number in (signal.SIGTERM, signal.SIGINT)}
    small = cfg.rehearse
    workers = 1 if small else max(1, (os.cpu_count() or 1) - 2)
    flags = "train_omni.py --data scenes --lr 1e-3 --muon_lr 3e-3 --text_lr 0.5 --warmup 50 --shift 2 " \
        f"--sample_every 0 --save_every 1000000 --workers {workers} --log_every {1 if small else 20} " \
        f"--wandb off {cfg.train}"
    try:
        if "ptxas" not in skip and not small:
            usable_ptxas(log, cfg.ptxas)
        checks(log, skip, f"{flags} --batch_size {cfg.batch} --stage base --preset tiny", small)
        benchmarks(log, skip, 0 if small else 0.38 * 60 * cfg.minutes, small)
        train(log, cfg, skip, flags, 0 if small else 0.15 * 60 * cfg.minutes)
        if "judge" not in skip:
            judge(log, small)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        log.content["seconds"] = round(time.monotonic() - began, 1)
        log.content["goals"] = goals(log.content["parts"])
        save(log)
        shutil.rmtree(log.scratch, ignore_errors=True)
    for row in log.content["goals"]:
        print(f"{row['what']:66} {row['found']:10.4g}, goal {row['goal']:.4g}")
    failed = [name for name, row in log.content["parts"].items() if row["code"] and not row["late"]]
    print(f"{log.content['seconds']:.0f} s; failed: {', '.join(failed) or 'nothing'}; left out: "
          f"{'; '.join(log.content['left_out']) or 'nothing'}; {out / 'gpu.json'}")
    return log.content


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, config=(tyro.conf.FlagConversionOff,)))
