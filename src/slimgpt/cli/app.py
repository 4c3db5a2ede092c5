"""The command line: one command per public function. Results on stdout, progress on stderr."""

import io
import json
import logging
import os
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table

import slimgpt
from slimgpt.cli.latency import check_latency
from slimgpt.cli.options import options_of
from slimgpt.cli.recovery import prune_and_recover, recovery_options
from slimgpt.cli.tables import (
    bench_lines,
    check_lines,
    perplexity_lines,
    plan_table,
    pruning_table,
    ratio_lines,
    recovery_lines,
    recovery_plan,
    rich_table,
    sweep_lines,
    task_lines,
)
from slimgpt.config import (
    BenchConfig,
    EvalConfig,
    ExportConfig,
    LatencyConfig,
    PruneConfig,
    RecoverConfig,
    ReportConfig,
    check_text,
)
from slimgpt.errors import ConfigError, ResourceError, SlimGPTError, resource_error
from slimgpt.experiments.recipe import load_recipe
from slimgpt.presentation.tables import blocks_table, sizes
from slimgpt.pruning.memory import size
from slimgpt.runtime.progress import progress_bar

log = logging.getLogger("slimgpt")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Structured pruning of large language models into smaller dense checkpoints.",
)


class _Stderr(Console):
    """Standard error. If it is closed or full, the run continues without it."""

    def tell(self, text: str, style: str | None = None) -> None:
        """Print a line."""
        try:
            self.print(text, style=style, soft_wrap=True)
        except OSError:
            _give_up(2)

    def on_broken_pipe(self) -> None:
        """Raise, so that the caller decides; Rich would end the process."""
        raise BrokenPipeError


stdout = Console(highlight=False, markup=False)

stderr = _Stderr(stderr=True, highlight=False, markup=False)

LONGEST_MESSAGE = 500  # characters of a message about the command line

# click's class, or that of typer's own copy of click.
_UsageError = cast(type[Exception], typer.BadParameter.__base__)

Model = Annotated[
    str,
    typer.Argument(
        help="Hub id, local directory, .gguf file, smollm2-135m or gemma3-270m.", metavar="MODEL"
    ),
]

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

PushToHub = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Upload the result to this repository of the hub, with the login of `hf auth login`.",
    ),
]

Recipe = Annotated[
    Path | None, typer.Option(help="YAML file with any of these options; flags override it.")
]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Handle the options before the command."""
    if debug:
        log.setLevel(logging.DEBUG)
    if version:
        _print(slimgpt.__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        raise ConfigError("a command is missing", hint="`slimgpt --help` lists the commands")


@app.command()
@options_of(PruneConfig)
def prune(
    model: Model,
    output: Annotated[
        Path | None,
        typer.Option(help="Directory for the pruned model; with --recover, for the recovered one."),
    ] = None,
    recover: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS|TIME",
            help="Then distil the pruned model, e.g. on 1M tokens or for 30min or 1h, with the "
            "calibration's texts. The pruned one stays in OUTPUT-pruned. For other options of the "
            "recovery, leave this out and run `slimgpt recover`.",
        ),
    ] = None,
    recipe: Recipe = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the planned widths; load no weights.")
    ] = False,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Discard an interrupted run in OUTPUT (and OUTPUT-pruned)."),
    ] = False,
    push_to_hub: PushToHub = None,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Prune MODEL into a smaller dense model."""
    values = _given(recipe, options)
    _check_destination(push_to_hub)
    recovery = None
    if recover is not None:
        recovery = recovery_options(model, PruneConfig.create(**values), recover)
    if dry_run:
        if push_to_hub:
            raise ConfigError("--dry-run leaves nothing to push", hint="leave out --push-to-hub")
        _show_plan(model, values, recovery, as_json)
        return
    if output is None:
        raise ConfigError("--output is missing", hint="name a directory for the result")
    recovered = None
    with _resumable(), progress_bar(stderr) as progress:
        if recovery:
            result, recovered = prune_and_recover(
                model, output, values, recovery, restart=restart, progress=progress
            )
        else:
            result = slimgpt.prune(model, output, restart=restart, progress=progress, **values)
    report, config = result.report, result.report["config"]
    is_checked = config["target_latency"] is not None and config["latency_table"] is None
    if not as_json:
        seconds = sum(report["seconds"].values())
        peak = size(report["peak_memory_bytes"] or 0)
        where = f"the pruned model is in {result.output}"
        _print(*ratio_lines(result.plan), f"{seconds:.0f} s, peak memory {peak}", where)
        if recovered:
            _print(*recovery_lines(recovered, str(result.output)))
    check = check_latency(model, result) if is_checked and _is_first_process() else None
    if as_json:
        measured = {"latency": check} if check else {}
        if recovered:
            measured |= {"pruned": str(result.output), "recovery": recovered.report}
        _emit({"output": str(output), **report, **measured}, (), as_json=True)
    elif check:
        _print(*bench_lines(check.bench), check.line)
    _push(push_to_hub, output)


