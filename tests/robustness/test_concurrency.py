"""Threads, forks and workers: calls of one model and of several at once give what they give one after the other."""

import copy
import dataclasses
import functools
import itertools
import multiprocessing
import os
import re
import threading
import time

import pytest
import torch
from helpers import Chain, assert_close, randomize, run_together
from official_models import BLOCK_KINDS, IMAGES, official
from published_blocks.speakers1d import SpeechBrainChain
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tree import ROOT

from res2net_fused import Bottle2neck, accelerate, explain, freeze, hierarchical_conv2d, refresh, restore
from res2net_fused._native import library
from res2net_fused.modules import fused_forward, fused_forward1d, made_on, weight_cache
from res2net_fused.modules.block_state import STATE
from res2net_fused.patching import accelerate as taking_over
from res2net_fused.patching.class_swap import fused_class

ROUNDS = 12
KINDS = [BLOCK_KINDS[name] for name in ("official", "identity_pass", "uncounted_pad")]
IMAGES_64 = IMAGES[..., :17, :19].double()
needs_library = pytest.mark.skipif(not library.cpu_library().loaded, reason=library.cpu_library().reason or "loaded")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def infer(model, x):
    with torch.inference_mode():
        return model(x)


def inputs(count, channels_last=True):
    """Images of other sizes for each thread."""
    images = [IMAGES[:, :, : 33 - 2 * i, : 47 - 3 * i] for i in range(count)]
    return [x.contiguous(memory_format=torch.channels_last) if channels_last else x.contiguous() for x in images]


# Calls ------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("impatient_threads")
@pytest.mark.parametrize("keep", ["kept", "frozen", "with gradients"])
def test_one_model_in_many_threads(keep):
    """Where weights are kept, every round begins with all threads folding at once."""
    model = accelerate(official())
    call = model if keep == "with gradients" else functools.partial(infer, model)
    images = inputs(4)
    expected = [call(x).detach() for x in images]
    for _ in range(ROUNDS):
        refresh(model)
        if keep == "frozen":
            freeze(model)
        found = run_together(*(functools.partial(call, x) for x in images))
        assert all(map(torch.equal, found, expected))
    assert all(report.fused for report in explain(model))


@pytest.mark.usefixtures("impatient_threads")
def test_models_of_several_kinds_at_once():
    models = [accelerate(official(kind)) for kind in KINDS] + [accelerate(official(baseWidth=14, scale=8))]
    images = inputs(len(models))
    expected = [infer(model, x) for model, x in zip(models, images, strict=True)]
    for _ in range(ROUNDS):
        for model in models:
            refresh(model)
        work = [functools.partial(infer, *pair) for pair in zip(models, images, strict=True)]
        assert all(map(torch.equal, run_together(*work), expected))


@pytest.mark.usefixtures("impatient_threads")
@pytest.mark.parametrize("change", [refresh, freeze, lambda model: freeze(refresh(model)), accelerate], ids=range(4))
def test_what_may_run_beside_calls(change):
    """Weights stay the same, so that results must too, whatever is dropped, frozen or packed meanwhile."""
    model = accelerate(official())
    images = inputs(3)
    expected = [infer(model, x) for x in images]
    done = threading.Event()

    def call(i):
        try:
            return all(torch.equal(infer(model, images[i]), expected[i]) for _ in range(2 * ROUNDS))
        finally:
            done.set()

    def disturb():
        while not done.wait(0.001):
            change(model)
        return True

    assert all(run_together(*(functools.partial(call, i) for i in range(3)), disturb))


@pytest.mark.usefixtures("impatient_threads")
def test_blocks_may_be_accelerated_beside_calls():
    """A call takes the class that it finds: its own forward or the fused one."""
    for _ in range(3):
        model = official().double()
        expected = infer(model, IMAGES_64)

        def call(model=model):
            return [infer(model, IMAGES_64) for _ in range(3)]

        for results in run_together(call, call, functools.partial(accelerate, model))[:2]:
            for result in results:
                assert_close(result, expected, 1e-12)


@pytest.mark.usefixtures("impatient_threads")
def test_threads_that_accelerate_one_model_take_turns(monkeypatch):
    """Blocks are tried on copies, which cannot be made while another thread changes them."""
    model, own, inside, most = official(), taking_over._take_over, [], []

    def counted(*arguments):
        inside.append(1)
        most.append(len(inside))
        own(*arguments)
        inside.pop()

    monkeypatch.setattr(taking_over, "_take_over", counted)
    run_together(*[functools.partial(accelerate, model), functools.partial(restore, model)] * 2)
    assert max(most) == 1
    assert all(r.fused is not False for r in explain(accelerate(model)))


@pytest.mark.usefixtures("impatient_threads")
def test_threads_generate_one_class():
    for _ in range(20 * ROUNDS):
        kind = type("Kind", (KINDS[0],), {})
        generated = run_together(*[functools.partial(fused_class, kind, fused_forward.FusedForward)] * 4)
        assert len(set(generated)) == 1


