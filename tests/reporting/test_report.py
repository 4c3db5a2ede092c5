"""slimgpt report: what is on the page, what is not, and how a browser shows it."""

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
import yaml
from conftest import TEXT, Run
from families import tiny_config
from transformers import AutoModelForCausalLM

import slimgpt
from slimgpt.benchmarking.results import BenchResult, Cost, Setting, Speed, Spread
from slimgpt.checkpoint.card import write_card
from slimgpt.config import PruneConfig, RecoverConfig
from slimgpt.errors import ConfigError, MissingDependencyError, RunStateError
from slimgpt.evaluation.evaluate import TaskResult
from slimgpt.presentation.figures import COLORS
from slimgpt.reporting import report

Checkpoint = Callable[[str], Path]
ALWAYS = ["Removed parameters", "Errors of the layers", "Reproduction"]


def edit(file: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def sections(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


@pytest.fixture
def slim(slim_checkpoint: Checkpoint, tmp_path: Path) -> Path:
    return shutil.copytree(slim_checkpoint("llama"), tmp_path / "slim")


@pytest.fixture(scope="module")
def measured(
    slim_checkpoint: Checkpoint,
    tiny_checkpoint: Checkpoint,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A pruned model with results of every kind; only the perplexities are real."""
    slim = shutil.copytree(slim_checkpoint("llama"), tmp_path_factory.mktemp("report") / "slim")
    options: dict[str, Any] = {"data": "pydocs", "seqlen": (16, 32), "max_tokens": 640}
    slimgpt.evaluate(str(slim), against=str(tiny_checkpoint("llama")), **options)
    edit(
        slim / "eval" / "perplexity.json",
        lambda results: [r.update(layer_errors=[0.01, 0.02, 0.04, 0.08]) for r in results],
    )
    task = TaskResult(
        "piqa", "acc", 0.512, 0.011, True, 1838, 0, "piqa_valid.jsonl", "0.4.13, task version 1.0",
        model="slim", base="llama", dtype="float32", base_value=0.641, base_stderr=0.012,
    )  # fmt: skip
    (slim / "eval" / "tasks.json").write_text(json.dumps([asdict(task)]))
    around = Spread(40.0, 38.0, 42.0)
    speed, costs = Speed(around, around, around, around), [2**26, 2**25, 2**24, 2**30]
    bench = BenchResult(
        engine="transformers", device="cpu", versions={}, threads=1, new_tokens=8, repeats=5,
        costs=tuple(Cost(name, "float32", *costs) for name in ("slim", "llama")),
        settings=(Setting(2, 128, speed, speed, Spread(1.6, 1.5, 1.7), Spread(1.3, 1.2, 1.4)),),
        ideal_prefill=1.9, ideal_decode=1.7,
    )  # fmt: skip
    (slim / "eval" / "speed.json").write_text(json.dumps([asdict(bench)]))
    config = RecoverConfig.create(method="distill", max_steps=40, data="alpaca.json")
    recovery = {
        "model": "slim", "teacher": "owner/teacher", "data": "alpaca.json", "held_out": "wikitext2",
        "config": config.model_dump(mode="json", exclude={"teacher"}),
        "steps": 40, "seconds": 12.5, "peak_memory_bytes": 2**31,
        "train_loss": [[step, 3 - step / 40] for step in range(1, 41)],
        "held_out_perplexity": [[0, 91.0], [20, 70.5], [40, 61.25]],
        "held_out_kl": [[0, 1.5], [20, 0.75], [40, 0.8]], "tokens": 40_960, "best_step": 20,
        "num_examples": 100, "preparation_seconds": 1234.5,
        "budget": {"minutes": 21.5, "tokens": 51_200, "measuring": 3.0, "seconds": 1250.0},
    }  # fmt: skip
    (slim / "recovery_report.json").write_text(json.dumps(recovery))
    return slim


def test_page_of_a_model_with_everything(
    run: Run, measured: Path, tiny_checkpoint: Checkpoint
) -> None:
    base = tiny_checkpoint("llama")
    code, out, err = run("report", measured, "--against", base, "--new-tokens", "4")
    assert code == 0, err
    assert str(measured / "report.html") in out
    page = (measured / "report.html").read_text()
    assert sections(page) == [
        *ALWAYS[:2], "Quality", "Speed and memory", "Recovery", "Samples", ALWAYS[2],
    ]  # fmt: skip
    assert page.count('<div role="img" aria-label="') == page.count("<figcaption>") == 9
    assert page.count("<svg") == 18  # a wide and a narrow one of each
    pruning = json.loads((measured / "pruning_report.json").read_text())
    for number in ("params_before", "params_after"):
        assert f"{pruning[number]:,}" in page
    for ratio in ("target_ratio", "block_ratio", "total_ratio"):
        assert f"{pruning[ratio]:.2%}" in page
    for result in json.loads((measured / "eval" / "perplexity.json").read_text()):
        assert f"<td>{result['base_perplexity']:.2f}</td>" in page
        assert f"<td>{result['perplexity']:.2f}</td>" in page
    assert "0.6410 <small>± 0.0120" in page
    assert "0.5120 <small>± 0.0110" in page
    assert "<b>1.30×</b>" in page
    assert "1.6 <small>1.5–1.7</small></td><td>1.9</td>" in page
    assert "<td>64</td><td>32</td><td>1,024</td>" in page
    assert "91.00 at first, 61.25 at last" in page
    assert "1.50 at first, 0.80 at last" in page
    assert "The weights are those of step 20" in page
    assert "alpaca.json (40,960 tokens), method distill" in page
    assert "21.5 minutes were asked for: 51,200 tokens" in page
    assert "training took 20.8\nminutes" in page
    samples, seconds = pruning["calibration"], pruning["seconds"]
    phases = {
        "pruning and refit": (samples["nsamples"] * samples["seqlen"], seconds["prune"]),
        "recovery: measuring the speed": ("", 3.0),
        "recovery: text and predictions": (51_200, 1234.5),
        "recovery: training": (40_960, 12.5),
        "all": ("", sum(seconds.values()) + 1250),
    }
    for phase, (tokens, value) in phases.items():
        read = f"{tokens:,}" if tokens else ""
        assert re.search(rf"{phase}.*</th><td>{read}</td><td>{value:,.1f}</td>", page), phase
    kept = 0
    for block, shape in zip(pruning["blocks"], pruning["shapes"], strict=True):
        attention, heads = block["sublayers"][0], shape["sublayers"][0]["parts"]
        kept += len(attention.get("parts", ())) or heads * len(attention["keep"])
    assert f"{kept} of 32 are kept" in page
    assert all(prompt in page for prompt in report.PROMPTS)
    assert "--teacher owner/teacher" in page
    assert all(version in page for version in pruning["versions"].values())
    assert str(measured.parent) not in page
    assert str(base.parent) not in page


def test_sections_without_data_are_left_out(slim: Path) -> None:
    assert sections(slimgpt.report(slim).read_text()) == ALWAYS


def test_page_of_a_model_without_a_sensitivity_pass(slim: Path) -> None:
    edit(slim / "pruning_report.json", lambda report: report.pop("sensitivity", None))
    page = slimgpt.report(slim).read_text()
    assert sections(page) == ALWAYS
    assert "by the schedule" not in page


def test_methods_for_comparison_are_named(slim: Path) -> None:
    edit(slim / "pruning_report.json", lambda report: report["config"].update(method="wanda_sp"))
    page = slimgpt.report(slim).read_text()
    assert "pruned by 45% with wanda_sp</h1>" in page
    assert "The baseline method wanda_sp chose the attention heads" in page
    assert "remaining weights were updated" not in page
    assert "--method wanda_sp" in page


@pytest.fixture
def mixture(tokenizer: Any, tmp_path: Path) -> Callable[..., str]:
    """Prunes a tiny model with experts, and returns the page."""

    def make(model_type: str, **options: Any) -> str:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(model_type))
        for directory in (model, tokenizer):
            directory.save_pretrained(tmp_path / "dense")
        slim = tmp_path / "slim"
        values = {"calibration": TEXT, "nsamples": 4, "seqlen": 32} | options
        slimgpt.prune(str(tmp_path / "dense"), slim, **values)
        return slimgpt.report(slim).read_text()

    return make


def cells(page: str, title: str) -> list[list[str]]:
    """Rows of the table with this title, without their markup."""
    table = page.partition(f'aria-label="{title}"')[2].partition("</tbody>")[0]
    rows = table.partition("<tbody>")[2].split("</tr>")[:-1]
    return [
        [" ".join(re.sub("<.*?>", "", cell).split()) for cell in re.split("</t[hd]>", row)[:-1]]
        for row in rows
    ]


def test_page_of_a_mixture_shows_its_experts(mixture: Callable[..., str], tmp_path: Path) -> None:
    page = mixture("qwen3_moe", layer_ratios=(0.5, 0.3, 0.6), nsamples=2, expert_units="both")
    blocks = json.loads((tmp_path / "slim" / "pruning_report.json").read_text())["blocks"]
    decided = [block["sublayers"][1] for block in blocks]
    few = [len(s["routing"].get("few_tokens", ())) for s in (decided[0], decided[2])]
    assert cells(page, "Experts of each block") == [
        [
            str(block),
            f"{len(sublayer['keep'])} of 6",
            f"{len(sublayer['parts']) // len(sublayer['keep'])} of 16",
            f"{sublayer['routing']['rerouted']:.1%}",
            f"{sublayer['routing']['load_shift']:.1%}",
            str(number),
        ]
        for block, sublayer, number in zip((0, 2), (decided[0], decided[2]), few, strict=True)
    ]
    assert min(few) > 0
    assert min(s["routing"]["rerouted"] for s in (decided[0], decided[2])) > 0
    removed = "attention heads, FFN channels, channels of experts and experts"
    assert f"Whole {removed} were removed" in page
    assert "dense model" not in page
    assert "<h3>Channels of each block</h3>" in page
    first = len(decided[0]["parts"])
    assert f"Bars of the channels of each block (FFN or experts): {first} are kept" in page
    assert "relative error of attention and FFN or experts" in page


def test_page_of_a_mixture_that_loses_whole_experts_only(mixture: Callable[..., str]) -> None:
    page = mixture("deepseek_v3", method="random", ratio=0.3, min_ratio=0.3)
    rows = cells(page, "Experts of each block")
    assert [row[:2] for row in rows] == [["1", "12 of 16"], ["2", "10 of 16"]]
    assert all(len(row) == 5 for row in rows)  # no channels
    assert "The baseline method random chose the FFN channels and experts that" in page
    assert "Heads of attention" not in page  # they cannot be pruned


def test_blocks_that_keep_all_experts_have_no_routing(mixture: Callable[..., str]) -> None:
    options = {"method": "reap", "expert_units": "experts", "layer_ratios": (0, 0.2)}
    rows = cells(mixture("olmoe", **options), "Experts of each block")
    assert rows[0][1:] == ["6 of 6", "32 of 32", "", "", ""]
    assert rows[1][1:3] == ["5 of 6", "32 of 32"]
    assert rows[1][3] != ""


def test_page_of_a_dense_model_has_no_experts(slim: Path) -> None:
    page = slimgpt.report(slim).read_text()
    assert "Experts of each block" not in page
    assert "A smaller dense model made" in page
    assert "Whole attention heads and FFN channels were removed" in page
    assert "<h3>FFN channels of each block</h3>" in page


def test_samples_are_greedy_and_of_the_prompts_given(
    slim: Path, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("A first text\n\nA second <b>text</b>\n")
    options: dict[str, Any] = {"prompts": tmp_path / "prompts.txt", "new_tokens": 8}
    page = slimgpt.report(slim, against=str(tiny_checkpoint("llama")), **options).read_text()
    assert "<h3>A first text</h3>" in page
    assert "<h3>A second &lt;b&gt;text&lt;/b&gt;</h3>" in page
    base, ours = re.findall(r"<h4>(?:base|this model)</h4><p>(.*?)</p>", page, re.S)[:2]
    assert base != ours
    same = slimgpt.report(slim, against=str(slim), **options).read_text()
    assert re.findall(r"<h4>(?:base|this model)</h4><p>(.*?)</p>", same, re.S)[:2] == [ours, ours]


def test_nothing_in_the_data_is_markup(slim: Path) -> None:
    attack = '"><script>alert(1)</script>$x_1$'
    edit(slim / "pruning_report.json", lambda report: report.update(base_model=attack))
    result = {
        "model": "slim", "data_sha256": "0",
        "base": attack, "dtype": "float32", "data": "text", "seqlen": 8, "tokens": 7,
        "perplexity": 9.0, "base_perplexity": None, "kl_divergence": None,
        "layer_errors": [0.1] * 4,
    }  # fmt: skip
    (slim / "eval").mkdir()
    (slim / "eval" / "perplexity.json").write_text(json.dumps([result]))
    page = slimgpt.report(slim).read_text()
    assert "in float32" not in page  # legends are short where nothing is to be told apart
    results = [result, result | {"dtype": "bfloat16"}]
    (slim / "eval" / "perplexity.json").write_text(json.dumps(results))
    page = slimgpt.report(slim).read_text()
    assert "<script" not in page
    legend = "&lt;script&gt;alert(1)&lt;/script&gt;$x_1$ in float32"
    assert page.count(legend) == 2  # in two widths


def test_nothing_in_a_name_is_markup_in_the_card(slim: Path) -> None:
    attack = "a\nbase_model: [x]\n# b | `c` <img src=x> <!-- end of tasks --> [l](u)"
    edit(slim / "pruning_report.json", lambda report: report.update(base_model=attack))
    write_card(slim)
    card = (slim / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front == {
        "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["slimgpt", "pruned"],
    }  # fmt: skip
    assert "<img" not in card
    assert card.count("\n# ") == 1
    assert card.count("<!-- end of tasks -->") == 1
    assert "# a base_model: \\[x\\] # b \\| \\`c\\` &lt;img src=x&gt;" in card
    edit(slim / "pruning_report.json", lambda report: report.update(base_model="owner/yes"))
    write_card(slim)
    card = (slim / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "owner/yes"


def test_links_lead_nowhere(slim: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    (slim / "report.html").symlink_to(tmp_path / "mine.txt")
    slimgpt.report(slim)
    assert not (slim / "report.html").is_symlink()
    (slim / ".report.html.lock").symlink_to(tmp_path / "mine.txt")
    with pytest.raises(RunStateError, match="is a link"):
        slimgpt.report(slim)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_same_inputs_give_the_same_bytes(measured: Path) -> None:
    first = slimgpt.report(measured).read_bytes()
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        assert slimgpt.report(measured).read_bytes() == first


def test_page_needs_nothing_but_itself(measured: Path) -> None:
    page = slimgpt.report(measured).read_text()
    assert set(re.findall(r'(?:src|(?<!:)href)="([^#"]*)', page)) == {
        "data:,",
        "https://arxiv.org/abs/2412.18110",
    }
    assert "@import" not in page
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|xlink:href=")#([^")]*)', page)) == set(ids)
    assert set(re.findall(r"url\((.)", page)) == {"#"}
    drawings = re.findall(r"<svg.*?</svg>", page, re.S)
    assert not any(color in svg for svg in drawings for color in COLORS.values())
    colors = set(re.findall(r"var\((--[\w-]+)\)", page))
    light, dark = (set(re.findall(r"(--[\w-]+):", part)) for part in page.split("@media")[:2])
    assert colors <= light == dark


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "paper", "ratio": 0.3},
        {"uniform": True, "ratio": 0.5},
        {"schedule": "linear_decrease", "min_ratio": 0.1, "multiple_of": 4},
        {"layer_ratios": (0.5, 0.25), "method": "flap"},
    ],
)
def test_command_makes_the_same_plan(
    options: dict[str, Any], run: Run, tiny_checkpoint: Checkpoint
) -> None:
    model = str(tiny_checkpoint("llama"))
    config = PruneConfig.create(**options)
    command = report._command("prune", model, config.model_dump(mode="json"), PruneConfig)
    words = shlex.split(command.replace("\\\n", ""))
    assert words[0] == "slimgpt"
    code, out, err = run(*words[1:], "--dry-run", "--json")
    assert code == 0, err
    assert json.loads(out) == json.loads(json.dumps(asdict(slimgpt.plan(model, **options))))


def remove_report(directory: Path) -> None:
    (directory / "pruning_report.json").unlink()


def cut_report(directory: Path) -> None:
    report = (directory / "pruning_report.json").read_text()
    (directory / "pruning_report.json").write_text(report[:200])


def cut_speeds(directory: Path) -> None:
    (directory / "eval").mkdir()
    (directory / "eval" / "speed.json").write_text("[{")


def old_perplexity(directory: Path) -> None:
    (directory / "eval").mkdir()
    result = {"data": "text", "seqlen": 8, "tokens": 7, "perplexity": 9.0, "base_perplexity": None}
    (directory / "eval" / "perplexity.json").write_text(json.dumps([result]))


@pytest.mark.parametrize(
    ("breakage", "arguments", "message", "hint"),
    [
        (old_perplexity, (), "not as this version writes it", "measure again"),
        (remove_report, (), "has no pruning_report.json", "`slimgpt prune` or `slimgpt recover`"),
        (cut_report, (), "cannot read", "the file is broken"),
        (cut_speeds, (), "speed.json", "the file is broken"),
        (None, ("--against", "nothing"), "no model 'nothing'", ""),
        (None, ("--prompts", "p.txt", "--new-tokens", "4"), "nothing is generated: new_tokens", ""),
        (None, ("--against", "BASE", "--prompts", "none.txt"), "cannot read --prompts", ""),
        (None, ("--against", "BASE", "--prompts", "empty.txt"), "has no prompt", "on each line"),
        (None, ("--against", "BASE", "--new-tokens", "128"), "exceed the context", "--new-tokens"),
    ],
)
def test_refusals(
    breakage: Callable[[Path], None] | None,
    arguments: tuple[str, ...],
    message: str,
    hint: str,
    run: Run,
    slim: Path,
    tiny_checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n \n")
    if breakage:
        breakage(slim)
    words = [str(tiny_checkpoint("llama")) if word == "BASE" else word for word in arguments]
    code, out, err = run("report", slim, *words)
    assert code == 2
    assert message in err
    assert hint in err
    assert not out
    assert not (slim / "report.html").exists()


def test_directory_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none has no pruning_report\.json"):
        slimgpt.report(tmp_path / "none")


def test_missing_packages(slim: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="'jinja2'") as error:
        slimgpt.report(slim)
    assert "slimgpt[report]" in str(error.value.hint)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium that keeps a log of its console and of its requests."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium or no chromedriver in PATH")
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
        "disable-background-networking", "disable-component-update", "disable-sync",
        "disable-dev-shm-usage", f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "*")  # the driver is on this machine
        chrome = Chrome(options, Service(driver))
        yield chrome
        chrome.quit()


def luminance(color: str) -> float:
    """Relative luminance of a CSS colour, WCAG 2.1."""
    channels = [int(value) / 255 for value in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(first: str, second: str) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_in_a_browser(
    width: int, scheme: str, browser: Any, measured: Path, tiny_checkpoint: Checkpoint
) -> None:
    base = str(tiny_checkpoint("llama"))
    url = slimgpt.report(measured, against=base, new_tokens=2).as_uri()
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width == 360}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get_log("performance")  # drops what came before
    browser.get(url)
    browser.execute_script("document.querySelector('details').open = true")
    seen = browser.execute_script(
        """
        const fill = element => getComputedStyle(element).fill;
        const shown = [...document.querySelectorAll('svg')].filter(s => s.getClientRects().length);
        return {
            width: document.documentElement.scrollWidth,
            page: getComputedStyle(document.body).backgroundColor,
            ink: getComputedStyle(document.body).color,
            muted: getComputedStyle(document.querySelector('figcaption')).color,
            labels: shown.map(svg => fill(svg.querySelector('text'))),
            bar: fill(shown[2].querySelector('[style*="--series-1"]')),
            kinds: shown.map(svg => svg.classList[0]),
            widths: shown.map(svg => svg.getBoundingClientRect().width),
            textSize: shown[0].getScreenCTM().a * 12,
        };
        """
    )
    assert seen["width"] <= width
    assert seen["kinds"] == ["narrow" if width == 360 else "wide"] * 7
    assert min(seen["widths"]) > 300
    assert 11 < seen["textSize"] < 13
    assert (luminance(seen["page"]) < 0.1) == (scheme == "dark")
    for text in (seen["ink"], seen["muted"], *seen["labels"]):
        assert contrast(text, seen["page"]) > 4.5
    assert contrast(seen["bar"], seen["page"]) > 3
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requested = {
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    }
    assert requested == {url}
