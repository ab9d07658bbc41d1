"""Progress: sparse plain lines away from a terminal, with rate and ETA."""

from flexmemory.progress import ProgressLine, eta


def test_lines_are_sparse_and_keep_the_last_text(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("flexmemory.progress.time.perf_counter", lambda: now[0])
    with ProgressLine("train", 100, "steps") as line:
        for step in range(1, 101):
            now[0] += 1.0
            line.update(step, f"loss {step}" if step % 10 == 0 else None)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6  # every 20 seconds, and the end
    assert lines[0] == "train: 20/100  1.0 steps/s  ETA 1:20  loss 20"
    assert lines[-1].startswith("train: 100/100")


def test_resumed_work_does_not_count_as_speed(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("flexmemory.progress.time.perf_counter", lambda: now[0])
    with ProgressLine("export", 100, "rows", start=80) as line:
        now[0] = 30.0
        line.update(95)
    assert "0.5 rows/s  ETA 0:10" in capsys.readouterr().err


def test_short_work_and_disabled_lines_say_nothing(capsys):
    with ProgressLine("train", 2, "steps") as line:
        line.update(2)
    with ProgressLine("train", 2, "steps", enabled=False, every=0.0) as line:
        line.update(1)
    assert capsys.readouterr().err == ""


def test_eta_reads_well():
    assert [eta(s) for s in (0, 59.6, 61, 3725)] == ["0:00", "1:00", "1:01", "1:02:05"]
