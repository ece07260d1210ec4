"""`pbsd convert megatron-to-hf`, as a script."""

import sys

from launcher.convert import command_line

if __name__ == "__main__":
    sys.exit(command_line("megatron-to-hf"))
