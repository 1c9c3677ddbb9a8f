import pytest
import torch
import torch.distributed as dist

from opsd_megatron.config import ParallelConfig
from opsd_megatron.errors import ConfigError
from opsd_megatron.parallel.mesh import build_mesh
from tests.ranks import run_on_ranks

LAYOUTS = (
    ParallelConfig(tp=2, pp=2, cp=2, sequence_parallel=True),
    ParallelConfig(cp=2),
    ParallelConfig(tp=2, pp=2, vpp=2),
    ParallelConfig(),
)


def describe_meshes() -> list[dict]:
    found = []
    for layout in LAYOUTS:
        mesh = build_mesh(layout)
        axes = {axis.name: axis for axis in (mesh.tp, mesh.pp, mesh.cp, mesh.dp, mesh.dp_cp, mesh.replica, mesh.world)}
        sums = {}
        for name, axis in axes.items():
            total = torch.tensor([dist.get_rank()])
            if axis.group is not None:
                dist.all_reduce(total, group=axis.group)
            sums[name] = total.item()
        found.append(
            {
                "ranks": {name: axis.ranks for name, axis in axes.items()},
                "places": {name: (axis.rank, axis.size, axis.group is None) for name, axis in axes.items()},
                "sums": sums,
                "stages": (mesh.is_first_stage, mesh.is_last_stage),
                "text": mesh.describe(),
            }
        )
    return found


def test_every_rank_is_at_its_place_on_every_axis_also_after_the_layout_changed():
    by_rank = run_on_ranks(8, describe_meshes)
    for number, layout in enumerate(LAYOUTS):
        dp = 8 // layout.model_ranks
        for rank, meshes in enumerate(by_rank):
            mesh = meshes[number]
            places = {name: place for name, (place, _, _) in mesh["places"].items()}
            assert rank == places["tp"] + layout.tp * (
                places["cp"] + layout.cp * (places["dp"] + dp * places["pp"])
            )  # tp is the fastest axis, then cp, dp, pp
            sizes = {name: size for name, (_, size, _) in mesh["places"].items()}
            assert sizes == {
                "tp": layout.tp,
                "pp": layout.pp,
                "cp": layout.cp,
                "dp": dp,
                "dp_cp": dp * layout.cp,
                "replica": layout.model_ranks,
                "world": 8,
            }
            for name, (place, size, silent) in mesh["places"].items():
                members = mesh["ranks"][name]
                assert members[place] == rank
                assert silent == (size == 1)
                assert mesh["sums"][name] == sum(members)
            assert set(mesh["ranks"]["replica"]) == {
                other for other in range(8) if by_rank[other][number]["places"]["dp"][0] == places["dp"]
            }
            assert mesh["stages"] == (places["pp"] == 0, places["pp"] == layout.pp - 1)
    assert "tp=2 pp=2 cp=2 dp=1 dp_cp=2 replica=8 sequence_parallel" in by_rank[0][0]["text"]


def build_mesh_of_three() -> str:
    with pytest.raises(ConfigError) as caught:
        build_mesh(ParallelConfig(tp=3))
    return str(caught.value)


def test_a_world_size_that_does_not_match_the_layout_is_refused_on_every_rank():
    for message in run_on_ranks(8, build_mesh_of_three):
        assert "world size 8 is not a multiple of tp*pp*cp = 3*1*1" in message
