"""README.md, CONTRIBUTING.md and docs/*.md: what they show runs, in the order of the page, as a reader would run it.

A page's Python blocks and its commands (lines of an indented or shell block that begin with a program of PROGRAMS) are run
one after another in a fresh process and an empty directory. A new block or command is run without anybody's doing; what
it needs comes from BEFORE, arguments that make it take seconds from SMALLER, and what is not run at all says why in
NOT_RUN. Such commands, and those in the middle of a sentence, are checked against the program's own options.

    python tests/test_docs.py PAGE      runs one page, in the current directory
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
PROGRAMS = ("sage-ext", "make", "python", "pip", "pytest")
SHELLS = ("console", "bash", "sh", "shell")

# Keys of the tables below: (page, beginning of the block's first line or of the command).
NOT_RUN = {
    ("README.md", "make"): "minutes each; the targets are looked up",
    ("README.md", "sage-ext compare"): "trains for minutes; tests/study/test_run.py runs small studies",
    ("CONTRIBUTING.md", "make"): "minutes each; the targets are looked up",
    ("docs/video.md", "sage-ext stream --run RUN --camera"): "a machine's own devices",
    (
        "docs/video.md",
        "sage-ext stream --run RUN --browser-camera",
    ): "waits for a browser; tests/video/test_camera.py has one",
    ("docs/real-data.md", "python"): "the film is no part of the project",
    ("docs/releasing.md", "make"): "half an hour, and gigabytes",
    ("docs/scaling.md", "sage-ext extract"): "of two machines; the page says how it was tried",
    ("docs/scaling.md", "sage-ext compare"): "trains for hours; tests/study/test_launch.py does it small",
    ("docs/study.md", "sage-ext compare"): "trains for hours; tests/study/test_run.py runs small studies",
    ("docs/study.md", "python benchmarks/streams.py"): "trains for an hour; tests/study/test_streams.py runs it small",
}
SMALL_TRAINING = "--max-steps 2 --dim 8 --blocks 2 --window 2 --hop 1.3333 --threads 1 --quiet"
EXIT_CODES = {("docs/data.md", "sage-ext check broken"): 1}  # of commands that say that something is wrong
SMALLER = {
    ("README.md", "sage-ext train"): SMALL_TRAINING,
    ("README.md", "sage-ext stream"): "--serve 0",  # the page's port may be taken
    ("CONTRIBUTING.md", "SAGE_EXT_PEERS"): SMALL_TRAINING,
    ("docs/affwild2.md", "sage-ext train"): SMALL_TRAINING,
    ("docs/index.md", "sage-ext train"): SMALL_TRAINING,
    ("docs/video.md", "sage-ext train"): SMALL_TRAINING,
    ("docs/video.md", "sage-ext stream --run DRAWN-RUN --video"): "--serve 0",
    ("docs/streaming.md", "sage-ext stream --run RUN --input frames.jsonl --serve"): "--serve 0 --pace 1000",
    ("docs/streaming.md", "sage-ext stream --run RUN --input features.f32"): "--no-follow",  # see run_command
    ("docs/streaming.md", "sage-ext stream --run demo-run/sage --format f32 --input"): "--serve 0 --pace 1000",
}


# ------------------------------------------------------------------------------------------------- what is on a page
@dataclass
class Item:
    """A Python block, or one command with its environment, redirections aside."""

    line: int
    text: str
    python: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)
    stdin: str | None = None
    stdout: str | None = None

    def entry(self, page: str, table: dict):
        """What a table says of this item, or None."""
        keys = [key for key in table if key[0] == page and self.text.startswith(key[1])]
        assert len(keys) <= 1, keys
        return table[keys[0]] if keys else None


def command(line: int, text: str) -> Item | None:
    """The first command of a pipeline; None: the line begins with no program. ValueError: the line goes on in the next."""
    if not re.match(rf"(?:\w+=\S+ )*(?:\S*/)?(?:{'|'.join(PROGRAMS)})(?:\s|$)", text):
        return None
    lexer = shlex.shlex(text, posix=True, punctuation_chars="|<>;&")
    lexer.whitespace_split = True
    item, words = Item(line, text), iter(lexer)
    for word in words:
        if word[0] in "|;&":
            break
        if word in ("<", ">"):
            setattr(item, "stdin" if word == "<" else "stdout", next(words))
        elif not item.arguments and (assignment := re.fullmatch(r"(\w+)=(.*)", word)):
            item.environment[assignment[1]] = assignment[2]
        else:
            item.arguments.append(word)
    return item


def items(page: str) -> list[Item]:
    """Python blocks and commands of a page, in its order."""
    found, fence, block, pending, begun = [], None, [], "", 0
    for number, line in enumerate((ROOT / page).read_text().split("\n"), start=1):
        if line.startswith("```"):
            if fence == "python":
                found.append(Item(begun + 1, "\n".join(block), python=True))
            fence, block, begun = (line[3:].strip(), [], number) if fence is None else (None, [], 0)
        elif fence == "python":
            block.append(line)
        elif fence in SHELLS or (fence is None and line.startswith("    ")):
            text = pending + line.strip().removeprefix("$ ")
            begun = begun if pending else number
            try:
                item = None if text.endswith("\\") else command(begun, text)
            except ValueError:  # an open quotation
                pending = text + "\n"
                continue
            if text.endswith("\\"):
                pending = text[:-1]
                continue
            pending = ""
            if item is not None:
                found.append(item)
    assert fence is None, f"{page}: a block has no end"
    assert not pending, f"{page}: a command has no end: {pending}"
    return found


def mentioned(page: str) -> Iterator[Item]:
    """Commands within sentences, between backquotes."""
    text = re.sub(r"^```.*?^```|^    .*?$", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    for span in re.findall(r"`([^`]+)`", text):
        item = command(0, " ".join(span.split()))
        if item is not None and len(item.arguments) > 1:
            yield item


# ------------------------------------------------------------------------------------- commands that are not run: checks
class Parsed(BaseException):
    """The command line was understood: the parser, and what it read (None where it was to be asked for its options)."""


@contextmanager
def stopped_after_parsing(really: bool):
    original = argparse.ArgumentParser.parse_args

    def parse(self, arguments=None, namespace=None):
        raise Parsed(self, original(self, arguments, namespace) if really else None)

    argparse.ArgumentParser.parse_args = parse  # type: ignore[method-assign]
    try:
        yield
    finally:
        argparse.ArgumentParser.parse_args = original  # type: ignore[method-assign]


def sage_ext_options() -> dict[str, set[str]]:
    """{sub-command: its flags}"""
    from sage_ext import cli

    with stopped_after_parsing(really=False), pytest.raises(Parsed) as stop:
        cli.main([])
    [commands] = [a for a in stop.value.args[0]._actions if isinstance(a, argparse._SubParsersAction)]
    return {name: set(parser._option_string_actions) for name, parser in commands.choices.items()}


def check(item: Item, complete: bool) -> None:
    """The program, what it is to do, and each flag exist. `complete`: the whole line is what its parser wants."""
    program, arguments = Path(item.arguments[0]).name, item.arguments[1:]
    flags = [word.partition("=")[0] for word in arguments if re.match(r"--?[a-zA-Z]", word)]
    documented = set(re.findall(r"^\| `(SAGE_EXT_\w+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert set(item.environment) <= documented, f"{item.text}: README.md does not list the variable"
    if program == "sage-ext":
        options = sage_ext_options()
        assert arguments[0] in options, item.text
        assert set(flags) <= options[arguments[0]], item.text
        if complete:
            from sage_ext import cli

            with stopped_after_parsing(really=True), pytest.raises(Parsed):
                cli.main(arguments)
    elif program == "make":
        done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif program == "python":
        assert arguments[0] in ("-c", "-m") or (ROOT / arguments[0]).is_file(), item.text
        source = (ROOT / arguments[0]).read_text() if arguments[0].endswith(".py") else ""
        assert all(f'"{flag}"' in source for flag in flags if flag not in ("-c", "-m")), item.text
    elif program == "pytest":
        [declared] = re.findall(
            r"^markers = \[(.*?)\]$", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE
        )
        markers = set(re.findall(r'"(\w+):', declared))
        values = dict(itertools.pairwise(arguments))
        assert set(re.findall(r"\w+", values.get("-m", ""))) - {"not", "and", "or"} <= markers, item.text
        paths = [word for word in arguments if "/" in word]
        assert all((ROOT / path.partition("::")[0]).exists() for path in paths), item.text
    elif program == "pip":
        extras = importlib.metadata.metadata("sage-ext").get_all("Provides-Extra")
        wanted = [name for group in re.findall(r"\[([\w,]+)\]", item.text) for name in group.split(",")]
        assert set(wanted) <= set(extras), item.text
        options = re.findall(r"cmake\.define\.(\w+)", item.text)
        assert all(name in (ROOT / "CMakeLists.txt").read_text() for name in options), item.text


# ------------------------------------------------------------------------------------------- what blocks need and leave
def data_set(path: str, train: int = 4, validation: int = 2, frames: tuple[int, int] = (60, 90)) -> None:
    from sage_ext.data import write_dataset

    write_dataset(path, train=train, validation=validation, test=2, frames=frames)


def trained(run: str, data: str) -> None:
    from sage_ext.training.trainer import TrainConfig, train

    config = TrainConfig(data, dim=8, blocks=2, window=2, hop=4 / 3, max_steps=2, threads=1)
    train(config, run, overwrite=Path(run).exists(), progress=False)


def recording(space: dict) -> None:
    """A run, and a clip of its validation split as the page's three files."""
    import json

    data_set("data")
    trained("RUN", "data")
    [labels, *_] = sorted(Path("data").glob("*/VA_Estimation_Challenge/Validation_Set/*.txt"))
    names = ("audio", "visual")
    rows = [np.nan_to_num(np.load(f"data/features/{name}/{labels.stem}.npy").astype("<f4")) for name in names]
    frames = [json.dumps({n: x[t].tolist() for n, x in zip(names, rows)}) for t in range(min(map(len, rows)))]
    Path("frames.jsonl").write_text("\n".join(frames) + "\n")
    Path("features.f32").write_bytes(np.hstack([x[: len(frames)] for x in rows]).tobytes())
    Path("clip.txt").write_text(labels.read_text())


