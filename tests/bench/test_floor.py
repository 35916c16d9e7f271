"""The least time of a network by counts and measured rates. The counts are exact, and no test times anything."""

import cpu
import network_summary
import pytest
from cpu import HELD

from res2net_fused._timing import Timing
from res2net_fused.bench import floor, networks
from res2net_fused.bench.floor import FLOORS, SQUARE, Part, Products, Rates
from res2net_fused.bench.work import Work

IMAGES = (1, 3, 224, 224)


def totals(parts):
    products = [part.products for part in parts]
    return [sum(getattr(p, f"{kind}_flops") for p in products) for kind in ("pointwise", "chain", "stem")]


@pytest.mark.parametrize("batch", [1, 8])
def test_products_of_26w4s(batch):
    """1x1 convolutions 6.44 GFLOP, 4 MFLOP of them the linear layer; chains 1.83, the 7x7 convolution 0.24."""
    parts = floor.parts(networks.random_network("res2net50_26w4s"), (batch, *IMAGES[1:]))
    assert totals(parts) == [batch * flops for flops in (6_442_680_320, 1_831_624_704, 236_027_904)]
    assert sum(part.work.flops for part in parts) == sum(totals(parts)) and len(parts) == 18
    stem, first, *_, last, head = (part.products for part in parts)
    assert stem.pointwise == () and head.pointwise == ((batch, 1000, 2048),) and stem.chain_flops == first.stem_flops == 0
    assert first.pointwise == tuple((batch * 56 * 56, *size) for size in ((104, 64), (256, 104), (256, 64)))
    assert last.pointwise == tuple((batch * 7 * 7, *size) for size in ((832, 2048), (2048, 832)))
    assert last.chain_flops == batch * 3 * 2 * 7 * 7 * 9 * 208 * 208
    assert len(floor.sizes_of([parts, parts])) == len({size for part in parts for size in part.products.pointwise}) == 17


def test_products_of_other_networks():
    assert totals(floor.parts(networks.random_network("resnet50"), IMAGES))[0] == 4_242_964_480
    grouped = floor.parts(networks.random_network("res2next50"), IMAGES)
    assert sum(totals(grouped)) == sum(part.work.flops for part in grouped)


SIZE = (100, 20, 30)
RATES = Rates({SQUARE: 1e9, SIZE: 5e8}, 1e6)


def test_the_longer_of_products_and_memory_counts():
    products = Products((SIZE,), 2_400_000, 1_000_000)
    seconds = 120_000 / 1e9 + 2_400_000 / 4 / 0.6e9 + 1_000_000 / 1e9
    assert floor.floor_ms([Part(Work(1, 1, 0), products)], RATES, False) == pytest.approx(1e3 * seconds)
    assert floor.floor_ms([Part(Work(1, 1, 0), products)], RATES, True) == pytest.approx(1e3 * (seconds + 120_000 / 1e9))
    slow = Part(Work(30_000, 20_000, 0), products)
    assert floor.floor_ms([slow], RATES, False) == floor.floor_ms([slow], RATES, True) == pytest.approx(50)
    both = floor.fields([slow, Part(Work(1, 1, 0), products)], RATES)
    assert list(both) == list(FLOORS) and both["sgemm_floor_ms"] == pytest.approx(50 + 1e3 * seconds)


def test_rates_are_work_over_time(monkeypatch):
    """Every call takes two seconds here; each size is multiplied, and 64 MB are read and as many written."""
    called = []

    def measured(contenders, device, **turns):
        (call,) = contenders.values()
        called.append(call.outputs()[0].shape)
        return {"call": Timing(2000.0, 0, 0, turns["min_repeats"], 0)}

    monkeypatch.setattr(floor, "measure", measured)
    rates = floor.measure_rates([SIZE])
    assert rates == Rates({SIZE: 60_000.0, SQUARE: 2048.0**3}, 2.0**26)
    assert called == [(100, 20), (2048, 2048), (2**24,)]
    assert rates.best(Rates({SIZE: 7e4, SQUARE: 1.0}, 1.0)) == Rates({SIZE: 7e4, SQUARE: 2048.0**3}, 2.0**26)
    assert "sgemm of 2048 at 1 GFLOP/s, a copy at 2.0 GB/s" in str(Rates({SQUARE: 1e9}, 2e9))


def row(provider, ms, **changes):
    case = {"workload": "network", "config": "res2net50_26w4s", "batch": 1, "provider": provider, "median_ms": ms}
    return case | dict(zip(FLOORS, (25.0, 32.0), strict=True)) | changes


def test_the_table_shows_both_floors_and_is_read_again(tmp_path, capsys):
    found = networks.network_ratios([row("ours", 40.0), row("eager", 80.0)])
    assert [found[0].over_floor(name) for name in FLOORS] == [1.6, 1.25]
    environment = {"device": "Some Chip (AVX2)", "threads": 2, "torch": "2", "peers": {}}
    assert cpu.report(found, environment, {}) == 0
    printed = capsys.readouterr().out
    assert "1.60x (25 ms)" in printed and "1.25x (32 ms)" in printed
    path = tmp_path / "networks.txt"
    path.write_text(printed)
    run = network_summary.from_text(path)
    assert run.ratios[0].floors == found[0].floors
    head, (line,) = network_summary.table_lines([run])
    assert dict(zip(head, line, strict=True))["ours / floor at own sizes"] == "1.25x"
    (old,) = networks.network_ratios([{k: v for k, v in row("ours", 40.0).items() if k not in FLOORS}])
    assert old.floors == {} and "floor" not in networks.ratio_table([old])
    assert networks.ratio_table([old, *found]).count("not timed") > networks.ratio_table(found).count("not timed")


def test_everybody_starts_again_who_is_to_be_held(monkeypatch):
    """Libraries read their switches when they are loaded."""

    class Started(Exception):
        pass

    def execve(program, arguments, environment):
        raise Started(arguments, environment)

    monkeypatch.setattr(cpu.os, "execve", execve)
    monkeypatch.setattr(cpu.sys, "orig_argv", ["python", "benchmarks/cpu.py", "networks", "--isa", "avx2"])
    with pytest.raises(Started) as started:
        cpu.main(["networks", "--isa", "avx2"])
    arguments, environment = started.value.args
    assert arguments[1:] == ["benchmarks/cpu.py", "networks", "--isa", "avx2"]
    assert HELD["avx2"].items() <= environment.items() and "PATH" in environment
    for name, value in HELD["avx2"].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cpu.providers, "unavailable", lambda device: {"openvino": "not installed"})
    assert cpu.main(["networks", "--isa", "avx2", "--bar-peer", "1"]) == 2  # held already: it goes on
