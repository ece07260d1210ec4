"""`pbsd convert reshard`, as a script."""

import sys

from launcher.convert import command_line

if __name__ == "__main__":
    sys.exit(command_line("reshard"))
