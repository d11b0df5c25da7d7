"""DeepSeek-V3 against `transformers` in fp32, and what must hold for any model here."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.oracle import (
    VOCABULARY,
    hf_logits,
    hf_loss,
    hf_model,
    logits_of,
    our_model,
    packed,
)
from torchsft import ops
from torchsft.models.deepseek_v3 import DeepseekV3

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES = {
    "as V3": {},
    "no query latent": {"q_lora_rank": None},
    "yarn": {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    "yarn, no query latent": {
        "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        "q_lora_rank": None,
    },
    "yarn, mscale differs": {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}},
    "yarn, mscale absent": {"rope_parameters": YARN},
    "yarn, mscale alone": {"rope_parameters": YARN | {"mscale": 0.7}},
    "yarn, other bounds": {
        "rope_parameters": YARN | {"beta_fast": 4, "beta_slow": 2, "truncate": False}
    },
    "yarn, attention factor": {"rope_parameters": YARN | {"attention_factor": 1.3}},
    "one group": {"n_group": 1, "topk_group": 1},
    "all groups": {"n_group": 2, "topk_group": 2},
    "positive bias": {"bias": (2.0, 0.3)},
    "negative bias": {"bias": (-0.5, 0.3)},
    # Every biased score is below 0: if other groups were filled with 0, their experts would win.
    "very negative bias": {"bias": (-10.0, 0.3)},
    "weights not normalised": {"norm_topk_prob": False},
    "tied embeddings": {"tie_word_embeddings": True},
    "attention bias": {"attention_bias": True},
    "attention bias, no query latent": {"attention_bias": True, "q_lora_rank": None},
    "two shared experts, all layers sparse": {"n_shared_experts": 2, "first_k_dense_replace": 0},
    "all layers dense": {"first_k_dense_replace": 3},
    "other norm epsilon": {"rms_norm_eps": 1e-2},
}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_transformers(case):
    """Documents below, at and beyond the original context of 32, packed, with padding; transformers
    sees each alone.
    """
    reference = hf_model(**CASES[case])
    model = our_model(reference)
    inputs = packed([9, 32, 100], padding=11)
    expected = hf_logits(reference, inputs)
    torch.testing.assert_close(
        logits_of(model, inputs)[: len(expected)], expected, rtol=0, atol=1e-4
    )

    expected_loss = hf_loss(expected, inputs)
    expected_loss.backward()
    loss = model(**inputs)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(
        expected_loss.item(), rel=1e-5
    )
    gradients = {name: p.grad for name, p in model.named_parameters()}
    expected_gradients = {name: p.grad for name, p in reference.named_parameters()}
    assert gradients.keys() == expected_gradients.keys()
    errors = {
        name: ((gradients[name] - value).abs().max() / value.abs().max()).item()
        for name, value in expected_gradients.items()
    }
    assert all(error <= 1e-4 for error in errors.values()), errors


def test_far_positions_equal_transformers():
    """Positions 5000 and up, 40 times the original context, with YaRN: angles are computed in
    fp32.
    """
    reference = hf_model(
        rope_parameters=YARN | {"factor": 64.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    )
    inputs = packed([20, 30], first_position=5000)
    got = logits_of(our_model(reference), inputs)
    torch.testing.assert_close(got, hf_logits(reference, inputs), rtol=0, atol=1e-4)


def test_packing_of_transformers_itself_agrees():
    """The other oracle: transformers told of the documents by positions that restart."""
    reference = hf_model()
    inputs = packed([5, 17, 10])
    with torch.no_grad():
        expected = reference(
            inputs["tokens"][None], position_ids=inputs["positions"][None], use_cache=False
        ).logits[0]
        torch.testing.assert_close(
            logits_of(our_model(reference), inputs), expected, rtol=0, atol=1e-4
        )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("options", [{"experts": "loop"}, {"attention": "flex"}, {"loss_chunk": 7}])
def test_every_implementation_computes_the_same(options):
    """fp32 sums in another order. flex has no backward pass on CPU, so it is compared without
    gradients.
    """
    reference = hf_model()
    inputs = packed([9, 1, 40], padding=6)
    with torch.no_grad():
        expected, got = our_model(reference)(**inputs), our_model(reference, **options)(**inputs)
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"experts": "loop"}])
def test_the_plain_twins_compute_the_same_loss_and_gradients(options):
    """`--model.ops plain` (and `--model.experts loop`): fp32 sums in another order, 1e-5 of each
    largest gradient.
    """
    reference = hf_model()
    inputs = packed([9, 1, 40], padding=6)
    fast, slow = our_model(reference), our_model(reference, **options)
    fast(**inputs).backward()
    ops.use_plain(True)
    try:
        slow(**inputs).backward()
    finally:
        ops.use_plain(False)
    for (name, a), b in zip(fast.named_parameters(), slow.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() <= 1e-5 * b.grad.abs().max(), name


def test_padding_changes_nothing():
    """Other padding tokens: bit-equal loss, gradients and expert load. No padding: equal up to the
    order of sums.
    """
    reference = hf_model()
    inputs = packed([9, 30], padding=25)
    results = []
    for shift in (0, 17):
        model = our_model(reference)
        tokens = inputs["tokens"].clone()
        tokens[39:] = (tokens[39:] + shift) % VOCABULARY
        loss = model(**inputs | {"tokens": tokens})
        loss.backward()
        results.append(
            [
                loss,
                *(p.grad for p in model.parameters()),
                *(b for n, b in model.named_buffers() if "load" in n),
            ]
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    bare = {
        key: value[:39] if key not in ("cu_seqlens", "max_seqlen") else value
        for key, value in inputs.items()
    }
    torch.testing.assert_close(our_model(reference)(**bare), results[0][0])


@pytest.mark.parametrize(("dense_layers", "tolerance"), [(3, 0.0), (1, 1e-5)])
def test_documents_do_not_see_each_other(dense_layers, tolerance):
    """Document 1 changes, the logits of documents 0 and 2 stay bit for bit.

    With experts, document 1 also changes how many rows an expert's matrix product has, and with it
    perhaps the order
    of its sums: bounded there by fp32 rounding.
    """
    model = our_model(hf_model(first_k_dense_replace=dense_layers))
    inputs = packed([12, 20, 15], padding=3)
    before = logits_of(model, inputs)
    inputs["tokens"][12:32] = (inputs["tokens"][12:32] + 1) % VOCABULARY
    after = logits_of(model, inputs)
    change = (before - after).abs().amax(-1)
    assert change[:12].max() <= tolerance and change[32:47].max() <= tolerance
    assert change[12:32].min() > 1e-2


def test_later_tokens_do_not_reach_earlier_ones():
    model = our_model(hf_model(first_k_dense_replace=3))
    inputs = packed([20])
    before = logits_of(model, inputs)
    inputs["tokens"][13] = (inputs["tokens"][13] + 1) % VOCABULARY
    same = (before == logits_of(model, inputs)).all(-1)
    assert same[:13].all() and not same[13:].any()


def test_a_microbatch_of_padding_alone_gives_zero():
    """A zero gradient, not none: FSDP's ranks must reduce the same set of gradients, whoever has no
    documents.
    """
    model = our_model(hf_model())
    inputs = packed([], padding=8)
    loss = model(**inputs)
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in model.parameters())


def test_expert_load_counts_real_tokens_in_training_only():
    model = our_model(hf_model()).train()
    inputs = packed([9, 30], padding=25)
    loads = [layer.mlp.expert_load for name, layer in model.model.layers.items() if name != "0"]
    model(**inputs)
    assert [load.sum().item() for load in loads] == [39 * 3, 39 * 3]
    model(**inputs)
    assert [load.sum().item() for load in loads] == [2 * 39 * 3, 2 * 39 * 3]
    model.eval()(**inputs)
    assert [load.sum().item() for load in loads] == [2 * 39 * 3, 2 * 39 * 3]
    model.init_buffers()
    assert [load.sum().item() for load in loads] == [0, 0]


class Shapes(TorchDispatchMode):
    """Shapes of everything that operations return."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.seen.add(tuple(tensor.shape))
        return result


