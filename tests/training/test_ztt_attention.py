"""Attention beside the zero token: every way to compute it against the sum written out in float64."""

import pytest
import torch

from weightsmith.errors import InputError
from weightsmith.training.zero_token.attention import zero_attention, zero_scores

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
WAYS = {
    "eager": {"backend": "eager"},
    "kernel": {"backend": "sdpa"},
    "concat": {"backend": "sdpa", "implementation": "concat"},
    "flex": {"backend": "flex_attention"},
}
TRAINABLE = ("eager", "kernel", "concat")  # flex_attention has no backward pass on the CPU
SHAPES = [(5, 5, 4), (5, 9, 2), (1, 9, 2), (1, 9, 1)]  # queries, keys, key heads of 4
SCALING = 8**-0.5


def made(queries, keys, key_heads, dtype=torch.float64, seed=0):
    """Queries, keys, values, a zero key and its biases, all with gradients."""
    torch.manual_seed(seed)
    wanted = torch.is_grad_enabled()
    shapes = [(2, 4, queries, 8), (2, key_heads, keys, 8), (2, key_heads, keys, 8), (key_heads, 8), (4,)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_(wanted) for shape in shapes]


def causal(queries, keys, padding="none", window=None):
    """True where a query sees a key; padding hides the first or the last two keys of row 0."""
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    if window is not None:
        seen &= ~torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries - window)
    seen = seen.expand(2, 1, queries, keys).clone()
    if padding != "none":
        seen[0, :, :, slice(0, 2) if padding == "left" else slice(-2, None)] = False
    return seen


