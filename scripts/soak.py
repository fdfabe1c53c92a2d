"""Kill and restart a run at random moments for a given time; check that its weights come out as if nothing happened.

    python scripts/soak.py [--minutes 20] [--seed 0] [--folder FOLDER]

Rounds alternate between the loaders and between one and two ranks (gloo). Each trains the same small run on the CPU in
deterministic mode, with gradient accumulation and an average of the weights, until it ends: hit by SIGKILL (all
processes at once, as a power cut does; or one rank alone), SIGTERM, SIGINT or SIGUSR1 after a random time. Then every
tensor of its last checkpoint and every line of metrics.jsonl (but for the times) must equal those of a run that nobody
touched. Exit status 1 at the first difference.
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
from reliability import command, kill, outcome, rank_pid, saved_step, train, write_images  # noqa: E402

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
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


def round_(run: Path, images: Path, loader: str, ranks: int, longest: float, dice: random.Random) -> Counter[str]:
    """One run, hit until it ends."""
    hits: Counter[str] = Counter()
    while True:
        process, delay = start(run, images, loader, ranks), dice.uniform(0, longest)
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            what = hit(process, ranks, dice)
            process.wait(300)
            hits[what] += 1
            say(f"  {what} after {delay:.1f} s: exit {process.returncode}, saved step {saved_step(run)}")
        else:
            if process.returncode == 0:
                return hits
            say(f"  exit {process.returncode} by itself; see {run.with_suffix('.log')}")
            sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the kinds of the hits")
    parser.add_argument("--folder", type=Path, help="for the runs (default: a temporary one)")
    options = parser.parse_args()
    root = options.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    images, dice = write_images(root / "images"), random.Random(options.seed)
    expected, took, total = {}, {}, Counter[str]()
    number = 0
    while time.monotonic() - begin < 60 * options.minutes:
        setting = loader, ranks = [("torch", 1), ("dali", 2), ("dali", 1), ("torch", 2)][number % 4]
        if setting not in expected:
            reference, since = root / f"untouched-{loader}-{ranks}", time.monotonic()
            finished = train(reference, images, f"data.loader={loader}", *OVERRIDES, ranks=ranks)
            assert finished.status == 0, finished.stderr
            expected[setting], took[setting] = outcome(reference), time.monotonic() - since
            say(f"untouched: {loader}, {ranks} rank(s), {took[setting]:.0f} s: {expected[setting][0][:16]}")
        number += 1
        run = root / f"hit-{number:03}"
        say(f"round {number}: {loader}, {ranks} rank(s)")
        hits = round_(run, images, loader, ranks, 0.7 * took[setting], dice)
        total += hits
        found = outcome(run)
        if found != expected[setting]:
            say(f"DIFFERENT: {found} instead of {expected[setting]}")
            sys.exit(1)
        say(f"  finished after {sum(hits.values())} hits: {found[0][:16]}, equal to the last bit")
    say(f"{number} runs, {sum(total.values())} hits ({', '.join(f'{n} x {what}' for what, n in total.most_common())})")
    say("every run ended with the weights, averages, momenta, random streams and metrics of the untouched one")


if __name__ == "__main__":
    main()
