"""MTP layers against the formulas of DeepSeek-V3's report (arXiv:2412.19437, section 2.2), written
down in float64, and against the MTP model of `transformers`.
"""

import itertools

import pytest
import torch
from torch import nn
from transformers import DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from tests.models.oracle import VOCABULARY, packed, randomise
from tests.tiny import tiny_config
from torchsft.config import InputError, Model, Train
from torchsft.models.families import build_model
from torchsft.models.language_model import trained_mtp_layers
from torchsft.parallel.activation import apply_activation_checkpointing

LAYERS, FACTOR = 3, 0.3
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


class Reference(nn.Module):
    """The decoder layers of `transformers`, of which the last ones are those of the MTP modules, in
    float64 (its router computes in fp32); all else is written by hand.
    """

    def __init__(self, modules: int, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"vocab_size": VOCABULARY, "num_nextn_predict_layers": modules}
        sizes["tie_word_embeddings"] = tied
        config = tiny_config(**sizes, num_hidden_layers=LAYERS + modules)
        hf = DeepseekV3ForCausalLM._from_config(config, **EAGER)
        self.model, self.lm_head = hf.model, hf.lm_head
        width = config.hidden_size
        for layer in self.model.layers[LAYERS:]:
            layer.enorm, layer.hnorm = (nn.RMSNorm(width, config.rms_norm_eps) for _ in "12")
            layer.eh_proj = nn.Linear(2 * width, width, bias=False)
            layer.shared_head = nn.Module()
            layer.shared_head.norm = nn.RMSNorm(width, config.rms_norm_eps)
        randomise(self)
        self.double()
        self.config = config

    def transform(self, layer, x):
        """TRM_k of one document."""
        length = x.shape[0]
        rotary = self.model.rotary_emb(x[None], torch.arange(length)[None])
        mask = torch.full((length, length), -torch.inf).double().triu(1)[None, None]
        return layer(x[None], attention_mask=mask, position_embeddings=rotary)[0]

    def logits(self, tokens):
        """Of one document, [depth][position, vocabulary]: the model's, then each module's."""
        length, x = len(tokens), self.model.embed_tokens(tokens)
        for layer in self.model.layers[:LAYERS]:
            x = self.transform(layer, x)
        states = [self.model.norm(x)]
        for k, layer in enumerate(self.model.layers[LAYERS:], start=1):
            if length <= k:
                break
            # h'_i = M_k [RMSNorm(h_i); RMSNorm(Emb(t_{i+k}))], i in 1..T-k, with the columns of M_k
            # in the order of the files: the embedding's first
            joined = torch.stack(
                [
                    layer.eh_proj(
                        torch.cat(
                            [
                                layer.enorm(self.model.embed_tokens(tokens[i + k])),
                                layer.hnorm(states[-1][i]),
                            ]
                        )
                    )
                    for i in range(length - k)
                ]
            )
            states.append(layer.shared_head.norm(self.transform(layer, joined)))
        return [self.lm_head(state) for state in states]


def supervised(inputs):
    """Of each document: tokens, and target -> (token, weight) as the packed labels have it."""
    bounds = inputs["cu_seqlens"].tolist()
    for start, end in itertools.pairwise(bounds):
        targets = {}
        for place in range(start, end - 1):
            label = int(inputs["labels"][place])
            if label != -100:
                targets[place + 1 - start] = label, float(inputs["loss_weights"][place])
        yield inputs["tokens"][start:end], targets


def inputs_of(lengths, padding):
    """Labels are the next tokens of the document."""
    inputs = packed(lengths, padding)
    has_label = inputs["labels"] != -100
    inputs["labels"] = torch.where(has_label, inputs["tokens"].roll(-1), -100)
    last = inputs["cu_seqlens"][1:].long() - 1
    inputs["labels"][last] = -100
    return inputs


def ours(reference, modules, **options):
    """Our model with the weights of a reference."""
    described = reference.config.to_dict() | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_hidden_layers": LAYERS,
        "num_nextn_predict_layers": modules,
    }
    model = build_model(described, mtp="train", **options)
    state = reference.state_dict()
    model.load_state_dict({name: state[name].float() for name in model.state_dict()})
    return model


