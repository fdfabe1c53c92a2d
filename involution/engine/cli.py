"""From the command line to an exit status: one readable message for whatever the user can mend."""

import errno
import functools
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from data import BadImageError
from involution.engine.config import hint, nearest
from involution.engine.distributed import announce
from involution.engine.errors import EXIT_ERROR, EXIT_PREEMPTED, EXIT_USAGE, Preempted, Stopped, UserError

log = logging.getLogger("involution")


class _Leave(BaseException):
    """Carries an error past Hydra, which would print a line of its own about it."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def job(main: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
    """What `hydra.main` calls: outside a sweep, errors with a message of their own go straight to `run`."""

    @functools.wraps(main)
    def quiet(config: DictConfig) -> None:
        try:
            main(config)
        except (UserError, Stopped, BadImageError) as error:
            _remove_unused_folder()
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise
            raise _Leave(error) from error

    return quiet


def _remove_unused_folder() -> None:
    """Hydra makes a run's folder before the run has anything to write; a run that never began leaves none."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    if folder != Path.cwd():
        with suppress(OSError):  # something is in it
            folder.rmdir()


def run(main: Callable[[], Any], config_dir: str, config_name: str) -> None:
    """Run a program that `hydra.main` wraps, and leave with the exit status of its outcome (see errors.py)."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, instead of Hydra's own message and exit status 1
    status, message = EXIT_ERROR, ""
    try:
        try:
            _refuse_sweep_on_every_rank()
            main()
        except _Leave as carrier:
            raise carrier.error from None
        status = 0
    except (UserError, BadImageError) as error:
        status, message = EXIT_USAGE, str(error)
    except HydraException as error:
        status, message = EXIT_USAGE, _explain(error, config_dir, config_name)
    except Preempted as stopped:
        status, message = EXIT_PREEMPTED, str(stopped)
    except Stopped as stopped:
        message = str(stopped)
    except KeyboardInterrupt:
        message = "interrupted"
    except Exception as error:
        message = f"{error}: make room and run again" if _disk_is_full(error) else traceback.format_exc()
    _exit(_report(status, message) if message else status)


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
    print(json.dumps(result), flush=True)


def _refuse_sweep_on_every_rank() -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and {"-m", "--multirun"} & set(sys.argv):
        raise UserError(
            "torchrun with -m would run the whole sweep once on every rank. Start the sweep with plain "
            "`python train.py -m ...` (one process a job), or start each job of it with torchrun"
        )


def _explain(error: Exception, config_dir: str, config_name: str) -> str:
    """Hydra's message, with the nearest valid key or group option."""
    text = str(error).strip()
    if "override_grammar" in text:
        return (
            f"{text.splitlines()[0]}. A value with blanks, brackets or commas needs quotes of its own, inside "
            "the shell's: 'images=\"my photo (1).jpg\"'"
        )
    if key := re.search(r"Could not override '([^']+)'", text):
        return f"there is no key {key[1]}{hint(_nearest_key(key[1], config_dir, config_name))}"
    if option := re.search(r"Could not find '([^']+)'\s+Available options in '([^']+)':\s+(.*)", text, re.DOTALL):
        group, _, name = option[1].rpartition("/")
        known = [known for known in option[3].split() if not known.startswith("_")]
        return f"{group}={name} is unknown{hint(nearest(name, known))} Known: {', '.join(known)}"
    return text


def _nearest_key(key: str, config_dir: str, config_name: str) -> list[str]:
    chosen = [argument for argument in sys.argv[1:] if re.fullmatch(r"\w+=\w+", argument)]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir, version_base="1.3"):
            groups = os.listdir(config_dir)
            config = compose(config_name, [argument for argument in chosen if argument.split("=")[0] in groups])
    except HydraException:
        return []
    keys = list(_leaves(OmegaConf.to_container(config)))
    same_name = [known for known in keys if known.rpartition(".")[2] == key.rpartition(".")[2]]
    return same_name[:1] or nearest(key, keys)


def _leaves(config: Any, prefix: str = "") -> Iterator[str]:
    for name, value in config.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
