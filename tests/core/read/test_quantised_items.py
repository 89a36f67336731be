"""Tensors of classes of their own (low-bit optimizer state, quantised weights): refused as such, and never called damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import shardferry
from shardferry.checkpoint.open import open_checkpoint, opened_storage
from shardferry.read.verify import verify_checkpoint
from shardferry.read.zip_header import HeaderTooShort, QuantisedState, parse_header
from tests.support.alone import item_of, save_alone
from tests.support.small_net import Net, adamw, fill


class LowBit(torch.Tensor):
    """Codes and a scale a row, as torchao's optimizers keep their moments."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor) -> LowBit:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], list[Any]]:
        return ["codes", "scale"], []

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        if func in (
            torch.ops.aten.detach.default,
            torch.ops.aten.clone.default,
            torch.ops.aten._to_copy.default,
        ):
            return cls(args[0].codes.clone(), args[0].scale.clone())
        if func is torch.ops.aten.is_pinned.default:
            return False
        raise NotImplementedError(func)


class Thin(torch.Tensor):
    """A plain tensor under another class."""


def low_bit(shape: torch.Size) -> LowBit:
    return LowBit(torch.ones(shape, dtype=torch.int8), torch.ones(shape[0]))


@pytest.mark.filterwarnings("ignore:.*quantize.*:")
@pytest.mark.parametrize(
    ("make", "name"),
    [
        pytest.param(lambda: low_bit(torch.Size((4, 4))), f"{__name__}.LowBit", id="wrapper"),
        pytest.param(lambda: torch.nn.Parameter(low_bit(torch.Size((4, 4)))), f"{__name__}.LowBit", id="parameter"),
        pytest.param(lambda: torch.ones(3).as_subclass(Thin), f"{__name__}.Thin", id="thin subclass"),
        pytest.param(lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8), "QInt8", id="torch's own"),
    ],
)
def test_an_item_is_refused_by_its_class_however_little_of_it_is_there(
    make: Callable[[], torch.Tensor], name: str
) -> None:
    item = item_of(make())
    said: list[str] = []
    for length in range(64, len(item), 64):
        try:
            parse_header(item[:length])
        except HeaderTooShort:
            assert not said
        except QuantisedState as error:
            said.append(str(error))
    assert said
    assert all("quantised state" in message and name in message for message in said)


def save(path: Path) -> str:
    model = Net()
    fill(model, optimizer := adamw(model))
    state = get_optimizer_state_dict(model, optimizer)
    moments = state["state"]["second.weight"]
    moments["exp_avg"] = low_bit(moments["exp_avg"].shape)
    save_alone({"optim": state}, path)
    return str(path)


def test_a_load_says_quantised_state_and_changes_nothing(tmp_path: Path) -> None:
    where, model = save(tmp_path / "ckpt"), Net()
    optimizer = adamw(model)
    with pytest.raises(shardferry.ShardferryError) as caught:
        shardferry.load_optimizer_state(model, optimizer, where)
    message = str(caught.value)
    for part in ("quantised state", "second.weight", "exp_avg", f"{__name__}.LowBit", "exclude", "dequantised"):
        assert part in message
    assert "damaged" not in message
    assert not optimizer.state
    shardferry.load_optimizer_state(model, optimizer, where, exclude=["second.weight"], keys="allow_missing")
    assert set(optimizer.state) == {p for n, p in model.named_parameters() if n != "second.weight"}


def test_verify_says_quantised_state_and_still_reads_checksums(tmp_path: Path) -> None:
    catalog = open_checkpoint(save(tmp_path / "ckpt"))
    with opened_storage(catalog) as storage:
        (problem,) = verify_checkpoint(catalog, storage, concurrency=2)
    assert "second.weight.exp_avg" in problem
    assert "quantised state" in problem
    assert "damaged" not in problem
    saved = catalog.tensors["optim.state.second.weight.exp_avg"].chunks.start
    file = tmp_path / "ckpt" / catalog.files[catalog.chunk_file[saved]]
    data = bytearray(file.read_bytes())
    data[data.index(b"\1" * 12, int(catalog.chunk_byte_offset[saved]))] ^= 2
    file.write_bytes(data)
    catalog = open_checkpoint(tmp_path / "ckpt")
    with opened_storage(catalog) as storage:
        (problem,) = verify_checkpoint(catalog, storage, concurrency=2)
    assert "checksum" in problem
