"""The ``wush`` command: flags or a config file in, an exit code out."""

from __future__ import annotations

import functools
import json
import sys
import tomllib
from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import jax
import tyro

from wush_jax.checkpoints.content import library_version
from wush_jax.commands.demo import demo
from wush_jax.commands.files import bench, export, inspect
from wush_jax.commands.models import evaluate, generate
from wush_jax.commands.promise import verify
from wush_jax.commands.quantize import plan, quantize
from wush_jax.commands.terminal import warnings_in_a_line

Command = Callable[..., None]
OF_MODELS: tuple[Command, ...] = (plan, quantize, evaluate, verify, generate, export, inspect)
COMMANDS: tuple[Command, ...] = (*OF_MODELS, bench, demo)
ABOUT = (
    "4-bit quantization of language models with WUSH transforms. Every command takes "
    "--config FILE (.toml or .json): flags by name, which those of the command line override."
)
BAD_INPUT, INTERRUPTED = 2, 130
REPEATED = ("text",)  # flags that are given once for each of their values


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
      argv: arguments; None takes the process's own.

    Returns:
      The exit code: 0; 2 for input or a place that is no good, or what this machine cannot do;
      130 when interrupted. Anything else is a mistake of ours, and a traceback.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv == ["--version"]:
        print(f"wush {library_version()}, jax {jax.__version__}")
        return 0
    app = tyro.extras.SubcommandApp()
    for command in COMMANDS:
        shown: Command = _naming_its_folder(command) if command in OF_MODELS else command
        app.command(shown)
    try:
        argv = with_config_file(argv)
        with warnings_in_a_line():
            if argv[:1] == ["bench"] and "--help" not in argv:
                bench(tuple(argv[1:]))  # flags of another parser
            else:
                config = (tyro.conf.OmitArgPrefixes,)
                app.cli(args=argv, prog="wush", description=ABOUT, config=config)
    except (ValueError, OSError, MemoryError, NotImplementedError) as error:
        print(f"wush: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("wush: interrupted; --resume continues a layer-after-layer run", file=sys.stderr)
        return INTERRUPTED
    return 0


def _naming_its_folder(command: Command) -> Command:
    """Return a command that puts its model's folder before what is wrong, unless that has it.

    What goes wrong with a layer is said of the layer; of which model, only the command knows.
    """

    @functools.wraps(command)
    def run(*args: Any, **flags: Any) -> None:
        try:
            return command(*args, **flags)
        except (ValueError, NotImplementedError) as error:
            given = signature(command).bind(*args, **flags).arguments
            folder, said = str(next(iter(given.values()))), str(error)
            named = folder in said or said.startswith("--")
            if named or type(error) not in (ValueError, NotImplementedError):
                raise
            raise type(error)(f"{folder}: {said}") from error

    return run


def with_config_file(argv: list[str]) -> list[str]:
    """Return the arguments with those of ``--config FILE`` before them, so that they override.

    >>> with_config_file(["plan", "folder", "--format", "MXFP4"])
    ['plan', 'folder', '--format', 'MXFP4']

    Raises:
      ValueError: no file, or one that is no table of flags.
    """
    argv = [part for word in argv for part in _parts(word)]
    if "--config" not in argv:
        return argv
    at = argv.index("--config")
    if at + 1 == len(argv):
        raise ValueError("--config needs a file")
    rest = argv[:at] + argv[at + 2 :]
    first = next((i for i, word in enumerate(rest) if word.startswith("-")), len(rest))
    return rest[:first] + as_flags(_read_table(Path(argv[at + 1]))) + rest[first:]


def _parts(word: str) -> list[str]:
    return word.split("=", 1) if word.startswith("--config=") else [word]


def _read_table(file: Path) -> Mapping[str, Any]:
    try:
        text = file.read_text("utf8")
        table = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ValueError(f"--config {file} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"--config {file} is neither TOML nor JSON ({error})") from error
    if not isinstance(table, dict):
        raise ValueError(f"--config {file} holds a {type(table).__name__}, expected names of flags")
    return table


def as_flags(table: Mapping[str, Any]) -> list[str]:
    """Return settings as flags.

    >>> as_flags({"block_size": 64, "skip": ["lm_head", "x"], "resume": True, "dry_run": False})
    ['--block-size', '64', '--skip', 'lm_head', 'x', '--resume', '--no-dry-run']
    >>> as_flags({"text": ["a.txt", "b.jsonl"]})
    ['--text', 'a.txt', '--text', 'b.jsonl']
    """
    flags = []
    for name, value in table.items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            values = value if isinstance(value, list) else [value]
            if name in REPEATED:
                flags += [part for one in values for part in (f"--{name}", str(one))]
            else:
                flags += [f"--{name}", *map(str, values)]
    return flags


if __name__ == "__main__":
    sys.exit(main())