# Weights that change while they are made --------------------------------------------------------------------------------


def block_2d():
    x = torch.randn(2, 32, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return randomize(Bottle2neck(32, 8).double()).eval(), x


def block_1d():
    x = torch.randn(2, 32, 23, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return accelerate(randomize(SpeechBrainChain()).double().eval(), backend="cpu"), x


SLOW = {"2d": (block_2d, fused_forward, "fold_block"), "1d": (block_1d, fused_forward1d, "resolve_weights")}


@pytest.fixture(params=SLOW.values(), ids=SLOW.keys())
def slow_block(request, monkeypatch):
    """(block, x, made, go): after folding, the first call sets `made` and waits for `go`."""
    make, module, name = request.param
    block, x = make()
    made, go, first = threading.Event(), threading.Event(), threading.Lock()
    own = getattr(module, name)

    def slowly(*args, **kwargs):
        result = own(*args, **kwargs)
        if first.acquire(blocking=False):
            made.set()
            assert go.wait(60)
        return result

    monkeypatch.setattr(module, name, slowly)
    return block, x, made, go


def written_unseen(block):
    """New values in all weights and statistics, of which PyTorch knows nothing."""
    for tensor in (*block.parameters(), *block.buffers()):
        if tensor.is_floating_point():
            tensor.data.mul_(1.5)


@pytest.mark.parametrize("make", [infer, lambda block, x: freeze(block)], ids=["call", "freeze"])
def test_refresh_is_not_undone_by_what_was_folded_before_it(slow_block, make):
    block, x, made, go = slow_block

    def change():
        assert made.wait(60)
        written_unseen(block)
        refresh(block)
        go.set()

    run_together(functools.partial(make, block, x), change)
    found = infer(block, x)
    refresh(block)
    assert torch.equal(found, infer(block, x))


# Streams, as far as they can be looked at without a GPU (else tests/gpu/test_streams.py) -----------------------------


class FakeStream:
    ids = itertools.count()

    def __init__(self):
        self.stream_id, self.waited = next(self.ids), []

    def record_event(self):
        return self

    def wait_event(self, event):
        self.waited.append(event)


@pytest.fixture
def current(monkeypatch):
    """The current stream, of which `lent` tells what was recorded; `capturing` may be set."""

    class Current:
        stream, capturing, lent = FakeStream(), False, []

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Current.stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: Current.capturing)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: Current.lent.append((tensor, stream)))
    return Current


def test_kept_weights_are_waited_for_and_held_on_other_streams(current):
    block, x = block_2d()
    infer(block, x)
    folded = weight_cache.mark_made(getattr(block, STATE).kept[1], torch.device("cuda"))
    maker, other = current.stream, FakeStream()
    infer(block, x)
    assert current.lent == []
    # What a call has left out, a hooked projection for one, the stream's later calls may read.
    current.stream = other
    weight_cache.lend_to_current_stream(dataclasses.replace(folded, packed=None))
    for _ in range(3):  # once is enough
        infer(block, x)
        assert other.waited == [maker] and maker.waited == []
        lent = [id(tensor) for tensor, stream in current.lent if stream is other]
        kept = folded.conv1_weight, folded.conv3_bias, *folded.weights, *folded.biases, *folded.packed
        assert set(map(id, kept)) <= set(lent) and len(lent) == len(set(lent))
    current.capturing, current.stream = True, FakeStream()  # a graph cannot wait for what lies outside it
    weight_cache.lend_to_current_stream(folded)
    assert current.stream.waited == []
    current.capturing = False  # and a stream that a graph was captured on is still to be lent to
    weight_cache.lend_to_current_stream(folded)
    assert current.stream.waited == [maker]


def test_streams_without_end_are_not_remembered_without_end(current, monkeypatch):
    monkeypatch.setattr(made_on, "_MANY_STREAMS", 4)
    block, x = block_2d()
    infer(block, x)
    folded = weight_cache.mark_made(getattr(block, STATE).kept[1], torch.device("cuda"))
    for _ in range(20):
        current.stream = FakeStream()
        for _ in range(2):
            infer(block, x)
        assert len(current.stream.waited) == 1 and len(folded.made.readers) <= 4


# Training ---------------------------------------------------------------------------------------------------------------


