"""Changed elements of a tensor go where a copy of a box of the tensor would put them."""

import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from millrace.checksum import sampled_checksums
from millrace.engines.stock.launching import EXTENSION
from millrace.extension.millrace_boxes import box_of
from tests.engines.stock.test_parts import at, boxes


def changes() -> Any:
    """The module, as the engines import it."""
    with patch.object(sys, "path", [str(EXTENSION), *sys.path]):
        return importlib.import_module("millrace_changes")


@given(case=boxes(), order=st.permutations(range(3)), margin=st.integers(0, 2), data=st.data())
def test_elements_go_where_a_copy_of_a_box_puts_them(
    case: Any, order: list[int], margin: int, data: st.DataObject
) -> None:
    """The place is a region of a larger parameter, as in fused layers, whose dimensions may be in another order."""
    shape, box, _ = case
    old = torch.arange(1.0, torch.Size(shape).numel() + 1).view(shape)
    chosen = data.draw(st.lists(st.integers(0, old.numel() - 1), unique=True).map(sorted))
    new = old.clone()
    new.view(-1)[chosen] *= -1

    def source(tensor: torch.Tensor) -> torch.Tensor:
        return at(tensor, box).permute([dim for dim in order if dim < len(shape)])

    view = source(old)
    found = box_of(shape, int(view.storage_offset()), view.shape, view.stride())
    assert found is not None
    parameter = torch.zeros([size + 2 * margin for size in view.shape], dtype=torch.bfloat16)
    target = parameter
    for dim, size in enumerate(view.shape):
        target = target.narrow(dim, margin, size)
    target.copy_(view)
    expected = parameter.clone()
    expected[tuple(slice(margin, margin + size) for size in view.shape)] = source(new).bfloat16()

    module = changes()
    need = module.Need("p", target, *found)
    placed = module.Placed({"w": old}, {"w": [need]})
    assert placed.differing({"w": old}) == []
    folder = {"at/w": torch.tensor(chosen, dtype=torch.int32), "to/w": new.view(-1)[chosen]}
    with tempfile.TemporaryDirectory() as place:
        save_file(folder, Path(place, "changes"), metadata={"whole": "[]"})
        placed.write(Path(place, "changes"), {"w": new})
    assert torch.equal(parameter, expected)
    assert torch.equal(module.source_of(new, need), source(new))
    assert placed.differing({"w": new}) == []
    assert placed.differing({"w": new + 64}) == ["p"]


@given(together=st.sampled_from([1, 5, 2**22]), seed=st.integers(0, 2**31))
def test_many_tensors_of_one_parameter(together: int, seed: int) -> None:
    """Experts are parts of one parameter: of some, few elements have changed, of others all, or none. They are in two
    files, and a rank holds half of each of them."""
    draw = torch.Generator().manual_seed(seed)
    fused = torch.zeros(6, 4, 4)
    old = {f"{index}.w": torch.rand(8, 4, generator=draw) + 1 for index in range(6)}
    new = {name: one.clone() for name, one in old.items()}
    few: dict[str, torch.Tensor] = {}
    for name in ("0.w", "2.w", "3.w"):
        chosen = (torch.rand(32, generator=draw) < 0.3).nonzero()[:, 0]
        new[name].view(-1)[chosen] *= -1
        few |= {f"at/{name}": chosen.int(), f"to/{name}": new[name].view(-1)[chosen]}
    new["4.w"] = -old["4.w"]
    module = changes()
    needs = {name: [module.Need("p", fused[index], ((2, 6), (0, 4)), (0, 1))] for index, name in enumerate(old)}
    for index, one in enumerate(old.values()):
        fused[index] = one[2:6]
    placed = module.Placed(old, needs)
    assert len(placed._groups) == 1
    with tempfile.TemporaryDirectory() as place, patch.object(module, "TOGETHER", together):
        path = Path(place)
        save_file(few, path / "changes", metadata={"whole": '["4.w"]'})
        for file, chosen_names in (("a", ("0.w", "3.w", "5.w")), ("b", ("1.w", "2.w", "4.w"))):
            save_file({name: new[name] for name in chosen_names}, path / f"{file}.safetensors")
        files = importlib.import_module("millrace_files")
        folder = {
            name: one for file in "ab" for name, one in files.mapped_tensors(path / f"{file}.safetensors")[0].items()
        }
        placed.write(path / "changes", folder)
        assert torch.equal(fused, torch.stack([new[f"{index}.w"][2:6] for index in range(6)]))
        assert placed.differing(folder) == []
        fused[3] += 1
        assert placed.differing(folder) == ["p"]
        assert placed.checksums(folder) == dict(zip(folder, sampled_checksums(list(folder.values())), strict=True))
