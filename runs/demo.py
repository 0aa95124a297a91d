"""The main job on the embedded dataset, in a few minutes: pictures, preferences, rewards, PeFL, the judge.

    python runs/demo.py                  from the models in assets/; the same command goes on where it stopped
    python runs/demo.py --fast True      a few steps of everything: does it run here?

Every stage is a command of this repository, kept with its output in OUT. The paper's values are the scripts'
defaults; those below suit a small model of pixels.
"""

import json
import math
import os
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import tyro

ROOT = Path(__file__).absolute().parents[1]
TASKS = {"outpaint": "outpainting", "edit": "an object into a hole", "erase": "an object out of a hole"}


@dataclass
class Config:
    out: str = "out/demo"  # folder for everything that is made
    prompts: int = 240  # prompts of which the base makes four pictures each
    captions: int = 3000  # further pictures with a true and three false captions
    reward_steps: int = 250  # training steps of the aesthetic reward
    align_steps: int = 350  # training steps of the alignment reward
    phases: str = "20/15/10x60,8/6/3x24"  # phases of PeFL, T/T1/T2 x steps (Sec. 3.3)
    disc_first: int = 24  # steps in which the coherence model learns alone
    judged: int = 60  # held-out scenes for each task
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the hardware has it
    fast: bool = False  # two steps of everything


class Stage(NamedTuple):
    """What stands on the progress line; seconds on two plain cores; commands, which run side by side."""

    title: str
    seconds: float
    commands: dict[str, str]  # name of the log -> script and flags, to which main() adds --precision
    ranks: int = 1  # processes of a command


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def stages(cfg: Config) -> list[Stage]:
    out, n = cfg.out, cfg
    # A step of 16 pictures of a small model gains little from a second thread and all from a second rank
    ranks = 4 if cores() >= 4 else 2 if cores() >= 2 else 1
    one, two = (int(phase.split("x")[1]) for phase in n.phases.split(","))  # steps; both ends are judged
    every = math.gcd(one, 20)
    many = f"-m torch.distributed.run --standalone --nproc_per_node={ranks} -- " if ranks > 1 else ""
    reward = "--lr 5e-4 --warmup 50 --dropout 0 --batch_size 32 --noise 0.3 --eval_every 0 --wandb off"
    return [
        Stage("pictures by the models in assets/", 20, {
            "showcase": f"runs/showcase.py --out {out}"}),
        Stage("preferences: pictures of the base, ranked by the known truth", 55, {
            "prefs": f"make_prefs.py --ckpt assets/base --n {n.prompts} --captions {n.captions} "
                     f"--steps 4,6,8,20 --degrade all --out {out}/prefs"}),
        Stage("rewards: aesthetic (Eq. 1) and alignment (Eq. 5)", 160, {
            "aesthetic": f"train_reward.py --pairs {out}/prefs/aesthetic.json --preset tiny --augment 2 "
                         f"--steps {n.reward_steps} --out {out}/aesthetic {reward}",
            "alignment": f"train_reward.py --pairs {out}/prefs/alignment.jsonl --preset tiny-p16 "
                         f"--steps {n.align_steps} --out {out}/alignment {reward}"}),
        Stage("perceptual feedback learning: stages 1 to 3, coherence, two phases", 130, {
            "pefl": f"{many}train_pefl.py --base assets/base --aesthetic {out}/aesthetic "
                    f"--alignment {out}/alignment --phases {n.phases} --adversarial_from 1 "
                    "--tasks outpaint=7,edit=7,inpaint=3,erase=3 --start noise --hold known "
                    f"--disc_init {out}/aesthetic --disc_first {n.disc_first} "
                    f"--batch_size {16 // ranks} --lr 2e-5 --warmup 10 --ema 0.95 "
                    "--disc_lr 3e-4 --reward_noise 0.2 --eta 0.005 "
                    "--w_aesthetic 0.001 --w_alignment 0.001 --w_coherence 0.1 --sample_every 0 "
                    f"--save_every {every} --keep {2 + two // every} --wandb off "
                    f"--out {out}/pefl"}, ranks),
        Stage("the judge, on held-out scenes: base and PeFL", 80, {
            "judge": f"evaluate.py scenes --steps 20,20,8,8 --n {n.judged} --out {out}/judge "
                     f"--ckpt assets/base,{out}/pefl/step_{one:08d},assets/base,{out}/pefl"})]


