"""The served weights: new ones are staged beside them, checked as a whole, and only then swapped in."""

import hashlib
import json
from math import prod
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsd_megatron.safetensors_header import DTYPES, parse_header
from opsd_megatron.server.refusal import Refusal
from opsd_megatron.server.transfer import Described, Rooms, Staging
from opsd_megatron.transfer import Member, aligned, packed_buckets, unpack

NO_UPDATE = "NoUpdateOpenError"


class WeightStore:
    """Parameters of `model` under their Hugging Face names, and what is staged to replace them.

    Staging holds a second copy in memory, on a CPU for good: the memory of weights that were replaced takes the next
    ones. Nothing but `swap` touches the model.
    """

    def __init__(self, model: PreTrainedModel, root: Path | None):
        """`root`: the one directory below which `stage_directory` reads; None allows none."""
        self.model = model
        self.root = root.resolve() if root else None
        self.parameters = dict(model.named_parameters())
        for parameter in self.parameters.values():  # results depend on it in the last bit: those of later weights too
            parameter.data = aligned(parameter.data)
        self.tied = {  # name -> the parameter that it repeats
            name: source for name, source in getattr(model, "all_tied_weights_keys", {}).items()
            if source in self.parameters and name not in self.parameters
        }  # fmt: skip
        self._staged: Staging | None = None
        self._rooms = Rooms()
        self._shapes: dict[str, torch.Size] | None = None
        self._kept: dict[str, Tensor] = {}
        self.is_hollow = False
        """The memory is there, but nothing has been written to it."""

    @property
    def is_updating(self) -> bool:
        return self._staged is not None

    def begin(self) -> None:
        """Starts with nothing staged; what an unfinished update had staged is gone."""
        self._check_present()
        self._staged = Staging()

    def abort(self) -> None:
        self._staged = None

    def room_for(self, bucket: str, num_bytes: int) -> Tensor:
        """Host memory for the body that holds a bucket; what was staged under that name is gone.

        Its memory is not used again: a request that was given up may still be writing there.
        """
        staged = self._open_update()
        staged.buckets.pop(bucket, None)
        staged.rooms.pop(bucket, None)
        return self._rooms.take(num_bytes, torch.device("cpu"), staged, bucket)

    def stage(self, bucket: str, body: Tensor) -> int:
        """Number of tensors in a whole safetensors file, bytes in memory of `room_for`."""
        staged = self._open_update()
        try:
            length = int.from_bytes(_raw(body[:8]), "little")
            if 8 + length > len(body):
                raise ValueError(f"its header has {length} bytes, the body {len(body)}")
            values = body[8 + length :]
            entries = parse_header(bytes(_raw(body[8 : 8 + length])), len(values))
        except ValueError as error:
            raise Refusal(400, f"bucket {bucket}: the body is not a whole safetensors file ({error})") from error
        tensors = {}
        for name, entry in entries.items():
            dtype = DTYPES.get(entry.dtype, torch.uint8)
            self._check_one(f"bucket {bucket}", name, dtype, entry.shape)
            tensors[name] = aligned(values[entry.start : entry.stop]).view(dtype).view(entry.shape)
        staged.buckets[bucket] = tensors
        return len(tensors)

    def receive(self, described: Described, member: Member, bucket_bytes: int) -> int:
        """Number of tensors that came through the group; Refusal 409 before the first where they do not fit."""
        staged = self._open_update()
        if missing := sorted(self.parameters.keys() - described.keys()):
            raise Refusal(409, f"{len(missing)} of {len(self.parameters)} tensors are missing, first {missing[0]}")
        for name, (dtype, shape) in described.items():
            self._check_one("broadcast", name, dtype, shape)
        names = list(described)
        sizes = [dtype.itemsize * prod(shape) for dtype, shape in described.values()]
        for number, bucket in enumerate(packed_buckets(sizes, bucket_bytes)):
            label = f"broadcast {number}"
            room = self._rooms.take(sum(sizes[index] for index in bucket), member.device, staged, label)
            member.broadcast(room)
            chosen = [names[index] for index in bucket]
            dtypes, shapes = zip(*(described[name] for name in chosen), strict=True)
            staged.buckets[label] = dict(zip(chosen, unpack(room, dtypes, shapes), strict=True))
        return len(names)

    def stage_directory(self, path: str) -> int:
        """Number of tensors read from the safetensors files of a Hugging Face directory below `root`."""
        staged = self._open_update()
        directory = self._confine(path)
        for file in _shards(directory):
            try:
                tensors = safetensors.torch.load_file(file)  # mapped, not read
            except (OSError, safetensors.SafetensorError) as error:
                raise Refusal(400, f"{file}: cannot be read as safetensors ({error})") from error
            for name, tensor in tensors.items():
                self._check_one(str(file), name, tensor.dtype, tuple(tensor.shape))
            copies = {name: self._rooms.copy_of(tensor, staged, str(file)) for name, tensor in tensors.items()}
            staged.buckets[str(file)] = copies
        return sum(map(len, staged.buckets.values()))

    def check_complete(self) -> None:
        """Refusal 409 unless exactly one tensor is staged for each parameter."""
        counts: dict[str, int] = {}
        for tensors in self._open_update().buckets.values():
            for name in tensors:
                counts[name] = counts.get(name, 0) + 1
        missing = sorted(self.parameters.keys() - counts.keys())
        repeated = sorted(name for name, count in counts.items() if count > 1)
        if missing:
            raise Refusal(409, f"{len(missing)} of {len(self.parameters)} tensors are missing, first {missing[0]}")
        if repeated:
            raise Refusal(409, f"{len(repeated)} tensors were sent in two buckets, first {repeated[0]}")
        flat = self._flat()
        for name, source in self.tied.items():
            if name in flat and not torch.equal(flat[name], flat[source]):
                raise Refusal(409, f"{name} is tied to {source} in this model but differs from it")

    @torch.no_grad()
    def swap(self) -> list[Tensor]:
        """Replaces every parameter's values; `check_complete` has passed and no engine runs.

        By pointer where the new ones lie on the parameter's device: milliseconds, however large the model. Returns what
        is not needed any more, for giving memory back takes longer than that.
        """
        flat = self._flat()
        moved = [name for name, parameter in self.parameters.items() if parameter.device == flat[name].device]
        for name in self.parameters.keys() - set(moved):
            self.parameters[name].copy_(flat[name])
        replaced = [self.parameters[name].data for name in moved]
        for name in moved:
            self.parameters[name].data = flat[name]
        staging, self._staged, self.is_hollow = self._open_update(), None, False
        return replaced + self._rooms.serve(staging, keep=len(moved) == len(self.parameters))

    @torch.no_grad()
    def release(self, keep: bool) -> None:
        """Gives the parameters' memory back. What they hold is kept in host memory (which on a CPU is where it is) or
        lost."""
        if self._shapes is None:
            self._shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
            self._kept = {name: parameter.data.cpu() for name, parameter in self.parameters.items() if keep}
            for parameter in self.parameters.values():
                parameter.data = parameter.data.new_empty(0)
        if not keep:
            self._kept = {}
        self._rooms = Rooms()
        _return_to_device(self.model)

    @torch.no_grad()
    def restore(self) -> None:
        """Takes the memory again; hollow where nothing was kept."""
        if self._shapes is None:
            return
        for name, parameter in self.parameters.items():
            kept = self._kept.get(name)
            empty = parameter.data.new_empty(self._shapes[name]) if kept is None else kept.to(parameter.device)
            parameter.data = empty
        self.is_hollow = self.is_hollow or not self._kept
        self._shapes, self._kept = None, {}

    def checksums(self) -> dict[str, str]:
        """sha256 of the bytes of each parameter."""
        self._check_present()
        if self.is_hollow:
            raise Refusal(409, "the weights hold nothing since the server slept; publish weights first")
        return {name: hashlib.sha256(_raw(tensor)).hexdigest() for name, tensor in self.parameters.items()}

    def _flat(self) -> dict[str, Tensor]:
        return {name: tensor for tensors in self._open_update().buckets.values() for name, tensor in tensors.items()}

    def _open_update(self) -> Staging:
        if self._staged is None:
            raise Refusal(409, "no weight update is open; POST /start_weight_update first", NO_UPDATE)
        self._check_present()
        return self._staged

    def _check_present(self) -> None:
        if self._shapes is not None:
            raise Refusal(409, "the weights sleep; POST /wake_up?tags=weights first")

    def _check_one(self, where: str, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        wanted = self.parameters.get(self.tied.get(name, name))
        if wanted is None:
            raise Refusal(409, f"{where}: {name} is no tensor of this model (Hugging Face names are expected)")
        if shape != tuple(wanted.shape):
            raise Refusal(409, f"{where}: {name} has shape {list(shape)}, expected {list(wanted.shape)}")
        if dtype != wanted.dtype:
            raise Refusal(409, f"{where}: {name} is {dtype}, expected {wanted.dtype}; cast it or change --dtype")

    def _confine(self, path: str) -> Path:
        if self.root is None:
            raise Refusal(403, "updates from disk are off; start the server with --weights-root DIRECTORY")
        directory = (self.root / path).resolve()
        if not directory.is_relative_to(self.root):
            raise Refusal(403, f"{path} is outside of the server's --weights-root")
        if not directory.is_dir():
            raise Refusal(400, f"{path} is not a directory below the server's --weights-root")
        return directory


def _shards(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return [directory / Path(name).name for name in names]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise Refusal(400, f"{directory} holds no .safetensors file")
    return files


def _raw(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _return_to_device(model: PreTrainedModel) -> None:
    """Freed memory stays with torch's allocator, where others on the same GPU cannot have it."""
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