def streaming_names(space: dict) -> None:
    """What the page takes for granted: a model, features of two streams, a second session."""
    import torch

    from sage_ext.models import SAGE

    model = SAGE({"audio": 12, "visual": 16})
    audio, visual = torch.randn(2, 12), torch.randn(2, 16)
    space.update(
        model=model, audio=audio, visual=visual, features={"audio": audio, "visual": visual},
        present=torch.tensor([[True, False], [True, True]]), active=torch.tensor([True, False]),
        other=model.stream(batch_size=6),
    )  # fmt: skip


def demo_run(space: dict) -> None:
    """What `make demo` would have left, by name."""
    data_set("demo-run/data", validation=12)
    trained("demo-run/sage", "demo-run/data")


def a_table(space: dict) -> None:
    """table.csv as the README wants it: two people, three conversations each, a row a second."""
    rng = np.random.default_rng(0)
    lines = ["video,time,person,voice_loudness,face_smile,stress"]
    for video in range(6):
        lines += [
            f"v{video},{t},p{video // 3},{rng.normal():.3f},{rng.normal():.3f},{rng.uniform(0, 9):.2f}"
            for t in range(50)
        ]
    Path("table.csv").write_text("\n".join(lines) + "\n")


def what_is_wrong_is_what_the_page_says(space: dict, printed: str) -> None:
    text = (ROOT / "docs/data.md").read_text()
    [block] = re.findall(r"^    Wrong: \d+$(.*?)^\(lines wrapped", text, re.DOTALL | re.MULTILINE)
    said = re.sub(r"\n {10}", " ", block)  # where a line was wrapped
    sentences = [line.strip() for line in said.split("\n") if line.strip()]
    assert len(sentences) == 15
    for sentence in sentences:
        assert sentence in printed, sentence