@pytest.mark.parametrize(
    ("modules", "mode", "tied"),
    [(1, "none", False), (2, "full", False), (2, "stream", False), (2, "none", True)],
)
def test_losses_and_gradients_are_those_of_the_report(modules, mode, tied):
    """Documents packed, one of a single token, one of two, with padding: no prediction crosses a
    boundary; embedding and head are shared.
    """
    reference = Reference(modules, tied)
    inputs = inputs_of([9, 1, 2, 40, 30], padding=7)
    main, further, expected_load = 0.0, 0.0, 0
    for tokens, targets in supervised(inputs):
        for depth, logits in enumerate(reference.logits(tokens)):
            log_probs = logits.log_softmax(-1)
            for target, (token, weight) in targets.items():
                if target > depth:
                    nll = -log_probs[target - depth - 1, token] * weight
                    main, further = (main + nll, further) if depth == 0 else (main, further + nll)
        expected_load += 3 * sum(max(len(tokens) - k, 0) for k in range(1, modules + 1))
    divisor = float((inputs["loss_weights"] * (inputs["labels"] != -100)).sum())
    ((main + FACTOR / modules * further) / divisor).backward()

    model = ours(reference, modules, loss_chunk=20)
    model.mtp_scale = FACTOR / (modules * divisor)
    options = Train(activation_checkpointing=mode)
    apply_activation_checkpointing(model, options, torch.device("cpu"))
    loss = model(**inputs)
    (loss / divisor).backward()
    assert loss.item() == pytest.approx(main.item(), rel=1e-5)  # reported apart
    assert model.mtp_loss.item() == pytest.approx(further.item(), rel=1e-5)
    expected = {name: p.grad for name, p in reference.named_parameters()}
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():
        error = (gradients[name] - value).abs().max() / value.abs().max()
        assert error <= 1e-4, (name, error)
    # Positions whose next token is another document's are routed nowhere.
    loads = {int(name): int(moe.expert_load.sum()) for name, moe in model.moe_layers().items()}
    assert sum(load for layer, load in loads.items() if layer >= LAYERS) == expected_load


def test_accepted_drafts_are_those_that_the_model_itself_would_choose():
    """A share by hand: what the module says of i + 2 from the true tokens up to i + 1."""
    reference = Reference(1)
    inputs = inputs_of([9, 1, 2, 40, 30], padding=7)
    accepted = drafted = 0
    with torch.no_grad():
        # a head that prefers few tokens, so that some drafts are accepted
        reference.lm_head.weight[3] *= 6
        for tokens, targets in supervised(inputs):
            main, *further = (logits.argmax(-1) for logits in reference.logits(tokens))
            for target, (_, weight) in targets.items():
                if weight and target >= 2:
                    drafted += 1
                    accepted += int(further[0][target - 2] == main[target - 1])
        model = ours(reference, 1, loss_chunk=20).eval()
        model(**inputs)
    assert 0 < accepted < drafted
    assert model.mtp_drafts.tolist() == [accepted, drafted]
    assert model.mtp_loss == 0 and all(not m.expert_load.any() for m in model.moe_layers().values())


def test_drafts_are_those_of_transformers():
    """Its MTP model, as `generate(use_mtp=True)` runs it: the states that it is given are those
    behind the model's last norm.
    """
    reference = Reference(1)
    tokens = inputs_of([30], padding=0)["tokens"]
    config = tiny_config(vocab_size=VOCABULARY, num_nextn_predict_layers=1)
    main = DeepseekV3ForCausalLM._from_config(config, **EAGER).double()
    state = reference.state_dict()
    mine = {name: t for name, t in state.items() if f"layers.{LAYERS}." not in name}
    main.load_state_dict(mine)
    mtp = MtpModel(main, 1).double()
    names = {
        **{f"{part}.weight": f"layers.0.{part}.weight" for part in ("enorm", "hnorm", "eh_proj")},
        "shared_head.norm.weight": "layers.0.post_norm.weight",
    }
    prefix = f"model.layers.{LAYERS}."
    parts = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    parts = {names.get(name, f"layers.0.mtp_block.{name}"): t for name, t in parts.items()}
    _, unexpected = mtp.load_state_dict(parts, strict=False)
    assert not unexpected
    with torch.no_grad():
        out = main(tokens[None], output_hidden_states=True, use_cache=False)
        chosen = out.logits[0, -1].argmax()
        positions = torch.arange(1, 31)[None]
        _, logits, _ = mtp(
            torch.cat([tokens[1:], chosen[None]])[None],
            out.hidden_states[-1],
            attention_mask=None,
            position_ids=positions,
            mtp_cache=None,
        )
        expected = reference.logits(torch.cat([tokens, chosen[None]]))[1][-1]
    torch.testing.assert_close(logits[0, 0], expected, rtol=0, atol=1e-5)


def test_what_cannot_be_trained_is_refused():
    described = tiny_config(num_nextn_predict_layers=0).to_dict()
    config = build_model(described | {"architectures": None}).config
    with pytest.raises(InputError, match=r"config\.json has 0 layers for multi-token prediction"):
        trained_mtp_layers("train", config)
    trained_mtp_layers("drop", config)
    described["num_nextn_predict_layers"] = 1
    config = build_model(described | {"architectures": None}).config
    trained_mtp_layers("train", config)
    with pytest.raises(InputError, match=r"mtp-weight is 0\.3, but --model\.mtp is keep; set"):
        Model(mtp_weight=0.3)
