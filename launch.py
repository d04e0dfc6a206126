"""How a script starts and ends: Ctrl-C and SIGTERM are answered from its first moment on, what is
wrong is said in one line. No torch. No command of its own.
"""
import _signal  # of `signal`; that itself takes 10 ms to import
import os
import sys


def no_room(kind, error, trace):
    """Print one line in place of a traceback where there is no memory to load what is imported; for
    sys.excepthook. In what a library makes of it, the loader's words stand, or Python's."""
    at = error
    while at is not None:
        if isinstance(at, MemoryError) or any(words in str(at) for words in (
                "annot allocate memory", "map segment", "return without exception set")):
            os.write(2, b"error: out of memory while Python, PyTorch and other libraries are "
                        b"loaded; end other programs, or raise the limit\n")
            os._exit(2)
        at = at.__context__
    sys.__excepthook__(kind, error, trace)


def answer_early(main):
    """End a script of ours with a line at Ctrl-C while it still imports PyTorch, for seconds; then
    launch() takes over. So where memory gives out. main: the module that was started. Elsewhere
    this does nothing."""
    file, own = getattr(main, "__file__", None), os.path.realpath(__file__)
    ours = file and os.path.dirname(os.path.realpath(file)) == os.path.dirname(own)
    if ours and "IPython" not in sys.modules:       # a notebook's kernel lives on
        def leave(number, _):
            os.write(2, b"error: stopped; nothing was begun, start it again\n")
            os._exit(128 + number)

        sys.excepthook = no_room
        for number, usual in ((_signal.SIGINT, _signal.default_int_handler),
                              (_signal.SIGTERM, _signal.SIG_DFL)):
            if _signal.getsignal(number) is usual:      # in the background Ctrl-C is ignored
                _signal.signal(number, leave)


answer_early(sys.modules["__main__"])       # before anything that takes longer to import

import contextlib
import logging
import signal
import threading
import time

from tqdm import tqdm

tqdm.monitor_interval = 0               # no thread of its own, for bars that stand still
# A paragraph of it, where there is no home folder, on the cache that it makes elsewhere.
logging.getLogger("matplotlib").setLevel(logging.ERROR)

PARENT = os.getppid()                   # torchrun, where it started this process
# torchrun's number of this process; clusters leave one behind where there are no others
RANK = os.environ.get("RANK", "0") if os.environ.get("WORLD_SIZE", "1") != "1" else "0"
RANK = int(RANK) if RANK.isdecimal() else 0


def plain(text):
    """Return a name from outside as text that any terminal or file takes: newlines, escape codes
    and undecodable bytes written out as \\n, \\x1b, \\udcff."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def fail(message, code=2):
    """Print one line on stderr and leave: 2 for bad input, 3 for a loss that is not finite."""
    text = f"process {RANK}: {message}" if RANK else str(message)       # each may fail alone
    text = text if len(text) < 3000 else f"{text[:2000]} … {text[-900:]}"
    # In one piece: of several processes each may write.
    with contextlib.suppress(OSError):      # no room where it goes: the code says it, too
        write(f"error: {plain(text)}\n", sys.stderr)
    raise SystemExit(code)


ENDINGS = []    # what a script does once its work is done: device.join leaves the other processes
BEGUN = []      # of a run that has begun: where, and how it goes on when it is stopped
ASKED = []      # the stops that were asked for: the signal, when
WRITING = []    # filled while a line is written: tqdm's lock must not meet a stop
IMPATIENT = 3   # seconds in which a second stop changes nothing


def write(text, file):
    """Write text above a progress bar, if there is one."""
    WRITING[:] = [file]
    try:
        tqdm.write(text, file=file, end="")
        file.flush()
    finally:
        WRITING.clear()


def again(args):
    """Return how a run goes on: --overwrite beside --resume would start it again."""
    if "resume" not in vars(args):
        return "the same command"
    flag = " with --resume" * (args.overwrite or not args.resume)
    return "the same command" + flag + " in place of --overwrite" * bool(args.overwrite)


def exit_code():
    """Return the exit code after a stop; without a launch(), of a Ctrl-C."""
    return 128 + (ASKED[-1][0] if ASKED else signal.SIGINT)


def stopped(where, way_on):
    """Leave after Ctrl-C or SIGTERM, with a line that says how to go on."""
    fail(f"{where}stopped; {way_on}", exit_code())


def stop():
    """Raise the stop that was asked for, if one was: what met it first may have dropped it."""
    if ASKED:
        raise KeyboardInterrupt


def launch(main):
    """Run a script's main as a program: Ctrl-C and SIGTERM end it with a line, not a traceback."""
    def answer(number, _):
        if ASKED and time.monotonic() < ASKED[-1][1] + IMPATIENT:
            return          # a second one must not break what cleans up
        ASKED.append((number, time.monotonic()))
        if not WRITING:
            stop()

    def dropped(found):     # in a callback, Python would print the stop and go on
        if not isinstance(found.exc_value, KeyboardInterrupt):
            return usual_hook(found)
        number = ASKED.pop()[0] if ASKED else signal.SIGINT
        once_more = threading.Timer(0.1, os.kill, (os.getpid(), number))
        once_more.daemon = True
        once_more.start()

    ASKED.clear()
    usual_hook, sys.unraisablehook = sys.unraisablehook, dropped
    found = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}

    def silence():          # all is said and whole: a stop needs no words from here on
        sys.unraisablehook = usual_hook
        for each, usual in found.items():
            if "IPython" in sys.modules:        # %run: it lives on, and has its own
                signal.signal(each, usual or signal.SIG_DFL)
            elif signal.getsignal(each) is answer:      # functions do not last to Python's end
                signal.signal(each, signal.SIG_IGN if ASKED else signal.SIG_DFL)
        ASKED.clear()

    signal.signal(signal.SIGTERM, answer)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:       # in the background
        signal.signal(signal.SIGINT, answer)
    for name in ("stdout", "stderr"):       # closed; or of an encoding that lacks × and ²
        stream = getattr(sys, name) or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        if hasattr(stream, "reconfigure"):      # a notebook's %run has none
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, stream)
    try:
        try:
            main()
            sys.stdout.flush()
            stop()
            silence()
            for end in ENDINGS:
                end()
        except BrokenPipeError:     # who reads what is printed has gone, as `| head` does
            os._exit(141)
        except (Exception, KeyboardInterrupt) as error:
            if ASKED or isinstance(error, KeyboardInterrupt):       # or what a library made of it
                stopped(*(BEGUN or ("", "nothing was begun that is not whole; start it again")))
            if not isinstance(error, OSError):
                raise
            sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")   # no room where it goes
            fail(f"{error.filename or 'standard output'}: {error.strerror or error}; mend that")
    except SystemExit as error:
        error.code = exit_code() if ASKED else error.code
        silence()
        if ENDINGS and error.code:      # others may never answer, so do not wait for them
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os._exit(error.code)
        raise


def say(line):
    """Print a line, or some, on stdout, above a progress bar if there is one; of several processes
    one. What it says of files may hold anything."""
    if not RANK:
        write("\n".join(map(plain, line.split("\n"))) + "\n", sys.stdout)
    stop()


def in_kernel():
    """Return whether sys.argv is that of a notebook's kernel: ipykernel_launcher.py, on Colab
    colab_kernel_launcher.py, or ipykernel/__main__.py. After %run it is the script's own."""
    return any(word in sys.argv[0] for word in ("ipykernel", "kernel_launcher"))