def folder_of_crops(space: dict) -> None:
    """Crops with gaps, 50 Hz audio shared by two persons, a 25 fps video, through the page's functions."""
    root = Path("affwild2")
    for name, images in (("duo_left", (1, 2, 5)), ("duo_right", (2, 4, 6)), ("nobody", ())):
        folder = root / "cropped_aligned" / name
        folder.mkdir(parents=True)
        for i in images:
            (folder / f"{i:05d}.jpg").touch()
        (folder / "Thumbs.db").touch()
    space["face_features"](
        root / "cropped_aligned", root / "features/visual", lambda path: np.full(3, int(path.stem)), 3
    )
    space["describe"](root / "features/audio", rate=50, shared=True, about={"model": "none"})
    space["describe"](root / "features/visual", about={"model": "none"})
    rows = np.repeat(np.arange(10, dtype=np.float32)[:, None], 2, axis=1)  # 0.2 s: 5 frames at 25 fps
    np.save(root / "features/audio/duo.npy", rows)
    np.save(root / "features/audio/nobody.npy", rows)
    (root / "fps.json").write_text('{"duo": 25}')
    for split, names in (("Train_Set", ("duo_left", "duo_right")), ("Validation_Set", ("nobody",))):
        folder = root / "6th ABAW Annotations/VA_Estimation_Challenge" / split
        folder.mkdir(parents=True)
        for name in names:
            (folder / f"{name}.txt").write_text("valence,arousal\n" + "".join(f"0.{i},-0.{i}\n" for i in range(5)))
    np.save(root / "features/visual/nobody.npy", np.arange(15).reshape(5, 3).astype(np.float16))