def trained(model, x, steps=3):
    """The model's state after some steps of an optimizer, and an inference between them."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    for _ in range(steps):
        model.train()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.arange(len(x)) % 5).backward()
        optimizer.step()
        infer(model.eval(), x)
    return [tensor.clone() for tensor in model.state_dict().values()] + [infer(model, x)]


@pytest.mark.usefixtures("impatient_threads")
@pytest.mark.parametrize("backend", ["auto", pytest.param("cpu", marks=needs_library)])
def test_training_in_threads_gives_the_same_bits(backend):
    models = [accelerate(official(kind), backend=backend) for kind in KINDS]
    serving = accelerate(official())
    images = inputs(len(models))
    served = infer(serving, images[0])
    expected = [trained(copy.deepcopy(model), x) for model, x in zip(models, images, strict=True)]

    def serve():
        return all(torch.equal(infer(serving, images[0]), served) for _ in range(ROUNDS))

    *found, right = run_together(*(functools.partial(trained, *p) for p in zip(models, images, strict=True)), serve)
    assert right
    for states, wanted in zip(found, expected, strict=True):
        assert all(map(torch.equal, states, wanted))


def test_gradients_of_one_model_in_threads():
    """Each thread backward through a graph of its own; the gradients add up as PyTorch's do."""
    model = accelerate(official().double().train(), backend="reference")
    images = [IMAGES_64 + i for i in range(3)]

    def gradients(x):
        return torch.autograd.grad(model(x).square().sum(), list(model.parameters()))

    expected = [gradients(x) for x in images]
    for found, wanted in zip(run_together(*(functools.partial(gradients, x) for x in images)), expected, strict=True):
        for a, b in zip(found, wanted, strict=True):
            assert_close(a, b, 1e-12)


# Processes --------------------------------------------------------------------------------------------------------------


class Features(Dataset):
    """What a model makes of an image, worked out where the item is loaded."""

    def __init__(self, model, images):
        self.model, self.images = model, images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return infer(self.model, self.images[i : i + 1])[0].clone()


@needs_fork
@pytest.mark.parametrize("threads", [1, 2], ids=["1thread", "2threads"], indirect=True)
@pytest.mark.parametrize("frozen", [False, True], ids=["kept", "frozen"])
def test_forked_workers_of_a_data_loader(frozen, threads):
    """The parent has packed weights, scratch memory and a pool of OpenMP threads, of which the children have the first two."""
    images = torch.cat([IMAGES, IMAGES.flip(3)]).contiguous(memory_format=torch.channels_last)
    model = accelerate(official())
    if frozen:
        freeze(model)
    data = Features(model, images)
    expected = torch.stack([data[i] for i in range(len(data))])
    loader = DataLoader(data, batch_size=1, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert_close(torch.cat(list(loader)), expected, 1e-6)  # one thread there: other sums
    assert torch.equal(data[0], expected[0])  # and the parent goes on


@pytest.mark.slow
def test_spawned_workers_of_a_data_loader():
    model = freeze(accelerate(official()))
    data = Features(model, IMAGES.contiguous(memory_format=torch.channels_last))
    expected = torch.stack([data[i] for i in range(len(data))])
    loader = DataLoader(data, batch_size=1, num_workers=1, multiprocessing_context="spawn", timeout=100)
    assert_close(torch.cat(list(loader)), expected, 1e-6)


@needs_fork
@needs_library
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_amid_calls_of_other_threads():
    """A child has none of the threads that took scratch memory at the moment of the fork, nor what they had locked."""
    tensors = Chain(width=3).tensors((1, 3, 3), torch.float32)
    call = functools.partial(hierarchical_conv2d, *tensors, backend="cpu")
    expected, done = call(), threading.Event()

    def keep_calling():
        while not done.is_set():
            call(dilation=800)  # 164 MB of scratch memory, more than is kept: it is freed at every call

    def fork():
        try:
            return [_right_in_a_child(call, expected) for _ in range(ROUNDS)]
        finally:
            done.set()

    assert all(run_together(keep_calling, keep_calling, fork)[-1])


def _right_in_a_child(call, expected) -> bool:
    child = os.fork()
    if child == 0:
        wrong = 1
        try:
            torch.set_num_threads(1)  # as workers do: there is no pool of OpenMP threads in a child
            wrong = not all(torch.equal(call(), expected) for _ in range(3))
        finally:
            os._exit(wrong)  # without the parent's clean-up
    for _ in range(600):
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return status == 0
        time.sleep(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False


def _call_in_a_child(queue) -> None:
    queue.put(float(hierarchical_conv2d(*Chain(width=3).tensors((1, 3, 3), torch.float32)).sum()))


@needs_fork
def test_a_process_forked_by_multiprocessing():
    """`fork` without a loader: whoever uses it sets one thread, as torch.multiprocessing asks for."""
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        child = context.Process(target=_call_in_a_child, args=(queue,))
        child.start()
        found = queue.get(timeout=60)
        child.join(60)
    finally:
        torch.set_num_threads(torch_threads)
    assert child.exitcode == 0
    assert found == pytest.approx(float(hierarchical_conv2d(*Chain(width=3).tensors((1, 3, 3), torch.float32)).sum()))


# Free threading ---------------------------------------------------------------------------------------------------------


def test_the_module_leaves_free_threaded_python_its_freedom():
    """Importing a module that does not say so turns the lock on again. The declaration is what can be tested without one."""
    source = ROOT / "csrc/python/build_info_module.cpp"
    assert re.search(r"PYBIND11_MODULE\(_build_info, m, py::mod_gil_not_used\(\)\)", source.read_text())
