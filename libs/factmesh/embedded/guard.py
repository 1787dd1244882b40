"""The guard between us and a server: it runs the server, and stops it when the process that asked for it is gone.
Standard library only, run by path as a script: it must start fast and know nothing of Factmesh.

    python guard.py STOP_SIGNAL STOP_WAIT_S USER COMMAND …      (standard input: the pipe whose end means "stop")

The pipe's other end is held by our process alone. However it dies, SIGKILL too, the kernel closes the pipe, and the
guard asks the server to stop, then kills it. Works wherever pipes do, and whichever thread started the server.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading


def primary_group(user: str) -> int:
    """The group that `user` logs in with: root's own group must not stay behind."""
    import pwd

    return pwd.getpwnam(user).pw_gid


def main() -> int:
    stop_signal, stop_wait_s, user, command = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], sys.argv[4:]
    # A terminal's Ctrl-C reaches the whole group; the order of stopping is our process's business, not the terminal's.
    ignored = [signal.SIGINT, signal.SIGTERM]
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)

    def in_child() -> None:
        for number in ignored:  # an ignored signal would stay ignored in the server
            signal.signal(number, signal.SIG_DFL)
        # On Linux: the server hears when the guard itself is killed. Elsewhere the next start finds the orphan.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, stop_signal)  # PR_SET_PDEATHSIG

    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=2,  # our own standard output is the line that tells the server's pid
        preexec_fn=in_child if os.name == "posix" else None,
        user=user or None,
        group=primary_group(user) if user else None,
        extra_groups=[] if user else None,
    )
    sys.stdout.write(f"{child.pid}\n")
    sys.stdout.flush()
    os.dup2(2, 1)

    def stop_when_parent_is_gone() -> None:
        while os.read(0, 1):
            pass
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(stop_signal)
        try:
            child.wait(stop_wait_s)
        except subprocess.TimeoutExpired:
            child.kill()

    threading.Thread(target=stop_when_parent_is_gone, daemon=True).start()
    return child.wait()


if __name__ == "__main__":
    sys.exit(main())
