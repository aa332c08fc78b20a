"""Self-tuning: what pays, works and agrees is used; everything else is turned down with its reason.

Time is a toy clock that each step moves on by what its setting is said to cost, so that outcomes do not depend on the
machine. Networks and their numbers are real.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from toys import network as network_spec

from autoseg import devices, tuning
from autoseg.agreement import Workload
from autoseg.computing import apply, autocast, describe, fits, safe_base, scaler, settle, untuned
from autoseg.networks import build
from autoseg.records import load_json, save_json
from autoseg.schema import Tuning
from autoseg.tuning import time_step, tune

CPU = torch.device("cpu")
PATCH = (8, 12, 12)
SPEC = network_spec(features=(6, 8, 10))


@pytest.fixture(autouse=True)
def process_as_it_was():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


class Machine:
    """Steps that take the seconds that `cost` says for a setting; remembers which settings it has run."""

    def __init__(self, cost):
        self.now, self.cost, self.ran = 0.0, cost, []

    def clock(self):
        return self.now

    def step_of(self, network, setting):
        def step():
            self.ran.append(setting)
            self.now += self.cost(setting)

        return step


def cost_of(**factors):
    """1 s a step, times the factor of each choice that is made."""

    def cost(setting):
        seconds = 1.0
        for name, factor in factors.items():
            if getattr(setting, name) not in (False, "float32"):
                seconds *= factor
        return seconds

    return cost


def unet():
    return build(SPEC, 1, 3)


def work(machine, make_network=unet, **more):
    given = {"patch": PATCH, "batch_size": 2, "channels": 1, "device": CPU, **more}
    return Workload(make_network=make_network, step_of=machine.step_of, **given)


def probe(machine, make_network=unet, seconds=1e5, **more):
    return tune(work(machine, make_network, **more), seconds=seconds, budget_seconds=1000, clock=machine.clock)


@pytest.fixture
def no_compiler(monkeypatch):
    def compile(self, *args, **kwargs):
        raise RuntimeError("no C++ compiler found\nlong explanations")

    monkeypatch.setattr(nn.Module, "compile", compile)


def note(made, name):
    return next(line for line in made.notes if line.startswith(name))


def test_what_pays_is_used_with_its_numbers(no_compiler):
    machine = Machine(cost_of(keep_freed=0.5, channels_last=0.97, precision=0.8, compiled=0.1))
    made = probe(machine)
    assert (made.keep_freed, made.channels_last, made.precision, made.compiled) == (True, False, "bfloat16", False)
    assert note(made, "freed memory") == "freed memory kept: used, 2 x faster (0.5 s against 1 s a step)"
    assert "no clear gain" in note(made, "channels-last")
    assert note(made, "bfloat16") == "bfloat16: used, 1.25 x faster (0.4 s against 0.5 s a step)"
    assert made.seconds_a_step == pytest.approx(0.4)


def test_a_failing_compiler_leaves_training_eager(no_compiler):
    made = probe(Machine(cost_of(compiled=0.1)))
    assert not made.compiled
    assert note(made, "compile") == "compile: not used, does not work here (RuntimeError: no C++ compiler found)"
    network = apply(unet(), made, CPU)
    assert network(torch.zeros(1, 1, *PATCH)).shape == (1, 3, *PATCH)


def test_what_is_slower_is_turned_down_after_one_pair(no_compiler):
    machine = Machine(cost_of(keep_freed=2.0, channels_last=3.0, precision=1.5))
    made = probe(machine)
    assert replace(made, notes=(), seconds_a_step=None) == safe_base(CPU)
    assert "3 x slower (3 s against 1 s a step)" in note(made, "channels-last")
    assert sum(setting.channels_last for setting in machine.ran) == 2


def test_both_sides_are_timed_in_turn(no_compiler):
    machine = Machine(cost_of(channels_last=0.9))
    probe(machine)
    turns = [s.channels_last for s in machine.ran if s.precision == "float32" and not s.keep_freed]
    turns = turns[turns.index(True) + 1 :]
    assert turns[:6] == [False, True, True, False, False, True]


def test_a_gain_must_show_pair_by_pair_and_over_all():
    probes = tuning._Probes(work(Machine(cost_of())), lambda: 0.0, 60)
    candidate = replace(probes.best, channels_last=True)
    # Two pairs of three say 0.9 times, the medians of all say 1.8 s against 1.2 s.
    said = probes.judge(candidate, lambda: None, 1.0, [(1.0, 0.9), (2.0, 1.8), (1.2, 2.0)])
    assert said == "not used, 1.5 x slower (1.8 s against 1.2 s a step)"
    said = probes.judge(candidate, lambda: None, 1.0, [(1.0, 0.9), (2.0, 1.8), (1.2, 1.0)])
    assert said.startswith("used, 1.11 x faster")
    assert probes.best.channels_last


def test_what_is_hopeless_is_given_up_during_the_agreement(no_compiler):
    class Slow(WrongInLowPrecision):
        def forward(self, x, all_scales=False):
            machine.now += 5 if torch.is_autocast_enabled("cpu") else 1
            return self.inner(x, all_scales=True)

    machine = Machine(cost_of(precision=0.5))
    made = probe(machine, lambda: Slow(None))
    assert note(made, "bfloat16") == "bfloat16: not used, 5 x slower (5 s against 1 s in the agreement)"


def test_a_machine_that_slows_down_meanwhile_does_not_decide(no_compiler):
    machine = Machine(lambda setting: 1.0 + machine.now / 20)
    assert not probe(machine, seconds=1e6).channels_last


class WrongInLowPrecision(nn.Module):
    """A network whose low-precision kernel is fast and wrong, in the way that `spoil` says."""

    divisor = (4, 4, 4)

    def __init__(self, spoil):
        super().__init__()
        self.inner, self.spoil = unet(), spoil

    def forward(self, x, all_scales=False):
        scales = self.inner(x, all_scales=True)
        if torch.is_autocast_enabled("cpu"):
            scales = [self.spoil(scale, x) for scale in scales]
        return scales if all_scales else scales[0]


class LosesGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, outer: Tensor) -> Tensor:
        return torch.zeros_like(outer)


def one_voxel_off(scale, x):
    scale = scale.clone()
    scale[0, 0, 0, 0, 0] += 3
    return scale


SPOILS = {
    "scaled": lambda scale, x: 1.3 * scale,
    "one voxel": one_voxel_off,
    "not finite": lambda scale, x: scale / 0,
    "this shape only": lambda scale, x: 0 * scale if x.shape[2:] == PATCH else scale,
    "large batches only": lambda scale, x: 0 * scale if len(x) == 2 else scale,
    "gradient lost": lambda scale, x: LosesGradient.apply(scale),
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_a_fast_and_wrong_kernel_is_refused(no_compiler, spoil):
    machine = Machine(cost_of(precision=0.1))
    made = probe(machine, lambda: WrongInLowPrecision(spoil))
    assert made.precision == "float32"
    assert "disagrees with float32" in note(made, "bfloat16")
    assert all(setting.precision == "float32" for setting in machine.ran)


@pytest.mark.parametrize("name", ["unet", "resenc"])
def test_a_right_kernel_agrees(no_compiler, name):
    """On a patch of which the deepest stage sees more than two slices: with two, kernels of some CPUs are wrong."""
    spec = replace(SPEC, name=name)
    machine = Machine(cost_of(precision=0.5, channels_last=0.5))
    made = probe(machine, lambda: build(spec, 1, 3), patch=(12, 16, 20))
    assert (made.precision, made.channels_last) == ("bfloat16", True)


def test_what_is_wrong_on_other_shapes_does_no_harm(no_compiler):
    machine = Machine(cost_of(precision=0.5))
    made = probe(machine, lambda: WrongInLowPrecision(lambda scale, x: scale if x.shape[2:] == PATCH else 0 * scale))
    assert made.precision == "bfloat16"


def test_low_precision_comes_before_the_layout(no_compiler):
    """A layout that gains a little alone and spoils low precision would else keep it from its larger gain."""

    def cost(setting):
        low = setting.precision != "float32"
        return {(False, False): 1.0, (False, True): 0.9, (True, False): 0.5, (True, True): 0.7}[
            low, setting.channels_last
        ]

    made = probe(Machine(cost))
    assert (made.precision, made.channels_last, made.seconds_a_step) == ("bfloat16", False, pytest.approx(0.5))


class LeavesOut(nn.Module):
    """Half of its features in training, at random; in low precision logits are `factor` times what they should be."""

    divisor = (2, 2, 2)

    def __init__(self, factor):
        super().__init__()
        self.factor = factor
        self.body = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Dropout(0.5), nn.Conv3d(8, 2, 1))

    def forward(self, x, all_scales=False):
        logits = self.body(x) * (self.factor if torch.is_autocast_enabled("cpu") else 1.0)
        return [logits] if all_scales else logits


@pytest.mark.parametrize(("factor", "precision"), [(1.0, "bfloat16"), (1.2, "float32")])
def test_what_is_left_out_at_random_hides_no_wrong_kernel(no_compiler, factor, precision):
    made = probe(Machine(cost_of(precision=0.5)), lambda: LeavesOut(factor))
    assert made.precision == precision
    assert LeavesOut(factor).body[2].p == 0.5


def test_a_wrong_layout_is_refused_however_little_it_is_off(no_compiler):
    class WrongInChannelsLast(WrongInLowPrecision):
        def forward(self, x, all_scales=False):
            weight = self.inner.encoder[1][0].conv.weight
            off = 0.0 if weight.is_contiguous() else 1e-3
            return [scale + off for scale in self.inner(x, all_scales=True)]

    made = probe(Machine(cost_of(channels_last=0.5)), lambda: WrongInChannelsLast(None))
    assert not made.channels_last
    assert "disagrees" in note(made, "channels-last")


def test_a_network_of_ones_own_without_divisor_or_scales(no_compiler):
    machine = Machine(cost_of(precision=0.5))
    made = probe(machine, lambda: nn.Conv3d(1, 2, 3, padding=1), all_scales=False)
    assert made.precision == "bfloat16"


def test_a_step_that_fails_in_a_setting_turns_it_down(no_compiler):
    class Failing(Machine):
        def step_of(self, network, setting):
            if setting.precision == "bfloat16":
                raise torch.OutOfMemoryError("tried to allocate 3 GiB")
            return super().step_of(network, setting)

    made = probe(Failing(cost_of(keep_freed=0.5)))
    assert made.keep_freed
    assert "tried to allocate 3 GiB" in note(made, "bfloat16")


def test_where_float32_does_not_fit_what_fits_is_used(no_compiler):
    class Small(Machine):
        def step_of(self, network, setting):
            def step():
                if setting.precision == "float32":
                    raise torch.OutOfMemoryError("full")
                self.now += 1

            return step

    made = probe(Small(cost_of()))
    assert made.precision == "bfloat16"
    assert made.seconds_a_step == 1


def test_an_error_of_the_base_is_not_swallowed():
    class Broken(Machine):
        def step_of(self, network, setting):
            raise ZeroDivisionError("in the step itself")

    with pytest.raises(ZeroDivisionError):
        probe(Broken(cost_of()))


@pytest.mark.parametrize("expected", [{"seconds": 200.0}, {"steps": 200}])
def test_short_training_is_not_probed(expected):
    machine = Machine(cost_of())
    made = tune(work(machine), clock=machine.clock, **expected)
    assert len(made.notes) == 1
    assert "training takes" in made.notes[0] and "200 s" in made.notes[0].replace("2e+02", "200")
    assert len(machine.ran) <= 2
    assert made.precision == "float32"


def test_probes_keep_to_their_share(no_compiler):
    # 2 % of 1500 s are 30 s; the fewest pairs of the first candidate take 9 s, so the later ones are left out.
    machine = Machine(lambda setting: 2.0)
    made = tune(work(machine), seconds=1500.0, clock=machine.clock)
    assert machine.now <= 30
    assert "no clear gain" in note(made, "freed memory")
    assert "not tried, needs about 60 s" in note(made, "compile")


def test_one_step_dearer_than_all_probes_may_be():
    machine = Machine(lambda setting: 150.0)
    made = tune(work(machine), steps=10000, clock=machine.clock)
    assert len(machine.ran) == 1
    assert "one step takes 150 s and probes may take 120 s; not tried are freed memory kept" in made.notes[0]
    assert "bfloat16" in made.notes[0]


def test_memory_is_kept_where_there_is_no_time_to_compare():
    machine = Machine(lambda setting: 20.0)
    made = tune(work(machine), steps=10000, clock=machine.clock)
    assert made.keep_freed == untuned(CPU, "").keep_freed
    assert machine.now <= 60


def test_a_compilation_that_is_not_earned_back_is_not_used(monkeypatch):
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: None)
    first = []

    def cost(setting):
        if setting.compiled and not first:
            first.append(1)
            return 40.0
        return 0.9 if setting.compiled else 1.0

    machine = Machine(cost)
    made = tune(work(machine), seconds=390.0, budget_seconds=1000, clock=machine.clock)
    assert not made.compiled
    machine = Machine(cost)
    first.clear()
    monkeypatch.setattr(tuning, "SHARE", 1.0)
    made = tune(work(machine), seconds=390.0, budget_seconds=1000, clock=machine.clock)
    assert "first step takes 40 s and it would save 39 s in all" in note(made, "compile")
    first.clear()
    made = tune(work(machine), seconds=800.0, budget_seconds=1000, clock=machine.clock)
    assert made.compiled


def test_threads_are_tried_where_there_are_more_than_two(monkeypatch, no_compiler):
    monkeypatch.setattr(devices, "cores", lambda: 6)
    torch.set_num_threads(8)
    machine = Machine(lambda setting: {6: 1.0, 5: 0.8, 3: 0.7, 4: 0.5}[setting.threads])
    made = probe(machine)
    assert {setting.threads for setting in machine.ran} == {6, 5, 3}
    assert made.threads == 3 == torch.get_num_threads()
    assert "5 threads: used" in note(made, "5 threads")


def test_random_state_and_the_callers_network_stay_as_they_were(no_compiler):
    torch.manual_seed(11)
    before, mine = torch.get_rng_state(), unet()
    torch.set_rng_state(before)
    weights = {name: tensor.clone() for name, tensor in mine.state_dict().items()}
    probe(Machine(cost_of(precision=0.5)))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in mine.state_dict().items())


def test_compiling_and_layout_keep_names_and_values():
    plain, made = unet(), unet()
    made.load_state_dict(plain.state_dict())
    apply(made, replace(safe_base(CPU), compiled=True, channels_last=True), CPU)
    assert list(made.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in made.state_dict().items())
    assert made._compiled_call_impl is not None
    assert made.encoder[1][0].conv.weight.is_contiguous(memory_format=torch.channels_last_3d)


def test_precision_is_what_convolutions_compute_in():
    network, image = unet(), torch.zeros(1, 1, *PATCH)
    base = safe_base(CPU)
    with autocast(base, CPU):
        assert network(image).dtype == torch.float32
    with autocast(replace(base, precision="bfloat16"), CPU):
        assert network(image).dtype == torch.bfloat16
    assert not scaler(replace(base, precision="bfloat16"), CPU).is_enabled()
    assert scaler(replace(base, precision="float16"), CPU).is_enabled()


def test_a_choice_is_saved_said_in_a_line_and_bound_to_its_machine(tmp_path):
    made = untuned(CPU, "it is a test")
    save_json(made, tmp_path / "tuning.json")
    assert load_json(Tuning, tmp_path / "tuning.json") == made
    assert describe(made).count("\n") == 0
    assert describe(made).startswith("float32, eager, contiguous, freed memory ")
    assert describe(made).endswith("nothing was probed: it is a test")
    assert fits(made, CPU)
    assert not fits(replace(made, device="cpu, another"), CPU)
    assert not fits(replace(made, torch="0.1"), CPU)


def test_settle_sets_the_threads():
    settle(replace(safe_base(CPU), threads=2))
    assert torch.get_num_threads() == 2


def test_only_one_length_of_training_is_taken():
    with pytest.raises(ValueError, match="either"):
        tune(work(Machine(cost_of())))


def test_a_step_is_timed_before_its_batch_is_chosen():
    machine = Machine(cost_of())
    assert time_step(work(machine), 10.0, machine.clock) == 1
    assert len(machine.ran) == 1, "a second one would take more than 2 % of the budget"
    assert time_step(work(machine), 1e4, machine.clock) == 1
    assert len(machine.ran) == 3


def test_a_step_without_room_has_no_time():
    def full(setting):
        raise torch.OutOfMemoryError("no room")

    machine = Machine(full)
    assert time_step(work(machine), 1e4, machine.clock) is None
