"""The op inside torch.compile: with every alias as in eager mode, and once for all counts."""

import pytest
import torch
from support import F32, assert_bits, blank, check, make_call
from torch._dynamo.testing import CompileCounterWithBackend

from merge_attn_states import merge_attn_states as merge

OP = torch.ops.merge_attn_states.merge_attn_states


def compiled(function, backend="aot_eager", dynamic=True):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("way", [merge, OP], ids=["python", "torch.ops"])
def test_compiled(way, backend, device):
    def step(output, prefix, prefix_lse, suffix, suffix_lse, output_lse):
        way(output, prefix * 2, prefix_lse, suffix, suffix_lse + 1, output_lse)
        return output + 1

    run = compiled(step, backend)
    for tokens in (6, 9):  # a second size without a second graph
        call = make_call((tokens, 2, 16), F32, device)
        result = run(*call[:6])
        inputs = call._replace(prefix_output=call.prefix_output * 2, suffix_lse=call.suffix_lse + 1)
        plain = check(
            inputs._replace(
                output=blank((tokens, 2, 16), F32, device),
                output_lse=blank((2, tokens), F32, device),
            )
        )
        assert_bits(call.output, plain.output)
        assert_bits(call.output_lse, plain.output_lse)
        assert_bits(result, plain.output + 1)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("way", [merge, OP], ids=["python", "torch.ops"])
def test_a_number_of_tokens_that_is_not_known(way, backend, device):
    """Whether an output of so many is expanded cannot be asked while compiling."""
    call = make_call((6, 2, 16), F32, device)
    for operand in call[:6]:
        torch._dynamo.decorators.mark_unbacked(operand, 0 if operand.dim() == 3 else 1)

    def step(*operands):
        way(*operands)

    with torch.no_grad():
        check(call, lambda *args: compiled(step, backend, dynamic=None)(*args[:6]))


def in_place(x, x_lse, y, y_lse):
    merge(x, x, x_lse, y, y_lse, x_lse)


def into_the_suffix(x, x_lse, y, y_lse):
    merge(y, x, x_lse, y, y_lse, y_lse)


def into_a_clone(x, x_lse, y, y_lse):  # PyTorch 198031: compiled to op(x, x)
    z = x.clone()
    merge(z, x, x_lse, y, y_lse)
    return z


def over_the_source_of_a_clone(x, x_lse, y, y_lse):
    z = x.clone()
    merge(x, z, x_lse, y, y_lse)
    return z


def halves_of_one_buffer(x, x_lse, y, y_lse):
    merge(x[4:], x[:4], x_lse[:, :4], y[4:], y_lse[:, 4:], y_lse[:, :4])
    merge(y[:, 1:], y[:, :1], x_lse[1:], x[:, :1], x_lse[:1])


def interleaved_views_of_one_buffer(x, x_lse, y, y_lse):
    merge(x[::2], x[1::2], x_lse[:, ::2], y[1::2], y_lse[:, 1::2], x_lse[:, 1::2])
    merge(x[1::2], x[::2], x_lse[:, ::2], y[::2], y_lse[:, ::2])


ALIAS_STEPS = [in_place, into_the_suffix, into_a_clone, over_the_source_of_a_clone,
               halves_of_one_buffer, interleaved_views_of_one_buffer]  # fmt: skip


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("step", ALIAS_STEPS, ids=lambda step: step.__name__)
def test_aliases_compiled_as_eager(step, backend, device):
    call = make_call((8, 2, 12), F32, device, empty=False)
    sources = (call.prefix_output, call.prefix_lse, call.suffix_output, call.suffix_lse)
    # PyTorch 198068: inductor forgets the offset of a written view with a step whose size is
    # symbolic, for every op.
    dynamic = backend != "inductor" or step is not interleaved_views_of_one_buffer
    results = []
    for run in (step, compiled(step, backend, dynamic)):
        # Clones begin where their memory begins: a graph's input at an offset, written through a
        # slice of it, is sliced wrongly by PyTorch's functionalisation of any op (2.13).
        operands = [x.clone() for x in sources]
        result = run(*operands)
        results.append([*operands, *([] if result is None else [result])])
    for eager, other in zip(*results, strict=True):
        assert_bits(other, eager)


def test_ten_context_counts_compile_once(device):
    counter = CompileCounterWithBackend("aot_eager")
    run = compiled(lambda *args: merge(*args), counter)
    for count in range(2, 12):
        check(make_call((12, 2, 16), F32, device, count=count), run)
    assert counter.frame_count == 1


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_grad_mode_the_graph_is_the_op_alone(context):
    """In grad mode a merge is copied, so that what autograd saves is nobody else's."""
    targets = []

    def backend(graph, _):
        targets.append([node.target for node in graph.graph.nodes if node.op.startswith("call")])
        return graph

    step = compiled(lambda *args: merge(*args), backend)
    with context():
        check(make_call((4, 2, 16), F32, count=2), step)
    assert targets == [[OP.default]]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("way", [merge, OP], ids=["python", "torch.ops"])
def test_export(way, context, strict):
    class Step(torch.nn.Module):
        def forward(self, *args):
            way(*args)
            return args[0] + 1

    call, expected = (make_call((4, 2, 16), F32, empty=False) for _ in range(2))
    merge(*expected)
    with context():
        exported = torch.export.export(Step(), call[:6], strict=strict)
        assert OP.default in [node.target for node in exported.graph.nodes]
        result = exported.module()(*call[:6])
    assert_bits(call.output, expected.output)
    assert_bits(call.output_lse, expected.output_lse)
    assert_bits(result, expected.output + 1)
