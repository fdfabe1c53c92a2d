"""Kill and restart a run at random moments for a given time; check that its weights come out as if nothing happened.

    python scripts/soak.py [--minutes 20] [--hits 100] [--seed 0] [--folder FOLDER]

Rounds alternate between the loaders and between one and two ranks (gloo). Each trains the same small run on the CPU in
deterministic mode, with gradient accumulation and an average of the weights, until it ends: hit by SIGKILL (all
processes at once, as a power cut does; or one rank alone), SIGTERM, SIGINT or SIGUSR1 within seconds of its first step,
sometimes before. Then every tensor of its last checkpoint and every line of metrics.jsonl (but for the times) must be
those of a run that nobody touched. Exit status 1 at the first difference.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from programs import kill  # noqa: E402
from reliability import command, outcome, rank_pid, saved_step, train, write_images  # noqa: E402

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
AFTER_STEP = 6.0  # seconds at most: a training process is hit about every three of its seconds
OVERRIDES = ("train.epochs=8", "train.checkpoint_every_steps=3", "train.checkpoint_every_minutes=0.05")

begin = time.monotonic()


def say(text: str) -> None:
    passed = round(time.monotonic() - begin)
    print(f"[{passed // 60:02}:{passed % 60:02}] {text}", flush=True)


def start(run: Path, images: Path, loader: str, ranks: int) -> subprocess.Popen[str]:
    words = command(run, images, f"data.loader={loader}", *OVERRIDES, ranks=ranks)
    log = open(run.with_suffix(".log"), "a")  # noqa: SIM115 (the process keeps it)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, cwd=ROOT, env=env, text=True, stdout=log, stderr=log)


def hit(process: subprocess.Popen[str], ranks: int, dice: random.Random) -> str:
    """Do something bad to a running program; returns what."""
    kind = dice.choice(["SIGKILL", "SIGKILL", "SIGTERM", "SIGINT", "SIGUSR1"])
    if kind == "SIGKILL" and not (ranks > 1 and dice.random() < 0.5):
        kill(process)
        return "SIGKILL to all"
    try:
        target = rank_pid(process, dice.randrange(ranks)) if ranks > 1 else process.pid
        os.kill(target, getattr(signal, kind))
    except (AssertionError, OSError):
        return "nothing: the ranks were not up, or had ended"
    return f"{kind} to one rank" if ranks > 1 else kind


def steps_logged(run: Path) -> int:
    path = run / "train.log"
    return path.read_text().count("  step ") if path.exists() else 0


def ends_before(process: subprocess.Popen[str], run: Path, dice: random.Random) -> bool:
    """Wait for the moment to hit: seconds after the first step, now and then before it. Has it ended by then?"""
    before, since = steps_logged(run), time.monotonic()
    early = dice.uniform(0, 20) if dice.random() < 0.1 else 300
    while steps_logged(run) == before and time.monotonic() - since < early:
        if process.poll() is not None:
            return True
        time.sleep(0.05)
    try:
        process.wait(dice.uniform(0, AFTER_STEP))
    except subprocess.TimeoutExpired:
        return False
    return True


def round_(run: Path, images: Path, loader: str, ranks: int, dice: random.Random) -> Counter[str]:
    """One run, hit until it ends."""
    hits: Counter[str] = Counter()
    while True:
        process, since = start(run, images, loader, ranks), time.monotonic()
        if ends_before(process, run, dice):
            if process.returncode == 0:
                return hits
            say(f"  exit {process.returncode} by itself; see {run.with_suffix('.log')}")
            sys.exit(1)
        what, after = hit(process, ranks, dice), time.monotonic() - since
        process.wait(300)
        hits[what] += what.startswith("SIG")
        say(f"  {what} after {after:.1f} s: exit {process.returncode}, saved step {saved_step(run)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20, help="no new run begins after that time")
    parser.add_argument("--hits", type=float, default=float("inf"), help="nor after that many hits")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the kinds of the hits")
    parser.add_argument("--folder", type=Path, help="for the runs (default: a temporary one)")
    options = parser.parse_args()
    root = options.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    images, dice = write_images(root / "images"), random.Random(options.seed)
    expected, total = {}, Counter[str]()
    number = 0
    while time.monotonic() - begin < 60 * options.minutes and total.total() < options.hits:
        setting = loader, ranks = [("torch", 1), ("dali", 2), ("dali", 1), ("torch", 2)][number % 4]
        if setting not in expected:
            reference = root / f"untouched-{loader}-{ranks}"
            finished = train(reference, images, f"data.loader={loader}", *OVERRIDES, ranks=ranks)
            assert finished.status == 0, finished.stderr
            expected[setting] = outcome(reference)
            say(f"untouched: {loader}, {ranks} rank(s): {expected[setting][0][:16]}")
        number += 1
        run = root / f"hit-{number:03}"
        say(f"round {number}: {loader}, {ranks} rank(s)")
        hits = round_(run, images, loader, ranks, dice)
        total += hits
        found = outcome(run)
        if found != expected[setting]:
            say(f"DIFFERENT: {found} instead of {expected[setting]}")
            sys.exit(1)
        say(f"  finished after {hits.total()} hits: {found[0][:16]}, equal to the last bit")
    say(f"{number} runs, {total.total()} hits ({', '.join(f'{n} x {what}' for what, n in total.most_common())})")
    say("every run ended with the weights, averages, momenta, random streams and metrics of the untouched one")


if __name__ == "__main__":
    main()
