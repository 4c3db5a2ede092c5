"""Write docs/options.md: every option of the command line, from the command line itself.

Usage: python tools/options_page.py > docs/options.md
"""

from typing import Any

from typer.main import get_command

from slimgpt.cli.app import app
from slimgpt.config import PRESETS

# Where a page explains more.
MORE = {
    "attention_share": "method.md#layer-ratios",
    "calibration": "evaluation.md#data-sets",
    "correction": "method.md#correction",
    "data": "evaluation.md#data-sets",
    "data_dir": "evaluation.md#local-data-of-tasks",
    "drop_layers": "method.md#whole-layers",
    "engine": "bench.md",
    "expert_units": "mixtures.md",
    "latency_phase": "targets.md#latency",
    "latency_table": "targets.md#latency",
    "minutes": "recovery.md#in-a-given-time",
    "multiple_of": "quantise.md",
    "query_heads": "method.md#heads",
    "recover": "recovery.md#in-one-command",
    "refit_epochs": "method.md#refit",
    "target_kv_cache": "targets.md#sizes",
    "target_latency": "targets.md#latency",
    "target_params": "targets.md#sizes",
    "target_size": "targets.md#sizes",
    "target_type": "targets.md#sizes",
    "tasks": "evaluation.md",
    "tensor_parallel": "targets.md#tensor-parallelism",
    "widths": "method.md#measured-widths",
}

HEAD = """# Options

All commands and their options, as `slimgpt COMMAND --help` shows them. The functions of the same
names take the same options: `--min-ratio 0.1` is `min_ratio=0.1`. A file for `--recipe` has them
too: `min_ratio: 0.1`.

This page is written by `tools/options_page.py`.
"""


def page() -> str:
    """Write the page as Markdown."""
    commands: Any = get_command(app)
    sections = (section(name, command) for name, command in commands.commands.items())
    return "\n".join([HEAD, *sections, presets()])


def section(name: str, command: Any) -> str:
    """Write the table of one command."""
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    usage = " ".join(["slimgpt", name, *(argument.metavar for argument in arguments)])
    rows = [row(option) for option in command.params if option.param_type_name == "option"]
    explained = "".join(f"`{a.metavar}`: {cell(a.help)}\n\n" for a in arguments if a.help)
    table = "\n".join(["| Option | Default | |", "|---|---|---|", *rows]) if rows else ""
    return f"## `{usage}`\n\n{command.help}\n\n{explained}{table}\n"


def row(option: Any) -> str:
    """Write the row of one option."""
    flags = " ".join(f"`{flag}`" for flag in (*option.opts, *option.secondary_opts))
    text = cell(option.help)
    if option.name in MORE:
        text += f" [More]({MORE[option.name]})"
    shown = option.show_default
    default = cell(shown) if isinstance(shown, str) else ("required" if option.required else "")
    return f"| {flags} | {default} | {text} |"


def presets() -> str:
    """Write what each preset stands for."""
    lines = [
        f"| `{name}` | {', '.join(f'`{option}: {value}`' for option, value in values.items())} |"
        for name, values in PRESETS.items()
        if values
    ]
    rows = "\n".join(["| `--preset` | Defaults that it changes |", "|---|---|", *lines])
    return f"## Presets of `slimgpt prune`\n\n{rows}\n"


def cell(text: str) -> str:
    """Escape text for a cell."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    print(page(), end="")
