"""Messages of the command line that are not results."""

import sys

from tqdm.auto import tqdm


def complain(message: str) -> None:
    # Not print: the message would end up on the line of a progress bar that was left half way.
    tqdm.write(f"zoobot-hf: {message}", file=sys.stderr)