def main(cfg: Config) -> None:
    if cfg.fast:
        cfg = Config(cfg.out, prompts=12, captions=40, reward_steps=2, align_steps=2,
                     phases="20/15/10x1,8/6/3x1", disc_first=0, judged=4, precision=cfg.precision)
    os.chdir(ROOT)
    out, settings = Path(cfg.out), json.dumps(asdict(cfg))
    out.mkdir(parents=True, exist_ok=True)
    if (known := out / "settings.json").exists() and known.read_text() != settings:
        raise SystemExit(f"error: --out: {out}: was begun with other settings, {known.read_text()}: give "
                         "those, or another --out")
    known.write_text(settings)
    every = [stage._replace(commands={name: f"{command} --precision {cfg.precision}"
                                      for name, command in stage.commands.items()}) for stage in stages(cfg)]
    began, pace = time.time(), 1.0
    spent = planned = 0.0
    for number, stage in enumerate(every, 1):
        done = out / f"{'_'.join(stage.commands)}.done"
        if done.exists():
            continue
        head, start = f"{number}/{len(every)} {stage.title}", time.time()
        later = sum(s.seconds for s in every[number:])

        def progress():
            left = max(pace * stage.seconds - (time.time() - start), 5) + pace * later
            line(f"{head}, about {clock(left)} left in all")

        run(stage.commands, out, progress, stage.ranks)
        done.write_text("".join(f"python {command}\n" for command in stage.commands.values()))
        spent, planned = spent + time.time() - start, planned + stage.seconds
        pace = spent / planned  # of this machine, against the one that the seconds above are of
        say(f"{head}: {clock(time.time() - start)}")
        if number == 1:
            say(f"    look at {out / 'showcase.png'}")
    runs = " ".join(f"{out}/{name}" for name in ("pefl", "aesthetic", "alignment", "judge"))
    run({"report": f"evaluate.py report {runs} --out {out}/report.html"}, out, lambda: None)
    report(out)
    print(f"\n{clock(time.time() - began)}; curves, tables, before and after: {out}/report.html; pictures: "
          f"{out}/showcase.png, {out}/judge/sheet.png; the commands: {out}/*.done")


def run(commands: dict[str, str], out: Path, progress, ranks: int = 1) -> None:
    """The commands side by side, the cores shared out among them, each with its output in OUT/NAME.log."""
    threads = {"OMP_NUM_THREADS": str(max(1, cores() // (len(commands) * ranks))),
               "OMP_WAIT_POLICY": "PASSIVE"}
    if ranks > 1:  # they meet on this machine alone, whatever its host name stands for
        threads["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    children = {}
    try:
        for name, command in commands.items():
            with open(out / f"{name}.log", "w") as log:
                children[name] = subprocess.Popen([sys.executable, *shlex.split(command)], stdout=log,
                                                  stderr=subprocess.STDOUT, env={**threads, **os.environ})
        while any(child.poll() is None for child in children.values()):
            progress()
            time.sleep(0.5)
        for name, child in children.items():
            if child.returncode:
                log = out / f"{name}.log"
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-8:])
                raise SystemExit(f"\n{tail}\nerror: {log}: this stage failed: mend what the last lines say; "
                                 "the same command goes on here")
    finally:
        for child in children.values():
            if child.poll() is None:
                child.terminate()  # the training scripts save, and resume
                child.wait()


LINES = {"last": 0.0}  # when a progress line was written


def line(text: str) -> None:
    """The progress line: rewritten in place on a terminal, one every half minute elsewhere."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
    elif time.time() - LINES["last"] > 30:
        LINES["last"] = time.time()
        print(text, file=sys.stderr, flush=True)


def say(text: str) -> None:
    """A line that stays."""
    print(("\r\x1b[K" if sys.stderr.isatty() else "") + text, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def report(out: Path) -> None:
    """The judge's table, shortened: what a reader should see at the end."""
    tasks = json.loads((out / "judge/results.json").read_text())["tasks"]
    columns = list(next(iter(tasks.values())))
    names = ["base, 20 steps", "PeFL, 20 steps", "base, 8 steps", "PeFL, 8 steps", "base, blurred", "truth"]
    rows = [("texture, distance from the truth's", "texture", 1), ("distance to real pictures", "frechet", 1),
            ("error where the truth is determined", "exact", 1),
            ("has the object asked for, %", "named", 100), ("nothing is left of it, %", "empty", 100)]
    print("\n" + " " * 62 + "".join(f"{name:>16}" for name in names))
    for task, found in tasks.items():
        for label, key, scale in rows:
            if key in found[columns[0]]:
                values = [f"{scale * found[c][key]['mean']:.3g}" for c in columns]
                print(f"{TASKS[task] + ': ' + label:<62}" + "".join(f"{v:>16}" for v in values))


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__, config=(tyro.conf.FlagConversionOff,)))
    except KeyboardInterrupt:
        raise SystemExit("\ninterrupted: the same command goes on where it stopped") from None