@pytest.mark.parametrize("training", [True, False])
def test_full_logits_never_exist(training):
    model = our_model(hf_model(), loss_chunk=16)
    inputs = packed([30, 30], padding=4)
    with torch.set_grad_enabled(training), Shapes() as shapes:
        loss = model(**inputs)
        if training:
            loss.backward()
    over_vocabulary = {
        shape[0] for shape in shapes.seen if len(shape) == 2 and shape[1] == VOCABULARY
    }
    # a chunk's logits, and the transposed weight: width 32
    assert over_vocabulary == {16, 32}


def test_bf16_model_keeps_routing_and_positions_in_fp32():
    """Cast as a whole: correction bias and frequencies stay fp32, and the loss is near the fp32
    one.
    """
    reference = hf_model()
    model, low = our_model(reference), our_model(reference).to(torch.bfloat16)
    kept = {name for name, buffer in low.named_buffers() if buffer.dtype == torch.float32}
    assert kept == {"model.rotary_emb.inv_freq"} | {
        f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in (1, 2)
    }
    assert all(
        torch.equal(b, dict(low.named_buffers())[n]) for n, b in model.named_buffers() if n in kept
    )
    inputs = packed([9, 32, 100], padding=11)
    with torch.no_grad():
        assert logits_of(low, inputs).dtype == torch.bfloat16
        assert low(**inputs).item() == pytest.approx(model(**inputs).item(), rel=0.02)


