"""`rf.tune`. Times are planted: nothing depends on the machine's speed."""

import copy
import logging
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn
from tuned_network import CHANNELS, SIZE, images, run

import res2net_fused as rf
from res2net_fused import cli
from res2net_fused.backends import choices, policy, selection
from res2net_fused.backends.choices_file import read
from res2net_fused.backends.policy import why_left_to_pytorch
from res2net_fused.modules import measuring as block_measuring
from res2net_fused.tuning import tune as tuning

pytestmark = pytest.mark.usefixtures("choices_table", "clock")


def test_the_fastest_is_taken_kept_and_shown(network, clock, choices_table):
    x = images()
    expected = run(network, x)
    report = rf.tune(network, x, progress=False)
    (call,) = report.calls
    assert call.blocks == ("1", "2") and call.choice == "cpu" and {"own", "reference", "cpu"} <= call.ms.keys()
    assert all(error < 1e-5 for error in call.errors.values())
    assert report.model_ms.keys() == {"own", "predicted", "tuned"} and "times as fast as its own" in str(report)
    assert "and 1 more" in str(report) and "cpu 2 (" in str(report)
    torch.testing.assert_close(run(network, x), expected)
    assert all("measured here in ms: cpu 2" in block.reason for block in rf.explain(network))
    assert len(read(choices_table).choices) == 1


def test_a_model_in_nchw_is_measured_in_channels_last_too(network, clock):
    network.to(memory_format=torch.contiguous_format)
    for p in network.parameters():
        p.data = p.data.contiguous()
    x = images().contiguous()
    strides = [p.stride() for p in network.parameters()]
    clock["in channels-last"] = 0.5
    report = rf.tune(network, x, progress=False)
    assert sorted("channels_last" in call.call for call in report.calls) == [False, True]
    assert "18.00 times as fast; accelerate(model, memory_format=torch.channels_last) converts it" in str(report)
    assert [p.stride() for p in network.parameters()] == strides
    clock["in channels-last"] = 10.0
    assert "0.90 times as fast" in str(rf.tune(network, x, progress=False)) and "converts it" not in str(report.notes)


def test_no_row_is_written_where_nothing_ran_fused(network, choices_table):
    with_hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        (call,) = rf.tune(network, images(), progress=False).calls
    finally:
        with_hook.remove()
    assert not call.ms and any("the block's own forward ran: " in note for note in call.notes)
    assert not choices_table.exists()


def test_the_first_block_that_can_run_fused_is_measured(network):
    network[1].relu = nn.Tanh()
    (call,) = rf.tune(network, images(), progress=False).calls
    assert call.choice == "cpu" and any("own forward ran" in note for note in call.notes)


def test_inputs_and_the_default_device_are_left_alone(network):
    class Normalises(nn.Module):
        def forward(self, x):
            return x.sub_(1.0)

    x = images()
    before = x.clone()
    torch.set_default_device("meta")
    try:
        (call,) = rf.tune(nn.Sequential(Normalises(), network), x, progress=False).calls
    finally:
        torch.set_default_device(None)
    assert torch.equal(x, before) and call.choice == "cpu"
    y = images().requires_grad_()
    rf.tune(network, y, training=True, progress=False)
    assert y.grad is None


def test_a_head_with_a_synchronised_norm_and_blocks_called_by_name(network):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.norm = network, nn.SyncBatchNorm(CHANNELS)

        def forward(self, x):
            for module in self.body[:3]:
                x = module(x=x) if isinstance(module, rf.Bottle2neck) else module(x)
            return self.norm(x.mean((2, 3)))

    (call,) = rf.tune(Named().eval(), images(), progress=False).calls
    assert call.blocks == ("body.1", "body.2") and call.choice == "cpu"


def test_the_own_forward_is_taken_where_it_is_the_fastest(network, clock):
    x = images()
    before = run(network, x)
    clock["own"] = 0.5
    rf.tune(network, x, progress=False)
    out = run(network, x)
    for block in rf.explain(network):
        assert block.fused is False and "its own forward is the fastest, measured here in ms: own 0.5, cpu 2" in block.reason
    torch.testing.assert_close(out, before)

    run(network, images(3))
    assert "the nearest" in rf.explain(network)[0].reason