def crops_are_read_in_time(space: dict, printed: str) -> None:
    """The page's check says what to look at; rows stand at their images' frames, and audio at its times."""
    from sage_ext.data import AffWild2, clip_tensors

    assert re.search(r"^train +2 ", printed, re.MULTILINE), printed
    assert "  duo_right: visual has 6 rows for 5 frames: the last 1 are ignored" in printed
    left, right = AffWild2("affwild2", "train")
    item = clip_tensors(left, ["audio", "visual"])
    assert item["present"][:, 1].tolist() == [True, True, False, False, True]
    assert item["features"]["visual"][:, 0].tolist() == [1, 2, 0, 0, 5]
    assert item["features"]["audio"][:, 0].tolist() == [0.5, 2.5, 4.5, 6.5, 8.5]
    assert clip_tensors(right, ["visual"])["present"][:, 0].tolist() == [False, True, False, True, False]


def a_data_set_to_train_on(space: dict) -> None:
    os.rename("affwild2", "crops")
    data_set("affwild2")
    Path("affwild2/sample_submission.txt").rename("sample_submission.txt")  # anywhere, with --sample


def rows_are_the_samples(space: dict, printed: str) -> None:
    sample, out = (Path(name).read_text().split("\n") for name in ("sample_submission.txt", "predictions.txt"))
    assert [line.split(",")[0] for line in out] == [line.split(",")[0] for line in sample]
    assert len(out) > 100
    assert all(re.fullmatch(r".+/\d{5}\.jpg(,-?[01]\.\d{6}){2}", line) for line in out[1:-1])


def one_answer_a_frame(space: dict, printed: str) -> None:
    assert printed.count("\n") == Path("frames.jsonl").read_text().count("\n")
    assert printed.startswith('{"frame":1,')