def _show_plan(
    model: str, values: dict[str, Any], recovery: dict[str, Any] | None, as_json: bool
) -> None:
    if recovery is not None:
        from slimgpt.recovery.recover import check_recovery

        check_recovery(model, RecoverConfig.create(**recovery))
    planned = slimgpt.plan(model, **values)
    lines = plan_table(planned)
    if planned.dropped:
        lines += ("the run chooses the layers to drop; this plan assumes the last ones",)
    if planned.is_measured:
        lines += ("the run may move heads and channels between blocks; the totals do not change",)
    if recovery is None:
        _emit(planned, lines, as_json)
    else:
        _emit(asdict(planned) | {"recovery": recovery}, (*lines, recovery_plan(recovery)), as_json)


@app.command()
@options_of(PruneConfig)
def family(
    model: Model,
    output: Annotated[Path, typer.Option(help="Directory for the pruned models, or the curve.")],
    ratios: Annotated[
        str, typer.Option(help="Ratios of the sizes, e.g. 0.2,0.33,0.5.", metavar="A,B,…")
    ] = "0.2,0.33,0.5",
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Write no model: only measure each size's divergence.")
    ] = False,
    recipe: Recipe = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard an interrupted run in OUTPUT.")
    ] = False,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Prune MODEL to several sizes, each a part of the next larger one."""
    values: dict[str, Any] = {"restart": restart, **_given(recipe, options)}
    asked = _ratios(ratios)
    with _resumable(), progress_bar(stderr) as progress:
        if sweep:
            points = slimgpt.sweep(model, output, asked, progress=progress, **values)
            _emit(points, sweep_lines(points, output), as_json)
            return
        results = slimgpt.prune_family(model, output, asked, progress=progress, **values)
    summary = [{"output": str(result.output), **sizes(result.plan)} for result in results]
    lines = [f"{result.output}: {result.plan.params_after:,} parameters" for result in results]
    _emit(summary, lines, as_json)


def _ratios(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--ratios {text!r} are not numbers", hint="give them as in --ratios 0.2,0.33,0.5"
        ) from None


@app.command()
@options_of(LatencyConfig)
def latency(
    model: Model,
    output: Annotated[Path, typer.Option(help="File for the table, e.g. laptop.json.")],
    as_json: Json = False,
    **options: Any,
) -> None:
    """Measure the latency of MODEL's layers at several widths, for --latency-table."""
    table = slimgpt.latency(model, output, **_given(None, options))
    line = f"the {table.setting.described} on {table.setting.machine} is in {output}"
    _emit(table.model_dump(), (line,), as_json)


@app.command("eval")
@options_of(EvalConfig)
def evaluate(model: Model, recipe: Recipe = None, as_json: Json = False, **options: Any) -> None:
    """Measure the perplexity of MODEL, dense or pruned, and run benchmark tasks on it."""

    def show(results: slimgpt.Evaluation) -> None:
        lines = (
            *(perplexity_lines(results.perplexity) if results.perplexity else ()),
            *(task_lines(results.tasks) if results.tasks else ()),
        )
        if lines:
            _emit(results, lines, as_json)

    with _showing_what_was_measured(show):
        results = slimgpt.evaluate(model, **_given(recipe, options))
    show(results)


@app.command()
@options_of(RecoverConfig)
def recover(
    model: Model,
    output: Annotated[Path, typer.Option(help="Directory for the recovered model.")],
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard an interrupted run in OUTPUT.")
    ] = False,
    recipe: Recipe = None,
    push_to_hub: PushToHub = None,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Fine-tune a pruned MODEL to recover quality."""
    values = _given(recipe, options)
    _check_destination(push_to_hub)
    with _resumable(), progress_bar(stderr) as progress:
        result = slimgpt.recover(model, output, restart=restart, progress=progress, **values)
    report = {"output": str(result.output), **result.report}
    _emit(report, recovery_lines(result, "MODEL"), as_json)
    _push(push_to_hub, result.output)


@app.command("inspect")
def inspect_model(
    model: Model,
    check: Annotated[
        bool,
        typer.Option("--check", help="Check that the description of its family holds for MODEL."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show the widths and parameters of MODEL, dense or pruned."""
    if check:
        found = slimgpt.check(model)
        _emit(found, check_lines(found), as_json)
        return
    summary = slimgpt.inspect(model)
    table = rich_table(blocks_table(summary))
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in summary.params.items())
    header = f"{summary.model}: {summary.model_type}, head_dim {summary.head_dim}"
    lines = [header, table, f"parameters: {kinds}"]
    if summary.dropped:
        lines.append(f"dropped layers of the base: {', '.join(map(str, summary.dropped))}")
    _emit(summary, (*lines, *pruning_table(summary)), as_json)