def test_the_meta_device_and_back():
    """Built on meta, materialised, weights copied, buffers recomputed: the same model."""
    reference = our_model(hf_model())
    with torch.device("meta"):
        model = DeepseekV3(reference.config)
    model.to_empty(device="cpu")
    model.init_buffers()
    model.load_state_dict(reference.state_dict())
    inputs = packed([10, 5])
    assert torch.equal(model(**inputs), reference(**inputs))


def test_checkpoint_pieces_rebuild_the_model_from_a_saved_checkpoint(tmp_path):
    """transformers writes experts one by one; the pieces name all its keys, once, and put each
    where it belongs.
    """
    from safetensors.torch import load_file

    reference = hf_model()
    reference.save_pretrained(tmp_path)
    on_disk = load_file(tmp_path / "model.safetensors")
    model = our_model(reference)
    expected = model.state_dict()
    pieces = model.checkpoint_pieces()
    keys = [piece.key for parts in pieces.values() for piece in parts]
    assert sorted(keys) == sorted(on_disk)
    assert pieces.keys() == expected.keys()
    for name, parts in pieces.items():
        rebuilt = torch.full_like(expected[name], float("nan"))
        for piece in parts:
            assert tuple(on_disk[piece.key].shape) == piece.hf_shape
            shape = (1,) * (rebuilt.dim() - len(piece.hf_shape)) + piece.hf_shape
            box = tuple(
                slice(start, start + size) for start, size in zip(piece.start, shape, strict=True)
            )
            rebuilt[box] = on_disk[piece.key].view(shape)
        assert torch.equal(rebuilt, expected[name]), name


def test_initial_values_depend_on_name_and_seed_alone():
    model = our_model(hf_model())
    name, shape = "model.layers.1.mlp.experts.down_proj", (8, 32, 16)
    value = model.initial_value(name, shape, 0)
    torch.manual_seed(7)
    assert torch.equal(value, model.initial_value(name, shape, 0))
    assert not torch.equal(value, model.initial_value(name, shape, 1))
    assert not torch.equal(value, model.initial_value(name.replace("1", "2"), shape, 0))
    assert value.dtype == torch.float32
    assert value.std().item() == pytest.approx(model.config.initializer_range, rel=0.1)
    assert (model.initial_value("model.layers.1.input_layernorm.weight", (32,), 0) == 1).all()
    assert (
        model.initial_value("model.layers.1.mlp.gate.e_score_correction_bias", (8,), 0) == 0
    ).all()
    assert (model.initial_value("model.norm.weight", (32,), 0) == 1).all()
