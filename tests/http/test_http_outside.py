"""Other people's programs against the server: openai-python's own tests, schemathesis, lm-eval's local-completions."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import pytest
from http_support import serving, stories
from openai import OpenAI

# The models that openai-python's tests name.
NAMES = ("gpt-3.5-turbo-instruct", "gpt-6-astra", "gpt-5.4", "gpt-4o", "model", "string")
SELECTED = (
    "not aiohttp and not all_params and "
    "((test_completions and create) or (test_models and (list or (retrieve and path))))"
)


@pytest.fixture(scope="module")
def openai_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source of the installed openai, which has its tests, from the package index."""
    folder = tmp_path_factory.mktemp("openai")
    wanted = f"openai=={version('openai')}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "openai", wanted]
    done = subprocess.run([*command, "--dest", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the package index has no source of {wanted} for us: {done.stderr.strip().splitlines()[-1]}")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if path.is_dir())


@pytest.mark.slow
def test_openai_pythons_own_tests_pass(openai_source, test_data, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("My API Key\n")
    checkpoint = stories(test_data)
    with serving(dict.fromkeys(NAMES, checkpoint), api_key_file=str(keys)) as url:
        tests = [
            f"tests/api_resources/{name}.py" for name in ("test_completions", "chat/test_completions", "test_models")
        ]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-k", SELECTED, *tests],
            cwd=openai_source,
            env={**os.environ, "TEST_API_BASE_URL": f"{url}/v1", "COLUMNS": "150"},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0 and "64 passed" in done.stdout, done.stdout[-5000:] + done.stderr


def test_schemathesis_finds_no_server_error_and_no_answer_against_the_schema(test_data, tmp_path):
    with serving({"stories": stories(test_data)}, max_tokens=4) as url:
        options = "--checks not_a_server_error,response_schema_conformance"
        options += " --phases coverage,fuzzing --seed 1 --max-examples 5"
        command = [str(Path(sys.executable).with_name("st")), "run", f"{url}/openapi.json", *options.split()]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr
        with OpenAI(base_url=f"{url}/v1", api_key="none") as client:  # and it goes on answering
            assert client.completions.create(model="stories", prompt="Once", max_tokens=2).choices


@pytest.mark.parametrize("task", ["arc_easy", "hellaswag"])
def test_lm_evals_local_completions_gives_the_scores_of_llmkit_eval(task, test_data, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    import lm_eval
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from test_eval_parity import LAYOUT, copy_lines, harness_task, ours

    source = next((test_data / LAYOUT[task][1]).glob("*.jsonl" if task != "hellaswag" else "validation.jsonl"))
    copy_lines(source, tmp_path / LAYOUT[task][1] / source.name, lambda row: True, 20)
    checkpoint = stories(test_data)
    with serving({"stories": checkpoint}) as url:
        model = LocalCompletionsAPI(
            model="stories",
            base_url=f"{url}/v1/completions",
            tokenizer=str(checkpoint.path),
            tokenizer_backend="huggingface",
            add_bos_token=True,
            max_length=512,
            batch_size=4,
            num_concurrent=4,
        )
        theirs = lm_eval.evaluate(model, {task: harness_task(task, tmp_path, 0)}, log_samples=True, bootstrap_iters=10)
    samples, results = ours(task, checkpoint, tmp_path, 0, "fp32", "llmkit")
    assert len(samples) == 20
    for metric in ("acc", "acc_norm"):
        assert theirs["results"][task][f"{metric},none"] == pytest.approx(results[metric])
    for sample in theirs["samples"][task]:
        logprobs = [float(answer[0][0]) for answer in sample["resps"]]
        greedy = [answer[0][1] in (True, "True") for answer in sample["resps"]]
        answers = samples[sample["doc_id"]].answers
        assert logprobs == pytest.approx([answer.logprob for answer in answers], abs=1e-3)
        assert greedy == [answer.is_greedy for answer in answers]
