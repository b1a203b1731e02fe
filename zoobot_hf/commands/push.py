"""`zoobot-hf push`: a finished run to the Hub."""

import argparse
from pathlib import Path

from ..publishing.hub import push_folder


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="OUT", help="output_dir of a finished run")
    parser.add_argument("repo_id", metavar="USER/NAME", help="the repository; made where it doesn't exist")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--branch", help="branch to commit to, made where it doesn't exist (default: main)")
    parser.add_argument("--pull_request", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--message", help="first line of the commit")
    parser.add_argument("--include_code", action="store_true", help="let it load where zoobot_hf is not installed")


def run(options: argparse.Namespace) -> int:
    url = push_folder(
        options.folder,
        options.repo_id,
        private=options.private or None,
        revision=options.branch,
        create_pr=options.pull_request,
        commit_message=options.message,
        include_code=options.include_code,
    )
    print(f"pushed to {url}")
    return 0
