"""The command line: which commands there are, and how their errors end. Each command is in the module of its topic.

Started for `--help` or for shell completion, it imports nothing that takes long: commands import what they need when they run.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import signal
import sys
from typing import Annotated, Any

import typer

from cifar.cli import export, inspect, maintenance, report, sweep, train
from cifar.errors import UserError, is_out_of_threads, name_program, program_name
from cifar.system import user_code
from cifar.system.disk import DISK_FULL_ERRNOS
from cifar.system.files import check_text
from cifar.system.names import escape_controls
from cifar.system.redact import redact
from cifar.system.redacted_streams import install_redacted_output, redact_output

app = typer.Typer(
    name="cifar",
    help="CIFAR-10 experiments: a sweep file becomes trials, trials become a picture of accuracy against FLOPs.",
    epilog="Start with `python -m cifar sweep quickstart`; `python -m cifar doctor` says what is missing.",
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},  # commands inherit it
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        import cifar

        print(f"cifar {cifar.__version__}")
        raise typer.Exit


@app.callback()
def _common_options(
    version: Annotated[
        bool, typer.Option("--version", help="print the version", callback=_print_version, is_eager=True, expose_value=False)
    ] = False,
) -> None: ...


app.command(context_settings={"ignore_unknown_options": True})(train.train)  # W&B's ${args} writes --lr=0.1
app.command()(sweep.sweep)
app.command()(sweep.agent)
app.command()(report.report)
app.command()(report.push)
app.command()(inspect.models)
app.command()(inspect.profile)
app.command()(inspect.data)
app.command()(train.evaluate)
app.command()(export.export)
app.command()(train.config)
app.command()(maintenance.gc)
app.command()(maintenance.doctor)
app.add_typer(sweep.sweeps_app, name="sweeps")

COMMANDS = [command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands] + ["sweeps"]
COMPLETION_OPTIONS = {"--install-completion", "--show-completion"}


def main(arguments: list[str] | None = None) -> int:
    """Run a command -> its exit code: 2 with one sentence for bad input, 130 after Ctrl-C. Bugs keep their traceback.

    Of an error in a plug-in the user's own lines are shown, and 1 is returned. What is printed meanwhile has no secrets
    (`cifar.system.redact`).
    """
    with redact_output():
        return _run_command(sys.argv[1:] if arguments is None else arguments)


def _run_command(arguments: list[str]) -> int:
    program = program_name()
    try:
        if program != "cifar" and COMPLETION_OPTIONS & set(arguments):
            raise UserError("shells complete the installed command only: give this option to `cifar` (pip install -e .)")
        _prepare_text(arguments)
        command = typer.main.get_command(app)
        _name_program_in_help(command)
        code = command.main(arguments or ["--help"], prog_name=program, standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except UserError as error:
        return _print_error(str(error))
    except OSError as error:
        if user_code.is_plugin_error(error):  # a file of theirs is missing, say
            return _print_user_error(error)
        if error.errno not in _DISK_ADVICE:
            raise
        place = f" at {error.filename}" if error.filename else ""
        return _print_error(f"{(error.strerror or 'cannot write').lower()}{place}; {_DISK_ADVICE[error.errno]}")
    except MemoryError:
        return _print_error("the memory does not hold what was given; take smaller values or a smaller file")
    except BaseException as error:
        user_code.pass_interrupt(error)
        if is_out_of_threads(error):
            return _print_error(f"{error}; {_DISK_ADVICE[errno.EAGAIN]}")
        message = getattr(error, "format_message", None)  # Typer's own usage errors; their class is private
        if message is None:
            if not user_code.is_plugin_error(error):
                raise
            return _print_user_error(error)
        name = f"{arguments[0]} " if arguments and arguments[0] in COMMANDS else ""
        return _print_error(f"{message().rstrip('.')}; see `python -m cifar {name}--help`")
    if code in _SIGNAL_ENDS:
        print(_SIGNAL_ENDS[code], file=sys.stderr)
    return code if isinstance(code, int) else 0


_SIGNAL_ENDS = {
    128 + signal.SIGINT: "interrupted",
    128 + signal.SIGUSR1: "pre-empted by SIGUSR1",
    128 + signal.SIGTERM: "pre-empted by SIGTERM",
}  # exit code -> what is said last
_FREE_SPACE = "free some space, or name another place with --runs-dir"
_OTHER_PLACE = "name another place with --runs-dir, or repair this one"
_DISK_ADVICE = {
    **dict.fromkeys((*DISK_FULL_ERRNOS, errno.EFBIG), _FREE_SPACE),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST), _OTHER_PLACE),
    **dict.fromkeys((errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO), _OTHER_PLACE),
    **dict.fromkeys((errno.EIO, errno.ESTALE), _OTHER_PLACE),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "this process needs some 100 of them: see `ulimit -n`"),
    errno.EAGAIN: "no more processes can be started: see `ulimit -u`, or take fewer --workers",
    errno.ENOMEM: "take fewer --workers, or a machine with more memory",
    errno.ENOLCK: "this file system has no locks of files: name another place with --runs-dir",
}


def _prepare_text(arguments: list[str]) -> None:
    """Refuse arguments that are no text. Let whatever is printed be printed, also where the terminal lacks its letters."""
    for argument in arguments:
        try:
            check_text(argument)
        except ValueError as error:
            raise UserError(f"an argument cannot be read: {error}; write it in UTF-8") from None
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # a stream of a test, or one that is closed
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def _print_error(sentence: str) -> int:
    print("error: " + escape_controls(" ".join(redact(name_program(sentence)).split())), file=sys.stderr)
    return 2


def _print_user_error(error: BaseException) -> int:
    print(escape_controls(redact(user_code.format_folded(error)), keeps_lines=True), file=sys.stderr)
    return 1


def _name_program_in_help(command: Any) -> None:
    """Examples in help texts name the program as it was started. `command`: Typer's, with those below it."""
    for field in ("help", "epilog"):
        if text := getattr(command, field, None):
            setattr(command, field, name_program(text))
    for child in getattr(command, "commands", {}).values():
        _name_program_in_help(child)


def run() -> None:
    """The entry point `cifar`."""
    # Large tensors in huge pages, where Linux has them: a CPU may spend half a step on the faults of small ones (LOG.md).
    # PyTorch reads this when it first allocates; workers inherit it.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    install_redacted_output()
    try:
        code = main()
    except Exception:
        import traceback

        sys.stderr.write(escape_controls(redact(traceback.format_exc()), keeps_lines=True))
        code = 1
    gc.freeze()  # at its end Python would look at every object once more, for a quarter of a second after a large table
    sys.exit(code)
