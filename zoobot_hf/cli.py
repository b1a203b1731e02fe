"""The command `zoobot-hf`: each subcommand is one call into the library."""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any, NoReturn

from safetensors import SafetensorError

from .commands.messages import complain

# Their modules import PyTorch and more, so each is imported when it is called, and help needs none.
COMMANDS = {
    "demo": "finetune an encoder to drawn ring galaxies, with no network",
    "finetune": "train a new head on an encoder, then both",
    "curve": "measure how many labels are enough",
    "predict": "write a table of predictions for a catalog or a folder of images",
    "embed": "write the encoder's embeddings of a catalog or a folder of images",
    "merge": "turn the folder that predict wrote into one table",
    "cache": "list the embeddings that are kept on disk, or delete them",
    "push": "send a finished run to the Hub in one commit",
    "export": "turn a finetuned model into plain transformers or ONNX",
}
INTERRUPTED = 130  # what shells give for SIGINT


def main(arguments: list[str] | None = None) -> int:
    """The exit status of a command line: 0 when all went well.

    Args:
        arguments: The command line without the program's name; the process's own when absent.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        called = next((argument for argument in arguments if argument in COMMANDS), None)
        options = _parser(called).parse_args(arguments)
    except KeyboardInterrupt:  # while PyTorch is imported, which takes seconds
        complain("interrupted")
        return INTERRUPTED
    try:
        with _log_on_stdout():
            return int(options.run(options))
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        if options.debug:
            raise
        complain(_in_one_line(error))
        return 1
    except KeyboardInterrupt:
        if options.debug:
            raise
        complain(f"interrupted{options.advice}")
        return INTERRUPTED


@contextlib.contextmanager
def _log_on_stdout() -> Iterator[None]:
    # The package's log alone: the libraries' loggers have handlers of their own, and would say everything twice.
    logger, handler = logging.getLogger(__package__), logging.StreamHandler(sys.stdout)
    # A launcher's other processes say the same as the main one. A rank alone may be left over from somewhere else.
    if os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0":
        handler.setLevel(logging.ERROR)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _in_one_line(error: Exception) -> str:
    # Libraries below spread some of their messages over several lines, and a few have none.
    message = " ".join(str(error).split()) or type(error).__name__
    # Of a file that it reads it says neither which nor what to do.
    if isinstance(error, SafetensorError) and "Error while serializing" not in message:
        return f"the model's weights, model.safetensors, are damaged ({message}); copy or download them again."
    return message


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line; argparse's own repeat every option before they say what is wrong."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # Each command refuses what it doesn't know, and points to its own help; argparse leaves that to the program.
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return known, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser(called: str | None) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="zoobot-hf", description="Finetune a galaxy encoder, publish it, predict a survey.", allow_abbrev=False
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, help in COMMANDS.items():
        # Abbreviated, --over would be --overwrite, which deletes.
        description = f"{help[0].upper()}{help[1:]}."
        command = commands.add_parser(name, help=help, description=description, allow_abbrev=False)
        if name == called:
            module = import_module(f".commands.{name}", __package__)
            command.set_defaults(run=module.run, advice="")
            module.add_options(command)
            command.add_argument("--debug", action="store_true", help="show where an error came from")
    return parser


if __name__ == "__main__":
    sys.exit(main())