@app.command()
def families(as_json: Json = False) -> None:
    """List the model types that can be pruned, and what can be pruned of them."""
    from slimgpt.exporting.gguf_graphs import graphs_by_model_type
    from slimgpt.models.family import (
        NEWEST_ONLY,
        TESTED_VERSIONS,
        WRAPPER_TYPES,
        load_families,
        load_unsupported,
    )

    graphs, rows = graphs_by_model_type(), []
    table, reasons = Table("model type", "pruned units", "GGUF graph", "tested with"), {}
    for model_type, family in sorted(load_families().items()):
        row = {
            "model_type": model_type,
            "units": ", ".join(family.units),
            "gguf": graphs.get(model_type, ""),
            "tested": family.real_weights.get(model_type, "random weights"),
        }
        rows.append(row)
        table.add_row(*row.values())
        for reason in family.reasons:
            reasons.setdefault(reason, []).append(model_type)
    rebuilt = [t for t, family in sorted(load_families().items()) if family.rebuilds_attention]
    lines = [
        f"all tested with random weights on transformers {' and '.join(TESTED_VERSIONS)}; "
        f"{', '.join(NEWEST_ONLY)} on the newer only",
        *(f"{', '.join(types)} keep their {reason}" for reason, types in reasons.items()),
        f"the attention of {', '.join(rebuilt)} stays whole with --uniform: their stock classes "
        "take the size of a head from the hidden size",
        f"the text model inside {', '.join(WRAPPER_TYPES)} is pruned, all else is copied",
        "not supported:",
        *(f"  {', '.join(types)}: {reason}" for reason, types in load_unsupported().items()),
    ]
    _emit(rows, (table, *lines), as_json)


@app.command()
@options_of(ExportConfig)
def export(
    model: Model,
    output: Annotated[
        Path | None, typer.Option(help="Output file. Default: in the directory of the model.")
    ] = None,
    push_to_hub: PushToHub = None,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Write MODEL as a GGUF file for llama.cpp."""
    _check_destination(push_to_hub)
    result = slimgpt.export(model, output, **_given(None, options))
    types = ", ".join(f"{number} {name}" for name, number in result.types.items())
    lines = (
        f"{result.output}: {result.num_bytes / 2**20:,.1f} MiB, llama.cpp graph {result.arch}",
        f"types of the tensors: {types}",
    )
    _emit({**asdict(result), "output": str(result.output)}, lines, as_json)
    _push(push_to_hub, result.output, model)


@app.command()
@options_of(BenchConfig)
def bench(model: Model, recipe: Recipe = None, as_json: Json = False, **options: Any) -> None:
    """Measure speed and memory of MODEL in an engine, beside its base."""

    def show(result: slimgpt.BenchResult) -> None:
        _emit(result, bench_lines(result), as_json)

    with _showing_what_was_measured(show):
        result = slimgpt.bench(model, **_given(recipe, options))
    show(result)


@app.command()
@options_of(ReportConfig)
def report(
    output: Annotated[Path, typer.Argument(help="Directory of a pruned model.", metavar="OUT")],
    as_json: Json = False,
    **options: Any,
) -> None:
    """Write all results for the model in OUT to one page, OUT/report.html."""
    page = slimgpt.report(output, **_given(None, options))
    _emit({"page": str(page)}, (f"the report is {page}",), as_json)


@app.command("run")
def run_recipe(
    recipe: Annotated[
        Path, typer.Argument(help="YAML file with a grid, or table1, figure2, …", metavar="RECIPE")
    ],
    output: Annotated[Path, typer.Option(help="Directory for the results.")],
    small: Annotated[bool, typer.Option("--small", help="Run the small variant.")] = False,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder that replaces {data} in the recipe.")
    ] = None,
    keep_models: Annotated[
        bool, typer.Option(help="Keep the pruned models after the run.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run the experiments of RECIPE and write its table or figure."""
    options: dict[str, Any] = {"small": small, "data_dir": data_dir, "keep_models": keep_models}
    with _resumable():
        result = slimgpt.run_recipe(recipe, output, **options)
    if as_json:
        _emit(result.report, (), as_json=True)
    else:
        _print(result.markdown, f"the results are in {result.output}")
    if result.errors:
        raise SlimGPTError(
            f"{len(result.errors)} of {len(result.report['cells'])} cells failed: "
            + "; ".join(dict.fromkeys(result.errors)),
            hint="the same command tries them again; finished cells are not repeated",
        )


def main() -> None:
    """Run the command line; report an error as one line, a hint and an exit code."""
    _open_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # for consoles without Unicode
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)  # between dependencies
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    is_main = _is_first_process()  # under torchrun, only one process reports
    if not is_main:
        sys.stdout = io.StringIO()
    log.setLevel(logging.INFO if is_main else logging.WARNING)
    log.handlers = [_StderrHandler()]
    log.propagate = False
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # sent by job schedulers
    try:
        code = _run()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for number, stream in ((1, sys.stdout), (2, sys.stderr)):
            try:
                stream.flush()
            except OSError:
                _give_up(number)
    sys.exit(code)


