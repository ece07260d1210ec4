"""Starts an SGLang server in SGLang's environment.

    python serve.py ARGUMENTS      a JSON object of fields of ServerArgs
"""

from __future__ import annotations

import json
import logging
import os
import sys


def main(arguments):
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s] %(message)s", force=True)
    try:
        run_server(ServerArgs(**arguments))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":  # the server's other processes import this file
    main(json.loads(sys.argv[1]))
