from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from millrace.errors import DataError
from millrace.train.batch import collate
from millrace.train.policy import gather_logprobs, load_policy
from tests.train.small_models import (
    CPU,
    VOCABULARY,
    make_config,
    make_model,
    make_policy,
    make_samples,
    plain_logprobs,
    weights,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_transformers_also_beside_padding(folder: Path, temperature: float) -> None:
    samples = make_samples(5)
    policy = make_policy(folder, make_config())
    plain = AutoModelForCausalLM.from_pretrained(folder)
    logprobs_BT = policy.token_logprobs(collate(samples).token_ids_BT, temperature).logprobs_BT
    assert logprobs_BT.dtype == torch.float32
    for row, sample in zip(logprobs_BT, samples, strict=True):
        expected = plain_logprobs(plain, sample.token_ids.tolist(), temperature)
        torch.testing.assert_close(row[1 : sample.token_ids.size], expected, atol=1e-5, rtol=1e-5)
        assert row[0] == 0


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_chunks_change_neither_logprobs_nor_entropy_nor_gradient(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(2, 5, VOCABULARY, generator=generator)).requires_grad_()
    token_ids = torch.randint(0, VOCABULARY, (2, 5), generator=generator)
    upstream = torch.randn(2, 5, generator=generator)
    result = gather_logprobs(logits, token_ids, 0.7, chunk_bytes=rows * 4 * VOCABULARY)
    [gradient] = torch.autograd.grad((result.logprobs_BT * upstream).sum(), logits)

    softened = torch.log_softmax(logits[:, :-1].double() / 0.7, dim=-1)
    expected = softened.gather(-1, token_ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    [expected_gradient] = torch.autograd.grad((expected * upstream[:, 1:]).sum(), logits)
    torch.testing.assert_close(result.logprobs_BT[:, 1:].double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        result.entropy_BT[:, 1:].double(), -(softened.exp() * softened).sum(-1), atol=1e-5, rtol=1e-5
    )
    assert not result.entropy_BT.requires_grad


def test_bfloat16_logits_are_summed_in_float32() -> None:
    """In bfloat16, a logprob of -10 is off by up to 0.03. With a sum in float32 it need not be, even from bfloat16
    logits."""
    logits = (5 * torch.randn(1, 64, 500, generator=torch.Generator().manual_seed(0))).bfloat16()
    token_ids = torch.randint(0, 500, (1, 64), generator=torch.Generator().manual_seed(1))
    exact = torch.log_softmax(logits.double(), dim=-1)[:, :-1].gather(-1, token_ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    result = gather_logprobs(logits, token_ids, 1.0).logprobs_BT
    assert result.dtype == torch.float32
    torch.testing.assert_close(result[:, 1:].double(), exact, atol=1e-5, rtol=1e-5)


def test_bfloat16_forward_keeps_float32_weights_and_gradients(folder: Path) -> None:
    token_ids = collate(make_samples(5)).token_ids_BT
    exact = make_policy(folder, make_config()).token_logprobs(token_ids, 1.0).logprobs_BT
    policy = make_policy(folder, make_config(dtype="bfloat16"))
    logprobs = policy.token_logprobs(token_ids, 1.0).logprobs_BT
    logprobs.sum().backward()  # type: ignore[no-untyped-call]
    assert not torch.equal(logprobs, exact)
    torch.testing.assert_close(logprobs, exact, atol=0.1, rtol=0.05)
    for parameter in policy.parameters().values():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32


def test_gradient_checkpointing_computes_layers_twice_and_changes_nothing(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", dropout=0.5)
    token_ids = collate(make_samples(5)).token_ids_BT
    calls, gradients = [], []
    for checkpointing in (False, True):
        policy = make_policy(folder, make_config(gradient_checkpointing=checkpointing))
        count: list[int] = []
        policy.model.model.layers[0].input_layernorm.register_forward_hook(lambda *_, count=count: count.append(1))
        policy.token_logprobs(token_ids, 1.0).logprobs_BT.sum().backward()  # type: ignore[no-untyped-call]
        calls.append(len(count))
        gradients.append([p.grad for p in policy.parameters().values()])
    assert calls == [1, 2]
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("tied", [True, False])
def test_named_tensors_are_the_files_tensors_tied_ones_once(tmp_path: Path, tied: bool) -> None:
    folder = make_model(tmp_path / "model", tied=tied)
    tensors = weights(make_policy(folder, make_config()))
    assert ("lm_head.weight" in tensors) is not tied
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    if tied:
        del expected["lm_head.weight"]
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name])
        assert not tensor.requires_grad


def test_the_reference_stays_when_the_policy_moves(folder: Path) -> None:
    policy = make_policy(folder, make_config())
    token_ids = collate(make_samples(3)).token_ids_BT
    with pytest.raises(ValueError, match="take_reference"):
        policy.reference_logprobs(token_ids, 1.0)
    policy.take_reference()
    before = policy.reference_logprobs(token_ids, 1.0)
    assert torch.equal(before, policy.token_logprobs(token_ids, 1.0).logprobs_BT)
    for tensor in policy.state().values():
        tensor.mul_(1.5)
    assert torch.equal(policy.reference_logprobs(token_ids, 1.0), before)
    policy.take_reference()
    assert torch.equal(policy.reference_logprobs(token_ids, 1.0), policy.token_logprobs(token_ids, 1.0).logprobs_BT)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty"):
        load_policy(tmp_path / "empty", make_config(), CPU)
    damaged = make_model(tmp_path / "damaged") / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:5000])
    with pytest.raises(DataError, match="damaged"):
        load_policy(damaged.parent, make_config(), CPU)