def a_folder_of_videos(data: str) -> Callable[[dict], None]:
    """videos/, annotations of two of them where `data` will be, and new.mp4."""

    def make(space: dict) -> None:
        from sage_ext.video.synth import write_videos

        write_videos("drawn", train=1, validation=1, test=1, seconds=(3, 4), size=(160, 120))
        shutil.copytree("drawn/annotations", f"{data}/annotations")
        shutil.rmtree(f"{data}/annotations/Test_Set")
        shutil.move("drawn/videos/test_01.mp4", "new.mp4")
        shutil.move("drawn/videos", "videos")

    return make


def annotations_of_the_drawn(space: dict) -> None:
    shutil.copytree("WORLD/annotations", "DRAWN/annotations")


def run_by_two_processes(space: dict, printed: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "ddp.py"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    assert re.fullmatch(r"CCC of all that was seen: \[0\.\d+, 0\.\d+\]\n", done.stdout), done.stdout
    assert "no process_group" not in done.stderr


BEFORE: dict[tuple[str, str], Callable[[dict], None]] = {
    ("README.md", "sage-ext import"): a_table,
    ("README.md", "sage-ext extract"): a_folder_of_videos("FACES"),
    ("README.md", "sage-ext stream"): recording,
    ("CONTRIBUTING.md", "SAGE_EXT_PEERS"): lambda space: data_set("DIR"),
    ("docs/affwild2.md", "sage-ext check"): folder_of_crops,
    ("docs/affwild2.md", "sage-ext train"): a_data_set_to_train_on,
    ("docs/video.md", "sage-ext extract videos/"): a_folder_of_videos("DATA"),
    ("docs/video.md", "sage-ext check DRAWN"): annotations_of_the_drawn,
    ("docs/robustness.md", "from sage_ext.data import AffWild2"): lambda space: data_set("DATA"),
    ("docs/streaming.md", "session = model.stream"): streaming_names,
    ("docs/streaming.md", "sage-ext stream --run RUN < frames.jsonl"): recording,
    ("docs/streaming.md", "python -c"): demo_run,
}
AFTER: dict[tuple[str, str], Callable[[dict, str], None]] = {
    ("README.md", "sage-ext stream"): one_answer_a_frame,
    ("docs/affwild2.md", "sage-ext check"): crops_are_read_in_time,
    ("docs/affwild2.md", "sage-ext predict"): rows_are_the_samples,
    ("docs/data.md", "sage-ext check broken"): what_is_wrong_is_what_the_page_says,
    ("docs/scaling.md", '"""ddp.py'): run_by_two_processes,
    ("docs/streaming.md", "sage-ext stream --run RUN"): one_answer_a_frame,
}


# -------------------------------------------------------------------------------------------------------- to run a page
@contextmanager
def redirected(stdin: str | None, stdout: str):
    """File descriptors 0 and 1, for this process and its children, come from and go to files."""
    kept = os.dup(0), os.dup(1)
    with open(stdin or os.devnull, "rb") as source, open(stdout, "wb") as target:
        os.dup2(source.fileno(), 0)
        os.dup2(target.fileno(), 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        for number, copy in enumerate(kept):
            os.dup2(copy, number)
            os.close(copy)


def run_command(item: Item, more: list[str], code: int) -> None:
    """sage-ext in this process unless it is given an environment, python in its own, whatever else through PATH."""
    program, *arguments = item.arguments
    arguments += more
    if "--no-follow" in more:  # a followed file has no end: read it once
        arguments = [word for word in arguments if word not in ("--follow", "--no-follow")]
    if program == "sage-ext" and not item.environment:
        from sage_ext import cli

        assert cli.main(arguments) == code, item.text
        return
    start = {"sage-ext": [sys.executable, "-m", "sage_ext"], "python": [sys.executable]}.get(program, [program])
    subprocess.run([*start, *arguments], env={**os.environ, **item.environment}, check=True)


def run_page(page: str) -> None:
    space: dict = {}
    for item in items(page):
        where = f"{page}:{item.line}"
        if item.entry(page, NOT_RUN):
            check(item, complete=True)
            continue
        print(where, file=sys.stderr, flush=True)
        if not item.python:
            check(item, complete=True)
        elif file := re.match(r'"""(\w+\.py):', item.text):  # the block says what file it is
            Path(file[1]).write_text(item.text)
        (item.entry(page, BEFORE) or (lambda space: None))(space)
        printed = item.stdout or "printed.txt"
        with redirected(item.stdin, printed):
            if item.python:
                exec(compile("\n" * (item.line - 1) + item.text, str(ROOT / page), "exec"), space)
            else:
                run_command(item, (item.entry(page, SMALLER) or "").split(), item.entry(page, EXIT_CODES) or 0)
        (item.entry(page, AFTER) or (lambda space, printed: None))(space, Path(printed).read_text("utf-8", "replace"))


# ------------------------------------------------------------------------------------------------------------ the tests
QUICK = ("README.md", "docs/data.md")  # what a stranger tries first


@pytest.mark.parametrize(
    "page", [page if page in QUICK else pytest.param(page, marks=pytest.mark.slow) for page in PAGES]
)
def test_page(page, tmp_path):
    if page == "docs/frameworks.md":  # of an extra that the tests go without
        for name in ("pytorch_lightning", "accelerate", "transformers"):
            pytest.importorskip(name)
    command = [sys.executable, str(Path(__file__).resolve()), page]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("page", PAGES)
def test_commands_within_sentences(page):
    for item in mentioned(page):
        check(item, complete=False)


def test_every_entry_of_the_tables_is_used():
    for table in (NOT_RUN, EXIT_CODES, SMALLER, BEFORE, AFTER):
        for page, beginning in table:
            assert any(item.text.startswith(beginning) for item in items(page)), (page, beginning)


def test_what_is_taken_for_a_block_and_for_a_command(tmp_path, monkeypatch):
    """A page of every form: nothing is overlooked, nothing else is taken."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "page.md").write_text(
        "Text with `sage-ext info` and\n`sage-ext synth DIR\n--seed N` in it.\n\n"
        "    A=b sage-ext train --run x \\\n      --data 'y z'   # it's a comment\n"
        '    a tree/\n    make test\n    python -c "print(\n        1)" > one.txt\n\n'
        "```python\nx = 1\n\ny = 2\n```\n```console\n$ sage-ext stream < in.f32 | jq .\n```\n```text\nmake nothing\n```\n"
    )
    found = items("page.md")
    assert [(i.line, i.python, i.environment, i.arguments, i.stdin, i.stdout) for i in found] == [
        (5, False, {"A": "b"}, ["sage-ext", "train", "--run", "x", "--data", "y z"], None, None),
        (8, False, {}, ["make", "test"], None, None),
        (9, False, {}, ["python", "-c", "print(\n1)"], None, "one.txt"),
        (13, True, {}, [], None, None),
        (18, False, {}, ["sage-ext", "stream"], "in.f32", None),
    ]
    assert found[3].text == "x = 1\n\ny = 2"
    assert [i.arguments[1:] for i in mentioned("page.md")] == [["info"], ["synth", "DIR", "--seed", "N"]]


@pytest.mark.parametrize(
    "text",
    ["sage-ext fly", "sage-ext train --wings 2", "make nothing", "python benchmarks/no.py", "python benchmarks/bench.py --no",
     "pytest tests/no", "pytest -m fast tests", 'pip install ".[no]"', "NO_SUCH=1 sage-ext info"],
)  # fmt: skip
def test_a_wrong_command_is_noticed(text):
    item = command(1, text)
    with pytest.raises(AssertionError):
        check(item, complete=False)


def test_a_wrong_argument_is_noticed(capsys):
    with pytest.raises(SystemExit):
        check(command(1, "sage-ext synth DIR --seed x"), complete=True)


if __name__ == "__main__":
    run_page(sys.argv[1])
