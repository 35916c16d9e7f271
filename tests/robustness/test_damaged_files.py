"""Files from disk are data: damaged, hostile or foreign ones give an error that names them, or a warning and a way on."""

import ast
import copy
import json
import logging
import pickle
import random
from pathlib import Path

import pytest
import torch
from torch import nn

import res2net_fused
from res2net_fused.backends.triton import tiles as tile_table
from res2net_fused.backends.triton.tiles import Shape, Tile, lookup
from res2net_fused.bench import record_file, results
from res2net_fused.models.checkpoint import load_checkpoint

PACKAGE = Path(res2net_fused.__file__).resolve().parent


# Nothing is executed --------------------------------------------------------------------------------------------------

EXECUTING = {"eval", "exec", "execfile", "compile", "__import__"}  # as plain names: model.eval() is another thing
UNPICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def executed_calls(source):
    """Calls in `source` that execute what they read."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in {*UNPICKLING, "torch"}:
            found += [(node.lineno, f"{node.module}.{n.name}") for n in node.names if n.name.startswith(("load", "Unpickler"))]
        if not isinstance(node, ast.Call):
            continue
        name, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        module, _, function = name.rpartition(".")
        executes = (
            name in EXECUTING
            or (module in UNPICKLING and function.startswith(("load", "Unpickler", "open")))
            or (name == "torch.load" and keywords.get("weights_only") != "True")
            or (module == "yaml" and function != "safe_load")
            or (module in ("np", "numpy") and function == "load" and keywords.get("allow_pickle", "False") != "False")
            or keywords.get("shell") == "True"
            or name in ("os.system", "os.popen")
        )
        if executes:
            found.append((node.lineno, ast.unparse(node)))
    return found


# The package wherever it lies, and what lies beside it in a checkout.
FILES = sorted(path for name in (PACKAGE.name, "benchmarks", "examples") for path in (PACKAGE.parent / name).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_nothing_executes_what_it_reads(path):
    assert executed_calls(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "eval(text)",
        "exec(open(path).read())",
        "pickle.load(file)",
        "pickle.loads(data)",
        "from pickle import loads",
        "from torch import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "joblib.load(path)",
        "yaml.load(file)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_the_scan_can_fail(source):
    assert executed_calls(source)


def test_the_scan_passes_what_is_harmless():
    assert executed_calls("model.eval(); torch.load(p, weights_only=True); json.loads(t); re.compile(t); np.load(p)") == []


# Tables of tiles ------------------------------------------------------------------------------------------------------

SHAPE = Shape("step", (9, 0), "half", 26, 26, 32 * 56 * 56)
ROW = {
    "kernel": "step", "capability": "9.0", "dtype": "half", "width": 26, "inputs": 26, "pixels": 32 * 56 * 56,
    "tile": [64, 32, 32, 4, 3],
}  # fmt: skip


def table(**changes):
    return json.dumps({"rows": [ROW | changes]}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"rows":' * 50_000,
        b"\xff\xfe\x00binary",
        table().decode().encode("utf-16"),
        table()[:-20],
        table(width=10**400),
        table(pixels=2**63),
        table(capability="9" * 5000 + ".0"),
        table(capability="-9.0"),
        table(kernel=["step"]),
        table(dtype={"half": 1}),
        table(tile=[64.0, 32, 32, 4, 3]),
        table(tile=[64, 32, 32, True, 3]),
        table(tile=[64, 32, 32, 4, float("nan")]),
        table(tile=[[64], 32, 32, 4, 3]),
        table(tile="64,32"),
        b'{"rows": [' + b"9" * 10_000 + b"]}",
    ],
    ids=range(17),
)
def test_hostile_tables_of_tiles(user_table, content, caplog):
    user_table.write_bytes(content)
    with pytest.raises(ValueError, match="is no table of tiles.*res2net-fused tune") as error:
        tile_table.read(user_table)
    assert str(user_table) in str(error.value) and len(str(error.value)) < 1000
    with caplog.at_level(logging.WARNING, "res2net_fused"):
        assert lookup(SHAPE) is None
    assert "tuned tiles are not used" in caplog.text


def test_tables_with_wrong_bytes(user_table):
    """Whatever a byte becomes: a table that is read has only tiles that kernels can have, and a look-up never fails."""
    rng, good, read = random.Random(1), table(), 0
    for _ in range(400):
        content = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        user_table.write_bytes(content)
        tile_table.forget()
        assert lookup(SHAPE) is None or type(lookup(SHAPE)) is Tile
        try:
            read += len(tile_table.read(user_table))
        except ValueError as error:
            assert str(user_table) in str(error)
    assert 0 < read < 400  # both happened


# Results --------------------------------------------------------------------------------------------------------------

ENVIRONMENT = dict.fromkeys(results.ENVIRONMENT_FIELDS, "x")


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 100_000, "is no result file"),
        ("\x00", "is no result file"),
        (json.dumps({"environment": ENVIRONMENT | {"failures": [1]}, "rows": []}), "failures of type list"),
        (json.dumps({"environment": ENVIRONMENT | {"runs": {"command": "x"}}, "rows": []}), "runs of type dict"),
        (json.dumps({"environment": ENVIRONMENT | {"runs": [{"run": 1}]}, "rows": []}), "runs without a command"),
        (json.dumps({"environment": ENVIRONMENT | {"runs": ["x"]}, "rows": []}), "runs without a command"),
    ],
    ids=range(6),
)
def test_hostile_results(tmp_path, text, message):
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        record_file.Record(path, ENVIRONMENT)
    assert str(path) in str(error.value)


# Checkpoints ----------------------------------------------------------------------------------------------------------


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def save(state, path):
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=path.suffix != ".old")
    return path


def refused(path, match):
    """`load_checkpoint` raises and has changed nothing."""
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=match) as error:
        load_checkpoint(model, path)
    assert path.name in str(error.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("suffix", [".pth", ".old", ".safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.9, 0.999])
def test_truncated_checkpoints(tmp_path, suffix, kept):
    path = save(network().state_dict(), tmp_path / f"file{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    refused(path, "get it anew")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content", [b"<!DOCTYPE html><html>Not found</html>", b"version https://git-lfs.github.com/spec/v1\n", b"\x80\x02}q\x00."]
)
def test_files_of_another_kind(tmp_path, suffix, content):
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    refused(path, "get it anew|holds no state_dict")


@pytest.mark.parametrize("suffix", [".pth", ".old", ".safetensors"])
def test_checkpoints_with_wrong_bytes(tmp_path, suffix):
    """A file whose form is damaged raises that one error; damage to the numbers alone cannot be seen."""
    path, rng, model = save(network().state_dict(), tmp_path / f"file{suffix}"), random.Random(3), network()
    content, raised = path.read_bytes(), 0
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(8):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            load_checkpoint(model, path)
        except RuntimeError as error:
            assert str(path) in str(error)
            raised += 1
    assert raised > 5


def odd(tensor, kind):
    """`tensor` as a kind that a parameter cannot take."""
    if kind == "sparse":
        return tensor.to_sparse()
    if kind == "complex":
        return torch.complex(tensor, tensor)
    return tensor.to("meta")


@pytest.mark.parametrize("kind", ["sparse", "complex", "meta"])
def test_odd_tensors_load_nothing(tmp_path, kind):
    state = network().state_dict()
    state["1.bias"] = odd(state["1.bias"], kind)  # behind others, which would be loaded before it
    refused(save(state, tmp_path / "file.pth"), "'1.bias' are no dense tensors")


def test_a_file_that_holds_itself(tmp_path):
    state = {"epoch": 3}
    state["model"] = state
    refused(save(state, tmp_path / "file.pth"), "holds no state_dict")


@pytest.mark.parametrize("error", [pickle.UnpicklingError(), EOFError(), MemoryError("x" * 10_000)], ids=repr)
def test_whatever_a_reader_raises(tmp_path, monkeypatch, error):
    def load(*arguments, **keywords):
        raise error

    path = save(network().state_dict(), tmp_path / "file.pth")
    monkeypatch.setattr(torch, "load", load)
    refused(path, f"{type(error).__name__}.*get it anew")


def test_checkpoints_that_cannot_be_read(tmp_path):
    for name in ("folder.pth", "folder.safetensors"):
        (tmp_path / name).mkdir()
        with pytest.raises(OSError, match=name):
            load_checkpoint(network(), tmp_path / name)
