"""The pages: their code runs, their translations keep step, and what they point to exists."""

import csv
import difflib
import functools
import io
import re
import shutil
import statistics
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = sorted((REPOSITORY / "docs").glob("*.md"))
PAGES = [*sorted(REPOSITORY.glob("*.md")), *DOCS]
TRANSLATED = [page for page in PAGES if page.name.endswith(".zh-CN.md")]
DIFF = REPOSITORY / "docs" / "continuous_to_discrete.diff"

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:(?<=\n\n)|\A)(?: {4}[^\n]*\n+)+")
NOT_RUN = re.compile(r"<!-- not run: [^\n]+ -->\n+\Z")
FILE = re.compile(r"[\w./-]*\w\.(?:py|md|csv|txt|toml|diff|cff|png|gif)\b")


def python_blocks(text):
    """(line, source) of every python block that is to run."""
    for match in FENCE.finditer(text):
        if match[1] == "python" and not NOT_RUN.search(text[: match.start()]):
            yield text.count("\n", 0, match.start(2)), match[2]


def without_comments(language, code):
    """Lines of code without comments, trailing space and empty lines."""
    lines = code.splitlines()
    if language == "python":
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            if token.type == tokenize.COMMENT:
                row, column = token.start
                lines[row - 1] = lines[row - 1][:column]
    else:
        lines = [re.sub(r"(^|\s)#.*", "", line) for line in lines]
    return [line.rstrip() for line in lines if line.strip()]


def code_blocks(text):
    fenced = [without_comments(match[1], match[2]) for match in FENCE.finditer(text)]
    return fenced + [without_comments("", match[0]) for match in INDENTED.finditer(FENCE.sub("", text))]


def prose(text):
    return INDENTED.sub("", FENCE.sub("", text))


def headings(text):
    return re.findall(r"^(#+) (.+)$", FENCE.sub("", text), re.MULTILINE)