@pytest.mark.parametrize("choice", ["cpu", "cpu:direct", "reference"])
def test_every_choice_is_what_runs(network, clock, choice):
    x = images(size=16)
    exact = run(copy.deepcopy(network).double(), x.double())
    clock[choice] = 0.1
    assert rf.tune(network, x, progress=False).calls[0].choice == choice
    for _ in range(4):  # asked anew, known, prepared
        out = run(network, x)
    assert float((out.double() - exact).norm() / exact.norm()) < 5e-6
    report = rf.explain(network)[0]
    assert report.backend == choice.partition(":")[0]
    if choice == "cpu:direct":
        assert "direct convolution" in report.plan


def test_nothing_is_measured_twice(network, clock):
    rf.tune(network, images(), progress=False)
    count = len(clock["calls"])
    report = rf.tune(network, images(), progress=False)
    assert report.calls[0].notes == ("measured before",) and report.calls[0].choice == "cpu"
    assert len(clock["calls"]) == count + 1, "of the whole model alone"


def test_another_process_measures_nothing_again(network, choices_table):
    torch.save(network.state_dict(), choices_table.with_name("weights.pt"))
    rf.tune(network, images(), progress=False)
    code = (
        "import torch, res2net_fused as rf\n"
        "from res2net_fused.backends import measuring\n"
        "measuring.settle = None\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "b = rf.Bottle2neck(128, 32, base_width=24, scale=4).eval().to(memory_format=torch.channels_last)\n"
        "x = torch.randn(2, 128, 6, 6).contiguous(memory_format=torch.channels_last)\n"
        "print(rf.tune(b, x, progress=False))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ))
    assert "measured before" in done.stdout and "cpu 2" in done.stdout


def test_a_wrong_candidate_is_never_used(network, clock, monkeypatch, caplog):
    x = images()
    exact = run(copy.deepcopy(network).double(), x.double())
    clock["cpu"] = 0.01  # the fastest by far, and wrong
    backend = selection.get_backend("cpu")
    own = type(backend).block_forward

    def wrong(*arguments):
        return own(*arguments) + 1e-3

    monkeypatch.setattr(type(backend), "native_settings", lambda *call: None)
    monkeypatch.setattr(type(backend), "prepared_block", staticmethod(lambda *_: None))
    monkeypatch.setattr(type(backend), "block_forward", staticmethod(wrong))
    with caplog.at_level(logging.WARNING, "res2net_fused"):
        report = rf.tune(network, x, progress=False)
    (call,) = report.calls
    assert call.choice == "reference" and "cpu" not in call.ms
    assert any("differs from float64" in note and note.startswith("cpu: ") for note in call.notes)
    assert "please report it" in caplog.text
    out = run(network, x)
    assert float((out.double() - exact).norm() / exact.norm()) < 5e-6
    assert rf.explain(network)[0].backend == "reference"


def test_what_raises_is_put_aside_and_what_has_no_memory_is_not(network, clock, monkeypatch):
    backend = selection.get_backend("cpu")
    errors = [RuntimeError("a launcher's"), torch.OutOfMemoryError("none")]
    monkeypatch.setattr(type(backend), "native_settings", lambda *call: None)
    monkeypatch.setattr(type(backend), "prepared_block", staticmethod(lambda *_: None))
    for error in errors:
        selection._aside.clear()
        choices.forget()

        def raises(*_, error=error):
            raise error

        monkeypatch.setattr(type(backend), "block_forward", staticmethod(raises))
        (call,) = rf.tune(network, images(), progress=False).calls
        assert "cpu" not in call.ms and call.choice == "reference"
        assert bool(selection._aside) == (type(error) is RuntimeError)
        os.remove(os.environ["RES2NET_FUSED_CHOICES"])


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(network, training):
    seen = []
    network[1].register_forward_hook(lambda *_: seen.append("outer"))
    network[0].register_forward_pre_hook(lambda *_: seen.append("stem"))
    network.train(training)
    network[0].weight.grad = torch.ones_like(network[0].weight)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [m.training for m in network.modules()]
    x = images()
    kept, state = x.clone(), torch.get_rng_state()
    report = rf.tune(network, x, training=training, progress=False)
    assert report.calls[0].call.startswith("training" if training else "inference") and report.calls[0].ms
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(x, kept) and not seen
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [m.training for m in network.modules()] == modes
    grads = {name for name, p in network.named_parameters() if p.grad is not None}
    assert grads == {"0.weight"} and torch.equal(network[0].weight.grad, torch.ones_like(network[0].weight))


def test_training_is_measured_forward_and_backward_and_taken(network, clock):
    network.train()
    clock["reference"] = 0.1
    (call,) = rf.tune(network, images(), training=True, progress=False).calls
    assert call.choice == "reference" and {"own", "cpu", "reference"} <= call.ms.keys()
    network(images()).sum().backward()
    assert {block.backend for block in rf.explain(network)} == {"reference"}
    choices.forget()
    os.remove(os.environ["RES2NET_FUSED_CHOICES"])
    clock["own"] = 0.01
    rf.tune(network, images(), training=True, progress=False)
    network(images()).sum().backward()
    assert all("its own forward is the fastest" in block.reason for block in rf.explain(network))


def test_frozen_norms_are_measured_with_gradients(network, clock):
    network.train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    (call,) = rf.tune(network, images(), training=True, progress=False).calls
    assert call.call.startswith("gradients") and call.choice == "cpu"
    choices.forget()
    os.remove(os.environ["RES2NET_FUSED_CHOICES"])
    clock["own"] = 0.1
    rf.tune(network, images(), training=True, progress=False)
    network(images().requires_grad_()).sum().backward()
    assert all("its own forward is the fastest" in block.reason for block in rf.explain(network))


@pytest.mark.parametrize("factor, fails", [(1.003, 9), (1.003, 2), (1.2, 9)])
def test_gradients_of_relus_that_rounding_decides_are_no_fault(network, monkeypatch, factor, fails):
    """Rounding may take a ReLU's input across zero, and with it gradients: other images are tried before anybody is blamed."""
    backend = selection.get_backend("cpu")
    own, calls = type(backend).train_backward, []

    def backward(self, *arguments, **options):
        found = own(self, *arguments, **options)
        calls.append(1)
        return (found[0] * (factor if len(calls) <= fails else 1.0), *found[1:])

    monkeypatch.setattr(type(backend), "train_backward", backward)
    network.train()
    (call,) = rf.tune(nn.Sequential(network[1]), images_of(network[1]), training=True, progress=False).calls
    assert ("cpu" in call.ms) == (fails < 4) and bool(selection._aside) == (factor > 1.1)
    assert any("differs from float64" in note for note in call.notes) == (fails > 4)


def test_minutes_end_it_and_another_call_goes_on(network, monkeypatch):
    network[2] = rf.Bottle2neck(CHANNELS, CHANNELS // 4, base_width=40, scale=4).eval().to(memory_format=torch.channels_last)
    ticks = iter([0.0, 1.0, *[1e9] * 50])
    monkeypatch.setattr(tuning.time, "monotonic", lambda: next(ticks))
    report = rf.tune(network, images(), minutes=1, progress=False)
    assert [bool(call.ms) for call in report.calls] == [True, False] and not report.model_ms
    assert report.calls[1].notes == ("no time was left",)
    report = rf.tune(network, images(), progress=False)
    assert [call.notes for call in report.calls] == [("measured before",), ()]


@pytest.mark.parametrize("bad, error", [({"minutes": 0}, ValueError), ({"minutes": -1.0}, ValueError)])
def test_bad_arguments(network, bad, error):
    with pytest.raises(error, match="minutes is"):
        rf.tune(network, images(), **bad)
    with pytest.raises(ValueError, match="call accelerate"):
        rf.tune(nn.Conv2d(3, 3, 1), images())
    with pytest.raises(TypeError, match="model is a function"):
        rf.tune(run, images())


def test_a_choice_does_not_hide_what_is_asked_for(network, clock, monkeypatch):
    clock["own"] = 0.1
    rf.tune(network, images(), progress=False)
    monkeypatch.setenv("RES2NET_FUSED_BACKEND", "reference")
    run(network, images())
    assert rf.explain(network)[0].backend == "reference"


def test_a_served_model_can_be_tuned_meanwhile(network):
    x = images()
    expected = run(network, x)
    stop, wrong = threading.Event(), []

    def serve():
        while not stop.is_set():
            if not torch.allclose(run(network, x), expected, rtol=1e-4, atol=1e-5):
                wrong.append(1)

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        rf.tune(network, x, progress=False)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong


def test_wrapped_models_are_tuned(network):
    """Images stay on the CPU: DataParallel takes them to the GPU, where its network is."""
    there = copy.deepcopy(network).to("cuda" if torch.cuda.is_available() else "cpu")
    for wrapped in (torch.compile(network, backend="eager"), nn.DataParallel(there)):
        assert rf.tune(wrapped, images(), progress=False).calls


def test_zero_initialised_norms_hide_nothing(network):
    """A last norm with a factor of zero, as networks begin training with, would let a wrong chain pass."""
    for block in network[1:3]:
        nn.init.zeros_(block.bn3.weight)
    (call,) = rf.tune(network, images(), progress=False).calls
    assert all(error > 0 for error in call.errors.values())


def test_blocks_that_are_asked_for_or_cannot_be_measured_are_told(network, monkeypatch):
    model = nn.ModuleList([rf.Bottle2neck(CHANNELS, CHANNELS // 4, base_width=24, scale=4, backend="cpu"), network[1]]).eval()
    both = nn.Sequential(*model)
    report = rf.tune(both, torch.randn(2, CHANNELS, SIZE, SIZE), progress=False)
    assert len(report.calls) == 1 and "0: left as it is: it is asked to run by backend='cpu'" in report.notes
    monkeypatch.setattr(block_measuring, "bare_copy", lambda *_: 1 / 0)
    (call,) = rf.tune(nn.Sequential(network[1]), torch.randn(3, CHANNELS, 5, 5), progress=False).calls
    assert not call.ms and "cannot be measured: ZeroDivisionError" in call.notes[0]


def test_warm_up_leaves_the_model_as_it_was(network):
    network.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    x, state = images(), torch.get_rng_state()
    rf.warm_up(network, x)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and network.training


def test_the_command_tunes_models_by_name(capsys, choices_table):
    arguments = ["tune", "--device", "cpu", "--batch", "1", "--size", "32"]
    assert cli.main([*arguments, "--model", "res2net50_26w4s"]) == 0
    out = capsys.readouterr().out
    assert "layer1.0" in out and "times as fast as its own" in out and f"kept in {choices_table}" in out
    assert len(read(choices_table).choices) == 8
    arguments = ["tune", "--device", "cpu", "--batch", "2", "--size", "33"]
    assert cli.main([*arguments, "--train", "--dtype", "float32"]) == 0
    assert "training (2, 4x26" in capsys.readouterr().out


def test_half_types_are_left_to_processors_that_have_them(monkeypatch):
    """Ours compute in float32: until that is measured, PyTorch's operators run."""
    block = rf.Bottle2neck(CHANNELS, CHANNELS // 4, base_width=24, scale=4).eval().bfloat16()
    block, x = block.to(memory_format=torch.channels_last), images_of(block).bfloat16()
    run(block, x)
    assert rf.explain(block)[0].backend == "cpu"
    monkeypatch.setattr(policy, "why_left_to_pytorch", lambda device, dtype: "has them" if dtype == torch.bfloat16 else None)
    choices.forget()
    run(block, x)
    assert rf.explain(block)[0].reason == "has them"
    rf.tune(block, x, progress=False)
    run(block, x)
    assert rf.explain(block)[0].backend == "cpu", "it was measured"


def images_of(block):
    return torch.randn(2, block.conv1.in_channels, SIZE, SIZE).contiguous(memory_format=torch.channels_last)


def test_which_processors_have_half_types(monkeypatch):
    own = why_left_to_pytorch.__wrapped__
    cpu = torch.device("cpu")
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    monkeypatch.setattr(policy, "_flags", lambda: "flags : avx2")
    assert all(own(cpu, dtype) is None for dtype in (torch.bfloat16, torch.float16, torch.float32))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert "bfloat16 instructions" in own(cpu, torch.bfloat16) and own(cpu, torch.float16) is None
    monkeypatch.setattr(policy, "_flags", lambda: "flags : avx512_fp16")
    assert "float16 instructions" in own(cpu, torch.float16) and own(cpu, torch.float32) is None
    assert own(torch.device("cuda"), torch.float16) is None
