"""Outside of notebooks, a progress bar is for people who look at a terminal."""

import os
import pty
import subprocess
import sys
import termios

BAR = """
from mrl_rag.progress import progress_bar
with progress_bar(3, "encode", "text", True) as advance:
    advance(3)
"""


def test_a_bar_is_shown_on_a_terminal():
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    subprocess.run([sys.executable, "-W", "error", "-c", BAR], stderr=theirs, check=True, timeout=60)
    os.close(theirs)
    assert b"3/3" in os.read(ours, 10_000)
    os.close(ours)


def test_nothing_is_written_to_a_file_or_pipe():
    ran = subprocess.run([sys.executable, "-W", "error", "-c", BAR], capture_output=True, check=True, timeout=60)
    assert ran.stderr == b""
