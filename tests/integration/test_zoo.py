"""Models that nobody tuned for, served as TensorFlow in process runs them."""

from __future__ import annotations

from collections.abc import Generator

import grpc
import numpy as np
import pytest

from modelport.tensors import decode, encode
from tests.support.expected import Case, by_tensorflow
from tests.support.rpc import call, canary, open_channel, request, start
from tests.support.saved_models import SERVING_DEFAULT
from tests.support.zoo import INPUTS, ODD_NUMBERS, Zoo

OK = grpc.StatusCode.OK
INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture
def channel(zoo: Zoo) -> Generator[grpc.Channel]:
    with open_channel(zoo.server.address) as channel:
        yield channel


@pytest.mark.parametrize(("model", "signature"), INPUTS, ids=lambda name: name)
def test_equal_to_tensorflow_in_process(zoo: Zoo, channel: grpc.Channel, model: str, signature: str) -> None:
    outcome = call(channel, request(model, INPUTS[model, signature], signature=signature, sequence=11))
    assert outcome.code is OK, outcome.message
    expected = zoo.expected[model, signature]
    assert (outcome.response.model, outcome.response.version, outcome.response.sequence) == (model, 1, 11)
    assert [tensor.name for tensor in outcome.response.outputs] == sorted(expected)
    for name, array in outcome.outputs.items():
        assert (array.dtype, array.shape) == (expected[name].dtype, expected[name].shape)
        np.testing.assert_array_equal(array, expected[name])


def test_without_a_signature_the_default_one_answers(zoo: Zoo, channel: grpc.Channel) -> None:
    outcome = call(channel, request("signatures", INPUTS["signatures", SERVING_DEFAULT]))
    np.testing.assert_array_equal(outcome.outputs["y"], zoo.expected["signatures", SERVING_DEFAULT]["y"])


def test_which_signatures_are_batched(zoo: Zoo) -> None:
    batched = {
        (model, signature.name): signature.batched
        for model in {model for model, _ in INPUTS}
        for signature in zoo.server.version(model, 1).signatures
    }
    alone = {("no_batch", SERVING_DEFAULT), ("scalars", SERVING_DEFAULT), ("batch_mates", SERVING_DEFAULT)}
    assert {name for name, value in batched.items() if not value} == alone


def test_golden_examples_are_counted(zoo: Zoo) -> None:
    assert zoo.server.version("two_inputs", 1).golden_examples == 9
    assert zoo.server.version("no_batch", 1).golden_examples == 1
    assert zoo.server.version("signatures", 1).golden_examples == 15


def test_only_the_outputs_that_were_asked_for(zoo: Zoo, channel: grpc.Channel) -> None:
    wanted = ["out_40", "out_03"]
    outcome = call(channel, request("many", INPUTS["many", SERVING_DEFAULT], outputs=wanted))
    assert list(outcome.outputs) == sorted(wanted)
    expected = zoo.expected["many", SERVING_DEFAULT]
    for name in wanted:
        np.testing.assert_array_equal(outcome.outputs[name], expected[name])


def test_an_unknown_output_is_refused(channel: grpc.Channel) -> None:
    outcome = call(channel, request("many", INPUTS["many", SERVING_DEFAULT], outputs=["out_00", "nope"]))
    assert outcome.code is INVALID
    assert "'nope'" in outcome.message


def test_every_caller_of_a_model_whose_rows_depend_on_each_other_gets_its_own(zoo: Zoo) -> None:
    random = np.random.default_rng(3)
    inputs = [random.standard_normal(rows).astype(np.float32) for rows in (1, 2, 3, 5, 8, 13, 21, 200) * 4]
    cases = {str(i): Case(zoo.saved_models / "zoo" / "batch_mates", {"x": x}) for i, x in enumerate(inputs)}
    expected = by_tensorflow(zoo.registry.root.parent / "batch_mates", cases)
    with open_channel(zoo.server.address) as channel:
        waits = [start(channel, request("batch_mates", {"x": x})) for x in inputs]
        for number, wait in enumerate(waits):
            outcome = wait()
            assert outcome.code is OK, outcome.message
            np.testing.assert_array_equal(outcome.outputs["y"], expected[str(number)]["y"])


def test_one_bad_row_among_31_good_ones_of_other_callers(zoo: Zoo, channel: grpc.Channel) -> None:
    for _ in range(5):
        rows = [np.array([-1.0 if number == 13 else number], np.float32) for number in range(32)]
        waits = [start(channel, request("bad_rows", {"x": row})) for row in rows]
        outcomes = [wait() for wait in waits]
        assert [number for number, outcome in enumerate(outcomes) if outcome.code is not OK] == [13]
        assert outcomes[13].code is INVALID
        assert "x is negative" in outcomes[13].message
        for number, outcome in enumerate(outcomes):
            if number != 13:
                np.testing.assert_allclose(outcome.outputs["y"], np.sqrt(rows[number]), rtol=1e-6)


def test_more_rows_than_the_largest_batch_are_one_answer(channel: grpc.Channel) -> None:
    x = np.arange(3 * 10_000, dtype=np.float32).reshape(-1, 3)
    outcome = call(channel, request("two_inputs", {"a": x, "b": np.arange(10_000, dtype=np.int32)}))
    assert outcome.code is OK, outcome.message
    np.testing.assert_array_equal(outcome.outputs["sum"], x + np.arange(10_000, dtype=np.float32)[:, None])
    text = np.array([str(number).encode() * (number % 4) for number in range(1000)], dtype=object)
    outcome = call(channel, request("strings", {"text": text}))
    assert outcome.outputs["doubled"].tolist() == [item * 2 for item in text.tolist()]


def test_no_rows_are_a_legal_call(channel: grpc.Channel) -> None:
    outcome = call(channel, request("two_inputs", {"a": np.empty((0, 3), np.float32), "b": np.empty(0, np.int32)}))
    assert outcome.code is OK, outcome.message
    assert {name: array.shape for name, array in outcome.outputs.items()} == {"sum": (0, 3), "product": (0,)}
    outcome = call(channel, request("strings", {"text": np.empty(0, object)}))
    assert {name: array.shape for name, array in outcome.outputs.items()} == dict.fromkeys(
        ("upper", "doubled", "length"), (0,)
    )
    outcome = call(channel, request("batch_mates", {"x": np.empty(0, np.float32)}))
    assert outcome.outputs["y"].shape == (0,)


def test_odd_numbers_pass_through(zoo: Zoo, channel: grpc.Channel) -> None:
    outcome = call(channel, request("canary", {"x": ODD_NUMBERS}))
    assert outcome.code is OK, outcome.message
    expected = zoo.expected["canary", "odd"]["y"]
    np.testing.assert_array_equal(outcome.outputs["y"].view(np.uint32), expected.view(np.uint32))
    assert np.isnan(expected[0]).all()
    assert np.signbit(expected[3]).all()


def test_one_connection_of_many_callers_beside_a_canary(zoo: Zoo) -> None:
    with canary(zoo.server.address, "canary", 1), open_channel(zoo.server.address) as channel:
        waits = [
            (model, signature, start(channel, request(model, inputs, signature=signature)))
            for _ in range(30)
            for (model, signature), inputs in INPUTS.items()
        ]
        for model, signature, wait in waits:
            outcome = wait()
            assert outcome.code is OK, outcome.message
            for name, array in zoo.expected[model, signature].items():
                np.testing.assert_array_equal(outcome.outputs[name], array)


def test_the_codec_of_the_tests_is_the_sdks() -> None:
    for inputs in INPUTS.values():
        for name, array in inputs.items():
            np.testing.assert_array_equal(decode(encode(name, array)), array)
