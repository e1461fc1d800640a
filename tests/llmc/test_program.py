"""The executable: a published command line, its outputs, kill and resume, and what it says about bad input."""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support import header, model_bytes, write_text_shards

from llmkit_llmc.build import BuildError, build, find_compiler

#: llm.c's published GPT-2 run; only paths, sizes and steps are made small
PUBLISHED = [
    "-i",
    "train_*.bin",
    "-j",
    "val_*.bin",
    "-o",
    "log",
    "-v",
    "4",
    "-s",
    "6",
    "-g",
    "12",
    "-h",
    "1",
    "-b",
    "4",
    "-t",
    "16",
    "-d",
    "128",
    "-r",
    "0",
    "-z",
    "1",
    "-c",
    "0.1",
    "-k",
    "cosine",
    "-l",
    "0.0006",
    "-q",
    "0.1",
    "-u",
    "3",
    "-n",
    "2",
    "-x",
    "9",
    "-ge",
    "1",
    "-y",
    "1",
    "-e",
    "tiny.bin",
]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def folder(tmp_path: Path, test_data: Path) -> Path:
    """Real text as byte tokens, a tiny model, a tokenizer and an eval file."""
    make_inputs(tmp_path, (test_data / "text" / "tinyshakespeare" / "input.txt").read_bytes())
    return tmp_path


def make_inputs(folder: Path, text: bytes) -> None:
    write_text_shards(folder, text[:100_000])
    (folder / "tiny.bin").write_bytes(model_bytes(np.random.default_rng(0), V=257, T=64, C=16, L=2, NH=2))
    tokens = b"".join(bytes([1, i]) for i in range(256)) + b"\x05<eot>"
    (folder / "gpt2_tokenizer.bin").write_bytes(header(20240328, 2, 257, 256) + tokens)
    words = [1, 4, 2, 72, 101, 1, 108, 2, 108, 111, 1, 97, 1, 98]
    target = folder / "dev" / "data" / "hellaswag"
    target.mkdir(parents=True)
    (target / "hellaswag_val.bin").write_bytes(
        header(20240522, 1, 1, 34) + np.array([65535, 34, 0, *words], "<u2").tobytes()
    )


@pytest.fixture
def program(executable: Path, folder: Path) -> Run:
    def run(*arguments: str, code: int = 0, **more: object) -> subprocess.CompletedProcess[str]:
        command = [str(executable), *arguments]
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=120, check=False, **more
        )  # type: ignore[call-overload]
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return run


def small(**changes: str) -> list[str]:
    """PUBLISHED with other values: small(x="4")."""
    arguments = list(PUBLISHED)
    for letter, value in changes.items():
        flag = "-" + letter
        if flag in arguments:
            arguments[arguments.index(flag) + 1] = value
        else:
            arguments += [flag, value]
    return arguments


def outputs(folder: Path, step: int = 9) -> list[bytes]:
    names = (f"model_{step:08d}.bin", f"state_{step:08d}_00000.bin", "main.log")
    return [(folder / name).read_bytes() for name in names]


def test_the_published_command(program: Run, folder: Path) -> None:
    done = program(*PUBLISHED)
    assert done.stderr == "llmc: -ge (GELU fusion) means nothing on a CPU and is ignored\n"
    assert len(re.findall(r"^step +\d+/9 \| loss [\d.]+ \(\+nanz\)\| norm [\d.]+ .*tok/s$", done.stdout, re.M)) == 9
    assert done.stdout.count("val loss") == 4  # 0, 4, 8 and the end
    assert done.stdout.count("HellaSwag: ") == 3 and done.stdout.count("generating:") == 2
    log = (folder / "log" / "main.log").read_text().splitlines()
    kinds = [re.fullmatch(r"s:(\d+) (tel|eval|trl):\d+\.\d{4}( lr:\d\.\d{6} norm:\d+\.\d\d)?", line) for line in log]
    assert all(kinds) and [m[1] for m in kinds if m and m[2] == "trl"] == [str(i) for i in range(9)]
    assert sorted(p.name for p in (folder / "log").glob("DONE_*")) == [f"DONE_{i:08d}" for i in (2, 4, 6, 8, 9)]
    losses = [float(line.split("tel:")[1]) for line in log if "tel" in line]
    assert losses[-1] < losses[0]