def numbers(text):
    """The numbers in the prose, thousands without their comma; link targets do not count."""
    text = re.sub(r"\]\([^)]*\)", "]", prose(text))
    return {number.replace(",", "") for number in re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", text)}


@pytest.mark.parametrize("page", [page for page in DOCS if page not in TRANSLATED], ids=lambda page: page.name)
def test_python_blocks_run(page):
    """From top to bottom in one session; a failure names the page's own line."""
    session = {"__name__": "__page__"}
    for line, source in python_blocks(page.read_text()):
        exec(compile("\n" * line + source, str(page), "exec"), session)


def test_readme_plays_a_saved_model(tmp_path):
    """The README's one Python block, after its own words in a process of its own, with a run that was just made."""
    command = [sys.executable, "maddpg_discrete.py", "--total-timesteps", "100", "--learning-starts", "50"]
    command += ["--num-envs", "5", "--eval-episodes", "1"]
    shutil.copy(REPOSITORY / "maddpg_discrete.py", tmp_path)
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    ((_, source),) = python_blocks((REPOSITORY / "README.md").read_text())
    (run,) = (tmp_path / "runs").iterdir()
    source = source.replace("runs/RUN", f"runs/{run.name}") + "print(data['rewards'].shape, actions.sum(2).tolist())"
    played = subprocess.run([sys.executable, "-c", source], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert played.stdout == "(1, 4) [[1.0, 1.0, 1.0, 1.0]]\n"


# What stands in the README's first table, in its order: table, script, game, whose return, steps, labels
RESULTS = """
    marks     continuous simple_spread_v3           agent     600k default-600k
    marks     continuous simple_spread_v3           agent     600k n-step-600k
    marks     continuous simple_spread_v3           agent     1.5M default
    marks     discrete   simple_spread_v3           agent     600k default-600k
    marks     discrete   simple_spread_v3           agent     2M   default
    marks     continuous simple_speaker_listener_v4 listener  1M   default
    marks     discrete   simple_speaker_listener_v4 listener  1M   default
    marks     continuous simple_reference_v3        agent     1.5M default
    marks     continuous simple_reference_v3        agent     1.5M n-step
    marks     continuous simple_tag_v3              adversary 1M   random-prey
    marks     continuous simple_tag_v3              adversary 1M   random-prey-gamma-0.95
    marks     discrete   simple_tag_v3              adversary 1M   random-prey
    marks     discrete   simple_tag_v3              adversary 1M   random-prey-gamma-0.95
    marks     continuous simple_spread_v3           agent     600k default-600k
    gamma     continuous simple_spread_v3           agent     600k gamma-0.95
    marks     discrete   simple_spread_v3           agent     600k default-600k
    gamma     discrete   simple_spread_v3           agent     600k gamma-0.95
    marks     continuous simple_speaker_listener_v4 listener  1M   default
    gamma     continuous simple_speaker_listener_v4 listener  1M   gamma-0.95
    marks     discrete   simple_speaker_listener_v4 listener  1M   default
    gamma     discrete   simple_speaker_listener_v4 listener  1M   gamma-0.95
    main_job  discrete   simple_tag_v3              adversary 100k default
    gamma     discrete   simple_tag_v3              adversary 200k default gamma-0.95
"""
LEVERS = """
    ablations continuous simple_spread_v3           agent     300k default-300k original-cadence gamma-0.95
    ablations discrete   simple_spread_v3           agent     300k default-300k original-cadence gamma-0.95
    ablations continuous simple_speaker_listener_v4 listener  300k default-300k original-cadence gamma-0.95
    ablations discrete   simple_speaker_listener_v4 listener  300k default-300k original-cadence gamma-0.95
    ablations continuous simple_tag_v3              adversary 300k random-prey-300k random-prey-original-cadence
    ablations continuous simple_tag_v3              adversary 300k random-prey-gamma-0.95
    ablations discrete   simple_tag_v3              adversary 300k random-prey-300k random-prey-original-cadence
    ablations discrete   simple_tag_v3              adversary 300k random-prey-gamma-0.95
"""
VERSUS_DDPG = """
    ablations continuous simple_speaker_listener_v4 listener  300k default-300k ddpg
    ablations discrete   simple_speaker_listener_v4 listener  300k default-300k ddpg
    ablations continuous simple_spread_v3           agent     300k default-300k ddpg
    ablations discrete   simple_spread_v3           agent     300k default-300k ddpg
    ablations continuous simple_tag_v3              adversary 300k random-prey-300k random-prey-ddpg
    ablations discrete   simple_tag_v3              adversary 300k random-prey-300k random-prey-ddpg
"""


@functools.cache
def rows_of(table):
    """The rows of a table of benchmark/results, as dictionaries of text."""
    with open(REPOSITORY / f"benchmark/results/{table}.csv") as file:
        return list(csv.DictReader(file))


def final_returns(table, script, game, side, steps, label):
    """In the order of seeds: the mean over the side's agents, 1,000 episodes at the end of a run."""
    returns = {}
    at = str(round(float(steps[:-1]) * {"k": 1_000, "M": 1_000_000}[steps[-1]]))
    for row in rows_of(table):
        of_run = row["script"], row["env_id"], row["label"], row["global_step"], row["episodes"]
        if of_run == (f"maddpg_{script}.py", game, label, at, "1000") and row["agent"].startswith(side):
            returns.setdefault(row["seed"], []).append(float(row["episodic_return"]))
    return [statistics.fmean(returns[seed]) for seed in sorted(returns)]


def test_tables_of_the_readme_are_those_of_the_rows():
    """Every mean and interval, `-7.73** (-7.94 to -7.52)`, in three tables of returns, to its decimals."""
    tables = re.findall(r"(?:^\|.*\n)+", (REPOSITORY / "README.md").read_text(), re.MULTILINE)
    starts = {"| game | steps": RESULTS, "| | default: a round": LEVERS, "| game | continuous: MADDPG": VERSUS_DDPG}
    for start, expected in starts.items():
        (table,) = (table for table in tables if table.startswith(start))
        cells = [x for row in re.findall(r"([+-]?[\d.]+)\** \((\S+) to (\S+?)\)", table) for x in row]
        exact = []
        for *about, steps, labels in (line.split(maxsplit=5) for line in expected.strip().splitlines()):
            for label in labels.split():
                returns = final_returns(*about, steps, label)
                quantile = {3: 4.302653, 5: 2.776445}[len(returns)]  # of Student's t at 97.5%, n - 1 degrees of freedom
                half = quantile * statistics.stdev(returns) / len(returns) ** 0.5
                exact += [statistics.fmean(returns) + x for x in (0, -half, half)]
        for cell, value in zip(cells, exact, strict=True):
            decimals = len(cell.partition(".")[2])
            assert float(cell) == pytest.approx(value, abs=0.501 * 10**-decimals)


def readme_table(start):
    """The cells of the README's table whose head begins so, a list for each of its rows."""
    table = re.search(rf"^{re.escape(start)}.*\n\|[-|]+\n((?:\|.*\n)+)", (REPOSITORY / "README.md").read_text(), re.M)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()]


def test_maddpg_against_ddpg_is_that_of_the_rows():
    """README: trained together, three runs; and in cross-play. Intervals of the adversary, means of both."""
    labels = {
        "MADDPGMADDPG": "default",
        "MADDPGDDPG": "ddpg-agent",
        "DDPGMADDPG": "ddpg-adversary",
        "DDPGDDPG": "ddpg-both",
    }
    pairs = {(row["env_id"], row["side"], row["first"], row["second"]): row for row in rows_of("crossplay_pairs")}
    table = readme_table("| game | adversary | together")
    assert len(table) == 6
    for game, adversary, *cells in table:
        for cell, agents in zip(cells[:2], ("MADDPG", "DDPG"), strict=True):
            about = "crossplay", "discrete", game
            ours, theirs = (
                final_returns(*about, side, "300k", labels[adversary + agents]) for side in ("adversary", "agent")
            )
            mean, half = statistics.fmean(ours), 4.302653 * statistics.stdev(ours) / 3**0.5
            expected = f"{mean:.1f} ({mean - half:.1f} to {mean + half:.1f}), {statistics.fmean(theirs):.1f}"
            assert len(ours) == 3 and cell == expected
        for cell, agents in zip(cells[2:], ("MADDPG", "DDPG"), strict=True):
            ours, theirs = (pairs[game, side, adversary.lower(), agents.lower()] for side in ("adversary", "agent"))
            mean, low, high = (float(ours[name]) for name in ("episodic_return", "low", "high"))
            assert cell == f"{mean:.1f} ({low:.1f} to {high:.1f}), {float(theirs['episodic_return']):.1f}"


def test_predators_of_a_random_prey_are_those_of_the_rows():
    """README: scripted, trained and planned; what a discount of 0.95 gains, seed by seed; whose values gain what."""
    page = " ".join((REPOSITORY / "README.md").read_text().split())
    (_, *push), (_, *aim), (_, *trained), (_, *longer), (_, _, planned) = readme_table("| predators | continuous")
    for n, script in enumerate(("continuous", "discrete")):
        scripted = [row for row in rows_of("chasers") if row["script"] == f"maddpg_{script}.py"]
        by_lead = {float(row["lead"]): float(row["episodic_return"]) for row in scripted}
        about = "marks", script, "simple_tag_v3", "adversary", "1M"
        plain, of_longer = (final_returns(*about, f"random-prey{label}") for label in ("", "-gamma-0.95"))
        figures = by_lead[0], max(by_lead.values()), statistics.fmean(plain), statistics.fmean(of_longer)
        for cell, figure in zip((push[n], aim[n], trained[n], longer[n]), figures, strict=True):
            assert float(cell) == pytest.approx(figure, abs=0.0501)
        gains = [value - other for value, other in zip(of_longer, plain, strict=True)]
        mean, half = statistics.fmean(gains), 2.776445 * statistics.stdev(gains) / 5**0.5
        assert min(gains) > 0 and f"with each of five seeds, {mean:.1f}" in page
        assert any(f"{mean - half:{sign}.1f} to {mean + half:{sign}.1f}" in page for sign in ("", "+"))
    assert float(planned) == pytest.approx(float(rows_of("planner")[0]["episodic_return"]), abs=0.0501)
    values = "none", "rollouts", "critics", "fitted actors, 4"
    for value, (_, cell) in zip(values, readme_table("| the worth of an action"), strict=True):
        found = [float(row["episodic_return"]) for row in rows_of("improvement") if row["values"] == value]
        for shown, figure in zip(cell.split(" to "), (min(found), max(found)), strict=True):
            assert len(found) == 4 and float(shown) == pytest.approx(figure, abs=0.0501)


def test_what_the_returns_mean_is_that_of_the_rows():
    """README: distances, collisions and touches, means over the runs of five seeds."""
    means = {}
    for row in rows_of("physical"):
        run = row["script"], row["total_timesteps"], row["quantity"]
        means.setdefault(run, []).append(float(row["value"]))
    means = {run: statistics.fmean(values) for run, values in means.items() if len(values) == 5}
    page = " ".join((REPOSITORY / "README.md").read_text().split())
    found = re.search(
        r"sum up to ([\d.]+) an episode \(([\d.]+) .*?; discrete ([\d.]+)\), "
        r"with ([\d.]+) collisions \(discrete ([\d.]+)\)"
        r".*?after 1.5M steps to ([\d.]+), with ([\d.]+), discrete after 2M to ([\d.]+), with ([\d.]+)\."
        r".*?touch a random prey ([\d.]+) times an episode, with discrete actions ([\d.]+):",
        page,
    )
    continuous, discrete = "maddpg_continuous.py", "maddpg_discrete.py"
    runs = (
        *((script, "600000", quantity) for quantity in ("distance", "collisions") for script in (continuous, discrete)),
        *((continuous, "1500000", quantity) for quantity in ("distance", "collisions")),
        *((discrete, "2000000", quantity) for quantity in ("distance", "collisions")),
        *((script, "1000000", "touches") for script in (continuous, discrete)),
    )
    figures = [means[run] for run in runs]
    figures.insert(1, figures[0] / 75)
    for shown, figure in zip(found.groups(), figures, strict=True):
        assert float(shown) == pytest.approx(figure, abs=0.501 * 10 ** -len(shown.partition(".")[2]))


def test_differences_on_a_gpu_and_of_both_are_those_of_the_rows():
    """The last table of docs/ablations.md: seed by seed to the default of the same machine, three runs and all six."""
    page = (REPOSITORY / "docs/ablations.md").read_text()
    head = "| variant | continuous, GPU | both | discrete, GPU | both |\n|---|---|---|---|---|\n"
    lines = re.match(r"(?:\|.*\n)+", page[page.index(head) + len(head) :])[0].splitlines()
    for name, *cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines):
        for script, *shown in ("continuous", *cells[:2]), ("discrete", *cells[2:]):
            found = []
            for table, cell in zip(("gpu", "ablations"), shown, strict=True):
                about = table, script, "simple_tag_v3", "adversary", "300k"
                returns, plain = (final_returns(*about, f"random-prey-{label}") for label in (name, "300k"))
                found += [value - other for value, other in zip(returns, plain, strict=False)]
                if cell:
                    half = {3: 4.302653, 6: 2.570582}[len(found)]
                    half *= statistics.stdev(found) / len(found) ** 0.5
                    mean = statistics.fmean(found)
                    bold = "**" if abs(mean) > half else ""
                    assert cell == f"{bold}{mean:+.2f}{bold} ({mean - half:+.2f} to {mean + half:+.2f})"


