"""docs/affwild2.md: its snippets run and do what the page says, its commands are the command line's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np

from sage_ext import cli
from sage_ext.data import AffWild2, clip_tensors, write_dataset

PAGE = (Path(__file__).parents[2] / "docs" / "affwild2.md").read_text()


def test_snippets(tmp_path, monkeypatch, capsys):
    """A folder of crops with gaps, 50 Hz audio shared by two persons, a 25 fps video; then the page's check."""
    faces, extract, check = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    space: dict = {}
    exec(faces + extract, space)
    root = tmp_path / "affwild2"
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
            (folder / f"{name}.txt").write_text("valence,arousal\n" + "0.1,0.2\n" * 5)
    np.save(root / "features/visual/nobody.npy", np.ones((5, 3), np.float16))

    monkeypatch.chdir(tmp_path)
    exec(check, {})
    printed = capsys.readouterr().out.split("\n")
    assert printed[0] == "train 2 clips {'audio': 2, 'visual': 3}"
    assert printed[1].startswith("duo_right: visual has 6 rows for 5 frames")

    left, right = AffWild2(root, "train")
    item = clip_tensors(left, ["audio", "visual"])
    assert item["present"][:, 1].tolist() == [True, True, False, False, True]
    assert item["features"]["visual"][:, 0].tolist() == [1, 2, 0, 0, 5]
    assert item["features"]["audio"][:, 0].tolist() == [0.5, 2.5, 4.5, 6.5, 8.5]
    assert clip_tensors(right, ["visual"])["present"][:, 0].tolist() == [False, True, False, True, False]


def test_commands(tmp_path, monkeypatch):
    """train, evaluate and predict as written (two steps of training), from the synthetic data set as `affwild2`."""
    lines = [line.strip() for line in PAGE.split("\n") if line.startswith("    sage-ext ")]
    assert [shlex.split(line)[1] for line in lines] == ["train", "evaluate", "predict"]
    monkeypatch.chdir(tmp_path)
    write_dataset("affwild2", train=4, validation=2, test=2, frames=(60, 90))
    Path("affwild2/sample_submission.txt").rename("sample_submission.txt")  # anywhere, with --sample
    for line in lines:
        arguments = shlex.split(line)[1:]
        if arguments[0] == "train":
            arguments += ["--max-steps", "2", "--dim", "8", "--threads", "1", "--quiet"]
        if arguments[0] == "evaluate":
            arguments = arguments[: arguments.index("--report")]  # pictures are tested elsewhere
        assert cli.main(arguments) == 0, line
    sample, out = (Path(name).read_text().split("\n") for name in ("sample_submission.txt", "predictions.txt"))
    assert [line.split(",")[0] for line in out] == [line.split(",")[0] for line in sample]
    assert len(out) > 100
    assert all(re.fullmatch(r".+/\d{5}\.jpg(,-?[01]\.\d{6}){2}", line) for line in out[1:-1])
