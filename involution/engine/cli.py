"""From the command line to an exit status: one readable message for whatever the user can mend."""

import errno
import functools
import gc
import io
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data import BadImageError, LostDataError
from involution.checks import SizeError, first_line, strict_json
from involution.engine import arguments, explain, help, signals
from involution.engine.config import given
from involution.engine.distributed import announce
from involution.engine.errors import EXIT_ERROR, EXIT_PREEMPTED, EXIT_USAGE, Preempted, Stopped, UserError
from involution.engine.run import lock_file
from involution.outage import is_outage

log = logging.getLogger("involution")
UNUSABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}
OTHER_FOLDER = "set output_root to a folder you can write to"


class _Leave(BaseException):
    """Carries an error past Hydra, which would print a line of its own about it."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def job(main: Callable[[DictConfig], None]) -> Callable[[DictConfig], str | None]:
    """What `hydra.main` calls. A job of a sweep says why it failed; a single run's errors go straight to `run`."""
    said: set[str] = set()

    @functools.wraps(main)
    def quiet(config: DictConfig) -> str | None:
        in_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
        try:
            _refuse_study_alone(in_sweep)
            _refuse_name_of_another_model()
            main(config)
        except Exception as error:
            _remove_unused_folder()
            if not in_sweep:
                raise _Leave(error) from error
            _, message = _outcome(error)
            why = "as a job before" if message in said else message
            log.error("%s failed: %s", Path(HydraConfig.get().runtime.output_dir).name, why)
            said.add(message)
            return message.strip().splitlines()[-1]
        finally:
            if in_sweep:  # the next job needs the memory, and compiles programs of its own
                torch.compiler.reset()
                gc.collect()
                torch.cuda.empty_cache()
        return None

    return quiet


def _refuse_study_alone(in_sweep: bool) -> None:
    study = HydraConfig.get().runtime.choices.get("ablation")
    if study is not None and not in_sweep:
        raise UserError(
            f"ablation={study} is a sweep of several runs: start it with -m, python train.py -m ablation={study}"
        )


def _refuse_name_of_another_model() -> None:
    """A model's options come with its group; its name alone would meet another model's."""
    node = HydraConfig.get()
    names = [each.partition("=")[2] for each in node.overrides.task if each.startswith("model.name=")]
    if names and node.runtime.choices.get("model") not in (None, "timm"):
        raise UserError(f"model.name is for model=timm; this project's networks are chosen by model={names[-1]}")


def rate_of_another_optimizer(config: DictConfig) -> str:
    """A remark where a recipe's learning rate meets another optimizer than its own: AdamW with SGD's diverges."""
    node = HydraConfig.get()
    chosen, recipe = node.runtime.choices.get("optimizer"), node.runtime.choices.get("recipe")
    keys = given(node.overrides.task)
    if "optimizer" not in keys or "optimizer.lr" in keys or recipe is None:
        return ""
    folder = next(source.path for source in node.runtime.config_sources if source.provider == "main")
    own, rate = _of_recipe(Path(folder) / "recipe", recipe)
    if rate is None or chosen == own:
        return ""
    usual = OmegaConf.load(Path(folder) / "optimizer" / f"{chosen}.yaml").lr
    return (
        f"recipe={recipe} has optimizer.lr={config.optimizer.lr}, which is for optimizer={own}; {chosen}'s usual one "
        f"is optimizer.lr={usual}"
    )


def _of_recipe(folder: Path, name: str) -> tuple[str, Any]:
    """The optimizer of a recipe, and its learning rate where the recipe has one of its own."""
    recipe: Any = OmegaConf.to_container(OmegaConf.load(folder / f"{name}.yaml"))
    own, rate = "sgd", None
    for entry in recipe["defaults"]:
        if isinstance(entry, dict):
            own = entry.get("override /optimizer", own)
        elif not entry.startswith(("/", "_")):
            own, rate = _of_recipe(folder, entry)
    return own, recipe.get("optimizer", {}).get("lr", rate)