def test_the_original_codes_curves_are_those_of_the_rows():
    """README's table of parity: rows "here", means and intervals of three seeds, after 625k and 1.5M steps."""
    labels = {
        ("MADDPG", "128", "the original's"): ("original", "original-128-training"),
        ("MADDPG", "128", "mpe2's"): ("parity", "relaxed-128-training"),
        ("MADDPG", "64", "the original's"): ("original", "original-training"),
        ("MADDPG", "64", "mpe2's"): ("parity", "relaxed-training"),
        ("DDPG", "64", "mpe2's"): ("parity", "relaxed-ddpg-training"),
    }
    page = (REPOSITORY / "README.md").read_text()
    rows = re.findall(r"^\| here, (\w+) \| (\d+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", page, re.MULTILINE)
    assert {tuple(about) for *about, _, _ in rows} == labels.keys()
    for *about, early, late in rows:
        table, label = labels[tuple(about)]
        for cell, at in (early, "625000"), (late, "1500000"):
            found = [row for row in rows_of(table) if (row["label"], row["global_step"]) == (label, at)]
            returns = [float(row["episodic_return"]) for row in found if row["agent"] == "sum"]
            returns = [(value / 3 + 75) / 2 for value in returns] if table == "original" else returns
            mean, half = statistics.fmean(returns), 4.302653 * statistics.stdev(returns) / 3**0.5
            assert len(returns) == 3 and cell == f"{mean:.1f} ({mean - half:.1f} to {mean + half:.1f})"


