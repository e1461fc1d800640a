"""`llmkit generate`: one JSON object or streamed text, repeatable samples, and one clear sentence for each mistake."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmkit.cli.main import run
from llmkit.testing.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def stories(test_data: Path) -> str:
    return str(test_data / "models" / "stories260k-hf")


def generate(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> tuple[str, str]:
    assert run(["generate", *args]) == code
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_text_goes_to_stdout_and_notes_to_stderr(stories: str, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = generate(capsys, stories, "--prompt", "Once upon a time", "--greedy", "--max-tokens", "20")
    assert out.startswith(", there was a little girl named Lily.")
    assert out.endswith("\n")
    assert "[20 tokens, ended by length]" in err


def test_json_is_one_object_with_the_documented_keys(stories: str, capsys: pytest.CaptureFixture[str]) -> None:
    args = [stories, "--prompt", "Once", "--num-samples", "3", "--max-tokens", "12", "--seed", "5", "--json"]
    result = json.loads(generate(capsys, *args)[0])
    assert set(result) == {"checkpoint", "prompt", "samples", "tokens_per_second"}
    assert result["prompt"] == "Once"
    assert [sample["seed"] for sample in result["samples"]] == [5, 6, 7]
    assert all(set(sample) == {"text", "tokens", "finish_reason", "seed"} for sample in result["samples"])
    assert len({sample["text"] for sample in result["samples"]}) > 1
    again = json.loads(generate(capsys, stories, "--prompt", "Once", "--max-tokens", "12", "--seed", "6", "--json")[0])
    assert again["samples"] == result["samples"][1:2]


def test_samples_are_shown_whole_one_after_the_other(stories: str, capsys: pytest.CaptureFixture[str]) -> None:
    args = [stories, "--prompt", "Once", "--num-samples", "3", "--max-tokens", "12", "--seed", "5"]
    out, _ = generate(capsys, *args)
    samples = json.loads(generate(capsys, *args, "--json")[0])["samples"]
    shown = "".join(f"--- sample {i}\n{sample['text'].rstrip(chr(10))}\n" for i, sample in enumerate(samples, start=1))
    assert out == shown


def test_stop_strings_end_the_text(stories: str, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--prompt", "Once upon a time", "--greedy", "--stop", "zzz", "--stop", " named", "--json"]
    (sample,) = json.loads(generate(capsys, stories, *args)[0])["samples"]
    assert sample["text"] == ", there was a little girl"
    assert sample["finish_reason"] == "stop"


def test_a_prompt_from_standard_input(
    stories: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"Once upon a time")))
    result = json.loads(generate(capsys, stories, "--prompt", "-", "--greedy", "--max-tokens", "4", "--json")[0])
    assert result["prompt"] == "Once upon a time"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"\xff\xfe")))
    assert "the prompt is not UTF-8 text" in generate(capsys, stories, "--prompt", "-", code=1)[1]


def test_an_empty_prompt_begins_a_text(stories: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads(generate(capsys, stories, "--prompt", "", "--greedy", "--max-tokens", "8", "--json")[0])
    assert result["samples"][0]["text"].startswith("Once upon a time")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--greedy", "--top-k", "3"], "--greedy does not sample, so it cannot be combined with --top-k"),
        (["--greedy", "--seed", "3"], "cannot be combined with --seed"),
        (["--greedy", "--num-samples", "2"], "cannot be combined with --num-samples"),
        (["--system", "x"], "--system needs --chat"),
        (["--stop", ""], "--stop needs a text"),
        (["--engine", "transformer"], "unknown engine 'transformer': did you mean transformers?"),
        (["--top-p", "0"], "--top-p"),
        (["--max-tokens", "0"], "--max-tokens"),
        (["--dtype", "int8"], "--dtype"),
    ],
)
def test_wrong_use_is_exit_code_2(
    stories: str, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    out, err = generate(capsys, stories, "--prompt", "x", *args, code=2)
    assert message in err and not out


def test_failures_are_exit_code_1(stories: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def message(*args: str) -> str:
        out, err = generate(capsys, *args, code=1)
        assert not out and "Traceback" not in err
        return err

    assert "has no chat template: it is a base model" in message(stories, "--prompt", "x", "--chat")
    assert "the prompt has" in message(stories, "--prompt", "word " * 600)
    assert "there is no checkpoint" in message(str(tmp_path / "none"), "--prompt", "x")
    copy = tmp_path / "copy"
    shutil.copytree(stories, copy, copy_function=shutil.copyfile)
    (copy / "model.safetensors").unlink()
    assert "has no weights" in message(str(copy), "--prompt", "x")
    assert "no tokenizer.json" in message(str(_without_tokenizer(tmp_path)), "--prompt", "x")


def _without_tokenizer(tmp_path: Path) -> Path:
    path = tiny_checkpoint(tmp_path / "mute").path
    (path / "tokenizer.json").unlink()
    return path


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom llmkit.cli.main import run\n"
        "run(['generate', '--help']), run(['eval', '--help']), run(['eval', '--list'])\n"
        "heavy = {'torch', 'numpy', 'transformers', 'jinja2', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