def _run() -> int:
    """Run a command and return its exit code."""
    try:
        _check_arguments(sys.argv[1:])
        return app(standalone_mode=False) or 0
    except _UsageError as err:
        return _report_usage(err)
    except BrokenPipeError:  # the reader has closed the pipe
        return 1
    except Exception as err:
        if log.isEnabledFor(logging.DEBUG):
            stderr.tell(traceback.format_exc())
        known = err if isinstance(err, SlimGPTError) else resource_error(err)
        _report(
            known
            or SlimGPTError(
                f"internal error: {type(err).__name__}: {err}",
                hint="this is a fault of slimgpt; `slimgpt --debug …` shows where",
            )
        )
        return known.exit_code if known else 1


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _report(err: SlimGPTError) -> None:
    stderr.tell(f"error: {err}", style="red")
    if err.hint:
        stderr.tell(f"\nhint: {err.hint}")


def _report_usage(err: Any) -> int:
    """Report a usage error in the same form as all other errors."""
    command = err.ctx.command_path if err.ctx else "slimgpt"
    if message := err.format_message():  # empty if help was requested
        text = message[0].lower() + message[1:].rstrip(".")
        _report(ConfigError(_cut(text), hint=f"`{command} --help` explains the options"))
    return err.exit_code


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]}…"


def _check_arguments(arguments: Sequence[str]) -> None:
    """Check that all arguments can be file names and can be printed."""
    for argument in arguments:
        try:
            check_text(argument)
        except ValueError as err:
            raise ConfigError(
                f"the argument {_cut(repr(argument))} cannot be used: {err}",
                hint="give another name to the file; names are UTF-8",
            ) from None


def _open_standard_streams() -> None:
    """Open closed standard streams on the null device.

    Otherwise the next opened file would get the descriptor of a standard stream, and its output.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def _give_up(number: int) -> None:
    """Redirect a standard stream that cannot be written to the null device."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)


@contextmanager
def _showing_what_was_measured(show: Callable[[Any], None]) -> Iterator[None]:
    """If an error occurs, first show what was measured before it."""
    try:
        yield
    except BaseException as err:
        if measured := getattr(err, "measured", None):
            show(measured)
        raise


@contextmanager
def _resumable() -> Iterator[None]:
    """After Ctrl-C, show the command that resumes the run."""
    try:
        yield
    except KeyboardInterrupt:
        arguments = [argument for argument in sys.argv[1:] if argument != "--restart"]
        launcher = "torchrun … -m slimgpt" if "TORCHELASTIC_RUN_ID" in os.environ else "slimgpt"
        command = f"{launcher} {shlex.join(arguments)}"
        stderr.tell(f"interrupted; resume with:\n  {command}")
        raise typer.Exit(130) from None


class _StderrHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        warning = record.levelno >= logging.WARNING
        text = f"warning: {record.getMessage()}" if warning else record.getMessage()
        stderr.tell(text, style="yellow" if warning else None)


def _given(recipe: Path | None, options: dict[str, Any]) -> dict[str, Any]:
    """Merge the options of the recipe and the flags; flags take precedence."""
    flags = {name: value for name, value in options.items() if value is not None}
    values = load_recipe(recipe) if recipe else {}
    if arguments := values.keys() & {"model", "output", "restart", "progress"}:
        names = ", ".join(sorted(arguments))
        raise ConfigError(
            f"the recipe {recipe} sets {names}, which belongs on the command line",
            hint="a recipe with a grid is for `slimgpt run`",
        )
    return values | flags


def _check_destination(name: str | None) -> None:
    """Before any work, check that its result can be uploaded."""
    if name is not None:
        from slimgpt.checkpoint.hub import check_destination

        check_destination(name)


def _push(name: str | None, output: Path, exported_from: str | None = None) -> None:
    if name is not None and _is_first_process():
        slimgpt.push(output, name, exported_from)


def _emit(result: Any, renderables: Iterable[Any], as_json: bool) -> None:
    if as_json:
        _print(json.dumps(result, indent=1, default=asdict))
    else:
        _print(*renderables)


def _print(*renderables: Any) -> None:
    """Print results.

    Raises
    ------
    ResourceError
        If standard output cannot be written.
    """
    try:
        for renderable in renderables:
            stdout.print(renderable, soft_wrap=isinstance(renderable, str))
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as err:
        _give_up(1)
        raise ResourceError(
            f"the results cannot be written to standard output: {err.strerror}",
            hint="the files that the command has written are complete",
        ) from None
