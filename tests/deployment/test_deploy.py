"""deploy takes the fastest form that computes the same, says what each step gained, and leaves the model alone."""

import copy

import pytest
import torch
from torch import nn

import slabformer as sf
from slabformer._defaults import RUNTIME_RTOL
from slabformer.deployment import deploy as deployment
from slabformer.deployment.steps import HALF_EPSILONS, STEPS, Form, Job, Step
from slabformer.measure import allocator
from slabformer.nn.controls import repbn_modules
from small_models import images, trained_looking
from tolerances import FLOAT32, assert_close

pytestmark = pytest.mark.usefixtures("_compiler")


def names(deployed: deployment.Deployed) -> list[str]:
    return [step.name for step in deployed.report.steps]


def test_the_deployed_form_computes_the_same_and_the_model_is_left_alone():
    model, x = trained_looking(), images()
    before = copy.deepcopy(model.state_dict())
    deployed = sf.deploy(model, x, compile=False, seconds=0.2)
    assert names(deployed) == ["as given", "fused", "channels last", "in C++"]
    assert deployed.report.steps[1].did == "9 of 9 norms folded"
    assert_close(deployed(x), model(x), FLOAT32)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for step in deployed.report.steps:
        assert step.p50_ms > 0
        assert step.speed > 0
        assert step.name in deployed.report.table()
    assert deployed.report.to_dict()["taken"] == deployed.report.taken


def test_without_measuring_the_last_form_is_taken():
    deployed = sf.deploy(trained_looking(), images(), compile=False, seconds=0)
    assert deployed.report.taken == "in C++"
    assert not repbn_modules(deployed.eager)


def times(monkeypatch: pytest.MonkeyPatch, milliseconds: dict[str, float]) -> list[set[str]]:
    """Let each form take that long; returns which were timed together."""
    together = []

    def time_interleaved(calls, **_):
        together.append(set(calls))
        return {name: [[milliseconds[name] / 1e3]] for name in calls}

    monkeypatch.setattr(deployment, "time_interleaved", time_interleaved)
    return together


def test_a_slower_step_is_reported_and_not_built_on(monkeypatch):
    together = times(monkeypatch, {"as given": 2.0, "fused": 1.0, "channels last": 3.0, "in C++": 0.5})
    deployed = sf.deploy(trained_looking(), images(), compile=False)
    steps = {step.name: step for step in deployed.report.steps}
    assert {name: step.taken for name, step in steps.items()} == {
        "as given": True,
        "fused": True,
        "channels last": False,
        "in C++": True,
    }
    assert [round(step.gain, 2) for step in steps.values()] == [1.0, 2.0, 0.33, 2.0]
    assert [round(step.speed, 2) for step in steps.values()] == [1.0, 2.0, 0.67, 4.0]
    assert together == [{"as given"}, *[{"as given", "fused", name} for name in ("fused", "channels last", "in C++")]]
    assert "slower, not taken" in str(steps["channels last"])
    conv = next(module for module in deployed.eager.modules() if isinstance(module, nn.Conv2d))
    assert not conv.weight.is_contiguous(memory_format=torch.channels_last)  # the step left no trace


def test_a_fused_form_that_is_slower_is_not_built_on(monkeypatch):
    times(monkeypatch, {"as given": 2.0, "fused": 3.0, "channels last": 1.0, "in C++": 4.0})
    deployed = sf.deploy(trained_looking(), images(), compile=False)
    assert deployed.report.taken == "channels last"
    assert repbn_modules(deployed.eager)
    assert_close(deployed(images()), trained_looking()(images()), FLOAT32)


def test_half_precision_goes_through_the_whole_life():
    model, x = trained_looking(), images()
    deployed = sf.deploy(model, x, dtype=torch.bfloat16, compile=False, seconds=0)
    assert names(deployed) == ["as given", "fused", "bfloat16", "channels last", "in C++"]
    assert {p.dtype for p in deployed.eager.parameters()} == {torch.bfloat16}
    assert deployed(x).dtype == torch.bfloat16
    assert 0 < deployed.report.steps[2].max_rel < HALF_EPSILONS * torch.finfo(torch.bfloat16).eps


def test_statistics_are_recalibrated_first_where_data_is_given():
    model = trained_looking()
    batches = [images(4, seed=1), images(4, seed=2)]
    deployed = sf.deploy(model, images(), batches=batches, compile=False, seconds=0)
    assert deployed.report.notes == ("recalibrated on 2 batches",)
    assert not torch.allclose(deployed(images()), model(images()), rtol=1e-3)


def test_how_this_process_allocates_changes_where_asked_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(allocator, "keep_memory", lambda: asked.append(True) or True)
    assert sf.deploy(trained_looking(), images(), compile=False, seconds=0).report.notes == ()
    assert not asked
    deployed = sf.deploy(trained_looking(), images(), compile=False, keep_memory=True, seconds=0)
    assert deployed.report.notes == ("the C library keeps freed memory for the next forward",)


def test_a_model_without_our_norms_is_only_laid_out():
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(1), nn.Linear(4 * 15 * 15, 2)).eval()
    assert names(sf.deploy(model, images(), compile=False, seconds=0)) == ["as given", "channels last"]


class Traced(Step):
    """A target of somebody else's, off by ``error``."""

    def __init__(self, error: float = 0.0) -> None:
        self.error = error

    def applies(self, form: Form, job: Job) -> bool:
        return job.device.type == "cpu"

    def build(self, form: Form, job: Job) -> Form:
        run = nn.Sequential(form.eager, Plus(self.error))
        return Form("traced", "by hand", run, form.eager, form.dtype)


class Plus(nn.Module):
    def __init__(self, error: float) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.error


def test_a_target_from_outside_is_built_verified_and_taken():
    deployed = sf.deploy(trained_looking(), images(), compile=False, seconds=0, steps=[*STEPS, Traced()])
    assert names(deployed)[-2:] == ["in C++", "traced"]
    assert_close(deployed(images()), trained_looking()(images()), FLOAT32)


def test_a_target_that_computes_something_else_is_refused():
    with pytest.raises(sf.VerificationError):
        sf.deploy(trained_looking(), images(), seconds=0, steps=[Traced(error=1.0)])


def test_without_steps_the_model_is_deployed_as_given():
    deployed = sf.deploy(trained_looking(), images(), seconds=0.1, steps=[])
    assert names(deployed) == ["as given"]


@pytest.mark.slow
def test_the_compiled_form_computes_the_same():
    model, x = trained_looking(), images()
    deployed = sf.deploy(model, x, seconds=0)
    assert deployed.report.taken == "compiled"
    assert_close(deployed(x), model(x), RUNTIME_RTOL)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": torch.int8}, "dtype must be a floating point type, got torch.int8"),
        ({"batches": []}, "no batch"),
    ],
    ids=["dtype", "batches"],
)
def test_bad_options_are_refused_in_words(options, said):
    with pytest.raises(ValueError, match=said):
        sf.deploy(trained_looking(), images(), **options)


def test_a_model_in_training_or_still_fading_is_refused():
    model = trained_looking()
    with pytest.raises(ValueError, match="deploy needs eval mode"):
        sf.deploy(model.train(), images())
    sf.PRepBN.set_gamma(model.norm, 0.5)
    with pytest.raises(ValueError, match="still holds its norm"):
        sf.deploy(model.eval(), images(), compile=False)
