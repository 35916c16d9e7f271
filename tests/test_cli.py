"""The command line, through a subprocess where its whole way matters and in-process where something must go wrong."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stem_cases import needs_library

from res2net_fused import cli
from res2net_fused.backends import policy
from res2net_fused.backends.reference import BACKEND as reference_backend
from res2net_fused.bench import check, networks, progress, results

SMALL = ["--batch", "1", "--device", "cpu", "--no-network", "--threads", "1"]
SPEED_UP = re.compile(r"\d\.\d\dx")


def run(*arguments, cwd=None, timeout=300):
    command = [sys.executable, "-m", "res2net_fused", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=cwd)


def test_info():
    done = run("info", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert torch.__version__ in done.stdout
    for name in ("reference", "triton", "cpu", "cuda"):
        assert re.search(rf"^  {name} +\S", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^  reference +can run$", done.stdout, re.MULTILINE)
    assert "RES2NET_FUSED_BACKEND" in done.stdout
    assert "native extension" in done.stdout


def test_check():
    done = run("check", "--quick", *SMALL, "--configs", "14w4s", "--dtype", "float32,bfloat16")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.endswith(" ok")]
    for dtype in ("float32", "bfloat16"):
        for workload in ("chain", "block"):
            for stage in (1, 2, 3, 4):
                for variant in ("normal", "stage"):
                    pattern = rf"{workload} +14w4s +{stage} {variant} +reference +{dtype} "
                    assert sum(re.match(pattern, row) is not None for row in rows) == 1
    assert f"{len(rows)} comparisons, 0 misses" in done.stdout
    assert "not checked, backend cuda: " in done.stdout


def test_bench_writes_results_and_a_plot(tmp_path):
    done = run("bench", "--quick", *SMALL, "--scales", "4,8", "--out", "results", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert SPEED_UP.search(done.stdout)
    data = results.read(tmp_path / "results" / "bench-cpu.json")
    assert data["environment"]["command"].startswith("res2net-fused bench --quick --batch 1")
    seen = {(r["workload"], r["config"], r["stage"], r["provider"]) for r in data["rows"]}
    providers = ("eager", "eager_channels_last", "ours")
    assert seen == {
        (workload, config, stage, provider)
        for workload in ("chain", "block")
        for config in ("26w4s", "14w8s")
        for stage in (1, 2, 3, 4)
        for provider in providers
    }
    assert len(data["rows"]) == len(seen)
    assert (tmp_path / "results" / "bench-cpu.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_bench_with_all_peers(tmp_path):
    done = run("bench", "--quick", *SMALL, "--configs", "14w8s", "--peers", "all", "--out", tmp_path, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    data = results.read(tmp_path / "bench-cpu.json")
    for workload in ("chain", "block"):
        providers = {row["provider"] for row in data["rows"] if row["workload"] == workload}
        assert providers == {"eager", "eager_channels_last", "compile", "compile_freezing", "ours"}  # no runtimes: --quick


@pytest.mark.slow
@pytest.mark.parametrize(
    "networks",
    [{"res2net50_26w4s": (4, 16)}, {"res2next29_6c24w4s": (3, 9), "dla60_res2next": (4, 16)}],
    ids=["default", "others"],
)
def test_bench_with_a_network(networks, tmp_path):
    """networks: stages and blocks of each."""
    arguments = ["--batch", "1", "--device", "cpu", "--configs", "14w8s", "--out", tmp_path]
    arguments += ["--model", ",".join(networks)] if len(networks) > 1 else []
    done = run("bench", "--quick", *arguments, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [row for row in results.read(tmp_path / "bench-cpu.json")["rows"] if row["workload"] == "network"]
    providers = ("eager", "eager_channels_last", "ours_plain", "ours")
    found = [(row["config"], row["stage"], row["batch"], row["provider"]) for row in rows]
    assert len(found) == len(set(found)) and set(found) == {(n, None, 1, p) for n in networks for p in providers}
    for name, (stages, blocks) in networks.items():
        for place in (*(f"{i + 1} features" for i in range(stages)), "logits"):
            assert re.search(rf"^{name} +{place} +{blocks} of {blocks} +\w+ +\d\.\de", done.stdout, re.MULTILINE)


def wrong_last_group(monkeypatch):
    right = reference_backend.forward

    def forward(problem, x, *rest):
        out = right(problem, x, *rest)
        out[:, -1] += 0.01
        return out

    monkeypatch.setattr(reference_backend, "forward", forward)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_check_fails_on_a_miss(monkeypatch, capsys, threads):
    wrong_last_group(monkeypatch)
    arguments = ["check", "--quick", *SMALL, "--configs", "14w8s", "--backend", "reference", "--dtype", "float32"]
    assert cli.main(arguments) == 1
    assert re.search(r"16 comparisons, 16 misses", capsys.readouterr().out)


def test_check_goes_on_behind_what_raises(monkeypatch, capsys, threads):
    right = reference_backend.forward

    def forward(problem, x, *rest):
        if problem.height == 7:
            raise RuntimeError("it broke")
        return right(problem, x, *rest)

    monkeypatch.setattr(reference_backend, "forward", forward)
    arguments = ["check", "--quick", *SMALL, "--configs", "14w8s", "--backend", "reference", "--dtype", "float32"]
    assert cli.main(arguments) == 1
    printed = capsys.readouterr().out
    failed = re.findall(r"^failed, (\w+) 14w8s stage 4 \w+ float32, backend reference: RuntimeError: it broke$", printed, re.M)
    assert sorted(set(failed)) == ["block", "chain"] and printed.count(" ok") == 16 - len(failed)


@needs_library
def test_check_compares_kernels_that_auto_leaves_to_pytorch(monkeypatch, capsys, threads):
    """On a processor with instructions for bfloat16 the network's blocks would run PyTorch's operators."""
    monkeypatch.setattr(policy, "why_left_to_pytorch", lambda device, dtype: "has them" if dtype == torch.bfloat16 else None)
    small = functools.partial(networks.random_network, layers=(1, 1, 1, 1))
    monkeypatch.setattr(networks, "random_network", small)
    assert check.run_check(check.CheckOptions((), ("float32", "bfloat16"), "cpu", None, 60), []) == 0
    printed = capsys.readouterr().out
    for dtype in ("float32", "bfloat16"):
        assert re.search(rf"^network +res2net50_26w4s +logits +cpu +{dtype} .* ok$", printed, re.M), printed


def test_photographs_are_asked_for_before_anything_is_measured(monkeypatch, capsys, tmp_path, threads):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert cli.main(["bench", "--quick", "--batch", "1", "--device", "cpu", "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert "--no-network" in printed.err and "parity" not in printed.out and "timing" not in printed.out
    assert not list(tmp_path.iterdir())


def test_check_goes_without_photographs(monkeypatch, capsys):
    """They need the extra 'bench': the comparisons that do not need them are made, and what is left out is told."""
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    arguments = ["--configs", "14w4s", "--backend", "reference", "--dtype", "float32", "--batch", "1", "--device", "cpu"]
    assert cli.main(["check", *arguments]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^not checked, network \S+ float32: .*pip install 'res2net-fused\[bench\]'", printed, re.M)
    assert "two photographs against" not in printed and re.search(r"^\d\d comparisons, 0 misses$", printed, re.M)


@pytest.mark.parametrize("hidden", [["tqdm"], ["matplotlib", "tqdm"], ["PIL"]])
def test_bench_names_its_extra_in_one_sentence(monkeypatch, capsys, tmp_path, hidden):
    own = cli.importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name, *a: None if name in hidden else own(name, *a))
    assert cli.main(["bench", "--quick", *SMALL[:4], "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("not installed: pip install 'res2net-fused[bench]'")
    assert all({"PIL": "pillow"}.get(name, name) in line for name in hidden)
    assert not (tmp_path / "out").exists()


def test_what_bench_needs_is_its_extra():
    project = (Path(cli.__file__).parents[1] / "pyproject.toml").read_text()
    (extra,) = re.findall(r"^bench = \[(.*)\]$", project, re.M)
    assert set(re.findall(r'"([\w-]+)"', extra)) == {*cli._BENCH_EXTRA.values(), *cli._BENCH_EXTRA_FOR_NETWORKS.values()}


def test_progress_without_tqdm(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(progress, "_SILENCE_S", 0.0)
    with progress.progress("comparing", 2) as bar:
        bar.set_postfix_str("the first")
        bar.update()
    printed = capsys.readouterr().out
    assert re.fullmatch(
        r"comparing \(2 cases\)\n  0 of 2 after 0 s; the first\n  1 of 2 after 0 s; next\ncomparing: 0 s\n", printed
    ), printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["check", "--configs", "26"], "26w4s"),
        (["check", "--configs", "26w4s", "--scales", "4"], "not allowed with"),
        (["check", "--dtype", "int8"], "int8"),
        (["check", "--backend", "magic"], "magic"),
        (["bench", "--batch", "0"], "'0'"),
        (["bench", "--scales", "3-2"], "holds no scale"),
        (["bench", "--scales", "0-2"], "'0'"),
        (["bench", "--device", "cuda:99"], "cuda:99"),
        (["bench", "--device", "mps"], "allowed are cpu and cuda"),
        (["bench", "--threads", "none"], "'none'"),
        (["bench", "--peers", "none"], "none"),
        ([], "required"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["check", "bench"])
def test_a_backend_that_cannot_run_is_an_error(command, capsys, threads, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main([command, "--quick", *SMALL, "--backend", "cuda"]) == 2
    assert "backend='cuda' cannot run" in capsys.readouterr().err


def test_help_shows_examples(capsys):
    for command in ("info", "check", "bench"):
        with pytest.raises(SystemExit) as stopped:
            cli.main([command, "--help"])
        assert stopped.value.code == 0
        assert f"examples:\n  res2net-fused {command}" in capsys.readouterr().out