def written_out(q, k, v, key, bias, seen):
    """Output and a0, query by query, as the equations say."""
    out, share = torch.zeros(q.shape, dtype=torch.float64), torch.zeros(q.shape[:3], dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for row in range(q.shape[0]):
        for head in range(q.shape[1]):
            for t in range(q.shape[2]):
                query = q[row, head, t]
                zero = torch.exp(SCALING * (query @ key[head // group]) + bias[head])
                total, summed = zero, torch.zeros(8, dtype=torch.float64)
                for s in range(k.shape[2]):
                    if seen[row, 0, t, s]:
                        weight = torch.exp(SCALING * (query @ k[row, head // group, s]))
                        total, summed = total + weight, summed + weight * v[row, head // group, s]
                out[row, head, t], share[row, head, t] = summed / total, zero / total
    return out.transpose(1, 2), share


def computed(way, q, k, v, key, bias, seen, **more):
    z = zero_scores(q, key, bias, SCALING)
    return zero_attention(q, k, v, z, seen, scaling=SCALING, **WAYS[way], **more)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_every_backend_gives_the_sum_with_a_slot_of_value_zero(way, shape, padding):
    inputs = made(*shape)
    seen = causal(*shape[:2], padding)
    found = computed(way, *inputs, seen)
    out, share = written_out(*inputs, seen)
    torch.testing.assert_close(found.out_BTHD, out)
    torch.testing.assert_close(found.share_BHT, share)


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_a_window_does_not_hide_the_zero_token(way):
    inputs, seen = made(5, 9, 2), causal(5, 9, window=3)
    found = computed(way, *inputs, seen)
    out, share = written_out(*inputs, seen)
    torch.testing.assert_close((found.out_BTHD, found.share_BHT), (out, share))


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_without_a_mask_a_query_sees_what_is_before_it(way):
    inputs = made(5, 5, 2)
    found = computed(way, *inputs, None, is_causal=True)
    torch.testing.assert_close(found.out_BTHD, computed(way, *inputs, causal(5, 5)).out_BTHD)


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_a_query_that_sees_no_key_attends_to_the_zero_token_alone(way):
    inputs, seen = made(5, 5, 2), causal(5, 5, "left")
    found = computed(way, *inputs, seen)
    assert (found.share_BHT[0, :, :2] == 1).all()
    assert (found.out_BTHD[0, :2] == 0).all()


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_a_score_far_below_is_plain_attention_and_far_above_writes_nothing(way):
    q, k, v, key, bias = made(5, 5, 4)
    seen = causal(5, 5)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    low = computed(way, q, k, v, key, torch.full_like(bias, -1e4), seen)
    torch.testing.assert_close(low.out_BTHD, plain)
    assert low.share_BHT.abs().max() < 1e-12
    high = computed(way, q, k, v, key, torch.full_like(bias, 1e4), seen)
    assert high.out_BTHD.abs().max() < 1e-12


@torch.no_grad()
def test_a_zero_key_without_bias_is_softmax_plus_one():
    q, k, v, key, _ = made(4, 4, 4)
    found = computed("kernel", q, k, v, torch.zeros_like(key), None, causal(4, 4))
    scores = ((q @ k.mT) * SCALING).masked_fill(~causal(4, 4), -torch.inf).exp()
    wanted = scores @ v / (1 + scores.sum(-1, keepdim=True))
    torch.testing.assert_close(found.out_BTHD.transpose(1, 2), wanted)


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_bfloat16_keeps_its_type_and_its_precision(way):
    inputs, seen = made(5, 9, 2, torch.bfloat16), causal(5, 9, "left")
    found = computed(way, *inputs, seen)
    out, share = written_out(*(x.double() for x in inputs), seen)
    assert (found.out_BTHD.dtype, found.share_BHT.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(found.out_BTHD.double(), out, rtol=0.05, atol=0.03)
    torch.testing.assert_close(found.share_BHT.double(), share, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_under_autocast_wider_queries_keys_and_masks_are_cast(way):
    """What autocast leaves: rotated queries and keys in float32, values in bfloat16."""
    q, k, v, key, bias = made(5, 9, 2, torch.float32)
    seen = causal(5, 9, "left")
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    mask[0, :, 0] = torch.finfo(torch.float32).min  # a query that sees no key
    seen[0, :, 0] = False
    with torch.autocast("cpu", torch.bfloat16):
        found = computed(way, q, k, v.bfloat16(), key, bias, mask)
    out, share = written_out(*(x.double() for x in (q, k, v, key, bias)), seen)
    assert (found.out_BTHD.dtype, found.share_BHT.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(found.out_BTHD.double(), out, rtol=0.05, atol=0.03)
    torch.testing.assert_close(found.share_BHT.double(), share, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("way", TRAINABLE)
def test_gradients_of_output_and_share_are_those_of_finite_differences(way, shape):
    inputs, seen = made(*shape), causal(*shape[:2])

    def both(*tensors):
        found = computed(way, *tensors, seen)
        return found.out_BTHD, found.share_BHT

    assert torch.autograd.gradcheck(both, inputs)


@pytest.mark.parametrize("of", ["output", "share"])
def test_the_kernels_gradients_hold_where_only_one_of_its_results_is_used(of):
    seen, grads = causal(5, 5, "left"), {}
    for way in TRAINABLE:
        inputs = made(5, 5, 2)
        found = computed(way, *inputs, seen)
        chosen = found.out_BTHD if of == "output" else found.share_BHT
        chosen[1].square().sum().backward()  # row 0 has no gradient at all
        grads[way] = [torch.zeros_like(x) if x.grad is None else x.grad for x in inputs]
    for way in ("kernel", "concat"):
        torch.testing.assert_close(grads[way], grads["eager"])


def test_float32_gradients_are_as_good_as_the_plain_formulation():
    seen, grads = causal(16, 16), {}
    for way in TRAINABLE:
        inputs = made(16, 16, 2, torch.float32)
        found = computed(way, *inputs, seen)
        (found.out_BTHD.square().sum() + found.share_BHT.square().sum()).backward()
        grads[way] = [x.grad for x in inputs]
    torch.testing.assert_close(grads["kernel"], grads["eager"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"backend": "flash_attention_2"},
            "flash_attention_2 gives no log-sum-exp.*sdpa, flex",
        ),
        (
            {"backend": "eager", "implementation": "lse"},
            "eager has none; take sdpa or flex",
        ),
        ({"backend": "flex_attention", "implementation": "concat"}, "found flex_attention"),
        ({"backend": "sdpa", "implementation": "lse", "dropout": 0.1}, "found device cpu and dropout 0.1"),
    ],
)
def test_a_backend_that_can_not_show_the_zero_token_is_named_with_those_that_can(options, message):
    q, k, v, key, bias = made(2, 2, 4)
    with pytest.raises(InputError, match=message):
        zero_attention(q, k, v, zero_scores(q, key, bias, SCALING), None, scaling=SCALING, **options)


@pytest.mark.parametrize("way", ["eager", "concat"])
def test_dropout_leaves_the_mean_where_it_was(way):
    q, k, v, key, bias = made(3, 3, 4)
    torch.manual_seed(0)
    rows = [x.repeat(400, 1, 1, 1) for x in (q, k, v)]
    seen = causal(3, 3).repeat(400, 1, 1, 1)
    with torch.no_grad():
        dropped = computed(way, *rows, key, bias, seen, dropout=0.2).out_BTHD.unflatten(0, (400, 2)).mean(0)
        whole = computed(way, q, k, v, key, bias, causal(3, 3)).out_BTHD
    torch.testing.assert_close(dropped, whole, rtol=0.2, atol=0.12)
    assert not torch.equal(dropped, whole)
