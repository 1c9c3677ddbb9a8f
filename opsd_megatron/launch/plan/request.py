"""What is asked of the planner, and its printed answer."""

from dataclasses import dataclass, field, replace
from typing import Annotated

import tyro
from rich.console import Console

from opsd_megatron.config import OtherTeacher, RunConfig
from opsd_megatron.launch.plan.estimate import Plan, make_plan
from opsd_megatron.launch.plan.machine import MACHINES, Machine
from opsd_megatron.launch.plan.search import fitting_layouts
from opsd_megatron.launch.plan.shapes import hf_config_of
from opsd_megatron.launch.plan.table import show
from opsd_megatron.models.architecture import architecture_of


@dataclass(frozen=True)
class Request:
    """A recipe on a machine."""

    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)
    """The recipe. `model.path` may be a model directory, a config.json or the name of a published model."""
    machine: Machine = MACHINES["h100-80gb"]
    """Where it runs."""
    efficiency: float = 0.4
    """Share of the peak that executed FLOPs are expected to reach, communication included: an assumption."""


def answer(request: Request, title: str, console: Console) -> Plan:
    """Prints the plan, and layouts that fit where it does not.

    Raises:
        ConfigError: model, layout and machine do not go together.
    """
    model, teacher, other = request.run.model, request.run.teacher, None
    student = architecture_of(hf_config_of(model.path), model.yarn_factor, model.yarn_original_positions)
    if isinstance(teacher, OtherTeacher):  # its head is cut at the student's ids
        other = replace(architecture_of(hf_config_of(teacher.path)), vocab_size=student.vocab_size)
    plan = make_plan(request.run, student, request.machine, request.efficiency, other)
    nearest = []
    if not plan.fits:
        nearest = fitting_layouts(request.run, student, request.machine, request.efficiency, other=other)
    show(plan, title, console, nearest)
    return plan