def test_kill_and_resume_to_the_same_bits(program: Run, executable: Path, folder: Path) -> None:
    program(*small(o="whole", n="1", x="30"))
    chance = random.Random(1)
    for _ in range(6):
        process = subprocess.Popen(
            [executable, *small(o="cut", n="1", x="30")],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(chance.uniform(0.1, 0.35))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert "resumed" in program(*small(o="cut", n="1", x="30")).stdout or (folder / "cut" / "DONE_00000030").exists()
    assert outputs(folder / "whole", 30) == outputs(folder / "cut", 30)


def test_a_signal_saves_and_stops(program: Run, executable: Path, folder: Path) -> None:
    arguments = small(o="log", n="1000", x="4000", s="0", v="0")
    process = subprocess.Popen(
        [executable, *arguments], cwd=folder, stdout=subprocess.PIPE, text=True, errors="replace"
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step   12/"):
            process.send_signal(signal.SIGINT)
            break
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and re.search(r"saved step (\d+) in log", rest)


def test_files_cut_off_in_a_save_are_not_resumed_from(program: Run, folder: Path) -> None:
    program(*small(x="4"))
    for name in ("model_00000006.bin", "state_00000006_00000.bin.partial"):
        (folder / "log" / name).write_bytes(b"cut off")
    shutil.copy(folder / "log" / "main.log", folder / "log.before")
    program(*PUBLISHED)
    program(*small(o="whole"))
    assert outputs(folder / "log")[0] == outputs(folder / "whole")[0]


def test_a_full_disk_leaves_the_checkpoint_before(program: Run, folder: Path) -> None:
    program(*small(x="2"))
    before = outputs(folder / "log", 2)[:2]

    def limit() -> None:  # a file size limit fails a write as a full disk does
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    failed = program(*small(x="4"), code=1, preexec_fn=limit)
    assert re.match(r"llmc: cannot write log/(state|model)_00000004", failed.stderr.splitlines()[-1])
    assert outputs(folder / "log", 2)[:2] == before
    assert not list((folder / "log").glob("*.partial")) and not (folder / "log" / "DONE_00000004").exists()
    assert "resumed" in program(*small(x="4")).stdout


def test_only_the_last_checkpoints_are_kept(program: Run, folder: Path) -> None:
    program(*small(nk="2", nm="4"))
    assert sorted(p.name for p in (folder / "log").glob("DONE_*")) == [f"DONE_{i:08d}" for i in (4, 8, 9)]
    assert len(list((folder / "log").glob("model_*"))) == len(list((folder / "log").glob("state_*"))) == 3


def test_outliers_are_skipped_and_their_window_survives_a_resume(program: Run, folder: Path) -> None:
    common = {
        "x": "200",
        "v": "0",
        "s": "0",
        "h": "0",
        "sg": "0.2",
        "d": "64",
        "t": "8",
        "b": "8",
        "l": "1e-5",
        "k": "constant",
    }
    whole = program(*small(**common, o="whole", n="150"))
    assert "skipping the update" in whole.stdout
    program(*small(**common, o="cut", n="150"))
    for path in (folder / "cut").glob("*200*"):
        path.unlink()
    resumed = program(*small(**common, o="cut", n="150"))
    assert "resumed" in resumed.stdout and "(+nanz)" not in resumed.stdout
    assert outputs(folder / "whole", 200) == outputs(folder / "cut", 200)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_without_clipping_kill_and_resume_to_the_same_bits(
    program: Run, executable: Path, folder: Path, dtype: str
) -> None:
    """Weights are then updated inside the backward; a clip that never clips takes the other way, to the same weights.

    (The norms that the state file holds were summed in another order.)
    """
    options = [*small(d="64", n="1", x="40", h="0", s="0"), "--dtype", dtype, "--grad-clip"]
    program(*options, "1e9", "-o", "stored")
    program(*options, "0", "-o", "whole")
    assert outputs(folder / "whole", 40)[0] == outputs(folder / "stored", 40)[0]
    chance = random.Random(2)
    for _ in range(3):
        process = subprocess.Popen([executable, *options, "0", "-o", "cut"], cwd=folder, stdout=subprocess.DEVNULL)
        time.sleep(chance.uniform(0.1, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
    program(*options, "0", "-o", "cut")
    assert outputs(folder / "whole", 40) == outputs(folder / "cut", 40)


@pytest.mark.parametrize("level", ["1", "2"])
def test_recomputation_changes_no_bit(program: Run, folder: Path, level: str) -> None:
    program(*small(o="zero", x="3"))
    program(*small(o="other", x="3", r=level))
    assert outputs(folder / "zero", 3) == outputs(folder / "other", 3)


def test_one_batch_is_learnt(program: Run) -> None:
    done = program(*small(a="1", x="60", d="64", l="0.02", v="0", s="0", n="0", q="1", u="0"))
    losses = [float(x) for x in re.findall(r"\| loss ([\d.]+)", done.stdout)]
    assert losses[-1] < 1.5 < losses[0]


def test_schedules(program: Run, folder: Path) -> None:
    expected = {
        "linear": [0.01, 0.02, 0.02, 0.0175, 0.015, 0.0125, 0.01, 0.0075, 0.005, 0.0025],
        "constant": [0.02] * 10,
        "wsd": [0.01, 0.02, 0.02, 0.02, 0.02, 0.02, 0.02, 0.02, 0.02, 0.005858],
    }
    for kind, rates in expected.items():
        program(*small(k=kind, o=kind, x="10", u="2", l="0.02", q="0", v="0", s="0", h="0"))
        logged = re.findall(r"lr:([\d.]+)", (folder / kind / "main.log").read_text())
        assert [float(r) for r in logged] == pytest.approx(rates, abs=2e-6)


def test_samples_follow_a_prompt(program: Run) -> None:
    options = [*small(x="2", s="2", n="0", g="5"), "--prompt", "82,79,77,69,79", "--temperature", "0", "--top-k", "3"]
    assert "\n---\nROMEO" in program(*options).stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-q0"], 2, "there is no option -q0; --help lists the options"),
        (["-x"], 2, "-x needs a value"),
        (["-x", "ten"], 2, "--steps takes a whole number, not 'ten'"),
        (["-l", "nan"], 2, "--learning-rate takes a number, not 'nan'"),
        (["-b", "0"], 2, "-b is 0, but must be at least 1"),
        (["-r", "3"], 2, "-r is 3, but must be 0, 1 or 2"),
        (["-z", "2"], 2, "-z is 2, but only ZeRO stage 1 exists here"),
        (["--dtype", "fp8"], 2, "--dtype is 'fp8'"),
        (["-e", "d7"], 1, "there is no GPT-2 depth of 7; known depths are 6, 12"),
        (["-e", "nowhere.bin"], 1, "cannot read nowhere.bin: No such file or directory"),
        (["-i", "nowhere_*.bin"], 1, "no file matches nowhere_*.bin"),
        (["-k", "cosinus"], 1, "there is no schedule 'cosinus'; use cosine"),
        (["-d", "100"], 1, "-d 100 is not a multiple of 4 sequences x 16 tokens"),
        (["-t", "65"], 1, "a sequence length of 65 is beyond the 64 positions of the model"),
        (["-o", "tiny.bin/log"], 1, "cannot make the directory"),
        (["-l", "1e30", "-u", "0"], 1, "at step"),
    ],
)
def test_bad_input_is_one_sentence(program: Run, arguments: list[str], code: int, message: str) -> None:
    done = program(*PUBLISHED, *arguments, code=code)
    lines = [line for line in done.stderr.splitlines() if "means nothing" not in line]
    assert len(lines) == 1 and lines[0].startswith("llmc: ") and message in lines[0]


def test_resuming_another_model_or_data(program: Run, folder: Path) -> None:
    program(*small(x="2"))
    failed = program(*small(x="4", b="2"), code=1)
    assert "resume with the data, batch size and sequence length that the run began with" in failed.stderr
    failed = program(*small(x="4"), "--dtype", "bf16", code=1)
    assert "the run in log is fp32, but bf16 was asked for" in failed.stderr
    state = folder / "log" / "state_00000002_00000.bin"
    state.write_bytes(state.read_bytes()[:3000])
    assert "it is truncated, or of another model" in program(*small(x="4"), code=1).stderr


def test_bf16_trains_and_resumes(program: Run, folder: Path) -> None:
    program(*small(o="whole", x="8"), "--dtype", "bf16")
    program(*small(o="cut", x="8", n="4"), "--dtype", "bf16")
    for path in (folder / "cut").glob("*_00000008*"):
        path.unlink()
    program(*small(o="cut", x="8", n="4"), "--dtype", "bf16")
    assert outputs(folder / "whole", 8)[:2] == outputs(folder / "cut", 8)[:2]
    assert (folder / "cut" / "model_00000008.bin").read_bytes()[4:8] == b"\5\0\0\0"


def mpirun(count: int, *arguments: str, folder: Path, code: int = 0) -> str:
    try:
        program = build(mpi=True).executable
    except BuildError as missing:
        pytest.skip(str(missing))
    assert find_compiler(mpi=True)
    from llmkit_llmc.processes import launcher

    command = [launcher(), "-np", str(count), str(program), *arguments, "--threads", "1"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=180, check=False, env=os.environ)
    assert (done.returncode != 0) == bool(code), done.stdout + done.stderr
    return done.stdout + done.stderr


def test_processes_resume_to_the_same_bits_and_share_the_state(folder: Path) -> None:
    arguments = small(b="2", x="6", s="0")
    mpirun(2, *arguments, "-o", "whole", folder=folder)
    mpirun(2, *arguments, "-o", "cut", "-x", "6", folder=folder)
    for path in (folder / "cut").glob("*_00000006*"):
        path.unlink()
    assert "resumed" in mpirun(2, *arguments, "-o", "cut", folder=folder)
    for name in ("model_00000006.bin", "state_00000006_00000.bin", "state_00000006_00001.bin", "main.log"):
        assert (folder / "whole" / name).read_bytes() == (folder / "cut" / name).read_bytes()
    whole = (folder / "whole" / "model_00000006.bin").stat().st_size
    assert all(
        p.stat().st_size < 1.2 * whole for p in (folder / "whole").glob("state_*")
    )  # two moments of half the values
    assert "resume with as many processes as it was saved with" in mpirun(
        3, *small(b="1", d="144", x="9", s="0"), "-o", "whole", folder=folder, code=1
    )