def test_what_the_original_environment_is_worth():
    """README: 0.8 to each agent of the same policies, both times; there a return is 6 times mpe2's less 75."""
    returns = {}
    for row in rows_of("lag"):
        returns.setdefault((row["label"], row["environment"]), []).append(float(row["episodic_return"]))
    for label in {label for label, _ in returns}:
        original, mpe2 = (statistics.fmean(returns[label, environment]) for environment in ("original", "mpe2"))
        assert (original + 75) / 6 - mpe2 == pytest.approx(0.8, abs=0.06)
        assert (original + 75) / 2 - 3 * mpe2 == pytest.approx(2.4, abs=0.06)


def test_the_target_actors_of_every_run_have_more():
    """docs/ablations.md: in each of 21 runs, the same networks played both ways."""
    returns = {}
    for row in rows_of("averaged"):
        run = row["script"], row["env_id"], row["label"], row["seed"]
        returns.setdefault(run, {"online": 0.0, "target": 0.0})[row["actor"]] += float(row["episodic_return"])
    assert len(returns) == 21 and "In\neach of 21 runs" in (REPOSITORY / "docs/ablations.md").read_text()
    assert all(of_run["target"] > of_run["online"] for of_run in returns.values())


@pytest.mark.parametrize("page", TRANSLATED, ids=lambda page: page.name)
def test_translation_keeps_step(page):
    english = page.with_name(page.name.replace(".zh-CN", "")).read_text()
    chinese = page.read_text()
    assert [level for level, _ in headings(chinese)] == [level for level, _ in headings(english)]
    assert code_blocks(chinese) == code_blocks(english)
    assert numbers(chinese) == numbers(english)
    inline = [set(re.findall(r"`([^`\n]+)`", prose(text))) for text in (chinese, english)]
    assert inline[0] == inline[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            titles = [re.sub(r"[^\w\- ]", "", title.lower()) for _, title in headings(file.read_text())]
            assert anchor in [title.replace(" ", "-") for title in titles], target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_named_files_exist(page):
    """By path from the root, a folder of it or the page, or by bare name. `my_*` and runs/ are the reader's own."""
    folders = [REPOSITORY, *(REPOSITORY / name for name in ("docs", "benchmark", "tests"))]
    names = {path.name for folder in folders[1:] for path in folder.rglob("*")}
    text = re.sub(r"https?://\S+", "", page.read_text())
    for name in set(FILE.findall(text)):
        if name.startswith(("my_", "runs/")) or "/my_" in name:
            continue
        found = any((folder / name).exists() for folder in (*folders, page.parent))
        assert found or ("/" not in name and name in names), name


@pytest.mark.skipif(not DIFF.exists(), reason="there is no docs/continuous_to_discrete.diff")
def test_difference_of_the_twins_is_the_one_shown():
    """But for the two lines that name the files: `diff -u` and difflib both serve."""

    def hunks(lines):
        lines = list(lines)
        return lines[next((n for n, line in enumerate(lines) if line.startswith("@@")), len(lines)) :]

    twins = [REPOSITORY / "maddpg_continuous.py", REPOSITORY / "maddpg_discrete.py"]
    by_difflib = difflib.unified_diff(*(twin.read_text().splitlines() for twin in twins), lineterm="")
    by_diff = subprocess.run(["diff", "-u", *twins], capture_output=True, text=True).stdout.splitlines()
    assert hunks(DIFF.read_text().splitlines()) in (hunks(by_difflib), hunks(by_diff))
