"""lmms-eval itself asks ten questions, where there is a Python that has it.

python -m venv lmms && lmms/bin/pip install lmms-eval
LMMS_EVAL_PYTHON=$PWD/lmms/bin/python python -m pytest tests/openai/test_lmms_eval.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from edge_vlm_runtime.openai.media import MediaRules
from tests.openai.served import CLIP, serving

TASK = Path(__file__).parent / "lmms_task"
SEEN = ("mushroom", "dog", "bicycle", "balloon")
NOT_SEEN = ("boat", "car", "clock", "hat", "key", "tree")


def test_ten_questions(tmp_path: Path) -> None:
    """Its model class `openai`, four requests at once. Most answers are right: the clip's things
    come and go, and it is sampled as lmms-eval wants."""
    python = os.environ.get("LMMS_EVAL_PYTHON")
    if python is None:
        pytest.skip("LMMS_EVAL_PYTHON names no Python with lmms-eval")
    shutil.copytree(TASK, tmp_path / "tasks" / "ten")
    questions = tmp_path / "questions.jsonl"
    with questions.open("w") as out:
        for thing in (*SEEN, *NOT_SEEN):
            doc = {
                "video": str(CLIP),
                "question": f"Is there a {thing}?",
                "answer": "yes" if thing in SEEN else "no",
            }
            out.write(json.dumps(doc) + "\n")
    task = tmp_path / "tasks" / "ten" / "ten_questions.yaml"
    task.write_text(task.read_text().replace("QUESTIONS", str(questions)))
    with serving(media=MediaRules(folders=(CLIP.parent,))) as server:
        arguments = {
            "model_version": "demo",
            "base_url": f"{server.page_url}v1",
            "api_key": "none",
            "timeout": "600",
            "num_concurrent": "4",
            "pass_video_url": "True",
            "max_frames_num": "16",
        }
        command = [
            *(python, "-m", "lmms_eval", "--model", "openai", "--tasks", "ten_questions"),
            *("--include_path", str(tmp_path / "tasks"), "--batch_size", "1"),
            *("--model_args", ",".join(f"{k}={v}" for k, v in arguments.items())),
            *("--output_path", str(tmp_path / "out")),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = (tmp_path / "out").rglob("*_results.json")
    scores = json.loads(found.read_text())["results"]["ten_questions"]
    assert scores["exact,none"] >= 0.7
