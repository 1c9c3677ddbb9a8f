"""The teacher of a run: the student's modules with other weights, or a second model beside them."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from opsd_megatron import config as configs
from opsd_megatron.checkpoint.model_weights import load_weights
from opsd_megatron.data.tokenizer import Tokenizer, check_same_vocabulary, load_tokenizer
from opsd_megatron.models.architecture import Architecture, read_architecture
from opsd_megatron.models.build import build_model
from opsd_megatron.models.teacher import OtherTeacher, Teacher, build_teacher
from opsd_megatron.parallel.mesh import Mesh

Config = configs.LiveTeacher | configs.FrozenTeacher | configs.EmaTeacher | configs.OtherTeacher


def make_teacher(
    config: Config,
    modules: Sequence[nn.Module],
    student: Architecture,
    tokenizer: Tokenizer,
    mesh: Mesh,
    dtype: torch.dtype,
) -> tuple[Teacher, int]:
    """The teacher, and the number of token ids that both models have: the loss compares no others.

    Raises:
        DataError: another model's tokenizer has another vocabulary.
        ConfigError: the layout does not divide that model.
    """
    if not isinstance(config, configs.OtherTeacher):
        return build_teacher(config, modules, mesh), student.vocab_size
    theirs = load_tokenizer(config.path).fingerprint
    check_same_vocabulary(tokenizer.fingerprint, theirs, f"the teacher in {config.path}")
    own = read_architecture(config.path)
    # models of one tokenizer differ in embedding rows that no token uses (Qwen2.5): cut at the student's ids
    chunks = build_model(replace(own, vocab_size=student.vocab_size), mesh, dtype)
    load_weights(chunks, own, config.path, mesh)
    return OtherTeacher(chunks, mesh), min(own.vocab_size, student.vocab_size)