def _remove_unused_folder() -> None:
    """Hydra makes a run's folder before the run has anything to write; a run that never began leaves none."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    if folder != Path.cwd():
        with suppress(OSError):  # something else is in it, or another run has the lock
            found = {path.name for path in folder.iterdir()}
            if {".lock"} <= found <= {".lock", "train.log"} and os.environ.get("RANK", "0") == "0":
                with open(folder / ".lock", "a") as lock:
                    if lock_file(lock) is None:
                        for name in found:
                            (folder / name).unlink()
            folder.rmdir()


def run(main: Callable[[], Any], config_dir: str, config_name: str) -> None:
    """Run a program that `hydra.main` wraps, and leave with the exit status of its outcome (see errors.py)."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, instead of Hydra's own message and exit status 1
    status, message, requeue = EXIT_ERROR, "", False
    try:
        try:
            if {"--help", "-h"} & set(sys.argv[1:]):
                print_text(help.text(os.path.basename(sys.argv[0]), config_dir, config_name, sys.argv[1:]))
                return
            _refuse_sweep_on_every_rank()
            _refuse_dashes()
            sys.argv[1:] = arguments.keep_text(sys.argv[1:])
            main()
        except _Leave as carrier:
            raise carrier.error from None
        except OSError as error:  # from Hydra, which makes the folders of runs and sweeps
            if error.filename is None or _disk_is_full(error):
                raise
            raise UserError(f"cannot write to {error.filename}: {error.strerror}; {OTHER_FOLDER}") from error
        status = 0
    except HydraException as error:
        status, message = EXIT_USAGE, explain.composition(error, config_dir, config_name)
    except OmegaConfBaseException as error:
        status, message = EXIT_USAGE, explain.value(error)
    except Preempted as stopped:
        status, message, requeue = EXIT_PREEMPTED, str(stopped), stopped.requeue
    except KeyboardInterrupt:
        message = "interrupted"
    except Exception as error:
        status, message = _outcome(error)
    status = _report(status, message) if message else status
    _exit(signals.requeue() if requeue else status)


def _outcome(error: Exception) -> tuple[int, str]:
    """The exit status for an error, and what to say."""
    if isinstance(error, UserError | BadImageError | SizeError):
        return EXIT_USAGE, str(error)
    if isinstance(error, Stopped | LostDataError):
        return EXIT_ERROR, str(error)
    if is_outage(error):
        return EXIT_ERROR, f"{error}: the disk, the network or a limit failed; start the same again to continue"
    if _disk_is_full(error):
        return EXIT_ERROR, f"{error}: make room and run again"
    if _memory_is_full(error):
        return EXIT_USAGE, (
            f"{first_line(error).rstrip('.')}. Take a smaller train.batch_size (the global batch stays, for gradients "
            "are accumulated; BatchNorm sees fewer images), or train.precision=bf16; in eval.py a smaller batch_size"
        )
    if isinstance(error, OSError) and error.errno in UNUSABLE and error.filename is not None:
        return EXIT_USAGE, f"{error.filename}: {error.strerror}"
    return EXIT_ERROR, "".join(traceback.format_exception(error))


def _memory_is_full(error: Exception) -> bool:
    """Of the GPU, of our operators on the CPU, or of torch's, whose allocator has no type of error of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _disk_is_full(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _report(status: int, message: str) -> int:
    """Say why the program ends, on the rank where that began, and tell the others; returns everyone's exit status."""
    say = log.error if log.handlers else functools.partial(print, file=sys.stderr)
    mine, (rank, first_status, first) = int(os.environ.get("RANK", 0)), announce(status, message)
    if rank == mine:
        say(message if status == EXIT_ERROR else f"{os.path.basename(sys.argv[0])}: {message}")
    elif first != message:
        say(f"[rank {mine}] leaving because rank {rank} did: {first.strip().splitlines()[-1]}")
    return first_status


def _exit(status: int) -> None:
    """Leave at once after a failure: the other ranks may wait in a collective that no destructor may join."""
    sys.stdout.flush()
    sys.stderr.flush()
    logging.shutdown()
    if status and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        os._exit(status)
    sys.exit(status)


@contextmanager
def user_input() -> Iterator[None]:
    """Where objects are built from the configuration: a ValueError there is the user's to mend."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def print_result(result: dict[str, Any]) -> None:
    """The program's answer: one JSON object on the last line of standard output."""
    print_text(strict_json(result))


def print_text(text: str) -> None:
    """Print on standard output, as long as somebody reads it: `train.py --help | head` is no failure."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try again when it ends


def _refuse_sweep_on_every_rank() -> None:
    ranks = max(int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))
    if ranks > 1 and {"-m", "--multirun"} & set(sys.argv):
        raise UserError(
            "torchrun or srun with -m would run the whole sweep once on every rank. Start it as one process, "
            "`python train.py -m ...`, and let a launcher give each job its ranks: hydra/launcher=submitit_local on "
            "this machine, hydra/launcher=slurm in SLURM's queue"
        )


def _refuse_dashes() -> None:
    """Hydra would answer `--model rednet50` with its own usage."""
    for argument in sys.argv[1:]:
        name = argument.partition("=")[0]
        if name.startswith("-") and name not in get_args_parser()._option_string_actions:
            raise UserError(f"{argument}: options are KEY=VALUE, without dashes, as in model=rednet50")
