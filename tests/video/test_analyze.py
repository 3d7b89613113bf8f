"""`analyze` is extract and predict in one go; without a run nothing is estimated."""

from __future__ import annotations

import csv

import numpy as np
import pytest

pytest.importorskip("av")
pytest.importorskip("cv2")
pytest.importorskip("librosa")
pytest.importorskip("safetensors")

from media import grey, make, tone, write

from sage_ext.cli import main
from sage_ext.training.runs import Run, predict_run
from sage_ext.training.trainer import TrainConfig, train
from sage_ext.video import Parameters, analyze

TOLD = Parameters(told=True)


def predicted(run, data, path):
    """The rows that `predict` writes of video three."""
    predict_run(run, data, path, split="test")
    return [row for row in csv.DictReader(path.read_text().splitlines()) if row["video"] == "three"]


def test_the_run_remembers_how_its_features_were_made(trained):
    run = Run.load(trained / "run")
    assert run.about["visual"]["parameters"]["visual"] == "hog"
    assert run.about["audio"]["tool"] == "sage-ext extract"


def test_it_equals_extract_and_predict(trained, videos, tmp_path):
    rows = predicted(trained / "run", trained / "data", tmp_path / "predictions.csv")
    result = analyze(videos / "three.mp4", trained / "run", told=True)
    assert result.prediction.shape == (45, 2)
    for c, target in enumerate(("valence", "arousal")):
        assert [float(row[target]) for row in rows] == pytest.approx(result.prediction[:, c].tolist(), abs=2e-6)
    for m, name in enumerate(result.modalities):
        assert [float(row[f"weight {name}"]) for row in rows] == pytest.approx(result.weights[:, m].tolist(), abs=2e-6)
    assert result.present.all()
    assert result.faces[0].tolist() == [32, 16, 56, 56]
    assert result.size == (128, 96)
    assert 20 <= len(result.thumbnails) <= 24
    assert ((result.deviation >= 0) & (result.deviation <= 1.5)).all()


def test_table(trained, videos, tmp_path):
    pytest.importorskip("pandas")
    result = analyze(videos / "three.mp4", trained / "run", told=True)
    table = result.to_pandas()
    assert len(table) == 45
    assert table["valence"].tolist() == pytest.approx(result.prediction[:, 0].tolist())
    assert {
        "time",
        "arousal",
        "confidence audio",
        "weight visual",
        "present visual",
        "visual sharpness",
        "audio snr",
        "stage 1",
    } <= set(table)
    result.write_csv(tmp_path / "a.csv")
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert list(rows[0]) == list(table)
    assert float(rows[44]["time"]) == pytest.approx(44 / 30, abs=1e-6)
    assert float(rows[10]["arousal"]) == pytest.approx(result.prediction[10, 1], rel=1e-5)


def test_without_a_run_nothing_is_estimated(videos):
    result = analyze(videos / "one.mp4", told=True)
    assert result.prediction is None
    assert result.targets == ()
    assert not {"valence", "arousal"} & set(result.columns())
    assert result.quality["audio"].shape[0] == 60


def test_a_video_without_sound_or_picture(trained, tmp_path):
    silent = analyze(make(tmp_path / "silent.mp4", 1.0, sound=None), trained / "run", told=True)
    m = silent.modalities.index("audio")
    assert not silent.present[:, m].any()
    assert (silent.weights[:, m] == 0).all()
    assert np.isfinite(silent.prediction).all()
    heard = analyze(write(tmp_path / "heard.wav", sound=tone(1.0), audio_codec="pcm_s16le"), trained / "run")
    m = heard.modalities.index("visual")
    assert not heard.present[:, m].any()
    assert heard.thumbnails == []
    assert heard.size == (0, 0)


def test_a_run_of_one_modality_reads_the_quality_that_it_learnt(trained, videos, tmp_path):
    """The voice's match with the face is a column of the face's quality: it needs the sound, which the model does not read."""
    config = TrainConfig(
        str(trained / "data"), modalities=("visual",), dim=16, batch_size=2, window=2.0, epochs=1, max_steps=1
    )
    train(config, tmp_path / "run", progress=False)
    rows = predicted(tmp_path / "run", trained / "data", tmp_path / "predictions.csv")
    result = analyze(videos / "three.mp4", tmp_path / "run", told=True)
    assert result.modalities == ("visual",)
    match = result.quality["visual"][:, result.quality_columns["visual"].index("voice_match")]
    assert np.isfinite(match).any()
    assert [float(row["valence"]) for row in rows] == pytest.approx(result.prediction[:, 0].tolist(), abs=2e-6)
    with pytest.raises(FileNotFoundError, match="path: expected a media file"):
        analyze(videos, tmp_path / "run")


def test_a_run_of_other_features_is_refused(videos, foreign_run):
    with pytest.raises(ValueError, match=r"root: expected features .*'audio': 9"):
        analyze(videos / "one.mp4", foreign_run, told=True)


def test_the_command(trained, videos, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["analyze", str(videos / "three.mp4"), "--run", str(trained / "run"), "--told", "--out", str(out), "--quiet",
                 "--overlay", str(out / "drawn.mp4")]) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == ["drawn.mp4", "three.csv", "three.html"]
    assert "mean weight" in said
    assert main(["analyze", str(videos / "three.mp4"), "--told", "--out", str(out), "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "nothing is estimated" in said
    assert "valence" not in said
    (tmp_path / "bad.mp4").write_bytes(b"x")
    assert main(["analyze", str(tmp_path / "bad.mp4"), "--out", str(tmp_path / "none")]) == 2
    assert "error: path: expected a media file" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    write(tmp_path / "grey.mp4", [grey(90)] * 10, fps=30)
    assert main(["analyze", str(tmp_path / "grey.mp4"), "--out", str(out), "--quiet"]) == 0
