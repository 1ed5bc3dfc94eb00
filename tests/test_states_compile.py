"""Many parts inside torch.compile and torch.export: as in eager mode, and once for all sizes."""

import re

import pytest
import torch
from states_support import make_states
from support import F32, OPERATOR_ERROR, assert_bits

from merge_attn_states import merge_states, update_state

OPS = torch.ops.merge_attn_states
BACKENDS = ("eager", "aot_eager", "inductor")
H, D, K = 2, 8, 3


def operands_of(rows, device="cpu") -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Clones begin where their memory begins: a graph's input at an offset, written through a slice
    of it, is sliced wrongly by PyTorch's functionalisation of any op (2.13).
    """
    states = make_states((rows, H), D, K, F32, device, empty=False)
    return [x.clone() for x in states.outputs], [x.clone() for x in states.lses]


def assert_same(operands, others) -> None:
    for now, other in zip([*operands[0], *operands[1]], [*others[0], *others[1]], strict=True):
        assert_bits(now, other)


def assert_same_results(results, others) -> None:
    for result, other in zip(results, others, strict=True):
        assert (result is None) == (other is None)
        if other is not None:
            assert_bits(result, other)


def compiled(step, backend, dynamic=True):
    torch._dynamo.reset()
    return torch.compile(step, backend=backend, fullgraph=True, dynamic=dynamic)


# Steps of outputs and lses, each with something around the merge that the graph may fuse.


def new(outputs, lses):
    return merge_states([x * 2 for x in outputs], lses)


def new_by_op(outputs, lses):
    return OPS.merge_states(outputs, [lse + 1 for lse in lses], [], [])


def without_lse(outputs, lses):
    return merge_states(tuple(outputs), lses, return_lse=False)


def stacked(outputs, lses):
    return merge_states(torch.stack(outputs, 1), torch.stack(lses, 1), dim=1)


def stacked_with_masks(outputs, lses):
    masks = [None, lses[1] > 2, None]
    return merge_states(torch.stack(outputs), torch.stack(lses), dim=0, empty=masks)


def of_everything(outputs, lses):
    index = torch.arange(outputs[0].shape[0], device=outputs[0].device).flip(0)
    return merge_states(
        outputs,
        lses,
        index=[None, index, None],
        empty=[None, lses[1] > 2, None],
        sink=lses[0][0],
        lse_base=["e", "2", "e"],
        out_lse_base="2",
        out_dtype=torch.bfloat16,
    )


def into_a_new_output(outputs, lses):
    return merge_states(outputs, lses, out=torch.empty_like(outputs[0]))


def into_parts(outputs, lses):
    merge_states(outputs, lses, out=outputs[1], out_lse=lses[0])
    return (outputs[1] + 1,)


def into_parts_by_op(outputs, lses):
    OPS.merge_states_out(outputs[1], lses[0], outputs, lses, [], [])
    return (outputs[1] + 1,)


def into_a_clone(outputs, lses):  # PyTorch 198031: compiled to op(x, x)
    clone = outputs[1].clone()
    merge_states(outputs, lses, out=clone)
    return clone, outputs[1] + 1


def over_the_source_of_a_clone(outputs, lses):
    clone = outputs[0].clone()
    merge_states([clone, *outputs[1:]], lses, out=outputs[0])
    return clone, outputs[0] + 1


def update(outputs, lses):
    update_state(outputs[0], lses[0], outputs[1] * 2, lses[1])
    return (outputs[0] + 1,)


def update_by_op(outputs, lses):
    OPS.update_state(outputs[0], lses[0], outputs[1] * 2, lses[1])
    return (outputs[0] + 1,)


def update_twice(outputs, lses):
    for k in (1, 2):
        update_state(outputs[0], lses[0], outputs[k], lses[k])
    return outputs[0] + 1, lses[0] * 2


def update_half(outputs, lses):
    half = outputs[0].shape[0] // 2
    update_state(outputs[0][half:], lses[0][half:], outputs[1][half:], lses[1][half:])
    return (outputs[0] + 1,)


def update_by_index(outputs, lses):
    index = torch.arange(outputs[0].shape[0], device=outputs[0].device).flip(0)
    update_state(
        outputs[0], lses[0], outputs[1], lses[1], index=index, empty=lses[2] > 2, lse_base="2"
    )
    return (outputs[0] + 1,)


STEPS = [new, new_by_op, without_lse, stacked, stacked_with_masks, of_everything,
         into_a_new_output, into_parts, into_parts_by_op, into_a_clone, over_the_source_of_a_clone,
         update, update_by_op, update_twice, update_half, update_by_index]  # fmt: skip
OF_ANY_SIZE = [step for step in STEPS if step is not update_half]  # PyTorch guards a slice's size


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_compiled_once_as_eager(step, backend, context, device):
    run = compiled(step, backend)
    with context(), torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (6, 9, 33):
            operands, expected = operands_of(rows, device), operands_of(rows, device)
            results, due = run(*operands), step(*expected)
            assert_same_results(results, due)
            assert_same(operands, expected)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("step", OF_ANY_SIZE, ids=lambda step: step.__name__)
def test_a_number_of_rows_that_is_not_known(step, backend):
    operands, expected = operands_of(6), operands_of(6)
    for operand in (*operands[0], *operands[1]):
        torch._dynamo.decorators.mark_unbacked(operand, 0)
    with torch.no_grad():
        results, due = compiled(step, backend, dynamic=None)(*operands), step(*expected)
    assert_same_results(results, due)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("step", "op"), [
    (lambda outputs, lses: merge_states(outputs, lses), OPS.merge_states),
    (lambda outputs, lses: merge_states(outputs, lses, out=outputs[0], out_lse=lses[1]),
     OPS.merge_states_out),
    (lambda outputs, lses: update_state(outputs[0], lses[0], outputs[1], lses[1]),
     OPS.update_state),
], ids=["new", "in place", "update"])  # fmt: skip
def test_without_grad_mode_the_graph_is_the_op_alone(step, op, context):
    """In grad mode what is written in place is copied; a merge into new results never is."""
    targets = []

    def backend(graph, _):
        nodes = [node for node in graph.graph.nodes if node.op.startswith("call")]
        targets.extend(node.target for node in nodes if "getitem" not in str(node.target))
        return graph

    with context():
        compiled(step, backend)(*operands_of(4))
    assert targets == [op.default]


# Refusals.

WRONG = {
    "lses[1]: expected shape [4, 2] = outputs[1].shape[:-1], got [2, 4]":
        lambda outputs, lses: merge_states(outputs, [lses[0], lses[1].T, lses[2]]),
    "lses[2]: expected shape [4, 2] = outputs[2].shape[:-1], got [2, 4]":
        lambda outputs, lses: merge_states(outputs, [*lses[:2], lses[2].T], out=outputs[0]),
    "block_lse: expected shape [4, 2] = block_out.shape[:-1], got [2, 4]":
        lambda outputs, lses: update_state(outputs[0], lses[0], outputs[1], lses[1].T),
    "index: expected rows in [0, 4) or -1, got 4 at 2":
        lambda outputs, lses: update_state(
            outputs[0], lses[0], outputs[1], lses[1], index=torch.arange(4) * 2
        ),
}  # fmt: skip


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("message", WRONG)
def test_a_refusal_keeps_its_text(message, backend, context):
    operands, before = operands_of(4), operands_of(4)
    with context(), pytest.raises((OPERATOR_ERROR, RuntimeError), match=re.escape(message)):
        compiled(WRONG[message], backend)(*operands)
    assert_same(operands, before)


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["merge", "update"])
def test_an_output_that_a_graph_of_any_size_expands_is_named(form, backend, context):
    """PyTorch, which copies what a graph writes, would not name it."""

    def step(one, outputs, lses):
        out = one.expand(outputs[0].shape[0], -1, -1)
        if form == "merge":
            merge_states(outputs, lses, out=out)
        else:
            update_state(out, lses[0], outputs[1], lses[1])

    refusal = "out: expected memory of its own for each element"
    with context(), pytest.raises((OPERATOR_ERROR, RuntimeError), match=refusal):
        compiled(step, backend)(torch.full((1, H, D), float("nan")), *operands_of(4))


# Export.


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("step", OF_ANY_SIZE, ids=lambda step: step.__name__)
def test_export(step, context, strict):
    class Step(torch.nn.Module):
        def forward(self, outputs, lses):
            return step(outputs, lses)

    operands, expected = operands_of(4), operands_of(4)
    due = step(*expected)
    rows = torch.export.Dim("rows", min=4)
    with context():
        exported = torch.export.export(
            Step(), operands, strict=strict, dynamic_shapes=([{0: rows}] * K, [{0: rows}] * K)
        )
        assert any("merge_attn_states" in str(node.target) for node in exported.graph.nodes)
        results = exported.module()(*operands)
    assert_same_results(results, due)
    assert_same(operands, expected)
